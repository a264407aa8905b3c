"""What GPUs can do, by their makers, and the memory that nvidia-smi shows of them; what any device does, measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from perl.types import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A GPU. Rates are a second, in one direction for `link`, which connects it to those beside it."""

    name: str
    flops: float
    """Of bfloat16 products, dense."""
    bandwidth: float
    """Bytes of its own memory."""
    memory: float
    """Bytes, as nvidia-smi counts them: more than the name says."""
    link: float
    """Bytes."""
    source: str
    reported: str = r"(?!)"
    """How its driver calls it, as a regular expression; of other boards with its name the rates differ."""


MIB = 2.0**20
DEVICES = (
    Device(
        "B200",
        2250e12,
        7.7e12,
        183359 * MIB,
        900e9,
        "NVIDIA HGX B200 datasheet, an eighth",
        "NVIDIA B200",
    ),
    Device(
        "H200", 989e12, 4.8e12, 143771 * MIB, 450e9, "NVIDIA H200 datasheet, SXM", "NVIDIA H200"
    ),
    Device(
        "H100",
        989e12,
        3.35e12,
        81559 * MIB,
        450e9,
        "NVIDIA H100 datasheet, SXM",
        "NVIDIA H100 80GB HBM3",
    ),
    Device(
        "A100-80",
        312e12,
        2.039e12,
        81920 * MIB,
        300e9,
        "NVIDIA A100 datasheet, SXM 80 GB",
        r"NVIDIA A100[- ](SXM4-80GB|80GB PCIe)",
    ),
    Device(
        "A100-40",
        312e12,
        1.555e12,
        40960 * MIB,
        300e9,
        "NVIDIA A100 datasheet, SXM 40 GB",
        r"NVIDIA A100-(SXM4|PCIE)-40GB",
    ),
    Device(
        "L40S",
        362e12,
        0.864e12,
        46068 * MIB,
        32e9,
        "NVIDIA L40S datasheet; PCIe 4.0 x16",
        "NVIDIA L40S",
    ),
    Device(
        "RTX 4090",
        165.2e12,
        1.008e12,
        24564 * MIB,
        32e9,
        "NVIDIA Ada whitepaper; PCIe 4.0 x16",
        "NVIDIA GeForce RTX 4090",
    ),
)


def device_named(name: str, tflops: float, tb_per_s: float, memory: float) -> Device:
    """A device of the table with what is given (above 0) in place of its figures, or one made of these three.

    Raises:
        UserError: it is not in the table, and not all three are given.
    """
    given = {"flops": tflops * 1e12, "bandwidth": tb_per_s * 1e12, "memory": memory * 1e9}
    given: dict[str, Any] = {key: value for key, value in given.items() if value > 0}
    known = next((d for d in DEVICES if _plain(d.name) == _plain(name)), None)
    if known is None and len(given) < 3:
        raise UserError(
            f"--steps-of {name}: no such device; choose {', '.join(d.name for d in DEVICES)}, or give --tflops, "
            "--tb-per-s and --memory of your own"
        )
    if known is None:
        return Device(name, **given, link=32e9, source="given; link as PCIe 4.0 x16")
    source = f"{known.source}, and as given" if given else known.source
    return replace(known, **given, source=source)


@dataclass(frozen=True)
class Peak:
    """The most FLOPs a second that a share is taken of, and where the number is from."""

    flops: float
    source: str


@cache
def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of a device in a dtype: by its maker where the table has it, else measured in some milliseconds.

    Measured is the fastest of a few square products, which is below what the maker gives: shares of it are higher.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((d for d in DEVICES if re.fullmatch(d.reported, name)), None)
        if known and dtype in (torch.bfloat16, torch.float16):
            return Peak(known.flops, known.source)
    size = 8192 if device.type == "cuda" else 512
    with torch.no_grad():
        factor = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_seconds_of_product(factor) for _ in range(6))
    of = f"{size} x {size} in {str(dtype).removeprefix('torch.')}"
    return Peak(2 * size**3 / seconds, f"measured: products of {of}")


def _seconds_of_product(factor: torch.Tensor) -> float:
    """The first one is slower: kernels are chosen in it."""
    import torch

    def wait() -> None:
        if factor.is_cuda:
            torch.cuda.synchronize(factor.device)

    wait()
    start = time.perf_counter()
    _ = factor @ factor
    wait()
    return time.perf_counter() - start


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
