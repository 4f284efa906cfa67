"COCO and VOC readers on small trees in the true layout, written here from the published formats."
import json

import numpy as np
import pytest
import torch
from small_data import packed, runs_of, write_coco, write_voc

from decomp_nb.data import outlines
from decomp_nb.data.catalog import detect_format, open_dataset, validate_dataset
from decomp_nb.data.natural import CocoScenes, VocScenes


@pytest.fixture
def coco(tmp_path): return write_coco(tmp_path)


def test_coco_instances_classes_overlap_and_crowd(coco):
    data = CocoScenes(coco, 40)
    assert len(data) == 2 and len(CocoScenes(coco, 40, split="train")) == 1 and data.check() == 2
    item = data[0]
    assert item["image_id"] == "000000000003" and item["labels"]["class"].tolist() == [2, 1]  # category 90 is the second of two
    masks, classes, ignore = (item[k] for k in ("masks", "class_masks", "ignore"))
    left = 12  # the square's place: 40 of 64 columns
    assert masks[20, 22 - left] == 1 and masks[20, 42 - left] == 2 and masks[20, 34 - left] == 2  # the later instance covers the earlier
    assert classes[20, 22 - left] == 2 and classes[20, 42 - left] == 1
    assert ignore[20, 34 - left] and not ignore[20, 22 - left]  # two claims
    assert ignore[2, 51 - left] and not ignore[13, 24 - left]  # a crowd is ignored, but not where an instance stands
    assert masks.dtype == torch.int64 and ignore.dtype == torch.bool and item["image"].shape == (3, 40, 40)
    empty = data[1]
    assert empty["masks"].max() == 0 and empty["labels"]["visibility"].sum() == 0
    batch = torch.utils.data.default_collate([item, empty])
    assert batch["ignore"].shape == (2, 40, 40)


def test_an_instance_outside_the_square_is_not_visible(coco):
    file = coco / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [[0, 0, 6, 0, 6, 6, 0, 6]]
    file.write_text(json.dumps(content))
    assert CocoScenes(coco, 20)[0]["labels"]["visibility"].tolist() == [0, 1]


@pytest.mark.parametrize("change, complaint", [
    (lambda c: c.pop("categories"), "no categories"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), "three points"),
    (lambda c: c["annotations"][1]["segmentation"].update(counts=[5]), "cover 5 pixels"),
    (lambda c: c["annotations"][1]["segmentation"].update(counts="o"), "cut short"),
])
def test_damaged_annotations_are_named(coco, change, complaint):
    file = coco / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint): CocoScenes(coco, 20).check()


def test_missing_files_are_named(coco):
    (coco / "images/val2017/000000000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000000000003"): CocoScenes(coco, 20)[0]
    (coco / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(ValueError, match="instances_val2017"): CocoScenes(coco, 20)
    (coco / "annotations/instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances_val2017"): CocoScenes(coco, 20)
    with pytest.raises(ValueError, match="train"): CocoScenes(coco, 20, split="test")


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_come_back(seed):
    mask = np.random.default_rng(seed).random((13, 17)) < (0.1, 0.5, 0.9, 0.02)[seed]
    runs = runs_of(mask)
    assert outlines.unpack_runs(packed(runs)) == runs
    assert (outlines.mask_of_runs(runs, 13, 17) == mask).all()


def test_polygons_are_united_and_filled_to_the_pixel():
    mask = outlines.mask_of_polygons([[0, 0, 4, 0, 4, 3, 0, 3], [6, 1, 9, 1, 9, 5, 6, 5]], 6, 10)
    assert mask[:3, :4].all() and mask[1:5, 6:9].all() and mask.sum() == 12 + 12


def crosses(x, y, x0, y0, x1, y1) -> bool:
    "Whether a ray from (x, y) to the left meets an edge"
    return (y0 > y) != (y1 > y) and x > x0 + (y - y0) * (x1 - x0) / (y1 - y0)


@pytest.mark.parametrize("seed", range(4))
def test_a_pixel_belongs_to_a_polygon_if_its_centre_does(seed):
    corners = np.random.default_rng(seed).uniform(-3, 25, (7, 2)).round(1)  # crosses itself, and leaves the picture
    edges = np.c_[corners, np.roll(corners, -1, 0)]
    mask = outlines.mask_of_polygons([corners.ravel().tolist()], 20, 22)
    for row, column in np.ndindex(20, 22):
        odd = sum(crosses(column + 0.5, row + 0.5, *edge) for edge in edges) % 2
        assert mask[row, column] == odd, (row, column)


@pytest.fixture(params=["slot_diffusion", "original"])
def voc(tmp_path, request): return write_voc(tmp_path, request.param)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc_void_of_either_map_is_ignored(voc):
    data = VocScenes(voc, 30)
    item = data[0]
    top = 10
    assert item["masks"][15 - top, 6] == 1 and item["class_masks"][15 - top, 6] == 15 and item["labels"]["class"][:3].tolist() == [15, 7, 0]
    for row in (20, 21):  # void in the object map, void in the class map: background in both, and listed
        assert item["ignore"][row - top, 5:15].all() and item["masks"][row - top, 5:15].max() == item["class_masks"][row - top, 5:15].max() == 0
    assert item["ignore"].sum() == 20 and data.check() == 1 and item["labels"]["visibility"].sum() == 2


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc_training_list_has_classes_only(voc):
    train = VocScenes(voc, 30, split="train")
    assert train.split == "trainaug" and set(train[0]) == {"image", "class_masks", "ignore", "image_id"}
    torch.manual_seed(0)
    moved = VocScenes(voc, 30, split="train", flip=True, slide=True)
    seen = [moved[0] for _ in range(8)]
    assert len({tuple(x["class_masks"].flatten().tolist()) for x in seen}) > 3
    for x in seen: assert set(x["class_masks"].unique().tolist()) <= {0, 7, 15} and not (x["ignore"] & (x["class_masks"] > 0)).any()


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc_names_what_is_wrong(voc):
    with pytest.raises(ValueError, match="no list test.txt"): VocScenes(voc, 30, split="test")
    with pytest.raises(ValueError, match="max_objects"): VocScenes(voc, 30, max_objects=1)[0]
    (voc / "SegmentationObject/2007_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match="SegmentationObject"): VocScenes(voc, 30)[0]
    with pytest.raises(FileNotFoundError, match="no VOC folder"): VocScenes(voc / "SegmentationClass")


def check_catalog(folder, kind, **options):
    "The catalog recognises the folder, and opens it with the options of the recipes"
    assert detect_format(folder) == kind
    train, val = (open_dataset(folder, kind=kind, size=24, split=split, **options) for split in ("train", "val"))
    validate_dataset(train, image_size=24, batch_size=1)
    assert "class_masks" in train[0] and {"masks", "class_masks", "ignore"} <= set(val[0]) and type(open_dataset(folder, size=24)) is type(val)
    with pytest.raises(ValueError, match="Did you mean 'flip'"): open_dataset(folder, kind=kind, flipp=True)


def test_catalog_opens_coco(coco): check_catalog(coco, "coco", flip=True)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_catalog_opens_voc(voc): check_catalog(voc, "voc", flip=True, slide=True)
