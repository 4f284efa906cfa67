"The check of the site: a page that is right passes every rule, and each seeded fault is reported by the rule that it is for."
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import llms
import nbformat as nbf
import pytest
import readme
import site_check
import site_pages
from PIL import Image, PngImagePlugin
from site_check import Page, Site

ROOT = Path(__file__).resolve().parents[1]


def png(words: str = "", side: int = 4) -> str:
    "A black picture in base64, described in its file where `words` are given"
    told, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if words:
        told.add_itxt("Description", words)
    Image.new("RGB", (side, side)).save(buffer, "PNG", pnginfo=told)
    return base64.b64encode(buffer.getvalue()).decode()


def text(source: str, name: str = "words") -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}


def code(source: str, *outputs: dict, name: str = "code") -> dict:
    return {"cell_type": "code", "id": name, "metadata": {}, "source": source, "outputs": list(outputs)}


def shown(**data) -> dict:
    "An output of these media types, `_` for the slash"
    return {"output_type": "display_data", "metadata": {}, "data": {mime.replace("_", "/", 1): value for mime, value in data.items()}}


def printed(words: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": words}


def front(claim: str = "A page.") -> dict:
    return {"cell_type": "raw", "id": "front", "metadata": {}, "source": f"---\ntitle: Toy\ndescription: '{claim}'\n---\n"}


def site(root: Path, *cells: dict, size: int = 1000, claim: str = "A toy.") -> Site:
    "A site of two pages, `methods/toy` with these cells and `home` beside it, in a folder that has all that a site needs"
    nbs = root / "nbs"
    nbs.mkdir(exist_ok=True)
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, root / name)
    for name in ("favicon.svg", "404.qmd", "llms.txt", "site.scss", "styles.css"):
        shutil.copy(ROOT / "nbs" / name, nbs / name)
    home = Page("home", [front(), text("# Home\n\n## Where to start\n\n### `Slots` and more {#slots}")])
    toy = Page("methods/toy", [front(claim), text("# Toy"), *cells], size)
    return Site(root, {"home": home, "methods/toy": toy})


GOOD = [
    text("[start](../home.ipynb#where-to-start), [slots](../home.html#slots), [here](#toy), [paper](https://arxiv.org/abs/2303.10834), $\\langle a \\rangle$"),
    text("| a | b |\n|---|---|\n| `x` | 1 |\n\n```sh\nmake test\n```\n\nCode `<c1>` and \\<c1> stay."),
    code('#| fig-alt: "a square"\nshow()', shown(image_png=png())),
    code("print()", printed("fine")),
]
ALT = '#| fig-alt: "x"\nx'
LONG = "| method | " + "a long sentence about it " * 4 + "|"
FAULTS = {
    "twice": ("pages_say_what_they_are", [text("It is this.\n\nA toy.")], "once more"),
    "page": ("links_lead_somewhere", [text("[x](../gone.ipynb)")], "does not exist"),
    "anchor": ("links_lead_somewhere", [text("[x](../home.ipynb#nowhere)")], "no such heading"),
    "own anchor": ("links_lead_somewhere", [text("[x](#nowhere)")], "no such heading"),
    "link of HTML": ("links_lead_somewhere", [text('<a href="../gone.html">x</a>')], "does not exist"),
    "link of an output": ("links_lead_somewhere", [code("x", shown(text_markdown="[x](../gone.html)"))], "does not exist"),
    "address of the site": ("links_lead_somewhere", [text("[x](https://decomp-nb.github.io/decomp_nb/gone.html)")], "does not exist"),
    "file of the repository": ("links_lead_somewhere", [text("[x](https://github.com/decomp-nb/decomp_nb/blob/main/gone.py)")], "repository"),
    "module": ("modules_exist", [text("Built by `components.denoisers.slot_denoiser`, logged in `metrics.jsonl`.")], "components/denoisers"),
    "figure": ("pictures_have_words", [code("show()", shown(image_png=png(side=5)))], "a picture without words"),
    "picture in the text": ("pictures_have_words", [text("![](../favicon.svg)")], "no words"),
    "picture in HTML": ("pictures_have_words", [text('<img src="../favicon.svg">')], "no `alt`"),
    "picture in an output": ("pictures_have_words", [code("x", shown(text_html='<img src="x.png">'))], "no `alt`"),
    "font": ("nothing_from_elsewhere", [text('<link href="https://fonts.example.org/a.css" rel="stylesheet">')], "elsewhere"),
    "script": ("nothing_from_elsewhere", [code("x", shown(text_html='<script src="https://example.org/a.js"></script>'))], "elsewhere"),
    "far picture": ("nothing_from_elsewhere", [text("![badge](https://example.org/a.svg)")], "elsewhere"),
    "swallowed word": ("nothing_is_swallowed", [text("the word <c1> is learned")], "<c1>"),
    "link in code": ("no_raw_markdown", [code("x", shown(text_markdown="```python\nf(a: [`Tensor`](x.html))\n```"))], "inside of code"),
    "printed link": ("no_raw_markdown", [code("x", printed("see [log](https://example.org/x)"))], "raw Markdown"),
    "printed table": ("no_raw_markdown", [code("x", printed("| a | b |\n|---|---|\n| 1 | 2 |"))], "raw Markdown"),
    "narrow column": ("tables_fit", [text(f"{LONG} FG-ARI |\n|{'-' * 9}|{'-' * 80}|---|\n| a | b | 0.542\u00a0±\u00a00.068 |")], "has room for"),
    "ragged table": ("tables_fit", [text("| a | b |\n|---|---|\n| 1 | 2 | 3 |")], "rows of"),
    "wide command": ("commands_fit", [text("```sh\n" + "decomp_nb run " + "x" * 100 + "\n```")], "characters"),
    "unmarked command": ("commands_fit", [text("```\npip install decomp_nb\n```")], "without ```sh"),
    "wide output": ("commands_fit", [code("x", printed("y" * 900))], "output line"),
    "heavy picture": ("sizes_are_small", [code('#| fig-alt: "x"\nx', shown(image_png="A" * 600_000))], "at most"),
    "broad picture": ("pictures_can_be_seen", [code(ALT, shown(image_png=png("other")) | {"metadata": {"image/png": {"width": 1100}}})], "1100"),
    "picture twice": ("pictures_can_be_seen", [code(ALT, shown(image_png=png()))], "once more"),
    "plain picture": ("pictures_can_be_seen", [code(ALT, shown(image_png=png("plain", 16)))], "one colour"),
    "paper": ("papers_are_linked", [text("Jiang et al., arXiv 2303.10834")], "not a link"),
}


def test_a_right_page_passes(tmp_path):
    found = site_check.findings(site(tmp_path, *GOOD))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_reported(tmp_path, name):
    rule, cells, words = FAULTS[name]
    found = site_check.findings(site(tmp_path, *GOOD, *cells))
    assert len(found) == 1 and words in found[0], found
    made = site(tmp_path, *GOOD, *cells)
    assert list(getattr(site_check, rule)(made.pages["methods/toy"], made)), f"{rule} is silent"
    assert {rule for rule, _, _ in FAULTS.values()} == {r.__name__ for r in site_check.PAGE_RULES}, "a rule that no fault breaks"


@pytest.mark.parametrize(("claim", "words"), [("", "no sentence"), ("A toy", "no end")])
def test_a_page_says_what_it_is(tmp_path, claim, words):
    assert words in site_check.findings(site(tmp_path, *GOOD, claim=claim))[0]


def test_a_heavy_page_is_reported(tmp_path):
    assert "MB" in site_check.findings(site(tmp_path, size=2_000_000))[0]


SITE_FAULTS = {
    "favicon": (lambda root: (root / "nbs/favicon.svg").unlink(), "favicon"),
    "404": (lambda root: (root / "nbs/404.qmd").unlink(), "404"),
    "llms": (lambda root: (root / "nbs/llms.txt").unlink(), "llms.txt"),
    "font": (lambda root: (root / "nbs/site.scss").write_text("/*-- scss:defaults --*/\n"), "fetch a font"),
    "import": (lambda root: (root / "nbs/styles.css").write_text("@import url(https://fonts.example.org/x.css);"), "fetches"),
    "sidebar": (lambda root: change(root / "_quarto.yml", "collapse-level: 1", "collapse-level: 2"), "collapse-level"),
    "icon": (lambda root: change(root / "_quarto.yml", "icon: github", "icon: rss", "github.com", "example.org"), "icon"),
    "big file": (lambda root: (root / "nbs/big.png").write_bytes(b"x" * 500_000), "kB"),
}


def change(path: Path, *words: str) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in zip(words[::2], words[1::2]):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", SITE_FAULTS)
def test_each_fault_of_the_site_is_reported(tmp_path, name):
    made = site(tmp_path, *GOOD)
    SITE_FAULTS[name][0](tmp_path)
    found = site_check.findings(made)
    assert len(found) == 1 and SITE_FAULTS[name][1] in found[0], found


@pytest.mark.parametrize(("order", "right"), [(["badge", "install", "use"], True), (["badge", "use"], False), (["badge", "use", "install"], False)])
def test_a_badge_needs_a_cell_that_installs(tmp_path, order, right):
    made = site(tmp_path)
    parts = {"badge": nbf.v4.new_markdown_cell('<img src="https://colab.research.google.com/assets/colab-badge.svg">'),
             "install": nbf.v4.new_code_cell("import sys\nif 'google.colab' in sys.modules:\n    %pip install -q toy"),
             "use": nbf.v4.new_code_cell("from decomp_nb import LSD")}
    nbf.write(nbf.v4.new_notebook(cells=[parts[name] for name in order]), tmp_path / "nbs" / "toy.ipynb")
    assert bool(list(site_check.badges_install(made))) != right


def test_the_step_is_part_of_the_check(tmp_path):
    made = site(tmp_path)
    made.stopped["nbs/toy.ipynb"] = "NameError"
    assert "nbs/toy.ipynb: NameError" in site_check.findings(made)


def test_headings_are_named_as_pandoc_names_them():
    named = {"Factors: the set": "factors-the-set", "`sample`, one loop": "sample-one-loop", "1. A model": "a-model", "Film.strip": "film.strip",
             "What *disappoints*: the pictures": "what-disappoints-the-pictures", "to_uint8": "to_uint8", "Own [name](x.html)": "own-name",
             "Factors.\\_\\_mul\\_\\_": "factors.__mul__"}
    assert {heading: site_check.heading_id(heading) for heading in named} == named
    twice = Page("x", [text("## Run\n\n## Run\n\n```sh\n# no heading\n```")])
    assert twice.anchors == {"run", "run-1"}


# --- what is done to the pages --------------------------------------------------------------------------------------------------------


def test_links_stay_out_of_code_and_of_links():
    given = "`Factors`, [`Factors`](x.html), ``Factors``, `_join`\n\n```python\n`Factors`\n```\n"
    made = site_pages.with_links(given)
    assert made.count("](") == 2 and made.startswith("[`Factors`](https://") and "```python\n`Factors`\n```" in made


def test_links_into_the_site_are_relative():
    assert site_pages.with_near_links(f"[x]({site_pages.site_address()}viz/film.html#y)", 1) == "[x](../viz/film.html#y)"


def test_pictures_are_described_by_themselves():
    cell = code("show()", shown(image_png=png("two squares")))
    site_pages.describe_pictures(cell)
    assert cell["source"].startswith('#| fig-alt: "two squares"\n')
    by_text = code("show()", shown(image_png=png(), text_plain='Picture 4×4: a "red" disc'))
    site_pages.describe_pictures(by_text)
    assert json.loads(by_text["source"].splitlines()[0].split(": ", 1)[1]) == 'a "red" disc'
    own = code('#| fig-alt: "mine"\nshow()', shown(image_png=png("theirs")))
    site_pages.describe_pictures(own)
    assert own["source"].count("fig-alt") == 1


def test_wide_pictures_are_marked_for_phones():
    def marked(width):
        cell = code("show()", shown(image_png=png()) | {"metadata": {"image/png": {"width": width}}})
        site_pages.mark_wide_pictures(cell)
        return cell["source"].startswith('#| classes: "wide"\n')
    assert marked(742) and not marked(380)
    assert ".cell.wide img" in (ROOT / "nbs" / "styles.css").read_text(encoding="utf-8")


def test_checks_are_folded_and_so_is_long_drawing():
    def options(cell, everything=True):
        site_pages.fold_code(cell, everything)
        return dict(re.findall(r"^#\| (\S+): (.*)$", cell["source"], re.M))
    assert options(code("assert 1"))["code-summary"] == '"Checks"'
    drawing = "\n".join(f"x{i} = {i}" for i in range(12))
    assert options(code(drawing, shown(image_png=png())))["code-fold"] == "true"
    assert not options(code(drawing, shown(image_png=png())), everything=False)
    assert options(code("import os\nfrom sys import path"))["code-summary"] == '"Imports"'
    assert not options(code("import os"), everything=False) and not options(code("import os\nos.name", shown(text_plain="'posix'")))
    assert not options(code("show()", shown(image_png=png()))) and not options(code("assert 1\n1", shown(text_plain="1")))


def test_columns_are_as_wide_as_their_words():
    made = site_pages.with_balanced_tables("| what | score |\n|---|:--:|\n| " + "many words " * 20 + "| 0.542 ± 0.068 |")
    first, second = site_pages.row_cells(made.split("\n")[1])
    assert second.startswith(":") and second.endswith(":") and len(second) >= 13 < len(first) and "0.542\u00a0±\u00a00.068" in made
    assert site_pages.row_cells("| `a|b` | c \\| d | $|x|$ |") == ["`a|b`", "c \\| d", "$|x|$"]


def test_classes_show_fields_parameters_and_methods():
    def page(name):
        return site_pages.class_page(name, *site_pages.definition(name))
    assert "class FactorTensors(NamedTuple):" in page("FactorTensors") and "| `masks` | `Tensor or None` |" in page("FactorTensors")
    assert "#### FactorChoice.pick" in page("FactorChoice") and "[`rows`](" in page("FactorChoice")
    assert "#### Decomposer.decode" in page("Decomposer") and "| `steps` | `int` | denoising steps. Default `25`. |" in page("Decomposer")
    assert "| `evaluate` |" in page("Trainer") and "#### Trainer.fit" in page("Trainer")
    assert "_private" not in page("Trainer") and "self" not in page("Trainer").split("```")[1]


def test_words_in_angles_stay_visible():
    assert site_pages.with_visible_names("<c1> `<c1>` <br> <https://x.org>") == "\\<c1> `<c1>` <br> <https://x.org>"


def test_the_readme_links_to_what_it_cannot_run():
    said = readme.without_mixers('Try.\n\n<decomp-mixer data-side="32"><img src="x.webp" alt="y"></decomp-mixer>\n<script src="mixer.js"></script>')
    assert said.startswith("Try.\n\n[Press its buttons") and "<script" not in said and "index.html)" in said
    assert "<decomp-mixer" not in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_list_for_language_models():
    assert (ROOT / "nbs" / "llms.txt").read_text(encoding="utf-8") == llms.build(), "run `make prepare`"


def test_nbdev_uses_the_processor(tmp_path):
    "The whole way: settings.ini names the processor and the renderer, and the step applies them"
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "nbs" / "metrics").mkdir(parents=True)
    picture = nbf.v4.new_output("display_data", {"image/png": png("a square")})
    cells = [nbf.v4.new_markdown_cell("# Toy\n\n> It is small."), nbf.v4.new_markdown_cell("`Factors`"),
             nbf.v4.new_code_cell("1", outputs=[picture])]
    nbf.write(nbf.v4.new_notebook(cells=cells), tmp_path / "nbs" / "metrics" / "toy.ipynb")
    script = ("import sys, documentation; from pathlib import Path\n"
              "with documentation.pages(Path(sys.argv[1]), 1) as (nbs, stopped):\n"
              "    print(stopped)\n    print((nbs / 'metrics/toy.page').read_text())")
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=ROOT / "tools", timeout=120)
    assert "fig-alt: \\\"a square\\\"" in done.stdout and "](../factors.html#factors)" in done.stdout, done.stdout + done.stderr
