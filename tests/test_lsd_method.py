"LSD and Stable-LSD: what a notebook cell is too small for — other pipelines, other widths, damaged folders, and that nothing frozen is trained or saved."
import json

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from decomp_nb.components.slot_sets import changed_region, drop_slots, repaint
from decomp_nb.components.text import quiet, tiny_pipeline
from decomp_nb.decomposer import load_decomposer
from decomp_nb.factors import Factors
from decomp_nb.methods.lsd import LSD, lsd_preset
from decomp_nb.methods.stable_lsd import StableLSD


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return LSD(**lsd_preset("tiny", null_dropout=0.1)).eval()


@pytest.fixture(scope="module")
def foundations(tmp_path_factory):
    "A random text-to-image pipeline and a random DINOv2, in the layout of the real ones"
    folder = tmp_path_factory.mktemp("foundations")
    pipeline = tiny_pipeline(folder / "pipeline")
    torch.manual_seed(1)
    dino = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7))
    with quiet(): dino.save_pretrained(folder / "dino")
    return str(pipeline), str(folder / "dino")


def stable(foundations, **options):
    pipeline, dino = foundations
    return StableLSD(pipeline, dict(kind="dino", name_or_folder=dino, image_size=32, resolution=56),
                     dict(n_slots=3, slot_dim=16, hidden_dim=16, n_iterations=2), image_size=32, **options)


def noise_and_time(model, b=2):
    return torch.randn(b, *model.latent_shape, generator=torch.Generator().manual_seed(2)), torch.tensor([5, 900])[:b]


@torch.no_grad()
def test_weight_zero_is_a_dropped_token_and_weight_two_a_doubled_one(tiny):
    x, t = noise_and_time(tiny)
    f = Factors(torch.randn(2, 4, 16))
    near = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiny.predict(x, t, f * torch.tensor([1.0, 0, 1, 1])), tiny.predict(x, t, f.drop(1)), **near)
    torch.testing.assert_close(tiny.predict(x, t, f * torch.tensor([1.0, 2, 1, 1])), tiny.predict(x, t, f.cat(f.pick(1))), **near)
    zeroed = f._replace(codes=f.codes * torch.tensor([1.0, 0, 1, 1])[:, None])
    assert (tiny.predict(x, t, zeroed) - tiny.predict(x, t, f.drop(1))).abs().max() > 1e-3  # a zero vector is something else


def test_slot_dropout_never_leaves_an_empty_set():
    f = drop_slots(Factors(torch.zeros(500, 4, 3)), 0.95, torch.Generator().manual_seed(0))
    kept = f.weights.sum(1)
    assert kept.min() == 1 and kept.mean() < 1.5 and set(f.weights.unique().tolist()) == {0.0, 1.0}


@torch.no_grad()
def test_every_slot_order_gives_the_same_picture(tiny):
    "Slots are a set: the denoiser must not know their numbers"
    x, t = noise_and_time(tiny)
    f = Factors(torch.randn(2, 4, 16))
    torch.testing.assert_close(tiny.predict(x, t, f), tiny.predict(x, t, f.pick([2, 0, 3, 1])), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_enlarged_pictures_give_finer_masks_but_only_outside_training(tiny):
    torch.manual_seed(0)
    twice = LSD(**lsd_preset("tiny", null_dropout=0.1, zoom=2.0)).eval()
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 16)
    plain, fine = tiny.encode(x, noise=noise), twice.encode(x, noise=noise)
    assert plain.masks.shape == (2, 4, 8, 8) and fine.masks.shape == (2, 4, 16, 16)
    for one, other in ((twice.encode(x, noise=noise, zoom=1), plain), (twice.train().encode(x, noise=noise), plain), (tiny.encode(x, noise=noise, zoom=2.0), fine)):
        torch.testing.assert_close(one.codes, other.codes)


@torch.no_grad()
def test_clips_carry_slots_from_frame_to_frame(tiny):
    clip, start = torch.rand(2, 3, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 16)
    f = tiny.encode(clip, noise=start)
    assert f.codes.shape == (2, 3, 4, 16) and f.masks.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(f.codes[:, 0], tiny.encode(clip[:, 0], noise=start).codes, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_repaint_keeps_what_lies_outside(tiny):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    f = tiny.encode(x)
    region = torch.zeros(2, 1, 16, 16)
    region[:, :, 4:9, 5:12] = 1
    out = repaint(tiny, x, f.drop(0), region, steps=3, generator=torch.Generator().manual_seed(0))
    inside = region.bool().expand_as(x)
    torch.testing.assert_close(out[~inside], x[~inside])
    assert (out[inside] - x[inside]).abs().mean() > 1e-3
    assert changed_region(f, f, 16).sum() == 0 and changed_region(f, f.drop(1), 16, grow=0)[0].sum() == (f.segmentation(16)[0] == 1).sum()


def test_repaint_needs_a_denoiser():
    from decomp_nb.methods.slot_attention_ae import SlotAttentionAE, slot_attention_preset
    model = SlotAttentionAE(**slot_attention_preset("tiny"))
    with pytest.raises(ValueError, match="no denoiser"): repaint(model, torch.zeros(1, 3, 32, 32), Factors(torch.zeros(1, 5, 64)), torch.ones(1, 1, 32, 32))


@pytest.mark.parametrize("options, complaint", [
    (dict(encoder_config=None), "encoder_config"),
    (dict(slots_config=dict(n_slots=0)), "n_slots=0"),
    (dict(slots_config=dict(out_dim=8)), "cross_attention_dim"),
    (dict(image_size=32), "image_size=16"),
    (dict(denoiser_config=dict(sample_size=15)), "sample_size 15"),
    (dict(scheduler_config=dict(prediction_type="picture")), "picture"),
])
def test_a_config_that_cannot_work_names_its_field(options, complaint):
    with pytest.raises(ValueError, match=complaint): LSD(**lsd_preset("tiny", **options)).latents


def test_latents_of_another_size_are_refused():
    model = LSD(**lsd_preset("tiny", patch_size=2))
    with pytest.raises(ValueError, match=r"\(12, 8, 8\).*3 channels of side 16"): model.latents


def test_pictures_that_do_not_fit_are_refused(tiny):
    for wrong, complaint in [(torch.zeros(1, 3, 1, 1), "smaller than"), (torch.zeros(1, 3, 15, 15), "multiple"), (torch.zeros(1, 1, 16, 16), "expected")]:
        with pytest.raises(ValueError, match=complaint): tiny.encode(wrong)


def test_guidance_needs_a_model_that_was_trained_for_it():
    model = LSD(**lsd_preset("tiny"))
    with pytest.raises(ValueError, match="guidance"): model.decode(Factors(torch.zeros(1, 4, 16)), steps=1, guidance_scale=2.0)


def test_damaged_or_foreign_folders_are_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "lsd")
    with pytest.raises(FileNotFoundError, match="no model folder"): LSD.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds a LSD, not a StableLSD"): StableLSD.from_pretrained(tmp_path / "lsd")
    config = json.loads((tmp_path / "lsd" / "config.json").read_text())
    assert not any(str(tmp_path) in str(v) for v in config.values())
    weights = tmp_path / "lsd" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()

    def with_slots(n):
        changed = json.loads(json.dumps(config))
        changed["slots_config"].update(hidden_dim=n)
        (tmp_path / "lsd" / "config.json").write_text(json.dumps(changed))
    with_slots(24)
    with pytest.raises(ValueError, match="do not fit"): LSD.from_pretrained(tmp_path / "lsd")
    with_slots(16)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match="(?i)weights|safetensors|incomplete"): LSD.from_pretrained(tmp_path / "lsd")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"): LSD.from_pretrained(tmp_path / "lsd")


def test_stable_lsd_trains_only_its_slots(foundations, tmp_path):
    model = stable(foundations)
    assert all(name.startswith("slot_attention.") for name, _ in model.named_parameters())
    assert model.scheduler.config.prediction_type == "v_prediction"  # the foundation's own
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model.train()({"image": torch.rand(2, 3, 32, 32) * 2 - 1})["loss"].backward()
    optimiser.step()
    assert model.slot_attention.to_q.weight.grad.abs().sum() > 0
    for k, v in model.denoiser.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "diffusion_pytorch_model.safetensors").stat().st_size < 60_000
    again, (x, t) = load_decomposer(tmp_path / "m").eval(), noise_and_time(model)
    f = Factors(torch.randn(2, 3, 16))
    with torch.no_grad(): torch.testing.assert_close(again.predict(x, t, f), model.eval().predict(x, t, f))


def test_registers_and_contrast_work_on_a_frozen_denoiser(foundations):
    model = stable(foundations, n_registers=2, contrast_weight=0.1).train()
    out = model({"image": torch.rand(2, 3, 32, 32) * 2 - 1})
    out["loss"].backward()
    assert {"denoising", "swapped"} < set(out) and model.registers.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_stable_lsd_gradients_survive_checkpointing(foundations):
    model = stable(foundations).train()
    batch = {"image": torch.rand(2, 3, 32, 32) * 2 - 1, "noise": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([10, 700]), "slot_noise": torch.randn(2, 3, 16),
             "latent_noise": torch.randn(2, 4, 8, 8)}
    def gradient():
        model.zero_grad()
        model(batch)["loss"].backward()
        return model.slot_attention.to_v.weight.grad.clone()
    plain = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_stable_lsd_guides_against_the_empty_prompt(foundations):
    from decomp_nb.components.text import PromptEncoder
    model = stable(foundations).eval()
    f, (x, t) = Factors(torch.randn(2, 3, 16)), noise_and_time(model)
    empty = PromptEncoder(foundations[0])([""], 3).expand(2, -1, -1)
    without, full = model.predict(x, t, Factors(empty)), model.predict(x, t, f)
    torch.testing.assert_close(model.guided(f, 1.3)(x, t), without + 1.3 * (full - without), rtol=1e-4, atol=1e-5)


def test_stable_lsd_names_what_is_missing(foundations, tmp_path):
    pipeline, dino = foundations
    with pytest.raises(FileNotFoundError, match="scheduler"): StableLSD(str(tmp_path), dict(kind="dino", name_or_folder=dino, image_size=32, resolution=56))


@torch.no_grad()
def test_single_slots_are_guided_against_a_single_token(foundations):
    model = stable(foundations).eval()
    one = Factors(torch.randn(2, 1, model.factor_dim))
    empty = model.null_factors(one).codes
    assert empty.shape == one.codes.shape
    several = Factors(torch.randn(2, 3, model.factor_dim))
    torch.testing.assert_close(empty, model.null_factors(several).codes[:, :1])  # the text encoder is causal
    noise = torch.randn(2, *model.latent_shape)
    assert model.decompose(several, steps=2, guidance_scale=2.0, noise=noise).shape == (2, 3, 3, 32, 32)
