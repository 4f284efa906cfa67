"The cases of the performance page compute the same whatever lever is pulled."

from training_benchmark import lsd_step, slot_diffusion_step
from video_benchmark import clip_step

from decomp_nb.methods.lsd import lsd_preset
from decomp_nb.methods.slot_diffusion import slot_diffusion_denoiser


def test_no_lever_changes_the_loss_of_lsd():
    small = lsd_preset("tiny", denoiser_config={"in_channels": 4, "out_channels": 4, "sample_size": 8})
    vae = dict(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    )
    levers = ("cached", "fused", "bf16", "channels_last", "sdpa")
    losses = {lever: lsd_step(small, 2, vae, **{lever: True})[0]() for lever in levers}
    plain = lsd_step(small, 2, vae)[0]()
    assert all(abs(v - plain) < 0.02 * plain for v in losses.values()), (plain, losses)


def test_caches_change_nothing_but_the_time_of_slot_diffusion():
    "Half-precision features move the first loss in the fourth digit"
    vit = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vit |= dict(patch_size=8, image_size=16)
    denoiser = slot_diffusion_denoiser(
        4, slot_dim=16, channels=(8, 16), layers_per_block=1, head_dim=8, groups=4, dropout=0.0
    )
    little = dict(
        image_size=16,
        encoder_config=dict(kind="vit", image_size=16, vit_config=vit),
        slots_config=dict(n_slots=3, slot_dim=16),
        denoiser_config=denoiser,
    )
    vq = dict(width=8, multipliers=(1, 1, 1), layers_per_block=1, n_codes=16, groups=4, attention=False)
    cached = ({}, {"latents": True}, {"features": True}, {"latents": True, "features": True})
    losses = [slot_diffusion_step(little, 2, vae=vq, **levers)[0]() for levers in cached]
    assert max(losses) - min(losses) < 1e-2 * losses[0], losses


def test_a_clip_recomputed_in_the_backward_pass_has_the_same_loss():
    kept, again = (clip_step(3, recompute, preset="tiny")[0]() for recompute in (False, True))
    assert abs(kept - again) < 1e-5 * kept
