"""Precision and recall, LPIPS, and the extractor that comes with the package"""
import pytest
import torch
import torch.nn.functional as F

from decomp_nb.components import lpips
from decomp_nb.decomposer import shipped
from decomp_nb.metrics import extractors, generation
from decomp_nb.worlds.scenes import Scenes


def rng(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def common() -> extractors.SceneExtractor: return extractors.scene_extractor()


@pytest.fixture(scope="module")
def photos() -> torch.Tensor: return Scenes("shapes", 160, size=32, split="val", seed=5).batch(range(160))["image"]


# precision and recall

def test_regions_of_clouds():
    real = torch.randn(300, 3, generator=rng())
    assert generation.precision_recall(real, real) == (1, 1) and generation.precision_recall(real + 50, real) == (0, 0)
    half = real[real[:, 0] > 0]  # drawn pictures show only one half of the world
    precision, recall = generation.precision_recall(half, real)
    assert precision == 1 and 0.4 < recall < 0.7
    assert generation.precision_recall(real, half) == (recall, precision)
    wide = generation.precision_recall(4 * torch.randn(300, 3, generator=rng(1)), real)
    assert wide[0] < 0.3 < 0.7 < wide[1]


def test_regions_by_hand():
    real, drawn = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.9], [4.9], [5.1]])
    assert generation.precision_recall(drawn, real, k=1) == (pytest.approx(2 / 3), 1)  # radii 1, 1, 2 and 4, 0.2, 0.2
    with pytest.raises(ValueError, match="more than 3 pictures on each side, got 3 and 3"): generation.precision_recall(drawn, real)


def test_scores_are_named_after_the_extractor(common, photos):
    plain, full = (generation.distribution_scores(common, photos[:60], photos[60:], manifold=m) for m in (False, True))
    assert list(plain) == ["FID (scene extractor)", "KID (scene extractor)"]
    assert plain.items() <= full.items() and set(full) - set(plain) == {"precision (scene extractor)", "recall (scene extractor)"}
    few = generation.distribution_scores(common, photos[:4].repeat(15, 1, 1, 1), photos[60:], manifold=True)
    assert few["precision (scene extractor)"] > 0.5 > few["recall (scene extractor)"]  # real pictures, but always the same four


# the shipped network

def test_shipped_extractor_is_small_fixed_and_sees_what_is_there(common, photos):
    file = shipped("scene_extractor") / "model.safetensors"
    assert file.stat().st_size < 300 * 1024 and not any(p.requires_grad for p in common.parameters())
    assert torch.equal(common(photos[:4]), extractors.scene_extractor()(photos[:4])) and common(photos[:4]).shape == (4, 64)
    assert common(F.interpolate(photos[:2], (64, 64))).shape == (2, 64)
    real, other = photos[:80], photos[80:]
    def fid(x): return generation.distribution_scores(common, x, real)["FID (scene extractor)"]
    blurred = F.avg_pool2d(F.pad(other, (2,) * 4, mode="reflect"), 5, 1)
    noisy = other + 0.15 * torch.randn(other.shape, generator=rng())
    squares = Scenes("toy_squares", 80, size=32).batch(range(80))["image"]
    assert fid(other) < min(fid(blurred), fid(noisy), fid(other.roll(1, 1)), fid(squares))


# LPIPS

def test_perceptual_distance(common, photos):
    x, y = photos[:16], photos[16:32]
    near, far = (lpips.lpips(torch.lerp(x, y, t), x, common) for t in (0.1, 0.7))
    assert (lpips.lpips(x, x, common) == 0).all() and (near < far).all() and near.shape == (16,)
    torch.testing.assert_close(lpips.lpips(x, y, common), lpips.lpips(y, x, common, batch_size=5))
    scores = generation.reconstruction_scores(y, x, perceptual=common)
    assert scores["LPIPS (scene extractor)"] == pytest.approx(lpips.lpips(y, x, common).mean().item()) and "fg_psnr" not in scores
    with pytest.raises(ValueError, match="differ in shape"): lpips.lpips(x, y[:3], common)


def test_perceptual_distance_by_hand():
    class Twice:
        name, weights = "twice", [torch.tensor([1.0, 0.5, 2.0]), torch.tensor([3.0, 0.0, 0.0])]
        def maps(self, x): return [x, F.avg_pool2d(x, 2)]
    x, y = torch.randn(2, 1, 3, 2, 2, generator=rng())
    expected = 0.0
    for a, b, w in zip(Twice().maps(x), Twice().maps(y), Twice.weights):
        a, b = (v[0].flatten(1).T / v[0].flatten(1).norm(dim=0)[:, None] for v in (a, b))
        expected += ((a - b) ** 2 @ w).mean()
    torch.testing.assert_close(lpips.lpips(x, y, Twice()), expected.double()[None])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    "Files in the layout of the official weights, with random numbers"
    folder, widths = tmp_path_factory.mktemp("vgg"), (64, 128, 256, 512, 512)
    with torch.device("meta"): shapes = lpips.VGGFeatures().state_dict()
    state = {name: torch.randn(v.shape, generator=rng()) * (0.02 if v.ndim == 4 else 0.1) for name, v in shapes.items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(widths)}, folder / "lin.pth")
    return folder, state


def test_official_layout(official, photos):
    folder, state = official
    network = lpips.load_lpips(folder / "vgg16.pth", folder / "lin.pth")
    x, y = photos[:2], photos[2:4]
    def layers(v):  # VGG16, written out
        v, found, i = (v - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None], [], 0
        for block, count in enumerate((2, 2, 3, 3, 3)):
            if block: v, i = F.max_pool2d(v, 2), i + 1
            for _ in range(count): v, i = F.conv2d(v, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1).relu(), i + 2
            found.append(v)
        return found
    lin, expected = torch.load(folder / "lin.pth", weights_only=True), 0
    for i, (a, b) in enumerate(zip(layers(x), layers(y))):
        a, b = (F.normalize(v, dim=1) for v in (a, b))
        expected = expected + F.conv2d((a - b) ** 2, lin[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    torch.testing.assert_close(lpips.lpips(x, y, network), expected.double(), rtol=1e-4, atol=1e-7)
    assert network.name == "VGG16" and "all weights 1" in lpips.load_lpips(folder / "vgg16.pth").name


def test_wrong_weights(official, tmp_path):
    folder, _ = official
    with pytest.raises(FileNotFoundError, match="official weights have to lie on this machine"): lpips.load_lpips(tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match="is no VGG16: features.0.weight"): lpips.load_lpips(folder / "lin.pth")
    with pytest.raises(ValueError, match="LPIPS of VGG16 needs"): lpips.load_lpips(folder / "vgg16.pth", folder / "vgg16.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken.pth cannot be read: it is no weight file but something unknown that begins with b.no weights"): lpips.load_lpips(tmp_path / "broken.pth")
