"Decomp Diffusion: what a notebook cell is too small for. Every mode on any batch, mask and K; exact lean gradients; the re-enacted official loop; bad input."
import json
from pathlib import Path

import decomp_benchmark
import papermill
import pytest
import torch
from test_runs import QUICK, execute

from decomp_nb.components.ddim import ddim_invert, decomp_sampler
from decomp_nb.components.diffusion import signal_and_noise
from decomp_nb.components.recombination import decode_across, keep_mask, swap_across
from decomp_nb.components.text import tiny_pipeline
from decomp_nb.components.vectors import SpatialSoftmax
from decomp_nb.decomposer import sample
from decomp_nb.factors import Factors, recombine
from decomp_nb.methods.decomp_diffusion import DecompDiffusion, decomp_diffusion_preset, orthogonality
from decomp_nb.metrics.separation import object_shares, recombination_accuracy, separation
from decomp_nb.training.run_directory import Run

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers


def awake(model, seed=0):
    "Layers that start at zero say something"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return awake(DecompDiffusion(**decomp_diffusion_preset("tiny", **changes)), seed)


@pytest.fixture
def images(): return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def noise_for(model, b=4, seed=1): return torch.randn(b, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


near = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# --- composition -----------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("composition", ["mean", "sum", "learned"])
def test_prediction_is_the_composition_of_separate_calls(composition, images):
    model = tiny(composition=composition)
    if composition == "learned": model.component_logits.copy_(torch.tensor([0.5, -1.0, 2.0]))
    f, x, t = model.encode(images), noise_for(model), torch.tensor([3, 400, 800, 999])
    each = torch.stack([model.predict_component(x, t, f.codes[:, i]) for i in range(3)], 1)
    w = {"mean": torch.ones(3) / 3, "sum": torch.ones(3), "learned": torch.tensor([0.5, -1.0, 2.0]).softmax(0)}[composition]
    near(model.predict(x, t, f), (each * w[:, None, None, None]).sum(1))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunks_change_nothing(chunk, images):
    model = tiny()
    f, options = model.encode(images), dict(steps=3, noise=noise_for(model), guidance_scale=2.0)
    whole = model.decomposition(f, **options)
    model.factor_chunk = chunk
    for a, b in zip(model.decomposition(f, **options), whole): near(a, b)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_batch_draws_what_many_runs_draw(guidance, images):
    model = tiny()
    f, noise = model.encode(images), noise_for(model)
    options = dict(steps=4, guidance_scale=guidance)
    parts, whole = model.decomposition(f, noise=noise, **options)
    for i in range(3): near(parts[:, i], model.decode(f.pick(i), noise=noise, **options), 1e-4)
    near(parts, model.decompose(f, noise=noise, **options), 1e-4)
    near(whole, model.decode(f, noise=noise, **options), 1e-4)
    grown = model.growing(f, [2, 0, 1], noise=noise, **options)
    near(grown[:, 1], model.decode(f.pick([2, 0]), noise=noise, **options), 1e-4)
    near(grown[:, 2], whole, 1e-4)
    film = model.progress(f, 2, noise=noise, **options)
    assert film.shape == (2, 4, 4, 3, 16, 16)
    near(film[-1, :, -1], whole, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm", "euler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_every_sampler_with_guidance(kind, prediction, images):
    model = tiny(scheduler_config={"prediction_type": prediction})
    f, scheduler = model.encode(images), decomp_sampler(kind, model.scheduler)
    draw = lambda s: model.decode(f, steps=4, guidance_scale=s, noise=noise_for(model), scheduler=scheduler, generator=torch.Generator().manual_seed(3))
    assert draw(1.0).isfinite().all() and (draw(1.0) - draw(4.0)).abs().max() > 1e-3
    near(draw(4.0), draw(4.0))


@torch.no_grad()
def test_guidance_is_the_usual_formula(images):
    model = tiny()
    f, x, t = model.encode(images), noise_for(model), torch.tensor([3, 400, 800, 999])
    nothing = model.predict(x, t, Factors(torch.zeros_like(f.codes)))
    near(model.guided(f, 3.0)(x, t), nothing + 3 * (model.predict(x, t, f) - nothing), 1e-4)
    near(model.predict(x, t, model.null_factors(f)), nothing)
    near(model.guided(f.pick(1), 3.0)(x, t), nothing + 3 * (model.predict(x, t, f.pick(1)) - nothing), 1e-4)


@torch.no_grad()
def test_recombining_adding_and_combining_across_models(images):
    model, other = tiny(), tiny(seed=7)
    a, b, noise = images[:2], images[2:], noise_for(model, 2)
    options = dict(steps=3, noise=noise)
    f, g = model.encode(a), model.encode(b)
    near(model.swap(a, b, [1, 0, 1], **options), model.decode(f.replace(1, g), **options))
    near(model.swap(a, b, "1,1,1", **options), model.decode(f, **options))
    near(model.add(a, b, **options), model.decode(f.cat(g), **options))
    near(model.add(a, b, a, **options), model.decode(Factors(f.codes).cat(g, f), **options))
    h = other.encode(b)
    near(swap_across(model, other, a, b, [1, 0, 1], **options), decode_across([model, other], [f.pick([0, 2]), h.pick(1)], **options))
    near(swap_across(model, model, a, b, [1, 0, 1], **options), model.swap(a, b, [1, 0, 1], **options), 1e-4)
    near(swap_across(model, other, a, b, [0, 0, 0], **options), other.decode(h, **options))


class Spy:
    "A scheduler that notes the first answer"
    init_noise_sigma = 1.0

    def __init__(self, seen): self.seen = seen
    def __deepcopy__(self, memo): return self
    def set_timesteps(self, n, device=None): self.timesteps = torch.arange(1)
    def scale_model_input(self, x, t): return x

    def step(self, out, t, x):
        self.seen.append(out)
        return type("Step", (), {"prev_sample": out})


@torch.no_grad()
def test_across_asks_at_the_same_time(images):
    "The mean over all components, each asked of its own model at the sampler's time (the spy's is 0)"
    model, other = tiny(), tiny(seed=7)
    seen, x = [], noise_for(model, 2)
    f, h = model.encode(images[:2]).pick([0, 2]), other.encode(images[2:]).pick(1)
    decode_across([model, other], [f, h], steps=1, noise=x, scheduler=Spy(seen))
    t = torch.zeros(2, dtype=torch.long)
    near(seen[0], (2 * model.predict(x, t, f) + other.predict(x, t, h)) / 3)


@torch.no_grad()
def test_inversion_leads_back():
    "With the exact denoiser of Gaussian pictures DDIM is a flow: up to the noise and down again ends at the start, which another noise does not"
    scheduler, spread, steps = tiny().scheduler, 0.2, 200  # no pixel beyond ±1, where the clean picture is clipped

    def predict(x, t):
        a, s = signal_and_noise(scheduler, t, x)
        return spread ** 2 * a / (spread ** 2 * a ** 2 + s ** 2) * x
    ladder = decomp_sampler("ddim", scheduler)
    ladder.set_timesteps(steps)
    known = spread * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = ddim_invert(predict, known, scheduler, ladder.timesteps.flip(0).tolist())[-1]
    error = lambda noise: (sample(predict, noise, ladder, steps) - known).abs().mean() / spread
    assert error(own) < 0.05 and error(torch.randn_like(known)) > 0.5 and 0.8 < own.std() < 1.2


# --- training --------------------------------------------------------------------------------------------------------------------------------------

def batch_for(model, images):
    return {"image": images, "noise": noise_for(model, len(images)), "timesteps": torch.tensor([3, 400, 800, 999])[:len(images)]}


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_component_by_component_is_the_same_gradient(chunk, images):
    model = tiny(composition="learned", orthogonality=0.1).train()
    grads = []
    for lean in (False, True):
        model.component_backward, model.factor_chunk = lean, chunk if lean else 0
        model.zero_grad()
        model(batch_for(model, images))["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-6 * grads[0].norm() and (grads[0] - grads[1]).abs().max() < 1e-6


def test_lean_gradients_repeat_the_dropout(images):
    "The recomputed forward draws the dropout masks of the first one: two equal runs, equal gradients, different from no dropout"
    def gradient(lean, dropout=0.3):
        model = tiny(denoiser_config={"dropout": dropout}).train()
        model.component_backward = lean
        torch.manual_seed(11)
        model(batch_for(model, images))["loss"].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    near(gradient(True), gradient(True), 1e-7)
    assert (gradient(True) - gradient(True, 0.0)).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing(images):
    model, grads = tiny().train(), []
    for _ in range(2):
        model.zero_grad()
        model(batch_for(model, images))["loss"].backward()
        grads.append(model.encoder.last.weight.grad.clone())
        model.enable_gradient_checkpointing()
    near(grads[0], grads[1], 1e-6)


def test_null_dropout_blanks_whole_pictures(images):
    model = tiny(null_dropout=0.5).train()
    f = model.encode(images.repeat(50, 1, 1, 1))
    shown = model.drop_condition(f).codes
    blank = (shown == 0).all(-1)
    assert (blank.all(1) | (~blank).all(1)).all() and 0.3 < blank.float().mean() < 0.7
    assert model.eval().drop_condition(f) is f


def test_dead_codes_are_rewarded_only_officially():
    codes = torch.eye(4)[None, :3] * torch.tensor([1.0, 1, 0])[:, None]
    assert orthogonality(codes).item() == 0 and orthogonality(codes, "official").item() == pytest.approx(-1 / 9)


def test_groups_cover_all_weights():
    model = tiny(composition="learned")
    named = [id(p) for g in model.parameter_groups() for p in g["params"]]
    assert len(named) == len(set(named)) and set(named) == {id(p) for p in model.parameters()}


@torch.no_grad()
def test_the_official_loop_draws_the_same_pictures(images):
    "The all-off setting of the benchmark is the same mathematics"
    model = tiny()
    noise = noise_for(model, 2)
    slow = decomp_benchmark.official_picture(model, images[:2], noise, steps=3)
    parts, whole = model.decomposition(model.encode(images[:2]), steps=3, noise=noise, scheduler=decomp_sampler("ddim", model.scheduler))
    near(torch.cat([parts, whole[:, None]], 1), model.latents.decode(slow.flatten(0, 1)).unflatten(0, (2, -1)), 1e-4)
    for case in (decomp_benchmark.train_step, decomp_benchmark.picture):
        for levers in ({}, dict(sdpa=True, bf16=True, channels_last=True, **(dict(one_run=True) if case is decomp_benchmark.picture else dict(fused=True, lean=True)))):
            step, n = case(decomp_diffusion_preset("tiny"), 1, **({"sample_steps": 2} if case is decomp_benchmark.picture else {}), **levers)
            with torch.enable_grad(): step()


# --- the second lineage ----------------------------------------------------------------------------------------------------------------------------

TOKENS = dict(kind="tokens", sample_size=8, in_channels=4, out_channels=4, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=1, attention_head_dim=1,
              down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


@pytest.mark.parametrize("frozen", [False, True])
def test_latents_and_tokens(frozen, tmp_path):
    pipeline = str(tiny_pipeline(tmp_path / "pipeline"))
    space = dict(foundation=pipeline) if frozen else dict(latents_path=pipeline, denoiser_config=TOKENS, scheduler_config=dict(prediction_type="epsilon"))
    model = DecompDiffusion(image_size=32, n_factors=3, factor_dim=6, encoder_config=dict(width=4), **space)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    before = {k: v.clone() for k, v in model.unet.state_dict().items()} if frozen else {}
    model.train()({"image": x})["loss"].backward()
    assert model.encoder.first.weight.grad.abs().sum() > 0
    if frozen: assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"encoder", "to_token"} and all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    else: assert model.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight.grad.abs().max() < 1e-9  # one token: the softmax is 1
    model.eval().save_pretrained(tmp_path / "model")
    again = DecompDiffusion.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        f, noise = model.encode(x), noise_for(model, 2)
        near(again.decode(f, steps=2, noise=noise), model.decode(f, steps=2, noise=noise))
        assert model.decomposition(f, steps=2, noise=noise)[0].shape == (2, 3, 3, 32, 32)


# --- scores ----------------------------------------------------------------------------------------------------------------------------------------

def test_scores_of_made_up_components():
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[0, :3, :3], masks[0, 5:, 5:] = 1, 2
    image = torch.full((1, 3, 8, 8), -1.0)
    image[0, 0][masks[0] == 1] = 0.6
    image[0, 1][masks[0] == 2] = 0.6
    part = lambda *which: torch.where(torch.isin(masks, torch.tensor(which))[:, None], image, -1.0)
    near(object_shares(torch.stack([part(1), part(2), part()], 1), image, masks)[0], torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
    apart = lambda *parts: separation(torch.stack(parts, 1), image, masks)["separated"].item()
    assert apart(part(1), part(2)) and apart(part(2), part(), part(1))  # a spare component may stay empty
    assert not apart(part(1, 2), part()) and not apart(part(1), part(1)) and not apart(part(1, 2), part(2))
    ghost = part(2)
    ghost[..., 0:4, 4:8] = 0.6
    assert not apart(part(1), ghost)
    shares = object_shares(torch.stack([part(1), part(2)], 1), image, masks)
    other = image.flip(-1)
    keep = torch.tensor([True, False])
    score = lambda drawn: recombination_accuracy(drawn, (shares, shares), (image, other), (masks, masks.flip(-1)), keep).item()
    right = torch.maximum(part(1), part(2).flip(-1))
    assert score(right) == 1 and score(image) == 0.5 and score(torch.full_like(image, -1.0)) == 0.5


# --- an encoder that says where -----------------------------------------------------------------------------------------------------------------

def test_factors_share_out_the_places():
    torch.manual_seed(0)
    layer = SpatialSoftmax(3, 6, groups=3, maps=2)
    x = torch.full((1, 3, 9, 9), -1.0)
    for channel, (row, column) in enumerate([(0, 0), (8, 8), (4, 2)]): x[0, channel, row, column] = 1.0
    with torch.no_grad(): layer.to_maps.weight.copy_(20 * torch.eye(3).repeat_interleave(2, 0)[..., None, None])
    looks = layer.maps_and_looks(x)[1].unflatten(-1, (9, 9))
    near(looks.sum((-1, -2)), torch.ones(1, 3, 2))
    for factor, (row, column) in enumerate([(0, 0), (8, 8), (4, 2)]): assert (looks[0, factor, :, row, column] > 0.99).all()
    with torch.no_grad():  # the third factor would look at the first's place too, but somebody is there who wants it more
        layer.to_maps.weight[4:] = torch.tensor([10.0, 0, 5])[:, None, None]
        taken = layer.maps_and_looks(x)[1].unflatten(-1, (9, 9))[0, 2, 0]
        alone = SpatialSoftmax(3, 2, maps=1)
        alone.to_maps.weight[:] = layer.to_maps.weight[4:5]
        free = alone.maps_and_looks(x)[1].unflatten(-1, (9, 9))[0, 0, 0]
    assert free[0, 0] > 0.99 and taken[0, 0] < 0.01 and taken[4, 2] > 0.99


def test_each_factor_reads_maps_of_its_own(images):
    model = tiny(encoder_config={"readout": "spatial_softmax", "maps": 4})
    before = model.encode(images).codes
    with torch.no_grad(): model.encoder.last.to_vector.weight[:4] += 1  # rows of the first factor
    changed = (model.encode(images).codes - before).abs().amax((0, 2))
    assert changed[0] > 0.01 and (changed[1:] == 0).all()
    assert "encoder.last.weight" in dict(tiny().named_parameters())  # names of official weights are as they were


# --- bad input -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, complaint", [
    (dict(n_factors=0), "n_factors=0"), (dict(composition="maximum"), "composition='maximum'"), (dict(data_range="byte"), "data_range='byte'"),
    (dict(encoder_config={"widht": 8}), "no option 'widht'"), (dict(denoiser_config={"chanels": 8}), "no option 'chanels'"),
    (dict(encoder_config={"norm": "layer"}), "norm='layer'"), (dict(encoder_config={"readout": "mean"}), "readout='mean'"), (dict(encoder_config={"readout": "spatial_softmax", "groups": 5}), "groups=5"),
    (dict(encoder_config={"end": "tanh"}), "end='tanh'"), (dict(denoiser_config={"head_dim": 7}), "head_dim=7"),
    (dict(denoiser_config={"channels": [16, 18]}), "groups=4"), (dict(denoiser_config={"attention_levels": [4]}), "no level 4"),
    (dict(denoiser_config={"sample_size": 8}), r"\(3, 16, 16\).*3 channels of side 8"), (dict(scheduler_config={"prediction_type": "picture"}), "picture"),
    (dict(scheduler_config={"beta": 1}), "no option beta"), (dict(orthogonality=0.1, orthogonality_kind="cosine"), "orthogonality_kind='cosine'"),
])
def test_a_config_that_cannot_work_names_its_field(options, complaint, images):
    with pytest.raises(ValueError, match=complaint): DecompDiffusion(**decomp_diffusion_preset("tiny", **options))({"image": images})


def test_masks_and_pictures_that_do_not_fit(images):
    model = tiny()
    for keep, complaint in [(None, "3 components: give keep with 3 entries"), ([1, 0], "keep has 2 entries, but there are 3"), ("1,0,1,0", "4 entries"), ([1, 2, 0], "only 0 and 1")]:
        with pytest.raises(ValueError, match=complaint): model.swap(images, images, keep)
    assert keep_mask(None, 4).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match=r"built for \(b, 3, 16, 16\)"): model.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="add up to 0"): model.decode(model.encode(images) * torch.tensor([1.0, -1.0, 0.0]), steps=1)
    with pytest.raises(ValueError, match="k is 3 and 2"): recombine(model.encode(images), model.encode(images).pick([0, 1]), [0])
    with pytest.raises(ValueError, match="start=7"): model.invert(images, steps=5, start=7)
    with pytest.raises(ValueError, match="preset 'clevrr'"): decomp_diffusion_preset("clevrr")


@pytest.mark.parametrize("changes, complaint", [(dict(n_factors=4), "n_factors is 3 and 4"), (dict(factor_dim=6), "factor_dim is 4 and 6"), (dict(image_size=32), "latent_shape"),
                                                (dict(data_range="unit"), "data_range"), (dict(scheduler_config={"prediction_type": "epsilon"}), "prediction_type"),
                                                (dict(scheduler_config={"beta_schedule": "linear"}), "noise schedules")])
def test_models_that_cannot_share_a_picture(changes, complaint, images):
    with pytest.raises(ValueError, match=complaint): swap_across(tiny(), tiny(**changes), images, images, [1, 0, 1], steps=1)


# --- the run notebook ------------------------------------------------------------------------------------------------------------------------------

SMALL = dict(preset="tiny", n_images=24, eval_scenes=6, sample_steps=2, eval_seeds=2)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decomp")
    execute("train_decomp_diffusion", folder, out_dir=str(folder / "run"), **SMALL, **QUICK)
    return folder / "run"


def test_train_leaves_a_run_that_is_enough(first_run):
    run, scores = Run(first_run), json.loads((first_run / "scores.json").read_text())
    assert run.config["model"]["_class_name"] == "DecompDiffusion" and [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4]
    assert set(scores) == {"all components", "the mean picture"} and "separated" in scores["all components"] and run.curve("eval/psnr")[0] == [2, 4]
    assert (first_run / "pictures" / "film.gif").read_bytes()[:3] == b"GIF" and 0 <= json.loads((first_run / "recombination.json").read_text())["accuracy"] <= 1
    assert DecompDiffusion.from_pretrained(first_run / "model").n_factors == 3


def test_components_of_a_run_are_evaluated(first_run, tmp_path):
    execute("eval_components", tmp_path, run_dir=str(first_run), n_scenes=6, seeds=2, sample_steps=2, batch_size=4, examples=2)
    found = json.loads((first_run / "eval_components.json").read_text())
    assert set(found["scores"]) == {"all components", "the mean picture"} and found["scores"]["all components"]["once"]["n"] == 2
    assert 0 <= found["recombined"]["recombined"]["right"]["mean"] <= 1 and found["kept"] == "1,1,0" and (first_run / "pictures" / "eval_components.png").exists()
    with pytest.raises(papermill.PapermillExecutionError, match="has no true masks"):
        execute("eval_components", tmp_path, run_dir=str(first_run), data="shapes3d", n_scenes=6)
    with pytest.raises(papermill.PapermillExecutionError, match="LSD has no components that are pictures"):
        execute("eval_components", tmp_path, run_dir="lsd_shapes", n_scenes=2)


def test_a_union_of_data_sets_learned_weights_and_a_partner(first_run, tmp_path):
    execute("train_decomp_diffusion", tmp_path, out_dir=str(tmp_path / "run"), more_data="shapes", partner=str(first_run), keep="1,0,1", factor_chunk=2, component_backward=True,
            guidance_scale=2.0, sampler="dpm", model_options={"composition": "learned", "null_dropout": 0.1}, **SMALL, **QUICK)
    assert (tmp_path / "run" / "pictures" / "across.png").is_file() and "separated" not in json.loads((tmp_path / "run" / "scores.json").read_text())["all components"]


def test_fewer_images_than_a_batch_are_refused(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="smaller than batch_size=64"):
        execute("train_decomp_diffusion", tmp_path, out_dir=str(tmp_path / "run"), **SMALL, **{**QUICK, "batch_size": 64})


@pytest.mark.parametrize("recipe", sorted((ROOT / "papermill_runs" / "recipes").glob("decomp_diffusion_*.yaml"), key=lambda p: p.stem), ids=lambda p: p.stem)
def test_recipes_name_real_parameters_and_presets(recipe):
    import yaml
    values = yaml.safe_load(recipe.read_text())
    assert set(values) <= set(papermill.inspect_notebook(str(ROOT / "nbs" / "train_decomp_diffusion.ipynb")))
    decomp_diffusion_preset(values["preset"], **values.get("model_options", {}))
    assert values["out_dir"] == f"papermill_runs/out/{recipe.stem}"
