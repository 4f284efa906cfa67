"""The smallest model and data that exercise every source of randomness, and a way to train them in a process of its own."""
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time

import accelerate  # noqa: F401  imported here so that forked processes have them already
import diffusers.optimization  # noqa: F401
import diffusers.training_utils  # noqa: F401
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from decomp_nb.training import precision, reporting, trainer
from decomp_nb.training.config import TrainConfig
from decomp_nb.training.trainer import Trainer


class Pictures:
    "`n` fixed pictures; `shaky` adds noise from all three generators, as augmentation would"
    def __init__(self, n=22, shaky=True):
        self.x, self.shaky = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)), shaky

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        jitter = 0.1 * (random.random() + np.random.rand() + torch.rand(1).item()) if self.shaky else 0
        return {"image": self.x[i] + jitter, "caption": f"picture {i}"}


class Denoiser(nn.Module):
    "Two layers with dropout on noisy pictures; `quiet` leaves out noise and dropout, so that only the data matters"
    def __init__(self, width=6, quiet=False):
        super().__init__()
        self.encoder, self.head = nn.Linear(48, width), nn.Linear(width, 48)
        self.quiet, self.calls = quiet, 0

    def parameter_groups(self):
        return [{"params": self.encoder.parameters(), "name": "encoder", "lr_scale": 0.5}, {"params": self.head.parameters(), "name": "head"}]

    def forward(self, batch):
        self.calls += 1
        x = batch["image"].flatten(1)
        noise = torch.zeros_like(x) if self.quiet else torch.randn_like(x)
        hidden = F.relu(self.encoder(x + noise))
        loss = F.mse_loss(self.head(hidden if self.quiet else F.dropout(hidden, 0.2, self.training)), x)
        return {"loss": loss, "half": loss.detach() / 2, "hidden": hidden}


class Slower(Denoiser):
    "Sends signal `name` to its own process (`everyone`: to the whole process group) in the forward pass of step `at`"
    at, name, everyone = 0, "SIGUSR1", False

    def forward(self, batch):
        output = super().forward(batch)
        if self.training and self.calls == self.at:
            number = getattr(signal, self.name)
            os.killpg(os.getpgid(0), number) if self.everyone else os.kill(os.getpid(), number)
        return output


def config(out_dir, **options):
    return TrainConfig(**{**dict(out_dir=out_dir, cpu=True, trackers="", mixed_precision="no", max_steps=12, batch_size=4, log_every=1, eval_every=0, save_every=0, ema_decay=0.9,
                                 learning_rate=1e-2, resume="never", lr_schedule="cosine", warmup_steps=2), **options})


def train(out_dir, *, data=None, model=None, evaluate=None, quiet=False, **options):
    "Seed, build, fit → (trainer, run)"
    torch.manual_seed(0)
    fitter = Trainer(model or Denoiser(quiet=quiet), Pictures(shaky=not quiet) if data is None else data, config(out_dir, **options), evaluate=evaluate, name="toy")
    return fitter, fitter.fit()


def train_in_process(request, env, log):
    "What a process of its own does: environment, session and output of its own, then one training (`stop` = attributes of `Slower`)"
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers: the server's own method would import everything once more
    os.environ.update(env)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    stop, quiet, out_dir = request.get("stop", {}), request.get("quiet", False), request["out_dir"]
    if request.get("odd_ranks"): make_ranks_differ(int(env["RANK"]))
    torch.manual_seed(0)
    model = Slower(quiet=quiet)
    for name, value in stop.items(): setattr(model, name, value)
    options = {k: v for k, v in request.items() if k not in ("stop", "quiet", "out_dir", "odd_ranks")}
    fitter, run = train(out_dir, model=model, quiet=quiet, **options)
    print(f"after fit: {len(run.curve('loss')[0])} lines of metrics, {fitter.session.accelerator.mixed_precision}, {fitter.session.forecast.plan}")


def make_ranks_differ(rank):
    "Lines of metrics take half a second to arrive; the first process is fast at bfloat16 and slow otherwise, the second the other way round"
    honest, steps = trainer.append_metrics, itertools.count()
    def late(path, row):
        time.sleep(0.5)
        honest(path, row)
    trainer.append_metrics = late
    precision.native_bf16 = lambda kind: True
    precision.trial_seconds = lambda: ((2.0, 1.0), (1.0, 2.0))[rank]
    reporting.Stopwatch.now = staticmethod(lambda: next(steps) * (0.1, 0.01)[rank])
