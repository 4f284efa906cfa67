"""SAVi, STEVE, SlotDiffusion on clips, StoSAVi and the scores of videos against arrays recorded from the official modules.

As in `test_slot_diffusion.py`: each check reads what it is `given`, computes everything else with our modules and compares array by array; shapes, settings
and cases come from the files. Two folders belong here: `video`, and the video arrays of `slotdiffusion`.
"""
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import Recorded as Arrays
from recorded import compared_and_given, every_alteration_fails, once, run, scratch
from safetensors.torch import load_file

from decomp_nb.components import diffusion
from decomp_nb.components.predictors import build_predictor
from decomp_nb.components.samplers import SinglestepSolver
from decomp_nb.components.slot_model import SlotModel
from decomp_nb.components.slot_sets import mix_slots
from decomp_nb.components.tracking import TrackState
from decomp_nb.decomposer import sample
from decomp_nb.factors import Factors
from decomp_nb.metrics.generation import mse, psnr, ssim
from decomp_nb.metrics.segmentation import ari
from decomp_nb.metrics.video_generation import (
    boxes_found,
    boxes_of_slots,
    claimed_labels,
    frame_curves,
    frame_order,
    fvd,
    summed_error,
    take_frames,
    video_gaussian,
)
from decomp_nb.metrics.video_segmentation import frame_scores, video_scores
from decomp_nb.official import reading
from decomp_nb.official import slots as convert

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SINGLE, UNET, IMAGE, EXACT = (1e-4, 2e-5), (0, 5e-4), (0, 2e-4), (0, 0)  # relative and absolute tolerances
OLDER = {"predictor", "savi", "steve", "savi_ldm_encoder"}  # of the folder slotdiffusion; the others are of the folder video
LATER = {"interleaved", "single_step", "slotformer_broadcast", "ldm_slotformer", "readout_pairs", "vqa_accuracy", "datasets"}
CONTRADICTS = {("steve_video", "grad_norm")}  # recorded 27.2, but the gradients of the token loss cannot be longer than those of both losses and of the image loss together (1.75 + 0.28); see below
CHECKPOINTS = {"savi_video": "savi.pth", "steve_video": "steve.pth", "savi_ldm": "savi_ldm.pth"}


class Recorded(Arrays):
    "The arrays of a folder, and the models that its weights make"
    relative = 0.01

    def model(self, name: str, **options):
        "A whole official model, through a `.pth` file and the strict loader"
        return read_model(self.folder, name, **options)

    def gradient(self, *key: str) -> tuple[float, float]:
        "Tolerance of a gradient: a thousandth of its largest entry"
        return 0, 1e-3 * self.read(*key).abs().max().item()


def folder_of(group: str) -> str: return "slotdiffusion" if group in OLDER else "video"


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(folder / f"{name}.safetensors").items()}


@cache
def official_file(folder: Path, name: str) -> Path:
    "The official file, or one as the official code writes it, with the parts that the folder keeps elsewhere put back"
    if name in CHECKPOINTS: return folder / CHECKPOINTS[name]
    state = weights_of(folder, name)
    if name == "steve": state |= {f"dvae.{k}": v for k, v in weights_of(folder, "dvae").items()}
    torch.save(state, scratch() / f"{name}.pth")
    return scratch() / f"{name}.pth"


@cache
def read_model(folder: Path, name: str, **changes):
    config = json.loads((folder / f"{name}.json").read_text())
    options = dict(image_size=config["resolution"][0], n_iterations=config["slot_dict"]["num_iterations"], predictor_heads=config["pred_dict"]["pred_num_heads"],
                   norm_first=config["pred_dict"]["pred_norm_first"])
    if "dec_num_heads" in config["dec_dict"]: options["n_heads"] = config["dec_dict"]["dec_num_heads"]
    if "unet_dict" in config["dec_dict"]:
        noise = config["dec_dict"]["diffusion_dict"]
        options |= dict(head_dim=config["dec_dict"]["unet_dict"]["num_head_channels"], z_scale=noise["z_scale_factor"],
                        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[noise["pred_target"]])
    return convert.load_official_slots(official_file(folder, name), **options | changes)


@cache
def read_encoder(folder: Path, name: str) -> SlotModel:
    "Encoder, slot attention and tracker of a file without a decoder"
    config, state = json.loads((folder / f"{name}.json").read_text()), weights_of(folder, name)
    side, prediction = config["resolution"][0], config["pred_dict"]
    encoder, tracker = convert.family_encoder_config(state, side), convert.take_tracker(state)
    slots = convert.family_slots_config(state, config["slot_dict"]["num_iterations"])
    tracking = convert.family_tracking_config(tracker, prediction["pred_num_heads"], prediction["pred_norm_first"])
    assert tracking["predictor"].get("recurrent", False) == prediction["pred_rnn"] and tracking["predictor"]["kind"] == prediction["pred_type"]
    model = SlotModel(side, encoder, slots, tracking_config=tracking)
    parts = {"slot_attention.": convert.take_slot_attention(state), "encoder.": convert.take_encoder(state), "tracker.": tracker}
    assert not state
    reading.load_strict(model, {prefix + k: v for prefix, part in parts.items() for k, v in part.items()}, name)
    return model.eval()


def norm(parameters) -> torch.Tensor: return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()


def first_projection(model) -> torch.Tensor: return model.tracker.predictor.transformer.layers[0].self_attn.in_proj_weight.grad


def resized(masks: torch.Tensor, size) -> torch.Tensor:
    "Masks `(b,t,k,h,w)` at the size of the frames, as the official code gives them in evaluation"
    if masks.shape[-2:] == tuple(size): return masks
    return F.interpolate(masks.flatten(0, 1), tuple(size), mode="bilinear", align_corners=False).unflatten(0, masks.shape[:2])


# --- the checks: generators of (file, array, our value, tolerance) ---------------------------------------------------------------------------------

@torch.no_grad()
def check_predictor(r: Recorded):
    config, x, state = r.json("predictor"), r.given("predictor", "x"), weights_of(r.folder, "predictor")

    def load(name):
        options = config[name].get("base", config[name])
        part = {f"predictor.{k}": v for k, v in reading.part_of(state, f"{name}.").items()}
        tracker = convert.take_tracker(part)
        ours = convert.family_tracking_config(tracker, options.get("num_heads", 4), options["norm_first"])["predictor"]
        dim = options["d_model"] if "d_model" in options else options["channels"][0]
        module = build_predictor(dim, **ours).eval()
        return reading.load_strict(module, reading.part_of(tracker, "predictor."), name)

    for name in config:
        module = load(name)
        if name != "rnn":
            yield "predictor", f"y_{name}", module(x[0]), SINGLE
            continue
        memory, made = None, []
        for slots in x:
            out, memory = module(slots, memory)
            made.append(out)
        yield "predictor", f"y_{name}", torch.stack(made), SINGLE
        yield "predictor", f"y_{name}_after_burnin", module(x[0], module.burn_in(x.transpose(0, 1)))[0], SINGLE


def check_savi(r: Recorded):
    model, video = r.model("savi"), r.given("savi", "video")
    model.zero_grad()
    factors = model.encode(video, masks="attention")
    picture, _, masks = model.layers(factors)
    for name, ours in dict(slots=factors.codes, recon_img=picture, masks=masks[:, :, :, None]).items(): yield "savi", name, ours.detach(), SINGLE
    loss = model({"image": video})["loss"]
    loss.backward()
    yield "savi", "loss", loss.detach(), SINGLE
    yield "savi", "grad_init_latents", model.slot_attention.slot_mean.grad, r.gradient("savi", "grad_init_latents")
    before, n = TrackState(r.given("savi", "prev_slots")), r.read("savi", "slots_from_prev").shape[1]
    with torch.no_grad(): yield "savi", "slots_from_prev", model.encode(video[:, :n], state=before).codes, SINGLE


@torch.no_grad()
def check_savi_ldm_encoder(r: Recorded):
    model, video = read_encoder(r.folder, "savi_ldm_encoder"), r.given("savi_ldm_encoder", "video").float()
    factors = model.encode(video)
    yield "savi_ldm_encoder", "slots", factors.codes, SINGLE
    yield "savi_ldm_encoder", "masks", resized(factors.masks, video.shape[-2:]), SINGLE


@torch.no_grad()
def check_steve(r: Recorded):
    model, video = r.model("steve"), r.given("steve", "video")
    factors = model.encode(video)
    tokens, logits, _ = model.predict_tokens({"image": video})
    for name, ours in dict(slots=factors.codes, attn_masks=resized(factors.masks, video.shape[-2:]), pred_logits=logits).items(): yield "steve", name, ours, SINGLE
    yield "steve", "target_token_id", tokens, EXACT
    yield "steve", "token_recon_loss", model({"image": video})["loss"], SINGLE


def check_savi_video(r: Recorded):
    model, video, truth = r.model("savi_video"), r.given("savi_video", "video"), r.given("savi_video", "gt_masks")
    n, file = r.json("savi_video")["clip_len"], "savi_video"
    model.zero_grad()
    loss = model({"image": video[:, :n]})["loss"]
    loss.backward()
    yield file, "loss", loss.detach(), SINGLE
    for name, ours in dict(grad_init_latents=model.slot_attention.slot_mean.grad, grad_predictor_in_proj=first_projection(model), grad_norm=norm(model.parameters())).items():
        yield file, name, ours, r.gradient(file, name)
    with torch.no_grad():
        factors = model.encode(video)
        picture, _, masks = model.layers(factors)
        for name, ours in dict(slots=factors.codes, masks=masks[:, :, :, None], recon_img=picture).items(): yield file, name, ours, SINGLE
        yield file, "slots_chunks", model.encode(video, chunk=2).codes, SINGLE
        yield file, "val_img_recon_loss", model({"image": video})["loss"], SINGLE
    for name, ours in scores_of(truth, factors.masks).items(): yield file, f"val_{name}", ours.nanmean(), SINGLE


@torch.no_grad()
def _tracked(r: Recorded, file: str):
    model, video = read_encoder(r.folder, file), r.given(file, "video")
    yield file, "slots", model.encode(video).codes, SINGLE
    yield file, "slots_chunks", model.encode(video, chunk=2).codes, SINGLE


def check_savi_rnn(r: Recorded): yield from _tracked(r, "savi_rnn")


def check_savi_mlp(r: Recorded): yield from _tracked(r, "savi_mlp")


def check_stosavi(r: Recorded):
    file, model, mean = "stosavi", r.model("stosavi"), r.model("stosavi", random=False)
    video, noise = r.given(file, "video"), r.given(file, "eps").transpose(0, 1)
    with torch.no_grad():
        factors, found = model.encode(video, frame_noise=noise, return_found=True)
        yield file, "kernel_dist", found.gaussians, SINGLE
        yield file, "slots", factors.codes, SINGLE
        yield file, "kld_loss", model.tracker.gaussian.kld(found.gaussians), SINGLE
        yield file, "slots_none", mean.encode(video).codes, SINGLE
        out = mean({"image": video})
        assert out["kld"] == 0
        yield file, "recon_loss_none", out["loss"], SINGLE
    model.zero_grad()
    out = model({"image": video, "frame_noise": noise})
    out["loss"].backward()
    yield file, "recon_loss", out["reconstruction"], SINGLE
    yield file, "grad_init_latents", model.slot_attention.slot_mean.grad, r.gradient(file, "grad_init_latents")
    yield file, "grad_norm", norm(model.parameters()), r.gradient(file, "grad_norm")


def check_savi_ldm(r: Recorded):
    file, model = "savi_ldm", r.model("savi_ldm")
    given = lambda name: r.given(file, name)
    video, n, t, noise, other = given("video"), int(given("n_clip")), given("t"), given("noise"), given("slots_random")
    clip = video[:, :n]
    with torch.no_grad():
        factors, x0 = model.encode(clip), model.latents.encode(clip.flatten(0, 1))
        x_t = diffusion.noise_at(model.scheduler, x0, noise, t)
        for name, ours in dict(slots=factors.codes, masks=resized(factors.masks, clip.shape[-2:]), x0=x0, x_t=x_t).items(): yield file, name, ours, SINGLE
        pred = model.predict(x_t, t, factors.fold_time())
        yield file, "pred", pred, UNET
        yield file, "pred_random", model.predict(x_t, t, Factors(other)), UNET
        for short, kind in dict(x0="sample", v="v_prediction").items():
            target = diffusion.diffusion_target(diffusion.make_scheduler("ddpm", model.scheduler, prediction_type=kind), x0, noise, t)
            yield file, f"loss_{short}", diffusion.diffusion_loss(pred, target), SINGLE
    model.zero_grad()
    loss = model({"image": clip, "noise": noise, "timesteps": t})["loss"]
    loss.backward()
    yield file, "loss_eps", loss.detach(), SINGLE
    first, second = (group["params"] for group in model.parameter_groups())
    grads = dict(init_latents=model.slot_attention.slot_mean.grad, conv0=model.encoder.layers[0].weight.grad, predictor_in_proj=first_projection(model),
                 unet_conv_in=model.denoiser.conv_in.weight.grad, norm=norm(model.parameters()), norm_slots=norm(first), norm_decoder=norm(second))
    for name, ours in grads.items(): yield file, f"grad_{name}", ours, r.gradient(file, f"grad_{name}")
    with torch.no_grad():
        long = model.encode(video)
        yield file, "slots_long", long.codes, SINGLE
        yield file, "slots_chunks", model.encode(video, chunk=2).codes, SINGLE
        yield file, "slots_mixed_official", mix_slots(long, official=True).codes, SINGLE
    one, own = given("noise_one").expand(len(t), -1, -1, -1), given("noise_own")
    draw = lambda start, solver: sample(model.guided(factors.fold_time()), start, solver, 20)
    plain = SinglestepSolver(model.scheduler)
    yield file, "z_one", draw(one, model.sampler), UNET
    yield file, "z_one_novq", draw(one, plain), UNET
    yield file, "z_own_novq", draw(own, plain), UNET
    yield file, "samples", model.decode(factors, steps=20, noise=one.unflatten(0, clip.shape[:2])), IMAGE


def check_steve_video(r: Recorded):
    file, model = "steve_video", r.model("steve_video")
    video, n = r.given(file, "video"), int(r.given(file, "n_clip"))
    clip, exp_noise = video[:, :n], r.given(file, "exp_noise")
    with torch.no_grad():
        factors, long = model.encode(clip), model.encode(video)
        tokens, logits, _ = model.predict_tokens({"image": clip})
        for name, ours in dict(slots=factors.codes, masks=resized(factors.masks, clip.shape[-2:]), pred_logits=logits, slots_long=long.codes,
                               slots_chunks=model.encode(video, chunk=2).codes).items(): yield file, name, ours, SINGLE
        yield file, "target_token_id", tokens, EXACT
        yield file, "tokens_long", model.dvae.tokens(video.flatten(0, 1)).unflatten(0, video.shape[:2]), EXACT
        drawn = model.draw_softly(logits, exp_noise)
        yield file, "recon_soft", drawn, IMAGE
        yield file, "img_recon_loss", F.mse_loss(drawn, clip.flatten(0, 1)), SINGLE
        pictures = factors.fold_time()
        words, scores = model.decoder.generate(pictures.codes, return_logits=True)
        yield file, "gen_tokens", words, EXACT
        yield file, "gen_logits", scores, SINGLE
        draw = lambda f: model.dvae.decode(model.generate(f).flatten(0, 1)).unflatten(0, clip.shape[:2])
        yield file, "recon", draw(factors), IMAGE
        mixed = mix_slots(long, official=True)
        yield file, "slots_mixed_official", mixed.codes, SINGLE
        yield file, "mixed", draw(Factors(mixed.codes[:, :n])), IMAGE
    lengths = {}
    for weight in (0.0, 1.0):
        model.register_to_config(image_weight=weight)
        model.zero_grad()
        out = model({"image": clip, "exp_noise": exp_noise})
        out["loss"].backward()
        lengths[weight] = norm(model.parameters())
        if weight: yield file, "grad_norm_both", lengths[weight], r.gradient(file, "grad_norm_both")
        if weight: continue
        yield file, "token_recon_loss", out["loss"].detach(), SINGLE
        for name, ours in dict(init_latents=model.slot_attention.slot_mean.grad, predictor_in_proj=first_projection(model), tok_emb=model.decoder.words.weight.grad).items():
            yield file, f"grad_{name}", ours, r.gradient(file, f"grad_{name}")
    assert lengths[0.0] < lengths[1.0] < 2 and r.given(file, "grad_norm") > 10 * lengths[1.0], "recorded anew? then compare grad_norm with lengths[0.0]"
    model.register_to_config(image_weight=0.0)


def scores_of(true, pred) -> dict[str, torch.Tensor]:
    "The official names of the scores of whole videos: what is empty counts as 1 (FG-ARI), the background as an object (mIoU)"
    objects, everything = video_scores(true, pred), video_scores(true, pred, background="include")
    return dict(ari=objects.ari, fari=objects.fg_ari.nan_to_num(1.0), miou=everything.per_image("iou"), fmiou=objects.per_image("iou"), mbo=objects.per_image("best"))


def check_video_segmentation(r: Recorded):
    file = "video_segmentation"
    true, pred = r.given(file, "gt"), r.given(file, "pred")
    for name, ours in scores_of(true, pred).items():
        yield file, f"video_{name}", ours, SINGLE
        yield file, f"batch_{name}", ours.nanmean(), SINGLE
    frames, everything = frame_scores(true, pred), frame_scores(true, pred, background="include")
    fari = ari(true.flatten(0, 1), pred.flatten(0, 1), ignore_background=True, empty=1.0).unflatten(0, true.shape[:2]).mean(1)  # official: empty frames count as 1
    for name, ours in dict(ari=frames["ari"], fari=fari, miou=everything["miou"], fmiou=frames["miou"], mbo=frames["mbo"]).items(): yield file, f"frame_{name}", ours, SINGLE


def check_fvd(r: Recorded):
    file = "fvd"
    real, fake = r.given(file, "feats_real"), r.given(file, "feats_fake")
    mean, covariance = video_gaussian(real, biased=True)
    yield file, "mean_real", mean, SINGLE
    yield file, "cov_real", covariance, SINGLE
    yield file, "fvd", torch.tensor(fvd(fake, real, biased=True)), SINGLE
    yield file, "fvd_first20", torch.tensor(fvd(fake, real, biased=True, limit=20)), SINGLE
    length, read = len(r.read(file, "order_24")), len(r.read(file, "fake_frames"))
    yield file, "order_24", torch.tensor(frame_order(length, "text")), EXACT
    yield file, "fake_frames", take_frames(torch.arange(length)[None], read, order="text")[0], EXACT


def check_vp_metrics(r: Recorded):
    file = "vp_metrics"
    true, pred = r.given(file, "gt"), r.given(file, "pred")
    height, width = true.shape[-2:]
    curves = frame_curves(pred, true)
    yield file, "step_mse", summed_error(curves["mse"], height, width), SINGLE
    for name in ("psnr", "ssim"): yield file, f"step_{name}", curves[name], SINGLE
    pairs = pred.flatten(0, 1), true.flatten(0, 1)
    yield file, "all_mse", summed_error(mse(*pairs).mean(), height, width, colours="sum"), SINGLE
    yield file, "all_psnr", psnr(*pairs).mean(), SINGLE
    yield file, "all_ssim", ssim(*pairs).mean(), SINGLE
    soft = r.given(file, "soft_masks")[:, :, :, 0]
    labels = claimed_labels(soft)
    yield file, "pred_masks", labels, EXACT
    yield file, "pred_masks_argmax", soft.argmax(2), EXACT
    boxes = boxes_of_slots(labels, soft.shape[2])
    yield file, "pred_boxes", boxes, EXACT
    objects = r.given(file, "gt_masks")
    of_frames = lambda **options: ari(objects.flatten(0, 1), labels.flatten(0, 1), **options).unflatten(0, objects.shape[:2]).mean(0)
    yield file, "step_ari", of_frames(), SINGLE
    yield file, "step_fari", of_frames(ignore_background=True, empty=1.0), SINGLE
    scores = [video_scores(objects[:, t:t + 1], labels[:, t:t + 1]).per_image("iou") for t in range(objects.shape[1])]
    yield file, "step_miou", torch.stack(scores, 1).mean(0), SINGLE
    there, known = r.given(file, "gt_boxes"), r.given(file, "present")
    found = [[boxes_found(there[b, t][known[b, t]], boxes[b, t]) for b in range(len(there))] for t in range(there.shape[1])]
    precision, recall = torch.tensor(found).mean(1).T
    yield file, "step_ap", precision, SINGLE
    yield file, "step_ar", recall, SINGLE


CHECKS = {name[len("check_"):]: f for name, f in list(globals().items()) if name.startswith("check_")}
finished = once(CHECKS.get, Recorded)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", CHECKS)
def test_matches_official(group, golden):
    comparisons, _ = finished(group, golden(folder_of(group)))
    assert comparisons


@pytest.mark.parametrize("part, elsewhere", [("video", LATER), ("slotdiffusion", None)])
def test_every_array_is_compared(part, elsewhere, golden):
    "No array of any file that belongs here is left out: it is compared, or it is an input on which compared arrays depend"
    folder = golden(part)
    groups = {group: check for group, check in CHECKS.items() if folder_of(group) == part}
    compared, given = compared_and_given(finished, groups, folder)
    files = {path.stem for path in folder.glob("*.npz")} - LATER if elsewhere else OLDER
    everything = {(file, name) for file in files for name in Recorded(folder).names(file)}
    assert everything == compared | given, f"untouched: {sorted(everything ^ (compared | given))}"
    listed = set(re.findall(r"^### (\w+)\.npz", (folder / "README.md").read_text(), flags=re.M))
    assert files <= listed and (not elsewhere or files == listed - elsewhere), f"files and README differ: {files ^ listed}"
    assert not any(name.startswith(("grad", "loss", "pred_", "z_", "recon", "gen_", "val_", "video_", "frame_")) for _, name in given - compared - CONTRADICTS), given - compared


@pytest.mark.parametrize("group", CHECKS)
def test_altered_expectation_fails(group, golden):
    folder = golden(folder_of(group))
    every_alteration_fails(finished(group, folder)[0], folder, Recorded)


@pytest.mark.parametrize("group", ["predictor", "savi_rnn", "video_segmentation"])
def test_altered_file_fails(group, golden):
    "The same through the whole check: the first array that is compared and no input too, altered as it is read from the file"
    folder = golden(folder_of(group))
    made, used = finished(group, folder)
    file, name = next((file, name) for file, name, *_ in made if (file, name) not in used)
    with pytest.raises(AssertionError, match=re.escape(f"{file}/{name}")): run(CHECKS[group], Recorded(folder, altered=(file, name)))


# --- checkpoints: strict, safe, complete -----------------------------------------------------------------------------------------------------------

def test_models_are_recognised(golden):
    "Whole checkpoints of the middle of training, flat files; what is not read is named"
    folder = golden("video")
    kinds = {name: type(read_model(folder, name)).__name__ for name in (*CHECKPOINTS, "stosavi")}
    assert kinds == dict(savi_video="SAVi", steve_video="STEVE", savi_ldm="SlotDiffusion", stosavi="SAVi")
    assert "state_dict" in torch.load(folder / "savi.pth", weights_only=True) and "state_dict" not in torch.load(folder / "steve.pth", weights_only=True)
    with pytest.raises(ValueError, match="SlotFormer"): convert.load_official_slots(folder / "ldm_slotformer.pth")


@pytest.mark.parametrize("damage, complaint", [
    (lambda s: {k: v for k, v in s.items() if "linear1.bias" not in k}, "missing: tracker.predictor"),
    (lambda s: s | {"predictor.more": torch.zeros(2)}, "left over: predictor.more"),
    (lambda s: {k: v for k, v in s.items() if "transformer_encoder" not in k} | {"predictor.rnn.weight_hh_l0": torch.zeros(8, 2)}, "neither a transformer nor an MLP"),
])
def test_damaged_checkpoints_are_refused(golden, tmp_path, damage, complaint):
    folder = golden("video")
    state = torch.load(folder / "savi.pth", weights_only=True)["state_dict"]
    torch.save(damage(state), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=complaint): convert.load_official_slots(tmp_path / "bad.pth", image_size=Recorded(folder).json("savi_video")["resolution"][0])


def test_the_running_average_can_be_taken(golden, tmp_path):
    folder = golden("video")
    state = torch.load(folder / "savi_ldm.pth", weights_only=True)
    prefix = "dm_decoder.model."
    unet = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    state |= {f"dm_decoder.model_ema.{k.replace('.', '')}": v + 1 for k, v in unet.items()} | {"dm_decoder.model_ema.decay": torch.tensor(0.9), "dm_decoder.model_ema.num_updates": torch.tensor(3)}
    torch.save(state, tmp_path / "ema.pth")
    size = Recorded(folder).json("savi_ldm")["resolution"][0]
    trained, average = (convert.load_official_slots(tmp_path / "ema.pth", image_size=size, averaged=x) for x in (False, True))
    torch.testing.assert_close(average.denoiser.conv_in.weight, trained.denoiser.conv_in.weight + 1)
    with pytest.raises(ValueError, match="no running average"): convert.load_official_slots(folder / "savi_ldm.pth", image_size=size, averaged=True)


def test_a_folder_keeps_the_autoencoder_with_the_model(golden, tmp_path):
    folder = golden("video")
    for name in ("savi_ldm", "steve_video"):
        model = read_model(folder, name)
        again = type(model).from_pretrained(reading.keep_with(model, tmp_path / name)).eval()
        codes = Factors(torch.randn(1, 2, *model.slot_attention.slot_mean.shape[1:], generator=torch.Generator().manual_seed(0)))
        options = dict(steps=3, generator=torch.Generator().manual_seed(0)) if name == "savi_ldm" else {}
        drawn = model.decode(codes, **options)
        if options: options["generator"] = torch.Generator().manual_seed(0)
        torch.testing.assert_close(again.decode(codes, **options), drawn)
