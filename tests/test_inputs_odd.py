"""What people feed in, acted out anew: label maps beside frames, keys of another name, odd arguments of verbs"""

import json

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from decomp_nb.components.clip_clusters import ClipClusters
from decomp_nb.data.natural import InstanceFile
from decomp_nb.data.scenes_h5 import H5Scenes
from decomp_nb.data.video import VideoClips
from decomp_nb.factors import Factors, align, interpolate
from decomp_nb.methods.savi import SAVi, savi_preset
from decomp_nb.metrics.generation import frechet_distance, kid
from decomp_nb.metrics.segmentation import segmentation, segmentation_scores
from decomp_nb.training.parameters import read_recipe

FACTORS = Factors(torch.randn(3, 5, 4), None, torch.rand(3, 5, 8, 8).softmax(1))
NAN = Factors(torch.full((3, 5, 4), torch.nan))


def make_davis(folder):
    "Two videos as DAVIS has them: frames, and label maps of the same names in a folder beside"
    rng = np.random.default_rng(0)
    for video in ("bear", "dog"):
        for place in ("JPEGImages", "Annotations"):
            (folder / place / video).mkdir(parents=True)
        for t in range(4):
            frame = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(frame).save(folder / "JPEGImages" / video / f"{t:05d}.jpg")
            labels = (frame[..., 0] * 0 + np.arange(24) // 12).astype(np.uint8)
            Image.fromarray(labels).save(folder / "Annotations" / video / f"{t:05d}.png")


def test_label_maps_beside_frames_are_no_videos(tmp_path):
    make_davis(tmp_path)
    with pytest.warns(UserWarning, match="8 label maps of frames are no videos"):
        clips = VideoClips(tmp_path, 16, n_frames=2, clips="windows")
    assert [video.name for video in clips.videos] == ["JPEGImages/bear", "JPEGImages/dog"]


def test_label_maps_in_the_folder_of_the_frames_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for t in range(3):
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(tmp_path / f"{t}.png")
        Image.fromarray(np.eye(16, 24, dtype=np.uint8)).save(tmp_path / f"{t}_mask.png")
    with pytest.warns(UserWarning, match="3 label maps"):
        assert len(VideoClips(tmp_path, 16).videos[0]) == 3


@pytest.mark.parametrize("names", ["a", []])
def test_names_of_videos_are_a_list(tmp_path, names):
    (tmp_path / "a").mkdir()
    for t in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * t, np.uint8)).save(tmp_path / "a" / f"{t}.png")
    with pytest.raises(ValueError, match=r"videos=.*expected is a list of names, such as \['a'\]"):
        VideoClips(tmp_path, 8, videos=names)


@pytest.mark.parametrize("key", ["masks", "segmentation", "instance_labels"])
def test_label_maps_of_another_name_are_spoken_of(tmp_path, key):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["image"] = np.zeros((3, 8, 8, 3), np.uint8)
        file[key] = np.ones((3, 8, 8), np.uint8)
    with pytest.warns(UserWarning, match=f"'{key}' .* is not read"):
        assert not H5Scenes(tmp_path / "s.h5", split="all").has_masks


def make_instances(folder, **changes):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 7, 1, 7, 7]]}],
    }
    (folder / "i.json").write_text(json.dumps(content | changes))
    return folder / "i.json"


def test_one_picture_under_two_ids_is_refused(tmp_path):
    file = make_instances(tmp_path, images=[{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}])
    with pytest.raises(ValueError, match="i.json.*a.jpg is listed twice, under two ids"):
        InstanceFile(file)


def test_a_flat_polygon_is_refused(tmp_path):
    flat = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [1, 1, 7, 1, 7, 7]}]
    file = InstanceFile(make_instances(tmp_path, annotations=flat))
    with pytest.raises(ValueError, match="a.jpg, annotation 1: a polygon is a list in a list"):
        file.instances(file.pictures[0], 8, 8)


@pytest.mark.parametrize("act, said", [
    (lambda: FACTORS.drop(torch.tensor([[0, 1], [1, 1], [0, 2]])), "more factors in one picture than in another"),
    (lambda: FACTORS.unfold_time(2), "3 frames are no whole clips"),
    (lambda: FACTORS.segmentation(0), "size=0: expected is a whole number"),
    (lambda: FACTORS.segmentation(8.0), "size=8.0"),
    (lambda: FACTORS.segmentation((8, 8, 8)), r"\(height, width\)"),
    (lambda: FACTORS * 1j, "weight"),
    (lambda: interpolate(FACTORS, FACTORS, float("nan")), "t .*NaN"),
    (lambda: align(FACTORS, NAN), "codes .*NaN"),
])
def test_verbs_refuse_odd_arguments(act, said):
    with pytest.raises(ValueError, match=said):
        act()


@pytest.mark.parametrize("act", [
    lambda: FACTORS.replace(0, FACTORS.codes),
    lambda: Factors(np.ones((2, 3, 4))).pick(0),
])
def test_verbs_name_the_type_that_is_expected(act):
    with pytest.raises(TypeError, match="expected"):
        act()


def test_numbers_of_numpy_weight_a_set_from_either_side():
    assert torch.equal((np.float64(2) * FACTORS).weights, (FACTORS * 2).weights)
    assert torch.equal((np.arange(5.0) * FACTORS).weights, (FACTORS * torch.arange(5.0)).weights)


def test_slices_run_backwards_as_in_lists():
    assert torch.equal(FACTORS.pick(slice(None, None, -1)).codes, FACTORS.codes.flip(1))


def test_the_mask_of_a_masked_array_is_not_lost():
    labels = np.ma.masked_equal(np.arange(64).reshape(1, 8, 8) % 3, 2)
    with pytest.raises(ValueError, match=r"true labels are a masked array.*filled\(-1\)"):
        segmentation_scores(labels, np.zeros((1, 8, 8), int))


def test_labels_in_floats_are_no_masks_of_one_slot():
    labels = torch.arange(64.0).reshape(1, 1, 8, 8) % 3
    with pytest.raises(ValueError, match="look like labels"):
        segmentation(labels)
    assert not segmentation(torch.ones(1, 1, 8, 8)).any()


@pytest.mark.parametrize("score", [frechet_distance, kid])
@pytest.mark.parametrize("bad, said", [(torch.full((9, 4), torch.nan), "NaN"), (np.ones((9, 4)), "ndarray")])
def test_features_are_finite_tensors(score, bad, said):
    with pytest.raises(ValueError, match=f"features .*{said}"):
        score(bad, torch.randn(9, 4))


@pytest.mark.parametrize("content, said", [
    (b"max_steps:100", "a blank after the colon"),
    ("max_steps: 100".encode("utf-16"), "save it as UTF-8"),
])
def test_recipes_of_other_editors(tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"r.yaml .*{said}"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("rounds", [0, -1])
def test_a_number_of_rounds_that_is_none_is_named(rounds):
    at_once = dict(predictor=None, first_iterations=None, parallel=dict(n_layers=1))
    model = SAVi(**savi_preset("tiny", tracking_config=at_once))
    with pytest.raises(ValueError, match=f"n_iterations={rounds}: at least one iteration"):
        model.encode(torch.zeros(1, 2, 3, 32, 32), n_iterations=rounds)


def test_clusters_of_clips_are_not_joined():
    with pytest.raises(ValueError, match="join=0.5: clusters of whole clips are not joined"):
        ClipClusters(16, join=0.5)


def test_a_weight_is_a_real_number():
    with pytest.raises(ValueError, match="a complex weight"):
        FACTORS * torch.tensor([1j])
