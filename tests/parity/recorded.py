"""What the parity tests share: arrays recorded from official programs, comparisons that remember what was used, and ways to spoil a number.

A *check* is a function of `Recorded` that yields (key …, our value, tolerance). The key names a recorded array, mostly by file and name.
"""
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


class Recorded:
    "The arrays of one folder; remembers which were given to a computation. One array can be `altered` as it is read, or `shifted` where it is given"
    absolute, relative = 0.01, 0.0  # how far an altered number moves: so much, and so much of the largest

    def __init__(self, folder: Path, altered: tuple[str, ...] = (), shifted: tuple[str, ...] = ()):
        self.folder, self.altered, self.shifted, self.files, self.used = folder, altered, shifted, {}, set()

    def load(self, file: str) -> dict[str, Tensor]:
        if file not in self.files: self.files[file] = load_arrays(self.folder, file)
        return self.files[file]

    def names(self, file: str) -> list[str]: return sorted(self.load(file))

    def read(self, *key: str) -> Tensor:
        file, name = key
        return self.load(file)[name]

    def array(self, *key: str) -> Tensor: return alter(self.read(*key), self.absolute, self.relative) if key == self.altered else self.read(*key)

    def given(self, *key: str) -> Tensor:
        self.used.add(key)
        value = self.array(*key).clone()
        return shift(value) if key == self.shifted else value

    def json(self, name: str) -> dict: return json.loads((self.folder / f"{name}.json").read_text())


def load_arrays(folder: Path, file: str) -> dict[str, Tensor]:
    "`file.npz`, else `file.safetensors` (which beside an npz holds weights)"
    if not (folder / f"{file}.npz").is_file(): return load_file(folder / f"{file}.safetensors")
    with np.load(folder / f"{file}.npz") as found: return {k: torch.from_numpy(np.array(found[k])) for k in found.files}


def alter(value: Tensor, absolute: float = 0.01, relative: float = 0.0) -> Tensor:
    "The array with one entry changed: by `absolute` and `relative` of the largest, integers by one"
    value = value.clone()
    flat, at = value.view(-1), value.numel() // 2
    if value.dtype == torch.bool: flat[at] = ~flat[at]
    elif not value.is_floating_point(): flat[at] += 1
    else:
        known = (~flat.isnan()).nonzero()
        if flat[at].isnan() and len(known): at = int(known[0])
        flat[at] = 1.0 if flat[at].isnan() else flat[at] + absolute + relative * flat.abs().nan_to_num().max()
    return value


def shift(value: Tensor) -> Tensor:
    "Another input: numbers a tenth larger, integers one step away"
    return value + 0.1 if value.is_floating_point() else torch.where(value > 0, value - 1, value + 1)


def processor() -> str:
    "The widest vector instructions that torch and numpy both use here, such as \"AVX512\" or \"AVX2\""
    try: from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError: from numpy.core._multiarray_umath import __cpu_features__ as features  # numpy 1
    capability = torch.backends.cpu.get_cpu_capability()
    wide = features.get("AVX512_SKX") or features.get("X86_V4")
    return "AVX2" if capability == "AVX512" and not wide else capability


def recorded_like_here(versions: dict[str, str], cpu: str = "AVX512") -> bool:
    "Whether these packages run here in the recorded versions, on a processor like the recording's: last bits agree"
    from importlib.metadata import PackageNotFoundError, version
    names = {"sklearn": "scikit-learn"}
    try: same = all(version(names.get(name, name)) == recorded for name, recorded in versions.items())
    except PackageNotFoundError: return False
    return same and processor() == cpu


def close(ours, recorded, tolerance: float | tuple[float, float], what: str) -> None:
    "Same shape and kind of number, within an absolute tolerance, or (relative, absolute); NaN only where NaN is"
    ours, recorded = torch.as_tensor(ours), torch.as_tensor(recorded)
    floating = recorded.is_floating_point()
    rtol, atol = tolerance if isinstance(tolerance, tuple) else (0, tolerance)
    torch.testing.assert_close(ours.to(recorded.dtype) if floating else ours, recorded, rtol=rtol, atol=atol, equal_nan=True,
                               check_dtype=not floating, msg=lambda text: f"{what}: {text}")


def run(check: Callable, r: Recorded, close: Callable = close) -> list[tuple]:
    "Compute and compare; returns the comparisons"
    made = []
    for *key, ours, tolerance in check(r):
        close(ours, r.array(*key), tolerance, "/".join(key))
        made.append((*key, ours, tolerance))
    return made


def once(check_of: Callable, kind: type[Recorded], close: Callable = close) -> Callable:
    "`finished(group, folder)` → comparisons of a group and the keys it was given, computed once per session"
    @cache
    def finished(group: str, folder: Path) -> tuple[list[tuple], set[tuple]]:
        r = kind(folder)
        return run(check_of(group), r, close), r.used
    return finished


@cache
def scratch() -> Path:
    "A folder for files that official programs would write; it lives as long as the process"
    holder = tempfile.TemporaryDirectory()
    scratch.holder = holder
    return Path(holder.name)


def keys_of(made: list[tuple]) -> set[tuple]: return {tuple(key) for *key, _, _ in made}


def compared_and_given(finished: Callable, groups, folder: Path) -> tuple[set, set]:
    "Keys of all groups together"
    done = [finished(group, folder) for group in groups]
    return set().union(*(keys_of(made) for made, _ in done)), set().union(*(used for _, used in done))


def inputs_of_all(finished: Callable, groups, folder: Path, kind: type[Recorded], ending: str, elsewhere: set[str]) -> set[tuple]:
    "Arrays that are inputs only. Fails unless each array of the folder's files is compared or an input, and its README lists these files"
    compared, given = compared_and_given(finished, groups, folder)
    files = {path.stem for path in folder.glob(f"*.{ending}")} - elsewhere
    everything = {(file, name) for file in files for name in kind(folder).names(file)}
    assert everything == compared | given, f"untouched: {sorted(everything - compared - given)}"
    listed = set(re.findall(rf"^### (\w+)\.{ending}", (folder / "README.md").read_text(), flags=re.M)) - elsewhere
    assert files == listed, f"files and README differ: {files ^ listed}"
    return given - compared


def every_alteration_fails(made: list[tuple], folder: Path, kind: type[Recorded], close: Callable = close) -> None:
    "Changing any one of the compared arrays makes its comparison fail"
    for *key, ours, tolerance in made:
        what = "/".join(key)
        with pytest.raises(AssertionError, match=re.escape(what)): close(ours, kind(folder, altered=tuple(key)).array(*key), tolerance, what)


@cache
def parity(name: str):
    "Another parity module, found by its path: `tests/` holds files of the same name"
    place = importlib.util.spec_from_file_location(f"parity_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module
