"""How dense the code is: tokens per line and per function, widths, lengths of modules and cells; names that no page shows;
and in visible cells of pages that export nothing: crowded statements.

`python tools/style.py` prints a row per module; `--update` lowers the limits of tests/style_limits.json to what is measured.
"""
from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMITS = ROOT / "tests" / "style_limits.json"
NO_CODE = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER, tokenize.COMMENT}
FSTRING_START = getattr(tokenize, "FSTRING_START", None)
FSTRING_END = getattr(tokenize, "FSTRING_END", None)
WITH_BODY = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Measure(NamedTuple):
    "What is measured of one module; the two about functions have an aim for the whole package only"
    tokens_per_line: float  # code tokens over lines that hold one; comments and docstrings do not count
    dense_bodies: int  # function bodies of five lines and more with over 25 tokens a line
    wide_lines: int  # lines of over 120 characters
    width: int  # 95th percentile of the width of lines that are not blank
    median_function: float  # tokens
    long_function: float  # tokens, 90th percentile
    lines: int  # code lines


AIMS = {"tokens_per_line": 11.5, "dense_bodies": 0, "wide_lines": 0, "width": 110, "lines": 350}
PACKAGE_AIMS = {"median_function": 60, "long_function": 190, "names_not_shown": 3}
PACKAGE = "whole package"
LONGEST_CELL = "longest exported cell"
PAGES = "pages that export nothing"
PAGE_AIMS = {"tokens_per_line": 11.5, "crowded": 0, "wide_lines": 0, "wide_parameters": 0, "longest_cell": 40}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_starts(tree: ast.Module) -> set[tuple[int, int]]:
    "Line and column at which each docstring begins"
    starts = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, WITH_BODY) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            starts.add((first.lineno, first.col_offset))
    return starts


def merge_fstrings(tokens: list[tokenize.TokenInfo]) -> list[tokenize.TokenInfo]:
    "An f-string counts as one token in every version of Python: since 3.12 its parts come one by one"
    merged = []
    depth = 0
    for token in tokens:
        if token.type == FSTRING_START:
            depth += 1
            if depth == 1:
                merged.append(token)
        elif token.type == FSTRING_END:
            depth -= 1
        elif not depth:
            merged.append(token)
    return merged


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
    "Tokens that are code: no comments, no docstrings, no line ends"
    docstrings = docstring_starts(ast.parse(source))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = [t for t in tokens if t.type not in NO_CODE and t.start not in docstrings]
    return merge_fstrings(code)


def lines_of(tokens: list[tokenize.TokenInfo]) -> set[int]:
    "Numbers of the lines that hold a token"
    lines = set()
    for token in tokens:
        lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def percentile(values: list[float], share: float) -> float:
    "The value below which `share` of the values lie; 0 of none"
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0


def functions(source: str) -> list[ast.FunctionDef]:
    "Every function and method"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def between(starts: list[int], first: int, last: int) -> list[int]:
    "Those of the ordered line numbers that lie in `first … last`"
    return starts[bisect_left(starts, first):bisect_right(starts, last)]


def is_dense(function: ast.FunctionDef, starts: list[int]) -> bool:
    "Whether its body has five lines or more and over 25 tokens a line"
    body = between(starts, function.body[0].lineno, function.end_lineno)
    lines = set(body)
    return len(lines) >= 5 and len(body) > 25 * len(lines)


def function_sizes(source: str) -> list[int]:
    "Tokens of every function and method"
    starts = [token.start[0] for token in code_tokens(source)]
    return [len(between(starts, f.lineno, f.end_lineno)) for f in functions(source)]


def measure(source: str) -> Measure:
    "All measures of a module's source"
    source = without_names(source)
    tokens = code_tokens(source)
    found = functions(source)
    starts = [token.start[0] for token in tokens]
    sizes = function_sizes(source)
    widths = [len(line) for line in source.splitlines() if line.strip()]
    lines = len(lines_of(tokens))
    return Measure(
        tokens_per_line=round(len(tokens) / max(lines, 1), 1),
        dense_bodies=sum(is_dense(f, starts) for f in found),
        wide_lines=sum(width > 120 for width in widths),
        width=percentile(widths, 0.95),
        median_function=percentile(sizes, 0.5),
        long_function=percentile(sizes, 0.9),
        lines=lines,
    )


def without_names(source: str) -> str:
    "The source without the `__all__` that nbdev writes"
    tree = ast.parse(source)
    listed = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    lines = source.splitlines()
    for node in listed:
        lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines) + "\n"


def modules() -> dict[str, Path]:
    "Name → file of every module of the package that a person wrote"
    package = ROOT / "decomp_nb"
    files = sorted(p for p in package.rglob("*.py") if p.name != "_modidx.py")
    return {p.relative_to(package).as_posix(): p for p in files if p.read_text(encoding="utf-8").strip()}


def code_cells() -> dict[str, list[str]]:
    "Notebook → sources of its code cells"
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            name = path.relative_to(ROOT / "nbs").as_posix()
            found[name] = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return found


def public_names(source: str) -> list[str]:
    "The `__all__` of a module"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def not_shown(names: list[str], cells: list[str]) -> list[str]:
    "Names that no visible cell uses: exported and hidden cells do not count"
    visible = [cell for cell in cells if not re.search(r"^#\|\s*(hide|export|default_exp)", cell, re.MULTILINE)]
    words = set(re.findall(r"\w+", "\n".join(visible)))
    return [name for name in names if name not in words]


def names_by_page() -> dict[str, tuple[list[str], list[str]]]:
    "Notebook that makes a module → its public names, and those that the page does not show"
    found = {}
    for page, cells in code_cells().items():
        homes = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells), re.MULTILINE)
        if homes:
            module = ROOT / "decomp_nb" / f"{homes[0].replace('.', '/')}.py"
            names = public_names(module.read_text(encoding="utf-8"))
            found[page] = names, not_shown(names, cells)
    return found


def measure_package() -> dict[str, float]:
    "Median and 90th percentile of the tokens of all functions; percentage of public names that no page shows"
    sizes = []
    for path in modules().values():
        sizes += function_sizes(path.read_text(encoding="utf-8"))
    pages = names_by_page().values()
    share = sum(len(missing) for _, missing in pages) / sum(len(names) for names, _ in pages)
    return {
        "median_function": percentile(sizes, 0.5),
        "long_function": percentile(sizes, 0.9),
        "names_not_shown": round(100 * share, 1),
    }


def exported_lines(cells: list[str]) -> list[int]:
    "Lines of each exported cell, blank ones and the directive left out"
    exported = [source for source in cells if source.lstrip().startswith("#| export")]
    return [sum(bool(line.strip()) for line in source.splitlines()[1:]) for source in exported]


def longest_cells() -> dict[str, int]:
    "Notebook → lines of its longest exported cell"
    lines = {name: exported_lines(cells) for name, cells in code_cells().items()}
    return {name: max(counts) for name, counts in lines.items() if counts}


def has_inner(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    "Whether there is a node of these kinds inside of another"
    return any(isinstance(inner, kinds) for inner in ast.walk(node) if inner is not node)


def shares_line(node: ast.AST) -> bool:
    "Whether a block stands on the line of its head, or two statements on one line"
    for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
        if not isinstance(body, list) or not body:
            continue
        starts = [statement.lineno for statement in body]
        ends = [statement.end_lineno for statement in body]
        if any(start <= end for start, end in zip(starts[1:], ends)):
            return True
        if not isinstance(node, ast.Module) and starts[0] == node.lineno:
            return True
    return False


def crowding(node: ast.AST) -> str:
    "What makes a reader stop at a node: the name of the fault, or nothing"
    if shares_line(node):
        return "several statements on a line"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return "a lambda with a name"
    if isinstance(node, COMPREHENSIONS) and (len(node.generators) > 1 or has_inner(node, COMPREHENSIONS)):
        return "a nested comprehension"
    if isinstance(node, COMPREHENSIONS) and node.end_lineno - node.lineno >= 4:
        return "a comprehension of more than four lines"
    if isinstance(node, ast.IfExp) and (has_inner(node, ast.IfExp) or node.end_lineno > node.lineno):
        return "a conditional expression of several lines or steps"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple) and any(isinstance(v, ast.Call) for v in node.value.elts):
        return "calls in a row"
    return ""


def crowded(source: str) -> list[str]:
    "Line and fault of every crowded place; a tuple at the end of a cell is what it shows"
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    found = []
    for node in ast.walk(tree):
        fault = crowding(node)
        if fault and not (node is last and fault == "calls in a row"):
            found.append(f"line {getattr(node, 'lineno', 1)}: {fault}")
    return found


class Cell(NamedTuple):
    "A code cell of a page"
    name: str
    source: str
    is_parameters: bool


def visible_cells(path: Path) -> list[Cell]:
    "Code cells that run; empty for pages that export a module"
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if "default_exp" in source:
            return []
        tags = cell["metadata"].get("tags", [])
        if "skip-execution" not in tags:
            found.append(Cell(cell["id"], source, "parameters" in tags))
    return found


def pages() -> dict[str, list[Cell]]:
    "Page that exports nothing → its cells"
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = [] if ".ipynb_checkpoints" in path.parts else visible_cells(path)
        if cells:
            found[path.relative_to(ROOT / "nbs").as_posix()] = cells
    return found


def count_wide(cells: list[Cell]) -> int:
    "Lines of over 120 characters"
    return sum(len(line) > 120 for cell in cells for line in cell.source.splitlines())


def measure_page(cells: list[Cell]) -> dict[str, float]:
    "Measures of a page's cells; a parameters cell is a list that papermill reads line by line, so only its width counts"
    code = [cell for cell in cells if not cell.is_parameters]
    whole = measure("\n\n".join(cell.source for cell in code) + "\n")
    counts = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code]
    return {
        "tokens_per_line": whole.tokens_per_line,
        "crowded": sum(len(crowded(cell.source)) for cell in code),
        "wide_lines": count_wide(code),
        "wide_parameters": count_wide([cell for cell in cells if cell.is_parameters]),
        "longest_cell": max(counts, default=0),
    }


def allowed(measured: float, aim: float, limit: float | None) -> float:
    "The new limit: never above the old one, never below the aim"
    return max(aim, measured if limit is None else min(measured, limit))


def above(values: dict[str, float], aims: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    "New limits of whatever is still above its aim"
    return {key: allowed(values[key], aim, before.get(key)) for key, aim in aims.items() if values[key] > aim}


def updated_limits(old: dict) -> dict:
    "Limits as measured now, for whatever is still above its aim"
    limits = {}
    for name, path in modules().items():
        values = measure(path.read_text(encoding="utf-8"))._asdict()
        limits[name] = above(values, AIMS, old.get(name, {}))
    limits = {name: row for name, row in limits.items() if row}
    limits[PACKAGE] = above(measure_package(), PACKAGE_AIMS, old.get(PACKAGE, {}))
    limits[LONGEST_CELL] = {name: n for name, n in longest_cells().items() if n > 40}
    before = old.get(PAGES, {})
    of_pages = {name: above(measure_page(cells), PAGE_AIMS, before.get(name, {})) for name, cells in pages().items()}
    limits[PAGES] = {name: row for name, row in of_pages.items() if row}
    return limits


def main() -> None:
    "Print the table, or lower the limits"
    if "--update" in sys.argv:
        old = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
        LIMITS.write_text(json.dumps(updated_limits(old), indent=1) + "\n")
        return
    print("  ".join(name.replace("_", " ") for name in Measure._fields))
    for name, path in modules().items():
        print("  ".join(f"{value:6g}" for value in measure(path.read_text(encoding="utf-8"))), name)
    print(", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in measure_package().items()))
    for page, (_, missing) in names_by_page().items():
        if missing:
            print(f"{page} does not show {', '.join(missing)}")
    for page, cells in pages().items():
        print("  ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in measure_page(cells).items()), page)
        for cell in cells:
            if not cell.is_parameters:
                print("".join(f"    {cell.name}, {fault}\n" for fault in crowded(cell.source)), end="")


if __name__ == "__main__":
    main()
