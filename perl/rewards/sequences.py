"""Answers with an order in them: spans of time, sequences, numbers of frames."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from perl.rewards.answers import column_of, score_each
from perl.rewards.reading import equal, final_answer, gold_text, items, stated_answer, tagged
from perl.types import UserError

_TIME = re.compile(r"[0-9]{1,4}(?::[0-9]{2}){1,2}(?:\.[0-9]{1,6})?|[0-9]{1,9}(?:\.[0-9]{1,6})?")


def temporal_iou(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    column: str = "answer",
    duration: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """Intersection over union of the final answer's span of time with the gold one, 0 to 1.

    Temporal grounding with the plain overlap, as in TimeZero, the first version of Time-R1 (arXiv
    2503.13377). With `duration`, which names the column of the video's length T in seconds, the
    timestamp-aware reward of the later versions: the overlap times (1 - |start - gold start| / T)
    and (1 - |end - gold end| / T), here each at least 0.

    The span is the first two times of the answer, in seconds or as `1:23`, and in `column`, the
    gold ones, also a list of two numbers. None without gold; a span without length scores 0.
    """
    lengths = [(math.inf,)] * len(completions)
    if duration is not None:
        # In tuples, as a length of None is a fault and not an answer without gold.
        lengths = [(length,) for length in column_of("temporal_iou", columns, duration)]

    def score(text: str, value: Any, length: tuple[Any]) -> float:
        wanted = _span(value) if isinstance(value, str) else tuple(float(v) for v in value)
        if wanted is None or len(wanted) != 2:
            raise ValueError(f"the gold {value!r} is no span of two times")
        whole = _seconds(length[0]) if isinstance(length[0], str) else float(length[0])
        if not whole > 0:
            raise ValueError(f"the duration {length[0]!r} is not above 0 s")
        found = _span(final_answer(text))
        if found is None:
            return 0.0
        score = _overlap(found, wanted)
        for a, b in zip(found, wanted, strict=True):
            score *= max(0.0, 1 - abs(a - b) / whole)
        return score

    return score_each(score, completions, column_of("temporal_iou", columns, column), lengths)


def ordering(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    kendall: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the final answer lists the gold items in the gold sequence, else 0; None without gold.

    Lists such as `C, A, B`, `[3, 1, 2]`, `C > A > B` or `CAB`. With `kendall` a permutation of the
    gold items scores (1 + tau) / 2 with Kendall's tau, 0 for the reversed sequence and 1 for the
    right one, and anything else 0.
    """

    def score(text: str, gold: str) -> float:
        given, gold = stated_answer(text), gold_text(gold)
        if not kendall:
            return float(equal(given, gold, "sequence"))
        wanted, found = items(gold), items(given)
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"the gold sequence '{gold}' names an item twice")
        if sorted(found) != sorted(wanted):
            return 0.0
        return (1 + kendall_tau([wanted.index(item) for item in found])) / 2

    return score_each(score, completions, answer)


def frame_index(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    count: int,
    frames: int | None = None,
    first: int = 1,
    **columns: Any,
) -> list[float | None]:
    """1 where the last `<index>` block names `count` different frames that there are, else 0.

    ViaRL, arXiv 2505.15447, where frames are counted from `first=0`. `frames` is how many there
    are; left out, as many as the rollout has images.
    """
    orders: Sequence[Any] = columns.get("order") or [None] * len(completions)
    if frames is None and None in orders:
        raise UserError("reward frame_index: how many frames there are is not known; set frames")

    def score(text: str, order: Any) -> float:
        named = [int(n) for n in re.findall(r"[0-9]{1,9}", tagged(text, "index") or "")]
        there = range(first, first + (len(order) if frames is None else frames))
        return float(len(named) == len(set(named)) == count and all(n in there for n in named))

    return list(map(score, completions, orders))


def kendall_tau(ranks: Sequence[int]) -> float:
    """Kendall's tau of a permutation against the sorted sequence, -1 to 1; 1 for a single item.

    (concordant - discordant) / pairs. Example: `kendall_tau([0, 2, 1]) == 1 / 3`.
    """
    pairs = list(combinations(ranks, 2))
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs) if pairs else 1.0


def _span(text: str) -> tuple[float, float] | None:
    times = [_seconds(match[0]) for match in _TIME.finditer(text)][:2]
    return (times[0], times[1]) if len(times) == 2 else None


def _seconds(time: str) -> float:
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return shared / (a[1] - a[0] + b[1] - b[0] - shared) if shared > 0 else 0.0
