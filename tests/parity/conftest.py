"""Parity data: arrays recorded from the official systems. `DECOMP_GOLDEN` names their folder (default `../shared/golden` beside the checkout)."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def golden_folder(method: str) -> Path:
    "Folder of one method's parity data; may not exist"
    return Path(os.environ.get("DECOMP_GOLDEN", ROOT.parent / "shared" / "golden")) / method


@pytest.fixture(scope="session")
def golden():
    "`golden(method)` → folder; skips the test with a clear message where the data is absent"
    def find(method: str) -> Path:
        folder = golden_folder(method)
        if not folder.is_dir():
            pytest.skip(f"no parity data at {folder}: set DECOMP_GOLDEN to the folder that holds '{method}/'")
        return folder
    return find
