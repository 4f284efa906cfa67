"""Put the weights of a finished run into the package, in half precision, with what is needed to evaluate them by name.

What draws (the denoiser) can take eight bits a number: --eight-bits denoiser.

    python tools/ship.py papermill_runs/out/lsd_shapes_long lsd_shapes \
        --made-by "recipe lsd_shapes_long, 45 minutes of one shared core" --scores "FG-ARI 0.978, …" \
        --command "decomp_nb run nbs/eval_segmentation.ipynb -p run_dir lsd_shapes"
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.readout import HiddenReadout, PhysionReadout
from decomp_nb.components.token_model import VOCABULARIES, TokenSpace, load_dvae
from decomp_nb.decomposer import load_decomposer, weights_folder
from decomp_nb.methods.slot_former import FrozenSlots
from decomp_nb.official.reading import keep_with
from decomp_nb.training.run_directory import load_run

KEPT = ("seed", "max_steps", "max_minutes", "batch_size", "learning_rate", "encoder_lr_scale", "ema_decay")


def record(run) -> dict:
    "What run.json tells of a training: name, data, model, and the settings that decide the result"
    config = run.config
    train = {name: value for name, value in config["train"].items() if name in KEPT}
    return {"name": config["name"], "data": config["data"], "model": config["model"], "train": train}


def describe(run, made_by: str, scores: str, commands: list[str]) -> dict:
    "The card that `shipped()` shows"
    data = run.config["data"]
    pictures = f"{data['data']}, {data['size']} pixels, seed {run.config['train']['seed']}"
    what = run.config["model"]["_class_name"]
    return {"what": what, "made_by": made_by, "data": pictures, "scores": scores, "commands": commands}


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(run) -> torch.nn.Module:
    "The model of a run: a method, or a vocabulary of tokens"
    kind = json.loads((run.path / "model" / "config.json").read_text())["_class_name"]
    return load_dvae(str(run.path)) if kind in VOCABULARIES else load_decomposer(run.path / "model")


def save_half(model: torch.nn.Module, folder: Path) -> None:
    "A model in half precision; a roll-out takes its slot model along, and feeds on its own numbers: both stay as they are"
    if isinstance(model, FrozenSlots):
        keep_with(model, folder)
    else:
        model.to(torch.float16).save_pretrained(folder)
    forget_places(folder)


def forget_places(folder: Path) -> None:
    "Configs do not say from which folder of this machine a model was loaded"
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        write(file, config)


def keep_tokens(model: TokenSpace, folder: Path) -> None:
    "The vocabulary of a model beside it, unless it comes with the package; it is read in the numbers it was saved in"
    if (weights_folder() / str(model.config.dvae_path)).is_dir():
        return
    model.dvae.float().save_pretrained(folder / "dvae")
    model.register_to_config(dvae_path="dvae")


def shorten(folder: Path, part: str) -> None:
    "Store the large weights of one part as float8; reading them again gives float32, as of the rest"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    large = [key for key, value in weights.items() if key.startswith(f"{part}.") and value.numel() >= 4096]
    if not large:
        raise ValueError(f"--eight-bits {part}: no large weights begin with this name")
    weights |= {key: weights[key].to(torch.float8_e4m3fn) for key in large}
    save_file(weights, file, metadata={"format": "pt"})


def ship(
    run_dir: str, name: str, made_by: str, scores: str, commands: list[str], eight_bits: str = ""
) -> Path:
    "The folder that was written; `eight_bits`: the part whose large weights take a byte each"
    folder = weights_folder() / name
    if (Path(run_dir) / "readout.json").is_file():
        return ship_readout(Path(run_dir), folder, made_by, scores, commands)
    run = load_run(run_dir)
    model = load(run)
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(model, TokenSpace):
        keep_tokens(model, folder)
    save_half(model, folder)
    if eight_bits:
        shorten(folder, eight_bits)
    told = record(run)
    for place in ("dvae_path", "slot_model_path"):  # as it is now: beside the model
        if place in told["model"]:
            told["model"] = told["model"] | {place: model.config[place]}
    write(folder / "run.json", told)
    write(folder / "card.json", describe(run, made_by, scores, commands))
    return folder


def ship_readout(run_dir: Path, folder: Path, made_by: str, scores: str, commands: list[str]) -> Path:
    "The readout of a run of train_readout that was best on validation, with what it needs to read slots"
    settings = json.loads((run_dir / "readout.json").read_text())
    best = max(range(len(settings["choices"])), key=lambda i: settings["choices"][i]["accuracy"])
    kind = HiddenReadout if settings["kind"] == "hidden" else PhysionReadout
    shutil.rmtree(folder, ignore_errors=True)
    kind.from_pretrained(run_dir / f"readout_{best}").to(torch.float16).save_pretrained(folder)
    forget_places(folder)
    kept = {key: settings[key] for key in ("data", "observed", "future", "standardise", "mean", "deviation")}
    write(folder / "readout.json", kept | {"threshold": settings["choices"][best]["threshold"]})
    data = f"{settings['data']}, seed {settings['seed']}"
    about = {"what": kind.__name__, "made_by": made_by, "data": data, "scores": scores, "commands": commands}
    write(folder / "card.json", about)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("name")
    parser.add_argument("--made-by", required=True)
    parser.add_argument("--scores", required=True)
    parser.add_argument("--command", action="append", default=[], help="what prints the scores; once for each")
    parser.add_argument("--eight-bits", default="", metavar="PART")
    asked = parser.parse_args()
    folder = ship(asked.run_dir, asked.name, asked.made_by, asked.scores, asked.command, asked.eight_bits)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB. Write the same row into {folder.parent / 'README.md'}.")


if __name__ == "__main__":
    main()
