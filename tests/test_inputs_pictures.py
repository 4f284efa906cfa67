"What people feed in as pictures: folders as they are found on disks, with splits, numbers, links and formats of all kinds"
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from small_data import write_clevrtex, write_dump, write_scenes

from decomp_nb.data.catalog import detect_format, open_dataset, split_file, validate_dataset
from decomp_nb.data.class_folders import class_folders
from decomp_nb.data.clevrtex import ClevrTex
from decomp_nb.data.images import (
    ImageFolder,
    find_images,
    list_images,
    read_image,
    to_image_tensor,
    to_rgb,
)
from decomp_nb.data.movi import MoviDump
from decomp_nb.data.official_folders import OfficialFolder
from decomp_nb.data.reader import split_folders, split_in_name


def save(path, colour="red", size=(12, 12), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def tagged(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def half(size=(40, 20)):
    "Left half red, right half blue"
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", (0, 0, size[0] // 2, size[1]))
    return picture


# -- row 4: splits by folder ------------------------------------------------------------------------------------------

LAYOUTS = [
    ("images/train", "images/val"), ("Train", "Val"), ("train2017", "val2017"), ("images/train2017", "images/val2017"),
    ("data/a/TRAIN", "data/a/VALID"), ("training", "evaluation"), ("Train Images", "Validation Set"), ("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("training_set", "validation_set"),
]


@pytest.mark.parametrize("train, val", LAYOUTS, ids=[t.replace("/", "-") for t, _ in LAYOUTS])
def test_split_folders_are_recognised_at_any_depth_and_spelling(tmp_path, train, val):
    for folder, count in ((train, 6), (val, 2)):
        for i in range(count): save(tmp_path / folder / "cats" / f"{i}.png")
    parts = [ImageFolder(tmp_path, split=s) for s in ("train", "val", "all")]
    assert [len(p) for p in parts] == [6, 2, 8]
    assert all(f.startswith(train) for f in parts[0].files) and all(f.startswith(val) for f in parts[1].files)
    assert "split by folder names" in parts[0].taken and parts[0].taken.startswith("6 of 8 files")
    with pytest.raises(ValueError, match="none for split='test'"): ImageFolder(tmp_path, split="test")


def test_a_class_called_train_is_no_split(tmp_path):
    for name in ("aeroplane", "ship", "train"):
        for i in range(10): save(tmp_path / name / f"{name}{i}.png")
    parts = [set(ImageFolder(tmp_path, split=s).files) for s in ("train", "val", "test")]
    assert len(set.union(*parts)) == 30 and all(parts) and any(not f.startswith("train/") for f in parts[0])


def test_splits_inside_of_categories_and_folders_beside_the_splits(tmp_path):
    for part in ("train/good", "test/good", "test/broken", "ground_truth/broken"): save(tmp_path / "bottle" / part / "0.png")
    assert ImageFolder(tmp_path, split="train").files == ["bottle/train/good/0.png"]
    assert len(ImageFolder(tmp_path, split="test")) == 2  # ground_truth is in neither
    assert [split_in_name(n) for n in ("trainA", "strain", "train_val", "contest")] == ["train", None, None, None]
    assert split_folders(["train/a.png"]) == [("train", "train")]


def test_every_reader_takes_folders_for_splits(tmp_path):
    for split, n in (("train2020", 4), ("val2020", 2)):
        write_clevrtex(tmp_path / "tex" / split, n)
        write_dump(tmp_path / "movi" / "videos" / split, "slot_diffusion", range(n), 1)
        for i in range(n): save(tmp_path / "official" / split / f"{i}.png")
        for i in range(n):
            for name in ("cat", "dog"): save(tmp_path / "classes" / split / name / f"{i}.png")
    assert [len(ClevrTex(tmp_path / "tex", split=s)) for s in ("train", "val")] == [4, 2]
    assert [len(MoviDump(tmp_path / "movi", split=s, max_objects=9)) for s in ("train", "val")] == [4, 2]
    assert [len(OfficialFolder(tmp_path / "official", kind="clevr", split=s)) for s in ("train", "val")] == [4, 2]
    for split, folder in (("train", "train2020"), ("val", "val2020")):
        found = class_folders(tmp_path / "classes", n_per_class=2, size=8, split=split)
        assert found["names"] == ["cat", "dog"] and all(f"/{folder}/" in path for path in found["paths"])


def test_split_files_in_other_spellings(tmp_path):
    for name in ("Train.h5", "Val.h5"): write_scenes(tmp_path / name, n=2)
    assert split_file(tmp_path, "val")[0].name == "Val.h5" and split_file(tmp_path, "train")[0].name == "Train.h5"


def test_the_data_line_says_how_the_split_was_made(tmp_path, capsys):
    for i in range(5): save(tmp_path / "train" / f"{i}.png")
    for i in range(2): save(tmp_path / "val" / f"{i}.png")
    for i in range(3): (tmp_path / "train" / f"{i}.heic").write_bytes(b"0000ftypheic")
    validate_dataset(open_dataset(tmp_path, size=16, n=4))
    assert "4 of 10 files (n=4 of the 5 in the split), 3 .heic skipped; split by folder names train 5, val 2" in capsys.readouterr().out


# -- row 5: pictures or frames ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [("cats", "dogs", "birds", "fish"), tuple("0123"), ("n01440764", "n01443537", "n01484850", "n01491361")])
def test_class_folders_of_numbered_pictures_are_no_videos(tmp_path, names):
    for name in names:
        for i in range(20): save(tmp_path / name / f"{i:04d}.png")
    train = open_dataset(tmp_path, size=16)
    assert len(train) == 72 and {f.split("/")[0] for f in train.files} == set(names) and "split by hash of names" in train.taken


def test_folders_that_call_themselves_clips_are_kept_whole_and_the_run_says_so(tmp_path):
    for v in range(6):
        for t in range(3): save(tmp_path / f"video_{v}" / f"{t:03d}.png")
    train = ImageFolder(tmp_path, split="train")
    assert len(train) == 12 and "12 of 18" in train.taken and "frames of a video" in train.taken
    assert len(ImageFolder(tmp_path, split="train", group_by="file")) == 16


@pytest.mark.parametrize("frame", ["frame_{:04d}.png", "img{:05d}.jpg", "{:05d}_rgb.png", "shot7-{}.png"])
def test_frames_of_clips_stay_together_however_they_are_numbered(tmp_path, frame):
    for v in range(6):
        for t in range(4): save(tmp_path / f"clip{v}" / frame.format(t))
    parts = [ImageFolder(tmp_path, split=s) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [16, 4, 4] and "frames of a video" in parts[0].taken
    assert all(len({f.split("/")[0] for f in p.files}) == len(p) // 4 for p in parts)


# -- row 11: pictures with unusual numbers ----------------------------------------------------------------------------

def grey(path, values):
    Image.fromarray(values).save(path)
    return path


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
UNUSUAL = {
    "nan": np.where(RAMP > 0.9, np.nan, RAMP).astype(np.float32), "infinite": np.where(RAMP > 0.9, np.inf, RAMP).astype(np.float32),
    "thousand": (RAMP * 1000).astype(np.float32), "signed": (RAMP * 2 - 1).astype(np.float32), "int32": (RAMP * 2e6).astype(np.int32),
    "a little above one": (RAMP * 3).astype(np.float32), "small numbers": (RAMP * 10).astype(np.int32), "zero and one": (RAMP > 0.5).astype(np.int32),
    "negative": (RAMP * 100 - 50).astype(np.int32), "twelve": (RAMP * 4095).astype(np.uint16), "ten": (RAMP * 1023).astype(np.uint16),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_greys_whose_white_nobody_knows_are_refused_by_name(tmp_path, name):
    grey(tmp_path / f"{name}.tiff", UNUSUAL[name])
    with pytest.raises(ValueError, match=f"(?s)1 of 1 images.*{name}.tiff.*(NaN|levels=)"): validate_dataset(ImageFolder(tmp_path, 16))


@pytest.mark.parametrize("name, levels", [("thousand", (0, 1000)), ("signed", (-1, 1)), ("int32", (0, 2e6)), ("twelve", (0, 4095)), ("negative", (-50, 50))])
def test_levels_say_which_numbers_are_black_and_white(tmp_path, name, levels):
    grey(tmp_path / f"{name}.tiff", UNUSUAL[name])
    image = open_dataset(tmp_path, split="all", size=16, levels=levels)[0]["image"]
    torch.testing.assert_close(image[0].double(), torch.from_numpy(RAMP * 2 - 1), atol=0.03, rtol=0)


@pytest.mark.parametrize("values", [RAMP.astype(np.float32), (RAMP * 1.0000002).astype(np.float32), (RAMP * 255).astype(np.float32), (RAMP * 65535).astype(np.uint16), (RAMP * 255).astype(np.int32),
                                    np.zeros((16, 16), np.uint16)])
def test_usual_greys_need_no_levels(tmp_path, values):
    image = to_image_tensor(read_image(grey(tmp_path / "a.tiff", values)))
    expected = RAMP * 2 - 1 if values.any() else np.full((16, 16), -1.0)
    torch.testing.assert_close(image.double(), torch.from_numpy(expected).expand(3, -1, -1), atol=0.01, rtol=0)


def test_a_set_that_shows_nothing_is_refused(tmp_path):
    "Masks of 0 and 1, saved as pictures, are black"
    for i in range(4): grey(tmp_path / f"{i}.png", (np.random.default_rng(i).random((16, 16)) > 0.5).astype(np.uint8))
    with pytest.raises(ValueError, match="show nothing: all values lie between -1 and -0.992"): validate_dataset(ImageFolder(tmp_path, 16))
    grey(tmp_path / "0.png", (RAMP * 255).astype(np.uint8))
    validate_dataset(ImageFolder(tmp_path, 16))  # one picture is enough


# -- row 12: errors without a file's name -----------------------------------------------------------------------------

def test_a_picture_with_megabytes_of_text_or_profile_is_read_or_named(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 3_000_000, zip=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "text.png", pnginfo=info)
    Image.new("RGB", (9, 9)).save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    for name in ("text.png", "profile.png"):
        try: assert read_image(tmp_path / name).size == (9, 9)
        except ValueError as error: assert name in str(error) and "Delete or replace" in str(error)


@pytest.mark.parametrize("raised", [struct_error := __import__("struct").error("unpack"), ZeroDivisionError(), TypeError("x"), KeyError(7), RecursionError(), MemoryError()],
                         ids=lambda e: type(e).__name__)
def test_whatever_a_decoder_raises_the_file_is_named(tmp_path, monkeypatch, raised):
    save(tmp_path / "cat.png")
    def fail(self): raise raised
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError, match="cat.png"): read_image(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="(?s)1 of 1 images.*cat.png"): ImageFolder(tmp_path).check()


def test_broken_exif_does_not_cost_the_picture(tmp_path, monkeypatch):
    half().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30))
    assert read_image(tmp_path / "a.jpg").size == (40, 20)
    def fail(self): raise ZeroDivisionError
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert read_image(tmp_path / "a.jpg").size == (40, 20)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_orientation_is_followed_once_in_all_formats(tmp_path, suffix):
    half().save(tmp_path / f"a.{suffix}", exif=tagged(6))
    picture = read_image(tmp_path / f"a.{suffix}")
    assert picture.size == (20, 40) and to_rgb(picture).size == (20, 40)
    assert picture.getpixel((10, 5))[0] > 200 > 60 > picture.getpixel((10, 35))[0]  # red came to lie above blue
    if suffix == "tiff": return  # Pillow turns those while it loads
    stored = read_image(tmp_path / f"a.{suffix}", upright=False)
    assert stored.size == (40, 20) and to_rgb(stored).size == (40, 20)


# -- row 13: names and links ------------------------------------------------------------------------------------------

def test_a_name_that_is_no_utf8_does_not_stop_the_folder(tmp_path):
    for i in range(6): save(tmp_path / f"{i}.png")
    try: os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError: pytest.skip("this file system allows UTF-8 only")
    assert sum(len(open_dataset(tmp_path, split=s, size=16)) for s in ("train", "val", "test")) == 6
    ids = [item["image_id"] for item in ImageFolder(tmp_path, 16)]
    assert "caf�.png" in ids and all(name.encode() for name in ids)
    open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb").close()
    with pytest.raises(ValueError, match="caf�.png") as error: ImageFolder(tmp_path).check()
    assert str(error.value).encode()


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_that_loop_end_and_the_same_picture_counts_once(tmp_path, target):
    for i in range(4): save(tmp_path / "set" / "a" / f"{i}.png")
    (tmp_path / "set" / "a" / "loop").symlink_to(target)
    (tmp_path / "set" / "again").symlink_to("a")
    (tmp_path / "set" / "copy.png").symlink_to("a/0.png")
    (tmp_path / "set" / "twin.png").symlink_to("a/0.png")
    assert [f for f in list_images(tmp_path / "set") if f.startswith("a/")] == [f"a/{i}.png" for i in range(4)]
    assert len(ImageFolder(tmp_path / "set")) == 4 and detect_format(tmp_path / "set") == "images"


def test_links_to_elsewhere_are_followed_and_broken_ones_counted(tmp_path):
    save(tmp_path / "store" / "x.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images(tmp_path / "set")
    assert found.files == ["x.png"] and found.skipped == {"broken links": 1}
    os.mkfifo(tmp_path / "set" / "pipe.png")  # opening it would wait for ever
    assert ImageFolder(tmp_path / "set").check() == 1


def test_loops_end_in_the_other_readers(tmp_path):
    for name, write in (("tex", lambda p: write_clevrtex(p, 3)), ("movi", lambda p: write_dump(p, "slot_diffusion", range(3), 1))):
        write(tmp_path / name)
        (tmp_path / name / "zloop").symlink_to("..")
    assert len(ClevrTex(tmp_path / "tex")) == 3 and len(MoviDump(tmp_path / "movi", max_objects=9)) == 3


# -- row 14: a second reader ------------------------------------------------------------------------------------------

def test_class_folders_read_as_everything_else_does(tmp_path):
    half().save(save(tmp_path / "cats" / "0.jpg"), exif=tagged(6), quality=95)
    save(tmp_path / "cats" / "1.png", (0, 0, 0, 0), mode="RGBA")
    grey(tmp_path / "cats" / "2.png", (np.ones((9, 9)) * 40000).astype(np.uint16))
    save(tmp_path / "cats" / "3.jfif", format="JPEG")
    for trash in (".ipynb_checkpoints/cats/0.png", "__MACOSX/cats/0.png"): save(tmp_path / trash)
    (tmp_path / "cats" / "._0.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    found = class_folders(tmp_path, n_per_class=-1, size=16)
    assert found["names"] == ["cats"] and len(found["image"]) == 4
    upright, transparent, sixteen, _ = found["image"]
    assert upright[0, :7].mean() > 0.9 and upright[2, 9:].mean() > 0.9  # red above blue
    assert transparent.min() == 1 and abs(float(sixteen.mean()) - (40000 / 65535 * 2 - 1)) < 0.01
    (tmp_path / "cats" / "4.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cats/4.png"): class_folders(tmp_path, n_per_class=-1, size=16)


def test_class_folders_count_what_they_cannot_read(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0.heic").write_bytes(b"0000ftypheic")
    with pytest.raises(FileNotFoundError, match="cats.*1 .heic"): class_folders(tmp_path, size=16)


# -- row 20: formats --------------------------------------------------------------------------------------------------

def test_jfif_avif_and_others_are_read_or_counted(tmp_path):
    save(tmp_path / "a.jfif", format="JPEG")
    save(tmp_path / "b.JPE", format="JPEG")
    (tmp_path / "c.heic").write_bytes(b"0000ftypheic")
    (tmp_path / "d.txt").write_text("notes")
    (tmp_path / "e").write_bytes(b"")
    ds = ImageFolder(tmp_path, 16)
    assert ds.files == ["a.jfif", "b.JPE"] and ds.check() == 2
    assert ds.taken == "2 of 5 files, 1 .heic, 1 .txt, 1 without ending skipped; all"
    buffer = io.BytesIO()
    try: Image.new("RGB", (16, 16)).save(buffer, "AVIF")
    except (KeyError, ValueError, OSError): return  # Pillow without the codec: counted like .heic
    (tmp_path / "f.avif").write_bytes(buffer.getvalue())
    assert "f.avif" in ImageFolder(tmp_path, 16).files


def test_a_folder_of_nothing_but_heic_says_so(tmp_path):
    for i in range(3): (tmp_path / f"IMG_{i}.HEIC").write_bytes(b"0000ftypheic")
    with pytest.raises(ValueError, match="no images.*3 .heic"): open_dataset(tmp_path)


def test_n_that_cuts_a_folder_is_said(tmp_path):
    for i in range(30): save(tmp_path / f"p{i}.png")
    assert ImageFolder(tmp_path, n=20).taken.startswith("20 of 30 files (n=20 of the 30 in the split)")


# -- label maps are no pictures ---------------------------------------------------------------------------------------

LABELLED = {
    "ADE20K": ("images/training/ADE_train_{}.jpg", "annotations/training/ADE_train_{}.png", "L"), "VOC": ("JPEGImages/2007_{}.jpg", "SegmentationClass/2007_{}.png", "P"), "Cityscapes": ("leftImg8bit/train/aachen/aachen_{}_leftImg8bit.png", "gtFine/train/aachen/aachen_{}_gtFine_labelIds.png", "L"),
    "colours of Cityscapes": ("leftImg8bit/train/aachen/aachen_{}_leftImg8bit.png", "gtFine/train/aachen/aachen_{}_gtFine_color.png", "RGB"), "pairs": ("{}.png", "{}_mask.png", "1"), "pets": ("images/pet_{}.jpg", "annotations/trimaps/pet_{}.png", "L"),
    "old ADE20K": ("training/a/abbey/ADE_train_{}.jpg", "training/a/abbey/ADE_train_{}_seg.png", "RGB"), "sixteen bits": ("img/{}.tif", "labels/{}.tif", "I;16"), "no words": ("images/{}.png", "ground_truth/{}.png", "P"),
}


@pytest.mark.parametrize("layout", LABELLED)
def test_label_maps_beside_pictures_are_left_out_and_counted(tmp_path, layout):
    *names, mode = LABELLED[layout]
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)
        labels = Image.new(mode, (24, 24), (20, 40 * i, 0) if mode == "RGB" else i % 2)
        for name, picture in zip(names, (Image.fromarray(noise), labels)):
            (tmp_path / name.format(i)).parent.mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / name.format(i))
    data = ImageFolder(tmp_path)
    assert data.files == sorted(names[0].format(i) for i in range(4)) and "4 of 8 files, 4 label maps skipped" in data.taken
    assert len(ImageFolder(tmp_path / names[1].format(0).split("/")[0])) == 4 if "/" in names[1] and names[0].split("/")[0] != names[1].split("/")[0] else True  # who names that folder wants them


@pytest.mark.parametrize("folders", [("mask", "no_mask"), ("with_mask", "without_mask"), ("labels", "boxes")])
def test_photographs_in_a_class_that_is_called_mask_are_pictures(tmp_path, folders):
    for name in folders:
        for i in range(4): save(tmp_path / name / f"{i}.png") and Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    assert len(ImageFolder(tmp_path)) == 8


# -- greys and levels, again ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, kind", [(RAMP * 16383, np.uint16), (RAMP * 32767, np.int32), (RAMP * 100, np.float32), (RAMP * 4.5, np.float32), (RAMP * 60000 / 4, np.float32), (RAMP * 0.2, np.float32), (RAMP * 50, np.int32)],
                         ids=["14 bits", "15 bits", "per cent", "to 4.5", "to 15,000", "to 0.2", "int to 50"])
def test_greys_that_would_come_out_dark_are_refused_until_levels_say_what_white_is(tmp_path, values, kind):
    grey(tmp_path / "a.tiff", values.astype(kind))
    with pytest.raises(ValueError, match="(?s)a.tiff.*its greys go from.*pass levels="): ImageFolder(tmp_path, 16).check()
    image = ImageFolder(tmp_path, 16, levels=(0, float(values.max())))[0]["image"]
    assert image.min() == -1 and image.max() == 1


@pytest.mark.parametrize("values, kind", [(RAMP * 20000, np.uint16), (RAMP * 200, np.float32), (RAMP * 0.5, np.float32), (RAMP * 70, np.int32)])
def test_somewhat_dark_greys_are_read(tmp_path, values, kind):
    ImageFolder(grey(tmp_path / "a.tiff", values.astype(kind)).parent, 16).check()


@pytest.mark.parametrize("levels", [(4095, 0), (7, 7), (0,), 4095, (0, float("nan")), ("0", "1"), (0, 1, 2)], ids=str)
def test_levels_that_are_no_black_and_white_are_refused_before_any_picture(tmp_path, levels):
    grey(tmp_path / "a.png", (RAMP * 255).astype(np.uint8))
    with pytest.raises((ValueError, TypeError), match="levels=.*two numbers \\(black, white\\), the smaller one first"): ImageFolder(tmp_path, 16, levels=levels)


ARGUMENTS = [("size", 0), ("size", -3), ("size", "64"), ("size", 64.0), ("size", (64, 64)), ("n", 0), ("n", 2.5), ("n", True), ("crop", 0), ("crop", (3, 4)), ("crop", "centre"), ("crop", (0.5, 0.5, 0.5)), ("min_size", "8"), ("min_size", -1)]


@pytest.mark.parametrize("name, value", ARGUMENTS, ids=str)
def test_wrong_arguments_are_named_and_no_picture_is_blamed(tmp_path, name, value):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"^{name}=.*expected is") as error: ImageFolder(tmp_path, **{name: value})
    assert "a.png" not in str(error.value)


@pytest.mark.parametrize("reader, name", [(lambda p, **o: ClevrTex(p / "tex", **o), "max_objects"), (lambda p, **o: MoviDump(p / "movi", **o), "clip_length"), (lambda p, **o: open_dataset(p / "movi", n_frames=2, **o), "frame_offset"),
                                          (lambda p, **o: open_dataset("shapes3d", **o), "size"), (lambda p, **o: open_dataset(p / "a.h5", **o), "hop"), (lambda p, **o: OfficialFolder(p, **o), "n")])
@pytest.mark.parametrize("value", [0, "4"])
def test_every_reader_checks_its_arguments(tmp_path, reader, name, value):
    write_clevrtex(tmp_path / "tex", 1)
    write_dump(tmp_path / "movi", "slot_diffusion", range(4), 2)
    write_scenes(tmp_path / "a.h5", n=3)
    with pytest.raises(ValueError, match=f"^{name}={value!r}: expected is a whole number, at least 1"): reader(tmp_path, **{name: value})


# -- classes that one split lacks -------------------------------------------------------------------------------------

@pytest.mark.parametrize("lacking", ["train", "val"])
def test_a_class_keeps_its_number_where_one_split_lacks_it(tmp_path, lacking):
    for split in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            if (split, name) != (lacking, "dog"): save(tmp_path / split / name / "0.png")
    other = "val" if lacking == "train" else "train"
    whole = class_folders(tmp_path, n_per_class=1, size=8, split=other)
    with pytest.warns(UserWarning, match=f"there is no .*{lacking}/dog: split='{lacking}' has no pictures of that class"): found = class_folders(tmp_path, n_per_class=1, size=8, split=lacking)
    assert found["names"] == whole["names"] == ["cat", "dog", "owl"] and whole["label"].tolist() == [0, 1, 2] and found["label"].tolist() == [0, 2]
    assert all(f"/{found['names'][label]}/" in path for label, path in zip(found["label"], found["paths"]))


# -- further finds ----------------------------------------------------------------------------------------------------

def noise(i=0, size=(24, 24, 3)): return Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8))


def test_black_and_white_jpegs_beside_pictures_are_masks_and_grey_photographs_are_not(tmp_path):
    for folder in ("images", "masks", "labels"): (tmp_path / folder).mkdir()
    for i in range(4):
        noise(i).save(tmp_path / "images" / f"{i}.jpg")
        noise(i, (24, 24)).save(tmp_path / "labels" / f"{i}.jpg")
        Image.fromarray(np.kron(np.eye(3, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))).save(tmp_path / "masks" / f"{i}.jpg", quality=90)
    assert {file.split("/")[0] for file in ImageFolder(tmp_path).files} == {"images", "labels"}


def test_one_picture_in_two_formats_lies_in_one_split(tmp_path):
    for i in range(40):
        for suffix in ("jpg", "png"): noise(i).save(tmp_path / f"{i}.{suffix}")
    train, val = (ImageFolder(tmp_path, split=s) for s in ("train", "val"))
    assert not {f.split(".")[0] for f in train.files} & {f.split(".")[0] for f in val.files} and len(val) == 4
    assert "split by hash of names without their endings, since some occur twice" in val.taken


def test_sets_that_are_very_dark_are_spoken_of(tmp_path):
    for i in range(3): Image.fromarray(np.random.default_rng(i).integers(0, 16, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="are very dark: the lightest value is -0.8.*10, 12 or 14 bits in 16"): validate_dataset(ImageFolder(tmp_path, 16))


def test_animated_png_are_counted_among_those_with_several_frames(tmp_path):
    noise().save(tmp_path / "a.png", save_all=True, append_images=[noise(1)])
    for i in range(3): noise(i).save(tmp_path / f"{i}.png")
    assert "several frames in 1 of 4 .png: the first is read" in ImageFolder(tmp_path).taken
