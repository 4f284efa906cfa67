"""What a training survives: kill -9, SIGTERM, a full disk, flipped bits, a clock set back, a folder without the right to write.

    python tools/endurance.py [--kills 60] [--seed 0] [--folder DIR]

A toy training of some forty steps is started in a process of its own and disturbed at random moments, again and again,
until it has come to its end. Then its weights and its metrics must be those of a training that nobody disturbed, bit for bit.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate  # noqa: F401  imported here so that forked processes have them already
import diffusers.optimization  # noqa: F401
import diffusers.training_utils  # noqa: F401
import torch
from safetensors.torch import load_file
from torch import nn

from decomp_nb.training.checkpoint import list_checkpoints
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.run_directory import Run
from decomp_nb.training.trainer import Trainer

STEPS = 40
CLOCK = ("seconds", "images_per_second")  # what the clock decides


class Pictures:
    "Twenty fixed pictures"

    def __init__(self):
        self.images = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.images[i] + 0.1 * torch.rand(())}


class Toy(nn.Module):
    "Pictures through eight numbers, with noise"

    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(48, 8)
        self.wide = nn.Linear(8, 48)

    def forward(self, batch: dict) -> dict:
        code = self.narrow(batch["image"])
        again = self.wide(code + 0.1 * torch.randn_like(code))
        return {"loss": (again - batch["image"]).square().mean()}


def train(folder: Path) -> None:
    "The toy training, from wherever it stands"
    torch.manual_seed(0)
    config = TrainConfig(
        out_dir=str(folder), cpu=True, mixed_precision="no", trackers="", max_steps=STEPS, batch_size=4, log_every=1,
        eval_every=7, save_every=3, learning_rate=0.01, lr_schedule="cosine", warmup_steps=2, ema_decay=0.9,
    )
    Trainer(Toy(), Pictures(), config, evaluate=lambda model, step: {"norm": model.wide.weight.norm()}).fit()


def start(folder: Path, disturb: Callable[[], None] = lambda: None) -> int:
    "Train in a process of its own, in which `disturb` is called first; its number"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with folder.with_suffix(".log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        disturb()
        train(folder)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    "Wait for a process: its exit code, or minus the signal that ended it"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder: Path) -> tuple[list, dict]:
    "Metrics without what the clock decides, and all weights of the last checkpoint and of model/"
    run = Run(folder)
    rows = [{name: value for name, value in row.items() if name not in CLOCK} for row in run.metrics()]
    last = list_checkpoints(run.checkpoints)[-1]
    files = [last / "model.safetensors", last / "ema.safetensors", folder / "model" / "model.safetensors"]
    return rows, {(file.parent.name, file.name, name): v for file in files for name, v in load_file(file).items()}


def same(one: tuple[list, dict], other: tuple[list, dict]) -> bool:
    "Whether two results agree bit for bit"
    weights = one[1].keys() == other[1].keys() and all(torch.equal(v, other[1][key]) for key, v in one[1].items())
    return weights and one[0] == other[0]


def interrupt(folder: Path, dice: random.Random, longest: float, number: int) -> int:
    "Start the training and send a signal after a random time; its exit code"
    pid = start(folder)
    time.sleep(dice.uniform(0, longest))
    os.kill(pid, number)
    return ended(pid)


def fill_disk(folder: Path, dice: random.Random) -> int:
    "Train where no file may grow beyond a random size, which ends a write in its middle"
    most = dice.choice([200, 900, 2000, 4000, 8000])
    return ended(start(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))


def set_clock_back(folder: Path) -> int:
    "Train while the clock of the day runs backwards from ten days ago"
    def disturb() -> None:
        began = time.time()
        time.time = lambda: began - 864_000 - 5 * (time.monotonic() % 1e6)
    return ended(start(folder, disturb))


def forbid_writing(folder: Path) -> int:
    "Train in a folder that may be read only, as a user without the right to write"
    def disturb() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
    folder.chmod(0o555)
    code = ended(start(folder, disturb))
    folder.chmod(0o755)
    return code


def flip_bit(folder: Path, dice: random.Random) -> Path | None:
    "Flip one bit of one file of the newest checkpoint"
    checkpoints = list_checkpoints(folder / "checkpoints")
    files = sorted(path for path in checkpoints[-1].iterdir()) if checkpoints else []
    if not files:
        return None
    file = dice.choice(files)
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return file


def disturbed(folder: Path, dice: random.Random, longest: float) -> dict[str, int]:
    "One training with every disturbance until it ends by itself; how often which came"
    count = dict.fromkeys(("kill -9", "SIGTERM", "full disk", "flipped bit", "clock set back", "read-only folder"), 0)
    log = folder.with_suffix(".log")
    while True:
        said_before = log.stat().st_size if log.exists() else 0
        what = dice.choices(list(count), weights=(12, 2, 1, 1, 1, 1))[0]
        count[what] += 1
        if what == "clock set back":
            code = set_clock_back(folder)
        elif what == "full disk":
            code = fill_disk(folder, dice)
        elif what == "read-only folder":
            code = forbid_writing(folder) if folder.exists() else 1
        elif what == "flipped bit":
            code = flip_bit(folder, dice) and 1
        else:
            code = interrupt(folder, dice, longest, signal.SIGKILL if what == "kill -9" else signal.SIGTERM)
        said = log.read_bytes()[said_before:].decode(errors="replace")  # sizes count bytes
        if code == 0 and f"trained for {STEPS} steps" in said:  # code 0 alone may be a SIGTERM at the last step
            return count


def second_writer_refused(folder: Path) -> bool:
    "Whether a training that starts beside a running one ends at once and says who is there"
    first = start(folder)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)  # it holds the lock for as long as we like
    log = folder.with_suffix(".log")
    before = log.stat().st_size
    code = ended(start(folder))
    said = log.read_bytes()[before:].decode(errors="replace")
    os.kill(first, signal.SIGKILL)
    ended(first)
    return code == 1 and f"is being written by process {first} on" in said


def endure(kills: int, seed: int, folder: Path) -> dict[str, int]:
    "Disturb trainings until there were so many kills; the counts, or an `AssertionError` where one was not the same"
    dice = random.Random(seed)
    began = time.monotonic()
    assert ended(start(folder / "whole")) == 0, (folder / "whole.log").read_text()
    longest = time.monotonic() - began
    whole = result(folder / "whole")
    total: dict[str, int] = {"trainings": 0}
    while total.get("kill -9", 0) < kills:
        place = folder / f"run-{total['trainings']}"
        assert second_writer_refused(place), place.with_suffix(".log").read_text()
        for name, number in disturbed(place, dice, longest).items():
            total[name] = total.get(name, 0) + number
        total["kill -9"] += 1  # of the second writer's rival
        assert same(result(place), whole), f"{place} differs from the training that nobody disturbed"
        total["trainings"] += 1
        shutil.rmtree(place)
    return total


def main() -> None:
    "Read the command line, endure, tell"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        Path(folder).chmod(0o755)
        found = endure(args.kills, args.seed, Path(folder))
    told = ", ".join(f"{number} × {name}" for name, number in found.items() if name != "trainings")
    print(f"{found['trainings']} trainings of {STEPS} steps, disturbed by {told}: "
          f"weights and metrics are those of an undisturbed one, bit for bit ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
