"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, product

from perl.permutation import original_answer
from perl.rewards.reading import Reader, canonical, extract_answer
from perl.types import Group, Rollout


def chosen_picture(rollout: Rollout, read: Reader = extract_answer) -> str | None:
    """The answer of a rollout in the example's original order: two that are equal chose the same picture."""
    answer = original_answer(rollout.variant, read(rollout.text))
    return None if answer is None else canonical(answer)


def agreement(by_order: Sequence[Sequence[str | None]]) -> float:
    """The share of equal pairs among all pairs of choices from two different orders; None equals none.

    Args:
        by_order: for each order the choices of its completions.

    Returns:
        0 to 1; NaN with fewer than two orders.
    """
    pairs = [pair for both in combinations(by_order, 2) for pair in product(*both)]
    equal = sum(a is not None and a == b for a, b in pairs)
    return equal / len(pairs) if pairs else math.nan


def group_agreement(group: Group, read: Reader = extract_answer) -> float:
    """`agreement` of a group's rollouts across its orders."""
    by_order: defaultdict[tuple[int, ...], list[str | None]] = defaultdict(list)
    for rollout in group.rollouts:
        by_order[rollout.variant.order].append(chosen_picture(rollout, read))
    return agreement(list(by_order.values()))
