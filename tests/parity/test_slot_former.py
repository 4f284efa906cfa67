"""SlotFormer against arrays recorded from the official modules: roll-outs, interleaved and from one frame, losses, gradients, predicted frames.

As in `test_video.py`: each check reads what it is `given`, computes everything else with our modules and compares array by array; shapes, settings
and cases come from the files of the folder `video`.
"""
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from recorded import Recorded as Arrays
from recorded import compared_and_given, every_alteration_fails, once, run
from safetensors.torch import load_file

from decomp_nb.components.rollout import RolloutTransformer, interleaved_frames, roll_out_interleaved, rollout_loss, squared_error
from decomp_nb.factors import Factors
from decomp_nb.methods.slot_former import SlotFormer
from decomp_nb.official import reading
from decomp_nb.official import slot_former as convert
from decomp_nb.official.slots import load_official_slots

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SINGLE, UNET, IMAGE = (1e-4, 2e-5), (0, 5e-4), (0, 2e-4)  # relative and absolute tolerances
GROUPS = ["interleaved", "single_step", "slotformer_broadcast", "ldm_slotformer"]  # files of the folder that belong here


class Recorded(Arrays):
    "The arrays of a folder, and the models that its weights make"
    relative = 0.01

    def gradient(self, *key: str) -> tuple[float, float]:
        "Tolerance of a gradient: a thousandth of its largest entry"
        return 0, 1e-3 * self.read(*key).abs().max().item()


def rollout_of(state: dict, config: dict) -> RolloutTransformer:
    "The transformer of an official state dict, as the converter makes it"
    state = {f"rollouter.{k}": v.float() if v.dtype == torch.float16 else v for k, v in state.items()}
    rollout = convert.take_rollout(state)
    reading.refuse_rest(state, "the file")
    single = "cond_len" in config
    sizes = convert.rollout_sizes(rollout, config["num_slots"], config["num_heads"], config["history_len"] if single else None)
    expected = dict(slot_dim="slot_size", n_slots="num_slots", history="cond_len" if single else "history_len", dim="d_model", n_layers="num_layers", hidden="ffn_dim")
    assert {ours: sizes[ours] for ours in expected} == {ours: config[theirs] for ours, theirs in expected.items()}
    assert sizes["slot_code"] == (config["slots_pe"] == "learnable") and sizes["time_code"] == {"sin": "sine", "learnable": "learned"}[config["t_pe"]]
    model = RolloutTransformer(**sizes, norm_first=config["norm_first"])
    return reading.load_strict(model, rollout, "the file").eval()


@cache
def read_model(folder: Path, name: str, whole: bool = False) -> SlotFormer:
    "A whole official model, through its `.pth` file and the strict loader; `whole`: with the model that the slots come from"
    config = json.loads((folder / f"{name}.json").read_text())
    options = dict(image_size=config["resolution"][0], n_slots=config["slot_dict"]["num_slots"], n_heads=config["rollout_dict"]["num_heads"],
                   n_predicted=config["loss_dict"]["rollout_len"])
    if "unet_dict" in config["dec_dict"]:
        noise = config["dec_dict"]["diffusion_dict"]
        options |= dict(head_dim=config["dec_dict"]["unet_dict"]["num_head_channels"], z_scale=noise["z_scale_factor"],
                        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[noise["pred_target"]])
    if config["loss_dict"].get("use_img_recon_loss"): options["image_weight"] = config["img_recon_loss_w"]
    if whole: options["slot_model"] = folder / "savi_ldm.pth"
    return convert.load_official_slot_former(folder / f"{name}.pth", **options)


def norm(parameters) -> torch.Tensor: return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()


# --- the checks: generators of (file, array, our value, tolerance) ---------------------------------------------------------------------------------

@torch.no_grad()
def check_interleaved(r: Recorded):
    weights = load_file(r.folder / "interleaved.safetensors")
    for case, config in r.json("interleaved").items():
        model = rollout_of(reading.part_of(weights, f"{case}."), config["rollouter"])
        observed, length = r.given("interleaved", f"slots_{case}")[:, :config["obs"]], config["video_len"]
        predicted = roll_out_interleaved(model, observed, length - config["obs"], config["offset"])
        yield "interleaved", f"rolled_{case}", torch.cat([observed, predicted], 1), SINGLE


@torch.no_grad()
def check_single_step(r: Recorded):
    model = rollout_of(load_file(r.folder / "single_step.safetensors"), r.json("single_step"))
    n = r.read("single_step", "pred_slots").shape[1]
    yield "single_step", "pred_slots", model.roll_out(r.given("single_step", "slots"), n), SINGLE


def check_slotformer_broadcast(r: Recorded):
    file = "slotformer_broadcast"
    model, slots, images, length = read_model(r.folder, file), r.given(file, "slots"), r.given(file, "img"), r.given(file, "vid_len")
    batch, past = {"slots": slots, "image": images}, model.rollout.observed
    with torch.no_grad():
        predicted = model.rollout.roll_out(slots[:, :past], slots.shape[1] - past)
        picture, _, masks = model.slot_model.layers(Factors(predicted))
        yield file, "pred_slots", predicted, SINGLE
        yield file, "recon_combined", picture, SINGLE
        yield file, "pred_masks", masks[:, :, :, None], SINGLE
        yield file, "pred_masks", model.draw_masks(Factors(predicted)).masks[:, :, :, None], SINGLE
        out, short = model.eval()(batch), model(batch | {"length": length})
        for i in range(1, predicted.shape[1] + 1): yield file, f"val_slot_recon_loss_{i}", out[f"slots_{i}"], SINGLE
        for name, ours in (("slots", "slot"), ("image", "img")):
            yield file, f"{ours}_recon_loss", out[name], SINGLE
            yield file, f"{ours}_recon_loss_short", short[name], SINGLE
        errors = squared_error(predicted, slots[:, past:])
        yield file, "slot_recon_loss_decay", rollout_loss(errors, 0.5), SINGLE
        counts = past + torch.arange(predicted.shape[1]) < length[:, None]
        yield file, "slot_recon_loss_short_decay", rollout_loss(errors, 0.01, counts), SINGLE
    model.zero_grad()
    model(batch)["loss"].backward()
    yield file, "grad_in_proj", model.rollout.read.weight.grad, r.gradient(file, "grad_in_proj")
    yield file, "grad_norm", norm(model.parameters()), r.gradient(file, "grad_norm")
    assert all(p.grad is None for p in model.slot_model.parameters())


def check_ldm_slotformer(r: Recorded):
    file, model = "ldm_slotformer", read_model(r.folder, "ldm_slotformer")
    given = lambda name: r.given(file, name)
    slots, past, n = given("slots"), int(given("history_len")), int(given("rollout_len"))
    assert (past, n) == (model.rollout.history, model.config.n_predicted)
    model.zero_grad()
    out = model({"slots": slots})
    out["loss"].backward()
    yield file, "loss", out["loss"].detach(), SINGLE
    first = model.rollout.transformer.layers[0].self_attn.in_proj_weight.grad
    grads = dict(grad_in_proj=model.rollout.read.weight.grad, grad_out_proj=model.rollout.write.weight.grad, grad_layer0=first, grad_norm=norm(model.parameters()))
    for name, ours in grads.items(): yield file, name, ours, r.gradient(file, name)
    yield file, "t_pe", model.rollout.time_code.detach()[None], SINGLE
    with torch.no_grad():
        yield file, "pred_slots", model.rollout.roll_out(slots[:, :past], n), SINGLE
    yield file, "gt_slots", slots[:, past:past + n], (0, 0)
    observed, length = Factors(slots[:, :past]), r.read(file, "rollout_slots").shape[1]
    future = model.roll_out(observed, length - past)
    combined = Factors(torch.cat([observed.codes, future.codes], 1))
    yield file, "rollout_slots", combined.codes, SINGLE
    longer = r.read(file, "rollout_from_longer").shape[1]
    yield file, "rollout_from_longer", model.roll_out(Factors(slots[:, :past + 1]), longer).codes, SINGLE
    b = len(slots)
    one, own = given("noise_one").expand(b, length, -1, -1, -1), given("noise_own").unflatten(0, (b, -1))
    yield file, "recon_combined", model.decode(combined, steps=20, noise=one), IMAGE
    yield file, "vp_images", model.decode(future, steps=20, noise=own), IMAGE


CHECKS = {name[len("check_"):]: f for name, f in list(globals().items()) if name.startswith("check_")}
finished = once(CHECKS.get, Recorded)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", GROUPS)
def test_matches_official(group, golden):
    comparisons, _ = finished(group, golden("video"))
    assert comparisons


def test_every_array_is_compared(golden):
    "No array of any file that belongs here is left out: it is compared, or it is an input on which compared arrays depend"
    folder = golden("video")
    compared, given = compared_and_given(finished, GROUPS, folder)
    everything = {(file, name) for file in GROUPS for name in Recorded(folder).names(file)}
    assert everything == compared | given, f"untouched: {sorted(everything ^ (compared | given))}"
    assert not any(name.startswith(("grad", "loss", "pred_", "recon", "val_", "rolled", "vp_")) or "loss" in name for _, name in given - compared), given - compared


@pytest.mark.parametrize("group", GROUPS)
def test_altered_expectation_fails(group, golden):
    folder = golden("video")
    every_alteration_fails(finished(group, folder)[0], folder, Recorded)


@pytest.mark.parametrize("group", ["interleaved", "single_step", "slotformer_broadcast"])
def test_altered_file_fails(group, golden):
    "The same through the whole check: the first array that is compared and no input too, altered as it is read from the file"
    folder = golden("video")
    made, used = finished(group, folder)
    file, name = next((file, name) for file, name, *_ in made if (file, name) not in used)
    with pytest.raises(AssertionError, match=re.escape(f"{file}/{name}")): run(CHECKS[group], Recorded(folder, altered=(file, name)))


# --- checkpoints: strict, safe, complete -----------------------------------------------------------------------------------------------------------

def test_the_slot_model_makes_it_whole(golden):
    "With the official file of the slot model, frames are taken apart, rolled out and drawn; its decoder is the one in the roll-out's file"
    folder = golden("video")
    whole, alone = read_model(folder, "ldm_slotformer", whole=True), read_model(folder, "ldm_slotformer")
    clip = Recorded(folder).read("savi_ldm", "video")
    future = whole.roll_out(whole.encode(clip), 2)
    noise = torch.randn(*future.codes.shape[:2], *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone.decode(future, steps=3, noise=noise), whole.decode(future, steps=3, noise=noise))
    with pytest.raises(ValueError, match="hold a decoder only"): alone.encode(clip)


def test_files_that_do_not_fit_are_refused(golden, tmp_path):
    folder = golden("video")
    state = torch.load(folder / "ldm_slotformer.pth", weights_only=True)
    size = Recorded(folder).json("ldm_slotformer")["resolution"][0]
    sizes = dict(image_size=size, n_slots=4, n_heads=4)

    def refusal(changed: dict, **options):
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(ValueError) as error: convert.load_official_slot_former(tmp_path / "bad.pth", **sizes | options)
        return str(error.value)

    assert "missing: read.bias" in refusal({k: v for k, v in state.items() if k != "rollouter.in_proj.bias"})
    assert "left over: more" in refusal(state | {"more": torch.zeros(2)})
    assert "no rollouter" in refusal({k: v for k, v in state.items() if not k.startswith("rollouter.")})
    assert "no decoder that we know" in refusal({k: v for k, v in state.items() if k.startswith("rollouter.")})
    assert "how many slots" in refusal(state, n_slots=None)
    first = "dm_decoder.model.diffusion_model.input_blocks.0.0.bias"
    assert "of another training" in refusal(state | {first: state[first] + 1}, slot_model=load_official_slots(folder / "savi_ldm.pth", image_size=size, head_dim=32))
    with pytest.raises(ValueError, match="load_official_slot_former"): load_official_slots(folder / "ldm_slotformer.pth")


def test_steve_slotformer_is_read(golden, tmp_path):
    "A file as STEVE-SlotFormer writes it: the transformer and the discrete VAE of STEVE beside a roll-out"
    folder = golden("video")
    steve, config = torch.load(folder / "steve.pth", weights_only=True), Recorded(folder).json("steve_video")
    slot_model = load_official_slots(folder / "steve.pth", image_size=config["resolution"][0], n_heads=config["dec_dict"]["dec_num_heads"])
    k, d = slot_model.n_factors, slot_model.factor_dim
    torch.manual_seed(0)
    rollout = RolloutTransformer(d, k, history=2, dim=16, n_layers=1, n_heads=2).eval()
    official = {new: old for old, new in convert.ROLLOUT_KEYS.items()}
    state = {}
    for key, value in rollout.state_dict().items():
        new = next(name for name in official if key.startswith(name))
        state[official[new] + key.removeprefix(new)] = value[None] if key.endswith("_code") else value
    state |= {key.replace("trans_decoder.", "decoder."): value for key, value in steve.items() if key.startswith(("trans_decoder.", "dvae."))}
    torch.save({"state_dict": state}, tmp_path / "steve_slotformer.pth")
    options = dict(n_slots=k, n_heads=2, decoder_heads=config["dec_dict"]["dec_num_heads"])
    slots = Factors(Recorded(folder).read("steve_video", "slots"))
    drawn = []
    for given in (None, slot_model):
        model = convert.load_official_slot_former(tmp_path / "steve_slotformer.pth", given, **options)
        assert type(model.slot_model).__name__ == "STEVE"
        drawn.append(model.decode(model.roll_out(slots, 2)))
    torch.testing.assert_close(*drawn)
    torch.testing.assert_close(drawn[0], slot_model.decode(Factors(rollout.roll_out(slots.codes, 2).detach())))


def test_all_offsets_in_one_batch_cost_less_than_a_loop():
    "Counted in calls of the transformer: the official script makes one for each frame of each video, here one for each frame of a roll-out"
    model = RolloutTransformer(4, 2, history=3, dim=8, n_layers=1, n_heads=1).eval()
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(): roll_out_interleaved(model, torch.randn(5, 9, 2, 4), 12, offset=3)
    assert len(calls) == 12 // 3
    assert interleaved_frames(9, 3, 3).unique().numel() == 9
