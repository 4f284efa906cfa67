"`latents_path` names any of diffusers' image autoencoders; each of them carries a method, with and without a cache."

import json

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny

from decomp_nb.components.autoencoders import DCAutoencoder, small_dc, small_vae, vq_model
from decomp_nb.components.latent_diffusion import LatentDiffusion
from decomp_nb.components.latents import DeterministicLatents, KLLatents, build_latents, decode_latents
from decomp_nb.components.text import tiny_pipeline
from decomp_nb.components.text_to_image import TextToImage
from decomp_nb.data.cache import cache_latents
from decomp_nb.worlds.scenes import Scenes
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.methods.stable_lsd import StableLSD
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.trainer import Trainer


def tiny_autoencoder(levels=3, channels=4):
    "An `AutoencoderTiny` that compresses by 2^(levels − 1)"
    sizes = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * levels)
    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * levels)
    return AutoencoderTiny(latent_channels=channels, scaling_factor=0.7, **sizes, **blocks)


KINDS = {
    "tiny": (tiny_autoencoder, (4, 8)),
    "tiny, 2": (lambda: tiny_autoencoder(2, 6), (6, 16)),
    "dc": (lambda: small_dc(4, width=8, latent_channels=4), (4, 8)),
    "dc, 32": (lambda: small_dc(32, width=8, latent_channels=8, layers=[0, 1, 1, 1, 1, 1]), (8, 1)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_lsd(path, channels, side):
    "LSD for 32-pixel pictures in latents of this shape"
    levels = dict(
        block_out_channels=[16],
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
    )
    unet = dict(
        in_channels=channels, out_channels=channels, sample_size=side, **(levels if side == 1 else {})
    )
    return LSD(
        **lsd_preset(
            "tiny",
            image_size=32,
            encoder_config={"image_size": 32},
            latents_path=str(path),
            denoiser_config=unet,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_any_shape_are_read_cached_and_painted(kind, tmp_path):
    build, (channels, side) = KINDS[kind]
    network = build()
    network.save_pretrained(tmp_path / "vae")
    space, images = build_latents(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1
    assert (
        isinstance(space, DeterministicLatents)
        and space.shape(32) == (channels, side, side)
        and type(build_latents(str(tmp_path))) is DeterministicLatents
    )
    z = space.encode(images, torch.randn(2, channels, side, side))
    with torch.no_grad():
        expected = network.eval().encode(images, return_dict=False)[0] * network.config.scaling_factor
    torch.testing.assert_close(z, expected)
    assert space.decode(z).shape == images.shape and space.decode(z).abs().max() <= 1
    torch.testing.assert_close(decode_latents(space, z).clamp(-1, 1), space.decode(z))
    data = Scenes("shapes", 5, size=32)
    cached = cache_latents(data, space, tmp_path / "cache")
    batch = torch.utils.data.default_collate([cached[i] for i in range(5)])
    torch.testing.assert_close(space.from_batch(batch), space.encode(batch["image"]), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in space.parameters()) and not space.train().training
    with pytest.raises(ValueError, match=f"multiple of {32 // side}"):
        space.encode(torch.zeros(1, 3, 33, 33))


@pytest.mark.parametrize("kind", KINDS)
def test_lsd_trains_on_them(kind, tmp_path):
    build, (channels, side) = KINDS[kind]
    build().save_pretrained(tmp_path / "vae")
    model = small_lsd(tmp_path / "vae", channels, side)
    config = TrainConfig(
        out_dir=str(tmp_path / "run"), max_steps=3, batch_size=4, log_every=1, learning_rate=1e-3, trackers=""
    )
    run = Trainer(model, Scenes("shapes", 8, size=32), config).fit()
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3]
    again = LSD.from_pretrained(run.path / "model").eval()
    images = Scenes("shapes", 2, size=32).batch([0, 1])["image"]
    assert again.decode(again.encode(images), steps=2).shape == images.shape


@pytest.mark.parametrize(
    ("kind", "channels", "side"), [("tiny", 4, 16), ("tiny", 3, 8), ("dc, 32", 8, 2), ("dc", 8, 8)]
)
def test_other_shapes_are_refused_before_training(kind, channels, side, tmp_path):
    KINDS[kind][0]().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=f"built for {channels} channels of side {side}.*latents_path"):
        _ = small_lsd(tmp_path / "vae", channels, side).latent_shape
    unet = dict(in_channels=channels, sample_size=side, channels=[32], attention_levels=[])
    with pytest.raises(ValueError, match="built for"):
        _ = LatentDiffusion(image_size=32, latents_path=str(tmp_path / "vae"), denoiser_config=unet).latents


def test_what_is_no_autoencoder_or_does_not_fit_itself_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="UNet2DModel.*AutoencoderTiny, AutoencoderDC"):
        build_latents(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="without _class_name"):
        build_latents(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no hub name that is cached"):
        build_latents("nobody/nothing-of-this-name")
    lopsided = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    lopsided.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="comes back with side 4"):
        build_latents(str(tmp_path))
    with pytest.raises(ValueError, match="no place for an AutoencoderDC"):
        TextToImage(["dot"], 32, latents=DeterministicLatents(small_dc(4, width=8, latent_channels=4)))


def test_a_pipeline_on_the_hub_stands_for_its_autoencoder(tmp_path, monkeypatch):
    "A hub name is asked for vae/ first: a pipeline has no config.json at its root"
    small_vae(4, width=8).save_pretrained(tmp_path / "someone" / "pipeline" / "vae")
    from diffusers import AutoencoderKL

    local, asked = AutoencoderKL.load_config, []
    monkeypatch.setattr(
        AutoencoderKL,
        "load_config",
        lambda name, **o: asked.append((name, o["subfolder"])) or local(tmp_path / name, **o),
    )
    monkeypatch.setattr(
        AutoencoderKL,
        "from_pretrained",
        lambda name, subfolder, **o: asked.append((name, subfolder)) or small_vae(4, width=8),
    )
    assert type(build_latents("someone/pipeline")) is KLLatents and asked == [("someone/pipeline", "vae")] * 2


def test_a_trained_dc_autoencoder_is_plain_diffusers(tmp_path):
    model = DCAutoencoder(small_dc(8, width=8, latent_channels=8), latent_noise=0.1).train()
    batch = {"image": torch.rand(4, 3, 32, 32) * 2 - 1, "latent_noise": torch.randn(4, 8, 4, 4)}
    first, same, other = (
        model(batch)["loss"],
        model(batch)["loss"],
        model(batch | {"latent_noise": -batch["latent_noise"]})["loss"],
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    for _ in range(300):
        model.spread.lerp_(model.vae.encode(batch["image"]).latent.detach().std(), 0.02)
    model.save_pretrained(tmp_path / "model")
    plain = AutoencoderDC.from_pretrained(tmp_path / "model")
    space = build_latents(str(tmp_path))
    assert plain.config.encoder_layers_per_block == [0, 1, 2, 2] and space.shape(64) == (8, 8, 8)
    assert space.encode(batch["image"]).std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="only the first may have 0"):
        small_dc(8, layers=[1, 0, 1, 1])
    with pytest.raises(ValueError, match="4 levels"):
        small_dc(8, multipliers=[1, 2, 4])
    with pytest.raises(ValueError, match="must divide"):
        small_dc(8, latent_channels=12)


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_frozen_denoiser_takes_pictures_of_any_side(image_size, tmp_path):
    "Stable-LSD is published with pictures of 256 pixels and a UNet whose config says 768"
    tiny_pipeline(tmp_path)
    encoder = dict(kind="conv", image_size=image_size, channels=[8, 8], stride=2, kernel=3, groups=4)
    model = StableLSD(
        str(tmp_path), encoder, dict(n_slots=3, slot_dim=16, hidden_dim=16), image_size=image_size
    )
    assert model.latent_shape == (4, image_size // 4, image_size // 4)
    assert model({"image": torch.rand(2, 3, image_size, image_size)})["loss"].isfinite()
    small_vae(4, width=8, latent_channels=3).save_pretrained(tmp_path / "vae")
    other = StableLSD(
        str(tmp_path), encoder, dict(n_slots=3, slot_dim=16, hidden_dim=16), image_size=image_size
    )
    with pytest.raises(ValueError, match="built for 4 channels"):
        _ = other.latents


def test_reading_a_codebook_leaves_the_random_state_alone(tmp_path):
    "A resumed run reads its autoencoder in its first step, a run that was not broken off did so long before"
    vq_model(4, width=8, multipliers=(1, 1, 1), n_codes=16, groups=4).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    build_latents(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
