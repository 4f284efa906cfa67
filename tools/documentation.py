"""What nbdev does to every notebook before Quarto draws the site, without Quarto: `python tools/documentation.py [FOLDER]`.

Imports, definitions and `show_doc` run cell by cell, and annotations are evaluated where they stand, so one that names a class from further
down its page stops `make docs`, although the module and the notebook's own run are fine. Prints each notebook that stops, and exits 1 then.
Works in a copy: the folder stays as it was.
"""
from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLOW_IMPORTS = ("torch", "diffusers", "transformers", "matplotlib.pyplot", "ipywidgets", "nbdev.showdoc")


def copy(root: Path, scratch: Path) -> list[Path]:
    "What the step reads, copied; → the notebooks of the copy"
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(root / name, scratch / name)
    left_out = shutil.ignore_patterns(".ipynb_checkpoints", "papermill_runs", "_quarto.yml")
    shutil.copytree(root / "nbs", scratch / "nbs", ignore=left_out)
    return sorted((scratch / "nbs").rglob("*.ipynb"), key=lambda path: -path.stat().st_size)


def reason(error: BaseException) -> str:
    "One line: the cell's own error, and the last line of that cell"
    own = error.__cause__ or error
    lines = str(error).strip().splitlines()
    return f"{type(own).__name__}: {own}" + (f" (in `{lines[-1]}`)" if error.__cause__ else "")


def step(notebook: Path) -> str | None:
    "nbdev's documentation step for one notebook, which stands in a folder `nbs`; → why it stopped, or None"
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main
    target = notebook.with_suffix(".page")
    try:
        main((notebook, target, FilterDefaults))
    except Exception as error:
        return reason(error)


def start(scratch: Path) -> None:
    "A worker's first act: nbdev finds its settings from the folder it works in, and what they name from this one"
    os.chdir(scratch)
    sys.path.insert(0, str(ROOT / "tools"))
    warnings.simplefilter("ignore")


def import_once() -> None:
    "What nearly every notebook imports, before the workers part from this process"
    for name in SLOW_IMPORTS:
        if find_spec(name.split(".")[0]):
            import_module(name)


@contextmanager
def pages(root: Path = ROOT, workers: int = 2) -> Iterator[tuple[Path, dict[str, str]]]:
    "The step done in a copy: its folder `nbs`, in which `x.page` lies beside `x.ipynb`, and notebooks that stopped → why"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        notebooks = copy(root, scratch)
        if len(notebooks) > workers:
            import_once()
        with ProcessPoolExecutor(workers, get_context("fork"), start, [scratch]) as pool:
            found = list(pool.map(step, notebooks))
        stopped = {str(path.relative_to(scratch)): why for path, why in zip(notebooks, found, strict=True) if why}
        yield scratch / "nbs", stopped


def faults(root: Path = ROOT, workers: int = 2) -> dict[str, str]:
    "Notebooks that the step stops at → why"
    with pages(root, workers) as (_, stopped):
        return stopped


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    found = faults(root.resolve())
    for name, why in sorted(found.items()):
        print(f"{name}: {why}")
    if not found:
        print("documentation: every notebook passes nbdev's step before Quarto")
    return bool(found)


if __name__ == "__main__":
    import documentation  # nbdev's shell replaces __main__, where workers would then look for `step` in vain
    sys.exit(documentation.main())
