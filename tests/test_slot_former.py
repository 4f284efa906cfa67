"SlotFormer on each kind of slot model; slots on disk; the training notebook from the drawn world, headless"
import json

import pytest
import torch
from recipe_stage import ROOT, play
from test_runs import QUICK, execute
from test_video_methods import CLIPS, METHODS

from decomp_nb import load_decomposer
from decomp_nb.components.rollout import RolloutTransformer, curriculum_length, roll_out_interleaved
from decomp_nb.data.slot_files import SlotCard, SlotClips, continue_slots, extract_slots, import_slots, slots_to_read, store_slots
from decomp_nb.factors import Factors
from decomp_nb.methods.slot_former import SlotFormer, drawing_errors, slot_former_preset
from decomp_nb.metrics.generation import psnr
from decomp_nb.official.reading import keep_with
from decomp_nb.training.parameters import parameters
from decomp_nb.training.run_directory import Run

SIZES = dict(slot_dim=16, n_slots=4, history=2, dim=16, n_layers=1, n_heads=2, dropout=0.0)


def former(name, **options):
    torch.manual_seed(0)
    model = SlotFormer(**dict(rollout_config=SIZES, n_predicted=2) | options)
    return model.attach(METHODS[name]().eval(), "slot_model").eval()


@pytest.mark.parametrize("name", METHODS)
def test_a_roll_out_is_drawn_by_any_slot_model(name):
    model = former(name)
    factors = model.encode(CLIPS, frame_noise=torch.zeros(2, 5, 4, 16))
    future = model.roll_out(factors, 3)
    options = dict(steps=2, generator=torch.Generator().manual_seed(0)) if model.scheduler is not None else {}
    assert future.masks is None and model.decode(future, **options).shape == (2, 3, 3, 16, 16)
    masks = model.draw_masks(future, **options).masks
    assert masks.shape[:3] == (2, 3, 4)
    torch.testing.assert_close(masks.sum(2), torch.ones_like(masks[:, :, 0]))


@pytest.mark.parametrize("name", METHODS)
def test_the_drawn_frames_teach_the_roll_out_and_nothing_else(name):
    model = former(name, image_weight=1.0).train()
    assert not any(p.requires_grad for p in model.slot_model.parameters()) and not model.slot_model.training
    for p in model.slot_model.parameters(): torch.nn.init.normal_(p, std=0.1)  # no layer is zero
    slots = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    out = model({"slots": slots, "image": CLIPS[:, :4]})
    assert set(out) == {"loss", "slots", "image"}
    (out["loss"] - out["slots"]).backward(retain_graph=True)
    assert model.rollout.write.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.slot_model.parameters())
    with pytest.raises(ValueError, match="image_weight: the batch has no 'image'"): model({"slots": slots})
    errors = drawing_errors(model.slot_model, Factors(slots[:, 2:]), CLIPS[:, 2:4], *noise_of(model, 4))
    assert errors.shape == (2, 2)


def noise_of(model, n):
    return (torch.zeros(n, *model.latent_shape), torch.full((n,), 3)) if model.scheduler is not None else ()


def test_it_trains_on_pictures_where_there_are_no_slots():
    model = former("savi").train()
    model({"image": CLIPS})["loss"].backward()
    assert model.rollout.read.weight.grad is not None
    with pytest.raises(ValueError, match="neither 'slots' nor 'image'"): model({})


def test_objects_are_taken_away_before_the_roll_out():
    model = former("savi")
    past = Factors(torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)))
    gone, absent = past.drop([1]), past * torch.tensor([1.0, 0, 1, 1])
    here = model.roll_out(absent, 4)
    torch.testing.assert_close(here.drop([1]).codes, model.roll_out(gone, 4).codes)
    assert here.weights.shape == (2, 4, 4) and not here.weights[:, :, 1].any()
    assert not torch.allclose(model.roll_out(past, 4).drop([1]).codes, here.drop([1]).codes)
    coded = former("savi", rollout_config=SIZES | dict(slot_code=True))
    with pytest.raises(ValueError, match="give those to leave out weight 0"): coded.roll_out(gone, 4)
    assert coded.roll_out(absent, 4).codes.shape == (2, 4, 4, 16)
    with pytest.raises(ValueError, match="a frame without any slot"): model.roll_out(past * 0.0, 4)


def test_a_slot_model_that_does_not_fit_is_refused(tmp_path):
    savi = METHODS["savi"]()
    for changes, complaint in ((dict(n_slots=5), "has 4 slots, but rollout_config says n_slots=5"), (dict(slot_dim=8), "have 16 numbers, but rollout_config says slot_dim=8")):
        with pytest.raises(ValueError, match=complaint): SlotFormer(rollout_config=SIZES | changes).attach(savi, "slot_model")
    with pytest.raises(ValueError, match="trained on slots of the weights 12345678"): SlotFormer(rollout_config=SIZES, slot_fingerprint="12345678").attach(savi, "slot_model")
    with pytest.raises(ValueError, match="do not follow objects"): SlotFormer(rollout_config=SIZES).attach(torch.nn.Linear(2, 2), "slot_model")
    with pytest.raises(ValueError, match="rollout_config: not given"): SlotFormer()
    with pytest.raises(ValueError, match="a trained slot model is needed"): SlotFormer(rollout_config=SIZES).encode(CLIPS)


@pytest.mark.parametrize("name", ["savi", "steve", "diffusion"])
def test_a_folder_keeps_it_with_its_slot_model(name, tmp_path):
    model = former(name)
    again = load_decomposer(keep_with(model, tmp_path / "whole")).eval()
    options = dict(steps=2, noise=torch.zeros(2, 3, *model.latent_shape)) if model.scheduler is not None else {}
    past = Factors(torch.randn(2, 3, 4, 16))
    torch.testing.assert_close(again.decode(again.roll_out(past, 3), **options), model.decode(model.roll_out(past, 3), **options))


def test_momentum_lets_numbers_go_on_as_they_did():
    torch.manual_seed(0)
    model = RolloutTransformer(**SIZES | dict(residual=True, momentum=True)).eval()
    with torch.no_grad(): model.momentum[:] = torch.tensor([torch.inf] * 2 + [-torch.inf] * 14)
    past = torch.randn(2, 3, 4, 16)
    found, step = model.roll_out(past, 3), past[:, 2] - past[:, 1]
    torch.testing.assert_close(found[:, 2, :, :2], (past[:, 2] + 3 * step)[..., :2])
    torch.testing.assert_close(found[:, 2, :, 2:], past[:, 2, :, 2:])
    with pytest.raises(ValueError, match="momentum=True needs residual=True"): RolloutTransformer(**SIZES | dict(momentum=True))


def test_schedules_follow_the_training_and_are_kept(tmp_path):
    model = former("savi", n_predicted=3, curriculum_steps=4, decay_steps=8).train()
    slots = torch.randn(2, 5, 4, 16)
    for _ in range(3): model({"slots": slots})
    assert model.next_length() == curriculum_length(3, 4, 3) == 2
    assert model.weighting({}, 2)["factor"] == pytest.approx(0.01 + 0.99 * 3 / 8)
    model.save_pretrained(tmp_path)
    again = SlotFormer.from_pretrained(tmp_path).train()
    assert int(again.steps) == 3 and again.next_length() == 2
    assert again.eval().next_length() == 3 and again.weighting({}, 2) == dict(factor=1.0)


@pytest.mark.parametrize("offset, observed, n", [(1, 3, 5), (2, 7, 5), (3, 6, 7)])
def test_interleaved_roll_outs_are_those_of_a_loop(offset, observed, n):
    torch.manual_seed(0)
    model, film = RolloutTransformer(**SIZES).eval(), torch.randn(2, observed, 4, 16)
    with torch.no_grad():
        found = roll_out_interleaved(model, film, n, offset)
        for j in range(offset):
            start = film[:, observed - 2 * offset + j::offset]
            torch.testing.assert_close(found[:, j::offset], model.roll_out(start, n)[:, :found[:, j::offset].shape[1]])


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_a_number_of_frames_that_is_none_is_named(n):
    model = former("savi")
    codes = torch.zeros(1, 9, model.rollout.n_slots, model.rollout.slot_dim)
    with pytest.raises(ValueError, match=f"n_frames={n}: how many frames"):
        model.roll_out(Factors(codes), n)


# slots on disk --------------------------------------------------------------------------------------------------------------------

def test_stored_slots_of_another_kind_are_refused(tmp_path):
    savi = METHODS["savi"]()
    card, films = SlotCard.of(savi), [(f"film {i}", torch.randn(6 + i, 4, 16)) for i in range(3)]
    path = store_slots(films, tmp_path / "slots.h5", card)
    assert len(SlotClips(path, 3, model=savi)) == 4 + 5 + 6
    for other, complaint in ((METHODS["savi"](), "slots of the weights"), (METHODS["savi"](slots_config=dict(n_slots=5, slot_dim=16, hidden_dim=32, init="learned", position="ends")), "4 slots a frame")):
        with pytest.raises(ValueError, match=f"slots.h5 holds {complaint}"): SlotClips(path, 3, model=other)
    with pytest.raises(ValueError, match="video film 0 has 6 frames, n_frames=7"): SlotClips(path, 7)
    with pytest.raises(ValueError, match="whole videos of one length are needed"): SlotClips(path)
    padded = SlotClips(path, 7, pad=True)
    assert [int(padded[i]["length"]) for i in range(len(padded))] == [6, 7, 7, 7]


@pytest.mark.parametrize("name", ["steve", "diffusion", "lsd"])
def test_a_slot_that_is_not_there_wins_no_place_of_drawn_frames(name):
    model = former(name)
    future = Factors(torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)))
    options = dict(steps=2, generator=torch.Generator().manual_seed(0)) if model.scheduler is not None else {}
    masks = model.draw_masks(future * torch.tensor([1.0, 0, 1, 1]), **options).masks
    assert masks[:, :, 0].sum() > 0 and not masks[:, :, 1].any()


def clips_of(n, t, name="film"):
    return [dict(image=CLIPS[i % 2].repeat(2, 1, 1, 1)[:t], image_id=f"{name} {i}/000000") for i in range(n)]


def test_slots_of_other_videos_or_weights_are_not_used_again(tmp_path):
    model = former("savi")
    path = extract_slots(model.slot_model, clips_of(3, 6), tmp_path / "slots.h5")
    assert extract_slots(model.slot_model, clips_of(3, 6), path) == path
    for other, complaint in ((clips_of(3, 8), "slots of 6 frames of 'film 0', but the data set has 8"), (clips_of(3, 6, "clip"), "of 'film 0', .* of 'clip 0'")):
        with pytest.raises(ValueError, match=complaint): extract_slots(model.slot_model, other, path)
    trained = SlotFormer(rollout_config=SIZES, slot_fingerprint="00000000").eval()
    with pytest.raises(ValueError, match="slots.h5 holds slots of the weights .*, but the model has 00000000"):
        continue_slots(trained, path, tmp_path / "future.h5", observed=4, n_frames=2)
    trained = SlotFormer(rollout_config=SIZES | dict(n_slots=5)).eval()
    with pytest.raises(ValueError, match="4 slots a frame, but the model has 5"):
        continue_slots(trained, path, tmp_path / "future.h5", observed=4, n_frames=2)


def test_slots_are_stored_unmerged(tmp_path):
    model = METHODS["diffusion"](merge_threshold=-0.99, tracking_config={}).eval()
    assert (model.encode(CLIPS).weights == 0).any()
    stored = SlotClips(extract_slots(model, clips_of(2, 5), tmp_path / "slots.h5", dtype="float32"))
    torch.testing.assert_close(stored[1]["slots"], model.encode(CLIPS, merge_threshold=0.0).codes[1])


def test_frames_of_other_clips_than_the_slots_are_refused():
    model = former("savi", image_weight=1.0)
    with pytest.raises(ValueError, match=r"images of \(2, 3\) clips and frames, but slots of \(2, 5\)"):
        model({"slots": torch.randn(2, 5, 4, 16), "image": CLIPS[:, :3]})


def test_padded_frames_do_not_count():
    model = former("savi", n_predicted=3)
    slots, length = torch.randn(2, 5, 4, 16), torch.tensor([5, 3])
    loss = model({"slots": slots, "length": length})["loss"]
    slots[1, 3:] = 100.0
    torch.testing.assert_close(model({"slots": slots, "length": length})["loss"], loss)


@pytest.mark.parametrize("damage, complaint", [
    (lambda p: p.write_bytes(b"nothing"), "not an HDF5 file"),
    (lambda p: p.write_bytes(p.read_bytes()[:-200]), "damaged or cut short"),
])
def test_damaged_files_are_named(tmp_path, damage, complaint):
    path = store_slots([("a", torch.randn(5, 4, 16))], tmp_path / "slots.h5", SlotCard("", 4, 16))
    damage(path)
    with pytest.raises(ValueError, match=complaint): SlotClips(path, 2)


def test_official_slots_are_read_but_never_unpickled(tmp_path, golden_slots):
    path = import_slots(golden_slots, tmp_path / "physion.h5", dtype="float32")
    clips = SlotClips(path, 3, frame_offset=2)
    from safetensors.torch import load_file
    every = load_file(golden_slots)
    name, start = clips[1]["image_id"].rsplit("/", 1)
    assert torch.equal(clips[1]["slots"], every[name].float()[int(start):int(start) + 6:2])


@pytest.fixture
def golden_slots():
    import os
    from pathlib import Path
    root = Path(os.environ.get("DECOMP_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))
    path = root / "video" / "trees" / "Physion" / "slots.safetensors"
    if not path.is_file(): pytest.skip(f"no parity data at {path}")
    return path


# presets and the notebook ---------------------------------------------------------------------------------------------------------

def test_published_settings():
    "Table of video.md, section 4.3: history + rolled, offset, slots, width / layers / heads / MLP"
    rows = {"physion": (15, 10, 3, 8, 192, 256, 12, 1024), "physion_steve": (15, 10, 3, 6, 192, 256, 8, 1024), "obj3d": (6, 10, 1, 6, 128, 128, 4, 512),
            "clevrer": (6, 10, 2, 7, 128, 256, 4, 1024), "phyre": (6, 10, 1, 8, 128, 256, 8, 1024)}
    for name, row in rows.items():
        preset = slot_former_preset(name)
        sizes = preset["rollout_config"]
        config = SlotFormer(**preset).config
        assert row == (sizes["history"], config.n_predicted, config.frame_offset, *(sizes[k] for k in ("n_slots", "slot_dim", "dim", "n_layers", "hidden"))) and sizes["n_heads"] == 8
        assert config.image_weight == (name in ("obj3d", "clevrer")) and not config.curriculum_steps and sizes["dropout"] == 0.1


BILLIARDS = {"n_frames": 9, "observed": 4, "twins": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Folder of a run, rehearsed with slots that were really found"
    folder = tmp_path_factory.mktemp("slot_former")
    small = dict(n_images=6, eval_scenes=3, preset="tiny", decoder_steps=2, mixed_precision="no", data="billiards", data_options=BILLIARDS, observed=4)
    execute("train_slot_former", folder, out_dir=str(folder / "run"), **small, **QUICK)
    return folder / "run"


def test_train_slot_former(trained):
    run = Run(trained)
    assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4] and run.curve("eval/error_share")[0] == [2, 4] and run.curve("eval/fg_ari")[0] == [2, 4]
    scores = json.loads((trained / "scores.json").read_text())
    assert set(scores) == {"SlotFormer", "the last frame", "straight on"} and len(scores["SlotFormer"]["slot_error"]) == 9 - 4
    model = load_decomposer(trained / "whole")
    clips = torch.rand(1, 3, 3, 32, 32) * 2 - 1
    assert model.decode(model.roll_out(model.encode(clips), 2)).shape == (1, 2, 3, 32, 32)
    assert sorted(p.name for p in (trained.parent / "run-slots").iterdir()) == ["slot_model", "train.h5", "val.h5"]


def played(notebook, until, **changes):
    "Names of a notebook that ran in this process, up to a cell"
    path = ROOT / "nbs" / f"{notebook}.ipynb"
    return play(path, {name: p.default for name, p in parameters(path).items()} | changes, until, slots_to_read=slots_to_read)


def test_predictions_are_scored_frame_by_frame(trained):
    space = played("eval_prediction", "results", run_dir=str(trained), n_clips=4, draw_clips=4, split="val")
    found = json.loads((trained / "eval_prediction.json").read_text())
    assert found["observed"] == 4 and found["predicted"] == 5 and (trained / "pictures" / "eval_prediction.png").stat().st_size < 400_000
    assert set(found["by_step"]) == {"SlotFormer", "the last frame", "straight on", "places straight on", "slots of the true frame"}
    assert all(len(values) == 5 for who in ("by_step", "frames") for scores in found[who].values() for values in scores.values())
    true, given = space["films"][:, 4:], space["films"][:, 3:4]
    assert found["frames"]["the last frame"]["psnr"][0] == pytest.approx(psnr(given[:, 0], true[:, 0]).mean().item())
    seen = space["model"].roll_out(Factors(space["given"]), 5).codes  # four frames, nothing else
    torch.testing.assert_close(seen, space["guesses"]["SlotFormer"])
    moved = (space["guesses"]["places straight on"] - space["given"][:, -1:]).flatten(0, 2).abs().sum(0).nonzero()[:, 0]
    assert moved.tolist() == [16, 17]  # behind the mean of the keys: row and column


def test_a_readout_reads_what_was_observed_and_rolled_out(trained, tmp_path):
    small = dict(slot_former=str(trained), out_dir=str(tmp_path / "readout"), n_train=6, n_val=4, feature_dim=8, epochs=2, seeds=1, data_options=BILLIARDS)
    space = played("train_readout", "keep", **small)
    assert space["train"][0].shape == (6, 9, 5, 64)
    stored = SlotClips(tmp_path / "readout-slots" / "val-predicted.h5")
    seen = SlotClips(tmp_path / "readout-slots" / "val-seen.h5")
    assert stored.n_frames == 9 and seen.n_frames == 4 and torch.equal(stored[0]["slots"][:4], seen[0]["slots"])
    played("eval_questions", "keep", run_dir=str(tmp_path / "readout"), n_test=4)
    scores = json.loads((tmp_path / "readout" / "eval_questions.json").read_text())
    assert scores["questions"] == 4 and scores["frames"] == 9
    with pytest.raises(ValueError, match="choose one of predicted, true, none"): played("train_readout", "data", **small | dict(future="rolled"))
