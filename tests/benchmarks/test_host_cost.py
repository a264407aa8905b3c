"""What a call costs the host is measured of every function, on every backend, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_function_is_measured_on_every_backend(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.host_cost"),
            *("--device=cpu", "--rounds=2", f"--json={file}"),
        ],
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    found = {(row["call"], row["backend"], row["gradient"]): row["us"] for row in rows}
    functions = {"policy_loss", "token_logprobs", "grpo_loss", "linear_grpo_loss"}
    for backend in ("triton", "torch"):
        for gradient in (False, True):
            of = {call for call, there, with_ in found if (there, with_) == (backend, gradient)}
            assert of == functions | ({"group_advantages"} if not gradient else set())
    assert all(us > 1 for us in found.values())
    # Far from what 45 arguments took: a wrong unit, or a kernel that is compiled anew in each call.
    assert found["policy_loss", "triton", False] < 5000
    assert "| 15 eager operators " in done.stdout
