"Text-to-image models of five families: words that learn, and what they give back."
import json

import pytest
import torch
from tiny_pipelines import FAMILIES, tiny_foundation

import decomp_nb
from decomp_nb.components.foundations import codes_of, draw_prompts, nearest_words, random_codes
from decomp_nb.components.picture_memory import picture_memory
from decomp_nb.components.pipelines import open_foundation
from decomp_nb.components.text_to_image import TextToImage, random_pipeline
from decomp_nb.decomposer import sample
from decomp_nb.viz.attribution import record_attention, text_layers
from decomp_nb.worlds.captioned import SCENE_FACTORS, CaptionedScenes, full_captions, single_scenes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "A tiny pipeline of every family, and the exact memory"
    root = tmp_path_factory.mktemp("foundations")
    for family in FAMILIES:
        tiny_foundation(root / family, family)
    picture_memory().save_pretrained(root / "memory")
    return root


@pytest.mark.parametrize("family", [*FAMILIES, "memory"])
@pytest.mark.parametrize("n_vectors", [1, 2])
def test_new_words_learn_and_nothing_else(family, n_vectors, places):
    "By name or by code the same prompts; the gradient ends in the codes; drawing and inversion are finite"
    model = open_foundation(places / family)
    generator = torch.Generator().manual_seed(0)
    model.add_words(["<one>", "<two>"], n_vectors)
    codes = torch.randn(2, model.code_dim, generator=generator).mul(0.1).requires_grad_()
    prompts = model.encode(["a photo of <one>", "<two> and a red square"], codes)
    each = model.encode_each(codes, ["a photo of {}", "{} and a red square"])
    for a, b in zip(prompts, each):
        assert a is None or torch.allclose(a, b, atol=1e-6)
    x0 = model.latents.encode(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1)
    t = model.times(2, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    error = model.predict(model.noise_at(x0, noise, t), t, prompts) - model.target(x0, noise, t)
    error.square().mean().backward()
    assert (codes.grad.abs().sum(1) > 0).all() and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        drawn = sample(lambda x, t: model.predict(x, t, prompts.detach()), noise, model.sampler, 2)
        back = model.invert(lambda x, t: model.predict(x, t, prompts.detach()), x0, 2)
    assert model.latents.decode(drawn).shape == (2, 3, 16, 16) and back.isfinite().all()


def test_a_flow_leads_there_and_back(places):
    "Inversion of the flow of Stable Diffusion 3, then its sampler, is nearly the picture again"
    model = open_foundation(places / "sd3")
    prompts = model.encode(["a red square"]).detach()
    x0 = torch.randn(1, *model.latents.shape(16), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predict(x, t):
        return model.predict(x, t, prompts)
    noise = model.invert(predict, x0, 100)
    assert (noise - x0).abs().mean() > 0.1
    torch.testing.assert_close(sample(predict, noise, model.sampler, 100), x0, atol=0.05, rtol=0)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "if"])
def test_attention_of_every_family_is_recorded(family, places):
    "Every layer that reads text, without a trace in the model or its predictions"
    base = open_foundation(places / family)
    prompts = base.null().cat(base.encode(["a photo of a red square"]))
    x = torch.randn(2, *base.latents.shape(16))
    t = torch.full((2,), 500)
    expected = base.predict(x, t, prompts).detach()
    with record_attention(base, guided=True) as record:
        torch.testing.assert_close(base.predict(x, t, prompts).detach(), expected)
    assert len(record.sums) == len(text_layers(base.denoiser))
    assert record.maps().shape == (1, prompts.states.shape[1], 8, 8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.denoiser.modules())


def test_codes_of_two_dictionaries(places):
    model = open_foundation(places / "sdxl")
    model.n_vectors = 2
    codes = codes_of(model, ["circle", "red square"])
    assert codes.shape == (2, model.code_dim) and random_codes(model, 3).shape == (3, model.code_dim)
    torch.testing.assert_close(codes[:, :40], codes[:, 40:])
    assert nearest_words(model, codes, 1)[0][0][0] == "circle"


def test_words_are_added_once_and_need_codes(places):
    model = open_foundation(places / "sd")
    with pytest.raises(ValueError, match="call add_words first"):
        model.encode_each(torch.zeros(1, model.code_dim))
    model.add_words("<one>")
    with pytest.raises(ValueError, match="already has the words <one>"):
        model.add_words("<two>")
    with pytest.raises(ValueError, match="no codes were given"):
        model.encode("a photo of <one>")
    with pytest.raises(ValueError, match="not read as one word"):
        open_foundation(places / "if").add_words("<THING>")
    with pytest.raises(ValueError, match="already has the words"):
        memory = picture_memory()
        memory.add_words("<one>")
        memory.add_words("<two>")


def test_pipelines_that_cannot_be_opened(places, tmp_path):
    index = json.loads((places / "sd" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="is a FluxPipeline"):
        open_foundation(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="has no unet/"):
        open_foundation(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["elsewhere", "Net"]}))
    with pytest.raises(ValueError, match="only parts of diffusers and transformers"):
        open_foundation(tmp_path)


def test_the_shipped_model_opens():
    "And predicts something that depends on the sentence"
    base = open_foundation(decomp_nb.shipped("text_to_image"))
    x = torch.randn(1, *base.latents.shape(16), generator=torch.Generator().manual_seed(0))
    red, blue = (base.predict(x, torch.tensor([500]), base.encode([f"a {c} star"])) for c in ("red", "blue"))
    assert (red - blue).abs().max() > 0.01


def test_a_random_pipeline_is_the_same_again(tmp_path):
    "And leaves the random state alone"
    state = torch.get_rng_state()
    first, second = (open_foundation(random_pipeline(tmp_path / name)) for name in "ab")
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_unknown_options_of_the_small_model_are_refused(tmp_path):
    with pytest.raises(TypeError, match="depth"):
        TextToImage(["a"], 16, latents=open_foundation(random_pipeline(tmp_path)).latents, depth=3)
    with pytest.raises(TypeError, match="latents"):
        TextToImage(["a"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_names_still_lead_to_the_new_ones():
    from decomp_nb.components.foundations import clip_tokenizer, spelled, tiny_foundation, written_out
    from decomp_nb.components.text_to_image import clear_vae, identity_vae
    assert clear_vae is identity_vae and tiny_foundation is random_pipeline and clip_tokenizer
    assert spelled(["<a>"], 2) == ["<a>", "<a>_1"] and written_out("<a>", ["<a>"], 2) == "<a> <a>_1"


def test_a_picture_for_each_sentence(tmp_path):
    base = open_foundation(random_pipeline(tmp_path / "sd"))
    noise = torch.randn(2, *base.latents.shape(16), generator=torch.Generator().manual_seed(0))
    both = draw_prompts(base, ["a red square", "a blue circle"], noise, guidance_scale=2.0, steps=2)
    alone = draw_prompts(base, "a blue circle", noise[1:], guidance_scale=2.0, steps=2)
    torch.testing.assert_close(both[1:], alone)
    plain = draw_prompts(base, "a blue circle", noise[1:], guidance_scale=1, steps=2)
    assert plain.shape == (1, 3, 16, 16) and not torch.equal(plain, alone)
    with pytest.raises(ValueError, match="1 sentences and noise for 2 pictures"): draw_prompts(base, ["a red square"], noise)


def test_scenes_of_one_object_have_captions_that_name_everything():
    pictures, truth = single_scenes(CaptionedScenes(8, size=16, n_objects=(1, 1)), range(8))
    captions = full_captions(truth)
    assert len(pictures) == len(captions) == 8 and set(truth) == set(SCENE_FACTORS)
    for i, caption in enumerate(captions): assert all(SCENE_FACTORS[name][values[i]] in caption for name, values in truth.items())
    with pytest.raises(ValueError, match="scenes of one object"): single_scenes(CaptionedScenes(8, size=16), range(2))
