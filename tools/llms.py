"""nbs/llms.txt: every page with its one claim, for language models and for people who read plain text.

`python tools/llms.py` writes it, `--check` only compares. Order and sections are those of the sidebar.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import readme
import yaml

ROOT = Path(__file__).resolve().parents[1]


def head(path: Path) -> tuple[str, str]:
    "Title and claim of a notebook"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = next(("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), "")
    found = re.match(r"# (.+)\n+> (.+)", text.strip())
    return (found[1].strip(), found[2].strip()) if found else (path.stem, "")


def build(root: Path = ROOT) -> str:
    "The text of llms.txt"
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    known = readme.settings(root)
    address = f"{known['doc_host']}{known['doc_baseurl']}"
    title, claim = head(root / "nbs" / "index.ipynb")
    how = [
        f"# {title}", f"> {claim}",
        f"Python package `{known['lib_name']}` (Apache 2.0), written as notebooks: {known['git_url']}.",
        "A method is two functions, `encode(images) → Factors` and `predict(x_t, t, factors)`; `decode`, guidance, recombination and "
        "training follow from them. Images are float tensors `(b,3,h,w)` in [−1,1]. `load_decomposer(path)` loads any method, "
        "`open_dataset(name)` any data set, `decomp_nb run nbs/train_lsd.ipynb -p name value` runs a training without a screen.",
    ]
    parts = ["\n\n".join(how)]
    for section in site["website"]["sidebar"]["contents"]:
        lines = []
        for name in section["contents"]:
            words, what = head(root / "nbs" / name)
            lines.append(f"- [{words}]({address}/{name.removesuffix('.ipynb')}.html): {what}")
        parts.append(f"## {section['section']}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    target, text = ROOT / "nbs" / "llms.txt", build()
    if "--check" in sys.argv:
        late = not target.is_file() or target.read_text(encoding="utf-8") != text
        print("nbs/llms.txt is older than the pages: run `make prepare`" if late else "nbs/llms.txt is current")
        return late
    target.write_text(text, encoding="utf-8")
    print(f"nbs/llms.txt, {len(text.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
