"What people feed in as masks: label maps of all kinds, annotations that belong to other pixels, HDF5 files with everything in them"
import io
import json
import warnings

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import draw, write_clevrtex, write_coco, write_dump, write_scenes, write_voc

from decomp_nb.data.arrays import H5Images, NpzImages, npz_array
from decomp_nb.data.catalog import detect_format, open_dataset, validate_dataset
from decomp_nb.data.clevrtex import ClevrTex
from decomp_nb.data.hdf5 import H5Photos
from decomp_nb.data.movi import MoviDump
from decomp_nb.data.natural import CocoScenes, VocScenes
from decomp_nb.data.scene_item import read_labels, relabel, scene_item
from decomp_nb.data.scenes_h5 import H5Scenes


def edit(path, change):
    with h5py.File(path, "r+") as f: change(f)
    return path


def replace(f, key, values):
    del f[key]
    f[key] = values


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- row 6: annotations that belong to other pixels -------------------------------------------------------------------

BOX = (8, 4, 30, 14)  # left, top, right, bottom of a white box in a black picture of 64×40 (width×height)


def coco_of_boxes(folder, size=(64, 40), orientation=None, annotated=None, as_runs=False):
    "One picture with a white box, stored as `size` with an EXIF note; its polygon counts the pixels of `annotated`"
    write_coco(folder)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = BOX
    pixels[top:bottom, left:right] = 255
    exif = Image.Exif()
    if orientation: exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "images/val2017/000000000003.jpg", exif=exif, quality=100)
    polygon = [left, top, right, top, right, bottom, left, bottom]
    if annotated == "upright":  # turned by 90° clockwise: (x, y) → (h − y, x)
        polygon = np.stack([size[1] - np.array(polygon[1::2]), polygon[::2]], 1).flatten().tolist()
    w, h = size[::-1] if annotated == "upright" else size

    def change(content):
        content["images"] = [dict(id=3, file_name="000000000003.jpg", width=w, height=h)]
        content["annotations"] = [dict(id=1, image_id=3, iscrowd=0, category_id=1, segmentation=[polygon])]
    edit_json(folder / "annotations/instances_val2017.json", change)
    return folder


def overlap(item):
    white, mask = item["image"].mean(0) > 0, item["masks"] > 0
    return float((white & mask).sum() / (white | mask).sum())


@pytest.mark.parametrize("orientation, annotated", [(None, "stored"), (6, "stored"), (6, "upright")])
def test_the_mask_fits_whichever_way_the_picture_lay_when_it_was_annotated(tmp_path, orientation, annotated):
    item = CocoScenes(coco_of_boxes(tmp_path, orientation=orientation, annotated=annotated), 40)[0]
    assert overlap(item) > 0.9


@pytest.mark.parametrize("orientation, size, sized", [(3, (64, 40), True), (2, (64, 40), True), (6, (40, 40), True), (8, (64, 40), False)], ids=["on its head", "mirrored", "square", "no size"])
def test_where_the_size_does_not_tell_how_a_picture_lay_a_warning_names_it(tmp_path, orientation, size, sized):
    coco_of_boxes(tmp_path, size=size, orientation=orientation)
    if not sized: edit_json(tmp_path / "annotations/instances_val2017.json", lambda c: [c["images"][0].pop(key) for key in ("width", "height")])
    with pytest.warns(UserWarning, match="000000000003.jpg says that it is to be turned.*taken as stored; save it without the note"): item = CocoScenes(tmp_path, 40)[0]
    assert overlap(item) > 0.9


@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_where_the_size_tells_nothing_is_said(tmp_path, orientation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoScenes(coco_of_boxes(tmp_path, orientation=orientation), 40)[0]


def test_pictures_that_were_resized_beside_their_polygons_are_named(tmp_path):
    coco_of_boxes(tmp_path)
    file = tmp_path / "images/val2017/000000000003.jpg"
    Image.open(file).resize((32, 20)).save(file)
    with pytest.raises(ValueError, match="000000000003.jpg is 20×32, but its annotation is for 40×64"): validate_dataset(CocoScenes(tmp_path, 20))
    edit_json(tmp_path / "annotations/instances_val2017.json", lambda c: [c["images"][0].pop(key) for key in ("width", "height")])
    Image.open(file).resize((16, 10)).save(file)
    with pytest.raises(ValueError, match="000000000003.jpg.*annotation 1: a polygon leaves the picture"): CocoScenes(tmp_path, 8)[0]


def test_run_lengths_of_a_turned_picture_are_refused(tmp_path):
    coco_of_boxes(tmp_path)
    runs = dict(size=[64, 40], counts=[64 * 40])
    edit_json(tmp_path / "annotations/instances_val2017.json", lambda c: c["annotations"][0].update(segmentation=runs))
    with pytest.raises(ValueError, match="annotation 1: its run lengths are for 64×40, the picture is 40×64"): CocoScenes(tmp_path, 20)[0]


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc_and_clevrtex_pictures_with_a_note_lie_as_their_label_maps_do(tmp_path):
    voc = write_voc(tmp_path / "voc", "original")
    file = next((voc / "JPEGImages").glob("*.jpg"))
    plain = VocScenes(voc, 24)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).save(file, exif=exif, quality=95)
    turned = VocScenes(voc, 24)[0]
    assert (plain["image"] - turned["image"]).abs().mean() < 0.1 and plain["masks"].equal(turned["masks"])
    write_clevrtex(tmp_path / "tex", 1)
    picture = next((tmp_path / "tex").rglob("*_000000.png"))
    whole = ClevrTex(tmp_path / "tex")[0]["image"]
    Image.open(picture).save(picture, exif=exif)
    assert ClevrTex(tmp_path / "tex")[0]["image"].equal(whole)
    Image.open(picture).resize((100, 100)).save(picture)
    with pytest.raises(ValueError, match="_000000.png is 100×100, but its annotation is for 240×320"): ClevrTex(tmp_path / "tex")[0]


# -- row 7: label maps ------------------------------------------------------------------------------------------------

NAMES = np.array([0, 4, 9, 200, 201], np.uint8)  # what objects 0, 1, 2 … are called in the files


def test_labels_of_hdf5_are_names(tmp_path):
    plain = H5Scenes(write_scenes(tmp_path / "a.h5"))
    for drop in (["visibility", "color", "pixel_coords"], ["color", "pixel_coords"]):
        def change(f, drop=drop):
            replace(f, "mask", NAMES[f["mask"][:]])
            for key in drop: del f[key]
        named = H5Scenes(edit(write_scenes(tmp_path / f"{len(drop)}.h5"), change))
        assert all(a["masks"].equal(b["masks"]) for a, b in zip(plain, named))
        assert [int(item["labels"]["visibility"].sum()) for item in named] == [2, 3, 4] * 4
    file = edit(write_scenes(tmp_path / "rows.h5"), lambda f: replace(f, "mask", NAMES[f["mask"][:]]))
    with pytest.raises(ValueError, match=r"rows.h5: 'mask'\[0\] has the labels \[4, 9\], but 'visibility' has 5 rows"): H5Scenes(file)[0]


def test_more_names_than_objects_are_refused(tmp_path):
    def change(f):
        replace(f, "mask", (np.arange(48 * 48).reshape(48, 48) % 99)[None, ..., None].repeat(12, 0))
        for key in ("visibility", "color", "pixel_coords"): del f[key]
    with pytest.raises(ValueError, match="2 objects are listed"): H5Scenes(edit(write_scenes(tmp_path / "a.h5"), change))[0]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_negative_labels_are_void_and_no_object(tmp_path, dtype):
    def change(f):
        mask = f["mask"][:].astype(dtype)
        mask[:, :6] = -1
        replace(f, "mask", mask)
    plain, signed = H5Scenes(write_scenes(tmp_path / "a.h5")), H5Scenes(edit(write_scenes(tmp_path / "b.h5"), change))
    for a, b in zip(plain, signed):
        assert b["ignore"][:6].all() and not b["ignore"][6:].any() and b["masks"][6:].equal(a["masks"][6:]) and not b["masks"][:6].any()
    assert torch.utils.data.default_collate([signed[0], signed[1]])["ignore"].dtype == torch.bool
    clean = H5Scenes(edit(write_scenes(tmp_path / "c.h5"), lambda f: replace(f, "mask", f["mask"][:].astype(dtype))))
    assert not clean[0]["ignore"].any()  # every item of a signed file has it, so that they stack


def test_void_in_scene_item():
    image, mask = np.zeros((8, 8, 3), np.uint8), np.kron([[-1, 1], [2, 0]], np.ones((4, 4), int))
    item = scene_item(image, mask, [1, 2], {}, size=4, max_objects=2)
    assert item["masks"].tolist()[0] == [0, 0, 1, 1] and item["ignore"].tolist()[0] == [True, True, False, False]
    assert relabel(mask, [2]).max() == 1 and (relabel(mask, [2]) > 0).sum() == 16


@pytest.mark.parametrize("frames", ["single", "clip"])
def test_two_valued_masks_show_one_object(tmp_path, frames):
    root = write_dump(tmp_path / "dump", "slot_diffusion", range(3), 2)
    for file in root.rglob("*_mask.png"): Image.fromarray((np.array(Image.open(file)) > 0).astype(np.uint8) * 255).save(file)
    item = MoviDump(root, 48, max_objects=3, frames=frames)[0]
    assert item["labels"]["visibility"].tolist() == [1, 0, 0] and item["masks"].unique().tolist() == [0, 1]


def test_names_in_a_dump_keep_their_number_through_a_clip(tmp_path):
    root = write_dump(tmp_path / "dump", "slot_diffusion", range(1), 2)
    for t, labels in enumerate(([0, 40, 90], [0, 90, 90])):
        Image.fromarray(np.kron(np.uint8([labels]), np.ones((48, 16), np.uint8))).save(root / f"00000000/{t:06d}_mask.png")
    masks = MoviDump(root, 48, max_objects=3, frames="clip")[0]["masks"]
    assert masks[0, 0, ::16].tolist() == [0, 1, 2] and masks[1, 0, ::16].tolist() == [0, 2, 2]


def test_labels_that_a_table_does_not_list_are_named(tmp_path):
    root = write_dump(tmp_path / "movi-a", "lsd", range(1), 1)
    file = root / "labels/00000000/00000000_segment.png"
    Image.fromarray(NAMES[np.array(Image.open(file))]).save(file)
    with pytest.raises(ValueError, match=r"00000000_segment.png has labels \[4, 9\], but the objects listed beside it are \[1, 2\]"): MoviDump(root)[0]


@pytest.mark.parametrize("shift", [0, 1], ids=["from 1", "from 0"])
def test_clevrtex_counts_from_one_or_from_zero(tmp_path, shift):
    root = write_clevrtex(tmp_path, 3)
    for file in root.rglob("*.json"): edit_json(file, lambda c: [o.update(index=o["index"] // 3 - shift) for o in c["objects"]])
    for file in root.rglob("*_flat.png"): Image.fromarray(np.array(Image.open(file)) // 3).save(file)
    assert [int(item["labels"]["visibility"].sum()) for item in ClevrTex(root)] == [2, 3, 4]
    for file in root.rglob("*_flat.png"): Image.fromarray(np.array(Image.open(file)) + np.uint8(7)).save(file)
    with pytest.raises(ValueError, match="CLEVRTEX_full_000000.png has labels"): ClevrTex(root)[0]


@pytest.mark.parametrize("reader", ["hdf5", "movi"])
def test_visibility_that_is_nan_is_named(tmp_path, reader):
    if reader == "hdf5":
        file = edit(write_scenes(tmp_path / "a.h5"), lambda f: f["visibility"].write_direct(np.full((12, 5), np.nan, np.float32)))
        with pytest.raises(ValueError, match=r"a.h5: 'visibility' is NaN at \[0, 0\]"): H5Scenes(file)
    else:
        root = write_dump(tmp_path / "movi-a", "lsd", range(1), 1)
        edit_json(root / "labels/00000000/00000000_instances.json", lambda c: c.update(visibility=[1.0, float("nan")]))
        with pytest.raises(ValueError, match="00000000_instances.json.*visibility of object 1 is NaN"): MoviDump(root)[0]


def test_validation_refuses_masks_that_show_no_object(tmp_path):
    file = edit(write_scenes(tmp_path / "a.h5"), lambda f: replace(f, "mask", np.zeros((12, 48, 48, 1), np.uint8)))
    with pytest.raises(ValueError, match="a.h5.*show no object in 12 items"): validate_dataset(H5Scenes(file))
    one = np.zeros((12, 48, 48, 1), np.uint8)
    one[5, 10:20, 10:20] = 1
    validate_dataset(H5Scenes(edit(file, lambda f: replace(f, "mask", one))))  # a few empty pictures are fine


# -- row 15: HDF5 contents --------------------------------------------------------------------------------------------

def test_what_is_no_factor_is_left_alone(tmp_path):
    def change(f):
        f.create_group("meta")["notes"] = np.zeros(3)
        f["asset"] = np.array([["cube"] * 5] * 12, dtype=h5py.string_dtype())
        f["pose"] = np.zeros((12, 5), dtype=[("x", "f4"), ("y", "f4")])
        f["gone"], f["away"] = h5py.SoftLink("/nowhere"), h5py.ExternalLink("missing.h5", "/x")
        f["nothing"], f["type"] = h5py.Empty("f4"), np.dtype("f4")
    data = H5Scenes(edit(write_scenes(tmp_path / "a.h5"), change))
    assert set(data[0]["labels"]) == {"visibility", "color", "pixel_coords"} and len(data) == 12
    with pytest.raises(ValueError, match="a.h5: 'meta' is a group of notes"): H5Scenes(tmp_path / "a.h5", extras=["meta"])[0]
    with pytest.raises(ValueError, match="a.h5.*'gone'"): H5Scenes(tmp_path / "a.h5", extras=["gone"])[0]


BAD = {
    "image": [("group", "is a group"), ("text", "holds"), ("compound", "holds"), ("link", "leads nowhere|no dataset"), ("empty", "holds nothing")],
    "mask": [("group", "is a group"), ("text", "holds"), ("compound", "holds"), ("halves", "no whole numbers"), ("nan", "no whole numbers")],
    "visibility": [("group", "is a group"), ("text", "holds"), ("scalar", "visibility"), ("short", "a.h5")],
    "num_actual_objects": [("group", "is a group"), ("short", "num_actual_objects"), ("negative", "num_actual_objects")],
    "split": [("group", "is a group"), ("floats", "split"), ("beyond", "a.h5")],
}


@pytest.mark.parametrize("key, how, match", [(key, how, match) for key, cases in BAD.items() for how, match in cases])
def test_what_stands_in_a_needed_place_is_named(tmp_path, key, how, match):
    def change(f):
        if key in f: del f[key]
        if key == "num_actual_objects": del f["visibility"], f["color"], f["pixel_coords"]
        if key == "split": f.attrs["split_names"] = '["train"]'
        if how == "group": f.create_group(key)
        else:
            f[key] = dict(text=np.array(["a"] * 12, dtype=h5py.string_dtype()), compound=np.zeros((12, 48, 48, 1), dtype=[("x", "f4")]),
                          link=h5py.SoftLink("/nowhere"), empty=h5py.Empty("u1"), halves=np.full((12, 48, 48, 1), 0.5), nan=np.full((12, 48, 48, 1), np.nan),
                          scalar=np.float32(1), short=np.ones((3, 5)), negative=np.full(12, -3), floats=np.full(12, 0.5), beyond=np.full(12, 7))[how]
    file = edit(write_scenes(tmp_path / "a.h5"), change)
    with pytest.raises(ValueError, match=match) as error: open_dataset(file, split="all", kind="h5_scenes").check()
    assert "a.h5" in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.uint64])
def test_masks_of_whole_numbers_are_read_whatever_their_type(tmp_path, dtype):
    plain = H5Scenes(write_scenes(tmp_path / "a.h5"))
    other = H5Scenes(edit(write_scenes(tmp_path / "b.h5"), lambda f: replace(f, "mask", f["mask"][:].astype(dtype))))
    assert all(a["masks"].equal(b["masks"]) for a, b in zip(plain, other))


def test_bool_masks_show_one_object(tmp_path):
    def change(f):
        replace(f, "mask", f["mask"][:] > 0)
        for key in ("visibility", "color", "pixel_coords"): del f[key]
    assert H5Scenes(edit(write_scenes(tmp_path / "a.h5"), change))[0]["masks"].unique().tolist() == [0, 1]


def test_a_file_that_is_still_written_is_not_called_damaged(tmp_path):
    write_scenes(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+"):
        try: opened = open_dataset(tmp_path / "a.h5", split="all")
        except ValueError as error: assert "a.h5" in str(error) and "writing" in str(error) and "download" not in str(error)
        else: assert opened.check() == 12
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    H5_STATUS = 11  # of a version 2 or 3 superblock: bit 0 says that somebody writes
    with h5py.File(tmp_path / "c.h5", "w", libver="latest") as f: f["image"] = np.zeros((5, 8, 8, 3), np.uint8)
    data = bytearray((tmp_path / "c.h5").read_bytes())
    data[H5_STATUS] |= 1
    (tmp_path / "c.h5").write_bytes(data)
    with pytest.raises(ValueError, match="c.h5") as error: open_dataset(tmp_path / "c.h5")
    assert "download" not in str(error.value) or "checksum" in str(error.value).lower()


def test_other_hdf5_readers_name_file_and_key(tmp_path):
    with h5py.File(tmp_path / "photos.h5", "w") as f: f.create_group("jpeg")
    with pytest.raises(ValueError, match="photos.h5: 'jpeg' is a group"): H5Photos(tmp_path / "photos.h5")
    with h5py.File(tmp_path / "texts.h5", "w") as f: f["jpeg"] = np.array(["no", "picture"], dtype=h5py.string_dtype())
    with pytest.raises(ValueError, match="texts.h5"): H5Photos(tmp_path / "texts.h5").check()
    with h5py.File(tmp_path / "shapes.h5", "w") as f: f.create_group("images"), f.create_group("labels")
    with pytest.raises(ValueError, match="shapes.h5: 'images' is a group"): open_dataset(tmp_path / "shapes.h5")
    with pytest.raises(ValueError, match="shapes.h5: 'images' is a group"): H5Images(tmp_path / "shapes.h5", "images")


def test_archives_name_their_file(tmp_path):
    np.savez(tmp_path / "objects.npz", imgs=np.array([None, {}], dtype=object))
    np.savez(tmp_path / "fortran.npz", imgs=np.asfortranarray(np.zeros((3, 4, 5), np.uint8)))
    for name in ("objects", "fortran"):
        with pytest.raises(ValueError, match=f"{name}.npz"): NpzImages(tmp_path / f"{name}.npz", "imgs")
    with pytest.raises(ValueError, match="objects.npz"): npz_array(tmp_path / "objects.npz", "imgs")  # nothing is unpickled


# -- row 20: formats --------------------------------------------------------------------------------------------------

def test_coco_as_it_is_unpacked(tmp_path):
    coco = write_coco(tmp_path)
    expected = CocoScenes(coco, 24)[0]
    for split in ("train", "val"): (coco / f"images/{split}2017").rename(coco / f"{split}2017")
    (coco / "images").rmdir()
    assert detect_format(coco) == "coco"
    found = open_dataset(coco, split="val", size=24)
    assert found[0]["image"].equal(expected["image"]) and len(found) == 2 and found.taken.startswith("2 of 2 pictures")
    (coco / "val2017").rename(coco / "elsewhere")
    with pytest.raises(FileNotFoundError, match="neither .*images/val2017 nor .*val2017"): open_dataset(coco, split="val")


@pytest.mark.parametrize("change, match", [
    (lambda c: c["annotations"][0].update(category_id=7), "000000000003.jpg, annotation 1: category_id 7 is not in 'categories'"),
    (lambda c: c["annotations"][0].pop("category_id"), "category_id"),
    (lambda c: c["images"][0].pop("id"), "'id'"),
    (lambda c: c["images"][0].pop("file_name"), "file_name"),
    (lambda c: c.update(images="none"), "instances_val2017.json"),
    (lambda c: c.update(categories=[{"id": 1}]), "'name'"),
    (lambda c: c["annotations"][0].update(segmentation=[["a"] * 6]), "annotation 1"),
    (lambda c: c["annotations"][0].update(segmentation=7), "annotation 1"),
])
def test_entries_of_coco_that_do_not_fit_are_named(tmp_path, change, match):
    coco = write_coco(tmp_path)
    edit_json(coco / "annotations/instances_val2017.json", change)
    with pytest.raises(ValueError, match=match) as error: CocoScenes(coco, 20).check()
    assert "instances_val2017.json" in str(error.value) or "000000000003.jpg" in str(error.value)


def test_label_maps_that_are_damaged_or_colour_are_named(tmp_path):
    Image.fromarray(draw(0)["image"]).save(tmp_path / "colour.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "colour.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("colour", "cut", "text"):
        with pytest.raises(ValueError, match=f"{name}.png"): read_labels(tmp_path / f"{name}.png")
    sixteen = np.array([[0, 300], [60000, 1]], np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    assert (read_labels(tmp_path / "sixteen.png") == sixteen).all()


# -- label maps and the tables beside them ----------------------------------------------------------------------------

def test_objects_that_the_json_of_clevrtex_does_not_list_are_named(tmp_path):
    root = write_clevrtex(tmp_path, 2)
    edit_json(next(root.rglob("*_000000.json")), lambda c: c["objects"].pop())
    with pytest.raises(ValueError, match=r"CLEVRTEX_full_000000.png has labels \[3\], but the objects listed beside it are \[6\]"): ClevrTex(root)[0]
    assert ClevrTex(root)[1]["masks"].max() == 3


@pytest.mark.parametrize("index, match", [(lambda i: i - 1, "stand the labels|two have|has labels"), (lambda i: i + 1, r"objects \[2, 3, 4\] stand the labels \[1, 2, 3\]|has labels"), (lambda i: 1, "two have the same index")])
def test_indices_of_clevrtex_that_are_off_by_one_are_named(tmp_path, index, match):
    root = write_clevrtex(tmp_path, 2)
    for file in root.rglob("*.json"): edit_json(file, lambda c: [o.update(index=index(o["index"] // 3)) for o in c["objects"]])
    for file in root.rglob("*_flat.png"):
        labels = np.array(Image.open(file)) // 3
        Image.fromarray(labels if index(2) != 1 else np.maximum(labels, 1) - 1).save(file)  # the first object became background
    with pytest.raises(ValueError, match=f"CLEVRTEX_full_00000[01].png.*({match})"): ClevrTex(root).check()


def test_objects_of_hdf5_that_are_said_not_to_be_there_are_named(tmp_path):
    file = edit(write_scenes(tmp_path / "a.h5"), lambda f: f["visibility"].write_direct(np.array([[1.0, 1, 0, 0, 0]] * 12, np.float32)))
    with pytest.warns(UserWarning, match=r"a.h5: 'mask' shows objects whose 'visibility' is 0: they are taken as background"): assert H5Scenes(file)[0]["masks"].max() == 1
    shifted = edit(write_scenes(tmp_path / "b.h5"), lambda f: replace(f, "mask", f["mask"][:] + 1))
    with pytest.warns(UserWarning, match="b.h5.*are the labels its rows, counted from 0"): H5Scenes(shifted)[0]


@pytest.mark.parametrize("count, match", [(0, "if label 0 is an object, store all labels one higher"), (5, "expected is 1…4, so that one of its 5 rows"), (-1, "n_background=-1"), (1.5, "n_background=1.5")])
@pytest.mark.parametrize("given", [True, False])
def test_a_background_of_no_rows_or_of_all_is_refused(tmp_path, count, match, given):
    file = edit(write_scenes(tmp_path / "a.h5"), lambda f: f.attrs.update({} if given else {"n_background": count}))
    with pytest.raises(ValueError, match=f"a.h5: n_background={count}.*{match}|{match}"): H5Scenes(file, **{"n_background": count} if given else {})


@pytest.mark.parametrize("n_background", [1, 2, 3])
def test_several_rows_of_background_are_left_out(tmp_path, n_background):
    item = H5Scenes(write_scenes(tmp_path / "a.h5"), n_background=n_background)[2]  # four objects
    assert item["labels"]["visibility"].tolist() == [1] * (5 - n_background) == [1] * len(item["labels"]["color"]) and item["masks"].max() == 5 - n_background


@pytest.mark.parametrize("key, values, reader", [
    ("color", np.zeros((11, 5), np.uint8), "h5_scenes"), ("pixel_coords", np.zeros((13, 5, 3)), "h5_scenes"), ("visibility", np.ones((13, 5)), "h5_scenes"), ("split", np.array([b"train"] * 13), "h5_scenes"), ("split", np.array([b"train"] * 11), "h5_scenes"),
    ("camera", np.zeros((11, 3)), "h5_scenes"), ("split", np.array([b"train"] * 3), "h5_photos"), ("name", np.array([b"a"] * 5), "h5_photos"), ("clip", np.array([b"a"] * 3), "h5_photos"), ("frame", np.arange(5), "h5_photos"), ("label", np.zeros(5, int), "h5_photos"),
    ("clip", np.array([b"a"] * 3), "video"), ("frame", np.arange(5), "video"), ("subject", np.array([b"a"] * 5), "h5_photos"),
])
def test_rows_of_hdf5_that_are_more_or_fewer_than_pictures_are_named(tmp_path, key, values, reader):
    if reader == "h5_scenes":
        file = edit(write_scenes(tmp_path / "a.h5"), lambda f: replace(f, key, values) if key in f else f.update({key: values}) if hasattr(f, "update") else f.create_dataset(key, data=values))
    else: file = photos(tmp_path / "a.h5", **{key: values})
    options = {"extras": ["camera"]} if key == "camera" else {"n_frames": 2} if reader == "video" else {}
    with pytest.raises(ValueError, match=f"a.h5: '{key}' is .*, but there are {12 if reader == 'h5_scenes' else 4} pictures"): open_dataset(file, split="all", kind=reader, **options)


def photos(path, **more):
    "Four JPEGs of two clips"
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    columns = {"clip": np.array([b"a", b"a", b"b", b"b"]), "frame": np.array([0, 1, 0, 1]), **more}
    with h5py.File(path, "w") as f:
        jpeg = f.create_dataset("jpeg", (4,), h5py.vlen_dtype(np.uint8))
        for i in range(4): jpeg[i] = data
        for key, values in columns.items(): f[key] = values
        f.attrs["classes"] = '["cat", "dog"]'
    return path


@pytest.mark.parametrize("code", [-1, 2, 200])
def test_classes_without_a_name_are_refused(tmp_path, code):
    file = photos(tmp_path / "photos.h5", label=np.array([0, 1, code, 0]))
    with pytest.raises(ValueError, match="photos.h5: 'label' holds .*but 'classes' names 0…1"): H5Photos(file)
    def change(f):
        values = f["color"][:].astype(int)
        values[1, 2], values[0, 4] = code if code != 2 else 5, 77  # row 4 of the first scene is not there
        replace(f, "color", values)
    data = H5Scenes(edit(write_scenes(tmp_path / "a.h5"), change))
    assert data[0]["labels"]["color"][2:].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"a.h5: a/000001: 'color' holds class -?\d+, but there are names for 0…4"): data[1]
    with pytest.raises(ValueError, match="a/000001: 'color' holds class"): validate_dataset(data)


def test_edits_know_one_row_of_background_only(tmp_path):
    from test_data import write_edits
    file = write_edits(tmp_path / "edits.h5")
    open_dataset(file, split="all").check()
    with pytest.raises(ValueError, match="edits.h5: n_background=2"): open_dataset(edit(file, lambda f: f.attrs.update(n_background=2)), split="all")


# -- entries of COCO and VOC that mean something else -----------------------------------------------------------------

def coco_item(folder): return CocoScenes(folder, 40)[0]


@pytest.mark.parametrize("change", [
    lambda c: [a.update(image_id=str(a["image_id"])) for a in c["annotations"]], lambda c: [p.update(id=str(p["id"])) for p in c["images"]], lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]],
    lambda c: [a.update(iscrowd=bool(a["iscrowd"])) for a in c["annotations"]], lambda c: [a.update(category_id=str(a["category_id"])) for a in c["annotations"]], lambda c: [p.update(width=str(p["width"]), height=float(p["height"])) for p in c["images"]],
    lambda c: [a.pop("iscrowd") for a in c["annotations"] if not a["iscrowd"]],
], ids=["image_id", "id", "iscrowd", "bool", "category_id", "sizes", "none"])
def test_numbers_of_coco_that_are_texts_mean_the_same(tmp_path, change):
    plain = CocoScenes(write_coco(tmp_path / "a"), 40)[0]
    edit_json(write_coco(tmp_path / "b") / "annotations/instances_val2017.json", change)
    other = CocoScenes(tmp_path / "b", 40)[0]
    assert plain["masks"].equal(other["masks"]) and plain["ignore"].equal(other["ignore"]) and plain["labels"]["class"].equal(other["labels"]["class"]) and other["masks"].max() == 2


@pytest.mark.parametrize("change, match", [
    (lambda c: c["annotations"][0].update(segmentation=[[0.3, 0.25, 0.6, 0.25, 0.6, 0.75]]), "annotation 1: a polygon lies between 0.25 and 0.75, in shares of the sides: multiply x by 64 and y by 40"),
    (lambda c: c["annotations"][0].update(segmentation=[[3, float("nan"), 9, 9, 20, 30]]), "annotation 1: a polygon holds NaN"), (lambda c: c["annotations"][0].update(iscrowd="no"), "iscrowd is 'no', expected is 0 or 1"),
    (lambda c: [a.update(image_id="000000000003.jpg") for a in c["annotations"]], "all annotations have an image_id, such as '000000000003.jpg', that no picture has"), (lambda c: c["images"].append(dict(c["images"][0])), "two pictures have the id 5"),
], ids=["shares", "nan", "iscrowd", "no picture", "twice"])
def test_entries_of_coco_that_mean_nothing_are_refused(tmp_path, change, match):
    coco = write_coco(tmp_path)
    edit_json(coco / "annotations/instances_val2017.json", change)
    with pytest.raises(ValueError, match=match) as error: CocoScenes(coco, 20).check()
    assert "instances_val2017.json" in str(error.value)


def test_annotations_of_pictures_that_are_not_listed_are_counted(tmp_path):
    coco = write_coco(tmp_path)
    edit_json(coco / "annotations/instances_val2017.json", lambda c: c["annotations"].append(dict(c["annotations"][0], id=9, image_id=77)))
    with pytest.warns(UserWarning, match="1 annotations belong to 1 pictures that 'images' does not list, such as image_id '77'"): assert CocoScenes(coco, 20).check() == 2


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("change, match", [
    (lambda c, o: (np.roll(c, 9, 0), o), "of object 1, .* are background in the class map.*contradict"), (lambda c, o: (np.where(c == 7, 0, c), o), "of object 2"), (lambda c, o: (c, np.where(o == 2, 0, o)), "pixels have a class but no object"),
    (lambda c, o: (np.where(o == 1, 1 + np.arange(50)[:, None] % 4, c), o), "no class has half of them"),
], ids=["shifted", "no class", "no object", "several classes"])
def test_maps_of_voc_that_contradict_each_other_are_named(tmp_path, change, match):
    from small_data import save_palette
    voc = write_voc(tmp_path, "original")
    files = [voc / kind / "2007_000001.png" for kind in ("SegmentationClass", "SegmentationObject")]
    VocScenes(voc, 24).check()
    maps = [np.array(Image.open(file)) for file in files]
    for file, values in zip(files, change(*maps)): save_palette(values.astype(np.uint8), file)
    with pytest.raises(ValueError, match=f"2007_000001: .*{match}"): VocScenes(voc, 24).check()


# -- further finds ----------------------------------------------------------------------------------------------------

def test_label_maps_stored_as_jpeg_are_refused_and_grey_ones_in_three_channels_read(tmp_path):
    labels = np.kron(np.arange(4, dtype=np.uint8).reshape(2, 2), np.ones((8, 8), np.uint8))
    Image.fromarray(labels).save(tmp_path / "a.png", "JPEG")
    with pytest.raises(ValueError, match="a.png: it is a JPEG, which invents labels"): read_labels(tmp_path / "a.png")
    for alpha in (3, 4):
        Image.fromarray(np.stack([labels, labels, labels, labels * 0 + 255][:alpha], -1)).save(tmp_path / "b.png")
        assert (read_labels(tmp_path / "b.png") == labels).all()


def test_pictures_of_three_pixels_are_axes_in_another_order(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f: f["image"] = np.zeros((4, 24, 24, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="a.h5: 'image' .* are pictures of 24×3: its axes stand in another order"): H5Scenes(tmp_path / "a.h5")


@pytest.mark.parametrize("row, ok", [(1, False), (4, True)], ids=["there", "not there"])
def test_labels_that_are_nan_are_found_before_training(tmp_path, row, ok):
    def change(f):
        places = f["pixel_coords"][:]
        places[0, row] = np.nan
        f["pixel_coords"][...] = places
    data = H5Scenes(edit(write_scenes(tmp_path / "a.h5"), change))
    if ok: return validate_dataset(data)
    with pytest.raises(ValueError, match="label 'pixel_coords' of .*a.h5.* holds NaN"): validate_dataset(data)
