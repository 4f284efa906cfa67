"The house rules hold, and each of them can fail: for every rule a made-up notebook or project that breaks it."
import copy
import json
import subprocess
from pathlib import Path

import hygiene
import nbformat as nbf
import pytest
import readme
import run_nbs
from hygiene import Notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = hygiene.notebooks()


# --- the project as it is ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=[nb.name for nb in NOTEBOOKS])
def test_notebook_keeps_the_rules(nb):
    found = [f"{rule.__name__}: {text}" for rule in hygiene.NOTEBOOK_RULES for text in rule(nb)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", hygiene.PROJECT_RULES, ids=lambda rule: rule.__name__)
def test_project_keeps_the_rules(rule):
    found = list(rule(ROOT))
    assert not found, "\n".join(found)


# --- every notebook rule can fail ----------------------------------------------------------------------------------------------------


def cell(kind: str, name: str, text: str, tags: list | None = None, outputs: list | None = None) -> dict:
    made = {"cell_type": kind, "id": name, "metadata": {"tags": tags} if tags else {}, "source": text.splitlines(True)}
    return made | ({"outputs": outputs or [], "execution_count": None} if kind == "code" else {})


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def display(mime: str, value: object) -> dict:
    return {"output_type": "display_data", "data": {mime: value}}


def notebook(name: str, *cells: dict) -> Notebook:
    "A notebook that keeps every rule, with `cells` after its head"
    badge = f'<a href="{hygiene.badge_url(name)}"><img src="{hygiene.COLAB}/assets/colab-badge.svg" alt="Open In Colab"></a>'
    head = [cell("markdown", "toy-title", "# Toy\n\n> It does one thing."), cell("markdown", "toy-badge", badge)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    return Notebook(name, {"cells": [*head, *cells], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, 1000)


PARAMETERS = cell("code", "toy-parameters", "steps: int = 3  # how many", ["parameters"])
COLAB = cell("code", "toy-colab", "#| eval: false\nimport sys\nif 'google.colab' in sys.modules:\n    %pip install -q toy", ["skip-execution"])
SKIPPED = cell("raw", "toy-front", "---\nskip_exec: true\n---")
SHOWS = cell("code", "toy-show", "1 + 1", outputs=[{"output_type": "execute_result", "data": {"text/plain": ["2"]}}])
LIBRARY = notebook(
    "components/toy", cell("code", "toy-default", "#| default_exp components.toy"), cell("code", "toy-imports", "import math"),
    cell("code", "toy-export", "#| export\ndef double(x): return 2 * x"), SHOWS,
    cell("code", "toy-end", "#| hide\n#| eval: false\nimport nbdev; nbdev.nbdev_export()", ["skip-execution"]))
RUN = notebook("train_toy", SKIPPED, COLAB, PARAMETERS, cell("code", "toy-fit", "steps"))


@pytest.mark.parametrize("nb", [LIBRARY, RUN, notebook("tutorials/toy", COLAB, SHOWS)], ids=lambda nb: nb.name)
@pytest.mark.parametrize("rule", hygiene.NOTEBOOK_RULES, ids=lambda rule: rule.__name__)
def test_good_notebooks_pass(rule, nb):
    assert list(rule(nb)) == []


def with_metadata(nb: Notebook, **changes) -> Notebook:
    return Notebook(nb.name, nb.content | {"metadata": nb.content["metadata"] | changes}, nb.size)


def code(text: str, tags: list | None = None, outputs: list | None = None) -> Notebook:
    "A library notebook with one more code cell"
    return notebook("components/toy", SHOWS, cell("code", "toy-bad", text, tags, outputs))


def shown(text: str) -> Notebook:
    return code("print()", outputs=[stream(text)])


def run_with(*lines: str) -> Notebook:
    return notebook("train_toy", SKIPPED, cell("code", "toy-parameters", "\n".join(lines), ["parameters"]))


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["ValueError: no"]}
BAD = [
    (hygiene.kernelspec_is_python3, with_metadata(LIBRARY, kernelspec={"name": "venv", "language": "python"}), "'venv'"),
    (hygiene.kernelspec_is_python3, with_metadata(LIBRARY, kernelspec={"name": "python3"}), "None"),
    (hygiene.kernelspec_is_python3, Notebook("core", {"cells": [], "metadata": {}}), "None"),
    (hygiene.ids_speak, notebook("core", SHOWS, SHOWS), "twice"),
    (hygiene.ids_speak, notebook("core", cell("markdown", "3fa9c1d2", "text")), "random"),
    (hygiene.ids_speak, notebook("core", cell("markdown", "a01bc23d-1e2f-4a5b-8c9d-0e1f2a3b4c5d", "text")), "random"),
    (hygiene.ids_speak, notebook("core", cell("markdown", "", "text")), "no id"),
    (hygiene.ids_speak, notebook("core", cell("markdown", "cell-12", "text")), "number"),
    (hygiene.badge_leads_here, Notebook("core", LIBRARY.content), "nbs/core.ipynb"),
    (hygiene.title_and_claim, Notebook("core", {"cells": [cell("markdown", "t", "# Only a title")]}), "one-sentence"),
    (hygiene.one_parameters_cell, notebook("train_toy", SKIPPED), "0 cells"),
    (hygiene.one_parameters_cell, notebook("eval_toy", SKIPPED, PARAMETERS, PARAMETERS), "2 cells"),
    (hygiene.one_parameters_cell, notebook("core", PARAMETERS), "expected 0"),
    (hygiene.parameters_are_literals, run_with("steps: int = 3  # how many", "half: int = steps // 2  # derived"), "line 2"),
    (hygiene.parameters_are_literals, run_with("steps: int = 3"), "no help"),
    (hygiene.parameters_are_literals, run_with("steps = 3  # how many"), "no type"),
    (hygiene.parameters_are_literals, run_with("steps: Tensor = 3  # how many"), "Tensor"),
    (hygiene.parameters_are_literals, run_with("import math"), "line 1"),
    (hygiene.papermill_reads_parameters, run_with("steps: int = 3  # how many; 0 = all"), "0 = all"),
    (hygiene.papermill_reads_parameters, run_with("steps: int | None = 3  # how many"), "int | None"),
    (hygiene.no_stderr, code("1", outputs=[stream("UserWarning", "stderr")]), "UserWarning"),
    (hygiene.no_error_outputs, code("1", outputs=[ERROR]), "ValueError"),
    *[(hygiene.no_machine_paths, shown(f"saved to {p}x.png"), "absolute") for p in ("/home/", "/root/", "/tmp/", "/work/", "/Users/a/")],
    (hygiene.no_machine_paths, shown("saved to C:\\runs\\x.png"), "absolute path"),
    (hygiene.no_machine_paths, code("1", outputs=[display("text/html", "<img src='/tmp/a.png'>")]), "absolute"),
    (hygiene.no_widget_state, with_metadata(LIBRARY, widgets={"state": {}}), "metadata"),
    (hygiene.no_widget_state, code("1", outputs=[display("application/vnd.jupyter.widget-view+json", {})]), "widget output"),
    (hygiene.below_one_megabyte, Notebook("core", LIBRARY.content, 1_200_000), "1.2 MB"),
    (hygiene.outputs_are_committed, notebook("core", cell("code", "toy-show", "1 + 1")), "no outputs"),
    (hygiene.outputs_are_committed, notebook("tutorials/toy", cell("code", "toy-show", "1 + 1")), "no outputs"),
    (hygiene.no_picture_is_missing, code("x = 1\nx"), "toy-bad"),
    (hygiene.no_picture_is_missing, code("strip({'picture': images})"), "toy-bad"),
    (hygiene.imports_stand_alone, code("import math\nmath.pi"), "mixes"),
    (hygiene.imports_stand_alone, code("#| export\nfrom math import pi\ndef area(r): return pi * r * r"), "mixes"),
    (hygiene.no_star_imports, code("from math import *"), "from math"),
    (hygiene.only_libraries_export, notebook("tutorials/toy", cell("code", "toy-bad", "#| export\nx = 1")), "exports"),
    (hygiene.only_libraries_export, notebook("train_toy", cell("code", "toy-bad", "#| default_exp train")), "exports"),
    (hygiene.runs_are_not_tests, notebook("train_toy", PARAMETERS), "skip_exec"),
    (hygiene.runs_are_not_tests, notebook("eval_toy", cell("raw", "front", "skip_exec: false"), PARAMETERS), "skip_exec"),
    (hygiene.skipping_is_said_twice, code("#| eval: false\n1"), "skip-execution"),
    (hygiene.skipping_is_said_twice, code("1", ["skip-execution"]), "eval: false"),
    (hygiene.cells_are_python, code("import sys\nif 'google.colab' in sys.modules: %pip install -q toy"), "line 2"),
    (hygiene.cells_are_python, code("def f(:"), "line 1"),
    (hygiene.installs_itself_on_colab, notebook("tutorials/toy", SHOWS), "Colab"),
    (hygiene.installs_itself_on_colab, notebook("eval_toy", PARAMETERS), "Colab"),
    (hygiene.no_notebook_bars, code("from tqdm.auto import tqdm"), "tqdm.auto"),
]


@pytest.mark.parametrize("rule, nb, expected", BAD, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(BAD)])
def test_bad_notebook_is_found(rule, nb, expected):
    assert any(expected in text for text in rule(nb)), list(rule(nb))


def test_every_notebook_rule_has_a_bad_notebook():
    assert {rule for rule, _, _ in BAD} == set(hygiene.NOTEBOOK_RULES)


def test_addresses_and_pictures_are_no_machine_paths():
    assert not list(hygiene.no_machine_paths(shown("see https://example.org/home/index.html, ratio 3/work/day, a/tmp/b")))
    for mime, value in {"image/png": "AAAA/tmp/AAAA", "text/html": "<img src='data:image/png;base64,A/tmp/A'>"}.items():
        assert not list(hygiene.no_machine_paths(code("1", outputs=[display(mime, value)])))


# --- every project rule can fail -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> Path:
    "A small project that keeps every project rule"
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    save(tmp_path, LIBRARY)
    save(tmp_path, notebook("index", SHOWS))
    (tmp_path / "_quarto.yml").write_text(
        "website: {sidebar: {contents: [index.ipynb, {section: Components, contents: [components/toy.ipynb]}]}}")
    (tmp_path / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    module(tmp_path, "components/toy.py", "import torch\nfrom ..factors import Factors\n")
    module(tmp_path, "factors.py", "import torch\n")
    (tmp_path / "README.md").write_text(readme.build(tmp_path / "nbs/index.ipynb", tmp_path)[0])
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def save(root: Path, nb: Notebook) -> None:
    path = root / "nbs" / f"{nb.name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = copy.deepcopy(nb.content)
    for c in content["cells"]:
        for o in c.get("outputs", []):
            o.setdefault("metadata", {})
            if o["output_type"] == "execute_result":
                o.setdefault("execution_count", None)
    path.write_text(json.dumps(content))


def module(root: Path, name: str, text: str) -> None:
    path = root / "decomp_nb" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_good_project_passes(project):
    assert [text for rule in hygiene.PROJECT_RULES for text in rule(project)] == []


def break_demonstration(root):
    save(root, notebook("components/toy", cell("code", "toy-export", "#| export\ndef double(x): return 2 * x"),
                        cell("code", "toy-hidden", "#| hide\nassert double(1) == 2"), cell("code", "toy-imports", "import math"), SHOWS))


def break_sidebar(root):
    (root / "_quarto.yml").write_text("website: {sidebar: {contents: [index.ipynb, methods/missing.ipynb]}}")


def break_link(root):
    (root / "nbs/_quarto.yml").unlink()
    (root / "nbs/_quarto.yml").write_text("project: {type: website}")


def track_generated(root):
    (root / "build").mkdir()
    (root / "build/x.py").write_text("1")
    subprocess.run(["git", "-C", root, "add", "-f", "build/x.py"], check=True)


def has(name: str, text: str):
    "A break: the package gets one more module"
    return lambda root: module(root, name, text)


BREAKS = [
    (hygiene.definitions_are_shown, break_demonstration, "0 of 1"),
    (hygiene.layers_hold, has("factors.py", "def f():\n    from .components.toy import double"), "factors may not know components"),
    (hygiene.layers_hold, has("metrics/a.py", "import decomp_nb.methods.lsd"), "metrics may not know methods"),
    (hygiene.layers_hold, has("metrics/a.py", "from decomp_nb.components.slots import SlotAttention"), "metrics may not"),
    (hygiene.layers_hold, has("methods/a.py", "from .lsd import LSD"), "methods may not know methods"),
    (hygiene.layers_hold, has("training/a.py", "from ..metrics.segmentation import ari"), "training may not know metrics"),
    (hygiene.layers_hold, has("methods/a.py", "from .. import Factors"), "front door"),
    (hygiene.layers_hold, has("worlds/a.py", "from ..data.images import open_h5"), "worlds may not know data"),
    (hygiene.layers_hold, has("extras/a.py", "import math"), "no layer"),
    (hygiene.nothing_is_unpickled, has("a.py", "import torch\ntorch.load('a.pt')"), "decomp_nb.a:2"),
    (hygiene.nothing_is_unpickled, has("a.py", "import torch\ntorch.load('a.pt', weights_only=False)"), "weights_only"),
    (hygiene.nothing_is_unpickled, has("a.py", "import pickle\ndef f(x): return pickle.loads(x)"), "pickle.loads"),
    (hygiene.nothing_is_unpickled, has("a.py", "from pickle import load"), "pickle.load"),
    (hygiene.nothing_is_unpickled, has("a.py", "import numpy as np\nnp.load('a', allow_pickle=True)"), "allow_pickle"),
    (hygiene.nothing_is_unpickled, has("a.py", "import yaml\nyaml.load('a')"), "yaml.load"),
    (hygiene.no_torchvision, has("a.py", "def f():\n    import torchvision"), "decomp_nb/a.py"),
    (hygiene.no_torchvision, lambda root: (root / "constraints.txt").write_text("torch==2.13.0\ntorchvision==0.28.0\n"), "constraints.txt"),
    (hygiene.no_torchvision, lambda root: save(root, notebook("core", cell("code", "a", "from torchvision import io"))), "nbs/core.ipynb"),
    (hygiene.sidebar_is_complete, break_sidebar, "methods/missing.ipynb, which does not exist"),
    (hygiene.sidebar_is_complete, break_sidebar, "components/toy.ipynb is not in the sidebar"),
    (hygiene.site_configuration_is_linked, break_link, "symbolic link"),
    (hygiene.readme_is_current, lambda root: (root / "README.md").write_text("old"), "README.md"),
    (hygiene.readme_is_current, lambda root: (root / "nbs/index.ipynb").unlink(), "index.ipynb"),
    (hygiene.ignored_as_it_should_be, lambda root: (root / ".gitignore").write_text("*.yaml\n"), "does not cover .venv/x"),
    (hygiene.ignored_as_it_should_be, lambda root: (root / ".gitignore").write_text("*.yaml\n"), "hides papermill_runs/recipes/x.yaml"),
    (hygiene.ignored_as_it_should_be, track_generated, "build/x.py is in git"),
    (hygiene.data_has_a_public_home, has("data/a.py", "HOME = '../shared/data'"), "decomp_nb/data/a.py names shared/data"),
    (hygiene.data_has_a_public_home, lambda root: save(root, notebook("core", cell("code", "a", "open('shared/data/x')"))), "nbs/core.ipynb"),
]


@pytest.mark.parametrize("rule, breaks, expected", BREAKS, ids=[f"{rule.__name__}-{i}" for i, (rule, _, _) in enumerate(BREAKS)])
def test_broken_project_is_found(project, rule, breaks, expected):
    breaks(project)
    assert any(expected in text for text in rule(project)), list(rule(project))


def test_every_project_rule_has_a_broken_project():
    assert {rule for rule, _, _ in BREAKS} == set(hygiene.PROJECT_RULES)


def test_safe_loads_are_allowed():
    text = "import pickle, torch, yaml\ntry: torch.load('a.pt', weights_only=True)\nexcept pickle.UnpicklingError: yaml.safe_load('a')"
    assert list(hygiene.unsafe_loads(text)) == []


def test_relative_imports_are_followed():
    known = {"decomp_nb.factors", "decomp_nb.viz.figures", "decomp_nb.methods.lsd"}
    found = hygiene.imported_modules("decomp_nb.methods.lsd", "from ..factors import Factors\nfrom ..viz import figures\nimport torch", known)
    assert found == {"decomp_nb.factors", "decomp_nb.viz.figures"}


# --- the README ----------------------------------------------------------------------------------------------------------------------


def test_readme_is_built_from_the_home_page(project):
    png = "iVBORw0KGgo="
    picture = [{"output_type": "display_data", "data": {"image/png": png, "text/plain": ["<Picture>"]}}]
    save(project, notebook(
        "index", cell("markdown", "links", "See [the idea](methods/lsd.ipynb#idea), [GitHub](https://github.com) and ![a](images/a.png)."),
        cell("code", "hidden", "#| hide\nsecret = 1"), cell("code", "hero-picture", "#| echo: false\nshow(images)", outputs=picture),
        cell("code", "usage", "#| eval: false\nmodel.encode(images)", ["skip-execution"]),
        cell("code", "said", "f()", outputs=[stream("done\n")])))
    text, pictures = readme.build(project / "nbs/index.ipynb", project)
    assert "[the idea](https://decomp-nb.github.io/decomp_nb/methods/lsd.html#idea), [GitHub](https://github.com)" in text
    assert "![a](nbs/images/a.png)" in text and "![hero picture](nbs/images/hero-picture.png)" in text
    assert "secret" not in text and "show(images)" not in text and "<Picture>" not in text
    assert "```python\nmodel.encode(images)\n```" in text and "```text\ndone\n```" in text
    assert list(pictures) == ["nbs/images/hero-picture.png"]
    assert readme.stale(project) == ["README.md", "nbs/images/hero-picture.png"]


# --- running notebooks in place ------------------------------------------------------------------------------------------------------


def test_runner_leaves_out_what_nbdev_leaves_out(tmp_path):
    cells = [nbf.v4.new_code_cell(text, id=name, metadata={"tags": tags} if tags else {}) for name, text, tags in [
        ("first", "n = 1\nn", []), ("never", "#| eval: false\nn = 100", []), ("tagged", "n = 100", ["skip-execution"]),
        ("slow", "#| slow\nn += 10\nn", []), ("last", "n", [])]]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    for flags, expected in [({"slow", "gpu"}, "1"), ({"gpu"}, "11")]:
        path = tmp_path / "toy.ipynb"
        nbf.write(nbf.v4.new_notebook(cells=cells, metadata=kernel), path)
        run_nbs.run(path, flags)
        assert nbf.read(path, 4).cells[-1].outputs[0].data["text/plain"] == expected
    nbf.write(nbf.v4.new_notebook(cells=[nbf.v4.new_raw_cell("---\nskip_exec: true\n---"), *cells], metadata=kernel), path)
    assert "skipped" in run_nbs.run(path, set()) and not nbf.read(path, 4).cells[1].outputs
