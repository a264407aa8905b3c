"""Logits to the GRPO loss and their gradient: `grpo_loss` against everybody's way."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.head_problem import (
    Head,
    Level,
    LogitsProblem,
    head,
    head_contest,
    logits_head,
)
from benchmarks.providers import LOGITS_LOSS, soon_ready

OP = "GRPO loss of logits, forward and backward"


def contests(cuda: bool, quick: bool) -> list[Contest]:
    if cuda:
        sizes = [head("Qwen2.5-VL-3B", n, 2) for n in ((4096,) if quick else (2048, 8192, 16384))]
        sizes += [] if quick else [head("Qwen3.5-4B", 8192, 2)]
    else:
        # The logits of both take 156 and 134 MB, more than caches hold.
        sizes = [logits_head("Qwen2.5-VL-3B", 256, 4), logits_head("Mistral-7B", 1024, 4)]
        sizes += [] if quick else [logits_head("Qwen3.5-4B", 128, 4)]
    light = soon_ready(LOGITS_LOSS)
    return [
        *[_contest(size, LOGITS_LOSS) for size in sizes[:2]],
        *[_contest(size, light) for size in sizes[2:]],
        _contest(sizes[0], light, "sequence"),
    ]


def _contest(size: Head, providers: Sequence[Provider], level: Level = "token") -> Contest:
    case = size.case + ", sequence-level" * (level == "sequence")
    return head_contest(OP, LogitsProblem, size, providers, case, level=level)
