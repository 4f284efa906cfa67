"""One training step of LSD and of SlotDiffusion, with every lever on or off: cases for `training.benchmark.measure_step`.

With all levers off `lsd_step` re-enacts the official recipe: the picture goes through the frozen autoencoder in every step, 32-bit numbers, attention that writes its whole
matrix to memory, an optimiser that loops over the parameters. Each lever changes one of these: `cached` takes latents from the posterior's moments on disk, `fused` AdamW in one
kernel, `bf16` autocast, `channels_last` channels side by side in memory, `sdpa` attention that never writes its matrix, `compiled` torch.compile.
"""
from __future__ import annotations


def lsd_step(
    preset: dict | str = "movi_e",  # name or arguments of `lsd_preset`'s result
    batch_size: int = 4,
    vae: dict | None = None,  # config of the autoencoder; None = Stable Diffusion's
    *,
    cached: bool = False, fused: bool = False, bf16: bool = False, channels_last: bool = False, sdpa: bool = False, compiled: bool = False,
):
    "One LSD training step with random weights: forward, backward, clipping, AdamW; returns (step, pictures)"
    import torch
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    from decomp_nb.components.latents import KLLatents
    from decomp_nb.components.unets import PositionAttention
    from decomp_nb.methods.lsd import LSD, lsd_preset
    torch.manual_seed(0)
    model = LSD(**(lsd_preset(preset) if isinstance(preset, str) else preset))
    space = KLLatents(AutoencoderKL(**(vae or sd_vae_config())))
    model.frozen.latents = space
    if not sdpa:
        for layer in model.modules():
            processor = getattr(layer, "processor", None)
            if isinstance(processor, PositionAttention): processor.attend = AttnProcessor()
            elif processor is not None: layer.set_processor(AttnProcessor())
    if channels_last: model.to(memory_format=torch.channels_last), space.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True) if fused else torch.optim.AdamW(model.parameters(), 1e-4, foreach=False, fused=False)
    run = torch.compile(model) if compiled else model
    images = torch.rand(batch_size, 3, model.config.image_size, model.config.image_size) * 2 - 1
    if channels_last: images = images.contiguous(memory_format=torch.channels_last)
    batch = {"image": images}
    if cached: batch["latent_mean"], batch["latent_logvar"] = space.moments(images)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16): loss = run(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach().item()
    return step, batch_size


def sd_vae_config() -> dict:
    "Stable Diffusion's autoencoder: a factor of 8, 4 channels, 83.7 M parameters"
    return dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2, latent_channels=4)


def slot_diffusion_step(
    preset: dict | None = None,  # arguments of `SlotDiffusion`; None = the published COCO setting, its vision transformer with random weights
    batch_size: int = 2,
    image_size: int = 224,  # side of the pictures, for the published setting; a multiple of 32
    vae: dict | None = None,  # arguments of `vq_model`; None = the published ones
    *,
    latents: bool = False, features: bool = False,
):
    "One SlotDiffusion training step with random weights; `latents`, `features`: from a cache; returns (step, pictures)"
    import torch

    from decomp_nb.components.autoencoders import vq_model
    from decomp_nb.components.latents import VQLatents
    from decomp_nb.methods.slot_diffusion import SlotDiffusion, slot_diffusion_preset
    torch.manual_seed(0)
    if preset is None:
        preset = slot_diffusion_preset("coco", image_size=image_size, denoiser_config={"sample_size": image_size // 4})
        preset["encoder_config"] = dict(kind="vit", image_size=image_size, vit_config=None)
    model = SlotDiffusion(**preset).train()
    model.attach(VQLatents(vq_model(**(vae or {})).eval()))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    batch = {"image": torch.rand(batch_size, 3, model.config.image_size, model.config.image_size) * 2 - 1}
    if latents: batch["latent_mean"], batch["latent_logvar"] = model.latents.moments(batch["image"])
    if features: batch["features"] = model.extract_features(batch["image"], zoom=1.0).half()
    torch.manual_seed(0)  # the same noise and times, whatever is cached

    def step():
        loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach().item()
    return step, batch_size
