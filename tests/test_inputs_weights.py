"Files of weights from anywhere: read whatever they are called and wrapped in, or named for what they are; nothing is unpickled."
import ast
import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_runs import ROOT

from decomp_nb.checks import kind_of_file
from decomp_nb.components.dvae import DVAE
from decomp_nb.components.lpips import load_lpips
from decomp_nb.components.weight_files import read_json, read_weights
from decomp_nb.methods.decomp_diffusion import DecompDiffusion
from decomp_nb.methods.lsd import LSD
from decomp_nb.official.autoencoders import load_official_autoencoder
from decomp_nb.official.decomp_diffusion import load_official_decomp_diffusion, save_official_decomp_diffusion
from decomp_nb.official.disdiff import load_official_disdiff, load_official_latent_diffusion
from decomp_nb.official.lsd import load_official_lsd, save_official_lsd
from decomp_nb.official.slots import load_official_slots
from decomp_nb.training.parameters import gather_values, parse_parameters, read_recipe

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
FAMILIES = [load_official_decomp_diffusion, load_official_slots, load_official_autoencoder, load_official_disdiff, load_official_latent_diffusion, load_lpips]


def packed(name="readme.txt"):
    "A zip archive with one file"
    store = io.BytesIO()
    with zipfile.ZipFile(store, "w") as archive: archive.writestr(name, "hello")
    return store.getvalue()


FOREIGN = {
    "a saved web page": b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "empty (0 bytes)": b"", "a zip archive": packed(), "a NumPy archive": packed("weights.npy"), "a gzip archive": b"\x1f\x8b\x08\x00abc", "a JSON file": b'{"weight_map": {}}',
    "an HDF5 file": b"\x89HDF\r\n\x1a\n", "a picture": b"\x89PNG\r\n\x1a\n", "a damaged archive": b"PK\x03\x04cut",
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("read", [read_weights, *FAMILIES], ids=lambda f: f.__name__)
def test_a_file_that_is_no_weights_says_what_it_is(tmp_path, read, what):
    file = tmp_path / "model_100.pth"
    file.write_bytes(FOREIGN[what])
    with pytest.raises(ValueError) as refused: read(file)
    said = str(refused.value)
    assert what in said and "model_100.pth" in said and "weights_only" not in said and "foreign code" not in said


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt", "w.safetensors", "w", "W.PT"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before 1.6"])
def test_the_name_of_a_file_decides_nothing(tmp_path, name, kind):
    file = tmp_path / name
    if kind == "safetensors": save_file(WEIGHTS, file)
    else: torch.save(WEIGHTS, file, _use_new_zipfile_serialization=kind == "torch")
    assert kind_of_file(file) == kind.split()[0] and torch.equal(read_weights(file)["a.weight"], WEIGHTS["a.weight"])


def under(prefix, state): return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "module.": lambda s: under("module.", s), "_orig_mod.": lambda s: under("_orig_mod.", s), "both": lambda s: under("module._orig_mod.", s), "state_dict": lambda s: {"state_dict": s},
    "model and optimizer": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3, "args": None}, "all at once": lambda s: {"model": {"state_dict": under("module.", s)}},
    "averages": lambda s: {"ema": {"shadow": s, "decay": 0.99}, "step": 3}, "checkpoint": lambda s: {"checkpoint": {"params_ema": s}}, "beside averages": lambda s: {"ema": {}, "model": s},
    "half compiled": lambda s: {key.replace(".", "._orig_mod.", 1): value for key, value in s.items()},
}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    "family → (what loads it, its official file, a weight of the loaded model)"
    home = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    decomp = DecompDiffusion(image_size=16, n_factors=3, factor_dim=6, data_range="unit", encoder_config=dict(width=4, norm="batch", end="relu"),
                             denoiser_config=dict(channels=[16, 32], layers_per_block=1, attention_levels=[1], head_dim=8))
    file = save_official_decomp_diffusion(decomp, home / "model_1.pt")
    dvae = {key.replace(".norm.", ".").replace(".conv.", ".m."): value for key, value in DVAE(16, 8).state_dict().items() if key != "steps"}
    torch.save(dvae, home / "dvae.pth")
    return {"decomp": (lambda path: load_official_decomp_diffusion(path, head_dim=8).state_dict(), file), "slots": (lambda path: load_official_slots(path).state_dict(), home / "dvae.pth")}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("family", ["decomp", "slots"])
def test_wrapped_checkpoints_are_unwrapped(official, tmp_path, family, wrapped):
    load, file = official[family]
    torch.save(WRAPPED[wrapped](torch.load(file, weights_only=True)), tmp_path / file.name)
    for (name, plain), value in zip(load(file).items(), load(tmp_path / file.name).values(), strict=True): assert torch.equal(plain, value), name


def test_wrapped_parts_of_an_official_lsd_are_unwrapped(tmp_path):
    torch.manual_seed(0)
    seeing = dict(kind="unet", image_size=16, sample_size=8, in_channels=8, out_channels=8, block_out_channels=(8, 16), norm_num_groups=4)
    painting = dict(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4, cross_attention_dim=12,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    folder = save_official_lsd(LSD(image_size=16, encoder_config=seeing, slots_config=dict(n_slots=3, slot_dim=16, out_dim=12), denoiser_config=painting).eval(), tmp_path / "lsd")
    plain = load_official_lsd(folder).state_dict()
    for file in folder.rglob("*.safetensors"): save_file(under("module.", load_file(file)), file)
    again = load_official_lsd(folder).state_dict()
    assert plain.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in plain.items())


def test_every_official_family_reads_by_the_one_reader():
    "No module of official/ opens a weight file by itself"
    for module in (ROOT / "decomp_nb" / "official").glob("*.py"):
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "load_file", "safe_open"}, module.name


@pytest.mark.parametrize("beside, named", [({"loss": np.float64(0.5)}, "numpy"), ({"where": Path("x")}, "pathlib"), ({"rng": np.zeros(3)}, "numpy")])
@pytest.mark.parametrize("read", [read_weights, *FAMILIES], ids=lambda f: f.__name__)
def test_what_is_in_the_way_is_named(tmp_path, read, beside, named):
    torch.save({"model": WEIGHTS, **beside}, tmp_path / "last.pth")
    with pytest.raises(ValueError) as refused: read(tmp_path / "last.pth")
    said = str(refused.value)
    assert named in said and "beside its weights" in said and "last.pth" in said and "weights_only" not in said


@pytest.mark.parametrize("content, said", [({}, "holds nothing"), ([1, 2], "holds list"), ({"w": torch.ones(2), "epoch": 3}, "epoch hold no tensors"), ({1: torch.ones(2)}, "1 hold no tensors")])
def test_what_is_no_state_dict_is_named(tmp_path, content, said):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"odd.pth is no state dict: .*{said}"): read_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b'{"_class', b"\xff\xfe\x00{", b"[" * 100_000])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged .*: copy or download it again"): read_json(tmp_path / "config.json")


# mutations ------------------------------------------------------------------------------------------------------------------------

def mutated(whole, dice):
    "One of six damages at a random place"
    damaged, place = bytearray(whole), dice.randrange(len(whole))
    kind, n = dice.randrange(6), dice.randrange(1, 40)
    if kind == 0: damaged[place] ^= 1 << dice.randrange(8)
    elif kind == 1: del damaged[place:]
    elif kind == 2: del damaged[place:place + n]
    elif kind == 3: damaged[place:place] = dice.randbytes(n)
    elif kind == 4: damaged[place:place + n] = dice.randbytes(n)
    else: damaged[place:place] = damaged[:n]
    return bytes(damaged)


def stored(**options):
    store = io.BytesIO()
    torch.save({"model": WEIGHTS, "epoch": 3, "betas": (0.9, 0.999), "note": "a text"}, store, **options)
    return store.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
def test_mutated_checkpoints_are_read_or_refused_with_their_name(tmp_path, kind):
    whole = save(WEIGHTS) if kind == "safetensors" else stored(_use_new_zipfile_serialization=kind == "torch")
    file, dice, read = tmp_path / "mutated.pth", random.Random(kind), 0
    for _ in range(700):
        file.write_bytes(mutated(whole, dice))
        try:
            assert all(isinstance(value, torch.Tensor) for value in read_weights(file).values())
            read += 1
        except ValueError as error:
            assert "mutated.pth" in str(error), error
    assert 0 < read < 700


RECIPE = b"""# a recipe
seed: 3
lr: 3.0e-4
name: "two words"
cpu: false
sizes: [1, 2]
options: {masks: true, pad: ~, deep: {n: 010, list: [1.5, -2e-3]}}
"""
ACCEPTED = parse_parameters("seed: int = 0\nlr: float = 1e-3\nname: str = 'a'\ncpu: bool = False\nsizes: list = []\noptions: dict = {}")


def test_mutated_recipes_are_read_or_refused_with_their_name(tmp_path):
    file, dice, read = tmp_path / "mutated.yaml", random.Random(0), 0
    assert read_recipe_bytes(file, RECIPE)["options"]["deep"] == {"n": 10, "list": [1.5, -0.002]}
    for _ in range(1500):
        try:
            values = read_recipe_bytes(file, mutated(RECIPE, dice))
            assert set(values) <= set(ACCEPTED)
            read += 1
        except ValueError as error:
            assert "mutated.yaml" in str(error), error
    assert 0 < read < 1500


def read_recipe_bytes(file, content):
    file.write_bytes(content)
    read_recipe(file)
    return gather_values(ACCEPTED, [file], [])
