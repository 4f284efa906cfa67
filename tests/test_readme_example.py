"The first example of the README runs when it is copied, line by line, into an empty file."
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_first_example_runs_when_copied(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).rstrip().splitlines()
    shown = next(i for i in reversed(range(len(lines))) if not lines[i].startswith((" ", ")")))
    script = "\n".join([*lines[:shown], "picture = " + lines[shown], *lines[shown + 1:], "assert picture.size[0] > 500, picture"])
    copied = tmp_path / "copied.py"
    copied.write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, copied], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    assert "slots(" in script and "encode" in script, "the example shows how a picture is taken apart"
