"""Which groups of rollouts an optimiser step can learn from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perl.types import Group, UserError


def has_signal(rewards: np.ndarray | Sequence[float]) -> bool:
    """Whether the rewards that are not NaN differ: only then is an advantage other than zero.

    Example: `has_signal([0, 1, nan])`, but neither `has_signal([1, 1])` nor `has_signal([1, nan])`.
    """
    values = np.asarray(rewards, dtype=np.float64)
    scored = values[~np.isnan(values)]
    return scored.size > 1 and bool(scored.min() < scored.max())


class GroupFilter:
    """Keeps the groups with signal and counts what becomes of all of them.

    With `zero_variance=False` groups whose rewards are all equal are kept too; a group with fewer
    than two scorable rollouts has no baseline and is dropped in either case.
    """

    def __init__(self, zero_variance: bool = True) -> None:
        self.zero_variance = zero_variance
        self._counts = _no_counts()

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups to train on, in their order.

        Raises UserError if there are groups and not one rollout among them can be scored.
        """
        if groups and all(np.isnan(group.rewards).all() for group in groups):
            raise UserError(
                f"no rollout of {len(groups)} groups can be scored, example '{groups[0].example.id}' "
                "being the first; check that reward.functions fit the data's answers"
            )
        kept = []
        for group in groups:
            fate = self._fate(group)
            self._counts[fate] += 1
            if fate == "kept" or (fate != "unscorable" and not self.zero_variance):
                kept.append(group)
        return kept

    @property
    def counts(self) -> dict[str, int]:
        """Groups since the last `reset`, by what they are: `kept` those with signal, `unscorable`,
        and of equal rewards `all_best` (above zero) and `all_worst`, together `zero_variance`."""
        equal = self._counts["all_best"] + self._counts["all_worst"]
        return {**self._counts, "zero_variance": equal}

    def reset(self) -> None:
        self._counts = _no_counts()

    @staticmethod
    def _fate(group: Group) -> str:
        scored = group.rewards[~np.isnan(group.rewards)]
        if scored.size < 2:
            return "unscorable"
        if has_signal(scored):
            return "kept"
        return "all_best" if scored[0] > 0 else "all_worst"


def _no_counts() -> dict[str, int]:
    return dict.fromkeys(("kept", "all_best", "all_worst", "unscorable"), 0)
