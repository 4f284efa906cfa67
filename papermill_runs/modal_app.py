"""A run on a rented GPU, by Modal (https://modal.com/docs): the run directory lies on a volume, so that a machine that is taken
away, or the time limit of one attempt, costs only the steps since the last checkpoint.

    modal run papermill_runs/modal_app.py --name lsd --recipe papermill_runs/recipes/lsd_clevr.yaml --more "-p seed 1"
    modal volume get decomp-nb-runs lsd
"""
import shlex
import subprocess
import sys
from pathlib import Path

import modal

HOUR = 60 * 60
ROOT = Path(__file__).resolve().parents[1]
app = modal.App("decomp-nb")
runs = modal.Volume.from_name("decomp-nb-runs", create_if_missing=True)
image = (modal.Image.debian_slim(python_version="3.11")
         .add_local_dir(ROOT, "/project", copy=True, ignore=[".git", ".venv", "_docs", "_proc", "papermill_runs/out"])
         .run_commands("cd /project && python -m pip install -c constraints.txt -e ."))


# An attempt may take 24 hours at most; each retry starts the same command, which goes on where the last one ended.
@app.function(image=image, gpu="A100", volumes={"/runs": runs}, timeout=24 * HOUR, retries=modal.Retries(max_retries=10))
def train(notebook: str, recipe: str, name: str, more: str = "") -> None:
    "Run a notebook with a recipe; `more` are further words of `decomp_nb run`"
    words = ["run", notebook, f"/runs/{name}.ipynb", "-f", recipe, "-p", "out_dir", f"/runs/{name}", "--device", "gpu"]
    stop = ["--timeout", str(23.5 * HOUR)]  # save before the attempt is cut off
    done = subprocess.run([sys.executable, "-m", "decomp_nb", *words, *stop, *shlex.split(more)], cwd="/project", check=False)
    runs.commit()
    if done.returncode:
        raise RuntimeError(f"decomp_nb run ended with code {done.returncode}; what it saved is on the volume decomp-nb-runs")


@app.local_entrypoint()
def main(notebook: str = "nbs/train_lsd.ipynb", recipe: str = "papermill_runs/recipes/lsd_clevr.yaml", name: str = "lsd",
         more: str = "") -> None:
    "The command line of `modal run`"
    train.remote(notebook, recipe, name, more)
