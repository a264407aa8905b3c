"""What a completion is worth: the weighted sum over reward functions.

A reward function follows TRL's convention: `f(prompts, completions, **columns) -> list of float or
None`, all lists of the same length. Completions are plain strings; columns hold `answer` and every
further column of the data. None or NaN means that the completion cannot be scored.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from perl.reward_answers import accuracy, extract_answer, format_reward, normalise, same_answer
from perl.types import Rollout, UserError

__all__ = [
    "BUILT_IN",
    "RewardFunction",
    "Scorer",
    "accuracy",
    "extract_answer",
    "format_reward",
    "load_reward",
    "normalise",
    "rollout_columns",
    "same_answer",
]

RewardFunction = Callable[..., Any]

BUILT_IN: dict[str, RewardFunction] = {"accuracy": accuracy, "format": format_reward}


class Scorer:
    """The weighted sum of several reward functions.

    `functions` are names, `package.module:function`, `file.py:function`, or callables; `weights`
    has one number for each. A function of weight 0 is only reported. Raises UserError for a name
    that is not known or does not load.
    """

    def __init__(
        self,
        functions: Sequence[str | RewardFunction] = ("accuracy", "format"),
        weights: Sequence[float] = (0.9, 0.1),
    ) -> None:
        if not functions:
            raise UserError("reward.functions is empty; name at least one, for example accuracy")
        if len(functions) != len(weights):
            raise UserError(
                f"reward.weights has {len(weights)} numbers for {len(functions)} functions; "
                "give one for each"
            )
        if not all(np.isfinite(weight) for weight in weights):
            raise UserError(f"reward.weights must be finite numbers, got {tuple(weights)}")
        self.names = _names(functions)
        self.functions = tuple(load_reward(f) if isinstance(f, str) else f for f in functions)
        self.weights = tuple(float(weight) for weight in weights)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Totals float64 [R] and name -> float64 [R], NaN where a completion cannot be scored.

        `prompts`, `completions` and every column have length R. Raises UserError, naming the
        function and the example, if a function raises or returns anything but R finite numbers,
        None or NaN.
        """
        parts = {
            name: _call(name, function, prompts, completions, columns)
            for name, function in zip(self.names, self.functions, strict=True)
        }
        totals = np.zeros(len(completions), dtype=np.float64)
        for name, weight in zip(self.names, self.weights, strict=True):
            if weight:  # 0 * NaN would make a function that is only watched decide.
                totals += weight * parts[name]
        return totals, parts

    def score_rollouts(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`score` of rollouts, with the columns of `rollout_columns`."""
        prompts, completions, columns = rollout_columns(rollouts)
        return self.score(prompts, completions, columns)


def load_reward(spec: str) -> RewardFunction:
    """The reward function that a name, `package.module:function` or `file.py:function` stands for.

    Raises UserError, with the nearest known name, if there is none or its module does not load.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module_name, colon, function_name = spec.rpartition(":")
    if not colon:
        raise UserError(
            f"unknown reward function '{spec}'{_nearest(spec, BUILT_IN)}; known are "
            f"{', '.join(BUILT_IN)}, or write package.module:function or file.py:function"
        )
    module = _import(module_name, spec)
    function = getattr(module, function_name, None)
    if function is None:
        raise UserError(
            f"reward '{spec}': {module_name} has no '{function_name}'{_nearest(function_name, vars(module))}"
        )
    if not callable(function):
        raise UserError(
            f"reward '{spec}': '{function_name}' is a {type(function).__name__}, not a function"
        )
    return function


def rollout_columns(
    rollouts: Sequence[Rollout],
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Prompts, completions and columns of rollouts, as reward functions take them.

    `answer` is the one that is right in the rollout's order. A column that an example lacks is None
    there.
    """
    examples = [rollout.variant.example for rollout in rollouts]
    columns: dict[str, list[Any]] = {
        key: [example.extra.get(key) for example in examples]
        for key in dict.fromkeys(key for example in examples for key in example.extra)
        if key not in ("prompts", "completions")
    }
    columns["answer"] = [rollout.variant.answer for rollout in rollouts]
    columns["id"] = [example.id for example in examples]
    columns["task"] = [example.task for example in examples]
    prompts = ["\n".join(message.content for message in example.messages) for example in examples]
    return prompts, [rollout.text for rollout in rollouts], columns


def _names(functions: Sequence[str | RewardFunction]) -> tuple[str, ...]:
    """Distinct names to report by: the function's own, or the whole spec where two are alike."""
    whole = [
        f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__) for f in functions
    ]
    short = [name.rpartition(":")[2] for name in whole]
    names = tuple(w if short.count(s) > 1 else s for w, s in zip(whole, short, strict=True))
    if len(set(names)) < len(names):
        raise UserError(
            f"reward.functions names one function twice: {', '.join(names)}; leave one out"
        )
    return names


def _import(name: str, spec: str) -> ModuleType:
    try:
        return (
            _import_file(Path(name).resolve())
            if name.endswith(".py")
            else importlib.import_module(name)
        )
    except FileNotFoundError as error:
        raise UserError(f"reward '{spec}': {_one_line(error)}; correct the path") from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"reward '{spec}': {error}; "
            "install it, put its folder on PYTHONPATH, or write file.py:function"
        ) from error
    except Exception as error:
        raise UserError(
            f"reward '{spec}': importing {name} raised {type(error).__name__}: {_one_line(error)}"
        ) from error


@functools.cache
def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = (
        f"perl_reward_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up there while it runs.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _call(
    name: str,
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    try:
        values = function(prompts=list(prompts), completions=list(completions), **columns)
    except (Exception, SystemExit) as error:  # A script's exit() must not end the run unsaved.
        where = _first_failure(function, prompts, completions, columns)
        raise UserError(
            f"reward function '{name}' raised {type(error).__name__}: {_one_line(error)} on {where}; "
            "correct the function (it is called with prompts, completions and every column by name)"
        ) from error
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(completions):
        got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise UserError(
            f"reward function '{name}' returned {got} for {len(completions)} completions; "
            "return a list with one number or None for each"
        )
    scores = np.empty(len(completions), dtype=np.float64)
    for i, value in enumerate(values):
        number = _number(value)
        if number is None:
            raise UserError(
                f"reward function '{name}' returned {_one_line(repr(value))} for {_example(i, columns)}; "
                "return a finite number, or None if it cannot be scored"
            )
        scores[i] = number
    return scores


def _number(value: Any) -> float | None:
    if value is None:
        return float("nan")
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return None if np.isinf(number) else number


def _first_failure(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> str:
    for i in range(len(completions)):
        try:
            function(
                prompts=[prompts[i]],
                completions=[completions[i]],
                **{key: [column[i]] for key, column in columns.items()},
            )
        except (Exception, SystemExit):
            return _example(i, columns)
    return f"the batch of {len(completions)} completions, though on none of them alone"


def _example(i: int, columns: Mapping[str, Sequence[Any]]) -> str:
    return f"example '{columns['id'][i]}'" if "id" in columns else f"completion {i}"


def _one_line(value: object, limit: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
