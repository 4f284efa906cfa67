"The comparison of slot methods in miniature: one table from one run, two budgets, and nothing trained twice."
import csv
import json
import math

import pytest
from test_eval import execute

from decomp_nb.training.run_directory import Run
from decomp_nb.training.trainer import Trainer

TINY = dict(n_images=24, image_budget=32, time_budget=0.3, clock="processor", eval_scenes=4, n_evaluations=2, n_reference=12, sample_steps=2, examples=2, batch_size=8, seeds=[3], cpu=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "Folder and namespace of a comparison of all four methods"
    folder = tmp_path_factory.mktemp("compare")
    return folder, execute("compare_slots", out_dir=str(folder), **TINY)


def test_every_method_is_judged_at_both_budgets(compared):
    folder, names = compared
    result = json.loads((folder / "results.json").read_text())
    assert {(r["method"], r["discipline"]) for r in result["results"]} == {(m, d) for m in names["methods"] for d in ("images", "time")}
    for found in result["results"]:
        run = Run(names["path_of"](found["method"], 3))
        spent, images = ([row[f"eval/{k}"] for row in run.metrics("eval")] for k in ("spent", "images"))
        assert images[0] == 0 and spent == sorted(spent) and images[-1] >= 32 and spent[-1] >= 0.3
        if found["discipline"] == "images": assert found["images"] == 32
        else: assert found["spent"] >= 0.3 and found["spent"] == next(s for s in spent if s >= 0.3)
        assert all(math.isfinite(found[k]) for k in ("mbo", "miou", "psnr", "fid")) and len(found["scenes"]["mbo"]) == 4
    assert {"a grid", "random", "k-means of colours", "slots before training", "real pictures"} <= {r["method"] for r in result["rows"]}
    assert set(result["ceilings"]) == {"SLATE", "LSD", "SlotDiffusion"}
    assert all(found["psnr"] < result["ceilings"].get(found["method"], math.inf) for found in result["results"])
    assert len(list(csv.DictReader((folder / "results.csv").open()))) == 8


def test_all_begin_with_the_same_eyes(compared):
    _, names = compared
    def eyes(method):
        names["torch"].manual_seed(3)
        return {k: v for k, v in names["builders"][method]().state_dict().items() if k.startswith(("encoder.", "slot_attention."))}
    first, *others = map(eyes, names["methods"])
    for other in others: assert first.keys() == other.keys() and all((first[k] == other[k]).all() for k in first)


def test_a_second_run_trains_nothing(compared, monkeypatch, capsys):
    folder, names = compared
    def refuse(*_): raise AssertionError("trained again")
    monkeypatch.setattr(Trainer, "fit", refuse)
    (folder / "lsd-3" / "scores-time.json").unlink()  # scores that are missing are made from the weights that were put aside
    again = execute("compare_slots", out_dir=str(folder), **TINY)
    assert again["results"]["LSD", 3, "time"]["mbo"] == pytest.approx(names["results"]["LSD", 3, "time"]["mbo"])


def test_a_cut_run_goes_on_with_its_clock(compared):
    folder, names = compared
    train = names["train"]

    def until(images):
        names.update(image_budget=images, time_budget=0.0, path_of=lambda method, seed: folder / "cut")
        return train("Slot Attention", 3)

    first = until(16)
    second = until(32)
    assert first["images"] == 16 and second["images"] == 32 and second["seconds"] > first["seconds"]


def test_misspelt_methods_and_clocks(tmp_path):
    with pytest.raises(ValueError, match="sundial"): execute("compare_slots", out_dir=str(tmp_path), **{**TINY, "clock": "sundial"})
    with pytest.raises(ValueError, match="Slate"): execute("compare_slots", out_dir=str(tmp_path), **{**TINY, "methods": ["Slate"]})
