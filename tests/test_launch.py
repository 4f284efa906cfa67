"Runs as jobs: parameters are refused by name, progress is live, signals reach the notebook, ranks live and die together."
import importlib.util
import json
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
from decomp_nb.training.launch import main, take_parameters
from decomp_nb.training.parameters import check_trackers, gather_values, parameters, parse_parameters
from decomp_nb.training.processes import Rank, last_line
from decomp_nb.training.slurm import sbatch_script
from launch_toys import COMMAND, PATIENCE, ROOT, SAVES, alive, fake, slurm_environment, start, text_of, wait_for, write_notebook

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
    (["-p", "lr", "inf"], ["'lr'", "not a finite number"]),
    (["--timeout", "-5"], ["--timeout must be at least 0"]),
    (["--timeout", "nan"], ["--timeout must be at least 0"]),
    (["-f", "twice.yaml"], ["twice.yaml", "'steps' is set twice"]),
    (["--kernel", "fortran"], ["--kernel fortran", "there are:", f"runs in {sys.executable}"]),
    (["--nodes", "2", "--rendezvous", "localhost:29500"], ["--node-rank must number this machine, from 0 to 1"]),
    (["--nodes", "2", "--node-rank", "0"], ["--rendezvous HOST:PORT must name"]),
    (["--nodes", "2", "--node-rank", "0", "--rendezvous", "localhost"], ["'localhost': expected HOST:PORT"]),
])
def test_refuses_before_it_starts(toy, capsys, words, expected):
    Path("wrong.yaml").write_text("step: 3")
    Path("type.yaml").write_text("name: 3")
    Path("list.yaml").write_text("- steps")
    Path("broken.yaml").write_text("steps: [3")
    Path("twice.yaml").write_text("steps: 3\nsteps: 4")
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
    for words, expected in [(["batch_size", "0"], "batch_size: 0 is below 1"), (["lr_schedule", "cosin"], "did you mean 'cosine'"),
                            (["learning_rate", "inf"], "not a finite number"), (["trackers", "no_such"], "'no_such' is not installed")]:
        assert main(["run", "train.ipynb", "-p", *words]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name, text, expected", [
    ("out_dir", " ", "out_dir: is empty"), ("seed", str(2**64), "seed: "), ("model_options", "{[1]: 2}", "expects dict"),
    ("model_options", "[" * 10**5, "expects dict")])
def test_odd_values_are_refused(name, text, expected):
    with pytest.raises(ValueError, match=expected):
        gather_values(parameters(ROOT / "nbs" / "train_lsd.ipynb"), [], [(name, text)])


def test_a_tracker_with_a_point_in_its_name_is_refused():
    with pytest.raises(ValueError, match="'no.such' is not installed"):
        check_trackers("no.such")


def test_a_short_run_is_no_mistake():
    "`-p max_steps 3` is what everybody tries first: fewer steps than the warm-up has"
    accepted = parse_parameters(TrainConfig(lr_schedule="cosine", warmup_steps=50).parameters_cell())
    assert gather_values(accepted, [], [("max_steps", "3")]) == {"max_steps": 3}


ODD = parse_parameters("seed: int = 0\nlr: float = 1e-3\nprecision: str = 'auto'\ncpu: bool = False\noptions: dict = {}\n"
                       "sizes: tuple = (1, 2)\nlate: str = ''\nlimit: int | None = 3")


@pytest.mark.parametrize("text, expected", [
    ("seed: 010", {"seed": 10}),  # eight in YAML 1.1
    ("precision: no", {"precision": "no"}),  # False
    ("late: 1:30", {"late": "1:30"}),  # ninety
    ("late: 2026-01-02", {"late": "2026-01-02"}),  # a date
    ("lr: 3e-4", {"lr": 3e-4}),  # text
    ("cpu: yes", {"cpu": True}),
    ("sizes: [3, 4]", {"sizes": (3, 4)}),
    ("limit: ~", {"limit": None}),
    ("options: {masks: true, pad: null, word: no}", {"options": {"masks": True, "pad": None, "word": "no"}}),
])
def test_recipes_mean_what_they_say(tmp_path, text, expected):
    (tmp_path / "recipe.yaml").write_text(text)
    assert gather_values(ODD, [tmp_path / "recipe.yaml"], []) == expected


@pytest.mark.parametrize("name, text, expected", [
    ("lr", "-1e-4", -1e-4), ("seed", "010", 10), ("precision", "", ""), ("precision", "no", "no"), ("cpu", "no", False),
    ("options", '{"masks": true, "pad": null}', {"masks": True, "pad": None}), ("options", "{'a': (1, None)}", {"a": (1, None)}),
])
def test_words_of_the_command_line(name, text, expected):
    pairs, rest = take_parameters(["run", "a.ipynb", "-p", name, text, "--nproc", "2"])
    assert rest == ["run", "a.ipynb", "--nproc", "2"]
    assert gather_values(ODD, [], pairs) == {name: expected}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_consoles_that_are_not_utf8(toy, encoding):
    write_notebook(toy, "1", parameters="lr: float = 1.0  # rises as 1 − (1 + step)^(−2/3), ½ of ε")
    done = subprocess.run([*COMMAND, "params", "toy.ipynb"], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode(encoding).startswith("lr  float  1.0  rises as 1 "), done.stderr


@pytest.mark.parametrize("module", ["decomp_nb", "decomp_nb.training.launch"])
def test_python_m_is_the_command(toy, module):
    done = subprocess.run([sys.executable, "-m", module, "run", "toy.ipynb", "-p", "steps", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "'steps' expects int" in done.stderr


def test_a_missing_package_is_named(toy, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ipykernel" else there(name, *rest))
    assert main(["run", "toy.ipynb"]) == 2
    assert f"ipykernel is missing in {sys.executable}; install it: pip install ipykernel" in capsys.readouterr().err


@pytest.mark.parametrize("program, expected", [("exit 1", "died before"), ("sleep 1000", "in 2 seconds"), ("", "no-such-program")])
def test_a_kernel_that_does_not_start_is_an_error(toy, capsys, monkeypatch, tmp_path, program, expected):
    (tmp_path / "kernels/broken").mkdir(parents=True)
    spec = {"argv": ["sh", "-c", program] if program else ["no-such-program"], "display_name": "broken", "language": "python"}
    (tmp_path / "kernels/broken/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr("decomp_nb.training.kernel._START_TIMEOUT", 2)
    begin = time.monotonic()
    assert main(["run", "toy.ipynb", "out.ipynb", "--kernel", "broken"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("decomp_nb: error: the kernel 'broken' (--kernel) did not start:") and expected in said, said
    assert said.count("\n") == 1 and time.monotonic() - begin < 30


@pytest.mark.parametrize("visible, device", [("7", "auto"), ("", "gpu")])
def test_gpus_that_are_not_there(toy, capsys, monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", int)
    for words in ([], ["--nproc", "2"]):
        assert main(["run", "toy.ipynb", "--device", device, *words]) == 2
        assert "GPUs were asked for, but torch" in capsys.readouterr().err


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
    "Also where another environment has installed the kernel `python3`, and on a console without UTF-8"
    (tmp_path / "kernels/python3").mkdir(parents=True)
    (tmp_path / "kernels/python3/kernel.json").write_text('{"argv": ["false"], "display_name": "other", "language": "python"}')
    work = "import os, time\nos.makedirs(out_dir)\nfor i in range(steps): print('step', i, name, repr(lr), flush=True); time.sleep(1)"
    write_notebook(tmp_path / "toy.ipynb", work, "import sys\nprint('½', sys.executable)", "print('run directory:', out_dir)")
    (tmp_path / "settings.ini").write_text("[DEFAULT]")
    (tmp_path / "deep").mkdir()
    (tmp_path / "recipe.yaml").write_text("lr: 3e-4\nsteps: 9\n")
    process = start(tmp_path / "deep", "run", "../toy.ipynb", "-f", "../recipe.yaml", "-p", "steps", "3", "-p", "name", "007",
                    JUPYTER_PATH=str(tmp_path), PYTHONIOENCODING="ascii")
    assert wait_for(process, "step").split() == ["step", "0", "007", "0.0003"]
    assert process.poll() is None, "the first line came only when everything was over"
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and err == ""
    assert f"\\xbd {sys.executable}" in out
    first, second = out.splitlines()[-2:]
    executed = tmp_path / "deep" / first.removeprefix("executed notebook: ")
    assert executed.parent.samefile(tmp_path / "papermill_runs/out") and re.fullmatch(r"toy-\d{8}-\d{6}-\d{6}\.ipynb", executed.name)
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


def test_a_killed_rank_names_the_signal(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    process.wait()
    log = tmp_path / "rank1.txt"
    log.write_text("40 pictures to learn from\n")
    reason = Rank(1, process, tmp_path / "rank1.ipynb", log, tmp_path / "report1.txt").reason()
    assert last_line(reason).startswith("ended by SIGKILL") and "40 pictures" in reason


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


def test_slurm_job_saves_and_goes_back_into_the_queue(toy, tmp_path, capsys):
    write_notebook(toy, SAVES)
    assert main(["run", "toy.ipynb", "--sbatch", "jobs/job.sbatch", "-p", "steps", "7", "--array", "0-3", "--gpus", "0"]) == 0
    assert "sbatch jobs/job.sbatch" in capsys.readouterr().out
    task = {"SLURM_JOB_ID": "102", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "2"}
    job = subprocess.Popen(["bash", "jobs/job.sbatch"], env=slurm_environment(tmp_path / "bin") | task, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    wait_for(job, "waiting")
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, err
    assert Path("saved-0").read_text() == str(int(signal.SIGUSR1)) and Path("scontrol.txt").read_text() == "requeue 100_2\n"
    injected = nbf.read("papermill_runs/out/toy-100_2.ipynb", 4).cells[1].source
    assert "steps = 7" in injected and 'out_dir = "papermill_runs/out/toy-100_2"' in injected


def test_slurm_job_hands_on_the_exit_code(toy, tmp_path):
    Path("job.sbatch").write_text(sbatch_script("toy.ipynb", parameters("toy.ipynb"), {}))
    environment = slurm_environment(tmp_path / "bin")
    fake(tmp_path / "bin", "decomp_nb", 'echo "$@"; exit 3')
    fake(tmp_path / "bin", "scontrol", "touch scontrol.txt")
    job = subprocess.run(["bash", "job.sbatch"], env=environment, capture_output=True, text=True)
    assert job.returncode == 3 and not Path("scontrol.txt").exists()
    assert job.stdout.split()[:3] == ["run", "toy.ipynb", "papermill_runs/out/toy-local.ipynb"]


def test_committed_batch_script_is_what_its_header_says(tmp_path, monkeypatch):
    script = (ROOT / "papermill_runs" / "slurm.sbatch").read_text()
    command = re.search(r"^# Written by: decomp_nb (.+)$", script, re.M)[1]
    words = command.split()
    target = words.index("-o") + 1
    monkeypatch.chdir(tmp_path)
    for name in [words[1], *(words[i + 1] for i, w in enumerate(words) if w == "-f")]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, name)
    assert main(words) == 0
    assert Path(words[target]).read_text() == script
