"""The official loop of concept discovery, re-enacted with every lever off, and ours beside it: cases for `training.benchmark.measure_step`.

Each function returns (step, pictures per step). "All off" is what the official code does in each micro-batch: the autoencoder encodes the pictures; the text encoder reads every
word's sentence once per picture, and the empty one; the UNet is called for nothing and for every word, one after the other, with gradients everywhere; the whole dictionary has a
gradient and AdamW state, its old rows' gradients are set to zero and the rows are copied back.
"""
from __future__ import annotations

import torch

SIZES = {  # sides of pictures and latents, widths of the UNet, width and layers of the text model, its dictionary, tokens of a sentence
    "small": dict(image=32, factor=4, widths=(48, 96), text=96, layers=2, dictionary=64, tokens=24),  # about the size of the embedded foundation
    "dictionary": dict(image=32, factor=4, widths=(48, 96), text=768, layers=2, dictionary=49408, tokens=77),  # the same with a dictionary like Stable Diffusion's
    "larger": dict(image=128, factor=8, widths=(96, 192, 384), text=768, layers=6, dictionary=49408, tokens=77),
}


def foundation(size: str):
    "A random pipeline in Stable Diffusion's layout"
    from transformers import CLIPTextConfig, CLIPTextModel

    from decomp_nb.components.autoencoders import small_vae
    from decomp_nb.components.latents import KLLatents
    from decomp_nb.components.pipelines import StableDiffusion
    from decomp_nb.components.text_to_image import clip_tokenizer, text_unet
    s = SIZES[size]
    torch.manual_seed(0)
    tok = clip_tokenizer(["a", "photo", "of"], s["tokens"])
    text = CLIPTextModel(CLIPTextConfig(vocab_size=max(s["dictionary"], len(tok) + 16), hidden_size=s["text"], intermediate_size=4 * s["text"], num_hidden_layers=s["layers"], num_attention_heads=8,
                                        max_position_embeddings=s["tokens"], bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    unet = text_unet(s["image"] // s["factor"], 4, s["widths"], s["text"])
    schedule = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusion(unet, KLLatents(small_vae(s["factor"], width=32)), schedule, [tok], [text])


def concepts(size: str, n_words: int, n_images: int):
    "A `Concepts` with random weights on it, as published: free weights from 5"
    from unittest.mock import patch

    from decomp_nb.components import words
    from decomp_nb.methods import concepts as method
    with patch.object(words, "open_foundation", lambda _: foundation(size)):
        return method.Concepts("random", n_images, n_concepts=n_words, image_size=SIZES[size]["image"], weights="free", init_weight=5.0, weights_lr_scale=1.0).train()


def ours(size: str = "small", batch_size: int = 2, accumulation: int = 8, n_words: int = 5, *, latents: bool = True, whole: bool = False):
    "An optimiser step as `Concepts` and `Trainer` make it; `latents`: encoded once before; `whole`: all pictures of the step in one call"
    n = batch_size * accumulation
    model = concepts(size, n_words, n)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.08, fused=True)
    data = {"image": torch.rand(n, 3, model.config.image_size, model.config.image_size) * 2 - 1, "index": torch.arange(n)}
    if latents: data["latent_mean"], data["latent_logvar"] = model.latents.moments(data["image"])

    def step():
        parts = range(0, n, n if whole else batch_size)
        for i in parts: (model({k: v[i:i + (n if whole else batch_size)] for k, v in data.items()})["loss"] / len(parts)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step, n


def official(size: str = "small", batch_size: int = 2, accumulation: int = 8, n_words: int = 5, *, latents: bool = False, rows: bool = False, sentences: bool = False, calls: bool = False):
    "An optimiser step of the official loop. Levers: `latents` encoded once before; only the new `rows` are trained; distinct `sentences` are read once; the UNet's `calls` are one"
    base, n = foundation(size), batch_size * accumulation
    tokens = [f"<c{i + 1}>" for i in range(n_words)]
    base.add_words(tokens)
    encoder, unet, schedule, pictures = base.text_encoders[0], base.denoiser, base.scheduler, torch.rand(n, 3, SIZES[size]["image"], SIZES[size]["image"]) * 2 - 1
    first, ids, empty = base.tables[0].first, base.tokenise([f"a photo of {t}" for t in tokens])[0], base.tokenise([""])[0]
    table, new = base.tables[0].weight, torch.nn.Parameter(base.tables[0].weight[first:first + n_words].clone())
    if not rows: encoder.set_input_embeddings(base.tables[0].table.requires_grad_(True))
    weights, kept = torch.nn.Parameter(torch.full((n, n_words), 5.0)), table.detach().clone()
    old = torch.ones(len(table), dtype=torch.bool)
    old[first:first + n_words] = False
    optimiser = torch.optim.AdamW([new if rows else table, weights], 0.08)
    moments = base.latents.moments(pictures) if latents else None

    def read(ids):
        if rows: return base.read_with([ids], new).states
        return encoder(ids).last_hidden_state

    def micro(i):
        part, b = slice(i, i + batch_size), batch_size
        x0 = base.latents.from_batch({"latent_mean": moments[0][part], "latent_logvar": moments[1][part]} if latents else {"image": pictures[part]})
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (b,))
        x_t = schedule.add_noise(x0, noise, t)
        if sentences: states = [s[None].expand(b, -1, -1) for s in read(torch.cat([ids, empty]))]
        else: states = [read(row[None].expand(b, -1)) for row in ids] + [read(empty).expand(b, -1, -1)]
        if calls: said = unet(x_t.repeat(n_words + 1, 1, 1, 1), t.repeat(n_words + 1), encoder_hidden_states=torch.cat(states)).sample.chunk(n_words + 1)
        else: said = [unet(x_t, t, encoder_hidden_states=s).sample for s in states]
        null = said[-1]
        composed = null + sum(weights[part, k, None, None, None] * (said[k] - null) for k in range(n_words))
        (torch.nn.functional.mse_loss(composed, noise) / accumulation).backward()
        if not rows: table.grad[old] = table.grad[old].fill_(0)

    def step():
        for i in range(0, n, batch_size):
            micro(i)
            if i + batch_size >= n: optimiser.step()
            if not rows:
                with torch.no_grad(): table[old] = kept[old]
        optimiser.zero_grad()
    return step, n
