"""Pictures and the mixer: pixels where they belong, widths that fit the page, buttons that do what they say, errors that help."""
import io
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

from decomp_nb.decomposer import Decomposer
from decomp_nb.factors import Factors, to_uint8
from decomp_nb.viz.colours import PAPER, palette
from decomp_nb.viz.figures import (
    Picture,
    film,
    grid,
    masked,
    matrix,
    overlay,
    paint,
    save_picture,
    show,
    slots,
    strip,
)
from decomp_nb.viz.mixer import FactorMix, Mixer, board, factor_pictures, mixer, mixer_board
from decomp_nb.viz.plots import bars, curve, heat

PAGE = 1520  # output pixels: two to a nominal pixel


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pixels(picture):
    return np.asarray(picture.image)


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def contains(picture, tile, scale):
    "Does the enlarged tile occur in the picture, pixel for pixel?"
    page, tile = pixels(picture).astype(int), np.kron(np.asarray(tile), np.ones((scale, scale, 1), dtype=int))
    h, w = tile.shape[:2]
    starts = np.argwhere((page[:page.shape[0] - h + 1, :page.shape[1] - w + 1] == tile[0, 0]).all(-1))
    return any((page[y:y + h, x:x + w] == tile).all() for y, x in starts)


# ---------------------------------------------------------------------------------------------------------------- pictures

def test_plots_and_widgets_are_imported_only_when_used():
    code = ("import sys, decomp_nb.viz.figures, decomp_nb.viz.plots, decomp_nb.viz.mixer; "
            "print([m for m in ('matplotlib', 'ipywidgets', 'IPython') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_old_module_works_and_names_the_new_ones():
    code = ("import warnings; warnings.simplefilter('always', DeprecationWarning)\n"
            "with warnings.catch_warnings(record=True) as said:\n"
            "    from decomp_nb.viz.pictures import Film, Picture, bars, show\n"
            "print(*{str(w.message) for w in said}, sep='; ')\n"
            "import decomp_nb.viz.figures as new; print(show is new.show and issubclass(Film, Picture))")
    said, same, _ = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert all(f"decomp_nb.viz.{new}" in said for new in ("figures.show", "plots.bars", "sheets.Picture")) and same == "True"


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_every_pixel_becomes_a_square(scale):
    images = noise(2, 3, 8, 10)
    picture = show(images, scale=scale)
    for tile in to_uint8(images).numpy():
        assert contains(picture, tile, scale)
    assert np.array_equal(decoded(picture._repr_png_()), pixels(picture))


@pytest.mark.parametrize("n,size", [(1, 16), (3, 32), (7, 32), (13, 64), (24, 128), (9, 17), (5, 256), (2, 400)])
def test_figures_fit_the_page(n, size):
    images, soft = noise(n, 3, size, size), torch.softmax(noise(n, 6, 8, 8) * 4, 1)
    assert show(images, [f"title {i}" for i in range(n)]).size[0] <= PAGE
    assert grid(images).size[0] <= PAGE
    assert overlay(images, soft).size[0] <= PAGE
    assert strip({"input": images, "segmentation": paint(images, soft)}, col_titles=[str(i) for i in range(n)]).size[0] <= PAGE
    assert matrix(images[:3, None].expand(-1, 6, -1, -1, -1), images[:3], [images[0]] * 6).size[0] <= PAGE
    assert slots(images[:2], soft[:2], images[:2]).size[0] <= PAGE
    assert heat(soft[:2], images[:2]).size[0] <= PAGE


@pytest.mark.parametrize("k", [1, 5, 11, 24])
def test_slots_shows_every_factor_once(k):
    images = noise(1, 3, 32, 32)
    parts = noise(1, k, 3, 32, 32, seed=k)
    picture = slots(images, torch.softmax(noise(1, k, 16, 16), 1), parts=parts, scale=2)
    assert picture.size[0] <= PAGE
    assert all(contains(picture, tile, 2) for tile in [*to_uint8(parts[0]).numpy(), *to_uint8(images).numpy()])


def test_pictures_are_deterministic():
    images, soft = noise(4, 3, 16, 16), torch.softmax(noise(4, 3, 8, 8), 1)
    for draw in (lambda: show(images, list("abcd")), lambda: slots(images, soft), lambda: heat(soft), lambda: film(images),
                 lambda: curve({"a": [3, 2, 1], "b": [1, 2, 3]}), lambda: bars({"a": 1.0, "b": (2.0, 0.1)})):
        assert draw()._repr_png_() == draw()._repr_png_()


def test_saved_pngs_carry_their_alt_text_and_notebooks_their_nominal_size(tmp_path):
    picture = show(noise(2, 3, 16, 16), alt="two σ-scenes")
    with Image.open(picture.save(tmp_path / "new" / "a.png")) as saved:
        assert saved.info["Description"] == "two σ-scenes" and saved.size == picture.size
    data, metadata = picture._repr_mimebundle_()
    assert metadata["image/png"] == {"width": picture.size[0] // 2, "height": round(picture.size[1] / 2)}
    assert "two σ-scenes" in data["text/plain"]
    for name in ("a.jpg", "a.webp"):
        with Image.open(save_picture(noise(2, 3, 16, 16), tmp_path / name)) as saved:
            assert saved.size == picture.size


def test_neighbours_share_a_margin_and_keep_their_frames():
    a, b = (show(noise(1, 3, 16, 16, seed=s), scale=4) for s in (1, 2))
    assert (a + b).size == (2 * a.size[0] - 28, a.size[1]) and (a / b).size == (a.size[0], 2 * a.size[1] - 28)
    sources = noise(2, 3, 16, 16)
    framed = matrix(noise(1, 2, 3, 16, 16), sources[:1], sources)
    alone = (pixels(framed) == palette(2)[1].numpy()).all(-1).sum()
    for joined in (framed + a, a + framed, framed / a, a / framed):
        assert (pixels(joined) == palette(2)[1].numpy()).all(-1).sum() == alone


def test_factor_colours_do_not_depend_on_the_number_of_factors():
    images = noise(1, 3, 4, 4)
    for k in (3, 9, 20):
        labels = torch.full((1, 4, 4), 2)
        labels[0, 0, 0] = k - 1
        flat = to_uint8(paint(images, labels, alpha=1, contours=False))[0]
        assert torch.equal(flat[1, 1], palette(12)[2]) and torch.equal(flat[0, 0], palette(k)[k - 1])


def test_soft_masks_are_resized_before_the_argmax():
    images, soft = noise(2, 3, 32, 32), torch.softmax(noise(2, 4, 8, 8) * 5, 1)
    labels = F.interpolate(soft, (32, 32), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(paint(images, soft, alpha=1), palette(4)[labels].movedim(-1, 1) / 127.5 - 1)
    assert not torch.equal(labels, F.interpolate(soft.argmax(1)[:, None].float(), (32, 32))[:, 0].long())
    torch.testing.assert_close(paint(images, labels), paint(images, soft))


def test_contours_lie_on_the_borders_only():
    images, labels = noise(1, 3, 8, 8).clamp(-0.9, 0.9), torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = 1
    white = (paint(images, labels, alpha=0.3, scale=4) == 1).all(1)[0]
    assert white[:, 15:17].all() and white.sum() == 2 * 32
    assert not (paint(images, labels, alpha=0.3, scale=4, contours=False) == 1).all(1).any()


def test_masked_parts_add_up_to_the_image():
    images, soft = noise(2, 3, 16, 16), torch.softmax(noise(2, 3, 16, 16), 1)
    ground = torch.tensor([233.0, 233, 230]).view(3, 1, 1) / 127.5 - 1
    total = (masked(images, soft) - ground).sum(1) + ground
    torch.testing.assert_close(total, to_uint8(images).movedim(-1, 1) / 127.5 - 1, atol=1e-4, rtol=0)


def test_film_keeps_every_frame(tmp_path):
    frames = noise(2, 5, 3, 8, 8)
    moving = film(frames, fps=10, titles=["a", "b"])
    with Image.open(io.BytesIO(moving._repr_png_())) as played:
        assert played.n_frames == 5 and played.info["loop"] == 0 and played.info["duration"] == 100
        for t, page in enumerate(moving.pages):
            played.seek(t)
            assert np.array_equal(np.asarray(played.convert("RGB")), np.asarray(page))
    with Image.open(moving.save(tmp_path / "a.gif")) as played:
        assert played.n_frames == 5
    with Image.open(io.BytesIO(film(frames, fps=10, hold=2)._repr_png_())) as played:
        played.seek(4)
        assert played.info["duration"] == 2100, "the result of a sampler can be looked at"
    with Image.open(moving.save(tmp_path / "a.webp")) as played:
        assert played.n_frames == 5
    assert contains(moving.strip(3), to_uint8(frames[1, 2])[0].numpy(), 32)


def test_long_titles_are_wrapped():
    pictures = [bars({"a": 1.0}, title="words " * 15), curve({"a": [0, 1]}, title="words " * 15)]
    assert all((np.asarray(picture.image)[:, -16:] == np.array(PAPER)).all() for picture in pictures)
    assert pictures[0].size[1] > bars({"a": 1.0}, title="words").size[1]


def test_curve_smooths_without_bias_and_takes_tensors():
    from decomp_nb.viz.plots import _running_mean, _spread
    assert np.allclose(_running_mean(np.array([4.0, 4.0, 4.0]), 0.99), 4)
    assert np.allclose(_running_mean(np.array([1.0, 3.0]), 0.5), [1, 7 / 3])
    assert curve({"a": (torch.arange(3), torch.rand(3), torch.rand(3))}, log="x", title="t", y_label="y").size == (760, 500)
    names = _spread(np.array([0.0, 0.1, 0.2, 9.0]), 1, 0, 10)
    assert (np.diff(names) > 0.99).all() and names[0] >= -1e-9 and abs(names[3] - 9) < 1e-9


def test_plots_keep_their_main_colours_exactly():
    picture = curve({"a": (np.arange(9), np.linspace(3, 2, 9), np.full(9, 0.5)), "b": np.linspace(1, 0, 9)}, title="two")
    count = {colour: n for n, colour in picture.image.getcolors(256)}
    assert picture.image.getpixel((0, 0)) == (250, 250, 248) and len(count) <= 64
    assert all(count[tuple(c)] > 400 for c in palette(2).tolist())


def test_a_flat_or_empty_map_can_be_drawn():
    assert isinstance(heat(torch.zeros(1, 2, 4, 4)), Picture)
    assert isinstance(curve({"flat": [1.0, 1.0]}), Picture) and isinstance(curve({"point": [1.0]}), Picture)
    assert isinstance(bars({"zero": 0.0}), Picture)


GOOD = noise(4, 3, 8, 8)
LABELS = torch.zeros(4, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize("call,message", [
    (lambda: show((GOOD + 1) * 127.5), r"images: values reach 25\d"),
    (lambda: show(to_uint8(GOOD)), "channels come first"),
    (lambda: show(to_uint8(GOOD).movedim(-1, 1)), "x/127.5 - 1"),
    (lambda: show(GOOD[:, None]), "a video"),
    (lambda: show(GOOD[:, :2]), r"\(4, 2, 8, 8\)"),
    (lambda: show(GOOD * float("nan")), "NaN"),
    (lambda: show([GOOD, "cat.png"]), r"images\[1\].*str"),
    (lambda: show(GOOD, ["one"]), "titles: 1 for 4"),
    (lambda: show(GOOD, scale=0), "whole number"),
    (lambda: show(GOOD, resample="bicubic"), "'nearest' or 'lanczos'"),
    (lambda: paint(GOOD, LABELS, alpha=2), "alpha"),
    (lambda: paint(GOOD, LABELS - 1), "labels start at 0"),
    (lambda: paint(GOOD, LABELS[:2]), "2 for 4"),
    (lambda: paint(GOOD, LABELS.float()), "1 for 4"),
    (lambda: paint(GOOD, LABELS[:, None]), r"\(b,k,h,w\)"),
    (lambda: paint([GOOD[0], noise(3, 9, 9)], LABELS[:2]), "one size"),
    (lambda: slots(GOOD, torch.rand(4, 2, 8, 8), parts=GOOD), r"parts: expected \(4,k,3,h,w\)"),
    (lambda: strip({"a": GOOD}, col_titles=["x"]), "col_titles: 1 for 4"),
    (lambda: matrix(GOOD[None], GOOD[:2], GOOD), r"\(2,4,3,h,w\)"),
    (lambda: film(GOOD, fps=0), "fps"),
    (lambda: film(GOOD[0]), r"\(t,3,h,w\)"),
    (lambda: curve({}), "nothing"),
    (lambda: curve({"a": ([1, 2], [1])}), "'a'"),
    (lambda: curve({"a": [1]}, smooth=1), "smooth"),
    (lambda: heat(torch.rand(2, 8, 8), GOOD), "2 rows for 4"),
    (lambda: heat(torch.rand(2, 8, 8), colours="no such map"), "no such map"),
    (lambda: heat(torch.rand(8, 8)), r"\(b,h,w\)"),
    (lambda: bars({}), "nothing"),
])
def test_bad_input_is_refused_with_a_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------------- mixer

class Fake:
    "Three factors with constant codes; remembers what it was asked to decode"
    def __init__(self, masks=True, guided=False):
        self.masks, self.calls = masks, []
        if guided:
            self.null_factors = lambda factors: factors

    def encode(self, images):
        codes = torch.arange(len(images) * 3.0).view(len(images), 3, 1) + 0.1 * torch.rand(len(images), 3, 1)
        return Factors(codes, masks=torch.softmax(noise(len(images), 3, 4, 4), 1) if self.masks else None)

    def decode(self, factors, *, steps, guidance_scale, generator):
        self.calls.append((factors, steps, guidance_scale, generator.initial_seed()))
        if factors.n_factors == 3 and (factors.codes < 0.2).any() and guidance_scale > 7:
            raise ValueError("too much guidance")
        return noise(len(factors.codes), 3, 8, 8, seed=int(factors.codes.sum()))


def test_the_first_choice_reconstructs_the_first_picture():
    model = Fake()
    mix = FactorMix(model, noise(2, 3, 8, 8))
    mix.draw()
    assert torch.equal(model.calls[-1][0].codes, mix.factors.codes[:1]) and model.calls[-1][0].weights is None


def test_buttons_choose_what_is_decoded():
    model = Fake()
    widget = mixer(model, noise(2, 3, 8, 8), steps=7, seed=5)
    assert isinstance(widget, Mixer) and not model.calls
    widget.toggles[0][1].value = False
    widget.toggles[1][2].value = True
    assert not model.calls  # nothing is drawn before Draw is pressed
    widget.button.click()
    factors, steps, guidance_scale, seed = model.calls[-1]
    assert torch.equal(factors.codes, widget.factors.rows(0).pick([0, 2]).cat(widget.factors.rows(1).pick(2)).codes)
    assert (steps, guidance_scale, seed) == (7, 1.0, 5)
    assert decoded(widget.screen.value).shape[2] == 3 and widget.status.value == "0: [0, 2], 1: [2]"


def test_live_draws_at_every_change():
    model = Fake()
    widget = mixer(model, noise(2, 3, 8, 8))
    widget.live.value = True
    widget.toggles[1][0].value = True
    widget.steps_slider.value = 9
    widget.seed_box.value = 3
    assert [len(c[0].codes[0]) for c in model.calls] == [4, 4, 4]
    assert model.calls[1][1] == 9 and model.calls[2][3] == 3


def test_weight_sliders_reach_the_factors():
    model = Fake()
    widget = mixer(model, noise(2, 3, 8, 8), weights=True)
    widget.toggles[1][1].value = True
    widget.sliders[1][1].value = 0.5
    widget.button.click()
    torch.testing.assert_close(model.calls[-1][0].weights, torch.tensor([[1, 1, 1, 0.5]]))


def test_thumbnails_show_what_is_chosen():
    widget = mixer(Fake(), noise(1, 3, 8, 8))
    before = widget.thumbnails[0][2].value
    widget.toggles[0][2].value = False
    assert before != widget.thumbnails[0][2].value
    widget.toggles[0][2].value = True
    assert before == widget.thumbnails[0][2].value


def descendants(widget):
    return [widget, *(d for child in getattr(widget, "children", ()) for d in descendants(child))]


@pytest.mark.parametrize("guided", [True, False])
def test_guidance_is_offered_where_the_model_knows_it(guided):
    widget = mixer(Fake(guided=guided), noise(1, 3, 8, 8))
    assert (widget.guidance_slider in descendants(widget.widget)) == guided


def test_problems_are_reported_and_the_last_picture_stays():
    widget = mixer(Fake(guided=True), noise(1, 3, 8, 8))
    widget.button.click()
    shown = widget.screen.value
    for toggle in widget.toggles[0]:
        toggle.value = False
    widget.button.click()
    assert "at least one" in widget.status.value and widget.screen.value == shown and not widget.button.disabled
    for toggle in widget.toggles[0]:
        toggle.value = True
    widget.guidance_slider.value = 8
    widget.button.click()
    assert widget.status.value == "too much guidance" and widget.screen.value == shown


def test_without_masks_each_factor_is_decoded_alone():
    model = Fake(masks=False)
    parts = factor_pictures(FactorMix(model, noise(2, 3, 8, 8)))
    assert parts.shape == (2, 3, 3, 8, 8) and [c[0].n_factors for c in model.calls] == [1, 1, 1]


def test_randomness_belongs_to_the_seed():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = (FactorMix(Fake(), noise(1, 3, 8, 8), seed=s).factors.codes for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.rand(1), expected)


def test_the_board_shows_sources_factors_and_result():
    model, images = Fake(), noise(2, 3, 8, 8)
    picture = mixer_board(model, images, [[0, 2], [1]])
    assert torch.equal(model.calls[-1][0].codes.flatten().floor(), torch.tensor([0.0, 2, 4]))
    assert picture.size[0] <= PAGE + 120 and "source 0: 0, 2; source 1: 1" in picture.alt
    for i, colour in enumerate(palette(3).numpy()):  # each factor is framed once, next to its dot in the heading
        framed = (pixels(picture) == colour).all(-1).sum()
        assert framed > 2000, f"factor {i} is not framed"
    assert picture._repr_png_() == board(FactorMix(Fake(), images, choices=[[0, 2], [1]]))._repr_png_()


class Still(Decomposer):
    "The smallest Decomposer of the library: its denoiser believes that the picture is the mean of the codes"
    scheduler = DDIMScheduler(num_train_timesteps=100, prediction_type="sample", clip_sample=False)
    latent_shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, images):
        return Factors(self.scale.detach() * images.flatten(2).mean(-1)[:, None] + torch.linspace(-0.3, 0.3, 3)[:, None])

    def predict(self, x_t, t, factors):
        return factors.codes.mean(1)[:, :, None, None].expand_as(x_t)


def test_any_decomposer_can_be_mixed():
    images = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    widget = mixer(Still(), images, steps=3)
    widget.toggles[1][0].value = True
    widget.button.click()
    assert widget.guidance_slider not in descendants(widget.widget)
    torch.testing.assert_close(widget.result, torch.full((1, 3, 8, 8), (3 * 0.5 - 0.8) / 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(widget.pieces[0, :, 0, 0, 0], torch.tensor([0.2, 0.5, 0.8]), atol=1e-5, rtol=0)


def test_without_ipywidgets_the_mixer_is_a_board():
    with patch.dict(sys.modules, ipywidgets=None):
        assert type(mixer(Fake(), noise(2, 3, 8, 8))) is Picture


@pytest.mark.parametrize("choices,message", [([[3]], "factor 3 .* there are 3"), ([[0]] * 3, "3 sets for 2"), ([[]], "at least one")])
def test_wrong_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        mixer_board(Fake(), noise(2, 3, 8, 8), choices)
