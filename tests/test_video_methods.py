"Methods on clips: what is learned about time, long clips in chunks, starts from boxes, start noise"
import pytest
import torch

from decomp_nb.components.dvae import DVAE
from decomp_nb.components.slots import SlotAttention
from decomp_nb.components.tracking import Tracker, boxes_of_labels, track
from decomp_nb.components.unets import denoiser_config
from decomp_nb.factors import interpolate
from decomp_nb.methods.lsd import LSD
from decomp_nb.methods.savi import SAVi, savi_preset
from decomp_nb.methods.slot_diffusion import SlotDiffusion, slot_diffusion_denoiser
from decomp_nb.methods.steve import STEVE, steve_preset

CLIPS = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
EYES = dict(image_size=16, encoder_config=dict(kind="conv", image_size=16, channels=[8, 8], stride=2, kernel=3, groups=0),
            slots_config=dict(n_slots=4, slot_dim=16, hidden_dim=32, init="learned", position="ends"))
TIME = dict(predictor=dict(n_layers=1, n_heads=2, hidden=16, dropout=0.0, recurrent=True), gaussian={}, contrast_weight=0.5)


def savi(**options): return SAVi(**EYES | dict(decoder_config=dict(channels=[8], start=8, kernel=5), tracking_config=TIME) | options)


def steve(**options):
    model = STEVE(**EYES | dict(decoder_config=dict(vocabulary=16, dim=16, n_layers=1, n_heads=2, dropout=0.0), tracking_config=TIME) | options)
    return model.attach(DVAE(16, width=8))


def diffusion(**options):
    unet = slot_diffusion_denoiser(4, slot_dim=16, channels=(8, 16), layers_per_block=1, head_dim=8, groups=4, dropout=0.0, in_channels=48)
    return SlotDiffusion(**EYES | dict(denoiser_config=unet, patch_size=4, tracking_config=TIME) | options)


def lsd(**options):
    unet = denoiser_config(4, slot_dim=16, channels=(8, 16), layers_per_block=1, n_heads=2, groups=4, in_channels=48)
    return LSD(**EYES | dict(denoiser_config=unet, patch_size=4, tracking_config=TIME) | options)


METHODS = dict(savi=savi, steve=steve, diffusion=diffusion, lsd=lsd)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_reaches_what_is_learned_about_time(name):
    torch.manual_seed(0)
    model = METHODS[name]().train()
    for p in model.parameters(): p.requires_grad and torch.nn.init.normal_(p, std=0.1)  # no layer begins at zero
    out = model({"image": CLIPS[:, :3]})
    assert {"kld", "contrast"} < set(out)
    out["loss"].backward()
    silent = [n for n, p in model.named_parameters() if n.startswith("tracker.") and (p.grad is None or not p.grad.abs().sum())]
    assert not silent, silent
    assert [g["name"] for g in model.parameter_groups()] == ["encoder", "decoder"]
    assert {id(p) for p in model.tracker.parameters()} <= {id(p) for p in model.parameter_groups()[0]["params"]}


@pytest.mark.parametrize("name", METHODS)
def test_chunks_give_the_whole_clip_and_a_folder_the_same_model(name, tmp_path):
    model = METHODS[name]().eval()
    given = dict(frame_noise=torch.randn(2, 5, 4, 16, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        whole = model.encode(CLIPS, **given)
        chunks, found = model.encode(CLIPS, chunk=2, return_found=True, **given)
        start, first = model.encode(CLIPS[:, :3], return_found=True, **given)
        rest = model.encode(CLIPS[:, 3:], state=first.state, **given)
        finer = [model.encode(CLIPS, zoom=2.0, chunk=n, masks="attention", **given).masks if name == "savi" else model.encode(CLIPS, zoom=2.0, chunk=n, **given).masks for n in (None, 2)]
    torch.testing.assert_close(chunks.codes, whole.codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunks.masks, whole.masks, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([start.codes, rest.codes], 1), whole.codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(*finer)
    assert found.state.n_frames == 5
    with pytest.raises(ValueError, match="chunk=0"): model.encode(CLIPS, chunk=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert torch.equal(again.encode(CLIPS, **given).codes, whole.codes)


def test_boxes_start_slots_and_the_learned_start_is_left_out():
    model = savi(tracking_config=dict(condition="boxes", predictor={}))
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    labels[:, 2:6, 3:9] = 1
    boxes = boxes_of_labels(labels, 3)
    model({"image": CLIPS, "boxes": boxes})["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as several GPUs need it
    assert not model.slot_attention.slot_mean.requires_grad
    model.diagnostics({"image": CLIPS, "boxes": boxes})
    with pytest.raises(ValueError, match="pass boxes="): model.encode(CLIPS)
    with pytest.raises(ValueError, match="at most 3"): model.encode(CLIPS, boxes=torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="not built to start from them"): savi().encode(CLIPS, boxes=boxes)


def test_gradients_flow_through_so_many_frames():
    module, tracker = SlotAttention(8, n_slots=3, slot_dim=16, init="learned"), Tracker(16, 3, predictor=dict(dropout=0.0), truncate=2)
    features = torch.randn(1, 4, 8, 4, 4, requires_grad=True)
    tracker(module, features).slots[:, -1].square().sum().backward()
    reached = features.grad.flatten(2).abs().sum(-1)[0] > 0
    assert reached.tolist() == [False, False, True, True]


def test_absent_slots_stay_away():
    "A slot that does not exist changes nothing, neither in slot attention nor in the predictor"
    module, tracker = SlotAttention(8, n_slots=4, slot_dim=16), Tracker(16, 4, predictor={}).eval()
    features, start = torch.randn(2, 3, 8, 4, 4), torch.randn(2, 4, 16)
    mask, other = torch.tensor([[True, True, True, False]] * 2), start.clone()
    other[:, 3] = 7.0
    found = [tracker(module, features, slots=s, slot_mask=mask).slots[:, :, :3] for s in (start, other)]
    torch.testing.assert_close(*found)


def test_frames_of_a_clip_share_their_noise():
    model = diffusion().eval()
    with torch.no_grad(): factors = model.encode(CLIPS[:, :1]).rows([0, 0])
    still = factors._replace(codes=factors.codes.expand(-1, 3, -1, -1), masks=factors.masks.expand(-1, 3, -1, -1, -1))
    draw = lambda share: model.decode(still, steps=2, noise_per=share, generator=torch.Generator().manual_seed(0))
    clip, frame, batch = draw("clip"), draw("frame"), draw("batch")
    torch.testing.assert_close(clip[:, 0], clip[:, 1])
    assert not torch.allclose(clip[0], clip[1]) and not torch.allclose(frame[:, 0], frame[:, 1])
    torch.testing.assert_close(batch[0], batch[1])


@pytest.mark.parametrize("preset, cls, name, size", [
    (savi_preset, SAVi, "movi_e", 4_853_892), (savi_preset, SAVi, "movi_solid", 2_352_260), (steve_preset, STEVE, "movi_e", 10_780_608),
])
def test_published_presets_have_the_published_size(preset, cls, name, size):
    with torch.device("meta"): assert sum(p.numel() for p in cls(**preset(name)).parameters()) == size


def test_plain_tracking_is_as_before():
    module, x = SlotAttention(8, n_slots=3, slot_dim=16), torch.randn(1, 2, 8, 4, 4)
    noise = torch.randn(1, 3, 16)
    found = track(module, x, noise=noise)
    torch.testing.assert_close(found.slots[:, 1], module(x[:, 1], slots=module(x[:, 0], noise=noise).slots).slots)


# -- all frames at once ------------------------------------------------------------------------------

AT_ONCE = dict(parallel=dict(n_layers=2, n_heads=2, hidden=16, gain=1.0), contrast_weight=0.5)


@pytest.mark.parametrize("name", METHODS)
def test_frames_that_look_back_in_every_method(name, tmp_path):
    "What is learned gets gradients, chunks give the whole clip, a folder the same model, and the future changes nothing"
    torch.manual_seed(0)
    model = METHODS[name](tracking_config=AT_ONCE)
    for p in model.parameters(): p.requires_grad and torch.nn.init.normal_(p, std=0.1)
    model.train()({"image": CLIPS[:, :3]})["loss"].backward()
    silent = [n for n, p in model.named_parameters() if n.startswith("tracker.") and (p.grad is None or not p.grad.abs().sum())]
    assert not silent, silent
    model.eval()
    later = CLIPS.clone()
    later[:, 3:] = 0.5
    with torch.no_grad():
        whole, chunks, changed = model.encode(CLIPS), model.encode(CLIPS, chunk=2), model.encode(later)
        start, first = model.encode(CLIPS[:, :3], return_found=True)
        rest = model.encode(CLIPS[:, 3:], state=first.state.detach())
        assert model.encode(CLIPS[:, 0]).codes.shape == (2, 4, 16)
    for found in (chunks.codes, torch.cat([start.codes, rest.codes], 1)): torch.testing.assert_close(found, whole.codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(changed.codes[:, :3], whole.codes[:, :3], rtol=0, atol=1e-5)
    assert not torch.allclose(changed.codes[:, 4], whole.codes[:, 4])
    model.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(type(model).from_pretrained(tmp_path).eval().encode(CLIPS).codes, whole.codes)


def test_a_frame_knows_its_past():
    "The same last frame behind another past has other slots; where nothing is read from the past, the same ones"
    torch.manual_seed(0)
    model = savi(tracking_config=dict(parallel=dict(n_layers=1, n_heads=2, gain=1.0))).eval()
    other = torch.cat([CLIPS.flip(0)[:, :4], CLIPS[:, 4:]], 1)
    last = lambda: [model.encode(clips).codes[:, 4] for clips in (CLIPS, other)]
    with torch.no_grad():
        assert not torch.allclose(*last(), atol=1e-3)
        model.tracker.layers[0].over_time.to_out.weight.zero_()
        torch.testing.assert_close(*last())


def test_absent_slots_stay_away_at_once():
    module, tracker = SlotAttention(8, n_slots=4, slot_dim=16), Tracker(16, 4, parallel=dict(gain=1.0)).eval()
    features, start = torch.randn(2, 3, 8, 4, 4), torch.randn(2, 4, 16)
    mask, other = torch.tensor([[True, True, True, False]] * 2), start.clone()
    other[:, 3] = 7.0
    found = [tracker(module, features, slots=s, slot_mask=mask).slots[:, :, :3] for s in (start, other)]
    torch.testing.assert_close(*found)


def test_options_that_go_from_frame_to_frame_are_refused_at_once():
    for wrong in (dict(predictor={}), dict(gaussian={}), dict(first_iterations=3), dict(truncate=2), dict(recompute=True)):
        with pytest.raises(ValueError, match=f"parallel: no frame follows another, so leave out {next(iter(wrong))}"): savi(tracking_config=dict(parallel={}, **wrong))
    with pytest.raises(ValueError, match="n_layers=0"): savi(tracking_config=dict(parallel=dict(n_layers=0)))
    clusters = savi(slots_config=dict(kind="clusters", n_slots=4, slot_dim=80), tracking_config=dict(parallel={}))
    with pytest.raises(ValueError, match="kind='attention'"): clusters.encode(CLIPS)
    boxes = savi(tracking_config=dict(parallel={}, condition="boxes"))
    with pytest.raises(ValueError, match="pass boxes="): boxes.encode(CLIPS)
    assert boxes.encode(CLIPS, boxes=torch.zeros(2, 3, 4)).codes.shape == (2, 5, 4, 16)


@pytest.mark.parametrize("name", METHODS)
def test_verbs_of_factors_work_on_clips_of_every_method(name):
    "An object is dropped from all frames, swapped between clips, and two clips are blended; each changes what is drawn"
    torch.manual_seed(0)
    model = METHODS[name](tracking_config={}).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.2)
    draw = lambda factors: model.decode(factors, steps=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        factors = model.encode(CLIPS[:, :2])
        other = factors.rows([1, 0])
        edits = dict(plain=factors, dropped=factors.drop([0]), swapped=factors.replace([1], other), blended=interpolate(factors, other, 0.5), joined=factors.pick([0]).cat(other.pick([2, 3])))
        drawn = {what: draw(edit) for what, edit in edits.items()}
    assert torch.equal(edits["swapped"].codes[:, :, 1], other.codes[:, :, 1]) and edits["dropped"].n_factors == 3
    for what, film in drawn.items():
        assert film.shape == (2, 2, 3, 16, 16) and film.isfinite().all()
    if name != "steve": assert all(not torch.allclose(film, drawn["plain"], atol=1e-5) for what, film in drawn.items() if what != "plain")
    with pytest.raises((ValueError, IndexError)): factors.drop([9])
