"""Rounds of both sides in turn, as long as they tell something new."""

from __future__ import annotations

import time

from benchmarks.comparing.ratio import LEAST, Ratio, ratio
from benchmarks.comparing.side import Side

_ROUND = 0.02
"""Seconds of a round at least: short calls are repeated within it."""
_MOST_CALLS = 1000
_LONG = 0.1
"""Seconds of a call on a CPU that needs no other before it: caches are filled in a small part of it."""


def contend(
    base: Side, head: Side, call: float, cuda: bool, budget: float, threshold: float
) -> tuple[list[float], list[float], Ratio]:
    """Seconds of a call in each round of BASE and of HEAD, and their ratio.

    The order is ABBA: whatever drifts slowly (clock, heat, other programs) meets both sides alike, and whichever goes
    second does so as often as the other. Rounds end when the ratio is decided or `budget` is spent, after at least
    the `LEAST` pairs that an interval needs.

    Args:
        call: seconds of a call, roughly; both sides make equally many in a round.
        budget: seconds.
    """
    calls = max(1, min(_MOST_CALLS, round(_ROUND / call)))
    warm = cuda or call < _LONG
    end = time.monotonic() + budget
    times: dict[Side, list[float]] = {base: [], head: []}
    while True:
        for side in (base, head, head, base):
            times[side].append(side.ask("round", calls=calls, warm=warm))
        if len(times[base]) < LEAST:
            continue
        found = ratio(times[base], times[head])
        if found.decided(threshold) or time.monotonic() > end:
            return times[base], times[head], found
