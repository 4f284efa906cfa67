"""README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py` writes it, `--check` only compares.

Pictures of the home page are written to nbs/images/<cell id>.png; links between notebooks become links to the site.
"""
from __future__ import annotations

import base64
import re
import sys
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema would build 38 parsers of web addresses with it, which takes seconds
import nbformat  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
HEAD = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit the notebook, then `make prepare`. -->\n"
IMAGES = {"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/svg+xml": ".svg"}


def settings(root: Path = ROOT) -> dict:
    "The keys of settings.ini, `%(user)s` and its like filled in"
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def page_url(notebook: str, root: Path = ROOT) -> str:
    "Site address of a notebook, its path relative to nbs/: `methods/lsd.ipynb#idea` → `https://…/methods/lsd.html#idea`"
    cfg = settings(root)
    path, _, anchor = notebook.partition("#")
    page = str(PurePosixPath(path).with_suffix(".html"))
    return f"{cfg['doc_host']}{cfg['doc_baseurl']}/{page}" + (f"#{anchor}" if anchor else "")


def relink(text: str, root: Path = ROOT) -> str:
    "Markdown and HTML links that are relative to nbs/, made to work at the top of the repository"
    def target(link):
        if re.match(r"[a-z]+:|#|/", link):
            return link
        return page_url(link, root) if link.partition("#")[0].endswith(".ipynb") else str(PurePosixPath("nbs") / link)
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + target(m[2]), text)
    return re.sub(r"((?:href|src)=\")([^\"]+)", lambda m: m[1] + target(m[2]), text)


MIXER = re.compile(r"<decomp-mixer\b.*?</decomp-mixer>\n<script[^>]*></script>", re.S)


def without_mixers(text: str, page: str = "index.ipynb", root: Path = ROOT) -> str:
    "A mixer needs JavaScript, which GitHub does not run: a link to the page where it can be pressed"
    return MIXER.sub(f"[Press its buttons on the home page]({page_url(page, root)}).", text)


def directives(source: str) -> tuple[dict, str]:
    "Leading `#| name: value` lines as a dict, and the code below them"
    lines, found = source.splitlines(), {}
    while lines and lines[0].lstrip().startswith("#|"):
        name, _, value = lines.pop(0).split("#|", 1)[1].strip().partition(" ")
        found[name.rstrip(":")] = value.strip()
    return found, "\n".join(lines).strip()


def described(output) -> str:
    "What a figure says of itself: `Picture 8×8: two squares` → `two squares`"
    found = re.match(r"(?:Picture|Film) \d+×\d+: ([^\[\]]+)$", str(output["data"].get("text/plain", "")).strip())
    return found[1] if found else ""


def output_markdown(output, cell_id: str, pictures: dict) -> str:
    "One output as Markdown: a table, a picture (kept in `pictures` under its path) or text"
    if output["output_type"] == "stream":
        return f"```text\n{output['text'].rstrip()}\n```"
    data = output.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    for mime, suffix in IMAGES.items():
        if mime in data:
            path = f"nbs/images/{cell_id}{suffix}"
            pictures[path] = data[mime].encode() if suffix == ".svg" else base64.b64decode(data[mime])
            return f"![{described(output) or cell_id.replace('-', ' ')}]({path})"
    return f"```text\n{data['text/plain'].rstrip()}\n```" if "text/plain" in data else ""


def build(index: Path = ROOT / "nbs" / "index.ipynb", root: Path = ROOT) -> tuple[str, dict]:
    "Text of the README, and its pictures as path → bytes"
    parts, pictures = [], {}
    for cell in nbformat.read(index, 4).cells:
        if cell.cell_type == "markdown":
            parts.append(relink(without_mixers(cell.source, root=root), root))
        if cell.cell_type != "code":
            continue
        found, code = directives(cell.source)
        if "hide" in found or found.get("include") == "false" or "default_exp" in found:
            continue
        if code and found.get("echo") != "false" and "hide_input" not in found:
            parts.append(f"```python\n{code}\n```")
        if found.get("output") != "false":
            parts += [text for o in cell.outputs if (text := output_markdown(o, cell.id, pictures))]
    return HEAD + "\n" + "\n\n".join(part.strip() for part in parts) + "\n", pictures


def stale(root: Path = ROOT) -> list[str]:
    "Files that differ from what the home page says"
    if not (root / "nbs" / "index.ipynb").is_file():
        return ["nbs/index.ipynb (missing)"]
    text, pictures = build(root / "nbs" / "index.ipynb", root)
    wanted = {"README.md": text.encode(), **pictures}
    return [name for name, content in wanted.items() if not (root / name).is_file() or (root / name).read_bytes() != content]


def main() -> int:
    if "--check" in sys.argv:
        late = stale()
        print("\n".join(f"{name} is older than nbs/index.ipynb: run `make prepare`" for name in late) or "README.md is current")
        return bool(late)
    text, pictures = build()
    for name, content in {"README.md": text.encode(), **pictures}.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(content)
    print(f"README.md, {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
