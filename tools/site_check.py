"""What must hold of the site, without Quarto: `python tools/site_check.py` prints what does not, and exits 1 then.

Does nbdev's step before Quarto (`documentation.py`) and reads the pages that come out of it: links and anchors, words for pictures,
badges, Markdown that would be shown raw, widths, sizes, and what a page would fetch from elsewhere. Where Quarto is installed it renders
the site too, and with Chromium it looks at it (`site_look.py`).

A page rule takes a `Page` and yields findings, a site rule takes the whole `Site`. `tests/test_site.py` shows every rule a fault.
"""
from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import documentation
import readme
import site_pages
import yaml
from PIL import Image, UnidentifiedImageError

ROOT = Path(__file__).resolve().parents[1]
COMMAND_WIDTH = 96  # characters; longer commands are cut by a phone and wrapped by a desktop
OUTPUT_WIDTH = 450  # characters of a line of text; outputs wrap, but nobody reads six lines of one value
STILL_BYTES, FILM_BYTES = 280_000, 420_000
PAGE_BYTES = 1_100_000
COLUMN_WIDTH = 860  # pixels that the text takes on a desktop; a wider picture shrinks, and its words with it


# --- pages ----------------------------------------------------------------------------------------------------------------------------


def joined(text) -> str:
    return text if isinstance(text, str) else "".join(text)


@dataclass
class Page:
    "A notebook after nbdev's step; `name` is its path relative to nbs/, without the suffix"
    name: str
    cells: list[dict]
    size: int = 0

    @classmethod
    def read(cls, path: Path, nbs: Path) -> Page:
        text = path.read_text(encoding="utf-8")
        return cls(str(path.relative_to(nbs).with_suffix("")), json.loads(text)["cells"], len(text.encode()))

    def code(self):
        return [c for c in self.cells if c["cell_type"] == "code"]

    def outputs(self):
        for cell in self.code():
            for output in cell.get("outputs", []):
                yield cell, output

    def markdown(self):
        "Every piece of Markdown of the page with the id of its cell: text, and outputs that are Markdown"
        for cell in self.cells:
            if cell["cell_type"] == "markdown":
                yield cell.get("id", ""), joined(cell["source"])
            for output in cell.get("outputs", []):
                if "text/markdown" in output.get("data", {}):
                    yield cell.get("id", ""), joined(output["data"]["text/markdown"])

    @cached_property
    def claim(self) -> str:
        "The sentence under the title, which search results and llms.txt show; nbdev keeps it in a cell of YAML"
        fronts = [joined(cell["source"]) for cell in self.cells if cell["cell_type"] == "raw"]
        kept = yaml.safe_load(fronts[0].strip().strip("-")) if fronts else {}
        return str(kept.get("description", "")).strip()

    def printed(self):
        "Every output of plain text with the id of its cell"
        for cell, output in self.outputs():
            data = output.get("data", {})
            if "text" in output:
                yield cell.get("id", ""), joined(output["text"])
            elif set(data) == {"text/plain"}:
                yield cell.get("id", ""), joined(data["text/plain"])

    def pictures(self):
        "Cell, media type and bytes (base64 taken off, about) of every picture"
        for cell, output in self.outputs():
            for mime, content in output.get("data", {}).items():
                if mime.startswith("image/"):
                    yield cell, mime, len(joined(content)) * (1 if "svg" in mime else 3) // (1 if "svg" in mime else 4)

    @cached_property
    def anchors(self) -> set[str]:
        "Ids that links may name: headings as Pandoc names them, and ids in HTML"
        found = []
        for _, text in self.markdown():
            site_pages.outside_fences(text, lambda part: found.extend(headings(part)) or part)
        seen, ids = {}, set()
        for heading in found:
            count = seen[heading] = seen.get(heading, -1) + 1
            ids.add(heading if not count else f"{heading}-{count}")
        text = "\n".join(text for _, text in self.markdown())
        return ids | set(re.findall(r"\bid=[\"']([^\"']+)", text)) | set(re.findall(r"\{[^}\n]*#([\w.:-]+)[^}\n]*\}", text))


def headings(text: str) -> list[str]:
    "Ids of the headings in a text, doubles not numbered"
    found = []
    for line in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        given = re.search(r"\{[^}]*#([\w.:-]+)[^}]*\}", line)
        found.append(given[1] if given else heading_id(line))
    return found


def heading_id(text: str) -> str:
    "The id that Pandoc gives a heading"
    text = re.sub(r"!?\[((?:[^\[\]])*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\{[^}]*\}|\\", "", text)
    text = re.sub(r"(?<!\w)[*_]+|[*_]+(?!\w)|`", "", text) if "__" not in text else text.replace("`", "")
    kept = "".join(c for c in text if c.isalnum() or c in "_-. ")
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip().lower()))


class Links(HTMLParser):
    "Addresses in HTML: what is linked, what is fetched, what has no words"

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.linked, self.fetched, self.silent, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "a" and attrs.get("href"):
            self.linked.append(attrs["href"])
        address = attrs.get("href") if tag == "link" else attrs.get("src") or attrs.get("data-sprite")
        if address:
            self.fetched.append(address)
        if tag == "img" and not attrs.get("alt"):
            self.silent.append(attrs.get("src", "?"))

    handle_startendtag = handle_starttag


def without_code(text: str) -> str:
    "Markdown without its code and mathematics"
    kept = []
    site_pages.outside_fences(text, lambda part: kept.append(part) or part)
    text = "\n".join(kept)
    text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.S)
    text = re.sub(r"\\<", "", text)
    return re.sub(r"\$\$.*?\$\$|(?<![\\$\w])\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)", "", text, flags=re.S)


MARKDOWN_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def markdown_links(text: str):
    "(is a picture, words, address) of the links of a text; those in code are none"
    for match in MARKDOWN_LINK.finditer(re.sub(r"`[^`\n]+`", lambda m: "x" * len(m[0]), outside(text))):
        yield match[1] == "!", match[2].strip(), match[3]


def outside(text: str) -> str:
    kept = []
    site_pages.outside_fences(text, lambda part: kept.append(part) or part)
    return "\n".join(kept)


@dataclass
class Site:
    "All pages, the project's folder, and where the site will stand"
    root: Path
    pages: dict[str, Page]
    stopped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def settings(self) -> dict:
        return readme.settings(self.root)

    @cached_property
    def address(self) -> str:
        return f"{self.settings['doc_host']}{self.settings['doc_baseurl']}/"

    @cached_property
    def repository(self) -> str:
        return f"{self.settings['git_url']}/"

    @cached_property
    def config(self) -> dict:
        return yaml.safe_load((self.root / "_quarto.yml").read_text(encoding="utf-8"))


# --- rules for pages ------------------------------------------------------------------------------------------------------------------


def pages_say_what_they_are(page: Page, site: Site):
    "Under its title a page says in a sentence what it is, and says it once"
    if not page.claim:
        yield "no sentence under the title that says what the page is: `> …`"
    elif page.claim[-1] not in ".?!":
        yield f"the sentence under the title has no end: {page.claim[-40:]}"
    for cell, text in page.markdown():
        if page.claim and page.claim.rstrip(".?!") in " ".join(text.split()):
            yield f"cell {cell}: says once more what stands under the title"


def links_lead_somewhere(page: Page, site: Site):
    "Pages, anchors and files that a link names exist; names of this site and repository are followed too"
    for cell, text in page.markdown():
        addresses = [address for _, _, address in markdown_links(text)]
        html = Links(without_code(text))
        for address in dict.fromkeys(addresses + html.linked + html.fetched):
            if why := missing(address, page, site):
                yield f"cell {cell}: {address} {why}"


def missing(address: str, page: Page, site: Site) -> str:
    "Why a link leads nowhere; empty where it leads somewhere, or out of the project"
    if address.startswith(site.repository):
        path = re.match(r"(?:blob|tree|raw)/[^/]+/([^#?]+)", address.removeprefix(site.repository))
        return "" if not path or (site.root / path[1]).exists() else "does not exist in the repository"
    if address.startswith(site.address):
        inside = address.removeprefix(site.address)
    elif re.match(r"[a-z][a-z+.-]*:", address):
        return ""
    else:
        path, mark, anchor = address.partition("#")
        inside = join(page.name, path) + mark + anchor if path else f"{page.name}.html{mark}{anchor}"
    path, _, anchor = inside.partition("#")
    path = path or "index.html"
    target = site.pages.get(re.sub(r"\.(ipynb|html)$", "", path))
    if target is None:
        return "" if (site.root / "nbs" / path).is_file() else "does not exist"
    return "" if not anchor or anchor in target.anchors else f"has no such heading; there are {near(anchor, target.anchors)}"


def join(page: str, path: str) -> str:
    "A path relative to a page, relative to nbs/"
    parts = list(PurePosixPath(page).parent.parts)
    for part in PurePosixPath(path).parts:
        if part == "..":
            parts = parts[:-1] if parts else ["(outside)"]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def near(anchor: str, known: set[str]) -> str:
    words = set(re.split(r"[-_.]", anchor))
    return ", ".join(sorted(known, key=lambda k: -len(words & set(re.split(r"[-_.]", k))))[:3]) or "none"


ROOMS = "components|methods|metrics|data|worlds|viz|training|official"
MODULE = re.compile(rf"`(?:decomp_nb[./])?({ROOMS})[./]([a-z_0-9]+)(?:[./][\w.]+)?`")


def modules_exist(page: Page, site: Site):
    "A module that a text names is still there under this name"
    for cell, text in page.markdown():
        for room, name in MODULE.findall(text):
            if name != "jsonl" and f"{room}/{name}" not in site.pages:
                yield f"cell {cell}: there is no module {room}/{name}"


def pictures_have_words(page: Page, site: Site):
    "Every picture is described, for those who do not see it"
    for cell in page.code():
        if site_pages.pictures(cell) and not site_pages.has_option({"source": joined(cell["source"])}, "fig-alt"):
            yield f"cell {cell.get('id', '')}: a picture without words; give the figure an `alt`, or the cell `#| fig-alt:`"
    for cell, text in page.markdown():
        silent = [address for picture, words, address in markdown_links(text) if picture and not words]
        yield from (f"cell {cell}: the picture {address} has no words" for address in silent)
        yield from (f"cell {cell}: the picture {address} has no `alt`" for address in Links(without_code(text)).silent)
    for cell, output in page.outputs():
        if "text/html" in output.get("data", {}):
            html = Links(joined(output["data"]["text/html"]))
            yield from (f"cell {cell.get('id', '')}: the picture {address[:60]} has no `alt`" for address in html.silent)


def nothing_from_elsewhere(page: Page, site: Site):
    "A page is complete without the network: no picture, script or font of somebody else"
    for cell, text in page.markdown():
        addresses = Links(without_code(text)).fetched + [address for picture, _, address in markdown_links(text) if picture]
        yield from (f"cell {cell}: {address} is fetched from elsewhere" for address in addresses if urlparse(address).netloc)
    for cell, output in page.outputs():
        html = Links(joined(output.get("data", {}).get("text/html", "")))
        far = [address for address in html.fetched if urlparse(address).netloc]
        yield from (f"cell {cell.get('id', '')}: {address} is fetched from elsewhere" for address in far)


def nothing_is_swallowed(page: Page, site: Site):
    "`<c1>` in a text is a tag that no browser knows, and vanishes: write it as code"
    for cell, text in page.markdown():
        unknown = sorted(set(Links(without_code(text)).tags) - site_pages.KNOWN_TAGS)
        yield from (f"cell {cell}: <{tag}> would vanish; write it as code" for tag in unknown)


def no_raw_markdown(page: Page, site: Site):
    "Links and tables that stand where they are shown as they are: in code, and in printed text"
    for cell, text in page.markdown():
        for code in re.findall(r"^ *```.*?^ *```", text, re.M | re.S):
            if found := re.search(r"\[`?[\w.]+`?\]\([^)\s]+\)", code):
                yield f"cell {cell}: a link inside of code: {found[0][:60]}"
    for cell, text in page.printed():
        if found := re.search(r"\[[^\]\n]+\]\(https?:[^)\s]+\)|^\|[ :-]*-{3}[-|: ]*\|$", text, re.M):
            yield f"cell {cell}: printed text with raw Markdown: {found[0][:60]}"


def tables_fit(page: Page, site: Site):
    "No column is narrower than its longest word: Pandoc takes the widths from the dashes below the head"
    for cell, text in page.markdown():
        lines = outside(text).split("\n")
        for i in range(1, len(lines)):
            if "|" in lines[i] and "|" in lines[i - 1] and site_pages.RULER.match(lines[i]):
                yield from (f"cell {cell}: {why}" for why in narrow_columns(lines, i))


def narrow_columns(lines: list[str], i: int):
    last = next((j for j in range(i + 1, len(lines)) if "|" not in lines[j]), len(lines))
    rows = [site_pages.row_cells(line) for line in [lines[i - 1], *lines[i + 1:last]]]
    dashes = [cell.count("-") for cell in site_pages.row_cells(lines[i])]
    head = site_pages.visible(rows[0][0])[:30]
    wrong = {len(row) for row in rows} - {len(dashes)}
    if wrong:
        yield f"table '{head} …': rows of {sorted(wrong)} cells below {len(dashes)} columns"
        return
    if max(map(len, lines[i - 1:last])) <= 72:
        return  # Pandoc leaves such a table to the browser
    for column, width in zip(zip(*rows), dashes):
        word = max((w for c in column for w in re.split(r"[ /\n]+", site_pages.visible(c))), key=len)
        room = width / sum(dashes) * max(site_pages.COLUMNS, sum(dashes))
        if len(word) > room + 1:
            name = site_pages.visible(column[0])[:20]
            yield f"table '{head} …': column '{name}' has room for {room:.0f} of {len(word)} characters of {word[:40]}"


def commands_fit(page: Page, site: Site):
    "Commands are marked as such (```sh), and short enough to be read without scrolling"
    for cell, text in page.markdown():
        for language, code in re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```", text, re.M | re.S):
            if not language.strip() and re.search(r"^\s*(\$ |pip |make |git |python |decomp_nb |papermill |torchrun )", code, re.M):
                yield f"cell {cell}: commands without ```sh: {code.strip()[:50]}"
            if language.strip() in ("sh", "bash"):
                wide = [line for line in code.splitlines() if len(line) > COMMAND_WIDTH]
                yield from (f"cell {cell}: a command of {len(line)} characters (at most {COMMAND_WIDTH}): {line[:50]}…" for line in wide)
    for cell, text in page.printed():
        wide = [line for line in text.splitlines() if len(line) > OUTPUT_WIDTH]
        yield from (f"cell {cell}: an output line of {len(line)} characters (at most {OUTPUT_WIDTH}): {line[:50]}…" for line in wide[:1])


def sizes_are_small(page: Page, site: Site):
    "Pages load on a phone: limits for pictures, films and pages"
    if page.size > PAGE_BYTES:
        yield f"{page.size / 1e6:.2f} MB, at most {PAGE_BYTES / 1e6:.2f}"
    for cell, _, size in page.pictures():
        outputs = [joined(o.get("data", {}).get("text/plain", "")) for o in cell.get("outputs", [])]
        limit = FILM_BYTES if any(text.startswith("Film") for text in outputs) else STILL_BYTES
        if size > limit:
            yield f"cell {cell.get('id', '')}: a picture of {size // 1000} kB, at most {limit // 1000}"


def pictures_can_be_seen(page: Page, site: Site):
    "A picture fits the column, shows more than one colour, and stands on its page once"
    earlier: dict[bytes, str] = {}
    for cell, output in page.outputs():
        name = cell.get("id", "")
        width = site_pages.width_on_page(output)
        if width > COLUMN_WIDTH:
            yield f"cell {name}: a picture {width} pixels wide on the page, at most {COLUMN_WIDTH}; put its parts below one another"
        if "image/png" not in output.get("data", {}):
            continue
        content = base64.b64decode(joined(output["data"]["image/png"]))
        if content in earlier:
            yield f"cell {name}: the picture of cell {earlier[content]} once more"
        earlier[content] = name
        if is_plain(content):
            yield f"cell {name}: a picture of one colour"


def is_plain(content: bytes) -> bool:
    "Is a still picture of one colour only? Bytes that are no picture are not judged"
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        return False
    still = getattr(image, "n_frames", 1) == 1
    return still and min(image.size) > 8 and image.convert("RGB").getcolors(1) is not None


def papers_are_linked(page: Page, site: Site):
    "A number of arXiv is a link"
    for cell, text in page.markdown():
        plain = MARKDOWN_LINK.sub("", without_code(text))
        plain = re.sub(r"<a\b.*?</a>|https?://\S+", "", plain, flags=re.S)
        found = re.search(r"arXiv[: ]+\d{4}\.\d{4,5}", plain)
        if found:
            yield f"cell {cell}: {found[0]} is not a link"


PAGE_RULES = [
    pages_say_what_they_are, links_lead_somewhere, modules_exist, papers_are_linked, pictures_have_words, pictures_can_be_seen,
    nothing_from_elsewhere, nothing_is_swallowed, no_raw_markdown, tables_fit, commands_fit, sizes_are_small,
]


# --- rules for the site ---------------------------------------------------------------------------------------------------------------


def documentation_step_passes(site: Site):
    "nbdev's step before Quarto: imports, definitions and annotations, cell by cell"
    yield from (f"{name}: {why}" for name, why in sorted(site.stopped.items()))


def badges_install(site: Site):
    "Who follows a badge to Colab finds a cell that installs the package there, before the first import of it"
    for path in sorted((site.root / "nbs").rglob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if ".ipynb_checkpoints" in path.parts or "colab-badge.svg" not in text:
            continue
        sources = [joined(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        install = next((i for i, s in enumerate(sources) if "google.colab" in s and "%pip" in s), len(sources))
        used = next((i for i, s in enumerate(sources) if re.search(r"^(from|import) decomp_nb", s, re.M)), len(sources))
        if install == len(sources) or used < install:
            yield f"nbs/{path.relative_to(site.root / 'nbs')}: a badge for Colab, but no cell that installs the package before it is used"


def files_are_small(site: Site):
    "Pictures and scripts that lie beside the notebooks"
    for path in sorted((site.root / "nbs").rglob("*")):
        if path.suffix in (".png", ".jpg", ".webp", ".gif", ".js", ".svg") and path.stat().st_size > FILM_BYTES:
            yield f"{path.relative_to(site.root)}: {path.stat().st_size // 1000} kB, at most {FILM_BYTES // 1000}"


def configuration_fetches_nothing(site: Site):
    "Themes, style sheets and scripts of the site name nothing that is fetched from elsewhere"
    files = [site.root / "_quarto.yml", *sorted((site.root / "nbs").glob("*.css")), *sorted((site.root / "nbs").glob("*.scss")),
             *sorted((site.root / "nbs").glob("*.html")), *sorted((site.root / "nbs").glob("*.js"))]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"(?:@import|url\(|src=|from)\s*[\"'(]*(https?://[^\"')\s]+)", text):
            yield f"{path.relative_to(site.root)} fetches {address}"
    themes = json.dumps(site.config["format"]["html"].get("theme", ""))
    scss = [p for p in (site.root / "nbs").glob("*.scss") if p.name in themes]
    if not any(re.search(r"\$web-font-path:\s*false", p.read_text(encoding="utf-8")) for p in scss):
        yield "_quarto.yml: the themes fetch a font; name a .scss with `$web-font-path: false`"


def site_is_furnished(site: Site):
    "A page for wrong addresses, an icon, a way to the source, a sidebar that is not all open, a page for language models"
    website = site.config["website"]
    wanted = {"favicon": website.get("favicon"), "404.qmd": "404.qmd", "llms.txt": "llms.txt"}
    for what, name in wanted.items():
        if not name or not (site.root / "nbs" / name).is_file():
            yield f"nbs/ has no {what}"
    if "github" not in json.dumps(website.get("navbar", {})):
        yield "_quarto.yml: the navigation bar has no icon that leads to the repository"
    if website.get("sidebar", {}).get("collapse-level") != 1:
        yield "_quarto.yml: the sidebar shows all pages at once; collapse-level: 1"


SITE_RULES = [documentation_step_passes, badges_install, files_are_small, configuration_fetches_nothing, site_is_furnished]


# --- run ------------------------------------------------------------------------------------------------------------------------------


def findings(site: Site, page_rules=PAGE_RULES, site_rules=SITE_RULES) -> list[str]:
    "Everything that breaks a rule, one line each"
    found = [text for rule in site_rules for text in rule(site)]
    for name, page in site.pages.items():
        found += [f"nbs/{name}.ipynb: {text}" for rule in page_rules for text in rule(page, site)]
    return found


def read_site(root: Path, nbs: Path, stopped: dict[str, str]) -> Site:
    made = sorted(nbs.rglob("*.page"))
    return Site(root, {page.name: page for page in (Page.read(path, nbs) for path in made)}, stopped)


def rendered(root: Path) -> list[str]:
    "With Quarto: the site is rendered, and what its pages fetch is looked up in the finished HTML"
    done = subprocess.run(["make", "docs"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        return [f"make docs failed: {done.stderr.strip().splitlines()[-1:]}"]
    found = []
    for path in sorted((root / "_docs").rglob("*.html")):
        fetched = Links(path.read_text(encoding="utf-8")).fetched
        found += [f"_docs/{path.relative_to(root / '_docs')}: fetches {a}" for a in fetched if urlparse(a).netloc]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="keep a picture of every page at two widths there")
    args = parser.parse_args()
    with documentation.pages(ROOT) as (nbs, stopped):
        site = read_site(ROOT, nbs, stopped)
        found = findings(site)
    if shutil.which("quarto"):
        found += rendered(ROOT)
    else:
        print("site-check: no Quarto here, so the pages were checked as nbdev hands them to it, and not rendered")
    if args.screenshots or shutil.which("quarto"):
        found += looked_at(args.screenshots or ROOT / "_docs" / "screenshots")
    print("\n".join(found) or f"site-check: {len(site.pages)} pages, {len(PAGE_RULES) + len(SITE_RULES)} rules, nothing to say")
    return bool(found)


def looked_at(folder: Path) -> list[str]:
    "Pages that scroll sideways in Chromium; pictures of all stay in `folder`"
    import chromium
    import site_look
    if chromium.find() is None:
        print(f"site-check: no pictures of the pages, {chromium.ABSENT}")
        return []
    return site_look.look(folder, [])


if __name__ == "__main__":
    import site_check  # nbdev's shell replaces __main__, where workers would then look for `step` in vain
    sys.exit(site_check.main())
