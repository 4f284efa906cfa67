"""A run that its time limit cuts short ends with its learning rate at the end; one that it does not cut is left alone. All clocks are imagined."""
import json
from types import SimpleNamespace

import pytest
import torch
from test_trainer import assert_same_run, rows
from training_toys import Slower, train

from decomp_nb.training import reporting
from decomp_nb.training import trainer as trainer_module
from decomp_nb.training.checkpoint import list_checkpoints
from decomp_nb.training.files import write_manifest
from decomp_nb.training.forecast import Plan
from decomp_nb.training.run_directory import Run


@pytest.fixture
def clock(monkeypatch):
    "Every training step takes `clock.per_step` seconds of an imagined time, and nothing else takes any"
    clock = SimpleNamespace(seconds=0.0, per_step=0.4)
    monkeypatch.setattr(reporting.Stopwatch, "now", staticmethod(lambda: clock.seconds))
    honest = trainer_module.Loop.train_step
    def timed(self, batches):
        honest(self, batches)
        clock.seconds += clock.per_step
    monkeypatch.setattr(trainer_module.Loop, "train_step", timed)
    return clock


LIMIT = dict(max_steps=400, max_minutes=1.0, warmup_steps=10, log_every=5)  # with 0.4 s a step there is time for 150


def rates(run):
    "Learning rate of the head at every line of metrics; its peak is 0.01"
    return run.curve("lr/head")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_ends_where_the_time_ends(tmp_path, clock, capsys, schedule):
    _, run = train(tmp_path / "run", **LIMIT, lr_schedule=schedule)
    steps, lr = rates(run)
    assert 147 <= steps[-1] <= 150 and clock.seconds <= 60
    assert lr[-1] < (0.01 * 0.01 if schedule == "linear" else 0.01 * 1e-3)
    falling = lr[steps.index(15):]                                  # the line of step 10 shows the last step of the warm-up
    assert all(a > b for a, b in zip(falling, falling[1:]))
    said = capsys.readouterr().out
    assert "400 steps of 4 pictures, at most 60 seconds; float32: as asked" in said
    assert "0.4 s a step: about 150 of 400 steps in 60 seconds; the learning rate falls to its end there" in said
    assert f"trained for 1 minutes, {steps[-1]} steps" in said
    _, whole = train(tmp_path / "whole", **{**LIMIT, "max_steps": 15}, lr_schedule=schedule)
    assert rates(run)[1][:2] == rates(whole)[1][:2], "the warm-up is that of a run with time enough"


def test_evaluations_count_and_a_machine_may_slow_down(tmp_path, clock):
    def evaluate(model, step): clock.seconds += 3.0
    def busy(model, step):
        evaluate(model, step)
        clock.per_step = 0.8
    for name, hook in (("steady", evaluate), ("busy", busy)):
        clock.seconds, clock.per_step = 0.0, 0.4
        _, run = train(tmp_path / name, **LIMIT, evaluate=hook, eval_every=40)
        steps, lr = rates(run)
        assert clock.seconds - 3.0 <= 60 + clock.per_step, "the last evaluation comes after the time limit, as it always did"
        assert clock.seconds > 57 and lr[-1] < 0.01 * 0.01, name
    assert steps[-1] < 100


def test_run_with_time_enough_is_untouched(tmp_path, clock):
    _, free = train(tmp_path / "free", max_steps=60, warmup_steps=5)
    _, limited = train(tmp_path / "limited", max_steps=60, warmup_steps=5, max_minutes=0.5)      # 24 of 30 seconds
    assert_same_run(free, limited)
    torch.manual_seed(0)
    cut = Slower()
    cut.at = 33
    with pytest.raises(SystemExit): train(tmp_path / "cut", model=cut, max_steps=60, warmup_steps=5, max_minutes=0.5)
    _, resumed = train(tmp_path / "cut", model=Slower(), max_steps=60, warmup_steps=5, max_minutes=0.5, resume="auto")
    assert_same_run(free, resumed)


def test_resumed_run_goes_on_with_its_plan(tmp_path, clock):
    torch.manual_seed(0)
    cut = Slower()
    cut.at = 80
    with pytest.raises(SystemExit): train(tmp_path / "run", model=cut, **LIMIT)
    plan = torch.load(tmp_path / "run" / "checkpoints" / "step-00000080" / "state.pt", weights_only=True)["plan"]
    assert plan["total"] == 400 and 147 <= plan["end"] <= 150 and plan["limit"] == 60
    clock.seconds = 1000.0                                          # another day
    _, run = train(tmp_path / "run", model=Slower(), **LIMIT, resume="auto")
    steps, lr = rates(run)
    assert 147 <= steps[-1] <= 150 and lr[-1] < 0.01 * 1e-3
    _, whole = train(tmp_path / "whole", model=None, **LIMIT)
    assert lr == pytest.approx(rates(whole)[1], abs=0.01 * 0.02), "up to the rounding of one step"
    _, again = train(tmp_path / "run", model=Slower(), **LIMIT, resume="auto")
    assert rates(again) == (steps, lr), "a finished run stays finished"
    _, longer = train(tmp_path / "run", model=Slower(), **{**LIMIT, "max_minutes": 10.0}, resume="auto")
    free = train(tmp_path / "free", **{**LIMIT, "max_minutes": 0.0})[1]
    assert rates(longer)[1][-40:] == rates(free)[1][-40:], "with time enough the schedule is that of 400 steps again"


def test_warmup_fits_into_a_very_short_run(tmp_path, clock, capsys):
    clock.per_step = 5.0                                             # time for twelve steps
    _, run = train(tmp_path / "run", **{**LIMIT, "warmup_steps": 50, "log_every": 1})
    steps, lr = rates(run)
    assert steps[-1] == 12 and max(lr) > 0.005 and lr.index(max(lr)) in range(5, 9) and lr[-1] < 0.3 * max(lr)
    _, run = train(tmp_path / "three", max_steps=3, warmup_steps=50)
    assert rates(run)[1] == pytest.approx([0.0 if step < 1 else 0.01 * (1 - (step - 1) / 2) ** 1 for step in range(3)])
    assert "warm-up: 1 of 3 steps (warmup_steps is 50)" in capsys.readouterr().out


def test_constant_rate_stays_constant(tmp_path, clock, capsys):
    _, run = train(tmp_path / "run", **LIMIT, lr_schedule="constant")
    steps, lr = rates(run)
    assert set(lr[2:]) == {0.01} and 147 <= steps[-1] <= 150
    assert "about 150 of 400 steps in 60 seconds\n" in capsys.readouterr().out


def test_run_directory_from_before_there_were_plans(tmp_path):
    "No `plan` in its checkpoint, no `precision` in its config.json"
    _, whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    cut = Slower()
    cut.at = 7
    with pytest.raises(SystemExit): train(tmp_path / "cut", model=cut)
    run = Run(tmp_path / "cut")
    folder, = list_checkpoints(run.checkpoints)
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["plan"]
    torch.save(state, folder / "state.pt")
    (folder / "complete.json").unlink()
    write_manifest(folder)
    record = run.config
    del record["precision"]
    (run.path / "config.json").write_text(json.dumps(record))
    _, resumed = train(tmp_path / "cut", model=Slower(), resume="auto", mixed_precision="auto")
    assert resumed.latest["precision"]["chosen"] == "no" and resumed.latest["precision"]["why"] == "as this run began"
    assert rows(whole, "train") == rows(resumed, "train")


def test_plan_of_every_end_stays_on_the_schedule():
    "Whatever the estimates say, positions rise, jump nowhere, and reach the end"
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        plan, last, step = Plan.whole(1000, warmup=20), 0.0, 0
        target = int(torch.randint(200, 900, (1,), generator=generator))
        while step < plan.end and step < target + 5:
            if step % 10 == 0 and step >= target // 10:
                plan = plan.revised(step, target + int(torch.randint(-5, 6, (1,), generator=generator)))
            position = plan.position_at(step)
            assert last <= position <= 1000 and position - last < 2.5 * 1000 / max(target - target // 10, 1) + 2, (trial, step)
            last, step = position, step + 1
        assert plan.position_at(plan.end) == 1000 and 1000 - last < 0.05 * 1000
