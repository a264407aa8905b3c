"""How often completions of different image orders choose the same picture."""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product

from perl.permutation import AnswerForm, answer_form, original_answer
from perl.rewards.forms import reader_of
from perl.rewards.loading import BoundReward
from perl.rewards.math import equal_values, math_reward
from perl.rewards.reading import Reader, canonical, equal, extract_answer
from perl.rewards.sequences import ordering
from perl.types import Example, Group, Rollout

_LABELLED = re.compile(r"(?<![^,])([a-z])\. [^,]*")
"""An item such as `b. a dog` of a canonical answer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward function reads the answer of a completion, and tells whether two answers are one."""

    read: Reader = extract_answer
    form: AnswerForm | None = None
    """What it takes a list for; None: what the question asks for (`answer_form`)."""
    same: Callable[..., bool] = equal
    """Of two answers and their form."""

    @classmethod
    def of(cls, function: BoundReward) -> Reading | None:
        """None for a function whose answers are not known here."""
        read = reader_of(function)
        form = "set" if function.options.get("unordered") else None
        form = "sequence" if function.function is ordering else form
        # Each pair of different answers is compared: none may wait long.
        by_value = partial(equal_values, seconds=1.0)
        return read and cls(read, form, by_value if function.function is math_reward else equal)

    def form_in(self, example: Example) -> AnswerForm | None:
        """What a list is that is given to an example."""
        if example.kind == "ordering":  # An option, which stands for a sequence of images.
            return "sequence"
        return self.form or answer_form(example)

    def same_in(self, example: Example) -> Callable[[str, str], bool]:
        """Whether two answers to an example chose the same picture, or pictures."""
        return partial(self.same, form=self.form_in(example))


def chosen_picture(rollout: Rollout, reading: Reading) -> str | None:
    """The answer of a rollout in the example's original order, to be compared by `Reading.same_in`; None: it gives none, or
    one that names no picture where it should."""
    example, answer = rollout.variant.example, reading.read(rollout.text)
    if answer is not None and example.should_change:
        answer = _LABELLED.sub(r"\1", canonical(answer, reading.form_in(example)))
    return original_answer(rollout.variant, answer)


def agreement(
    by_order: Sequence[Sequence[str | None]], same: Callable[[str, str], bool] = operator.eq
) -> float:
    """The share of equal pairs among all pairs of choices from two different orders; None equals none.

    Args:
        by_order: for each order the choices of its completions.
        same: whether two choices are equal.

    Returns:
        0 to 1; NaN with fewer than two orders.
    """
    found: dict[str | None, str] = {}
    for choice in dict.fromkeys(c for choices in by_order for c in choices if c is not None):
        firsts = dict.fromkeys(found.values())
        found[choice] = next((first for first in firsts if same(choice, first)), choice)
    pairs = [pair for both in combinations(by_order, 2) for pair in product(*both)]
    alike = sum(a is not None and found[a] == found.get(b) for a, b in pairs)
    return alike / len(pairs) if pairs else math.nan


def group_agreement(group: Group, reading: Reading) -> float:
    """`agreement` of a group's rollouts across its orders, formulas as they are written: their values take time in each step."""
    by_order: defaultdict[tuple[int, ...], list[str | None]] = defaultdict(list)
    for rollout in group.rollouts:
        by_order[rollout.variant.order].append(chosen_picture(rollout, reading))
    return agreement(list(by_order.values()), replace(reading, same=equal).same_in(group.example))
