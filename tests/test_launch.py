"Runs as jobs: parameters are refused by name, progress is live, signals reach the notebook, ranks live and die together."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat as nbf
import pytest

from decomp_nb.training.config import TrainConfig
from decomp_nb.training.launch import main
from decomp_nb.training.parameters import gather_values, parameters
from decomp_nb.training.slurm import sbatch_script

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


def text_of(notebook: Path) -> str:
    "All stream output of an executed notebook"
    return "".join(o.get("text", "") for c in nbf.read(notebook, 4).cells for o in c.get("outputs", []))


# --- before anything starts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_notebook(tmp_path / "toy.ipynb", "print(steps)")


def test_lists_what_a_notebook_accepts(toy, capsys):
    assert main(["params", "toy.ipynb"]) == 0
    listed = capsys.readouterr().out
    assert main(["run", "toy.ipynb", "--help-notebook"]) == 0
    assert capsys.readouterr().out == listed
    assert re.search(r"^lr\s+float\s+0\.001\s+learning rate$", listed, re.M)


@pytest.mark.parametrize("words, expected", [
    (["-p", "stepz", "3"], ["unknown parameter 'stepz'", "did you mean 'steps'", "lr, name, out_dir"]),
    (["-p", "steps", "many"], ["'steps'", "expects int", "'many'"]),
    (["-p", "steps", "2.5"], ["'steps'", "expects int"]),
    (["-f", "wrong.yaml"], ["unknown parameter 'step'", "wrong.yaml", "did you mean 'steps'"]),
    (["-f", "type.yaml"], ["'name'", "expects str", "type.yaml"]),
    (["-f", "list.yaml"], ["list.yaml", "must hold lines `name: value`"]),
    (["-f", "broken.yaml"], ["broken.yaml", "not valid YAML"]),
    (["-f", "missing.yaml"], ["no recipe at missing.yaml"]),
    (["out.txt"], ["out.txt", ".ipynb"]),
    (["toy.ipynb"], ["is the notebook itself"]),
    (["--nproc", "0"], ["--nproc 0"]),
])
def test_refuses_before_it_starts(toy, capsys, words, expected):
    Path("wrong.yaml").write_text("step: 3")
    Path("type.yaml").write_text("name: 3")
    Path("list.yaml").write_text("- steps")
    Path("broken.yaml").write_text("steps: [3")
    before = toy.read_bytes()
    assert main(["run", "toy.ipynb", *words]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said
    assert toy.read_bytes() == before and not Path("papermill_runs").exists()


def test_refuses_what_is_no_run_notebook(toy, capsys):
    nbf.write(nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell("1")]), "plain.ipynb")
    Path("text.ipynb").write_text("hello")
    cases = {"plain.ipynb": "0 cells tagged 'parameters'", "text.ipynb": "is not a notebook", "tox.ipynb": "did you mean toy.ipynb"}
    for name, expected in cases.items():
        assert main(["run", name]) == 2
        assert expected in capsys.readouterr().err


def test_limits_of_training_options_are_known(toy, capsys):
    write_notebook(Path("train.ipynb"), "1", parameters=TrainConfig().parameters_cell({"dataset": ("shapes", "which images")}))
    assert set(TrainConfig.names()) < set(parameters("train.ipynb"))
    for words, expected in [(["batch_size", "0"], "batch_size: 0 is below 1"), (["lr_schedule", "cosin"], "did you mean 'cosine'")]:
        assert main(["run", "train.ipynb", "-p", *words]) == 2
        assert expected in capsys.readouterr().err


RECIPES = sorted((ROOT / "papermill_runs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_fits_its_notebook(recipe):
    methods = {p.stem.removeprefix("train_"): p for p in (ROOT / "nbs").glob("train_*.ipynb")}
    methods |= {kind: methods["autoencoder"] for kind in ("vqvae", "dvae")} | {"compare": ROOT / "nbs" / "compare_slots.ipynb"}
    fitting = [m for m in methods if recipe.stem.startswith(f"{m}_")]
    assert fitting, f"{recipe.name}: recipes are called <method>_<data set>.yaml; methods: {', '.join(methods)}"
    accepted = parameters(methods[max(fitting, key=len)])
    assert gather_values(accepted, [recipe], [])
    assert recipe.read_text().startswith("#"), f"{recipe.name}: the head says how long it takes, on what, and which number to expect"


# --- one process ---------------------------------------------------------------------------------------------------------------------


def test_run_is_live_and_names_its_results(tmp_path):
    work = "import os, time\nos.makedirs(out_dir)\nfor i in range(steps): print('step', i, name, repr(lr), flush=True); time.sleep(1)"
    write_notebook(tmp_path / "toy.ipynb", work, "print('run directory:', out_dir)")
    (tmp_path / "settings.ini").write_text("[DEFAULT]")
    (tmp_path / "deep").mkdir()
    (tmp_path / "recipe.yaml").write_text("lr: 3e-4\nsteps: 9\n")
    process = start(tmp_path / "deep", "run", "../toy.ipynb", "-f", "../recipe.yaml", "-p", "steps", "3", "-p", "name", "007")
    assert wait_for(process, "step").split() == ["step", "0", "007", "0.0003"]
    assert process.poll() is None, "the first line came only when everything was over"
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and err == ""
    first, second = out.splitlines()[-2:]
    executed = tmp_path / "deep" / first.removeprefix("executed notebook: ")
    assert executed.parent.samefile(tmp_path / "papermill_runs/out") and re.fullmatch(r"toy-\d{8}-\d{6}\.ipynb", executed.name)
    assert second == "run directory: runs/toy"
    kept = tmp_path / "deep/runs/toy/notebook.ipynb"
    assert kept.read_bytes() == executed.read_bytes() and "step 2 007" in text_of(kept)


def test_failing_cell_is_shown_and_the_notebook_kept(tmp_path):
    write_notebook(tmp_path / "toy.ipynb", "print('before')", "missing = {}\nmissing['slots']", "print('after')")
    process = start(tmp_path, "run", "toy.ipynb", "out.ipynb")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "before" in out and "after" not in out
    assert "KeyError: 'slots'" in err and "missing['slots']" in err and "notebook up to there: out.ipynb" in err
    assert text_of(tmp_path / "out.ipynb") == "before\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_let_the_notebook_save(tmp_path, number):
    write_notebook(tmp_path / "toy.ipynb", SAVES, "print('not reached')")
    process = start(tmp_path, "run", "toy.ipynb", "out.ipynb")
    wait_for(process, "waiting")
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert (tmp_path / "saved-0").exists() and "executed notebook: out.ipynb" in out and "not reached" not in out


def test_stop_before_the_notebook_can_save(tmp_path):
    write_notebook(tmp_path / "toy.ipynb", "import os, time\nprint('waiting', os.getpid(), flush=True)\ntime.sleep(60)")
    process = start(tmp_path, "run", "toy.ipynb", "out.ipynb")
    kernel = int(wait_for(process, "waiting").split()[1])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in err and not alive(kernel)
    assert "waiting" in text_of(tmp_path / "out.ipynb")


def test_timeout_asks_to_save(tmp_path):
    write_notebook(tmp_path / "toy.ipynb", SAVES)
    for seconds in ("5", "20", "80"):  # a kernel that starts slowly cannot save yet
        process = start(tmp_path, "run", "toy.ipynb", "out.ipynb", "--timeout", seconds)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 124, err
        if (tmp_path / "saved-0").exists():
            break
    else:
        raise AssertionError("the notebook was not asked to save")


# --- several processes ---------------------------------------------------------------------------------------------------------------


def test_two_ranks_find_each_other_and_save_together(tmp_path):
    work = """
import os, torch, torch.distributed as dist
dist.init_process_group('gloo')
ones = torch.ones(1); dist.all_reduce(ones)
meet = dist.barrier  # every rank can save before the first one says that it waits
print('sum', ones.item(), 'steps', steps, 'cpu', os.environ['ACCELERATE_USE_CPU'], flush=True)
"""
    write_notebook(tmp_path / "toy.ipynb", work, SAVES)
    process = start(tmp_path, "run", "toy.ipynb", "out.ipynb", "-p", "steps", "5", "--nproc", "2", CUDA_VISIBLE_DEVICES="")
    assert wait_for(process, "sum").split() == ["sum", "2.0", "steps", "5", "cpu", "1"]
    wait_for(process, "waiting")
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert sorted(p.name for p in tmp_path.glob("*.ipynb")) == ["out.ipynb", "toy.ipynb"] and out.count("executed notebook:") == 1


def test_one_dead_rank_stops_the_others(tmp_path):
    work = """
import os, time
open(f'pid-{os.environ["RANK"]}', 'w').write(str(os.getpid()))
if os.environ['RANK'] == '1':
    while not os.path.exists('pid-0'): time.sleep(0.05)
    raise RuntimeError('rank one gives up')
time.sleep(120)
"""
    write_notebook(tmp_path / "toy.ipynb", work)
    process = start(tmp_path, "run", "toy.ipynb", "out.ipynb", "--nproc", "2", CUDA_VISIBLE_DEVICES="")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "rank 1 failed" in err and "rank one gives up" in err
    assert (tmp_path / "out-rank1.ipynb").exists()
    survivor = int((tmp_path / "pid-0").read_text())
    deadline = time.monotonic() + PATIENCE
    while alive(survivor) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(survivor), "the kernel of rank 0 was left behind"


# --- Slurm ---------------------------------------------------------------------------------------------------------------------------


def fake(folder: Path, name: str, script: str) -> None:
    "An executable that stands in for a cluster's command"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_job_saves_and_goes_back_into_the_queue(toy, tmp_path, capsys):
    write_notebook(toy, SAVES)
    assert main(["run", "toy.ipynb", "--sbatch", "jobs/job.sbatch", "-p", "steps", "7", "--array", "0-3"]) == 0
    assert "sbatch jobs/job.sbatch" in capsys.readouterr().out
    fake(tmp_path / "bin", "decomp_nb", f'exec {sys.executable} -m decomp_nb "$@"')
    fake(tmp_path / "bin", "scontrol", 'echo "$@" > scontrol.txt')
    task = {"SLURM_JOB_ID": "102", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "2",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "jobs/job.sbatch"], env=os.environ | task, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(job, "waiting")
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert Path("saved-0").read_text() == str(int(signal.SIGUSR1)) and Path("scontrol.txt").read_text() == "requeue 100_2\n"
    injected = nbf.read("papermill_runs/out/toy-100_2.ipynb", 4).cells[1].source
    assert "steps = 7" in injected and 'out_dir = "papermill_runs/out/toy-100_2"' in injected


def test_slurm_job_hands_on_the_exit_code(toy, tmp_path):
    Path("job.sbatch").write_text(sbatch_script("toy.ipynb", parameters("toy.ipynb"), {}))
    fake(tmp_path / "bin", "decomp_nb", 'echo "$@"; exit 3')
    fake(tmp_path / "bin", "scontrol", "touch scontrol.txt")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    job = subprocess.run(["bash", "job.sbatch"], env=env | {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}"}, capture_output=True, text=True)
    assert job.returncode == 3 and not Path("scontrol.txt").exists()
    assert job.stdout.split()[:3] == ["run", "toy.ipynb", "papermill_runs/out/toy-local.ipynb"]


def test_committed_batch_script_is_what_its_header_says(tmp_path, monkeypatch):
    script = (ROOT / "papermill_runs" / "slurm.sbatch").read_text()
    command = re.search(r"^# Written by: decomp_nb (.+)$", script, re.M)[1]
    words = command.split()
    target = words.index("--sbatch") + 1
    monkeypatch.chdir(tmp_path)
    for name in [words[1], *(words[i + 1] for i, w in enumerate(words) if w == "-f")]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, name)
    assert main(words) == 0
    assert Path(words[target]).read_text() == script
