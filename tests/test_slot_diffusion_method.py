"SlotDiffusion, SLATE and Slot Attention: what a notebook cell is too small for — options of training, clips, saved folders, presets, bad configs."
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.autoencoders import vq_model
from decomp_nb.components.dvae import DVAE
from decomp_nb.components.latents import VQLatents
from decomp_nb.components.slot_sets import drop_slots, keep_largest, merge_duplicates, mix_slots, swap_slots
from decomp_nb.components.slots import SlotAttention
from decomp_nb.data.cache import cache_features
from decomp_nb.factors import Factors
from decomp_nb.components.token_model import load_dvae
from decomp_nb.methods.slate import SLATE, slate_preset
from decomp_nb.methods.slot_attention_ae import SlotAttentionAE, slot_attention_preset
from decomp_nb.methods.slot_diffusion import SlotDiffusion, slot_diffusion_denoiser, slot_diffusion_preset
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.engine import parameter_groups
from decomp_nb.training.record import check_model, model_record

EYES = dict(image_size=16, encoder_config=dict(kind="conv", image_size=16, channels=[8, 8], stride=2, kernel=3, groups=0, activation="relu"),
            slots_config=dict(n_slots=4, slot_dim=16, hidden_dim=32, init="learned", position="ends"))


def diffusion(**options):
    torch.manual_seed(0)
    config = EYES | dict(denoiser_config=slot_diffusion_denoiser(4, slot_dim=16, channels=(8, 16), layers_per_block=1, head_dim=8, groups=4, dropout=0.0)) | options
    model = SlotDiffusion(**config)
    model.attach(VQLatents(vq_model(4, width=8, multipliers=(1, 1, 1), layers_per_block=1, n_codes=16, groups=4, attention=False).eval()))
    return model


def slate(**options):
    torch.manual_seed(0)
    model = SLATE(**(EYES | dict(decoder_config=dict(vocabulary=16, dim=16, n_layers=2, n_heads=2, dropout=0.0)) | options))
    model.attach(DVAE(16, width=8))
    return model


def mixture(**options):
    torch.manual_seed(0)
    return SlotAttentionAE(**(EYES | dict(decoder_config=dict(channels=[8, 8], start=8, kernel=3)) | options))


PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
METHODS = dict(diffusion=diffusion, slate=slate, mixture=mixture)


@pytest.mark.parametrize("name", METHODS)
def test_one_contract_for_three_decoders(name, tmp_path):
    "encode → Factors, decode(factors) → pictures, a loss with gradients everywhere, groups for the optimiser, save and load"
    model = METHODS[name]()
    loss = model.train()({"image": PICTURES})["loss"]
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0) and "to_k" not in n and "to_q" not in n]
    assert not [n for n in silent if n.startswith(("encoder", "slot_attention.slot_mean", "slot_attention.gru"))], silent
    groups = {g["name"]: g["lr"] for g in parameter_groups(model, TrainConfig(learning_rate=1e-3, encoder_lr_scale=0.5))}
    assert groups == {"encoder": 5e-4, "decoder": 1e-3}
    model.eval()
    with torch.no_grad(): factors = model.encode(PICTURES)
    assert factors.codes.shape == (3, 4, 16) and factors.masks.shape[:2] == (3, 4)
    torch.testing.assert_close(factors.masks.sum(1), torch.ones_like(factors.masks[:, 0]))
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    paint = lambda m, f: m.decode(f, steps=3, noise=noise, guidance_scale=1.0)
    painted = paint(model, factors)
    assert painted.shape == PICTURES.shape and painted.abs().max() <= 1
    torch.testing.assert_close(paint(model, factors * torch.tensor([1.0, 0, 1, 1])), paint(model, factors.drop(1)), rtol=1e-3, atol=1e-3)
    assert model.reconstruct(PICTURES, steps=2).shape == PICTURES.shape and model.decompose(factors, steps=2).shape == (3, 4, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.frozen_modules().update(model.frozen_modules())
    torch.testing.assert_close(paint(again, factors), painted)
    assert set(model.diagnostics({"image": PICTURES})) == {"slot_entropy", "slot_cosine", "empty_slots"}


@pytest.mark.parametrize("name", METHODS)
def test_clips_keep_a_time_axis(name):
    model, clip = METHODS[name]().eval(), PICTURES[None].expand(2, -1, -1, -1, -1)
    with torch.no_grad(): factors = model.encode(clip)
    side = 16 if name == "mixture" else 8  # masks of the decoder, and of the attention
    assert factors.codes.shape == (2, 3, 4, 16) and factors.masks.shape == (2, 3, 4, side, side)
    if name == "mixture":
        with torch.no_grad(): assert model.encode(clip, masks="attention").masks.shape == (2, 3, 4, 8, 8)


def test_training_options_change_only_what_the_decoder_reads():
    torch.manual_seed(0)
    factors = Factors(torch.randn(3, 4, 16), None, torch.rand(3, 4, 8, 8).softmax(1))
    model = mixture(keep_slots=2)
    for mode in (True, False): assert (model.train(mode).prune_slots(factors).weights > 0).sum(1).tolist() == [2] * 3
    dropping = mixture(slot_dropout=0.9)
    assert dropping.eval().prune_slots(factors).weights is None and (dropping.train().prune_slots(factors).weights == 0).any()


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equal_slots_are_one_outside_training(name):
    "`merge_threshold` has one meaning for every method, for pictures and for clips; what came before it is still read"
    model = METHODS[name](merge_threshold=-1.0)
    assert (model.eval().encode(PICTURES).weights > 0).sum(1).tolist() == [1] * 3 and model.train().encode(PICTURES).weights is None
    assert model.eval().encode(PICTURES, merge_threshold=0).weights is None
    clip = model.encode(PICTURES[None])
    assert (clip.weights > 0).sum(-1).tolist() == [[1] * 3] and len(set(clip.weights.argmax(-1).flatten().tolist())) == 1


@pytest.mark.parametrize("name", METHODS)
def test_clips_are_trained_on_and_decoded_as_their_frames(name):
    model = METHODS[name]()
    clip = PICTURES[None].expand(2, -1, -1, -1, -1)
    draws = dict(noise=torch.randn(2, 3, 3, 4, 4), timesteps=torch.full((2, 3), 500)) if name == "diffusion" else {}
    loss = model.train()({"image": clip, **draws})["loss"]
    loss.backward()
    assert loss.isfinite() and model.slot_attention.slot_mean.grad.abs().sum() > 0
    with torch.no_grad():
        factors = model.eval().encode(clip)
        loss_of_frames = model({"image": clip[:, :1].flatten(0, 1), **{key: value[:, :1].flatten(0, 1) for key, value in draws.items()}})["loss"]
        torch.testing.assert_close(model({"image": clip[:, :1], **{key: value[:, :1] for key, value in draws.items()}})["loss"], loss_of_frames)
        if name != "diffusion":
            pictures = model.decode(factors)
            assert pictures.shape == clip.shape
            torch.testing.assert_close(pictures[:, 1], model.decode(Factors(*(None if v is None else v[:, 1] for v in factors))))


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_of_decode_are_refused(name):
    with pytest.raises(TypeError, match="stpes"): METHODS[name]().decode(Factors(torch.zeros(1, 4, 16)), stpes=3)


@pytest.mark.parametrize("old", ["merge_twins", "merge_above"])
def test_configs_of_older_versions_load(old, tmp_path):
    for name, make in METHODS.items():
        make(merge_threshold=0.9).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config[old] = config.pop("merge_threshold")
        if name == "diffusion":
            config = {key: value for key, value in config.items() if key not in ("n_registers", "contrast_weight")} | {"ask_codebook": True}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert type(make()).from_pretrained(tmp_path / name).config.merge_threshold == 0.9
    (tmp_path / "diffusion" / "config.json").write_text(json.dumps(json.loads((tmp_path / "diffusion/config.json").read_text()) | {"ask_codebook": False}))
    with pytest.raises(ValueError, match="ask_codebook is no longer an option of SlotDiffusion"): SlotDiffusion.from_pretrained(tmp_path / "diffusion")


def test_registers_are_read_and_are_no_factors():
    plain, registered = diffusion(), diffusion(n_registers=3)
    x, t = torch.randn(3, *plain.latent_shape), torch.tensor([3, 500, 900])
    with torch.no_grad():
        factors = registered.eval().encode(PICTURES)
        assert factors.n_factors == 4 and registered.tokens(factors).n_factors == 7
        assert (registered.tokens(factors * torch.tensor([1.0, 0, 1, 1])).weights == torch.tensor([1.0, 0, 1, 1, 1, 1, 1])).all()
        before = registered.predict(x, t, factors)
        registered.registers += 1
        assert (registered.predict(x, t, factors) - before).abs().max() > 1e-6 or registered.denoiser.conv_out.weight.abs().max() == 0


def test_contrast_needs_training_and_is_subtracted():
    model = diffusion(contrast_weight=0.1, contrast_rate=1.0)
    torch.manual_seed(0)
    out = model.train()({"image": PICTURES})
    torch.testing.assert_close(out["loss"].detach(), out["denoising"] - 0.1 * out["swapped"])
    assert set(model.eval()({"image": PICTURES})) == {"loss"}


def test_sampling_asks_the_codebook_only_where_there_is_one():
    assert diffusion().sampler.project is not None
    pixels = SlotDiffusion(**EYES, patch_size=4, denoiser_config=slot_diffusion_denoiser(4, slot_dim=16, channels=(8, 16), layers_per_block=1, head_dim=8, groups=4, in_channels=48))
    x = torch.randn(2, 48, 4, 4)
    assert pixels.sampler.project(x) is x and pixels.latent_shape == x.shape[1:]


def test_guidance_needs_a_model_that_was_trained_for_it():
    factors = Factors(torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="guidance"): diffusion().decode(factors, steps=1, guidance_scale=2.0)
    assert diffusion(null_dropout=0.5).train().drop_condition(Factors(torch.ones(64, 4, 16))).codes.sum((1, 2)).unique().numel() == 2
    assert diffusion(null_dropout=0.1).decode(factors, steps=2, guidance_scale=2.0).shape == (1, 3, 16, 16)


def test_methods_without_a_denoiser_say_so():
    for model in (slate(), mixture()):
        with pytest.raises(ValueError, match="no denoiser"): model.predict(torch.zeros(1), torch.zeros(1), Factors(torch.zeros(1, 4, 16)))


def test_slate_finds_its_words_in_its_own_folder_first(tmp_path):
    model = slate().eval()
    model.save_pretrained(tmp_path / "slate")
    model.dvae.save_pretrained(tmp_path / "slate" / "dvae")
    config = json.loads((tmp_path / "slate/config.json").read_text())
    (tmp_path / "slate/config.json").write_text(json.dumps(config | {"dvae_path": "dvae"}))
    again = SLATE.from_pretrained(tmp_path / "slate")
    assert torch.equal(again.dvae.tokens(PICTURES), model.dvae.tokens(PICTURES)) and not any(p.requires_grad for p in again.dvae.parameters())
    with pytest.raises(ValueError, match="dvae_path"): load_dvae(None)
    with pytest.raises(FileNotFoundError, match="no discrete VAE"): load_dvae("nowhere")
    with pytest.raises(ValueError, match="vocabulary=16"): model.attach(DVAE(8, width=8))


@pytest.mark.parametrize("name", METHODS)
def test_cached_features_replace_a_frozen_encoder(name, tmp_path):
    vit = dict(kind="vit", image_size=16, vit_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8, image_size=16))
    model = METHODS[name](encoder_config=vit).train()
    kept = cache_features([{"image": x} for x in PICTURES], model.encoder, tmp_path, dtype="float32")
    batch = torch.utils.data.default_collate([kept[i] for i in range(3)])
    draws = dict(noise=torch.ones(3, 3, 4, 4), timesteps=torch.tensor([5, 500, 900])) if name == "diffusion" else {}
    losses = [model({**items, **draws})["loss"].item() for items in (batch, {"image": batch["image"]})]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert model.diagnostics(batch) == pytest.approx(model.diagnostics({"image": batch["image"]}), rel=1e-4)
    assert model({**batch, **draws, "features": torch.zeros_like(batch["features"])})["loss"].item() != pytest.approx(losses[0], rel=1e-5)  # they are what is read
    with pytest.raises(ValueError, match="is trained"): cache_features([{"image": x} for x in PICTURES], METHODS[name]().encoder, tmp_path)


def test_verbs_of_slots():
    torch.manual_seed(0)
    factors = Factors(torch.randn(4, 6, 5), None, torch.rand(4, 6, 3, 3))
    assert mix_slots(factors).masks.shape == factors.masks.shape
    for b in range(4):
        for k in range(6): assert torch.equal(mix_slots(factors).masks[b, k], factors.masks[(b + k) % 4, k])
    assert (drop_slots(factors, 0.5, torch.Generator().manual_seed(0)).weights.sum(1) >= 1).all() and drop_slots(factors, 0.0) is factors
    assert torch.equal(swap_slots(factors, 1.0).codes, factors.codes.roll(-1, 0))
    with pytest.raises(ValueError, match="masks"): keep_largest(factors._replace(masks=None), 2)
    twin = factors.cat(factors.pick([0]))
    merged = merge_duplicates(twin, 0.999)
    torch.testing.assert_close(merged.masks[:, 0], 2 * factors.masks[:, 0])
    assert (merged.weights == torch.tensor([2.0] + [1.0] * 5 + [0.0])).all() and (merged.masks[:, 6] == 0).all()


@pytest.mark.parametrize("preset", [slot_diffusion_preset, slate_preset, slot_attention_preset])
def test_presets_build_and_refuse_unknown_names(preset):
    cls = {slot_diffusion_preset: SlotDiffusion, slate_preset: SLATE, slot_attention_preset: SlotAttentionAE}[preset]
    for name in ("tiny", "shapes"): cls(**preset(name))
    assert preset("clevrtex", slots_config=dict(n_slots=5))["slots_config"] == preset("clevrtex")["slots_config"] | dict(n_slots=5)
    with pytest.raises(ValueError, match="'shapes'"): preset("nothing")


@pytest.mark.parametrize("make, complaint", [
    (lambda: SlotDiffusion(**EYES), "denoiser_config: not given"),
    (lambda: diffusion(slots_config=dict(n_slots=4, slot_dim=8)), "cross_attention_dim is 16"),
    (lambda: diffusion(contrast_rate=0.0), "contrast_rate=0.0"),
    (lambda: diffusion(image_size=32), "encoder_config says image_size=16"),
    (lambda: SlotDiffusion(**EYES, denoiser_config=slot_diffusion_denoiser(8, slot_dim=16, channels=(8, 16), groups=4, head_dim=8)).latents, "built for 3 channels of side 8"),
    (lambda: SLATE(**EYES), "decoder_config"),
    (lambda: mixture(mask_source="dreams"), "mask_source='dreams'"),
    (lambda: SlotAttentionAE(**EYES, decoder_config=dict(channels=[8], start=5)), "image_size=16"),
    (lambda: diffusion(scheduler_config=dict(prediction_type="picture")), "picture"),
    (lambda: mixture(zoom=0.0).eval().encode(PICTURES), "zoom=0.0"),
    (lambda: SlotAttention(10, context=1), "context: 10 channels"),
    (lambda: SlotAttention(8, context=-1), "context=-1"),
    (lambda: SlotAttention(8, init="kmeans++").start(2), "start_on"),
    (lambda: SlotAttention(8, init="kmeans++")(torch.rand(2, 8, 4, 4), n_slots=0), "n_slots=0"),
])
def test_a_config_that_cannot_work_names_its_field(make, complaint):
    with pytest.raises(ValueError, match=complaint): make()


def test_runs_of_older_versions_go_on(tmp_path):
    "A run directory names its model: options that have come since are at their defaults, renamed ones are the same"
    model = mixture(merge_threshold=0.9)
    record = model_record(model)
    old = {key: value for key, value in record.items() if key not in ("merge_threshold", "zoom")} | {"merge_above": 0.9}
    (tmp_path / "config.json").write_text(json.dumps({"model": old}))
    check_model(tmp_path / "config.json", model)
    with pytest.raises(ValueError, match="merge_threshold: 0.9 in the run, 0.0 now"): check_model(tmp_path / "config.json", mixture())
    with pytest.raises(ValueError, match="SlotAttentionAE"): check_model(tmp_path / "config.json", slate())


def test_slate_of_an_earlier_version(tmp_path):
    "Its decoder was called writer: in the config, in the weights, in calls"
    model = slate().eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["writer_config"] = config.pop("decoder_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = next(tmp_path.glob("*.safetensors"))
    weights = {name.replace("decoder.", "writer.", 1): value for name, value in load_file(file).items()}
    assert any(name.startswith("writer.") for name in weights)
    save_file(weights, file)
    again = SLATE.from_pretrained(tmp_path).eval().attach(model.dvae)
    with torch.no_grad(): factors = model.encode(PICTURES)
    with pytest.warns(DeprecationWarning, match="generate"): assert torch.equal(again.write(factors), model.generate(factors))
    with pytest.warns(FutureWarning, match="writer_config is now decoder_config"):
        SLATE(**EYES, writer_config=dict(vocabulary=16, dim=16, n_layers=1, n_heads=2))


def test_merging_under_its_old_names():
    "An option keeps its old name for one version, in constructors and in calls"
    with pytest.warns(FutureWarning, match="merge_above is now merge_threshold"): model = mixture(merge_above=0.9).eval()
    assert model.config.merge_threshold == 0.9
    with torch.no_grad():
        start = torch.zeros(1, 4, 16)
        with pytest.warns(FutureWarning, match="merge_twins is now merge_threshold"):
            old = model.encode(PICTURES[:1], noise=start, merge_twins=-1.0)
        new = model.encode(PICTURES[:1], noise=start, merge_threshold=-1.0)
        assert torch.equal(old.weights, new.weights) and (new.weights == 0).any()
