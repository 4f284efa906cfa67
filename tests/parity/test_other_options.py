"""The parity checks on sets recorded with other options than the ones at hand.

Such a set is made here, small: weights of a model of ours in the official layout, arrays by formulas written down
anew, then the very check that reads the recorded sets. What only one option shows (an odd number of components, steps
near the clean end) is so compared without its recording.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import close, parity, run
from safetensors.torch import load_file, save_file

from decomp_nb.official import autoencoders, decomp_diffusion, disdiff, reading

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation"
)  # numpy 2 about torch, inside diffusers


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    "No layer silent: every weight moved away from its start"
    g = rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return model.eval()


# --- Decomp Diffusion: an odd number of components, times near both ends ------------------------------------


def cosine_bars() -> torch.Tensor:
    "ᾱ of the official schedule, float64"
    level = lambda s: torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
    i = torch.arange(1000, dtype=torch.float64)
    betas = (1 - level((i + 1) / 1000) / level(i / 1000)).clamp_max(0.999)
    return (1 - betas).cumprod(0)


@torch.no_grad()
def drawn_by_hand(answer, x: torch.Tensor, steps: int) -> torch.Tensor:
    "Official DDIM without noise: the clean picture is clipped, and ε is read off it"
    bars = cosine_bars()
    for i in reversed(range(steps)):
        t = i * (1000 // steps)
        now, before = bars[t], bars[t - 1000 // steps] if i else torch.tensor(1.0, dtype=torch.float64)
        clean = answer(x, torch.full((len(x),), t)).clamp(-1, 1)
        noise = (x.double() - now.sqrt() * clean) / (1 - now).sqrt()
        x = (before.sqrt() * clean + (1 - before).sqrt() * noise).float()
    return x


def mean_of(parts):
    "Composed answer of `(model, vector)` pairs: the mean of what each model says to its vector"

    def answer(x, t):
        return torch.stack([model.predict_component(x, t, code.expand(len(x), -1)) for model, code in parts]).mean(0)

    return answer


@torch.no_grad()
def odd_set(folder: Path, k: int = 3):
    "A folder in the layout of the recorded one, with k components; only what combinations and posteriors need"
    from decomp_nb.methods.decomp_diffusion import DecompDiffusion

    Recorded = parity("test_decomp_diffusion").Recorded
    unet = dict(
        channels=(16, 16),
        layers_per_block=1,
        attention_levels=(1,),
        groups=16,
        n_heads=2,
        head_dim=0,
        resample="resnet",
    )
    model = DecompDiffusion(
        image_size=16,
        n_factors=k,
        factor_dim=8,
        data_range="unit",
        encoder_config=dict(width=4, norm="batch", end="relu"),
        denoiser_config=unet,
    )
    decomp_diffusion.save_official_decomp_diffusion(shake(model), folder / "model_1.pt")
    save_file(reading.read_weights(folder / "model_1.pt"), folder / "weights.safetensors")
    config = dict(
        main=dict(image_size=16, num_heads=2, num_head_channels=-1, num_heads_upsample=-1),
        slice_custom_indices="0,1,1",
        cross_indices="1,0,1",
        cross_model2="every floating tensor of weights.safetensors times 0.9.",
    )
    (folder / "config.json").write_text(json.dumps(config))
    r, x0 = Recorded(folder), torch.rand(2, 3, 16, 16, generator=rng(1))
    noise = torch.randn(2, 3, 16, 16, generator=rng(2))
    save_file({"x0": x0}, folder / "arrays.safetensors")
    model, other = r.model(), r.model(scale=0.9)
    first, second = model.encode(x0 * 2 - 1).codes
    theirs = other.encode(x0 * 2 - 1).codes[1]
    arrays = {
        "x0": x0,
        "noise": noise,
        "noise_T": noise.clone(),
        "t": torch.tensor([2, 996]),
        "ddim5_x0_components": torch.zeros(1),
    }
    for name, mask in (("slice_default", [1, 0, 0]), ("slice_custom", [0, 1, 1])):
        chosen = torch.where(torch.tensor(mask)[:, None] > 0, first, second)
        arrays |= {
            f"{name}_latent": chosen.flatten()[None],
            name: drawn_by_hand(mean_of([(model, c) for c in chosen]), noise[:1], 5),
        }
    arrays["add"] = drawn_by_hand(mean_of([(model, c) for c in (*first, *second)]), noise[:1], 5)
    arrays["cross"] = drawn_by_hand(
        mean_of([(model, first[0]), (other, theirs[1]), (model, first[2])]), noise[:1], 5
    )
    save_file(arrays | posteriors(model, arrays, (first, second)), folder / "arrays.safetensors")
    return Recorded(folder)


def posteriors(model, arrays, codes) -> dict[str, torch.Tensor]:
    "Mean, clean picture and log variance of one step of the whole process, for both readings of the answer, in float64"
    bars, t = cosine_bars(), arrays["t"]
    column = lambda v: v[:, None, None, None]
    now, before = column(bars[t]), column(bars[t - 1])
    beta, x_t = 1 - now / before, (now.sqrt() * arrays["x0"] + (1 - now).sqrt() * arrays["noise"])
    said = torch.cat(
        [
            mean_of([(model, c) for c in own])(x_t[i : i + 1].float(), t[i : i + 1])
            for i, own in enumerate(codes)
        ]
    ).double()
    out = {}
    for kind, clean in (("x0", said), ("eps", (x_t - (1 - now).sqrt() * said) / now.sqrt())):
        clean = clean.clamp(-1, 1)
        mean = beta * before.sqrt() / (1 - now) * clean + (1 - before) * (1 - beta).sqrt() / (1 - now) * x_t
        out |= {f"pmv_{kind}_mean": mean.float(), f"pmv_{kind}_pred_xstart": clean.float()}
    share = (beta + 1) / 2
    out["pmv_log_variance"] = (
        (share * beta.log() + (1 - share) * (beta * (1 - before) / (1 - now)).log()).flatten().float()
    )
    return out


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return odd_set(tmp_path_factory.mktemp("odd"))


def test_combinations_of_an_odd_number_of_components(odd):
    check_combinations = parity("test_decomp_diffusion").check_combinations
    made = {name: tolerance for _, name, _, tolerance in run(check_combinations, odd)}
    assert set(made) == {
        "slice_default",
        "slice_default_latent",
        "slice_custom",
        "slice_custom_latent",
        "add",
        "cross",
    }
    spoilt = type(odd)(odd.folder, altered=("arrays", "slice_default"))
    with pytest.raises(AssertionError, match="slice_default"):
        run(check_combinations, spoilt)


def test_combinations_without_the_official_default(odd, monkeypatch):
    "The official default fails for an odd number, so a recording may lack it"
    check_combinations = parity("test_decomp_diffusion").check_combinations
    r = type(odd)(odd.folder)
    r.files["arrays"] = {
        k: v for k, v in r.load("arrays").items() if not k.startswith(("slice_default", "cross"))
    }
    assert [name for _, name, *_ in run(check_combinations, r)] == [
        "slice_custom_latent",
        "slice_custom",
        "add",
    ]


def test_posteriors_near_both_ends(odd):
    "1 − ᾱ is as small as 10⁻⁴ at one of these times, ᾱ as small as 10⁻⁵ at the other"
    checks = parity("test_decomp_diffusion")
    made = {name: (ours, tolerance) for _, name, ours, tolerance in run(checks.check_posterior, odd)}
    assert made["pmv_x0_mean"][1] == checks.SINGLE < made["pmv_eps_pred_xstart"][1] <= checks.SEEN
    for name, (ours, tolerance) in made.items():
        if name.endswith("mean"):
            close(ours[:1], odd.read("arrays", name)[:1], 2e-5, f"{name} beside the clean end")
        spoilt = type(odd)(odd.folder, altered=("arrays", name)).array("arrays", name)
        with pytest.raises(AssertionError, match=name):
            close(ours, spoilt, tolerance, name)


# --- DisDiff on a KL autoencoder, with the draw of its latents recorded -------------------------------------

SETTINGS = ("images_u8", "t", "sampled_concept")  # what the recorded set and ours have in common


@torch.no_grad()
def kl_set(folder: Path, golden: Path):
    "The recorded weights behind the other autoencoder, and what the frozen model says about a draw of its latents"
    checks = parity("test_disdiff")
    recorded = checks.Recorded(golden)
    if recorded.kind == "kl":
        pytest.skip("the recorded set has a KL autoencoder itself")
    state, vae = load_file(recorded.file), load_file(golden / "ae2_kl.safetensors")
    channels = len(vae["post_quant_conv.weight"])
    state = {k: v for k, v in state.items() if not k.startswith("first_stage_model.")} | {
        f"first_stage_model.{k}": v for k, v in vae.items()
    }
    for i, (name, axis) in enumerate(
        {
            "input_blocks.0.0.weight": 1,
            "out.2.weight": 0,
            "out.2.bias": 0,
            "shift_out.2.weight": 0,
            "shift_out.2.bias": 0,
        }.items()
    ):
        old = state[f"model.diffusion_model.{name}"].float()
        shape = [channels if i == axis else n for i, n in enumerate(old.shape)]
        state[f"model.diffusion_model.{name}"] = 0.2 * torch.randn(shape, generator=rng(i))
    given = {name: recorded.read(name) for name in SETTINGS}
    latent = (
        autoencoders.load_official_autoencoder(golden / "ae2_kl.safetensors").encode(recorded.images).latent_dist
    )
    posterior_noise, noise = (torch.randn(latent.mean.shape, generator=rng(seed)) for seed in (7, 8))
    z = latent.mean + latent.std * posterior_noise
    state["scale_factor"] = 1 / z.std()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "disdiff.safetensors")
    (folder / "config.json").write_text(json.dumps(recorded.config | dict(first_stage="kl")))
    np.savez(folder / "arrays.npz", **{k: v.numpy() for k, v in given.items()})
    model = disdiff.load_official_latent_diffusion(folder / "disdiff.safetensors", **recorded.heads())
    bars = (1 - torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[
        given["t"]
    ][:, None, None, None]
    z0 = z / z.std()
    z_t = (bars.sqrt() * z0 + (1 - bars).sqrt() * noise).float()
    answer = model.predict(z_t, given["t"])
    told = {
        "z0": z0,
        "z0_posterior_noise": posterior_noise,
        "noise": noise,
        "z_t": z_t,
        "scale_factor": 1 / z.std(),
        "ldm.eps": answer,
        "ldm.loss": (answer - noise).abs().mean(),
    }
    bound = checks.noise_loss(answer, noise, given["t"], model.scheduler)["bound"]
    np.savez(
        folder / "arrays.npz", **{k: v.numpy() for k, v in (given | told | {"ldm.loss_vlb": bound}).items()}
    )
    return folder


@pytest.fixture(scope="module")
def kl(tmp_path_factory, golden):
    return kl_set(tmp_path_factory.mktemp("kl"), golden("disdiff"))


def test_a_recorded_draw_of_the_latents_is_used(kl):
    "z_0 and its scale are then computed from the pictures, and the training step makes the same draw"
    checks = parity("test_disdiff")
    r = checks.Recorded(kl)
    made = {name for name, *_ in run(checks.check_prior, r, checks.close)}
    assert (
        {"z0", "scale_factor", "ldm.eps", "ldm.loss"} <= made
        and ("z0_posterior_noise",) in r.used
        and "z0_posterior_noise" in checks.INPUTS
    )
    batch = checks.train_batch(r, r.model())
    assert torch.equal(batch["latent_noise"], r.read("z0_posterior_noise")) and "latent_mean" not in batch
    for name in ("z0", "scale_factor", "ldm.loss"):
        with pytest.raises(AssertionError, match=name):
            run(checks.check_prior, checks.Recorded(kl, altered=(name,)), checks.close)
    with pytest.raises(AssertionError):
        run(checks.check_prior, checks.Recorded(kl, shifted=("z0_posterior_noise",)), checks.close)


def test_without_the_draw_its_result_is_given(kl, tmp_path):
    checks = parity("test_disdiff")
    for name in ("disdiff.safetensors", "config.json"):
        shutil.copy(kl / name, tmp_path / name)
    with np.load(kl / "arrays.npz") as arrays:
        np.savez(tmp_path / "arrays.npz", **{k: arrays[k] for k in arrays.files if k != "z0_posterior_noise"})
    r = checks.Recorded(tmp_path)
    made = {name for name, *_ in run(checks.check_prior, r, checks.close)}
    assert "z0" not in made and {("z0",), ("scale_factor",)} <= r.used
    batch = checks.train_batch(r, r.model())
    model = r.model().latents
    checks.close(model.from_batch(batch), r.read("z0"), checks.VALUE, "z0")


# --- Concepts: a learning rate that warms up while gradients accumulate -------------------------------------


def warmed_up_set(folder: Path, golden: Path, case: str, warmup: int):
    "The recorded run `case` again, but with a learning rate, set by hand, that rises over `warmup` optimiser steps"
    checks = parity("test_concepts")
    for part in ("pipeline", "images"):
        (folder / part).symlink_to(golden / part)
    recorded = checks.Recorded(golden)
    settings = recorded.json(case)
    settings["effective_args"] |= dict(lr_scheduler="constant_with_warmup", lr_warmup_steps=warmup)
    (folder / f"{case}.json").write_text(json.dumps(settings))
    np.savez(folder / f"{case}.npz", **{k: v.numpy() for k, v in recorded.load(case).items()})
    r = checks.Recorded(folder)
    model, flags, templates = checks.trained_case(r, case)
    base, order, arrays = model.base, checks.call_order(r, case, model), dict(r.load(case))
    rows, weights, others = model.codes, model.raw_weights, checks.other_rows(base).requires_grad_()
    base.null = lambda: base.encode([""])
    optimiser = torch.optim.AdamW([rows, weights], **settings["optimizer_kwargs"])
    accumulation, full = flags["gradient_accumulation_steps"], optimiser.param_groups[0]["lr"]
    column = lambda w: w.detach().clone()[:, :, None, None, None]
    for number, m in enumerate(checks.micro_batches(r, case)):
        arrays |= {
            f"{m}/weights_before": column(weights),
            f"{m}/placeholder_rows_before": rows.detach().clone(),
        }
        out = model(checks.batch_of(r, case, m, templates[m]))
        (out["loss"] / accumulation).backward()
        arrays |= {
            f"{m}/composed_score": out["composed"],
            f"{m}/mse_loss": out["mse"],
            f"{m}/loss": out["loss"].detach(),
            f"{m}/weights_grad_accum": column(weights.grad),
        }
        arrays |= {
            f"{m}/placeholder_rows_grad_accum": rows.grad.clone(),
            f"{m}/other_rows_grad_absmax": others.grad.abs().max(),
        }
        if number:
            arrays[f"{m}/unet_out_sum"] = out["answers"].transpose(0, 1).roll(-1, 0)[order].double().sum((1, 2, 3, 4))
        others.grad = None
        if not settings["sync"][number]:
            continue
        optimiser.param_groups[0]["lr"] = full * min(1, number / (warmup * accumulation))
        optimiser.step()
        optimiser.zero_grad()
    arrays |= {"weights_final": column(weights), "placeholder_rows_final": rows.detach().clone()}
    np.savez(folder / f"{case}.npz", **{k: v.numpy() for k, v in arrays.items()})
    return r


def test_learning_rate_warms_up_while_gradients_accumulate(golden, tmp_path):
    checks = parity("test_concepts")
    case, folder = "train_conj", golden("concept_discovery")
    if not (folder / f"{case}.npz").is_file():
        pytest.skip(f"no {case} in {folder}")
    recorded = checks.Recorded(folder).read(case, "placeholder_rows_final")
    r = warmed_up_set(tmp_path, folder, case, warmup=3)
    assert r.json(case)["effective_args"]["gradient_accumulation_steps"] > 1
    fresh = checks.Recorded(tmp_path)
    assert (
        fresh.read(case, "placeholder_rows_final") - recorded
    ).abs().max() > 100 * checks.COMPOSED  # another rate, another end
    made = run(checks.check_of(case), fresh)
    assert {name for _, name, *_ in made} >= {"placeholder_rows_final", "weights_final", "m00/loss"}
    wrong = fresh.json(case)
    wrong["effective_args"]["lr_warmup_steps"] = 6
    (tmp_path / f"{case}.json").write_text(json.dumps(wrong))
    with pytest.raises(AssertionError):
        run(checks.check_of(case), checks.Recorded(tmp_path))
