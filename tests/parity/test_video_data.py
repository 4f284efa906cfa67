"""Clips of MOVi dumps and mp4s against what the official loaders of SlotDiffusion made of the same small folders.

`datasets.json` lists the clips of each case in order, `datasets.npz` holds some of them. Everything, sizes and numbers of frames included, comes from there.
"""
import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorded import Recorded, alter, close, keys_of, run

from decomp_nb.data.images import to_image_tensor
from decomp_nb.data.video import VideoClips, default_clips

FILE = "datasets"
CLIPS = {"movi": {}, "steve": {}, "physion": {"test": "windows"}}  # Physion is tested on windows, MOVi on first clips
FOLDERS = {"movi": "MOVi/MOVi-D", "steve": "MOVi/MOVi-Solid", "physion": "Physion"}
SMALL = {"movi_small": "movi_test", "steve_small": "steve_test"}  # the first item of these cases, at half the size
LATER = ("_slots", "_slots0", "_labels")  # predictions and questions, no clips
IMAGES, PIXELS = 1e-5, 0.1  # JPEGs of the mp4s were stored on the way: README


@pytest.fixture(scope="module")
def golden(request):
    from conftest import golden_folder
    folder = golden_folder("video")
    if not (folder / f"{FILE}.npz").is_file(): pytest.skip("no parity data of video data sets: set DECOMP_GOLDEN")
    return folder


def cases(folder: Path) -> dict[str, dict]:
    "The cases that list clips"
    listed = json.loads((folder / f"{FILE}.json").read_text())
    return {name: case for name, case in listed.items() if "items" in case}


def of_split(folder: Path, case: dict) -> list[str] | None:
    "The videos of a split of Physion, task by task, as the file says; None for the others"
    if "subset" not in case: return None
    split = folder / "trees/Physion/splits" / f"{case['subset']}_{case['split']}.json"
    return [Path(name).stem for names in json.loads(split.read_text()).values() for name in names]


def open_clips(folder: Path, name: str, case: dict, size: int, **options) -> VideoClips:
    kind = name.split("_")[0]
    names = of_split(folder, case)
    clips = CLIPS[kind].get(case["split"])
    return VideoClips(folder / "trees" / FOLDERS[kind], size, split="all" if names else case["split"], n_frames=case["n_sample_frames"],
                      frame_offset=case["frame_offset"], max_frames=case["video_len"], videos=names, clips=clips or default_clips(case["split"]), renumber=True,
                      resample="bilinear", **options)


def listed(ds: VideoClips) -> list[list]:
    "Name of the video as the cases write it, and first frame, of every clip"
    return [[Path(ds.videos[v].name).stem if ds.videos[v].name.endswith(".mp4") else ds.videos[v].name, s] for v, s in ds.index.tolist()]


def needs_pyav(name: str) -> None:
    if name.startswith("physion") and not find_spec("av"): pytest.skip("mp4 needs PyAV: pip install decomp_nb[video]")


@pytest.mark.parametrize("name", ["movi_train", "movi_val", "movi_test", "movi_train2", "movi_val2", "steve_train", "steve_test", "physion_training_train",
                                  "physion_training_val", "physion_train_offset", "physion_val_offset", "physion_test_offset"])
def test_clips_are_the_official_ones_in_their_order(golden, name):
    needs_pyav(name)
    case = cases(golden)[name]
    assert listed(open_clips(golden, name, case, 32)) == case["items"]


def test_all_cases_are_tested(golden):
    mark, = (m for m in test_clips_are_the_official_ones_in_their_order.pytestmark if m.name == "parametrize")
    assert set(mark.args[1]) == set(cases(golden))


def through_jpeg(frames: torch.Tensor) -> torch.Tensor:
    "Frames as they come back from JPEGs of quality 95: so the official script stored what it took from an mp4"
    stored = []
    for frame in ((frames.movedim(1, -1) + 1) * 127.5).round().byte().numpy():
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        stored.append(to_image_tensor(Image.open(buffer)))
    return torch.stack(stored)


def check(folder: Path, group: str):
    "A check of the arrays of one case: `(key …, ours, tolerance)`"
    def compare(r: Recorded):
        name = SMALL.get(group, group)
        size = r.read(FILE, f"{group}_img").shape[-1]
        ds = open_clips(folder, name, cases(folder)[name], size)
        item = ds[0 if group in SMALL else len(ds) - 1]
        if name.startswith("physion"): yield FILE, f"{group}_img", through_jpeg(item["image"]), PIXELS
        else: yield FILE, f"{group}_img", item["image"], IMAGES
        if f"{group}_masks" in r.names(FILE): yield FILE, f"{group}_masks", item["masks"], 0
    return compare


def groups(folder: Path) -> list[str]: return [name.removesuffix("_img") for name in Recorded(folder).names(FILE) if name.endswith("_img")]


def test_every_array_of_clips_is_reproduced_and_an_altered_one_is_noticed(golden):
    r, compared = Recorded(golden), set()
    for group in groups(golden):
        if group.startswith("physion") and not find_spec("av"): continue
        made = run(check(golden, group), r)
        compared |= keys_of(made)
        for *key, ours, tolerance in made:
            with pytest.raises(AssertionError): close(ours, alter(r.read(*key), 3 * max(tolerance, 0.01)), tolerance, "/".join(key))
    wanted = {(FILE, name) for name in r.names(FILE) if not name.endswith(LATER) and (find_spec("av") or not name.startswith("physion"))}
    assert compared == wanted


def test_our_own_sizes_and_numbers_differ_where_they_should(golden):
    "Whole blocks are averaged, and an object keeps the number it has in the files of its video"
    case = cases(golden)["movi_test"]
    official = open_clips(golden, "movi_test", case, 12)  # at a half or a quarter both are the same
    ours = VideoClips(official.path, 12, split="test", n_frames=case["n_sample_frames"])
    assert listed(ours) == listed(official)
    assert not torch.allclose(ours[0]["image"], official[0]["image"], atol=0.05)
    assert ours.max_objects == 23 and ours[0]["labels"]["visibility"].shape == (23,)
