"Small notebooks that run as jobs, and executables that stand in for a cluster's commands."
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat as nbf

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "decomp_nb"]
PATIENCE = 300  # seconds; a busy machine starts kernels slowly
PARAMETERS = """\
steps: int = 2  # lines to print
lr: float = 1e-3  # learning rate
name: str = 'toy'  # text
out_dir: str = 'runs/toy'  # run directory
"""
# what the trainer does: on a signal, save and end the notebook
SAVES = """
import os, signal, sys, time
def save(number, frame):
    open(f'saved-{os.environ.get("RANK", 0)}', 'w').write(str(number))
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, save)
globals().get('meet', int)()
open(f'waiting-{os.environ.get("RANK", 0)}', 'w').close()
print('waiting', os.getpid(), flush=True)
while True: time.sleep(0.05)
"""


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> Path:
    "A notebook with a parameters cell and then `sources`"
    cells = [nbf.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(nbf.v4.new_code_cell, sources)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbf.write(nbf.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    "The command in `folder`, its output piped as text"
    return subprocess.Popen([*COMMAND, *map(str, words)], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, word: str) -> str:
    "The first line of its output that begins with `word`"
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f"ended without saying {word!r}: {process.stderr.read()}")


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def text_of(notebook: Path) -> str:
    "All stream output of an executed notebook"
    return "".join(o.get("text", "") for c in nbf.read(notebook, 4).cells for o in c.get("outputs", []))


def fake(folder: Path, name: str, script: str) -> None:
    "An executable that stands in for a cluster's command"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def slurm_environment(folder: Path) -> dict[str, str]:
    "Fakes of Slurm's commands in `folder`, and the environment in which a batch script finds them"
    fake(folder, "decomp_nb", f'exec {sys.executable} -m decomp_nb "$@"')
    fake(folder, "scontrol", SCONTROL)
    fake(folder, "srun", SRUN)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return clean | {"PATH": f"{folder}:{os.environ['PATH']}"}


SCONTROL = """
case "$1" in
    requeue) echo "$@" > scontrol.txt ;;
    show) [ "$2" = hostnames ] && echo 127.0.0.1; [ "$2" = job ] && echo "JobState=${FAKE_STATE:-RUNNING}" ;;
esac
exit 0
"""
# one task per node, each with its number; signals are passed on, the highest exit code counts
SRUN = """
while [[ "$1" == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}" 2>/dev/null' USR1
trap 'kill -TERM "${tasks[@]}" 2>/dev/null' TERM
for ((node = 0; node < ${SLURM_JOB_NUM_NODES:-1}; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > tasks.tmp
mv tasks.tmp tasks.txt
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
