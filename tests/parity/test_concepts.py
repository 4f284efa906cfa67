"""Concepts against arrays recorded from the official code (main.py, compose_models.py, daam_ddim_visualize.py, eval.py and the daam package).

Each check reads what it is `given` (noise, times, sentences), computes everything else and compares it array by array. Cases, sizes, words, flags and schedules come
from the files, so another set of the same layout passes unchanged; cases that are not there are not asked for.
"""
import copy
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from recorded import Recorded as Arrays
from recorded import close, every_alteration_fails, keys_of, once, run

from decomp_nb.components.pipelines import open_foundation
from decomp_nb.components.words import noise_per_concept
from decomp_nb.decomposer import sample
from decomp_nb.methods.concept_drawing import compose, recipe_factors
from decomp_nb.methods.concepts import Concepts, sample_prompts
from decomp_nb.metrics import concepts as metrics
from decomp_nb.official.concepts import (
    load_official_concepts,
    official_arguments,
    official_ddim,
    official_plan,
    read_official,
    save_concepts,
)
from decomp_nb.viz import attribution

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

# absolute tolerances of the data's README: single evaluations, compositions, weights after steps, sampling, attention maps
SINGLE, COMPOSED, WEIGHTS, CHAIN, MAPS = 1e-5, 1e-4, 2e-4, 5e-4, 1e-6


class Recorded(Arrays):
    "The arrays of the folder, and the pipeline beside them"
    @property
    def pipeline(self) -> str: return str(self.folder / "pipeline")


@cache
def foundation(folder: str): return open_foundation(folder)


# --- training ----------------------------------------------------------------------------------------------------------------------------------------

def sentence_of(ids, tokenizer, first: int) -> str:
    "Token numbers → the sentence, `{}` in the place of the new word"
    inside = [i for i in ids.tolist() if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    while inside and inside[-1] == tokenizer.pad_token_id: inside.pop()
    return "".join("{} " if i >= first else tokenizer.convert_ids_to_tokens(i).replace("</w>", " ") for i in inside).strip()


def micro_batches(r, case): return sorted({name.split("/")[0] for name in r.names(case) if re.match(r"m\d+/", name)})


def trained_case(r, case):
    "Model, flags, and what each micro-batch saw"
    flags = r.json(case)["effective_args"]
    arguments = official_arguments(flags)
    first = len(foundation(r.pipeline).tokenizers[0])
    ids = {m: r.given(case, f"{m}/input_ids") for m in micro_batches(r, case)}
    tokenizer = foundation(r.pipeline).tokenizers[0]
    said = {m: [[sentence_of(row, tokenizer, first) for row in rows] for rows in v] for m, v in ids.items()}
    templates = sorted({s for v in said.values() for rows in v for s in rows})
    n = len(r.array(case, "m00/weights_before"))
    model = Concepts(r.pipeline, n, templates=templates, **arguments).train()
    with torch.no_grad():
        model.codes.copy_(r.given(case, "placeholder_rows_init"))
        model.raw_weights.copy_(r.given(case, "m00/weights_before").flatten(1))
    return model, flags, {m: torch.tensor([[templates.index(s) for s in row] for row in v]) for m, v in said.items()}


def call_order(r, case, model):
    "Which of our answers (words 0 … M−1, nothing M) each recorded call of the UNet is"
    first = r.given(case, "placeholder_token_ids").tolist()
    calls = r.given(case, "m00/unet_call_order_ids")
    return [next((k for k, word in enumerate(first) if word in ids.tolist()), len(first)) for ids in calls]


def batch_of(r, case, m, template):
    put = lambda name: r.given(case, f"{m}/{name}")
    x0, noise, t = put("latents"), put("noise"), put("timesteps")
    if t.ndim == 2: x0, noise, t = x0.transpose(0, 1), noise.transpose(0, 1), t.T
    return {"x0": x0, "noise": noise, "timesteps": t, "index": put("weight_id"), "template": template}


def check_first_batch(r, case, model, batch, template, order):
    "Pictures, latents, noisy latents and sentences of the first micro-batch"
    from PIL import Image
    base, name = model.base, lambda what: f"m00/{what}"
    ours = []
    for path, recorded in zip(r.json(case)["image_paths"][0], r.array(case, name("pixel_values"))):
        size = recorded.shape[-1]
        picture = Image.open(r.folder / "images" / Path(*Path(path).parts[1:])).convert("RGB").resize((size, size), Image.BICUBIC)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        ours.append(min((x, x.flip(-1)), key=lambda v: (v - recorded).abs().max()))  # the official loop flips at random
    yield name("pixel_values"), torch.stack(ours), SINGLE
    mean, logvar = base.latents.moments(r.given(case, name("pixel_values")))
    yield name("vae_posterior_mean"), mean, SINGLE
    yield name("vae_posterior_std"), (0.5 * logvar).exp(), SINGLE
    drawn = (r.given(case, name("latents")) / base.latents.vae.config.scaling_factor - mean) / (0.5 * logvar).exp()
    assert drawn.abs().max() < 8  # a posterior sample: the noise that it was drawn with
    views = drawn if drawn.ndim == 5 else drawn[None]
    again = torch.stack([base.latents.from_batch({"image": r.given(case, name("pixel_values")), "latent_noise": v}) for v in views])
    yield name("latents"), again if drawn.ndim == 5 else again[0], SINGLE
    flat = [batch[k].flatten(0, 1) if batch["timesteps"].ndim == 2 else batch[k] for k in ("x0", "noise", "timesteps")]
    noisy, recorded = base.noise_at(*flat), r.array(case, name("noisy_latents"))
    if batch["timesteps"].ndim == 2:
        noisy = noisy.unflatten(0, batch["timesteps"].shape).transpose(0, 1)
        noisy = noisy if recorded.ndim == 5 else noisy[0]
    yield name("noisy_latents"), noisy, SINGLE
    told, rows = sample_prompts(model, len(batch["index"]), template)
    yield name("text_hidden"), told.states[rows[0].roll(-1)[order]].detach(), SINGLE


def other_rows(base) -> torch.Tensor: return base.tables[0].table.weight


def check_training(r, case):
    model, flags, templates = trained_case(r, case)
    base, settings = model.base, r.json(case)
    order, learns_words = call_order(r, case, model), not flags["test"]
    yield "placeholder_token_ids", base.tables[0].first + torch.arange(model.n_factors), SINGLE
    told = {k: settings["argv"][settings["argv"].index(f"--{k}") + 1] if f"--{k}" in settings["argv"] else None for k in ("learning_rate", "max_train_steps", "num_train_epochs")}
    plan = official_plan(len(model.raw_weights), iters_per_image=flags["num_iters_per_image"], batch_size=flags["train_batch_size"], accumulation=flags["gradient_accumulation_steps"],
                         learning_rate=float(told["learning_rate"] or 1e-4), max_steps_given=told["max_train_steps"] is not None, epochs=int(told["num_train_epochs"] or 100))
    yield "learning_rate_effective", torch.tensor(plan["learning_rate"], dtype=torch.float64), 1e-9
    yield "max_train_steps_effective", torch.tensor(plan["steps"]), SINGLE
    yield "num_micro_batches", torch.tensor(plan["micro_batches"]), SINGLE
    model.codes.requires_grad_(learns_words)
    model.raw_weights.requires_grad_(not flags["freeze_weights"])
    other_rows(base).requires_grad_(learns_words)  # only to compare what official code has to mask
    if learns_words: base.null = lambda: base.encode([""])  # official code lets the gradient into the empty prompt, too
    before = other_rows(base).detach().clone()
    kwargs = dict(settings["optimizer_kwargs"])
    optimiser = torch.optim.AdamW([p for p in (model.codes, model.raw_weights) if p.requires_grad], **kwargs)
    accumulation = flags["gradient_accumulation_steps"]
    lengths = dict(num_warmup_steps=flags["lr_warmup_steps"], num_training_steps=plan["steps"])
    rate = get_scheduler(flags["lr_scheduler"], optimiser, **{name: n * accumulation for name, n in lengths.items()})
    column = lambda w: w.detach().clone()[:, :, None, None, None]
    for number, m in enumerate(micro_batches(r, case)):
        name, sync = lambda what, m=m: f"{m}/{what}", plan["sync"][number]
        batch = batch_of(r, case, m, templates[m])
        yield name("input_ids"), tokens_again(model, templates[m], base), SINGLE
        yield name("sync_gradients"), torch.tensor(sync), SINGLE
        yield name("weights_before"), column(model.raw_weights), WEIGHTS
        if learns_words: yield name("placeholder_rows_before"), model.codes.detach().clone(), COMPOSED
        out = model(batch)
        answers = out["answers"].transpose(0, 1).roll(-1, 0)[order]
        if number == 0:
            yield from check_first_batch(r, case, model, batch, templates[m], order)
            yield name("unet_out"), answers, SINGLE
        else: yield name("unet_out_sum"), answers.double().sum((1, 2, 3, 4)), 5e-3
        yield name("composed_score"), out["composed"], COMPOSED
        yield name("mse_loss"), out["mse"], SINGLE
        yield name("loss"), out["loss"].detach(), SINGLE
        (out["loss"] / accumulation).backward()
        if model.raw_weights.requires_grad: yield name("weights_grad_accum"), column(model.raw_weights.grad), COMPOSED * r.array(case, name("weights_grad_accum")).abs().max().item()
        if learns_words:
            yield name("placeholder_rows_grad_accum"), model.codes.grad.clone(), COMPOSED * r.array(case, name("placeholder_rows_grad_accum")).abs().max().item()
            yield name("other_rows_grad_absmax"), other_rows(base).grad.abs().max(), COMPOSED * r.array(case, name("other_rows_grad_absmax")).abs().item()
            other_rows(base).grad = None
        if sync:
            optimiser.step()
            optimiser.zero_grad()
        rate.step()
    yield "weights_final", column(model.raw_weights), WEIGHTS
    if learns_words:
        yield "placeholder_rows_final", model.codes.detach(), COMPOSED
        yield "other_rows_changed_absmax", (other_rows(base).detach() - before).abs().max(), 0.0


def tokens_again(model, template, base):
    "The sentences as we tokenise them, `(b,M,n)`"
    texts = [[model.templates[i].format(word) for i, word in zip(row, model.tokens)] for row in template.tolist()]
    return torch.stack([base.tokenise(row)[0] for row in texts])


# --- sampling ----------------------------------------------------------------------------------------------------------------------------------------

def model_of_files(r) -> Concepts:
    "The words that the recorded run of `train_conj` ended with"
    rows = r.given("train_conj", "placeholder_rows_final")
    model = Concepts(r.pipeline, 0, r.json("train_conj")["effective_args"]["placeholder_tokens"].split(","), templates="word",
                     image_size=r.json("train_conj")["effective_args"]["resolution"]).eval()
    with torch.no_grad(): model.codes.copy_(rows)
    return model


@torch.no_grad()
def check_compose(r, case):
    model, texts = model_of_files(r), r.json("compose_ddim")["prompts"]
    scales, noise = r.given(case, "scales").tolist(), r.given(case, "initial_latents")
    steps = len(r.array(case, "timesteps"))
    ladder = model.sampler
    ladder.set_timesteps(steps)
    yield "timesteps", ladder.timesteps, SINGLE
    told, strengths = recipe_factors(model, dict(zip(texts, scales)))
    assert strengths.tolist()[0] == pytest.approx(scales)
    answers = noise_per_concept(model, told, noise, ladder.timesteps[:1].expand(len(noise)))
    yield "unet_out_step0", torch.stack([torch.cat([answers[:, 0], answers[:, 1 + k]]) for k in range(len(texts))]), SINGLE
    seen, after = [], []
    original = model.base.predict

    def watched(x, t, prompts):
        answers = original(x, t, prompts)
        x, each = (v.unflatten(0, (len(noise), -1)) for v in (x, answers))
        seen.append((x[:, 0].clone(), (each[:, 0], each[:, 1:])))
        return answers
    model.base.predict = watched
    drawn = compose(model, dict(zip(texts, scales)), noise=noise, steps=steps, scheduler=official_ddim(model.base), callback=lambda state: after.append(state["x"].clone()))
    yield "latents_before", torch.stack([x for x, _ in seen]), CHAIN
    yield "latents_after", torch.stack(after), CHAIN
    w = torch.tensor(scales)[None, :, None, None, None]
    yield "composed_noise_pred", torch.stack([n + (w * (s - n[:, None])).sum(1) for _, (n, s) in seen]), CHAIN
    yield "final_image_float", (drawn / 2 + 0.5).permute(0, 2, 3, 1), CHAIN


@torch.no_grad()
def check_inversion(r, case):
    from PIL import Image
    model, info = model_of_files(r), r.json("compose_ddim")
    image, steps, scale = r.given(case, "image"), int(r.given(case, "num_inference_steps")), float(r.given(case, "guidance_scale"))
    picture = Image.open(r.folder / "images" / Path(*Path(info["ddim_image"]).parts[1:])).convert("RGB")
    size = min(picture.size)
    left, top = ((s - size) // 2 for s in picture.size)
    picture = picture.crop((left, top, left + size, top + size)).resize((image.shape[-1], image.shape[-2]), Image.BILINEAR)
    yield "image", torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1, SINGLE
    mean, logvar = model.latents.moments(image)
    z = (r.given(case, "image_latents") / model.latents.vae.config.scaling_factor - mean) / (0.5 * logvar).exp()
    assert z.abs().max() < 8
    x0 = model.latents.encode(image, z)
    yield "image_latents", x0, SINGLE
    told = model.base.encode([info["ddim_prompt"]], model.codes)
    yield "text_embeddings", told.states, SINGLE
    seen = []

    def predict(x, t):
        seen.append((int(t[0]), x.clone()))
        cond = model.base.predict(x, t, told)
        if scale == 1 or len(seen) <= steps: return cond
        null = model.base.predict(x, t, model.base.null())
        return null + scale * (cond - null)
    inverted = model.base.invert(predict, x0, steps)
    yield "inversion_timesteps", torch.tensor([t for t, _ in seen]), SINGLE
    yield "inversion_latents_before", torch.stack([x for _, x in seen]), CHAIN
    yield "inverted_latents", inverted, CHAIN
    drawn = sample(predict, inverted, model.sampler, steps)
    yield "reconstruction_timesteps", torch.tensor([t for t, _ in seen[steps:]]), SINGLE
    yield "reconstruction_latents_before", torch.stack([x for _, x in seen[steps:]]), CHAIN
    yield "reconstructed_latents", drawn, CHAIN
    yield "reconstructed_image", model.latents.vae.decode(drawn / model.latents.vae.config.scaling_factor).sample, CHAIN


# --- attribution -------------------------------------------------------------------------------------------------------------------------------------

def check_daam_given(r, case):
    "Maps made from attention probabilities that the file gives"
    info = r.json("daam")
    record = attribution.AttentionMaps()
    for name in (n for n in r.names(case) if n.startswith("attn/")):
        layer = int(re.search(r"layer(\d+)", name)[1])
        record.add(layer, r.given(case, name).float(), images=1, guided=True)
    n, size = len(info["tokens"]) + 2, round(info["latent_hw"] ** 0.5)
    options = dict(size=size, exact=True)
    whole = record.maps(**options)[0, :n]
    yield "global_maps", whole, MAPS
    yield "global_maps_normalized", attribution.normalised(whole[None])[0], MAPS
    yield "global_layer0", record.maps(layers=[0], **options)[0, :n], MAPS
    yield "global_head0", record.maps(heads=[0], **options)[0, :n], MAPS
    yield "global_factor2", record.maps(factors=[2], **options)[0, :n], MAPS
    model = model_of_files(r)
    width, height = info["image_size_WH"]
    for which in ("keyword", "second"):
        places = attribution.token_places(model.base, info["prompt"], info[which])
        assert places == info[f"merge_indices_{which}"]
        word = whole[places].mean(0)
        yield f"word_map_{which}", word, MAPS
        if which == "keyword":  # the official package writes width before height
            yield "expanded_keyword", attribution.expand(word[None], (width, height))[0], MAPS
            yield "expanded_absolute", attribution.expand(word[None], (width, height), absolute=True)[0], MAPS
            yield "expanded_threshold_0p4", (attribution.expand(word[None], (width, height)) > 0.4)[0].float(), MAPS


@torch.no_grad()
def check_daam_trace(r, case):
    "Maps of a whole generation, hooked into the UNet"
    info, model = r.json("daam"), model_of_files(r)
    trace, noise = info["trace"], r.given(case, "initial_latents")
    told = model.base.null().cat(model.base.encode([info["prompt"]], model.codes))
    scale = trace["guidance_scale"]

    def predict(x, t):
        null, cond = model.base.predict(torch.cat([x, x]), torch.cat([t, t]), told).chunk(2)
        return null + scale * (cond - null)
    with attribution.record_attention(model.base, guided=True) as record: x = sample(predict, noise, official_ddim(model.base), trace["num_inference_steps"])
    yield "image", (model.latents.decode(x) / 2 + 0.5).permute(0, 2, 3, 1), CHAIN
    shown = r.array(case, "global_maps")
    n = len(info["tokens"]) + 2
    maps = record.maps(size=shown.shape[-1], exact=True)[0]
    yield "global_maps", maps[:len(shown)], MAPS
    yield "word_map", maps[attribution.token_places(model.base, info["prompt"], info["keyword"])].mean(0), MAPS
    for name in (m for m in r.names(case) if m.startswith("raw/")):
        layer, head = map(int, re.search(r"layer(\d+)_head(\d+)", name).groups())
        yield name, record.sums[layer][0, head, :n], SINGLE


# --- evaluation --------------------------------------------------------------------------------------------------------------------------------------

def check_eval(r, case):
    info = r.json(case)
    scores = {"clip": metrics.clip_scores(r.given(case, "clip_image_features"), r.given(case, "clip_text_features")), "resnet": r.given(case, "resnet_logits_targets")}
    assert sorted(r.given(case, "resnet_target_indices").tolist()) == info["resnet"]["target_labels_sorted"]
    for kind, s in scores.items():
        said, q = info[kind], metrics.class_shares(s, epsilon=1e-8 if kind == "resnet" else 0.0)
        close(q.float(), torch.tensor(said["q"][0]), 1e-6, f"{kind} q")
        assert f"{100 * metrics.threshold_accuracy(s, said['threshold']):.2f}" == said["printed_acc_percent"], kind
        kl = metrics.official_kl(q)
        assert kl == pytest.approx(said["kl"], abs=1e-6) and f"{kl:.4f}" == said["printed_kl"].replace("Infinity", "inf"), kind
        assert said["p"][0] == pytest.approx([1 / s.shape[1]] * s.shape[1])


KINDS = {"compose": check_compose, "ddim_inversion": check_inversion, "daam_given_attention": check_daam_given, "daam_trace": check_daam_trace}


def cases(folder: Path) -> list[str]: return sorted(p.stem for p in folder.glob("*.npz") if p.stem != "eval")


def check_of(case: str):
    "Check of a case, with the case before every name"
    return lambda r: ((case, *row) for row in KINDS.get(case, check_training)(r, case))


finished = once(check_of, Recorded)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        from conftest import golden_folder
        metafunc.parametrize("case", cases(golden_folder("concept_discovery")) or ["none"])


# --- the tests -------------------------------------------------------------------------------------------------------------------------------------------

INPUTS = {"input_ids", "weight_id", "noise", "timesteps", "unet_call_order_ids", "latents", "initial_latents", "scales", "num_inference_steps", "guidance_scale", "placeholder_rows_init"}


def test_matches_official(case, golden): assert finished(case, golden("concept_discovery"))[0]


def test_every_array_is_compared(case, golden):
    "No array is left out: it is compared, or it is an input on which compared arrays depend"
    folder = golden("concept_discovery")
    made, used = finished(case, folder)
    compared, given = ({name for file, name in keys if file == case} for keys in (keys_of(made), used))
    everything = set(Recorded(folder).names(case))
    assert everything <= compared | given, f"untouched: {sorted(everything - compared - given)}"
    inputs = {name.split("/")[-1] for name in given - compared if not name.startswith("attn/")}
    assert inputs <= INPUTS, inputs


def test_altered_expectation_fails(case, golden):
    every_alteration_fails(finished(case, golden("concept_discovery"))[0], golden("concept_discovery"), Recorded)


def test_altered_input_fails(golden):
    "Another noise, another time, another starting row: the first losses no longer match"
    folder = golden("concept_discovery")
    case = next(c for c in cases(folder) if c.startswith("train_"))
    for what in ("m00/noise", "m00/timesteps", "placeholder_rows_init", "m00/latents"):
        class Shifted(Recorded):
            def given(self, file, name, what=what):
                value = super().given(file, name)
                return value if name != what else value + 0.1 if value.is_floating_point() else value // 2
        with pytest.raises(AssertionError): run(check_of(case), Shifted(folder))


def test_evaluation_matches_official(golden): check_eval(Recorded(golden("concept_discovery")), "eval")


def test_altered_evaluation_fails(golden):
    folder = golden("concept_discovery")
    for name in ("clip_image_features", "resnet_logits_targets"):
        class Shifted(Recorded):
            def given(self, file, which, name=name): return super().given(file, which) * (1 if which != name else torch.linspace(-2, 2, self.array(file, which).shape[1]))
        with pytest.raises(AssertionError): check_eval(Shifted(folder), "eval")


# --- files -----------------------------------------------------------------------------------------------------------------------------------------------

def test_official_files_are_read_and_written(golden, tmp_path):
    "What an official run wrote is what its arrays say, and what we write again is the same"
    r = Recorded(golden("concept_discovery"))
    folder, rows, weights = r.folder / "official_artifacts", r.array("train_conj", "placeholder_rows_final"), r.array("train_conj", "weights_final").flatten(1)
    tokens, read_rows, read_weights = read_official(folder)
    assert tokens == r.json("train_conj")["effective_args"]["placeholder_tokens"].split(",")
    assert torch.equal(read_rows, rows) and torch.equal(read_weights, weights)
    model = load_official_concepts(folder, r.pipeline, image_size=32)
    assert torch.equal(model.codes, rows) and torch.equal(model.weights(), weights)
    save_concepts(model, tmp_path, official=True)
    for name in ("learned_embeds.bin", "weights.bin"):
        ours, theirs = (torch.load(f / name, weights_only=True) for f in (tmp_path, folder))
        assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    if (folder / "test_weights.bin").is_file():
        assert torch.equal(read_official(folder, "test_")[2], r.array("test_mode_weights_only", "weights_final").flatten(1))


def test_diffusers_reads_our_words(golden, tmp_path):
    from diffusers import StableDiffusionPipeline
    r = Recorded(golden("concept_discovery"))
    model = load_official_concepts(r.folder / "official_artifacts", r.pipeline, image_size=32)
    save_concepts(model, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(r.pipeline, safety_checker=None)
    for token in model.tokens: pipe.load_textual_inversion(tmp_path / "words" / f"{token.strip('<>')}.safetensors")
    text = r.json("compose_ddim")["prompts"][1]
    close(pipe.encode_prompt(text, "cpu", 1, False)[0], model.base.encode([text], model.codes).states, SINGLE, "encode_prompt")


def test_one_call_whatever_the_number_of_words(golden):
    "A training step asks the denoiser once, and in chunks it gives the same gradient"
    r = Recorded(golden("concept_discovery"))
    case = next(c for c in cases(r.folder) if c.startswith("train_conj"))
    model, _, templates = trained_case(r, case)
    batch, grads = batch_of(r, case, "m00", templates["m00"]), []
    for chunk in (0, 1):
        calls, original = [], model.base.predict
        model.base.predict = lambda *a, original=original, calls=calls: (calls.append(len(a[0])), original(*a))[1]
        model.concept_chunk = chunk
        model(copy.copy(batch))["loss"].backward()
        grads.append(model.codes.grad.clone())
        model.codes.grad, model.base.predict = None, original
        if not chunk: assert calls == [len(batch["index"]) * (model.n_factors + 1)]
    close(grads[0], grads[1], 1e-6, "chunks")
