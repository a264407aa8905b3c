"""What a session of benchmarks found: rows, and the machine they are from."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Contest, Provider
from benchmarks.peaks import Peaks, measure_peaks
from perl.files import replacing


@dataclass
class Row:
    """A provider in a contest: its times, or why there are none."""

    contest: Contest
    provider: Provider
    status: str = "proven"
    """`timed`; `missing` (not installed, or not made for this machine), `refused` (a wrong result), `out of memory`,
    `failed`, `left out`; `proven` where nothing was to be timed."""
    reason: str = ""
    error: float | None = None
    """Relative, against fp64."""
    turns: list[list[float]] = field(default_factory=list)
    """Seconds of every round, by turn."""
    peak_extra_bytes: int | None = None

    def out(self, status: str, reason: str) -> None:
        """No time, for a reason; what was timed before stays."""
        if not self.turns:
            self.status = status
        self.reason = reason

    @property
    def seconds(self) -> list[float]:
        """Of every round."""
        return [seconds for turn in self.turns for seconds in turn]

    def asdict(self, peaks: Peaks | None) -> dict[str, Any]:
        contest, provider = self.contest, self.provider
        row: dict[str, Any] = {
            "op": contest.op,
            "case": contest.case,
            "shape": dict(contest.shape),
            "axis": contest.axis,
            "provider": provider.name,
            "package": provider.version,
            "ours": provider.ours,
            "note": provider.note,
            "status": self.status,
            "reason": self.reason,
            "flops": contest.work.flops,
            "bytes": contest.work.bytes,
        }
        if self.status == "timed" and self.seconds:
            median = statistics.median(self.seconds)
            row |= {
                "median": median,
                "turns": self.turns,
                "peak_extra_bytes": self.peak_extra_bytes,
                "error": self.error,
            }
            if peaks and (contest.work.flops or contest.work.bytes):
                bound = peaks.seconds(contest.work)
                row |= {"bound": bound, "fraction": bound / median}
        return row


class Findings:
    """Rows in the order in which they came."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: list[Row] = []
        self.peaks: Peaks | None = None

    def measure_peaks(self) -> None:
        """Once a session."""
        if self.peaks is None:
            self.peaks = measure_peaks(self.device)

    def row(self, contest: Contest, provider: Provider) -> Row:
        row = Row(contest, provider)
        self.rows.append(row)
        return row

    def write(self, file: Path) -> None:
        """JSON: `machine`, `peaks` and `rows`."""
        found = {
            "machine": machine(self.device),
            "peaks": self.peaks.asdict() if self.peaks else None,
            "rows": [row.asdict(self.peaks) for row in self.rows],
        }
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, but for the code."""
    cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "cuda": torch.version.cuda or "" if cuda else "",
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
