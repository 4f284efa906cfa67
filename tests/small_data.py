"Writers of small data sets in the true public layouts; everything that they show is known."

import json
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

COLOURS = np.array(
    [[120, 120, 120], [220, 40, 40], [40, 220, 40], [40, 40, 220], [220, 220, 40]], np.uint8
)  # code → colour, 0 = background


# -- scenes with objects ------------------------------------------------------------------------


def draw(seed: int, h: int = 48, w: int = 48, k: int = 3) -> dict:
    "k squares on grey in different cells of the centred square: image, label map, colour code and centre (column, row, depth) of each"
    rng, side = np.random.default_rng(seed), min(h, w)
    image, mask = np.full((h, w, 3), 120, np.uint8), np.zeros((h, w), np.uint8)
    codes, centres, cell = rng.permutation(4)[:k] + 1, np.zeros((k, 3), np.float32), side // 3
    for i, place in enumerate(rng.permutation(9)[:k]):
        half = rng.integers(cell // 4, cell // 3)
        row, column = (
            (h - side) // 2 + place // 3 * cell + cell // 2,
            (w - side) // 2 + place % 3 * cell + cell // 2,
        )
        mask[row - half : row + half, column - half : column + half], centres[i] = i + 1, (column, row, 5)
        image[mask == i + 1] = COLOURS[codes[i]]
    return {"image": image, "mask": mask, "color": codes, "pixel_coords": centres, "k": k}


def rows(values: np.ndarray, n: int) -> np.ndarray:
    "Background row first, then the objects, then zeros up to n rows"
    out = np.zeros((n, *values.shape[1:]), np.float32)
    out[1 : 1 + len(values)] = values
    return out


def write_scenes(
    path: Path, n: int = 12, size: int = 48, trailing: bool = False, counts=(2, 3, 4), **more
) -> Path:
    "The layout of the rendered sets, or with trailing axes of object-centric-library"
    scenes = [draw(i, size, size, counts[i % len(counts)]) for i in range(n)]
    end = (lambda x: x[..., None]) if trailing else (lambda x: x)
    with h5py.File(path, "w") as f:
        f["image"] = np.stack([s["image"] for s in scenes])
        f.create_dataset(
            "mask",
            data=np.stack([s["mask"] for s in scenes])[..., None],
            chunks=(1, size, size, 1),
            compression="gzip",
        )
        f["visibility"] = end(
            np.stack([[1.0] + [1.0] * s["k"] + [0.0] * (4 - s["k"]) for s in scenes]).astype(np.float32)
        )
        f["num_actual_objects"] = end(np.array([s["k"] for s in scenes], np.uint8))
        f["color"] = end(np.stack([rows(s["color"], 5) for s in scenes]).astype(np.uint8))
        f["pixel_coords"] = np.stack([rows(s["pixel_coords"], 5) for s in scenes])
        f["camera"] = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
        if not trailing:
            f.attrs["factor_names"] = '{"color": ["none", "red", "green", "blue", "yellow"]}'
        for key, value in more.items():
            f[key] = value
    return path


NAMES = ["none", "red", "green", "blue", "yellow"]


def write_clevrtex(root: Path, n: int = 20) -> Path:
    for i in range(n):
        s, folder = draw(i, 240, 320, 2 + i % 3), root / "clevrtex_full" / str(i // 8)
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"CLEVRTEX_full_{i:06d}"
        Image.fromarray(s["image"]).save(f"{stem}.png")
        flat = Image.fromarray(s["mask"] * 3)  # object numbers with gaps
        flat.putpalette(list(range(256)) * 3)
        flat.save(f"{stem}_flat.png")
        objects = [
            {
                "material": f"mat{c}",
                "shape": NAMES[c],
                "size": "small",
                "rotation": 10.0 * j,
                "3d_coords": [j, -j, 0.5],
                "index": 3 * (j + 1),
                "pixel_coords": s["pixel_coords"][j].tolist(),
            }
            for j, c in enumerate(s["color"].tolist())
        ]
        Path(f"{stem}.json").write_text(
            json.dumps({"ground_material": "moss", "objects": objects[::-1]})
        )  # in any order
    return root


def frame(video: int, t: int) -> dict:
    s = draw(100 + video, 48, 48, 2 + video % 3)
    return (
        s
        | {k: np.roll(s[k], t, 1) for k in ("image", "mask")}
        | {"pixel_coords": s["pixel_coords"] + [t, 0, 0]}
    )


def write_dump(root: Path, layout: str, videos: range, frames: int = 4) -> Path:
    for v in videos:
        for t in range(frames):
            s, k = frame(v, t), frame(v, t)["k"]
            name = f"{t:06d}" if layout == "slot_diffusion" else f"{t:08d}"
            folder = root / ("images" if layout == "lsd" else "") / f"{v:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            picture, mask = Image.fromarray(s["image"]), Image.fromarray(s["mask"])
            if layout == "slot_diffusion":
                picture.save(folder / f"{name}.jpg", quality=100, subsampling=0)
                mask.save(folder / f"{name}_mask.png")
            else:
                picture.save(folder / f"{name}_image.png")
            if layout == "steve":
                for j in range(5):
                    Image.fromarray((s["mask"] == j + 1).astype(np.uint8) * 255).save(
                        folder / f"{name}_mask_{j:02d}.png"
                    )
            if layout == "lsd":
                labels = root / "labels" / f"{v:08d}"
                labels.mkdir(parents=True, exist_ok=True)
                mask.save(labels / f"{name}_segment.png")
                (labels / f"{name}_instances.json").write_text(
                    json.dumps(
                        {
                            "color_label": (s["color"] - 1).tolist(),
                            "image_positions": (s["pixel_coords"][:, :2] / 48).tolist(),
                            "visibility": [9] * k,
                            "asset_id": ["cube"] * k,
                            "bboxes_3d": np.zeros((k, 8, 3)).tolist(),
                            "bboxes": [[[0, 0, 1, 1]]] * k,
                            "mass": [2.5] * k,
                        }
                    )
                )
    return root


def write_clips(path: Path, n: int = 3, frames: int = 8, size: int = 64) -> Path:
    "Clips in the layout of rendered videos: squares that move to the right and come back on the left"
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes = [draw(i, size, size, 2 + i % 3) for i in range(n)]
    moved = {key: np.stack([[np.roll(s[key], t, 1) for t in range(frames)] for s in scenes]) for key in ("image", "mask")}
    with h5py.File(path, "w") as f:
        f["video"], f["mask"] = moved["image"], moved["mask"][..., None]
        f["visibility"] = np.stack([[1.0] + [1.0] * s["k"] + [0.0] * (4 - s["k"]) for s in scenes]).astype(np.float32)
    return path


# -- photographs ------------------------------------------------------------------------


def runs_of(mask):
    "Run lengths of 0, 1, 0 … down the columns"
    flat, runs, current = mask.T.flatten().astype(int), [0], 0
    for v in flat:
        if v == current:
            runs[-1] += 1
        else:
            runs.append(1)
            current = v
    return runs


def packed(runs):
    "COCO's packed text of run lengths"
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            letter, value = value & 31, value >> 5
            more = not (value == 0 and not letter & 16 or value == -1 and letter & 16)
            text += chr(letter + (32 if more else 0) + 48)
    return text


def write_coco(folder: Path, train: tuple[int, ...] = (8,)) -> Path:
    "val: picture 3 (two instances, one crowd), picture 5 (nothing); train: pictures like the first"
    rng, (h, w) = np.random.default_rng(0), (40, 64)
    box, crowd = np.zeros((h, w), bool), np.zeros((h, w), bool)
    box[10:30, 20:40] = crowd[:8, 50:] = crowd[12:16, 22:26] = True
    shapes = [
        dict(category_id=90, iscrowd=0, segmentation=[[20, 10, 40, 10, 40, 30, 20, 30]]),
        dict(
            category_id=1,
            iscrowd=0,
            segmentation=dict(size=[h, w], counts=packed(runs_of(np.roll(box, 8, 1)))),
        ),
        dict(category_id=1, iscrowd=1, segmentation=dict(size=[h, w], counts=runs_of(crowd))),
    ]
    categories = [dict(id=90, name="toothbrush"), dict(id=1, name="person")]
    (folder / "annotations").mkdir(parents=True)
    for split, ids, shown in (("val", (5, 3), (3,)), ("train", train, train)):
        (folder / f"images/{split}2017").mkdir(parents=True)
        for i in ids:
            Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(
                folder / f"images/{split}2017/{i:012d}.jpg"
            )
        notes = [
            shape | dict(id=1 + k + 3 * j, image_id=i)
            for j, i in enumerate(shown)
            for k, shape in enumerate(shapes)
        ]
        pictures = [dict(id=i, file_name=f"{i:012d}.jpg", height=h, width=w) for i in ids]
        content = dict(images=pictures, annotations=notes, categories=categories)
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def write_voc(
    folder: Path, layout: str = "slot_diffusion", train: tuple[str, ...] = ("2008_000002",)
) -> Path:
    "One picture in val with two objects, others in trainaug with classes only; both folder layouts"
    pictures, lists = (
        ("images", "sets") if layout == "slot_diffusion" else ("JPEGImages", "ImageSets/Segmentation")
    )
    for f in (pictures, lists, "SegmentationClass", "SegmentationClassAug", "SegmentationObject"):
        (folder / f).mkdir(parents=True)
    objects, classes = np.zeros((50, 30), np.uint8), np.zeros((50, 30), np.uint8)
    objects[12:20, 5:15], classes[12:20, 5:15] = 1, 15
    objects[25:35, 12:22], classes[25:35, 12:22] = 2, 7
    objects[20, 5:15], classes[21, 5:15] = 255, 255
    for name in ("2007_000001", *train):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 30, 3), np.uint8)).save(
            folder / pictures / f"{name}.jpg"
        )
        save_palette(classes, folder / "SegmentationClassAug" / f"{name}.png")
    save_palette(classes, folder / "SegmentationClass" / "2007_000001.png")
    save_palette(objects, folder / "SegmentationObject" / "2007_000001.png")
    (folder / lists / "val.txt").write_text("2007_000001\n")
    (folder / lists / "trainaug.txt").write_text("".join(f"{name}\n" for name in train))
    return folder


def save_palette(values, path):
    picture = Image.fromarray(values, "P")
    picture.putpalette([i % 256 for i in range(768)])
    picture.save(path)


# -- factors ------------------------------------------------------------------------


def as_bytes(images: torch.Tensor) -> np.ndarray:
    return ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


def write_shapes(path, drawn, labels=None, images=None):
    values = [
        np.arange(2) / 10,
        np.arange(3) / 10,
        np.arange(2) / 10,
        np.array([0.75, 1.25]),
        np.arange(4.0),
        np.array([-30.0, 0, 30]),
    ]
    with h5py.File(path, "w") as f:
        f["images"] = as_bytes(drawn.batch(range(len(drawn)))["image"]) if images is None else images
        f["labels"] = (
            np.stack([v[k] for v, k in zip(values, drawn.factors.T)], 1) if labels is None else labels
        )
    return path


def write_cars(folder: Path) -> Path:
    "Three cars from twelve sides; the files lie in another order than the cars"
    folder.mkdir(parents=True)
    for car, name in enumerate(["b", "a", "c"]):
        views = np.zeros((16, 16, 3, 6, 2), np.uint8)
        for azimuth in range(6):
            for elevation in range(2):
                views[..., azimuth, elevation] = 80 * car + 10 * azimuth + elevation
        savemat(folder / f"car_{name}.mat", {"im": views})
    return folder


def write_celeba(folder: Path) -> Path:
    "Eight pictures, five of them in train, two in val, one in test; the colour fills the published crop exactly"
    (folder / "img_align_celeba").mkdir(parents=True)
    for i in range(8):
        picture = Image.new("RGB", (178, 218), (0, 0, 0))
        picture.paste((20 * i, 90, 200), (25, 57, 153, 185))
        picture.save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=95)
    rows = "".join(f"{i:06d}.jpg {1 - 2 * (i % 2)} {1 if i > 2 else -1} -1\n" for i in range(8))
    (folder / "list_attr_celeba.txt").write_text("8\nSmiling Young Bald\n" + rows)
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{i:06d}.jpg {[0, 0, 0, 0, 0, 1, 1, 2][i]}\n" for i in range(8))
    )
    return folder


PLACES = {
    "clevr": "images_clevr/{}.png",
    "clevr_toy": "clevr_toy/{}.png",
    "celebahq": "celebahq/data128x128/{}.jpg",
    "tetris": "tetris_images_32/{}.png",
    "anime": "anime_portraits/{}.jpg",
    "kitti": "kitti_data_tracking_image_2/training/image_02/{}/000.png",
    "vkitti": "vkitti_2.0.3_rgb/Scene01/{}/frames/rgb/Camera_0/rgb_0.jpg",
}


def write_places(folder, kinds, count=4):
    for kind in kinds:
        for i in range(count):
            file = folder / PLACES[kind].format(f"{i:04d}")
            file.parent.mkdir(parents=True, exist_ok=True)
            wide = "kitti" in kind
            picture = Image.new(
                "RGBA" if kind == "clevr" else "L" if kind == "tetris" else "RGB",
                (1242, 375) if wide else (64, 64),
                0,
            )
            if wide:
                picture.paste((200, 40 * i, 90), (433, 0, 808, 375))
            if kind == "clevr":
                picture.paste((200, 40 * i, 90, 255), (0, 0, 32, 64))
            elif not wide:
                picture.paste(255 if kind == "tetris" else (200, 40 * i, 90), (0, 0, 8, 8))
            picture.save(file)
    return folder
