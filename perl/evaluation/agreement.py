"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations, product

from perl.permutation import original_answer
from perl.rewards.answers import accuracy, extract_answer, normalise, tagged
from perl.rewards.choice import choice, chosen_letter
from perl.rewards.loading import BoundReward
from perl.types import Group, Rollout

Reader = Callable[[str], str | None]
"""The answer that a completion gives; None: it gives none."""


def reader_of(function: BoundReward) -> Reader | None:
    """What reads a completion's answer as a reward function does; None for one whose answers are not known here."""
    if function.function is accuracy:
        return tagged if function.options.get("tags") else extract_answer
    if function.function is choice:
        unordered = bool(function.options.get("unordered"))
        return lambda text: ", ".join(chosen_letter(text, unordered) or "") or None
    return None


def chosen_picture(rollout: Rollout, read: Reader = extract_answer) -> str | None:
    """The answer of a rollout in the example's original order: two that are equal chose the same picture."""
    answer = original_answer(rollout.variant, read(rollout.text))
    return None if answer is None else normalise(answer)


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
