"""Answers read out of completions, and the weighted sum over reward functions."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards.answers import (
    accuracy,
    extract_answer,
    format_reward,
    format_tags,
    normalise,
    same_answer,
)
from perl.rewards.scorer import Scorer, load_reward, rollout_columns
from perl.types import Example, Rollout, UserError, Variant

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{B}", "B"),
        (r"</think> \boxed{ B }", "B"),
        (r"\boxed {B}", "B"),
        (r"\boxed{A} no, \boxed{C}.", "C"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", ""),
        (r"\boxed{A} \boxed{B", None),
        (r"\boxed{\text{A}", None),
        ("boxed{B}", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@given(st.text(alphabet="{}\\boxed ab", max_size=60))
def test_extract_answer_survives_any_text(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer in text
    normalise(answer or "")


@pytest.mark.parametrize(
    ("given_", "gold"),
    [
        ("b", "B"),
        ("(B)", "B"),
        ("(b).", "B"),
        ("B.", "(B)"),
        ("Image 2", "2"),
        ("image2", "Image 2"),
        ("option B", "b"),
        (r"\text{B}", "B"),
        ("$B$", "B"),
        ("a  Red   car.", "A red car"),
        ("0.50", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac{1}{2}", "-.5"),
        ("2.0", "2"),
        ("+3", "3"),
        ("\u22123", "-3"),
        ("1,234", "1234"),
        ("007", "7"),
        ("A,C", "(A), (C)"),
        ("(A, C)", "A, C"),
        ("[1, 3, 2]", "1,3,2"),
        ("B", r"\boxed{B}"),
    ],
)
def test_same_answers(given_: str, gold: str) -> None:
    assert same_answer(given_, gold)


@pytest.mark.parametrize(
    ("given_", "gold"),
    [
        (None, "B"),
        ("", "B"),
        ("A", "B"),
        ("BB", "B"),
        ("images", "s"),
        ("C, A", "A, C"),
        ("2", "3"),
        ("1/0", "1"),
        ("1/3", "0.333"),
        ("12", "1,2"),
        ("1e3", "1000"),
        ("9" * 100_000, "9" * 99_999),
    ],
)
def test_different_answers(given_: str | None, gold: str) -> None:
    assert not same_answer(given_, gold)


def test_accuracy_scores_each_completion() -> None:
    texts = [r"\boxed{B}", r"\boxed{A}", "B", r"\boxed{B}"]
    assert accuracy(["q"] * 4, texts, ["B", "B", "B", None]) == [1.0, 0.0, 0.0, None]


def test_accuracy_of_tags_and_of_sets() -> None:
    texts = ["<answer>A</answer> <answer> (c) and A. </answer>", r"<answer>C, A \boxed{A, C}"]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2) == [0, 1]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True) == [0, 0]
    assert accuracy(["q"] * 2, texts, ["A, C"] * 2, tags=True, unordered=True) == [1, 0]
    assert accuracy(["q"], [r"\boxed{A}"], ["A, C"], unordered=True) == [0]
    assert accuracy(["q"], [r"\boxed{2; 1}"], ["1,2"], unordered=True) == [1]


@pytest.mark.parametrize(
    ("text", "tags", "score"),
    [
        ("<think>x</think><answer>B</answer>", ("think", "answer"), 1),
        ("\n<think>\nx</think>\n <answer>B</answer>\n", ("think", "answer"), 1),
        ("<think></think><answer></answer>", ("think", "answer"), 1),
        ("<think>x</think> so <answer>B</answer>", ("think", "answer"), 0),
        ("<think>x</think><answer>B</answer> !", ("think", "answer"), 0),
        ("<think>x</think><answer>B</answer><answer>C</answer>", ("think", "answer"), 0),
        ("<think><think>x</think><answer>B</answer>", ("think", "answer"), 0),
        ("<answer>B</answer><think>x</think>", ("think", "answer"), 0),
        ("<think>x</think><answer>B", ("think", "answer"), 0),
        ("<think>x</think><index>1</index><answer>B</answer>", ("think", "answer"), 0),
        ("<think>x</think><index>1</index><answer>B</answer>", ("think", "index", "answer"), 1),
        ("", ("think", "answer"), 0),
    ],
)
def test_format_of_tags(text: str, tags: tuple[str, ...], score: float) -> None:
    assert format_tags(["q"], [text], tags=tags) == [score]


@given(st.lists(st.sampled_from(["<think>", "</think>", r"\boxed{", "}", "x", "\n"]), max_size=8))
def test_format_is_the_expression(parts: list[str]) -> None:
    text = "".join(parts)
    assert format_reward(["q"], [text]) == [float(bool(FORMAT.fullmatch(text)))]


def test_format_takes_no_time_over_a_looping_model() -> None:
    start = time.perf_counter()
    looping = "<think>" + "</think>" * 20_000 + r"\boxed{" * 20_000
    assert format_reward(["q"], [looping]) == [0.0]
    assert time.perf_counter() - start < 1


def test_scorer_weights_accuracy_and_format() -> None:
    texts = [r"<think> x </think> \boxed{ B }", r"\boxed{B}", "<think> x </think> \\boxed{A}", "B"]
    totals, parts = Scorer().score(["q"] * 4, texts, {"answer": ["B"] * 4, "task": ["which"] * 4})
    assert totals.dtype == np.float64
    np.testing.assert_allclose(totals, [1.0, 0.9, 0.1, 0.0])
    np.testing.assert_array_equal(parts["accuracy"], [1, 1, 0, 0])
    np.testing.assert_array_equal(parts["format"], [1, 0, 1, 0])


def test_unscorable_is_nan_but_not_for_a_watched_function() -> None:
    def some(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [None, float("nan"), 1]

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [2.0, None, None]

    totals, parts = Scorer((some, watched), (0.5, 0.0)).score(["q"] * 3, ["a"] * 3, {})
    np.testing.assert_array_equal(totals, [np.nan, np.nan, 0.5])
    np.testing.assert_array_equal(parts["watched"], [2, np.nan, np.nan])


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
    assert set(columns) == {"answer", "id", "task", "goal", "order", "completion_length"}
    assert columns["order"] == [[1, 0], [0, 1]] and columns["completion_length"] == [1, 1]


def test_functions_load_from_modules_and_files(tmp_path: Path, monkeypatch: Any) -> None:
    source = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Score:\n    value: float = 0.25\n"
        "def quarter(prompts, completions, **columns):\n    return [Score().value] * len(completions)\n"
        "def half(prompts, completions, **columns):\n    return [0.5] * len(completions)\n"
        "def scaled(completions, scale, **columns):\n    return [scale * len(c) for c in completions]\n"
        "three = 3\n"
    )
    file = tmp_path / "my_rewards.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = Scorer((f"{file}:quarter", "my_rewards:half"), (1.0, 1.0))
    assert scorer.names == ("quarter", "half")
    np.testing.assert_array_equal(scorer.score(["q"], ["a"], {})[0], [0.75])
    alike = Scorer((f"{file}:half", "my_rewards:half"), (1.0, 1.0))
    assert alike.names == (f"{file}:half", "my_rewards:half")
    options = Scorer((f"{file}:scaled(scale=2)", f"{file}:quarter"), (1.0, 0.0))
    assert options.names == ("scaled", "quarter")
    np.testing.assert_array_equal(options.score(["q"], ["abc"], {"scale": [9]})[0], [6])
    with pytest.raises(UserError, match=r"has no 'quarters' \(did you mean 'quarter'\?\)"):
        load_reward(f"{file}:quarters")
    with pytest.raises(UserError, match="'three' is a int, not a function"):
        load_reward("my_rewards:three")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            "acuracy",
            r"unknown reward function 'acuracy' \(did you mean 'accuracy'\?\); known are accuracy, format",
        ),
        ("box_iou(threshold=0.5", "cannot be read; write a name"),
        ("box_iou(0.5)", r"its options cannot be read \(options are written name=value\)"),
        ("box_iou(**{'threshold': 1})", "written name=value, without"),
        ("box_iou(threshold=)", "its options cannot be read"),
        ("box_iou(threshold=open('x'))", "its options cannot be read"),
        ("box_iou(threshold=1)(2)", "its options cannot be read"),
        (
            "box_iou(threshhold=1)",
            r"no option 'threshhold' \(did you mean 'threshold'\?\); its options are",
        ),
        ("format(x=1)", "has no option 'x'; it takes none"),
        ("frame_index", "needs the option count"),
        ("{fine}:f(scale=2, size=3)", "has no option 'size'; its options are scale"),
        ("{fine}:f(prompts=2)", "has no option 'prompts'"),
        ("zzz", "unknown reward function 'zzz'; known are"),
        ("no_such_module:f", "No module named 'no_such_module'; install it"),
        ("missing.py:f", "there is no file .*missing.py; correct the path"),
        ("{broken}:f", "broken.py raised SyntaxError"),
        ("{failing}:f", "failing.py raised RuntimeError: at import"),
    ],
)
def test_functions_that_do_not_load(tmp_path: Path, spec: str, match: str) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("raise RuntimeError('at\\nimport')\n")
    (tmp_path / "fine.py").write_text("def f(prompts, completions, scale=1, **columns): ...\n")
    spec = spec.replace("{fine}", str(tmp_path / "fine.py"))
    spec = spec.replace("{broken}", str(tmp_path / "broken.py"))
    spec = spec.replace("{failing}", str(tmp_path / "failing.py"))
    with pytest.raises(UserError, match=match):
        load_reward(spec)


@pytest.mark.parametrize(
    ("functions", "weights", "match"),
    [
        ((), (), "functions is empty"),
        (("accuracy",), (0.9, 0.1), "2 numbers for 1 functions"),
        (("accuracy",), (float("nan"),), "must be finite"),
        (("accuracy", "accuracy"), (1.0, 1.0), "one function twice"),
        (("ordering(kendall=True)", "ordering(kendall=True)"), (1.0, 1.0), "one function twice"),
    ],
)
def test_bad_settings(functions: Any, weights: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Scorer(functions, weights)


def test_options_tell_functions_apart_where_names_do_not() -> None:
    scorer = Scorer(("ordering", "ordering(kendall=True)", "repetition(n=2)"), (0.5, 0.5, -1.0))
    assert scorer.names == ("ordering", "ordering(kendall=True)", "repetition")
    totals, _ = scorer.score(["q"], ["C, A, B"], {"answer": ["A, B, C"], "n": [7]})
    np.testing.assert_allclose(totals, [0.5 * (1 - 1 / 3) / 2])
