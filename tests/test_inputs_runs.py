"A run directory tells the truth: what was trained is recorded once, by one writer, and nothing that was learned is lost."
import errno
import json
import os
import random
import shutil
import signal
from dataclasses import fields

import pytest
import torch
from training_toys import Denoiser, Pictures, Slower, config, train

from decomp_nb.training import lock
from decomp_nb.training.agreement import CHANGEABLE, data_record, run_differences
from decomp_nb.training.checkpoint import list_checkpoints
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.lock import WriterLock
from decomp_nb.training.run_directory import Run, load_run, summary
from decomp_nb.training.trainer import Trainer


class Named(Pictures):
    "Pictures that have file names"

    def __init__(self, n=22, prefix="a"):
        super().__init__(n, shaky=False)
        self.files = [f"{prefix}/{i}.png" for i in range(n)]


def begin(folder, data=None, **options):
    "A short finished training → what its record says"
    train(folder, data=data or Named(), quiet=True, **{"max_steps": 4, **options})
    return (folder / "config.json").read_bytes()


# the record -----------------------------------------------------------------------------------------------------------------------

def test_other_settings_are_refused_and_all_of_them_listed(tmp_path):
    before = begin(tmp_path / "run")
    with pytest.raises(ValueError) as refused:
        train(tmp_path / "run", data=Named(), quiet=True, max_steps=4, resume="auto", seed=5, learning_rate=0.5)
    said = str(refused.value)
    assert "seed: 0 recorded, 5 asked" in said and "learning_rate: 0.01 recorded, 0.5 asked" in said and "another out_dir" in said
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig) if field.name not in CHANGEABLE])
def test_every_setting_either_may_change_or_is_compared(name):
    field = next(field for field in fields(TrainConfig) if field.name == name)
    other = {int: 7, float: 0.123, str: "linear", bool: not field.default}[type(field.default)]
    recorded = {"train": TrainConfig().to_dict()}
    assert len(run_differences(recorded, {"train": TrainConfig(**{name: other}).to_dict()})) == 1


def test_a_training_whose_record_is_gone_is_not_given_a_new_one(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match="run holds a training, but its config.json is gone.*restore it"): train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, seed=9, resume="auto")
    assert not (tmp_path / "run" / "config.json").exists()
    train(tmp_path / "new", data=Named(), quiet=True, max_steps=6, resume=str(tmp_path / "run" / "checkpoints" / "step-00000004"))
    assert Run(tmp_path / "new").last_step("train") == 6


def test_what_may_change_may_change_and_the_record_stays(tmp_path):
    before = begin(tmp_path / "run")
    train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, batch_size=2, grad_accumulation=2, num_workers=0, log_every=2, eval_every=3,
          save_every=5, keep_checkpoints=1, resume="auto", max_minutes=5.0)
    run = Run(tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before and run.last_step("train") == 6
    assert [start["step"] for start in run.starts] == [0, 4]
    assert run.starts[1]["changed"]["max_steps"] == 6 and "seed" not in run.starts[1]["changed"]


@pytest.mark.parametrize("data, what", [
    (Named(23), "22 recorded, 23 now"), (Named(21), "22 recorded, 21 now"), (Named(prefix="b"), "some file names are others"), ("swapped", "number 0, 4"),
])
def test_a_data_set_that_grew_shrank_or_was_swapped_is_noticed(tmp_path, data, what):
    before = begin(tmp_path / "run")
    if data == "swapped":
        data = Named()
        data.x = data.x.flip(0) * 2
    with pytest.raises(ValueError, match=what): train(tmp_path / "run", data=data, quiet=True, max_steps=6, resume="auto")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_the_same_pictures_at_another_place_are_no_other_data(tmp_path):
    def fit(place, **about):
        return Trainer(Denoiser(quiet=True), Named(), config(tmp_path / "run", max_steps=4, resume="auto"), extra_config={"data": place, **about}).fit()
    fit("/here/pictures", options={"crop": True})
    fit("/scratch/job-7/pictures", options={"crop": True})
    with pytest.raises(ValueError, match="data.options.crop: True recorded, False asked"): fit("/here/pictures", options={"crop": False})
    assert Run(tmp_path / "run").config["data"]["data"] == "/here/pictures"


def test_pictures_that_are_random_at_every_reading_go_on(tmp_path):
    class Noise(Pictures):
        def __getitem__(self, i): return {"image": torch.frombuffer(bytearray(os.urandom(48)), dtype=torch.uint8).float().view(3, 4, 4)}
    for steps in (3, 5): train(tmp_path / "run", data=Noise(), quiet=True, max_steps=steps, resume="auto")
    assert data_record(Noise())["sketches"] == {} and len(Run(tmp_path / "run").starts) == 2


def test_a_start_that_left_nothing_behind_binds_nobody(tmp_path):
    class Broken(Denoiser):
        def forward(self, batch): raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"): train(tmp_path / "run", model=Broken(), max_steps=4, resume="auto")
    train(tmp_path / "run", max_steps=4, resume="auto", learning_rate=0.5)
    assert Run(tmp_path / "run").config["train"]["learning_rate"] == 0.5 and len(Run(tmp_path / "run").starts) == 1


def test_other_settings_go_on_in_a_new_folder_that_says_where_it_began(tmp_path):
    begin(tmp_path / "run")
    train(tmp_path / "fork", data=Named(), quiet=True, max_steps=6, learning_rate=0.5, resume=str(tmp_path / "run"))
    record = Run(tmp_path / "fork").config
    assert record["train"]["learning_rate"] == 0.5 and record["begun_from"].endswith("step-00000004")


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    begin(tmp_path / "run")
    record = {key: value for key, value in Run(tmp_path / "run").config.items() if key != "data_set"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    for name in ("starts.jsonl", ".lock", "model/complete.json"): (tmp_path / "run" / name).unlink()
    train(tmp_path / "run", data=Named(30), quiet=True, max_steps=6, resume="auto")
    assert load_run(tmp_path / "run").last_step("train") == 6


# one writer -----------------------------------------------------------------------------------------------------------------------

def child(work):
    "Run `work` in a forked process → its number; it ends with code 0 or 1"
    pid = os.fork()
    if pid == 0:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    return pid


def code_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hold_until_killed(folder):
    "A process that has the lock of a folder and does not end"
    reader, writer = os.pipe()

    def work():
        lock = WriterLock(folder)  # kept: a lock ends with the object that holds its file open
        lock.acquire()
        os.write(writer, b"x")
        signal.pause()
    pid = child(work)
    os.read(reader, 1)
    return pid


def test_the_second_writer_is_refused_with_one_sentence(tmp_path):
    begin(tmp_path / "run")
    first = hold_until_killed(tmp_path / "run")
    try:
        with pytest.raises(BlockingIOError) as refused: train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, resume="auto")
    finally:
        os.kill(first, signal.SIGKILL)
    assert code_of(first) == -signal.SIGKILL
    said = str(refused.value)
    assert f"process {first} on " in said and "out_dir: run is being written" in said and "\n" not in said
    assert Run(tmp_path / "run").last_step("train") == 4
    train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, resume="auto")  # what the killed process left behind holds nobody up
    assert Run(tmp_path / "run").last_step("train") == 6 and (tmp_path / "run" / ".lock").read_text() == ""


def test_two_trainings_of_one_process_are_two_writers(tmp_path):
    def evaluate(model, step):
        with pytest.raises(BlockingIOError, match="is being written by process"): train(tmp_path / "run", max_steps=2, resume="auto")
        return {"score": 1.0}
    train(tmp_path / "run", max_steps=4, evaluate=evaluate)
    assert Run(tmp_path / "run").curve("eval/score") == ([4], [1.0])


@pytest.mark.parametrize("host, process, free", [(None, 2**22 + 1, True), (None, 1, False), ("elsewhere", 2**22 + 1, False)])
def test_a_file_system_without_locks_asks_for_the_process(tmp_path, monkeypatch, host, process, free):
    def no_locks(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    (tmp_path / ".lock").write_text(json.dumps(lock.holder() | {"process": process} | ({"host": host} if host else {})))
    if free: WriterLock(tmp_path).acquire()
    else:
        with pytest.raises(BlockingIOError, match=r"delete \.lock"): WriterLock(tmp_path).acquire()
    lock._HELD.clear()


# nothing is lost ------------------------------------------------------------------------------------------------------------------

def test_a_fault_in_the_last_evaluation_loses_no_step(tmp_path):
    def evaluate(model, step): raise KeyError("masks")
    with pytest.raises(KeyError, match="masks"): train(tmp_path / "run", evaluate=evaluate, max_steps=5, save_every=0)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000005" and (tmp_path / "run" / "model").is_dir()
    _, resumed = train(tmp_path / "run", evaluate=lambda model, step: {"score": 1.0}, max_steps=5, resume="auto")
    assert resumed.curve("eval/score") == ([5], [1.0])


class Sheet:
    "A picture that writes a file, or fails to"

    def __init__(self, fails=False): self.fails = fails

    def save(self, path):
        if self.fails: raise OSError("no font")
        path.write_text("picture")


def test_a_picture_of_any_name_is_saved(tmp_path):
    _, run = train(tmp_path / "run", evaluate=lambda model, step: {"a/b: <c>": Sheet()}, max_steps=2)
    assert [path.name for path in run.pictures.iterdir()] == ["a%2Fb%3A %3Cc%3E-00000002.png"]


def test_scores_are_written_before_a_picture_fails(tmp_path):
    with pytest.raises(OSError, match="no font"): train(tmp_path / "run", evaluate=lambda model, step: {"drawn": Sheet(fails=True), "score": 3.0}, max_steps=2)
    assert Run(tmp_path / "run").curve("eval/score") == ([2], [3.0]) and list_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["train_autoencoder", "train_concepts", "train_decomp_diffusion", "train_disdiff", "train_latent_diffusion", "train_lsd", "train_slate",
                                  "train_slot_attention_ae", "train_slot_diffusion", "train_slot_former", "train_text_to_image"])
def test_a_notebook_writes_its_results_before_it_draws(name):
    from test_runs import ROOT
    cells = [cell for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    fit = next(i for i, cell in enumerate(cells) if cell["id"] == "fit")
    writes = [i for i, source in enumerate(sources) if i > fit and any(word in source for word in ("write_results(", "save_concepts(", ".save_pretrained("))]
    assert writes == [fit + 1]


def test_a_stop_in_the_middle_then_other_settings_then_the_recorded_ones(tmp_path):
    "What people do at night: stop, try another learning rate in the same folder, and go on after all"
    torch.manual_seed(0)
    _, whole = train(tmp_path / "whole", model=Slower(), max_steps=9)
    torch.manual_seed(0)
    cut = Slower()
    cut.at = 5
    with pytest.raises(SystemExit): train(tmp_path / "cut", model=cut, max_steps=9)
    with pytest.raises(ValueError, match="learning_rate"): train(tmp_path / "cut", model=Slower(), max_steps=9, learning_rate=0.3, resume="auto")
    _, resumed = train(tmp_path / "cut", model=Slower(), max_steps=9, resume="auto")
    assert resumed.curve("loss") == whole.curve("loss")


# damaged records ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, remedy", [
    ("config.json", b'{"name": "toy", "tra', "restore it from a copy"), ("config.json", b"\xff\xfe\x00", "restore it from a copy"), ("config.json", b"[]", "restore it from a copy"),
    ("metrics.jsonl", b'{"step": 1, "loss": 2}\n{"st\n{"step": 3, "loss": 1}\n', "line 2 is damaged: delete that line"),
    ("metrics.jsonl", b'{"step": 1}\n\xff\xfe\n{"step": 3}\n', "line 2 is damaged"), ("starts.jsonl", b"nonsense\n{}\n", "line 1 is damaged"),
])
def test_damaged_records_are_named_with_a_remedy(tmp_path, name, content, remedy):
    begin(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError) as refused: train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, resume="auto")
    assert str(tmp_path / "run" / name) in str(refused.value) and remedy in str(refused.value)


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    begin(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file: file.write('{"step": 5, "lo')
    train(tmp_path / "run", data=Named(), quiet=True, max_steps=6, resume="auto")
    assert Run(tmp_path / "run").curve("loss")[0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"files": {}}', b'{"files": {"model.safetensors": 3}}', b'{"files": {"model.safetensors": {"bytes": null}}}'])
def test_a_damaged_list_of_a_checkpoint_is_passed_over(tmp_path, content):
    train(tmp_path / "run", max_steps=4, save_every=2)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "complete.json").write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000004 has .* complete.json"): train(tmp_path / "run", max_steps=4, save_every=2, resume="auto")


def test_a_flipped_bit_in_the_exported_model_is_found(tmp_path):
    run = Run(tmp_path / "run")
    begin(tmp_path / "run")
    file = run.path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model/ has a damaged model.safetensors.*delete model/"): run.model()
    shutil.rmtree(run.path / "model")
    train(tmp_path / "run", data=Named(), quiet=True, max_steps=4, resume="auto")
    assert (run.path / "model" / "complete.json").exists()


def test_mutated_records_are_read_or_named(tmp_path):
    "Seeded mutations of every record of a run: it is read, or refused with its name"
    begin(tmp_path / "run", eval_every=2)
    dice = random.Random(0)
    for name in ("config.json", "metrics.jsonl", "starts.jsonl"):
        whole = (tmp_path / "run" / name).read_bytes()
        for _ in range(300):
            damaged = bytearray(whole)
            place = dice.randrange(len(damaged))
            kind = dice.randrange(3)
            if kind == 0: damaged[place] ^= 1 << dice.randrange(8)
            elif kind == 1: del damaged[place:]
            else: damaged[place:place + dice.randrange(9)] = dice.randbytes(dice.randrange(4))
            (tmp_path / "run" / name).write_bytes(damaged)
            try:
                run = load_run(tmp_path / "run")
                assert summary(run) and run.latest is not None
            except ValueError as error:
                assert name in str(error), error
        (tmp_path / "run" / name).write_bytes(whole)


def test_a_folder_where_the_lock_belongs_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError, match=f"{tmp_path.name}/.lock is a folder.*another out_dir"):
        WriterLock(tmp_path).acquire()
