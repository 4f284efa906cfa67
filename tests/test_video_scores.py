"Scores of drawn and predicted clips, blind rivals, and slots that are clusters of whole clips"
import pytest
import torch

from decomp_nb.components.clip_clusters import ClipClusters
from decomp_nb.components.own_frame import OwnFrameDecoder
from decomp_nb.components.tracking import track
from decomp_nb.methods.savi import SAVi, savi_preset
from decomp_nb.metrics.video_generation import FrameFeatures, boxes_found, frame_curves, fvd, load_video_network, summed_error, take_frames, video_features
from decomp_nb.metrics.video_segmentation import colour_clips, link_labels, video_scores
from decomp_nb.worlds.scenes import Scenes

FILMS = Scenes("moving_shapes", 20, size=64, split="val", n_frames=6).batch(range(6))
SEEDED = dict(n_slots=3, slot_dim=80)


def seed(): return torch.Generator().manual_seed(0)


def test_linking_undoes_any_renumbering_of_frames():
    true = FILMS["masks"]
    k = int(true.max()) + 1
    orders = torch.stack([torch.randperm(k, generator=torch.Generator().manual_seed(t)) for t in range(6)])
    mixed = torch.stack([orders[t][true[:, t]] for t in range(6)], 1)
    assert video_scores(true, mixed).fg_ari.mean() < 0.5
    torch.testing.assert_close(video_scores(true, link_labels(mixed, k)).fg_ari, torch.ones(6, dtype=torch.float64), atol=0.02, rtol=0)


def test_colours_of_the_whole_clip_keep_their_number():
    true, films = FILMS["masks"], FILMS["image"]
    whole, alone = colour_clips(films, 7), colour_clips(films, 7, whole=False)
    assert whole.shape == alone.shape == true.shape
    assert video_scores(true, whole).fg_ari.mean() > 0.9 > video_scores(true, alone).fg_ari.mean() + 0.2


def test_errors_over_time_grow_where_nothing_moves():
    films = FILMS["image"]
    curves = frame_curves(films[:, :1].expand_as(films), films)
    assert all(values.shape == (6,) for values in curves.values())
    assert curves["psnr"][0] == torch.inf and curves["mse"][5] > curves["mse"][1] > curves["mse"][0] == 0
    assert torch.equal(summed_error(curves["mse"], 64, 64, colours="sum"), 3 * summed_error(curves["mse"], 64, 64))
    with pytest.raises(ValueError, match="of one shape"): frame_curves(films, films[:, 1:])
    with pytest.raises(ValueError, match="colours='max'"): summed_error(curves["mse"], 64, 64, colours="max")


def test_frames_that_are_not_there_are_refused():
    films = FILMS["image"]
    for options in (dict(n_frames=7), dict(n_frames=4, start=3), dict(n_frames=2, start=-1)):
        with pytest.raises(ValueError, match="have 6 frames"): take_frames(films, **options)
    with pytest.raises(ValueError, match="order='name'"): take_frames(films, 2, order="name")
    with pytest.raises(ValueError, match="give more"): video_features(FrameFeatures(), films, n_frames=4)
    with pytest.raises(ValueError, match="at least 2 clips"): fvd(torch.zeros(1, 3), torch.zeros(5, 3))


def test_a_file_that_is_no_network(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a TorchScript file"): load_video_network(tmp_path / "state.pt")


def test_boxes_that_are_not_there():
    box, none = torch.tensor([[0.0, 0, 4, 4]]), torch.full((1, 4), -1.0)
    assert boxes_found(box, box) == (1, 1) and boxes_found(box, torch.cat([box, box])) == (0.5, 1)
    precision, recall = boxes_found(box, none)
    assert precision != precision and recall == 0


def test_the_means_of_a_clip_are_those_of_all_its_frames():
    torch.manual_seed(0)
    slots, features = ClipClusters(8, **SEEDED), torch.randn(2, 4, 8, 6, 6)
    found = track(slots, features, generator=seed())
    means = found.slots[..., :16]
    assert torch.equal(means, means[:, :1].expand_as(means))
    turned = track(slots, features, slots=found.slots[:, 0])  # given slots keep their means
    torch.testing.assert_close(turned.slots, found.slots)
    hidden = track(slots, features, slots=found.slots[:, 0], slot_mask=torch.tensor([[True, True, False]] * 2))
    assert not hidden.attention[..., 2].any()
    with pytest.raises(ValueError, match="drawn places"): slots.start_on(features, noise=0.0)
    with pytest.raises(ValueError, match="leave it out"): ClipClusters(8, out_dim=32, project_slots=False, **SEEDED)


def test_savi_with_clusters_draws_moves_and_drops():
    torch.manual_seed(0)
    model = SAVi(**savi_preset("clusters", zoom=1.0)).eval()
    out = model.train()({"image": FILMS["image"][:2, :2]})
    assert {"reconstruction", "keys"} < set(out)
    out["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval()
    with torch.no_grad(): factors = model.encode(FILMS["image"][:2], generator=seed())
    assert factors.codes.shape == (2, 6, 8, 208) and model.decode(factors.drop([0])).shape == (2, 6, 3, 64, 64)
    with torch.no_grad(): later = model.encode(FILMS["image"][:2], generator=seed(), chunk=2)
    assert torch.equal(later.codes[:, 0, :, :16], later.codes[:, 5, :, :16])  # the first chunk decides


def test_a_decoder_in_the_slots_frame_follows_their_place():
    torch.manual_seed(0)
    decoder = OwnFrameDecoder(80, 32, window=7)
    slots = torch.zeros(1, 1, 80)
    slots[..., 16:19] = torch.tensor([0.0, -1.0, -1.0])  # row 1/2, column 1/4
    slots[..., 19:68] = 1.0
    place = decoder(slots)[0, 0, 3].flatten().topk(20).indices % 32
    assert 4 <= place.float().mean() <= 12
    with pytest.raises(ValueError, match="no content"): OwnFrameDecoder(68)
