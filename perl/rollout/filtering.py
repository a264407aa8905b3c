"""Which groups of rollouts an optimizer step can learn from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from perl.types import Group, UserError

logger = logging.getLogger(__name__)

_SLACK = 1e-9
_FATES: tuple[str, ...] = ("kept", "all_best", "all_worst", "too_hard", "too_easy", "unscorable")
_REASONS = {
    "too_hard": ("are too hard", "lower filter.min_accuracy or take easier data"),
    "too_easy": ("are too easy", "raise filter.max_accuracy or take harder data"),
    "all_worst": (
        "have equal rewards, none above zero",
        "take easier data, raise rollout.per_order, or start from a model that is sometimes right",
    ),
    "all_best": ("have equal rewards, all of them good", "take harder data"),
    "unscorable": (
        "have fewer than two rollouts with a reward",
        "check reward.functions and the log's lines about them",
    ),
}


def has_signal(rewards: np.ndarray | Sequence[float]) -> bool:
    """Whether the rewards that are not NaN differ: only then is an advantage other than zero.

    Example: `has_signal([0, 1, nan])`, but neither `has_signal([1, 1])` nor `has_signal([1, nan])`.
    """
    values = np.asarray(rewards, dtype=np.float64)
    scored = values[~np.isnan(values)]
    return scored.size > 1 and bool(scored.min() < scored.max())


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
        """The groups to train on, in their order.

        Raises UserError if no reward part is called `measure` and one is needed.
        """
        kept = []
        for group in groups:
            fate = self._fate(group)
            self._counts[fate] += 1
            equal = fate in ("all_best", "all_worst")
            if fate == "kept" or (equal and not self.zero_variance):
                kept.append(group)
        return kept

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

    def tell_shortfall(self, have: int, wanted: int, tries: int) -> bool:
        """Whether a step got fewer groups than it wanted; the first time the log says why."""
        short = have < wanted
        if short and not self._said_shortfall:
            self._said_shortfall = True
            logger.warning(
                "%s (said once; the metrics count)", shortfall(have, wanted, tries, self.counts)
            )
        return short

    def _fate(self, group: Group) -> str:
        scored = group.rewards[~np.isnan(group.rewards)]
        if scored.size < 2:
            return "unscorable"
        signal = has_signal(scored)
        if self.band and (signal or not self.zero_variance):
            accuracy = self._accuracy(group)
            if np.isnan(accuracy):
                return "unscorable"
            if accuracy < self.band[0] - _SLACK:
                return "too_hard"
            if accuracy > self.band[1] + _SLACK:
                return "too_easy"
        if signal:
            return "kept"
        return "all_best" if scored[0] > 0 else "all_worst"

    def _accuracy(self, group: Group) -> float:
        if self.measure not in group.reward_parts:
            raise UserError(
                f"filter.measure = '{self.measure}' is none of the reward functions "
                f"({', '.join(group.reward_parts)}); name one of them"
            )
        values = group.reward_parts[self.measure]
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else float("nan")


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
