"Every recipe is rehearsed: its command line, its parameters, its data in the true layout, its model at full width, one training step."

import math

import pytest
from recipe_stage import RECIPES, Farm, OneStep, heavy, make_up_videos, training_step, write_farm

from decomp_nb.data import factors
from decomp_nb.training.accelerator import tracker_names
from decomp_nb.training.engine import lr_factor, parameter_groups


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    return write_farm(tmp_path_factory.mktemp("farm"))


@pytest.fixture
def farm(project, monkeypatch):
    "The project folder as a user has it, with the data beside it"
    monkeypatch.chdir(project)
    monkeypatch.setenv("DECOMP_DATA", str(project.parent / "data"))
    monkeypatch.setenv("DECOMP_CACHE", str(project / "cache"))
    make_up_videos(monkeypatch)
    monkeypatch.setitem(
        factors.GRIDS,
        "mpi3d",
        factors.FactorGrid(dict(zip(factors.GRIDS["mpi3d"].names, (2, 2, 2, 3, 1, 2, 2)))),
    )
    return Farm(project)


def check_schedule(config):
    "The learning rate is defined at every step, rises during the warm-up and is never above its peak"
    rates = [
        lr_factor(config)(step)
        for step in (0, config.warmup_steps // 2, config.warmup_steps, config.max_steps - 1, config.max_steps)
    ]
    assert all(0 <= rate <= 1 for rate in rates) and rates[2] > 0.99
    assert config.max_steps > config.warmup_steps and config.save_every <= config.max_steps


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if not r.stem.startswith(("compare", "readout"))], ids=lambda path: path.stem
)
def test_recipe(recipe, farm):
    space = farm.rehearse(recipe)
    trainer, meta = space["trainer"], heavy(space)
    check_schedule(trainer.config)
    tracker_names(trainer.config.trackers)
    assert parameter_groups(trainer.model, trainer.config)
    loss = training_step(trainer.model, trainer.data, meta)
    assert meta or math.isfinite(loss.item())


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.stem.startswith("compare")], ids=lambda path: path.stem
)
def test_recipe_of_a_comparison(recipe, farm):
    space = farm.rehearse(recipe, until="fit-all", Trainer=OneStep)
    assert set(space["finished"]) == {
        (method, seed) for method in space["methods"] for seed in space["seeds"]
    }


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem.startswith("readout")], ids=lambda path: path.stem)
def test_recipe_of_a_readout(recipe, farm):
    unrelated = 4 * ("n_unrelated" in recipe.read_text())
    space = farm.rehearse(recipe, dict(n_train=4, n_unrelated=unrelated, n_val=4, epochs=1, seeds=1), until="choice")
    assert math.isfinite(space["runs"][0][0].loss) and space["former"].rollout.slot_dim == space["train"][0].shape[-1]
    assert (space["folder"] / "readout_0" / "config.json").is_file()


BROKEN = {
    "a preset that is gone": ("lsd_shapes", dict(preset="shapez"), ValueError, "preset 'shapez'"),
    "a parameter that was renamed": (
        "lsd_shapes",
        dict(n_slotz=7),
        ValueError,
        "unknown parameter 'n_slotz'",
    ),
    "data that is not there": (
        "lsd_clevr",
        dict(data="../shared/data/clevrr"),
        FileNotFoundError,
        "no data set",
    ),
    "an option that the data set does not know": (
        "slot_diffusion_voc",
        dict(data_options={"slid": True}),
        ValueError,
        "Did you mean 'slide'",
    ),
    "latents of another shape": (
        "slot_diffusion_textured_vq",
        dict(model_options={}),
        ValueError,
        "built for 48 channels",
    ),
    "an autoencoder of another kind": (
        "slot_diffusion_textured_vq",
        dict(latents_path="papermill_runs/out/dvae_textured"),
        ValueError,
        "holds a DVAE",
    ),
    "a stage that nobody makes": (
        "slate_clevr",
        dict(dvae_path="papermill_runs/out/dvae_klevr"),
        AssertionError,
        "made by 0 recipes",
    ),
    "pictures that a cache cannot keep": (
        "slot_diffusion_coco",
        dict(cache_latents=True),
        AssertionError,
        "random flips",
    ),
    "a schedule that there is not": (
        "lsd_shapes",
        dict(lr_schedule="cosin"),
        ValueError,
        "did you mean .cosine",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_found(case, farm):
    stem, changes, error, message = BROKEN[case]
    recipe = next(r for r in RECIPES if r.stem == stem)
    with pytest.raises(error, match=message):
        farm.rehearse(recipe, changes)
