"""mixed_precision "auto": asked, chosen, recorded, kept; both answers on any machine."""
import dataclasses
import json
import time

import pytest
import torch
import yaml
from test_trainer import assert_same_run
from torch import nn
from training_toys import Slower, train

from decomp_nb.training import precision
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.precision import _fine_clock, machine_name, native_bf16, settle_precision, compare_steps


class Conv(nn.Module):
    "Notes in which numbers it computes"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, batch):
        painted = self.conv(batch["image"])
        self.dtype = painted.dtype
        return {"loss": (painted.float() - batch["image"]).square().mean()}


@pytest.fixture
def machine(monkeypatch):
    "`machine(seconds, native, name)`: what the processor says of itself from now on"
    def pretend(seconds=(0.002, 0.001), native=True, name="a processor"):
        monkeypatch.setattr(precision, "trial_seconds", lambda: seconds)
        monkeypatch.setattr(precision, "native_bf16", lambda kind: native)
        monkeypatch.setattr(precision, "machine_name", lambda kind: name)
    return pretend


def test_word_that_yaml_takes_for_a_truth_value():
    for text, meant in (("no", "no"), ("off", "no"), ('"no"', "no"), ("auto", "auto"), ("bf16", "bf16")):
        assert TrainConfig.from_dict(yaml.safe_load(f"mixed_precision: {text}")).mixed_precision == meant
    for text in ("yes", "true", "on"):
        with pytest.raises(TypeError, match='mixed_precision: YAML reads yes.*"auto", "no", "fp16", "bf16", with the quotes'):
            TrainConfig.from_dict(yaml.safe_load(f"mixed_precision: {text}"))
    with pytest.raises(ValueError, match="mixed_precision: 'atuo'.*did you mean 'auto'"): TrainConfig(mixed_precision="atuo").validate()
    with pytest.raises(TypeError, match="lr_schedule: expected str, got bool"): TrainConfig(lr_schedule=False)


@pytest.mark.parametrize("facts, chosen, dtype, words", [
    (dict(), "bf16", torch.bfloat16, "bfloat16: a trial step took 1.0 ms in bfloat16, 2.0 ms in float32"),
    (dict(seconds=(0.003, 0.090)), "no", torch.float32, "float32: a trial step took 90.0 ms in bfloat16, 3.0 ms in float32"),
    (dict(seconds=(0.0011, 0.001)), "no", torch.float32, "float32: a trial step took 1.0 ms in bfloat16, 1.1 ms in float32"),
    (dict(native=False), "no", torch.float32, "float32: this processor has no instructions for bfloat16"),
], ids=["faster", "emulated", "not clearly faster", "no instructions"])
def test_auto_follows_the_machine_and_says_so(tmp_path, machine, capsys, facts, chosen, dtype, words):
    machine(**facts)
    model = Conv()
    _, run = train(tmp_path / "run", model=model, mixed_precision="auto", max_steps=2)
    assert model.dtype == dtype and f"2 steps of 4 pictures; {words}\n" in capsys.readouterr().out
    record = run.config
    assert record["train"]["mixed_precision"] == "auto", "what was asked for stays on record"
    assert record["precision"] == {"asked": "auto", "chosen": chosen, "why": words.partition(": ")[2], "machine": "a processor"}


def test_explicit_wish_is_not_questioned(tmp_path, machine):
    machine(native=False)
    model = Conv()
    _, run = train(tmp_path / "run", model=model, mixed_precision="bf16", max_steps=2)
    assert model.dtype == torch.bfloat16 and run.config["precision"]["why"] == "as asked"


def test_trial_leaves_no_trace(tmp_path, monkeypatch):
    "A true trial before the run; whatever it finds, float32 is chosen: every digit is that of a run without trial"
    monkeypatch.setattr(precision, "native_bf16", lambda kind: True)
    monkeypatch.setattr(precision, "CLEARLY_FASTER", float("inf"))
    precision.trial_seconds.cache_clear()
    threads = torch.get_num_threads()
    _, tried = train(tmp_path / "tried", mixed_precision="auto")
    assert precision.trial_seconds.cache_info().misses == 1 and torch.get_num_threads() == threads
    assert "a trial step took" in tried.config["precision"]["why"] and tried.config["precision"]["chosen"] == "no"
    assert_same_run(tried, train(tmp_path / "plain", mixed_precision="no")[1])


def stopped(folder, **options):
    "A run that was stopped at step 5"
    torch.manual_seed(0)
    model = Slower()
    model.at = 5
    with pytest.raises(SystemExit): train(folder, model=model, **options)


def test_resumed_run_keeps_its_choice(tmp_path, machine):
    machine()
    stopped(tmp_path / "run", mixed_precision="auto")
    machine(seconds=(0.001, 0.001))                                  # today the trial would say otherwise
    _, resumed = train(tmp_path / "run", model=Slower(), mixed_precision="auto", resume="auto")
    assert resumed.latest["precision"]["chosen"] == "bf16" and resumed.latest["precision"]["why"] == "as this run began"
    assert_same_run(train(tmp_path / "whole", model=None, mixed_precision="bf16")[1], resumed)


def test_on_another_machine_it_chooses_again(tmp_path, machine, capsys):
    machine()
    stopped(tmp_path / "run", mixed_precision="auto")
    machine(native=False, name="an older processor")
    _, resumed = train(tmp_path / "run", model=Slower(), mixed_precision="auto", resume="auto")
    assert resumed.latest["precision"]["chosen"] == "no" and resumed.latest["precision"]["machine"] == "an older processor"
    assert "float32: chosen anew, this processor has no instructions for bfloat16 (the run began in bfloat16 on a processor)" in capsys.readouterr().out


def test_gpus_are_asked_for_their_own_instructions(monkeypatch):
    def modern(including_emulation=True): return including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", modern)
    assert native_bf16("cuda") is False, "an emulation does not count"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # an older PyTorch has no such argument
    for capability, native in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert native_bf16("cuda") is native
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert machine_name("cuda") == "a GPU" and settle_precision("auto", "cuda").chosen == "bf16"


def test_record_is_plain_json(tmp_path):
    found = settle_precision("auto", "cpu")
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    with pytest.raises(dataclasses.FrozenInstanceError): found.chosen = "no"


def test_a_busy_machine_does_not_decide():
    "A step that waits for its turn costs no more than one that does not"
    def work(): return sum(range(20_000))
    single, half = compare_steps(lambda: (work(), time.sleep(0.02)), work, budget=0.01, now=_fine_clock())
    waiting = _fine_clock() is time.perf_counter  # no finer clock here
    assert waiting or single < 0.01 and half < 0.01
