"""Files with bytes changed, cut, doubled: each is read, or refused by one error that names it.

`python tests/test_inputs_damaged.py 5000` goes through as many of each kind.
"""
import io
import json
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import draw, write_coco, write_scenes

from decomp_nb.data.arrays import NpzImages, npz_array
from decomp_nb.data.catalog import open_dataset
from decomp_nb.data.images import ImageFolder
from decomp_nb.data.natural import CocoScenes
from decomp_nb.data.scene_item import read_labels

SECONDS = 2.0  # for each kind of file, at most


def picture_bytes(kind: str) -> bytes:
    "A small picture with EXIF, texts and a palette where the format has them"
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a scene"
    picture = Image.fromarray(draw(0, 48, 48)["image"])
    buffer = io.BytesIO()
    if kind == "png": picture.convert("P").save(buffer, "PNG", exif=exif, transparency=0, icc_profile=bytes(200))
    elif kind == "gif": picture.convert("P").save(buffer, "GIF", save_all=True, append_images=[picture.convert("P")], comment=b"two")
    elif kind == "tiff": picture.save(buffer, "TIFF", compression="tiff_lzw", exif=exif)
    else: picture.save(buffer, kind.upper(), exif=exif)
    return buffer.getvalue()


def mutate(data: bytes, dice: random.Random) -> bytes:
    "One change, sometimes more: bits, bytes, numbers at their limits, pieces cut out, doubled or swapped"
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        at, length = dice.randrange(len(data) or 1), dice.randint(1, 8)
        how = dice.randrange(6)
        if how == 0 and data: data[at] ^= 1 << dice.randrange(8)
        elif how == 1: data[at:at + length] = dice.randbytes(length)
        elif how == 2: data[at:at + 4] = dice.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
        elif how == 3: del data[at:at + dice.choice([1, 4, 64, 10 ** 6])]
        elif how == 4: data[at:at] = data[at:at + 32]
        elif how == 5: data[at:at + length] = data[:length]
    return bytes(data)


def mutate_json(text: str, dice: random.Random) -> str:
    "Half of the time characters change, else a value somewhere becomes another one or is gone"
    if dice.random() < 0.4: return mutate(text.encode(), dice).decode("latin-1")
    content = json.loads(text)
    node = content
    while True:
        key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or dice.random() < 0.3: break
        node = node[key]
    if dice.random() < 0.3: del node[key]
    else: node[key] = dice.choice([None, -1, 0, 7, 1.5, 10 ** 9, "", "x", [], {}, [[]], True, float("nan"), [1, 2, 3, 4, 5, 6]])
    return json.dumps(content)


class Kind:
    "How files of one kind are made, changed and read; `names` are what an error may name"
    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.file, self.names = folder / f"a.{kind}", [f"a.{kind}"]
        if kind in PICTURES: self.good = picture_bytes(kind)
        if kind == "h5":
            write_scenes(self.file, n=4)
            self.good = self.file.read_bytes()
        if kind in ("npz", "packed.npz"):
            save = np.savez if kind == "npz" else np.savez_compressed
            save(self.file, images=np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8), names=np.arange(6))
            self.good = self.file.read_bytes()
        if kind == "json":
            write_coco(folder)
            self.file = folder / "annotations/instances_val2017.json"
            self.names = [self.file.name, "000000000003.jpg", "000000000005.jpg"]
            self.good = self.file.read_text()

    def change(self, dice):
        if self.kind == "json": self.file.write_text(mutate_json(self.good, dice), encoding="utf-8")
        else: self.file.write_bytes(mutate(self.good, dice))

    def read(self):
        if self.kind in PICTURES:
            folder = ImageFolder(self.folder, 16, min_size=1)
            assert folder[0]["image"].shape == (3, 16, 16)
            if self.kind == "png": read_labels(self.file)
        elif self.kind == "h5":
            data = open_dataset(self.file, split="all", size=16)
            for i in range(len(data)): data[i]
        elif self.kind == "json":
            data = CocoScenes(self.folder, 16)
            for i in range(min(len(data), 9)): data[i]
        else:
            images = NpzImages(self.file, "images")
            images.read(np.arange(images.shape[0])[:9])
            npz_array(self.file, "names")


PICTURES = ("png", "jpeg", "webp", "gif", "tiff")
KINDS = (*PICTURES, "h5", "npz", "packed.npz", "json")


def go_through(folder: Path, kind: str, n: int, seconds: float, seed: int = 0) -> tuple[int, int]:
    "How many files were tried, and how many of them were read"
    files, dice, read, start = Kind(folder, kind), random.Random(seed), 0, time.process_time()
    for i in range(n):
        if time.process_time() - start > seconds: return i, read
        files.change(dice)
        try:
            files.read()
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert any(name in str(error) for name in files.names), f"{kind} {i}: {type(error).__name__} {error}"
        except Exception as error:
            raise AssertionError(f"{kind} {i}: {type(error).__name__} {error}") from error
    return n, read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_named(tmp_path, kind):
    tried, read = go_through(tmp_path, kind, 300, SECONDS)
    assert tried > 5 and read < tried


if __name__ == "__main__":
    import tempfile
    warnings.simplefilter("ignore")
    for kind in sys.argv[2:] or KINDS:
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder: found = go_through(Path(folder), kind, int(sys.argv[1]), 1e9, seed=1)
        print(kind, *found, f"{time.process_time() - start:.1f} s", flush=True)
