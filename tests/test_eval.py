"""The evaluation notebooks run on a run directory, with few pictures, and leave numbers beside it"""
import json
import math
from pathlib import Path

import pytest
import torch
from test_natural_data import coco  # noqa: F401, a fixture

from decomp_nb.worlds.scenes import Scenes
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.parameters import parse_parameters
from decomp_nb.training.trainer import Trainer

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
FEW = {"eval_segmentation": dict(n_scenes=12, seeds=2, batch_size=5, examples=2),
       "eval_probing": dict(n_scenes=16, seeds=2, batch_size=6, min_pixels=1, properties=["color", "x"]),
       "eval_generation": dict(n_images=6, n_library=12, n_reference=16, seeds=2, sample_steps=2, extractor_steps=3, batch_size=4, examples=3)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A run directory of a tiny model after two steps"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "lsd"
    config = TrainConfig(out_dir=str(folder), max_steps=2, batch_size=4, trackers="", warmup_steps=0, cpu=True)
    Trainer(LSD(**lsd_preset("tiny")), Scenes("shapes", 8, size=16), config, extra_config={"data": "shapes", "options": {}, "n": 8, "size": 16}).fit()
    return folder


def execute(name: str, **parameters) -> dict:
    "Run the code cells of a notebook in one namespace, with other parameters; returns the namespace"
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    names = {"display": lambda *_: None}
    for cell in cells:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "skip-execution" in tags: continue
        source = "".join(cell["source"])
        exec(compile(source, f"{name}.ipynb, cell {cell['id']}", "exec"), names)
        if "parameters" in tags:
            assert set(parameters) <= set(parse_parameters(source))
            names |= parameters
    return names


def numbers(value):
    "All numbers in a nested result"
    if isinstance(value, dict): return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list): return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("name", FEW)
def test_notebook_evaluates_a_run(name, trained, capsys):
    execute(name, run_dir=str(trained), cpu=True, **FEW[name])
    result = json.loads((trained / f"{name}.json").read_text())
    assert f"run directory: {trained}" in capsys.readouterr().out and (trained / "pictures" / f"{name}.png").exists()
    assert result["model"] == "LSD" and result["data"] == "shapes" and all(math.isfinite(n) for n in numbers(result))
    if name == "eval_segmentation":
        assert set(result["scores"]) == {"LSD", "untrained", "k-means of colours", "grid", "random"} and result["scores"]["LSD"]["fg_ari"]["n"] == 2
        assert len(result["mbo_per_scene"]) == 12 and result["conventions"]["objects, missed = 0 (above)"]["mbo"] == result["scores"]["LSD"]["mbo"]
    if name == "eval_probing": assert {row["property"] for row in result["rows"]} == {"color", "x"} and result["raw_codes"]
    if name == "eval_generation":
        assert set(result["reconstruction"]) == {"LSD", "mean picture", "another picture"} and result["extractor"] == "own extractor"
        assert all("(own extractor)" in key for row in result["crowd"].values() for key in row)


def test_photographs_are_judged_by_instances_and_by_classes(trained, coco):  # noqa: F811
    names = execute("eval_segmentation", run_dir=str(trained), data=str(coco), data_options={"keep_empty": False}, cpu=True, **FEW["eval_segmentation"])
    result = json.loads((trained / "eval_segmentation.json").read_text())
    assert set(result["classes"]) == {"LSD", "untrained", "k-means of colours", "grid", "random"} and result["scores"]["LSD"]["n_objects"]["mean"] == 2
    assert 0 < result["classes"]["grid"]["mbo"]["mean"] < 1 and names["ignore"].any()
    perfect = torch.where(names["ignore"], 9, names["true"])  # what is painted where nobody judges does not matter
    assert names["scores_of"](perfect).compute()["mbo"] == 1
    by_class = torch.where(names["ignore"], 9, names["classes"])
    assert names["scores_of"](by_class, names["classes"]).compute()["miou"] == 1


def test_what_cannot_be_evaluated(trained, tmp_path):
    from PIL import Image
    for i in range(12): Image.new("RGB", (16, 16), (20 * i, 80, 120)).save(tmp_path / f"{i}.png")
    for name, message in (("eval_segmentation", "no true masks"), ("eval_probing", "no labels and no masks")):
        with pytest.raises(ValueError, match=message): execute(name, run_dir=str(trained), data=str(tmp_path), cpu=True, split="train")
    with pytest.raises(ValueError, match="colour not in the labels"): execute("eval_probing", run_dir=str(trained), properties=["colour"], cpu=True, n_scenes=4)
    with pytest.raises(FileNotFoundError, match="nowhere"): execute("eval_segmentation", run_dir=str(tmp_path / "nowhere"))
