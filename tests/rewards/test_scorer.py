"""The weighted sum over reward functions, and the columns that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perl.rewards.columns import rollout_columns
from perl.rewards.scorer import Scorer
from perl.types import Example, Rollout, Variant
from tests.messages import refused


def test_scorer_weights_accuracy_and_format() -> None:
    texts = [r"<think> x </think> \boxed{ B }", r"\boxed{B}", "<think> x </think> \\boxed{A}", "B"]
    totals, parts = Scorer().score(["q"] * 4, texts, {"answer": ["B"] * 4, "task": ["which"] * 4})
    assert totals.dtype == np.float64
    np.testing.assert_allclose(totals, [1.0, 0.9, 0.1, 0.0])
    np.testing.assert_array_equal(parts["accuracy"], [1, 1, 0, 0])
    np.testing.assert_array_equal(parts["format"], [1, 0, 1, 0])


def test_columns_reach_the_function_in_its_order() -> None:
    def length(prompts: Any, completions: Any, answer: Any, goal: Any, **columns: Any) -> Any:
        assert prompts == ["A <image> which ?"] * 2 and columns["task"] == ["which", "which"]
        assert answer == ["A", "B"] and columns["id"] == ["q", "q"]
        return np.array([len(text) - want for text, want in zip(completions, goal, strict=True)])

    example = Example(
        "q", (), "A <image> which ?", "A", task="which", extra={"goal": 2, "prompts": 0}
    )
    rollouts = [
        Rollout(Variant(example, order, (), answer), None, np.zeros(1), np.zeros(1), text, True)  # type: ignore[arg-type]
        for answer, order, text in (("A", (1, 0), "four"), ("B", (0, 1), "no"))
    ]
    totals, _ = Scorer((length,), (2.0,)).score_rollouts(rollouts)
    np.testing.assert_array_equal(totals, [4, 0])
    columns = rollout_columns(rollouts)[2]
    ours = {"answer", "id", "task", "order", "images", "completion_length", "completion_ids"}
    assert set(columns) == {*ours, "goal", "ground_truth", "answer_form"}
    assert columns["order"] == [[1, 0], [0, 1]] and columns["completion_length"] == [1, 1]


def test_a_function_that_changes_its_lists_changes_nobody_elses() -> None:
    def sorts(completions: Any, answer: Any, **columns: Any) -> Any:
        completions.sort()
        answer.clear()
        return [0.0] * len(completions)

    texts = [r"\boxed{B}", r"\boxed{A}"]
    totals, _ = Scorer((sorts, "accuracy"), (1.0, 2.0)).score(
        ["q"] * 2, texts, {"answer": ["B", "A"]}
    )
    np.testing.assert_array_equal(totals, [2, 2])


@pytest.mark.parametrize(
    ("functions", "weights", "names"),
    [
        ((), (), ["reward.functions", "accuracy"]),
        (
            ("accuracy",),
            (0.9, 0.1),
            ["reward.weights = [0.9, 0.1]", "1 reward.functions", "accuracy"],
        ),
        # The name that is misspelt, not the number of weights.
        (("acuracy",), (0.9, 0.1), ["'acuracy'", "'accuracy'?"]),
        (("accuracy",), (float("nan"),), ["reward.weights", "nan"]),
        (("accuracy", "accuracy"), (1.0, 1.0), ["accuracy", "twice"]),
        (("ordering(kendall=True)",) * 2, (1.0, 1.0), ["ordering(kendall=True)", "twice"]),
    ],
)
def test_bad_settings(functions: Any, weights: Any, names: list[str]) -> None:
    with refused(*names):
        Scorer(functions, weights)


@pytest.mark.parametrize(
    ("functions", "weights"),
    [
        (("accuracy", "format"), [0.9, 0.1]),
        (("accuracy",), [1.0]),
        (("format", "accuracy"), [1.0, 1.0]),
        (("accuracy", "choice", "format"), [1.0] * 3),
    ],
)
def test_weights_that_are_left_out(functions: Any, weights: list[float]) -> None:
    assert list(Scorer(functions).weights.values()) == weights


def test_options_tell_functions_apart_where_names_do_not() -> None:
    scorer = Scorer(("ordering", "ordering(kendall=True)", "repetition(n=2)"), (0.5, 0.5, -1.0))
    assert scorer.names == ("ordering", "ordering(kendall=True)", "repetition")
    totals, _ = scorer.score(["q"], ["C, A, B"], {"answer": ["A, B, C"], "n": [7]})
    np.testing.assert_allclose(totals, [0.5 * (1 - 1 / 3) / 2])
