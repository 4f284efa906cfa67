"""The official loop of Decomp Diffusion, re-enacted with every lever off, and ours beside it: cases for `training.benchmark.measure_step`.

Each function returns (step, pictures per step). "All off" is what the official code does: float32, NCHW, attention that writes out its n×n matrix,
Adam and the weight average parameter by parameter, encoder with batch norm; and for a picture one sampling run per component, one picture at a time.
"""
from __future__ import annotations

import torch


def build(preset: str | dict = "clevr", sdpa: bool = True):
    "A `DecompDiffusion` with random weights"
    from diffusers.models.attention_processor import AttnProcessor

    from decomp_nb.methods.decomp_diffusion import DecompDiffusion, decomp_diffusion_preset
    torch.manual_seed(0)
    model = DecompDiffusion(**(decomp_diffusion_preset(preset) if isinstance(preset, str) else preset))
    with torch.no_grad():
        for p in model.denoiser.parameters(): p.add_(0.02 * torch.randn_like(p))  # layers that start at zero would be skipped by nothing, but say nothing
    if not sdpa:
        for layer in model.denoiser.modules():
            if hasattr(layer, "set_processor"): layer.set_processor(AttnProcessor())
    return model


def train_step(
    preset: str | dict = "clevr",
    batch_size: int = 4,
    *,
    sdpa: bool = False, fused: bool = False, bf16: bool = False, channels_last: bool = False, lean: bool = False, compiled: bool = False,
):
    "Forward, backward, Adam, weight average; `lean` goes component by component"
    from diffusers.training_utils import EMAModel
    model = build(preset, sdpa).train()
    model.component_backward = lean
    if channels_last: model.to(memory_format=torch.channels_last)
    params = list(model.parameters())
    optimiser = torch.optim.Adam(params, 1e-3, fused=True) if fused else torch.optim.Adam(params, 1e-3, foreach=False, fused=False)
    average = EMAModel(params, decay=0.9999, foreach=True) if fused else [p.detach().clone() for p in params]
    run = torch.compile(model) if compiled else model
    images = torch.rand(batch_size, 3, model.config.image_size, model.config.image_size) * 2 - 1
    if channels_last: images = images.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = run({"image": images})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if fused: average.step(params)
        else:
            for a, p in zip(average, params): a.lerp_(p.detach(), 1e-4)
        return loss.detach().item()
    return step, batch_size


@torch.no_grad()
def official_picture(model, images, noise, steps: int = 50):
    "Components and reconstruction as the official script draws them: picture by picture, run by run; latents `(b,k+1,c,h,w)`"
    from decomp_nb.components.ddim import decomp_sampler
    from decomp_nb.decomposer import sample
    ddim, rows = decomp_sampler("ddim", model.scheduler), []
    for image, start in zip(images.split(1), noise.split(1)):
        factors = model.encode(image)
        sets = [*(factors.pick(i) for i in range(factors.n_factors)), factors]
        rows.append(torch.cat([sample(lambda x, t, f=f: model.predict(x, t, f), start, ddim, steps) for f in sets]))
    return torch.stack(rows)


def picture(
    preset: str | dict = "clevr",
    batch_size: int = 1,
    sample_steps: int = 50,
    *,
    sdpa: bool = False, one_run: bool = False, bf16: bool = False, channels_last: bool = False, solver_steps: int = 0,
):
    "A decomposition picture: run by run, or all components and the reconstruction in `one_run`; `solver_steps` > 0: DPM-Solver++ with so many steps"
    from decomp_nb.components.ddim import decomp_sampler
    model = build(preset, sdpa).eval()
    if channels_last: model.to(memory_format=torch.channels_last)
    images = torch.rand(batch_size, 3, model.config.image_size, model.config.image_size) * 2 - 1
    noise = torch.randn(batch_size, *model.latent_shape)
    scheduler = decomp_sampler("dpm", model.scheduler, timestep_spacing="trailing") if solver_steps else decomp_sampler("ddim", model.scheduler)

    @torch.no_grad()
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if one_run: return model.decomposition(model.encode(images), steps=solver_steps or sample_steps, noise=noise, scheduler=scheduler)
            return official_picture(model, images, noise, sample_steps)
    return step, batch_size
