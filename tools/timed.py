"""Run one part of `make test` and note its times: `python tools/timed.py NAME COMMAND …`. `make test` prints them all at its end.

The notes are lines of JSON in the file that DECOMP_TIMES names; processor time counts all processes that the command started.
"""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def note(name: str, wall: float, processor: float) -> None:
    "Add one line to the file of times"
    with open(os.environ["DECOMP_TIMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"part": name, "wall": wall, "processor": processor}) + "\n")


def processor_time(*whose: int) -> float:
    "Seconds that processes have computed, those of the system for them included"
    used = [resource.getrusage(who) for who in whose]
    return sum(u.ru_utime + u.ru_stime for u in used)


def table(file: Path) -> list[str]:
    "All parts and their sum, a line each, in minutes"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.append({"part": "all", "wall": sum(r["wall"] for r in rows), "processor": sum(r["processor"] for r in rows)})
    head = f"{'part':<16}{'wall':>8}{'processor':>12}  (minutes)"
    return [head, *(f"{r['part']:<16}{r['wall'] / 60:>8.1f}{r['processor'] / 60:>12.1f}" for r in rows)]


def main() -> int:
    name, *command = sys.argv[1:]
    begin = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "DECOMP_TIMES"}  # a part does not note itself once more
    status = subprocess.run(command, env=environment).returncode
    note(name, time.monotonic() - begin, processor_time(resource.RUSAGE_CHILDREN))
    return status


if __name__ == "__main__":
    sys.exit(main())
