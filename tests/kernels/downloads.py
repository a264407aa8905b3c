"""Files of other people's releases that are not installed, fetched by pip as an installation is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def release(requirement: str, folder: Path, *options: str) -> Path:
    """The archive of `name==version`, alone, in `folder`; the test is skipped where pip cannot
    have it. `folder` keeps it for the next run."""
    folder = folder / requirement.replace("==", "-")
    if not any(folder.glob("*")):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        alone = ["--quiet", "--no-deps", "--ignore-requires-python", "--dest", str(folder)]
        briefly = ["--retries", "1", "--timeout", "20"]
        done = subprocess.run(
            [*command, *alone, *briefly, *options, requirement], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"pip cannot download {requirement}: {done.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*")
    return archive
