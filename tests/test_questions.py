"Worlds with a question, what reads their answers, and the data sets that ask one."
from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from decomp_nb.data.catalog import open_dataset, validate_dataset
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
