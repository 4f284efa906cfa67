"Procedural scenes: contract, determinism, exact factors, agreement of the ray tracer with stored renders, bad input"
import pickle

import pytest
import torch
import torch.nn.functional as F

from decomp_nb.data.hdf5 import open_h5
from decomp_nb.data.home import data_home
from decomp_nb.worlds.blocks import BLOCK
from decomp_nb.worlds.clevr import Clevr, label_clevr, project, render_clevr
from decomp_nb.worlds.colours import COLORS, draw_background, hsv_to_rgb, nearest_colour, render_background, texture
from decomp_nb.worlds.random import permutation, scene_keys, uniform
from decomp_nb.worlds.scene_type import visible_pixels
from decomp_nb.worlds.scenes import KINDS, VARIANTS, Scenes
from decomp_nb.worlds.shading import CLEVR_COLORS
from decomp_nb.worlds.shapes import SHAPES, signed_distance

DATA = data_home()
CASES = {"shapes": {}, "shapes-32": {"size": 32, "min_visible": 5}, "textured_shapes": {}, "textured_shapes-objects": {"foreground": "textured"},
         "tetrominoes": {"size": 32}, "tetrominoes-35": {"size": 35}, "toy_squares": {}, "clevr_scenes": {"size": 32}}
CASES |= {f"shapes-{name}": {"variant": name} for name in VARIANTS}


def make(case: str, n: int = 500, **options) -> Scenes:
    return Scenes(case.split("-")[0], n, **(CASES[case] | options))


def same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict): same(value, b[name])
        elif torch.is_tensor(value): assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
        else: assert value == b[name], name


# ---------------------------------------------------------------------------------------------------------------- contract and determinism

@pytest.mark.parametrize("case", CASES)
def test_items_keep_the_contract(case):
    ds, k = make(case), make(case).max_objects
    batch = torch.utils.data.default_collate([ds[i] for i in (0, 7, 499)])
    image, masks, labels = batch["image"], batch["masks"], batch["labels"]
    assert image.shape == (3, 3, ds.size, ds.size) and image.dtype == torch.float32 and image.min() >= -1 and image.max() <= 1
    assert masks.shape == (3, ds.size, ds.size) and masks.dtype == torch.int64 and masks.min() == 0
    there = labels["visibility"]
    assert there.dtype == torch.float32 and there.shape == (3, k) and set(there.unique().tolist()) <= {0.0, 1.0}
    assert ds.spec.n_objects[0] <= there.sum(1).min() and there.sum(1).max() <= k
    for name, value in labels.items():
        assert value.shape[:2] == (3, k) and (value[there == 0] == 0).all(), name
        if name in ds.factor_names:
            assert value.dtype == torch.int64 and value.max() < len(ds.factor_names[name]) and (value[there > 0] > 0).all()
            assert ds.factor_names[name][0] == "none"
    assert torch.equal(visible_pixels(masks, k) > 0, there > 0)   # nothing that exists is invisible, nothing else has pixels
    assert batch["image_id"] == [f"{ds.kind}-train-{i:08d}" for i in (0, 7, 499)]
    assert all(text.startswith(("a ", "an ")) for text in batch["caption"])


@pytest.mark.parametrize("case", CASES)
def test_an_item_does_not_depend_on_its_company(case):
    ds, other = make(case), make(case, n=40)
    batch = ds.batch([31, 2, 17, 5])
    item = {name: {f: v[2] for f, v in value.items()} if isinstance(value, dict) else value[2] for name, value in batch.items()}
    same(ds[17], item)
    same(other[17], item)
    same(ds[17 - len(ds)], item)   # negative indices count from the end


def test_workers_fetch_the_same_batches():
    ds = make("shapes", n=16)
    alone, workers = (list(torch.utils.data.DataLoader(ds, batch_size=8, num_workers=n)) for n in (0, 2))
    for a, b in zip(alone, workers, strict=True): same(a, b)
    same(pickle.loads(pickle.dumps(ds))[3], ds[3])


def test_iteration_ends():
    assert len(list(make("toy_squares", n=5))) == 5


@pytest.mark.parametrize("case", ["shapes", "tetrominoes", "clevr_scenes"])
def test_splits_and_seeds_are_disjoint(case):
    sets = [make(case), make(case, split="val"), make(case, split="test"), make(case, seed=1)]
    x = torch.stack([ds.factors(range(8))["x"][:, 0] for ds in sets]).flatten()
    assert len(x.unique()) > 0.7 * len(x) if case == "tetrominoes" else len(x.unique()) == len(x)   # whole pixels do coincide
    keys = [scene_keys(range(3000), split=split, seed=seed) for split in ("train", "val", "test") for seed in (0, 1, -5)]
    assert len(torch.cat(keys).unique()) == 9 * 3000


def test_random_numbers_never_change():
    "Runs of years ago must find their scenes again"
    keys = scene_keys([0, 1, 123456789], seed=7, split="val")
    assert keys.tolist() == KNOWN_KEYS
    torch.testing.assert_close(uniform(keys, "x", 2), torch.tensor(KNOWN_NUMBERS), rtol=0, atol=1e-7)
    assert permutation(keys, "p", 50).sort(1)[0].equal(torch.arange(50).expand(3, 50))


# ---------------------------------------------------------------------------------------------------------------- shapes

@pytest.mark.parametrize("name", SHAPES)
def test_distance_agrees_with_the_outline(name):
    "|d| is the distance to the nearest point of the outline, found by brute force; d < 0 exactly inside"
    axis = torch.linspace(-2, 2, 401)
    x, y = axis.expand(401, 401), axis[:, None].expand(401, 401)
    d = signed_distance(name, x, y)
    assert torch.isfinite(d).all() and d[200, 200] < 0 or name == "ring"
    inside = F.pad((d < 0).float()[None, None], (1, 1, 1, 1))
    edge = (F.max_pool2d(inside, 3, 1) - inside[..., 1:-1, 1:-1])[0, 0] > 0
    outline = torch.stack([x[edge], y[edge]], 1)
    probe = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 0.8
    value = signed_distance(name, probe[:, 0], probe[:, 1])
    true = torch.cdist(probe, outline).amin(1)
    close = (true < 0.15) if name in ("ellipse", "triangle", "pentagon") else (value < 0) | (true < 0.6)   # these three are exact near the outline only
    if name in ("triangle", "pentagon", "heart", "cross"): close &= value < 0.02   # outside a corner, and inside a union, d is a bound
    if name in ("heart", "cross"): close &= true < 0.1
    assert close.sum() > 20 and (value.abs() - true)[close].abs().max() < 0.03


def test_factors_describe_the_picture():
    ds = Scenes("shapes", 300, n_objects=1, shapes=("square", "circle"), position=(0.35, 0.65))
    batch = ds.batch(range(60))
    l, masks, rgb = batch["labels"], batch["masks"] == 1, (batch["image"] + 1) / 2
    axis = (torch.arange(64) + 0.5) / 64
    area = masks.sum((1, 2))
    for f, along in (("x", axis[None, None, :]), ("y", axis[None, :, None])):
        torch.testing.assert_close((masks * along).sum((1, 2)) / area, l[f][:, 0], rtol=0, atol=0.005)
    square = l["shape"][:, 0] == 1
    assert 0 < square.sum() < 60
    torch.testing.assert_close(area[square] / 64**2, l["size"][square, 0] ** 2, rtol=0.04, atol=0)
    middle = rgb[torch.arange(60), :, (l["y"][:, 0] * 64).long(), (l["x"][:, 0] * 64).long()]
    torch.testing.assert_close(middle, l["rgb"][:, 0], rtol=0, atol=0.003)
    assert all(batch["caption"][i] == f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}" for i in range(60)
               for c, s in [(ds.factor_names["color"][l["color"][i, 0]], ds.factor_names["shape"][l["shape"][i, 0]])])


def test_later_objects_lie_on_top_and_edges_are_smooth():
    ds = Scenes("shapes", 10, n_objects=2, colors="white", background="black", shapes=("square",), rotate=False)
    factors = ds.factors([0])
    for f, v in (("x", (0.5, 0.5)), ("y", (0.5, 0.5)), ("size", (0.5, 0.25 + 1 / 128))): factors[f] = torch.tensor([v])
    out = ds.render(factors)
    assert visible_pixels(out["masks"], 2).tolist() == [[32 * 32 - 16 * 16, 16 * 16]]
    factors["visibility"][0, 0] = 0
    levels = (ds.render(factors)["image"] + 1) / 2
    assert levels.unique().tolist() == pytest.approx([0, 0.5 - 0.25 * 2**0.5, 0.25, 1], abs=0.003)   # 16.5 pixels: a quarter sticks out
    hard = Scenes("shapes", 10, colors="white", background="black", antialias=False)[0]["image"]
    assert hard.unique().tolist() == [-1, 1]


def test_hidden_objects_are_moved():
    ds = Scenes("shapes", 200, n_objects=7, min_visible=40)
    assert visible_pixels(ds.batch(range(100))["masks"], 7).min() >= 40


def test_number_of_objects_is_uniform():
    counts = Scenes("shapes", 3000, n_objects=(1, 4), size=16, min_visible=1).factors(range(1200))["visibility"].sum(1)
    assert (counts.long().bincount(minlength=5)[1:] / 1200 - 0.25).abs().max() < 0.05


def test_colours():
    import colorsys
    hsv = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hsv_to_rgb(hsv), torch.tensor([colorsys.hsv_to_rgb(*row) for row in hsv.tolist()]), rtol=0, atol=1e-5)
    assert nearest_colour(torch.tensor(list(COLORS.values()))).tolist() == [*range(1, 10)]
    palette = Scenes("shapes", 10, n_objects=8).factors(range(10))["color"]
    assert (palette.sort(1)[0] == torch.arange(1, 9)).all()   # never twice in a picture
    hue = torch.tensor([[colorsys.rgb_to_hsv(*c)[0] for c in row] for row in Scenes("shapes", 40, n_objects=5, colors="hsv").factors(range(40))["rgb"].tolist()])
    apart = (hue[:, :, None] - hue[:, None]).abs() + torch.eye(5)
    assert torch.minimum(apart, 1 - apart).abs()[:, ~torch.eye(5, dtype=torch.bool)].min() > 0.5 / 5 - 1e-4


@pytest.mark.parametrize("background", ["noise", "stripes", "checker", "voronoi", "textures", "color", "grey", "black"])
def test_backgrounds(background):
    keys = scene_keys(range(6))
    image = render_background({"key": keys, **draw_background(keys, background)}, 40)
    assert image.shape == (6, 3, 40, 40) and image.min() >= 0 and image.max() <= 0.75
    spread = image.flatten(2).std(2).amax(1)
    assert (spread > 0.02).all() if background not in ("color", "grey", "black") else (spread < 1e-6).all()
    if background in ("noise", "stripes"):
        tones = texture(scene_keys(range(4)), torch.full((4,), ["noise", "stripes"].index(background)), 40)
        assert tones.min() >= 0 and tones.max() <= 1 and (tones.std((1, 2)) > 0.1).all()


def test_variants_are_the_published_ones():
    image = make("shapes-binarized").batch(range(5))["image"]
    assert set(image.unique().tolist()) == {-1.0, 1.0}
    grey = make("shapes-colored_on_grayscale").batch(range(5))
    floor = grey["image"].permute(0, 2, 3, 1)[grey["masks"] == 0]
    assert (floor.std(1) < 0.35).float().mean() > 0.95 and make("shapes-colored_on_colored").max_objects == 4
    assert Scenes(variant="binarized", n_objects=1).max_objects == 1   # options win


# ---------------------------------------------------------------------------------------------------------------- blocks

def test_tetrominoes_are_pixel_exact():
    ds = Scenes("tetrominoes", 50, size=35)
    factors = ds.factors(range(20))
    batch = ds.render(factors)
    image, masks = (batch["image"] + 1) / 2, batch["masks"]
    assert (visible_pixels(masks, 3) == 100).all() and ((image > 0).any(1) == (masks > 0)).all()
    for i in range(20):
        r, c = (masks[i] == 1).nonzero().amin(0).tolist()
        c = (masks[i, r] == 1).nonzero()[0, 0]   # upper left block of object 1
        block = image[i, :, r:r + 5, c:c + 5].amax(0)
        torch.testing.assert_close(block, BLOCK, rtol=0, atol=0.003)
    small, double = (Scenes("tetrominoes", 50, size=s).batch(range(20)) for s in (32, 64))
    assert torch.equal(small["image"], batch["image"][..., 1:33, 1:33]) and torch.equal(double["masks"][:, ::2, 1::2], small["masks"])
    same(small["labels"], double["labels"])


def test_toy_squares():
    batch = Scenes("toy_squares", 50).batch(range(30))
    assert (visible_pixels(batch["masks"], 3) == 100).all()
    for i in range(3):
        assert torch.equal(batch["image"][:, i] > -1, batch["masks"] == i + 1)
        assert batch["image"][:, i].max() == pytest.approx(0.6, abs=0.003)   # brightness 0.8


# ---------------------------------------------------------------------------------------------------------------- CLEVR

@pytest.fixture(scope="module")
def stored():
    "Four stored renders of Blender at 64 pixels, and all that is needed to render them again"
    file = DATA / "clevr" / "clevr6_val.h5"
    if not file.is_file(): pytest.skip(f"no stored renders at {file}: set DECOMP_DATA to the folder that holds clevr/")
    with open_h5(file) as f: part = {name: torch.from_numpy(f[name][100:104]) for name in f}
    factors = {name: part[name][:, 1:].long() for name in ("shape", "size", "material", "color")}
    factors |= {name: part[name][:, 1:] for name in ("x", "y", "z", "rotation", "visibility")}
    return part, factors


def test_ray_tracer_agrees_with_blender(stored):
    part, factors = stored
    true = F.avg_pool2d(part["image"].permute(0, 3, 1, 2).float() / 255, 2)
    ours = render_clevr(part["camera"], part["lights"], factors, 64, 2)
    psnr = -10 * (ours - true).square().mean((1, 2, 3)).log10()
    assert psnr.mean() > 33 and psnr.min() > 30, psnr
    fg = F.max_pool2d(part["mask"].permute(0, 3, 1, 2).float(), 2) > 0
    assert -10 * (ours - true).square().mean(1, keepdim=True)[fg].mean().log10() > 26


def test_labels_and_projection_agree_with_blender(stored):
    part, factors = stored
    assert (label_clevr(part["camera"], factors, 128) == part["mask"][..., 0]).float().mean() > 0.985
    there = factors["visibility"] > 0
    ours = project(part["camera"], torch.stack([factors[f] for f in "xyz"], -1), 128)
    torch.testing.assert_close(ours[there], part["pixel_coords"][:, 1:][there], rtol=0, atol=0.05)


def test_clevr_keeps_the_rules_of_placement():
    ds = Scenes("clevr_scenes", 100, size=64, n_objects=6)
    f = ds.factors(range(24))
    xy, radius = torch.stack([f["x"], f["y"]], -1), torch.where(f["size"] == 1, 0.7, 0.35)
    far = 9 * torch.eye(6)
    assert (torch.cdist(xy, xy) - radius[:, None] - radius[:, :, None] + far).min() > 0.249
    ahead = F.normalize(-f["camera"][:, :2], dim=1)
    for axis in (ahead, torch.stack([ahead[:, 1], -ahead[:, 0]], 1)):
        along = (xy * axis[:, None]).sum(-1)
        assert ((along[:, None] - along[:, :, None]).abs() + far).min() > 0.399
    pixels = project(f["camera"], torch.stack([f[n] for n in "xyz"], -1), 64)
    assert pixels[..., :2].min() > 0 and pixels[..., :2].max() < 64
    assert visible_pixels(label_clevr(f["camera"], f, 64), 6).min() >= 10
    cube = f["shape"] == 1
    assert f["z"][cube].unique().tolist() == pytest.approx([0.35 / 2**0.5, 0.7 / 2**0.5]) and f["z"][~cube].unique().tolist() == pytest.approx([0.35, 0.7])


def test_cogent_divides_the_colours():
    names = list(CLEVR_COLORS)
    for condition, cubes in (("A", {"gray", "blue", "brown", "yellow"}), ("B", {"red", "green", "purple", "cyan"})):
        f = Clevr(cogent=condition).sample(scene_keys(range(60)), 32)
        of = lambda shape: {names[c - 1] for c in f["color"][f["shape"] == shape].tolist()}
        assert of(1) == cubes and of(3) == set(names) - cubes and of(2) == set(names)


def test_more_rays_approach_the_same_picture():
    few, more = (Scenes("clevr_scenes", 5, size=32, samples=s)[0]["image"] for s in (1, 4))
    fine = F.avg_pool2d(Scenes("clevr_scenes", 5, size=32, samples=4)[0]["image"], 4)
    assert (F.avg_pool2d(few, 4) - fine).abs().mean() < (few - more).abs().mean() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_draws_the_same(case):
    cpu, gpu = make(case).batch(range(6)), make(case, device="cuda").batch(range(6))
    assert gpu["image"].is_cuda and (gpu["masks"].cpu() != cpu["masks"]).float().mean() < 0.002
    assert (gpu["image"].cpu() - cpu["image"]).abs().mean() < 0.002


# ---------------------------------------------------------------------------------------------------------------- counterfactuals

@pytest.mark.parametrize("kind", ["shapes", "textured_shapes", "clevr_scenes", "tetrominoes", "toy_squares"])
def test_removal_leaves_the_others(kind):
    ds = Scenes(kind, 20, size=64)
    before, after = ds[3], ds.counterfactual(3, remove=2)
    assert not (after["masks"] == 2).any() and after["labels"]["visibility"][1] == 0 and after["labels"]["shape"][1] == 0
    elsewhere = before["masks"] != 2
    assert torch.equal(before["masks"][elsewhere], after["masks"][elsewhere])   # the others keep their labels
    near = F.max_pool2d((before["masks"] == 2).float()[None], 5, 1, 2)[0] > 0   # with its smooth outline
    change = (before["image"] - after["image"]).abs().amax(0)
    assert change[before["masks"] == 2].mean() > 0.1
    assert (change[~near] > 0).float().mean() > 0.05 if kind == "clevr_scenes" else (change[~near] > 0).float().mean() < 0.005   # shadows, too
    assert after["image_id"] == f"{kind}-train-00000003-remove-2" and before["caption"] != after["caption"]


@pytest.mark.parametrize("kind", ["shapes", "clevr_scenes", "tetrominoes"])
def test_recoloring_leaves_the_masks(kind):
    ds = Scenes(kind, 20, size=64)
    before = ds[3]
    target = next(c for c in ds.factor_names["color"][1:] if c != ds.factor_names["color"][before["labels"]["color"][0]])
    after = ds.counterfactual(3, recolor=(1, target))
    assert torch.equal(before["masks"], after["masks"]) and ds.factor_names["color"][after["labels"]["color"][0]] == target
    assert (before["image"] != after["image"]).any(0)[before["masks"] == 1].float().mean() > 0.9
    assert f" {target} " in after["caption"]


def test_moving():
    ds = Scenes("shapes", 20, n_objects=1, shapes=("circle",))
    after = ds.counterfactual(3, move=(1, (0.5, 0.25)))
    rows, columns = (after["masks"] == 1).nonzero(as_tuple=True)
    assert rows.float().mean() + 0.5 == pytest.approx(16, abs=0.3) and columns.float().mean() + 0.5 == pytest.approx(32, abs=0.3)


# ---------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, says", [
    (dict(kind="cubes"), "unknown kind of scene 'cubes'.*textured_shapes"),
    (dict(split="valid"), "unknown split 'valid'.*train, val, test"),
    (dict(n=0), "n is 0"), (dict(n=2.5), "n is 2.5"),
    (dict(n_objects=0), "n_objects is 0"), (dict(n_objects=(5, 2)), r"n_objects is \(5, 2\)"), (dict(n_objects="3"), "n_objects is '3'"),
    (dict(n_objects=9), "palette has 8 colours"), (dict(n_objects=True), "n_objects is True"),
    (dict(size=8), "size is 8.*16"), (dict(size=64.0), "size is 64.0"), (dict(kind="clevr_scenes", size=16), "size is 16.*32"),
    (dict(kind="tetrominoes", size=40), "size is 40.*multiple of 32 or of 35"), (dict(kind="toy_squares", n_objects=4), "one object per colour channel"),
    (dict(kind="clevr_scenes", n_objects=(3, 11)), "room for 10"), (dict(kind="clevr_scenes", samples=0), "samples is 0"),
    (dict(kind="clevr_scenes", cogent="C"), "cogent is 'C'"),
    (dict(colours="hsv"), "unknown option colours of shapes.*colors"), (dict(colors="cmyk"), "colors is 'cmyk'.*palette"),
    (dict(background="sky"), "background is 'sky'.*checker"), (dict(shapes=("square", "blob")), "shapes is.*pentagon"), (dict(shapes=()), "shapes is"),
    (dict(side=(0.4, 0.2)), "side is"), (dict(variant="rgb"), "unknown variant 'rgb'.*binarized"),
    (dict(kind="clevr_scenes", variant="binarized"), "clevr_scenes has no variants"),
])
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says): Scenes(**arguments)


def test_bad_requests_are_named():
    ds = Scenes("shapes", 10, n_objects=2)
    for i in (10, -11):
        with pytest.raises(IndexError, match=f"scene {i} of a data set of 10"): ds[i]
    with pytest.raises(ValueError, match="object 3 is not in this scene, which has 1, 2"): ds.counterfactual(0, remove=3)
    with pytest.raises(ValueError, match="unknown colour 'gold'.*red"): ds.counterfactual(0, recolor=(1, "gold"))
    with pytest.raises(ValueError, match="exactly one"): ds.counterfactual(0)
    with pytest.raises(ValueError, match="blocks"): Scenes("toy_squares", 10).counterfactual(0, move=(1, (0.5, 0.5)))
    with pytest.raises(ValueError, match="no room.*min_visible"): Scenes("shapes", 10, n_objects=8, side=(0.9, 0.9), min_visible=500)[0]
    assert set(KINDS) == {"shapes", "textured_shapes", "tetrominoes", "toy_squares", "clevr_scenes", "textured_objects",
                          "moving_shapes", "moving_textured", "billiards", "physics"}


KNOWN_KEYS = [1871991679607267958, -6058518672660118144, -4900699421834413079]
KNOWN_NUMBERS = [[0.59821582, 0.21372485], [0.37246162, 0.78334755], [0.86056072, 0.33297616]]
