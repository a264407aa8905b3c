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
    return gold[0][-2] == given[0][-2]
"""


def test_math() -> None:
    pytest.importorskip("math_verify")
    texts = [r"\boxed{\frac{2}{4}}", "<answer>0.5</answer>", r"so $\frac12$", r"\boxed{2}", "((("]
    assert score("math", texts, answer="1/2") == [1, 1, 1, 0, 0]
    assert score("math", r"\boxed{x = 3}", answer="3") == 1
    assert score("math", r"\boxed{\{2, 1\}}", answer=r"\{1, 2\}") == 1
    assert score("math", "The answer is $x = 3$.", answer="3") == 1


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("2,1,3", "1,2,3", 0), ("1,2,3", "1,2,3", 1), ("5 m", "5 cm", 0), ("5", "5 cm", 1), ("2 1/2", r"\frac{5}{2}", 1),
        ("3/2", "2 1/2", 0), ("10.5", r"2\frac{1}{2}", 0), ("[3,4]", "(3,4)", 0), ("50", r"50\%", 0), (r"\frac{1}{2}", r"50\%", 1),
        (r"3\sqrt{2}", r"\sqrt{18}", 1), (r"3\sqrt{2}\text{ m}", r"\sqrt{18}\text{ cm}", 0), (r"3\sqrt{2}", r"\sqrt{18}\text{ cm}", 1),
        (r"(\sqrt{4}, 1)", "(2, 1)", 1), (r"(1, \sqrt{4})", "(2, 1)", 0), (r"\sqrt{9}, 1", "1, 3", 1), (r"\sqrt{4}, 1", "1, 2", 0),
        (r"[\sqrt{4}, 3)", "[2, 3)", 1), (r"[\sqrt{4}, 3]", "[2, 3)", 0), (r"(-\infty, \sqrt{4})\cup(3,4)", r"(3,4)\cup(-\infty,2)", 1),
        ("0.3333333", r"\frac{1}{3}", 1), ("0.333", r"\frac{1}{3}", 0), ("(x+1)^2", "x^2+2x+1", 1), ("B", "(b)", 1), ("A", "B", 0),
        ("1,234", "1234", 1), (r"\$45.50", "$45.50", 1), ("x=2", "2", 1), (r"\{B\}", "B", 1), ("e", "2.718", 0),
        ("True", "true", 1), ("A red car.", "a red car", 1), ("felt", "left", 0), ("a erd car", "a red car", 0), ("2 -1/2", "2 1/2", 0), (r"\sqrt{6.25}", "2 1/2", 1), ("5 pixels", "5 cm", 0), ("5 cm", "5 apples", 0), ("5 apples", "5 pears", 0), ("2xy", "2yx", 1), ("I am quite sure of $5$ here", "5", 0), ("N 60° E", "60°", 0), ("on", "no", 0), ("BA", "AB", 0), ("A or C", "A, C", 0), ("C or A", "A, C", 0), ("3 or 1", "1, 3", 0), ("1 or 2", "1, 2", 0), (r"1 \text{ or } 2", "1, 2", 0),
        ("x=1 or x=2", "x=1, x=2", 1), ("1=2", "2", 0), ("2=1", "2", 0), ("1+1=2", "2", 1), (r"\frac{4}{2} = 2", "2", 1), ("1+1=3", "3", 0), ("x = 1 = 2", "2", 0), (r"\alpha = 2", "2", 1),
        ("-2", "10-12", 0), ("TRUE", "True", 1), ("True.", "True", 1), ("YES", "yes", 1), ("RED.", "red", 1), ("Image 3", "the third image", 1),
        ("2024-05-01", "2024-01-05", 0), ("2020/1/2", "2020/2/1", 0), ("10:30", "5:15", 0), ("3:2", r"\frac{3}{2}", 1), ("2-3", "-1", 0), (r"2 \times 3", r"3 \times 2", 0),
        ("1011_2", "1011_3", 0), ("101_{2}", "101", 0), (r"\geq 5", "5", 0), (r"\leq 5", r"\geq 5", 0), (r"x \geq 5", r"x \ge 5", 1), ("A'", "A", 0),
        ("$5-10", "$5", 0), ("$5 million", "$5", 0), (r"5 \text{ or more}", "5", 0), (r"5 \text{ is wrong}", "5", 0), (r"\text{not } $5$", "5", 0), (r"5 \text{ apples}", "5", 1),
    ],
)  # fmt: skip
def test_equal_as_mathematics_and_in_form(given: str, gold: str, right: int) -> None:
    pytest.importorskip("math_verify")
    assert score("math", rf"\boxed{{{given}}}", answer=gold) == right
    assert equal_values(given, gold) == bool(right)


def test_lists_of_mathematics_whose_form_is_known() -> None:
    pytest.importorskip("math_verify")
    for form, right in (("set", 1), ("sequence", 0), ("values", 0), (None, 0)):
        assert score("math", r"\boxed{\sqrt{4}, 1}", answer="1, 2", answer_form=form) == right


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
    """Instead of math-verify a package that prints, compares the ends of texts, and takes 1 s over "slow"."""
    (tmp_path / "math_verify.py").write_text(_NOISY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reward_math, "_WORKER", reward_math._Worker())  # Not one that others use.


@pytest.mark.usefixtures("noisy_math")
def test_math_is_not_misled_by_what_its_package_prints_or_an_interrupt_leaves() -> None:
    assert totals("math", ["it 1", "no 1", "so 2", "as 2"], answer=["3 + 1", "0", "3 + 2", "0"])[
        1
    ] == [
        1,
        0,
        1,
        0,
    ]
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        totals("math", ["slow 1"], answer=["1"])
    assert totals("math", ["it 1", "no 1", "so 1"], answer=["0", "3 + 1", "0"])[1] == [0, 1, 0]


@pytest.mark.usefixtures("noisy_math")
@pytest.mark.parametrize(
    ("text", "gold", "names"),
    [
        ("slow 1", "1", ["TimeoutError", "0.3 s"]),
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
    assert equal_values(third, "0.3333", digits=4) and equal_values("0.3333", third, digits=3)
    assert not equal_values(third, "0.333", digits=4)
    assert equal_values("sqrt(2)", r"$\sqrt{2}$", digits=5)
    assert not equal_values("4", "((") and not equal_values("((", "4")
    assert not equal_values("9^{9^{9^{9}}}", "4", seconds=0.5)


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("reward math", "math-verify", f"'{Path(__file__).parents[2]}[rewards]'"):
        Scorer(("math",), (1.0,))
