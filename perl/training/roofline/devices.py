"""What GPUs can do, by their makers, and the memory that nvidia-smi shows of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perl.types import UserError


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


MIB = 2.0**20
DEVICES = (
    Device("B200", 2250e12, 7.7e12, 183359 * MIB, 900e9, "NVIDIA HGX B200 datasheet, an eighth"),
    Device("H200", 989e12, 4.8e12, 143771 * MIB, 450e9, "NVIDIA H200 datasheet, SXM"),
    Device("H100", 989e12, 3.35e12, 81559 * MIB, 450e9, "NVIDIA H100 datasheet, SXM"),
    Device("A100-80", 312e12, 2.039e12, 81920 * MIB, 300e9, "NVIDIA A100 datasheet, SXM 80 GB"),
    Device("A100-40", 312e12, 1.555e12, 40960 * MIB, 300e9, "NVIDIA A100 datasheet, SXM 40 GB"),
    Device("L40S", 362e12, 0.864e12, 46068 * MIB, 32e9, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
    Device(
        "RTX 4090", 165.2e12, 1.008e12, 24564 * MIB, 32e9, "NVIDIA Ada whitepaper; PCIe 4.0 x16"
    ),
)


def device_named(name: str, tflops: float, tb_per_s: float, gb: float) -> Device:
    """A device of the table with what is given (above 0) in place of its figures, or one made of these three.

    Raises:
        UserError: it is not in the table, and not all three are given.
    """
    given = {"flops": tflops * 1e12, "bandwidth": tb_per_s * 1e12, "memory": gb * 1e9}
    given = {key: value for key, value in given.items() if value > 0}
    known = next((d for d in DEVICES if _plain(d.name) == _plain(name)), None)
    if known is None and len(given) < 3:
        raise UserError(
            f"--steps-of {name}: no such device; choose {', '.join(d.name for d in DEVICES)}, or give --tflops, "
            "--tb-per-s and --gb of your own"
        )
    if known is None:
        return Device(name, **given, link=32e9, source="given; link as PCIe 4.0 x16")
    source = f"{known.source}, and as given" if given else known.source
    return Device(**{**vars(known), **given, "source": source})


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
