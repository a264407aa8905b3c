"""How much memory a call takes beyond what was there before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def peak(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `run` gives, and the most bytes it had allocated at one time: results and temporaries, not its inputs.

    From PyTorch's allocators, which know what operators take inside and forget what an earlier run took.
    """
    gc.collect()  # What only a cycle of references keeps would else be freed during the run.
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return result, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler announces itself on stderr.
    profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profiler:
        result = run()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return result, most
