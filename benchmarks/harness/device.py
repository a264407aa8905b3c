"""The device of a run: its name, its clock, the memory that a call takes, and the peaks that times are fractions of."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer

from benchmarks.harness.contest import Work

T = TypeVar("T")


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
    """For pytest-benchmark's `timer`: events on a GPU, the wall clock on a CPU."""
    return Instant if device.type == "cuda" else time.perf_counter


def cool(device: torch.device) -> None:
    """Leave nothing of earlier rounds in the cache of a GPU; the write also keeps it busy while kernels are launched."""
    if device.type == "cuda":
        _scratch(device).zero_()


@cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Several times the second-level cache of the largest GPUs."""
    return torch.empty(2**29, dtype=torch.uint8, device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory() -> None:
    """What only cycles of references keep, and what PyTorch's allocator keeps of a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
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


@dataclass(frozen=True)
class Peaks:
    """Rates of a large copy (bytes read and written) and of a large product in the dtype of the benchmarks."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str

    def seconds(self, work: Work) -> float:
        """The bound: no implementation is faster than its operations or its bytes."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


def measure_peaks(device: torch.device) -> Peaks:
    """Medians of a copy of 2 GiB (CPU: 256 MiB) and a product of 8192 x 8192 x 8192 in bfloat16 (CPU: 2048, float32).

    Both are many times larger than any cache, so nothing has to cool between calls.
    """
    cuda = device.type == "cuda"
    source = torch.ones(2**31 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source))
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    # Random: on zeros a GPU draws less power and runs faster than it will on anything else.
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = _median(lambda: a @ b)
    return Peaks(2 * source.nbytes / copy, 2 * n**3 / product, str(dtype).removeprefix("torch."))


def _median(run: Callable[[], Any]) -> float:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1.0).median


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


def software(device: torch.device) -> dict[str, Any]:
    """What a report on training steps says of the machine."""
    import transformers

    return {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
