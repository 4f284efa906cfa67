"""Run notebooks in place and keep their outputs: `python tools/run_nbs.py [NOTEBOOK …] [--flags slow,gpu] [--force]`.

What nbdev would not run is not run here either: cells with `#| eval: false`, with the tag `skip-execution`, with a flag of settings.ini
(`slow`, `gpu`, `data`) that `--flags` does not name, and whole notebooks whose front matter says `skip_exec: true` (unless `--force`).
Without names, all notebooks run. Cleaned afterwards.
"""
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import nbdev_command
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from readme import directives, settings

ROOT = Path(__file__).resolve().parents[1]


def skipped_notebook(nb) -> bool:
    "Does the front matter say `skip_exec: true`?"
    return any(c.cell_type == "raw" and re.search(r"^skip_exec:\s*true\s*$", c.source, re.M) for c in nb.cells)


def skipped_cell(cell, flags: set[str]) -> bool:
    "Is this a code cell that must not run? `flags` are those of settings.ini that stay off"
    found, code = directives(cell.source)
    tagged = "skip-execution" in cell.metadata.get("tags", [])
    return tagged or found.get("eval") == "false" or bool(flags & found.keys()) or "nbdev_export(" in code


class Client(NotebookClient):
    "Executes a notebook, leaves skipped cells and their outputs as they are"
    flags: set = set()

    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type == "code" and skipped_cell(cell, self.flags):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def run(path: Path, flags: set[str], force: bool = False, timeout: int = 900) -> str:
    "Execute one notebook in its folder and write it back when it succeeds; returns what happened, in words"
    nb, start = nbformat.read(path, 4), time.monotonic()
    if skipped_notebook(nb) and not force:
        return "skipped by its front matter"
    client = Client(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                    extra_arguments=["--log-level=40"], store_widget_state=False)
    client.flags = flags
    client.execute()
    nbformat.write(nb, path)
    return f"{time.monotonic() - start:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="run cells with these flags too, separated by commas")
    parser.add_argument("--force", action="store_true", help="run notebooks that say skip_exec as well")
    args = parser.parse_args()
    off = set(settings().get("tst_flags", "").split()) - set(args.flags.split(","))
    paths = args.notebooks or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    failed = []
    for path in paths:
        try:
            said = run(path, off, args.force)
        except CellExecutionError as error:
            failed.append(path)
            said = f"FAILED, left as it was\n{error}"
        print(f"{path.resolve().relative_to(ROOT)}: {said}", flush=True)
    for path in paths:
        subprocess.run(nbdev_command.command("clean", "--fname", str(path)), check=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
