"""Properties that scores must have, whatever the picture"""
import json
import math
import time
from importlib import import_module
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from reference_metrics import loop_scores

from decomp_nb.metrics import extractors, generation, probing
from decomp_nb.metrics import segmentation as seg
from decomp_nb.metrics.tables import Spread, Table, spread, spread_of_runs, write_results


def rng(seed=0): return torch.Generator().manual_seed(seed)


def scenes(b=6, size=32, objects=4, slots=6, wrong=0.3, seed=0):
    "True labels of blocky objects and a prediction that is wrong on a share of the pixels"
    g = rng(seed)
    true = F.interpolate(torch.randint(0, objects + 1, (b, 1, 6, 6), generator=g).float(), (size, size))[:, 0].long()
    noise = torch.randint(0, slots, true.shape, generator=g)
    return true, torch.where(torch.rand(true.shape, generator=g) < wrong, noise, torch.randperm(slots, generator=g)[true])


# segmentation

@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_loop(seed):
    true, pred = scenes(seed=seed, wrong=0.2 * seed)
    scores, expected = seg.segmentation_scores(true, pred), loop_scores(true, pred, 6)
    assert {name: pytest.approx(scores[name], abs=1e-7) for name in expected} == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type(dtype):
    true, pred = scenes()
    assert torch.equal(seg.contingency(true.to(dtype), pred.to(dtype)), seg.contingency(true, pred))


def test_names_of_segments_do_not_matter():
    true, pred = scenes()
    renamed = torch.randperm(6, generator=rng(5))[pred]
    for score in (seg.ari, seg.fg_ari, seg.miou, seg.mbo):
        torch.testing.assert_close(score(true, pred), score(true, renamed), rtol=0, atol=1e-12)


def test_perfect_is_one_and_random_is_near_zero():
    true, _ = scenes(b=16, size=64)
    random = seg.random_partition(true.shape, 7, rng())
    for score in (seg.ari, seg.fg_ari, seg.miou, seg.mbo): assert torch.equal(score(true, true), torch.ones(16, dtype=torch.double))
    for score in (seg.ari, seg.fg_ari): assert score(true, random).abs().max() < 0.01
    assert seg.miou(true, random).max() < 0.15


def test_best_overlap_is_never_below_the_matched_one():
    for seed in range(4):
        true, pred = scenes(seed=seed, slots=5, wrong=0.6)
        assert (seg.mbo(true, pred) >= seg.miou(true, pred)).all()


def test_video_counts_time_as_space():
    true, pred = scenes(b=6)
    stacked = torch.cat(list(true), 1)[None], torch.cat(list(pred), 1)[None]
    clip = true[None], pred[None]
    for score in (seg.ari, seg.fg_ari, seg.miou, seg.mbo): torch.testing.assert_close(score(*clip), score(*stacked))


def test_ignored_pixels_count_nowhere():
    true, pred = scenes()
    void = torch.rand(true.shape, generator=rng(1)) < 0.3
    expected = seg.contingency(true, pred) - torch.stack([torch.bincount(t[v] * 6 + p[v], minlength=30).view(5, 6) for t, p, v in zip(true, pred, void)])
    assert torch.equal(seg.contingency(true, pred, ignore=void), expected)
    assert torch.equal(seg.contingency(torch.where(void, -1, true), pred), expected)


def test_degenerate_scenes_are_never_nan_in_the_mean():
    true, pred = scenes()
    cases = {"no foreground": torch.zeros_like(true), "only foreground": torch.ones_like(true), "usual": true}
    data = seg.SegmentationScores()
    for t in cases.values(): data.update(t, torch.zeros_like(pred)); data.update(t, pred)
    scores = data.compute()
    assert all(math.isfinite(v) for v in scores.values()) and all(math.isfinite(v) for v in data.compute("image").values())
    assert scores["n_images"] == 36 and data.per_image()["miou"].isnan().sum() == 12
    assert math.isnan(seg.segmentation_scores(cases["no foreground"], pred)["fg_ari"])


def test_empty_slots_and_absent_visible_objects_change_nothing():
    true, pred = scenes()
    seen = torch.ones(6, 9)
    soft = F.one_hot(pred, 12).permute(0, 3, 1, 2).float()  # six slots that own no pixel
    assert seg.segmentation_scores(true, soft, visibility=seen) == seg.segmentation_scores(true, pred)


def test_visibility_selects_objects():
    true, pred = scenes()
    seen = torch.ones(6, 4); seen[:, 1] = 0
    without = seg.scene_scores(true, pred, visibility=seen)
    assert not without.counted[:, 2].any() and without.counted[:, 1].all()
    with pytest.raises(ValueError, match="visibility has 2 objects"): seg.scene_scores(true, pred, visibility=seen[:, :2])


def test_batches_do_not_matter():
    true, pred = scenes(b=10)
    parts, whole = seg.SegmentationScores(), seg.SegmentationScores()
    for t, p in zip(true.split(3), pred.split(3)): parts.update(t, p)
    whole.update(true, pred)
    assert parts.compute() == pytest.approx(whole.compute()) and parts.compute("image") == pytest.approx(whole.compute("image"))


def test_conventions():
    true, _ = scenes()
    one = torch.zeros_like(true)
    assert seg.miou(true, one).mean() < seg.miou(true, one, unmatched="drop").mean()
    assert seg.scene_scores(true, one, background="include").counted[:, 0].all()
    assert not seg.scene_scores(true, true, min_pixels=10 ** 6).counted.any()
    for wrong in (dict(background="maybe"), dict(unmatched="keep"), dict(average="pixel")):
        with pytest.raises(ValueError, match="must be one of"): seg.segmentation_scores(true, one, **wrong)


@pytest.mark.parametrize("change, message", [
    (lambda t, p: (t, p[:, :16]), "differ in shape"), (lambda t, p: (t.float(), p), "must be integers"), (lambda t, p: (t, p - 1), "must be ≥ 0"),
    (lambda t, p: (t * 100000, p * 1000), "renumber")])
def test_bad_labels(change, message):
    with pytest.raises(ValueError, match=message): seg.contingency(*change(*scenes()))


def test_labels_beyond_the_stated_table():
    true, pred = scenes()
    with pytest.raises(ValueError, match="true labels reach 4"): seg.contingency(true, pred, n_true=4)
    with pytest.raises(ValueError, match="predicted labels reach 5"): seg.contingency(true, pred, n_pred=5)


def test_match_is_optimal_and_one_to_one():
    table = torch.rand(5, 4, 6, generator=rng())
    slot = seg.match(table)
    best = max(sum(table[0, i, j] for i, j in enumerate(p)) for p in permutations(range(6), 4))
    torch.testing.assert_close(table[0].gather(1, slot[0][:, None]).sum(), best)
    assert all(len(set(s.tolist())) == 4 for s in slot)
    rows = torch.tensor([True, False, True, False]).expand(5, 4)
    assert (seg.match(table, rows)[:, 1] == -1).all() and (seg.match(table[:, :, :1]) >= 0).sum() == 5


def test_soft_masks_are_enlarged_before_the_argmax():
    masks = torch.rand(2, 5, 4, 4, generator=rng())
    enlarged = F.interpolate(masks, (32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(seg.segmentation(masks, (32, 32)), enlarged.argmax(1)) and torch.equal(seg.segmentation(enlarged, (32, 32)), enlarged.argmax(1))


def test_partitions():
    grid = seg.grid_partition((2, 30, 20), 7)
    assert grid.shape == (2, 30, 20) and torch.bincount(grid[0].flatten()).min() > 30 * 20 / 7 * 0.6
    assert torch.equal(seg.random_partition((2, 8, 8), 4, rng(1)), seg.random_partition((2, 8, 8), 4, rng(1)))


def test_much_faster_than_the_loop():
    true, pred = scenes(b=64, size=128, objects=10, slots=11)
    def seconds(f, n): return min((f(), time.process_time() - start)[1] for start in (time.process_time() for _ in range(n)))
    slow = seconds(lambda: loop_scores(true[:8], pred[:8], 11), 1) * 8
    assert slow / seconds(lambda: seg.segmentation_scores(true, pred), 8) > 20


# probes

def world(n_images=60, per_image=4, d=12, seed=0):
    "Codes in which class and place can be read and nothing else"
    g = rng(seed)
    n = n_images * per_image
    kind, place = torch.randint(0, 3, (n,), generator=g), torch.rand(n, 2, generator=g)
    codes = torch.cat([F.one_hot(kind, 3), place * 2], 1) @ torch.randn(5, d, generator=g) + 0.05 * torch.randn(n, d, generator=g)
    return codes, dict(kind=kind, place=place, luck=torch.rand(n, generator=g)), torch.arange(n_images).repeat_interleave(per_image)


@pytest.mark.parametrize("reader", ["linear", "mlp"])
def test_probe_reads_what_is_there(reader):
    codes, labels, groups = world()
    result = {name: probing.probe(codes, y, groups, kind=reader) for name, y in labels.items()}
    assert result["kind"]["accuracy"] > 0.95 > result["kind"]["chance"] + 0.2
    assert result["place"]["r2"] > 0.9 and abs(result["luck"]["r2"]) < 0.3 and result["luck"]["mse"] > 0.1
    assert result["kind"]["n_train"] + result["kind"]["n_test"] == len(codes)


def test_probe_is_repeatable_and_leaves_the_random_state_alone():
    codes, labels, groups = world()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = probing.probe(codes, labels["kind"], groups, kind="mlp", seed=1, steps=20)
    assert torch.rand(1) == expected and first == probing.probe(codes, labels["kind"], groups, kind="mlp", seed=1, steps=20)


def test_groups_stay_together():
    groups = torch.randint(0, 20, (300,), generator=rng())
    train, test = probing.split_groups(groups, 0.25, seed=1)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(300)) and not set(groups[train].tolist()) & set(groups[test].tolist())
    assert len(groups[test].unique()) == 5
    with pytest.raises(ValueError, match="at least 2 groups"): probing.split_groups(torch.zeros(5))


def test_scaling_uses_the_training_rows_only():
    values, train = torch.randn(20, 3, generator=rng()), torch.arange(10)
    spoilt = values.clone(); spoilt[10:] = 1e6
    for scale in (probing.standardise, probing.to_unit_range): assert torch.equal(scale(values, train)[:10], scale(spoilt, train)[:10])
    constant = probing.to_unit_range(torch.ones(20, 2), train)
    assert torch.equal(constant, torch.zeros(20, 2)) and not probing.standardise(torch.ones(20, 2), train).isnan().any()


def test_matching_slots_to_objects():
    true, pred = scenes(wrong=0.0)
    pairs = probing.match_slots_to_objects(true, pred)
    codes = torch.arange(6.0)[None, :, None].expand(6, 6, 1)
    labels = torch.arange(1, 5)[None].expand(6, 4)
    name = torch.stack([pred[true == i][0] for i in range(1, 5)])  # the slot of object i, the same in all images
    assert torch.equal(pairs.labels(labels), pairs.object) and torch.equal(pairs.codes(codes)[:, 0].long(), name[pairs.object - 1])


def test_probe_refuses():
    codes, labels, groups = world(4)
    with pytest.raises(ValueError, match="differ in length"): probing.probe(codes[:-1], labels["kind"], groups)
    with pytest.raises(ValueError, match="kind='tree'"): probing.probe(codes, labels["kind"], groups, kind="tree")
    with pytest.raises(ValueError, match="task='rank'"): probing.probe(codes, labels["kind"], groups, task="rank")


# pictures

def photos(n=8, size=24, seed=0): return F.interpolate(torch.rand(n, 3, 6, 6, generator=rng(seed)), (size, size), mode="bilinear") * 2 - 1


def test_equal_pictures():
    x = photos()
    assert (generation.mse(x, x) == 0).all() and generation.psnr(x, x).isinf().all()
    torch.testing.assert_close(generation.ssim(x, x), torch.ones(8, dtype=torch.double))


def test_known_values():
    x = torch.zeros(2, 3, 16, 16)
    torch.testing.assert_close(generation.psnr(x, x + 2), torch.zeros(2, dtype=torch.double))  # the whole range wrong: 0 dB
    torch.testing.assert_close(generation.psnr(x, x + 0.02), torch.full((2,), 40.0, dtype=torch.double))
    black, white = x - 1, x + 1
    torch.testing.assert_close(generation.ssim(black, white), torch.full((2,), 1e-4 / (1 + 1e-4), dtype=torch.double))  # only the constants remain
    y = photos(2, 16)
    assert generation.ssim(y, -y).max() < 0.9 and (generation.ssim(y, -y) == generation.ssim(-y, y)).all()


def test_ssim_by_hand():
    "One window of 11×11: the definition, written out"
    x, y = (photos(1, 11, seed).double() for seed in (0, 1))
    at = torch.arange(-5, 6, dtype=torch.double)
    w = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5 ** 2)); w = w / w.sum()
    scores = []
    for a, b in zip((x[0] + 1) / 2, (y[0] + 1) / 2):
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, vab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
        scores.append((2 * ma * mb + 0.01 ** 2) * (2 * vab + 0.03 ** 2) / ((ma ** 2 + mb ** 2 + 0.01 ** 2) * (va + vb + 0.03 ** 2)))
    torch.testing.assert_close(generation.ssim(x, y), torch.stack(scores).mean()[None])


def test_foreground_only():
    x = photos(2)
    mask = torch.zeros(2, 24, 24, dtype=torch.long); mask[0, :4] = 1
    spoilt = torch.where(mask[:, None] > 0, x, x + 0.5)  # the background is wrong, the foreground right
    assert generation.mse(spoilt, x, mask)[0] == 0 and generation.mse(spoilt, x, mask)[1].isnan()
    assert generation.reconstruction_scores(spoilt, x, mask)["fg_psnr"] == math.inf
    with pytest.raises(ValueError, match="mask"): generation.mse(x, x, mask[:, :3])
    with pytest.raises(ValueError, match="differ in shape"): generation.ssim(x, x[:1])
    with pytest.raises(ValueError, match="smaller than the window"): generation.ssim(x[..., :8], x[..., :8])


def test_frechet_distance_of_gaussians():
    "For covariances that commute, the distance is that of the means and of the roots of the eigenvalues"
    g = rng()
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g).double()).Q
    a, b = torch.rand(5, generator=g).double() + 0.1, torch.rand(5, generator=g).double() + 0.1
    first, second = (torch.zeros(5).double(), turn @ a.diag() @ turn.T), (torch.ones(5).double(), turn @ b.diag() @ turn.T)
    assert generation.frechet_distance(first, second) == pytest.approx(float(5 + (a.sqrt() - b.sqrt()).square().sum()))
    few = torch.randn(4, 30, generator=g)  # fewer pictures than features: singular covariances
    assert generation.frechet_distance(few, few) == pytest.approx(0, abs=1e-4) and generation.frechet_distance(few, few + 1) == pytest.approx(30, rel=1e-4)
    with pytest.raises(ValueError, match="width 5 and 30"): generation.frechet_distance(first, few)


def test_kid_is_unbiased():
    many = torch.randn(2000, 4, generator=rng())
    values = [generation.kid(many[i:i + 50], many[i + 50:i + 100]) for i in range(0, 2000, 100)]
    assert min(values) < 0 and abs(sum(values) / 20) < 0.15 < generation.kid(many[:500], many[500:1000] + 0.7)


def test_own_extractor_tells_spoilt_pictures():
    real = photos(160, 32)
    extractor = extractors.train_extractor(real[:80], steps=40, batch_size=28)
    clean, noisy = (generation.distribution_scores(extractor, x, real[:80]) for x in (real[80:], real[80:] + 0.2 * torch.randn(80, 3, 32, 32, generator=rng(1))))
    assert all("own extractor" in name and clean[name] < noisy[name] for name in clean)
    assert not any(p.requires_grad for p in extractor.parameters())


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="TorchScript"): extractors.load_extractor(tmp_path / "inception.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="broken.pt is not a TorchScript file"): extractors.load_extractor(tmp_path / "broken.pt")


# tables

def test_spread_and_table(tmp_path):
    assert spread([1.0, 3.0, math.nan]) == Spread(2.0, math.sqrt(2), 2) and spread([]).n == 0
    runs = spread_of_runs([dict(a=1.0), dict(a=2.0, b=5.0)])
    assert runs["a"].n == 2 and runs["b"].n == 1
    table = Table([dict(name="x", **runs), dict(name="y", a=0.5)], best=dict(a="max"), digits=1)
    assert table._repr_markdown_().splitlines() == ["| name | a | b |", "| --- | ---: | ---: |", "| x | **1.5 ± 0.7** | 5.0 |", "| y | 0.5 | – |"]
    file = write_results(tmp_path / "r.json", dict(runs=runs, nothing=math.nan, tensor=torch.arange(3)))
    assert json.loads(file.read_text()) == {"runs": {"a": {"mean": 1.5, "std": pytest.approx(0.7071, abs=1e-4), "n": 2}, "b": {"mean": 5.0, "std": None, "n": 1}},
                                            "nothing": None, "tensor": [0, 1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


# names

@pytest.mark.parametrize("module, old, new", [
    ("metrics.generation", "train_extractor", "metrics.extractors.train_extractor"), ("metrics.generation", "VGGMaps", "components.lpips.VGGFeatures"),
    ("components.codebooks", "vgg_distance", "components.lpips.vgg_distance"), ("methods.decomp_diffusion", "separation", "metrics.separation.separation"),
    ("metrics.disentanglement", "tad", "metrics.attributes.tad"), ("metrics.disentanglement", "best_split", "metrics.boosting.best_split"),
    ("metrics.probing", "split_by_group", "metrics.probing.split_groups"), ("metrics.concepts", "coverage", "metrics.concepts.class_shares")])
def test_old_names_work_for_one_version(module, old, new):
    place, name = new.rsplit(".", 1)
    with pytest.warns(DeprecationWarning, match=f"{old} is now decomp_nb.{new}"): found = getattr(import_module(f"decomp_nb.{module}"), old)
    assert found is getattr(import_module(f"decomp_nb.{place}"), name)
    with pytest.raises(AttributeError, match="no_such_name"): import_module(f"decomp_nb.{module}").no_such_name  # noqa: B018
