"""What a session of benchmarks found: rows, and the machine they are from."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contest import Contest, Provider, Run
from benchmarks.harness.device import Peaks, machine
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
    run: Run | None = None
    """None before it was proven, and when it is out."""
    call_seconds: float = 0.0
    """Of one call, warm."""

    def out(self, status: str, reason: str) -> None:
        """No more time, for a reason; what was timed before stays."""
        if not self.turns:
            self.status = status
        self.reason, self.run = reason, None

    @property
    def median(self) -> float | None:
        """Seconds of a call, over the rounds of all turns."""
        return statistics.median(s for turn in self.turns for s in turn) if self.turns else None

    def asdict(self, peaks: Peaks | None) -> dict[str, Any]:
        contest, provider, median = self.contest, self.provider, self.median
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
        if median is not None:
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


@dataclass
class Findings:
    """Rows in the order in which they came."""

    device: torch.device
    rows: list[Row] = field(default_factory=list)
    peaks: Peaks | None = None

    def write(self, file: Path) -> None:
        """JSON: `machine`, `peaks` and `rows`, which `benchmarks.report.results_file` reads."""
        found = {
            "machine": machine(self.device),
            "peaks": asdict(self.peaks) if self.peaks else None,
            "rows": [row.asdict(self.peaks) for row in self.rows],
        }
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
