"""Segmentation scores and property probes against results recorded from official LSD's evaluation.

`check_metrics(folder)` and `check_probe(folder)` read every case, shape and constant from the files of the folder and raise an AssertionError
that names the array that differs.
"""
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.slots import masks_from_attention
from decomp_nb.metrics.probing import official_lsd_probe, official_lsd_readers, official_lsd_targets, pairs_of_scenes
from decomp_nb.metrics.segmentation import SegmentationScores, official_lsd_scenes, official_lsd_scores, segmentation

SCORE, WEIGHT = 1e-6, 1e-5  # absolute tolerance of scores; of probe weights after training
SAME = 0.0
PER_OBJECT = {"iou_matched_per_object": "iou", "best_overlap_per_object": "best"}
ROUNDED = 5e-5 + 1e-12  # the probe's scores were written with four decimals


def compare(ours, expected, tolerance: float, name: str) -> None:
    "Equal shapes, NaN in the same places, otherwise within the absolute tolerance"
    ours, expected = (torch.as_tensor(v, dtype=torch.double) for v in (ours, expected))
    try: torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance, equal_nan=True)
    except AssertionError as error: raise AssertionError(f"{name}: {error}") from None


def read(folder: Path) -> tuple[dict, dict]:
    "Arrays and values of the metric cases"
    return load_file(folder / "metrics.safetensors"), json.loads((folder / "metrics.json").read_text())


def cases(values: dict) -> list[str]: return [name for name, case in values.items() if "fg_ari_per_image" in case]


def score_case(arrays: dict, values: dict, case: str):
    "Predicted labels and official scenes of one case, from attention, true masks and visibility"
    true, attention = arrays[f"{case}.masks"], arrays[f"{case}.attn"]
    assert attention.shape[-1] == values[case]["num_slots"]
    masks = masks_from_attention(attention, true.shape[-2:])
    return segmentation(masks), official_lsd_scenes(true, masks, visibility=arrays[f"{case}.visibility"], max_objects=values[case]["max_num_obj"])


def metric_results(folder: Path) -> Iterator[tuple[str, object, float]]:
    "(name, our result, tolerance) for everything that is expected of the metric cases; array names hold a dot, values a slash"
    arrays, values = read(folder)
    scored = {case: score_case(arrays, values, case) for case in cases(values)}
    for case, (labels, scenes) in scored.items():
        yield f"{case}.pred_labels", labels, SAME
        yield f"{case}.matching", assignments(scenes.slot), SAME
        yield f"{case}/fg_ari_per_image", scenes.fg_ari, SCORE
        for name, ours in PER_OBJECT.items(): yield f"{case}/{name}", getattr(scenes, ours)[scenes.counted], SCORE
        some = scenes.counted.any(1)  # the official lists skip images without objects
        for name, ours in (("miou_per_image", "iou"), ("mbo_per_image", "best")):
            yield f"{case}/{name}", scenes.per_image(ours)[some], SCORE
        for name, value in official_lsd_scores(scenes).items(): yield f"{case}/{name}", value, SCORE
    data = SegmentationScores()
    for case in values["aggregate"]["cases_in_order"]: data.add(scored[case][1])
    for name, value in official_lsd_scores(data).items(): yield f"aggregate/{name}", value, SCORE


def assignments(slot: torch.Tensor) -> torch.Tensor:
    "Slot of each row, −1 = none → `(b,2,n)`: matched rows and their slots, as recorded"
    rows = [s.ge(0).nonzero().flatten() for s in slot]
    return torch.stack([torch.stack([r, s[r]]) for r, s in zip(rows, slot)])


def metric_expectation(folder: Path, name: str):
    arrays, values = read(folder)
    if name in arrays: return arrays[name]
    case, key = name.split("/")
    return values[case][key]


def check_metrics(folder: Path) -> None:
    "Labels, assignments and every value of every metric case and of the aggregate"
    for name, ours, tolerance in metric_results(folder): compare(ours, metric_expectation(folder, name), tolerance, f"metrics {name}")


def probe_results(folder: Path) -> Iterator[tuple[str, object, float]]:
    "(name, our result, tolerance) for everything that is expected of the probe, from slots and attention to trained readers"
    arrays, values = load_file(folder / "probe.safetensors"), json.loads((folder / "metrics.json").read_text())["probe"]
    seen, true = arrays["label.visibility"], arrays["masks"]
    masks = masks_from_attention(arrays["attn"], true.shape[-2:])
    pairs = pairs_of_scenes(official_lsd_scenes(true, masks, visibility=seen, max_objects=seen.shape[1]))
    codes, order = pairs.codes(arrays["slots"]), arrays["shuffle_idx"]
    kinds = {name.split(".")[2]: name.split(".")[1] for name in arrays if name.startswith("init.")}
    labels = {name: pairs.labels(arrays[f"label.{name}"]) for name in kinds}
    labels = {name: y.long() if kinds[name] == "discrete" else y.float() for name, y in labels.items()}
    n = int(len(codes) * values["train_portion"])
    yield "n_train", n, SAME
    yield "n_test", len(codes) - n, SAME
    yield "slots_train", codes[order][:n], SAME
    yield "slots_test", codes[order][n:], SAME
    for name, y in official_lsd_targets(labels).items():
        yield f"train.{name}", y[order][:n], SCORE
        yield f"test.{name}", y[order][n:], SCORE
    readers = official_lsd_readers(codes.shape[1], labels)
    readers.load_state_dict({key.split(".", 2)[2]: value for key, value in arrays.items() if key.startswith("init.")})
    result = official_lsd_probe(codes, labels, order, readers=readers, train_portion=values["train_portion"], steps=values["steps"])
    yield "final_train_loss_sum_before_divide_by_N", result.loss, WEIGHT
    for key, value in result.readers.state_dict().items(): yield f"final.{key}", value, WEIGHT
    for name, score in result.scores.items(): yield f"{kinds[name]} {name}", score, ROUNDED


def probe_expectation(folder: Path, name: str):
    arrays, values = load_file(folder / "probe.safetensors"), json.loads((folder / "metrics.json").read_text())["probe"]
    if name in arrays: return arrays[name]
    return values["results_test"][name] if name in values["results_test"] else values[name]


def check_probe(folder: Path) -> None:
    "Matched slots, targets, training and scores of the property probe"
    for name, ours, tolerance in probe_results(folder): compare(ours, probe_expectation(folder, name), tolerance, f"probe {name}")


CHECKS = {"metrics": (check_metrics, metric_results, metric_expectation), "probe": (check_probe, probe_results, probe_expectation)}


@pytest.mark.parametrize("group", CHECKS)
def test_metrics_match_official(group, golden):
    CHECKS[group][0](golden("lsd"))


def test_every_metric_is_compared(golden):
    "Every array and every value of the files is either given to a computation or compared with its result"
    folder = golden("lsd")
    arrays, values = read(folder)
    compared = {name for name, *_ in metric_results(folder)}
    given = {f"{case}.{kind}" for case in cases(values) for kind in ("attn", "masks", "visibility")}
    assert set(arrays) == given | {name for name in compared if "." in name and name in arrays}
    settings = {"note", "max_num_obj", "num_slots", "cases_in_order"}
    expected = {f"{case}/{key}" for case, entry in values.items() if case != "probe" for key in entry if key not in settings}
    assert expected == {name for name in compared if name not in arrays}
    arrays, values = load_file(folder / "probe.safetensors"), values["probe"]
    compared = {name for name, *_ in probe_results(folder)}
    given = {name for name in arrays if name.split(".")[0] in ("attn", "masks", "slots", "shuffle_idx", "init", "label")}
    assert set(arrays) == given | (compared & set(arrays)) and not given & compared
    assert compared - set(arrays) == set(values["results_test"]) | {"n_train", "n_test", "final_train_loss_sum_before_divide_by_N"}


def altered(expected):
    "The expectation with one entry changed by little more than rounding; NaN becomes a number"
    value = torch.as_tensor(expected, dtype=torch.double).clone()
    flat = value.view(-1)
    flat[-1] = 0.5 if flat[-1].isnan() else flat[-1] + 3e-4 * (1 + flat[-1].abs())
    return value


@pytest.mark.parametrize("group", CHECKS)
def test_altered_metric_fails(group, golden):
    "Changing one entry of any expected array or value makes its comparison fail"
    folder = golden("lsd")
    _, results, expectation = CHECKS[group]
    for name, ours, tolerance in results(folder):
        with pytest.raises(AssertionError, match="changed"): compare(ours, altered(expectation(folder, name)), tolerance, "changed")


def altered_copy(folder: Path, to: Path, file: str, name: str) -> Path:
    "A copy of the metric files with one entry of one array changed"
    to.mkdir()
    for path in (*folder.glob("metrics.*"), folder / "probe.safetensors"): shutil.copy(path, to / path.name)
    (to / file).chmod(0o644)
    arrays = load_file(folder / file)
    flat = arrays[name].reshape(-1).clone()
    flat[0] = flat[0] + 1
    arrays[name] = flat.view(arrays[name].shape)
    save_file(arrays, to / file)
    return to


@pytest.mark.parametrize("file, kinds", [("metrics.safetensors", ("pred_labels", "matching")), ("probe.safetensors", ("slots_train", "train", "test", "final"))])
def test_altered_metric_file_fails(file, kinds, golden, tmp_path):
    "The checks themselves fail on a folder in which one expected array is altered"
    folder = golden("lsd")
    check = check_metrics if file.startswith("metrics") else check_probe
    for i, kind in enumerate(kinds):
        name = next(n for n in load_file(folder / file) if kind in (n.split(".")[0], n.split(".")[-1]))
        with pytest.raises(AssertionError, match=name.replace(".", r"\.")): check(altered_copy(folder, tmp_path / str(i), file, name))
