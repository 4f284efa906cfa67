"""The trainer's promises: exact accumulation and resume, whole checkpoints, clear refusals. Tiny modules, one or two processes, CPU."""
import errno
import json
import socket
import warnings
from pathlib import Path

import pytest
import torch
import warm_kernel
from safetensors.torch import load_file
from torch import nn
from training_toys import Denoiser, Pictures, Slower, train, train_in_process

from decomp_nb.training import checkpoint, stream, trainer
from decomp_nb.training.checkpoint import list_checkpoints
from decomp_nb.training.config import TrainConfig, resolve_out_dir
from decomp_nb.training.files import verify_manifest
from decomp_nb.training.parameters import check_parameters_cell, parse_parameters
from decomp_nb.training.run_directory import Run, load_run

TIMES = ("seconds", "images_per_second")


def rows(run, kind=None):
    "Metric lines without what the clock decides"
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics(kind)]


def final_weights(run):
    folder = list_checkpoints(run.checkpoints)[-1]
    return {file: load_file(folder / f"{file}.safetensors") for file in ("model", "ema")}


def assert_same_run(a, b):
    assert rows(a, "train") == rows(b, "train")
    for file, tensors in final_weights(a).items():
        for name, tensor in tensors.items(): assert torch.equal(tensor, final_weights(b)[file][name]), (file, name)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "`processes(request, …, count)` trains each request in `count` gloo processes → output of rank 0 of the last; forked from a server that has imported torch once"
    server = warm_kernel.server()
    folder = tmp_path_factory.mktemp("processes")

    def run(*requests, count=1):
        for request in requests:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            env = dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1") if count > 1 else {}
            ranks = [env | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if env else {} for rank in range(count)]
            started = [server.Process(target=train_in_process, args=(request, rank, folder / f"log-{number}"), daemon=False) for number, rank in enumerate(ranks)]
            for process in started: process.start()
            for number, process in enumerate(started):
                process.join(240)
                if process.is_alive(): process.kill()
                assert process.exitcode == 0, (folder / f"log-{number}").read_text()[-3000:]
        return (folder / "log-0").read_text()
    run.logs = folder
    return run


# the configuration ------------------------------------------------------------------------------------------------------------------------------------------

def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'batchsize'; did you mean 'batch_size'"): TrainConfig.from_dict({"batchsize": 3})
    with pytest.raises(TypeError, match="max_steps: expected int, got str '10'"): TrainConfig(max_steps="10")
    with pytest.raises(TypeError, match="learning_rate: expected float.*1.0e-4"): TrainConfig(learning_rate="1e-4")
    for wrong in (dict(batch_size=0), dict(ema_decay=1.5), dict(mixed_precision="fp32"), dict(learning_rate=float("nan")), dict(keep_checkpoints=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))): TrainConfig(**wrong).validate()


def test_config_round_trips_through_json_and_the_parameters_cell():
    given = TrainConfig(out_dir='a "b"', learning_rate=1e-3, cpu=True, adam_epsilon=1e-12)
    assert TrainConfig.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    cell = given.parameters_cell({"n_slots": (4, "slots per image")})
    assert check_parameters_cell(cell) == []
    namespace = {}
    exec(cell, namespace)
    assert TrainConfig.pick(namespace) == given and namespace["n_slots"] == 4
    assert parse_parameters(cell)["n_slots"] == ("n_slots", "int", 4, "slots per image")
    assert all(f"`{name}`" in TrainConfig.help_table() for name in TrainConfig.names())
    assert check_parameters_cell(cell.replace("seed: int", "seeds: int")) == ["seed is missing"]


def test_out_dir_starts_at_the_project_root(tmp_path, monkeypatch):
    monkeypatch.delenv("IN_TEST", raising=False)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert resolve_out_dir("out") == tmp_path / "a" / "b" / "out"
    (tmp_path / "settings.ini").touch()
    assert resolve_out_dir("out") == tmp_path / "out"
    monkeypatch.setenv("IN_TEST", "1")
    assert resolve_out_dir("out") == resolve_out_dir("out") and tmp_path not in resolve_out_dir("out").parents
    assert resolve_out_dir(tmp_path / "x") == tmp_path / "x"


# exactness --------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, accumulation", [(4, 2), (2, 4)])
def test_accumulation_is_the_large_batch(tmp_path, batch_size, accumulation):
    _, large = train(tmp_path / "large", batch_size=8, quiet=True)
    _, small = train(tmp_path / "small", batch_size=batch_size, grad_accumulation=accumulation, quiet=True)
    for a, b in zip(rows(large), rows(small), strict=True): assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for file, tensors in final_weights(large).items():
        for name, tensor in tensors.items(): torch.testing.assert_close(final_weights(small)[file][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop_at, options", [
    (7, {}),                                                                     # in the middle of an epoch: 22 pictures, batches of 4
    (5, {"grad_accumulation": 2, "log_every": 3}),                               # and of a logging window
    (8, {"num_workers": 2, "grad_accumulation": 2, "log_every": 5}),
    (6, {"eval_every": 4, "save_every": 5}),
], ids=["middle of an epoch", "accumulation", "workers", "evaluation"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, stop_at, options):
    def draw(model, step): return {"score": torch.randn(1).item()}
    _, whole = train(tmp_path / "whole", evaluate=draw, **{**options, "num_workers": 0})
    torch.manual_seed(0)
    cut = Slower()
    cut.at = stop_at * options.get("grad_accumulation", 1)
    with pytest.raises(SystemExit) as stop: train(tmp_path / "cut", model=cut, evaluate=draw, **options)
    assert stop.value.code == 0 and list_checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == f"step-{stop_at:08d}"
    torch.manual_seed(99)                                                        # the new process starts with other dice and other weights
    _, resumed = train(tmp_path / "cut", model=Slower(), evaluate=draw, **{**options, "resume": "auto"})
    assert_same_run(whole, resumed)
    assert rows(whole, "eval") == rows(resumed, "eval")


def test_crash_after_the_last_checkpoint_leaves_no_double_lines(tmp_path):
    class Crash(Denoiser):
        def forward(self, batch):
            if self.calls == 9: raise RuntimeError("power cut")
            return super().forward(batch)
    _, whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="power cut"): train(tmp_path / "cut", model=Crash(), save_every=4)
    assert rows(Run(tmp_path / "cut"))[-1]["step"] == 9
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    record["model"]["_class_name"] = "Denoiser"
    (tmp_path / "cut" / "config.json").write_text(json.dumps(record))
    _, resumed = train(tmp_path / "cut", resume="auto")
    assert_same_run(whole, resumed)


def test_longer_run_goes_on_and_finished_run_returns_at_once(tmp_path, capsys):
    _, whole = train(tmp_path / "whole", max_steps=12, lr_schedule="constant")
    train(tmp_path / "short", max_steps=7, lr_schedule="constant", log_every=3)
    model = Denoiser()
    _, again = train(tmp_path / "short", model=model, max_steps=7, lr_schedule="constant", log_every=3, resume="auto")
    assert model.calls == 0 and "already" in capsys.readouterr().out
    assert [row["step"] for row in again.metrics("train")] == [3, 6, 7]
    _, longer = train(tmp_path / "short", max_steps=12, lr_schedule="constant", resume="auto", log_every=3)
    assert [row["step"] for row in longer.metrics("train")] == [3, 6, 7, 9, 12]
    for name, tensor in final_weights(whole)["ema"].items(): assert torch.equal(tensor, final_weights(longer)["ema"][name])


def test_resume_with_another_batch_goes_on_where_the_images_left_off(tmp_path):
    train(tmp_path / "run", max_steps=5, batch_size=4)
    read = []
    class Spy(Pictures):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)
    train(tmp_path / "run", data=Spy(), max_steps=6, batch_size=2, resume="auto")
    order = torch.cat([stream.epoch_order(22, 0, epoch) for epoch in range(2)]).tolist()
    assert read[-2:] == order[20:22]


def test_evaluation_does_not_change_training(tmp_path):
    def noisy(model, step):
        assert not model.training and not torch.is_grad_enabled()
        torch.randn(3); model({"image": torch.randn(2, 3, 4, 4)})
        return {"fg_ari": step / 10}
    _, alone = train(tmp_path / "alone")
    _, watched = train(tmp_path / "watched", evaluate=noisy, eval_every=5)
    assert_same_run(alone, watched)
    assert watched.curve("eval/fg_ari") == ([5, 10, 12], [0.5, 1.0, 1.2])


def test_evaluation_sees_the_averaged_weights(tmp_path):
    seen = {}
    def look(model, step): seen[step] = model.head.weight.clone()
    trainer, run = train(tmp_path / "run", evaluate=look, eval_every=1, save_every=1, keep_checkpoints=12)
    average = load_file(run.checkpoints / "step-00000001" / "ema.safetensors")["head.weight"]
    for step in range(2, 13):
        decay = min(0.9, step / (9 + step))                                      # diffusers: (1 + s) / (10 + s) with s = step − 1
        now = load_file(run.checkpoints / f"step-{step:08d}" / "model.safetensors")["head.weight"]
        average = average * decay + now * (1 - decay)
        torch.testing.assert_close(seen[step], average, rtol=0, atol=1e-6)
    torch.testing.assert_close(load_file(run.path / "model" / "model.safetensors")["head.weight"], seen[12], rtol=0, atol=0)
    assert torch.equal(trainer.model.head.weight, now)                           # the trained module itself keeps the last step


# what is written down ---------------------------------------------------------------------------------------------------------------------------------------

def test_metrics_name_everything(tmp_path, capsys):
    class Thumbnail:
        def save(self, path): Path(path).write_bytes(b"png")
    class Talkative(Denoiser):
        def diagnostics(self, batch): return {"slot_entropy": torch.rand(()), "images": len(batch["image"])}
    _, run = train(tmp_path / "run", model=Talkative(), evaluate=lambda model, step: {"fg_ari": 0.25, "overlay": Thumbnail()}, log_every=4, encoder_lr_scale=0.1)
    line = run.metrics("train")[-1]
    assert {"step", "loss", "half", "grad_norm", "lr/encoder", "lr/head", "images_per_second", "seconds", "diagnostics/slot_entropy", "diagnostics/images"} == line.keys()
    assert line["half"] == pytest.approx(line["loss"] / 2) and line["lr/encoder"] == pytest.approx(0.05 * line["lr/head"])
    assert (run.pictures / "overlay-00000012.png").read_bytes() == b"png"
    said = capsys.readouterr().out
    assert "step 12/12 · loss" in said and "FG-ARI 0.25" in said and "run directory:" in said
    record = load_run(run.path).config
    assert record["train"]["encoder_lr_scale"] == 0.1 and record["model"]["_class_name"] == "Talkative" and record["versions"]["torch"] == torch.__version__
    assert "Talkative" in run._repr_markdown_()
    with pytest.raises(KeyError, match="there are.*grad_norm"): run.curve("los")


def test_config_is_written_before_the_first_step(tmp_path):
    class Look(Denoiser):
        def forward(self, batch):
            assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "toy"
            return super().forward(batch)
    train(tmp_path / "run", model=Look(), max_steps=2)


def test_tensorboard(tmp_path):
    train(tmp_path / "run", trackers="tensorboard", max_steps=3)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "toy")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_weights_of_a_step_load_into_a_fresh_model(tmp_path):
    _, run = train(tmp_path / "run", save_every=4, keep_checkpoints=9)
    for step in (4, 12):
        model = run.load_weights(Denoiser(), step)
        assert torch.equal(model.head.weight, load_file(run.checkpoint(step) / "ema.safetensors")["head.weight"])
    with pytest.raises(FileNotFoundError, match="there are: step-00000004"): run.load_weights(Denoiser(), 5)


def test_run_gives_the_averaged_method(tmp_path):
    from decomp_nb.data.catalog import open_dataset
    from decomp_nb.methods.lsd import LSD, lsd_preset
    torch.manual_seed(0)
    model = LSD(**lsd_preset("tiny"))
    _, run = train(tmp_path / "run", data=open_dataset("shapes", size=16, n=8), model=model, max_steps=2, save_every=1)
    loaded = load_run(tmp_path / "run").model()
    assert type(loaded) is LSD and "diagnostics/slot_entropy" in run.metrics()[-1]
    for step in (1, 2):
        average = load_file(run.checkpoint(step) / "ema.safetensors")
        for name, weight in run.model(step).named_parameters(): assert torch.equal(weight, average[name]), name
    for name, weight in loaded.named_parameters(): assert torch.equal(weight, average[name]), name


# checkpoints ------------------------------------------------------------------------------------------------------------------------------------------------

def names(run_dir): return [path.name for path in list_checkpoints(run_dir / "checkpoints")]


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(tmp_path / "run", save_every=3, keep_checkpoints=2)
    assert names(tmp_path / "run") == ["step-00000009", "step-00000012"]
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing file", "unfinished"])
def test_damaged_checkpoint_is_passed_over_or_refused(tmp_path, damage):
    _, run = train(tmp_path / "run", save_every=6)
    newest = run.checkpoints / "step-00000012"
    victim = newest / ("complete.json" if damage == "unfinished" else "state.pt")
    content = victim.read_bytes()
    if damage == "truncated": victim.write_bytes(content[:-10])
    elif damage == "altered": victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    else: victim.unlink()
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="step-00000012 (has|lacks).*Whole checkpoints there: step-00000006"):
        train(tmp_path / "run", resume="step-00000012")
    assert kept == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}, "a refusal changes nothing"
    with pytest.warns(UserWarning, match="step-00000012.*passing over"): _, resumed = train(tmp_path / "run", resume="auto", save_every=6)
    _, whole = train(tmp_path / "whole")
    assert_same_run(whole, resumed)
    assert verify_manifest(newest) == ""


def test_going_back_to_an_older_checkpoint_replaces_the_newer_ones(tmp_path):
    _, run = train(tmp_path / "run", save_every=4, keep_checkpoints=3)
    assert names(run.path) == ["step-00000004", "step-00000008", "step-00000012"]
    train(tmp_path / "run", save_every=2, max_steps=6, resume="step-00000004", keep_checkpoints=1)
    assert names(run.path) == ["step-00000006"] and rows(run)[-1]["step"] == 6


def test_going_back_replaces_newer_checkpoints_from_the_first_one_on(tmp_path):
    class Mended(Denoiser):
        "Code has changed, which is why somebody goes back"
        def forward(self, batch):
            if self.calls == 5: raise RuntimeError("power cut")
            return super().forward({"image": batch["image"] / 2})
    _, run = train(tmp_path / "run", save_every=4, keep_checkpoints=3)
    other = load_file(run.checkpoints / "step-00000008" / "model.safetensors")
    record = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(record | {"model": record["model"] | {"_class_name": "Mended"}}))
    with pytest.raises(RuntimeError, match="power cut"):
        train(run.path, model=Mended(), save_every=4, keep_checkpoints=3, resume="step-00000004")
    assert names(run.path) == ["step-00000004", "step-00000008"], "step 12 came from the code that was given up"
    again = load_file(run.checkpoints / "step-00000008" / "model.safetensors")
    assert not torch.equal(other["head.weight"], again["head.weight"])


def test_killed_between_the_last_checkpoint_and_the_model(tmp_path, monkeypatch):
    _, whole = train(tmp_path / "whole", save_every=4)
    honest = trainer.export_model
    def killed(engine, path, step):
        if step == 12: raise KeyboardInterrupt
        honest(engine, path, step)
    monkeypatch.setattr(trainer, "export_model", killed)
    with pytest.raises(KeyboardInterrupt): train(tmp_path / "cut", save_every=4)
    monkeypatch.undo()
    stale = load_file(tmp_path / "cut" / "model" / "model.safetensors")
    _, cut = train(tmp_path / "cut", save_every=4, resume="auto")
    wanted, found = (load_file(run.path / "model" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not torch.equal(stale["head.weight"], found["head.weight"])
    before = {path: path.stat().st_mtime_ns for path in cut.path.rglob("*.safetensors")}
    train(tmp_path / "cut", save_every=4, resume="auto")
    assert before == {path: path.stat().st_mtime_ns for path in cut.path.rglob("*.safetensors")}, "a finished run is left alone"


def test_half_written_checkpoint_disappears(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / ".tmp-step-00000003").mkdir(parents=True)
    (run_dir / "checkpoints" / ".tmp-step-00000003" / "model.safetensors").write_bytes(b"half")
    train(run_dir, resume="auto", max_steps=3)
    assert names(run_dir) == ["step-00000003"] and not list(run_dir.rglob(".tmp-*"))


def test_full_disk_while_saving(tmp_path, monkeypatch):
    run_dir, honest = tmp_path / "run", checkpoint.save_weights
    def full(tensors, path):
        if "step-00000008" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(tensors, path)
    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(OSError, match="step-00000008.*No space left.*intact") as error: train(run_dir, save_every=4)
    assert error.value.errno == errno.ENOSPC
    assert names(run_dir) == ["step-00000004"] and not list(run_dir.rglob(".tmp-*")) and (run_dir / "model" / "model.safetensors").exists()
    monkeypatch.undo()
    _, resumed = train(run_dir, resume="auto", save_every=4)
    assert_same_run(train(tmp_path / "whole")[1], resumed)


def test_full_disk_while_writing_model(tmp_path, monkeypatch):
    honest, calls = checkpoint.write_text, []
    def full(path, text):
        if path.parent.name == ".tmp-model":
            calls.append(path)
            if len(calls) == 2: raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, text)
    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(OSError, match="could not save model"): train(tmp_path / "run", save_every=4)
    assert verify_manifest(tmp_path / "run" / "checkpoints" / "step-00000008") == "" and not list((tmp_path / "run").glob(".tmp-*"))
    load_file(tmp_path / "run" / "model" / "model.safetensors")


def test_state_holds_nothing_that_needs_unpickling(tmp_path):
    _, run = train(tmp_path / "run", max_steps=2)
    state = torch.load(run.checkpoints / "step-00000002" / "state.pt", weights_only=True)
    assert state["step"] == 2 and state["seen"] == 8 and len(state["ranks"]) == 1


def test_frozen_parameters_are_not_saved_but_watched(tmp_path):
    class Frozen(Denoiser):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.foundation = nn.Linear(3, 3).requires_grad_(False)
    _, run = train(tmp_path / "run", model=Frozen(1), max_steps=2)
    assert not any("foundation" in name for name in final_weights(run)["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path / "run", model=Frozen(1), max_steps=3, resume="auto")
    with pytest.warns(UserWarning, match="frozen parameters differ.*foundation.weight"): train(tmp_path / "run", model=Frozen(2), max_steps=4, resume="auto")


# stopping ---------------------------------------------------------------------------------------------------------------------------------------------------

def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    class Broken(Denoiser):
        def forward(self, batch):
            output = super().forward(batch)
            return {**output, "loss": output["loss"] * (float("nan") if self.calls == 7 else 1)}
    with pytest.raises(FloatingPointError, match=r"step 7 \(learning rate: encoder.*head.*step-00000006"):
        train(tmp_path / "run", model=Broken(), save_every=3, log_every=4)
    assert names(tmp_path / "run") == ["step-00000003", "step-00000006"] and not verify_manifest(tmp_path / "run" / "checkpoints" / "step-00000006")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_infinite_gradient_stops_the_run(tmp_path):
    class Steep(Denoiser):
        def forward(self, batch):
            output = super().forward(batch)
            return {"loss": output["loss"] + (torch.sqrt(self.head.weight.sum() * 0) if self.calls == 5 else 0)}
    with pytest.raises(FloatingPointError, match="step 5"): train(tmp_path / "run", model=Steep(), save_every=2)
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]


def test_minutes_end_the_run(tmp_path, capsys):
    _, run = train(tmp_path / "run", max_steps=10**6, max_minutes=0.005, evaluate=lambda model, step: {"fg_ari": 1.0}, lr_schedule="constant", log_every=10)
    done = run.metrics("train")[-1]["step"]
    assert 1 <= done < 10**6 and run.metrics("eval")[-1]["step"] == done and names(run.path) == [f"step-{done:08d}"]
    assert "trained for 0.005 minutes" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [dict(name="SIGTERM"), dict(name="SIGUSR1", everyone=True)], ids=["SIGTERM", "SIGUSR1 to the whole group"])
def test_signal_saves_and_exits_with_zero(tmp_path, stop, processes):
    "In a process of its own, with loader workers that receive the signal too"
    options = dict(out_dir=str(tmp_path / "cut"), num_workers=2 if stop.get("everyone") else 0)
    said = processes({**options, "stop": {"at": 5, **stop}})
    assert "stopped by a signal at step 5" in said and "after fit" not in said
    assert names(tmp_path / "cut") == ["step-00000005"]
    torch.manual_seed(5)
    _, resumed = train(tmp_path / "cut", model=Slower(), resume="auto")
    assert_same_run(train(tmp_path / "whole", model=None)[1], resumed)


def test_interrupt_saves_and_interrupts(tmp_path):
    torch.manual_seed(0)
    model = Slower()
    model.at, model.name = 5, "SIGINT"
    with pytest.raises(KeyboardInterrupt): train(tmp_path / "run", model=model)
    assert names(tmp_path / "run") == ["step-00000005"]


def test_signal_in_a_notebook_counts_as_success(tmp_path):
    import nbformat
    import papermill
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom training_toys import Slower, train",
        f"model = Slower(); model.at = 3\ntrain({str(tmp_path / 'run')!r}, model=model)",
        "raise AssertionError('this cell must not run')")]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    with warm_kernel.warm(): papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    assert names(tmp_path / "run") == ["step-00000003"]


# refusals ---------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, error, match", [
    (dict(data=Pictures(0)), ValueError, "data set is empty"),
    (dict(data=Pictures(3)), ValueError, "batch_size: 4 .* more than the 3 images"),
    (dict(data=iter([])), TypeError, "needs len"),
    (dict(trackers="tensorbord"), ValueError, "trackers: 'tensorbord'"),
    (dict(mixed_precision="fp16"), ValueError, "mixed_precision: fp16 needs a GPU"),
    (dict(gradient_checkpointing=True), ValueError, "gradient_checkpointing: Denoiser"),
    (dict(model=nn.Linear(3, 3).requires_grad_(False)), ValueError, "no trainable parameter"),
    (dict(model=nn.Linear(3, 3), encoder_lr_scale=0.5), ValueError, "encoder_lr_scale: Linear"),
    (dict(resume="step-1"), FileNotFoundError, "resume: no checkpoint"),
    (dict(max_steps=0), ValueError, "max_steps"),
], ids=lambda value: str(value)[:30] if isinstance(value, str) else "")
def test_refused_before_anything_is_written(tmp_path, wrong, error, match):
    with pytest.raises(error, match=match): train(tmp_path / "run", **wrong)
    assert not (tmp_path / "run" / "config.json").exists() and not list((tmp_path / "run").glob("**/metrics.jsonl"))


def test_forward_without_loss_is_refused(tmp_path):
    class Wrong(Denoiser):
        def forward(self, batch): return {"mse": super().forward(batch)["loss"]}
    with pytest.raises(TypeError, match="Wrong.forward.*'loss'"): train(tmp_path / "run", model=Wrong())


def test_group_that_forgets_a_parameter_is_refused(tmp_path):
    class Forgetful(Denoiser):
        def parameter_groups(self): return super().parameter_groups()[:1]
    with pytest.raises(ValueError, match="leaves out.*head.weight"): train(tmp_path / "run", model=Forgetful())


def test_unwritable_out_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="out_dir: cannot write"): train(tmp_path / "file" / "run")


def test_several_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(RuntimeError, match="2 processes were started, but accelerate sees 1.*ACCELERATE_USE_CPU"): train(tmp_path / "run", cpu=False)


@pytest.mark.parametrize("change", ["class", "config", "shape", "never"])
def test_run_of_another_model_is_refused_and_left_alone(tmp_path, change):
    class Sized(Denoiser):
        def __init__(self, width=6, note="a"):
            super().__init__(width)
            self.config = {"slots": {"width": width}, "note": note, "_private": object}
    _, run = train(tmp_path / "run", model=Sized() if change == "config" else None, max_steps=3)
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    model, match = {"class": (nn.Linear(48, 48), "model._class_name: 'Denoiser' in the run, 'Linear' now"), "config": (Sized(8), "model.slots.width: 6 in the run, 8 now"),
                    "shape": (Denoiser(8), r"encoder.weight is \(6, 48\) in step-00000003 and \(8, 48\) in the model"), "never": (None, "already holds a run: set resume='auto'")}[change]
    with pytest.raises((ValueError, FileExistsError), match=match): train(tmp_path / "run", model=model, resume="never" if change == "never" else "auto", max_steps=5)
    assert kept == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_going_on_from_another_run(tmp_path):
    _, first = train(tmp_path / "first", max_steps=6)
    _, second = train(tmp_path / "second", max_steps=12, resume=str(first.checkpoints / "step-00000006"))
    assert [row["step"] for row in second.metrics()] == list(range(7, 13))
    with pytest.raises(FileExistsError, match="belongs to another"): train(tmp_path / "second", resume=str(first.path))


# speed levers -----------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lever", [dict(mixed_precision="bf16"), dict(channels_last=True), dict(fused_adamw=False), dict(allow_tf32=False), dict(ema_decay=0.0), dict(max_grad_norm=0.0),
                                   dict(ema_warmup=True)], ids=lambda lever: next(iter(lever)))
def test_lever_trains_saves_and_resumes(tmp_path, lever):
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
        def forward(self, batch):
            self.strides, self.dtype = batch["image"].stride(), self.conv(batch["image"]).dtype
            return {"loss": (self.conv(batch["image"]).float() - batch["image"]).square().mean()}
    model = Conv()
    _, run = train(tmp_path / "run", model=model, max_steps=6, **lever)
    losses = run.curve("loss")[1]
    assert losses[-1] < losses[0]
    assert model.dtype == (torch.bfloat16 if "mixed_precision" in lever else torch.float32)
    assert (model.strides[1] == 1) == ("channels_last" in lever)
    assert "forward" not in model.__dict__ and model({"image": torch.randn(1, 3, 4, 4)})["loss"].dtype == torch.float32
    train(tmp_path / "run", model=Conv(), max_steps=8, resume="auto", **lever)
    assert (run.path / "model" / "model.safetensors").exists()


# two processes ----------------------------------------------------------------------------------------------------------------------------------------------

def test_two_processes_are_one_with_the_double_batch(tmp_path, processes):
    _, one = train(tmp_path / "one", batch_size=8, quiet=True)
    processes({"out_dir": str(tmp_path / "two"), "batch_size": 4, "quiet": True}, count=2)
    two = load_run(tmp_path / "two")
    assert two.config["hardware"]["processes"] == 2
    for a, b in zip(rows(one), rows(two), strict=True): assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for name, tensor in final_weights(one)["ema"].items(): torch.testing.assert_close(final_weights(two)["ema"][name], tensor, rtol=0, atol=1e-6)


def test_two_processes_stop_together_and_resume_exactly(tmp_path, processes):
    "A signal to one of them is enough; accumulation and dice of their own included"
    options = dict(batch_size=2, grad_accumulation=2, log_every=3)
    processes({"out_dir": str(tmp_path / "whole"), **options}, count=2)
    cut = {"out_dir": str(tmp_path / "cut"), **options}
    processes({**cut, "stop": {"at": 10, "name": "SIGTERM"}}, {**cut, "resume": "auto"}, count=2)
    assert_same_run(load_run(tmp_path / "whole"), load_run(tmp_path / "cut"))
    state = torch.load(tmp_path / "cut" / "checkpoints" / "step-00000012" / "state.pt", weights_only=True)
    assert len(state["ranks"]) == 2 and not torch.equal(state["ranks"][0]["random"]["torch"], state["ranks"][1]["random"]["torch"])


def test_main_process_decides_for_all(tmp_path, processes):
    "Precision, planned end and the moment when everything is written, in two processes whose machines and clocks disagree; limit: 60 imagined seconds"
    said = processes({"out_dir": str(tmp_path / "run"), "odd_ranks": True, "mixed_precision": "auto", "max_steps": 2000, "max_minutes": 1.0, "log_every": 5000}, count=2)
    first, second = ((processes.logs / f"log-{rank}").read_text().partition("after fit: ")[2] for rank in (0, 1))
    assert first == second and first.startswith("1 lines of metrics, bf16, Plan(total=2000, end=")
    run = load_run(tmp_path / "run")
    assert 50 < rows(run)[-1]["step"] < 1000 and run.curve("lr/head")[1][-1] < 0.01 * 0.01
    assert "bfloat16: a trial step took 1000.0 ms in bfloat16" in said and "the learning rate falls to its end there" in said
