"""What the device can do, measured beside everything else: the bounds that times are fractions of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.clock import clock, cool
from benchmarks.contest import Work


@dataclass(frozen=True)
class Peaks:
    """Rates of a large copy (bytes read and written) and of a large product in the dtype of the benchmarks."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str

    def seconds(self, work: Work) -> float:
        """The bound: no implementation is faster than its operations or its bytes."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def measure_peaks(device: torch.device) -> Peaks:
    """Medians of a copy of 2 GiB (CPU: 256 MiB) and a product of 8192 x 8192 x 8192 in bfloat16 (CPU: 2048, float32)."""
    cuda = device.type == "cuda"
    source = torch.ones(2**31 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    # Random: on zeros a GPU draws less power and runs faster than it will on anything else.
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = _median(lambda: a @ b, device)
    return Peaks(2 * source.nbytes / copy, 2 * n**3 / product, str(dtype).removeprefix("torch."))


def _median(run: Callable[[], Any], device: torch.device) -> float:
    now = clock(device)
    seconds = []
    for _ in range(3):
        run()
    for _ in range(15):
        cool(device)
        start = now()
        run()
        seconds.append(now() - start)  # pyright: ignore[reportOperatorIssue]
    return statistics.median(seconds)
