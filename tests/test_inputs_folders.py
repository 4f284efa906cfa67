"Folders as they come: one split without a partner, stray masks, data files beside photographs, competitions with equal names"
import warnings

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from small_data import write_clevrtex, write_dump, write_scenes

from decomp_nb.data.catalog import detect_format, open_dataset
from decomp_nb.data.class_folders import class_folders
from decomp_nb.data.clevrtex import ClevrTex
from decomp_nb.data.images import ImageFolder
from decomp_nb.data.movi import MoviDump
from decomp_nb.data.video import VideoClips


def noise(i=0, size=(24, 24, 3)): return Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8))


def save(file, i=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(i, **options).save(file)
    return file


def heard(call):
    "What a call returns, and the texts of its warnings"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return call(), [str(w.message) for w in found]


# -- one folder that is called like a split ---------------------------------------------------------------------------

@pytest.mark.parametrize("names", [("train", "query", "gallery"), ("bounding_box_train", "query"), ("images/train2020", "images/unlabelled")], ids=lambda n: n[0].replace("/", "-"))
def test_a_split_without_a_partner_is_spoken_of(tmp_path, names):
    for name in names:
        for i in range(10): save(tmp_path / name / f"{i}.png", i)
    for split in ("train", "val"):
        data, texts = heard(lambda split=split: ImageFolder(tmp_path, split=split))
        assert "split by hash" in data.taken and len(texts) == 1
        assert f"folder {names[0].split('/')[-1]!r} is called like a split, but not those beside it ({', '.join(sorted(n.split('/')[-1] for n in names[1:]))})" in texts[0]
    assert not heard(lambda: ImageFolder(tmp_path, split="all"))[1]


def test_readers_of_classes_and_scenes_speak_of_it_too(tmp_path):
    for name in ("train", "query"):
        write_clevrtex(tmp_path / "tex" / name, 4)
        write_dump(tmp_path / "movi" / name, "slot_diffusion", range(2), 2)
        for i in range(2): save(tmp_path / "classes" / name / f"{i}.png", i)
    for call in (lambda: ClevrTex(tmp_path / "tex", split="train"), lambda: class_folders(tmp_path / "classes", n_per_class=1, size=8), lambda: VideoClips(tmp_path / "movi", n_frames=2, split="train", max_objects=9)):
        assert any("folder 'train' is called like a split" in text for text in heard(call)[1])
    data, texts = heard(lambda: MoviDump(tmp_path / "movi", split="train", max_objects=9))
    assert len(data) == 4 and "2 videos in folders of no split (query) left out" in data.taken and "are left out, since train are splits" in texts[0]


@pytest.mark.parametrize("names", [("train", "val", "unlabelled"), ("train",), tuple(f"class {i}" for i in range(9)) + ("train",)], ids=["partner", "alone", "one of ten classes"])
def test_splits_and_classes_that_are_clear_are_not_spoken_of(tmp_path, names):
    for name in names: save(tmp_path / name / "0.png")
    assert not heard(lambda: ImageFolder(tmp_path, split="train"))[1]


# -- one stray mask makes no dump -------------------------------------------------------------------------------------

STRAY = {"named mask": ("tom.jpg", "tom_mask.png"), "numbered mask": ("7.jpg", "7_mask.png"), "numbered image": ("3_image.png",), "named image": ("tom_image.png",)}


@pytest.mark.parametrize("stray", STRAY)
def test_class_folders_with_a_stray_mask_are_no_videos(tmp_path, stray):
    for folder in ("cat", "dog"):
        for i in range(8): save(tmp_path / folder / f"{i + 20}.jpg", i)
    for name in STRAY[stray]: save(tmp_path / "cat" / name, 3)
    assert detect_format(tmp_path) == "images"
    assert len(open_dataset(tmp_path, split="all", size=16)) >= 16


@pytest.mark.parametrize("layout", ["lsd", "slot_diffusion", "steve"])
def test_dumps_are_recognised_and_count_what_belongs_to_no_frame(tmp_path, layout):
    write_dump(tmp_path, layout, range(2), 3)
    first = next(folder for folder in sorted(tmp_path.rglob("0000*")) if folder.is_dir())
    save(tmp_path / "cover.png")
    save(first / ("cover.png" if layout != "slot_diffusion" else "000009.jpeg"))
    assert detect_format(tmp_path) == "movi"
    assert "; 1 pictures that belong to no frame left out" in MoviDump(tmp_path, max_objects=9).taken
    if layout != "lsd":
        assert "; 1 pictures that belong to no frame left out" in VideoClips(tmp_path, n_frames=2, max_objects=9).taken


def test_frames_of_films_with_a_stray_mask_are_all_read(tmp_path):
    for clip in ("clip1", "clip2"):
        for i in range(4): save(tmp_path / clip / f"{i:03d}.png", i)
    save(tmp_path / "clip1" / "thumb_image.png")
    assert len(VideoClips(tmp_path, n_frames=4)) == 2


# -- a data file beside photographs -----------------------------------------------------------------------------------

def features(file):
    with h5py.File(file, "w") as f: f["features"] = np.zeros((3, 2))


BESIDE = {"labels.mat": lambda f: savemat(f, {"labels": np.arange(3)}), "features.h5": features, "features.npz": lambda f: np.savez(f, features=np.zeros(3)), "cars/annos.mat": lambda f: savemat(f, {"x": np.arange(3)}), "clip.mov": lambda f: f.write_bytes(b"0000ftypqt  ")}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("where", ["", "jpg"])
def test_a_file_beside_photographs_does_not_decide(tmp_path, name, where):
    for i in range(12): save(tmp_path / where / f"{i}.jpg", i)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    BESIDE[name](tmp_path / name)
    data = open_dataset(tmp_path, split="all", size=16)
    assert isinstance(data, ImageFolder) and len(data) == 12 and f"1 {name[name.index('.'):]} skipped" in data.taken


def test_photographs_beside_a_data_set_are_asked_about(tmp_path):
    write_scenes(tmp_path / "scenes.h5", n=4)
    for i in range(3): save(tmp_path / f"preview{i}.png", i)
    assert len(open_dataset(tmp_path, split="all")) == 4  # a few pictures show what is in the file
    for i in range(9): save(tmp_path / f"{i}.jpg", i)
    with pytest.raises(ValueError, match="holds 12 pictures and scenes.h5, which is a data set, too: name that file, pass kind='images'"): open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / "scenes.h5", split="all")) == 4 and len(open_dataset(tmp_path, kind="images", split="all", size=16)) == 12


def test_more_photographs_than_films_are_photographs(tmp_path):
    for i in range(3): save(tmp_path / "DCIM" / f"IMG_{i}.JPG", i)
    (tmp_path / "DCIM" / "IMG_9.MOV").write_bytes(b"0000ftypqt  ")
    assert detect_format(tmp_path) == "images"
    for i in range(5): (tmp_path / "DCIM" / f"VID_{i}.mp4").write_bytes(b"0000ftypmp42")
    assert detect_format(tmp_path) == "video"


# -- competitions: equal names in train and test, and a table ---------------------------------------------------------

TABLES = {"train.csv": "id,label\n0,cat\n1,dog\n2,cat\n", "splits.csv": "file,split\n0.png,train\n1.png,train\n2.png,train\n0.png,test\n1.png,test\n2.png,test\n", "lists/train.txt": "0.png\n1.png\n2.png\n", "train.json": '["0.png", "1.png", "2.png"]', "labels.csv": "id,label\n0,cat\n1,dog\n"}


@pytest.mark.parametrize("name", TABLES)
def test_equal_names_in_two_splits_are_told_apart_by_their_folders(tmp_path, name):
    for split in ("train", "test"):
        for i in range(3): save(tmp_path / split / f"{i}.png", i)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(TABLES[name])
    for split in ("train", "test"):
        assert ImageFolder(tmp_path, split=split).files == [f"{split}/{i}.png" for i in range(3)]


def test_a_list_that_takes_of_both_folders_still_counts_more(tmp_path):
    for split in ("train", "test"):
        for i in range(3): save(tmp_path / split / f"{split[1]}{i}.png", i)
    (tmp_path / "train.txt").write_text("r0\nr1\ne0\n")
    assert ImageFolder(tmp_path, split="train").files == ["test/e0.png", "train/r0.png", "train/r1.png"]
    assert ImageFolder(tmp_path, split="test").files == ["test/e1.png", "test/e2.png"]  # of its folder, what no list names
