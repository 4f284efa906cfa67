"""A kernel for notebooks under test, forked from a process that has imported the large libraries once: each start saves four seconds.

Everything else is as with any kernel: a process of its own, its own session, the same messages.
"""
import contextlib
import multiprocessing
import os
import sys
import time
from pathlib import Path
from unittest import mock

import accelerate  # noqa: F401  what run notebooks import, before processes part
import diffusers
import ipykernel.kernelapp
import matplotlib.pyplot  # noqa: F401
import sklearn.linear_model  # noqa: F401
import training_toys  # noqa: F401
import transformers

SLOW = [(diffusers, "AutoencoderKL UNet2DModel UNet2DConditionModel VQModel DDIMScheduler DDPMScheduler"), (transformers, "CLIPTextModel CLIPTokenizer")]
for library, names in SLOW:
    for name in names.split():
        getattr(library, name)  # both libraries import on first use


def server():
    "The context whose processes are forked from the one that has imported this module"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_kernel"])
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return context


def be_a_kernel(arguments: list[str], folder: str | None, environment: dict) -> None:
    "What the forked process does instead of `python -m ipykernel_launcher`"
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or ".")
    sys.path.insert(0, "")
    sys.argv = ["ipykernel_launcher", *arguments]
    ipykernel.kernelapp.launch_new_instance(argv=arguments)


class Forked:
    "What jupyter_client wants to know of a kernel's process"
    stdin = stdout = stderr = None

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


def launch(command, cwd=None, env=None, **_) -> Forked:
    "In place of jupyter_client's `launch_kernel`; returns when the process leads a group of its own, which may then be killed"
    arguments = command[command.index("ipykernel_launcher") + 1:]
    process = server().Process(target=be_a_kernel, args=(arguments, cwd and str(cwd), dict(env or os.environ)), daemon=False)
    process.start()
    for _ in range(3000):
        if not process.is_alive() or os.getpgid(process.pid) == process.pid:
            return Forked(process)
        time.sleep(0.01)
    process.kill()
    raise TimeoutError("a forked kernel did not start within 30 s")


@contextlib.contextmanager
def warm():
    "Kernels that start in here are forked"
    with mock.patch("jupyter_client.provisioning.local_provisioner.launch_kernel", launch):
        yield
