"""Logits to the GRPO loss and their gradient: `grpo_loss` against everybody's way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.conftest import TakeTurn
from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.head_problem import Head, Level, LogitsProblem, head, make_problem
from benchmarks.providers import LOGITS_LOSS, soon_ready


def contests(cuda: bool, quick: bool) -> list[Contest]:
    if cuda:
        sizes = [head("Qwen2.5-VL-3B", n, 2) for n in ((4096,) if quick else (2048, 8192, 16384))]
        sizes += [] if quick else [head("Qwen3.5-4B", 8192, 2)]
    else:
        sizes = [head("Qwen2.5-VL-3B", 256 if quick else 512, 4, fraction=8)]
        sizes += [] if quick else [head("Qwen2.5-VL-3B", 64, 4), head("Qwen3.5-4B", 64, 4)]
    light = soon_ready(LOGITS_LOSS)
    return [
        _contest(sizes[0], LOGITS_LOSS),
        *[_contest(size, light) for size in sizes[1:]],
        _contest(sizes[0], light, "sequence"),
    ]


def _contest(size: Head, providers: Sequence[Provider], level: Level = "token") -> Contest:
    return Contest(
        "GRPO loss of logits, forward and backward",
        size.case + (", sequence-level" if level == "sequence" else ""),
        {**size.asdict(), "level": level},
        partial(make_problem, LogitsProblem, size, level=level),
        providers,
        size.logits_loss(),
    )


def test_logits_loss(race: TakeTurn) -> None:
    race()
