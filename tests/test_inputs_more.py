"What a fresh reading found: twice annotated objects, grey classes called mask, exchanged files, odd numbers, types and records"
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_clevrtex, write_dump, write_scenes
from torch.utils.data import Subset

from decomp_nb.checks import as_labels, check_pictures
from decomp_nb.data.cache import cache_key
from decomp_nb.data.catalog import open_dataset
from decomp_nb.data.class_folders import class_folders
from decomp_nb.data.file_marks import files_mark, source_files
from decomp_nb.data.images import ImageFolder
from decomp_nb.data.natural import CocoScenes
from decomp_nb.data.video import VideoClips
from decomp_nb.decomposer import load_decomposer
from decomp_nb.factors import Factors, interpolate
from decomp_nb.metrics.segmentation import segmentation_scores
from decomp_nb.metrics.video_segmentation import frame_scores
from decomp_nb.training.agreement import data_differences, data_record
from decomp_nb.training.parameters import read_recipe


def noise(i=0, size=(24, 24, 3), levels=255): return Image.fromarray(np.random.default_rng(i).integers(0, levels, size, np.uint8))


def save(file, i=0, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(i, **options).save(file)
    return file


# -- COCO: objects and categories twice, objects without an outline ---------------------------------------------------

SQUARE, NEARLY, OTHER = [[2, 2, 12, 2, 12, 12, 2, 12]], [[2, 2, 12, 2, 12, 12.5, 2, 12]], [[14, 14, 20, 14, 20, 20]]
RUNS = {"counts": [50, 10, 516], "size": [24, 24]}


def coco(root, outlines, categories=((1, "cat"), (2, "dog")), kinds=None, **more):
    save(root / "val2017" / "1.jpg")
    kinds = kinds or [1] * len(outlines)
    notes = [{"id": i, "image_id": 1, "category_id": kind, "segmentation": outline, **more} for i, (outline, kind) in enumerate(zip(outlines, kinds))]
    content = {"images": [{"id": 1, "file_name": "1.jpg", "height": 24, "width": 24}], "annotations": notes, "categories": [{"id": i, "name": name} for i, name in categories]}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("twice", [(SQUARE, SQUARE), (SQUARE, NEARLY), (RUNS, RUNS), (SQUARE, SQUARE, SQUARE)], ids=["the same", "two annotators", "run lengths", "thrice"])
def test_an_object_that_is_annotated_twice_counts_once(tmp_path, twice):
    root = coco(tmp_path, [*twice, OTHER])
    with pytest.warns(UserWarning, match="annotated twice: each counts once|count as one object"): item = CocoScenes(root, 24)[0]
    assert item["masks"].unique().tolist() == [0, 1, 2] and not item["ignore"].any()
    assert item["labels"]["visibility"].sum() == 2


def test_the_same_outline_of_another_class_is_another_object(tmp_path):
    item = CocoScenes(coco(tmp_path, [SQUARE, SQUARE], kinds=[1, 2]), 24)[0]
    assert item["ignore"].any()  # a dog and a cat in the same place: nobody knows which


def test_two_categories_with_one_id_are_refused_and_the_same_twice_is_one(tmp_path):
    with pytest.raises(ValueError, match="two categories have the id 1, 'cat' and 'dog'"): CocoScenes(coco(tmp_path / "a", [SQUARE], ((1, "cat"), (1, "dog"))))
    assert CocoScenes(coco(tmp_path / "b", [SQUARE], ((1, "cat"), (1, "cat")))).factor_names["class"] == ["none", "cat"]


@pytest.mark.parametrize("nothing", [None, [], [[]]], ids=str)
def test_boxes_without_outlines_are_counted_or_refused(tmp_path, nothing):
    with pytest.warns(UserWarning, match="1 annotations have no 'segmentation': they are left out"): data = CocoScenes(coco(tmp_path / "some", [SQUARE, nothing]), 24)
    assert data[0]["masks"].max() == 1
    with pytest.raises(ValueError, match="no annotation has a 'segmentation': boxes are no masks"): CocoScenes(coco(tmp_path / "all", [nothing, nothing], bbox=[1, 2, 3, 4]))


# -- masks of one picture are no batch --------------------------------------------------------------------------------

MAP = torch.arange(64).view(8, 8) // 16
ONE_HOT = torch.nn.functional.one_hot(MAP).movedim(-1, 0)


@pytest.mark.parametrize("masks", [ONE_HOT, ONE_HOT.bool(), ONE_HOT.numpy().astype(np.uint8), list(ONE_HOT)], ids=["integers", "bool", "numpy", "list"])
def test_masks_of_one_picture_are_no_pictures(masks):
    for true, pred in ((masks, masks), (torch.zeros(4, 8, 8).long(), masks), (masks, ONE_HOT[None].float().expand(4, -1, -1, -1))):
        with pytest.raises(ValueError, match=r"look like masks \(k,h,w\) of one picture: pass their labels, x.argmax\(0\)\[None\]"): segmentation_scores(true, pred)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (3, 3), (2, 2)], ids=str)
def test_visibility_of_other_pictures_is_refused(shape):
    labels = MAP[None].repeat(2, 1, 1)
    for options in ({}, {"official": True, "max_objects": 3}):
        if shape != (2, 2) or not options:
            with pytest.raises(ValueError, match="visibility (is|has)"): segmentation_scores(labels, labels, visibility=torch.ones(shape), **options)
    assert segmentation_scores(labels, labels, visibility=torch.ones(2, 3))["miou"] == 1


def test_visibility_of_a_video_holds_in_all_its_frames():
    clips, seen = MAP[None, None].repeat(2, 3, 1, 1), torch.tensor([[1, 1, 0], [1, 0, 0]])
    worse = torch.where(clips == 3, 2, clips)
    assert frame_scores(clips, worse, visibility=seen)["miou"][1] == 1
    torch.testing.assert_close(frame_scores(clips, worse, visibility=seen[:, None].repeat(1, 3, 1))["miou"], frame_scores(clips, worse, visibility=seen)["miou"])


@pytest.mark.parametrize("maps", [[MAP, MAP], [MAP.numpy()] * 2, [MAP.tolist()] * 2, (MAP.to(torch.uint8), MAP.to(torch.uint8))], ids=["tensors", "arrays", "numbers", "tuple"])
def test_lists_of_label_maps_are_batches(maps):
    assert as_labels(maps, "true").equal(MAP[None].repeat(2, 1, 1))
    assert segmentation_scores(maps, maps)["miou"] == 1


@pytest.mark.parametrize("maps", [[MAP, MAP[:4]], [[0, 1], [0]], ["a"], None, [None]], ids=str)
def test_what_is_no_batch_of_label_maps_is_named(maps):
    with pytest.raises(ValueError, match="labels are no maps of one size"): segmentation_scores(maps, MAP[None])


# -- grey classes called mask -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending, mode", [("png", "L"), ("tif", "I;16"), ("gif", "P")])
@pytest.mark.parametrize("names", [("mask", "normal"), ("labels", "boxes")], ids=str)
def test_x_rays_in_a_class_called_mask_are_pictures(tmp_path, names, ending, mode):
    for name in names:
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            values = np.random.default_rng(i).integers(0, 250, (24, 24)).astype(np.uint16 if mode == "I;16" else np.uint8)
            Image.fromarray(values * (257 if mode == "I;16" else 1)).save(tmp_path / name / f"{i}.{ending}")
    assert len(ImageFolder(tmp_path)) == 8


@pytest.mark.parametrize("values", [np.arange(576).reshape(24, 24) // 100, np.kron(np.arange(100).reshape(10, 10) * 2, np.ones((8, 8), int)), np.eye(24) * 255], ids=["classes", "a hundred instances", "edges"])
def test_grey_label_maps_stay_label_maps(tmp_path, values):
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", i)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    assert ImageFolder(tmp_path).files == [f"images/{i}.png" for i in range(3)]


def test_depths_are_label_maps_however_many_greys_they_have(tmp_path):
    for i in range(3):
        save(tmp_path / "rgb" / f"{i}.png", i)
        save(tmp_path / "depth" / f"{i}.png", i, size=(24, 24))
    assert len(ImageFolder(tmp_path)) == 3


# -- pictures that were exchanged under their names -------------------------------------------------------------------

def folder(root):
    for i in range(60): save(root / "a" / f"{i}.png", i)
    return ImageFolder(root, 8)


SETS = {
    "pictures": (folder, "a/17.png"), "a part of them": (lambda root: Subset(folder(root), range(3, 50)), "a/17.png"), "COCO": (lambda root: CocoScenes(coco(root, [SQUARE]), 24), "val2017/1.jpg"),
    "MOVi": (lambda root: write_dump(root, "steve", range(3), 2) and open_dataset(root, split="all", size=16), "00000001/00000001_image.png"), "clips": (lambda root: write_dump(root, "steve", range(3), 2) and VideoClips(root, 16, n_frames=2), "00000001/00000001_image.png"),
    "HDF5": (lambda root: open_dataset(write_scenes(root / "x.h5", 4), split="all"), "x.h5"), "CLEVRTex": (lambda root: open_dataset(write_clevrtex(root, 3), split="all", size=16) if write_clevrtex(root, 3) is None else open_dataset(root, split="all", size=16), "clevrtex_full/0/CLEVRTEX_full_000001.png"),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_picture_that_is_exchanged_under_its_name_is_noticed(tmp_path, kind):
    make, name = SETS[kind]
    data = make(tmp_path)
    before, network = data_record(data), torch.nn.Linear(1, 1)
    key = cache_key(data, network)
    assert before["files"] == data_record(data)["files"] and data_differences(before, data_record(data)) == []
    if name.endswith(".h5"):
        raw = bytearray((tmp_path / name).read_bytes())
        raw[-1] ^= 1
        (tmp_path / name).write_bytes(raw)
        assert files_mark(source_files(data)) != before["files"]
        return
    with Image.open(tmp_path / name) as picture: size = picture.size[::-1]
    save(tmp_path / name, 99, size=(*size, 3))
    assert data_differences(before, data_record(data)) in (["pictures: as many as recorded, of the same names, but their files are others"],)
    assert cache_key(data, network) != key


def test_a_record_without_a_mark_and_drawn_worlds_are_not_compared():
    record = {"n": 3, "names": None, "sketches": {}}
    assert data_differences(record, record | {"files": "00000000"}) == [] and source_files(open_dataset("shapes", n=3)) == []


# -- numbers of factors, shares, weights ------------------------------------------------------------------------------

FACTORS = Factors(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), masks=torch.full((2, 4, 8, 8), 0.25))
ODD = [1.0, "1", "ab", None, [[0], [1, 2]], [0.0, 1.0], [True, False], torch.zeros(2, 1, 1, dtype=torch.long), torch.tensor([[0], [1], [2]]), torch.tensor(True), np.bool_(True), np.array([0.0]), np.array(["a"]), 2 ** 70, object(), torch.tensor([1 + 1j])]


@pytest.mark.parametrize("index", ODD, ids=lambda v: f"{type(v).__name__} {str(v)[:12]}")
def test_what_names_no_factors_is_an_index_error_with_words(index):
    for verb in (FACTORS.pick, FACTORS.drop, lambda i: FACTORS.replace(i, FACTORS), lambda i: FACTORS.replace(0, FACTORS, i) if i is not None else FACTORS.pick(i)):
        with pytest.raises(IndexError, match="factor"): verb(index)
    if not (isinstance(index, list) and index == [True, False]):
        with pytest.raises(IndexError, match="picture"): FACTORS.rows(index)


@pytest.mark.parametrize("index", [[1, 2], (1, 2), range(1, 3), slice(1, 3), torch.tensor([1, 2], dtype=torch.uint8), np.array([1, 2], np.uint16), [False, True, True, False], {1, 2}, [torch.tensor(1), torch.tensor(2)], (i for i in (1, 2)), [[1, 2], [1, 2]], torch.tensor([[-3, -2]])], ids=lambda v: type(v).__name__)
def test_whatever_names_factors_names_the_same(index):
    assert FACTORS.pick(index).codes.equal(FACTORS.codes[:, 1:3])


@pytest.mark.parametrize("call, match", [
    (lambda: FACTORS.repeat(0), "repeat.0.: expected is a whole number"), (lambda: FACTORS.repeat(1.5), "repeat"), (lambda: FACTORS.repeat(True), "repeat"), (lambda: FACTORS * "2", "a weight of '2': expected are numbers"), (lambda: FACTORS * [1, 2], r"a weight of \(2,\)"),
    (lambda: FACTORS * torch.ones(3, 1), r"a weight of \(3, 1\)"), (lambda: interpolate(FACTORS, FACTORS, "half"), "t='half'"), (lambda: interpolate(FACTORS, FACTORS, [0.1, 0.2, 0.3]), r"t is \(3,\)"), (lambda: interpolate(FACTORS, FACTORS, torch.rand(2, 4)), r"t is \(2, 4\)"),
])
def test_shares_weights_and_repeats_that_fit_nothing_are_named(call, match):
    with pytest.raises(ValueError, match=match): call()


def test_what_is_no_set_cannot_be_joined():
    for other in (None, FACTORS.codes, [1, 2]):
        with pytest.raises(TypeError, match="expected are Factors, got"): FACTORS.cat(other)


# -- doors of models --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_pictures_of_another_precision_than_the_model_are_named(kind):
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    with pytest.raises(ValueError, match=f"images are {kind}, but the model computes in torch.float32: pass images.to"): check_pictures(images.to(kind), dtype=torch.float32)
    check_pictures(images, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16): check_pictures(images.to(kind), dtype=torch.float32)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 0, 3, 8, 8\), .*|a clip needs at least one frame"): check_pictures(torch.zeros(2, 0, 3, 8, 8))


@pytest.mark.parametrize("content", ["[]", "3", '"lsd"', "null", '{"_class_name": 5}', '{"_class_name": ["LSD"]}', "{}"])
def test_a_config_that_names_no_model_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json holds a .* instead of named fields|which is no method"): load_decomposer(tmp_path)


@pytest.mark.parametrize("text, said", [("a: 1\n\tb: 2\n", "line 2: there is a tab; YAML wants spaces"), ("a:\t1\n", "line 1: there is a tab"), ("a: [1\nb: 2\n", "line 2: .*"), ("a: 'x\n", "line 2: ")])
def test_a_recipe_with_a_fault_names_its_line(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"r.yaml is not valid YAML: {said}") as error: read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, match", [({"n_per_class": 0}, "n_per_class=0: expected"), ({"n_per_class": -3}, "n_per_class=-3"), ({"names": ["cat", "cat"]}, "cat is named twice"), ({"names": []}, "no|names")], ids=str)
def test_classes_that_are_none_are_named(tmp_path, options, match):
    for name in ("cat", "dog"): save(tmp_path / name / "0.png")
    if options == {"names": []}:
        assert class_folders(tmp_path, n_per_class=1, size=8)["names"] == ["cat", "dog"]
        return
    with pytest.raises(ValueError, match=match): class_folders(tmp_path, size=8, **options)


def test_factors_of_each_clip_are_replaced_in_all_of_its_frames():
    clips, other = Factors(torch.zeros(2, 3, 4, 5)), Factors(torch.ones(2, 3, 4, 5))
    found = clips.replace(torch.tensor([[0], [3]]), other).codes[..., 0]
    assert found.sum(-1).eq(1).all() and found[0, :, 0].eq(1).all() and found[1, :, 3].eq(1).all()
