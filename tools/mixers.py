"""Draws the mixers of the site from trained weights and writes them into their pages: `python tools/mixers.py [NAME …]`.

One row of `MIXERS` for each: weights (`shipped` by name, or any folder), two pictures, options of `web_mixer`, pages. The sprite goes to
nbs/images/mixers/NAME.webp, the element into the page's cell `mixer-page`, which is made below `after` where it is missing. With better
weights, run it again.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from decomp_nb import Decomposer, Scenes, load_decomposer, shipped, web_mixer
from decomp_nb.data.shapes3d import Shapes3D

ROOT = Path(__file__).resolve().parents[1]
CELL = "mixer-page"


class Recipe(NamedTuple):
    "How a mixer is made, and where it is shown"
    weights: str  # shipped weights by name, or a folder
    pictures: Callable[[], torch.Tensor]  # two of them
    options: Callable[[Decomposer], dict]  # of `web_mixer`
    pages: dict[str, str]  # page → id of the cell above
    words: str  # above the mixer
    alt: str


def scenes(world: str, side: int, numbers: list[int]) -> Callable[[], torch.Tensor]:
    return lambda: Scenes(world, 64, split="val", size=side).batch(numbers)["image"]


def rooms(numbers: list[int]) -> Callable[[], torch.Tensor]:
    return lambda: Shapes3D(size=32, split="val", n=1500, seed=0).batch(numbers)["image"]


@torch.no_grad()
def names_by_truth(model: Decomposer, least: float = 0.2) -> list[str]:
    "What each factor of a model of Shapes3D carries: the attribute that explains the largest share of its variance"
    data = Shapes3D(size=32, split="val", n=1500, seed=0)
    codes = torch.cat([model.encode(data.batch(range(i, i + 100))["image"]).codes for i in range(0, 1500, 100)])
    total = codes.var(0, unbiased=False).sum(-1)
    explained = {}
    for j, name in enumerate(data.grid.names):
        values = torch.as_tensor(data.factors[:, j])
        within = sum(codes[values == v].var(0, unbiased=False).sum(-1) * (values == v).float().mean() for v in values.unique())
        explained[name.replace("_", " ")] = 1 - within / total
    best = [max(explained, key=lambda name: explained[name][k].item()) for k in range(model.n_factors)]
    return [name if explained[name][k] >= least else "hardly anything" for k, name in enumerate(best)]


MIXERS = {
    "decomp_diffusion_toy_squares": Recipe(
        "decomp_diffusion_toy_squares", scenes("toy_squares", 32, [2, 4]),
        lambda model: {"steps": 25, "crisp": True, "names": [f"component {k + 1}" for k in range(model.n_factors)]},
        {"index": "mixer-why", "methods/decomp_diffusion": "play-swap"},
        "Two pictures of squares, three components each, found by [Decomp Diffusion](../methods/decomp_diffusion.ipynb) without labels.",
        "two pictures of coloured squares, and the eight pictures that their components make together"),
    "lsd_shapes": Recipe(
        "lsd_shapes", scenes("shapes", 64, [4, 6]), lambda model: {"steps": 20, "n_each": 4},
        {"methods/lsd": "mixer-why"},
        "Objects of two scenes, found by LSD without labels; every mixture is drawn by the denoiser from the slots alone.",
        "two scenes of coloured shapes, and all pictures that their objects make together"),
    "slot_attention_shapes": Recipe(
        "slot_attention_shapes", scenes("shapes", 64, [34, 22]), lambda model: {"n_each": 3, "limit": 120_000},
        {"methods/slot_attention_ae": "mixer-why"},
        "Objects of two scenes, the largest first. The background is the first picture's and always stays; "
        "every mixture is one pass of the decoder.",
        "two scenes of coloured shapes, and the 64 pictures that three objects of each make together, drawn by Slot Attention"),
    "slate_shapes": Recipe(
        "slate_shapes", scenes("shapes", 64, [34, 21]), lambda model: {"n_each": 3, "limit": 120_000},
        {"methods/slate": "mixer-why"},
        "Objects of two scenes, the largest first. The background is the first picture's and always stays; "
        "every mixture is written anew, likeliest token by token.",
        "two scenes of coloured shapes, and the 64 pictures that three objects of each make together, drawn by SLATE"),
    "slot_diffusion_textured": Recipe(
        "slot_diffusion_textured", scenes("textured_shapes", 64, [25, 14]),
        lambda model: {"steps": 20, "merge_ground": True, "min_area": 0.02},
        {"methods/slot_diffusion": "mixer-why"},
        "Objects of two scenes, the largest first. A ground with a pattern lies in several slots, which move together: "
        "the last button takes the ground of the second picture.",
        "two scenes of coloured shapes on patterned grounds, and the 128 pictures that their objects and either ground make together"),
    "disdiff_shapes3d": Recipe(
        "disdiff_shapes3d", rooms([17, 141]),
        lambda model: {"steps": 20, "names": names_by_truth(model)},
        {"methods/disdiff": "hero"},
        "Two pictures of Shapes3D and the eight factors of a trained DisDiff: each button takes one from the second picture.",
        "two rooms of Shapes3D, and all pictures that their attributes make together"),
}


def make(name: str, recipe: Recipe):
    "The mixer of a recipe"
    weights = recipe.weights if Path(recipe.weights).is_dir() else shipped(recipe.weights)
    model = load_decomposer(weights).eval()
    return web_mixer(model, recipe.pictures(), alt=recipe.alt, **recipe.options(model))


def relative(page: str, target: str) -> str:
    return "../" * page.count("/") + target


def show_on(page: str, after: str, name: str, recipe: Recipe, mixer) -> None:
    "The element in the page's cell"
    path = ROOT / "nbs" / f"{page}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    words = recipe.words.replace("../", relative(page, ""))
    html = mixer.markup(relative(page, f"images/mixers/{name}.webp"), relative(page, "mixer.js"))
    cells = notebook["cells"]
    cell = next((c for c in cells if c["id"] == CELL), None)
    if cell is None:
        at = next(i for i, c in enumerate(cells) if c["id"] == after) + 1
        cell = {"cell_type": "markdown", "id": CELL, "metadata": {}}
        cells.insert(at, cell)
    cell["source"] = f"{words}\n\n{html}".splitlines(True)
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which; by default all of {', '.join(MIXERS)}")
    for name in parser.parse_args().names or MIXERS:
        start = time.monotonic()
        mixer = make(name, MIXERS[name])
        mixer.save(ROOT / "nbs" / "images" / "mixers" / f"{name}.webp")
        for page, after in MIXERS[name].pages.items():
            show_on(page, after, name, MIXERS[name], mixer)
        print(f"{name}: {len(mixer.buttons.sets)} pictures, {len(mixer.sprite) // 1000} kB, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
