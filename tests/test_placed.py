"Components that lie somewhere: shares, costs, gradients, what training leaves out, bad options, saving; and that without them nothing has changed."
import pytest
import torch
from test_runs import QUICK, execute

from decomp_nb.components.layout import layout_dim
from decomp_nb.components.placed import EMPTY, OutlineMaps, build_finder, largest_first, nowhere, own_shares, shares_in_latents
from decomp_nb.components.recombination import swap_across
from decomp_nb.decomposer import load_decomposer
from decomp_nb.factors import Factors, recombine
from decomp_nb.methods.decomp_diffusion import DecompDiffusion, decomp_diffusion_preset
from decomp_nb.worlds.scenes import Scenes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers

SLOTS = dict(encoder_config=dict(kind="ground", channels=8), slots_config=dict(slot_dim=64, key_dim=8, window=5, hidden_dim=16, ground=True))
PLACED = dict(
    image_size=16, n_factors=3, factor_dim=40, patch_size=2, layout_channels=4, composition="masks", ground_dropout=0.5, slots=SLOTS,
    denoiser_config=dict(channels=[16], layers_per_block=1, attention_levels=[], head_dim=8, groups=4),
)
near = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def placed(seed=0, **changes):
    "Layers that start at zero say something"
    torch.manual_seed(seed)
    model = DecompDiffusion(**PLACED | changes)
    with torch.no_grad():
        for p in [*model.denoiser.parameters(), *model.layout.parameters()] if model.layout else model.denoiser.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def images(): return Scenes("toy_squares", 4, size=16).batch(range(4))["image"]


seeded = lambda seed=0: torch.Generator().manual_seed(seed)
noise_for = lambda model, b=4: torch.randn(b, *model.latent_shape, generator=seeded(1))


# --- encoding --------------------------------------------------------------------------------------------------------------------------------------

def test_components_are_clusters_the_ground_first(images):
    model = placed()
    found = model.encode(images, generator=seeded())
    area = found.masks.sum((-2, -1))
    assert found.codes.shape == (4, 3, 40) and (area.diff(dim=1) <= 0).all()
    near(found.masks.sum(1), torch.ones(4, 8, 8))
    assert torch.equal(model.encode(images, generator=seeded()).codes, found.codes)
    corner = found.segmentation()[:, 0, 0]
    assert (corner == 0).float().mean() >= 0.5  # black ground


def test_largest_first_moves_codes_weights_and_masks_together():
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 0, :1], masks[0, 1, 1:], masks[0, 2, 0, 0] = 1, 1, 0.5
    sorted_set = largest_first(Factors(torch.tensor([[[0.0], [1], [2]]]), torch.tensor([[5.0, 6, 7]]), masks))
    assert sorted_set.codes.flatten().tolist() == [1, 0, 2] and sorted_set.weights.tolist() == [[6, 5, 7]] and sorted_set.masks[0, 0].sum() == 12


# --- shares ----------------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_prediction_is_the_sum_of_separate_calls_weighted_place_by_place(images):
    model = placed()
    f, x, t = model.encode(images, generator=seeded()), noise_for(model), torch.tensor([3, 400, 800, 999])
    codes = f.cat(model.null_factors(f)).codes
    each = torch.stack([model.predict_component(x, t, codes[:, i]) for i in range(4)], 1)
    shares = model.place_shares(f)
    near(shares.sum(1), torch.ones(4, 12, 8, 8))
    near(model.predict(x, t, f), (each * shares).sum(1), 1e-4)
    nothing = each[:, -1]
    near(model.guided(f, 3.0)(x, t), nothing + 3 * ((each * shares).sum(1) - nothing), 1e-3)


@torch.no_grad()
def test_a_component_sees_itself_only(images):
    model = placed()
    f, x, t = model.encode(images, generator=seeded()), noise_for(model), torch.full((4,), 700)
    other = f.codes.clone()
    other[:, 2] = other[:, 2].roll(1, 0)
    first = model.predict_components(x, t, f.codes)[:, :2]
    near(model.predict_components(x, t, other)[:, :2], first)
    moved = f.codes[:, 1].clone()
    moved[:, 1] += 1  # a quarter of the picture to the right
    assert (model.predict_component(x, t, moved) - first[:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_weight_0_costs_nothing_and_leaves_its_place_to_nothing(images):
    model = placed()
    f, x, t = model.encode(images, generator=seeded()), noise_for(model), torch.full((4,), 700)
    calls = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    model.predict(x, t, f)
    some = model.predict(x, t, f * torch.tensor([1.0, 0, 1]))
    none = model.predict(x, t, f * 0)
    assert calls == [16, 12, 4]
    near(none, model.predict_component(x, t, model.null_factors(f).codes[:, 0]), 1e-4)
    near(some, model.predict(x, t, f.drop(1)), 1e-4)


def test_shares_follow_outline_weight_and_size():
    window, dim = 5, layout_dim(5) + 3
    codes = nowhere(dim, window).repeat(1, 2, 1)
    codes[..., 3:layout_dim(window)] = 1  # two full outlines at the same place
    codes[0, 1, 2] -= 1  # the second is smaller
    shares = own_shares(Factors(codes), window, 16)
    middle = shares[0, :, 8, 8]
    assert middle[1] > 0.8 and middle[2] < EMPTY
    heavy = own_shares(Factors(codes) * torch.tensor([100.0, 1]), window, 16)
    assert heavy[0, 0, 8, 8] > 0.8
    assert OutlineMaps(dim, window, 2).shares(Factors(nowhere(dim, window)[None, None]), 16).abs().max() == 0
    assert own_shares(Factors(nowhere(dim, window)[None, None]), window, 8, torch.tensor([0.0])).isfinite().all()


@torch.no_grad()
def test_of_latents_shares_are_means_of_finer_ones(images):
    model = placed(image_size=16, latents_path="drawn_dc", denoiser_config=dict(PLACED["denoiser_config"], sample_size=2, in_channels=8))
    f = model.encode(images, generator=seeded())
    shares = shares_in_latents(f, 5, model.latents, 16)
    assert shares.shape == (4, 4, 1, 2, 2)
    near(shares.sum(1), torch.ones(4, 1, 2, 2))
    assert model.decode(f, steps=2).shape == images.shape


# --- training --------------------------------------------------------------------------------------------------------------------------------------

def test_gradients_reach_keys_content_layout_and_denoiser_and_the_keys_are_slowed_down(images):
    model = placed().train()
    out = model({"image": images})
    out["loss"].backward()
    assert out["keys"] > 0
    near(out["loss"].detach(), out["per_image"].mean() + out["keys"])
    moved = {name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"encoder.encoder", "encoder.slot_attention", "layout.values", "layout.layers"} <= moved
    slots = model.encoder.slot_attention
    assert slots.to_k[0].weight.grad.abs().sum() > 0 and slots.content.skip.weight.grad.abs().sum() > 0
    groups = {group["name"]: {id(p) for p in group["params"]} for group in model.parameter_groups()}
    assert id(slots.to_k[0].weight) in groups["encoder"] and id(slots.content.skip.weight) in groups["denoiser"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_training_leaves_out_the_ground_of_some_pictures_and_nothing_paints_there(images):
    model = placed(ground_dropout=0.999).train()
    factors, _ = model.find_to_learn({"image": images})
    assert (factors.weights[:, 0] == 0).all() and (factors.weights[:, 1:] > 0).all()
    shares = model.place_shares(factors)
    assert shares[:, 0].abs().max() == 0 and shares[:, -1].mean() > 0.3
    kept, _ = placed(ground_dropout=0.0).train().find_to_learn({"image": images})
    assert (kept.weights > 0).all() and model.place_shares(kept)[:, -1].abs().max() == 0  # one call less
    near(model.place_shares(kept).sum(1), torch.ones(4, 12, 8, 8))
    resting, _ = model.eval().find_to_learn({"image": images})
    assert (resting.weights > 0).all()


def test_lean_gradients_are_exact(images):
    model = placed(ground_dropout=0.0).train()
    x = model.latents.encode(images)
    f = model.encode(images, generator=seeded())
    grads = []
    for model.component_backward in (False, True):
        model.zero_grad()
        (model.predict(x, torch.full((4,), 600), f) - x).square().mean().backward(retain_graph=True)
        grads.append(torch.cat([p.grad.flatten() for p in model.denoiser.parameters()]))
    near(grads[1], grads[0])


def test_saved_and_loaded_it_is_the_same_and_a_run_resumes(images, tmp_path):
    model = placed()
    model.save_pretrained(tmp_path / "model")
    again = load_decomposer(tmp_path / "model").eval()
    assert type(again) is DecompDiffusion and torch.equal(again.encode(images, generator=seeded()).codes, model.encode(images, generator=seeded()).codes)
    options = dict(preset="tiny", n_factors=3, factor_dim=40, n_images=24, eval_scenes=6, sample_steps=2, eval_seeds=1)
    options |= dict(model_options={name: PLACED[name] for name in ("layout_channels", "composition", "ground_dropout", "slots")} | dict(encoder_config=None), keep="1,1,0")
    for steps in (2, 4):
        execute("train_decomp_diffusion", tmp_path, out_dir=str(tmp_path / "run"), **options, **{**QUICK, "max_steps": steps, "resume": "auto"})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"step": 4' in lines and lines.count('"step": 1,') == 1


# --- recombination ---------------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_recombined_pictures_take_places_along(images):
    model = placed()
    a, b = (model.encode(x, generator=seeded()) for x in (images[:2], images[2:]))
    mixed = recombine(a, b, [1])
    shares = model.place_shares(mixed)
    near(shares.sum(1), torch.ones(2, 12, 8, 8))
    theirs = own_shares(b, 5, 16)[:, 1] > 0.9
    assert own_shares(mixed, 5, 16)[:, 1][theirs].mean() > 0.5
    assert model.swap(images[:2], images[2:], [1, 0, 1], steps=2).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="composition is 'masks'"):
        swap_across(model, model, images, images, [1, 0, 1], steps=1)


# --- bad options -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, complaint", [
    (dict(slots=None), "composition='masks': only components that say where they lie"),
    (dict(slots=None, composition="mean"), "layout_channels: only components"),
    (dict(slots=None, composition="mean", layout_channels=0), "ground_dropout: only components"),
    (dict(encoder_config={"width": 8}), "encoder_config: slots have their own"),
    (dict(composition="learned"), "composition='learned': slots are exchangeable"),
    (dict(composition="mean"), "ground_dropout=0.5: below 1, and only with composition='masks'"),
    (dict(ground_dropout=1.0), "ground_dropout=1.0: below 1"),
    (dict(null_dropout=0.1), "null_dropout: with slots, ground_dropout"),
    (dict(foundation="nowhere"), "foundation: slots need a denoiser that is trained"),
    (dict(denoiser_config={"kind": "tokens"}), "denoiser_config: slots need a denoiser that reads vectors"),
    (dict(slots=SLOTS | dict(slots_config=SLOTS["slots_config"] | dict(n_slots=5))), "slots: n_slots=5, but this model needs 3"),
    (dict(slots=SLOTS | dict(slots_config=SLOTS["slots_config"] | dict(out_dim=48))), "slots: out_dim=48, but this model needs 40"),
    (dict(slots=SLOTS | dict(slots_config=dict(kind="attention"))), "slots: kind='attention', but this model needs 'clusters'"),
    (dict(slots=SLOTS | dict(zooom=2)), "slots: no option 'zooom'"),
    (dict(slots=dict(SLOTS, encoder_config=dict(kind="conv", channels=[8], groups=4))), "ground=True needs features that mark it"),
    (dict(factor_dim=20), "out_dim=20: must be above 28"),
])
def test_options_that_do_not_go_together_are_one_clear_error(changes, complaint):
    with pytest.raises(ValueError, match=complaint): DecompDiffusion(**PLACED | changes)


def test_noise_of_the_encoder_and_pictures_of_another_kind_are_refused(images):
    model = placed()
    with pytest.raises(ValueError, match="pass a seeded generator"): model.encode(images, noise=0.0)
    with pytest.raises(ValueError, match="multiple of|stride"): model.encode(torch.zeros(2, 3, 15, 15))
    with pytest.raises(ValueError, match="n_slots=7"): build_finder(16, 3, 40, slots_config=dict(n_slots=7))


# --- what stays as it is ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["clevr", "celebahq", "tetris", "toy_squares", "tiny"])
def test_published_settings_have_no_places(name):
    options = decomp_diffusion_preset(name)
    assert not {"slots", "layout_channels", "ground_dropout"} & set(options) and options.get("composition", "mean") == "mean"


def test_without_slots_the_start_of_a_model_and_its_step_are_what_they_were(images):
    torch.manual_seed(3)
    model = DecompDiffusion(**decomp_diffusion_preset("tiny"))
    torch.manual_seed(3)
    from decomp_nb.components.plain_unets import vector_denoiser
    from decomp_nb.components.vectors import VectorEncoder
    encoder = VectorEncoder(16, 12, groups=3, width=8, levels=2)
    denoiser = vector_denoiser(16, code_dim=4, in_channels=3, channels=[16, 16], layers_per_block=1, attention_levels=[1], head_dim=8, groups=4)
    for part, mine in ((encoder, model.encoder), (denoiser, model.denoiser)):
        state = mine.state_dict()
        assert all(torch.equal(v, state[name]) for name, v in part.state_dict().items())
    assert [name.split(".")[0] for name in model.state_dict()][-1] == "denoiser" and model.layout is None
    assert [group["name"] for group in model.parameter_groups()] == ["encoder", "denoiser"]
    codes = model.encode(images).codes
    near(codes, encoder(images).unflatten(1, (3, 4)))
