"""nbdev's commands, whichever nbdev is installed: `python tools/nbdev_command.py export | clean | test | docs … [options]`.

nbdev 2 calls them nbdev_export and reads settings.ini; nbdev 3 calls them nbdev-export and reads `[tool.nbdev]` of pyproject.toml. The
addresses of site and repository cannot stand there: every module would get a line of documentation. They are put into the index afterwards.
"""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from pprint import pformat

from readme import settings

BIN = Path(sys.executable).parent


def command(name: str, *options: str, folder: Path = BIN) -> list[str]:
    "The command line of `name` for the nbdev in `folder`; options are written as nbdev 3 has them, a path as `--path=…`"
    script = folder / f"nbdev_{name.replace('-', '_')}"
    if script.exists():
        return [str(script), *(option.replace("--n-workers", "--n_workers") for option in options)]
    script = folder / f"nbdev-{name}"
    if not script.exists():
        raise FileNotFoundError(f"no nbdev command {name!r} in {folder}: `make setup` installs nbdev")
    if name == "test":
        options = tuple(option.removeprefix("--path=") for option in options)
    return [str(script), *options]


def fill_index(root: Path) -> None:
    "Addresses of settings.ini in `_modidx.py`, written as nbdev 2 writes it"
    known = settings(root)
    path = root / known["lib_path"] / "_modidx.py"
    head, _, table = path.read_text(encoding="utf-8").partition("d = ")
    index = ast.literal_eval(table)
    names = ("branch", "doc_baseurl", "doc_host", "git_url", "lib_path")
    index["settings"] = {name: known[name] for name in names}
    text = pformat(index, width=140, indent=2, compact=True)
    path.write_text(f"{head}d = {text}\n", encoding="utf-8")


def run(name: str, *options: str, root: Path | None = None) -> int:
    "Run a command in `root` (default: here) → its exit status"
    root = root or Path.cwd()
    found = command(name, *options)
    status = subprocess.run(found, cwd=root).returncode
    if name == "export" and not status and Path(found[0]).name == "nbdev-export":
        fill_index(root)
    return status


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
