"""Data sets read from small files that the tests write in the true public layouts, and from the real files of the data folder where there is one"""
import gzip
import io
import json
import multiprocessing
import pickle
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import COLOURS, NAMES, draw, frame, rows, write_clevrtex, write_dump, write_scenes
from torch.utils.data import DataLoader

from decomp_nb.data import home
from decomp_nb.data.catalog import detect_format, open_dataset, validate_dataset
from decomp_nb.data.clevrtex import ClevrTex
from decomp_nb.data.hdf5 import H5Photos, open_h5
from decomp_nb.data.images import (
    ImageFolder,
    crop_box,
    read_image,
    resize_crop,
    to_image_tensor,
    to_rgb,
)
from decomp_nb.data.mixture import Mixture, open_mixture
from decomp_nb.data.movi import MoviDump, instance_factors
from decomp_nb.data.reader import split_by_group
from decomp_nb.data.records import (
    RECORD_LAYOUTS,
    ClevrWithMasks,
    ObjectRecords,
    masked_crc,
    read_example,
    read_records,
)
from decomp_nb.worlds.scenes import Scenes
from decomp_nb.data.scene_item import follow_crop, scene_item
from decomp_nb.data.scenes_h5 import H5Edits, H5Scenes, count_objects, h5_layout

ROOT = Path(__file__).resolve().parents[1]
DATA = home.data_home()
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}: set DECOMP_DATA to the data folder")

# -- scenes of which everything is known -------------------------------------------------------------------------------------------------

def assert_true(item: dict, factor: str = "color", colour_of=lambda code: COLOURS[code]) -> int:
    "Every visible object has the colour that its row of labels says, and lies where its row says; returns how many there were"
    labels, image = item["labels"], (item["image"] + 1) * 127.5
    masks = item["masks"] if item["masks"].dim() == 2 else item["masks"][0]
    there = [i for i, v in enumerate(labels["visibility"].tolist(), 1) if v and (masks == i).any()]
    assert set(masks.unique().tolist()) - {0} == set(there)
    for i in there:
        region = masks == i
        if factor in labels:
            seen = image[:, region].median(dim=1).values
            torch.testing.assert_close(seen, torch.tensor(colour_of(int(labels[factor][i - 1]))).float(), atol=4, rtol=0)
        if "pixel_coords" in labels:
            row, column = region.nonzero().float().mean(0).tolist()
            at = labels["pixel_coords"][i - 1]
            at = at[0] if at.dim() == 2 else at
            assert abs(column + 0.5 - at[0]) < 1.6 and abs(row + 0.5 - at[1]) < 1.6 and at[2] == 5
    return len(there)


def write_video(path: Path, n: int = 6, t: int = 5) -> Path:
    "Clips in which the whole scene moves to the right, one pixel each frame"
    scenes = [draw(i, 48, 48, 3) for i in range(n)]
    with h5py.File(path, "w") as f:
        f["video"] = np.stack([[np.roll(s["image"], d, 1) for d in range(t)] for s in scenes])
        f["mask"] = np.stack([[np.roll(s["mask"], d, 1) for d in range(t)] for s in scenes])[..., None]
        f["visibility"] = np.tile(np.float32([1, 1, 1, 1]), (n, 1))
        f["color"] = np.stack([rows(s["color"], 4) for s in scenes]).astype(np.uint8)
        f["pixel_coords"] = np.stack([[rows(s["pixel_coords"] + [d, 0, 0], 4) for d in range(t)] for s in scenes]).astype(np.float32)
    return path


@pytest.fixture
def scenes_file(tmp_path): return write_scenes(tmp_path / "scenes.h5")


@pytest.fixture
def photos(tmp_path):
    "Ten pictures in two folders, of different sizes and modes"
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "RGB", "RGB"]):
        array = (np.random.default_rng(i).random((30 + 3 * i, 40)) * 255).astype(np.uint8)
        picture = Image.fromarray(array.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(array).convert(mode)
        folder = tmp_path / "photos" / ("a" if i % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"pic{i}.{'tif' if mode == 'CMYK' else 'jpg' if i > 7 else 'png'}")
    return tmp_path / "photos"


# -- pictures ----------------------------------------------------------------------------------------------------------------------------

def test_resize_agrees_with_pil_and_block_mean():
    picture = Image.fromarray((np.random.default_rng(0).random((90, 90, 3)) * 255).astype(np.uint8))
    ours, pil = resize_crop(to_image_tensor(picture), 40), to_image_tensor(picture.resize((40, 40), Image.Resampling.BILINEAR))
    assert (ours - pil).abs().max() < 1.1 / 127.5  # PIL rounds to 8 bits after each axis
    x = to_image_tensor(picture)
    torch.testing.assert_close(resize_crop(x, 45), x.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)))


@pytest.mark.parametrize("side, size", [(48, 24), (48, 16), (50, 32), (36, 72), (40, 64)])
def test_labels_are_taken_at_the_pixel_centres_of_the_colours(side, size):
    mask = torch.from_numpy(draw(3, side, side, 4)["mask"]).long()
    small = resize_crop(mask, size)
    centres = ((np.arange(size) + 0.5) * side / size).astype(int)
    assert small.equal(mask[centres][:, centres]) and small.dtype == torch.int64
    assert set(small.unique().tolist()) <= set(mask.unique().tolist())


def test_crop_and_its_errors():
    assert crop_box(240, 320, (29, 64, 192)) == (29, 64, 192)
    for wrong in (0, 241, (100, 100, 200), (-1, 0, 10)):
        with pytest.raises(ValueError, match="crop="): crop_box(240, 320, wrong)


def test_to_image_tensor_range_and_errors():
    assert to_image_tensor(np.zeros((2, 4, 4, 1), np.uint8)).shape == (2, 3, 4, 4)
    assert to_image_tensor(Image.new("RGB", (5, 4), "white")).unique().tolist() == [1]
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"): to_image_tensor(wrong)


def test_transparent_and_palette_pictures_lie_on_white():
    picture = Image.new("P", (4, 4), 0)
    picture.info["transparency"] = 0
    assert to_rgb(picture).getpixel((0, 0)) == (255, 255, 255)


def test_folder_is_recursive_sorted_and_square(photos):
    ds = ImageFolder(photos, 24)
    assert len(ds) == 10 and [i["image_id"] for i in ds] == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))
    assert all(i["image"].shape == (3, 24, 24) and i["image"].abs().max() <= 1 for i in ds)
    assert ds.check() == 10
    assert ImageFolder(photos, 64)[0]["image"].shape == (3, 64, 64)  # enlarged
    with pytest.raises(ValueError, match=r"smaller than min_size=36"): ImageFolder(photos, 24, min_size=36).check()
    assert len(ImageFolder(photos, 24, pattern="*.jpg")) == 2


def test_folder_splits(photos, tmp_path):
    parts = [set(ImageFolder(photos, split=s).files) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [8, 1, 1] and len(set.union(*parts)) == 10
    assert ImageFolder(photos, split="val").files == ImageFolder(photos, split="validation").files
    with pytest.raises(ValueError, match="split='dev2'"): ImageFolder(photos, split="dev2")
    with pytest.raises(ValueError, match="at least 3 groups"): ImageFolder(photos, split="val", group_by="folder")
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "own" / split / f"{split}.png")
    assert ImageFolder(tmp_path / "own", split="val").files == ["val/val.png"]
    with pytest.raises(ValueError, match="none for split='test'"): ImageFolder(tmp_path / "own", split="test")


def test_frames_of_a_video_stay_together(tmp_path):
    for v in range(8):
        (tmp_path / f"clip{v}").mkdir()
        for t in range(3): Image.new("RGB", (16, 16)).save(tmp_path / f"clip{v}" / f"{t:04d}.png")
    parts = [{f.split("/")[0] for f in ImageFolder(tmp_path, split=s).files} for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [6, 1, 1] and len(set.union(*parts)) == 8


def test_splits_hardly_move_when_pictures_are_added():
    names = [f"{i}.png" for i in range(400)]
    before, after = ({ns[i] for i in split_by_group(ns, "train")} for ns in (names, [*names, "new.png"]))
    assert len(before - after) <= 2


def test_subset_is_deterministic_and_nested(photos):
    assert ImageFolder(photos, n=4, seed=1).files == ImageFolder(photos, n=4, seed=1).files != ImageFolder(photos, n=4, seed=2).files
    assert set(ImageFolder(photos, n=3).files) < set(ImageFolder(photos, n=6).files)
    with pytest.raises(ValueError, match="n=0"): ImageFolder(photos, n=0)


def test_flip_mirrors_about_half(photos):
    torch.manual_seed(0)
    plain, mirrored = ImageFolder(photos, 24)[1]["image"], ImageFolder(photos, 24, flip=True)
    flipped = sum(mirrored[1]["image"].equal(plain.flip(-1)) for _ in range(40))
    assert 10 < flipped < 30


def jpeg_bytes(seed: int = 0, size=(300, 200)) -> bytes:
    smooth = Image.fromarray((np.random.default_rng(seed).random((5, 7, 3)) * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def test_large_jpegs_may_be_decoded_small_with_the_same_result(tmp_path):
    (tmp_path / "big.jpg").write_bytes(jpeg_bytes(size=(1600, 1200)))
    fast = ImageFolder(tmp_path, 64)[0]["image"]
    assert read_image(tmp_path / "big.jpg", at_least=128).size < (1600, 1200)
    assert (fast - resize_crop(to_image_tensor(Image.open(tmp_path / "big.jpg")), 64)).abs().mean() < 1 / 127.5


@pytest.mark.parametrize("resolution", [(0, 0), (1, 0)])
def test_a_broken_resolution_does_not_matter(tmp_path, resolution):
    "Cameras write it; Pillow before 11.1 stopped at it when it turned the picture upright"
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x011A, 5, 1, 38)]
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<III", 0, *resolution)
    Image.new("RGB", (4, 6), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(read_image(tmp_path / "turned.jpg")).size == (6, 4)


@pytest.mark.parametrize("content", [b"", b"no picture", jpeg_bytes()[:400]], ids=["empty", "text", "cut"])
def test_corrupt_image_is_named(photos, content):
    bad = photos / "a" / "broken.jpg"
    bad.write_bytes(content)
    ds = ImageFolder(photos, 24)
    with pytest.raises(ValueError, match="broken.jpg.*Delete or replace"): ds[ds.files.index("a/broken.jpg")]
    with pytest.raises(ValueError, match="(?s)1 of 11 images.*broken.jpg") as error: validate_dataset(ds)
    assert "/pic" not in str(error.value)
    png = (photos / "a" / "pic1.png").read_bytes()
    (photos / "a" / "cut.png").write_bytes(png[:-30])
    with pytest.raises(ValueError, match="2 of 12 images"): ImageFolder(photos, 24).check()


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images in folder"): ImageFolder(tmp_path)
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no images in folder"): open_dataset(tmp_path)


# -- photographs in HDF5 -----------------------------------------------------------------------------------------------------------------

def write_photos(path: Path, n: int = 9, **more) -> Path:
    with h5py.File(path, "w") as f:
        data = f.create_dataset("jpeg", n, dtype=h5py.vlen_dtype(np.uint8))
        for i in range(n): data[i] = np.frombuffer(jpeg_bytes(i), np.uint8)
        for key, value in more.items(): f[key] = value
        f.attrs["classes"] = '["hat", "shoe"]'
    return path


def test_h5_photos(tmp_path):
    path = write_photos(tmp_path / "p.h5", label=np.arange(9) % 2, split=np.array(["train"] * 6 + ["validation"] * 2 + ["test"], "S10"))
    ds = H5Photos(path, 32, split="val")
    assert len(ds) == 2 and ds[0]["caption"] == "a photo of a hat" and ds[1]["class_index"] == 1
    torch.testing.assert_close(ds[0]["image"], resize_crop(to_image_tensor(read_image(jpeg_bytes(6), at_least=64)), 32))
    assert not H5Photos(path).data.is_open and H5Photos(path).check() == 9
    assert open_dataset(path, split="test", size=32)[0]["image_id"] == "000008"


def test_h5_photos_of_clips_are_split_by_clip(tmp_path):
    clips = np.repeat(np.array(["x", "y", "z"], "S4"), 3)
    parts = [set(H5Photos(write_photos(tmp_path / f"{s}.h5", clip=clips), split=s)[0]["image_id"].split("/")[0]) for s in ("train", "val", "test")]
    assert len(set.union(*parts)) == 3


def test_damaged_jpeg_in_h5_is_named(tmp_path):
    path = write_photos(tmp_path / "p.h5")
    with h5py.File(path, "r+") as f: f["jpeg"][4] = np.frombuffer(jpeg_bytes()[:200], np.uint8)
    with pytest.raises(ValueError, match=r"p.h5 \[4\]"): validate_dataset(H5Photos(path))


# -- scenes in HDF5 ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trailing", [False, True], ids=["shared", "object-centric-library"])
@pytest.mark.parametrize("size", [None, 24, 96])
def test_h5_scenes(tmp_path, trailing, size):
    ds = H5Scenes(write_scenes(tmp_path / "s.h5", trailing=trailing), size)
    assert len(ds) == 12 and ds.max_objects == 4 and ds.size == (size or 48)
    assert [assert_true(item) for item in ds] == [2, 3, 4] * 4
    item = ds[0]
    assert item["masks"].dtype == torch.int64 and item["labels"]["color"].dtype == torch.int64
    assert item["labels"]["visibility"].tolist() == [1, 1, 0, 0] and item["labels"]["pixel_coords"].shape == (4, 3)
    assert ds.factor_names["color"][0] == ("0" if trailing else "none") and set(ds.factor_names) == {"color"}
    validate_dataset(ds, image_size=ds.size, need_masks=True, batch_size=12)


def test_h5_crop_moves_coordinates_and_visibility(scenes_file):
    full, ds = H5Scenes(scenes_file), H5Scenes(scenes_file, 32, crop=(0, 0, 16))
    hidden = 0
    for item, whole in zip(ds, full):
        left = whole["masks"][:16, :16]
        assert (item["labels"]["visibility"] > 0).tolist() == [bool((left == i).any()) for i in range(1, 5)]
        hidden += int(whole["labels"]["visibility"].sum() - item["labels"]["visibility"].sum())
        torch.testing.assert_close(item["labels"]["pixel_coords"][:, :2], whole["labels"]["pixel_coords"][:, :2] * 2)
    assert hidden > 0


def test_h5_filter_split_extras(scenes_file):
    few = H5Scenes(scenes_file, max_objects=3)
    assert len(few) == 8 and few.max_objects == 3 and all(item["masks"].max() <= 3 for item in few)
    assert len(H5Scenes(scenes_file, max_objects=6)) == 12 and H5Scenes(scenes_file, max_objects=6)[0]["labels"]["color"].shape == (6,)
    parts = [{i for i, _ in H5Scenes(scenes_file, split=s, shares=(0.5, 0.25, 0.25)).index} for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [6, 3, 3] and len(set.union(*parts)) == 12
    assert H5Scenes(scenes_file, extras=["camera"])[2]["camera"].tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match="'lamps'"): H5Scenes(scenes_file, extras=["lamps"])
    with pytest.raises(ValueError, match="max_objects=1"): H5Scenes(scenes_file, max_objects=1)


def test_h5_own_split_is_respected(tmp_path):
    path = write_scenes(tmp_path / "s.h5", split=np.array([0, 1, 0] * 4, np.uint8))
    with pytest.raises(ValueError, match="s.h5: 'split' holds numbers.*'split_names'"): H5Scenes(path)
    with h5py.File(path, "r+") as f: f.attrs["split_names"] = '["train", "val"]'
    assert [i for i, _ in H5Scenes(path, split="val").index] == [1, 4, 7, 10] and len(H5Scenes(path)) == 12
    with pytest.raises(ValueError, match="nothing for split='test'.*train.*val"): H5Scenes(path, split="test")


def test_h5_several_background_rows_and_gaps(tmp_path):
    with h5py.File(tmp_path / "room.h5", "w") as f:
        mask = np.zeros((1, 8, 8, 1), np.uint8)
        for label in range(6): mask[0, label] = label
        f["image"], f["mask"], f["visibility"] = np.zeros((1, 8, 8, 3), np.uint8), mask, np.float32([[1, 1, 1, 0, 1, 1]])
        f["size"] = np.float32([[10, 11, 12, 13, 14, 15]])
    with pytest.warns(UserWarning, match="objects whose 'visibility' is 0"): item = H5Scenes(tmp_path / "room.h5", n_background=2)[0]  # row 3 is listed as not there: its pixels are background
    assert item["masks"][:, 0].tolist() == [0, 0, 1, 0, 2, 3, 0, 0] and item["labels"]["size"].tolist() == [12, 14, 15, 0]


def test_h5_without_visibility(tmp_path):
    with h5py.File(write_scenes(tmp_path / "s.h5"), "r+") as f: del f["visibility"], f["color"], f["pixel_coords"]
    ds = H5Scenes(tmp_path / "s.h5")
    assert [int(item["labels"]["visibility"].sum()) for item in ds] == [2, 3, 4] * 4 and list(ds[0]["labels"]) == ["visibility"]
    ds = None  # closes its handle
    with h5py.File(tmp_path / "s.h5", "r+") as f: del f["num_actual_objects"]
    with pytest.raises(ValueError, match="neither 'visibility' nor 'num_actual_objects'"): H5Scenes(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as f: del f["mask"]
    assert set(H5Scenes(tmp_path / "s.h5")[0]) == {"image", "image_id"}


def test_h5_video(tmp_path):
    path = write_video(tmp_path / "v.h5")
    clips, frames = H5Scenes(path), H5Scenes(path, frames="single")
    item = clips[1]
    assert item["video"].shape == (5, 3, 48, 48) and item["masks"].shape == (5, 48, 48) and item["image"].equal(item["video"][0])
    assert item["labels"]["pixel_coords"].shape == (3, 5, 3) and item["labels"]["color"].shape == (3,)
    assert len(frames) == 30 and all(assert_true(frames[i]) == 3 for i in (0, 7, 29)) and assert_true(item) == 3
    assert frames[7]["image"].equal(clips[1]["video"][2]) and frames[7]["labels"]["pixel_coords"].equal(item["labels"]["pixel_coords"][:, 2])
    short = H5Scenes(path, clip_length=2, frame_step=2, hop=1)
    assert len(short) == 6 * 3 and short[1]["video"].equal(clips[0]["video"][[1, 3]])
    parts = [{i for i, _ in H5Scenes(path, split=s, frames="single", shares=(0.5, 0.25, 0.25)).index} for s in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[1] & parts[2] or parts[0] & parts[2]) and len(set.union(*parts)) == 6
    with pytest.raises(ValueError, match="clip_length=9"): H5Scenes(path, clip_length=9)
    with pytest.raises(ValueError, match="frames='both'"): H5Scenes(path, frames="both")
    validate_dataset(clips, need_masks=True)


def test_h5_layout_describes_shapes_only(scenes_file):
    with h5py.File(scenes_file) as f:
        layout = h5_layout(f)
        assert count_objects(f, layout).tolist() == [2, 3, 4] * 4
    assert (layout.pictures, layout.n_scenes, layout.n_steps, layout.hw, layout.n_rows) == ("image", 12, None, (48, 48), 5)
    assert set(layout.factors) == {"color", "pixel_coords"}  # and not the camera


def write_edits(path: Path, n: int = 3) -> Path:
    "Per scene: original, object 2 removed (rows behind it move up), everything removed"
    scenes = [draw(i, 48, 48, 3) for i in range(n)]
    with h5py.File(path, "w") as f:
        image, mask, color, seen = [], [], [], []
        for s in scenes:
            gone = s["mask"] == 2
            less = np.where(gone, 0, s["mask"] - (s["mask"] == 3)).astype(np.uint8)
            image.append([s["image"], np.where(gone[..., None], 120, s["image"]), np.full_like(s["image"], 120)])
            mask.append([s["mask"], less, 0 * less])
            color.append([rows(s["color"], 5), rows(s["color"][[0, 2]], 5), np.zeros(5)])
            seen.append([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
        f["image"], f["mask"], f["color"] = np.array(image, np.uint8), np.array(mask)[..., None], np.array(color, np.uint8)
        f["visibility"], f["edited_object"] = np.array(seen, np.float32), np.full(n, 2, np.uint8)
        f.attrs["ops"] = '["original", "remove", "empty"]'
    return path


def test_h5_edits_keep_identity(tmp_path):
    ds = H5Edits(write_edits(tmp_path / "e.h5"), 24)
    assert len(ds) == 3 and ds.ops == ["original", "remove", "empty"] and ds.max_objects == 4
    for item in ds:
        removed, empty = item["edits"]["remove"], item["edits"]["empty"]
        assert int(item["edited_object"]) == 2 and assert_true(item) == 3 and assert_true(removed) == 2
        assert removed["labels"]["visibility"].tolist() == [1, 0, 1, 0] and empty["labels"]["visibility"].sum() == 0
        assert removed["masks"].equal(torch.where(item["masks"] == 2, 0, item["masks"])) and empty["masks"].max() == 0
        assert removed["labels"]["color"][2] == item["labels"]["color"][2] and removed["labels"]["color"][1] == 0
    batch = next(iter(DataLoader(ds, 3)))
    assert batch["edits"]["remove"]["image"].shape == (3, 3, 24, 24)
    validate_dataset(ds, need_masks=True)
    with pytest.raises(ValueError, match="H5Edits"): H5Scenes(tmp_path / "e.h5")
    with pytest.raises(ValueError, match="holds no edits"): H5Edits(write_scenes(tmp_path / "s.h5"))


def test_open_late_and_once_per_process(scenes_file):
    ds = H5Scenes(scenes_file)
    assert not ds.data.is_open and ds.data._factors is None
    expected = [ds[i] for i in range(len(ds))]  # now this process holds a handle, which the workers must not share
    assert ds.data.is_open
    copy = pickle.loads(pickle.dumps(ds))
    assert not copy.data.is_open and copy.data._factors is None and copy[3]["image"].equal(expected[3]["image"])
    fork, (here, there) = multiprocessing.get_context("fork"), multiprocessing.Pipe()
    child = fork.Process(target=lambda: there.send((ds.data.is_open, ds[3]["masks"].sum().item(), ds.data.is_open)))
    child.start()
    assert here.poll(20) and here.recv() == (False, expected[3]["masks"].sum().item(), True)  # the inherited handle is not used
    child.join()
    for _ in range(2):
        loaded = [item for batch in DataLoader(ds, batch_size=4, num_workers=2) for item in zip(batch["image"], batch["masks"], batch["image_id"])]
        assert [name for *_, name in loaded] == [item["image_id"] for item in expected]
        assert all(image.equal(item["image"]) and masks.equal(item["masks"]) for (image, masks, _), item in zip(loaded, expected))


# -- bad HDF5 files ----------------------------------------------------------------------------------------------------------------------

def test_missing_foreign_and_cut_files(scenes_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such.h5"): H5Scenes(tmp_path / "no_such.h5")
    (tmp_path / "page.h5").write_text("<html>please log in</html>")
    (tmp_path / "cut.h5").write_bytes(scenes_file.read_bytes()[:-3000])
    (tmp_path / "empty.h5").write_bytes(b"")
    for reader in (H5Scenes, H5Photos, H5Edits, open_dataset):
        with pytest.raises(ValueError, match="page.h5 is not an HDF5 file.*<html>"): reader(tmp_path / "page.h5")
        with pytest.raises(ValueError, match="empty.h5 is not an HDF5 file"): reader(tmp_path / "empty.h5")
        with pytest.raises(ValueError, match="cut.h5 is damaged or cut short.*copy or download"): reader(tmp_path / "cut.h5")


def test_missing_keys_and_wrong_shapes(scenes_file, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as f: f["pictures"] = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="no dataset 'image' or 'video'; it has: pictures"): H5Scenes(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="'image', 'video', 'jpeg'; it has: pictures"): open_dataset(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="no dataset 'jpeg'"): H5Photos(scenes_file)
    with h5py.File(scenes_file, "r+") as f:
        del f["mask"]
        f["mask"] = np.zeros((12, 24, 24, 1), np.uint8)
    with pytest.raises(ValueError, match=r"scenes.h5: 'mask' is \(12, 24, 24, 1\) but 'image' is \(12, 48, 48, 3\)"): H5Scenes(scenes_file)
    with h5py.File(tmp_path / "float.h5", "w") as f: f["image"] = np.zeros((2, 8, 8, 3))
    with pytest.raises(ValueError, match="'image' is float64"): H5Scenes(tmp_path / "float.h5")


def test_damaged_chunk_names_file_and_key(scenes_file):
    with h5py.File(scenes_file) as f: at = f["mask"].id.get_chunk_info(5).byte_offset
    data = bytearray(scenes_file.read_bytes())
    data[at:at + 20] = b"\xff" * 20
    scenes_file.write_bytes(data)
    ds = H5Scenes(scenes_file)
    assert ds[0]["image"].shape == (3, 48, 48)
    with pytest.raises(ValueError, match=r"scenes.h5: 'mask'\[\(5,\)\] is damaged"): ds[5]
    with pytest.raises(ValueError, match="scenes.h5: 'mask'"): validate_dataset(ds)


def test_positions_follow_an_off_centre_crop():
    factors = {"pixel_coords": np.array([[100.0, 50.0, 7.0]]), "image_positions": np.array([[0.5, 0.25]]), "x": np.array([3.0])}
    moved = follow_crop(factors, (200, 400), (20, 60, 160), 80)
    assert moved["pixel_coords"].tolist() == [[20, 15, 7]] and moved["image_positions"].tolist() == [[140 / 160, 30 / 160]]
    assert moved["x"] is factors["x"] and factors["pixel_coords"][0, 0] == 100  # the input is left alone


def test_scene_item_errors():
    image, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match="tea/7: the mask is .6, 6. but the image is .8, 8."):
        scene_item(image, mask[:6, :6], [], {}, size=8, max_objects=2, image_id="tea/7")
    with pytest.raises(ValueError, match="tea/7 has 3 objects"): scene_item(image, mask, [1, 2, 3], {}, size=8, max_objects=2, image_id="tea/7")


# -- TFRecords ---------------------------------------------------------------------------------------------------------------------------

def varint(n: int) -> bytes: return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
def field(number: int, content: bytes) -> bytes: return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: np.ndarray) -> bytes:
    "bytes_list with one string for every element (uint8), float_list (float32) or int64_list, as TensorFlow writes them"
    if values.dtype == np.uint8:
        flat = values.ravel()
        return field(1, np.stack([np.full_like(flat, 10), np.ones_like(flat), flat], axis=1).tobytes())
    if values.dtype == np.int64: return field(3, field(1, b"".join(varint(v % (1 << 64)) for v in values.ravel().tolist())))
    return field(2, field(1, values.astype("<f4").tobytes()))


def example(features: dict[str, np.ndarray]) -> bytes:
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, feature(values))) for name, values in features.items()))


def write_records(path: Path, examples: list[dict], compress: bool = True) -> Path:
    with (gzip.open(path, "wb", compresslevel=1) if compress else open(path, "wb")) as f:
        for features in examples:
            payload = example(features)
            size = struct.pack("<Q", len(payload))
            f.write(size + struct.pack("<I", masked_crc(size)) + payload + struct.pack("<I", masked_crc(payload)))
    return path


def record(layout: str, seed: int) -> dict:
    "A scene with the features of one of the four public sets; objects lie inside the crop that everybody uses"
    how, n = RECORD_LAYOUTS[layout], {"clevr_with_masks": 11, "multi_dsprites": 5, "tetrominoes": 4, "objects_room": 7}[layout]
    (h, w), k, back = how.hw, 2 + seed % 2, how.n_background
    if how.crop:
        s, image, mask = draw(seed, how.crop[2], how.crop[2], k), np.full((h, w, 3), 120, np.uint8), np.zeros((h, w), np.uint8)
        top, left, side = how.crop
        image[top:top + side, left:left + side], mask[top:top + side, left:left + side] = s["image"], s["mask"]
        s |= {"image": image, "mask": mask, "pixel_coords": s["pixel_coords"] + np.float32([left, top, 0])}
    else: s = draw(seed, h, w, k)
    stored = np.where(s["mask"] > 0, s["mask"] + back - 1, np.arange(h)[:, None] % back)  # several backgrounds in stripes
    one_hot = (stored == np.arange(n)[:, None, None]).astype(np.uint8)[..., None] * 255
    visible = np.float32([1] * (back + k) + [0] * (n - back - k))
    features = {"image": s["image"], "mask": np.moveaxis(one_hot, 0, 2) if how.masks_last else one_hot}
    if layout == "objects_room": return features
    features |= {"visibility": visible, "x": rows(s["pixel_coords"][:, 0], n)}
    if layout == "clevr_with_masks":
        return features | {"color": rows(s["color"], n).astype(np.uint8), "pixel_coords": rows(s["pixel_coords"], n), "size": np.ones(n, np.uint8)}
    return features | {"shape": rows(s["color"] % 4, n), "color": rows(COLOURS[s["color"]] / 255, n)}


def test_example_round_trip():
    sent = {"image": np.arange(256, dtype=np.uint8).reshape(16, 16), "x": np.float32([1.5, -2]), "id": np.int64([7, -1, 1 << 40]), "empty": np.zeros(0, np.uint8)}
    received = read_example(example(sent))
    assert set(received) == set(sent) and all((received[k] == v.ravel()).all() for k, v in sent.items())
    whole = field(1, field(1, field(1, b"image") + field(2, field(1, field(1, bytes(range(9)))))))  # one string for the whole image
    assert read_example(whole)["image"].tolist() == list(range(9))
    unpacked = field(1, field(1, field(1, b"x") + field(2, field(2, b"".join(b"\x0d" + struct.pack("<f", v) for v in (1.0, 2.0))))))
    assert read_example(unpacked)["x"].tolist() == [1, 2]


@pytest.fixture(scope="module")
def clevr_records(tmp_path_factory):
    "Three records of 3.2 MB, as large as the public file's"
    return write_records(tmp_path_factory.mktemp("clevr") / "clevr_with_masks_train.tfrecords", [record("clevr_with_masks", i) for i in range(3)])


@pytest.mark.parametrize("layout", list(RECORD_LAYOUTS))
def test_records(tmp_path, layout, clevr_records):
    n, path = 3 if layout == "clevr_with_masks" else 5, tmp_path / f"{layout}_train.tfrecords"
    if layout == "clevr_with_masks": path.symlink_to(clevr_records)
    else: write_records(path, [record(layout, i) for i in range(n)])
    ds = ObjectRecords(path, layout=layout)
    assert len(ds) == n and isinstance(ds, H5Scenes) and ds.size == {"clevr_with_masks": 192, "tetrominoes": 35}.get(layout, 64)
    for i, item in enumerate(ds):
        rgb = (lambda code: COLOURS[code]) if layout == "clevr_with_masks" else None
        assert (assert_true(item, colour_of=rgb) if rgb else assert_true(item, factor="")) == 2 + i % 2
        if layout in ("multi_dsprites", "tetrominoes"):
            region = (item["image"][:, item["masks"] == 1] + 1).median(dim=1).values / 2
            torch.testing.assert_close(region, item["labels"]["color"][0], atol=0.01, rtol=0)
            assert item["labels"]["shape"].dtype == torch.int64
    again = open_dataset(path, split="all", size=32)
    assert again[1]["image"].shape == (3, 32, 32) and sorted(p.name for p in tmp_path.iterdir()) == [f"{layout}_train.h5", path.name]


def test_clevr_with_masks_protocol(tmp_path, clevr_records):
    path = tmp_path / "clevr_with_masks_train.tfrecords"
    path.symlink_to(clevr_records)
    ds = ClevrWithMasks(path, 64, max_objects=2, cache=tmp_path / "cache.h5")
    assert len(ds) == 2 and ds.max_objects == 2 and not ds.data.is_open and (tmp_path / "cache.h5").exists()
    assert ds.factor_names["color"][0] == "none" and len(ds.factor_names["color"]) == 9
    stamp = (tmp_path / "cache.h5").stat().st_mtime_ns
    assert len(ClevrWithMasks(path, 64, split="train", cache=tmp_path / "cache.h5")) == 2 and (tmp_path / "cache.h5").stat().st_mtime_ns == stamp
    assert len(ClevrWithMasks(path, 64, limit=1)) == 1 and (tmp_path / "clevr_with_masks_train_first1.h5").exists()
    with pytest.raises(ValueError, match="cache.h5 was made with"): ObjectRecords(path, layout="tetrominoes", cache=tmp_path / "cache.h5")


def test_plain_records_and_bad_ones(tmp_path):
    good = write_records(tmp_path / "tetrominoes.tfrecords", [record("tetrominoes", 0)] * 2, compress=False)
    assert len(list(read_records(good))) == 2
    packed = write_records(tmp_path / "packed.tfrecords", [record("tetrominoes", 0)] * 2)
    for name, content, match in [("cut", good.read_bytes()[:-50], "cut short.*record 1"), ("foreign", b"x" * 99, "no TFRecord file"),
                                 ("cutpacked", packed.read_bytes()[:-50], "cut short"), ("empty", b"", "holds no records")]:
        (tmp_path / f"{name}.tfrecords").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.tfrecords.*{match}"): ObjectRecords(tmp_path / f"{name}.tfrecords", layout="tetrominoes")
        assert not (tmp_path / f"{name}.h5").exists() and not list(tmp_path.glob(".*"))  # nothing half made is left behind
    with pytest.raises(ValueError, match="packed.tfrecords, record 0.*'image'.*240x320.*layout"): ClevrWithMasks(packed)
    with pytest.raises(ValueError, match="layout='clever'"): ObjectRecords(packed, layout="clever")
    with pytest.raises(FileNotFoundError, match="gone.tfrecords"): ClevrWithMasks(tmp_path / "gone.tfrecords")
    with pytest.raises(OSError, match="cannot write.*cache="): ObjectRecords(packed, layout="tetrominoes", cache=tmp_path / "no" / "folder" / "c.h5")


# -- CLEVRTex ----------------------------------------------------------------------------------------------------------------------------

def shape_colour(names):
    return lambda code: COLOURS[NAMES.index(names[code])]


def test_clevrtex(tmp_path):
    root = write_clevrtex(tmp_path)
    for crop in (192, 240):
        ds = ClevrTex(root, 96, crop=crop)
        assert len(ds) == 20 and ds.max_objects == 10 and set(ds.factor_names["shape"]) == set(NAMES) and ds.factor_names["shape"][0] == "none"
        for item in ds:
            labels = {k: v for k, v in item["labels"].items() if crop == 240 or k != "pixel_coords"}  # the smaller crop cuts objects off
            assert assert_true(item | {"labels": labels}, "shape", shape_colour(ds.factor_names["shape"])) == int(item["labels"]["visibility"].sum())
            assert item["labels"]["rotation"][1] == 10 and item["labels"]["y"][1] == -1
    parts = [set(ClevrTex(root, split=s).files) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [16, 2, 2] and len(set.union(*parts)) == 20
    assert {Path(f).stem for f in parts[2]} == {"CLEVRTEX_full_000000", "CLEVRTEX_full_000001"}
    few = ClevrTex(root, max_objects=3)
    assert few.max_objects == 3 and len(few) == 14
    batch = next(iter(DataLoader(ds, 4, num_workers=2)))
    assert batch["masks"].shape == (4, 96, 96)
    validate_dataset(ds, need_masks=True, image_size=96)


def test_clevrtex_bad_files(tmp_path):
    root = write_clevrtex(tmp_path, 3)
    stem = root / "clevrtex_full" / "0" / "CLEVRTEX_full_000001"
    good = Path(f"{stem}_flat.png").read_bytes()
    Image.new("L", (64, 64)).save(f"{stem}_flat.png")
    with pytest.raises(ValueError, match="CLEVRTEX_full_000001.png is 240×320, but its annotation is for 64×64"): ClevrTex(root)[1]
    Image.new("RGB", (320, 240), "red").save(f"{stem}_flat.png")
    with pytest.raises(ValueError, match="000001_flat.png is a colour picture"): ClevrTex(root)[1]
    Path(f"{stem}_flat.png").write_bytes(good[:40])
    with pytest.raises(ValueError, match="cannot read label map.*000001_flat.png"): ClevrTex(root)[1]
    Path(f"{stem}_flat.png").unlink()
    with pytest.raises(FileNotFoundError, match="000001_flat.png"): validate_dataset(ClevrTex(root))
    with pytest.raises(ValueError, match="factor_names"): ClevrTex(root, factor_names={"shape": ["none", "cube"]})[0]
    Path(f"{stem}.json").write_text("{")
    with pytest.raises(ValueError, match="000001.json"): ClevrTex(root)
    Path(f"{stem}.json").unlink()
    with pytest.raises(FileNotFoundError, match="000001.json"): ClevrTex(root)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no CLEVRTEX_"): ClevrTex(tmp_path / "nothing")


# -- MOVi dumps --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["lsd", "slot_diffusion", "steve"])
def test_movi_dump(tmp_path, layout):
    root = write_dump(tmp_path / "movi-a", layout, range(10))
    ds = MoviDump(root, 24)
    assert len(ds) == 40 and ds.max_objects == 10 and not ds.single == (ds.n_frames > 1)
    for i in (0, 5, 39):
        v, t = divmod(i, 4)
        item = ds[i]
        assert assert_true(item, "color_label") == 2 + v % 3
        true = frame(v, t)
        assert item["masks"].equal(resize_crop(torch.from_numpy(true["mask"]).long(), 24))
        assert item["image_id"].endswith(f"{v:08d}/{t:06d}" if layout == "slot_diffusion" else f"{v:08d}/{t:08d}")
        if layout == "lsd": torch.testing.assert_close(item["labels"]["image_positions"][0] * 48, torch.tensor(true["pixel_coords"][0, :2]).float())
    parts = [{v.folder for v, _ in MoviDump(root, split=s).index} for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [8, 1, 1] and len(set.union(*parts)) == 10  # whole videos
    moved = root.rename(tmp_path / "elsewhere")
    elsewhere = {v.folder for v, _ in MoviDump(moved, split="val", max_objects=10).index}
    assert {Path(f).name for f in elsewhere} == {Path(f).name for f in parts[1]}  # on another machine the same
    moved.rename(root)
    clips = MoviDump(root, 24, frames="clip", clip_length=2)
    assert len(clips) == 20 and clips[1]["video"].shape == (2, 3, 24, 24) and clips[1]["masks"].equal(torch.stack([ds[2]["masks"], ds[3]["masks"]]))
    batch = next(iter(DataLoader(clips, 5, num_workers=2)))
    assert batch["video"].shape == (5, 2, 3, 24, 24)
    if layout == "lsd":
        shapes = {k: tuple(v.shape) for k, v in batch["labels"].items()}
        assert shapes == {"visibility": (5, 10), "color_label": (5, 10), "mass": (5, 10, 2), "image_positions": (5, 10, 2, 2), "bboxes_3d": (5, 10, 2, 8, 3)}
        assert ds.factor_names["color_label"][:3] == ["none", "blue", "brown"] and set(ds[0]["labels"]) == set(shapes)
        assert len(MoviDump(root, 24, max_objects=3)) == 28
    validate_dataset(ds, need_masks=True, check_files=3)
    assert type(open_dataset(root, size=24)) is MoviDump


def test_movi_split_folders_and_most_objects(tmp_path):
    for split, videos in {"train": range(3), "validation": range(3, 5)}.items():
        write_dump(tmp_path / "movi-e" / f"movi-e-{split}-with-label", "lsd", videos, 1)
        write_dump(tmp_path / "solid" / split, "steve", videos, 1)
    ds = MoviDump(tmp_path / "movi-e", split="val")
    assert len(ds) == 2 and ds.max_objects == 23 and len(MoviDump(tmp_path / "movi-e")) == 5
    with pytest.raises(ValueError, match="none for split='test'"): MoviDump(tmp_path / "movi-e", split="test")
    assert MoviDump(tmp_path / "solid", split="train").max_objects == 5  # as many as there are mask files
    write_dump(tmp_path / "anything", "slot_diffusion", range(3), 1)
    with pytest.raises(ValueError, match="pass max_objects="): MoviDump(tmp_path / "anything")
    assert len(MoviDump(tmp_path / "anything", max_objects=5)) == 3
    with pytest.raises(ValueError, match="00000002/000000 has 4 objects"): MoviDump(tmp_path / "anything", max_objects=3).check()


def test_dump_of_clevr_with_masks_has_a_background_row():
    ids, factors = instance_factors({"x": [0, 1.5, 2.5, 0], "color": [0, 3, 8, 0], "visibility": [[1], [1], [1], [0]],
                                     "pixel_coords": [[0, 0, 0], [5, 6, 7], [8, 9, 1], [0, 0, 0]]})
    assert ids == [1, 2] and factors["x"].tolist() == [1.5, 2.5] and factors["color"].tolist() == [3, 8]
    assert factors["pixel_coords"].tolist() == [[5, 6, 7], [8, 9, 1]]


def test_dump_of_clevr_with_masks(tmp_path):
    for i in range(3):
        s, folder = draw(i, 240, 320, 2 + i), f"{i:08d}"
        for kind in ("images", "labels"): (tmp_path / "clevr_with_masks" / kind / folder).mkdir(parents=True)
        Image.fromarray(s["image"]).save(tmp_path / "clevr_with_masks" / "images" / folder / "00000000_image.png")
        Image.fromarray(s["mask"]).save(tmp_path / "clevr_with_masks" / "labels" / folder / "00000000_segment.png")
        instances = {"x": rows(s["color"], 11), "color": rows(s["color"], 11).astype(int), "pixel_coords": rows(s["pixel_coords"], 11),
                     "visibility": [1.0] * (3 + i) + [0.0] * (8 - i)}
        instances = {k: np.asarray(v).tolist() for k, v in instances.items()}
        (tmp_path / "clevr_with_masks" / "labels" / folder / "00000000_instances.json").write_text(json.dumps(instances))
    ds = open_dataset(tmp_path / "clevr_with_masks", split="all", size=120)
    assert [assert_true(item) for item in ds] == [2, 3, 4] and ds.max_objects == 10 and len(ds.factor_names["color"]) == 9
    assert len(MoviDump(tmp_path / "clevr_with_masks", max_objects=3)) == 2


def test_movi_bad_files(tmp_path):
    root = write_dump(tmp_path / "movi-a", "lsd", range(3), 2)
    (root / "labels" / "00000001" / "00000001_segment.png").unlink()
    with pytest.raises(FileNotFoundError, match="00000001_segment.png"): MoviDump(root)[3]
    (root / "labels" / "00000002" / "00000000_instances.json").write_text('{"mass": [1]}')
    with pytest.raises(ValueError, match="00000002/00000000_instances.json.*'visibility'"): MoviDump(root)[4]
    (root / "images" / "00000002" / "00000001_image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="00000002/00000001_image.png"): MoviDump(root)[5]
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="no video frames in"): MoviDump(tmp_path / "void")
    with pytest.raises(FileNotFoundError, match="nowhere"): MoviDump(tmp_path / "nowhere")


# -- catalog -----------------------------------------------------------------------------------------------------------------------------

def test_recognise(tmp_path, photos):
    assert detect_format(photos) == "images" and detect_format(write_clevrtex(tmp_path / "t", 1)) == "clevrtex"
    assert detect_format(write_scenes(tmp_path / "s.h5")) == "h5_scenes" and detect_format(write_video(tmp_path / "v.hdf5")) == "h5_scenes"
    assert detect_format(write_edits(tmp_path / "e.h5")) == "h5_edits" and detect_format(write_photos(tmp_path / "p.h5")) == "h5_photos"
    for layout in ("lsd", "slot_diffusion", "steve"): assert detect_format(write_dump(tmp_path / layout, layout, range(1), 1)) == "movi"
    (tmp_path / "data.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="data.npz is no data set: expected .h5"): detect_format(tmp_path / "data.npz")


def test_split_files(tmp_path):
    for name in ("six_train", "six_val", "ten_val"): write_scenes(tmp_path / f"{name}.h5", n=4)
    write_edits(tmp_path / "edits_val.h5")
    assert open_dataset(tmp_path, split="val").path.name == "six_val.h5" and open_dataset(tmp_path).path.name == "six_train.h5"
    assert len(open_dataset(tmp_path)) == 4  # the whole file
    assert open_dataset(tmp_path / "six_train.h5", split="val").path.name == "six_val.h5"
    assert open_dataset(tmp_path / "ten_val.h5", split="all").path.name == "ten_val.h5"
    with pytest.raises(ValueError, match="ten_val.h5 is the val split"): open_dataset(tmp_path / "ten_val.h5")
    with pytest.raises(ValueError, match="six_val.h5 is the val split"): open_dataset(tmp_path / "six_val.h5")  # not quietly six_train.h5
    with pytest.raises(ValueError, match="is the train split, but split='test'"): open_dataset(tmp_path / "six_train.h5", split="test")
    with pytest.raises(ValueError, match="no files for split='test'.*six_train.h5"): open_dataset(tmp_path, split="test")
    (tmp_path / "one").mkdir()
    write_scenes(tmp_path / "one" / "scenes.h5", n=20)
    assert [len(open_dataset(tmp_path / "one", split=s)) for s in ("train", "val", "test")] == [18, 1, 1]


def test_unknown_names_and_options(scenes_file, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'shapess'.*Did you mean 'shapes'"): open_dataset("shapess")
    with pytest.raises(FileNotFoundError, match="nowhere/x.h5.*no such file or folder.*data folder"): open_dataset("nowhere/x.h5")
    with pytest.raises(ValueError, match="'max_object' of H5Scenes.*Did you mean 'max_objects'.*Allowed: max_objects, n_background"):
        open_dataset(scenes_file, max_object=3)
    with pytest.raises(ValueError, match="unknown option 'max_objects' of ImageFolder"): open_dataset(photos, max_objects=3)
    with pytest.raises(ValueError, match="kind='cleverness'.*clevrtex"): open_dataset(photos, kind="cleverness")
    with pytest.raises(ValueError): open_dataset("shapes", colour="red")
    assert len(open_dataset("../shared/data/scenes.h5", split="all")) == 12  # relative names are looked for in the data folder
    assert home.find_data("scenes.h5") == tmp_path / "scenes.h5" and home.find_data("nothing") is None


def test_options_reach_the_reader(scenes_file, photos):
    ds = open_dataset(scenes_file, split="all", size=24, n=5, seed=3, max_objects=3)
    assert (len(ds), ds.size, ds.max_objects) == (5, 24, 3)
    assert ds.index == H5Scenes(scenes_file, 24, n=5, seed=3, max_objects=3).index
    assert type(open_dataset(photos, kind="images", flip=True)) is ImageFolder


def test_generators_by_name():
    parts = {split: open_dataset("shapes", split=split, size=32, n=3, seed=1) for split in ("train", "val", "test")}
    assert all(len(ds) == 3 and ds.size == 32 for ds in parts.values())
    assert not parts["train"][0]["image"].equal(parts["val"][0]["image"])
    validate_dataset(parts["train"], image_size=32, need_masks=True, batch_size=3, multiple_of=8)


# -- validation --------------------------------------------------------------------------------------------------------------------------

class Promise:
    "A data set that breaks its promise in one way"
    size, max_objects = 16, 3

    def __init__(self, n=4, **wrong): self.n, self.wrong = n, wrong
    def __len__(self): return self.n

    def __getitem__(self, i):
        item = {"image": torch.linspace(-1, 1, 768).view(3, 16, 16), "masks": torch.eye(16, dtype=torch.int64), "labels": {"visibility": torch.zeros(3)}}
        return item | {k: v(i) if callable(v) else v for k, v in self.wrong.items()}


@pytest.mark.parametrize("wrong, match", [
    ({"image": torch.zeros(16, 16, 3)}, r"'image'.*\(16, 16, 3\)"), ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}, "uint8"),
    ({"image": torch.full((3, 16, 16), 255.0)}, "255.*scale"), ({"image": torch.full((3, 16, 16), torch.nan)}, "nan"), ({"image": None}, "tensor 'image'"),
    ({"masks": torch.zeros(8, 8).long()}, r"'masks'.*\(8, 8\)"), ({"masks": torch.zeros(16, 16)}, "float32"), ({"masks": torch.full((16, 16), 4)}, "max_objects=3"),
    ({"labels": {"color": torch.zeros(3)}}, "visibility"), ({"labels": {"visibility": torch.zeros(5)}}, "5 rows"),
    ({"extra": lambda i: torch.zeros(i + 1)}, "cannot be stacked"),
])
def test_validation_finds_broken_promises(wrong, match):
    validate_dataset(Promise(), image_size=16, need_masks=True, batch_size=4, multiple_of=4)
    with pytest.raises(ValueError, match=match): validate_dataset(Promise(**wrong))


def test_validation_against_the_model(photos):
    ds = ImageFolder(photos, 24)
    for wants, match in [(dict(image_size=64), "24 px, the model takes 64: open it with size=64"), (dict(batch_size=11), "smaller than batch_size=11"),
                         (dict(need_masks=True), "no masks"), (dict(multiple_of=16), "multiple of 16"), (dict(multiple_of=32), "multiple of 32")]:
        with pytest.raises(ValueError, match=match): validate_dataset(ds, **wants)
    with pytest.raises(ValueError, match="is empty"): validate_dataset(Promise(0))
    with pytest.raises(ValueError, match="lacks 'size'"): validate_dataset([1, 2])


# -- the real files ----------------------------------------------------------------------------------------------------------------------

@real_data
@pytest.mark.parametrize("name, split, count, reader", [
    ("clevr", "train", 3200, H5Scenes), ("clevr", "val", 300, H5Scenes), ("clevr/clevr10_val.h5", "val", 100, H5Scenes), ("clevr/clevr6_tiny64.h5", "all", 48, H5Scenes),
    ("clevrtex_proc", "train", 400, H5Scenes), ("clevr_video", "val", 25, H5Scenes), ("nuclei_dsb2018", "test", 183, H5Scenes),
    ("clevr/clevr_edits_val.h5", "val", 20, H5Edits), ("clothing_cc0", "val", 341, H5Photos), ("dreambooth", "all", 158, H5Photos),
    ("bccd", "val", 87, H5Photos), ("movi_samples", "all", 384, H5Photos), ("clevr/official_samples", "all", 8, ImageFolder)])
def test_real_data(name, split, count, reader):
    if not (DATA / name).exists(): pytest.skip(f"no {name} in {DATA}")
    ds = open_dataset(DATA / name, split=split, size=64)
    assert type(ds) is reader and len(ds) == count
    validate_dataset(ds, image_size=64, need_masks=reader in (H5Scenes, H5Edits), check_files=5)


@real_data
def test_real_clevr_masks_centres_and_counts_agree():
    path = DATA / "clevr" / "clevr6_val.h5"
    if not path.exists(): pytest.skip(f"no {path}")
    for i in (0, 50, 299):
        item = H5Scenes(path)[i]
        labels, n = item["labels"], int(item["labels"]["visibility"].sum())
        assert item["masks"].max() == n and labels["visibility"].tolist() == [1] * n + [0] * (10 - n)
        for j in range(n):  # pixel counts come from the renderer, centres from its camera
            region = (item["masks"] == j + 1).nonzero().float()
            assert len(region) == labels["visible_pixels"][j]
            x, y = labels["pixel_coords"][j, :2].tolist()
            (top, left), (bottom, right) = region.min(0).values.tolist(), region.max(0).values.tolist()
            assert left - 6 < x < right + 7 and top - 6 < y < bottom + 7


@real_data
def test_real_edits_keep_identity():
    path = DATA / "clevr" / "clevr_edits_val.h5"
    if not path.exists(): pytest.skip(f"no {path}")
    for item in H5Edits(path, n=6):
        touched, labels = int(item["edited_object"]) - 1, item["labels"]
        for name, edit in item["edits"].items():
            stays = edit["labels"]["visibility"].bool()
            stays[touched] &= name == "recolor"
            for key in ("x", "y", "rotation", "shape", "size"): torch.testing.assert_close(edit["labels"][key][stays], labels[key][stays])
        assert item["edits"]["recolor"]["masks"].equal(item["masks"])
        assert item["edits"]["recolor"]["labels"]["color"][touched] != labels["color"][touched]


@real_data
def test_real_splits_share_no_scene():
    if not (DATA / "clevr").exists(): pytest.skip(f"no clevr in {DATA}")
    cameras = [{tuple(item) for item in open_h5(DATA / "clevr" / f"clevr6_{s}.h5")["camera"][:].tolist()} for s in ("train", "val")]
    assert len(cameras[0]) == 3200 and not cameras[0] & cameras[1]
    nuclei = DATA / "nuclei_dsb2018" / "nuclei_96.h5"
    with open_h5(nuclei) as f: source = f["source_image"][:]
    parts = [{source[i] for i, _ in H5Scenes(nuclei, split=s).index} for s in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


@pytest.mark.parametrize("shares, complaint", [
    ({}, "every data set of a mixture needs a share"),
    ({"shapes": 0}, r"shares=\[0.0\]"),
    ({"shapes": 1, "nothing of that name": 0}, "shares="),
    ({"shapes": float("inf"), "tetrominoes": 1}, "shares="),
])
def test_shares_that_mean_nothing_are_refused_before_a_data_set_is_opened(shares, complaint):
    with pytest.raises(ValueError, match=complaint):
        open_mixture(shares, size=32, n=4)


def test_a_mixture_needs_pictures_and_names_all_its_parts():
    one, two = (Scenes("shapes", n, size=16) for n in (2, 3))
    with pytest.raises(ValueError, match="data sets with pictures"):
        Mixture([], [])
    with pytest.raises(ValueError, match="n=-1"):
        Mixture([one, two], [1, 1], -1)
    assert "1 Scenes('shapes', 2" in repr(Mixture([one, two], [1, 1], 1)) and "0 Scenes('shapes', 3" in repr(Mixture([one, two], [1, 1], 1))
