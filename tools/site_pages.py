"""What the site adds to nbdev's own work on a notebook; settings.ini names it: `procs`, `skip_procs`, `renderer`.

* Every picture gets its description as alternative text (`fig-alt`), from the figure itself; a wide one keeps its width on a phone.
* Names in back-ticks become links, but not inside of code and not inside of links.
* Checks, imports and the code of figures are folded; tables get columns as wide as their words.
* A class is shown as a class, with its fields, its parameters in a table, and its methods.

Signatures are read from the package's source, not from objects: nothing has to be imported or evaluated for them.
"""
from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import re
import tokenize
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer
from PIL import Image, UnidentifiedImageError

LINE = 88  # a signature that is longer has one parameter a line
COLUMNS = 92  # characters that a table has room for
FOLDED_FROM = 9  # lines; the code of a figure that is shorter stays open
WIDE = 600  # pixels of the page; words in a wider picture cannot be read when it shrinks to the width of a phone
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# --- signatures, from the source ------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    "A parameter or a field, as the source has it"
    name: str
    type: str = ""
    default: str = ""
    meaning: str = ""


@lru_cache(None)
def parsed(path: Path) -> tuple[ast.Module, dict[int, str]]:
    "A module, and its comments by line"
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
    return ast.parse(text), comments


def package_file(name: str) -> Path | None:
    "The file that defines a public name of the package, by nbdev's index"
    known = NbdevLookup()[name]
    if not isinstance(known, tuple):
        return None
    spec = importlib.util.find_spec("decomp_nb")
    path = Path(spec.origin).parents[1] / known[1]
    return path if path.is_file() else None


def definition(name: str) -> tuple[Definition, dict[int, str]] | None:
    "The definition of a public name, and the comments of its module; None where the index does not know it"
    path = package_file(name)
    if path is None:
        return None
    tree, comments = parsed(path)
    owner, _, method = name.partition(".")
    found = next((n for n in tree.body if isinstance(n, Definition) and n.name == owner), None)
    if method and found is not None:
        found = next((n for n in found.body if isinstance(n, Definition) and n.name == method), None)
    return None if found is None else (found, comments)


def parameters(function: Definition, comments: dict[int, str]) -> list[Parameter]:
    "Parameters of a function with stars where they stand; what a comment beside them says is their meaning"
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [described(arg, value, comments) for arg, value in zip(plain, defaults)]
    if a.vararg:
        found.append(described(a.vararg, None, comments, "*"))
    elif a.kwonlyargs:
        found.append(Parameter("*"))
    found += [described(arg, value, comments) for arg, value in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        found.append(described(a.kwarg, None, comments, "**"))
    return [p for p in found if p.name not in ("self", "cls")]


def described(arg: ast.arg, default: ast.expr | None, comments: dict[int, str], stars: str = "") -> Parameter:
    last = arg.end_lineno if default is None else default.end_lineno
    own = arg.col_offset > 0 and comments.get(last, "")
    return Parameter(stars + arg.arg, text_of(arg.annotation), text_of(default), "" if "noqa" in (own or "") else own or "")


def text_of(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


def fields(cls: ast.ClassDef, comments: dict[int, str]) -> list[Parameter]:
    "Fields of a NamedTuple, a dataclass or any class that annotates them"
    found = []
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            meaning = comments.get(node.end_lineno, "")
            found.append(Parameter(node.target.id, text_of(node.annotation), text_of(node.value), meaning))
    return found


def bases(cls: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in cls.bases]


def decorators(function: Definition) -> set[str]:
    return {ast.unparse(d).split("(")[0] for d in function.decorator_list}


def methods(cls: ast.ClassDef) -> list[Definition]:
    "Public methods of a class with a docstring, and its operators"
    found = []
    for node in cls.body:
        if not isinstance(node, ast.FunctionDef) or node.name == "__init__" or not ast.get_docstring(node):
            continue
        operator = node.name.startswith("__") and node.name.endswith("__")
        if (operator or not node.name.startswith("_")) and not decorators(node) & {f"{node.name}.setter"}:
            found.append(node)
    return found


def signature(name: str, given: list[Parameter], returns: str, with_types: bool, word: str = "") -> str:
    "One line if it fits, else a line for each parameter"
    parts = []
    for p in given:
        part = f"{p.name}: {p.type}" if with_types and p.type else p.name
        equals = " = " if with_types and p.type else "="
        parts.append(part + (f"{equals}{p.default}" if p.default else ""))
    end = f" -> {returns}" if returns else ""
    line = f"{word}{name}({', '.join(parts)}){end}"
    if len(line) <= LINE:
        return line
    inside = "".join(f"    {part},\n" for part in parts)
    return f"{word}{name}(\n{inside}){end}"


# --- Markdown of a definition ---------------------------------------------------------------------------------------------------------


def in_table(text: str) -> str:
    "Text that may stand in a cell of a table: no bar ends the cell early"
    def code(match):
        content = match[1]
        return f"<code>{content.replace('|', '&#124;').replace('<', '&lt;')}</code>" if "|" in content else match[0]
    text = re.sub(r"`([^`]+)`", code, text.replace("\n", " "))
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def type_in_words(text: str) -> str:
    "`Tensor | None` → `Tensor or None`, which needs no bars"
    return f"`{text.replace(' | ', ' or ')}`" if text else ""


def table(given: list[Parameter], head: str) -> str:
    "A row for each parameter or field; nothing where no comment describes one"
    rows = [p for p in given if p.name != "*"]
    if not any(p.meaning for p in rows):
        return ""
    with_types = any(p.type for p in rows)
    lines = [f"| {head} | Type | Meaning |" if with_types else f"| {head} | Meaning |"]
    lines.append("|---" * (3 if with_types else 2) + "|")
    for p in rows:
        default = f" Default `{p.default}`." if p.default and p.default not in ("None", "''") else ""
        meaning = p.meaning.strip()
        end = "." if default and meaning and meaning[-1] not in ".;:!?" else ""
        words = [f"`{p.name}`", *([type_in_words(p.type)] if with_types else []), meaning + end + default]
        lines.append("| " + " | ".join(map(in_table, words)) + " |")
    return "\n".join(lines)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def sentence(node: Definition) -> str:
    "The docstring: its first paragraph in italics, as nbdev shows it"
    text = ast.get_docstring(node) or ""
    first, _, rest = text.partition("\n\n")
    return joined(f"*{first.strip()}*" if first and "*" not in first else first, rest)


def function_page(name: str, node: Definition, comments: dict[int, str]) -> str:
    given = parameters(node, comments)
    meanings = table(given, "Parameter")
    returns = text_of(node.returns)
    return joined(fenced(signature(name, given, returns, not meanings)), sentence(node), meanings)


def method_page(owner: str, node: Definition, comments: dict[int, str]) -> str:
    "A method below its class: heading, signature, docstring, parameters"
    name = f"{owner}.{node.name}"
    heading = "#### " + name.replace("__", "\\_\\_")
    if decorators(node) & {"property", "cached_property"}:
        returns = f": {text_of(node.returns)}" if node.returns else ""
        return joined(heading, fenced(f"{name}{returns}  # property"), sentence(node))
    return joined(heading, function_page(name, node, comments))


def inherited(cls: ast.ClassDef) -> str:
    "Links to what a class has from public classes of the package, the nearest first"
    said = []
    for base in bases(cls):
        found = None if base.startswith("_") else definition(base)
        if found is None:
            continue
        names = [m.name for m in methods(found[0]) if not m.name.startswith("_")]
        links = [f"[`{name}`]({NbdevLookup().doc(base)}.{name})" for name in names]
        said += [f"From `{base}`: {', '.join(links)}."] if links else []
        said += filter(None, [inherited(found[0])])
    return "\n\n".join(said)


def class_page(name: str, node: ast.ClassDef, comments: dict[int, str]) -> str:
    "A class: how it is made, its fields or parameters, its methods"
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    given = parameters(init, comments) if init else fields(node, comments)
    meanings = table(given, "Parameter" if init else "Field")
    parents = f"class {name}({', '.join(bases(node))}):" if bases(node) else f"class {name}:"
    made = signature(name, given, "", not meanings) if given else ""
    head = fenced(parents + (f"\n\n{made}" if made else ""))
    return joined(head, sentence(node), meanings, inherited(node), *(method_page(name, m, comments) for m in methods(node)))


class Renderer(BasicMarkdownRenderer):
    "Documentation of a name: nbdev's heading and link to the source, then what the source says"

    def _repr_markdown_(self):
        found = definition(self.nm)
        if found is None:
            return super()._repr_markdown_()
        node, comments = found
        address = NbdevLookup().code(self.nm)
        link = f'[source]({address}){{target="_blank" style="float:right; font-size:smaller"}}'
        page = class_page if isinstance(node, ast.ClassDef) else function_page
        return joined("---", link, f"{'#' * self.title_level} {self.nm}", page(self.nm, node, comments))


# --- text -----------------------------------------------------------------------------------------------------------------------------


def outside_fences(text: str, change) -> str:
    "`change` applied to every stretch of lines outside of fenced code"
    parts = re.split(r"(^ *```.*?^ *```[^\n]*$)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


LINK_OR_NAME = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)\s]*(?:\s[^)]*)?\)|<a\b.*?</a>|``.*?``|`([^`\s]+?)(?:\(\))?`", re.S)


def with_links(text: str) -> str:
    "Names in back-ticks as links to their documentation; code and what is a link already stay"
    lookup = NbdevLookup()

    def link(match):
        private = not match[1] or match[1].split(".")[-1].startswith("_")
        address = None if private else lookup.doc(match[1])
        return f"[{match[0]}]({address})" if address else match[0]
    return outside_fences(text, lambda part: LINK_OR_NAME.sub(link, part))


@lru_cache(None)
def site_address() -> str:
    "Where the site will stand, by settings.ini"
    known = get_config()
    return f"{known.doc_host}{known.doc_baseurl}/"


def with_near_links(text: str, depth: int) -> str:
    "Links into the site relative to a page that stands `depth` folders deep, so that a copy of the site leads into itself"
    start = "../" * depth or "./"
    return text.replace(f"]({site_address()}", f"]({start}")


RULER = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")


def row_cells(line: str) -> list[str]:
    "Cells of a line of a table; bars in code and behind a backslash do not part cells"
    parts = re.split(r"(`[^`]*`|\$[^$]*\$|\\\|)", line.strip().removeprefix("|").removesuffix("|"))
    marked = "".join(part.replace("|", "\0") if i % 2 else part for i, part in enumerate(parts))
    return [cell.replace("\0", "|").strip() for cell in marked.split("|")]


def visible(text: str) -> str:
    "What a reader sees of a cell, about"
    text = re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|[`*]", "", text)
    return re.sub(r"\\[a-zA-Z]+|[${}]", "", text)


def table_widths(rows: list[list[str]]) -> list[int]:
    "Characters for each column: room for its longest word, and what is left by how much there is to say"
    columns = list(zip(*rows))
    words = [max(max(map(len, re.split(r"[ /]+", visible(c))), default=1) for c in column) for column in columns]
    whole = [max(len(visible(c)) for c in column) for column in columns]
    spare = max(0, COLUMNS - sum(words))
    wanted = [max(0, w - n) for w, n in zip(whole, words)]
    total = max(1, sum(wanted))
    return [max(3, n + 1 + round(min(w, spare * w / total))) for n, w in zip(words, wanted)]


def ruler(line: str, widths: list[int]) -> str:
    "The line below a table's head, as long as the columns are to be wide"
    marks = []
    for cell, width in zip(row_cells(line), widths):
        left = ":" if cell.startswith(":") else ""
        right = ":" if cell.endswith(":") and len(cell) > 1 else ""
        marks.append(left + "-" * max(3, width - len(left + right)) + right)
    return "|" + "|".join(marks) + "|"


def with_balanced_tables(text: str) -> str:
    "Tables whose columns are as wide as their words; numbers stay beside their deviation"
    def balance(part):
        part = re.sub(r"(?<=\d) ± (?=[\d.])", "\u00a0±\u00a0", part)
        lines = part.split("\n")
        for i in range(1, len(lines)):
            if "|" in lines[i] and "|" in lines[i - 1] and RULER.match(lines[i]):
                last = next((j for j in range(i + 1, len(lines)) if "|" not in lines[j]), len(lines))
                rows = [row_cells(line) for line in [lines[i - 1], *lines[i + 1:last]]]
                n = len(row_cells(lines[i]))
                rows = [(row + [""] * n)[:n] for row in rows]
                lines[i] = ruler(lines[i], table_widths(rows))
        return "\n".join(lines)
    return outside_fences(text, balance)


KNOWN_TAGS = set(
    "a abbr audio b blockquote br button canvas caption center code col colgroup dd decomp-mixer del details dfn div dl dt em "
    "figcaption figure h1 h2 h3 h4 h5 h6 hr i img input ins kbd label li link main mark math mi mn mo mrow msub msup noscript ol option "
    "p path picture pre q rect s script section select small source span strong style sub summary sup svg table tbody td text tfoot th "
    "thead title tr u ul var video".split())


def with_visible_names(text: str) -> str:
    "`<c1>` outside of code is a word of the text and no tag: a browser would swallow it"
    def escape(match):
        return match[0] if match[1] is None or match[1].lower() in KNOWN_TAGS else "\\" + match[0]
    return outside_fences(text, lambda part: re.sub(r"`[^`\n]*`|<!--.*?-->|<(?:https?:[^>]*)>|<([a-zA-Z]\w*)>", escape, part, flags=re.S))


BADGE = re.compile(r'<a href="(https://colab[^"]+)"><img src="[^"]+" alt="Open In Colab"></a>')


def with_own_badge(text: str) -> str:
    "The Colab badge as a link that the style sheet draws: its picture would be fetched from elsewhere"
    return BADGE.sub(r'<a class="colab" href="\1">Open in Colab</a>', text)


# --- cells ----------------------------------------------------------------------------------------------------------------------------


def description(output: dict) -> str:
    "What a picture says of itself: the words in its file, or those in its text"
    data = output.get("data", {})
    if "image/png" in data:
        content = data["image/png"]
        raw = base64.b64decode(content if isinstance(content, str) else "".join(content))
        with Image.open(io.BytesIO(raw)) as image:
            if words := getattr(image, "text", {}).get("Description"):
                return str(words)
    text = data.get("text/plain", "")
    text = text if isinstance(text, str) else "".join(text)
    if text.startswith("Factors(codes="):
        return "A set of factors: who owns which pixel, where the method knows it, a colour for each factor, and the codes as a heat map"
    found = re.match(r"(?:Picture|Film) \d+×\d+: (.+)", text, re.S)
    return " ".join(found[1].split()) if found else ""


def pictures(cell: dict) -> list[dict]:
    return [o for o in cell.get("outputs", []) if any(mime.startswith("image/") for mime in o.get("data", {}))]


def has_option(cell: dict, name: str) -> bool:
    return bool(re.search(rf"^#\| *{name}:", cell["source"], re.M))


def add_option(cell: dict, name: str, value) -> None:
    "An option for Quarto, unless the cell has its own"
    if not has_option(cell, name):
        cell["source"] = f"#| {name}: {json.dumps(value, ensure_ascii=False)}\n{cell['source']}"


def describe_pictures(cell: dict) -> None:
    "`fig-alt` from the figures' own descriptions"
    words = [description(output) for output in pictures(cell)]
    if words and all(words):
        add_option(cell, "fig-alt", words[0] if len(words) == 1 else words)


def width_on_page(output: dict) -> int:
    "Pixels of the page that a picture takes: what it asks for, else its own"
    sizes = [about["width"] for mime, about in output.get("metadata", {}).items() if mime.startswith("image/") and "width" in about]
    return max(sizes) if sizes else max(map(own_width, bitmaps(output)), default=0)


def bitmaps(output: dict) -> list[bytes]:
    "Pictures of an output as files in memory; drawings (SVG) have no pixels"
    found = {mime: content for mime, content in output.get("data", {}).items() if mime.startswith("image/") and "svg" not in mime}
    return [base64.b64decode(content if isinstance(content, str) else "".join(content)) for content in found.values()]


def own_width(content: bytes) -> int:
    "Pixels of a picture; 0 for bytes that are none"
    try:
        return Image.open(io.BytesIO(content)).width
    except UnidentifiedImageError:
        return 0


def mark_wide_pictures(cell: dict) -> None:
    "A class for `styles.css`: on a phone a wide picture scrolls in its own box instead of shrinking until nobody can read it"
    if any(width_on_page(output) > WIDE for output in pictures(cell)):
        add_option(cell, "classes", "wide")


def statements(cell: dict) -> list[ast.stmt]:
    try:
        return ast.parse(cell["source"]).body
    except SyntaxError:
        return []


def is_check(cell: dict) -> bool:
    "Does the cell assert something, and show nothing?"
    return not cell.get("outputs") and any(isinstance(s, ast.Assert) for s in statements(cell))


def is_imports(cell: dict) -> bool:
    "Does the cell import, and do nothing else?"
    found = statements(cell)
    return bool(found) and all(isinstance(s, ast.Import | ast.ImportFrom) for s in found)


def fold_code(cell: dict, everything: bool) -> None:
    "Checks are folded; where `everything` may be, imports and the long code of a figure too"
    lines = [line for line in cell["source"].splitlines() if line.strip() and not line.startswith("#|")]
    summary = ""
    if is_check(cell):
        summary = "Checks"
    elif everything and is_imports(cell):
        summary = "Imports"
    elif everything and pictures(cell) and len(lines) >= FOLDED_FROM:
        summary = "Code of the figure"
    if summary and not has_option(cell, "code-fold") and not has_option(cell, "echo"):
        add_option(cell, "code-summary", summary)
        add_option(cell, "code-fold", True)


class Site(Processor):
    "The processor that settings.ini names; it comes after nbdev's own"

    def begin(self):
        path = Path(getattr(self.nb, "path_", "page.ipynb"))
        self.teaches = path.parent.name == "tutorials" or path.name == "index.ipynb"
        folders = list(path.parent.parts)[::-1]
        self.depth = folders.index("nbs") if "nbs" in folders else 0

    def cell(self, cell):
        if cell.cell_type == "markdown":
            cell.source = self.text(cell.source)
        if cell.cell_type != "code":
            return
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                words = data["text/markdown"]
                data["text/markdown"] = self.text(words if isinstance(words, str) else "".join(words))
        describe_pictures(cell)
        mark_wide_pictures(cell)
        fold_code(cell, not self.teaches)

    def end(self):
        "Without widgets on the page nothing need be fetched for them"
        for widgets in self.nb.metadata.get("widgets", {}).values():
            if not widgets.get("state"):
                self.nb.metadata.pop("widgets", None)
                return

    def text(self, text: str) -> str:
        linked = with_near_links(with_links(text), self.depth)
        return with_balanced_tables(with_own_badge(with_visible_names(linked)))
