"`decomp_nb run --check`: everything happens once, what it costs is said, and nothing is left."

import os
import re

import pytest
import torch
from training_toys import Denoiser, Pictures, config

from decomp_nb.components.autoencoders import small_dc
from decomp_nb.training.launch import main
from decomp_nb.training.parameters import Parameter, Parameters
from decomp_nb.training.rehearsal import VARIABLE, rehearse_notebook, rehearsing, scratch, smaller
from decomp_nb.training.trainer import Trainer


def tree(folder):
    "All files and folders below, with their times"
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


# -- the trainer --------------------------------------------------------------------------


def play(out_dir, evaluate=None, **options):
    "A rehearsed training of the toy model"
    with scratch(out_dir) as folder:
        where = str(folder / "run")
        Trainer(Denoiser(), Pictures(), config(where, resume="auto", **options), evaluate=evaluate).fit()


def test_everything_happens_once(tmp_path, capsys):
    seen = []
    with pytest.raises(SystemExit) as end:
        play(tmp_path / "run", lambda model, step: seen.append(step) or {"score": 1.0}, max_steps=5000)
    said = capsys.readouterr().out
    assert end.value.code == 0 and len(seen) == 1 and f"going on from step {seen[0]} of 5000" in said
    assert (
        re.search(r"parameters +630 trained\n", said)
        and "whole run" in said
        and "5,000 steps in about" in said
    )
    assert not list(tmp_path.iterdir()) and VARIABLE not in os.environ


def test_a_time_limit_is_part_of_the_forecast(tmp_path, capsys):
    with pytest.raises(SystemExit):
        play(tmp_path / "run", max_steps=10**8, max_minutes=0.5)
    assert re.search(
        r"about [\d,]+ of 100,000,000 steps in 30 seconds; the learning rate falls to its end there",
        capsys.readouterr().out,
    )


def test_mistakes_keep_their_own_message(tmp_path):
    def wrong(model, step):
        raise ValueError("no such score")

    with pytest.raises(ValueError, match="no such score"):
        play(tmp_path / "run", wrong)
    with pytest.raises(ValueError, match="batch_size: 64"):
        play(tmp_path / "run", batch_size=64)
    with pytest.raises(FloatingPointError, match="not finite"):
        play(tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0)
    assert not list(tmp_path.iterdir()) and not rehearsing(tmp_path / "run")


# -- the launcher -------------------------------------------------------------------------


def accepts(**defaults):
    return Parameters(
        {name: Parameter(name, type(value).__name__, value, "") for name, value in defaults.items()}
    )


def test_what_is_made_smaller():
    accepted = accepts(
        out_dir="runs/x",
        n_images=0,
        batch_size=64,
        sample_steps=200,
        seeds=[4, 5],
        width=512,
        trackers="wandb",
        resume="never",
        max_steps=9,
    )
    changes = smaller(accepted, {"batch_size": 128}, processes=2)
    assert changes == dict(n_images=768, sample_steps=2, seeds=[4], trackers="", resume="auto")
    with pytest.raises(ValueError, match="no out_dir"):
        smaller(accepts(n_images=0), {})


def test_a_failing_notebook_fails_the_rehearsal(tmp_path, capsys):
    def fails(output, values):
        os.makedirs(values["out_dir"])
        return 3

    assert rehearse_notebook(fails, accepts(out_dir=str(tmp_path / "deep" / "run")), {}) == 3
    assert "failed" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="out_dir: cannot write"):
        rehearse_notebook(fails, accepts(out_dir=str(tmp_path / "file" / "run")), {})


def test_slurm_scripts_are_not_rehearsed(tmp_path, capsys):
    assert (
        main(["run", "nbs/train_lsd.ipynb", "--check", "--sbatch", str(tmp_path / "job")]) == 2
        and "--check" in capsys.readouterr().err
    )


def check(tmp_path, capfd, notebook, **values):
    "Rehearse a notebook; exit code and what was said"
    before = tree(tmp_path)
    pairs = [word for name, value in values.items() for word in ("-p", name, str(value))]
    code = main(
        ["run", f"nbs/{notebook}.ipynb", *pairs, "-p", "out_dir", str(tmp_path / "out" / "run"), "--check"]
    )
    assert tree(tmp_path) == before
    return code, capfd.readouterr()


def test_latent_lsd(tmp_path, capfd):
    torch.manual_seed(0)
    small_dc(4, width=8, latent_channels=4).save_pretrained(tmp_path / "vae")
    options = {
        "image_size": 32,
        "encoder_config": {"image_size": 32},
        "denoiser_config": {"in_channels": 4, "out_channels": 4, "sample_size": 8},
    }
    code, said = check(
        tmp_path,
        capfd,
        "train_lsd",
        preset="tiny",
        latents_path=tmp_path / "vae",
        cache_latents=True,
        model_options=options,
        n_images=5000,
        max_minutes=0,
    )
    assert (
        code == 0
        and "n_images 5000 → 256" in said.out
        and "4,500 steps in about" in said.out
        and "passed" in said.out
    )
    assert re.search(r"parameters +[\d,]+ trained, [\d,]+ frozen", said.out) and not said.err


def test_concepts(tmp_path, capfd):
    code, said = check(tmp_path, capfd, "train_concepts", preset="tiny", n_per_class=2)
    assert code == 0 and "begin_steps 100 → 2" in said.out and "passed" in said.out


def test_a_missing_stage(tmp_path, capfd):
    code, said = check(tmp_path, capfd, "train_slate", dvae_path=tmp_path / "nowhere")
    assert (
        code == 1
        and "no discrete VAE at" in said.err
        and "failed" in said.err
        and "notebook up to there" not in said.err
    )
