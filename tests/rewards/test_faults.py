"""Reward functions that raise, hang or return nonsense cost single rollouts their score, not the run."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perl.rewards import calls
from perl.rewards.scorer import Scorer
from perl.types import UserError
from tests.chat_server import Model
from tests.messages import refused, tells
from tests.rewards.scoring import totals

NAN = math.nan
TEXTS, IDS = ["ok", "bad", "fine"], ["q1", "q2", "q3"]


def score(function: Callable[..., Any], timeout: float = 60.0) -> tuple[Scorer, list[float]]:
    return totals(function, TEXTS, timeout, id=IDS)


def returns(values: Any, name: str = "constant") -> Callable[..., Any]:
    """A reward function that gives `values`, or raises them."""

    def function(**columns: Any) -> Any:
        if isinstance(values, Exception):
            raise values
        return values

    function.__name__ = name
    return function


def raises_on_bad(completions: Any, **columns: Any) -> list[float]:
    return [1 / (text != "bad") for text in completions]


async def raises_on_bad_later(completions: Any, **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return raises_on_bad(completions)


def exits_on_bad(completions: Any, **columns: Any) -> list[float]:
    return [sys.exit(0) if text == "bad" else 1.0 for text in completions]


def hangs_on_bad(completions: Any, **columns: Any) -> list[float]:
    while "bad" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


async def hangs_on_bad_later(completions: Any, **columns: Any) -> list[float]:
    if "bad" in completions:
        await asyncio.Event().wait()
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "timeout", "names"),
    [
        (raises_on_bad, 60.0, ["ZeroDivisionError: division"]),
        (raises_on_bad, 0.0, ["ZeroDivisionError: division"]),
        (raises_on_bad_later, 60.0, ["ZeroDivisionError: division"]),
        (raises_on_bad_later, 0.0, ["ZeroDivisionError: division"]),
        (exits_on_bad, 60.0, ["SystemExit: 0"]),
        (hangs_on_bad, 0.4, ["reward.timeout = 0.4"]),
        (hangs_on_bad_later, 0.4, ["reward.timeout = 0.4"]),
        (returns([1, NAN, 1]), 60.0, ["nan"]),
        (returns([1, -math.inf, 1]), 60.0, ["-inf"]),
        (returns([1, "x", 1]), 60.0, ["'x'"]),
        (returns([1, [2, 3], 1]), 60.0, ["[2, 3]"]),
        (returns([1, 10**400, 1]), 60.0, ["1" + 196 * "0" + "..."]),
        (returns([1, ValueError("no"), 1]), 60.0, ["ValueError: no"]),
    ],
)
def test_one_rollout_loses_its_score(
    function: Callable[..., Any], timeout: float, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    scorer, scores = score(function, timeout)
    np.testing.assert_array_equal(scores, [1, NAN, 1])
    name = function.__name__
    assert scorer.faults == {name: 1}
    tells(caplog.text, f"'{name}'", "example 'q2'", *names)
    scorer.score(["q"] * 3, TEXTS, {"id": IDS})
    assert len(caplog.records) == 1 and scorer.faults == {name: 2}
    scorer.reset()
    assert scorer.faults == {name: 0}


def test_none_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    scorer, scores = score(returns([None, None, None]))
    assert np.isnan(scores).all() and scorer.faults == {"constant": 0} and not caplog.records


def test_what_is_called_again_alone() -> None:
    """A call with one completion is not made twice; one value must come back alone; a place without ids is counted."""
    called = []

    def fails(completions: Any, **columns: Any) -> list[float]:
        called.append(list(completions))
        return [0.0, 0.0] if completions == ["bad"] else [1.0] if completions == ["ok"] else 1 / 0

    with refused("'fails'", "ZeroDivisionError: division", "completion 0"):
        totals(fails, ["worse"])
    assert called == [["worse"]]
    scorer, scores = totals(fails, ["ok", "bad", "worse"])
    np.testing.assert_array_equal(scores, [1, NAN, NAN])
    assert called[1:] == [["ok", "bad", "worse"], ["ok"], ["bad"], ["worse"]]
    assert scorer.faults == {"fails": 2}


def test_async_calls_alone_are_made_eight_at_a_time() -> None:
    running, most = set[str](), 0

    async def fails_together(completions: Any, **columns: Any) -> list[float]:
        nonlocal most
        if len(completions) > 1:
            raise RuntimeError
        running.update(completions)
        most = max(most, len(running))
        await asyncio.sleep(0.05)
        running.difference_update(completions)
        return [1.0]

    assert totals(fails_together, [str(i) for i in range(20)])[1] == [1] * 20
    assert most == 8


def test_what_fails_only_together_is_scored_alone(caplog: pytest.LogCaptureFixture) -> None:
    def too_many(completions: Any, **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too\nmany")
        return [float(len(completions[0]))]

    scorer, scores = score(too_many)
    assert scores == [2, 3, 4] and scorer.faults == {"too_many": 0}
    tells(caplog.text, "'too_many'", "RuntimeError: too many", "3 completions")


@pytest.mark.parametrize("timeout", [60.0, 0.0])
def test_a_function_that_keeps_a_state_is_never_called_beside_itself(timeout: float) -> None:
    class Stateful:
        current = ""

        def __call__(self, completions: Any, **columns: Any) -> list[float]:
            if len(completions) > 1 and "bad" in completions:
                raise ValueError
            self.current = completions[0]
            time.sleep(0.001)
            if self.current == "bad":
                raise ValueError
            return [float(self.current)]

    texts = ["bad", *(str(i) for i in range(40))]
    np.testing.assert_array_equal(totals(Stateful(), texts, timeout)[1], [NAN, *range(40)])


def test_one_that_hangs_alone_leaves_time_for_the_rest() -> None:
    start = time.perf_counter()
    scores = totals(hangs_on_bad, ["bad", "ok", "bad", "ok", "ok"], 0.8)[1]
    np.testing.assert_array_equal(scores, [NAN, 1, NAN, 1, 1])
    assert time.perf_counter() - start < 2 * 0.8 + 1


def test_each_call_alone_may_use_half_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    class Alone:
        """One call, which takes as many seconds as its function says."""

        def __init__(self, functions: Any, limit: float, within: float) -> None:
            self.spent = min(functions[0](), within)

        def results(self) -> list[float]:
            nonlocal now
            now += self.spent
            return [self.spent]

    monkeypatch.setattr(calls, "Calls", Alone)
    monkeypatch.setattr(calls, "time", SimpleNamespace(monotonic=lambda: now))
    spent = calls.call_each([lambda: 99, lambda: 1, lambda: 99, lambda: 0], 16, at_once=False)
    assert spent == [8, 1, 3.5, 0]


@pytest.mark.parametrize("name", ["math", "judge", "caption_facts"])
def test_what_asks_another_process_has_limits_of_its_own(
    name: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker:
        def ask(self, *asked: Any) -> bool:
            time.sleep(0.2)
            return True

    pytest.importorskip("math_verify")
    monkeypatch.setattr("perl.rewards.math._WORKER", Worker())
    model.answer = lambda text: time.sleep(0.2) or ("yes" if name == "judge" else "1")
    assert totals(name, ["x + 1"], 0.05, answer=["1 + x"], facts=["x"])[1] == [1]


def test_none_leaves_a_function_out_and_a_fault_does_not() -> None:
    first = returns([None, 1, None, NAN, None, ValueError("x"), 1], "first")
    second = returns([2, None, None, 2, NAN, None, 2], "second")
    watched = returns([NAN, 5, None, 5, 5, 5, 5], "watched")
    scorer = Scorer((first, second, watched), (0.5, 0.25, 0.0))
    scores, parts = scorer.score(["q"] * 7, ["a"] * 7, {})
    np.testing.assert_array_equal(scores, [0.5, 0.5, NAN, NAN, NAN, NAN, 1])
    np.testing.assert_array_equal(parts["first"], [NAN, 1, NAN, NAN, NAN, NAN, 1])
    np.testing.assert_array_equal(parts["watched"], [NAN, 5, NAN, 5, 5, 5, 5])
    assert scorer.faults == {"first": 2, "second": 1, "watched": 1}


@given(
    st.lists(st.tuples(*[st.none() | st.floats(-5, 5)] * 2), min_size=1, max_size=6),
    st.tuples(*[st.sampled_from([-1.0, 0.5, 2.0])] * 2),
)
def test_totals_are_the_weighted_sum_of_what_is_not_none(
    rows: list[tuple[float | None, float | None]], weights: tuple[float, float]
) -> None:
    first, second = zip(*rows, strict=True)
    functions = (returns(first, "a"), returns(second, "b"))
    scores, _ = Scorer(functions, weights, 0).score(["q"] * len(rows), ["x"] * len(rows), {})
    for total, row in zip(scores, rows, strict=True):
        given_ = [w * v for w, v in zip(weights, row, strict=True) if v is not None]
        assert total == pytest.approx(sum(given_)) if given_ else math.isnan(total)


@pytest.mark.parametrize(
    "values", [(1, 2, 3), np.array([1, 2, 3]), range(1, 4), torch.tensor([1.0, 2, 3])]
)
def test_lists_in_other_forms(values: Any) -> None:
    assert score(returns(values))[1] == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (ValueError("a\nb"), ["ValueError: a b", "example 'q1'"]),
        (["x", "x", NAN], ["'x'", "example 'q1'", "None"]),
        ([1.0], ["1 values", "3 completions", "None"]),
        (None, ["NoneType", "3 completions"]),
        ("abc", ["str", "3 completions"]),
        (b"abc", ["bytes", "3 completions"]),
        ({1: "a", 2: "b", 3: "c"}, ["dict", "3 completions"]),
        ({1.0, 2.0, 3.0}, ["set", "3 completions"]),
        (np.ones((3, 1)), ["ndarray", "3 completions"]),
        (np.float64(3), ["float64", "3 completions"]),
    ],
)
def test_a_function_that_fails_on_all_is_an_error(values: Any, names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        score(returns(values))
    assert "\n" not in str(caught.value)
    tells(caught.value, "'constant'", *names)


def test_an_error_of_the_users_is_passed_on() -> None:
    with pytest.raises(UserError, match=r"^switch it on$"):
        score(returns(UserError("switch it on")))


def test_a_function_that_always_hangs_takes_two_limits() -> None:
    def hangs(**columns: Any) -> None:
        threading.Event().wait(30)

    start = time.perf_counter()
    with refused("'hangs'", "reward.timeout = 0.2"):
        score(hangs, 0.2)
    assert time.perf_counter() - start < 2


def test_a_python_loop_past_the_limit_is_stopped() -> None:
    before = set(threading.enumerate())
    score(hangs_on_bad, 0.1)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_async_functions_wait_at_the_same_time() -> None:
    """Objects with an async call too, and while a function that is not async is called."""
    running, most = 0, []

    async def waits(completions: Any, **columns: Any) -> list[float]:
        nonlocal running
        running += 1
        await asyncio.sleep(0.2)
        most.append(running)
        return [1.0] * len(completions)

    class Waits:
        async def __call__(self, **columns: Any) -> list[float]:
            return await waits(**columns)

    async def also_waits(**columns: Any) -> list[float]:
        return await waits(**columns)

    scorer = Scorer([returns([2.0]), waits, also_waits, Waits()], [1.0] * 4)
    assert scorer.score(["q"], ["a"], {})[0].tolist() == [5]
    assert most == [3, 3, 3]


_HANGS_FOR_GOOD = """
import threading
from perl.rewards.scorer import Scorer
def f(completions, **columns):
    'bad' in completions and threading.Lock().acquire() and threading.Event().wait()
    return [1.0] * len(completions)
print(Scorer((f,), (1.0,), 0.2).score(['q'] * 2, ['ok', 'bad'], {})[0].tolist())
"""


def test_a_thread_that_hangs_for_good_does_not_keep_python_from_ending() -> None:
    command, root = [sys.executable, "-c", _HANGS_FOR_GOOD], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.strip() == "[1.0, nan]", done.stderr
