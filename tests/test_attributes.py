"Attributes found without labels, the encoder that has them, drawings as a data set, and which factor follows an exchange."
import copy
import json

import numpy as np
import pytest
import torch
from test_runs import QUICK, execute

from decomp_nb.components.attributes import AttributeEncoder, all_combinations, balanced, effect_design, find_attributes, fit_effects
from decomp_nb.data.catalog import open_dataset
from decomp_nb.factors import recombine
from decomp_nb.methods.decomp_diffusion import DecompDiffusion
from decomp_nb.metrics.separation import follows, nearest_factors, pairs_that_differ

SIZES = (4, 3, 2)


def signs(copies=1, size=8, seed=0):
    "Pictures of all combinations: a bright column, a colour of the upper half, a bright corner; the column hides part of the colour"
    values = all_combinations(SIZES).repeat(copies, 1)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])
    pictures = torch.zeros(len(values), 3, size, size)
    for picture, (column, colour, corner) in zip(pictures, values.tolist()):
        picture[:, :size // 2] = colours[colour][:, None, None]
        picture[:, :, 2 * column:2 * column + 1] = 1.0
        picture[:, -2:, -2:] = 0.7 * corner
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return 2 * pictures - 1 + 0.04 * noise, values


def same_groups(a, b): return torch.equal(a[:, None] == a, b[:, None] == b)


@pytest.fixture(scope="module")
def searched():
    "An encoder that knows the signs; a run of the search ends there in one of three to four, so that forty do on any processor"
    encoder = AttributeEncoder(8, 12, sizes=SIZES, rank=16)
    encoder.find(signs()[0], runs=40)
    return encoder


def test_a_regression_knows_main_effects_and_pairs():
    design, interacts = effect_design(SIZES)
    assert design.shape == (24, 4 + 3 + 2 + 12 + 8 + 6) and int(interacts.sum()) == 26
    effects = fit_effects(design, torch.where(interacts, 1e-3, 1e-3), torch.eye(24), torch.arange(24.0)[:, None])
    torch.testing.assert_close(design @ effects, torch.arange(24.0)[:, None], rtol=0, atol=0.05)
    held = fit_effects(design, torch.where(interacts, 1e6, 1e-3), torch.eye(24), torch.randn(24, 5))
    assert held[interacts].abs().max() < 1e-4 < held[~interacts].abs().max()


def test_balanced_shares_are_equal_however_one_sided_the_scores():
    shares = balanced(torch.randn(40, 5) + torch.tensor([9.0, 0, 0, 0, 0]), rounds=100)
    torch.testing.assert_close(shares.sum(0), torch.full((5,), 8.0), rtol=0, atol=0.01)
    torch.testing.assert_close(shares.sum(1), torch.ones(40))


@pytest.mark.parametrize("copies", [1, 3])
def test_attributes_are_found_without_labels(copies):
    pictures, values = signs(copies)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    found = find_attributes(pictures[order].flatten(1), SIZES, runs=40)
    for k in range(3): assert same_groups(found.values[:, k], values[order, k])
    assert 2 <= found.agreeing < 40
    torch.testing.assert_close(found.centres.view(4, 3, 2, -1).mean((0, 1, 2)), pictures.flatten(1).mean(0), rtol=0, atol=1e-3)


def test_units_of_the_pictures_do_not_matter_and_a_seed_decides():
    pictures, values = signs()
    plain = find_attributes(pictures.flatten(1), SIZES, runs=40)
    other = find_attributes(100 * pictures.flatten(1) + 7, SIZES, runs=40)
    for k in range(3): assert same_groups(other.values[:, k], values[:, k])
    assert other.objective == pytest.approx(plain.objective, rel=1e-3)
    once, again = (find_attributes(pictures.flatten(1), SIZES, runs=2, seed=3) for _ in range(2))
    assert torch.equal(once.values, again.values) and once.objective == again.objective


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match=r"5 pictures for attributes of \(4, 3, 2\) values: give at least 9"):
        find_attributes(torch.randn(5, 12), SIZES)


@pytest.mark.parametrize("change, words", [
    (dict(sizes=[]), "how many values each attribute has"),
    (dict(sizes=[4, 0]), "how many values each attribute has"),
    (dict(sizes=[4, 2.0]), "how many values each attribute has"),
    (dict(sizes="4,2"), "how many values each attribute has"),
    (dict(pictures=torch.full((40, 12), torch.nan)), "NaN or infinite"),
    (dict(pictures=torch.rand(40, 3, 2, 2)), "a row of finite numbers for each"),
    (dict(runs=0), "at least 0, 2 and 1"),
    (dict(temperatures=1), "at least 0, 2 and 1"),
    (dict(interaction=-1.0), "at least 0, 2 and 1"),
])
def test_what_cannot_be_searched_is_refused(change, words):
    given = dict(pictures=torch.rand(40, 12), sizes=[4, 2]) | change
    with pytest.raises(ValueError, match=words): find_attributes(given.pop("pictures"), given.pop("sizes"), **given)


def test_pictures_of_another_size_are_refused():
    encoder = AttributeEncoder(8, 12, sizes=[4, 2, 2])
    with pytest.raises(ValueError, match="built for"): encoder.find(torch.rand(20, 3, 16, 16))


def test_reading_is_exact_in_mixed_precision_and_from_half_weights(searched):
    pictures, _ = signs()
    plain = searched.values(pictures)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(searched.values(pictures), plain)
    assert torch.equal(copy.deepcopy(searched).half().values(pictures), plain)


def test_an_encoder_reads_pictures_that_it_has_not_seen(searched):
    others, values = signs(seed=5)
    with pytest.raises(ValueError, match="call find"): AttributeEncoder(8, 12, sizes=SIZES, rank=16)(others)
    read = searched.values(others)
    for k in range(3): assert same_groups(read[:, k], values[:, k])
    codes = searched(others).view(24, 3, 4)
    assert torch.equal(codes[0, 1], searched.vectors[1][read[0, 1]])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="are 3 attributes, for 2 factors"): AttributeEncoder(8, 12, sizes=SIZES, groups=2)
    with pytest.raises(ValueError, match="for 3 factors of 13 numbers"): AttributeEncoder(8, 13, sizes=SIZES)
    with pytest.raises(ValueError, match="kind='atributes': choose 'convolutions' or 'attributes'"): people(encoder_config=dict(kind="atributes"))


def people(**changes):
    torch.manual_seed(0)
    unet = dict(channels=[16], layers_per_block=1, attention_levels=[], head_dim=8, groups=4)
    options = dict(encoder_config=dict(kind="attributes", sizes=SIZES, rank=16), denoiser_config=unet, patch_size=2)
    return DecompDiffusion(image_size=8, n_factors=3, factor_dim=4, **options | changes)


def test_decomp_diffusion_keeps_its_attributes_on_disk(tmp_path):
    pictures, _ = signs()
    model = people()
    model.encoder.find(pictures, runs=1)
    with torch.no_grad():
        for p in model.denoiser.parameters(): p.add_(0.1 * torch.randn_like(p))  # layers that start at zero say something
    loss = model({"image": pictures})["loss"]
    loss.backward()
    assert all(vectors.grad.abs().max() > 0 for vectors in model.encoder.vectors)
    model.save_pretrained(tmp_path)
    codes = model.eval().encode(pictures).codes
    again = DecompDiffusion.from_pretrained(tmp_path).eval().encode(pictures)
    assert torch.equal(again.codes, codes)
    swapped = recombine(again, again.rows(torch.arange(23, -1, -1)), [1])
    assert torch.equal(swapped.codes[:, 0], codes[:, 0]) and torch.equal(swapped.codes[:, 1], codes.flip(0)[:, 1])


def drawings(file, **changes):
    rgba = np.zeros((2, 3, 16, 16, 4), np.uint8)
    rgba[..., 0] = np.arange(6).reshape(2, 3, 1, 1) * 40
    rgba[..., :8, :, 3] = 255
    np.savez(file, **dict(rgba=rgba, form=["disc", "square"], colour=["red", "blue", "green"]) | changes)
    return file


def test_drawings_lie_on_white_and_know_their_factors(tmp_path):
    data = open_dataset(drawings(tmp_path / "drawn.npz"), split="all", size=16)
    item = data[data.item_of((1, 2))]
    assert {k: int(v) for k, v in item["labels"].items()} == {"form": 1, "colour": 2} and data.factor_names["colour"][2] == "green"
    assert item["image"][:, 12].eq(1).all() and item["image"][1, 2].eq(-1).all()
    assert item["image"][0, 2, 0].item() == pytest.approx(2 * 200 / 255 - 1, abs=1e-5)


@pytest.mark.parametrize("changes, words", [
    (dict(colour=["red", "blue"]), "form 2, colour 2"),
    (dict(extra=["a"]), "one array of names for each axis"),
    (dict(rgba=np.zeros((2, 3, 16, 16, 3), np.uint8)), "uint8"),
    (dict(rgba=np.zeros((2, 3, 16, 16, 4), np.float32)), "float32"),
])
def test_odd_drawings_are_refused_by_name(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): open_dataset(drawings(tmp_path / "odd.npz", **changes), size=16)


def test_names_are_never_unpickled(tmp_path):
    file = drawings(tmp_path / "odd.npz", form=np.array(["disc", 5], dtype=object))
    with pytest.raises(ValueError): open_dataset(file, size=16)


def test_exactly_one_factor_has_to_follow():
    taker, giver = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long)
    read = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 1], [0, 1, 2]])
    assert follows(read, taker, giver).tolist() == [[False, False, True]] + 3 * [3 * [False]]
    with pytest.raises(ValueError, match="no two pictures differ"): pairs_that_differ(torch.tensor([[0, 1], [0, 2]]), 5)
    with pytest.raises(ValueError, match="1 of 4 pairs agree"): follows(read, taker, torch.cat([giver[:3], taker[:1]]))
    pictures, values = signs()
    assert torch.equal(nearest_factors(pictures[:5] + 0.1, pictures, values), values[:5])


def test_training_finds_attributes_and_says_what_follows_an_exchange(tmp_path):
    data = drawings(tmp_path / "drawn.npz")
    options = {"image_size": 16, "n_factors": 2, "encoder_config": {"sizes": [2, 3], "rank": 8}, "denoiser_config": {"channels": [32]}}
    out = tmp_path / "run"
    execute("train_decomp_diffusion", tmp_path, data=str(data), preset="people", attributes_from="all", model_options=options, n_images=0, eval_scenes=1,
            eval_seeds=1, sample_steps=2, out_dir=str(out), **QUICK | dict(batch_size=2))
    exchanged = json.loads((out / "exchange.json").read_text())
    assert [set(row) for row in exchanged] == 2 * [{"component", "form", "colour", "none"}]
    assert all(0 <= value <= 1 for row in exchanged for name, value in row.items() if name != "component")
