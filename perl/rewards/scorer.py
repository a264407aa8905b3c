"""What a completion is worth: the weighted sum over reward functions.

A reward function follows TRL's convention, `f(prompts, completions, **columns) -> list of float or None`, all lists of
the same length, or the same as `async def`; or that of a peer (`peers`). Columns are those of `columns.rollout_columns`.
None means that the function does not apply, and leaves it out of that completion's sum; a dict has the score and named
parts of it; NaN, inf, no number, an exception in the list, or a call that raises or takes too long is a fault, which costs
the rollout its score but does not end the run.
docs/rewards.md has the built-in functions.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from perl.config import names_of
from perl.rewards.answers import accuracy, format_reward, format_tags
from perl.rewards.boxes import box_iou, detection, grounding
from perl.rewards.calls import Calls, Fault, call_each
from perl.rewards.choice import choice
from perl.rewards.columns import TrainerState, conversations, rollout_columns
from perl.rewards.judge import caption_facts, check_judge, judge
from perl.rewards.loading import BoundReward, RewardFunction, load
from perl.rewards.math import check_math, math_reward
from perl.rewards.results import listed, named_parts, number_in, only_value
from perl.rewards.sequences import frame_index, ordering, temporal_iou
from perl.rewards.shaping import length_penalty, repetition
from perl.types import Example, Rollout, UserError, one_line

logger = logging.getLogger(__name__)

BUILT_IN: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "format": format_reward,
    "math": math_reward,
    "choice": choice,
    "format_tags": format_tags,
    "box_iou": box_iou,
    "detection": detection,
    "grounding": grounding,
    "temporal_iou": temporal_iou,
    "ordering": ordering,
    "frame_index": frame_index,
    "judge": judge,
    "caption_facts": caption_facts,
    "length_penalty": length_penalty,
    "repetition": repetition,
}

_OUTSIDE: dict[RewardFunction, Callable[[], None]] = {
    math_reward: check_math,
    judge: check_judge,
    caption_facts: check_judge,
}
"""Those that ask something outside this process, with time limits of their own, and what raises
UserError before a run starts if it is not there."""


_DEFAULT = {("accuracy", "format"): (0.9, 0.1)}
"""Weights of functions that are given none, if not 1 each: the paper's."""


class Scorer:
    """The weighted sum of several reward functions.

    `functions` are names, `package.module:function`, `file.py:function`, or callables; the first
    three may have options. `weights` has one number for each, or none: then 1 each, and 0.9 and 0.1 for accuracy and
    format; a function of weight 0 is only reported. `timeout` is the limit of one call in seconds, 0 none. `state` is
    what functions are told of the run. `faults` counts, by the names in `names`, the rollouts that a function failed on,
    and `metrics` holds what functions logged, since `reset`. Raises UserError for a
    name that is not known, does not load, or lacks what it needs.
    """

    def __init__(
        self,
        functions: Sequence[str | RewardFunction] = ("accuracy", "format"),
        weights: Sequence[float] = (),
        timeout: float = 60.0,
    ) -> None:
        if not functions:
            raise UserError("reward.functions is empty; name at least one, for example accuracy")
        # Before their number is compared with that of the weights: one that is misspelt is why they differ, often.
        loaded = [load_reward(f) if isinstance(f, str) else BoundReward(f) for f in functions]
        weights = weights or _DEFAULT.get(tuple(functions), (1.0,) * len(functions))  # type: ignore[arg-type]
        self.names = names_of(functions)
        if len(functions) != len(weights):
            raise UserError(
                f"reward.weights = {list(weights)} for {len(functions)} reward.functions "
                f"({', '.join(self.names)}); give one for each, or none: then each counts 1"
            )
        if not all(np.isfinite(weight) for weight in weights):
            raise UserError(f"reward.weights must be finite numbers, got {tuple(weights)}")
        self.functions = dict(zip(self.names, loaded, strict=True))
        self.weights = dict(zip(self.names, map(float, weights), strict=True))
        self.reader = next((name for name, f in self.functions.items() if f.reads_answer), None)
        """The first function that reads the column answer."""
        self.timeout = timeout
        self.state = TrainerState()
        self.reset()
        self._said: set[str] = set()

    def reset(self) -> None:
        self.faults = dict.fromkeys(self.names, 0)
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)
        self.logged: dict[str, list[Any]] = {}
        """What functions logged of each completion of the last call of `score`, by name."""
        self.failed: dict[str, dict[int, Fault]] = {}
        """By function the completions of the last call of `score` that it failed on."""

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        chats: Mapping[str, Sequence[Any]] | None = None,
        *,
        lenient: bool = False,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Totals float64 [R] and name -> float64 [R], NaN where a function gave no score.

        A total is the weighted sum over the functions that did not give None for the completion; it
        is NaN if all did, or one failed on it. Functions of weight 0 have no part in either. Named parts of a function's
        scores stand beside them as `function/part`.

        `prompts`, `completions` and every column have length R; `chats` may hold other prompts and completions for
        functions of TRL's convention. A function that raises or takes
        too long is called again with each completion alone, to find those it fails on. Raises
        UserError, naming the function and the first example, if it fails on all R (not if `lenient`)
        or returns anything but R values.
        """
        batch = {"prompts": prompts, "completions": completions, **columns}
        chats, self.logged = chats or {}, {}
        everything = range(len(completions))
        # Those that wait for others do so at the same time.
        waiting = {
            name: Calls([self._call(function, batch, chats, everything)], self._limit(function))
            for name, function in self.functions.items()
            if function.is_async
        }
        parts, faulty = {}, {}
        for name, function in self.functions.items():
            if name in waiting:
                (outcome,) = waiting[name].results()
            else:
                call = self._call(function, batch, chats, everything)
                (outcome,) = call_each([call], self._limit(function), at_once=True)
            values = self._values(name, function, outcome, batch, chats)
            parts[name], faulty[name] = self._scores(name, function, values, batch, lenient)
            parts |= named_parts(name, values)
        deciding = {name: weight for name, weight in self.weights.items() if weight}
        totals = np.zeros(len(completions), dtype=np.float64)
        for name, weight in deciding.items():
            totals += weight * np.nan_to_num(parts[name])
        if deciding:
            totals[np.all([np.isnan(parts[name]) for name in deciding], axis=0)] = math.nan
            totals[np.any([faulty[name] for name in deciding], axis=0)] = math.nan
        return totals, parts

    def score_rollouts(
        self, rollouts: Sequence[Rollout], *, lenient: bool = False
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`score` of rollouts, with the columns of `rollout_columns`; if `lenient` they need no answers."""
        for rollout in () if lenient else rollouts:
            self.check_answer(rollout.variant.example)
        prompts, completions, columns = rollout_columns(rollouts)
        chats = conversations(rollouts, prompts, completions)
        return self.score(prompts, completions, columns, chats, lenient=lenient)

    def _call(
        self,
        function: BoundReward,
        batch: Mapping[str, Sequence[Any]],
        chats: Mapping[str, Sequence[Any]],
        places: Sequence[int],
    ) -> Callable[[], Any]:
        """The call of a function with the completions at some places of the batch."""

        # One that is too late must not write into what belongs to a later call.
        logged, metrics = self.logged, self.metrics

        def log_extra(column: str, values: Sequence[Any]) -> None:
            own = logged.setdefault(column, [None] * len(batch["completions"]))
            for place, value in zip(places, values, strict=True):
                own[place] = value

        def log_metric(name: str, value: float) -> None:
            metrics[name].append(float(value))

        # Lists of its own: one function that sorts its completions must not change the next one's.
        own, own_chats = (
            {key: [column[i] for i in places] for key, column in lists.items()}
            for lists in (batch, chats)
        )
        return partial(
            function,
            own,
            own_chats,
            trainer_state=self.state,
            log_extra=log_extra,
            log_metric=log_metric,
        )

    def check_answer(self, example: Example) -> None:
        """Raise UserError if the example has no answer and a function reads it."""
        if self.reader and not example.answer:
            _, held = example.origin.get("answer", ("", None))
            is_object = isinstance(held, Mapping)
            what = f"holds {one_line(held, 60)} and no text" if is_object else "is empty or missing"
            there = f"its other columns are {', '.join(example.extra)}; " if example.extra else ""
            raise UserError(
                f"reward function '{self.reader}' reads the column answer, which {what} in example "
                f"'{example.id}'; {there}name the one that holds it with data.map, as in \"answer=THEIRS\", "
                "or use rewards that need no answer"
            )

    def _limit(self, function: BoundReward) -> float:
        return 0.0 if function.function in _OUTSIDE else self.timeout

    def _values(
        self,
        name: str,
        function: BoundReward,
        outcome: Any,
        batch: Mapping[str, Sequence[Any]],
        chats: Mapping[str, Sequence[Any]],
    ) -> list[Any]:
        """What the function gave for each completion, or a Fault."""
        count = len(batch["completions"])
        if not isinstance(outcome, Fault):
            values = listed(outcome)
            if values is None or len(values) != count:
                got = type(outcome).__name__ if values is None else f"{len(values)} values"
                raise UserError(
                    f"reward function '{name}' returned {got} for {count} completions; "
                    "return a list with one number or None for each"
                )
            return values
        if count <= 1:
            return [outcome] * count
        # Each completion alone, to find those that it fails on.
        alone = [self._call(function, batch, chats, [i]) for i in range(count)]
        outcomes = call_each(alone, self._limit(function), at_once=function.is_async)
        values = [only_value(value) for value in outcomes]
        if not any(isinstance(number_in(value), Fault) for value in values):
            self._say(name, outcome, f"{count} completions together, though on none alone")
        return values

    def _scores(
        self,
        name: str,
        function: BoundReward,
        values: Sequence[Any],
        batch: Mapping[str, Sequence[Any]],
        lenient: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float64 [R], NaN for None and for a fault, and which of them are faults, bool [R]."""
        count = len(values)
        numbers = [number_in(value) for value in values]
        faults = {i: number for i, number in enumerate(numbers) if isinstance(number, Fault)}
        self.failed[name] = faults
        if faults:
            first, fault = next(iter(faults.items()))
            where = f"example '{batch['id'][first]}'" if "id" in batch else f"completion {first}"
            if len(faults) == count and not lenient:
                # What a reward of ours refuses is a value of the data or of its options.
                own = isinstance(fault.error, ValueError) and function.function in BUILT_IN.values()
                advice = "correct its data, or the reward's options" if own else fault.advice
                raise UserError(
                    f"reward function '{name}' {fault.what} {where}; {advice}"
                ) from fault.error
            self.faults[name] += len(faults)
            self._say(name, fault, where)
        faulty = np.array([isinstance(number, Fault) for number in numbers], dtype=bool)
        scores = [math.nan if isinstance(number, Fault) else number for number in numbers]
        return np.array(scores, dtype=np.float64), faulty

    def _say(self, name: str, fault: Fault, where: str) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning(
                "reward function '%s' %s %s; a rollout that it fails on is not scored "
                "(logged once for each function; the metrics count them)",
                name,
                fault.what,
                where,
            )


def load_reward(spec: str) -> BoundReward:
    """The reward function that a name, `package.module:function` or `file.py:function` stands for.

    Options may follow, as in `box_iou(threshold=0.5)`. Raises UserError, with the nearest known
    name, if there is none, its module does not load, or it lacks a package or service.
    """
    function = load(spec, BUILT_IN)
    if function.function in _OUTSIDE:
        _OUTSIDE[function.function]()
    return function


def is_outside(spec: str) -> bool:
    """Whether a function asks something outside this process."""
    return load(spec, BUILT_IN).function in _OUTSIDE
