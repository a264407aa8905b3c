"""The command line called in this process or in others, the rewards that runs are given, and what a run wrote."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from perl.cli import main
from tests.forked import Forked

ErrorOf = Callable[..., str]
"""The fixture `error_of`: runs a command that must fail by one line of error with code 2, and returns what it says."""

BY_LENGTH = """
def f(prompts, completions, **columns):
    return [len(c.split()) % 3 / 2 for c in completions]
"""
"""A reward that differs between completions of an untrained model, as accuracy does not."""

ALTERNATING = "def f(prompts, **c): return [float(i % 2) for i in range(len(prompts))]"
"""A reward that an untrained model learns from."""


def run(*arguments: object) -> int | str | None:
    """The exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def spawn(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, which prints to one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "perl", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


_forked = partial(Forked, "perl")


def spawn_two(*arguments: object, start: Callable[..., Any] = _forked) -> list[Any]:
    """Two processes that know of each other, as torchrun would start them; of interpreters of their own with `start=spawn`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(*arguments, **shared, OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]


def finish(processes: list[Any]) -> list[tuple[int, str]]:
    """The exit code of each and what it printed."""
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]


def wait_for(folder: Path, stage: str, step: int, *processes: Any) -> None:
    """Until the processes of a run have recorded a step."""
    deadline = time.monotonic() + 240
    while f'"stage": "{stage}", "step": {step},' not in _text(folder / "metrics.jsonl"):
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
        time.sleep(0.02)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def rewarded(folder: Path, source: str = BY_LENGTH) -> list[str]:
    """Options for the reward function `f` of this source, which is written to a file in the folder."""
    file = folder / "reward.py"
    file.write_text(source)
    return ["--reward.functions", f"{file}:f", "--reward.weights", "1"]


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [r for r in json_lines(folder / "metrics.jsonl") if stage in (None, r["stage"])]


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The same rows without what differs from run to run; which images are encoded depends on what is cached."""
    timing = re.compile(r"(time|throughput|memory|mfu)/|flops/\w+/vision$")
    return [{k: v for k, v in r.items() if not timing.match(k)} for r in metrics(folder)]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs left the same model to the bit."""
    import torch
    from safetensors.torch import load_file

    mine, others = (load_file(f / "models" / "final" / "model.safetensors") for f in (one, other))
    return all(torch.equal(mine[name], others[name]) for name in mine)
