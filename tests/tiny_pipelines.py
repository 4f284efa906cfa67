"Text-to-image pipelines of random weights in the true layout of each family, written by diffusers itself: for tests that run offline"
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from decomp_nb.components.text import quiet
from decomp_nb.components.text_to_image import clip_tokenizer

FAMILIES = ("sd", "sd-v", "sdxl", "sd3", "if")
WORDS = (
    "a", "photo", "of", "in", "the", "style", "painting", "red", "blue", "green", "square", "circle", "and",
)  # fmt: skip


def t5_tokenizer(words=WORDS):
    "A T5 tokenizer for which each of `words` is one token"
    from transformers import T5Tokenizer
    letters = [*map(chr, range(97, 123)), *map(str, range(10))]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in sorted(set(words))), *letters]
    vocab = [(p, 0.0 if i < 3 else -1.0 - 5 * (len(p) == 1)) for i, p in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def clip(tokenizer, width: int, projection: int = 0) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5(tokenizer, width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel
    size = dict(d_model=width, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **size))


def vae(**options) -> nn.Module:
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **options,
    )


def unet(**options) -> nn.Module:
    from diffusers import UNet2DConditionModel
    small = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**small | options)


def load_pipelines():
    "diffusers with its pipelines imported, without what transformers says about image processors that nothing here uses"
    import diffusers
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "IF"):
            getattr(diffusers, f"{name}Pipeline")
    finally:
        logging.set_verbosity(level)
    return diffusers


def ddim(family: str):
    from diffusers import DDIMScheduler
    prediction = "v_prediction" if family == "sd-v" else "epsilon"
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return DDIMScheduler(**options, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)


NO_CHECKS = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable_diffusion(d, tokenizer, family):
    parts = dict(vae=vae(), text_encoder=clip(tokenizer, 16), unet=unet(cross_attention_dim=16))
    return d.StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=ddim(family), **NO_CHECKS)


def sdxl(d, tokenizer, family):
    body = unet(
        cross_attention_dim=40,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    encoders = dict(text_encoder=clip(tokenizer, 16), text_encoder_2=clip(tokenizer, 24, 12))
    tokenizers = dict(tokenizer=tokenizer, tokenizer_2=clip_tokenizer(WORDS, 24))
    return d.StableDiffusionXLPipeline(vae=vae(), **encoders, **tokenizers, unet=body, scheduler=ddim(family))


def sd3(d, tokenizer, family):
    body = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=16,
    )
    third = t5_tokenizer()
    return d.StableDiffusion3Pipeline(
        transformer=body,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.05),
        text_encoder=clip(tokenizer, 16, 16),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 24, 24),
        tokenizer_2=clip_tokenizer(WORDS, 24),
        text_encoder_3=t5(third, 40),
        tokenizer_3=third,
    )


def deepfloyd(d, _, family):
    tokenizer = t5_tokenizer()
    body = unet(
        in_channels=3,
        out_channels=6,
        sample_size=16,
        cross_attention_dim=16,
        encoder_hid_dim=20,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
    )
    scheduler = d.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    parts = dict(tokenizer=tokenizer, text_encoder=t5(tokenizer, 20), unet=body, scheduler=scheduler)
    return d.IFPipeline(**parts, watermarker=None, **NO_CHECKS)


def tiny_foundation(folder: str | Path, family: str = "sd", *, seed: int = 0) -> Path:
    "Write a random pipeline of a family (`FAMILIES`) into `folder`, for pictures of 16 pixels"
    makers = dict(zip(FAMILIES, (stable_diffusion, stable_diffusion, sdxl, sd3, deepfloyd)))
    diffusers = load_pipelines()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = makers[family](diffusers, clip_tokenizer(WORDS, 24), family)
    with quiet():
        pipeline.save_pretrained(folder)
    return Path(folder)
