"""Where recipes are rehearsed: a project folder with small data sets in the true layouts, foundations that consist of their configuration
alone, and runs of earlier stages; and an executor that plays a notebook in this process, without a kernel, up to its training."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image
from small_data import (
    write_cars,
    write_celeba,
    write_clevrtex,
    write_clips,
    write_coco,
    write_dump,
    write_places,
    write_scenes,
    write_shapes,
    write_voc,
)
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from decomp_nb import decomposer
from decomp_nb.components import attributes, latent_diffusion
from decomp_nb.components.text_to_image import TextToImage, clip_tokenizer
from decomp_nb.data import physion, video
from decomp_nb.data.class_folders import NumberedPictures
from decomp_nb.data.shapes3d import Shapes3D
from decomp_nb.data.slot_files import SlotCard, store_slots, video_name
from decomp_nb.methods import disdiff
from decomp_nb.methods.slot_former import load_slot_model
from decomp_nb.official.concepts import published_folders
from decomp_nb.training.config import resolve_out_dir
from decomp_nb.training.engine import read_losses
from decomp_nb.training.launch import make_parser, take_parameters
from decomp_nb.training.parameters import check_values, gather_values, parameters
from decomp_nb.training.rehearsal import smaller
from decomp_nb.training.reporting import append_metrics
from decomp_nb.training.run_directory import Run

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "papermill_runs" / "recipes").glob("*.yaml"))

# what foundations are made of: the published configurations of Stable Diffusion 2.1 (and its base), DINO and DINOv2

SD_UNET = dict(
    _class_name="UNet2DConditionModel",
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)
SD_VAE = dict(
    _class_name="AutoencoderKL",
    sample_size=512,
    latent_channels=4,
    layers_per_block=2,
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    scaling_factor=0.18215,
)
SD_TEXT = dict(
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=23,
    max_position_embeddings=77,
    projection_dim=512,
    hidden_act="gelu",
)
SD_SCHEDULER = dict(
    _class_name="DDIMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    num_train_timesteps=1000,
)
DINO = dict(
    architectures=["ViTModel"],
    model_type="vit",
    hidden_size=384,
    num_attention_heads=6,
    num_hidden_layers=12,
    intermediate_size=1536,
    patch_size=8,
    image_size=224,
)
DINO2 = dict(
    architectures=["Dinov2Model"],
    model_type="dinov2",
    hidden_size=768,
    num_attention_heads=12,
    num_hidden_layers=12,
    patch_size=14,
    image_size=518,
    mlp_ratio=4,
)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_stable_diffusion(folder: Path, prediction_type: str, side: int) -> None:
    "The folder of a pipeline without its weights; the tokenizer knows letters only"
    tokenizer = clip_tokenizer(["a"], 77)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    write_json(folder / "unet" / "config.json", SD_UNET | {"sample_size": side})
    write_json(folder / "vae" / "config.json", SD_VAE)
    words = len(tokenizer)
    text = SD_TEXT | dict(
        vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1
    )
    write_json(folder / "text_encoder" / "config.json", text)
    write_json(
        folder / "scheduler" / "scheduler_config.json", SD_SCHEDULER | {"prediction_type": prediction_type}
    )
    parts = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", scheduler="DDIMScheduler")
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= dict(text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"])
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})


def write_pictures(folder: Path, names: list[str], side: int = 64) -> None:
    "Photographs of noise"
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)).save(
            folder / name
        )


N_FRAMES = 150  # of every video file


def write_empty(file: Path) -> None:
    "A video file, whose frames are made up where it is read: PyAV is not needed"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def made_up_frames(path: str, stamps: np.ndarray) -> np.ndarray:
    "In place of the frames of a video file"
    return np.random.default_rng(len(str(path))).integers(0, 255, (len(stamps), 32, 32, 3), np.uint8)


def make_up_videos(patch: pytest.MonkeyPatch) -> None:
    "From now on every video file holds noise"
    for module in (physion, video):
        patch.setattr(module, "frame_times", lambda path: np.arange(N_FRAMES))
    patch.setattr(video, "read_frames", made_up_frames)


def write_physion(folder: Path) -> None:
    "Physion's training and readout parts: two tasks of two videos each, split files and labels"
    answers = {}
    for part in ("training", "readout"):
        for split in ("train", "val"):
            files = {
                task: [f"PhysionTrainMP4s/{task}_{part}_MP4s/pilot_{task}_{split}_{i:04d}_img.mp4" for i in range(2)]
                for task in ("Drop", "Roll")
            }
            write_json(folder / "splits" / f"{part}_{split}.json", files)
            for file in sum(files.values(), []):
                write_empty(folder / file)
                if part == "readout":
                    answers[Path(file).stem.removesuffix("_img")] = len(answers) % 2 == 0
    rows = [",ground truth outcome", *(f"{name},{answer}" for name, answer in answers.items())]
    (folder / "PhysionTrainMP4s" / "readout_labels.csv").write_text("\n".join(rows) + "\n")


def write_drawings(file: Path) -> None:
    "Drawn people in all combinations of 20 roles, 3 figures and 6 skins, 8 pixels"
    file.parent.mkdir(parents=True)
    rgba = np.random.default_rng(0).integers(0, 255, (20, 3, 6, 8, 8, 4), np.uint8)
    names = {"role": range(20), "gender": range(3), "skin": range(6)}
    np.savez(file, rgba=rgba, **{name: [f"{name} {i}" for i in values] for name, values in names.items()})


def write_data(data: Path) -> None:
    "The data folder: what users download, each set with a few pictures"
    write_cars(data / "cars")
    write_celeba(data / "celeba")
    write_coco(data / "coco", train=(8, 9, 10))
    write_voc(data / "voc", train=("2008_000002", "2008_000003"))
    write_clevrtex(data / "clevrtex")
    for split, videos, frames in (("train", range(3), 3), ("validation", range(3, 5), 24)):
        for name in ("movi-e", "movi-c", "clevr_with_masks"):
            write_dump(data / name / f"{name}-{split}-with-label", "lsd", videos, frames)
        write_dump(data / "movi-d" / split, "slot_diffusion", videos, frames)
    for name in ("movi-solid", "movi-tex"):  # no split folders: whole videos by hash
        write_dump(data / name, "steve", range(12), 24)
    for split in ("train", "val"):
        write_clips(data / "clevr_video" / f"clevr_video_{split}.h5", 3, 8, 64)
    write_shapes(data / "3dshapes.h5", Shapes3D(sizes=(2, 3, 2, 2, 4, 3), size=64))
    np.savez(
        data / "mpi3d_toy.npz", images=np.random.default_rng(0).integers(0, 255, (96, 64, 64, 3), np.uint8)
    )
    write_places(data, ["clevr", "clevr_toy", "celebahq", "tetris", "anime", "vkitti"], count=40)
    write_physion(data / "Physion")
    for split in ("train", "val"):
        write_pictures(data / "Physion_frames" / split, [f"{i:06d}.jpg" for i in range(8)])
        for i in range(2):
            write_pictures(data / "OBJ3D" / split / f"{i}", [f"test_{t}.png" for t in range(1, 51)], 16)
            write_empty(data / "CLEVRER" / "videos" / split / "video_00000-01000" / f"video_{i:05d}.mp4")
    write_pictures(data / "ffhq", [f"{i:05d}.png" for i in range(40)])
    write_pictures(data / "celebahq" / "data256x256", [f"{i:05d}.jpg" for i in range(40)])
    write_pictures(data / "Falcor3D_down128" / "images", [f"{i:06d}.png" for i in range(40)])
    write_drawings(data / "noto_people" / "noto_people_128.npz")


def write_farm(farm: Path) -> Path:
    "The whole place; returns the project folder, in which recipes run as they are"
    project = farm / "project"
    write_data(farm / "data")
    for name in (
        "clevr/clevr6_train",
        "clevr/clevr6_val",
        "clevrtex_proc/clevrtex_proc_train",
        "clevrtex_proc/clevrtex_proc_val",
    ):
        (farm / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_scenes(farm / "data" / f"{name}.h5", 40, 64, counts=(2, 3, 4))
    project.mkdir()
    (project / "settings.ini").write_text("[DEFAULT]\n")
    write_stable_diffusion(project / "stabilityai" / "stable-diffusion-2-1", "v_prediction", 96)
    write_stable_diffusion(project / "stabilityai" / "stable-diffusion-2-1-base", "epsilon", 64)
    write_json(project / "facebook" / "dinov2-base" / "config.json", DINO2)
    write_json(project / "facebook" / "dino-vits8" / "config.json", DINO)
    folders = {
        "imagenet/train": [n for k in "1234" for n in published_folders(f"imagenet_s{k}")],
        "ADE20K/home_or_hotel": published_folders("ade20k"),
        "style": published_folders("art"),
    }
    for root, names in folders.items():
        for name in names:
            write_pictures(
                project / root / name,
                [f"{i}.jpg" for i in range(25 if root == "ADE20K/home_or_hotel" else 5)],
            )
    return project


# -- models without weights ---------------------------------------------------------------


def from_folder(real):
    "A `from_pretrained` that builds what a configuration says where no weights lie beside it"

    def build(cls, name, *args, subfolder=None, output_loading_info=False, **options):
        folder = Path(name, subfolder or "")
        if any(folder.glob("*.safetensors")) or not folder.is_dir():
            return real(
                cls,
                name,
                *args,
                subfolder=subfolder or "",
                **({"output_loading_info": True} if output_loading_info else {}),
                **options,
            )
        if hasattr(cls, "load_config"):
            model = cls.from_config(cls.load_config(str(name), subfolder=subfolder)).eval()
            model.register_to_config(_name_or_path=str(name))
            return (model, {}) if output_loading_info else model
        config = AutoConfig.from_pretrained(folder)
        return (cls.from_config(config) if hasattr(cls, "_model_mapping") else cls(config)).eval()

    return classmethod(build)


def to_cpu(real):
    "`Tensor.cpu` that fills what has no data with noise"
    return lambda t, *args, **options: (
        torch.randn(t.shape).to(t.dtype) if t.is_meta else real(t, *args, **options)
    )


def to_meta(module: nn.Module, *args, **options) -> nn.Module:
    return module._apply(lambda t: t.to("meta"))


@contextlib.contextmanager
def weightless(meta: bool):
    """Inside, folders that hold a configuration alone give models with random weights. With `meta` nothing that is built has weights,
    wherever it is moved, so that a billion of them costs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for base in (ModelMixin, PreTrainedModel, _BaseAutoModelClass):
            patch.setattr(base, "from_pretrained", from_folder(base.from_pretrained.__func__))
        patch.setattr(decomposer, "_check_folder", lambda cls, path: None)
        for module in (latent_diffusion, disdiff):
            patch.setattr(module, "fingerprint", lambda module: "rehearsal")
        if not meta:
            yield
            return
        patch.setattr(nn.Module, "to", to_meta)
        patch.setattr(torch.Tensor, "cpu", to_cpu(torch.Tensor.cpu))
        patch.setattr(torch, "autocast", lambda device_type, *a, **o: contextlib.nullcontext())
        with init_empty_weights(include_buffers=False):
            yield


def keep(model: nn.Module, run: Path) -> None:
    "What later stages read of a run: its configuration"
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text("{}")
    if isinstance(model, TextToImage):
        model.save_pretrained(run / "pipeline")
    elif hasattr(inside := getattr(model, "vae", model), "save_config"):
        inside.save_config(run / "model")


# -- a notebook without a kernel ----------------------------------------------------------


class Kept(torch.utils.data.Dataset):
    "What a cache would give, without encoding anything: items also carry zeros of the right shapes"

    def __init__(self, data, **shapes):
        first = data[0]["image"]
        same = all(torch.equal(first, data[0]["image"]) for _ in range(16))  # a coin may fall the same way a few times
        assert same, "a cache does not go with random flips or crops"
        self.data, self.more = data, {name: torch.zeros(shape) for name, shape in shapes.items()}

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i] | self.more


def keep_latents(data, latents, folder, **options):
    shape = latents.shape(data.size)
    return Kept(data, latent_mean=shape, latent_logvar=shape)


def keep_features(data, encoder, folder, **options):
    side = encoder.feature_size
    return Kept(data, features=(encoder.out_channels, side, side))


def keep_slots(model, data, path, **options):
    "The file of slots that a model would find, made up, of the first videos alone"
    card, frames = SlotCard.of(model), len(data[0]["image"])
    names = [video_name(data[i]) for i in range(min(4, len(data)))]
    return store_slots(((name, torch.randn(frames, card.n_slots, card.slot_dim)) for name in names), path, card)


def keep_read_slots(model, videos, folder, name, **options):
    "The same for a readout, which reads all videos"
    return keep_slots(model.slot_model, videos, Path(folder) / f"{name}.h5")


def load_undrawn(path, **options):
    "A slot model whose frames are black: drawing whole videos takes minutes"
    model = load_slot_model(path, **options)
    frame = 3, model.config.image_size, model.config.image_size
    model.decode = lambda factors, **options: torch.zeros(*factors.codes.shape[:2], *frame)
    return model


def without_latents(images, latents, **options):
    return NumberedPictures(images, None, **options)


class Reached(Exception):
    "A notebook has come to its training"


class Stopper:
    "Stands for the trainer, where it would begin"

    def __init__(self, model, data, config, *, evaluate=None, name="", extra_config=None, loop=None):
        self.model, self.data, self.config, self.evaluate = model, data, config.validate(), evaluate

    def fit(self):
        raise Reached(self)


class OneStep(Stopper):
    "Stands for the trainer of a comparison, which goes on afterwards: one step, and a run directory with scores"

    def fit(self):
        training_step(self.model, self.data)
        run = Run(resolve_out_dir(self.config.out_dir))
        keep(self.model, run.path)
        append_metrics(
            run.metrics_file, {"step": 1, **{f"eval/{name}": 0.5 for name in ("psnr", "fg_ari", "mbo", "images", "spent")}}
        )
        return run


STAND_INS = dict(
    Trainer=Stopper,
    cache=keep_latents,
    cache_latents=keep_latents,
    keep_features=keep_features,
    extract_slots=keep_slots,
    slots_to_read=keep_read_slots,
    load_slot_model=load_undrawn,
)


def runs(cell) -> bool:
    tags = cell.metadata.get("tags", [])
    return cell.cell_type == "code" and "skip-execution" not in tags and "parameters" not in tags


def heavy(space: dict) -> bool:
    "Whether the run is too large to be computed in a test; autoencoders see a corner of a picture, SlotFormer slots"
    if space.get("arguments", {}).get("slots"):  # small, and which components are evaluated depends on their values
        return False
    limit = {"train_autoencoder": 10**6, "train_decomp_diffusion": 32, "train_slot_former": 128}.get(space["__name__"], 64)
    return max(space.get("size", 0), space.get("image_size", 0)) > limit or bool(space.get("foundation"))


def training_step(model: nn.Module, data, meta: bool = False, corner: int = 64) -> torch.Tensor:
    "Loss of one small batch, with its gradients; without weights only their shapes"
    items = data.__getitems__([0, 1]) if hasattr(data, "__getitems__") else [data[0], data[1]]
    batch = torch.utils.data.default_collate(items)
    if not meta and "image" in batch:  # SlotFormer reads slots
        batch["image"] = batch["image"][..., :corner, :corner]
    with weightless(meta):
        if meta:
            to_meta(model)
            batch = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        loss, _ = read_losses(model.train()(batch), model)
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    return loss


def quick_attributes():
    "Inside, attributes are found in a moment, and badly"
    quick = functools.partial(attributes.find_attributes, runs=1, temperatures=3, rounds=1)
    return mock.patch.object(attributes, "find_attributes", quick)


def play(notebook: Path, values: dict, until: str = "", **stand_ins) -> dict:
    "Run the cells of a notebook in this process, up to its training or the cell `until`; returns its names, `trainer` among them"
    space, transform = {"__name__": notebook.stem, **values}, TransformerManager().transform_cell
    for cell in filter(runs, nbformat.read(notebook, 4).cells):
        code = compile(transform(cell.source), f"{notebook.name}, cell {cell.id}", "exec")
        try:
            with weightless(heavy(space)), quick_attributes():
                exec(code, space)
        except Reached as reached:
            return space | {"trainer": reached.args[0]}
        if cell.id == "imports":
            space |= {name: one for name, one in (STAND_INS | stand_ins).items() if callable(space.get(name))}
            if heavy(space) and "NumberedPictures" in space:
                space["NumberedPictures"] = without_latents
        if cell.id == until:
            return space
    raise AssertionError(f"{notebook.name} ended without a training")


# -- recipes ------------------------------------------------------------------------------


def commands(recipe: Path) -> list[list[str]]:
    "The command lines in the head of a recipe, as words"
    lines = [line.lstrip("# ").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("decomp_nb run")]


def command(recipe: Path):
    "The parsed command line that runs a recipe itself"
    own = [words for words in commands(recipe) if str(recipe.relative_to(ROOT)) in words]
    assert len(own) == 1, f"the head of {recipe.name} does not say how it is run"
    pairs, rest = take_parameters(own[0])
    args = make_parser().parse_args(rest)
    args.p = pairs
    return args


def given(recipe: Path, changes: dict) -> tuple[Path, dict]:
    "Notebook of a recipe, and the parameters that it, the command line in its head and `changes` set"
    args = command(recipe)
    notebook = ROOT / args.notebook
    pairs = [pair for pair in args.p if pair[0] != "data"]  # the folder that a user has elsewhere
    return notebook, gather_values(parameters(notebook), [recipe], pairs) | check_values(
        parameters(notebook), changes, "changed"
    )


def settings(notebook: Path, values: dict) -> dict:
    "All parameters, made as small as a rehearsal makes them; widths stay"
    accepted = parameters(notebook)
    values |= dict(batch_size=2, grad_accumulation=1) if "grad_accumulation" in accepted else {}
    values |= dict(batch_size=2) if "batch_size" in accepted else {}
    values |= dict(begin_steps=0) if "begin_steps" in accepted else {}
    return {name: p.default for name, p in accepted.items()} | values | smaller(accepted, values)


class Farm:
    "The place where recipes run; earlier stages are made when a later one asks for them"

    def __init__(self, project: Path):
        self.project = project

    def needed(self, values: dict) -> list[str]:
        "Run directories that these parameters name as input"
        return [
            v
            for k, v in values.items()
            if isinstance(v, str) and v.startswith("papermill_runs/out/") and k != "out_dir"
        ]

    def rehearse(self, recipe: Path, changes: dict | None = None, until: str = "", **stand_ins) -> dict:
        "Names of the recipe's notebook where its training would begin"
        notebook, values = given(recipe, changes or {})
        for out_dir in self.needed(values):
            self.stage(out_dir)
        space = play(notebook, settings(notebook, values), until, **stand_ins)
        if "trainer" in space:
            keep(space["trainer"].model, self.project / values["out_dir"])
        return space

    def stage(self, out_dir: str) -> None:
        "See to it that the run directory is there"
        if (self.project / out_dir).is_dir():
            return
        makers = [r for r in RECIPES if f"out_dir: {out_dir}\n" in r.read_text() + "\n"]
        assert len(makers) == 1, f"{out_dir} is made by {len(makers)} recipes"
        self.rehearse(makers[0])
