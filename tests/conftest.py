"For all tests: what takes long begins first, and the end says how long everything took."
import os
import resource
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import timed

BEGIN = time.monotonic()
sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema, which nbformat imports, would build 38 parsers of web addresses with it
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # a checkout with real data beside it
if DATA.is_dir():
    os.environ.setdefault("DECOMP_DATA", str(DATA))
LONGEST = ("test_launch", "test_cluster", "test_recipes", "test_trainer", "test_rehearsal", "test_disdiff_runs", "test_slot_runs", "test_runs",
           "test_concepts", "test_decomp_diffusion", "test_compare", "test_viz")


@pytest.fixture(autouse=True)
def same_environment():
    "Whatever a test, or a library that it calls, writes into the environment is gone after it"
    before = dict(os.environ)
    yield
    before["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")
    os.environ.clear()
    os.environ.update(before)


def place(item: pytest.Item) -> int:
    "Position of a test's module among those that take long; all others come after them"
    module = Path(item.path).stem
    return LONGEST.index(module) if module in LONGEST and item.path.parent.name == "tests" else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Two processes take whole modules from the front: they end together when the last ones are short"
    items.sort(key=place)


def pytest_sessionfinish() -> None:
    "End the server that warm kernels are forked from: only then their processor time counts"
    if (server := forkserver._forkserver)._forkserver_pid:
        server._stop()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    "The times of `make test`, which runs the tests last; the workers of pytest-xdist leave the word to the process that started them"
    if not os.environ.get("DECOMP_TIMES") or hasattr(config, "workerinput"):
        return
    processor = timed.processor_time(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    timed.note("tests", time.monotonic() - BEGIN, processor)
    terminalreporter.section("how long everything took")
    for line in timed.table(Path(os.environ["DECOMP_TIMES"])):
        terminalreporter.write_line(line)
