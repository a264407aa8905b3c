"""The command line called in this process, and what a run wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.cli import main

ErrorOf = Callable[..., str]
"""The fixture `error_of`: runs a command that must fail by one line of error with code 2, and returns what it says."""


def run(*arguments: object) -> int | str | None:
    """The exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]
