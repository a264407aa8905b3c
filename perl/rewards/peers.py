"""Reward functions that were written for verl or EasyR1, told by the names of their parameters.

verl: `compute_score(data_source, solution_str, ground_truth, extra_info=None)` of one completion, and its batch form with
each name in the plural. EasyR1: `compute_score(reward_inputs)` of a list of dicts, `compute_score(reward_input)` of one,
and the older `compute_score(predicts, ground_truths)`. A result is a number, or a dict whose "score" (verl) or "overall"
(EasyR1) counts and whose other numbers are parts of their own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl.types import UserError

_COMPLETIONS = ("solution_str", "reward_input", "predict", "predict_str")
"""What the completion, or a dict that holds it, is called; with an s there are all of them."""

GIVEN = ("data_source", "ground_truth", "extra_info", *_COMPLETIONS)
"""What such a function may be given, of each completion."""


@dataclass(frozen=True, slots=True)
class PeerForm:
    """How a function of a peer's is called."""

    names: tuple[str, ...]
    """Those of `GIVEN` that it takes."""
    whole: bool
    """All completions in one call, under names in the plural."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> PeerForm | None:
        """None: the function is in no form of a peer's."""
        taken = parameters_of(function) or {}
        for name in _COMPLETIONS:
            for whole, plural in ((False, name), (True, f"{name}s")):
                if plural in taken:
                    suffix = "s" if whole else ""
                    return cls(tuple(n for n in GIVEN if n + suffix in taken), whole)
        return None

    def call(
        self,
        function: Callable[..., Any],
        columns: Mapping[str, Sequence[Any]],
        options: Mapping[str, Any],
    ) -> Any:
        """What the function gives for all completions; of one that it raised for, the exception."""
        given = _given(columns)
        if self.whole:
            return function(**{f"{name}s": given[name] for name in self.names}, **options)
        calls = [
            {**{name: given[name][i] for name in self.names}, **options}
            for i in range(len(columns["completions"]))
        ]
        if inspect.iscoroutinefunction(function):
            return _together(function, calls)
        return [_attempt(function, call) for call in calls]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """None where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _given(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Each name of `GIVEN` for every completion."""
    texts = list(columns["completions"])
    none = [None] * len(texts)
    golds = list(columns.get("ground_truth") or columns.get("answer") or none)
    lengths = columns.get("completion_length") or none
    inputs = [
        {"response": text, "response_length": length, "ground_truth": gold}
        for text, length, gold in zip(texts, lengths, golds, strict=True)
    ]
    return {
        "data_source": list(columns.get("data_source") or columns.get("task") or none),
        "ground_truth": golds,
        "extra_info": [
            dict(info or {}) if isinstance(info, Mapping | None) else info
            for info in columns.get("extra_info") or none
        ],
        "solution_str": texts,
        "predict": texts,
        "predict_str": texts,
        "reward_input": inputs,
    }


def _attempt(function: Callable[..., Any], call: Mapping[str, Any]) -> Any:
    try:
        return function(**call)
    except UserError:
        raise
    except Exception as error:
        return error


async def _together(function: Callable[..., Any], calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    done = await asyncio.gather(*(function(**call) for call in calls), return_exceptions=True)
    for outcome in done:
        if isinstance(outcome, UserError):
            raise outcome
    return done
