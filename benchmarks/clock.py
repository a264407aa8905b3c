"""Time on a device: events on a GPU, whose cache is cold, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch


class Instant:
    """A point in the work of a GPU; the difference of two is the seconds between them.

    The host waits when the difference is asked for, not when the point is set, so launches are not part of the time
    as long as the device has work.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable[[], float | Instant]:
    """For pytest-benchmark's `timer`."""
    return Instant if device.type == "cuda" else time.perf_counter


def cool(device: torch.device) -> None:
    """Leave nothing of earlier rounds in the cache of a GPU; the write also keeps it busy while kernels are launched."""
    if device.type == "cuda":
        _scratch(device).zero_()


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Several times the second-level cache of the largest GPUs."""
    return torch.empty(2**29, dtype=torch.uint8, device=device)
