"The package as a whole: exported from the notebooks as they are, light to import, honest about its names."
import ast
import builtins
import filecmp
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import nbdev_command
import pytest

import decomp_nb

ROOT = Path(__file__).resolve().parents[1]


WRITTEN_BY_HAND = ("__init__.py", "__main__.py")  # everything else is exported


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
    for name in WRITTEN_BY_HAND:
        shutil.copy(ROOT / "decomp_nb" / name, root / "decomp_nb" / name)
    assert nbdev_command.run("export", root=root) == 0
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
    assert min(float(python(code)) for _ in range(5)) < 0.1  # processor time, and the best of five: others on the machine do not count


def test_import_brings_nothing_heavy():
    heavy = ["torch", "numpy", "diffusers", "transformers", "matplotlib", "sklearn", "papermill"]
    code = "import sys, {}; print([m for m in {} if m in sys.modules])"
    assert python(code.format("decomp_nb", heavy)) == "[]\n"
    assert python(code.format("decomp_nb.training.launch", [*heavy, "jupyter_client", "yaml"])) == "[]\n"
    assert python(code.format("decomp_nb.decomposer", heavy[4:])) == "[]\n"


def test_papermill_comes_without_parsers_of_web_addresses():
    code = "import sys; from decomp_nb.training.kernel import _import_papermill as get; print(get().__name__, {'lark', 'rfc3987_syntax'} & set(sys.modules))"
    assert python(code) == "papermill set()\n"


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


def test_the_readme_imports_what_it_uses():
    example = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S))
    nodes = list(ast.walk(ast.parse(example)))
    known = {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert used and used <= known, used - known


def test_no_merge_was_left_half_done():
    files = [*ROOT.glob("*.*"), *(ROOT / "papermill_runs").glob("*.*"), *ROOT.glob("[ntd]*/**/*.py"), *ROOT.glob("nbs/**/*.ipynb")]
    marked = [path for path in files if path.is_file() and re.search(rb"^[ \"]*(<{7}|>{7}) ", path.read_bytes(), re.M)]
    assert not marked and len(files) > 100


def test_requirements_are_ranges_and_constraints_are_exact():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    pinned = {distribution(line) for line in lines}
    for requirement in settings()["requirements"].split() + settings()["dev_requirements"].split():
        assert "==" not in requirement and distribution(requirement) in pinned, requirement


IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
TRANSITIVE = {"matplotlib", "tqdm", "jupyter_client", "jupyter-client", "nbformat", "huggingface_hub", "IPython", "joblib", "tokenizers"}  # they come with what is declared


def test_every_import_is_a_declared_dependency():
    known = settings()["requirements"].split() + settings()["video_requirements"].split() + settings()["physics_requirements"].split()  # extras are imported where they are needed
    declared = {IMPORT_NAMES.get(d, d.replace("-", "_")) for d in map(distribution, known)}
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


FAKE_NBDEV = """#!/bin/sh
[ README.md -ot nbs/index.ipynb ] && echo "written by nbdev" > README.md
mkdir -p _docs
"""


def test_docs_leave_the_readme_alone(tmp_path):
    "nbdev writes README.md where it is older than the home page's notebook, as in a fresh checkout"
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in {"python": FAKE_PYTHON, "nbdev": FAKE_NBDEV, "quarto": "#!/bin/sh"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "index.ipynb").write_text("{}")
    (tmp_path / "README.md").write_text("ours")
    os.utime(tmp_path / "README.md", (1, 1))
    command = ["make", "docs", f"PYTHON={tmp_path / 'python'}", f"NBDEV={tmp_path / 'nbdev'}"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "README.md").read_text() == "ours" and (tmp_path / "_docs").is_dir()


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


def test_weights_do_not_tell_where_they_were_made():
    configs = sorted((ROOT / "decomp_nb/weights").glob("*/config.json"))
    assert len(configs) >= 8
    told = [path.parent.name for path in configs if "_name_or_path" in json.loads(path.read_text())]
    assert not told, f"{told}: take _name_or_path out of their config.json (tools/ship.py does)"


def test_weights_are_small():
    "What comes with the package stays a small download: 12 MiB for one set of weights, 40 in all"
    size = {f.name: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) / 2**20 for f in (ROOT / "decomp_nb/weights").iterdir() if f.is_dir()}
    assert size and all(v <= 12 for v in size.values()) and sum(size.values()) <= 40, size


# versions ---------------------------------------------------------------------------------------------------------------------------

def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def as_settings_have_it(value: object) -> str:
    "A value of pyproject.toml in the spelling of settings.ini"
    return " ".join(value) if isinstance(value, list) else str(value)


def test_nbdev_3_reads_what_nbdev_2_reads():
    table, known = pyproject()["tool"]["nbdev"], settings()
    assert table.pop("allowed_out_metadata_keys") == ["image/png"]  # nbdev 2 keeps the metadata of outputs
    assert table.pop("doc_procs") == known["procs"].split()  # nbdev 2 has one kind of processors only
    assert set(table) >= {"lib_path", "nbs_path", "tst_flags", "custom_sidebar", "jupyter_hooks", "allowed_cell_metadata_keys"}
    assert {key: as_settings_have_it(value) for key, value in table.items()} == {key: known[key] for key in table}
    project = pyproject()["project"]
    assert project["name"] == known["lib_name"] and project["requires-python"] == f">={known['min_python']}"


@pytest.mark.parametrize(("script", "test", "export"), [
    ("nbdev_{}", ["--path=nbs/factors.ipynb", "--n_workers", "2"], []), ("nbdev-{}", ["nbs/factors.ipynb", "--n-workers", "2"], [])], ids=["nbdev 2", "nbdev 3"])
def test_commands_of_either_nbdev(tmp_path, script, test, export):
    for name in ("test", "export"):
        (tmp_path / script.format(name)).touch()
    def found(*words: str) -> list[str]:
        command, *options = nbdev_command.command(*words, folder=tmp_path)
        assert Path(command) == tmp_path / script.format(words[0])
        return options
    assert found("test", "--path=nbs/factors.ipynb", "--n-workers", "2") == test and found("export") == export
    with pytest.raises(FileNotFoundError, match="make setup"):
        nbdev_command.command("clean", folder=tmp_path)


def test_the_index_is_filled_as_nbdev_2_fills_it(tmp_path):
    "What nbdev 3 leaves out of it comes from settings.ini; the rest stays, byte for byte"
    index = (ROOT / "decomp_nb" / "_modidx.py").read_text()
    shutil.copy(ROOT / "settings.ini", tmp_path / "settings.ini")
    (tmp_path / "decomp_nb").mkdir()
    emptied = index.replace("'doc_host': 'https://decomp-nb.github.io'", "'doc_host': ''")
    assert emptied != index
    (tmp_path / "decomp_nb" / "_modidx.py").write_text(emptied)
    nbdev_command.fill_index(tmp_path)
    assert (tmp_path / "decomp_nb" / "_modidx.py").read_text() == index


def pins(name: str) -> dict[str, tuple[int, ...]]:
    "Distribution → version of a file of constraints"
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {distribution(name): tuple(map(int, re.findall(r"\d+", version)[:3])) for name, version in pairs}


def bounds() -> dict[str, tuple[int, ...]]:
    "Distribution → lower bound of settings.ini"
    return {distribution(r): tuple(map(int, r.split(">=")[1].split(",")[0].split("."))) for r in settings()["requirements"].split()}


def test_the_floor_is_what_the_settings_allow():
    floor = pins("constraints-floor.txt")
    assert set(floor) == set(bounds())
    for name, bound in bounds().items():
        if name != "torch":  # tried in one version only
            assert floor[name][:len(bound)] == bound, f"{name}: floor {floor[name]}, settings.ini {bound}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-colab.txt", "constraints-floor.txt"])
def test_every_set_of_versions_lies_within_the_bounds(name):
    for distribution_name, version in pins(name).items():
        assert version >= bounds().get(distribution_name, ()), distribution_name


def test_jupyter_is_an_extra():
    "A user who has a notebook already, as on Colab, keeps it"
    known = settings()
    assert "jupyter" not in map(distribution, known["requirements"].split())
    assert "jupyter" in map(distribution, known["notebook_requirements"].split())
