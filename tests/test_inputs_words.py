"Prompts longer than the text encoder, words of odd names, and files of learned words."
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from decomp_nb.components.foundations import check_words
from decomp_nb.components.pipelines import open_foundation, read_index
from decomp_nb.components.text import PromptEncoder, tiny_pipeline
from decomp_nb.components.text_to_image import random_pipeline
from decomp_nb.components.weight_files import file_name
from decomp_nb.decomposer import load_decomposer
from decomp_nb.methods.concept_drawing import compose, recipe_factors
from decomp_nb.methods.concepts import Concepts
from decomp_nb.official.concepts import load_official_concepts, read_embeddings, read_official, save_concepts, word_files

LONG = "a photo of " * 12  # 36 words; the small pipelines read 24 tokens, beginning and end among them


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return str(random_pipeline(tmp_path_factory.mktemp("sd") / "sd"))


def model(sd, *tokens, **options): return Concepts(sd, 3, list(tokens) or ["<one>"], image_size=16, **options)


# text behind the limit ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, tokens", [
    ({"templates": LONG + "{}"}, 39), ({"n_vectors": 30, "templates": "a photo of {}"}, 35), ({"templates": ["a {}", LONG + "{}"]}, 39), ({"n_vectors": 22, "templates": "{} a"}, 25),
])
def test_a_word_behind_the_last_token_is_refused_before_training(sd, options, tokens):
    if tokens == 25:  # the word is read to its end, the text behind it is not
        with pytest.warns(UserWarning, match="has 25 tokens, and this text encoder reads 24"): model(sd, **options)
        return
    with pytest.raises(ValueError, match=f"has {tokens} tokens, and this text encoder reads 24: .*vectors of new words lie behind"): model(sd, **options)


def test_a_prompt_that_just_fits_is_read(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = model(sd, n_vectors=22, templates="{}")
    prompts = words.base.encode_each(words.codes, "{}")
    last = prompts.states[:, -1]
    some_direction = torch.linspace(-1, 1, last.shape[-1])  # a plain sum is constant behind a layer norm
    (gradient,) = torch.autograd.grad((last * some_direction).sum(), words.codes)
    assert (gradient.view(22, -1).abs().sum(1) > 1e-6).all()  # every vector is trained


def test_compose_does_not_ignore_a_word_at_the_end_of_a_long_prompt(sd):
    words = model(sd)
    with pytest.raises(ValueError, match="1 of the 1 vectors of new words lie behind"): compose(words, LONG + "<one>", n=1, steps=1)
    with pytest.warns(UserWarning, match="the rest has no effect"): recipe_factors(words, {"<one> " + LONG: 1.0})


def test_cut_prompts_warn_wherever_prompts_are_read(sd, tmp_path):
    encoder = PromptEncoder(str(tiny_pipeline(tmp_path / "tiny")))
    with pytest.warns(UserWarning, match="has 92 tokens, and this text encoder reads 77"): encoder(["ball." * 18])
    with pytest.warns(UserWarning, match="reads 5"): encoder(["a ball"], n_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["", "a red ball", "b" * 75])


def test_captions_of_a_training_that_are_cut_warn(sd):
    from decomp_nb.components.latents import KLLatents
    from decomp_nb.components.autoencoders import small_vae
    from decomp_nb.components.text_to_image import TextToImage
    small = TextToImage(["a", "photo", "of"], 16, KLLatents(small_vae(2, width=8)), widths=(8, 16), text_width=16, max_tokens=8)
    with pytest.warns(UserWarning, match="has 38 tokens, and this text encoder reads 8"): small.read([LONG])


# words as names -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token", ["<a/b>", "<..>", "<a:b>", "<a\\b>", "<a*?>", "<.a>", "<größe>"])
def test_a_word_of_any_name_is_saved_and_read_again(sd, tmp_path, token):
    words = model(sd, token, "<two>")
    save_concepts(words, tmp_path / "saved", official=True)
    (first, second) = sorted((tmp_path / "saved" / "words").iterdir(), key=lambda path: path.name == "two.safetensors")
    assert torch.equal(load_file(first)[token], words.codes[:1].detach()) and second.name == "two.safetensors"
    assert read_official(tmp_path / "saved")[0] == [token, "<two>"] and load_decomposer(tmp_path / "saved").tokens == [token, "<two>"]


def test_two_words_never_share_a_file():
    assert word_files(["<cat>", "dog>"]) == ["cat.safetensors", "dog.safetensors"]
    assert word_files([">a", "a>"]) == ["0-a.safetensors", "1-a.safetensors"] and word_files(["<Cat>", "<cat>"]) == ["0-Cat.safetensors", "1-cat.safetensors"]
    assert len({file_name(name) for name in ("a/b", "a%2Fb", "a_b", "a b", "")}) == 5


@pytest.mark.parametrize("token", ["<a,b>", "<" + "a" * 200 + ">", "<a\0b>", "", "two words"])
def test_a_word_that_no_file_could_hold_is_refused_at_the_start(sd, token):
    with pytest.raises(ValueError, match="placeholder"): check_words([token], lambda word: False)
    with pytest.raises(ValueError, match="placeholder"): model(sd, token)


@pytest.mark.parametrize("recipe", ["<t9>", {"a photo of <t9>": 1.0}, {"<one>": 1.0, "<onne>": 1.0}])
def test_an_unknown_word_is_refused(sd, recipe):
    with pytest.raises(ValueError, match=r"the prompt uses '<(t9|onne)>', but the new words are <one>"): compose(model(sd), recipe, n=1, steps=1)


def test_an_unknown_word_is_refused_where_there_are_no_new_ones(sd):
    with pytest.raises(ValueError, match="'<t9>', but no words were added"): open_foundation(sd).encode(["a photo of <t9>"])


# files of words -------------------------------------------------------------------------------------------------------------------

ROW, ROWS = torch.arange(16.0), torch.arange(48.0).view(3, 16)
EMBEDDINGS = {
    "one vector (d,)": ({"<cat>": ROW}, ["<cat>"], (1, 1, 16)), "one word of several vectors": ({"<cat>": ROWS}, ["<cat>"], (1, 3, 16)), "official": ({"<a>,<b>,<c>": ROWS}, ["<a>", "<b>", "<c>"], (3, 1, 16)),
    "several words": ({"<a>": ROW, "<b>": ROW + 1}, ["<a>", "<b>"], (2, 1, 16)), "two encoders": ({"clip_g": torch.ones(2, 5), "clip_l": torch.zeros(2, 3)}, ["<learned_embeds>"], (1, 2, 8)),
    "older": ({"string_to_param": {"*": ROWS}, "name": "cat", "step": 3}, ["<learned_embeds>"], (1, 3, 16)), "half precision": ({"<cat>": ROWS.half()}, ["<cat>"], (1, 3, 16)),
}


@pytest.mark.parametrize("case, end", [(case, end) for case in EMBEDDINGS for end in (".bin", ".safetensors") if (case, end) != ("older", ".safetensors")])
def test_learned_embeddings_of_every_kind_are_read(tmp_path, case, end):
    stored, tokens, shape = EMBEDDINGS[case]
    file = tmp_path / f"learned_embeds{end}"
    if end == ".bin": torch.save(stored, file)
    else: save_file(stored, file)
    found, vectors = read_embeddings(file)
    assert found == tokens and tuple(vectors.shape) == shape and vectors.dtype == torch.float32
    assert torch.equal(read_official(tmp_path)[1], vectors.flatten(1))


def test_two_encoders_stand_in_the_order_of_the_pipeline(tmp_path):
    save_file({"clip_g": torch.ones(1, 5), "clip_l": torch.zeros(1, 3)}, tmp_path / "cat.safetensors")
    tokens, vectors = read_embeddings(tmp_path / "cat.safetensors")
    assert tokens == ["<cat>"] and vectors.flatten().tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_words_of_diffusers_become_a_model(sd, tmp_path):
    torch.save({"<cat>": ROWS}, tmp_path / "learned_embeds.bin")
    words = load_official_concepts(tmp_path, sd, image_size=16)
    assert words.tokens == ["<cat>"] and words.config.n_vectors == 3 and torch.equal(words.codes.detach(), ROWS.flatten()[None])


def test_our_own_words_come_back_from_their_files(sd, tmp_path):
    words = model(sd, "<one>", "<two>", n_vectors=2)
    save_concepts(words, tmp_path / "saved")
    again = load_official_concepts(tmp_path / "saved" / "words" / "two.safetensors", sd, image_size=16)
    assert again.tokens == ["<two>"] and torch.equal(again.codes[0], words.codes[1])


@pytest.mark.parametrize("stored, said", [
    ({"<a>,<b>": ROWS}, "2 tokens, but 3 rows"), ({"<a>": ROW, "<b>": ROWS}, "words of different sizes"), ({"<a>": torch.ones(1, 2, 3)}, "is no file of learned embeddings"),
    ({"<a>": torch.ones(0)}, "is no file of learned embeddings"), ({"<a>": 3}, "<a> hold no tensors"),
])
def test_what_is_no_file_of_words_is_named(tmp_path, stored, said):
    torch.save(stored, tmp_path / "learned_embeds.bin")
    with pytest.raises(ValueError, match=said) as refused: read_official(tmp_path)
    assert "learned_embeds.bin" in str(refused.value)


@pytest.mark.parametrize("weights", [{"other": torch.ones(2, 1)}, {"weights": torch.ones(2)}, {"weights": torch.ones(2, 5, 1, 1, 1)}])
def test_weights_that_do_not_belong_to_the_words_are_named(tmp_path, weights):
    torch.save({"<a>,<b>,<c>": ROWS}, tmp_path / "learned_embeds.bin")
    torch.save(weights, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="weights.bin"): read_official(tmp_path)


def test_a_damaged_index_of_a_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_bytes(b'{"_class_name": "Stab')
    with pytest.raises(ValueError, match="model_index.json is damaged"): read_index(tmp_path)
