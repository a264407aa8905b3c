"""Ctrl-C, SIGTERM and a closed terminal end a run between two steps, after a checkpoint."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""


class StopSignal:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `requested`; a second one stops at once."""

    _signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            "\nstopping after this step, with a checkpoint; once more to stop at once",
            file=sys.stderr,
        )
