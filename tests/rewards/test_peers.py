"""Functions written for verl and for EasyR1 run as they are, and the parts of their scores are kept."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from perl.rewards.scorer import Scorer, load_reward
from perl.types import Example, UserError
from tests.messages import refused

COLUMNS = {
    "answer": ["A", "B"],
    "ground_truth": ["A", "B"],
    "task": ["zoo", "zoo"],
    "extra_info": [{"index": 1}, None],
    "completion_length": [3, 5],
    "level": [1, 2],
}


def verl(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> float:
    assert data_source == "zoo" and extra_info in ({"index": 1}, {})
    return float(solution_str == ground_truth)


async def verl_later(
    data_source: Any, solution_str: Any, ground_truth: Any, **more: Any
) -> dict[str, Any]:
    await asyncio.sleep(0)
    assert not more
    right = solution_str == ground_truth
    return {"score": float(right), "acc": right, "pred": solution_str}


def verl_batch(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> Any:
    assert data_sources == ["zoo", "zoo"] and extra_infos == [{"index": 1}, {}]
    return [float(a == b) for a, b in zip(solution_strs, ground_truths, strict=True)]


def easyr1(reward_inputs: list[dict[str, Any]], format_weight: float = 0.5) -> list[dict[str, Any]]:
    return [easyr1_one(own, format_weight) for own in reward_inputs]


def easyr1_one(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, Any]:
    right = float(reward_input["response"] == reward_input["ground_truth"])
    length = float(reward_input["response_length"])
    overall = (1 - format_weight) * right + format_weight * length
    return {"overall": overall, "accuracy": right, "format": length}


def easyr1_old(predicts: list[str], ground_truths: list[str]) -> list[dict[str, float]]:
    return [{"overall": float(a == b)} for a, b in zip(predicts, ground_truths, strict=True)]


def score(function: Callable[..., Any], *texts: str) -> tuple[list[float], dict[str, list[float]]]:
    totals, parts = Scorer((function,), (2.0,)).score(["q"] * 2, texts, COLUMNS)
    del parts[function.__name__]
    return totals.tolist(), {name: own.tolist() for name, own in parts.items()}


@pytest.mark.parametrize(
    ("function", "totals", "parts"),
    [
        (verl, [2, 0], {}),
        (verl_later, [2, 0], {"acc": [1, 0]}),
        (verl_batch, [2, 0], {}),
        (easyr1, [4, 5], {"accuracy": [1, 0], "format": [3, 5]}),
        (easyr1_one, [4, 5], {"accuracy": [1, 0], "format": [3, 5]}),
        (easyr1_old, [2, 0], {}),
    ],
)
def test_each_form_and_its_parts(
    function: Callable[..., Any], totals: list[float], parts: dict[str, list[float]]
) -> None:
    named = {f"{function.__name__}/{part}": values for part, values in parts.items()}
    assert score(function, "A", "A") == (totals, named)


@pytest.mark.parametrize("function", [verl, easyr1])
def test_they_need_an_answer(function: Callable[..., Any]) -> None:
    Scorer((function,)).check_answer(Example("q", (), "Which?", "A"))
    with refused(f"'{function.__name__}'", "answer", "'q'", "data.map"):
        Scorer((function,)).check_answer(Example("q", (), "Which?", ""))
    # An object, which is no answer, is none that is missing.
    held = Example("q", (), "Which?", "", origin={"answer": ("answer", {"box": 17})})
    with refused("{'box': 17}"):
        Scorer((function,)).check_answer(held)


def test_information_may_be_of_any_type() -> None:
    def compute_score(solution_str: str, extra_info: Any) -> float:
        return float(extra_info == '{"index": 1}')

    totals, _ = Scorer((compute_score,)).score(["q"], ["a"], {"extra_info": ['{"index": 1}']})
    assert totals.tolist() == [1]


def test_options_are_those_that_are_not_given() -> None:
    spec = f"{__name__}:easyr1(format_weight=0.0)"
    assert Scorer((spec,)).score(["q"] * 2, ["A", "A"], COLUMNS)[0].tolist() == [1, 0]
    with refused(f"'{__name__}:verl(extra_info=1)'", "option 'extra_info'"):
        load_reward(f"{__name__}:verl(extra_info=1)")


def test_one_that_fails_costs_its_own_completion() -> None:
    def compute_score(solution_str: str, ground_truth: str) -> dict[str, Any]:
        called.append(solution_str)
        if solution_str == "told":
            raise UserError("set reward.timeout")
        return {"score": {"A": 1.0, "?": None}[solution_str], "acc": 1.0}

    called: list[str] = []
    scorer = Scorer((compute_score,))
    totals, parts = scorer.score(["q"] * 3, ["A", "bad", "?"], {})
    np.testing.assert_array_equal(totals, [1, math.nan, math.nan])
    np.testing.assert_array_equal(parts["compute_score/acc"], [1, math.nan, 1])
    assert scorer.faults == {"compute_score": 1} and called == ["A", "bad", "?"]
    with refused("reward.timeout"):
        scorer.score(["q"] * 2, ["A", "told"], {})
    with refused("'compute_score'", "KeyError: 'bad'"):
        scorer.score(["q"] * 2, ["bad", "bad"], {})


def test_dicts_of_any_function_need_a_score() -> None:
    def parts(completions: Any) -> list[Any]:
        return [{"score": 1, "overall": 7, "n": 2}, {"overall": 3, "n": "x"}, {"n": 1}]

    scorer = Scorer((parts,))
    totals, found = scorer.score(["q"] * 3, ["a"] * 3, {})
    np.testing.assert_array_equal(totals, [1, 3, math.nan])
    assert scorer.faults == {"parts": 1}
    np.testing.assert_array_equal(found["parts/overall"], [7, math.nan, math.nan])
    np.testing.assert_array_equal(found["parts/n"], [2, math.nan, 1])
