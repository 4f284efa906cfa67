"Splits as text lists, written on any system and in any spelling; and files that hold several frames"
import json
import unicodedata
import warnings

import pytest
import torch
from PIL import Image
from small_data import write_clevrtex, write_dump, write_voc

from decomp_nb.data.catalog import open_dataset, validate_dataset
from decomp_nb.data.class_folders import class_folders
from decomp_nb.data.clevrtex import ClevrTex
from decomp_nb.data.images import ImageFolder
from decomp_nb.data.lists import read_list
from decomp_nb.data.movi import MoviDump
from decomp_nb.data.natural import VocScenes

NAMES = [f"{animal}/my {animal} {i}.png" for animal in ("cat", "dog") for i in range(4)]
VAL = ["cat/my cat 3.png", "dog/my dog 0.png"]
TRAIN = [name for name in NAMES if name not in VAL]


def pictures(folder, names=NAMES):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (20 * i, 0, 0)).save(folder / name)
    return folder


def write_lists(folder, write=str, join="\n", encoding="utf-8", place=".", **others):
    "Lists of both splits, each line written by `write`"
    (folder / place).mkdir(parents=True, exist_ok=True)
    for split, names in {"train": TRAIN, "val": VAL, **others}.items():
        (folder / place / f"{split}.txt").write_bytes((join.join(map(write, names)) + join).encode(encoding))


LINES = {
    "relative": str, "with a point": lambda n: f"./{n}", "backslashes": lambda n: n.replace("/", "\\"), "absolute here": "{folder}/{name}".format, "absolute elsewhere": lambda n: f"/home/ada/animals/{n}",
    "drive": lambda n: "D:\\animals\\" + n.replace("/", "\\"), "without ending": lambda n: n.removesuffix(".png"), "names only": lambda n: n.split("/")[1].removesuffix(".png"),
    "label": lambda n: f"{n} 3", "table": lambda n: f"{n}\tcat\t3", "csv": lambda n: f'"{n}", cat', "comment behind": lambda n: f"{n}  # blurred",
}


@pytest.mark.parametrize("line", LINES)
def test_lists_are_read_however_they_name_pictures(tmp_path, line):
    pictures(tmp_path)
    write = LINES[line] if line != "absolute here" else lambda name: f"{tmp_path}/{name}"
    write_lists(tmp_path, write)
    parts = {split: ImageFolder(tmp_path, split=split) for split in ("train", "val", "all")}
    assert parts["train"].files == TRAIN and parts["val"].files == VAL and parts["all"].files == NAMES
    assert "split by lists" in parts["val"].taken and "train.txt 6" in parts["val"].taken and "val.txt 2" in parts["val"].taken
    with pytest.raises(ValueError, match="none for split='test': add test.txt"): ImageFolder(tmp_path, split="test")


@pytest.mark.parametrize("join, encoding", [("\r\n", "utf-8"), ("\n", "utf-8-sig"), ("\r\n", "utf-16"), ("\r", "utf-8"), ("\n\n  \n", "utf-8"), ("\n# a comment\n", "utf-8")], ids=["crlf", "mark", "powershell", "old mac", "blank", "comments"])
def test_lists_of_all_systems_are_read(tmp_path, join, encoding):
    write_lists(pictures(tmp_path), join=join, encoding=encoding)
    assert [ImageFolder(tmp_path, split=s).files for s in ("train", "val")] == [TRAIN, VAL]


@pytest.mark.parametrize("place", ["splits", "lists", "ImageSets/Main"])
def test_lists_lie_in_folders_of_their_own(tmp_path, place):
    write_lists(pictures(tmp_path), place=place, trainval=NAMES, train_aug=VAL)
    assert [ImageFolder(tmp_path, split=s).files for s in ("train", "val")] == [TRAIN, VAL]


def test_lists_count_more_than_folders(tmp_path):
    names = [f"{split}/{i}.png" for split in ("train", "val") for i in range(4)]
    pictures(tmp_path, names)
    (tmp_path / "train.txt").write_text("\n".join(names[:2]))
    (tmp_path / "val.txt").write_text("\n".join(names[2:5]))
    train = ImageFolder(tmp_path, split="train")
    assert train.files == names[:2] and train.taken.endswith("split by lists train.txt 2, val.txt 3, 3 in none")


def test_what_is_in_both_lists_is_said(tmp_path):
    write_lists(pictures(tmp_path), test=[*VAL, VAL[0], TRAIN[0]])
    assert "2 test.txt" not in ImageFolder(tmp_path, split="test").taken and ImageFolder(tmp_path, split="test").taken.endswith("3 in several of them")
    assert len(ImageFolder(tmp_path, split="test")) == 3  # a name that stands there twice counts once


@pytest.mark.parametrize("extra, match", [("cat/gone.png", "1 of the 7 pictures that .*train.txt names are not there: cat/gone.png. Put them there"), ("/data/gone.jpg 3", "train.txt names.*gone.jpg"), ("gone", "train.txt.*gone")])
def test_missing_pictures_are_named_with_their_list(tmp_path, extra, match):
    write_lists(pictures(tmp_path), train=[*TRAIN, extra])
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=match): open_dataset(tmp_path, split=split, size=16)


def test_a_list_of_another_set_is_refused_and_not_passed_over(tmp_path):
    write_lists(pictures(tmp_path), train=["bird/0.png", "bird/1.png"])
    with pytest.raises(ValueError, match="2 of the 2 pictures that .*train.txt names are not there"): ImageFolder(tmp_path, split="train")


def test_a_name_that_two_pictures_have_is_refused(tmp_path):
    pictures(tmp_path, ["a/0.png", "b/0.png", "a/1.png"])
    (tmp_path / "train.txt").write_text("0\n")
    with pytest.raises(ValueError, match="train.txt: '0' may be a/0.png or b/0.png"): ImageFolder(tmp_path, split="train")


@pytest.mark.parametrize("name, text, said", [("notes.txt", "0.png\n", False), ("train_log.txt", "0.png loss 0.3\n", True), ("train_captions.txt", "0.png a red disc\n", True), ("loss_train.csv", "step,loss\n100,3.1\n", False),
                                              ("train_test_split.txt", "0.png 1\n1.png 0\n", True), ("metadata.csv", "name,fold\n0.png,2\n1.png,3\n", True), ("config.json", '{"train": {"lr": 1}}', False)])
def test_texts_that_are_no_lists_change_nothing_and_those_that_may_be_are_named(tmp_path, name, text, said):
    pictures(tmp_path, [f"{i}.png" for i in range(20)])
    before = [ImageFolder(tmp_path, split=s).files for s in ("train", "val", "test")]
    (tmp_path / name).write_text(text)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert [ImageFolder(tmp_path, split=s).files for s in ("train", "val", "test")] == before
    assert [name in str(w.message) and "is not used for the split" in str(w.message) for w in heard] == [True] * 3 * said


@pytest.mark.parametrize("name, text, begins", [("train.txt", "Dear diary,\nwe went by train.\n", "Dear diary,"), ("train.txt", "", "nothing"), ("val.csv", "filename,label\n", "filename,label"), ("splits/train.txt", "bird_7\nbird_8\n", "bird_7"), ("train.json", '{"lr": 0.1}', "lr"),
                                                ("train.txt", "7,8,9", "7,8,9"), ("a/train.txt", "x\ny\n", "x")])
def test_a_list_that_matches_nothing_never_leads_to_a_split_by_hash(tmp_path, name, text, begins):
    pictures(tmp_path, [f"a/my {i}.png" for i in range(20)])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    for split in ("train", "val", "test"):
        with pytest.raises(ValueError, match=f"{name} is called like the list of a split, but names none of the pictures, such as 'a/my 0.png'; it begins with '{begins}"): open_dataset(tmp_path, split=split, size=16)
    assert len(open_dataset(tmp_path, split="all", size=16)) == 20


def test_every_reader_refuses_a_list_that_it_cannot_follow(tmp_path):
    write_clevrtex(tmp_path / "tex", 4)
    write_dump(tmp_path / "movi", "slot_diffusion", range(4), 2)
    for root in ("tex", "movi"): (tmp_path / root / "val.txt").write_text("scene_7\n")
    for reader in (lambda: ClevrTex(tmp_path / "tex", split="train"), lambda: MoviDump(tmp_path / "movi", split="train", max_objects=9), lambda: open_dataset(tmp_path / "movi", n_frames=2, split="train")):
        with pytest.raises(ValueError, match="val.txt is called like the list of a split"): reader()


def rows_of(split, names, labels=True):
    return [[name, str(i % 2), split] for i, name in enumerate(names)]


ALL_ROWS = [*rows_of("train", TRAIN), *rows_of("Validation", VAL)]
TABLES = {
    "splits.csv": "filename,label,split\n" + "".join(",".join(row) + "\n" for row in ALL_ROWS), "metadata.tsv": "\tpath\tlabel\tsubset\n" + "".join(f"{i}\t" + "\t".join(row) + "\n" for i, row in enumerate(ALL_ROWS)),
    "labels.csv": "".join(";".join(row) + "\n" for row in ALL_ROWS), "split.txt": "".join(f'"{name}",{split}\n' for name, _, split in ALL_ROWS), "splits.json": json.dumps({"train": TRAIN, "valid": VAL, "classes": ["cat", "dog"]}),
    "split_zhou.json": json.dumps({"train": [[name, 0, "cat"] for name in TRAIN], "val": [[name, 1, "dog"] for name in VAL]}),
    "splits_of_all.json": json.dumps({"training": [{"file": name} for name in TRAIN], "val": [{"file": name, "id": 3} for name in VAL]}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("place", [".", "splits"])
def test_one_table_may_tell_the_split_of_every_picture(tmp_path, name, place):
    pictures(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / name).write_text(TABLES[name])
    assert [ImageFolder(tmp_path, split=s).files for s in ("train", "val")] == [TRAIN, VAL]
    assert ImageFolder(tmp_path, split="val").taken.endswith(f"split by lists {name} 6, {name} 2")


FORMS = {
    "csv with headings": (".csv", lambda names: "image,label\n" + "".join(f"{n},cat\n" for n in names)), "csv of a data frame": (".csv", lambda names: ",image,label\n" + "".join(f"{i},{n},1\n" for i, n in enumerate(names))),
    "semicolons": (".csv", lambda names: "image;label\n" + "".join(f"{n};3\n" for n in names)), "json names": (".json", json.dumps), "json entries": (".json", lambda names: json.dumps([{"label": 3, "image": n} for n in names])),
    "json of coco": (".json", lambda names: json.dumps({"info": {}, "images": [{"id": i, "file_name": n} for i, n in enumerate(names)], "annotations": [{"id": 7, "image_id": 0}]})), "json by class": (".json", lambda names: json.dumps({c: [n for n in names if n.startswith(c)] for c in ("cat", "dog")})),
    "json labels": (".json", lambda names: json.dumps({n: 3 for n in names})), "label first": (".txt", lambda names: "".join(f"3 {n}\n" for n in names)), "label first, tab": (".tsv", lambda names: "".join(f"cat\t{n}\n" for n in names)),
    "number, name, box": (".txt", lambda names: "".join(f"{i} {n}\n" for i, n in enumerate(names))), "other ending": (".txt", lambda names: "".join(n.replace(".png", ".JPEG") + "\n" for n in names)), "other letters": (".txt", lambda names: "".join(n.upper() + "\n" for n in names)),
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_are_read_in_whatever_form_they_come(tmp_path, form):
    suffix, write = FORMS[form]
    pictures(tmp_path)
    for split, names in (("train", TRAIN), ("val", VAL)): (tmp_path / (split + suffix)).write_text(write(names))
    assert [sorted(ImageFolder(tmp_path, split=s).files) for s in ("train", "val")] == [TRAIN, VAL]


@pytest.mark.parametrize("write", ["{} {}.png".format, "{},{}.png".format, "{1}.png {0}".format, "{1}.png,{0}".format])
def test_labels_that_are_names_too_are_labels(tmp_path, write):
    "A label 3 is not the picture 3.png, whether it stands before the name or behind it"
    pictures(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "train.txt").write_text("".join(write(i % 3, i) + "\n" for i in (7, 5, 3)))
    assert ImageFolder(tmp_path, split="train").files == ["3.png", "5.png", "7.png"]
    (tmp_path / "train.txt").write_text("".join(write(i % 3, i) + "\n" for i in (7, 5, 30)))
    with pytest.raises(ValueError, match="1 of the 3 pictures.*30.png"): ImageFolder(tmp_path, split="train")


def test_names_without_endings_that_may_be_labels_are_refused(tmp_path):
    pictures(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "train.txt").write_text("7 1\n5 2\n")
    with pytest.raises(ValueError, match="train.txt: '7 1' may be 1.png or 7.png: write the whole path with its ending"): ImageFolder(tmp_path, split="train")
    (tmp_path / "train.txt").write_text("7 1\n5 1\n")  # a label that repeats is one
    assert ImageFolder(tmp_path, split="train").files == ["5.png", "7.png"]


@pytest.mark.parametrize("root, place", [("images", ".."), ("JPEGImages", "../splits"), (".", "pictures")])
def test_lists_lie_beside_the_folder_of_pictures_or_in_it(tmp_path, root, place):
    folder = tmp_path / "set" / root
    pictures(folder, [f"pictures/{name}" for name in NAMES])
    write_lists(folder, place=place, write=lambda name: name.split("/")[1])
    assert [[f.removeprefix("pictures/") for f in ImageFolder(folder, split=s).files] for s in ("train", "val")] == [TRAIN, VAL]


def test_lists_of_every_class_are_put_together(tmp_path):
    pictures(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(4)])
    for c in ("cat", "dog"):
        for split, numbers in (("train", "0123"[:3]), ("val", "3")): (tmp_path / c / f"{split}.txt").write_text("\n".join(numbers))
    train = ImageFolder(tmp_path, split="train")
    assert train.files == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)] and "cat/train.txt and dog/train.txt 6" in train.taken


def test_a_foreign_list_beside_the_folder_of_pictures_says_nothing(tmp_path):
    pictures(tmp_path / "images", [f"{i}.png" for i in range(20)])
    (tmp_path / "train.txt").write_text("x\ny\n")
    assert "hash" in ImageFolder(tmp_path / "images", split="train").taken


def test_lists_of_other_names_count_where_they_agree(tmp_path):
    pictures(tmp_path)
    for split, names in (("train", TRAIN), ("val", VAL)): (tmp_path / f"birds_{split}.csv").write_text("\n".join(names))
    assert [ImageFolder(tmp_path, split=s).files for s in ("train", "val")] == [TRAIN, VAL]
    (tmp_path / "birds_val.csv").write_text("\n".join([*VAL, TRAIN[0]]))
    with pytest.warns(UserWarning, match="birds_(train|val).csv names [63] of the 8 pictures"): assert "hash" in ImageFolder(tmp_path, split="train").taken


@pytest.mark.parametrize("write", ["{}_{}.png".format, "images/{}-{:03}.png".format, "{1:04}_{0}.png".format, "{}/x/{}.png".format])
def test_names_of_files_that_tell_a_split_are_followed(tmp_path, write):
    pictures(tmp_path, [write(split, i) for split, n in (("train", 6), ("val", 3)) for i in range(n)])
    parts = [ImageFolder(tmp_path, split=s) for s in ("train", "val")]
    assert [len(p) for p in parts] == [6, 3] and "names train 6, val 3" in parts[0].taken
    with pytest.raises(ValueError, match="none for split='test'"): ImageFolder(tmp_path, split="test")


def test_names_that_tell_no_split_or_only_some_do_not_count(tmp_path):
    pictures(tmp_path / "a", [f"{kind}_{i}.png" for kind in ("train", "plane", "ship") for i in range(8)])
    assert "hash" in ImageFolder(tmp_path / "a", split="train").taken  # railways
    pictures(tmp_path / "b", [*(f"{kind}_{i}.png" for kind in ("train", "val") for i in range(8)), "cover.png"])
    with pytest.warns(UserWarning, match="names of 16 of 17 pictures tell a split, but not 'cover.png'"): assert "hash" in ImageFolder(tmp_path / "b", split="train").taken


def test_accents_of_a_mac_are_the_same_letters(tmp_path):
    pictures(tmp_path, [unicodedata.normalize("NFD", "größe.png"), "b.png"])
    (tmp_path / "train.txt").write_text(unicodedata.normalize("NFC", "größe.png"))
    assert len(ImageFolder(tmp_path, split="train")) == 1


def test_file_names_that_look_like_comments_or_are_no_utf8(tmp_path):
    pictures(tmp_path, ["#1.png", "2.png", "größe.png"])
    (tmp_path / "train.txt").write_text("#1.png\n# 2.png\ngröße.png", encoding="utf-8")
    assert ImageFolder(tmp_path, split="train").files == ["#1.png", "2.png", "größe.png"][::2]
    (tmp_path / "latin.txt").write_bytes("größe.png\n".encode("latin-1"))
    assert len(read_list(tmp_path / "latin.txt")) == 1


def test_every_reader_that_makes_splits_follows_lists(tmp_path):
    write_clevrtex(tmp_path / "tex", 4)
    write_dump(tmp_path / "movi", "slot_diffusion", range(4), 1)
    for root, train, val in (("tex", ["CLEVRTEX_full_000000", "CLEVRTEX_full_000002"], ["CLEVRTEX_full_000001"]), ("movi", ["00000000", "00000003"], ["00000001"])):
        for name, lines in (("train", train), ("val", val)): (tmp_path / root / f"{name}.txt").write_text("\n".join(lines))
    for reader in (lambda s: ClevrTex(tmp_path / "tex", split=s), lambda s: MoviDump(tmp_path / "movi", split=s, max_objects=9)):
        assert [len(reader(s)) for s in ("train", "val")] == [2, 1]


# -- the lists of VOC -------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc_lists_in_other_spellings(tmp_path):
    voc = write_voc(tmp_path, "original")
    file = voc / "ImageSets/Segmentation/val.txt"
    names = file.read_text().split()
    for write in ("{}.jpg", "JPEGImages/{}.jpg", "/home/ada/VOC2012/JPEGImages/{}.jpg", "{}  1", "{} -1\r"):
        file.write_bytes(("# of 2012\r\n\r\n" + "\n".join(write.format(name) for name in names)).encode("utf-8-sig"))
        assert VocScenes(voc, 24).index == names and VocScenes(voc, 24).check() == len(names)
    file.write_text("\n".join([*names, "2007_000000"]))
    with pytest.raises(ValueError, match="val.txt names are not there: 2007_000000"): VocScenes(voc, 24)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="val.txt"): VocScenes(voc, 24)


# -- several frames in a file -----------------------------------------------------------------------------------------

def film(path, colours=("red", "blue", "green"), **options):
    frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("suffix", ["gif", "tiff", "TIF", "webp"])
def test_of_several_frames_the_first_is_read_and_the_line_says_so(tmp_path, suffix, capsys):
    film(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"b.{suffix}")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "c.png")
    data = ImageFolder(tmp_path, 16)
    for i in range(3): torch.testing.assert_close(data[i]["image"], data[2]["image"], atol=0.02, rtol=0)
    assert len(data) == 3
    assert f"several frames in 1 of 2 .{suffix.lower()}: the first is read" in data.taken
    validate_dataset(data)
    assert "the first is read" in capsys.readouterr().out


def test_files_of_one_frame_are_not_spoken_of(tmp_path):
    for suffix in ("gif", "tiff", "webp"): Image.new("RGB", (16, 16)).save(tmp_path / f"a.{suffix}")
    (tmp_path / "b.gif").write_bytes(b"GIF89a")  # damaged: named by check()
    assert "frames" not in ImageFolder(tmp_path, 16).taken


def test_class_folders_take_the_first_frame_too(tmp_path):
    (tmp_path / "cats").mkdir()
    film(tmp_path / "cats" / "a.gif")
    assert class_folders(tmp_path, n_per_class=-1, size=16)["image"][0, :, 8, 8].tolist() == [1, -1, -1]


@pytest.mark.parametrize("train, val", [("training", "validate"), ("train", "holdout"), ("traindata", "valdata"), ("trn", "evalset")])
def test_folders_of_splits_in_other_words(tmp_path, train, val):
    pictures(tmp_path / train, [f"{i}.png" for i in range(6)])
    pictures(tmp_path / val, [f"{i}.png" for i in range(2)])
    taken = {split: open_dataset(str(tmp_path), split=split, size=8) for split in ("train", "val")}
    assert {split: len(data) for split, data in taken.items()} == {"train": 6, "val": 2} and "hash" not in taken["train"].taken
