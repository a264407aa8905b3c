"""What a run shows while it goes on: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from perl.report.metrics import plural

_LINE_EVERY = 10.0


class _Console(Console):
    """A reader that goes away (`| head`) silences the display; the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Stage, step, a few numbers, elapsed and remaining time.

    Args:
        enabled: False in every process but the first.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.console = _Console(quiet=not enabled, stderr=True)
        self._live = enabled and self.console.is_terminal
        self._bar: Progress | None = None
        self._stage, self._total, self._done, self._spoken, self._started = "", 0, 0, 0.0, 0.0

    def stage(self, name: str, total: int, done: int = 0, unit: str = "step") -> None:
        """Begin a stage of `total` steps (or another unit, in the singular), `done` of which lie behind."""
        self.close()
        self._stage, self._total, self._done = name, total, done
        self._spoken = self._started = time.monotonic()
        self._first = done
        if self._live:
            columns = (
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, completed=done, numbers="")
        else:
            left = total - done
            self.console.print(f"{name}: {left} {plural(unit, left)}", highlight=False)

    def advance(self, steps: int = 1, numbers: Mapping[str, float] | None = None) -> None:
        """One or more steps are done; `numbers` are shown beside the bar."""
        self._done += steps
        text = "  ".join(f"{name} {_short(value)}" for name, value in (numbers or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, numbers=text)
        elif time.monotonic() - self._spoken > _LINE_EVERY or self._done >= self._total:
            self._spoken = time.monotonic()
            spent = self._spoken - self._started
            left = spent / max(1, self._done - self._first) * (self._total - self._done)
            line = (
                f"{self._stage} {self._done}/{self._total}  {text}  {spent:.0f} s, eta {left:.0f} s"
            )
            self.console.print(line, highlight=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _short(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"
