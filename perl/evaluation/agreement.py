"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from perl.permutation import original_answer
from perl.rewards.answers import extract_answer, normalise
from perl.types import Group, Rollout


def chosen_picture(rollout: Rollout) -> str | None:
    """The answer of a rollout in the example's original order: two that are equal chose the same picture."""
    answer = original_answer(rollout.variant, extract_answer(rollout.text))
    return None if answer is None else normalise(answer)


def agreement(by_order: Sequence[Sequence[str | None]]) -> float:
    """How often two completions from different orders choose the same picture.

    The share of equal pairs among all pairs from two different orders; an answer that names nothing agrees with none.

    Args:
        by_order: for each order the choices of its completions.

    Returns:
        0 to 1; NaN with fewer than two orders.
    """
    equal = total = 0
    for one, other in combinations(by_order, 2):
        for a in one:
            for b in other:
                equal += a is not None and a == b
                total += 1
    return equal / total if total else math.nan


def group_agreement(group: Group) -> float:
    """`agreement` of a group's rollouts across its orders."""
    by_order: defaultdict[tuple[int, ...], list[str | None]] = defaultdict(list)
    for rollout in group.rollouts:
        by_order[rollout.variant.order].append(chosen_picture(rollout))
    return agreement(list(by_order.values()))
