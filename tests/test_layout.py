"""Layouts of slots: written into codes, drawn again, and shown to the denoiser; what edits do to them."""

import pytest
import torch
import torch.nn.functional as F

from decomp_nb.components.layout import (
    Layout,
    LayoutMaps,
    centre_and_size,
    draw_outlines,
    find_layout,
    layout_dim,
    move_slots,
    read_layout,
    share_pixels,
    write_layout,
)
from decomp_nb.decomposer import load_decomposer
from decomp_nb.factors import Factors
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.worlds.scenes import Scenes

SMALL = dict(
    image_size=16, patch_size=4, layout_channels=6,
    encoder_config=dict(kind="conv", image_size=16, channels=[8, 8], stride=1, kernel=3, groups=4),
    slots_config=dict(kind="clusters", n_slots=4, slot_dim=48, window=5, out_dim=40, key_dim=8, hidden_dim=16, show_layout=True),
)


def small_model(**changes):
    torch.manual_seed(0)
    unet = lsd_preset("tiny")["denoiser_config"] | dict(
        in_channels=48, out_channels=48, sample_size=4, cross_attention_dim=40, block_out_channels=[8, 8]
    )
    return LSD(**SMALL | dict(denoiser_config=unet) | changes)


def small_batch(n=3):
    return {"image": Scenes("shapes", 8, size=16).batch(range(n))["image"]}


def true_masks(n=20):
    return F.one_hot(Scenes("shapes", n, size=64).batch(range(n))["masks"], 8).movedim(-1, 1).float()


def encoded(model, batch):
    with torch.no_grad():
        return model.eval().encode(batch["image"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [1, 4, 11])
def test_a_layout_is_read_as_it_was_written(window):
    given = Layout(*torch.rand(3, 2, 5).add(0.05), torch.rand(2, 5, window, window))
    numbers = write_layout(given)
    assert numbers.shape == (2, 5, layout_dim(window))
    for read, written in zip(read_layout(numbers), given):
        torch.testing.assert_close(read, written, atol=1e-5, rtol=1e-4)


def test_numbers_of_no_square_window_are_refused():
    with pytest.raises(ValueError, match="20 numbers are no layout"):
        read_layout(torch.zeros(1, 2, 20))


def test_objects_are_drawn_where_they_were_and_as_they_were():
    masks = true_masks()
    layout = find_layout(masks, 11)
    shares = share_pixels(draw_outlines(layout, 64), layout.size)
    there = masks.sum((2, 3)) > 60
    overlap = torch.minimum(shares, masks).sum((2, 3)) / torch.maximum(shares, masks).sum((2, 3))
    assert overlap[there].mean() > 0.85
    torch.testing.assert_close(shares.sum(1), torch.ones(len(masks), 64, 64))


def test_a_moved_slot_is_drawn_elsewhere_and_a_grown_one_larger():
    masks = torch.zeros(1, 2, 64, 64)
    masks[:, 0] = 1
    masks[:, 1, 20:32, 10:22] = 1
    masks[:, 0, 20:32, 10:22] = 0
    scene = Factors(write_layout(find_layout(masks, 11)))
    where = lambda factors: centre_and_size(draw_outlines(read_layout(factors.codes), 64))
    before, after = where(scene), where(move_slots(scene, 1, down=0.25, right=0.5))
    moved = [(b - a)[0, 1].item() for a, b in zip(before, after)]
    assert moved == pytest.approx([0.25, 0.5, 0.0], abs=0.02)
    grown = where(move_slots(scene, 1, grow=1.5))
    assert (grown[2] / before[2])[0, 1].item() == pytest.approx(1.5, rel=0.1)
    torch.testing.assert_close(scene.codes, write_layout(find_layout(masks, 11)))  # the set itself is as it was


@pytest.mark.parametrize("wrong, complaint", [
    (dict(slot=2), "slot=2"), (dict(slot=0, grow=0.0), "grow=0"), (dict(slot=0, grow=float("inf")), "grow=inf"),
    (dict(slot=0, down=float("nan")), "down=nan"),
])
def test_a_move_that_makes_no_sense_is_refused(wrong, complaint):
    with pytest.raises((IndexError, ValueError), match=complaint):
        move_slots(Factors(torch.zeros(1, 2, layout_dim(3))), **wrong)


def test_the_denoiser_sees_a_set():
    torch.manual_seed(0)
    maps = LayoutMaps(layout_dim(5) + 6, 5, 4)
    scene = Factors(torch.cat([write_layout(find_layout(true_masks(2), 5)), torch.randn(2, 8, 6)], -1))
    order = torch.randperm(8)
    torch.testing.assert_close(maps(Factors(scene.codes[:, order]), 8), maps(scene, 8), atol=1e-5, rtol=1e-4)
    without = maps(scene.drop(3), 8)
    torch.testing.assert_close(without, maps(scene.pick([0, 1, 2, 4, 5, 6, 7]), 8), atol=1e-5, rtol=1e-4)
    assert (without - maps(scene, 8)).abs().max() > 1e-3


def test_slots_that_do_not_say_where_they_lie_have_no_layout():
    with pytest.raises(ValueError, match="layout_channels.*show_layout"):
        LSD(**lsd_preset("tiny", layout_channels=4))
    with pytest.raises(ValueError, match="a layout takes 28"):
        LayoutMaps(28, 5, 4)


def test_the_loss_reaches_the_layout_and_not_the_keys():
    model = small_model(slots_config=SMALL["slots_config"] | dict(key_weight=0.0))
    model.train()(small_batch())["loss"].backward()
    assert model.layout.values.weight.grad.abs().sum() > 0 and model.slot_attention.to_out.weight.grad.abs().sum() > 0
    assert not model.slot_attention.to_k[0].weight.grad.any()


def test_contrast_leaves_the_layout_alone():
    grads = []
    for weight in (0.0, 0.1):
        model = small_model(contrast_weight=weight).train()
        batch = small_batch(4) | {"noise": torch.ones(4, 48, 4, 4), "timesteps": torch.tensor([100, 300, 600, 900])}
        torch.manual_seed(1)
        model(batch)["loss"].backward()
        grads.append([model.layout.values.weight.grad, model.denoiser.conv_in.weight.grad])
    for without, with_contrast in zip(*grads):
        torch.testing.assert_close(without, with_contrast)


def test_clips_numbers_and_folders(tmp_path):
    model = small_model()
    clips = {"image": small_batch(4)["image"].unflatten(0, (2, 2))}
    assert model(clips)["loss"].isfinite()
    factors = encoded(model, small_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.predict(torch.zeros(3, 48, 4, 4), torch.tensor([5] * 3), factors).isfinite().all()
    model.save_pretrained(tmp_path)
    again = load_decomposer(tmp_path).eval()
    with torch.no_grad():
        answers = [m.predict(torch.zeros(3, 48, 4, 4), torch.tensor([5] * 3), factors) for m in (model, again)]
    torch.testing.assert_close(*answers)


def test_groups_of_parameters_follow_their_loss():
    model = small_model()
    first, second = ({id(p) for p in group["params"]} for group in model.parameter_groups())
    assert {id(p) for p in model.slot_attention.to_k.parameters()} <= first
    learned_by_drawing = [*model.slot_attention.content.parameters(), *model.layout.parameters()]
    assert {id(p) for p in learned_by_drawing} <= second and not first & second
    assert len(first) + len(second) == len([p for p in model.parameters() if p.requires_grad])
