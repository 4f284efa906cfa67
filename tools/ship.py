"""Put the weights of a finished run into the package, in half precision, with what is needed to evaluate them by name.

    python tools/ship.py papermill_runs/out/lsd_shapes_long lsd_shapes \
        --made-by "recipe lsd_shapes_long, 45 minutes of one shared core" --scores "FG-ARI 0.978, …"
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from decomp_nb.components.token_model import VOCABULARIES, load_dvae
from decomp_nb.decomposer import load_decomposer, weights_folder
from decomp_nb.training.run_directory import load_run

KEPT = ("seed", "max_steps", "max_minutes", "batch_size", "learning_rate", "encoder_lr_scale", "ema_decay")


def record(run) -> dict:
    "What run.json tells of a training: name, data, model, and the settings that decide the result"
    config = run.config
    train = {name: value for name, value in config["train"].items() if name in KEPT}
    return {"name": config["name"], "data": config["data"], "model": config["model"], "train": train}


def describe(run, made_by: str, scores: str) -> dict:
    "The card that `shipped()` shows"
    data = run.config["data"]
    pictures = f"{data['data']}, {data['size']} pixels, seed {run.config['train']['seed']}"
    return {"what": run.config["model"]["_class_name"], "made_by": made_by, "data": pictures, "scores": scores}


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(run) -> torch.nn.Module:
    "The model of a run: a method, or a vocabulary of tokens"
    kind = json.loads((run.path / "model" / "config.json").read_text())["_class_name"]
    return load_dvae(str(run.path)) if kind in VOCABULARIES else load_decomposer(run.path / "model")


def forget_where_it_was(folder: Path) -> None:
    "Take out of a saved config the folder that its weights were read from"
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    write(folder / "config.json", config)


def ship(run_dir: str, name: str, made_by: str, scores: str) -> Path:
    "The folder that was written"
    run = load_run(run_dir)
    model = load(run).to(torch.float16)
    folder = weights_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    forget_where_it_was(folder)
    write(folder / "run.json", record(run))
    write(folder / "card.json", describe(run, made_by, scores))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("name")
    parser.add_argument("--made-by", required=True)
    parser.add_argument("--scores", required=True)
    asked = parser.parse_args()
    folder = ship(asked.run_dir, asked.name, asked.made_by, asked.scores)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB. Write the same row into {folder.parent / 'README.md'}.")


if __name__ == "__main__":
    main()
