"What people hand to `encode`, the scores and the verbs of factors: ranges, shapes, types and numbers that do not fit"
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from decomp_nb import Factors, load_decomposer, shipped
from decomp_nb.checks import UnitRangeWarning, check_pictures
from decomp_nb.components.library import build_library
from decomp_nb.components.slot_sets import repaint
from decomp_nb.data.catalog import validate_dataset
from decomp_nb.decomposer import Method
from decomp_nb.metrics import segmentation as seg
from decomp_nb.metrics.extractors import extract
from decomp_nb.metrics.generation import mse, psnr, reconstruction_scores, ssim
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.trainer import Trainer
from decomp_nb.worlds.scenes import Scenes


@pytest.fixture(scope="module")
def model(): return load_decomposer(shipped("lsd_shapes")).eval()


@pytest.fixture(scope="module")
def images():
    scenes = Scenes("shapes", n=4, size=64, seed=3)
    return torch.stack([scenes[i]["image"] for i in range(4)])


# -- row 8: range of pictures -----------------------------------------------------------------------------------------

WRONG = {
    "bytes": (lambda x: (x + 1) * 127.5, r"from \d+ to 2\d\d, .*/ 127.5 - 1"),
    "computed bytes": (lambda x: (x + 1) * 127.5 - 1e-4, r"expected are pictures in \[−1,1\].*/ 127.5 - 1"),
    "uint8": (lambda x: ((x + 1) * 127.5).byte(), "uint8.*expected are floats"),
    "nan": (lambda x: torch.where(x > 0.5, torch.nan, x), "NaN"),
    "infinite": (lambda x: torch.where(x > 0.5, torch.inf, x), "infinite"),
    "normalised": (lambda x: x * 40, r"expected are pictures in \[−1,1\]"),
    "one picture": (lambda x: x[0], r"add a batch axis"),
    "channels last": (lambda x: x.movedim(1, -1), r"expected are pictures \(b,3,h,w\)"),
    "two channels": (lambda x: x[:, :2], r"expected are pictures \(b,3,h,w\)"),
    "numpy": (lambda x: x.numpy(), "expected is a tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_pictures_in_another_range_or_shape_are_refused_at_every_door(wrong, images, model):
    change, match = WRONG[wrong]
    bad = change(images)
    for door in (model.encode, lambda x: psnr(x, x), lambda x: psnr(images, x), lambda x: mse(x, images), lambda x: ssim(x, x), lambda x: reconstruction_scores(x, x)):
        with pytest.raises(ValueError, match=match): door(bad)


class Mean(Method):
    "A method that knows colours only"

    def encode(self, images): return Factors(images.mean((2, 3))[:, None])


class Pictures(torch.utils.data.Dataset):
    size = 64

    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return {"image": self.images[i]}


def doors(model, images):
    "Everything that takes pictures, as functions of pictures"
    return {
        "encode": model.encode, "other methods": Mean().eval().encode, "clips": lambda x: Mean().eval().encode(x[:, None]),
        "psnr": lambda x: psnr(x, x), "reference": lambda x: psnr(images, x), "mse": lambda x: mse(x, images), "ssim": lambda x: ssim(x, x),
        "scores": lambda x: reconstruction_scores(x, x), "features": lambda x: extract(lambda y: y.mean((2, 3)), x),
        "data set": lambda x: validate_dataset(Pictures(x)),
    }


DOORS = list(doors(Mean(), None))
BRIGHT = {"unit": lambda x: (x + 1) / 2, "resized": lambda x: torch.nn.functional.interpolate((x + 1) / 2, 48, mode="bicubic").clamp(max=1).repeat_interleave(2, -1)[..., :64].repeat_interleave(2, -2)[..., :64, :]}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bright", BRIGHT)
def test_pictures_that_may_be_in_0_1_warn_at_every_door(door, bright, images, model):
    with pytest.warns(UnitRangeWarning, match=r"darker than middle grey.*pass 2 \* x - 1, or say that they are right"): doors(model, images)[door](BRIGHT[bright](images))


@pytest.mark.parametrize("door", DOORS)
def test_bright_pictures_that_are_right_pass_once_one_says_so(door, images, model):
    "The line that the warning names is all that it takes, and the same category can be made an error"
    bright = (images + 1) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UnitRangeWarning)
        doors(model, images)[door](bright)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnitRangeWarning)
        with pytest.raises(UnitRangeWarning): doors(model, images)[door](bright)
        doors(model, images)[door](images)  # as dark as pictures are


def test_the_warning_comes_once_and_not_with_every_batch(images):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for scale in (0.9, 0.95, 1): check_pictures((images + 1) / 2 * scale)
    assert [w.category for w in heard] == [UnitRangeWarning]


def test_usual_pictures_pass(images, model):
    small = torch.nn.functional.interpolate(images, model.config.image_size)
    assert model.encode(small).codes.shape[0] == 4 and torch.isfinite(psnr(small, small * 0.9)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pictures in (torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), -1.0), torch.rand(1, 3, 8, 8) * 0.3 + 0.5): check_pictures(pictures)
    assert psnr(torch.randn(2, 3, 16, 16) * 2, images[:2, :, :16, :16]).isfinite().all()  # drawings of an untrained model may overshoot


def test_the_check_costs_one_minimum_and_maximum(images, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda x, _do=torch.Tensor.aminmax: calls.append(x.shape) or _do(x))
    check_pictures(images)
    assert calls == [images.shape]


def test_repainting_looks_at_its_pictures(images, model):
    factors = model.encode(images)
    with pytest.raises(ValueError, match="/ 127.5 - 1"): repaint(model, (images + 1) * 127.5, factors, torch.ones(4, 1, 64, 64), steps=1)


class Painter(Method):
    "Learns the mean colour; what it is called says whether it belongs to this library"

    def __init__(self):
        super().__init__()
        self.colour = torch.nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, batch): return {"loss": (self.colour - batch["image"].float()).square().mean()}


@pytest.mark.parametrize("change, match", [(lambda x: (x + 1) * 127.5, "training pictures have values from .*/ 127.5 - 1"), (lambda x: ((x + 1) * 127.5).byte(), "training pictures are torch.uint8"),
                                           (lambda x: x.masked_fill(x > 0.5, torch.nan), "training pictures.*NaN"), (lambda x: x / 0, "infinite")])
def test_a_training_looks_at_its_pictures(tmp_path, images, monkeypatch, change, match):
    options = TrainConfig(out_dir=str(tmp_path / "run"), max_steps=1, batch_size=2, trackers="", cpu=True)
    if "NaN" not in match and "infinite" not in match: Trainer(Painter(), Pictures(change(images)), options).fit()  # a model from elsewhere knows what it takes
    monkeypatch.setattr(Painter, "__module__", "decomp_nb.methods.painter")
    with pytest.raises(ValueError, match=match): Trainer(Painter(), Pictures(change(images)), replace(options, out_dir=str(tmp_path / "own"))).fit()
    assert not (tmp_path / "own").exists()
    with pytest.warns(UnitRangeWarning, match="training pictures"): Trainer(Painter(), Pictures((images + 1) / 2), replace(options, out_dir=str(tmp_path / "unit"))).fit()


# -- row 9: shapes of label maps --------------------------------------------------------------------------------------

TRUE = torch.arange(4).repeat_interleave(16).reshape(1, 8, 8).repeat(3, 1, 1)
SCORES = [seg.segmentation_scores, seg.scene_scores, seg.ari, seg.fg_ari, seg.miou, seg.mbo, seg.iou_matrix, lambda *a: seg.SegmentationScores().update(*a)]
IDS = ["segmentation_scores", "scene_scores", "ari", "fg_ari", "miou", "mbo", "iou_matrix", "update"]


@pytest.mark.parametrize("score", SCORES, ids=IDS)
def test_a_map_without_batch_axis_is_no_batch_of_rows(score):
    with pytest.raises(ValueError, match=r"true labels are \(8, 8\), expected are maps \(b,h,w\).*\[None\]"): score(TRUE[0], TRUE[0])


@pytest.mark.parametrize("score", SCORES, ids=IDS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int16, np.int64, torch.uint8, torch.uint16, torch.int32])
def test_labels_of_every_integer_type_score_the_same(score, kind):
    def cast(x): return x.to(kind) if isinstance(kind, torch.dtype) else x.numpy().astype(kind)
    pred = TRUE.roll(1, 1)
    expected, found = score(TRUE, pred), score(cast(TRUE), cast(pred))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("change, match", [
    (lambda t, p: dict(pred=torch.full((3, 2, 8, 8), torch.nan)), "soft masks.*NaN"),
    (lambda t, p: dict(pred=torch.full((3, 2, 8, 8), torch.nan).numpy()), "soft masks.*NaN"),
    (lambda t, p: dict(true=t.float()), "true labels must be integers"),
    (lambda t, p: dict(true=t.float() * torch.nan), "true labels must be integers"),
    (lambda t, p: dict(visibility=torch.full((3, 3), torch.nan)), "visibility.*NaN"),
    (lambda t, p: dict(visibility=torch.ones(3)), "visibility"),
    (lambda t, p: dict(pred=p[:1]), "differ in shape"),
    (lambda t, p: dict(pred=-1 - p), "must be ≥ 0"),
])
def test_masks_and_visibility_that_mean_nothing_are_refused(change, match):
    with pytest.raises(ValueError, match=match): seg.scene_scores(**(dict(true=TRUE, pred=TRUE) | change(TRUE, TRUE)))


def test_factors_with_nan_masks_own_no_pixels():
    with pytest.raises(ValueError, match="masks.*NaN"): Factors(torch.zeros(1, 2, 3), masks=torch.full((1, 2, 4, 4), torch.nan)).segmentation(8)


# -- row 10: numbers of factors ---------------------------------------------------------------------------------------

SEVEN = Factors(torch.arange(7.0)[None, :, None].repeat(2, 1, 3))


@pytest.mark.parametrize("index", [9, -8, [0, 9], torch.tensor([9]), torch.tensor([[9], [0]]), torch.tensor([[0], [-8]]), torch.tensor([[0.0], [1.0]]), (7,)], ids=str)
def test_factors_that_do_not_exist_are_refused_by_all_verbs(index):
    for verb in (SEVEN.pick, SEVEN.drop, lambda i: SEVEN.replace(i, SEVEN), lambda i: SEVEN.replace(0, SEVEN, i), lambda i: SEVEN.replace(i, SEVEN, 0)):
        with pytest.raises((IndexError, ValueError), match="factor|donors") as error: verb(index)
        assert error.type in (IndexError, ValueError)


@pytest.mark.parametrize("index", [True, torch.tensor([[True]])], ids=str)
def test_yes_is_no_number_of_a_factor(index):
    with pytest.raises(IndexError, match="factors.*numbers|integers"): SEVEN.pick(index)


def test_numbers_of_numpy_are_numbers():
    assert SEVEN.pick(np.int64(3)).codes[0, :, 0].tolist() == [3] and SEVEN.drop(np.array([0, 6])).codes[0, :, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [4, -1, 99])
def test_a_library_refuses_concepts_that_it_does_not_have(number):
    library = build_library(Factors(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))), 4)
    for ask in (library.nearest, lambda i: library.compose([i])):
        with pytest.raises((IndexError, ValueError), match=f"{number} (was named|is empty or unknown)"): ask(number)


def test_negative_numbers_count_from_the_end_in_every_picture():
    last = torch.tensor([[-1], [-7]])
    assert SEVEN.pick(last).codes[:, 0, 0].tolist() == [6, 0] and SEVEN.drop(last).codes[:, 0, 0].tolist() == [0, 1]
    assert SEVEN.replace(last, SEVEN, torch.tensor([[3], [4]])).codes[:, [6, 0], 0].diag().tolist() == [3, 4]


def test_pictures_that_do_not_exist_are_refused():
    assert SEVEN.rows(1).codes.shape == SEVEN.rows(-1).codes.shape == (1, 7, 3)
    for index in (2, -3):
        with pytest.raises(IndexError): SEVEN.rows(index)


@pytest.mark.parametrize("picture", [4, 99, -1])
def test_a_library_has_no_recipe_of_a_picture_that_it_does_not_hold(picture):
    library = build_library(Factors(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))), 4)
    assert len(library.recipe(3)) == 3
    with pytest.raises(IndexError, match=f"picture {picture}"):
        library.recipe(picture)


def test_clips_are_compared_frame_by_frame():
    clip = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = clip * 0.5
    for score in (psnr, ssim):
        found = score(clip, other)
        assert found.shape == (2, 3)
        torch.testing.assert_close(found[1], score(clip[1], other[1]))
    mask = torch.zeros(2, 3, 16, 16)
    mask[..., :4] = 1
    torch.testing.assert_close(psnr(clip, other, mask)[0], psnr(clip[0], other[0], mask[0]))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "lsd_shapes/..", 5])
def test_only_names_of_weights_that_come_with_the_package_are_found(name):
    with pytest.raises(FileNotFoundError, match="lsd_shapes"):
        shipped(name)


def test_a_pickle_beside_other_weights_is_not_read(tmp_path):
    model = load_decomposer(shipped("savi_moving_textured"))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    weights.rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_decomposer(tmp_path)
