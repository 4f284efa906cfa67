"""SlotDiffusion, SLATE and Slot Attention (images) against arrays recorded from the official modules.

Each check reads what it is `given`, computes everything else with our modules and compares array by array. Shapes, settings and cases come from the files:
widths from the constructor JSON and the weights, solver steps and cases from the array names, so that another recording of the same layout passes unchanged.
"""
import json
import re
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from recorded import Recorded as Arrays
from recorded import every_alteration_fails, inputs_of_all, once, run, scratch
from safetensors.torch import load_file

from decomp_nb.components import codebooks, diffusion, solvers
from decomp_nb.components.encoders import ResNetEncoder, build_encoder
from decomp_nb.components.slot_sets import mix_slots
from decomp_nb.components.positions import coordinate_grid
from decomp_nb.components.slots import SlotAttention
from decomp_nb.decomposer import sample
from decomp_nb.factors import Factors
from decomp_nb.metrics import generation, segmentation
from decomp_nb.official import autoencoders, reading
from decomp_nb.official import slots as convert
from decomp_nb.official.slots import published_rate

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SINGLE, CHAIN, SAMPLER = (1e-4, 2e-5), (1e-3, 2e-5), (1e-3, 2e-4)  # relative and absolute tolerance of single modules, of gradients, of whole samplers
EXACT = (0, 0)
VIDEO = {"predictor", "savi", "steve", "savi_ldm_encoder", "slotformer"}  # files of the video models: all but the last in test_video.py
VIDEO_METRICS = re.compile(r"(gt_|pred_)?video(_\w+)?")  # of metrics.npz: (t,h,w) label maps, compared below like images


class Recorded(Arrays):
    "The arrays of the folder, and the models that its weights make"
    relative = 0.01  # tolerances are relative

    def weights(self, name: str) -> dict[str, torch.Tensor]: return {k: v.clone() for k, v in read_part(self.folder, name).items()}

    def model(self, name: str):
        "A whole official model, through a `.pth` file and the strict loader"
        return read_model(self.folder, name)


@cache
def read_part(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(folder / f"{name}.safetensors").items()}


@cache
def official_file(folder: Path, name: str, target: Path) -> Path:
    "A `.pth` file as the official code writes it, with the parts that the folder keeps elsewhere put back"
    state = {k: v.clone() for k, v in read_part(folder, name).items()}
    parts = {"sa_ldm": ("vqvae", "dm_decoder.vae.vqvae."), "slate": ("dvae", "dvae.")}
    if name in parts: state |= {parts[name][1] + k: v.clone() for k, v in read_part(folder, parts[name][0]).items()}
    torch.save({"state_dict": state, "epoch": 1} if name == "slate" else state, target / f"{name}.pth")  # both forms are about
    return target / f"{name}.pth"


@cache
def read_model(folder: Path, name: str):
    config, folder_json = json.loads((folder / f"{name}.json").read_text()), official_file(folder, name, scratch())
    options = dict(image_size=config["resolution"][0], n_iterations=config["slot_dict"]["num_iterations"]) if "slot_dict" in config else {}
    if name == "slate": options["n_heads"] = config["dec_dict"]["dec_num_heads"]
    if name == "sa_ldm":
        options |= dict(head_dim=config["dec_dict"]["unet_dict"]["num_head_channels"], z_scale=config["dec_dict"]["diffusion_dict"]["z_scale_factor"])
        options["prediction_type"] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[config["dec_dict"]["diffusion_dict"]["pred_target"]]
    model = convert.load_official_slots(folder_json, **options)
    return model


# --- the checks: generators of (file, array, our value, tolerance) ---------------------------------------------------------------------------------

def check_slot_attention(r: Recorded):
    config, given = r.json("slot_attention"), lambda name: r.given("slot_attention", name)
    slots = SlotAttention(config["in_features"], n_slots=config["num_slots"], slot_dim=config["slot_size"], hidden_dim=config["mlp_hidden_size"], n_iterations=config["num_iterations"],
                          epsilon=config["eps"], init="learned", position=None, input_mlp=False)
    state = {f"slot_attention.{k}": v for k, v in r.weights("slot_attention").items()} | {"init_latents": slots.slot_mean.detach()}
    reading.load_strict(slots, convert.take_slot_attention(state), "slot_attention")
    inputs, start = given("inputs").requires_grad_(), given("slots_init").requires_grad_()
    found = slots(inputs.transpose(1, 2)[..., None], slots=start)  # features as a map of one column
    (found.slots * given("loss_weight")).sum().backward()
    yield "slot_attention", "slots", found.slots.detach(), SINGLE
    yield "slot_attention", "seg_mask", found.attention[:, 0].mT.detach(), SINGLE
    for name, grad in dict(inputs=inputs.grad, slots_init=start.grad, project_k=slots.to_k.weight.grad, gru_weight_hh=slots.gru.weight_hh.grad).items():
        yield "slot_attention", f"grad_{name}", grad, CHAIN


def check_sa(r: Recorded):
    model, image = r.model("sa"), r.given("sa", "img")
    model.zero_grad()
    with torch.no_grad():
        features = model.encoder(image)
        attention = model.slot_attention
        placed = features.flatten(2).mT + attention.position(coordinate_grid(*features.shape[-2:], ends=True)).flatten(0, 1)
        yield "sa", "encoder_out", attention.input_mlp(attention.input_norm(placed)), SINGLE
    factors = model.encode(image, masks="attention")
    picture, colours, masks = model.layers(factors)
    for name, ours in dict(slots=factors.codes, recon_img=picture, recons=colours, masks=masks[:, :, None]).items(): yield "sa", name, ours.detach(), SINGLE
    loss = model({"image": image})["loss"]
    loss.backward()
    yield "sa", "loss", loss.detach(), SINGLE
    yield "sa", "grad_init_latents", model.slot_attention.slot_mean.grad, CHAIN
    yield "sa", "grad_conv0", model.encoder.layers[0].weight.grad, CHAIN


def check_pos_grid(r: Recorded):
    h, w = r.array("pos_grid", "grid").shape[1:3]
    yield "pos_grid", "grid", coordinate_grid(h, w, ends=True)[None], SINGLE


def check_resnet_gn(r: Recorded):
    config, image, state = r.json("resnet_gn"), r.given("resnet_gn", "img"), r.weights("resnet_gn")
    n = 4 if config["use_layer4"] else 3
    encoder = ResNetEncoder(image.shape[-1], config["layers"][:n], dilate=config["replace_stride_with_dilation"])
    reading.load_strict(encoder, convert.convert_resnet(state), "resnet_gn")
    with torch.no_grad(): yield "resnet_gn", "feat", encoder(image), SINGLE


def check_dino_encoder(r: Recorded):
    config, pixels = r.json("dino_encoder"), r.given("dino_encoder", "img_u8")
    vit = dict(config.items())
    encoder = build_encoder(dict(kind="vit", vit_config=vit, image_size=pixels.shape[-1]))
    reading.load_strict(encoder, convert.take_encoder(r.weights("dino_encoder")), "dino_encoder")
    yield "dino_encoder", "feat", encoder.eval()((pixels.float() / 255 - 0.5) / 0.5), SINGLE


def check_vqvae(r: Recorded):
    given, config = lambda name: r.given("vqvae", name), r.json("vqvae")
    vq = autoencoders.read_vq(r.weights("vqvae"))
    image, book = given("img"), vq.quantize.embedding.weight
    trained = codebooks.VQAutoencoder(vq.requires_grad_(), beta=config["beta"], legacy=config["legacy"]).eval()
    painted, z, index = trained.reconstruct(image)
    quant, _ = codebooks.quantise(z, book)
    out = trained({"image": image})
    for name, ours in dict(h=z, quant=quant, recon=painted, quant_loss=out["codebook"], recon_loss=out["reconstruction"], l1=(painted - image).abs().mean()).items():
        yield "vqvae", name, ours.detach(), SINGLE
    yield "vqvae", "indices", index, EXACT
    space = codebooks.VQLatents(autoencoders.read_vq(r.weights("vqvae")))
    with torch.no_grad(): yield "vqvae", "quantize_decode", space.vae.decode(space.quantise(space.encode(image)), force_not_quantize=True).sample, SINGLE
    out["loss"].backward()
    yield "vqvae", "grad_embedding", book.grad, CHAIN
    yield "vqvae", "grad_conv_in", vq.encoder.conv_in.weight.grad, CHAIN


def check_dvae(r: Recorded):
    given = lambda name: r.given("dvae", name)
    dvae, image, noise = autoencoders.read_dvae(r.weights("dvae")), given("img"), given("exp_noise")
    with torch.no_grad():
        logits = dvae.logits(image)
        yield "dvae", "logits", logits, SINGLE
        yield "dvae", "tokens", dvae.tokens(image), EXACT
        yield "dvae", "recon_onehot", dvae.decode(dvae.tokens(image)), SINGLE
        for name in r.names("dvae"):
            if m := re.fullmatch(r"z_tau(\d+)", name): yield "dvae", name, codebooks.gumbel_softmax(logits, decimal(m[1]), exp_noise=noise), SINGLE
            if m := re.fullmatch(r"(recon|loss)_(tau(\d+)|hard)", name):
                tau, hard = decimal(m[3]) if m[3] else 1.0, m[2] == "hard"
                ours = dvae.decode(codebooks.gumbel_softmax(logits, tau, exp_noise=noise, hard=hard)) if m[1] == "recon" else dvae({"image": image, "exp_noise": noise, "tau": tau, "hard": hard})["loss"]
                yield "dvae", name, ours, SINGLE


def check_slate(r: Recorded):
    model, image = r.model("slate"), r.given("slate", "img")
    model.zero_grad()
    tokens = model.dvae.tokens(image).flatten(1)
    factors = model.encode(image)
    logits = model.decoder(tokens, factors.codes)
    masks = factors.masks if factors.masks.shape[-1] == image.shape[-1] else F.interpolate(factors.masks, image.shape[-2:], mode="bilinear", align_corners=False)
    for name, ours in dict(slots=factors.codes, attn_masks=masks, pred_logits=logits).items(): yield "slate", name, ours.detach(), SINGLE
    yield "slate", "target_token_id", tokens, EXACT
    loss = model({"image": image})["loss"]
    loss.backward()
    yield "slate", "token_recon_loss", loss.detach(), SINGLE
    yield "slate", "grad_init_latents", model.slot_attention.slot_mean.grad, CHAIN
    yield "slate", "grad_tok_emb", model.decoder.words.weight.grad, CHAIN
    with torch.no_grad():
        words, scores = model.decoder.generate(factors.codes, return_logits=True)
        yield "slate", "gen_tokens", words, EXACT
        yield "slate", "gen_logits", scores, SINGLE
        yield "slate", "gen_img", model.dvae.decode(model.generate(factors)), SINGLE


def check_sa_ldm(r: Recorded):
    given, model = lambda name: r.given("sa_ldm", name), r.model("sa_ldm")
    model.zero_grad()
    image, t, noise, random = given("img"), given("t"), given("noise"), given("slots_random")
    with torch.no_grad():
        factors, x0 = model.encode(image), model.latents.encode(image)
        masks = factors.masks if factors.masks.shape[-1] == image.shape[-1] else F.interpolate(factors.masks, image.shape[-2:], mode="bilinear", align_corners=False)
        x_t = diffusion.noise_at(model.scheduler, x0, noise, t)
        for name, ours in dict(slots=factors.codes, masks=masks, x0=x0, x_t=x_t, pred_random=model.predict(x_t, t, Factors(random))).items(): yield "sa_ldm", name, ours, SINGLE
    codes = factors.codes.clone().requires_grad_()
    pred = model.predict(x_t, t, Factors(codes))
    yield "sa_ldm", "pred", pred.detach(), SINGLE
    kinds = dict(eps="epsilon", x0="sample", v="v_prediction")
    for short, kind in kinds.items():
        target = diffusion.diffusion_target(diffusion.make_scheduler("ddpm", model.scheduler, prediction_type=kind), x0, noise, t)
        loss = diffusion.diffusion_loss(pred, target)
        yield "sa_ldm", f"loss_{short}", loss.detach(), SINGLE
        if short == "v": yield "sa_ldm", "v_target", target, SINGLE
        if short == "eps": yield "sa_ldm", "grad_slots", torch.autograd.grad(loss, codes, retain_graph=True)[0], CHAIN
    loss = model({"image": image, "noise": noise, "timesteps": t})["loss"]
    loss.backward()
    yield "sa_ldm", "train_loss", loss.detach(), SINGLE
    yield "sa_ldm", "grad_init_latents", model.slot_attention.slot_mean.grad, CHAIN
    yield "sa_ldm", "total_grad_norm", torch.stack([p.grad.norm() for p in model.parameters()]).norm(), CHAIN
    model.zero_grad()
    schedule, bar = model.scheduler, model.scheduler.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    betas = schedule.betas.double()
    for name, ours in dict(betas=betas, alphas_bar=bar, posterior_variance=betas * (1 - before) / (1 - bar), posterior_mean_coef1=betas * before.sqrt() / (1 - bar),
                           posterior_mean_coef2=(1 - before) * (1 - betas).sqrt() / (1 - bar)).items(): yield "sa_ldm", name, ours.float(), SINGLE


def check_samplers(r: Recorded):
    given, names, model = lambda name: r.given("samplers", name), r.names("samplers"), r.model("sa_ldm")
    x, factors = given("x_T"), Factors(given("slots"))
    predict = lambda x, t: model.predict(x, t, factors)

    def walk(solver, looks):
        places, guesses = [], []
        note = lambda state: (places.append(state["x"].clone()), guesses.append(state["x0"].clone())) and None
        last = sample(predict, x, solver, looks, callback=note)
        return last, places, guesses

    def dpm(codes, name, looks, kind):
        "Arrays of the single-step solver: every outer step or the last, where it was recorded so with a picture"
        schedule = diffusion.make_scheduler(
            "ddpm",
            model.scheduler,
            prediction_type={"_x0pred": "sample", "_vpred": "v_prediction"}.get(kind, "epsilon"),
        )
        last, places, _ = walk(solvers.SinglestepSolver(schedule, project=codes), looks)
        ends = torch.tensor(solvers.step_orders(looks)).cumsum(0) - 1
        out = {name: torch.stack(places)[ends] if kind == "_steps" else last}
        if kind == "_steps" and codes and f"decoded_dpm{looks}_vq" in names:
            out[f"decoded_dpm{looks}_vq"] = decode(model, codes(last))
        return out

    def ddim(codes, name, looks):
        _, places, guesses = walk(solvers.CodebookDDIM(model.scheduler, project=codes), looks)
        return {name: torch.stack(places), name.replace("_steps", "_x0"): torch.stack(guesses)}

    for name in names:
        if m := re.fullmatch(r"dpm(\d+)_(vq|novq)(_steps|_x0pred|_vpred)?", name):
            yield from settled(
                r,
                partial(dpm, name=name, looks=int(m[1]), kind=m[3]),
                model.latents if m[2] == "vq" else None,
            )
        if m := re.fullmatch(r"dpm(\d+)_(times|orders)", name):
            orders = torch.tensor(solvers.step_orders(int(m[1])))
            grid = torch.linspace(1, 1 / model.scheduler.config.num_train_timesteps, int(m[1]) + 1)
            yield (
                "samplers",
                name,
                orders if m[2] == "orders" else grid[F.pad(orders.cumsum(0), (1, 0))],
                EXACT if m[2] == "orders" else SINGLE,
            )
        if m := re.fullmatch(r"ddim(\d+)_(vq|novq)_steps", name):
            yield from settled(
                r, partial(ddim, name=name, looks=int(m[1])), model.latents if m[2] == "vq" else None
            )
        if m := re.fullmatch(r"ddim(\d+)_timesteps", name):
            planned = solvers.CodebookDDIM(model.scheduler)
            planned.set_timesteps(int(m[1]))
            yield "samplers", name, planned.timesteps.flip(0), EXACT
        if m := re.fullmatch(r"ddpm_t(\d+)", name):
            noise = r.given("samplers", "ddpm_noise")
            t = torch.tensor(int(m[1]))
            with torch.no_grad():
                answer = predict(x, t.expand(len(x)))
            yield "samplers", name, ancestral(model.scheduler, answer, t, x, noise), SAMPLER
    clock, t = solvers.ContinuousTime(model.scheduler), given("sched_t")
    lamb = clock.lambda_(t)
    for name, ours in dict(log_alpha=clock.log_alpha(t), inv=clock.time_of(lamb)).items():
        yield "samplers", f"sched_{name}", ours.float(), SINGLE
    yield "samplers", "sched_lambda", lamb.float(), SINGLE


def decode(model, codes):
    with torch.no_grad():
        return model.latents.vae.decode(
            codes / model.latents.vae.config.scaling_factor, force_not_quantize=True
        ).sample


# Two codes can be so nearly equally near that the last bits of the network's answer decide, and then everything after
# that place is another picture (the page of the solvers shows it). Nothing is excused for that: the recording must match
# as a whole, but where float32 cannot tell two codes apart it may have taken either.

NEAR = 2e-5  # error of an answer, per unit of size
DRAWS, TURNS = 32, 4  # draws that are tried; codes that may have fallen the other way


class Codes:
    "Projection onto the codebook; notes near-ties in `ties`, as (look, place), and takes the second code where `turned`"

    def __init__(self, space, turned: frozenset = frozenset()):
        self.space, self.turned, self.look, self.ties = space, turned, 0, {}

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        out, book, scale = (
            self.space.quantise(z).clone(),
            self.space.vae.quantize.embedding.weight.double(),
            self.space.vae.config.scaling_factor,
        )
        flat, places = (z / scale).movedim(1, -1).flatten(0, -2).double(), out.movedim(1, -1)
        distance, index = torch.cdist(flat, book).topk(2, largest=False)
        apart = (book[index[:, 1]] - book[index[:, 0]]).norm(dim=1)
        margin = (distance[:, 1].square() - distance[:, 0].square()) / (
            2 * apart
        )  # from the plane between the two codes
        doubt = (
            NEAR * (1 + flat.norm(dim=1)) + 4 * torch.finfo(torch.float32).eps * flat.square().sum(1) / apart
        )
        self.ties |= {
            (self.look, i): (margin[i] / doubt[i]).item()
            for i in (margin < doubt).nonzero().flatten().tolist()
        }
        chosen = codebooks.nearest_codes(z / scale, book.to(z.dtype)).flatten()
        for look, i in self.turned:
            if look != self.look:
                continue
            other = index[i, 0] if chosen[i] == index[i, 1] else index[i, 1]
            places[tuple(int(n) for n in np.unravel_index(i, places.shape[:-1]))] = (book[other] * scale).to(
                z.dtype
            )
        self.look += 1
        return out


def outcomes(draw, space):
    "What a sampler can draw and the ties that fell the other way: first none, then one after the other, tightest first"
    waiting = [frozenset()]
    for _ in range(DRAWS):
        if not waiting:
            return
        turned = waiting.pop(0)
        codes = Codes(space, turned)
        yield draw(codes), turned
        later = [tie for tie in sorted(codes.ties, key=codes.ties.get) if tie > max(turned, default=(-1, -1))]
        if len(turned) < TURNS:
            waiting += [turned | {tie} for tie in later]


def settled(r: Recorded, draw, space=None):
    "Comparisons of what a sampler draws; with a codebook the outcome that is recorded as a whole, else the plain one"
    if space is None:
        plain, turned = draw(None), frozenset()
    else:
        matching = (
            found
            for found in outcomes(draw, space)
            if all(matches(v, r.read("samplers", n)) for n, v in found[0].items())
        )
        plain, turned = next(matching, None) or next(outcomes(draw, space))
    if turned:
        warnings.warn(
            f"{', '.join(plain)}: as recorded where {len(turned)} near-ties between two codes fall the other way, "
            f"(call, place) {sorted(turned)}",
            stacklevel=2,
        )
    for name, ours in plain.items():
        yield "samplers", name, ours, SAMPLER


def matches(ours: torch.Tensor, recorded: torch.Tensor) -> bool:
    return ours.shape == recorded.shape and torch.allclose(ours, recorded, *SAMPLER)


def ancestral(scheduler, answer, t, x, noise):
    "One step of the DDPM scheduler with its noise given"
    from diffusers.schedulers import scheduling_ddpm
    original, scheduling_ddpm.randn_tensor = scheduling_ddpm.randn_tensor, lambda *a, **k: noise
    try: return scheduler.step(answer, t, x).prev_sample
    finally: scheduling_ddpm.randn_tensor = original


def check_ema(r: Recorded):
    "The averaging of the trainer (diffusers' `EMAModel`) follows the same rule, one step later: begun one step early it is the official one"
    steps = r.given("ema", "weights")
    weight = torch.nn.Parameter(steps[0].clone())
    ema, seen = EMAModel([weight], decay=0.9999), []
    ema.optimization_step = 1
    for value in steps[1:]:
        weight.data.copy_(value)
        ema.step([weight])
        seen.append(ema.shadow_params[0].clone())
    yield "ema", "ema", torch.stack(seen), SINGLE
    yield "ema", "num_updates", torch.tensor(len(seen), dtype=torch.int32), EXACT


def check_lr_schedule(r: Recorded):
    total = int(r.given("lr_schedule", "total_steps"))
    settings = (r.folder / "README.md").read_text()
    for name, default in (("lr", (0.05, 0.0)), ("lr_single", (0.025, 0.01))):
        line = re.search(rf"^\| {name} \|.*$", settings, re.M)[0]
        fraction = re.search(r"warm-up ([\d.]+) ?%", line)
        warmup = total * (float(fraction[1]) / 100 if fraction else default[0])
        recorded = r.array("lr_schedule", name)
        peaks = [float(p) for p in re.search(r"max ([\d.e/ -]+?)[,)]", line)[1].split("/")] if "max" in line else []
        peaks = peaks * (recorded.shape[1] // len(peaks))
        ours = [[published_rate(s, total, warmup, p, p * default[1]) for p in peaks] for s in range(len(recorded))]
        yield "lr_schedule", name, torch.tensor(ours, dtype=torch.float64), (1e-6, 1e-12)


def check_gumbel_tau(r: Recorded):
    line = re.search(r"cosine_anneal\(step, ?([\d.]+), ?([\d.]+), ?(\d+), ?(\d+)\)", (r.folder / "README.md").read_text())
    start, end, first, last = float(line[1]), float(line[2]), int(line[3]), int(line[4])
    yield "gumbel_tau", "tau", torch.tensor([codebooks.cosine_cooling(s, start, end, first, last) for s in r.given("gumbel_tau", "step").tolist()], dtype=torch.float64), (1e-9, 1e-12)


def check_slot_mixing(r: Recorded):
    factors = Factors(r.given("slot_mixing", "slots"))
    yield "slot_mixing", "mixed_ideal", mix_slots(factors).codes, EXACT
    yield "slot_mixing", "mixed_official", mix_slots(factors, official=True).codes, EXACT


def official_scores(true, pred, overlap=None) -> dict[str, torch.Tensor]:
    "The official conventions in terms of our tables: overlap pixels are background, and a cluster of their own; what is empty counts as 1 (FG-ARI) or not at all"
    b = len(true)
    true, pred = (x.reshape(b, 1, -1) for x in (true, pred))
    if overlap is not None:
        over = overlap.reshape(b, 1, -1) > 0
        true, pred = true.masked_fill(over, 0), torch.where(over, pred.amax((1, 2), keepdim=True) + 1, pred)
    table = segmentation.contingency(true, pred)
    fg, there = table[:, 1:], table.sum(2) > 0
    iou = segmentation.iou_of_table(table)
    objects = there.clone()
    objects[:, 0] = False

    def matched(rows):
        column = segmentation.match(iou, rows)
        values = torch.where(column < 0, 0.0, iou.gather(2, column.clamp(min=0)[..., None])[..., 0])
        return torch.where(rows, values, 0.0).sum(1) / rows.sum(1)
    return dict(ari=segmentation.ari_of_table(table), fari=segmentation.ari_of_table(fg, empty=1.0), miou=matched(there), fmiou=matched(objects),
                mbo=torch.where(objects, iou.amax(2), 0.0).sum(1) / objects.sum(1))


def check_metrics(r: Recorded):
    given = lambda name: r.given("metrics", name)
    true, pred, overlap = given("gt"), given("pred"), given("overlap")
    for ending, scores in (("", official_scores(true, pred)), ("_overlap", official_scores(true, pred, overlap))):
        for name, ours in scores.items():
            yield "metrics", f"{name}{ending}", ours, SINGLE
            if not ending: yield "metrics", f"{name}_batch", ours.nanmean(), SINGLE
    for name, ours in official_scores(given("gt_video"), given("pred_video")).items(): yield "metrics", f"video_{name}", ours, SINGLE
    a, b = given("img_a"), given("img_b")
    a1, b1 = a * 2 - 1, b * 2 - 1
    yield "metrics", "img_mse", (a - b).square().flatten(1).sum(1).mean(), SINGLE
    yield "metrics", "img_psnr", generation.psnr(a1, b1).double().mean(), SINGLE
    yield "metrics", "img_ssim", generation.ssim(a1, b1).mean(), SINGLE
    yield "metrics", "ids_out", renumbered(given("ids_in")), EXACT


def renumbered(ids):
    "0 … n−1 in ascending order over the whole tensor"
    return torch.searchsorted(ids.unique(), ids)


CHECKS = {name[len("check_"):]: f for name, f in list(globals().items()) if name.startswith("check_")}


# --- helpers ---------------------------------------------------------------------------------------------------------------------------------------

def decimal(digits: str) -> float: return float(f"{digits[0]}.{digits[1:]}") if len(digits) > 1 else float(digits)


finished = once(CHECKS.get, Recorded)


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group", CHECKS)
def test_matches_official(group, golden):
    comparisons, _ = finished(group, golden("slotdiffusion"))
    assert comparisons


def test_every_array_is_compared(golden):
    "No array of any image file is left out: it is compared, or it is an input on which compared arrays depend"
    inputs = inputs_of_all(finished, CHECKS, golden("slotdiffusion"), Recorded, "npz", VIDEO)
    assert not any(name.startswith(("grad", "loss_", "pred_", "dpm", "recon", "gen_")) for _, name in inputs - {("slot_attention", "loss_weight"), ("metrics", "pred_video")}), inputs


@pytest.mark.parametrize("group", CHECKS)
def test_altered_expectation_fails(group, golden):
    every_alteration_fails(finished(group, golden("slotdiffusion"))[0], golden("slotdiffusion"), Recorded)


@pytest.mark.parametrize("group", ["slot_attention", "resnet_gn", "dvae", "slot_mixing", "gumbel_tau", "metrics"])
def test_altered_file_fails(group, golden):
    "The same through the whole check: the first array that is compared and no input too, altered as it is read from the file"
    folder = golden("slotdiffusion")
    made, used = finished(group, folder)
    file, name = next((file, name) for file, name, *_ in made if (file, name) not in used)
    with pytest.raises(AssertionError, match=re.escape(f"{file}/{name}")): run(CHECKS[group], Recorded(folder, altered=(file, name)))


# --- near-ties between two codes ----------------------------------------------------------------------------

def test_a_near_tie_may_have_fallen_either_way(golden, monkeypatch):
    "A recording with the second of two almost equal codes is recognised; with a number wrong or no near-tie it is not"
    r = Recorded(golden("slotdiffusion"))
    model, x, factors = r.model("sa_ldm"), r.read("samplers", "x_T"), Factors(r.read("samplers", "slots"))

    def draw(codes):
        return {
            "dpm5_vq": sample(
                lambda x, t: model.predict(x, t, factors),
                x,
                solvers.SinglestepSolver(model.scheduler, project=codes),
                5,
            )
        }

    draw = torch.no_grad()(draw)
    plain, wide = draw(Codes(model.latents))["dpm5_vq"], 100 * NEAR
    assert torch.equal(plain, draw(model.latents.quantise)["dpm5_vq"])  # who looks for ties changes nothing
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "NEAR", wide)
        codes = Codes(model.latents)
        draw(codes)
    tie = min(codes.ties, key=lambda k: (-k[0], codes.ties[k]))  # late, so that it is seen in the end
    enough = 2 + sorted(codes.ties, key=codes.ties.get).index(tie)
    other = draw(Codes(model.latents, frozenset({tie})))["dpm5_vq"]
    spoilt = other.clone()
    spoilt[0, 0, 0, 0] += 0.01
    assert not matches(plain, other)
    for recording, near, fine in ((other, wide, True), (other, 0.0, False), (spoilt, wide, False)):
        told = Recorded(r.folder)
        told.files["samplers"] = {"dpm5_vq": recording}
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            patch.setitem(globals(), "NEAR", near)
            patch.setitem(globals(), "DRAWS", enough)
            ((*_, ours, _),) = settled(told, draw, model.latents)
        assert matches(ours, recording) == fine and torch.equal(ours, other if fine else plain)
        assert (
            any("fall the other way" in str(w.message) and str(tie) in str(w.message) for w in said) == fine
        )


# --- checkpoints: strict, safe, complete -----------------------------------------------------------------------------------------------------------

def test_models_are_recognised(golden, tmp_path):
    folder = golden("slotdiffusion")
    kinds = {name: type(convert.load_official_slots(official_file(folder, name, tmp_path), **({"image_size": Recorded(folder).json(name)["resolution"][0]} if name in ("sa", "slate", "sa_ldm") else {}))).__name__
             for name in ("sa", "slate", "sa_ldm", "vqvae", "dvae")}
    assert kinds == dict(sa="SlotAttentionAE", slate="SLATE", sa_ldm="SlotDiffusion", vqvae="VQModel", dvae="DVAE")


@pytest.mark.parametrize("damage, complaint", [
    (lambda s: {k: v for k, v in s.items() if k != "slot_attention.gru.bias_hh"}, "missing: slot_attention.gru.bias_hh"),
    (lambda s: s | {"something.else": torch.zeros(2)}, "left over: something.else"),
    (lambda s: s | {"slot_attention.gru.bias_hh": torch.zeros(3)}, "another shape"),
    (lambda s: s | {"encoder_pos_embedding.grid": s["encoder_pos_embedding.grid"].flip(-1)}, "other positions"),
    (lambda s: s | {"predictor.x": torch.zeros(1)}, "left over: predictor.x"),
    (lambda s: s | {"rollouter.x": torch.zeros(1)}, "SlotFormer"),
    (lambda s: s | {"note": "text"}, "hold no tensors"),
    (lambda s: {"w": torch.zeros(1)}, "no model of this family"),
])
def test_damaged_checkpoints_are_refused(golden, tmp_path, damage, complaint):
    folder = golden("slotdiffusion")
    state = torch.load(official_file(folder, "sa", scratch()), weights_only=True)
    torch.save(damage(state), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=complaint): convert.load_official_slots(tmp_path / "bad.pth", image_size=Recorded(folder).json("sa")["resolution"][0])


def test_nothing_is_unpickled(tmp_path):
    torch.save({"init_latents": torch.zeros(1, 2, 3), "where": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="refused"): convert.load_official_slots(tmp_path / "bad.pth")
    with pytest.raises(FileNotFoundError): convert.load_official_slots(tmp_path / "nowhere.pth")


def test_a_folder_keeps_the_autoencoder_with_the_model(golden, tmp_path):
    from decomp_nb.decomposer import load_decomposer
    from decomp_nb.methods.slate import SLATE
    from decomp_nb.methods.slot_diffusion import SlotDiffusion
    folder = golden("slotdiffusion")
    for name, cls in (("sa_ldm", SlotDiffusion), ("slate", SLATE)):
        model = Recorded(folder).model(name)
        again = cls.from_pretrained(reading.keep_with(model, tmp_path / name)).eval()
        codes = Factors(torch.randn(1, *model.slot_attention.slot_mean.shape[1:], generator=torch.Generator().manual_seed(0)))
        options = dict(steps=3, noise=torch.randn(1, *model.latent_shape)) if name == "sa_ldm" else {}
        torch.testing.assert_close(again.decode(codes, **options), model.decode(codes, **options))
    assert load_decomposer is not None
