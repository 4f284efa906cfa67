"""What an earlier version wrote is still read: a run directory and a checkpoint of 21 November 2026, written before the code was
rebuilt, and every model that ships with the package."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.latents import build_latents
from decomp_nb.components.pipelines import open_foundation
from decomp_nb.components.token_model import load_dvae
from decomp_nb.decomposer import load_decomposer, shipped
from decomp_nb.methods.lsd import LSD
from decomp_nb.metrics.extractors import scene_extractor
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.run_directory import Run, load_run
from decomp_nb.training.trainer import Trainer
from decomp_nb.worlds.scenes import Scenes

BEFORE = Path(__file__).parent / "before"


@pytest.fixture
def folder(tmp_path):
    "The run directory of four steps, with the checkpoint of the second"
    return Path(shutil.copytree(BEFORE / "run", tmp_path / "run"))


def answers(model):
    "What a model makes of two pictures"
    pictures = load_file(BEFORE / "answers.safetensors")["image"]
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        factors = model.encode(pictures, generator=torch.Generator().manual_seed(0))
        return {"codes": factors.codes, "masks": factors.masks, "drawn": model.decode(factors, steps=3, noise=noise)}


def test_the_model_of_an_earlier_run_answers_as_it_did(folder):
    model = load_run(folder).model().eval()
    recorded = load_file(BEFORE / "answers.safetensors")
    for name, values in answers(model).items():
        torch.testing.assert_close(values, recorded[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_other_weights_do_not_answer_so(folder):
    file = folder / "model" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    (folder / "model" / "complete.json").unlink(missing_ok=True)
    changed = answers(load_run(folder).model().eval())
    assert (changed["codes"] - load_file(BEFORE / "answers.safetensors")["codes"]).abs().max() > 1e-3


def test_a_checkpoint_of_an_earlier_version_goes_on(folder):
    "Cut after its second step, the run makes the third and the fourth as it did then"
    whole = [row["loss"] for row in Run(folder).metrics("train")]
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    shutil.rmtree(folder / "model")
    record = json.loads((folder / "config.json").read_text())
    config = TrainConfig.from_dict(record["train"] | {"out_dir": str(folder)})
    model = LSD.from_config({name: value for name, value in record["model"].items() if name[0] != "_"})
    Trainer(model, Scenes("shapes", 8, size=16), config, extra_config=record["data"]).fit()
    resumed = Run(folder)
    assert [row["step"] for row in resumed.metrics("train")] == [1, 2, 3, 4] and len(whole) == 4
    assert [row["loss"] for row in resumed.metrics("train")] == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(answers(resumed.model().eval())["codes"], load_file(BEFORE / "answers.safetensors")["codes"], rtol=1e-3, atol=1e-4)


# --- models that ship ----------------------------------------------------------------------------------------------------------------


NO_DECOMPOSERS = {
    "text_to_image": open_foundation,
    "scene_extractor": lambda _: scene_extractor(),
    "drawn_dc": build_latents,
    "drawn_patches": load_dvae,
    "drawn_dvae": load_dvae,
}


@pytest.mark.parametrize("name", shipped())
def test_shipped_model_loads_and_takes_pictures_apart(name):
    if name in NO_DECOMPOSERS:
        assert NO_DECOMPOSERS[name](str(shipped(name))) is not None
        return
    model = load_decomposer(shipped(name)).eval()
    n_frames = getattr(getattr(model, "rollout", None), "observed", 2)
    size = getattr(model.config, "image_size", None) or model.slot_model.config.image_size
    clips = model.tracks or hasattr(model, "rollout")
    pictures = torch.rand(1, *([n_frames] if clips else []), 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    with torch.no_grad():
        factors = model.encode(pictures)
    assert factors.codes.isfinite().all() and factors.codes.std() > 0.01
