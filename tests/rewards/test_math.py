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
from perl.rewards.scorer import Scorer
from tests.messages import refused
from tests.rewards.scoring import score, totals

_NOISY = """
import os, time
def parse(text, **options):
    return [text]
def verify(gold, given, **options):
    print("a stray line")
    os.write(1, b"another\\n")
    time.sleep("slow" in given[0] and 1)
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
    scorer, scores = totals("math(seconds=0.5)", texts, answer=["4"] * 2)
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


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("reward math", "math-verify", "'perl-rl[rewards]'"):
        Scorer(("math",), (1.0,))
