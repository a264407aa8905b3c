"""Whether a row's gold has the form that reward functions read, found before any rollout is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perl.rewards.scorer import BUILT_IN, is_outside, load_reward
from perl.types import Example, UserError, one_line


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
        columns: dict[str, list[Any]] = {key: [value] for key, value in example.extra.items()}
        columns |= {"answer": [example.answer], "id": [example.id], "task": [example.task]}
        columns |= {"order": [list(range(len(example.images)))], "completion_length": [0]}
        columns |= {"prompts": [""], "completions": [""]}
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
