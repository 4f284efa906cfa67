"Every run notebook, headless, from the repository root and in miniature: train → run directory → evaluate."
import json
from contextlib import nullcontext
from pathlib import Path

import papermill
import pytest
import torch
from warm_kernel import warm

from decomp_nb.data.home import data_home
from decomp_nb.training.run_directory import Run

ROOT = Path(__file__).resolve().parents[1]
QUICK = dict(max_steps=4, warmup_steps=1, eval_every=2, save_every=2, log_every=1, batch_size=4, trackers="", resume="never", num_workers=0)


def execute(name, folder, kernel=warm, **parameters):
    "Run a notebook with its parameters checked by name; returns the executed notebook's path"
    source, out = ROOT / "nbs" / f"{name}.ipynb", Path(folder) / f"{name}-{len(list(Path(folder).glob('*.ipynb')))}.ipynb"
    known = papermill.inspect_notebook(str(source))
    assert set(parameters) <= set(known), f"{name} has no parameters {set(parameters) - set(known)}"
    with kernel(): papermill.execute_notebook(str(source), str(out), parameters, kernel_name="python3", cwd=ROOT, progress_bar=False)
    cells = json.loads(out.read_text())["cells"]
    assert not any(o.get("name") == "stderr" for c in cells for o in c.get("outputs", [])), "stderr in the executed notebook"
    return out


@pytest.fixture(scope="module")
def lsd_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lsd")
    execute("train_lsd", folder, nullcontext, out_dir=str(folder / "run"), preset="tiny", n_images=40, eval_scenes=6, sample_steps=2, eval_seeds=2, **QUICK)  # a kernel as any other
    return folder / "run"


def test_train_lsd_leaves_a_run_that_is_enough(lsd_run):
    run = Run(lsd_run)
    scores = json.loads((lsd_run / "scores.json").read_text())
    assert run.config["train"]["max_steps"] == 4 and run.config["model"]["_class_name"] == "LSD" and run.config["data"]["data"] == "shapes"
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4] and set(scores) == {"pictures", "LSD", "LSD, untrained", "k-means of colours", "a grid", "random"}
    assert run.curve("eval/fg_ari")[0] == [2, 4] and list((lsd_run / "pictures").glob("*.png"))
    model = run.model()
    assert model.encode(torch.zeros(1, 3, 16, 16)).n_factors == 4


@pytest.mark.parametrize("name", ["eval_segmentation", "eval_probing", "eval_generation", "eval_edits"])
def test_evaluations_read_the_run(lsd_run, name, tmp_path):
    small = {k: v for k, v in dict(n_scenes=8, n_images=8, seeds=2, n_seeds=2, steps=2, sample_steps=2, extractor_steps=3).items()
             if k in papermill.inspect_notebook(str(ROOT / "nbs" / f"{name}.ipynb"))}
    execute(name, tmp_path, run_dir=str(lsd_run), **small)
    assert json.loads((lsd_run / f"{name}.json").read_text())


def test_an_autoencoder_of_ones_own_carries_latent_lsd(tmp_path):
    execute("train_autoencoder", tmp_path, out_dir=str(tmp_path / "ae"), n_images=40, image_size=32, factor=2, width=8, eval_images=12, **QUICK)
    assert "scaling_factor" in json.loads((tmp_path / "ae" / "model" / "config.json").read_text())
    for cached in (False, True):
        execute("train_lsd", tmp_path, out_dir=str(tmp_path / f"run-{cached}"), preset="tiny", latents_path=str(tmp_path / "ae"), cache_latents=cached,
                model_options={"image_size": 32, "encoder_config": {"image_size": 32}, "denoiser_config": {"in_channels": 4, "out_channels": 4}},
                n_images=40, eval_scenes=6, sample_steps=2, eval_seeds=1, mixed_precision="no", **QUICK)  # a cache is made in float32
    losses = [[row["loss"] for row in Run(tmp_path / f"run-{cached}").metrics("train")] for cached in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the cache changes nothing but the time


def test_stable_lsd_runs_from_local_folders(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    from decomp_nb.components.text import quiet, tiny_pipeline
    tiny_pipeline(tmp_path / "pipeline")
    with quiet(): Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)).save_pretrained(tmp_path / "dino")
    execute("train_lsd", tmp_path, out_dir=str(tmp_path / "run"), foundation=str(tmp_path / "pipeline"), dino=str(tmp_path / "dino"), n_slots=3,
            model_options={"image_size": 32, "dino_resolution": 56, "slots_config": {"slot_dim": 16, "hidden_dim": 16}},
            n_images=40, eval_scenes=6, sample_steps=2, eval_seeds=1, **QUICK)
    assert Run(tmp_path / "run").config["model"]["_class_name"] == "StableLSD"


@pytest.mark.skipif(not (data_home() / "clevr").is_dir(), reason="no clevr in the data folder: set DECOMP_DATA")
def test_edits_are_measured_against_renders(lsd_run, tmp_path):
    execute("eval_renders", tmp_path, run_dir=str(lsd_run), n_scenes=2, sample_steps=2, seeds=2, examples=1)
    found = json.loads((lsd_run / "eval_renders.json").read_text())
    assert found["scenes"] == 2 and 0 <= found["slot_overlap"] <= 1
    assert set(found["edits"]) == {f"{edit}, {where}" for edit in ("removed", "added") for where in ("whole", "at the object")}  # slots of no layout cannot move
    assert all(row["left"]["n"] == 2 and row["drawn"]["mean"] > 0 for row in found["edits"].values())


@pytest.mark.skipif(not (data_home() / "clevr").is_dir(), reason="no clevr in the data folder: set DECOMP_DATA")
def test_real_files_go_the_same_way(tmp_path):
    data = data_home() / "clevr" / "clevr6_tiny64.h5"
    execute("train_lsd", tmp_path, out_dir=str(tmp_path / "run"), data=str(data), n_images=0, preset="tiny", eval_scenes=6, sample_steps=2, eval_seeds=1, **QUICK)
