"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from perl.permutation import AnswerForm, answer_form, original_answer
from perl.rewards.forms import reader_of
from perl.rewards.loading import BoundReward
from perl.rewards.math import equal_values, math_reward
from perl.rewards.reading import Reader, canonical, extract_answer
from perl.types import Group, Rollout


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward function reads the answer of a completion, and tells whether two answers are one."""

    read: Reader = extract_answer
    form: AnswerForm | None = None
    """What it takes a list for; None: what the question asks for (`answer_form`)."""
    same: Callable[[str, str], bool] | None = None
    """Of answers that are written differently; None: those are different ones."""

    @classmethod
    def of(cls, function: BoundReward) -> Reading | None:
        """None for a function whose answers are not known here."""
        read = reader_of(function)
        form = "set" if function.options.get("unordered") else None
        same = equal_values if function.function is math_reward else None
        return read and cls(read, form, same)


def chosen_picture(rollout: Rollout, reading: Reading) -> str | None:
    """The answer of a rollout in the example's original order: two that are equal chose the same picture, or pictures."""
    variant = rollout.variant
    answer = original_answer(variant, reading.read(rollout.text))
    form = reading.form or answer_form(variant.example)
    return None if answer is None else canonical(answer, form)


def agreement(
    by_order: Sequence[Sequence[str | None]], same: Callable[[str, str], bool] | None = None
) -> float:
    """The share of equal pairs among all pairs of choices from two different orders; None equals none.

    Args:
        by_order: for each order the choices of its completions.
        same: whether two choices that are written differently are equal; None: they are not.

    Returns:
        0 to 1; NaN with fewer than two orders.
    """
    if same is not None:
        found: dict[str, str] = {}
        for choice in dict.fromkeys(c for choices in by_order for c in choices if c is not None):
            firsts = dict.fromkeys(found.values())
            found[choice] = next((first for first in firsts if same(choice, first)), choice)
        by_order = [[None if c is None else found[c] for c in choices] for choices in by_order]
    pairs = [pair for both in combinations(by_order, 2) for pair in product(*both)]
    equal = sum(a is not None and a == b for a, b in pairs)
    return equal / len(pairs) if pairs else math.nan


def group_agreement(group: Group, reading: Reading) -> float:
    """`agreement` of a group's rollouts across its orders."""
    by_order: defaultdict[tuple[int, ...], list[str | None]] = defaultdict(list)
    for rollout in group.rollouts:
        by_order[rollout.variant.order].append(chosen_picture(rollout, reading))
    return agreement(list(by_order.values()), reading.same)
