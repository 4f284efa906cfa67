"The documentation step that `make docs` begins with: it passes what is right, and names the notebook and the cell where it stops."
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat as nbf
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "documentation.py"
LATER = "#| export\nclass Later:\n    \"Named before it exists\""
EARLY = "#| export\ndef early(x: Later | None = None):\n    \"Names it\""


def project(root: Path, *cells: str) -> Path:
    "A project with one notebook `nbs/metrics/toy.ipynb` that exports `cells`"
    shutil.copy(ROOT / "settings.ini", root / "settings.ini")
    shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")
    sources = ["#| default_exp metrics.toy", "#| export\nfrom __future__ import annotations", *cells]
    notebook = nbf.v4.new_notebook(cells=[nbf.v4.new_markdown_cell("# Toy"), *map(nbf.v4.new_code_cell, sources)])
    (root / "nbs" / "metrics").mkdir(parents=True)
    nbf.write(notebook, root / "nbs" / "metrics" / "toy.ipynb")
    return root


def step(root: Path) -> tuple[int, str]:
    "Exit status of the tool on a project, and what it prints"
    done = subprocess.run([sys.executable, TOOL, root], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("cells", "status"), [([LATER, EARLY], 0), ([EARLY, LATER], 1)], ids=["in order", "out of order"])
def test_annotations_are_evaluated_where_they_stand(tmp_path, cells, status):
    root = project(tmp_path, *cells)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    found, said = step(root)
    assert found == status, said
    named = "nbs/metrics/toy.ipynb: NameError: name 'Later' is not defined (in `show_doc(early)`)"
    assert (named in said) == bool(status)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before, "the step left something behind"
