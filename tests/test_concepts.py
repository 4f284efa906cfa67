"Concepts: the method's promises beyond parity, bad input, and its notebooks headless and in miniature."
import itertools
import json
from pathlib import Path

import papermill
import pytest
import torch
import yaml
from test_runs import QUICK, execute
from tiny_pipelines import tiny_foundation

from decomp_nb.components.concept_penalties import penalty
from decomp_nb.components.concept_weights import ScoreStatistics, elimination, solve_weights
from decomp_nb.components.foundations import check_words, random_codes
from decomp_nb.components.picture_memory import picture_memory
from decomp_nb.components.pipelines import open_foundation
from decomp_nb.components.text_to_image import clip_tokenizer
from decomp_nb.components.words import score_statistics
from decomp_nb.data.class_folders import NumberedPictures, class_folders
from decomp_nb.decomposer import load_decomposer
from decomp_nb.factors import Factors
from decomp_nb.methods.concept_drawing import compose, edit
from decomp_nb.methods.concept_kinds import FactorKinds, find_kinds, init_from_kinds, known_words
from decomp_nb.methods.concept_start import init_from_images, medoids
from decomp_nb.methods.concepts import Concepts, concepts_preset, merge, select
from decomp_nb.metrics import concepts as metrics
from decomp_nb.official.concepts import load_official_concepts, save_concepts
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.run_directory import Run
from decomp_nb.training.trainer import Trainer
from decomp_nb.viz.attribution import attribute
from decomp_nb.worlds.captioned import CaptionedScenes, concept_task, scene_words

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # numpy 2 about torch, inside diffusers
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "A tiny pipeline of every family, and the exact memory"
    root = tmp_path_factory.mktemp("foundations")
    for family in ("sd", "sd-v", "sdxl", "sd3", "if"): tiny_foundation(root / family, family)
    picture_memory().save_pretrained(root / "memory")
    return root


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "if"])
def test_prompts_are_those_of_the_pipeline(family, places):
    "Our reading of a sentence is that of diffusers' own pipeline"
    import diffusers
    from diffusers.utils import logging
    logging.disable_progress_bar()
    cls = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "if": "IFPipeline"}[family]
    pipe, base = getattr(diffusers, cls).from_pretrained(places / family), open_foundation(places / family)
    text, options = "a photo of a red square", {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if family == "sd3": told, null, pooled, null_pooled = pipe.encode_prompt(text, text, text, **options)
    elif family == "sdxl": told, null, pooled, null_pooled = pipe.encode_prompt(text, **options)
    else: (told, null), pooled, null_pooled = pipe.encode_prompt(text, **options), None, None
    for ours, theirs in ((base.encode([text]), (told, pooled)), (base.null(), (null, null_pooled))):
        for a, b in zip(ours, theirs): assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


@pytest.mark.parametrize("family", ["sd", "sd-v", "sdxl", "sd3", "if", "memory"])
def test_every_family_learns_and_draws(family, places):
    "Only words and weights have gradients; two vectors per word; encode, decode, edit and compose give pictures"
    torch.manual_seed(0)
    model = Concepts(str(places / family), 3, ["<one>", "<two>"], n_vectors=2, image_size=16, templates=["a photo of a {}", "{}"]).train()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    out = model({"image": images, "index": torch.arange(3)})
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.codes, model.raw_weights))
    assert all(p.grad is None for p in model.base.parameters()) and len(list(model.parameters())) == 2
    model.eval()
    factors = model.encode(images[:2], draws=2)
    assert factors.weights.shape == (2, 2) and torch.allclose(factors.weights.sum(1), torch.ones(2), atol=1e-4)
    assert model.decode(factors, steps=2).shape == compose(model, {"<one>": 3.0, "a red square": 1.0, "<two>": -1.0}, 2, steps=2).shape == (2, 3, 16, 16)
    assert edit(model, images[:1], {"<one>": 0.0}, own=factors.weights[:1], steps=2).isfinite().all()
    before = model.codes.detach().clone()
    begun = init_from_images(model, images, steps=1, refine=1, draws=1, batch_size=2)
    assert set(begun) <= {0, 1, 2} and model.codes.isfinite().all() and not torch.equal(model.codes, before) and all(p.grad is None for p in model.base.parameters())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kinds_become_words_of_several_vectors(family, places):
    "A kind has as many words as asked for, no word is in two kinds, and a concept holds the vectors of its words"
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reader = Concepts(str(places / family), 0, ["<new>"], image_size=16).eval()
    one, two, three, four = some = known_words(reader)[:4]
    kinds = find_kinds(reader, images, [2, 1], known=some, draws=2)
    assert [len(words) for words in kinds.words] == [2, 1] and len({w for words in kinds.words for w in words}) == 3
    assert kinds.choice.shape == (3, 2) and (kinds.choice < torch.tensor([2, 1])).all()
    kinds = FactorKinds([[one, two], [three]], torch.tensor([[0, 0], [1, 0], [0, 0]]))
    model = Concepts(str(places / family), 3, n_concepts=2, n_vectors=2, image_size=16).eval()
    assert init_from_kinds(model, kinds, [0, 1]) == [[three, one], [three, two]]
    said = model.base.encode(["<c1>"], model.codes.detach()).states
    assert torch.allclose(said, model.base.encode([f"{three} {one}"]).states, atol=1e-5)
    assert model.weights().argmax(1).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="n_concepts=2, n_vectors=1"): init_from_kinds(model, kinds, [0])
    with pytest.raises(ValueError, match="asks for 5 words"): find_kinds(reader, images, [3, 2], known=[one, four])


def test_codes_of_each_picture_may_differ(places):
    "A set of words per picture is answered like the same words one picture at a time"
    model = Concepts(str(places / "sd"), 0, ["<one>", "<two>"], image_size=16).eval()
    codes, x, t = random_codes(model.base, 4).view(2, 2, -1), torch.randn(2, *model.latent_shape), torch.tensor([10, 700])
    f = Factors(codes, torch.rand(2, 2))
    with torch.no_grad():
        both = model.predict(x, t, f)
        for i in range(2): torch.testing.assert_close(model.predict(x[i:i + 1], t[i:i + 1], f.rows(i)), both[i:i + 1], atol=1e-5, rtol=1e-4)
        doubled = model.guided(f, 2.0)(x, t)
        null = model.base.predict(x, t, model.base.null().rows([0, 0]))
        torch.testing.assert_close(doubled, null + 2 * (both - null), atol=1e-4, rtol=1e-4)


def test_closed_form_is_the_minimum_of_the_training_loss(places):
    "The parabola predicts the loss that the model really has with these weights"
    model = Concepts(str(places / "memory"), 4, n_concepts=3, image_size=16, templates="word", weights="free", timestep_sampling="high_noise")
    images = model.base.pictures[:4]
    stats = score_statistics(model, images, 8, generator=torch.Generator().manual_seed(0))
    w = torch.rand(4, 3)
    x0, total, dice = images, 0.0, torch.Generator().manual_seed(0)
    for _ in range(8):
        t = model.base.times(4, how="high_noise", strength=1.0, generator=dice)
        noise = torch.randn(x0.shape, generator=dice)
        with torch.no_grad():
            said = model.predict(model.base.noise_at(x0, noise, t), t, Factors(model.codes.expand(4, -1, -1), w))
        total = total + (said - noise).square().flatten(1).mean(1) / 8
    torch.testing.assert_close(stats.loss(w), total, rtol=1e-3, atol=1e-4)
    assert (stats.loss(solve_weights(stats, "ridge", ridge=0.0)) <= stats.loss(w) + 1e-6).all()
    assert (stats.loss(solve_weights(stats, "nonnegative", ridge=0.0)) <= stats.loss(w) + 1e-6).all()


def test_paired_statistics_use_the_same_draws(places):
    "The same picture in another batch has the same parabola; unpaired, it has not"
    model = Concepts(str(places / "sd"), 0, n_concepts=2, image_size=16)
    images = (torch.rand(1, 3, 16, 16) * 2 - 1).repeat(3, 1, 1, 1)
    model.latents.encode = lambda x, noise=None, encode=model.latents.encode: encode(x, torch.zeros(()))  # the posterior's mean
    told = lambda **o: score_statistics(model, images, 3, generator=torch.Generator().manual_seed(0), batch_size=2, **o).pull
    apart = lambda pull: (pull[0] - pull[2]).abs().max().item()
    assert apart(told(paired=True)) < 1e-5 and apart(told()) > 10 * apart(told(paired=True))  # how far apart: the tiny model's weights decide


def test_simplex_weights_are_the_nearest_point():
    "With orthogonal words the loss is a distance: its minimum is the projection onto the simplex"
    x = torch.randn(50, 4, dtype=torch.float64) * 2
    others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((300,))
    p = solve_weights(ScoreStatistics(torch.eye(4).double().expand(50, 4, 4), x, x.square().sum(1)), "simplex", ridge=0.0)
    assert torch.allclose(p.sum(1), torch.ones(50, dtype=torch.float64)) and (p >= 0).all()
    assert ((x - p).norm(dim=1) <= torch.cdist(x, others).amin(1) + 1e-9).all()


def test_medoids_are_the_best_columns():
    "As good as the best of all choices; more columns than there are is refused"
    cost = torch.rand(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (1, 2, 3):
        best = min(cost[:, list(c)].amin(1).sum() for c in itertools.combinations(range(7), k))
        assert cost[:, medoids(cost, k)].amin(1).sum() <= best * 1.02 and len(set(medoids(cost, k))) == k
    with pytest.raises(ValueError, match="k=8"): medoids(cost, 8)


@pytest.mark.parametrize("weights", ["softmax", "free", "nonnegative"])
def test_words_init_from_images_of_different_classes(places, weights):
    "One word for each kind of picture, weights to match, the same again from the same seed; fewer candidates than pictures; bad input"
    hidden = ["red-square", "blue-circle", "green-heart"]
    model = Concepts(str(places / "memory"), 12, n_concepts=3, image_size=16, templates="word", timestep_sampling="high_noise", weights=weights)
    labels = torch.arange(3).repeat(4)
    images = model.base.pictures[[model.base.vocabulary.index(hidden[i]) for i in labels]]
    start = lambda **o: init_from_images(model, images, generator=torch.Generator().manual_seed(1), **o)
    chosen = start()
    assert sorted(labels[chosen].tolist()) == [0, 1, 2]
    assert (labels[chosen][model.weights().argmax(1)] == labels).all() and torch.allclose(model.weights().sum(1), torch.ones(12), atol=1e-4)
    codes = model.codes.detach().clone()
    assert start() == chosen and torch.equal(model.codes, codes) and model.codes.grad is None and model.codes.requires_grad
    assert all(p.grad is None for p in model.base.parameters())
    assert len(set(start(steps=2, draws=1, candidates=5, batch_size=4))) == 3
    with pytest.raises(ValueError, match="11 images for a model of 12"): init_from_images(model, images[:11])
    with pytest.raises(ValueError, match="2 images cannot begin 3 words"): init_from_images(Concepts(str(places / "memory"), 2, n_concepts=3, image_size=16), images[:2])


def test_superfluous_words_are_seen_and_merged():
    "Two equal words are one; a word that nobody needs goes first"
    d = torch.randn(3, 200)
    d = torch.stack([d[0], d[1], d[0], d[2]])  # word 2 repeats word 0
    gram = (d @ d.T / 200).expand(5, -1, -1)
    target = 1.0 * d[0] + 1.0 * d[1]
    stats = ScoreStatistics(gram, (d @ target / 200).expand(5, -1), (target @ target / 200).expand(5))
    curve = elimination(stats, "nonnegative")
    assert sorted(curve[2]["kept"]) in ([0, 1], [1, 2]) and curve[2]["explained"] > 0.99


def test_merge_and_select(places):
    model = Concepts(str(places / "memory"), 4, n_concepts=3, image_size=16, templates="word")
    with torch.no_grad(): model.codes[2] = model.codes[0]
    stats = score_statistics(model, model.base.pictures[:4], 8, generator=torch.Generator().manual_seed(0))
    small = merge(model, stats)
    assert len(small.tokens) == 2 and torch.allclose(small.weights().sum(1), torch.ones(4))
    assert torch.equal(select(model, [1]).codes, model.codes[1:2])


def config(folder, **options): return TrainConfig(out_dir=str(folder), cpu=True, trackers="", ema_decay=0.0, **{"max_steps": 4, "batch_size": 2, "save_every": 2, "eval_every": 0, "log_every": 1, **options})


def test_resuming_continues_words_weights_and_statistics(places, tmp_path):
    def new(**o): return Concepts(str(places / "sd"), 4, **{"n_concepts": 2, "image_size": 16, "refit_every": 2, "revive_every": 3, **o})
    data = NumberedPictures(torch.rand(4, 3, 16, 16) * 2 - 1, new().latents, flip=True)
    whole = Trainer(new(), data, config(tmp_path / "whole")).fit().model()
    Trainer(new(), data, config(tmp_path / "cut", max_steps=2)).fit()
    cut = Trainer(new(), data, config(tmp_path / "cut")).fit().model()
    for name, value in whole.state_dict().items(): torch.testing.assert_close(cut.state_dict()[name], value, msg=name)
    with pytest.raises(ValueError, match="tokens.*in the run"): Trainer(new(tokens=["<x>", "<y>"]), data, config(tmp_path / "cut")).fit()


def test_maps_of_chosen_layers(places):
    "One attention layer can be listened to alone; one that is not there is an error that names those that are"
    base, images = open_foundation(places / "sd"), torch.rand(2, 3, 16, 16) * 2 - 1
    maps = [attribute(base, "a red square", "red square", images=images, steps=1, layers=layers)[1] for layers in (None, [0], [1])]
    assert all(m.shape == (2, 16, 16) for m in maps) and not torch.allclose(maps[1], maps[2]) and not torch.allclose(maps[0], maps[1])
    with pytest.raises(ValueError, match="there are layers"): attribute(base, "a red square", "red", images=images, steps=1, layers=[99])


# --- bad input: one clear error each ------------------------------------------------------------------------------------------------------------------

def test_bad_words(places, tmp_path):
    for tokens, message in ((["red"], "'red' already is a word"), (["<a>", "<a>"], "given twice"), (["<a>", "x<a>x"], "part of"), (["two words"], "without spaces"), ([], "tokens is empty")):
        with pytest.raises(ValueError, match=message): Concepts(str(places / "sd"), 2, tokens, image_size=16)
    with pytest.raises(ValueError, match="initial_words has 1 entries for 2 tokens"): Concepts(str(places / "sd"), tokens=["<a>", "<b>"], initial_words=["red"])
    with pytest.raises(ValueError, match="template 'no place'"): Concepts(str(places / "sd"), templates="no place")
    with pytest.raises(ValueError, match="weights='equal'"): Concepts(str(places / "sd"), weights="equal").weights()
    with pytest.raises(ValueError, match="penalty 'word_wish'"): penalty("word_wish", torch.ones(2, 2), torch.ones(1, 2, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="only one"): penalty("word_energy", torch.ones(1, 2), torch.ones(1, 1, 3), torch.ones(1, 1))
    assert check_words("<a>", lambda w: False) == ["<a>"]


def test_bad_foundations(places, tmp_path):
    mute = tiny_foundation(tmp_path / "mute")
    index = json.loads((mute / "model_index.json").read_text())
    (mute / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ValueError, match="no text encoder"): Concepts(str(mute))
    with pytest.raises(FileNotFoundError, match="no foundation at"): Concepts("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model_index.json"): Concepts(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="learned_embeds.bin"): load_official_concepts(tmp_path / "empty", str(places / "sd"))
    torch.save({"<a>,<b>": torch.zeros(2, 7)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(ValueError, match="another foundation"): load_official_concepts(tmp_path, str(places / "sd"))
    torch.save({"<a>,<b>": torch.zeros(3, 7)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(ValueError, match="2 tokens, but 3 rows"): load_official_concepts(tmp_path, str(places / "sd"))


def test_bad_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is empty"): class_folders(tmp_path, ["empty"])
    with pytest.raises(ValueError, match="1 roots for 2 class folders"): class_folders([tmp_path], ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no class folder"): class_folders(tmp_path, ["cats"])
    with pytest.raises(ValueError, match="task 'faces'"): concept_task("faces")
    with pytest.raises(ValueError, match="only="): CaptionedScenes(5, only={"color": ["mauve"]})


def test_saved_words_of_two_encoders(places, tmp_path):
    from safetensors.torch import load_file
    model = Concepts(str(places / "sdxl"), 0, ["<one>"], image_size=16)
    save_concepts(model, tmp_path)
    words = load_file(tmp_path / "words" / "one.safetensors")
    assert {k: tuple(v.shape) for k, v in words.items()} == {"clip_l": (1, 16), "clip_g": (1, 24)}
    assert torch.equal(load_decomposer(tmp_path).codes, model.codes)
    with pytest.raises(ValueError, match="one row per word"): save_concepts(model, tmp_path, official=True)


# --- judges -----------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    "A random CLIP and a random ResNet-50 (its blocks, few channels) in the true layout"
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetForImageClassification
    root, words = tmp_path_factory.mktemp("judges"), clip_tokenizer(["a", "photo", "of", "red", "square", "castle"], 16)
    torch.manual_seed(0)
    body = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPModel(CLIPConfig(text_config=dict(vocab_size=len(words), max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, **body),
                         vision_config=dict(image_size=32, patch_size=8, **body), projection_dim=8)).save_pretrained(root / "clip")
    words.save_pretrained(str(root / "clip"))
    labels = {0: "castle", 1: "red square, square", 2: "tench, Tinca tinca", 3: "squared paper"}
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", id2label=labels)).save_pretrained(root / "resnet")
    return root


def test_clip_judge_is_clip(judges):
    "Cosines of CLIP's own features of the resized middle square and of the sentences, and the official two numbers on them"
    from transformers import AutoTokenizer, CLIPModel
    judge, images = metrics.open_judge(str(judges / "clip"), ["red square", "castle"]), torch.rand(5, 3, 32, 48) * 2 - 1
    model, tok = CLIPModel.from_pretrained(judges / "clip").eval(), AutoTokenizer.from_pretrained(judges / "clip")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad(): out = model(**tok(["a photo of red square", "a photo of castle"], padding=True, return_tensors="pt"), pixel_values=(images[..., 8:40] / 2 + 0.5 - mean) / std)
    scores = judge.scores(images)
    torch.testing.assert_close(scores, out.image_embeds @ out.text_embeds.T, atol=1e-5, rtol=1e-4)
    assert judge.scores(torch.rand(2, 3, 64, 96)).shape == (2, 2) and judge.threshold == 0.3 and metrics.class_shares(scores, judge.epsilon).sum() == 1
    assert metrics.threshold_accuracy(scores, -1.0) == 1 and metrics.threshold_accuracy(scores, 1.01) == 0


def test_resnet_judge_looks_at_the_middle(judges):
    "Logits of the named labels in their order, of the middle 224 pixels, whatever lies around them; small pictures are enlarged"
    from transformers import ResNetForImageClassification
    judge, images = metrics.open_judge(str(judges / "resnet"), ["tench", "castle"]), torch.rand(2, 3, 240, 260) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad(): logits = ResNetForImageClassification.from_pretrained(judges / "resnet").eval()((images[..., 8:232, 18:242] / 2 + 0.5 - mean) / std).logits
    torch.testing.assert_close(judge.scores(images), logits[:, [0, 2]], atol=1e-5, rtol=1e-4)
    around = images.clone()
    around[..., :8, :], around[..., 242:] = 1, -1
    assert judge.names == ["castle", "tench"] and torch.equal(judge.scores(around), judge.scores(images)) and judge.scores(images[..., :32, :32]).shape == (2, 2)
    assert judge.threshold == 10 and judge.epsilon == 1e-8


def test_bad_judges(judges, tmp_path):
    for name, message in (("unicorn", "in none of the 4 labels"), ("square", "in 2 labels")):
        with pytest.raises(ValueError, match=message): metrics.open_judge(str(judges / "resnet"), [name])
    with pytest.raises(FileNotFoundError, match="no judge at './nowhere'"): metrics.open_judge("./nowhere", ["castle"])
    with pytest.raises(FileNotFoundError, match="names no model"): metrics.open_judge(str(tmp_path), ["castle"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="is a vit"): metrics.open_judge(str(tmp_path), ["castle"])


# --- notebooks ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def foundation_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_to_image")
    execute("train_text_to_image", folder, out_dir=str(folder / "run"), image_size=16, n_images=40, vae_factor=2, vae_width=8, vae_steps=3, widths=[16, 16], text_width=16, attention_heads=2,
            sample_steps=2, judge_steps=3, judged=6, **QUICK)
    return folder / "run"


def test_train_text_to_image_writes_a_foundation(foundation_run):
    base = open_foundation(foundation_run / "pipeline")
    assert type(base).__name__ == "StableDiffusion" and {"red", "sketch", "star"} <= set(base.tokenizers[0].get_vocab()) | {w.removesuffix("</w>") for w in base.tokenizers[0].get_vocab()}
    assert all(len(base.tokenizers[0](w, add_special_tokens=False).input_ids) == 1 for w in scene_words())
    assert {"drawn", "judge on true pictures", "vae_psnr"} <= set(json.loads((foundation_run / "scores.json").read_text()))


@pytest.mark.parametrize("data", ["photos", "styles"])
def test_train_concepts_on_it(data, foundation_run, tmp_path):
    "Photographs in class folders or an embedded task, a foundation by path: words begin at pictures, files for everybody come out"
    from PIL import Image
    pictures = CaptionedScenes(8, size=24, n_objects=(1, 1)).batch(range(8))["image"]
    for i, picture in enumerate(pictures):
        (tmp_path / "photos" / "abcd"[i // 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save(tmp_path / "photos" / "abcd"[i // 2] / f"{i}.png")
    options = dict(out_dir=str(tmp_path / "run"), foundation=str(foundation_run / "pipeline"), preset="tiny", n_per_class=2, n_drawn=2, sample_steps=2, fit_draws=2, begin_steps=3, data=str(tmp_path / data) if data == "photos" else data)
    execute("train_concepts", tmp_path, **options, **QUICK)
    run = Run(tmp_path / "run")
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4] and set(json.loads((run.path / "scores.json").read_text())) == {"learned", "closed form"}
    model = run.model()
    assert model.n_factors == 4 and len(list((run.path / "concepts" / "words").iterdir())) == 4


def test_eval_concepts(places, tmp_path):
    execute("eval_concepts", tmp_path, out_dir=str(tmp_path / "scores"), foundation=str(places / "memory"), seeds=1, fit_draws=2, steps=6, n_per_class=2, n_drawn=1, sample_steps=2, judge_steps=2, held_out=2)
    assert len(json.loads((tmp_path / "scores" / "scores.json").read_text())) == 6


def test_eval_text_to_image(foundation_run, places, tmp_path):
    options = dict(out_dir=str(tmp_path / "scores"), judge_steps=2, judged=3, sample_steps=2, batch_size=2)
    execute("eval_text_to_image", tmp_path, foundation=str(foundation_run / "pipeline"), **options)
    scores = json.loads((tmp_path / "scores" / "eval_text_to_image.json").read_text())["scores"]
    assert set(scores["drawn"]) == {"shape", "color", "background", "light", "style", "joint"}
    assert scores["drawn"]["joint"] <= min(scores["drawn"].values()) and 0 < scores["judge on true pictures"]["shape"] < 1
    with pytest.raises(papermill.PapermillExecutionError, match="knows single words"):
        execute("eval_text_to_image", tmp_path, foundation=str(places / "memory"), **options)


def test_eval_concepts_with_clip_and_maps(foundation_run, judges, tmp_path):
    execute("eval_concepts", tmp_path, out_dir=str(tmp_path / "scores"), foundation=str(foundation_run / "pipeline"), judge=str(judges / "clip"), class_names="red square,castle,red,a photo,square",
            seeds=1, steps=3, kinds_draws=1, batch_size=2, n_per_class=1, n_drawn=1, sample_steps=2, fit_draws=2, held_out=1, located=4, located_steps=2)
    found = json.loads((tmp_path / "scores" / "attribution.json").read_text())
    assert {"given, 1 thing", "given, 2 things", "drawn, 1 thing", "discovered words"} == set(found) and found["given, 2 things"]["pictures"] == 4
    assert 0 < found["given, 1 thing"]["anywhere"] < 0.5 and all(0 <= v <= 1 for k, v in found["given, 2 things"].items() if k != "pictures")


RECIPES = sorted((ROOT / "papermill_runs" / "recipes").glob("concepts_*.yaml")) + sorted((ROOT / "papermill_runs" / "recipes").glob("text_to_image_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes(recipe):
    values = yaml.safe_load(recipe.read_text())
    notebook = "train_concepts" if recipe.stem.startswith("concepts") else "train_text_to_image"
    assert set(values) <= set(papermill.inspect_notebook(str(ROOT / "nbs" / f"{notebook}.ipynb")))
    assert values["out_dir"] == f"papermill_runs/out/{recipe.stem}"
    if notebook == "train_concepts": concepts_preset(values["preset"], **values.get("model_options", {}))
