"What every method inherits: clips are batches of frames, frozen models stay frozen, a fingerprint tells weights apart."
import copy
import re
from pathlib import Path

import papermill
import pytest
import torch

from decomp_nb.components.autoencoders import vq_model
from decomp_nb.components.latent_diffusion import LatentDiffusion
from decomp_nb.components.latents import VQLatents
from decomp_nb.decomposer import Decomposer, Frozen, fingerprint, load_decomposer, sample, shipped, weights_folder
from decomp_nb.factors import Factors
from decomp_nb.methods.decomp_diffusion import DecompDiffusion, decomp_diffusion_preset
from decomp_nb.methods.disdiff import DisDiff
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.methods.slot_attention_ae import SlotAttentionAE, slot_attention_preset

UNET = dict(sample_size=8, in_channels=3, channels=[8, 16], layers_per_block=1, attention_levels=[1], n_heads=2, groups=4)


def disdiff():
    space = VQLatents(vq_model(2, width=8, layers_per_block=1, n_codes=16, groups=4, attention=False))
    base = LatentDiffusion(image_size=16, denoiser_config=UNET).attach(space)
    model = DisDiff(image_size=16, n_factors=3, factor_dim=4, encoder_config={"width": 8}, denoiser_config=UNET)
    model.attach(base)
    return model


METHODS = {
    "lsd": lambda: LSD(**lsd_preset("tiny")),
    "decomp_diffusion": lambda: DecompDiffusion(**decomp_diffusion_preset("tiny")),
    "disdiff": disdiff,
    "slot_attention_ae": lambda: SlotAttentionAE(**slot_attention_preset("tiny")),
}


@pytest.fixture(params=METHODS)
def model(request):
    torch.manual_seed(0)
    model = METHODS[request.param]().eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def clips(model):
    "Two clips of three frames"
    generator = torch.Generator().manual_seed(0)
    size = model.config.image_size
    return torch.rand(2, 3, 3, size, size, generator=generator) * 2 - 1


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_training_on_clips(model, clips):
    "The loss of a clip is that of its frames, where a method does not carry its factors from frame to frame; else it is a number"
    losses = []
    for images in (clips, clips.flatten(0, 1)):
        torch.manual_seed(3)
        losses.append(model({"image": images})["loss"].detach())
    assert losses[0].isfinite() and losses[0].ndim == 0
    if not model.tracks:
        assert losses[0] == losses[1]


@torch.no_grad()
def test_a_clip_is_its_frames(model, clips):
    "decode, decompose and reconstruct of a clip: what they are for the frames, with a time axis; noise for all frames, or for each clip"
    torch.manual_seed(1)
    factors = model.encode(clips)
    frames = factors.fold_time()
    noise = torch.randn(2, *model.latent_shape)
    of_frames = noise.repeat_interleave(3, 0)
    drawn = model.decode(factors, steps=2, noise=noise) if model.scheduler else model.decode(factors)
    assert drawn.shape == clips.shape and factors.codes.shape[:2] == (2, 3)
    if not model.scheduler:
        return close(drawn.flatten(0, 1), model.decode(frames))
    close(drawn.flatten(0, 1), model.decode(frames, steps=2, noise=of_frames))
    close(drawn, model.decode(factors, steps=2, noise=of_frames.unflatten(0, (2, 3))))
    alone = model.decompose(factors, steps=2, noise=noise)
    assert alone.shape[:4] == (2, 3, factors.n_factors, 3)
    close(alone.flatten(0, 1), model.decompose(frames, steps=2, noise=of_frames))
    with pytest.raises(ValueError, match="noise of 2 clips of 3 frames is"):
        model.decode(factors, noise=noise[:1])


@torch.no_grad()
def test_a_clip_is_taken_apart(model, clips):
    "Frame by frame, unless slots are carried from frame to frame"
    torch.manual_seed(1)
    factors = model.encode(clips)
    if not model.tracks:
        close(factors.fold_time().codes, model.encode(clips.flatten(0, 1)).codes)
    if factors.masks is not None:
        assert factors.segmentation(16).shape == (2, 3, 16, 16)
    options = dict(steps=1) if model.scheduler else {}
    assert model.reconstruct(clips, **options).shape == clips.shape


@torch.no_grad()
def test_the_field_of_a_clip(model, clips):
    "`guided` takes clips x_t with one time a clip or one a frame"
    if not model.scheduler:
        pytest.skip("no denoiser")
    torch.manual_seed(1)
    factors = model.encode(clips)
    x = torch.randn(2, 3, *model.latent_shape)
    predict = model.guided(factors)
    field = model.guided(factors.fold_time())
    times = torch.tensor([10, 500])
    close(predict(x, times).flatten(0, 1), field(x.flatten(0, 1), times.repeat_interleave(3)))
    each = torch.arange(6).view(2, 3)
    close(predict(x, each).flatten(0, 1), field(x.flatten(0, 1), each.flatten()))
    assert sample(predict, x, model.sampler or model.scheduler, 2).shape == x.shape


def test_frozen_models_are_beside_not_inside():
    model = METHODS["decomp_diffusion"]()
    before = set(model.state_dict())
    model.attach(torch.nn.Linear(2, 2), "base")
    with pytest.warns(DeprecationWarning, match="frozen_modules"): assert model.foundations() is model.frozen_modules()
    assert model.frozen_modules() is vars(model.frozen) and set(model.state_dict()) == before
    assert not any(p.requires_grad for p in model.frozen.base.parameters())
    assert model.double().frozen.base.weight.dtype == torch.float64
    assert all(value is None for value in (getattr(Frozen, name) for name in Frozen.__annotations__))
    other = METHODS["decomp_diffusion"]()
    assert other.frozen.base is None
    with pytest.raises(ValueError, match="choose one of latents, dvae"):
        model.attach(torch.nn.Linear(2, 2), "vae")


def test_guidance_reads_the_weights_of_the_empty_set():
    "An empty set that is made by weights 0 counts as empty even where the factors have no weights"
    class Sum(Decomposer):
        def predict(self, x_t, t, factors):
            weights = (factors * 1.0).weights
            return x_t * 0 + (weights[..., None] * factors.codes).sum((1, 2))[:, None, None, None]

        def null_factors(self, factors):
            return factors * 0.0
    predict = Sum().guided(Factors(torch.ones(2, 3, 1)), 2.0)
    assert predict(torch.zeros(2, 1, 4, 4), torch.zeros(2)).unique().item() == 6


def test_a_fingerprint_tells_weights_apart():
    "Of fixed tensors always the same, also in half precision: marks in configs stay valid"
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.fill_(0.5)
    assert fingerprint(layer) == fingerprint(copy.deepcopy(layer).half()) == "17dde72d"
    with torch.no_grad():
        layer.bias[1] = 0.25
    assert fingerprint(layer) != "17dde72d"


def test_the_mark_of_a_shipped_model_holds():
    model = load_decomposer(shipped("disdiff_shapes3d"))
    assert model.config.base_mark == fingerprint(model.base) == "34688e81"


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 16, 16), (2, 1, 3, 16, 16), (3, 16, 16)])
def test_noise_of_other_pictures_is_refused(shape):
    model = LSD(**lsd_preset("tiny"))
    with pytest.raises(ValueError, match=r"noise of 2 pictures is \(2,c,h,w\)"):
        model.decode(Factors(torch.randn(2, 4, 16)), steps=2, noise=torch.randn(shape))


def test_weights_that_come_with_the_package_are_listed_with_their_scores():
    cards = shipped()
    folder = shipped("lsd_shapes").parent
    assert set(cards) == {path.name for path in folder.iterdir() if path.is_dir()}
    page = (folder / "README.md").read_text().replace("`", "")
    for name, card in cards.items():
        assert set(card) == {"what", "made_by", "data", "scores", "commands"}
        commands = "<br>".join(card["commands"]) or "–"
        row = f"| {card['made_by']} | {card['data']} | {card['scores']} | {commands} |"
        assert row in page, f"README.md tells something else of {name}"


@pytest.mark.parametrize("command", sorted({command for card in shipped().values() for command in card["commands"]}))
def test_commands_that_reproduce_scores_name_what_there_is(command):
    root = Path(__file__).resolve().parents[1]
    program, verb, page, *options = command.split()
    assert (root / page).is_file()
    if (program, verb) == ("python", "tools/run_nbs.py"):  # a page prints the scores itself
        return
    assert (program, verb) == ("decomp_nb", "run")
    recipes = [value for option, value in zip(options, options[1:]) if option == "-f"]
    assert all((root / recipe).is_file() for recipe in recipes)
    given = {name: value for option, name, value in zip(options, options[1:], options[2:]) if option == "-p"}
    assert set(given) <= set(papermill.inspect_notebook(str(root / page)))
    names = [value for name, value in given.items() if name in ("run_dir", "slot_former") and "/" not in value]
    assert names or recipes or "run_dir" in given or given.get("foundation") in shipped()
    assert all((shipped(name) / "run.json").is_file() for name in names), "evaluations find weights with run.json only"


def test_no_file_of_the_weights_names_a_folder_of_the_machine_that_made_them():
    files = [file for name in ("config.json", "run.json") for file in sorted(weights_folder().rglob(name))]
    absolute = [str(file) for file in files if re.search(r'"[/~]', file.read_text(encoding="utf-8"))]
    assert files and not absolute


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_a_number_of_steps_that_is_none_is_named(steps):
    model = load_decomposer(shipped("decomp_diffusion_toy_squares")).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=f"steps={steps}"):
        model.decode(model.encode(torch.zeros(1, 3, 32, 32)), steps=steps)
