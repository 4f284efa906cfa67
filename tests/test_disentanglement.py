"""Properties that disentanglement scores must have, whatever wrote the codes"""
import warnings

import numpy as np
import pytest
import torch

from decomp_nb.metrics import disentanglement as dis
from decomp_nb.metrics.attributes import tad

SIZES = (4, 3, 5)
FEW = dict(train=250, test=120, batch=16)
NOISE_FREE = {"dci_disentanglement", "dci_completeness", "dci_informativeness_train", "dci_informativeness_test", "mig", "modularity", "mcc_linear", "mcc_rank",
              "beta_vae", "factor_vae", "explicitness_test", "irs"}


def grid(sizes=SIZES) -> np.ndarray: return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), 1)


def rotated(codes: np.ndarray, seed=0) -> np.ndarray:
    return codes @ np.linalg.qr(np.random.default_rng(seed).normal(size=(codes.shape[1],) * 2))[0]


@pytest.fixture(scope="module")
def worlds() -> dict:
    "Scores of perfect, rotated and random codes"
    truth, random = grid(), np.random.default_rng(0)
    codes = {"perfect": truth.astype(float), "rotated": rotated((truth - truth.mean(0)) / truth.std(0)), "random": random.normal(size=truth.shape)}
    return {name: dis.disentanglement_scores(c, truth, **FEW) for name, c in codes.items()}


def test_perfect_codes_score_one(worlds):
    assert {name: worlds["perfect"][name] for name in NOISE_FREE} == {name: pytest.approx(1, abs=0.02) for name in NOISE_FREE}
    assert min(value for name, value in worlds["perfect"].items() if "med" in name) > 0.85  # 300 samples: a little information by chance


def test_random_codes_are_low_and_rotation_costs(worlds):
    perfect, mixed, noise = worlds["perfect"], worlds["rotated"], worlds["random"]
    assert all(0 <= value <= 1 + 1e-9 for scores in worlds.values() for value in scores.values())
    for name in ("dci_disentanglement", "dci_completeness", "mig", "sap", "med_disentanglement"): assert noise[name] < 0.15, name
    for name in ("beta_vae", "factor_vae"): assert noise[name] < 0.6, name
    for name in ("dci_disentanglement", "mig", "irs", "mcc_linear", "factor_vae"): assert noise[name] < mixed[name] <= perfect[name], name
    assert mixed["explicitness_test"] > 0.95  # nothing was lost


def test_order_sign_and_scale_of_codes_do_not_matter():
    truth = grid()
    codes = rotated(truth.astype(float)) + 0.1 * np.random.default_rng(1).normal(size=truth.shape)
    other = (codes * [-3, 0.5, 8])[:, [2, 0, 1]]
    some = ["mig", "mcc", "modularity", "dci", "factor_vae"]  # IRS weights codes by how far they move
    a, b = (dis.disentanglement_scores(c, truth, metrics=some, **FEW) for c in (codes, other))
    for name in a: assert a[name] == pytest.approx(b[name], abs=0.03), name
    assert a["mcc_linear"] == pytest.approx(b["mcc_linear"])


def test_order_of_the_rows_of_a_grid_does_not_matter():
    truth = grid()
    codes, order = rotated(truth.astype(float)), np.random.default_rng(2).permutation(len(truth))
    a, b = (dis.disentanglement_scores(codes[rows], truth[rows], metrics=["beta_vae", "factor_vae", "mig", "dci"], **FEW) for rows in (np.arange(len(truth)), order))
    assert a == pytest.approx(b, abs=1e-9)


def test_seeds_repeat_and_differ():
    truth, codes = grid(), np.random.default_rng(0).normal(size=(60, 4))
    before = np.random.get_state()[1].copy()
    runs = [dis.disentanglement_scores(codes, truth, metrics=["factor_vae", "mig"], seed=seed, **FEW) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2] and (np.random.get_state()[1] == before).all()


def test_tables_that_are_no_grid():
    random = np.random.default_rng(0)
    truth = random.integers(0, 4, (300, 3))
    table = dis.FactorTable(truth + 0.01 * random.normal(size=truth.shape), truth)
    train, test = table.split(None, None, np.random.RandomState(0))
    assert not table.is_grid and not set(train) & set(test) and len(train) == 200 and len(test) == 100
    rows = table.with_value(np.arange(50), 1, table.factors[:50, 1], np.random.RandomState(0))
    assert (table.factors[rows, 1] == table.factors[:50, 1]).all()
    scores = dis.disentanglement_scores(table.codes, truth, metrics=["dci", "mig", "factor_vae"])
    assert dis.beta_vae(table, train=200, test=100, batch=16).eval_accuracy > 0.98
    assert scores["dci_disentanglement"] > 0.98 and scores["factor_vae"] > 0.98


def test_vectors_and_tensors():
    truth = grid()
    vectors = torch.tensor(truth)[:, :, None] * torch.tensor([1.0, -2.0, 0.5])
    for how in ("pca", "mean"): assert dis.mcc(dis.reduce_codes(vectors, how), truth) > 0.999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dis.reduce_codes(torch.cat([vectors, torch.zeros(60, 1, 3)], 1))[:, 3].any()  # a factor that says nothing
    flat = dis.reduce_codes(vectors, "flatten")
    found = dis.dci(flat, truth, flat, truth)
    assert flat.shape == (60, 9) and dis.completeness(dis.group_importance(found.importance, 3)) > 0.98
    assert dis.disentanglement_scores(vectors, torch.tensor(truth), metrics=["mig"], **FEW)["mig"] > 0.98


# trees

def sample(n, classes, seed=0, decimals=None):
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    x = (random.normal(size=(n, 5)) + np.stack([y, 0.5 * y, y == 1, 0 * y, 0 * y], 1)).astype(np.float32)
    return (x if decimals is None else x.round(decimals)), y


@pytest.mark.parametrize("classes, decimals", [(2, None), (3, None), (3, 1)])
def test_trees_are_those_of_scikit_learn(classes, decimals):
    from sklearn.ensemble import GradientBoostingClassifier
    x, y = sample(3000, classes, decimals=decimals)
    ours = dis.boosted_trees(x[:2000], y[:2000], x[2000:], stages=10)
    theirs = GradientBoostingClassifier(n_estimators=10, random_state=0).fit(x[:2000], y[:2000])
    np.testing.assert_allclose(ours.importance, theirs.feature_importances_, atol=2e-4)
    assert np.mean(ours.train != theirs.predict(x[:2000])) < 2e-3 and np.mean(ours.test != theirs.predict(x[2000:])) < 5e-3


def test_trees_of_codes_that_say_nothing():
    constant = dis.boosted_trees(np.ones((50, 2)), np.arange(50) % 3, np.ones((5, 2)), stages=3)
    assert constant.importance.tolist() == [0, 0]
    ties = dis.boosted_trees(np.repeat([[0.0], [1.0]], 20, 0), np.repeat([3, 7], 20), np.array([[0.2], [0.9]]), stages=3)
    assert ties.importance.tolist() == [1] and ties.test.tolist() == [3, 7]


# single scores

def test_extremes_of_importance():
    assert dis.disentanglement(np.eye(5)) == pytest.approx(1) and dis.completeness(np.ones((3, 4))) == pytest.approx(0, abs=1e-9)
    assert dis.disentanglement(np.zeros((3, 4))) == pytest.approx(0, abs=1e-9)
    assert dis.top_codes(np.array([[0.9, 0], [0.8, 0.1], [0.7, 0.2], [0, 1.0]]), 2).tolist() == [0, 1, 3]


def test_mcc_needs_a_code_for_each_factor():
    truth = grid()
    assert dis.mcc(truth[:, :2], truth) == pytest.approx(2 / 3) and dis.mcc(np.ones((60, 3)), truth) == 0
    assert dis.mcc(truth ** 3.0, truth, "rank") == pytest.approx(1)
    assert dis.mcc(truth ** 3.0, truth) < 0.99


def test_dead_codes_have_no_vote_and_do_no_harm():
    truth = grid()
    table = dis.FactorTable(np.c_[np.zeros(60), truth, np.full(60, 2.0)], truth)
    result = dis.factor_vae(table, train=200, test=100, batch=16)
    assert result.active.tolist() == [False, True, True, True, False] and result.eval_accuracy == 1 and result.train_votes[:, [0, 4]].sum() == 0
    assert dis.irs(table.codes, truth).active_codes == 3
    nothing = dis.FactorTable(np.zeros((60, 2)), truth)
    assert dis.factor_vae(nothing, train=10, test=5, batch=4).eval_accuracy == 0 and dis.irs(nothing.codes, truth).score == 0
    tiny = dis.FactorTable(1e-3 * truth, truth)
    assert not dis.factor_vae(tiny, train=10, test=5, batch=4).active.any() and dis.factor_vae(tiny, train=99, test=50, batch=8, scale_invariant=True).eval_accuracy == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        scores = dis.disentanglement_scores(table.codes, truth, **FEW)
    assert all(np.isfinite(v) for v in scores.values())


def test_tad_of_known_detectors():
    random = np.random.default_rng(0)
    codes = random.uniform(size=(2000, 4))
    attributes = np.stack([codes[:, 0] > 0.5, codes[:, 1] < 0.3, codes[:, 1] < 0.3, random.random(2000) < 0.5], 1).astype(int)
    result = tad(codes, attributes)
    assert result.counts.tolist() == [True, False, False, False] and result.captured == 1  # 1 and 2 explain each other, 3 is a coin
    assert result.aurocs[0].argmax() == 0 and result.aurocs[1].argmax() == 1 and result.score == pytest.approx(result.differences[0])
    assert (tad(codes * 0.1, attributes).aurocs == 0.5).all()  # codes that hardly move detect nothing


# bad input

@pytest.mark.parametrize("codes, factors, options, message", [
    (np.zeros((10, 3)), np.zeros((9, 2)), {}, "factor 0 has the same value in all 9 rows|10 rows of codes, 9 of factors"),
    (np.zeros((60, 3)), grid()[:, [0, 0]] * [1, 0], {}, "factor 1 has the same value in all 60 rows"),
    (np.zeros((60, 3)), grid(), dict(names=["hue", "size", "shape"], sizes=(4, 2, 5)), "size has the value 2, but only 2 values"),
    (np.zeros((60, 3)), grid() - 1, {}, "hold -1"),
    (np.zeros((60, 3)), grid() + 0.5, {}, "whole numbers"),
    (np.full((60, 3), np.nan), grid(), {}, "NaN"),
    (np.zeros(60), grid(), {}, "codes have the shape"),
    (np.zeros((60, 3)), grid()[:, 0], {}, "factors have the shape"),
    (np.zeros((60, 1)), grid(), dict(metrics=["mig"]), "at least 2 codes"),
    (np.zeros((60, 3)), grid(), dict(metrics=["dcii"]), "'dcii' unknown"),
    (np.zeros((60, 3, 2)), grid(), dict(reduce="max"), "reduce='max'"),
    (np.zeros((60, 3)), grid(), dict(metrics=["dci"], boosting="xgb"), "boosting='xgb'"),
    (np.zeros((59, 3)), grid()[:59], dict(metrics=["mig"], train=50, test=20), "50 rows to train and 20 to test are needed, the table has 59"),
    (np.arange(120.0).reshape(40, 3), np.stack([np.arange(40), np.arange(40) % 2], 1), dict(metrics=["factor_vae"], train=30, test=10), "no two rows share a value of factor 0"),
])
def test_bad_input(codes, factors, options, message):
    with pytest.raises(ValueError, match=message): dis.disentanglement_scores(codes, factors, **options)


def test_bad_attributes():
    with pytest.raises(ValueError, match="attribute 1 is the same in all 5 rows"): tad(np.eye(5), np.array([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).T)
    with pytest.raises(ValueError, match="0 or 1"): tad(np.eye(5), np.arange(5)[:, None])
