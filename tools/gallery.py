"""The cards of the home page: `python tools/gallery.py` cuts their pictures out of what the methods' pages show, and writes the cell.

Nothing is computed: pictures are the outputs that lie in the notebooks, so run it after a page was run again. Pictures go to
nbs/images/gallery/, the cards into the cell `gallery` of nbs/index.ipynb.
"""
from __future__ import annotations

import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

from hygiene import badge_url
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = (300, 170)  # pixels of a card's picture
ACROSS = 3


class Card(NamedTuple):
    "A method: its page, the picture, and what to say"
    page: str
    title: str
    line: str
    weights: str  # shipped weights, or where they come from
    cell: str = ""  # whose picture is shown
    box: tuple[float, float, float, float] = (0, 0, 1, 1)  # left, top, right, bottom, as shares of the picture
    alt: str = ""  # what the picture shows, for those who do not see it


CARDS = [
    Card("methods/lsd", "LSD", "Objects as slots with masks, read by a latent diffusion model.", "lsd_shapes",
         "hero", (0.01, 0.128, 0.306, 0.701),
         "Two scenes of coloured shapes, each beside its reconstruction and its segmentation into objects"),
    Card("methods/decomp_diffusion", "Decomp Diffusion", "A few short vectors, each of which draws a picture by itself.",
         "decomp_diffusion_toy_squares", "hero", (0.133, 0.061, 0.702, 0.613),
         "Pictures of three coloured squares; below them, one component draws the red square alone, another the blue one"),
    Card("methods/disdiff", "DisDiff", "Attributes (hue, size, angle) as fields inside a frozen diffusion model.",
         "disdiff_shapes3d", "traverse", (0.145, 0.052, 0.986, 0.452),
         "A room drawn seven times in a row: the hue of the object changes, below that of the wall, then that of the floor"),
    Card("methods/concepts", "Concepts", "New words for a text-to-image model, found in unlabelled pictures.",
         "text_to_image", "trained-use", (0.1703, 0.0205, 0.8523, 0.741),
         "A discovered word drawn five times as a blue shape, then in sketch style, then on white"),
    Card("methods/slot_diffusion", "SlotDiffusion", "Slots with a latent diffusion model, published over a learned codebook.",
         "slot_diffusion_textured (without codebook)", "hero", (0.011, 0.072, 0.5, 0.316),
         "A textured scene, the picture drawn from its slots, and its segmentation into objects and ground"),
    Card("methods/savi", "SAVi", "Slots that follow their objects through a clip.",
         "savi_moving_textured", "patterned-film",
         alt="A film of patterned objects: a frame, the slots that follow the objects, and the frame drawn from them"),
    Card("methods/slot_attention_ae", "Slot Attention", "The baseline: slots compete for pixels, each is decoded to a layer.",
         "slot_attention_shapes", "hero", (0.015, 0.44, 0.306, 0.96),
         "Scenes of coloured shapes beside their reconstruction and their segmentation into objects"),
    Card("methods/slate", "SLATE", "A transformer draws the picture token by token from its slots.",
         "slate_shapes", "hero", (0.015, 0.345, 0.306, 0.765),
         "Scenes of coloured shapes beside the pictures that the transformer draws and their segmentation"),
    Card("methods/steve", "STEVE", "SLATE for clips, with slots that stay with their objects.",
         "steve_moving_textured", "learned-picture", (0.25, 0.095, 0.978, 0.527),
         "Five frames of a film of patterned objects, and the slots that stay with them"),
    Card("methods/slot_former", "SlotFormer", "Slots of the next frames, rolled out from those that were seen.",
         "slot_former_billiards", "billiards-strip", (0.02, 0.06, 0.985, 0.945),
         "Billiards 1 to 20 frames after the last frame that was seen: above the truth, below what SlotFormer predicts"),
    Card("methods/encdiff", "EncDiff", "Every factor is a token that the denoiser reads by cross-attention.",
         "recipe disdiff_shapes3d_tokens", "hero", (0.135, 0.07, 0.7, 0.372),
         "Rooms in two rows: along the first only the hue of the object goes in steps, along the second that of the wall"),
    Card("methods/stable_lsd", "Stable-LSD", "Slots in place of the words of a frozen Stable Diffusion.",
         "needs Stable Diffusion and a GPU", "idea-picture", (0, 0.09, 1, 1),
         "A sketch: the objects of a scene in boxes where the words of a prompt stood, above a frozen Stable Diffusion"),
]


def picture_of(card: Card) -> Image.Image | None:
    "The part of a page's picture that a card shows"
    if not card.cell:
        return None
    notebook = json.loads((ROOT / "nbs" / f"{card.page}.ipynb").read_text(encoding="utf-8"))
    cell = next((c for c in notebook["cells"] if c["id"] == card.cell), None)
    if cell is None:
        raise ValueError(f"nbs/{card.page}.ipynb has no cell {card.cell!r}: name another one in tools/gallery.py")
    data = next((o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})), None)
    if data is None:
        raise ValueError(f"nbs/{card.page}.ipynb, cell {card.cell!r}, shows no picture: run the page, or name another cell")
    image = Image.open(io.BytesIO(base64.b64decode("".join(data)))).convert("RGB")
    (w, h), (left, top, right, bottom) = image.size, card.box
    return image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))


def framed(image: Image.Image) -> Image.Image:
    "In the size of a card, on its paper, drawn for screens of two pixels to one"
    sheet = Image.new("RGB", (2 * SIZE[0], 2 * SIZE[1]), image.getpixel((1, 1)))
    scale = min(sheet.width / image.width, sheet.height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    sheet.paste(image, ((sheet.width - image.width) // 2, (sheet.height - image.height) // 2))
    return sheet


def card_html(card: Card) -> str:
    "A cell of the table: picture, name, line, weights, Colab"
    name = Path(card.page).name
    alt = html.escape(f"{card.title}: {card.alt}")
    shown = f'<img src="images/gallery/{name}.webp" width="{SIZE[0]}" alt="{alt}"><br>' if card.cell else ""
    return (f'<td valign="top"><a href="{card.page}.ipynb">{shown}<b>{card.title}</b></a><br>{html.escape(card.line)}<br>'
            f'<small>weights: {card.weights} · <a href="{badge_url(card.page)}">Colab</a></small></td>')


def cards() -> str:
    "All cards as a table, which GitHub shows as well"
    rows = [CARDS[i:i + ACROSS] for i in range(0, len(CARDS), ACROSS)]
    lines = ["<tr>\n" + "\n".join(map(card_html, row)) + "\n</tr>" for row in rows]
    return '<table class="gallery">\n' + "\n".join(lines) + "\n</table>"


def main() -> int:
    folder = ROOT / "nbs" / "images" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for card in CARDS:
        if (image := picture_of(card)) is not None:
            framed(image).save(folder / f"{Path(card.page).name}.webp", quality=85, method=6)
    path = ROOT / "nbs" / "index.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if c["id"] == "gallery")
    cell["source"] = ("## Methods\n\n" + cards()).splitlines(True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(CARDS)} cards, {sum(p.stat().st_size for p in folder.iterdir()) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
