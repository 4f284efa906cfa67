"""Readouts of slot pairs, accuracies of the Physion test, and which video has which label and task, against what the official code gave.

As in `test_video.py`: each check reads what it is `given`, computes everything else with our modules and compares array by array; shapes, settings and cases
come from the files of the folder `video`.
"""
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import Recorded as Arrays
from recorded import compared_and_given, every_alteration_fails, keys_of, once, run
from safetensors.torch import load_file

from decomp_nb.components.readout import JOINS
from decomp_nb.data.physion import Physion, drop_bad, physion_videos
from decomp_nb.metrics import questions
from decomp_nb.official.readout import load_official_readout, pair_indices

SINGLE, EXACT = (1e-4, 2e-5), (0, 0)  # relative and absolute tolerances


class Recorded(Arrays):
    "The arrays of a folder"
    relative = 0.01


@pytest.fixture(scope="module")
def golden(request):
    from conftest import golden_folder
    folder = golden_folder("video")
    if not (folder / "readout_pairs.npz").is_file(): pytest.skip("no parity data of questions: set DECOMP_GOLDEN")
    return folder


# -- readouts --------------------------------------------------------------------------------

def readout_of(folder: Path, join: str, scratch: Path):
    "The official checkpoint for max; the weights of the others, put into one"
    if join == "max": return load_official_readout(folder / "readout.pth", join=join)
    config = json.loads((folder / "readout_pairs.json").read_text())
    weights = load_file(folder / "readout_pairs.safetensors")
    state = {key.removeprefix(f"{join}."): value for key, value in weights.items() if key.startswith(f"{join}.")}
    state["comb_idx"] = pair_indices(config["num_slots"]).long()
    torch.save(state, scratch / f"{join}.pth")
    return load_official_readout(scratch / f"{join}.pth", join=join)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory): return tmp_path_factory.mktemp("readouts")


def check_readouts(r: Recorded, scratch: Path):
    file = "readout_pairs"
    slots, labels = r.given(file, "slots"), r.given(file, "labels")
    yield file, "comb_idx", pair_indices(slots.shape[2]).long(), EXACT
    for join in JOINS:
        readout = readout_of(r.folder, join, scratch)
        logits = readout(slots)
        loss = F.binary_cross_entropy_with_logits(logits, labels.float())
        loss.backward()
        yield file, f"logits_{join}", logits.detach(), SINGLE
        yield file, f"vqa_loss_{join}", loss.detach(), SINGLE
        for layer in ("linear1", "linear2"):
            name = f"grad_{layer}_{join}"
            yield file, name, getattr(readout, layer).weight.grad, (0, 1e-3 * r.read(file, name).abs().max().item())
        for name in r.names(file):
            if found := re.fullmatch(rf"val_{join}_acc_(.+)", name):
                yield file, name, questions.accuracy(logits.detach().sigmoid(), labels, float(found[1])), SINGLE


def test_readouts_are_the_official_ones_and_an_altered_number_is_noticed(golden, scratch):
    r = Recorded(golden)
    made = run(lambda r: check_readouts(r, scratch), r)
    assert keys_of(made) | r.used == {("readout_pairs", name) for name in r.names("readout_pairs")}
    every_alteration_fails(made, golden, Recorded)
    for key in r.used:
        with pytest.raises(AssertionError): run(lambda r: check_readouts(r, scratch), Recorded(golden, shifted=key))


def test_readout_files_are_read_strictly(golden, tmp_path):
    whole = torch.load(golden / "readout.pth", weights_only=True)
    state = whole.get("state_dict", whole)
    for change, error in (({"linear3.weight": torch.zeros(1)}, "left over: linear3.weight"), ({"linear2.bias": torch.zeros(2)}, "linear2.bias is")):
        torch.save(state | change, tmp_path / "changed.pth")
        with pytest.raises(ValueError, match=error): load_official_readout(tmp_path / "changed.pth")
    torch.save({key: value for key, value in state.items() if key != "linear1.bias"}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="missing: linear1.bias"): load_official_readout(tmp_path / "less.pth")


# -- accuracies ------------------------------------------------------------------------------

def check_accuracies(r: Recorded):
    file = "vqa_accuracy"
    cases = r.json(file)
    scores, labels = r.given(file, "scores"), r.given(file, "labels")
    videos, names, bad = cases["videos"], cases["tasks"], set(cases["bad_stimuli"])
    left = [video for video in videos if video not in bad]
    by_name = [video.split("_")[0] for video in left]
    by_place = questions.tasks_by_position([video.split("_")[0] for video in videos], len(left))
    numbers = {"true": by_name, "official": by_place}
    grid = questions.accuracy_grid(scores, labels, cases["thresholds"])
    yield file, "accuracy", grid, SINGLE
    for kind, tasks in numbers.items():
        yield file, f"task_{kind}", torch.tensor([names.index(task) for task in tasks]), EXACT
        rows = [[list(questions.accuracy_by_task(row, labels, tasks, threshold).values()) for row in scores] for threshold in cases["thresholds"]]
        yield file, f"per_task_{kind}", torch.tensor(rows), SINGLE
    best = questions.best_of_all_on_test_labels(scores, labels, cases["thresholds"])
    yield file, "best", torch.tensor([cases["thresholds"].index(best.threshold), best.checkpoint]), EXACT
    yield file, "best_accuracy", torch.tensor(best.accuracy), SINGLE


finished = once(lambda group: check_accuracies, Recorded)


def test_accuracies_are_the_official_ones_and_tasks_are_right_by_name(golden):
    r = Recorded(golden)
    compared, given = compared_and_given(finished, ["vqa_accuracy"], golden)
    assert compared | given == {("vqa_accuracy", name) for name in r.names("vqa_accuracy")}
    every_alteration_fails(finished("vqa_accuracy", golden)[0], golden, Recorded)
    for key in given:
        with pytest.raises(AssertionError): run(check_accuracies, Recorded(golden, shifted=key))


def test_a_choice_on_validation_never_sees_the_test(golden):
    "The fair choice, made on one half of the videos, cannot beat the best of all on the other"
    r = Recorded(golden)
    scores, labels = r.read("vqa_accuracy", "scores"), r.read("vqa_accuracy", "labels")
    choice = questions.choose_on_validation(scores[:, ::2], labels[::2])
    fair = questions.accuracy(scores[choice.checkpoint, 1::2], labels[1::2], choice.threshold).item()
    assert fair <= questions.best_of_all_on_test_labels(scores[:, 1::2], labels[1::2]).accuracy


# -- videos, labels, tasks -------------------------------------------------------------------

def part_of(case: str) -> tuple[str, str]: return tuple(case.removeprefix("vqa_").split("_"))


def check_videos(r: Recorded):
    file, root = "datasets", r.folder / "trees/Physion"
    slots = load_file(root / "slots.safetensors")
    for name, case in r.json(file).items():
        if not name.startswith("vqa_"): continue
        videos = physion_videos(root, *part_of(name), bad="official")
        yield file, f"{name}_labels", torch.tensor([video.answer for video in videos]), EXACT
        yield file, f"{name}_slots0", slots[videos[0].name][:case["video_len"]], SINGLE


def test_labels_are_those_of_the_official_loader(golden):
    r = Recorded(golden)
    made = run(check_videos, r)
    assert keys_of(made) == {("datasets", name) for name in r.names("datasets") if name.startswith("vqa_")}
    every_alteration_fails(made, golden, Recorded)


def test_files_and_tasks_are_those_of_the_official_loader(golden):
    root = golden / "trees/Physion"
    cases = {name: case for name, case in json.loads((golden / "datasets.json").read_text()).items() if name.startswith("vqa_")}
    assert len(cases) == 3
    for name, case in cases.items():
        part, split = part_of(name)
        videos = physion_videos(root, part, split)
        assert [video.name for video in videos] == case["files"]
        assert [case["all_tasks"].index(video.task) for video in videos] == case["task_idx_true"]
        every = physion_videos(root, part, split, bad="keep")
        by_place = questions.tasks_by_position([video.task for video in every], len(videos))
        assert [case["all_tasks"].index(task) for task in by_place] == case["task_idx_official"]
    assert drop_bad(every, ["nothing"]) == every and len(every) == len(videos) + 1


@pytest.mark.skipif(not find_spec("av"), reason="mp4 needs PyAV: pip install decomp_nb[video]")
def test_clips_of_physion_are_the_official_ones(golden):
    cases = {name: case for name, case in json.loads((golden / "datasets.json").read_text()).items() if name.startswith("physion_")}
    for case in cases.values():
        data = Physion(golden / "trees/Physion", 32, part=case["subset"], split=case["split"], n_frames=case["n_sample_frames"], frame_offset=case["frame_offset"],
                       max_frames=case["video_len"], bad="keep")
        assert [[data.listed[v].name, start] for v, start in data.index.tolist()] == case["items"]
    item = data[len(data) - 1]
    assert item["answer"] == data.listed[-1].answer and item["task"] == "Collide" and item["image"].shape == (case["n_sample_frames"], 3, 32, 32)
