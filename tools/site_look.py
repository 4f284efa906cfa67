"""Looks at the pages in Chromium, at the widths of a desk and of a phone: `python tools/site_look.py FOLDER [PAGE …]`.

Says which pages scroll sideways, and keeps a picture of each page at each width in FOLDER. Looks at `_docs` where Quarto has rendered it,
else at the pages as nbdev hands them to Quarto, drawn by nbconvert with the site's style sheet: figures, tables, widths and mixers are
those of the site, its frame (bars, colours of code) is not.
"""
from __future__ import annotations

import argparse
import html
import json
import re
import sys
import tempfile
from pathlib import Path

import chromium
import documentation
import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
TALLEST = 7_000  # pixels of a picture
COLUMN = """main.content { max-width: 860px; margin: 0 auto; padding: 0 14px; font-family: system-ui }
pre, .tex { overflow-x: auto } .tex { white-space: nowrap } p, li { overflow-wrap: anywhere }
img { max-width: 100%; height: auto } .anchor-link { display: none }"""
MEASURE = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
function beyond(page, width) {  // the first words that stand out of the page, and not in a box that scrolls
  const walk = page.createTreeWalker(page.querySelector("main"), NodeFilter.SHOW_TEXT), range = page.createRange();
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement;
    range.selectNodeContents(walk.currentNode);
    const out = range.getBoundingClientRect().right > width + 1;
    const words = `${parent.tagName.toLowerCase()}: ${parent.textContent.trim().slice(0, 50)}`;
    if (out && !parent.closest("pre, table, math, .tex")) return words;
  }
  return "a picture or a box";
}
function look(i, j) {
  if (i === pages.length) { document.body.setAttribute("data-found", JSON.stringify(found)); return; }
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${widths[j]}px;height:900px;border:0`;
  const next = () => { frame.remove(); j + 1 < widths.length ? look(i, j + 1) : look(i + 1, 0); };
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    const words = root.scrollWidth > widths[j] + 1 ? beyond(frame.contentDocument, widths[j]) : "";
    found.push([i, widths[j], root.scrollWidth, root.scrollHeight, words]);
    next();
  };
  frame.onerror = next;
  frame.src = pages[i];
  document.body.append(frame);
}
look(0, 0);
</script></body>"""


def boxed(formula: re.Match) -> str:
    "A formula as it is written, in a box that scrolls as the site's does"
    return f'<div class="tex">{html.escape(formula[0])}</div>'


def drawn(nbs: Path, folder: Path, names: list[str]) -> list[str]:
    "Pages of nbdev as HTML in `folder`; → their names"
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_raw=True)
    style = (ROOT / "nbs" / "styles.css").read_text(encoding="utf-8") + COLUMN
    style = style.replace(".cell.wide", ".celltag_wide")  # nbconvert's name for a class of a cell
    done = []
    for path in sorted(nbs.rglob("*.page")):
        name = str(path.relative_to(nbs).with_suffix(""))
        if names and name not in names:
            continue
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(r"\$\$(.+?)\$\$", boxed, cell.source, flags=re.S)
            if cell.cell_type == "code":
                hidden = re.search(r"^#\| *(echo: *false|code-fold: *true)", cell.source, re.M)
                cell.metadata["tags"] = ["wide"] if re.search(r"^#\| *classes: *\"wide\"", cell.source, re.M) else []
                cell.source = "" if hidden else re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
        body, _ = exporter.from_notebook_node(notebook)
        target = folder / f"{name}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        head = f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{style}</style>'
        target.write_text(f'{head}<main class="content">{body}</main>', encoding="utf-8")
        done.append(name)
    for part in ("images", "mixer.js"):
        if not (folder / part).exists():
            (folder / part).symlink_to((ROOT / "nbs" / part).resolve())
    return done


def measured(folder: Path, names: list[str]) -> dict[tuple[str, int], tuple[int, int, str]]:
    "(page, width of the window) → width and height of the page, and what stands out of it"
    pages = json.dumps([f"{name}.html" for name in names])
    widths = json.dumps([width for width, _ in WIDTHS.values()])
    page = folder / "measure.html"
    page.write_text(MEASURE.replace("PAGES", pages).replace("WIDTHS", widths), encoding="utf-8")
    found = re.search(r'data-found="([^"]+)"', chromium.dump(page, 3_600_000, timeout=900))
    if not found:
        raise RuntimeError("Chromium did not come to the end of the pages")
    return {(names[i], width): (w, h, words) for i, width, w, h, words in json.loads(html.unescape(found[1]))}


def sideways(sizes: dict) -> list[str]:
    "Pages that are wider than their window"
    found = [(name, width, w, words) for (name, width), (w, _, words) in sizes.items() if w > width + 1]
    return [f"{name} scrolls sideways at {width}: {w} pixels wide, {words}" for name, width, w, words in found]


def photographs(folder: Path, names: list[str], sizes: dict, target: Path) -> None:
    "A picture of each page at each width; a frame, because Chromium's own window has a least width"
    for name in names:
        for kind, (width, height) in WIDTHS.items():
            tall = min(TALLEST, max(height, sizes.get((name, width), (0, height, ''))[1]))
            frame = folder / "frame.html"
            address = html.escape(f"{name}.html")
            style = f"width:{width}px;height:{tall}px;border:0"
            frame.write_text(f'<!doctype html><body style="margin:0"><iframe src="{address}" style="{style}"></iframe>', encoding="utf-8")
            picture = target / f"{name.replace('/', '-')}-{kind}.png"
            chromium.photograph(frame, picture, max(width, 500), tall)


def look(target: Path, names: list[str]) -> list[str]:
    "Pictures into `target`; → what is wrong"
    target.mkdir(parents=True, exist_ok=True)
    docs = ROOT / "_docs"
    if (docs / "index.html").is_file():
        pages = names or sorted(str(p.relative_to(docs).with_suffix("")) for p in docs.rglob("*.html"))
        return look_at(docs, pages, target)
    with documentation.pages(ROOT) as (nbs, _), tempfile.TemporaryDirectory() as folder:
        return look_at(Path(folder), drawn(nbs, Path(folder), names), target)


def look_at(folder: Path, names: list[str], target: Path) -> list[str]:
    sizes = measured(folder, names)
    photographs(folder, names, sizes, target)
    return sideways(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="*", help="for instance methods/lsd; by default all")
    args = parser.parse_args()
    if chromium.find() is None:
        print(chromium.ABSENT)
        return 1
    found = look(args.folder, args.pages)
    print("\n".join(found) or "no page scrolls sideways")
    return bool(found)


if __name__ == "__main__":
    import site_look  # nbdev's shell replaces __main__, where workers would then look for `step` in vain
    sys.exit(site_look.main())
