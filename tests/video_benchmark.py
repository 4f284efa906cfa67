"""A training step of SAVi on a clip, for `training.benchmark.measure_step`."""

from __future__ import annotations

from collections.abc import Callable


def clip_step(frames: int, recompute: bool = False, preset: str = "moving") -> tuple[Callable[[], float], int]:
    "A training step of SAVi on one clip; `recompute` keeps nothing of slot attention for the backward pass"
    import torch

    from decomp_nb.methods.savi import SAVi, savi_preset
    torch.manual_seed(0)
    model = SAVi(**savi_preset(preset, tracking_config=dict(recompute=recompute))).train()
    side = model.config.image_size
    clips = torch.rand(1, frames, 3, side, side) * 2 - 1
    noise = torch.randn(1, model.n_factors, model.slot_attention.slot_dim)

    def step() -> float:
        loss = model({"image": clips, "slot_noise": noise})["loss"]
        loss.backward()
        model.zero_grad()
        return loss.item()
    return step, frames

