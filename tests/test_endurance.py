"A short version of tools/endurance.py: whatever disturbs a training, it ends with the weights and metrics of one that nobody disturbed."
import os
import subprocess
import sys

from test_runs import ROOT


def test_disturbed_trainings_end_like_undisturbed_ones(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "endurance.py", "--kills", "3", "--seed", "1", "--folder", tmp_path], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bit for bit" in done.stdout and not list(tmp_path.iterdir())
