"The training notebooks of SlotDiffusion, SLATE and Slot Attention, headless and in miniature, each on the autoencoder that it stands on."
import json

import pytest
from test_runs import QUICK, execute

from decomp_nb.components.latents import VQLatents, build_latents
from decomp_nb.methods.slate import SLATE
from decomp_nb.methods.slot_attention_ae import SlotAttentionAE
from decomp_nb.methods.slot_diffusion import SlotDiffusion
from decomp_nb.training.run_directory import Run

SMALL = dict(n_images=24, eval_scenes=4, eval_seeds=1, preset="tiny", mixed_precision="no", **QUICK)


def check(folder, cls):
    run = Run(folder)
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4] and run.curve("eval/fg_ari")[0] == [2, 4]
    assert run.config["model"]["_class_name"] == cls.__name__ and list((folder / "pictures").glob("mixed.png"))
    assert {"lr/encoder", "lr/decoder"} <= set(run.metrics("train")[-1])
    assert set(json.loads((folder / "scores.json").read_text())) == {cls.__name__, "a grid", "random"}
    return cls.from_pretrained(folder / "model")


def test_slot_attention_ae(tmp_path):
    execute("train_slot_attention_ae", tmp_path, out_dir=str(tmp_path / "run"), **SMALL)
    assert check(tmp_path / "run", SlotAttentionAE).n_factors == 5


def test_discrete_vae_then_slate(tmp_path):
    execute("train_autoencoder", tmp_path, kind="dvae", out_dir=str(tmp_path / "dvae"), n_images=24, image_size=32, width=8, n_codes=64, eval_images=4, **QUICK)
    execute("train_slate", tmp_path, out_dir=str(tmp_path / "run"), dvae_path=str(tmp_path / "dvae"), **SMALL)
    assert check(tmp_path / "run", SLATE).dvae.config.vocabulary == 64


@pytest.mark.parametrize("cached", [True])
def test_vq_vae_then_slot_diffusion(tmp_path, cached):
    execute("train_autoencoder", tmp_path, kind="vqvae", out_dir=str(tmp_path / "vq"), n_images=24, image_size=32, width=8, multipliers=[1, 1, 1], n_codes=16, free_steps=2, eval_images=4, **QUICK)
    assert isinstance(build_latents(str(tmp_path / "vq")), VQLatents)
    execute("train_slot_diffusion", tmp_path, out_dir=str(tmp_path / "run"), latents_path=str(tmp_path / "vq"), cache_latents=cached, sample_steps=2, **SMALL)
    assert check(tmp_path / "run", SlotDiffusion).latent_shape == (4, 8, 8)
