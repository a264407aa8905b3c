"""Whether a row's gold has the form that reward functions read, found before any rollout is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perl.rewards.columns import rollout_columns
from perl.rewards.scorer import BUILT_IN, is_outside, load_reward
from perl.types import Example, Rollout, UserError, Variant, one_line


def gold_check(functions: Sequence[str]) -> Callable[[Example], None]:
    """A function that raises UserError for an example that one of the built-in `functions` would fail on, whatever the
    completion. Functions of the user's own, and those that ask something outside, are not called.
    """
    loaded = {
        spec: load_reward(spec)
        for spec in functions
        if spec.partition("(")[0].strip() in BUILT_IN and not is_outside(spec)
    }

    def check(example: Example) -> None:
        variant = Variant(
            example, tuple(range(len(example.images))), example.images, example.answer
        )
        nothing: Any = np.zeros(0)
        unwritten = Rollout(variant, nothing, nothing, nothing, "", True)
        _, texts, columns = rollout_columns([unwritten])
        columns |= {"prompts": texts, "completions": texts}
        for spec, function in loaded.items():
            try:
                (score,) = function(columns, {})
            except Exception as error:
                score = error
            if isinstance(score, Exception):
                raise UserError(
                    f"example {example.id}: the reward function {spec} cannot score it: {one_line(score)}"
                )

    return check
