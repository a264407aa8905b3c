"""Seconds of training steps and of their parts; on a GPU the end of a part waits for what was begun in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from perl.timing import Stopwatch

PARTS = ("generation", "preparation", "update", "rest")
"""Sampling; prompts, images, rewards, advantages and packing; forward, backward and optimizer; anything else."""
_PERL = {"rollout": "generation", "update": "update"}
"""By the names of PeRL's stopwatch; others are preparation."""


@dataclass(frozen=True)
class StepTime:
    """Of one step: `parts` add up to `seconds`."""

    seconds: float
    parts: dict[str, float]


class StepClock:
    """From the end of one step to the end of the next, so that nothing between steps is lost.

    The first step has no beginning and is left out: it is the one that warms up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[StepTime] = []
        self.ended = 0
        """Steps that are over, the first one too."""
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0
        self._last: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Seconds of a block, without those of the parts inside it."""
        start, outer, self._inner = self._now(), self._inner, 0.0
        try:
            yield
        finally:
            spent = self._now() - start
            self._spent[name] += spent - self._inner
            self._inner = outer + spent

    def end_step(self) -> None:
        now = self._now()
        if self._last is not None:
            seconds = now - self._last
            parts = {name: self._spent[name] for name in PARTS[:-1]}
            self.steps.append(StepTime(seconds, {**parts, "rest": seconds - sum(parts.values())}))
        self._spent.clear()
        self._last = now
        self.ended += 1

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class PartWatch(Stopwatch):
    """PeRL's stopwatch, which tells the clock as well."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self.clock.part(_PERL.get(name, "preparation")), super().__call__(name):
            yield
