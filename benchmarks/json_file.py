"""A report of a benchmark as a JSON file, which is tried before anything is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from perl.files import write_json
from perl.types import UserError


def check(file: Path | None) -> None:
    """
    Raises:
        UserError: no report can be written there.
    """
    if file is None:
        return
    try:
        if (file.exists() and not file.is_file()) or not file.absolute().parent.is_dir():
            raise UserError(f"--json {file}: give a file in a folder that is there")
        with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise UserError(f"--json {file}: it cannot be written ({error.strerror})") from error


def write(file: Path | None, report: Any) -> None:
    """
    Raises:
        UserError: the disk is full, or the folder is gone.
    """
    if file is None:
        return
    try:
        write_json(file, report)
    except OSError as error:
        raise UserError(f"--json {file}: it cannot be written ({error.strerror})") from error
