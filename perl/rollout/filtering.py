"""Which groups of rollouts an optimizer step can learn from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from perl.rollout.advantages import group_mean
from perl.types import Group, UserError

logger = logging.getLogger(__name__)

_SLACK = 1e-9
"""For means of rewards that are equal to a bound but for rounding."""
_FATES: tuple[str, ...] = ("kept", "all_best", "all_worst", "too_hard", "too_easy", "unscorable")
_REASONS = {
    "too_hard": ("are too hard", "lower filter.min_accuracy or take easier data"),
    "too_easy": ("are too easy", "raise filter.max_accuracy or take harder data"),
    "all_worst": (
        "have equal rewards, none above zero",
        "take easier data, raise rollout.per_order, start from a model that is sometimes right, or see with perl-rl preview "
        "that reward.functions give a right answer more than zero",
    ),
    "all_best": ("have equal rewards, all of them good", "take harder data"),
    "unscorable": (
        "have fewer than two rollouts with a reward",
        "check reward.functions and the log's lines about them",
    ),
}


class GroupFilter:
    """Keeps the groups to train on and counts what becomes of all of them.

    A group with fewer than two scorable rollouts has no baseline and is dropped. One whose rewards
    are all equal has no signal and is dropped too, unless `zero_variance=False`. Of the others,
    those stay whose mean of the reward part `measure` (not its weighted value; rollouts without one
    left out) is from `min_accuracy` to `max_accuracy`, both included: MM-Eureka, arXiv 2503.07365,
    takes 0.1 to 0.9. With 0 and 1, the defaults, that is not looked at.
    """

    def __init__(
        self,
        zero_variance: bool = True,
        min_accuracy: float = 0.0,
        max_accuracy: float = 1.0,
        measure: str = "accuracy",
    ) -> None:
        self.zero_variance, self.measure = zero_variance, measure
        self.band = None if (min_accuracy, max_accuracy) == (0, 1) else (min_accuracy, max_accuracy)
        self._counts = dict.fromkeys(_FATES, 0)
        self._said_shortfall = False

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on, in their order."""
        wanted = ("kept",) if self.zero_variance else ("kept", "all_best", "all_worst")
        fates = [self._fate(group) for group in groups]
        for fate in fates:
            self._counts[fate] += 1
        return [group for group, fate in zip(groups, fates, strict=True) if fate in wanted]

    @property
    def counts(self) -> dict[str, int]:
        """Groups since the last `reset`, each once: `kept` those with signal, `unscorable`, of equal
        rewards `all_best` (above zero) and `all_worst`, together `zero_variance`, and outside of the
        band `too_hard` and `too_easy`. What the first rule drops is not asked by the next; with
        `zero_variance=False` the band comes first."""
        equal = self._counts["all_best"] + self._counts["all_worst"]
        return {**self._counts, "zero_variance": equal}

    def reset(self) -> None:
        self._counts = dict.fromkeys(_FATES, 0)

    def tell_shortfall(self, have: int, wanted: int, tries: int) -> None:
        """The first time that a step gets fewer groups than it wanted the log says why."""
        if have < wanted and not self._said_shortfall:
            self._said_shortfall = True
            logger.warning(
                "%s (said once; the metrics count)", shortfall(have, wanted, tries, self.counts)
            )

    def _fate(self, group: Group) -> str:
        scored = group.rewards[~np.isnan(group.rewards)]
        if scored.size < 2:
            return "unscorable"
        # Rewards that are all equal have no advantage other than zero.
        signal = scored.min() < scored.max()
        if self.band and (signal or not self.zero_variance):
            accuracy = group_mean(group.reward_parts[self.measure])
            if np.isnan(accuracy):
                return "unscorable"
            if accuracy < self.band[0] - _SLACK:
                return "too_hard"
            if accuracy > self.band[1] + _SLACK:
                return "too_easy"
        if signal:
            return "kept"
        return "all_best" if scored[0] > 0 else "all_worst"


def unscorable(groups: Sequence[Group], count: int) -> UserError:
    """What to say of a step none of whose `count` groups, `groups` among them, has a rollout with a reward."""
    first = f", example '{groups[0].example.id}' being the first" if groups else ""
    return UserError(
        f"no rollout of {count} groups can be scored{first}; "
        "check that reward.functions fit the data's answers"
    )


def shortfall(have: int, wanted: int, tries: int, counts: Mapping[str, int]) -> str:
    """One line on a batch that was not filled: how far it came, the commonest reason, what to do.

    `counts` are those of `GroupFilter` over the same tries.
    """
    dropped = {name: counts.get(name, 0) for name in _REASONS}
    seen = sum(dropped.values()) + counts.get("kept", 0)
    line = f"a step has {have} of {wanted} groups after {tries} tries with {seen} groups"
    commonest = max(dropped, key=dropped.__getitem__)
    if not dropped[commonest]:
        return f"{line}; raise filter.max_tries"
    what, advice = _REASONS[commonest]
    return f"{line}: {dropped[commonest]} {what}; {advice}, or raise filter.max_tries"
