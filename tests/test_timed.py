"`make test` says at its end how long each part took, and a part that fails stops it."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timed

TOOL = Path(timed.__file__)


@pytest.mark.parametrize("status", [0, 3])
def test_a_part_is_timed_and_its_status_kept(tmp_path, status):
    "Processor time is that of all processes that the command starts"
    busy = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.2: pass"
    code = f"import os, subprocess, sys; assert 'DECOMP_TIMES' not in os.environ; subprocess.run([sys.executable, '-c', {busy!r}]); sys.exit({status})"
    file = tmp_path / "times"
    done = subprocess.run([sys.executable, TOOL, "busy part", sys.executable, "-c", code], env=os.environ | {"DECOMP_TIMES": str(file)})
    assert done.returncode == status
    found = json.loads(file.read_text())
    assert found["part"] == "busy part" and found["processor"] >= 0.2 and found["wall"] >= 0.2


def test_the_table_adds_up(tmp_path, monkeypatch):
    monkeypatch.setenv("DECOMP_TIMES", str(tmp_path / "times"))
    timed.note("notebooks", 180, 330)
    timed.note("tests", 120, 210)
    head, *rows = timed.table(tmp_path / "times")
    assert head.split() == ["part", "wall", "processor", "(minutes)"]
    assert [row.split() for row in rows] == [["notebooks", "3.0", "5.5"], ["tests", "2.0", "3.5"], ["all", "5.0", "9.0"]]
