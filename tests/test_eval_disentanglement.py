"""The evaluation of disentanglement runs on a run directory, with few pictures, and leaves numbers beside it"""
import json
import math
from pathlib import Path

import pytest
import torch
from test_eval import execute, numbers

from decomp_nb.data.shapes3d import Shapes3D
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.trainer import Trainer

FEW = dict(data="shapes3d", data_options=dict(sizes=[3, 3, 1, 2, 2, 1]), train=20, test=10, seeds=2, batch_size=20, cpu=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A run directory of a tiny model after one step on drawn Shapes3D"
    torch.manual_seed(0)
    folder, options = tmp_path_factory.mktemp("runs") / "lsd", dict(sizes=[3, 2, 2, 1, 2, 1])
    config = TrainConfig(out_dir=str(folder), max_steps=1, batch_size=4, trackers="", warmup_steps=0, cpu=True)
    Trainer(LSD(**lsd_preset("tiny")), Shapes3D(size=16, **options), config, extra_config={"data": "shapes3d", "options": options, "size": 16}).fit()
    return folder


def test_weights_that_come_with_the_package_are_evaluated_by_name():
    names = execute("eval_disentanglement", run_dir="disdiff_shapes3d", metrics=["mig"], baselines=["noise"], **FEW | dict(seeds=1))
    assert names["name"] == "shapes3d" and set(names["scores"]) == {"DisDiff", "noise"} and names["count"] == 8


def test_notebook_evaluates_a_run(trained, capsys):
    execute("eval_disentanglement", run_dir=str(trained), metrics=["dci", "mig", "factor_vae", "mcc"], **FEW)
    result = json.loads((trained / "eval_disentanglement.json").read_text())
    assert f"run directory: {trained}" in capsys.readouterr().out and (trained / "pictures" / "eval_disentanglement.png").exists()
    assert result["model"] == "LSD" and result["factors"] == dict(floor_hue=3, wall_hue=3, scale=2, shape=2) and result["images"] == 36
    assert set(result["scores"]) == {"LSD", "untrained", "PCA", "noise"} and all(math.isfinite(n) for n in numbers(result))
    score, (low, high) = result["scores"]["LSD"]["mig"], result["intervals"]["LSD"]["mig"]
    assert score["n"] == 2 and low <= score["mean"] <= high and len(result["importance"]) == result["codes"]
    assert result["scores"]["PCA"]["dci_disentanglement"]["mean"] > result["scores"]["noise"]["dci_disentanglement"]["mean"]


def test_what_the_run_was_trained_on_and_a_part_of_it(trained):
    names = execute("eval_disentanglement", run_dir=str(trained), n_images=16, seeds=1, metrics=["mig"], baselines=["noise"], cpu=True)
    assert names["factor_names"] == ["floor_hue", "wall_hue", "object_hue", "shape"] and names["intervals"]["LSD"]["mig"] is None
    assert set(names["codes"]) == {"LSD", "noise"} and len(names["images"]) == 16


def test_what_cannot_be_evaluated(trained, tmp_path):
    with pytest.raises(ValueError, match="'shapes' is not made of factors"): execute("eval_disentanglement", run_dir=str(trained), data="shapes", split="val", n_images=8)
    with pytest.raises(ValueError, match="baselines: guess unknown"): execute("eval_disentanglement", run_dir=str(trained), baselines=["guess"])
    with pytest.raises(ValueError, match="'dcii' unknown"): execute("eval_disentanglement", run_dir=str(trained), metrics=["dcii"], **FEW | dict(seeds=1))
    with pytest.raises(FileNotFoundError, match="nowhere"): execute("eval_disentanglement", run_dir=str(tmp_path / "nowhere"))
