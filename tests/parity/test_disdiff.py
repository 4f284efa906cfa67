"""DisDiff against arrays recorded from the official code: all three stages, VQ and KL autoencoders.

Weights come in through `decomp_nb.official`, as a user's checkpoint would. Each check reads what it is `given` (pictures, noise, times, choices), computes everything
else and compares it array by array. Kinds, sizes, names of gradients and steps come from the files, so another set of the same layout passes unchanged.
The arrays of `metrics.npz` are compared by test_disentanglement_metrics.py.
"""
import copy
import json
import re
import sys
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from recorded import Recorded as Arrays
from recorded import compared_and_given, every_alteration_fails, keys_of, load_arrays, once, run
from safetensors.torch import load_file

from decomp_nb.components.adversarial import AdversarialAutoencoder
from decomp_nb.components.autoencoders import sample_posterior
from decomp_nb.components.codebooks import codebook_loss, nearest_codes, quantise
from decomp_nb.components.diffusion import noise_at, to_x0
from decomp_nb.components.latent_diffusion import bound_weights, noise_loss, posterior
from decomp_nb.components.latents import decode_latents
from decomp_nb.components.samplers import latent_sampler
from decomp_nb.components.shift_decoder import field_coefficient
from decomp_nb.components.plain_unets import unet_down, unet_up
from decomp_nb.decomposer import sample
from decomp_nb.factors import Factors
from decomp_nb.methods.disdiff import choice_losses, disentangling_logits
from decomp_nb.official import autoencoders, reading
from decomp_nb.official import disdiff as convert

VALUE, GRADIENT = 2e-4, 1e-3  # of the largest number of an array, as the README of the data says
INPUTS = {"images_u8", "t", "noise", "sampled_concept", "ddim.x_T", "ddim.swap_factor", "ddim.eta1_noise"}
INPUTS |= {"ae.noise", "ae2.noise"}
INPUTS |= {"scale_factor", "z0", "z0_posterior_noise"}  # of a KL autoencoder


class Recorded(Arrays):
    "The arrays of the one file `arrays.npz`, named without it, and the models that its weights make"
    absolute, relative = 1e-12, 0.01  # tolerances are shares of the largest number

    def __init__(self, folder: Path, altered: tuple[str, ...] = (), shifted: tuple[str, ...] = ()):
        super().__init__(folder, altered, shifted)
        self.config, self.arrays = self.json("config"), read_arrays(folder)

    def read(self, name: str) -> torch.Tensor: return self.arrays[name]

    def names(self, prefix: str = "") -> list[str]: return [n for n in self.arrays if n.startswith(prefix)]

    @property
    def kind(self) -> str: return self.config["first_stage"]

    @property
    def file(self) -> Path: return self.folder / "disdiff.safetensors"

    @property
    def images(self) -> torch.Tensor:
        return ((self.given("images_u8").float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()

    def heads(self) -> dict: return dict(n_heads=self.config["heads"], image_size=self.read("images_u8").shape[1])

    def model(self, **options):
        return copy.deepcopy(read_model(self.file, self.config["heads"], tuple(options.items())))

    def autoencoder(self, prefix: str):
        "(diffusers model, kind, pictures) behind the arrays `ae.…` or `ae2.…`"
        kind = self.kind if prefix == "ae" else {"vq": "kl", "kl": "vq"}[self.kind]
        file = self.file if prefix == "ae" else self.folder / f"ae2_{kind}.safetensors"
        return autoencoders.load_official_autoencoder(file), kind, self.images if prefix == "ae" else self.images[:1]

    @property
    def draws(self) -> dict[str, torch.Tensor]:
        "The noise with which a KL autoencoder drew z_0, as our batches name it, where it was recorded"
        return {"latent_noise": self.given("z0_posterior_noise")} if "z0_posterior_noise" in self.arrays else {}

    @property
    def z0_is_told(self) -> bool:
        "Whether z_0 follows from the pictures: always with VQ, with KL where its draw was recorded"
        return self.kind == "vq" or bool(self.draws)

    def noised(self, model):
        "z_0, ε, t and z_t; where a KL autoencoder's draw was not recorded, its z_0 is given"
        z0 = model.latents.from_batch({"image": self.images, **self.draws}) if self.z0_is_told else self.given("z0")
        t, noise = self.given("t"), self.given("noise")
        return z0, noise, t, noise_at(model.scheduler, z0, noise, t)


@cache
def read_arrays(folder: Path) -> dict[str, torch.Tensor]: return load_arrays(folder, "arrays")


@cache
def read_model(file: Path, heads: int, options: tuple): return convert.load_official_disdiff(file, n_heads=heads, **dict(options))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, name: str) -> None:
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
    if not theirs.is_floating_point(): assert torch.equal(ours.long(), theirs.long()), f"{name} differs"
    gap, size = (ours.detach().double() - theirs.double()).abs().max(), theirs.double().abs().max()
    assert gap <= tolerance * size, f"{name}: off by {gap:.2e}, largest {size:.2e}"


# --- the checks: generators of (array, our value, tolerance) -----------------------------------------------------------------------------------------

def check_schedule(r):
    model = r.model()
    ones, terms = torch.ones(len(model.scheduler.betas)), posterior(model.scheduler)
    times = torch.arange(len(ones))
    yield "schedule.betas", model.scheduler.betas, VALUE
    yield "schedule.alphas_cumprod", model.scheduler.alphas_cumprod, VALUE
    yield "schedule.shift_coef", field_coefficient(model.scheduler, times, ones, "pdae"), VALUE
    yield "schedule.ddim_coef", field_coefficient(model.scheduler, times, ones), VALUE
    yield "schedule.posterior_variance", terms.variance, VALUE
    yield "schedule.posterior_mean_coef1", terms.of_x0, VALUE
    yield "schedule.posterior_mean_coef2", terms.of_xt, VALUE


@torch.no_grad()
def check_autoencoders(r):
    for prefix in ("ae", "ae2"):
        vae, kind, images = r.autoencoder(prefix)
        if kind == "vq":
            h, book = vae.encode(images).latents, vae.quantize.embedding.weight
            codes, index = quantise(h, book)
            yield f"{prefix}.prequant", h, VALUE
            yield f"{prefix}.quant", codes, VALUE
            yield f"{prefix}.codebook_loss", codebook_loss(h, book, index), VALUE
            yield f"{prefix}.indices", nearest_codes(h, book).flatten(1), VALUE
            yield f"{prefix}.decode_quantised", vae.decode(h).sample, VALUE
            yield f"{prefix}.decode_continuous", vae.decode(h[:1], force_not_quantize=True).sample, VALUE
        else:
            posterior_ = vae.encode(images).latent_dist
            z = sample_posterior(posterior_.mean, posterior_.logvar, r.given(f"{prefix}.noise"))
            yield f"{prefix}.moments", posterior_.parameters, VALUE
            yield f"{prefix}.kl", posterior_.kl(), VALUE
            yield f"{prefix}.sample", z, VALUE
            yield f"{prefix}.decode_mode", vae.decode(posterior_.mean[:1]).sample, VALUE
            yield f"{prefix}.decode_sample", vae.decode(z[:1]).sample, VALUE


def check_stage1(r):
    for prefix in ("ae", "ae2"):
        vae, kind, images = r.autoencoder(prefix)
        model = AdversarialAutoencoder(vae, start=0 if kind == "vq" else 1)
        model.discriminator = autoencoders.load_official_discriminator(r.folder / "stage1_disc.safetensors")
        if kind == "vq":
            out = model.train()({"image": images})
            out["loss"].backward()
            for name, key in dict(total_loss="generator", quant_loss="codebook", nll_loss="error", d_weight="weight", g_loss="g_loss", disc_loss="discriminator",
                                  logits_real_mean="logits_real", logits_fake_mean="logits_fake").items():
                yield f"stage1.vq_{name}", out[key], VALUE
            yield "stage1.vq_grad_codebook", vae.quantize.embedding.weight.grad, GRADIENT
            yield "stage1.vq_grad_quant_conv", vae.quant_conv.weight.grad, GRADIENT
        else:
            noise = r.given(f"{prefix}.noise")
            with torch.no_grad(): found = [model.train()({"image": images[:n], "latent_noise": noise[:n]}) for n in {1, len(images)}]
            out = min(found, key=lambda o: abs(o["kl"] - r.arrays["stage1.kl_kl_loss"]))  # of one picture or of all: the data does not say
            for name, key in dict(total_loss="generator", kl_loss="kl", nll_loss="error").items(): yield f"stage1.kl_{name}", out[key], VALUE


@torch.no_grad()
def check_prior(r):
    model = convert.load_official_latent_diffusion(r.file, **r.heads())
    z0, noise, t, z_t = r.noised(model)
    if r.z0_is_told:
        yield "scale_factor", 1 / (z0 / z0.new_tensor(model.latents.vae.config.scaling_factor)).std(), VALUE
        yield "z0", z0, VALUE
    else: assert abs(model.latents.vae.config.scaling_factor / r.given("scale_factor").item() - 1) < 1e-6
    yield "z_t", z_t, VALUE
    answer = model.predict(z_t, t)
    yield "ldm.eps", answer, VALUE
    found = noise_loss(answer, noise, t, model.scheduler)
    yield "ldm.loss", found["loss"], VALUE
    yield "ldm.loss_vlb", found["bound"], VALUE
    if not r.z0_is_told: return
    batch = {"image": r.images, "noise": noise, "timesteps": t, **r.draws}
    close(model(batch)["loss"], found["loss"], 1e-5, "the training step")


@torch.no_grad()
def check_fields(r):
    model, images = r.model(), r.images
    _, _, t, z_t = r.noised(model)
    factors, chosen = model.encode(images), r.given("sampled_concept")
    frozen = model.base.denoiser
    seen = unet_down(frozen, z_t, t)
    fields = model.fields(seen, factors.codes, torch.arange(model.n_factors))
    answer, one = unet_up(frozen, seen), fields[torch.arange(len(t)), chosen]
    yield "t_emb", frozen.time_proj(t), VALUE
    yield "emb", seen.time, VALUE
    yield "cond_eval", factors.codes.flatten(1), VALUE
    if "part_basis" in r.arrays: yield "part_basis", model.fields.names.basis(), VALUE
    yield "pred_uncond", answer, VALUE
    yield "out_grad_all", fields.sum(1), VALUE
    yield "grad_per_factor", fields.transpose(0, 1), VALUE
    yield "sub_grad", one, VALUE
    yield "eps_shift_coef", answer + field_coefficient(model.scheduler, t, answer, "pdae") * fields.sum(1), VALUE
    said = model.predict(z_t, t, factors)
    yield "eps_ddim_coef", said, VALUE
    without, single = model.clean_latents(z_t, t, answer, one)
    yield "pred_z0_uncond", without, VALUE
    yield "pred_z0_single", single, VALUE
    yield "pred_z0_full", to_x0(model.scheduler, said, z_t, t), VALUE
    terms = posterior(model.scheduler)
    per = lambda table: table[t].float()[:, None, None, None]
    yield "ddpm_mean", per(terms.of_x0) * to_x0(model.scheduler, said, z_t, t) + per(terms.of_xt) * z_t, VALUE
    yield "ddpm_logvar", per(terms.variance.clamp_min(1e-20).log()), VALUE
    for chunk in (1, 3): close(model.fields(seen, factors.codes, torch.arange(model.n_factors), chunk), fields, 1e-5, "a few at a time")
    close(model.predict(z_t, t, model.only(factors, int(chosen[0])))[0], (answer + field_coefficient(model.scheduler, t, answer) * one)[0], 1e-5, "one factor")


def ddim_of(r, model, **options):
    "The official sampler with recorded noise"
    ddim = latent_sampler("official", model.scheduler, **options)
    if options.get("eta"):
        noises = iter(r.given("ddim.eta1_noise"))
        ddim.fresh = lambda like, generator: next(noises)
    return ddim


@torch.no_grad()
def check_sampling(r):
    model, images, start, k = r.model(), r.images, r.given("ddim.x_T"), int(r.given("ddim.swap_factor"))
    steps, own = len(r.array("ddim.timesteps")), model.encode(images)
    swapped = own.replace(k, own.rows(0).repeat(len(images)))
    ddim = ddim_of(r, model, eta=1.0)
    ddim.set_timesteps(steps)
    levels = [torch.tensor(v) for v in zip(*(ddim.levels(t) for t in ddim.timesteps.flip(0)))]
    yield "ddim.timesteps", ddim.timesteps.flip(0), VALUE
    for name, values in zip(("alphas", "alphas_prev", "eta1_sigmas"), levels): yield f"ddim.{name}", values, VALUE
    clean = []

    def draw_with(factors, note=lambda state: None, **options):
        return sample(model.guided(factors), start, ddim_of(r, model, **options), steps, callback=note)
    recon = draw_with(own)
    yield "ddim.recon", recon, VALUE
    yield "ddim.recon_image", unclipped(model, recon[:1]), VALUE
    yield "ddim.swapped_cond", swapped.codes.flatten(1), VALUE
    swap = draw_with(swapped, lambda state: clean.append(state["x0"]))
    yield "ddim.swap", swap, VALUE
    yield "ddim.swap_pred_z0_steps", torch.stack(clean), VALUE
    yield "ddim.swap_image", unclipped(model, swap[-1:]), VALUE
    yield "ddim.swap_partial", draw_with(model.only(swapped, k)), VALUE
    if "ddim.swap_quantize_x0" in r.arrays: yield "ddim.swap_quantize_x0", draw_with(swapped, project=official_codes(model)), VALUE
    yield "ddim.eta1", draw_with(swapped, eta=1.0), VALUE
    options = dict(noise=start, steps=steps, scheduler=ddim_of(r, model))
    close(model.swap(images, images[:1], k, **options)[-1:], unclipped(model, swap[-1:]).clamp(-1, 1), VALUE, "the method")
    close(model.swap(images, images[:1], k, partial=True, **options), model.latents.decode(r.array("ddim.swap_partial")), VALUE, "the method, with one field")


def unclipped(model, z):
    "Decoded as the official code does: a VQ decoder quantises"
    vae = model.latents.vae
    return vae.decode(z / vae.config.scaling_factor).sample


def official_codes(model):
    "Nearest codes of latents that are still scaled: the official option forgets the scale"
    book = model.latents.vae.quantize.embedding.weight
    return lambda z: torch.nn.functional.embedding(nearest_codes(z, book), book).movedim(-1, 1)


def our_names(r, model, name: str) -> dict[str, torch.Tensor]:
    "Our parameters behind an official one, each with the places of its numbers in the official tensor"
    key = name if name.startswith("cond_stage_model.") else f"model.diffusion_model.{name}"
    shape = load_shapes(r.file)[key]
    index = torch.arange(int(np.prod(shape))).reshape(shape)
    if name.startswith("cond_stage_model."): return {name.replace("cond_stage_model.encoder.", "encoder.layers."): index}
    return {f"fields.{k}": v for k, v in convert.convert_shift_decoder({name: index}, dict(model.config.denoiser_config)).items()}


@cache
def load_shapes(file: Path) -> dict: return {k: tuple(v.shape) for k, v in load_file(file).items()}


def as_official(r, model, values: dict, name: str) -> torch.Tensor:
    places = our_names(r, model, name)
    out = torch.empty(sum(v.numel() for v in places.values()))
    for ours, index in places.items(): out[index.flatten()] = values[ours].detach().flatten()
    key = name if name.startswith("cond_stage_model.") else f"model.diffusion_model.{name}"
    return out.reshape(load_shapes(r.file)[key])


def train_batch(r, model):
    z0, noise, t, _ = r.noised(model)
    batch = {"image": r.images, "noise": noise, "timesteps": t, "chosen": r.given("sampled_concept"), **r.draws}
    if not r.z0_is_told:
        mean = z0 / model.latents.vae.config.scaling_factor
        batch |= {"latent_mean": mean, "latent_logvar": torch.full_like(z0, -60.0), "latent_noise": torch.zeros_like(z0)}
    return batch


def check_moves(r):
    model = r.model().train()
    _, _, t, z_t = r.noised(model)
    chosen, frozen = r.given("sampled_concept"), model.base.denoiser
    with torch.no_grad():
        codes = model.encode(r.images).codes
        seen = unet_down(frozen, z_t, t)
        one = model.fields(seen, codes, torch.arange(model.n_factors))[torch.arange(len(t)), chosen]
        without, single = model.clean_latents(z_t, t, unet_up(frozen, seen), one)
        (x_u, before), (x_s, after) = model.reencode(without), model.reencode(single)
    assert model.encoder.training and model.encoder.layers[1].training  # as it was before
    moves = disentangling_logits(codes, before, after)
    variant, invariant = choice_losses(moves, chosen)
    values = dict(cond=codes.flatten(1), pred_zrep_uncond=before.flatten(1), pred_zrep_single=after.flatten(1), pred_z0_uncond=without, pred_z0_single=single, pred_x0_uncond=x_u,
                  pred_x0_single=x_s, logits=moves.variant, logits_delta=moves.invariant, ce=variant, ce_delta=invariant)
    for name, value in values.items(): yield f"train.{name}", value, VALUE
    for name in r.names("train.bn_after."):
        yield name, dict(model.encoder.named_buffers())[name.removeprefix("train.bn_after.").replace("encoder.", "layers.")], VALUE


def check_training(r):
    for kind in r.config["dis_loss_types"]:
        model = r.model(dis_kind=kind, dis_weight=r.config["dis_weight"]).train()
        out = model(train_batch(r, model))
        out["loss"].backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        values = dict(loss=out["loss"], loss_simple=out["denoising"], loss_vlb=out["bound"], dis_weight=out["dis_weight"], dis_loss=out["disentangling"])
        for name, value in values.items(): yield f"train.{kind}.{name}", value, VALUE
        norm = lambda part, grads=grads: torch.cat([g.flatten() for name, g in grads.items() if name.startswith(part)]).norm()
        yield f"train.{kind}.gradnorm_encoder", norm("encoder."), GRADIENT
        yield f"train.{kind}.gradnorm_unet", norm("fields."), GRADIENT
        for name in r.names(f"train.{kind}.grad."):
            yield name, as_official(r, model, grads, name.removeprefix(f"train.{kind}.grad.")), GRADIENT
        assert all(p.grad is None for p in model.base.parameters()) and all(p.grad is None for p in model.latents.parameters())
        if kind == "Z": yield from one_step(r, model)


def one_step(r, model):
    params = [p for p in model.parameters() if p.requires_grad]
    average = EMAModel(params, decay=0.9999)
    average.optimization_step = 1  # the official average counts one step further: its first decay is 2/11
    torch.optim.AdamW(params, r.config["lr"]).step()
    average.step(params)
    after, averaged = dict(model.named_parameters()), dict(zip((n for n, p in model.named_parameters() if p.requires_grad), average.shadow_params))
    for prefix, values in (("train.after_adamw.", after), ("train.ema_after.", averaged)):
        for name in r.names(prefix): yield name, as_official(r, model, values, name.removeprefix(prefix)), VALUE


CHECKS = dict(schedule=check_schedule, autoencoders=check_autoencoders, stage1=check_stage1, prior=check_prior, fields=check_fields, sampling=check_sampling,
              moves=check_moves, training=check_training)
QUICK = ("schedule", "autoencoders", "prior", "fields", "moves")  # repeated with altered inputs

finished = once(CHECKS.get, Recorded, close)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", CHECKS)
def test_matches_official(group, golden):
    made, _ = finished(group, golden("disdiff"))
    assert made


def test_every_array_is_compared(golden):
    "No array is left out: it is compared, or it is an input on which compared arrays depend"
    folder = golden("disdiff")
    compared, given = ({name for name, in keys} for keys in compared_and_given(finished, CHECKS, folder))
    everything = set(read_arrays(folder))
    assert everything == compared | given, f"untouched: {sorted(everything - compared - given)}"
    assert given - compared <= INPUTS, sorted(given - compared - INPUTS)
    listed = re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text().split("## metrics.npz")[0], flags=re.M)
    assert set(listed) == everything


@pytest.mark.parametrize("group", CHECKS)
def test_altered_expectation_fails(group, golden):
    every_alteration_fails(finished(group, golden("disdiff"))[0], golden("disdiff"), Recorded, close)


@pytest.mark.parametrize("group", QUICK)
def test_other_input_fails(group, golden):
    "The same through a whole check: another input, and the check no longer passes"
    folder = golden("disdiff")
    made, used = finished(group, folder)
    with pytest.raises(AssertionError): run(CHECKS[group], Recorded(folder, altered=made[-1][:1]), close)
    for name, in sorted(used - keys_of(made)):
        if (group, name) == ("moves", "noise") or name == "scale_factor": continue
        with pytest.raises(AssertionError): run(CHECKS[group], Recorded(folder, shifted=(name,)), close)


def test_altered_weight_fails(golden):
    r = Recorded(golden("disdiff"))
    for part in ("encoder.layers.0.weight", "fields.read.weight"):
        model = r.model()
        _, _, t, z_t = r.noised(model)
        with torch.no_grad():
            model.get_parameter(part)[0] += 0.5
            said = model.predict(z_t, t, model.encode(r.images))
        with pytest.raises(AssertionError): close(said, r.array("eps_ddim_coef"), VALUE, part)


# --- files -----------------------------------------------------------------------------------------------------------------------------------------

def whole_checkpoint(r, stage: str) -> dict:
    "State dict with every key of the official checkpoint of a stage: what the data leaves out (schedule, average) is put back"
    listed = json.loads((r.folder / "state_dict_keys.json").read_text())[stage]
    weights, state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(r.file).items()}, {}
    dotless = {"model_ema." + k.removeprefix("model.").replace(".", ""): k for k in weights if k.startswith("model.")}
    scheduler = r.model().scheduler
    for key, (shape, _) in listed.items():
        if key in weights: state[key] = weights[key]
        elif key.startswith("model_ema.diffusion_model"): state[key] = weights[dotless[key]] * 0.5
        elif key == "betas": state[key] = scheduler.betas
        else: state[key] = torch.zeros(shape)
    return state


@pytest.mark.parametrize("stage", ["disdiff_checkpoint", "ldm_checkpoint"])
def test_averages_are_taken_where_there_are_some(stage, golden, tmp_path):
    r = Recorded(golden("disdiff"))
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": whole_checkpoint(r, stage), "epoch": 3, "global_step": 7, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}, file)
    if stage == "ldm_checkpoint":
        load = lambda **o: convert.load_official_latent_diffusion(file, **r.heads(), **o).denoiser
        same, halved = convert.load_official_latent_diffusion(r.file, **r.heads()).denoiser, load()
    else:
        load = lambda **o: convert.load_official_disdiff(file, n_heads=r.config["heads"], **o).fields
        same, halved = r.model().fields, load()
        ours = convert.load_official_disdiff(file, n_heads=r.config["heads"])
        assert torch.equal(ours.encoder.layers[0].weight, r.model().encoder.layers[0].weight)  # the encoder has no average
        assert torch.equal(ours.base.denoiser.conv_in.weight, r.model().base.denoiser.conv_in.weight)  # nor has what is frozen
    assert torch.equal(halved.conv_out.weight, 0.5 * same.conv_out.weight) and torch.equal(load(ema=False).conv_out.weight, same.conv_out.weight)


def test_lightning_files_are_read_without_unpickling(golden, tmp_path, monkeypatch):
    "The class of a callback in the file is no obstacle; any other class is refused"
    r, module = Recorded(golden("disdiff")), types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    saver = module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"): patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"state_dict": load_file(r.file), "callbacks": {saver: {"best_model_path": ""}}}, tmp_path / "epoch=000001.ckpt")
    assert convert.load_official_disdiff(tmp_path / "epoch=000001.ckpt", n_heads=r.config["heads"]).n_factors == r.config["latent_unit"]
    torch.save({"state_dict": load_file(r.file), "where": Path("x")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="refused"): convert.load_official_disdiff(tmp_path / "bad.ckpt")


DAMAGES = {
    "missing": (lambda s: {k: v for k, v in s.items() if not k.endswith("shift_out.0.bias")}, "missing: conv_norm_out.bias"),
    "surplus": (lambda s: s | {"model.diffusion_model.shift_out.7.bias": torch.ones(2)}, "left over: out.7.bias"),
    "another shape": (lambda s: s | {"cond_stage_model.encoder.0.bias": torch.ones(3)}, "another shape"),
    "no encoder": (lambda s: {k: v for k, v in s.items() if not k.startswith("cond_stage")}, "no checkpoint of DisDiff"),
    "no autoencoder": (lambda s: {k: v for k, v in s.items() if not k.startswith("first_stage")}, "no autoencoder"),
    "average of something else": (lambda s: s | {"model_ema.diffusion_modelfoo": torch.ones(2)}, "model_ema: left over: foo"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses(damage, golden, tmp_path):
    r = Recorded(golden("disdiff"))
    change, message = DAMAGES[damage]
    torch.save({"state_dict": change(load_file(r.file))}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=re.escape(message)): convert.load_official_disdiff(tmp_path / "last.ckpt", n_heads=r.config["heads"])


def test_a_model_saved_with_all_it_stands_on_loads_by_itself(golden, tmp_path):
    from decomp_nb.methods.disdiff import DisDiff
    r = Recorded(golden("disdiff"))
    reading.keep_with(r.model(), tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "moved")
    model = DisDiff.from_pretrained(tmp_path / "moved").eval()
    _, _, t, z_t = r.noised(model)
    with torch.no_grad(): close(model.predict(z_t, t, model.encode(r.images)), r.array("eps_ddim_coef"), VALUE, "eps_ddim_coef")


def test_weights_are_wanted(golden):
    "Sets side by side add their fields up; a set with a factor missing is refused"
    r = Recorded(golden("disdiff"))
    model = r.model()
    _, _, t, z_t = r.noised(model)
    f = model.encode(r.images)
    with torch.no_grad(): close(model.predict(z_t, t, f.cat(f) * 0.5), model.predict(z_t, t, f), 1e-5, "half and half")
    with pytest.raises(ValueError, match="known by their place"): model.predict(z_t, t, Factors(f.codes[:, :-1]))
    assert bound_weights(model.scheduler)[0] == bound_weights(model.scheduler)[1]
    assert decode_latents(model.latents, torch.zeros(1, *model.latent_shape)).shape[-1] == r.arrays["images_u8"].shape[1]
