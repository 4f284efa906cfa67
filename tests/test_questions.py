"Worlds with a question, what reads their answers, and the data sets that ask one."
from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from decomp_nb.components.readout import HiddenReadout, PhysionReadout, fit_readout
from decomp_nb.data.catalog import detect_format, open_dataset, validate_dataset
from decomp_nb.data.mp4 import write_mp4
from decomp_nb.data.physion import physion_videos
from decomp_nb.metrics import questions
from decomp_nb.worlds import physics
from decomp_nb.worlds.scenes import Scenes

WORLDS = ["billiards", pytest.param("physics", marks=pytest.mark.skipif(not find_spec("pymunk"), reason="needs the extra physics"))]


@pytest.mark.parametrize("kind", WORLDS)
def test_twins_share_their_first_frame_and_differ_in_the_answer(kind):
    batch = Scenes(kind, 24, size=48).batch(range(24))
    answers = batch["answer"]
    assert batch["image"][::2, 0].equal(batch["image"][1::2, 0]) and batch["masks"][::2, 0].equal(batch["masks"][1::2, 0])
    assert (answers[::2] + answers[1::2] == 1).all() and 0 < answers[::2].sum() < 12  # the order of twins gives nothing away
    assert (batch["first_contact"][answers == 1] >= 10).all() and (batch["first_contact"][answers == 0] == -1).all()
    assert batch["contact"].equal(batch["contact"].transpose(1, 3)) and batch["task"][::2] == batch["task"][1::2]


@pytest.mark.parametrize("kind", WORLDS)
def test_items_are_a_function_of_seed_and_index(kind):
    code = f"from decomp_nb.worlds.scenes import Scenes; b = Scenes({kind!r}, 8, size=32, seed=3)[5]; print(b['image'].double().sum().item(), b['labels']['position'].double().sum().item())"
    once = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    item = Scenes(kind, 8, size=32, seed=3).batch([1, 5])
    assert [float(v) for v in once] == [item["image"][1].double().sum().item(), item["labels"]["position"][1].double().sum().item()]
    assert not item["image"][1].equal(Scenes(kind, 8, size=32, seed=4)[5]["image"])


@pytest.mark.parametrize("kind", WORLDS)
def test_masks_keep_identity_and_lie_at_the_positions(kind):
    data = open_dataset(kind, n=4, size=64)
    validate_dataset(data, image_size=64, need_masks=True)
    item = data[1]
    for number in (1, 2):
        for t in (0, 9, 29):
            rows, columns = (item["masks"][t] == number).nonzero(as_tuple=True)
            x, y = item["labels"]["position"][number - 1, t]
            whole = 0.12 < x < 0.88 and 0.12 < y < 0.88
            if whole: assert abs(columns.float().mean() + 0.5 - 64 * x) < 1 and abs(rows.float().mean() + 0.5 - 64 * y) < 1


def test_an_object_taken_away_is_missing_from_the_whole_story():
    data = Scenes("billiards", 40, size=32)
    changed = 0
    for i in range(12):
        item, without = data[i], data.counterfactual(i, remove=3)
        met = item["contact"][2].any()
        paths = item["labels"]["position"][:2], without["labels"]["position"][:2]
        assert met or torch.allclose(*paths, atol=1e-5)  # impacts of others round differently
        assert not without["contact"][2].any() and not (without["masks"] == 3).any()
        changed += not torch.allclose(*paths, atol=1e-5)
    assert changed > 2


def test_labels_can_also_be_merely_balanced():
    batch = Scenes("billiards", 20, size=32, twins=False).batch(range(20))
    assert batch["answer"].sum() == 10 and not batch["image"][0, 0].equal(batch["image"][1, 0])


def test_wrong_options_and_a_missing_engine_are_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="observed is 30"): Scenes("billiards", observed=30)
    with pytest.raises(ValueError, match="radius is"): Scenes("billiards", radius=(0.1, 0.4))
    monkeypatch.setitem(sys.modules, "pymunk", None)
    with pytest.raises(ImportError, match=r"decomp_nb\[physics\]"): Scenes("physics")
    with pytest.raises(ImportError, match="billiards"): physics.build_space()


# -- Physion on disk -------------------------------------------------------------------------

def physion_tree(root, tasks=("Drop", "Roll"), n=2):
    "The layout of Physion with empty videos; returns the folder"
    listed = {"readout_train": {}, "test_test": {}}
    rows = {"PhysionTrainMP4s/readout_labels.csv": [], "PhysionTestMP4s/labels.csv": []}
    for task in tasks:
        places = {"readout_train": [f"PhysionTrainMP4s/{task}_readout_MP4s/pilot_{task}_{i:04d}_img.mp4" for i in range(n)],
                  "test_test": [f"PhysionTestMP4s/{task}/mp4s-redyellow/pilot_{task}-redyellow_{i:04d}_img.mp4" for i in range(n)]}
        for split, files in places.items():
            listed[split][task] = files
            for file in files:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).touch()
        rows["PhysionTrainMP4s/readout_labels.csv"] += [f"pilot_{task}_{i:04d},{i % 2 == 0}" for i in range(n)]
        rows["PhysionTestMP4s/labels.csv"] += [f"pilot_{task}_{i:04d}_img,{i % 2 == 1}" for i in range(n)]
    (root / "splits").mkdir()
    for split, files in listed.items(): (root / f"splits/{split}.json").write_text(json.dumps(files))
    for file, lines in rows.items(): (root / file).write_text("\n".join([",ground truth outcome", *lines]) + "\n")
    (root / "splits/bad_stimuli.txt").write_text("pilot_Drop_0001\npilot_Roll-redyellow_0000\n")
    return root


def test_videos_labels_and_tasks_meet_by_name(tmp_path):
    root = physion_tree(tmp_path)
    assert [(v.task, v.answer) for v in physion_videos(root, "readout")] == [("Drop", 1), ("Drop", 0), ("Roll", 1), ("Roll", 0)]
    assert {how: [v.name[6:] for v in physion_videos(root, "test", bad=how)] for how in ("remove", "official")} == {
        "remove": ["Drop-redyellow_0000_img", "Roll-redyellow_0001_img"], "official": ["Drop-redyellow_0000_img", "Roll-redyellow_0000_img", "Roll-redyellow_0001_img"]}
    assert detect_format(root) == "physion"


def test_what_does_not_fit_is_counted_and_named(tmp_path):
    root = physion_tree(tmp_path)
    labels, split = root / "PhysionTrainMP4s/readout_labels.csv", root / "splits/readout_train.json"
    whole = labels.read_text()
    labels.write_text(whole + "pilot_Drop_0007,True\npilot_Drop_0008,True\n")
    with pytest.raises(ValueError, match="2 labels without a video: pilot_Drop_0007, pilot_Drop_0008"): physion_videos(root, "readout")
    labels.write_text(whole.replace("pilot_Roll_0001,False\n", ""))
    with pytest.raises(ValueError, match="no label for 1 videos: pilot_Roll_0001"): physion_videos(root, "readout")
    labels.write_text(whole.replace("pilot_Roll_0001,False", "pilot_Roll_0001,"))
    with pytest.raises(ValueError, match="row 5 says neither True nor False"): physion_videos(root, "readout")
    labels.write_text(whole.replace("ground truth outcome", "outcome"))
    with pytest.raises(ValueError, match="no column 'ground truth outcome'"): physion_videos(root, "readout")
    (root / "PhysionTrainMP4s/Roll_readout_MP4s/pilot_Roll_0000_img.mp4").unlink()
    with pytest.raises(ValueError, match=r"names 1 of 4 videos that are not in .*pilot_Roll_0000_img.mp4"): physion_videos(root, "readout")
    split.write_text("{")
    with pytest.raises(ValueError, match="readout_train.json"): physion_videos(root, "readout")
    split.unlink()
    with pytest.raises(FileNotFoundError, match="readout_train.json"): physion_videos(root, "readout")
    with pytest.raises(ValueError, match="part is 'tests'"): physion_videos(root, "tests")


@pytest.mark.skipif(not find_spec("av"), reason="PyAV is an extra")
def test_physion_gives_clips_with_answers(tmp_path):
    root = physion_tree(tmp_path)
    clips = Scenes("billiards", 4, size=32, n_frames=12).batch(range(4))["image"]
    for clip, video in zip(clips, physion_videos(root, "readout")): write_mp4(clip, root / video.file, fps=30)
    data = open_dataset(root, part="readout", split="train", size=32, n_frames=5, frame_offset=2, clips="first")
    validate_dataset(data, image_size=32)
    assert [item["answer"].item() for item in data] == [1, 0, 1, 0] and data[3]["task"] == "Roll" and data[3]["image"].shape == (5, 3, 32, 32)


def test_obj3d_folders_are_videos_of_their_split(tmp_path):
    from PIL import Image
    for split in ("train", "val", "test"):
        for v in range(2):
            (tmp_path / split / str(v)).mkdir(parents=True)
            for t in range(1, 13): Image.new("RGB", (16, 16), (20 * t, 0, 0)).save(tmp_path / split / str(v) / f"test_{t}.png")
    data = open_dataset(tmp_path, split="val", size=16, n_frames=11, max_frames=12)
    assert len(data) == 2 and data[0]["image"].shape == (11, 3, 16, 16)
    assert ((data[0]["image"][:, 0, 0, 0] + 1) * 127.5).round().tolist() == [20 * t for t in range(1, 12)]  # test_2 before test_10


# -- readouts --------------------------------------------------------------------------------

def test_hidden_units_read_a_distance_and_a_linear_readout_does_not():
    def closeness(n, seed):
        place = torch.rand(n, 1, 2, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return place, ((place[:, 0, 0, 0] - place[:, 0, 1, 0]).abs() < 0.55).long()
    right = {}
    for kind in (PhysionReadout, HiddenReadout):
        torch.manual_seed(0)
        epochs = fit_readout(kind(1, 16), closeness(600, 0), closeness(300, 1), epochs=8, lr=1e-2)
        choice = questions.choose_on_validation(torch.stack([epoch.scores for epoch in epochs]), closeness(300, 1)[1])
        right[kind] = choice.accuracy
    assert right[HiddenReadout] > 0.9 > 0.75 > right[PhysionReadout]


def test_readouts_are_saved_and_read_again(tmp_path):
    torch.manual_seed(0)
    readout, slots = HiddenReadout(6, 8, join="mean", n_hidden=1), torch.randn(3, 4, 5, 6)
    readout.save_pretrained(tmp_path)
    again = HiddenReadout.from_pretrained(tmp_path)
    assert again(slots).equal(readout(slots)) and again.config.join == "mean"


def test_videos_without_an_answer_are_not_counted_as_one():
    slots, answers = torch.randn(4, 2, 3, 4), torch.tensor([0, 1, 1, 0])
    for wrong in (answers - 1, answers[:3]):
        with pytest.raises(ValueError, match="slots of 4 clips need as many answers, 0 or 1"):
            fit_readout(PhysionReadout(4), (slots, wrong), (slots, answers), epochs=1)
    scores = torch.tensor([0.9, 0.1, 0.7, 0.2])
    with pytest.raises(ValueError, match="labels have to be 0 or 1"): questions.accuracy(scores, answers - 1)
    with pytest.raises(ValueError, match=r"scores \(4,\) hold NaN"): questions.accuracy(scores * float("nan"), answers)
