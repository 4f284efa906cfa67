"""Several machines and clusters: two hosts train as one, a dead rank ends the others, unequal machines do not start, batch jobs
come back. Hosts are network namespaces where those are allowed, else addresses of the loopback range."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat as nbf
import pytest
import torch
import yaml
from safetensors.torch import load_file

from decomp_nb.training.launch import main
from decomp_nb.training.parameters import parameters
from decomp_nb.training.rendezvous import _SILENCE, Board, Watch, exchange, leave, open_store
from decomp_nb.training.slurm import Allocation, sbatch_script
from launch_toys import COMMAND, PATIENCE, ROOT, SAVES, fake, slurm_environment, text_of, wait_for, wait_for_file, write_notebook
from training_toys import train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- two hosts -----------------------------------------------------------------------------------------------------------------------


def ip(*words: str) -> bool:
    "Whether the command `ip` did what it was told"
    program = shutil.which("ip")
    return program is not None and subprocess.run([program, *words], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def hosts():
    "Two hosts: for each the words that start a command there; and the address of the first"
    names = [f"decomp{os.getpid()}{i}" for i in (0, 1)]
    if ip("netns", "add", names[0]) and ip("netns", "add", names[1]):
        ip("link", "add", f"d{os.getpid()}a", "netns", names[0], "type", "veth", "peer", "name", f"d{os.getpid()}b", "netns", names[1])
        for i, name in enumerate(names):
            device = f"d{os.getpid()}{'ab'[i]}"
            for words in (["addr", "add", f"10.9.8.{i + 1}/24", "dev", device], ["link", "set", device, "up"], ["link", "set", "lo", "up"]):
                ip("-n", name, *words)
        yield [["ip", "netns", "exec", name] for name in names], "10.9.8.1"
    else:
        yield [[], []], "127.0.0.2"
    for name in names:
        ip("netns", "delete", name)


def start_on_both(hosts, folder: Path, *words: str, port: int = 29431, **environment: str) -> list[subprocess.Popen]:
    "The same command on both hosts"
    prefixes, address = hosts
    port = port if prefixes[0] else free_port()
    common = ["--nodes", "2", "--rendezvous", f"{address}:{port}", "--device", "cpu"]
    return [subprocess.Popen([*prefix, *COMMAND, "run", *words, *common, "--node-rank", str(node)], cwd=folder,
                             env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for node, prefix in enumerate(prefixes)]


TRAINING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import training_toys

class Denoiser(training_toys.Denoiser):
    def forward(self, batch):
        if self.calls == die_at and os.environ['RANK'] == '1':
            open('died', 'w').close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)

training_toys.torch.manual_seed(0)
training_toys.train(out_dir, model=Denoiser(quiet=True), quiet=True, resume='auto', save_every=4, batch_size=4)
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_two_hosts_train_as_one_and_survive_a_death(tmp_path, hosts):
    """Rank 1 of 2 is killed on the second host: both end within seconds, each with one message, and the run goes on from its
    checkpoint, on both hosts or on one process, to the weights of a run that one process made with the double batch"""
    _, whole = train(tmp_path / "whole", batch_size=8, quiet=True)
    write_notebook(tmp_path / "toy.ipynb", TRAINING, parameters="out_dir: str = 'runs/cut'  # here\ndie_at: int = -1  # call")
    command = ["toy.ipynb", "out.ipynb", "-p", "out_dir", str(tmp_path / "cut")]
    first, second = start_on_both(hosts, tmp_path, *command, "-p", "die_at", "6")
    said = [process.communicate(timeout=PATIENCE) for process in (first, second)]
    assert time.time() - (tmp_path / "died").stat().st_mtime < 30
    assert (first.returncode, second.returncode) == (1, 1), said
    died = f"rank 1 on node 1 ({socket.gethostname()}) failed"
    assert f"stopped, because {died}: the notebook's process died" in said[0][1] and "Traceback" not in said[0][1], said[0][1]
    assert said[1][1].startswith(f"{died}:\nthe notebook's process died"), said[1][1]
    assert said[1][1].endswith("notebook up to there: out-rank1.ipynb\n"), said[1][1]
    assert [p.name for p in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000004"]
    shutil.copytree(tmp_path / "cut", tmp_path / "one")

    _, alone = train(tmp_path / "one", batch_size=8, quiet=True, resume="auto")
    running = start_on_both(hosts, tmp_path, *command, port=29432)
    said = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "going on from step 4" in said[0][0] and said[0][0].count("executed notebook:") == 1 and said[1][0] == ""
    assert sorted(p.name for p in tmp_path.glob("*.ipynb")) == ["out-rank1.ipynb", "out.ipynb", "toy.ipynb"]
    assert json.loads((tmp_path / "cut/config.json").read_text())["hardware"]["processes"] == 2
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights(alone.path)[name], tensor, rtol=0, atol=1e-6)


# --- machines that must not start ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_notebook(tmp_path / "toy.ipynb", "print(steps)")


def run_nodes(*extra: list[str], **options: str) -> list[int]:
    "Exit codes of `decomp_nb run` on machines that differ in their last words; they are threads, because none gets as far as a kernel"
    codes = {}
    common = ["run", "toy.ipynb", "out.ipynb", "--device", "cpu", "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}",
              "--rendezvous-timeout", options.get("timeout", "20")]
    threads = [threading.Thread(target=lambda i=i, words=words: codes.update({i: main([*common, *words])})) for i, words in enumerate(extra)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return [codes[i] for i in range(len(extra))]


def test_unequal_parameters_are_refused(toy, capsys):
    assert run_nodes(["--node-rank", "0", "-p", "steps", "3"], ["--node-rank", "1", "-p", "steps", "4", "--nproc", "2"]) == [2, 2]
    said = capsys.readouterr().err
    assert said.count("the nodes do not run the same thing:") == 2
    host = socket.gethostname()
    assert said.count(f"parameter steps: node 0 ({host}) has 3, node 1 ({host}) has 4") == 2
    assert said.count(f"--nproc: node 0 ({host}) has 1, node 1 ({host}) has 2") == 2 and not Path("out.ipynb").exists()


def test_unequal_code_is_refused(toy, capsys, monkeypatch):
    answers = iter(["0a1b", "2c3d"])
    monkeypatch.setattr("decomp_nb.training.rendezvous._code_digest", lambda: next(answers))
    assert run_nodes(["--node-rank", "0"], ["--node-rank", "1"]) == [2, 2]
    assert capsys.readouterr().err.count("code of decomp_nb: node 0") == 2


def test_a_run_directory_that_only_one_machine_sees(toy, capsys, monkeypatch):
    answers = iter(["step-00000500", "none"])
    monkeypatch.setattr("decomp_nb.training.rendezvous._last_checkpoint", lambda out_dir: next(answers))
    assert run_nodes(["--node-rank", "0"], ["--node-rank", "1"]) == [2, 2]
    assert capsys.readouterr().err.count("last checkpoint in out_dir: node 0") == 2


def test_a_number_that_two_machines_have():
    store = open_store("127.0.0.1", 0, serve=True, timeout=5)
    first, second = (Board(open_store("127.0.0.1", store.port, serve=False, timeout=5), 1, 2, timeout=0.5) for _ in range(2))
    with pytest.raises(ConnectionError, match="node 0 of 2 did not come to the rendezvous"):
        exchange(first, {})
    with pytest.raises(ValueError, match="two machines were started as node 1"):
        exchange(second, {})


def test_a_port_that_something_else_uses(capfd):
    "A server of another kind accepts the connection and never speaks: refused after the timeout, not waited for"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConnectionError, match="something answers there, but not machine 0"):
            open_store("127.0.0.1", port, serve=False, timeout=1)
    time.sleep(1)  # torch prints a page once the port is closed; `capfd` takes it


def test_a_rendezvous_that_nobody_answers(toy, capfd):
    begin = time.monotonic()
    assert run_nodes(["--node-rank", "1"], timeout="2") == [2]
    said = capfd.readouterr().err
    assert "nobody answered within 2 s" in said and said.count("\n") == 1, "torch's own pages about failed tries"
    assert run_nodes(["--node-rank", "0"], timeout="2") == [2]
    assert "node 1 of 2 did not come to the rendezvous within 2 s" in capfd.readouterr().err
    assert time.monotonic() - begin < 30


def test_a_port_that_is_taken(toy, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = ["--nodes", "2", "--node-rank", "0", "--rendezvous", f"127.0.0.1:{other.getsockname()[1]}", "--rendezvous-timeout", "2"]
        assert main(["run", "toy.ipynb", *words]) == 2
    assert "cannot be served here" in capsys.readouterr().err


def test_a_machine_that_falls_silent(monkeypatch):
    store = open_store("127.0.0.1", 0, serve=True, timeout=10)
    first, second = (Watch(Board(open_store("127.0.0.1", store.port, serve=False, timeout=10), i, 2)) for i in (0, 1))
    assert first.trouble() == second.trouble() == first.trouble() == ""
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + _SILENCE + 1)
    assert first.trouble() == f"node 1 has given no sign of life for {_SILENCE} s"
    monkeypatch.undo()
    leave(second.board, 0)
    del store
    second.board.store = first.board.store = None  # as after a reset connection
    second.board.read = lambda key: (_ for _ in ()).throw(RuntimeError("Connection reset by peer"))
    second.board.write = lambda key, value: None
    assert second.trouble() == "node 0, which serves the rendezvous, is gone"


# --- other launchers -----------------------------------------------------------------------------------------------------------------


def test_under_torchrun_each_process_is_a_rank(tmp_path):
    "Signals and one written notebook; torchrun and `accelerate launch` set the same variables"
    work = """
import os, torch, torch.distributed as dist
dist.init_process_group('gloo')
ones = torch.ones(1); dist.all_reduce(ones)
print('sum', ones.item(), 'rank', os.environ['RANK'], flush=True)
"""
    write_notebook(tmp_path / "toy.ipynb", work)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*torchrun, "-m", "decomp_nb", "run", "toy.ipynb", "out.ipynb", "-p", "steps", "3"], cwd=tmp_path,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"sum (.+) rank (.)", done.stdout)) == [("2.0", "0"), ("2.0", "1")]
    assert sorted(p.name for p in tmp_path.glob("*.ipynb")) == ["out.ipynb", "toy.ipynb"] and done.stdout.count("executed notebook:") == 1
    assert "sum 2.0 rank 0" in text_of(tmp_path / "out.ipynb")


def test_a_rank_does_not_start_ranks(toy, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "toy.ipynb", "--nproc", "2"]) == 2
    assert "leave out --nproc and --nodes" in capsys.readouterr().err
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["run", "toy.ipynb", "--device", "cpu"]) == 2
    assert "MASTER_ADDR and MASTER_PORT are not" in capsys.readouterr().err


# --- Slurm ---------------------------------------------------------------------------------------------------------------------------


def test_slurm_writes_what_the_cluster_wants(toy, capsys):
    words = ["--nodes", "2", "--gpus", "4", "--account", "vision", "--qos", "low", "--partition", "a", "--constraint", "a100|h100",
             "--memory", "120G", "--module", "cuda/12", "--module", "gcc", "--setup", "export A=1", "--option=--exclusive", "--time", "2:00:00"]
    assert main(["slurm", "toy.ipynb", "-o", "job.sbatch", "-p", "lr", "-1e-4", *words]) == 0
    lines = Path("job.sbatch").read_text().splitlines()
    expected = ["nodes=2", "ntasks=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=32", "account=vision", "qos=low", "partition=a",
                "constraint=a100|h100", "mem=120G", "exclusive", "time=2:00:00", "signal=B:USR1@120", "requeue"]
    assert {f"#SBATCH --{option}" for option in expected} <= set(lines)
    assert {"module load cuda/12", "module load gcc", "export A=1"} <= set(lines)
    run = next(line for line in lines if "decomp_nb run" in line and not line.startswith("#"))
    assert '--nproc 4 --device gpu --nodes 2 --rendezvous "$first:$port" --code-when-stopped 75' in run and "-p lr -0.0001" in run
    assert main(["slurm", "toy.ipynb", "--nodes", "0"]) == 2 and main(["slurm", "toy.ipynb", "-p", "stepz", "1"]) == 2


def test_slurm_refuses_before_the_queue(toy, capsys):
    Path("wrong.yaml").write_text("stepz: 3")
    before = toy.read_bytes()
    for words, expected in [(["-f", "wrong.yaml"], "unknown parameter 'stepz'"), (["-f", "missing.yaml"], "no recipe at"),
                            (["-o", "toy.ipynb"], "is what the job reads"), (["--account", "a\nb"], "leave out quotes and line breaks")]:
        assert main(["slurm", "toy.ipynb", *words]) == 2 and expected in capsys.readouterr().err
    assert toy.read_bytes() == before and not Path("toy.sbatch").exists()


def test_slurm_survives_odd_names(toy, tmp_path):
    odd = toy.rename(tmp_path / 'my $(touch harm) "toy".ipynb')
    assert main(["slurm", odd.name, "-o", "job.sbatch", "-p", "name", "a\ntouch harm\n'b'", "--partition", "two words", "--gpus", "0"]) == 0
    script = Path("job.sbatch").read_text()
    assert {"#SBATCH --job-name=my_touch_harm_toy_", '#SBATCH --partition="two words"'} <= set(script.splitlines())
    environment = slurm_environment(tmp_path / "bin")
    fake(tmp_path / "bin", "decomp_nb", 'printf "<%s>" "$@"')
    job = subprocess.run(["bash", "job.sbatch"], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    assert f"<run><{odd.name}><papermill_runs/out/my_touch_harm_toy_-local.ipynb><-p><name><a\ntouch harm\n'b'>" in job.stdout
    assert not Path("harm").exists()


@pytest.mark.parametrize("image, expected", [("torch.sif", "apptainer exec --nv torch.sif decomp_nb run"),
                                             ("nvcr.io#nvidia/pytorch:25.01", "--container-image='nvcr.io#nvidia/pytorch:25.01' ")])
def test_slurm_containers(toy, image, expected):
    script = sbatch_script("toy.ipynb", parameters("toy.ipynb"), {}, job=Allocation(container=image))
    assert expected in script and subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


STAYS = "trap 'exit 75' USR1 TERM\necho waiting\nwhile :; do sleep 0.05; done"


@pytest.mark.parametrize("number, to_tasks, state, requeued", [
    ("USR1", False, "RUNNING", True), ("TERM", False, "RUNNING", True), ("TERM", True, "RUNNING", True), ("TERM", True, "CANCELLED", False)])
def test_every_warning_leads_back_to_the_queue(toy, tmp_path, number, to_tasks, state, requeued):
    Path("job.sbatch").write_text(sbatch_script("toy.ipynb", parameters("toy.ipynb"), {}))
    environment = slurm_environment(tmp_path / "bin") | {"SLURM_JOB_ID": "7", "FAKE_STATE": state}
    fake(tmp_path / "bin", "decomp_nb", STAYS)
    job = subprocess.Popen(["bash", "job.sbatch"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(job, "waiting")
    wait_for_file(Path("tasks.txt"))
    pids = map(int, Path("tasks.txt").read_text().split()) if to_tasks else [job.pid]
    for pid in pids:
        os.kill(pid, getattr(signal, f"SIG{number}"))
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == (0 if requeued else 75), err
    assert Path("scontrol.txt").exists() == requeued


def test_a_job_of_two_machines_saves_and_comes_back(toy, tmp_path):
    "SIGTERM reaches only the tasks, as when a job is preempted; both kernels save, and the job is queued again"
    write_notebook(toy, "import os\nprint('node', os.environ['GROUP_RANK'], 'threads', os.environ['OMP_NUM_THREADS'])", SAVES)
    assert main(["slurm", "toy.ipynb", "-o", "job.sbatch", "--nodes", "2", "--gpus", "0", "--account", "vision"]) == 0
    slurm = {"SLURM_JOB_ID": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.Popen(["bash", "job.sbatch"], env=slurm_environment(tmp_path / "bin") | slurm, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    wait_for(job, "waiting")
    wait_for_file(Path("waiting-1"))
    for pid in map(int, Path("tasks.txt").read_text().split()):
        os.kill(pid, signal.SIGTERM)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0 and Path("scontrol.txt").read_text() == "requeue 8\n", err
    assert Path("saved-0").read_text() == Path("saved-1").read_text() == str(int(signal.SIGTERM))
    assert "node 0" in text_of(Path("papermill_runs/out/toy-8.ipynb"))
    assert 'out_dir = "papermill_runs/out/toy-8"' in nbf.read("papermill_runs/out/toy-8.ipynb", 4).cells[1].source


# --- clouds --------------------------------------------------------------------------------------------------------------------------


def test_skypilot_example():
    task = yaml.safe_load((ROOT / "papermill_runs/skypilot.yaml").read_text())
    assert task["num_nodes"] >= 2 and task["resources"]["accelerators"] and task["workdir"] == "."
    assert subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True).returncode == 0
    words = task["run"]
    for needed in ("SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"):
        assert f"${needed}" in words
    assert (ROOT / task["envs"]["NOTEBOOK"]).exists() and (ROOT / task["envs"]["RECIPE"]).exists()


def test_modal_example(monkeypatch):
    "Compiles, and with a stand-in for modal runs the command that it should"
    source = (ROOT / "papermill_runs/modal_app.py").read_text()
    calls = []

    class Stub:
        "Answers every attribute and call with itself; as a decorator it hands the function back"
        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **options):
            return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not options else self
    monkeypatch.setitem(sys.modules, "modal", Stub())
    monkeypatch.setattr(subprocess, "run", lambda words, **options: calls.append(words) or subprocess.CompletedProcess(words, 0))
    names = {"__name__": "modal_app", "__file__": str(ROOT / "papermill_runs/modal_app.py")}
    exec(compile(source, "modal_app.py", "exec"), names)
    names["train"]("nbs/train_lsd.ipynb", "papermill_runs/recipes/lsd_clevr.yaml", "lsd", "-p max_steps 3")
    words = calls[-1]
    assert words[1:4] == ["-m", "decomp_nb", "run"] and words[-3:] == ["-p", "max_steps", "3"] and "gpu" in words
