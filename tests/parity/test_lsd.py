"""LSD against arrays recorded from the official modules.

Each check reads what it is `given` (pictures, noise, weights), computes everything else with our modules and compares it array by array with what was recorded.
Shapes, settings and cases come from the files: widths from config.json, the optimiser from meta.json, step counts and iterations from the array names.
"""
import copy
import json
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from lsd_metrics import (  # noqa: F401 - pytest collects them here: one file proves the whole method
    test_altered_metric_fails,
    test_altered_metric_file_fails,
    test_every_metric_is_compared,
    test_metrics_match_official,
)
from recorded import Recorded as Arrays
from recorded import close, compared_and_given, every_alteration_fails, inputs_of_all, keys_of, once, run
from safetensors.torch import save_file

from decomp_nb.components import denoisers, diffusion
from decomp_nb.components.positions import coordinate_grid
from decomp_nb.components.slots import SlotAttention
from decomp_nb.components.tracking import track
from decomp_nb.decomposer import sample
from decomp_nb.official import lsd as convert
from decomp_nb.official import reading

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SINGLE, CHAIN = 1e-5, 1e-4  # absolute tolerance of single forwards; of sampling trajectories, gradients and training steps
ELSEWHERE = {"metrics", "probe"}  # files that lsd_metrics.py compares


class Recorded(Arrays):
    "The arrays of the folder, and the official files beside them"
    def checkpoint(self) -> Path:
        found = sorted(self.folder.glob("checkpoint-*"))
        assert len(found) == 1, f"expected one checkpoint folder in {self.folder}, found {found}"
        return found[0]

    def model(self) -> convert.OfficialLSD: return copy.deepcopy(read_model(self.checkpoint()))

    def slot_noise(self, file: str) -> torch.Tensor | None:
        "The noise that slots start from; None where they start from learned places"
        return self.given(file, "slot_noise") if "slot_noise" in self.names(file) else None

    def vae(self) -> AutoencoderKL: return read_vae(self.folder / "vae")

    def scheduler(self, kind: str = "ddpm", **overrides):
        base = diffusion.make_scheduler("ddpm", self.folder / "scheduler", **overrides)
        # the arrays were made before diffusers changed the last step of DPM-Solver
        return base if kind == "ddpm" else diffusion.make_scheduler(kind, base, final_sigmas_type="sigma_min")


@cache
def read_model(folder: Path) -> convert.OfficialLSD: return convert.read_official_lsd(folder)


@cache
def read_vae(folder: Path) -> AutoencoderKL: return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()


# --- the checks: generators of (file, array, our value, tolerance) ---------------------------------------------------------------------------------

def check_schedule(r: Recorded):
    for name in r.names("schedule"):
        quantity, _, variant = re.fullmatch(r"(betas|alphas_cumprod)(_(\w+))?", name).groups()
        ours = r.scheduler(**(dict(beta_schedule=variant) if variant else {}))
        yield "schedule", name, getattr(ours, quantity), SINGLE


def check_backbone(r: Recorded):
    encoder, seen = r.model().encoder, {}
    with watch({"downscale": encoder.downscale}, seen), torch.no_grad():
        features = encoder(r.given("backbone", "pixel_values"))
    yield "backbone", "downscale", seen["downscale.out"], SINGLE
    yield "backbone", "features", features, SINGLE


def check_pos_modules(r: Recorded):
    given = lambda name: r.given("pos_modules", name)
    for kind in sorted({name.split(".")[0] for name in r.names("pos_modules")}):
        x = given(f"{kind}.in")
        if x.ndim == 4: (h, w), dim, tokens = x.shape[-2:], x.shape[1], x.flatten(2).transpose(1, 2)
        else: h, w, dim, tokens = *(round(x.shape[1] ** 0.5),) * 2, x.shape[2], x
        module = denoisers.PositionAttention(dim, (h, w), kind)
        state = {"cartesian": lambda: {"projection.weight": given("cartesian.projection.weight")[:, :, 0, 0], "projection.bias": given("cartesian.projection.bias")},
                 "sincos": lambda: {"gamma": given("sincos.gamma")}, "learned": lambda: {"table": given("learned.pe")}}[kind]()
        module.load_state_dict(state, strict=True)
        with torch.no_grad(): out = tokens + module.positions()
        if x.ndim == 4: out = out.transpose(1, 2).unflatten(-1, (h, w))
        yield "pos_modules", f"{kind}.out", out, SINGLE
        table = {"cartesian": ("pe", coordinate_grid(h, w)), "sincos": ("pos_embed", denoisers.sincos_table(h, w, dim))}.get(kind)
        if table: yield "pos_modules", f"{kind}.{table[0]}", table[1].reshape(h, w, -1).permute(2, 0, 1)[None], SINGLE


def check_slot_attn(r: Recorded):
    slots = r.model().slots
    noise, features = r.slot_noise("slot_attn"), r.given("slot_attn", "features")
    with torch.no_grad():
        start = slots.start(len(features), noise=noise)
        result = track(slots, features[:, None], noise=noise, record=True)
    yield "slot_attn", "slots_init", start, SINGLE
    for i, (value, attention) in enumerate(result.history, 1):
        yield "slot_attn", f"slots_iter{i}", value[:, None], SINGLE
        yield "slot_attn", f"attn_iter{i}", attention[:, None], SINGLE
    yield "slot_attn", "attn", result.attention, SINGLE
    yield "slot_attn", "slots_out", result.out, SINGLE


def check_slot_attn_variant(r: Recorded):
    config, state = convert.read_official_part(r.folder / "variant_slot_attn")
    slots = reading.load_strict(SlotAttention(config["input_size"], **convert.lsd_slots_config(config)), convert.convert_lsd_slot_attention(state, config), "variant")
    features = r.given("slot_attn_variant", "features").requires_grad_()
    result = track(slots, features)
    (result.out * r.given("slot_attn_variant", "loss_weight")).sum().backward()
    grads = {"project_q": slots.to_q.weight.grad, "slot_mu": slots.slot_mean.grad, "features": features.grad}
    yield "slot_attn_variant", "attn", result.attention.detach(), SINGLE
    yield "slot_attn_variant", "slots_out", result.out.detach(), SINGLE
    for name, value in grads.items(): yield "slot_attn_variant", f"grad_{name}", value, CHAIN


def check_unet(r: Recorded):
    given = lambda name: r.given("unet", name)
    model, seen = r.model(), {}
    x, t, slots = given("latents"), given("timesteps"), given("slots")
    watched = {name[len("act."):].rpartition(".")[0] for name in r.names("unet") if name.startswith("act.")}
    with torch.no_grad():
        with watch({name: model.denoiser.get_submodule(name) for name in watched}, seen):
            yield "unet", "noise_pred", model.denoiser(x, t, slots).sample, SINGLE
        for name, value in seen.items(): yield "unet", f"act.{name}", value, SINGLE
        time, n = re.search(r"`?noise_pred_subset`?[^\n]*?t=(\d+), only the first (\d+) slots of image 0", (r.folder / "README.md").read_text()).groups()
        yield "unet", "noise_pred_subset", model.denoiser(x[:1], int(time), slots[:1, :int(n)]).sample, SINGLE
        mask = (torch.arange(slots.shape[1]) < int(n)).long()[None]  # the same by masking tokens instead of leaving them out
        yield "unet", "noise_pred_subset", model.denoiser(x[:1], int(time), slots[:1], encoder_attention_mask=mask).sample, SINGLE
        config, state = convert.read_official_part(r.checkpoint() / "unet2dconditionmodelwithpos")
        plain = {k: v for k, v in state.items() if ".pos_emb." not in k}
        for name in r.names("unet"):
            if name in ("noise_pred", "noise_pred_subset") or not name.startswith("noise_pred_"): continue
            kind = name.removeprefix("noise_pred_")
            file = f"unet_pos_{kind}"
            positions = {k: r.given(file, k) for k in r.names(file)} if kind != "none" else {}
            changed = config | dict(pos_type=kind)
            convert.check_positions(changed, plain | positions)
            unet = reading.load_strict(denoisers.slot_denoiser(convert.lsd_denoiser_config(changed)), convert.convert_lsd_unet(plain | positions, changed), kind)
            yield "unet", name, unet(x, t, slots).sample, SINGLE
    with torch.no_grad(): found = model.slots(r.given("slot_attn", "features"), noise=r.slot_noise("slot_attn"))
    yield "unet", "slots", found.out, SINGLE


def check_train(r: Recorded):
    given, names = lambda name: r.given("train", name), r.names("train")
    model, vae, scheduler, meta = r.model(), r.vae(), r.scheduler(), r.json("meta")["train"]
    parts = {"multiheadstevesa": (model.slots, convert.convert_lsd_slot_attention), "unetencoder": (model.encoder, convert.convert_lsd_encoder),
             "unet2dconditionmodelwithpos": (model.denoiser, convert.convert_lsd_unet)}
    alias = {short: (*parts[folder], r.json(f"{r.checkpoint().name}/{folder}/config")) for short, folder in meta["alias"].items()}
    images, t, noise = given("pixel_values"), given("timesteps"), given("noise")
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = (posterior.mean + posterior.std * given("vae_eps")) * vae.config.scaling_factor
    yield "train", "vae_mean", posterior.mean, SINGLE
    yield "train", "vae_std", posterior.std, SINGLE
    yield "train", "latents", latents, SINGLE
    found = model.slots(model.encoder(images), noise=r.slot_noise("train"))
    yield "train", "slots", found.out.detach(), SINGLE
    yield "train", "attn", found.attention[:, None].detach(), SINGLE

    variants = {"": scheduler, "v.": r.scheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")}
    for prefix, variant in variants.items():
        if f"{prefix}loss" not in names: continue
        x_t, target = diffusion.noise_at(variant, latents, noise, t), diffusion.diffusion_target(variant, latents, noise, t)
        with torch.set_grad_enabled(prefix == ""): pred = model.denoiser(x_t, t, found.out).sample
        value = diffusion.diffusion_loss(pred, target)
        for name, ours in dict(noisy_latents=x_t, target=target, model_pred=pred.detach(), loss=value.detach()).items():
            yield "train", prefix + name, ours, SINGLE
        if prefix == "": loss, eps_pred, eps_target = value, pred, target
        else: close(value, meta["loss_v_prediction"], SINGLE, "meta.json loss_v_prediction")
    close(loss, meta["loss"], SINGLE, "meta.json loss")

    yield "train", "snr", diffusion.snr(scheduler, t), SINGLE
    gamma = next(int(m[1]) for m in (re.fullmatch(r"minsnr(\d+)_weight_eps", name) for name in names) if m)
    weight = diffusion.min_snr_weight(scheduler, t, gamma)
    weighted = diffusion.diffusion_loss(eps_pred.detach(), eps_target, weight)
    yield "train", f"minsnr{gamma}_weight_eps", weight, SINGLE
    yield "train", f"minsnr{gamma}_loss_eps", weighted, SINGLE
    close(weighted, meta[f"loss_minsnr{gamma}"], SINGLE, "meta.json loss_minsnr")

    loss.backward()
    modules = {short: module for short, (module, *_) in alias.items()}
    without = [f"{short}.{n}" for short, m in modules.items() for n, p in m.named_parameters() if p.grad is None]
    assert without == meta["params_without_grad"], f"parameters without a gradient: {without}"

    def official(kind, read):  # our tensors under the official names, in the official shapes
        wanted = [name for name in names if name.startswith(kind + ".")]
        ours = {short: back({n: read(p) for n, p in module.named_parameters()}, config, to_official=True) for short, (module, back, config) in alias.items()}
        for name in wanted:
            _, short, key = name.split(".", 2)
            yield "train", name, ours[short][key].detach().clone(), CHAIN
    yield from official("grad", lambda p: p.grad)

    optimiser = meta["optimizer"]
    everything = [p for m in modules.values() for p in m.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(everything, optimiser["max_grad_norm"])
    yield "train", "grad_norm_total", norm, CHAIN
    close(norm, meta["grad_norm_total"], CHAIN, "meta.json grad_norm_total")
    for short, expected in meta["grad_norm_per_module_after_clip"].items():
        close(torch.stack([p.grad.norm() for p in modules[short].parameters()]).norm(), expected, CHAIN, f"gradient norm of {short}")
    scaled = {name: optimiser["encoder_lr_scale"] for name in ("multiheadstevesa", "unetencoder")}
    groups = [dict(params=list(modules[short].parameters()), lr=optimiser["lr"] * scaled.get(folder, 1.0)) for short, folder in meta["alias"].items()]
    torch.optim.AdamW(groups, lr=optimiser["lr"], betas=tuple(optimiser["betas"]), weight_decay=optimiser["weight_decay"], eps=optimiser["eps"]).step()
    for file, name, ours, _ in official("after", lambda p: p):
        before = convert.read_official_part(r.checkpoint() / meta["alias"][name.split(".")[1]])[1][name.split(".", 2)[2]]
        assert not torch.equal(before, ours), f"{name} did not move"
        yield file, name, ours, SINGLE  # one step moves a parameter by the learning rate, so a step in the wrong direction is seen


def check_sampling(r: Recorded):
    given, names = lambda name: r.given("sampling", name), r.names("sampling")
    model, vae = r.model(), r.vae()
    slots = given("slots")
    with torch.no_grad():
        z = r.given("train", "vae_mean") + r.given("train", "vae_std") * r.given("train", "vae_eps")
        yield "sampling", "vae_recon", vae.decode(z).sample, SINGLE
    for walk in sorted({name.rpartition(".")[0] for name in names if "." in name}):
        kind, steps, scale = re.fullmatch(r"(ddpm|dpm)(\d+)(?:_cfg([\d.]+))?", walk).groups()
        scheduler, steps = r.scheduler(kind), int(steps)
        planned = diffusion.make_scheduler(kind, scheduler)
        planned.set_timesteps(steps)
        yield "sampling", f"{walk}.timesteps", planned.timesteps, 0
        if f"{walk}.init_latents" not in names: continue
        outputs, latents = [], []

        def predict(x, t):
            if scale is None: outputs.append(model.denoiser(x, t, slots).sample); return outputs[-1]
            both = model.denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([given("negative"), slots])).sample
            outputs.append(both)
            negative, positive = both.chunk(2)
            return negative + float(scale) * (positive - negative)

        noise = iter(given(f"{walk}.variance_noise")) if f"{walk}.variance_noise" in names else iter(())
        with injected_noise(noise), torch.no_grad():
            last = sample(predict, given(f"{walk}.init_latents"), scheduler, steps, callback=lambda state: latents.append(state["x"].clone()))
            images = (vae.decode(last / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        yield "sampling", f"{walk}.init_noise_sigma", torch.as_tensor(planned.init_noise_sigma, dtype=torch.float32), SINGLE
        yield "sampling", f"{walk}.unet_out", torch.stack(outputs), CHAIN
        yield "sampling", f"{walk}.latents", torch.stack(latents), CHAIN
        yield "sampling", f"{walk}.images", images, CHAIN


CHECKS = dict(schedule=check_schedule, backbone=check_backbone, pos_modules=check_pos_modules, slot_attn=check_slot_attn,
              slot_attn_variant=check_slot_attn_variant, unet=check_unet, train=check_train, sampling=check_sampling)


# --- helpers ---------------------------------------------------------------------------------------------------------------------------------------

@contextmanager
def watch(modules: dict, seen: dict):
    "Write the first argument and the output of modules into `seen` as `name.in`, `name.out`"
    def note(name):
        def hook(module, args, output): seen[f"{name}.in"], seen[f"{name}.out"] = args[0].detach(), output.detach()
        return hook
    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try: yield
    finally:
        for handle in handles: handle.remove()


@contextmanager
def injected_noise(noise):
    "DDPM takes its variance noise from the recording instead of a generator"
    from diffusers.schedulers import scheduling_ddpm
    original, scheduling_ddpm.randn_tensor = scheduling_ddpm.randn_tensor, lambda *args, **kwargs: next(noise)
    try: yield
    finally: scheduling_ddpm.randn_tensor = original


finished = once(CHECKS.get, Recorded)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", CHECKS)
def test_matches_official(group, golden):
    comparisons, _ = finished(group, golden("lsd"))
    assert comparisons


def test_every_array_is_compared(golden):
    "No array of any file is left out: it is compared, or it is an input on which compared arrays depend"
    inputs = inputs_of_all(finished, CHECKS, golden("lsd"), Recorded, "safetensors", ELSEWHERE)
    compared, _ = compared_and_given(finished, CHECKS, golden("lsd"))
    assert len(inputs) < len(compared) and not any(name.startswith(("grad", "after", "act", "noise_pred", "slots_iter", "attn")) for _, name in inputs), inputs


@pytest.mark.parametrize("group", CHECKS)
def test_altered_expectation_fails(group, golden):
    every_alteration_fails(finished(group, golden("lsd"))[0], golden("lsd"), Recorded)


@pytest.mark.parametrize("group", CHECKS)
def test_altered_file_fails(group, golden):
    "The same through the whole check: the first array that is compared and no input too, altered as it is read from the file"
    folder = golden("lsd")
    made, used = finished(group, folder)
    file, name = next((file, name) for file, name, *_ in made if (file, name) not in used)
    with pytest.raises(AssertionError, match=re.escape(f"{file}/{name}")): run(CHECKS[group], Recorded(folder, altered=(file, name)))


@pytest.mark.parametrize("group", ["backbone", "pos_modules", "slot_attn", "slot_attn_variant"])
def test_altered_input_fails(group, golden):
    "What the check is given matters: with an input altered, what we compute no longer matches"
    folder = golden("lsd")
    made, used = finished(group, folder)
    for file, name in sorted(used - keys_of(made)):
        with pytest.raises(AssertionError): run(CHECKS[group], Recorded(folder, altered=(file, name)))


def test_parameter_counts(golden):
    folder = golden("lsd")
    model, vae = Recorded(folder).model(), Recorded(folder).vae()
    count = lambda module: sum(p.numel() for p in module.parameters())
    ours = dict(backbone=count(model.encoder), slot_attn=count(model.slots), unet=count(model.denoiser), vae=count(vae))
    assert ours == Recorded(folder).json("meta")["params"]


@pytest.mark.parametrize("part", ["multiheadstevesa", "unetencoder", "unet2dconditionmodelwithpos"])
def test_conversion_is_lossless(part, golden):
    "official → ours → official gives every stored tensor back, bit for bit"
    recorded = Recorded(golden("lsd"))
    config, state = convert.read_official_part(recorded.checkpoint() / part)
    model = recorded.model()
    module, back = {"multiheadstevesa": (model.slots, convert.convert_lsd_slot_attention), "unetencoder": (model.encoder, convert.convert_lsd_encoder),
                    "unet2dconditionmodelwithpos": (model.denoiser, convert.convert_lsd_unet)}[part]
    same_weights(back(module.state_dict(), config, to_official=True), state)


def same_weights(ours: dict, official: dict) -> None:
    "The same names, weights to the last bit; of computed tables (linspace, sines) the last bit is the processor's"
    assert set(ours) == set(official), f"names differ: {sorted(set(ours) ^ set(official))[:8]}"
    computed = {k for k in official if k.endswith(convert.COMPUTED) or k == "pos.pe"}
    assert [k for k in set(official) - computed if not torch.equal(ours[k], official[k])] == []
    for k in computed:
        torch.testing.assert_close(
            ours[k], official[k], rtol=0, atol=2e-7, msg=lambda text, k=k: f"{k}: {text}"
        )


# --- the same through the method, and back into a folder -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lsd(golden):
    folder = golden("lsd")
    return convert.load_official_lsd(Recorded(folder).checkpoint(), vae=folder / "vae", scheduler=folder / "scheduler")


def test_method_has_the_official_loss_and_gradient(golden, lsd):
    r = Recorded(golden("lsd"))
    names = dict(image="pixel_values", noise="noise", timesteps="timesteps", slot_noise="slot_noise", latent_noise="vae_eps")
    lsd.train().zero_grad()
    loss = lsd({ours: r.given("train", theirs) for ours, theirs in names.items() if theirs in r.names("train")})["loss"]
    close(loss.detach(), r.array("train", "loss"), SINGLE, "loss")
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in lsd.parameters()]).norm()
    close(norm, r.array("train", "grad_norm_total"), CHAIN, "gradient norm")
    lsd.eval().zero_grad()


def test_saving_in_the_official_format_gives_the_same_folder(golden, lsd, tmp_path):
    original, written = Recorded(golden("lsd")).checkpoint(), convert.save_official_lsd(lsd, tmp_path / "checkpoint-1")
    parts = sorted(p.name for p in original.iterdir() if p.is_dir())
    assert parts == sorted(p.name for p in written.iterdir())
    for part in parts:
        (config, state), (our_config, our_state) = convert.read_official_part(original / part), convert.read_official_part(written / part)
        assert {k: v for k, v in config.items() if k != "_diffusers_version" and our_config.get(k, "absent") != v} == {}
        same_weights(our_state, state)


# --- positions of every kind, on maps of any side -----------------------------------------------------------

def official_tables(side: int, dim: int) -> dict[str, torch.Tensor]:
    "Buffers of the official classes for a map of this side, written down anew: `pe` (cartesian), `pos_embed` (sincos)"
    edges = torch.linspace(0.0, 1.0, side + 1)
    centres = 0.5 * (edges[:-1] + edges[1:])
    row, column = centres[:, None].expand(side, side), centres.expand(side, side)
    speed = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    angle = np.arange(side)[:, None] * speed
    waves = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (side, dim/2)
    sines = np.concatenate(
        [
            np.broadcast_to(waves[None], (side, side, dim // 2)),
            np.broadcast_to(waves[:, None], (side, side, dim // 2)),
        ],
        2,
    )
    return {
        "pe": torch.stack([row, column, 1 - row, 1 - column])[None],
        "pos_embed": torch.from_numpy(sines).float().permute(2, 0, 1)[None].contiguous(),
    }


def small_lsd(kind: str, side: int):
    "An untrained LSD for latents of this side, which need be no power of two"
    from decomp_nb.methods.lsd import LSD

    torch.manual_seed(0)
    encoder = dict(
        kind="unet",
        image_size=side,
        sample_size=side,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    unet = denoisers.denoiser_config(
        side,
        slot_dim=12,
        channels=(8, 16),
        layers_per_block=1,
        n_heads=2,
        groups=4,
        in_channels=3,
        position=kind,
    )
    return LSD(
        image_size=side,
        encoder_config=encoder,
        slots_config=dict(n_slots=3, slot_dim=16, out_dim=12),
        denoiser_config=unet,
    ).eval()


STORED = {"cartesian": {".1.projection.weight", ".1.projection.bias", ".1.pe"},
          "sincos": {".1.gamma", ".1.pos_embed"}, "learned": {".pe"}, "none": set()}


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize("kind", STORED)
def test_stored_positions_survive(kind, side, tmp_path):
    "ours → official → ours → official: the folder holds what the official classes hold, tables included"
    model = small_lsd(kind, side)
    written = convert.save_official_lsd(model, tmp_path / "checkpoint-1")
    config, state = convert.read_official_part(written / UNET)
    layers = {k.removesuffix(".to_q.weight") for k in state if k.endswith(".to_q.weight")}
    assert {k for k in state if ".pos_emb" in k} == {
        f"{layer}.pos_emb{end}" for layer in layers for end in STORED[kind]
    } and config["pos_type"] == kind
    for name in (k for k in state if k.endswith((".1.pe", ".1.pos_embed"))):
        layer, _, end = name.partition(".pos_emb.1.")
        level = convert.unet_level(name, 2)
        expected = official_tables(side // 2**level, state[f"{layer}.to_q.weight"].shape[1])[end]
        close(state[name], expected, 2e-7, name)
    close(
        convert.read_official_part(written / SLOTS)[1]["pos.pe"],
        official_tables(side, 4)["pe"],
        2e-7,
        "pos.pe",
    )
    again = convert.load_official_lsd(written)
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, again.state_dict()[k])] == []
    same_weights(
        convert.read_official_part(convert.save_official_lsd(again, tmp_path / "again") / UNET)[1], state
    )


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_recorded_positions_survive(kind, checkpoint, golden, tmp_path):
    "A checkpoint with recorded positions of this kind and the tables that the official class stores beside them"
    r = Recorded(golden("lsd"))
    config, state = convert.read_official_part(checkpoint / UNET)
    if f"unet_pos_{kind}.safetensors" not in {p.name for p in r.folder.iterdir()}:
        pytest.skip(f"the folder holds no positions of the kind {kind}")
    state = WITHOUT_POSITIONS(state) | {k: r.read(f"unet_pos_{kind}", k) for k in r.names(f"unet_pos_{kind}")}
    for name in [k for k in state if k.endswith(".pos_emb.1.gamma")]:
        level = convert.unet_level(name, len(config["block_out_channels"]))
        dim = state[name.replace("pos_emb.1.gamma", "to_q.weight")].shape[1]
        state[name.replace("gamma", "pos_embed")] = official_tables(config["sample_size"] // 2**level, dim)[
            "pos_embed"
        ]
    rewrite(checkpoint / UNET, config=lambda c: c | dict(pos_type=kind), state=lambda _: state)
    written = convert.save_official_lsd(
        convert.load_official_lsd(checkpoint, vae=r.folder / "vae"), tmp_path / "again"
    )
    same_weights(convert.read_official_part(written / UNET)[1], state)
    if kind == "sincos":
        rewrite(
            checkpoint / UNET,
            state=lambda s: {k: v.flip(-1) if k.endswith(".pos_embed") else v for k, v in s.items()},
        )
        with pytest.raises(ValueError, match="other positions"):
            convert.read_official_lsd(checkpoint)


# --- folders that must be refused ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(golden, tmp_path):
    "A copy of the official folder that a test may damage"
    shutil.copytree(Recorded(golden("lsd")).checkpoint(), tmp_path / "checkpoint-1")
    for path in (tmp_path / "checkpoint-1").rglob("*"): path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "checkpoint-1").chmod(0o755)
    return tmp_path / "checkpoint-1"


def rewrite(folder: Path, config=None, state=None) -> None:
    old_config, old_state = convert.read_official_part(folder)
    (folder / "config.json").write_text(json.dumps((config or dict)(old_config)))
    save_file((state or dict)(old_state), folder / "diffusion_pytorch_model.safetensors")


UNET, SLOTS = "unet2dconditionmodelwithpos", "multiheadstevesa"
WITHOUT_POSITIONS = lambda state: {k: v for k, v in state.items() if ".pos_emb." not in k}


def another_kind(config: dict) -> str:
    "A kind of positions that this checkpoint was not trained with"
    return "cartesian" if config["pos_type"] == "sincos" else "sincos"


def flipped(state: dict) -> dict:
    "The same weights beside tables of other positions; a learned table, which can be any, loses a row"
    if any(k.endswith(convert.COMPUTED) for k in state):
        return {k: v.flip(-1).flip(1) if k.endswith(convert.COMPUTED) else v for k, v in state.items()}
    return {k: v[:, 1:].contiguous() if k.endswith(".pos_emb.pe") else v for k, v in state.items()}


DAMAGES = {
    "position weights would be lost": (UNET, dict(config=lambda c: c | dict(pos_type="none")), "pos_type"),
    "position type not stated": (UNET, dict(config=lambda c: {k: v for k, v in c.items() if k != "pos_type"}), "would be lost"),
    "saved through the plain class": (UNET, dict(state=WITHOUT_POSITIONS), "hold no position entries"),
    "positions of another kind": (UNET, dict(config=lambda c: c | dict(pos_type=another_kind(c))),
                                  "processor.gamma|processor.projection"),
    "a position module is missing": (UNET, dict(state=lambda s: {k: v for k, v in s.items() if not k.startswith("mid_block.attentions.0.transformer_blocks.0.attn1.pos_emb")}),
                                     r"missing: mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.processor\."),
    "another grid": (UNET, dict(state=flipped), "other positions|another shape"),
    "a weight is missing": (SLOTS, dict(state=lambda s: {k: v for k, v in s.items() if k != "gru.bias_hh"}),
                            r"missing: gru\.bias_hh"),
    "a weight is left over": (SLOTS, dict(state=lambda s: s | {"extra.weight": s["gru.bias_hh"].clone()}),
                              r"left over: extra\.weight"),
    "another width": (SLOTS, dict(config=lambda c: c | dict(slot_size=c["slot_size"] * 2)), "another shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses(damage, checkpoint):
    part, change, message = DAMAGES[damage]
    rewrite(checkpoint / part, **change)
    with pytest.raises(ValueError, match=message) as caught: convert.read_official_lsd(checkpoint)
    assert part in str(caught.value) or ".pos_emb." in str(caught.value)


def test_reads_bin_files_without_unpickling(checkpoint):
    part = checkpoint / SLOTS
    _, state = convert.read_official_part(part)
    (part / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, part / "diffusion_pytorch_model.bin")
    assert torch.equal(convert.read_official_lsd(checkpoint).slots.slot_mean, state["slot_mu"])
    torch.save(dict(state, run=Path("x")), part / "diffusion_pytorch_model.bin")  # an object that is no tensor
    with pytest.raises(ValueError, match="refused"): convert.read_official_lsd(checkpoint)


def test_damaged_and_missing_files(checkpoint):
    weights = checkpoint / SLOTS / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"): convert.read_official_lsd(checkpoint)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds none of"): convert.read_official_lsd(checkpoint)
    (checkpoint / SLOTS / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"): convert.read_official_lsd(checkpoint)
    shutil.rmtree(checkpoint / SLOTS)
    with pytest.raises(FileNotFoundError, match=SLOTS): convert.read_official_lsd(checkpoint)
    with pytest.raises(FileNotFoundError): convert.read_official_lsd(checkpoint / "nowhere")


def test_settings_that_never_took_effect(checkpoint):
    "The official loader drops act_fn, so a config that says gelu was trained with silu, and must be loaded with silu"
    rewrite(checkpoint / UNET, config=lambda c: c | dict(act_fn="gelu"))
    with pytest.warns(UserWarning, match="act_fn='gelu'"): model = convert.read_official_lsd(checkpoint)
    assert model.denoiser.config.act_fn == "silu"


def test_slots_alone_need_a_foundation(checkpoint):
    for part in ("unetencoder", UNET): shutil.rmtree(checkpoint / part)
    assert convert.read_official_lsd(checkpoint).denoiser is None
    with pytest.raises(ValueError, match="foundation="): convert.load_official_lsd(checkpoint)


def test_stable_lsd_takes_the_slots(checkpoint, golden, tmp_path):
    "Slots of an official Stable-LSD run on a frozen text-to-image UNet and DINO features, all from local folders, and back"
    from diffusers import UNet2DConditionModel
    from transformers import Dinov2Config, Dinov2Model
    config, state = convert.read_official_part(checkpoint / SLOTS)
    unet_config, _ = convert.read_official_part(checkpoint / UNET)
    for part in ("unetencoder", UNET): shutil.rmtree(checkpoint / part)
    pipeline, dino = tmp_path / "pipeline", tmp_path / "dino"
    UNet2DConditionModel(**{k: v for k, v in convert.lsd_denoiser_config(unet_config).items() if k != "position"}).save_pretrained(pipeline / "unet")
    for part in ("vae", "scheduler"): shutil.copytree(golden("lsd") / part, pipeline / part)
    patch = 7
    Dinov2Model(Dinov2Config(hidden_size=config["input_size"], num_hidden_layers=1, num_attention_heads=1, image_size=4 * patch, patch_size=patch)).save_pretrained(dino)
    size = unet_config["sample_size"] * 2 ** (len(json.loads((pipeline / "vae/config.json").read_text())["block_out_channels"]) - 1)
    model = convert.load_official_lsd(checkpoint, foundation=pipeline, image_size=size,
                                      encoder_config=dict(kind="dino", name_or_folder=str(dino), image_size=size, resolution=4 * patch))
    factors = model.encode(torch.zeros(1, 3, size, size), noise=torch.zeros(1, config["num_slots"], config["slot_size"]))
    assert factors.codes.shape == (1, config["num_slots"], config["out_size"])
    written = convert.save_official_lsd(model, tmp_path / "again")
    assert [p.name for p in written.iterdir()] == [SLOTS]
    _, again = convert.read_official_part(written / SLOTS)
    assert [k for k in state if k != "pos.pe" and not torch.equal(state[k], again[k])] == []  # pos.pe is the grid of another resolution
