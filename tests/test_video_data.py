"""Clips of videos: what comes out of each kind of file, and one clear error for each thing that can be wrong with them."""
import builtins
import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from decomp_nb.data.catalog import detect_format, open_dataset, validate_dataset
from decomp_nb.data.mp4 import frame_times, write_mp4
from decomp_nb.data.physion import read_labels as physion_labels
from decomp_nb.data.video import CLIPS, VideoClips, VideoFile, check_numbers, cut_videos, find_videos, first_frames, jpeg_clips, renumber_objects
from decomp_nb.viz.film import clip_film, outline
from decomp_nb.worlds.moving import MovingShapes, bounce
from decomp_nb.worlds.scenes import Scenes

with_pyav = pytest.mark.skipif(not find_spec("av"), reason="PyAV is an extra")
T = 9


@pytest.fixture(scope="module")
def drawn():
    "Four clips, and their frames as bytes"
    batch = Scenes("moving_textured", 4, size=32, n_frames=T, n_objects=2).batch(range(4))
    return batch | {"pixels": ((batch["image"].movedim(2, -1) + 1) * 127.5).round().byte().numpy()}


def write_folder(root: Path, drawn: dict, layout: str = "frames", videos=range(4)) -> Path:
    "Videos as numbered frames, or as a dump in the layout of SlotDiffusion or STEVE"
    for v in videos:
        folder = root / f"{v:04d}"
        folder.mkdir(parents=True)
        for t in range(T):
            picture, mask = Image.fromarray(drawn["pixels"][v, t]), drawn["masks"][v, t].byte().numpy()
            if layout == "frames": picture.save(folder / f"{t}.png")
            if layout == "slot_diffusion":
                picture.save(folder / f"{t:06d}.jpg", quality=98, subsampling=0)
                Image.fromarray(mask * 3).save(folder / f"{t:06d}_mask.png")
            if layout == "steve":
                picture.save(folder / f"{t:08d}_image.png")
                for j in (1, 2): Image.fromarray((mask == j).astype(np.uint8) * 255).save(folder / f"{t:08d}_mask_{j - 1:02d}.png")
    return root


def write_h5(path: Path, drawn: dict, **more) -> Path:
    with h5py.File(path, "w") as f:
        f["video"], f["mask"] = drawn["pixels"], drawn["masks"].byte().numpy()[..., None]
        f["visibility"] = np.ones((4, 3), np.float32)
        f["position"] = np.concatenate([np.zeros((4, T, 1, 2)), drawn["labels"]["position"].movedim(2, 1).numpy()], 2).astype(np.float32)
        for key, value in more.items(): f[key] = value
    return path


# -- what comes out --------------------------------------------------------------------------


def test_frames_masks_and_labels_of_each_kind_of_file(tmp_path, drawn):
    sets = {"frames": write_folder(tmp_path / "a", drawn), "jpg": write_folder(tmp_path / "MOVi-A", drawn, "slot_diffusion"),
            "steve": write_folder(tmp_path / "b", drawn, "steve"), "h5": write_h5(tmp_path / "c.h5", drawn)}
    for name, path in sets.items():
        ds = VideoClips(path, 32, n_frames=3, frame_offset=2, clips="every")
        assert len(ds) == 4 * (T - 4)
        item = ds[7]  # video 1, frames 2, 4, 6
        lossy = 0.5 if name == "jpg" else 1e-6
        assert (item["image"] - drawn["image"][1, 2:7:2]).abs().mean() < (0.05 if name == "jpg" else 1e-6) and item["image"].shape == (3, 3, 32, 32)
        assert (item["image"] - drawn["image"][1, 2:7:2]).abs().max() < lossy
        assert ("masks" in item) == (name != "frames")
        if name in ("steve", "h5"): assert item["masks"].equal(drawn["masks"][1, 2:7:2])
        if name == "jpg":  # ids 3 and 6
            seen = drawn["masks"][1, 2:7:2]
            assert all((item["masks"][seen == j] == 3 * j).all() for j in (1, 2)) and ds.max_objects == 10
        if name == "h5": assert item["labels"]["position"].equal(drawn["labels"]["position"][1, :, 2:7:2])
        validate_dataset(ds, image_size=32, need_masks=name != "frames", batch_size=4)


def test_whole_videos_and_batches_by_workers(tmp_path, drawn):
    ds = open_dataset(write_h5(tmp_path / "c.h5", drawn), split="all", n_frames=None)
    batch = next(iter(DataLoader(ds, 4, num_workers=1)))
    assert batch["image"].equal(drawn["image"]) and batch["masks"].equal(drawn["masks"])


def test_splits_keep_videos_whole_and_are_cut_as_published(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    parts = [open_dataset(root, split=split, size=32, n_frames=2, frame_offset=2) for split in ("train", "val", "test")]
    names = [{video.name for video in ds.videos} for ds in parts]
    assert len(set.union(*names)) == 4 and sum(map(len, names)) == 4
    assert [len(ds) for ds in parts] == [2 * (T - 2), 2 * (T // 4), 1]
    folders = tmp_path / "b"
    write_folder(folders / "train", drawn, videos=(0, 1, 2)), write_folder(folders / "validation", drawn, videos=(3,))
    assert [video.name for video in open_dataset(folders, split="val", n_frames=2).videos] == ["validation/0003"]
    with pytest.raises(ValueError, match=r"split folders \['train', 'validation'\] but none for split='test'"): open_dataset(folders, split="test", n_frames=2)


def test_a_file_that_is_a_split_is_cut_as_that_split(tmp_path, drawn):
    for split in ("train", "val"): write_h5(tmp_path / f"set_{split}.h5", drawn)
    assert [len(open_dataset(tmp_path, split=split, n_frames=3)) for split in ("train", "val")] == [4 * (T - 2), 4 * (T // 3)]


def test_same_id_in_all_clips_of_a_video_unless_renumbered(tmp_path, drawn):
    masks = drawn["masks"].clone()
    masks[0, :4][masks[0, :4] == 1] = 0  # object 1 comes later
    path = write_folder(tmp_path / "MOVi-A", drawn | {"masks": masks}, "slot_diffusion", [0])
    plain, official = (VideoClips(path, 32, n_frames=4, clips="windows", renumber=renumber) for renumber in (False, True))
    assert plain[0]["masks"].unique().tolist() == [0, 6] and plain[1]["masks"].unique().tolist() == [0, 3, 6]
    assert official[0]["masks"].unique().tolist() == [0, 1] and official[1]["masks"].unique().tolist() == [0, 1, 2]
    assert official[0]["labels"]["visibility"].tolist() == [1] + [0] * 9


def test_clips_of_a_video_by_brute_force():
    for length in range(1, 12):
        for n in (1, 2, 3):
            for o in (1, 2, 3):
                every, windows, first = (first_frames(length, n, o, how) for how in CLIPS)
                assert every == [s for s in range(length) if s + (n - 1) * o < length]
                taken = [s + i * o for s in windows for i in range(n)]
                assert sorted(taken) == list(range(length // (n * o) * n * o))  # each frame once, up to the last whole window
                assert first == every[:1]


def test_videos_by_name_in_their_order(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    assert [v.name for v in VideoClips(root, n_frames=2, videos=["0002", "0000"]).videos] == ["0002", "0000"]
    with pytest.raises(ValueError, match="no video '0009'"): VideoClips(root, n_frames=2, videos=["0002", "0009"])


def test_jpegs_in_hdf5(tmp_path, drawn):
    def write(path, frames):
        with h5py.File(path, "w") as f:
            data = f.create_dataset("jpeg", (len(frames),), h5py.vlen_dtype(np.uint8))
            for i, t in enumerate(frames):
                Image.fromarray(drawn["pixels"][0, t]).save(tmp_path / "x.jpg", quality=98, subsampling=0)
                data[i] = np.frombuffer((tmp_path / "x.jpg").read_bytes(), np.uint8)
            f["clip"], f["frame"] = [b"one"] * len(frames), np.array(frames, np.uint8)
        return path
    video, = jpeg_clips(write(tmp_path / "photos.h5", [3, 1, 0, 2]))
    apart = np.abs(video.read(range(4))[0].astype(int)[:, None] - drawn["pixels"][0, :4]).mean((2, 3, 4))
    assert apart.argmin(1).tolist() == [0, 1, 2, 3] and apart.min(1).max() < 3
    with pytest.raises(ValueError, match="gap.h5: one lacks frames 2"): VideoClips(write(tmp_path / "gap.h5", [0, 1, 3]))


# -- what can be wrong ----------------------------------------------------------------------


def test_missing_frames_are_named(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    (root / "0002/4.png").unlink()
    with pytest.raises(ValueError, match="0002 lacks frames 4: extract"): open_dataset(root, n_frames=3)
    check_numbers([0, 5, 10], "x"), check_numbers([7], "x"), check_numbers([], "x")
    with pytest.raises(ValueError, match="x has two pictures with the number 5"): check_numbers([0, 5, 5, 10], "x")
    with pytest.raises(ValueError, match="x lacks frames 2, 6, 7"): check_numbers([0, 1, 3, 4, 5, 8, 9], "x")


def test_masks_of_another_length_than_the_clip(tmp_path, drawn):
    root = write_folder(tmp_path / "MOVi-A", drawn, "slot_diffusion")
    (root / "0001/000008_mask.png").unlink()
    with pytest.raises(ValueError, match="0001 has 9 frames but 8 label maps; these frames lack one of the two: 000008"): open_dataset(root, n_frames=3)
    path = write_h5(tmp_path / "c.h5", drawn)
    with h5py.File(path, "a") as f:
        masks = f["mask"][:, :-1]
        del f["mask"]
        f["mask"] = masks
    with pytest.raises(ValueError, match=r"'mask' is \(4, 8, 32, 32, 1\) but 'video' is \(4, 9"): open_dataset(path, n_frames=3)


def test_too_short_for_the_sampling(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    for t in (7, 8): (root / f"0001/{t}.png").unlink()
    with pytest.raises(ValueError, match="video 0001 has 7 frames, n_frames=8 with frame_offset=1 and clips='every' needs 8"):
        VideoClips(root, n_frames=8, clips="every")
    with pytest.raises(ValueError, match="video 0001 has 7 frames.*clips='windows' needs 8"): VideoClips(root, n_frames=4, frame_offset=2, clips="windows")
    assert len(VideoClips(root, n_frames=7, clips="first")) == 4
    for wrong in ({"n_frames": 0}, {"n_frames": 2, "frame_offset": 0}):
        with pytest.raises(ValueError, match="at least 1"): VideoClips(root, **wrong)
    with pytest.raises(ValueError, match="clips='some' is unknown: use one of every, windows, first"): VideoClips(root, n_frames=2, clips="some")


def test_whole_videos_of_unequal_length(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    (root / "0003/8.png").unlink()
    with pytest.raises(ValueError, match="0000 has 9 frames, 0003 has 8: pass n_frames= or max_frames="): VideoClips(root)
    assert VideoClips(root, max_frames=8).n_frames == 8


def test_frames_of_unequal_size(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    Image.new("RGB", (16, 20)).save(root / "0000/3.png")
    with pytest.raises(ValueError, match="32×32 and 20×16, the latter in 3.png"): validate_dataset(VideoClips(root, 32, n_frames=T))


def test_what_is_no_video(tmp_path, drawn):
    with pytest.raises(FileNotFoundError, match="nowhere"): VideoClips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no videos in"): VideoClips(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="a.txt is no video"): find_videos(tmp_path / "a.txt")
    with h5py.File(tmp_path / "stills.h5", "w") as f: f["image"] = drawn["pixels"][:, 0]
    with pytest.raises(ValueError, match="stills.h5 holds pictures, no videos"): open_dataset(tmp_path / "stills.h5", n_frames=2)


def test_video_files_without_pyav(tmp_path, monkeypatch):
    "One clear error, before anything else is done"
    (tmp_path / "a.mp4").write_bytes(b"anything")
    plain = builtins.__import__

    def without(name, *given, **options):
        if name == "av": raise ImportError("No module named 'av'")
        return plain(name, *given, **options)
    monkeypatch.setattr(builtins, "__import__", without)
    for path in (tmp_path, tmp_path / "a.mp4"):
        with pytest.raises(ImportError, match=re.escape('reading video files needs PyAV: pip install "decomp_nb[video]", or extract')): open_dataset(path, n_frames=2)


@with_pyav
def test_video_files_are_read_from_any_frame(tmp_path, drawn):
    long = torch.cat([drawn["image"][0], drawn["image"][1], drawn["image"][2]]).repeat(3, 1, 1, 1)  # 81 frames: several key frames apart
    file = VideoFile("a", str(write_mp4(long, tmp_path / "a.mp4", quality=4)), frame_times(tmp_path / "a.mp4"))
    assert len(file) == len(long)
    for times in (range(0, 5), range(13, 40, 5), range(80, 81), range(60, 81, 20)):
        frames = torch.from_numpy(file.read(times)[0]).movedim(-1, 1) / 127.5 - 1
        assert (frames - long[list(times)]).abs().mean((1, 2, 3)).max() < 0.08
    write_mp4(long, tmp_path / "b.mp4")
    ds = open_dataset(tmp_path, split="all", size=32, n_frames=3, frame_offset=20)
    assert ds.n_frames == 3 and [v.name for v in ds.videos] == ["a.mp4", "b.mp4"] and "masks" not in ds[0]
    validate_dataset(ds, image_size=32)


@with_pyav
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_a_video_file_cut_short(tmp_path, drawn, options):
    import av
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for picture in np.concatenate(drawn["pixels"]): container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert len(frame_times(path)) == 4 * T
    path.write_bytes(data[:len(data) * 3 // 4])
    with pytest.raises(ValueError, match="cannot read video .*a.mp4: .*It is damaged or cut short: copy or download it again"): open_dataset(path, split="all", n_frames=3)
    path.write_bytes(b"no video at all")
    with pytest.raises(ValueError, match="cannot read video .*a.mp4"): frame_times(path)
    with pytest.raises(ValueError, match="even sides"): write_mp4(torch.zeros(1, 3, 9, 9), path)


# -- moving shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moving_shapes", "moving_textured"])
def test_moving_shapes_are_a_function_of_seed_split_index(name):
    ds = open_dataset(name, split="val", size=48, n=20, n_frames=10)
    item = ds[7]
    assert item["image"].shape == (10, 3, 48, 48) and item["masks"].shape == (10, 48, 48) and item["masks"].dtype == torch.int64
    batch = Scenes(name, 20, size=48, split="val", n_frames=10).batch([3, 7])
    assert batch["image"][1].equal(item["image"]) and batch["masks"][1].equal(item["masks"])
    for other in (dict(split="test"), dict(split="val", seed=1)): assert not open_dataset(name, size=48, n=20, n_frames=10, **other)[7]["image"].equal(item["image"])
    validate_dataset(ds, image_size=48, need_masks=True, batch_size=4)


def test_moving_objects_keep_their_number_and_stay_inside():
    ds = Scenes("moving_shapes", 30, size=48, n_frames=24)
    batch = ds.batch(range(30))
    labels, there = batch["labels"], batch["labels"]["visibility"] > 0
    room = 0.75 * labels["size"][..., None, None]
    inside = (labels["position"] >= room - 1e-5) & (labels["position"] <= 1 - room + 1e-5)
    assert inside.all(-1)[there].all()
    colours = (batch["image"] + 1) / 2
    for b in range(30):  # in the middle of an object that is seen is its colour, in every frame
        for j in there[b].nonzero()[:, 0].tolist():
            for t in (0, 11, 23):
                own = batch["masks"][b, t] == j + 1
                assert labels["visible_pixels"][b, j, t] == own.sum()
                core = -torch.nn.functional.max_pool2d(-own[None].float(), 3, 1, 1)[0] > 0
                if core.any(): assert (colours[b, t, :, core].T - labels["rgb"][b, j]).abs().median() < 0.02
    moved = labels["position"].diff(dim=2)
    assert ((moved - labels["velocity"][:, :, :-1]).abs() < 1e-5)[there].float().mean() > 0.9
    assert not labels["position"][~there].any()


def test_bounce_is_a_simulation_in_small_steps():
    at, v, low, high = 0.37, 0.061, 0.15, 0.85
    place, velocity = bounce(torch.tensor(at), torch.tensor(v), torch.arange(40), torch.tensor(low), torch.tensor(high))
    for t in range(40):
        assert abs(place[t] - at) < 1e-4 and abs(velocity[t] - v) < 1e-6
        for _ in range(100):
            at += v / 100
            if not low <= at <= high:
                at = 2 * (low if at < low else high) - at
                v = -v


def test_options_of_moving_shapes_that_make_no_sense():
    for wrong, why in ((dict(n_frames=0), "n_frames is 0"), (dict(speed=(0.2, 0.1)), "speed is"), (dict(side=(0.2, 0.5)), "position is .*need centres in 0.375…0.625")):
        with pytest.raises(ValueError, match=why): MovingShapes(**wrong)


def test_an_object_removed_from_a_moving_scene_leaves_the_others():
    ds = Scenes("moving_shapes", 5, size=48, n_objects=3)
    before, after = ds[0], ds.counterfactual(0, remove=2)
    assert not (after["masks"] == 2).any() and after["labels"]["position"][[0, 2]].equal(before["labels"]["position"][[0, 2]])


def test_renumber_keeps_rows_with_their_objects():
    item = {"masks": torch.tensor([[0, 4], [2, 4]]), "labels": {"size": torch.tensor([1.0, 2, 3, 4])}}
    assert json.dumps(renumber_objects(item)["masks"].tolist()) == "[[0, 2], [1, 2]]" and renumber_objects(item)["labels"]["size"].tolist() == [2, 4, 0, 0]


def test_cut_videos_of_nothing_but_frames():
    class Blank:
        name = "blank"
        def __len__(self): return 7
    index, n = cut_videos([Blank(), Blank()], 3, 2, "every")
    assert n == 3 and index.tolist() == [[v, s] for v in (0, 1) for s in (0, 1, 2)]


# -- films ----------------------------------------------------------------------------------


def test_outlines_lie_on_their_objects_and_films_stay_small(drawn):
    frames, masks = drawn["image"][0], drawn["masks"][0]
    drawn_over = outline(frames, masks, scale=2, width=1)
    changed = ((drawn_over - frames.repeat_interleave(2, -1).repeat_interleave(2, -2)).abs() > 0.02).any(1)
    large = masks.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert changed.any() and not changed[large == 0].any()
    film = clip_film(drawn["image"], drawn["masks"], limit=60_000)
    assert len(film._repr_png_()) <= 60_000 and len(film.pages) in (T, 5, 3)
    assert len(clip_film(frames).pages) == T
    with pytest.raises(ValueError, match="expected clips .* with masks"): clip_film(frames, masks[1:])


def test_a_folder_of_pictures_with_a_stray_video_stays_one_of_pictures(tmp_path, drawn):
    root = write_folder(tmp_path / "a", drawn)
    (root / "0000/preview.mp4").write_bytes(b"")
    assert detect_format(root) == "images"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.mp4").write_bytes(b"")
    assert detect_format(tmp_path / "b") == detect_format(tmp_path / "b/x.mp4") == "video"


# -- labels of Physion, in other tables -------------------------------------------------------------------------------

@pytest.mark.parametrize("table", [
    "name,ground truth outcome\nfall_7_img,True\nroll_2,False\n", "ground truth outcome,stimulus name\nTrue,fall_7_img\nFalse,roll_2\n", ",video_name,ground truth outcome\n0,fall_7,True\n1,roll_2_img,False\n",
    ",ground truth outcome,seed\nfall_7_img,True,3\nroll_2,False,4\n", "clip,ground truth outcome\nfall_7_img,True\nroll_2,False\nroll_2_img,False\n",
])
def test_names_stand_in_the_column_that_is_called_so(tmp_path, table):
    (tmp_path / "labels.csv").write_text(table)
    assert physion_labels(tmp_path / "labels.csv") == {"fall_7": 1, "roll_2": 0}


@pytest.mark.parametrize("table, match", [("index,seed,ground truth outcome\n0,fall_7,True\n", r"not clear which of the columns .*'index', 'seed'"), ("name,ground truth outcome\nfall_7,True\nroll_2,True\nfall_7_img,False\n", "row 4 says False of 'fall_7', an earlier row the contrary"),
                                          ("name,video,ground truth outcome\na,b,True\n", "not clear which")])
def test_labels_that_may_mean_two_things_are_refused(tmp_path, table, match):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(ValueError, match=match) as error: physion_labels(tmp_path / "labels.csv")
    assert "labels.csv" in str(error.value)


def test_videos_of_a_file_are_not_chosen_by_name(tmp_path, drawn):
    with pytest.raises(ValueError, match="of an HDF5 file take split= or n="):
        VideoClips(write_h5(tmp_path / "c.h5", drawn), 16, n_frames=3, videos=["c/000002"])


def test_frames_that_lie_beside_films_are_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr("decomp_nb.data.video.frame_times", lambda file: [0.0, 0.04])
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").write_bytes(b"")
    (tmp_path / "films/cover_1.png").write_bytes(b"")
    with warnings.catch_warnings(action="error"):  # one picture may be its cover
        assert [video.name for video in find_videos(tmp_path)] == ["films/a.mp4"]
    (tmp_path / "b").mkdir()
    for i in range(3):
        (tmp_path / f"b/frame_{i:03}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"4 numbered pictures, such as .*, lie beside a.mp4: only films are read"):
        find_videos(tmp_path)
