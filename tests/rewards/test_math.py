"""Answers that are mathematics, and what the process that compares them may do wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from perl.rewards import math as reward_math
from perl.rewards.math import equal_values
from perl.rewards.scorer import Scorer
from tests.messages import refused, tells
from tests.rewards.scoring import score, totals

_NOISY = """
import os, time
def parse(text, **options):
    return [] if "unread" in text else [text]
def verify(gold, given, **options):
    print("a stray line")
    os.write(1, b"another\\n")
    time.sleep("slow" in given[0] and 1)
    "exit" in given[0] and os._exit(3)
    return gold == given
"""


def test_math() -> None:
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{2}{4}}", "<answer>0.5</answer>", r"so $\frac12$", r"\boxed{2}", "((("]
    assert score("math", texts, answer="1/2") == [1, 1, 1, 0, 0]
    assert score("math", r"\boxed{x = 3}", answer="3") == 1
    assert score("math", r"\boxed{\{2, 1\}}", answer=r"\{1, 2\}") == 1


def test_math_that_takes_too_long_is_one_fault() -> None:
    """A power that Python computes in one operation, which no thread can be freed from."""
    pytest.importorskip("math_verify")
    texts = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{4}"]
    start = time.perf_counter()
    scorer, scores = totals("math(seconds=1.5)", texts, answer=["4"] * 2)
    np.testing.assert_array_equal(scores, [np.nan, 1])
    assert scorer.faults == {"math": 1} and time.perf_counter() - start < 10


@pytest.fixture
def noisy_math(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of math-verify a package that prints, compares texts, and takes 1 s over "slow"."""
    (tmp_path / "math_verify.py").write_text(_NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reward_math, "_WORKER", reward_math._Worker())  # Not one that others use.


@pytest.mark.usefixtures("noisy_math")
def test_math_is_not_misled_by_what_its_package_prints_or_an_interrupt_leaves() -> None:
    assert totals("math", ["1", "2", "3", "4"], answer=["1", "0", "3", "0"])[1] == [1, 0, 1, 0]
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        totals("math", ["slow"], answer=["slow"])
    assert totals("math", ["1", "2", "3"], answer=["0", "2", "0"])[1] == [0, 1, 0]


@pytest.mark.usefixtures("noisy_math")
@pytest.mark.parametrize(
    ("text", "gold", "names"),
    [
        ("slow", "slow", ["TimeoutError", "0.3 s"]),
        ("exit", "1", ["RuntimeError", "code 3"]),
        ("1", "unread", ["ValueError", "'unread'"]),
    ],
)
def test_a_comparison_that_fails_is_a_fault_of_one(
    text: str, gold: str, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"answer": ["1", gold, "2"], "id": ["q1", "q2", "q3"]}
    np.testing.assert_array_equal(
        totals("math(seconds=0.3)", ["1", text, "2"], **columns)[1], [1, np.nan, 1]
    )
    tells(caplog.text, "'math'", "example 'q2'", *names)


def test_values_are_compared_to_so_many_digits() -> None:
    pytest.importorskip("math_verify")
    third = r"\frac{1}{3}"
    assert equal_values(third, "0.3333", 4) and equal_values("0.3333", third, 3)
    assert not equal_values(third, "0.333", 4)
    assert equal_values("sqrt(2)", r"$\sqrt{2}$", 5)
    assert not equal_values("4", "((", 2) and not equal_values("((", "4", 2)


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("reward math", "math-verify", f"'{Path(__file__).parents[2]}[rewards]'"):
        Scorer(("math",), (1.0,))
