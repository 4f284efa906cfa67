"""Decomp Diffusion against arrays recorded from the official code.

Weights come in through `decomp_nb.official`, as a user's checkpoint would. Each check reads what it is `given` (pictures, noise, times), computes everything else
and compares it array by array. Sizes, step counts, scales and masks come from the files, so another set of the same layout passes unchanged.
"""
import copy
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from recorded import Recorded as Arrays
from recorded import close, compared_and_given, every_alteration_fails, keys_of, once, run
from safetensors.torch import load_file, save_file
from test_lsd import watch

from decomp_nb.components.ddim import ddim_invert, decomp_sampler
from decomp_nb.components.diffusion import noise_at
from decomp_nb.components.recombination import check_partners, keep_mask, swap_across
from decomp_nb.decomposer import sample
from decomp_nb.factors import Factors, recombine
from decomp_nb.official import decomp_diffusion as convert
from decomp_nb.official import reading

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SINGLE, CHAIN = 5e-5, 2e-4  # absolute tolerances of the data's README: single evaluations and losses; sampling and guidance
SEEN = 0.005  # an error of a hundredth is always seen
USUAL = 5.0  # largest number of a noisy picture; tolerances of arrays with larger ones are relative
WEIGHTS = {"weights", "variant_weights"}


class Recorded(Arrays):
    "Arrays of the folder, and the models that its weights make"
    def settings(self, which: str = "main") -> dict: return self.json("config")[which]

    def model(self, which: str = "main", **options): return copy.deepcopy(read_model(self.folder, which, **options)).eval()

    def inputs(self, file: str = "arrays"):
        "Pictures in [−1,1] and [0,1], noise, times"
        x0 = self.given(file, "x0")
        return x0 * 2 - 1, x0, self.given(file, "noise"), self.given(file, "t")


@cache
def read_model(folder: Path, which: str, scale: float = 1.0, **options):
    settings = Recorded(folder).settings(which)
    file = folder / ("weights.safetensors" if which == "main" else f"{which}_weights.safetensors")
    fixed = settings["num_head_channels"] == -1
    heads = dict(n_heads=settings["num_heads"] if fixed else 0, n_heads_up=max(settings["num_heads_upsample"], 0), head_dim=64 if fixed else settings["num_head_channels"])
    model = convert.load_official_decomp_diffusion(file, image_size=settings["image_size"], **heads, **options)
    if scale != 1:
        state = {k: v * scale if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)
    return model


@contextmanager
def injected_noise(noise):
    "DDIM and DDPM take their noise from the recording instead of a generator"
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
    modules = (scheduling_ddim, scheduling_ddpm)
    original = [m.randn_tensor for m in modules]
    for m in modules: m.randn_tensor = lambda *args, **kwargs: next(noise)
    try: yield
    finally:
        for m, was in zip(modules, original): m.randn_tensor = was


def trajectory(predict, x, scheduler, steps):
    "States and clean pictures after every step"
    states, clean = [], []

    def note(state):
        states.append(state["x"].clone())
        clean.append(state["x0"].clone())
    sample(predict, x, scheduler, steps, callback=note)
    return torch.stack(states), torch.stack(clean)


def last_state(draw, **options):
    "What a method of the model draws, before it is clipped to a picture"
    states = []
    draw(callback=lambda state: states.append(state["x"].clone()), **options)
    return states[-1]


def steps_of(r, pattern, file="arrays"):
    "Names that match, with the numbers in them"
    return [(name, *m.groups()) for name in r.names(file) if (m := re.fullmatch(pattern, name))]


# --- the checks: generators of (file, array, our value, tolerance) ---------------------------------------------------------------------------------

def check_schedule(r):
    model = r.model()
    yield "arrays", "betas", model.scheduler.betas.double(), SINGLE
    yield "arrays", "alphas_cumprod", model.scheduler.alphas_cumprod.double(), SINGLE
    for name, n in steps_of(r, r"spaced(\d+)_timestep_map"):
        ladder = decomp_sampler("ddim", model.scheduler)
        ladder.set_timesteps(int(n))
        kept = ladder.timesteps.flip(0).long()
        yield "arrays", name, kept, SINGLE
        if f"spaced{n}_betas" in r.names("arrays"):
            abar = model.scheduler.alphas_cumprod[kept].double()
            yield "arrays", f"spaced{n}_betas", 1 - abar / torch.cat([torch.ones(1), abar[:-1]]), SINGLE


@torch.no_grad()
def check_embeddings(r):
    unet, d = r.model().unet, r.model().factor_dim
    for end in ("", "_frac"):
        sines = unet.time_proj(r.given("arrays", f"t{end}"))
        if not end: yield "arrays", "temb_sinusoid", sines, SINGLE
        whole = unet.time_embedding(sines)
        assert (whole[:, :d] == 0).all()
        yield "arrays", f"temb{end}", whole[:, d:], SINGLE


@torch.no_grad()
def check_encoder(r):
    model, (images, *_) = r.model(), r.inputs()
    yield "arrays", "latents", model.encode(images).codes.flatten(1), SINGLE
    model.train()
    yield "arrays", "latents_trainmode", model.encode(images).codes.flatten(1), SINGLE
    norm = model.encoder.blocks[0].norm1
    yield "arrays", "bn_running_mean_after_one_trainmode_pass", norm.running_mean, SINGLE
    yield "arrays", "bn_running_var_after_one_trainmode_pass", norm.running_var, SINGLE


def block_modules(model, names):
    "Official block name → the last of our modules in it"
    places = convert.encoder_places() | convert.decomp_places(dict(denoiser_config=model.config.denoiser_config))
    found = {}
    for name in names:
        inside = {int(k[len(name) + 1:].split(".")[0]): v for k, v in places.items() if k.startswith(f"{name}.")}
        found[name] = model.get_submodule(inside[max(inside)].rstrip("."))
    return found


@torch.no_grad()
def check_answers(r):
    model, (images, x0, noise, t) = r.model(), r.inputs()
    x_t = noise_at(model.scheduler, x0, noise, t)
    yield "arrays", "x_t", x_t, SINGLE
    f = model.encode(images)
    yield "arrays", "out_components", model.predict_components(x_t, t, f.codes), SINGLE
    yield "arrays", "out_composed", model.predict(x_t, t, f), SINGLE
    yield "arrays", "out_null", model.predict(x_t, t, Factors(torch.zeros_like(f.codes))), SINGLE
    close(model.predict(x_t, t, model.null_factors(f)), r.array("arrays", "out_null"), SINGLE, "one evaluation is enough for nothing")
    seen, names = {}, r.json("config")["block_names"]
    with watch(block_modules(model, names), seen): model.predict_component(x_t[:1], t[:1], f.codes[:1, 0])
    outputs = {name: seen[f"{name}.out"] for name in names}
    yield "arrays", "block_stats", torch.stack([torch.stack([v.mean(), v.std(), v.abs().max()]) for v in outputs.values()]), SINGLE
    for name in r.names("arrays"):
        if not name.startswith("act/"): continue
        whole = outputs[name[4:]]
        yield "arrays", name, whole[:, :, ::4, ::4], SINGLE
    for scale in r.json("config")["cfg_scales"]:
        yield "arrays", f"cfg_{scale:g}", model.guided(f, scale)(x_t, t), CHAIN


@torch.no_grad()
def check_losses(r):
    images, _, noise, t = r.inputs()
    batch = {"image": images, "noise": noise, "timesteps": t}
    keep = r.given("arrays", "uncond_keep_mask")
    cases = {"loss_x0": ({}, {}), "loss_eps": (dict(prediction_type="epsilon"), {}), "loss_x0_downweight": (dict(downweight=True), {}),
             "loss_x0_latent_orthog": (dict(orthogonality=1.0, orthogonality_kind="official"), {}), "loss_x0_uncond": (dict(null_dropout=0.5), dict(keep=keep))}
    for name, (options, more) in cases.items():
        out = r.model(**options)(batch | more)
        close(out["loss"], out["per_image"].mean(), 1e-6, "the loss is the mean over the pictures")
        yield "arrays", name, out["per_image"], SINGLE


def posterior_tolerance(largest: float, abar: torch.Tensor, kind: str) -> float:
    """Relative where numbers are larger than a noisy picture's.

    Where ε is read as a picture its rounding errors grow by √(1/ᾱ − 1); ten of that the tolerance holds anyway."""
    grown = (1 / abar.min() - 1).sqrt().item() / 10 if kind == "eps" else 1.0
    return max(SINGLE, SINGLE * largest / USUAL, min(SINGLE * grown, SEEN))


@torch.no_grad()
def check_posterior(r):
    images, x0, noise, t = r.inputs()
    for kind in ("x0", "eps"):
        model = r.model(**(dict(prediction_type="epsilon") if kind == "eps" else {}))
        x_t = noise_at(model.scheduler, x0, noise, t)
        said = model.predict(x_t, t, model.encode(images))
        ancestral = decomp_sampler("ddpm", model.scheduler)
        ancestral.set_timesteps(model.scheduler.config.num_train_timesteps)
        with injected_noise(iter([torch.zeros_like(x_t[:1])] * len(t))):
            steps = [ancestral.step(said[i : i + 1], now, x_t[i : i + 1]) for i, now in enumerate(t)]
        for name, values in {
            "mean": [s.prev_sample for s in steps],
            "pred_xstart": [s.pred_original_sample for s in steps],
        }.items():
            largest = r.read("arrays", f"pmv_{kind}_{name}").abs().max().item()
            yield (
                "arrays",
                f"pmv_{kind}_{name}",
                torch.cat(values),
                posterior_tolerance(largest, model.scheduler.alphas_cumprod[t], kind),
            )
    yield (
        "arrays",
        "pmv_log_variance",
        torch.stack([ancestral.log_variance(now) for now in t]).float(),
        SINGLE,
    )


@torch.no_grad()
def check_ddim(r):
    images, start = r.inputs()[0], r.given("arrays", "noise_T")
    for name, n, kind in steps_of(r, r"ddim(\d+)_(x0|eps)_samples"):
        model = r.model(**(dict(prediction_type="epsilon") if kind == "eps" else {}))
        ddim = decomp_sampler("ddim", model.scheduler)
        states, clean = trajectory(model.guided(model.encode(images)), start, ddim, int(n))
        yield "arrays", name, states, CHAIN
        yield "arrays", f"ddim{n}_{kind}_pred_xstart", clean, CHAIN
    model = r.model()
    f, ddim = model.encode(images), decomp_sampler("ddim", model.scheduler)
    for name, n in steps_of(r, r"ddim(\d+)_x0_components"):
        options = dict(steps=int(n), noise=start, scheduler=ddim)
        drawn = last_state(lambda **o: model.decomposition(f, **o), **options).unflatten(0, (len(images), -1))
        yield "arrays", name, drawn[:, :-1], CHAIN
        alone = last_state(lambda **o: model.decompose(f, **o), **options).unflatten(0, (len(images), -1))
        close(alone, drawn[:, :-1], CHAIN, "one by one as all at once")
        if f"ddim{n}_x0_samples" in r.names("arrays"): close(drawn[:, -1], r.array("arrays", f"ddim{n}_x0_samples")[-1], CHAIN, "the reconstruction in the same batch")
    for name, n in steps_of(r, r"ddim(\d+)_x0_final"):
        yield "arrays", name, last_state(lambda **o: model.decode(f, **o), steps=int(n), noise=start, scheduler=ddim), CHAIN


@torch.no_grad()
def check_stochastic(r):
    model, images, start, noises = r.model(), r.inputs()[0], r.given("arrays", "noise_T"), r.given("arrays", "step_noises")
    predict = model.guided(model.encode(images))
    for name, n, eta in steps_of(r, r"ddim(\d+)_x0_eta([\d.]+)_final"):
        with injected_noise(iter(noises)): states, _ = trajectory(predict, start, decomp_sampler("ddim", model.scheduler, eta=float(eta)), int(n))
        yield "arrays", name, states[-1], CHAIN
    for name, n in steps_of(r, r"ddpm(\d+)_x0_samples"):
        with injected_noise(iter(noises)): states, _ = trajectory(predict, start, decomp_sampler("ddpm", model.scheduler), int(n))
        yield "arrays", name, states, CHAIN


@torch.no_grad()
def check_inversion(r):
    model, (images, x0, noise, _) = r.model(), r.inputs()
    f = model.encode(images)
    for name, n in steps_of(r, r"ddim(\d+)_reverse_samples"):
        start = int(n) - len(r.array("arrays", name))
        ladder = decomp_sampler("ddim", model.scheduler)
        ladder.set_timesteps(int(n))
        times = ladder.timesteps.flip(0).tolist()
        begin = noise_at(model.scheduler, x0, noise, torch.full((len(x0),), times[start]))
        yield "arrays", f"ddim{n}_reverse_start", begin, SINGLE
        states = ddim_invert(model.guided(f), begin, model.scheduler, times[start:])
        yield "arrays", name, states, CHAIN
        close(model.invert(images, steps=int(n), start=start, noise=noise), states[-1], CHAIN, "the method")


def combination_masks(r, k: int) -> dict[str, list[int] | str | None]:
    """Recorded combination → its mask.

    The official default is half ones, half zeros and fails for an odd k; recorded all the same, k // 2 are ones."""
    found = {"slice_custom": r.json("config")["slice_custom_indices"]}
    if "slice_default" in r.names("arrays"):
        found["slice_default"] = None if k % 2 == 0 else [1] * (k // 2) + [0] * (k - k // 2)
    return found


@torch.no_grad()
def check_combinations(r):
    model, images, start, config = r.model(), r.inputs()[0], r.given("arrays", "noise_T")[:1], r.json("config")
    f, (a, b) = model.encode(images), (images[:1], images[1:2])
    (_, n), *_ = steps_of(r, r"ddim(\d+)_x0_components")
    options = dict(steps=int(n), noise=start, scheduler=decomp_sampler("ddim", model.scheduler))
    for name, mask in combination_masks(r, model.n_factors).items():
        keep = keep_mask(mask, model.n_factors)
        yield "arrays", f"{name}_latent", recombine(f.rows(0), f.rows(1), ~keep).codes.flatten(1), SINGLE
        yield "arrays", name, last_state(lambda **o: model.swap(a, b, mask, **o), **options), CHAIN
    yield "arrays", "add", last_state(lambda **o: model.add(a, b, **o), **options), CHAIN
    if "cross" not in r.names("arrays"): return
    scale = float(re.search(r"times (\d+(?:\.\d+)?)", config["cross_model2"])[1])
    other = r.model(scale=scale)
    check_partners([model, other])
    yield "arrays", "cross", last_state(lambda **o: swap_across(model, other, a, b, config["cross_indices"], **o), **options), CHAIN


def train_batch(r): return dict(zip(("image", "noise", "timesteps"), [v for i, v in enumerate(r.inputs()) if i != 1]))


def check_gradients(r):
    for lean in (False, True):  # component by component is the same gradient
        model = r.model().train()
        model.component_backward = lean
        out = model(train_batch(r))
        out["loss"].backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        sizes = dict(encoder_config=model.config.encoder_config, denoiser_config=model.config.denoiser_config)
        official = convert.convert_decomp(grads, sizes, convert.decomp_heads(model), to_official=True)
        norms = torch.stack([official[name].norm() for name in r.json("config")["param_names"]])
        yield "arrays", "loss_x0_trainmode", out["per_image"], SINGLE
        recorded = r.array("arrays", "grad_norms")
        yield "arrays", "grad_norms", norms, max(SINGLE, 1e-4 * min(recorded.max().item(), 10))
        for name in r.names("arrays"):
            if name.startswith("grad/"): yield "arrays", name, official[name[5:]], SINGLE


def check_training(r):
    model, (images, x0, noise, t) = r.model().train(), r.inputs()
    times, noises = r.given("arrays", "train_t"), r.given("arrays", "train_noise")
    optimiser, losses = torch.optim.Adam(model.parameters(), r.json("config")["adam_lr"]), []
    for now, eps in zip(times, noises):
        loss = model({"image": images, "noise": eps, "timesteps": now})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    yield "arrays", "train_losses", torch.stack(losses), SINGLE
    model.eval()
    with torch.no_grad():
        f = model.encode(images)
        yield "arrays", "train_after_latents", f.codes.flatten(1), CHAIN
        yield "arrays", "train_after_out", model.predict(noise_at(model.scheduler, x0, noise, t), t, f), CHAIN


@torch.no_grad()
def check_variant(r):
    file, model, (images, x0, noise, t) = "variant_arrays", r.model("variant"), r.inputs("variant_arrays")
    f, x_t = model.encode(images), noise_at(model.scheduler, x0, noise, t)
    yield file, "x_t", x_t, SINGLE
    yield file, "latents", f.codes.flatten(1), SINGLE
    yield file, "out_components", model.predict_components(x_t, t, f.codes), SINGLE
    yield file, "out_composed", model.predict(x_t, t, f), SINGLE
    yield file, "loss_x0", model({"image": images, "noise": noise, "timesteps": t})["per_image"], SINGLE
    for name, n in steps_of(r, r"ddim(\d+)_x0_final", file):
        yield file, name, last_state(lambda **o: model.decode(f, **o), steps=int(n), noise=noise, scheduler=decomp_sampler("ddim", model.scheduler)), CHAIN


CHECKS = dict(schedule=check_schedule, embeddings=check_embeddings, encoder=check_encoder, answers=check_answers, losses=check_losses, posterior=check_posterior,
              ddim=check_ddim, stochastic=check_stochastic, inversion=check_inversion, combinations=check_combinations, gradients=check_gradients,
              training=check_training, variant=check_variant)
QUICK = ("schedule", "embeddings", "encoder", "losses", "posterior", "variant")  # repeated with altered data

finished = once(CHECKS.get, Recorded)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", CHECKS)
def test_matches_official(group, golden):
    comparisons, _ = finished(group, golden("decomp_diffusion"))
    assert comparisons


def test_every_array_is_compared(golden):
    "No array of any file is left out: it is compared, or it is an input on which compared arrays depend"
    folder = golden("decomp_diffusion")
    compared, given = compared_and_given(finished, CHECKS, folder)
    everything = {(path.stem, name) for path in folder.glob("*.safetensors") if path.stem not in WEIGHTS for name in Recorded(folder).names(path.stem)}
    assert everything == compared | given, f"untouched: {sorted(everything - compared - given)}"
    inputs = {name for _, name in given - compared}
    assert inputs <= {"x0", "noise", "t", "t_frac", "noise_T", "uncond_keep_mask", "step_noises", "train_t", "train_noise"}, inputs
    listed = set(re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text(), flags=re.M))
    assert listed == {name for _, name in everything}


@pytest.mark.parametrize("group", CHECKS)
def test_altered_expectation_fails(group, golden):
    every_alteration_fails(finished(group, golden("decomp_diffusion"))[0], golden("decomp_diffusion"), Recorded)


@pytest.mark.parametrize("group", QUICK)
def test_altered_file_and_other_input_fail(group, golden):
    "The same through a whole check: one expected number changed as it is read, or another input, and the check no longer passes"
    folder = golden("decomp_diffusion")
    made, used = finished(group, folder)
    with pytest.raises(AssertionError): run(CHECKS[group], Recorded(folder, altered=made[-1][:2]))
    for given in sorted(used - keys_of(made)):
        if group == "encoder" and given[1] in ("noise", "t"): continue  # read with the pictures, not used
        with pytest.raises(AssertionError): run(CHECKS[group], Recorded(folder, shifted=given))


def test_keep_mask_matters(golden):
    r = Recorded(golden("decomp_diffusion"))
    batch = train_batch(r)
    with torch.no_grad(): all_kept, none_kept = (r.model(null_dropout=0.5)(batch | {"keep": torch.full((len(batch["image"]),), v)})["per_image"] for v in (1, 0))
    assert (all_kept - none_kept).abs().min() > 1e-4


def test_altered_weight_fails(golden):
    "One weight of either network changed, and the answers no longer match"
    r = Recorded(golden("decomp_diffusion"))
    images, x0, noise, t = r.inputs()
    for part in ("encoder.last.weight", "denoiser.down_blocks.0.resnets.0.time_emb_proj.weight"):
        model = r.model()
        with torch.no_grad():
            model.get_parameter(part)[0] += 0.5
            said = model.predict(noise_at(model.scheduler, x0, noise, t), t, model.encode(images))
        with pytest.raises(AssertionError): close(said, r.array("arrays", "out_composed"), SINGLE, part)


# --- files -----------------------------------------------------------------------------------------------------------------------------------------

def official_state(folder): return load_file(folder / "weights.safetensors")


def head_options(folder):
    settings = Recorded(folder).settings()
    return dict(head_dim=settings["num_head_channels"]) if settings["num_head_channels"] > 0 else dict(n_heads=settings["num_heads"])


@pytest.mark.parametrize("which", ["main", "variant"])
def test_sizes_are_read_off_the_shapes(which, golden):
    r = Recorded(golden("decomp_diffusion"))
    told, model = r.settings(which), r.model(which)
    config, unet = model.config, model.config.denoiser_config
    assert (config.image_size, config.n_factors, config.factor_dim) == (told["image_size"], told["num_components"], told["emb_dim"] // 2)
    assert config.encoder_config["width"] == told["enc_channels"] and unet["layers_per_block"] == told["num_res_blocks"]
    assert unet["channels"] == [int(m * told["model_channels"]) for m in told["channel_mult"]] and unet["scale_shift"] == told["use_scale_shift_norm"]
    assert [2 ** level for level in unet["attention_levels"]] == sorted(told["attention_resolutions"]) and unet["resample"] == ("resnet" if told["resblock_updown"] else "conv")


@pytest.mark.parametrize("which", ["main", "variant"])
def test_conversion_is_lossless(which, golden, tmp_path):
    "official → ours → official gives every stored tensor back, bit for bit"
    folder = golden("decomp_diffusion")
    state = load_file(folder / ("weights.safetensors" if which == "main" else "variant_weights.safetensors"))
    again = reading.read_weights(convert.save_official_decomp_diffusion(Recorded(folder).model(which), tmp_path / "model_1.pt"))
    assert set(again) == set(state)
    assert [k for k in state if not torch.equal(again[k], state[k])] == []


def test_averaged_checkpoints_load(golden, tmp_path):
    folder = golden("decomp_diffusion")
    state = official_state(folder)
    wrapped = {"initted": torch.tensor(True), "step": torch.tensor(7)} | {f"ema_model.{k}": v for k, v in state.items()}
    wrapped |= {f"online_model.{k}": v * 0.5 if v.is_floating_point() else v for k, v in state.items()}
    torch.save(wrapped, tmp_path / "ema_0.9999_7.pt")
    load = lambda **o: convert.load_official_decomp_diffusion(tmp_path / "ema_0.9999_7.pt", **head_options(folder), **o).state_dict()
    ours = Recorded(folder).model().state_dict()
    average, online = load(), load(ema=False)
    assert all(torch.equal(average[k], v) for k, v in ours.items())
    assert torch.equal(online["encoder.last.weight"], ours["encoder.last.weight"] * 0.5)


DAMAGES = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "out.0.bias"}, {}, "missing: denoiser.conv_norm_out.bias"),
    "surplus": (lambda s: s | {"label_emb.weight": torch.ones(2)}, {}, "left over: label_emb.weight"),
    "another shape": (lambda s: s | {"out.0.bias": torch.ones(3)}, {}, "another shape"),
    "no checkpoint": (lambda s: {"weight": torch.ones(2)}, {}, "lacks time_embed.0.weight"),
    "heads": (dict, dict(head_dim=37, n_heads=0), "head_dim=37"),
    "picture size": (dict, dict(image_size=640), "image_size=640"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses(damage, golden, tmp_path):
    folder = golden("decomp_diffusion")
    change, options, message = DAMAGES[damage]
    torch.save(change(official_state(folder)), tmp_path / "model_3.pt")
    with pytest.raises(ValueError, match=re.escape(message)) as caught: convert.load_official_decomp_diffusion(tmp_path / "model_3.pt", **{**head_options(folder), **options})
    if damage != "picture size": assert "model_3.pt" in str(caught.value)


def test_nothing_is_unpickled(golden, tmp_path):
    torch.save(official_state(golden("decomp_diffusion")) | {"run": Path("x")}, tmp_path / "model_3.pt")
    with pytest.raises(ValueError, match="refused"): convert.load_official_decomp_diffusion(tmp_path / "model_3.pt")
    with pytest.raises(FileNotFoundError, match="no weights"): convert.load_official_decomp_diffusion(tmp_path / "model_4.pt")
    (tmp_path / "model_5.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="cannot be read"): convert.load_official_decomp_diffusion(tmp_path / "model_5.pt")


@torch.no_grad()
def test_guided_plan_is_one_call(golden):
    "Guidance and K components together are one batch for the denoiser"
    r = Recorded(golden("decomp_diffusion"))
    model, images = r.model(), r.inputs()[0]
    f, (x0, noise, t) = model.encode(images), r.inputs()[1:]
    rows = []
    hook = model.denoiser.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model.guided(f, 3.0)(noise_at(model.scheduler, x0, noise, t), t)
    hook.remove()
    assert rows == [len(images) * (model.n_factors + 1)]


def test_an_official_file_as_safetensors(golden, tmp_path):
    folder = golden("decomp_diffusion")
    save_file(official_state(folder), tmp_path / "model.safetensors")
    assert torch.equal(convert.load_official_decomp_diffusion(tmp_path / "model.safetensors", **head_options(folder)).encoder.last.bias, Recorded(folder).model().encoder.last.bias)
