"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

from perl.permutation import original_answer
from perl.rewards.answers import accuracy, extract_answer, final_answer, normalise, tagged
from perl.rewards.choice import choice, chosen_letter
from perl.rewards.judge import judge
from perl.rewards.loading import BoundReward, RewardFunction, load
from perl.rewards.math import math_reward
from perl.rewards.scorer import BUILT_IN
from perl.rewards.sequences import ordering
from perl.types import Group, Rollout

Reader = Callable[[str], str | None]
"""The answer that a completion gives; None: it gives none."""


_READERS: dict[RewardFunction, Callable[[Mapping[str, Any]], Reader]] = {
    accuracy: lambda options: tagged if options.get("tags") else extract_answer,
    choice: lambda options: partial(_chosen, unordered=bool(options.get("unordered"))),
    math_reward: lambda _: final_answer,
    ordering: lambda _: final_answer,
    judge: lambda _: final_answer,
}
"""By its options, for each built-in function that compares one answer with the right one."""


def reader_of(function: BoundReward) -> Reader | None:
    """What reads a completion's answer as a reward function does; None for one whose answers are not known here."""
    reader = _READERS.get(function.function)
    return reader and reader(function.options)


def says_right(spec: str) -> bool:
    """Whether a function of `reward.functions` is a built-in one that gives an answer 1 where it is right and else 0."""
    name = spec.partition("(")[0].strip()
    if BUILT_IN.get(name) not in _READERS:
        return False
    return not load(spec, BUILT_IN).options.get("kendall")


def _chosen(text: str, unordered: bool) -> str | None:
    return ", ".join(chosen_letter(text, unordered) or "") or None


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
