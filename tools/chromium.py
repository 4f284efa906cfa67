"""Headless Chromium, where there is one: run a page's JavaScript, take pictures of pages. Nothing is fetched from the network."""
from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ABSENT = "no Chromium on this machine: `apt-get install chromium`, or any of " + ", ".join(NAMES[1:]) + " on the PATH"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
           "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"]


def find() -> str | None:
    "The browser's command, or None"
    return next(filter(None, map(shutil.which, NAMES)), None)


def run(page: Path, *options: str, timeout: float = 120) -> str:
    "What the browser prints for a page, with a profile of its own that goes afterwards"
    browser = find()
    if browser is None:
        raise FileNotFoundError(ABSENT)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout


def dump(page: Path, milliseconds: int = 4000, timeout: float = 120) -> str:
    "The page as HTML after its scripts have run for so long, by the page's own clock"
    return run(page, f"--virtual-time-budget={milliseconds}", "--dump-dom", timeout=timeout)


def photograph(page: Path, target: Path, width: int, height: int, milliseconds: int = 3000) -> Path:
    "A picture of the page in a window of this size"
    run(page, f"--virtual-time-budget={milliseconds}", f"--window-size={width},{height}", f"--screenshot={target.resolve()}")
    return target
