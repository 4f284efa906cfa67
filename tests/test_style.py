"Code that one can read: how dense lines, functions, modules and cells may be; what is still above the aim may only fall."
import json

import pytest
import style

LIMITS = json.loads(style.LIMITS.read_text())
CELLS = LIMITS[style.LONGEST_CELL]
PAGES = style.pages()


@pytest.mark.parametrize("name", style.modules())
def test_module_is_within_its_limits(name):
    measured = style.measure(style.modules()[name].read_text(encoding="utf-8"))._asdict()
    limits = style.AIMS | LIMITS.get(name, {})
    above = {key: (measured[key], limit) for key, limit in limits.items() if measured[key] > limit}
    assert not above, f"{name}: measured and allowed {above}; `python tools/style.py` prints all modules"


def test_functions_of_the_package_are_short_and_its_names_are_shown():
    measured = style.measure_package()
    limits = style.PACKAGE_AIMS | LIMITS[style.PACKAGE]
    above = {key: (measured[key], limit) for key, limit in limits.items() if measured[key] > limit}
    assert not above, f"tokens of functions, percentage of names not shown, measured and allowed: {above}; `python tools/style.py` lists them"


def test_exported_cells_are_short():
    above = {name: n for name, n in style.longest_cells().items() if n > CELLS.get(name, 40)}
    assert not above, f"longest exported cell of {above}; split it, 40 lines are enough for one idea"


def test_limits_name_what_exists():
    gone = set(LIMITS) - set(style.modules()) - {style.LONGEST_CELL, style.PACKAGE, style.PAGES}
    assert not gone, f"no such module: {gone}; run `python tools/style.py --update`"
    gone = set(LIMITS[style.PAGES]) - set(PAGES)
    assert not gone, f"no such page: {gone}; run `python tools/style.py --update`"


# --- visible cells of pages that export nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_visible_cells_are_as_plain_as_the_package(name):
    measured = style.measure_page(PAGES[name])
    limits = style.PAGE_AIMS | LIMITS[style.PAGES].get(name, {})
    above = {key: (measured[key], limit) for key, limit in limits.items() if measured[key] > limit}
    assert not above, f"{name}: measured and allowed {above}; `python tools/style.py` names the places"


def test_pages_are_those_that_export_nothing():
    assert {"train_lsd.ipynb", "eval_video.ipynb", "explain/performance.ipynb", "tutorials/your_images.ipynb"} < set(PAGES)
    assert "methods/lsd.ipynb" not in PAGES and "factors.ipynb" not in PAGES


@pytest.mark.parametrize("source, fault", [
    ("a = 1; b = 2\n", "several statements"), ("if a: b = 2\n", "several statements"), ("def f(): return 1\n", "several statements"),
    ("for a in b: a()\n", "several statements"), ("if a:\n    b()\nelse: c = 1; d = 2\n", "several statements"),
    ("f = lambda x: x\n", "lambda with a name"),
    ("a = [x for y in z for x in y]\n", "nested comprehension"), ("a = {k: [v for v in w] for k, w in b.items()}\n", "nested comprehension"),
    ("a = [\n    f(\n        x\n    )\n    for x in y\n]\n", "more than four lines"),
    ("a = b if c else d if e else f\n", "conditional expression"), ("a = (\n    b\n    if c\n    else d\n)\n", "conditional expression"),
    ("f(), g()\nh()\n", "calls in a row"),
])
def test_crowded_places_are_found(source, fault):
    assert any(fault in found for found in style.crowded(source)), style.crowded(source)


@pytest.mark.parametrize("source", [
    "a = [f(x) for x in y if x]\nb = c if d else e\n", "if a:\n    b = 1\nelse:\n    b = 2\n", "best_of(lambda: f(1))\n",
    "a = 1\na, f(a)\n", "try:\n    f()\nexcept ValueError:\n    g()\nfinally:\n    h()\n", "",
])
def test_plain_places_are_left_alone(source):
    assert style.crowded(source) == []


def test_a_parameters_cell_counts_by_its_width_only():
    cell = style.Cell("p", "a: int = 1  # " + "x" * 120 + "\nb: int = 2; c = 3\n", True)
    measured = style.measure_page([cell, style.Cell("c", "x = 1\n", False)])
    assert measured == {"tokens_per_line": 3.0, "crowded": 0, "wide_lines": 0, "wide_parameters": 1, "longest_cell": 1}


def test_hidden_and_exported_cells_do_not_show_a_name():
    cells = ["#| export\ndef f(): g()", "#| hide\ng()", "f()", "#| default_exp a\nh = 1"]
    assert style.not_shown(["f", "g", "h"], cells) == ["g", "h"]
    assert style.public_names("__all__ = ['f']\n") == ["f"] and style.public_names("x = 1\n") == []


DENSE = "def f(a, b):\n" + "    a = (a + b * 2 - 3) / (4 + a); b = (b + a * 2 - 3) / (4 + b)\n" * 5


@pytest.mark.parametrize("source, field, value", [
    ('"text"\nx = 1  # remark\n\ny = [x, 2]\n', "tokens_per_line", 5.0),
    ("x = f'{1 + 1} and {2}'\n", "tokens_per_line", 3.0),
    (DENSE, "dense_bodies", 1),
    ("x = 1\n" + "y = '" + "a" * 120 + "'\n", "wide_lines", 1),
    ("x = '''\n\n\n'''\n", "lines", 4),
    ("def f():\n    'text'\n    return 1\n", "median_function", 7),
    ("__all__ = ['a',\n           'b']\nx = 1\n", "lines", 1),
])
def test_measures_count_what_they_say(source, field, value):
    assert getattr(style.measure(source), field) == value
