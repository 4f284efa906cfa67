"""Put the weights of a finished run into the package, in half precision, with what is needed to evaluate them by name.

What draws (the denoiser) can take eight bits a number: --eight-bits denoiser.

    python tools/ship.py papermill_runs/out/lsd_shapes_long lsd_shapes \
        --made-by "recipe lsd_shapes_long, 45 minutes of one shared core" --scores "FG-ARI 0.978, …"
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.token_model import TokenSpace
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


def forget_where_it_was(folder: Path) -> None:
    "Take out of a saved config the folder that its weights were read from"
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    write(folder / "config.json", config)


def shorten(folder: Path, part: str) -> None:
    "Store the large weights of one part as float8; reading them again gives float32, as of the rest"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    large = [key for key, value in weights.items() if key.startswith(f"{part}.") and value.numel() >= 4096]
    if not large:
        raise ValueError(f"--eight-bits {part}: no large weights begin with this name")
    weights |= {key: weights[key].to(torch.float8_e4m3fn) for key in large}
    save_file(weights, file, metadata={"format": "pt"})


def ship(run_dir: str, name: str, made_by: str, scores: str, eight_bits: str = "") -> Path:
    "The folder that was written; `eight_bits`: the part whose large weights take a byte each"
    run = load_run(run_dir)
    model = load_decomposer(run.path / "model").to(torch.float16)
    folder = weights_folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(model, TokenSpace):
        model.dvae.float().save_pretrained(folder / "dvae")  # it is read in the numbers it was saved in
        forget_where_it_was(folder / "dvae")
        model.register_to_config(dvae_path="dvae")
    model.save_pretrained(folder)
    forget_where_it_was(folder)
    if eight_bits:
        shorten(folder, eight_bits)
    told = record(run)
    if isinstance(model, TokenSpace):
        told["model"] = told["model"] | {"dvae_path": "dvae"}
    write(folder / "run.json", told)
    write(folder / "card.json", describe(run, made_by, scores))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("name")
    parser.add_argument("--made-by", required=True)
    parser.add_argument("--scores", required=True)
    parser.add_argument("--eight-bits", default="", metavar="PART")
    asked = parser.parse_args()
    folder = ship(asked.run_dir, asked.name, asked.made_by, asked.scores, asked.eight_bits)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB. Write the same row into {folder.parent / 'README.md'}.")


if __name__ == "__main__":
    main()
