"What people hand to `encode`, the scores and the verbs of factors: ranges, shapes, types and numbers that do not fit"
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_nb import Factors, load_decomposer, shipped
from decomp_nb.checks import UnitRangeWarning, check_pictures
from decomp_nb.components.layout import move_slots
from decomp_nb.components.library import build_library
from decomp_nb.components.slot_sets import repaint
from decomp_nb.components.weight_files import read_weights
from decomp_nb.data.catalog import validate_dataset
from decomp_nb.decomposer import Method
from decomp_nb.factors import align, interpolate, recombine
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


# -- sets of factors that do not fit ----------------------------------------------------------------------------------

def a_set(b=2, k=3, d=4, masks=None, weights=None, **more):
    generator = torch.Generator().manual_seed(b + k + d)
    return Factors(torch.randn(b, k, d, generator=generator), weights=weights, masks=None if masks is None else torch.rand(b, masks, 8, 8, generator=generator))


@pytest.mark.parametrize("index", [(0, 1), [0, 1], range(2), torch.tensor([0, 1]), np.array([0, 1]), slice(2), torch.tensor([True, True, False, False]), [True, True, False, False]], ids=str)
def test_pictures_are_chosen_by_whatever_names_them(index):
    four = a_set(4, masks=3)
    chosen = four.rows(index)
    assert chosen.codes.equal(four.codes[:2]) and chosen.masks.equal(four.masks[:2])


@pytest.mark.parametrize("index", [torch.zeros(2, 2, dtype=torch.long), 0.5, [0.5], True, "ab", torch.tensor([[0], [1]])], ids=str)
def test_what_names_no_pictures_is_refused(index):
    with pytest.raises((IndexError, ValueError, TypeError)): a_set(4).rows(index)


VERBS = {"pick": lambda f: f.pick(0), "drop": lambda f: f.drop(0), "cat": lambda f: f.cat(a_set()), "cat to": lambda f: a_set().cat(f), "replace": lambda f: f.replace(0, f), "times": lambda f: f * 2.0, "segmentation": lambda f: f._replace(masks=f.masks if f.masks is not None else torch.rand(2, 3, 8, 8)).segmentation()}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("bad", [dict(masks=5), dict(masks=1), dict(weights=torch.ones(2, 4)), dict(weights=torch.ones(3)), dict(weights=torch.ones(1, 3))], ids=str)
def test_masks_and_weights_of_another_number_than_codes_are_refused_by_all_verbs(verb, bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=rf"{name} \(.*\) are not those of codes \(2, 3, 4\): one for each"): VERBS[verb](a_set(**bad))


def test_masks_of_other_codes_are_refused_where_they_are_drawn(model, images):
    factors = model.encode(torch.nn.functional.interpolate(images, model.config.image_size))
    for bad, match in ((factors._replace(masks=factors.masks[:, 1:]), "masks .* are not those of codes"), (factors._replace(weights=torch.ones(4)), "weights .* are not those of codes"),
                       (factors._replace(codes=factors.codes.masked_fill(factors.codes > 1, torch.nan)), "codes .* hold NaN"), (factors._replace(weights=factors.weights / 0), "weights .* hold NaN")):
        for door in (model.decode, model.decompose):
            with pytest.raises(ValueError, match=match): door(bad, steps=1)


@pytest.mark.parametrize("places, donors", [([0, 0], [1, 2]), (torch.tensor([[0, 1], [2, 2]]), None)], ids=["numbers", "of each picture"])
def test_a_place_takes_one_donor_only(places, donors):
    with pytest.raises(ValueError, match="a place is named twice"): a_set().replace(places, a_set(), donors)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor([1.0, float("inf"), 0.0])], ids=str)
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match="a weight of .*: expected are finite numbers"): a_set() * weight


@pytest.mark.parametrize("weight", [torch.ones(5, 3), torch.ones(2, 2, 3)], ids=lambda w: str(tuple(w.shape)))
def test_weights_of_more_pictures_than_there_are_do_not_make_more(weight):
    with pytest.raises(ValueError, match="weights|size"): a_set(1) * weight


@pytest.mark.parametrize("other", [dict(d=5), dict(b=3)], ids=str)
def test_sets_that_do_not_fit_each_other_are_refused_with_both_shapes(other):
    a, b = a_set(), a_set(**other)
    calls = {"cat": lambda: a.cat(b), "replace": lambda: a.replace(0, b), "recombine": lambda: recombine(a, b, [0]), "align": lambda: align(a, b)} | ({"interpolate": lambda: interpolate(a, b, 0.5)} if "d" in other else {})
    for name, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(f"codes (2, 3, 4) and {tuple(b.codes.shape)} do not fit each other")): call()
    with pytest.raises(ValueError, match="align: codes"): align(a, a_set(k=4))
    with pytest.raises(ValueError, match="interpolate: codes"): interpolate(a, a_set(k=1), 0.5)  # would have been spread over all


def test_what_holds_no_layout_cannot_be_moved(model, images):
    factors = model.encode(torch.nn.functional.interpolate(images, model.config.image_size))
    moved = factors
    for slot in range(factors.n_factors): moved = move_slots(moved, slot, right=0.3, grow=2.0)  # again and again
    assert move_slots(factors._replace(masks=None), 0, down=0.1).codes.shape == factors.codes.shape
    with pytest.raises(ValueError, match=r"codes \(4, 7, 192\) hold no layout"): move_slots(factors._replace(codes=torch.randn(4, 7, 192, generator=torch.Generator().manual_seed(0))), 0, down=0.1)
    with pytest.raises(ValueError, match="hold no layout"): move_slots(a_set(), 0, down=0.1)


def test_pictures_of_double_precision_are_named(model, images):
    small = torch.nn.functional.interpolate(images, model.config.image_size)
    with pytest.raises(ValueError, match=r"images are torch.float64, but the model computes in torch.float32: pass images.to\(torch.float32\)"): model.encode(small.double())
    Mean().eval().encode(small.double())  # a method without weights takes them


# -- weights that are none --------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("content, match", [(LFS, "a pointer of git-lfs.*git lfs pull"), (b"<!DOCTYPE html>", "a saved web page"), (b"", r"empty \(0 bytes\)")], ids=["lfs", "page", "empty"])
def test_what_lies_in_place_of_weights_is_said(tmp_path, content, match):
    folder = shutil.copytree(shipped("decomp_diffusion_toy_squares"), tmp_path / "model")
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is no weight file but {match}"): load_decomposer(folder)


def test_weights_that_are_nan_are_not_loaded(tmp_path):
    folder = shutil.copytree(shipped("decomp_diffusion_toy_squares"), tmp_path / "model")
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    name = sorted(state)[3]
    save_file(state | {name: state[name] * torch.nan}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 of .* tensors of .*model hold NaN, such as {name}: the training that made them failed"): load_decomposer(folder)
    with pytest.raises(ValueError, match=f"hold NaN, such as {name}"): read_weights(file)


# -- label maps in another order --------------------------------------------------------------------------------------

def test_one_hot_masks_are_no_clips_of_labels():
    hot = torch.nn.functional.one_hot(TRUE, 4).movedim(-1, 1)
    for call in (lambda: seg.ari(hot, hot), lambda: seg.ari(hot.numpy().astype(bool), hot)):
        with pytest.raises(ValueError, match=r"true labels \(3, 4, 8, 8\) are 0 and 1, and 1 once in each pixel.*argmax\(1\)"): call()
    clip = torch.stack([TRUE, TRUE], 1)
    assert seg.ari(clip.clamp(max=1), clip.clamp(max=1)).tolist() == [1, 1, 1]


def test_soft_masks_with_slots_last_are_refused():
    with pytest.raises(ValueError, match=r"soft masks \(3, 8, 8, 5\) are 8×5, the labels are 8×8: expected is \(b,k,h,w\)"): seg.segmentation_scores(TRUE, torch.rand(3, 8, 8, 5))


def test_shares_of_ignoring_are_refused():
    with pytest.raises(ValueError, match="ignore is torch.float32, expected is bool"): seg.ari(TRUE, TRUE, ignore=torch.rand(3, 8, 8))
