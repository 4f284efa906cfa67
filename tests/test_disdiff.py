"DisDiff and what it stands on: fields, losses and their gradients, composition, options, and what is refused."
import copy
import json
import math

import pytest
import torch

from decomp_nb.components.adversarial import AdversarialAutoencoder, PatchDiscriminator, adaptive_weight
from decomp_nb.components.autoencoders import kl_model, vq_model
from decomp_nb.components.code_model import FactorEncoder
from decomp_nb.components.codes import (
    CircularCodes,
    circular_kl,
    code_arc,
    code_line,
    edges,
    independent_circles,
)
from decomp_nb.components.latent_diffusion import LatentDiffusion
from decomp_nb.decomposer import fingerprint, load_decomposer
from decomp_nb.components.latents import KLLatents, VQLatents, decode_latents
from decomp_nb.components.samplers import DDIM, latent_sampler
from decomp_nb.components.shift_decoder import FactorNames, TwoConditions
from decomp_nb.components.plain_unets import unet_down, unet_up
from decomp_nb.factors import Factors
from decomp_nb.methods.disdiff import DisDiff, disdiff_preset, disentangling_logits, trajectory_times
from decomp_nb.methods.encdiff import EncDiff, encdiff_preset
from decomp_nb.training.record import check_model

UNET = dict(sample_size=8, in_channels=3, channels=[8, 16], layers_per_block=1, attention_levels=[1], n_heads=2, groups=4)


def space(kind="vq", seed=0):
    torch.manual_seed(seed)
    if kind == "kl": return KLLatents(kl_model(2, width=8, layers_per_block=1, latent_channels=3, groups=4, attention=False))
    return VQLatents(vq_model(2, width=8, layers_per_block=1, n_codes=16, groups=4, attention=False))


def base(kind="vq", seed=0, **options):
    torch.manual_seed(seed)
    model = LatentDiffusion(**{"image_size": 16, "denoiser_config": UNET, **options})
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model.attach(space(kind))


def disdiff(kind="vq", seed=0, alive=True, **options):
    torch.manual_seed(seed)
    model = DisDiff(**{"image_size": 16, "n_factors": 3, "factor_dim": 4, "encoder_config": {"width": 8}, "denoiser_config": UNET, **options})
    for p in model.fields.parameters() if alive else []:  # the last layer of every block begins at zero
        if p.ndim > 1 and not p.any(): torch.nn.init.normal_(p, std=0.2)
    return model.attach(base(kind))


def encdiff(kind="vq", seed=0, **options):
    torch.manual_seed(seed)
    return EncDiff(**{"image_size": 16, "n_factors": 3, "encoder_config": {"width": 8}, **TOKENS, **options}).attach(space(kind))


def batch(n=4, seed=1, model=None):
    g = torch.Generator().manual_seed(seed)
    return {"image": torch.rand(n, 3, 16, 16, generator=g) * 2 - 1, "noise": torch.randn(n, 3, 8, 8, generator=g), "timesteps": torch.tensor([5, 300, 600, 950])[:n],
            "chosen": torch.tensor([0, 2, 1, 0])[:n]}


def ask(model, x, t, f):
    with torch.no_grad(): return model.predict(x, t, f)


# --- fields ------------------------------------------------------------------------------------------------------------------------------------------


def test_two_conditions_are_one_after_the_other():
    layer = TwoConditions(6, 8)
    time, code, h = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 4)
    (s, b), (s2, b2) = layer.time(time).chunk(2, -1), layer.code(code).chunk(2, -1)
    scale, shift = layer(torch.cat([time, code], -1)).chunk(2, -1)
    torch.testing.assert_close(h * (1 + scale) + shift, (h * (1 + s) + b) * (1 + s2) + b2)


def test_names_are_orthogonal_and_stay_so():
    names = FactorNames(5, 32)
    torch.testing.assert_close(names.basis() @ names.basis().T, torch.eye(5), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="n_factors=20"): FactorNames(20, 32)
    assert FactorNames(20, 32, "free", 4)().shape == (20, 32)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_untrained_fields_are_zero_and_predict_is_the_frozen_model(kind):
    model = disdiff(kind, alive=False).eval()
    f, x, t = model.encode(batch()["image"]), torch.randn(4, 3, 8, 8), torch.tensor([1, 10, 500, 999])
    torch.testing.assert_close(ask(model, x, t, f), ask(model.base, x, t, None))
    assert model.diagnostics({"image": batch()["image"]})["code_spread"] >= 0


def test_fields_add_up_and_weights_scale_them():
    model = disdiff().eval()
    with torch.no_grad(): f = model.encode(batch()["image"])
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([1, 10, 500, 999])
    none = ask(model, x, t, model.null_factors(f))
    torch.testing.assert_close(none, ask(model.base, x, t, None))
    singles = [ask(model, x, t, model.only(f, i)) - none for i in range(3)]
    torch.testing.assert_close(ask(model, x, t, f) - none, sum(singles), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ask(model, x, t, f * torch.tensor([2.0, 0.0, -1.0])) - none, 2 * singles[0] - singles[2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.guided(f, 2.0)(x, t), ask(model, x, t, f * 2.0))
    rows = torch.tensor([[1.0, 0, 0]] * 2 + [[0, 1.0, 0]] * 2)  # other factors in every picture
    torch.testing.assert_close(ask(model, x, t, f * rows) - none, torch.cat([singles[0][:2], singles[1][2:]]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ask(model, x, t, f.cat(f)) - none, 2 * sum(singles), rtol=1e-3, atol=1e-5)


def test_a_factor_of_weight_zero_is_not_computed():
    model = disdiff().eval()
    seen = []
    model.fields.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        f = model.encode(batch()["image"])
        for g in (f, model.only(f, 1), model.only(f, [0, 2]), model.null_factors(f)): model.predict(torch.randn(4, 3, 8, 8), torch.tensor([3] * 4), g)
    assert seen == [3, 1, 2, 0]


def test_chunks_and_checkpoints_change_nothing():
    torch.manual_seed(0)
    losses = []
    for chunk, lean in ((0, False), (1, False), (2, True)):
        model = disdiff(dis_weight=1.0).train()
        model.factor_chunk = chunk
        if lean: model.enable_gradient_checkpointing()
        out = model(batch())
        out["loss"].backward()
        losses.append((out["loss"].item(), model.fields.read.weight.grad.norm().item()))
    for loss in losses[1:]: assert loss == pytest.approx(losses[0], rel=1e-4)


# --- losses ------------------------------------------------------------------------------------------------------------------------------------------


def test_logits():
    z, before, after = torch.zeros(1, 2, 1), torch.tensor([[[3.0], [1.0]]]), torch.tensor([[[1.0], [2.0]]])
    moves = disentangling_logits(z, before, after)
    assert moves.variant.tolist() == [[2.0, -1.0]] and moves.invariant.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("options", [dict(), dict(dis_kind="IM"), dict(reads="latents"), dict(reads="latents", dis_kind="IM"), dict(dis_bound=0.1), dict(names="free", loss="l2", coefficient="ddim"),
                                     dict(encoder_config=dict(width=8, norm="batch", skip_relu=True)), dict(variant_weight=0.0), dict(dis_weight=0.0)])
def test_training_reaches_what_is_trained_and_nothing_else(options):
    model = disdiff(**options).train()
    out = model(batch())
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and all(p.grad is not None and torch.isfinite(p.grad).all() for name, p in model.named_parameters() if "names.table" not in name or p.grad is not None)
    assert model.encoder.layers[0].weight.grad.abs().sum() > 0 and all(p.grad is None for p in [*model.base.parameters(), *model.latents.parameters()])
    assert {p for g in model.parameter_groups() for p in g["params"]} == set(model.parameters())
    if model.config.dis_bound: assert out["dis_weight"].max() <= 0.1


def test_the_target_of_the_variant_part_gets_no_gradient():
    "The code of another slot than the chosen one is touched by the reconstruction only"
    model = disdiff(dis_weight=1.0)
    b, codes = batch(), torch.randn(4, 3, 4, requires_grad=True)
    x_t, t = b["noise"], b["timesteps"]
    seen = unet_down(model.base.denoiser, x_t, t)
    one = model.fields(seen, codes, torch.arange(3))[torch.arange(4), b["chosen"]]
    model.disentangling(x_t, t, unet_up(model.base.denoiser, seen), one, codes, b["chosen"])["disentangling"].sum().backward()
    touched = codes.grad.abs().sum(-1) > 0
    assert torch.equal(touched, torch.nn.functional.one_hot(b["chosen"], 3).bool())


def test_re_encoding_leaves_the_encoder_as_it_was():
    model = disdiff(encoder_config=dict(width=8, norm="batch")).train()
    model.encoder.layers[1].eval()
    before = copy.deepcopy(model.encoder.state_dict())
    model.reencode(torch.randn(2, 3, 8, 8))
    assert model.encoder.training and not model.encoder.layers[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())


def test_the_weight_of_the_disentangling_loss_can_rise():
    rising, constant = disdiff(dis_warmup=4).train(), disdiff().train()
    full = constant(batch())["disentangling"]
    found = [rising(batch())["disentangling"] for _ in range(6)]
    for share, value in zip([0, 0.25, 0.5, 0.75, 1, 1], found):
        torch.testing.assert_close(value, share * full)
    assert rising.batches == 6 and "batches" in rising.state_dict() and "batches" not in constant.state_dict()
    rising.eval()(batch())
    assert rising.batches == 6


def test_levels_of_a_trajectory_begin_at_pure_noise_and_fall():
    assert trajectory_times(1, 1000) == [999] and trajectory_times(4, 1000, 1.0) == [999, 749, 499, 249]
    for offset in (0.01, 0.25, 1.0):
        times = trajectory_times(10, 1000, offset)
        assert times[0] == 999 and min(times) >= 0 and all(later < before for before, later in zip(times, times[1:]))


def test_trajectories_train_encoder_and_fields_on_clean_latents():
    model = disdiff(trajectory_steps=3).train()
    torch.manual_seed(0)
    out = model(batch())
    out["loss"].backward()
    assert model.encoder.layers[0].weight.grad.abs().sum() > 0 and model.fields.conv_out.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*model.base.parameters(), *model.latents.parameters()])
    torch.manual_seed(0)
    assert torch.equal(model(batch())["loss"], out["loss"]) and not torch.equal(model(batch(seed=2))["loss"], out["loss"])


def test_a_trajectory_of_true_noise_has_no_error(monkeypatch):
    model, b = disdiff(trajectory_steps=4).eval(), batch()
    x0 = model.latents.from_batch(b)

    def true_noise(self, x_t, t, factors):
        signal = self.scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
        return (x_t - signal * x0) / (1 - signal ** 2).sqrt()
    monkeypatch.setattr(DisDiff, "predict", true_noise)
    found = model(b)
    assert found["loss"] < 1e-3 and found["last"] < 1e-3
    monkeypatch.setattr(DisDiff, "predict", lambda self, x_t, t, factors: torch.zeros_like(x_t))
    assert model(b)["loss"] > 0.1


def test_injected_draws_decide_the_loss():
    model = disdiff().train()
    losses = [model(batch())["loss"].item() for _ in range(2)] + [model(batch() | {"chosen": torch.tensor([1, 1, 1, 1])})["loss"].item()]
    assert losses[0] == losses[1] != losses[2]


# --- use ---------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["official", "ddim", "ddpm", "dpm", "euler"])
def test_every_scheduler_draws(sampler):
    model = disdiff().eval()
    images = model.reconstruct(batch(2)["image"], steps=4, scheduler=latent_sampler(sampler, model.scheduler), generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1


def test_decompose_swap_and_traverse():
    model, x = disdiff().eval(), batch()["image"]
    with torch.no_grad(): f = model.encode(x)
    noise = torch.randn(4, 3, 8, 8)
    options = dict(steps=3, noise=noise)
    alone = model.decompose(f, **options)
    torch.testing.assert_close(alone[:, 1], model.decode(model.only(f, 1), **options))
    swapped = model.swap(x, x[:1], 2, **options)
    torch.testing.assert_close(swapped[:1], model.decode(f, **options)[:1])  # from itself: nothing changes
    torch.testing.assert_close(swapped, model.decode(f.replace(2, f.rows([0] * 4)), **options))
    torch.testing.assert_close(model.swap(x, x.roll(1, 0), [0, 1], partial=True, **options), model.decode(model.only(f.replace([0, 1], f.rows([3, 0, 1, 2])), [0, 1]), **options))
    line = code_line(torch.randn(50, 4), stops=5)
    walk = model.traverse(f.rows(1), 0, line, **options)
    assert walk.shape == (5, 3, 16, 16) and not torch.equal(walk[0], walk[-1])
    torch.testing.assert_close(model.traverse(f.rows(1), 0, f.codes[1:2, 0], **options), model.decode(f.rows(1), steps=3, noise=noise[:1]))


def test_dead_factors_show():
    model = disdiff().eval()
    norms = model.field_norms(batch()["image"])
    assert norms.shape == (3,) and (norms > 0).all()
    assert disdiff(alive=False).eval().field_norms(batch()["image"]).abs().max() == 0


def test_official_steps_and_noise():
    model = disdiff()
    ddim = DDIM(model.scheduler, eta=1.0)
    ddim.set_timesteps(300)
    assert len(ddim.timesteps) == 334 and ddim.timesteps[-1] == 1
    with pytest.raises(ValueError, match="steps=0"): ddim.set_timesteps(0)
    with pytest.raises(ValueError, match="official sampler"): latent_sampler("ddim", model.scheduler, eta=1.0)


def test_saved_with_a_path_and_loaded(tmp_path):
    from decomp_nb.official.reading import keep_with
    model = disdiff().eval()
    keep_with(model, tmp_path / "whole")
    again = load_decomposer(tmp_path / "whole").eval()
    x = batch()["image"]
    torch.testing.assert_close(again.reconstruct(x, steps=2, noise=batch()["noise"]), model.reconstruct(x, steps=2, noise=batch()["noise"]))
    half = copy.deepcopy(model.base).half()
    assert fingerprint(half) == fingerprint(model.base)


TOKENS = dict(factor_dim=1, token_dim=8,
              denoiser_config=dict(sample_size=8, in_channels=3, out_channels=3, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
                                   down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]))


def test_tokens_are_the_other_conditioning():
    model = encdiff().train()
    out = model(batch())
    out["loss"].backward()
    assert model.reader.to_token[2][0].weight.grad is not None and model.encode(batch()["image"]).codes.shape == (4, 3, 1)
    model.eval()
    f = model.encode(batch()["image"])
    assert model.decode(f, steps=2).shape == (4, 3, 16, 16) and len(model.parameter_groups()) == 2
    assert not torch.allclose(ask(model, torch.ones(4, 3, 8, 8), torch.tensor([500] * 4), f), ask(model, torch.ones(4, 3, 8, 8), torch.tensor([500] * 4), f * torch.tensor([0.0, 1, 1])))
    assert EncDiff(**encdiff_preset("encdiff")).n_factors == 20
    with pytest.raises(ValueError, match="preset 'encdif'"): encdiff_preset("encdif")


@pytest.mark.parametrize("asked", ["epsilon", "v_prediction", "sample"])
def test_codes_with_a_price(asked):
    "They are drawn in training and cost what they tell; `encode` gives their means; the denoiser answers what its schedule asks for"
    model, b = encdiff(kl_weight=0.1, token_gain=1.7, reads="latents", scheduler_config={"prediction_type": asked}).train(), batch()
    out = model(b | {"code_noise": torch.ones(4, 3, 1)})
    out["loss"].backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    with torch.no_grad():
        x0, t = model.latents.encode(b["image"]), b["timesteps"]
        codes, logvar = model.codes(x0)
        torch.testing.assert_close(model.encode(b["image"]).codes, codes)
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(codes, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
        a, s = (v[t].view(-1, 1, 1, 1) for v in (model.scheduler.alphas_cumprod.sqrt(), (1 - model.scheduler.alphas_cumprod).sqrt()))
        target = {"epsilon": b["noise"], "v_prediction": a * b["noise"] - s * x0, "sample": x0}[asked]
        answer = model.predict(a * x0 + s * b["noise"], t, Factors(codes + (logvar / 2).exp()))
    torch.testing.assert_close(out["kl"], kl)
    assert out["loss"].item() == pytest.approx((answer - target).square().mean().item() + 0.1 * kl.mean().item(), rel=1e-4)
    assert model.eval().reconstruct(b["image"], steps=2).shape == (4, 3, 16, 16)


CIRCULAR = dict(circular=True, factor_dim=2, kl_weight=0.1, token_gain=1.7)


def test_circular_codes_are_rotated_and_penalised():
    "Codes of length √2, rotated in training by noise of a width per factor; one penalty for all pictures, a part of it for factors that read edges"
    model, b = encdiff(**CIRCULAR, n_structure=1, kl_weight_structure=0.25).train(), batch()
    out = model(b | {"code_noise": torch.ones(4, 3)})
    out["loss"].backward()
    assert all(p.grad is not None for p in model.encoder.parameters()) and model.compass.log_width.grad.abs().min() > 0
    with torch.no_grad():
        kl = model.compass.kl
        torch.testing.assert_close(out["kl"], kl.sum().expand(4))
        penalty = out["loss"] - out["denoising"]
    assert penalty.item() == pytest.approx(0.1 * (kl[:2].sum() + 0.25 * kl[2]).item(), rel=1e-3)
    model.eval()
    codes = model.encode(b["image"]).codes
    torch.testing.assert_close(codes.norm(dim=-1), torch.full((4, 3), 2 ** 0.5))
    drawn = model.compass.sample(codes, torch.full((4, 3), 2.0))
    torch.testing.assert_close((drawn * codes).sum(-1) / 2, (2 * model.compass.sigma).cos().expand(4, 3))  # rotated by twice σ
    with torch.no_grad(): model.compass.log_width[1] = 1.0  # next to no information
    inactive = model.encode(b["image"]).codes
    assert (inactive[:, 1] == 0).all() and torch.equal(inactive[:, [0, 2]], codes[:, [0, 2]]) and model.diagnostics(b)["inactive_factors"] == pytest.approx(1 / 3)
    assert model.train()(b)["loss"].isfinite() and model.compass.sigma.max().item() == pytest.approx(CircularCodes.MAX_SIGMA)  # it can become active again
    assert model.eval().reconstruct(b["image"], steps=2).shape == (4, 3, 16, 16)


def test_kl_of_a_circular_code():
    "The divergence of a wrapped normal from the uniform distribution, computed on a grid"
    angles = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.double)[:-1]
    for s in (0.05, 0.3, 0.8, 1.19, 1.21, 1.5, 2.0):
        p = sum(torch.exp(-(angles + 2 * math.pi * k) ** 2 / (2 * s * s)) for k in range(-6, 7)) / (s * math.sqrt(2 * math.pi))
        exact = (p * (p.clamp_min(1e-300) * 2 * math.pi).log()).mean() * 2 * math.pi
        assert circular_kl(torch.tensor(s)).item() == pytest.approx(exact.item(), abs=0.03)


def test_the_penalty_rises_and_the_rise_is_saved(tmp_path):
    model, b = encdiff(**CIRCULAR, kl_warmup_steps=4).train(), batch()
    weights = []
    for _ in range(6):
        weights.append(model.kl_weight)
        out = model(b)
        assert (out["loss"] - out["denoising"]).item() == pytest.approx(weights[-1] * out["kl"][0].item(), abs=1e-5)  # nobody steps: the divergence stays
    assert weights == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])
    model.eval()(b)
    model.save_pretrained(tmp_path)
    assert int(EncDiff.from_pretrained(tmp_path).steps) == 6


@pytest.mark.parametrize("make, options", [(encdiff, CIRCULAR), (encdiff, {"factor_dim": 1, "kl_weight": 0.1}), (encdiff, {}), (disdiff, {})])
def test_form_does_not_read_hues(make, options):
    "Codes of the last factors stay where they are when colours change places; with log-variances too the halves are in order"
    model, x = make(**options, n_structure=1).eval(), batch()["image"]
    a, b = model.encode(x).codes, model.encode(x.flip(1)).codes
    torch.testing.assert_close(a[:, 2], b[:, 2])
    assert (a[:, :2] - b[:, :2]).abs().max() > 1e-3 and edges(x).min() >= 0 and edges(x).max() < 1
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    edges(flat).sum().backward()
    assert flat.grad.isfinite().all() and edges(flat).max() < 1e-3  # fields are judged through this slope
    if "kl_weight" in options and "circular" not in options:
        moved = model.codes(x.flip(1))[1] - model.codes(x)[1]
        assert moved[:, 2].abs().max() < 1e-5  # channels are summed in another order
        assert moved[:, :2].abs().max() > 1e-3


def test_circles_are_found_and_codes_begin_there():
    "Two circles and a line, mixed linearly: the two circles come back, surest first, and codes turn with them"
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 4000, generator=g) * 2 * math.pi
    hidden = torch.stack([3 * a.cos(), 3 * a.sin(), b.cos(), b.sin(), torch.randn(4000, generator=g), torch.randn(4000, generator=g)], 1)
    x = hidden @ torch.randn(6, 12, generator=g) + 2
    weights, offsets = independent_circles(x, 3)
    pairs = (x @ weights.T + offsets).unflatten(1, (-1, 2))
    assert pairs.shape[1] == 2 and pairs.flatten(1).std(0).allclose(torch.ones(4), atol=0.02)
    turn = torch.atan2(pairs[..., 1], pairs[..., 0])
    same = lambda u, v: max(torch.polar(torch.ones(4000), u - s * v).mean().abs().item() for s in (1, -1))
    assert sorted([same(turn[:, 0], a) > 0.99, same(turn[:, 1], a) > 0.99]) == [False, True] and sorted([same(turn[:, 0], b) > 0.99, same(turn[:, 1], b) > 0.99]) == [False, True]
    with pytest.raises(ValueError, match="40 pictures are too few"): independent_circles(x[:40], 2)

    images = torch.rand(2000, 3, 16, 16, generator=g) * 0.2  # two places whose colour turns
    for place, angle in ((slice(0, 8), a[:2000]), (slice(8, 16), b[:2000])): images[:, :2, place] += torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None]
    model = encdiff(**CIRCULAR, n_factors=4, encoder_config={"width": 8, "linear_skip": 4}, n_structure=1)
    assert model.init_from_ica(images) == 2
    for _ in range(50): model.train().codes(images[:500])  # centred
    assert model.compass.inactive.tolist() == [False, False, True, False]  # nothing turns for the third; the fourth reads edges
    turn = torch.atan2(*model.eval().encode(images).codes.unbind(-1))
    assert all(max(torch.polar(torch.ones(2000), turn[:, m] - s * v).mean().abs().item() for s in (1, -1) for m in (0, 1)) > 0.99 for v in (a[:2000], b[:2000]))
    with pytest.raises(ValueError, match="linear_skip"): encdiff(**CIRCULAR).init_from_ica(images)
    with pytest.raises(ValueError, match="set circular=True"): disdiff(encoder_config={"width": 8, "linear_skip": 4}).init_from_ica(images)


@pytest.mark.parametrize("make, options", [(encdiff, CIRCULAR), (encdiff, CIRCULAR | {"kl_weight": 0.0}), (disdiff, {"circular": True, "factor_dim": 2})])
def test_whatever_is_trained_has_a_gradient(make, options):
    "Several processes wait for ever for a gradient that never comes"
    model = make(**options, n_structure=1).train()
    model(batch())["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_an_adopted_encoder_stays_as_it_is():
    "Fields stand on codes that another model found; only fields learn, and the disentangling loss uses the same encoder"
    kind = dict(circular=True, factor_dim=2, n_structure=1)
    giver, model = encdiff(**CIRCULAR | kind, seed=3).train(), disdiff(**kind)
    for _ in range(3): giver(batch())
    model.adopt_encoder(giver.eval()).train()
    x = batch()["image"]
    torch.testing.assert_close(model.encode(x).codes, giver.encode(x).codes)
    out = model(batch() | {"chosen": torch.tensor([0, 1, 2, 0])})
    out["loss"].backward()
    assert out["disentangling"].mean() > 0 and all(p.grad is None for p in model.encoder.parameters()) and any(p.grad is not None and p.grad.any() for p in model.fields.parameters())
    torch.testing.assert_close(model.train().encode(x).codes, giver.encode(x).codes)  # and its running means are not touched
    torch.testing.assert_close(model.reencode(model.latents.encode(x))[1], model.encode(decode_latents(model.latents, model.latents.encode(x))).codes)
    with pytest.raises(ValueError, match="another one: n_factors is 3 there and 4 here"): disdiff(**kind | {"n_factors": 4}).adopt_encoder(giver)


def test_arcs_of_circular_codes():
    "Stops lie on the circle, within the arc that the data fill"
    around = lambda a: torch.stack([a.cos(), a.sin()], -1) * 2 ** 0.5
    stops = code_arc(around(torch.linspace(2.5, 4.0, 50)), 4)  # over the seam at π
    torch.testing.assert_close(stops, around(torch.linspace(2.5, 4.0, 4)), atol=1e-4, rtol=0)
    assert code_arc(around(torch.linspace(0, 6.2, 60)), 5).norm(dim=1).allclose(torch.full((5,), 2 ** 0.5))


def test_encoding_draws_nothing():
    model, x = disdiff("kl", reads="latents").eval(), batch()["image"]
    assert torch.equal(model.encode(x).codes, model.encode(x).codes)


def test_published_sizes():
    "Counts that the paper's code has: shift decoder 22.74 M, encoder 1.52 M, frozen UNet 29.42 M"
    model = DisDiff(**disdiff_preset("shapes3d", image_size=64))
    assert sum(p.numel() for p in model.fields.parameters()) == pytest.approx(22.74e6, abs=5e3)
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(1.52e6, abs=5e3)
    assert [sum(p.numel() for p in m.parameters()) / 1e6 for m in (kl_model(), vq_model(4, width=32, n_codes=2048))] == pytest.approx([3.48, 3.48], abs=0.02)


# --- refused -----------------------------------------------------------------------------------------------------------------------------------------


REFUSED = {
    "n_factors=1": dict(n_factors=1), "dis_kind='X'": dict(dis_kind="X"), "reads='pixels'": dict(reads="pixels"),
    "encoder_config: no option 'depth'": dict(encoder_config=dict(depth=3)), "no option 'heads'": dict(denoiser_config=UNET | {"heads": 2}), "names='none'": dict(names="none"),
    "circular=True: a point on a circle is a pair": dict(circular=True),
    "n_structure=3: of 3": dict(n_structure=3), "latents have no edges": dict(n_structure=1, reads="latents"), "image_size: give it": dict(image_size=None), "not 24": dict(image_size=24),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_options(message):
    with pytest.raises(ValueError, match=message): disdiff(**REFUSED[message])


MISMATCHES = {
    "image_size=32, but the base": (dict(image_size=32), {}, {}),
    "the base's UNet is another one": (dict(denoiser_config=UNET | {"channels": [16, 16]}), {}, {}),
    "another noise schedule": ({}, dict(scheduler_config={"beta_end": 0.02}), {}),
    "the base predicts 'v_prediction'": ({}, dict(scheduler_config={"prediction_type": "v_prediction"}), {}),
    "is not the one that the fields were trained on": (dict(base_mark="00000000"), {}, {}),
}


@pytest.mark.parametrize("message", MISMATCHES)
def test_refuses_a_base_that_does_not_fit(message):
    ours, theirs, _ = MISMATCHES[message]
    model = DisDiff(**{"image_size": 16, "n_factors": 3, "factor_dim": 4, "encoder_config": {"width": 8}, "denoiser_config": UNET, **ours})
    with pytest.raises(ValueError, match=message): model.attach(base(**theirs))


def test_refuses_stages_that_do_not_belong_together(tmp_path):
    "Another autoencoder than the one that stage 2 was trained with, one of another size, a path that holds something else, no path"
    space("vq", seed=0).vae.save_pretrained(tmp_path / "ae")
    space("vq", seed=5).vae.save_pretrained(tmp_path / "other")
    vq_model(4, width=8, layers_per_block=1, n_codes=16, groups=4, attention=False).save_pretrained(tmp_path / "small")
    model = LatentDiffusion(image_size=16, denoiser_config=UNET, latents_path=str(tmp_path / "ae"))
    model.latents  # noqa: B018 - the mark of the autoencoder is noted
    model.save_pretrained(tmp_path / "ldm")
    build = lambda **o: DisDiff(**{"base_path": str(tmp_path / "ldm"), "n_factors": 3, "factor_dim": 4, "encoder_config": {"width": 8}, **o})
    fine = build(latents_path=str(tmp_path / "ae"))
    assert fine.config.image_size == 16 and fine.latent_shape == (3, 8, 8) and fine.config.base_mark == fingerprint(fine.base)
    cases = {"is not the one that the denoiser was trained with": dict(latents_path=str(tmp_path / "other")), "but the denoiser was built for 3 channels of side 8": dict(latents_path=str(tmp_path / "small")),
             "holds a VQModel": dict(base_path=str(tmp_path / "ae")), "give its run directory": dict(base_path="", denoiser_config=UNET, image_size=16), "image_size: give it": dict(base_path=None)}
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message): build(**options).latents  # noqa: B018
    with pytest.raises(FileNotFoundError, match="no LatentDiffusion there"): build(base_path=str(tmp_path / "nothing"))


def test_refuses_half_a_set_and_other_pictures():
    model = disdiff()
    with pytest.raises(ValueError, match="known by their place"): model.predict(torch.randn(1, 3, 8, 8), torch.tensor([3]), Factors(torch.zeros(1, 2, 4)))
    with pytest.raises(ValueError, match="built for"): model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="preset 'shapes'"): disdiff_preset("shapes")
    with pytest.raises(ValueError, match="not 20"): FactorEncoder(20)


# --- first stage -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_adversarial_training_moves_both(kind, tmp_path):
    model = AdversarialAutoencoder(space(kind).vae.requires_grad_(True), width=8, layers=1, start=1, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3))).train()
    before = model({"image": batch()["image"]})
    assert before["discriminator"] == 0 and "perceptual" in before
    out = model({"image": batch()["image"]})
    out["loss"].backward()
    assert out["discriminator"] > 0 and model.discriminator.layers[0].weight.grad.abs().sum() > 0 and model.vae.decoder.conv_out.weight.grad.abs().sum() > 0
    assert {g["name"] for g in model.parameter_groups()} == {"autoencoder", "discriminator"}
    model.eval()
    with torch.no_grad(): assert model({"image": batch()["image"]})["weight"] == 0  # nothing to weigh without gradients
    model.save_pretrained(tmp_path)
    assert not any("discriminator" in k for k in type(model.vae).from_pretrained(tmp_path).state_dict())


def test_the_weight_is_bounded():
    w = torch.ones(3, requires_grad=True)
    assert adaptive_weight((w * 1e9).sum(), (w * 1e-9).sum(), w) == 1e4
    with pytest.raises(ValueError, match="too small"): PatchDiscriminator(width=8)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multipliers"): kl_model(4, multipliers=[1])


def test_paint_passes_gradients():
    for kind in ("vq", "kl"):
        z = torch.randn(1, 3, 8, 8, requires_grad=True)
        decode_latents(space(kind), z).sum().backward()
        assert z.grad.abs().sum() > 0


# --- configs from before ------------------------------------------------------------------------------------------------------------------------------


OLD_TOKENS = dict(conditioning="tokens", dis_weight=0.0, dis_kind="Z", dis_bound=0.0, dis_temperature=1.0, dis_below=1.0, variant_weight=1.0, invariant_weight=1.0, base_path=None, base_mark="", coefficient="pdae",
                  start="fresh", names="orthogonal", directions=True, code_price=0.1, structure_price=0.25, price_steps=4, encoder_config={"width": 8, "glance": 4})


def old_folder(model, config, folder):
    "The folder of a model as an earlier version wrote it: weights have the same names"
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    today = {"circular", "kl_weight", "kl_weight_structure", "kl_warmup_steps"}
    old = {k: v for k, v in written.items() if k not in today} | {"_class_name": "DisDiff"} | config
    (folder / "config.json").write_text(json.dumps(old))
    return folder


def test_a_model_with_tokens_from_before_is_an_encdiff(tmp_path):
    model = encdiff(**CIRCULAR, kl_weight_structure=0.25, kl_warmup_steps=4, encoder_config={"width": 8, "linear_skip": 4}).eval()
    folder, x = old_folder(model, OLD_TOKENS, tmp_path / "old"), batch()["image"]
    for again in (DisDiff.from_pretrained(folder), load_decomposer(folder), DisDiff.from_config(OLD_TOKENS | {"loss": "l2"} | {k: v for k, v in TOKENS.items() if k != "factor_dim"} | {"image_size": 16, "factor_dim": 2, "n_factors": 3, "token_gain": 1.7})):
        assert type(again) is EncDiff and {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in model.config.items() if k[0] != "_"}
    torch.testing.assert_close(load_decomposer(folder).eval().encode(x).codes, model.encode(x).codes)


def test_fields_from_before_load(tmp_path):
    model = disdiff(circular=True, factor_dim=2, n_structure=1, encoder_config={"width": 8, "linear_skip": 4}).eval()
    old = dict(conditioning="fields", token_dim=32, token_gain=1.0, code_price=0.0, structure_price=1.0, price_steps=0, dis_temperature=1.0, dis_below=1.0, directions=True, encoder_config={"width": 8, "glance": 4})
    folder, x = old_folder(model, old, tmp_path / "old"), batch()["image"]
    again = load_decomposer(folder).eval()
    torch.testing.assert_close(again.encode(x).codes, model.encode(x).codes)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in model.config.items() if k[0] != "_"}
    with pytest.raises(ValueError, match="dis_below is no longer an option of DisDiff"): DisDiff.from_config(dict(again.config) | {"dis_below": 0.5})
    assert disdiff_preset("tiny", directions=True, encoder_config={"glance": 8})["encoder_config"] == {"width": 16, "linear_skip": 8}


def test_runs_from_before_are_of_the_same_model(tmp_path):
    "A run directory of an earlier version resumes: its record names the same model, its checkpoint the same weights"
    model = encdiff(**CIRCULAR, kl_weight_structure=0.25, kl_warmup_steps=4, encoder_config={"width": 8, "linear_skip": 4})
    record = json.loads((old_folder(model, OLD_TOKENS, tmp_path / "model") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": {k: v for k, v in record.items() if k == "_class_name" or k[0] != "_"}}))
    check_model(tmp_path / "config.json", model)
    with pytest.raises(ValueError, match="linear_skip: only in the run"): check_model(tmp_path / "config.json", encdiff(**CIRCULAR, n_factors=4))
    names = {name for name in model.state_dict() if not name.startswith("reader.unet")}
    assert {"compass.log_width", "compass.centre.running_mean", "encoder.glance.weight", "encoder.layers.0.weight", "reader.to_token.2.4.bias", "steps"} <= names


def test_presets_and_options_that_moved_to_encdiff():
    "Codes as tokens were options of DisDiff; it says where they are"
    with pytest.raises(ValueError, match=r"EncDiff\(\*\*encdiff_preset\('shapes3d_tokens'\)\)"): disdiff_preset("shapes3d_tokens")
    with pytest.raises(TypeError, match="code_price: no longer an option of DisDiff"): disdiff_preset("tiny", code_price=0.1)
    with pytest.raises(TypeError, match="conditioning: no longer an option"): DisDiff(image_size=16, conditioning="tokens")
    with pytest.warns(FutureWarning, match="code_price is now kl_weight"): assert encdiff_preset(code_price=0.1)["kl_weight"] == 0.1
    with pytest.warns(FutureWarning, match="directions is now circular"): assert disdiff(directions=True, factor_dim=2).compass is not None
