"The package as a whole: exported from the notebooks as they are, light to import, honest about its names."
import ast
import filecmp
import importlib
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import decomp_nb

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, folder: Path = ROOT, **environment: str) -> str:
    "What a fresh interpreter prints"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*.py") if "__pycache__" not in p.parts}


def differences(package: Path, fresh: Path) -> list[str]:
    "How a committed package differs from a fresh export"
    ours, theirs = modules(package), modules(fresh)
    found = [f"{p}: no notebook exports it" for p in sorted(ours - theirs)] + [f"{p}: not exported yet" for p in sorted(theirs - ours)]
    return found + [f"{p}: differs" for p in sorted(ours & theirs) if not filecmp.cmp(package / p, fresh / p, shallow=False)]


@pytest.fixture(scope="module")
def fresh_export(tmp_path_factory) -> Path:
    "The notebooks exported into an empty project"
    root = tmp_path_factory.mktemp("fresh")
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"):
        shutil.copy(ROOT / name, root / name)
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "papermill_runs")
    shutil.copytree(ROOT / "nbs", root / "nbs", symlinks=True, ignore=ignored)
    (root / "decomp_nb").mkdir()
    shutil.copy(ROOT / "decomp_nb/__init__.py", root / "decomp_nb/__init__.py")
    python("from nbdev.doclinks import nbdev_export; nbdev_export()", root, PYTHONPATH=str(root))
    return root


def test_export_is_in_sync(fresh_export):
    late = differences(ROOT / "decomp_nb", fresh_export / "decomp_nb")
    assert not late, "run `make prepare`: " + "; ".join(late)


def test_export_leaves_the_metadata_alone(fresh_export):
    for name in ("pyproject.toml", "settings.ini", "decomp_nb/__init__.py"):
        assert (fresh_export / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} is rewritten by nbdev_export"


def test_the_comparison_can_fail(tmp_path):
    for name, text in {"a/same.py": "1", "b/same.py": "1", "a/old.py": "1", "b/new.py": "1", "a/other.py": "1", "b/other.py": "2"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found == ["old.py: no notebook exports it", "new.py: not exported yet", "other.py: differs"]


def test_import_costs_milliseconds():
    code = "import time; start = time.process_time(); import decomp_nb; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_import_brings_nothing_heavy():
    heavy = ["torch", "numpy", "diffusers", "transformers", "matplotlib", "sklearn", "papermill"]
    code = "import sys, {}; print([m for m in {} if m in sys.modules])"
    assert python(code.format("decomp_nb", heavy)) == "[]\n"
    assert python(code.format("decomp_nb.training.launch", heavy)) == "[]\n"
    assert python(code.format("decomp_nb.core", heavy[4:])) == "[]\n"


@pytest.mark.parametrize("name", decomp_nb.__all__)
def test_every_name_of_the_package_exists(name):
    assert getattr(decomp_nb, name).__name__ == name


def test_names_are_listed_and_unknown_ones_refused():
    assert set(decomp_nb.__all__) <= set(dir(decomp_nb)) and "__version__" in dir(decomp_nb)
    with pytest.raises(AttributeError, match="no attribute 'Factor'"):
        decomp_nb.Factor  # noqa: B018


MOVED = [(module, entry.partition("=")[0]) for module, homes in decomp_nb._moved.items() for names in homes.values() for entry in names.split()]


@pytest.mark.parametrize("module", decomp_nb._moved)
def test_old_names_lead_to_the_new_ones(module):
    old = importlib.import_module(f"decomp_nb.{module}")
    for name in [n for m, n in MOVED if m == module]:
        home, new = decomp_nb._new_place(module, name)
        with pytest.warns(DeprecationWarning, match=f"decomp_nb.{module}.{name} is now decomp_nb.{home}.{new}: ") as caught:
            found = getattr(old, name)
        assert found is getattr(importlib.import_module(f"decomp_nb.{home}"), new) and caught[0].filename == __file__
    with pytest.raises(AttributeError, match=f"'decomp_nb.{module}' has no attribute 'nothing'"):
        old.nothing  # noqa: B018


def test_old_modules_are_imported_as_before(recwarn):
    from decomp_nb.data import scenes
    from decomp_nb.data.scenes import Scenes
    from decomp_nb.worlds.scenes import Scenes as new
    assert Scenes is new and scenes.__name__ == "decomp_nb.data.scenes" and {w.filename for w in recwarn} == {__file__}
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("decomp_nb.data.nothing")
    assert len(set(MOVED)) == len(MOVED)


def settings() -> dict:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def distribution(requirement: str) -> str:
    "`torch>=2.4` → `torch`"
    return requirement.split(">")[0].split("<")[0].split("=")[0].lower().replace("_", "-")


def test_version_is_that_of_the_settings():
    assert decomp_nb.__version__ == settings()["version"]


def test_requirements_are_ranges_and_constraints_are_exact():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in pins)
    pinned = {distribution(line) for line in pins}
    for requirement in settings()["requirements"].split() + settings()["dev_requirements"].split():
        assert "==" not in requirement and distribution(requirement) in pinned, requirement


IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
TRANSITIVE = {"matplotlib", "tqdm", "jupyter_client", "jupyter-client", "nbformat", "huggingface_hub", "IPython", "joblib", "tokenizers"}  # they come with what is declared


def test_every_import_is_a_declared_dependency():
    declared = {IMPORT_NAMES.get(d, d.replace("-", "_")) for d in map(distribution, settings()["requirements"].split())}
    for path in (ROOT / "decomp_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - TRANSITIVE - {"decomp_nb"}:
                assert name in declared, f"{path.name} imports {name}, which settings.ini does not require"


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> calls.txt
case "$*" in "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;; esac
"""


def test_set_up_happens_once(tmp_path):
    "make sets up .venv when it is missing or made from other files; a mere touch, or nothing, starts no program at all"
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)

    def calls():
        (tmp_path / "calls.txt").write_text("")
        subprocess.run(["make", "-s", "setup", f"PYTHON={tmp_path / 'python'}"], cwd=tmp_path, check=True, capture_output=True)
        return (tmp_path / "calls.txt").read_text()
    assert "pip install" in calls() and calls() == ""
    (tmp_path / "constraints.txt").touch()
    assert calls() == ""
    (tmp_path / "constraints.txt").write_text("torch==0\n")
    assert "-c constraints.txt -e .[dev]" in calls() and calls() == ""
    shutil.rmtree(tmp_path / ".venv")
    assert "-m venv .venv" in calls()


def test_packaging_takes_every_module_and_the_weights(tmp_path):
    "setup.py reads settings.ini; what it builds holds all modules and whatever lies in decomp_nb/weights"
    for name in ("setup.py", "settings.ini", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "decomp_nb", tmp_path / "decomp_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "decomp_nb/weights/toy").mkdir(parents=True)
    (tmp_path / "decomp_nb/weights/toy/model.safetensors").write_text("weights")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "built"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "built/lib/decomp_nb"
    assert modules(built) == modules(ROOT / "decomp_nb"), "a folder of modules has no __init__.py"
    weights = {p.relative_to(built) for p in (built / "weights").rglob("*") if p.is_file()}
    assert weights == {p.relative_to(tmp_path / "decomp_nb") for p in (tmp_path / "decomp_nb/weights").rglob("*") if p.is_file()}


def test_weights_are_small():
    "What comes with the package stays a small download: 12 MiB for one set of weights, 24 in all"
    size = {f.name: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) / 2**20 for f in (ROOT / "decomp_nb/weights").iterdir() if f.is_dir()}
    assert size and all(v <= 12 for v in size.values()) and sum(size.values()) <= 24, size
