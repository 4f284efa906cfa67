"""The house rules that a machine can check: `python tools/hygiene.py` prints what breaks them, and exits 1 if anything does.

A notebook rule takes a `Notebook` and yields findings; a project rule takes the project's folder. `tests/test_notebooks.py` shows every
rule a made-up case that breaks it.
"""
from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import readme
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from decomp_nb.training.parameters import allowed_types, parse_parameters

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com"


@dataclass
class Notebook:
    "A notebook as parsed JSON; `name` is its path relative to nbs/, without the suffix"
    name: str
    content: dict
    size: int = 0

    @classmethod
    def read(cls, path: Path, nbs: Path) -> Notebook:
        text = path.read_text(encoding="utf-8")
        return cls(str(path.relative_to(nbs).with_suffix("")), json.loads(text), len(text.encode()))

    @property
    def cells(self) -> list[dict]:
        return self.content["cells"]

    @property
    def code(self) -> list[dict]:
        return [c for c in self.cells if c["cell_type"] == "code"]

    @property
    def runs(self) -> bool:
        "A notebook that papermill runs with parameters"
        return Path(self.name).name.startswith(("train_", "eval_", "compare_")) or self.name == "explain/performance"

    @property
    def exports(self) -> bool:
        "A notebook that a module is made from"
        return any("default_exp" in marks(c) for c in self.code)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def marks(cell: dict) -> dict:
    "The `#|` directives of a cell"
    return readme.directives(source(cell))[0]


def exported(cell: dict) -> bool:
    return bool({"export", "exports", "exporti"} & marks(cell).keys())


def unattended(cell: dict) -> bool:
    "Does this cell run when nobody looks?"
    return marks(cell).get("eval") != "false" and "skip-execution" not in tags(cell)


def as_python(cell: dict) -> str:
    "A code cell as IPython hands it to Python: magics and shell lines become calls"
    return TransformerManager().transform_cell(source(cell))


def parsed(cell: dict) -> list[ast.stmt]:
    "Statements of a code cell; empty where it is no Python"
    try:
        return ast.parse(as_python(cell)).body
    except SyntaxError:
        return []


def outputs(nb: Notebook):
    for cell in nb.code:
        for output in cell.get("outputs", []):
            yield cell, output


def texts(output: dict):
    "Every piece of text in an output; pictures are left out"
    def joined(value):
        return "".join(value) if isinstance(value, list) else str(value)
    yield joined(output.get("text", ""))
    yield joined(output.get("traceback", ""))
    for mime, value in output.get("data", {}).items():
        if not mime.startswith("image/") or mime == "image/svg+xml":
            yield re.sub(r"data:[^\"')\s]+", "", joined(value))


# --- notebook rules ------------------------------------------------------------------------------------------------------------------


def kernelspec_is_python3(nb: Notebook):
    "Colab and papermill find the kernel by this name, and papermill wants the language beside it"
    spec = nb.content.get("metadata", {}).get("kernelspec", {})
    if (spec.get("name"), spec.get("language")) != ("python3", "python"):
        yield f"kernelspec is {spec.get('name')!r} for {spec.get('language')!r}, not 'python3' for 'python'"


def ids_speak(nb: Notebook):
    "Exported modules point at cells by id: unique, stable words"
    seen = set()
    for number, cell in enumerate(nb.cells):
        name = cell.get("id", "")
        if not name:
            yield f"cell {number} has no id"
        elif name in seen:
            yield f"cell id {name!r} occurs twice"
        elif any(re.fullmatch(r"[0-9a-f]{6,}", part) and re.search(r"\d", part) and re.search(r"[a-f]", part) for part in name.split("-")):
            yield f"cell id {name!r} looks random; use words"
        elif re.fullmatch(r"(cell-?)?\d+", name):
            yield f"cell id {name!r} is only a number; use words"
        seen.add(name)


def badge_url(name: str, root: Path = ROOT) -> str:
    "Colab address of a notebook, from settings.ini"
    cfg = readme.settings(root)
    return f"{COLAB}/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{name}.ipynb"


def badge_leads_here(nb: Notebook):
    "Every page opens in Colab; the home page links to the tutorials instead"
    if nb.name == "index":
        return
    head = "".join(source(c) for c in nb.cells[:5] if c["cell_type"] == "markdown")
    wanted = f'<a href="{badge_url(nb.name)}"><img src="{COLAB}/assets/colab-badge.svg" alt="Open In Colab"></a>'
    if wanted not in head:
        yield f"no Colab badge among the first cells; expected {wanted}"


def title_and_claim(nb: Notebook):
    "A page begins with its title and one sentence that says what it claims"
    first = next((source(c).strip() for c in nb.cells if c["cell_type"] == "markdown"), "")
    if not re.match(r"# .+\n+> .+", first):
        yield "the first text cell is not `# Title` followed by `> one-sentence claim`"


def one_parameters_cell(nb: Notebook):
    "papermill overrides the one cell tagged `parameters`"
    count = sum("parameters" in tags(c) for c in nb.cells)
    if count != int(nb.runs):
        yield f"{count} cells tagged 'parameters', expected {int(nb.runs)}"


def parameters_are_literals(nb: Notebook):
    "`name: type = literal  # help`, so that values can be checked and listed without running anything"
    for cell in nb.code:
        if "parameters" not in tags(cell):
            continue
        try:
            for p in parse_parameters(source(cell)).values():
                allowed_types(p.type)
                if not p.help:
                    yield f"parameter {p.name!r} has no help comment on its line"
        except ValueError as error:
            yield str(error)
        for statement in parsed(cell):
            if not isinstance(statement, ast.AnnAssign):
                yield f"parameters cell: `{ast.unparse(statement)}` has no type"


def papermill_reads_parameters(nb: Notebook):
    "papermill's own reader knows one `=` a line and plain types; what it cannot read it calls an unknown parameter"
    for cell in nb.code:
        if "parameters" in tags(cell):
            for line in source(cell).splitlines():
                if line.count("=") > 1 or re.match(r"\w+: [\w\[\], ]*[^\w\[\], =]", line):
                    yield f"papermill cannot read `{line}`: write `0: none` instead of `0 = none`, and plain types"


def no_stderr(nb: Notebook):
    "Warnings are mended, not shown"
    for cell, output in outputs(nb):
        if output.get("name") == "stderr":
            yield f"cell {cell['id']} shows stderr: {''.join(output['text'])[:80]!r}"


def no_error_outputs(nb: Notebook):
    for cell, output in outputs(nb):
        if output["output_type"] == "error":
            yield f"cell {cell['id']} shows an error: {output.get('ename')}"


def no_machine_paths(nb: Notebook):
    "A page must not tell on which machine it was made"
    where = re.compile(r"(?<![\w.:/-])(/home/|/root/|/tmp/|/work/|/Users/|/var/folders/)|\b[A-Z]:\\\w")
    for cell, output in outputs(nb):
        for text in texts(output):
            if found := where.search(text):
                yield f"cell {cell['id']} shows an absolute path: {text[max(0, found.start() - 20):found.end() + 30]!r}"
                break


def no_widget_state(nb: Notebook):
    "Widgets are dead without a kernel; a static figure stands beside them"
    if "widgets" in nb.content.get("metadata", {}):
        yield "widget state in the metadata"
    for cell, output in outputs(nb):
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            yield f"cell {cell['id']} has a widget output"


def below_one_megabyte(nb: Notebook):
    if nb.size >= 1_000_000:
        yield f"{nb.size / 1e6:.1f} MB; a notebook stays below 1 MB"


def outputs_are_committed(nb: Notebook):
    "The site shows the outputs as they are committed"
    shows = [c for c in nb.code if unattended(c) and not exported(c) and ast_value(c)]
    if not nb.runs and shows and not any(c.get("outputs") for c in shows):
        yield "no outputs: run `make notebooks NB=…`"


def no_picture_is_missing(nb: Notebook):
    "A sentence that announces a picture or a table is followed by it: on a page with outputs, a cell that shows something has one"
    page_ran = any(c.get("outputs") for c in nb.code)
    for cell in nb.code:
        silent = not cell.get("outputs") and "hide" not in marks(cell) and not source(cell).rstrip().endswith(";")
        if page_ran and silent and unattended(cell) and not exported(cell) and surely_shows(cell):
            yield f"cell {cell['id']} ends in something to see and has no output: run the page again"


SHOWING = {"print", "Table", "strip", "grid", "show", "overlay", "curve", "film"}  # calls that always leave an output


def surely_shows(cell: dict) -> bool:
    "Does the cell end in a name, or in a call that always shows something?"
    body = parsed(cell)
    if not body or not isinstance(body[-1], ast.Expr):
        return False
    value = body[-1].value
    called = value.func if isinstance(value, ast.Call) else None
    return isinstance(value, ast.Name) or isinstance(called, ast.Name) and called.id in SHOWING


def ast_value(cell: dict) -> bool:
    "Does the cell end in an expression, so that it shows something?"
    body = parsed(cell)
    return bool(body) and isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Constant)


def imports_stand_alone(nb: Notebook):
    "The site runs cells that import; anything else in them would run too"
    for cell in nb.code:
        kinds_here = {isinstance(s, ast.Import | ast.ImportFrom) for s in parsed(cell)}
        if kinds_here == {True, False} and unattended(cell):
            yield f"cell {cell['id']} mixes imports with other code"


def no_star_imports(nb: Notebook):
    for cell in nb.code:
        for s in parsed(cell):
            if isinstance(s, ast.ImportFrom) and any(a.name == "*" for a in s.names):
                yield f"cell {cell['id']} imports * from {s.module}"


def only_libraries_export(nb: Notebook):
    "What runs and what teaches imports the package; a class defined in a kernel is not the package's class"
    if nb.runs or nb.name.startswith("tutorials/"):
        for cell in nb.code:
            if exported(cell) or "default_exp" in marks(cell):
                yield f"cell {cell['id']} exports"


def runs_are_not_tests(nb: Notebook):
    "nbdev_test leaves run notebooks to pytest, which runs them small"
    if nb.runs and not any(c["cell_type"] == "raw" and re.search(r"^skip_exec:\s*true\s*$", source(c), re.M) for c in nb.cells):
        yield "no raw cell with front matter `skip_exec: true`"


def skipping_is_said_twice(nb: Notebook):
    "nbdev reads `#| eval: false`, Jupyter and papermill read the tag `skip-execution`"
    for cell in nb.code:
        if (marks(cell).get("eval") == "false") != ("skip-execution" in tags(cell)):
            yield f"cell {cell['id']} needs both `#| eval: false` and the tag skip-execution, or neither"


def cells_are_python(nb: Notebook):
    "What Jupyter cannot read; `if colab: %pip …` on one line, for instance: a magic needs a line of its own"
    for cell in nb.code:
        try:
            ast.parse(as_python(cell))
        except SyntaxError as error:
            yield f"cell {cell['id']}, line {error.lineno}: {error.msg}"


def installs_itself_on_colab(nb: Notebook):
    "Whoever opens a tutorial or a run in Colab has no package yet"
    if (nb.runs or nb.name.startswith("tutorials/")) and not any("google.colab" in source(c) and "%pip" in source(c) for c in nb.code):
        yield "no cell that installs the package on Colab"


def no_notebook_bars(nb: Notebook):
    "tqdm.auto becomes a widget in a kernel"
    for cell in nb.code:
        if re.search(r"tqdm\.(auto|notebook)", source(cell)):
            yield f"cell {cell['id']} uses tqdm.auto"


NOTEBOOK_RULES = [
    kernelspec_is_python3, ids_speak, badge_leads_here, title_and_claim, one_parameters_cell,
    parameters_are_literals, papermill_reads_parameters, no_stderr, no_error_outputs, no_machine_paths,
    no_widget_state, below_one_megabyte, outputs_are_committed, no_picture_is_missing, imports_stand_alone,
    no_star_imports, only_libraries_export, runs_are_not_tests, skipping_is_said_twice, cells_are_python,
    installs_itself_on_colab, no_notebook_bars,
]


# --- demonstration ratio -------------------------------------------------------------------------------------------------------------


def defines(cell: dict) -> bool:
    return exported(cell) and any(isinstance(s, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) for s in parsed(cell))


def shows_or_tests(cell: dict) -> bool:
    "A cell that uses what was defined: runs, and is neither an export, nor imports, nor hidden"
    if exported(cell) or "hide" in marks(cell) or not unattended(cell):
        return False
    return any(not isinstance(s, ast.Import | ast.ImportFrom) for s in parsed(cell))


def undemonstrated(nb: Notebook) -> tuple[list[str], int]:
    "Ids of exported definitions that neither of the next two code cells shows or tests; and how many there are in all"
    code = nb.code
    at = [i for i, cell in enumerate(code) if defines(cell)]
    return [code[i]["id"] for i in at if not any(map(shows_or_tests, code[i + 1:i + 3]))], len(at)


def definitions_are_shown(root: Path = ROOT, wanted: float = 0.9):
    "At least nine of ten exported definitions are shown or tested within two code cells"
    missing, total = [], 0
    for nb in notebooks(root):
        ids, count = undemonstrated(nb)
        missing += [f"{nb.name}#{i}" for i in ids]
        total += count
    if total and 1 - len(missing) / total < wanted:
        yield f"{total - len(missing)} of {total} exported definitions are shown or tested; not: {', '.join(missing)}"


# --- layers --------------------------------------------------------------------------------------------------------------------------

LAYERS = [{"checks"}, {"factors", "decomposer"}, {"data", "worlds", "viz.figures"}, {"components"}, {"methods"},
          {"metrics", "training", "official", "viz.mixer", "viz.attribution"}]
NEIGHBOURS = {("data", "worlds"),  # data sets by name may be drawn ones; worlds read no files
              ("decomposer", "factors")}
SHARED = {  # modules that belong to one layer
    "viz.colours": "factors", "viz.web_mixer": "viz.mixer",
    **dict.fromkeys(("viz.sheets", "viz.plots", "viz.film"), "viz.figures"),
}
STRANGERS = {("metrics", "methods"), ("metrics", "components")}  # metrics take arrays
FOR_ALL = {"decomp_nb.components.lpips"}  # a distance of pictures: a loss for components, a score for metrics


def folder_of(module: str) -> str:
    "`decomp_nb.data.images` → `data`; of `viz`, which stands in several layers, the part: `decomp_nb.viz.mixer` → `viz.mixer`"
    parts = module.split(".")[1:]
    name = ".".join(parts[:2]) if parts and parts[0] == "viz" else parts[0] if parts else ""
    return SHARED.get(name, name)


def layer(name: str) -> int | None:
    return next((i for i, folders in enumerate(LAYERS) if name in folders), None)


def package_modules(root: Path = ROOT) -> dict[str, Path]:
    "Dotted name → file of the exported modules"
    paths = [p for p in (root / "decomp_nb").rglob("*.py") if not p.name.startswith("_")]
    return {".".join(p.relative_to(root).with_suffix("").parts): p for p in sorted(paths)}


def imported_modules(module: str, text: str, known: set[str]) -> set[str]:
    "Modules of the package that a module imports anywhere, inside functions too; relative imports resolved"
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[:-node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names}
    return {name for name in found if name == "decomp_nb" or name.startswith("decomp_nb.")} - {module}


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    "Module → modules of the package that it imports"
    modules = package_modules(root)
    return {name: imported_modules(name, path.read_text(encoding="utf-8"), set(modules)) for name, path in modules.items()}


def layers_hold(root: Path = ROOT):
    "Imports point to lower layers only"
    for module, targets in import_graph(root).items():
        here = folder_of(module)
        if layer(here) is None:
            yield f"{module}: folder {here!r} is in no layer"
            continue
        for target in sorted(targets):
            there = folder_of(target)
            if not there:
                yield f"{module} imports from the package's front door; name the module"
            elif here == there and here != "methods" or (here, there) in NEIGHBOURS:
                continue
            elif target in FOR_ALL and layer(there) < layer(here):
                continue
            elif here == there or layer(there) is None or layer(there) >= layer(here) or (here, there) in STRANGERS:
                yield f"{module} imports {target}: {here} may not know {there}"


# --- the package ---------------------------------------------------------------------------------------------------------------------


UNPICKLERS = {f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle", "joblib") for name in ("load", "loads", "Unpickler")}


def unsafe_loads(text: str):
    "Lines that would unpickle: pickle and its kin, torch.load without weights_only=True, numpy with allow_pickle=True, unsafe YAML"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLERS:
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names} & UNPICKLERS
            yield from ((node.lineno, f"imports {name}") for name in sorted(names))
        if isinstance(node, ast.Call):
            said = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
            function = ast.unparse(node.func)
            if function == "torch.load" and said.get("weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True"
            if said.get("allow_pickle", False) is not False:
                yield node.lineno, "allow_pickle"
            if function in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node.lineno, f"{function}; use yaml.safe_load"


def nothing_is_unpickled(root: Path = ROOT):
    for name, path in package_modules(root).items():
        for line, why in unsafe_loads(path.read_text(encoding="utf-8")):
            yield f"{name}:{line}: {why}"


def no_torchvision(root: Path = ROOT):
    "Not a dependency: there is no build of it for every torch"
    wanted = re.compile(r"^\s*(import|from)\s+torchvision|^torchvision\b|[ =]torchvision[<>=!~]", re.M)
    files = [root / name for name in ("constraints.txt", "settings.ini", "setup.py")]
    for folder in ("decomp_nb", "tests", "tools"):
        files += (root / folder).rglob("*.py")
    for path in files:
        if path.is_file() and wanted.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(root)} asks for torchvision"
    for nb in notebooks(root):
        if any(wanted.search(source(c)) for c in nb.code):
            yield f"nbs/{nb.name}.ipynb asks for torchvision"


# --- site and repository -------------------------------------------------------------------------------------------------------------


def notebooks(root: Path = ROOT) -> list[Notebook]:
    nbs = root / "nbs"
    skipped = {".ipynb_checkpoints", "papermill_runs"}
    return [Notebook.read(p, nbs) for p in sorted(nbs.rglob("*.ipynb")) if not skipped & set(p.parts)]


def sidebar_entries(contents: list) -> list[str]:
    "Notebook paths of a Quarto sidebar, sections opened"
    found = []
    for item in contents:
        if isinstance(item, str):
            found.append(item)
        elif "contents" in item:
            found += sidebar_entries(item["contents"])
        else:
            found += [item["href"]] if "href" in item else []
    return found


def sidebar_is_complete(root: Path = ROOT):
    "The reading order names every notebook, and only those that exist"
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    listed = sidebar_entries(site["website"]["sidebar"]["contents"])
    present = {f"{nb.name}.ipynb" for nb in notebooks(root)}
    for name in listed:
        if listed.count(name) > 1:
            yield f"{name} stands twice in the sidebar"
        if name not in present:
            yield f"the sidebar names {name}, which does not exist"
    for name in sorted(present - set(listed)):
        yield f"{name} is not in the sidebar of _quarto.yml"


def site_configuration_is_linked(root: Path = ROOT):
    "nbdev reads nbs/_quarto.yml, and would silently write its own default where that is missing"
    link = root / "nbs" / "_quarto.yml"
    if not link.is_symlink() or os.readlink(link) != "../_quarto.yml":
        yield "nbs/_quarto.yml must be a symbolic link to ../_quarto.yml"


def readme_is_current(root: Path = ROOT):
    for name in readme.stale(root):
        yield f"{name} differs from nbs/index.ipynb: run `make prepare`"


GENERATED = [".venv/x", "_proc/x", "_docs/x", "build/x", "dist/x", "decomp_nb.egg-info/x", "nbs/nbdev.yml", "papermill_runs/out/x.ipynb",
             "decomp_nb/__pycache__/x.pyc", "nbs/.ipynb_checkpoints/x.ipynb", ".pytest_cache/x", ".ruff_cache/x"]
KEPT = ["papermill_runs/README.md", "papermill_runs/recipes/x.yaml", "decomp_nb/factors.py",
        "nbs/factors.ipynb", "nbs/_quarto.yml", "README.md"]


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout


def ignored_as_it_should_be(root: Path = ROOT):
    "What is generated stays out of git, what is source stays in"
    if not git(root, "rev-parse", "--git-dir"):
        return
    ignored = set(git(root, "check-ignore", "--no-index", *GENERATED, *KEPT).splitlines())
    yield from (f".gitignore does not cover {p}" for p in GENERATED if p not in ignored)
    yield from (f".gitignore hides {p}" for p in KEPT if p in ignored)
    yield from (f"{p} is in git, though .gitignore names it" for p in git(root, "ls-files", "-ci", "--exclude-standard").splitlines())


def data_has_a_public_home(root: Path = ROOT):
    "Users have no folder shared/data: pages, package and recipes name data relative to the data folder, see data/home"
    files = [path for folder in ("nbs", "decomp_nb", "papermill_runs") for path in (root / folder).rglob("*")]
    for path in sorted(files):
        ours = path.suffix in (".ipynb", ".py", ".yaml", ".md", ".sbatch") and not {"out", ".ipynb_checkpoints"} & set(path.parts)
        if ours and path.is_file() and "shared/data" in path.read_text(encoding="utf-8"):
            yield f"{path.relative_to(root)} names shared/data"


PROJECT_RULES = [
    definitions_are_shown, layers_hold, nothing_is_unpickled, no_torchvision, sidebar_is_complete, site_configuration_is_linked,
    readme_is_current, ignored_as_it_should_be, data_has_a_public_home,
]


def findings(root: Path = ROOT) -> list[str]:
    "Everything that breaks a rule, one line each"
    found = [f"nbs/{nb.name}.ipynb: {text}" for nb in notebooks(root) for rule in NOTEBOOK_RULES for text in rule(nb)]
    return found + [text for rule in PROJECT_RULES for text in rule(root)]


if __name__ == "__main__":
    found = findings()
    print("\n".join(found) or f"hygiene: {len(notebooks())} notebooks, {len(NOTEBOOK_RULES) + len(PROJECT_RULES)} rules, nothing to say")
    sys.exit(bool(found))
