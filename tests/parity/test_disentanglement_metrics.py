"""Disentanglement scores against values recorded from the official metrics.

Every array of `metrics.npz` and every value of `metrics.json` is either given to a computation or compared with its result; sizes, settings and cases are read from the files.
"""
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from recorded import processor, recorded_like_here

from decomp_nb.metrics import disentanglement as dis
from decomp_nb.metrics.attributes import tad

EXACT, SCORE, SOLVER = 0.0, 1e-6, 0.02  # SOLVER: readers that iterate, as the README of the data says
# The same trees where another processor rounds exp and log differently: equal splits change their order. Weights that
# differ by one part in 10¹⁵ move importances by 0.0044 (0.006 per code), disentanglement by 0.0013, completeness by
# 0.001, informativeness by 0.0025 (most of 10 tries); thrice that, rounded.
TIES = {"importance": 0.018, "disentanglement": 0.004, "completeness": 0.003, "informativeness": 0.0075}
TREES = {"importance": 0.03, "disentanglement": 0.01, "completeness": 0.01, "informativeness": 0.02}  # another order among exactly equal splits
OFFICIAL = dict(train=10_000, test=5_000, batch=64)  # "official sizes" of the end-to-end wrapper
GIVEN = {"representation", "factors", "tad.latents", "tad.targets"}
SETTINGS = {"versions", "factor_sizes", "num_train", "num_test", "batch_size_votes", "random_state", "tad.thresh", "tad.ent_red_thresh"}


@cache
def read(folder: Path) -> tuple[dict, dict]:
    "Arrays and (flattened) values"
    values = {}
    for name, value in json.loads((folder / "metrics.json").read_text()).items():
        nested = isinstance(value, dict) and name not in SETTINGS
        values |= flat(name, value) if nested else {name: value}
    return dict(np.load(folder / "metrics.npz")), values


def flat(name: str, value) -> dict:
    return {k: v for key, inner in value.items() for k, v in flat(f"{name}.{key}", inner).items()} if isinstance(value, dict) else {name: value}


def protocol(folder: Path) -> tuple[dis.FactorTable, dict]:
    "The table of the case and its settings; rows of the table are in any order, factors may have any size"
    arrays, values = read(folder)
    bins, threshold, batch = (float(re.search(p, (folder / "README.md").read_text())[1]) for p in
                              (r"(\d+) histogram bins", r"prune threshold ([\d.]+)", r"generate_batch batch (\d+)"))
    settings = dict(train=values["num_train"], test=values["num_test"], votes=values["batch_size_votes"], bins=int(bins), threshold=threshold, batch=int(batch))
    return dis.FactorTable(dis.reduce_codes(arrays["representation"]), arrays["factors"], values["factor_sizes"]), settings


def rng() -> np.random.RandomState: return np.random.RandomState(0)


def drawn(folder: Path):
    table, s = protocol(folder)
    return [v for rows in table.split(s["train"], s["test"], rng(), s["batch"]) for v in (table.codes[rows], table.factors[rows])]


def codes_and_draws(folder: Path) -> Iterator:
    arrays, _ = read(folder)
    table, _ = protocol(folder)
    signs = np.sign((table.codes * arrays["codes_pca"]).sum(0))  # a principal component has no sign
    yield "codes_pca", table.codes * signs, 1e-5
    x, y, test_x, test_y = drawn(folder)
    for name, ours, axis in (("mus_train", x * signs, 1e-5), ("ys_train", y, EXACT), ("mus_test", test_x * signs, 1e-5), ("ys_test", test_y, EXACT)):
        yield f"batch.{name}", ours.T, axis


def official_codes(folder: Path) -> tuple[dis.FactorTable, dict]:
    "The table with the recorded components: a sign decides to which side of a bin's edge a value falls"
    arrays, values = read(folder)
    return dis.FactorTable(arrays["codes_pca"], arrays["factors"], values["factor_sizes"]), protocol(folder)[1]


def samples(folder: Path):
    table, s = official_codes(folder)
    return [v for rows in table.split(s["train"], s["test"], rng(), s["batch"]) for v in (table.codes[rows], table.factors[rows])]


def games(folder: Path) -> Iterator:
    table, s = official_codes(folder)
    options = dict(train=s["train"], test=s["test"], batch=s["votes"])
    beta = dis.beta_vae(table, random=rng(), **options)
    yield "beta_vae.train_points_first5", beta.points[:5], SCORE
    yield "beta_vae.train_labels", beta.labels, EXACT
    yield "beta_vae.train_accuracy", beta.train_accuracy, SOLVER
    yield "beta_vae.eval_accuracy", beta.eval_accuracy, SOLVER
    factor = dis.factor_vae(table, threshold=s["threshold"], random=rng(), **options)
    yield "factor_vae.global_variances", factor.variances, 1e-5
    yield "factor_vae.active_dims", factor.active, EXACT
    for part in ("train", "eval"):  # the official columns are those of the active codes, moved to the left
        votes = getattr(factor, f"{part}_votes")
        yield f"factor_vae.{part}_votes", np.concatenate([votes[:, factor.active], votes[:, ~factor.active]], 1), EXACT
    yield "factor_vae.train_accuracy", factor.train_accuracy, SCORE
    yield "factor_vae.eval_accuracy", factor.eval_accuracy, SCORE
    yield "factor_vae.num_active_dims", len(factor.active), EXACT  # the official count is of all codes


def information(folder: Path) -> Iterator:
    x, y, test_x, test_y = samples(folder)
    bins = protocol(folder)[1]["bins"]
    discrete = dis.discretise(x, bins)
    matrix = dis.mutual_information(discrete, y)
    yield "mig.discretised", discrete.T, EXACT
    yield "mig.mutual_info", matrix, SCORE
    yield "mig.entropy", np.diag(dis.mutual_information(y, y)), SCORE
    yield "mig.discrete_mig", dis.mig(x, y, bins), SCORE
    yield "modularity_from_mi", dis.modularity(matrix), SCORE
    yield "modularity_explicitness.modularity_score", dis.modularity(matrix), SCORE
    for part, value in zip(("train", "test"), dis.explicitness(x, y, test_x, test_y)):
        yield f"modularity_explicitness.explicitness_score_{part}", value, SOLVER
    result = dis.med(x, y, test_x, test_y, top_k=top_k(folder), bins=bins)
    yield "med.importance", result.importance, SCORE
    yield "med.topk_pick", result.picked, EXACT
    for name in ("disentanglement", "completeness"):
        yield f"med.{name}", getattr(result, name), SCORE
        yield f"med.top{top_k(folder)}_{name}", getattr(result, f"top_{name}"), SCORE
    for part in ("train", "test"): yield f"med.informativeness_{part}", getattr(result, f"informativeness_{part}"), SOLVER


def top_k(folder: Path) -> int:
    return next(int(m[1]) for name in read(folder)[1] if (m := re.fullmatch(r"med\.top(\d+)_disentanglement", name)))


def single_codes(folder: Path) -> Iterator:
    x, y, test_x, test_y = samples(folder)
    for kind, matrix in (("discrete", dis.sap_matrix(x, y, test_x, test_y)), ("continuous", dis.sap_matrix(x, y, continuous=True))):
        tolerance = SOLVER if kind == "discrete" else SCORE
        yield f"sap.score_matrix_{kind}", matrix, tolerance
        yield f"sap_{kind}.SAP_score", dis.top_gap(matrix).mean(), tolerance
    result = dis.irs(x, y, bins=protocol(folder)[1]["bins"])
    yield "irs.matrix", result.matrix, SCORE
    yield "irs.max_deviations", result.max_deviations, SCORE
    yield "irs.IRS", result.score, SCORE
    yield "irs.num_active_dims", x[:, x.var(0) > 0].T.sum(dtype=x.dtype), 1e-3  # the official "count" is the sum of the codes


def trees(folder: Path, boosting: str) -> Iterator:
    result = dis.dci(*samples(folder), boosting=boosting)
    def tolerance(name): return tree_tolerance(folder, boosting, name.split("_")[0])
    yield "dci.importance", result.importance, tolerance("importance")
    for name in ("disentanglement", "completeness", "informativeness_train", "informativeness_test"):
        yield f"dci.{name}", getattr(result, name), tolerance(name)
    yield "dci.disentanglement_per_code", dis.concentration(result.importance), tolerance("importance")
    yield "dci.completeness_per_factor", dis.concentration(result.importance.T), tolerance("importance")


def tree_tolerance(folder: Path, boosting: str, kind: str) -> float:
    "Last bits where all is as recorded, the reach of ties on another processor or numpy, else that of other trees"
    import sklearn

    versions = read(folder)[1]["versions"]
    if boosting != "sklearn" or versions["sklearn"] != sklearn.__version__:
        return TREES[kind]
    cpu = versions.get("cpu", "AVX512")
    packages = {name: version for name, version in versions.items() if name != "cpu"}
    return SCORE if recorded_like_here(packages, cpu) else TIES[kind]


def attributes(folder: Path) -> Iterator:
    arrays, values = read(folder)
    result = tad(arrays["tad.latents"], arrays["tad.targets"], min_auroc=values["tad.thresh"], max_explained=values["tad.ent_red_thresh"])
    for name, ours in dict(aurocs=result.aurocs, aurs_diffs=result.differences, mi_matrix_diag=result.entropy, ent_red_prop=result.explained).items():
        yield f"tad.{name}", ours, SCORE
    yield "tad.base_rates", arrays["tad.targets"].mean(0), SCORE
    yield "tad.filter", result.counts, EXACT
    yield "tad.score", result.score, 1e-5
    yield "tad.attributes_captured", result.captured, EXACT


def end_to_end(folder: Path) -> Iterator:
    "`disentanglement_scores` on the vectors themselves, with its defaults, which are the official sizes"
    arrays, values = read(folder)
    ours = dis.disentanglement_scores(arrays["representation"], arrays["factors"], sizes=values["factor_sizes"], metrics=["beta_vae", "dci", "mig", "factor_vae"], **OFFICIAL)
    for name, key, tolerance in (("beta_VAE.eval_accuracy", "beta_vae", SOLVER), ("MIG.discrete_mig", "mig", 5e-3), ("factor_VAE.eval_accuracy", "factor_vae", 2e-3)):
        yield f"eval_func_official_sizes.{name}", ours[key], tolerance  # the sign of a component moves a few values across the edge of a bin
    for name in ("disentanglement", "completeness", "informativeness_train", "informativeness_test"):
        yield f"eval_func_official_sizes.dci.{name}", ours[f"dci_{name}"], TREES[name.split("_")[0]]
    table, s = protocol(folder)
    yield "eval_func_official_sizes.beta_VAE.train_accuracy", dis.beta_vae(table, **OFFICIAL).train_accuracy, SOLVER
    factor = dis.factor_vae(table, threshold=s["threshold"], **OFFICIAL)
    yield "eval_func_official_sizes.factor_VAE.train_accuracy", factor.train_accuracy, 2e-3
    yield "eval_func_official_sizes.factor_VAE.num_active_dims", len(factor.active), EXACT


CHECKS = {"codes": codes_and_draws, "games": games, "information": information, "single codes": single_codes, "trees": lambda f: trees(f, "fast"),
          "official trees": lambda f: trees(f, "sklearn"), "attributes": attributes, "end to end": end_to_end}


@cache
def results(folder: Path, check: str) -> list: return list(CHECKS[check](folder))


def expectation(folder: Path, name: str):
    arrays, values = read(folder)
    return np.asarray(arrays[name] if name in arrays else values[name], dtype=float)


def compare(ours, expected, tolerance: float, name: str) -> None:
    ours = np.asarray(ours, dtype=float)
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    apart = np.abs(ours - expected).max(initial=0)
    assert apart <= tolerance * max(1.0, np.abs(expected).max(initial=0)), f"{name}: {apart:.3g} apart, allowed {tolerance:g}"


@pytest.mark.parametrize("check", CHECKS)
def test_metrics_match_official(check, golden):
    folder = golden("disdiff")
    for name, ours, tolerance in results(folder, check): compare(ours, expectation(folder, name), tolerance, name)


def test_everything_is_compared(golden):
    folder = golden("disdiff")
    arrays, values = read(folder)
    compared = {name for check in CHECKS for name, *_ in results(folder, check)}
    assert set(arrays) - GIVEN == compared & set(arrays)
    assert set(values) - SETTINGS == compared - set(arrays)


@pytest.mark.parametrize("check", CHECKS)
def test_altered_value_fails(check, golden):
    "One entry changed by little more than the tolerance"
    folder = golden("disdiff")
    for name, ours, tolerance in results(folder, check):
        expected = expectation(folder, name).copy()
        sign = np.sign(expected.flat[-1] - np.asarray(ours, dtype=float).flat[-1]) or 1  # away from our value
        expected.flat[-1] += sign * max(1.0, np.abs(expected).max()) * (2 * tolerance + 1e-4)
        with pytest.raises(AssertionError, match=re.escape(name)): compare(ours, expected, tolerance, name)


# --- ties ---------------------------------------------------------------------------------------------------

def test_bits_are_asked_for_only_where_they_were_recorded():
    here = {"numpy": np.__version__}
    assert recorded_like_here(here, processor())
    assert not recorded_like_here(here, "another processor")
    assert not recorded_like_here({"numpy": "1.0"}, processor())
    assert not recorded_like_here(here | {"no_such_package": "1.0"}, processor())


def test_ties_do_not_hide_other_trees(golden, monkeypatch):
    "Splits in another order stay within the loose tolerances; trees of another depth, or features mixed up, do not"
    import sklearn.ensemble

    folder = golden("disdiff")
    x, y, test_x, test_y = samples(folder)
    y, test_y, expected = (
        y[:, :2],
        test_y[:, :2],
        expectation(folder, "dci.importance")[:, :2],
    )  # every factor has trees of its own
    build = sklearn.ensemble.GradientBoostingClassifier

    class LastBits(build):
        def fit(self, codes, labels):
            return super().fit(codes, labels, 1 + 1e-15 * np.random.RandomState(0).randn(len(codes)))

    monkeypatch.setattr(sklearn.ensemble, "GradientBoostingClassifier", LastBits)
    compare(
        dis.dci(x, y, test_x, test_y, boosting="sklearn").importance,
        expected,
        TIES["importance"],
        "importance",
    )
    monkeypatch.setattr(
        sklearn.ensemble, "GradientBoostingClassifier", lambda **options: build(**options, max_depth=2)
    )
    wrong = dis.dci(x, y, test_x, test_y, boosting="sklearn").importance
    for fault in (wrong, expected[::-1]):
        with pytest.raises(AssertionError, match="importance"):
            compare(fault, expected, TIES["importance"], "importance")
