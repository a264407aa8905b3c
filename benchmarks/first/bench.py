"""What a part of the first run is given: a device, a clock and a report."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.device import Peaks, clock, cool, measure_peaks
from perl.files import replacing


class Bench(NamedTuple):
    """Where a part runs, and the file that it fills."""

    device: torch.device
    file: Path
    lines: list[dict[str, Any]]

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def backend(self) -> Any:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "torch" if self.dry and not interpreted else "triton"

    def say(self, name: str, wrong: str = "", **figures: Any) -> None:
        """A line of the report, which is whole at any time; `wrong` is what must not be."""
        self.lines.append({"name": name, **figures, **({"wrong": wrong} if wrong else {})})
        write(self.file, {"lines": self.lines})
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}
        said = [f"{k} {v}" for k, v in shown.items() if not isinstance(v, dict)]
        print(f"{name}: {', '.join(said + [f'WRONG: {wrong}'] * bool(wrong))}", flush=True)

    def seconds(self, call: Callable[[], Any], rounds: int = 7) -> float:
        """The median of a call, with cold caches."""
        call()
        spans = []
        for _ in range(1 if self.dry else rounds):
            cool(self.device)
            start = clock(self.device)()
            call()
            spans.append((start, clock(self.device)()))
        return statistics.median(end - start for start, end in spans)

    def peaks(self) -> Peaks:
        return Peaks(1e10, 1e10, "float32") if self.dry else measure_peaks(self.device)


def write(file: Path, found: dict[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
