"""Two models' scores on the same held-out examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perl.evaluation.evaluate import NUMBERS
from perl.evaluation.record import read_evaluation
from perl.evaluation.statistics import Comparison, compare_scores
from perl.report.metrics import plural
from perl.types import UserError, one_line

_NOT_SCORES = frozenset({"orders", "unscored", "unread"})
_AGAIN = frozenset({"reward/accuracy", "reward/format", "greedy_reward/accuracy"})
"""Rewards that an example's own numbers have."""

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """One example with the scores of both models, by measure; a score that is not known is absent."""

    id: str
    task: str
    pictures: str
    first: Scores
    second: Scores


def read_pairs(first: Path, second: Path) -> tuple[list[Pair], list[str]]:
    """The examples of two evaluations that both have, and remarks: examples that one alone has, settings that differ.

    Raises:
        UserError: an evaluation that cannot be read, or evaluations of different data.
    """
    (settings, one), (others, other) = read_evaluation(first), read_evaluation(second)
    common = [id for id in one if id in other]
    changed = [id for id in common if one[id]["content"] != other[id]["content"]]
    if not common or changed:
        what = f"example {one_line(changed[0], 60)} is another one" if changed else "none in common"
        raise UserError(
            f"{first} and {second} are of different examples ({what}); evaluate both with the same data.eval"
        )
    remarks = [
        f"{key}: {old} in the 1st, {new} in the 2nd"
        for key in {**settings, **others}
        if (old := settings.get(key)) != (new := others.get(key))
    ]
    for name, rows in (("1st", one), ("2nd", other)):
        if alone := len(rows) - len(common):
            remarks.append(f"left out: {alone} {plural('example', alone)} only in the {name}")
    pairs = [
        Pair(id, one[id]["task"], one[id]["pictures"], _scores(one[id]), _scores(other[id]))
        for id in common
    ]
    return pairs, remarks


def compare_pairs(pairs: Sequence[Pair]) -> dict[str, Comparison]:
    """A comparison by measure, over the examples that have it in both. Questions about the same pictures are no independent
    evidence and are drawn together for the intervals."""
    measures = list(dict.fromkeys(name for pair in pairs for name in pair.first))
    found = {}
    for name in measures:
        known = [pair for pair in pairs if name in pair.first and name in pair.second]
        if known:
            found[name] = compare_scores(
                [pair.first[name] for pair in known],
                [pair.second[name] for pair in known],
                [pair.pictures for pair in known],
            )
    return found


def comparison_rows(found: Mapping[str, Comparison]) -> list[list[str]]:
    """A table; shares in percent and their difference in points, rewards as they are."""
    rows = [["", "n", "1st", "2nd", "2nd - 1st", "95 % interval", "p", "1st higher", "2nd higher"]]
    for name, c in found.items():
        first, second = (_written(name, value) for value in (c.first, c.second))
        by, low, high = (_written(name, x, "+") for x in (c.difference, *c.interval))
        ways = [str(c.first_only), str(c.second_only)]
        rows.append(
            [_title(name), str(c.items), first, second, by, f"{low} to {high}", f"{c.p:.3g}", *ways]
        )
    return rows


def changed_rows(pairs: Sequence[Pair], limit: int) -> list[list[str]]:
    """A table of the examples whose greedy accuracy or, where that is the same, sampled accuracy changed most; by their
    rewards where a run has no accuracy. What one of the models lacks has not changed."""
    both = {name for pair in pairs for name in pair.first.keys() & pair.second.keys()}
    wanted = ("greedy", "accuracy") if "accuracy" in both else ("greedy_reward", "reward")
    names = [name for name in wanted if name in both]

    def change(pair: Pair) -> list[float]:
        known = pair.first.keys() & pair.second.keys()
        return [abs(pair.second[n] - pair.first[n]) if n in known else 0.0 for n in names]

    ranked = sorted((p for p in pairs if any(change(p))), key=change, reverse=True)[:limit]
    rows = [["example", "task", *(text for n in names for text in (f"{_title(n)}: 1st", "2nd"))]]
    for pair in ranked:
        sides = [(name, scores.get(name)) for name in names for scores in (pair.first, pair.second)]
        cells = ["-" if value is None else _written(name, value) for name, value in sides]
        rows.append([one_line(pair.id, 60), pair.task, *cells])
    return rows


def _title(name: str) -> str:
    return f"{name}, %" if name in NUMBERS else name


def _written(name: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if name in NUMBERS else f"{value:{sign}.3f}"


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an example and its rewards."""
    numbers = {key: value for key, value in row.items() if key not in _NOT_SCORES}
    rewards = {k: v for k, v in (row.get("rewards") or {}).items() if k not in _AGAIN}
    return {
        name: float(score)
        for name, score in {**numbers, **rewards}.items()
        if isinstance(score, int | float) and math.isfinite(score)
    }
