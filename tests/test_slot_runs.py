"The training notebooks of SlotDiffusion, SLATE and Slot Attention, headless and in miniature, each on the autoencoder that it stands on."
import json

import pytest
from test_runs import QUICK, execute

from decomp_nb.components.autoencoders import vq_model
from decomp_nb.components.dvae import DVAE
from decomp_nb.components.latents import VQLatents, build_latents
from decomp_nb.methods.savi import SAVi
from decomp_nb.methods.slate import SLATE
from decomp_nb.methods.slot_attention_ae import SlotAttentionAE
from decomp_nb.methods.slot_diffusion import SlotDiffusion
from decomp_nb.methods.steve import STEVE
from decomp_nb.training.run_directory import Run

SMALL = dict(n_images=24, eval_scenes=4, eval_seeds=1, preset="tiny", mixed_precision="no", **QUICK)


def check(folder, cls):
    run = Run(folder)
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4] and run.curve("eval/fg_ari")[0] == [2, 4]
    assert run.config["model"]["_class_name"] == cls.__name__ and list((folder / "pictures").glob("mixed.png"))
    assert {"lr/encoder", "lr/decoder"} <= set(run.metrics("train")[-1])
    assert {cls.__name__, "a grid", "random"} <= set(json.loads((folder / "scores.json").read_text()))
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


# -- clips ------------------------------------------------------------------------------------------------------------------------

CLIPS = dict(n_images=24, n_frames=2, eval_frames=5, eval_seeds=1, mixed_precision="no", **QUICK)


def scored(folder):
    "Names of the partitions that were scored, after a look at what is scored"
    scores = json.loads((folder / "scores.json").read_text())
    assert all({"fg_ari", "mbo", "frame_fg_ari", "switches"} <= set(found) for found in scores.values())
    return set(scores)


@pytest.fixture(scope="module")
def savi_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("savi")
    execute("train_savi", folder, data="moving_shapes", out_dir=str(folder / "run"), preset="tiny", eval_clips=4, **CLIPS)
    return folder / "run"


def test_savi(savi_run):
    assert scored(savi_run) == {"SAVi", "SAVi, untrained", "colours of the clip", "colours of each frame, linked", "a grid", "random"}
    assert (savi_run / "pictures" / "slots.png").stat().st_size < 400_000
    assert SAVi.from_pretrained(savi_run / "model").n_factors == 5


def test_clips_of_a_run_are_evaluated(savi_run, tmp_path):
    execute("eval_video", tmp_path, run_dir=str(savi_run), n_clips=4, seeds=2, draw_clips=4)
    found = json.loads((savi_run / "eval_video.json").read_text())
    assert found["frames"] == 5 and found["data"] == "moving_shapes" and {"SAVi", "SAVi, frame by frame, linked", "colours of the clip"} < set(found["scores"])
    assert len(found["drawn"]["psnr"]) == 5 and found["scores"]["SAVi"]["fg_ari"]["n"] == 2


def test_a_run_on_pictures_has_to_be_told_the_length_of_clips(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"data": "shapes"}}))
    with pytest.raises(Exception, match="say how many frames a clip has"):
        execute("eval_video", tmp_path, run_dir=str(run))


def test_steve_and_its_discrete_vae(tmp_path):
    DVAE(16, width=8).save_pretrained(tmp_path / "dvae")
    execute("train_steve", tmp_path, data="moving_shapes", out_dir=str(tmp_path / "run"), preset="tiny", dvae_path=str(tmp_path / "dvae"), eval_clips=4,
            model_options={"decoder_config": {"vocabulary": 16}}, **CLIPS)
    assert {"STEVE", "STEVE, untrained"} < scored(tmp_path / "run")
    assert STEVE.from_pretrained(tmp_path / "run" / "model").dvae.config.vocabulary == 16


def test_slot_diffusion_on_clips(tmp_path):
    sizes = dict(width=8, n_codes=16, code_dim=4, multipliers=(1, 1, 1), groups=8, layers_per_block=1, attention=False)
    vq_model(4, **sizes).save_pretrained(tmp_path / "vq")
    execute("train_slot_diffusion", tmp_path, data="moving_shapes", out_dir=str(tmp_path / "run"), preset="tiny_clips", latents_path=str(tmp_path / "vq"),
            eval_scenes=4, sample_steps=2, **CLIPS)
    assert scored(tmp_path / "run") == {"SlotDiffusion", "SlotDiffusion, untrained", "k-means of colours", "a grid", "random"}
