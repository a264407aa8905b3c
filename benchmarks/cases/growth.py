"""How the cost of `linear_grpo_loss` grows with tokens, vocabulary and hidden size, each over a factor of 16 or more."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cases.linear_loss import OP
from benchmarks.harness.contest import Contest
from benchmarks.harness.head_problem import Head, HeadProblem, head, head_contest
from benchmarks.providers import LINEAR_LOSS

_SHOWN = ("PeRL, Triton", "PeRL, native", "PeRL, PyTorch", "PyTorch, eager")


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """From the head of Qwen2.5-VL-3B; on a CPU from a sixteenth of it."""
    if cuda:
        start = head("Qwen2.5-VL-3B", 8192, 2)
        sweeps = {
            "N": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
            "V": (16384, 32768, 65536, 131072, 262144),
            "H": (512, 1024, 2048, 4096, 8192),
        }
    else:
        start = head("Qwen2.5-VL-3B", 256, 4, fraction=16)
        sweeps = {
            "N": (64, 128, 256, 512, 1024),
            "V": (2048, 4096, 8192, 16384, 32768),
            "H": (32, 64, 128, 256, 512),
        }
    if quick and cuda:
        sweeps = {axis: sizes[::2] for axis, sizes in sweeps.items()}
    return [_contest(start, axis, n) for axis, sizes in sweeps.items() for n in sizes]


def _contest(start: Head, axis: str, value: int) -> Contest:
    size = replace(start, **{axis: value})
    rest = ", ".join(f"{k} = {getattr(size, k)}" for k in "NHV" if k != axis)
    shown = [provider for provider in LINEAR_LOSS if provider.name in _SHOWN]
    return head_contest(OP, HeadProblem, size, shown, f"{axis} = {value} ({rest})", axis)
