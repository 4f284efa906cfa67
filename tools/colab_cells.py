"""Installs the package on Colab: a cell below the badge of every notebook that has a badge and no such cell. `python tools/colab_cells.py`

`make prepare` runs it; `make site-check` says where one is missing.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from readme import settings

ROOT = Path(__file__).resolve().parents[1]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def install_cell(root: Path = ROOT) -> dict:
    "The cell; hidden on the site, skipped by everything that runs unattended"
    known = settings(root)
    lines = ["#| hide", "#| eval: false", "import sys", "", "if 'google.colab' in sys.modules:",
             f'    %pip install -q "{known["lib_name"]} @ git+{known["git_url"]}"']
    text = "\n".join(lines).splitlines(True)
    tags = {"tags": ["skip-execution"]}
    return {"cell_type": "code", "execution_count": None, "id": "colab-install", "metadata": tags, "outputs": [], "source": text}


def add(path: Path) -> bool:
    "Put the cell in, if the notebook has a badge and lacks it"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    badge = next((i for i, c in enumerate(cells) if "colab-badge.svg" in source(c)), None)
    if badge is None or any("google.colab" in source(c) and "%pip" in source(c) for c in cells):
        return False
    cells.insert(badge + 1, install_cell())
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True


def main() -> int:
    added = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts and add(path)]
    print("\n".join(f"{path.relative_to(ROOT)}: a cell that installs the package on Colab" for path in added) or "every badge has its cell")
    return 0


if __name__ == "__main__":
    sys.exit(main())
