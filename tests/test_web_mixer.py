"The mixer without a kernel: every mixture is the one that its buttons name, and the desk works in a browser with mouse, keys and fingers."
import io
import json
import re
import subprocess

import chromium
import numpy as np
import pytest
import torch
from decomp_nb.factors import Factors
from decomp_nb.viz.web_mixer import ground_factors, mixer_script, web_mixer
from PIL import Image

TOUCH = """
<script>
const desk = document.querySelector("decomp-mixer"), said = {};
function look(name) {
  const c = desk.screen.getContext("2d").getImageData(300, 300, 1, 1).data;
  said[name] = {pressed: desk.pressed, colour: [c[0], c[1], c[2]], label: desk.screen.getAttribute("aria-label"),
                aria: desk.buttons.map(b => b.getAttribute("aria-pressed")), focus: desk.buttons.indexOf(desk.shadowRoot.activeElement)};
}
function key(name) { desk.shadowRoot.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true, composed: true})); }
function press() {
  look("start");
  desk.buttons[1].click(); look("second");
  desk.buttons[0].click(); look("both");
  desk.buttons[1].focus(); key("ArrowRight"); look("right"); key("ArrowRight"); look("round"); key("ArrowLeft"); look("left");
  desk.shadowRoot.querySelector(".reset").click(); look("reset");
  const play = desk.shadowRoot.querySelector(".play");
  play.click(); said.played = desk.timer > 0 && play.textContent === "Stop"; desk.buttons[0].click(); said.stopped = !desk.timer;
  said.named = [...desk.shadowRoot.querySelectorAll("canvas[role=img]")].every(c => c.getAttribute("aria-label"));
  said.tall = desk.buttons.every(b => b.getBoundingClientRect().height >= 44);
  said.wide = document.documentElement.scrollWidth <= window.innerWidth;
  said.hidden = desk.querySelector("img").hidden && Boolean(desk.querySelector("img").alt);
  document.body.setAttribute("data-said", JSON.stringify(said));
}
window.onerror = (words, _, line) => document.body.setAttribute("data-error", `${words}, line ${line}`);
if (desk.ready) press(); else desk.addEventListener("ready", press);
</script>"""


class Greys:
    "Three numbers; a picture is 100 · first + 50 · second + 25 · third, as a level of grey"
    def encode(self, images):
        return Factors(torch.tensor([[[0.0], [0.0], [0.0]], [[1.0], [1.0], [1.0]]]))

    def decode(self, factors, *, steps=1, guidance_scale=1.0, generator=None):
        level = factors.codes[..., 0] @ torch.tensor([100.0, 50.0, 25.0])
        return (level / 127.5 - 1)[:, None, None, None].expand(-1, 3, 16, 16)


@pytest.fixture(scope="module")
def desk():
    return web_mixer(Greys(), torch.zeros(2, 3, 16, 16), names=["light", "half", "quarter"], alt="greys")


def levels(desk) -> list[int]:
    "Grey of each tile of a sprite"
    pixels = np.asarray(Image.open(io.BytesIO(desk.sprite)).convert("L"))
    n = 2 + len(desk.buttons.labels) + len(desk.buttons.sets)
    return [int(pixels[i // desk.columns * 16 + 8, i % desk.columns * 16 + 8]) for i in range(n)]


def test_every_tile_is_the_mixture_of_its_number(desk):
    found = levels(desk)[5:]
    expected = [100 * (i & 1) + 50 * (i >> 1 & 1) + 25 * (i >> 2 & 1) for i in range(8)]
    assert np.abs(np.subtract(found, expected)).max() <= 2, found
    assert levels(desk)[2:5] == [found[1], found[2], found[4]], "thumbnails show what their button brings"


def test_a_sprite_keeps_its_limit():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Noise(Greys):
        def decode(self, factors, **options):
            return noise[:1].expand(len(factors.codes), -1, -1, -1)
    assert len(web_mixer(Noise(), noise, limit=30_000).sprite) <= 30_000
    with pytest.raises(ValueError, match="smaller `side`"):
        web_mixer(Noise(), noise, limit=1_000)


class Layers(Greys):
    "Masks of four factors: the upper and the lower half are ground, then two objects that touch one edge and none"
    def encode(self, images):
        owner = torch.zeros(2, 16, 16, dtype=torch.long)
        owner[:, 8:] = 1
        owner[:, 4:9, :5] = 2
        owner[:, 10:14, 8:12] = 3
        masks = torch.nn.functional.one_hot(owner, 4).movedim(-1, 1).float()
        return Factors(torch.arange(8.0).reshape(2, 4, 1) * torch.ones(3), masks=masks)

    def decode(self, factors, **options):
        return factors.codes[..., 0].sum(1)[:, None, None, None].expand(-1, 3, 16, 16) / 30 - 1


def test_a_ground_in_pieces_moves_as_one():
    images = torch.linspace(-1, 1, 2)[:, None, None, None].expand(2, 3, 16, 16)
    assert ground_factors(Layers().encode(images)) == [[0, 1], [0, 1]]
    mixer = web_mixer(Layers(), images, merge_ground=True)
    assert mixer.buttons.labels == ["object 1", "object 2", "object 1", "object 2", "ground"]
    assert mixer.buttons.groups == [("first picture", 2), ("second picture", 3)]
    assert mixer.buttons.sets[0b00011] == [0, 1, 2, 3], "the first picture"
    assert mixer.buttons.sets[0b11100] == [4, 5, 6, 7], "the second one"
    assert mixer.buttons.sets[0b10001] == [4, 5, 2], "an object of the first on the ground of the second"
    ground = np.asarray(Image.open(io.BytesIO(mixer.sprite)).convert("L"))[:16, 6 * 16:7 * 16]
    assert ground[0, 0] > 250 and ground[15, 15] > 250 and ground[6, 1] < 245, "its thumbnail shows all pieces, and a hole for the object"


def test_pictures_come_in_pairs():
    with pytest.raises(ValueError, match="two pictures"):
        web_mixer(Greys(), torch.zeros(3, 3, 16, 16))


def test_nothing_is_fetched(desk):
    assert not re.search(r"https?://|import\(|fetch\(|XMLHttpRequest", mixer_script())


@pytest.fixture(scope="module")
def pressed(desk, tmp_path_factory):
    "What the desk says of itself after it was pressed in a browser"
    if chromium.find() is None:
        pytest.skip(chromium.ABSENT)
    folder = tmp_path_factory.mktemp("page")
    desk.save(folder / "desk.webp")
    (folder / "mixer.js").write_text(mixer_script(), encoding="utf-8")
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = desk.markup("desk.webp", "mixer.js") + TOUCH
    (folder / "desk.html").write_text(f"{head}<body>{body}</body>", encoding="utf-8")
    try:
        shown = chromium.dump(folder / "desk.html")
    except (subprocess.SubprocessError, OSError) as problem:
        pytest.skip(f"Chromium does not run here: {problem}")
    said = re.search(r'data-said="([^"]+)"', shown)
    assert said, re.findall(r'data-error="([^"]+)"', shown) or shown[-2000:]
    return json.loads(said[1].replace("&quot;", '"'))


def test_a_click_shows_the_mixture(pressed):
    assert [pressed[name]["pressed"] for name in ("start", "second", "both", "reset")] == [0, 2, 3, 0]
    greys = [pressed[name]["colour"][0] for name in ("start", "second", "both", "reset")]
    assert np.abs(np.subtract(greys, [0, 50, 150, 0])).max() <= 3, greys


def test_buttons_say_what_they_are(pressed):
    assert pressed["both"]["aria"] == ["true", "true", "false"]
    assert pressed["start"]["label"] == "from the second picture: nothing"
    assert pressed["both"]["label"] == "from the second picture: light, half"
    assert pressed["named"] and pressed["hidden"] and pressed["tall"] and pressed["wide"]


def test_arrows_move_between_buttons(pressed):
    assert [pressed[name]["focus"] for name in ("right", "round", "left")] == [2, 0, 2]


def test_it_plays_and_stops(pressed):
    assert pressed["played"] and pressed["stopped"]
