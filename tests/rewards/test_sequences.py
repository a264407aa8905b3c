"""Spans of time, sequences and numbers of frames."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from perl.rewards.sequences import kendall_tau
from tests.messages import refused
from tests.rewards.scoring import score


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("<answer>[2.0, 6]</answer>", "[4, 8]", 1 / 3),
        ("from 0:02 to 0:06", [4, 8], 1 / 3),
        ("<answer>1:00:01-1:00:03</answer>", (3601, 3603), 1),
        ("<answer>5 to 7 s</answer>", "8 to 9", 0),
        ("<answer>7 to 5 s</answer>", "5 to 7", 0),
        ("<answer>5 to 7, not 8</answer>", "5.5 to 7.5", 0.6),
        ("<answer>0:59.5 to 1:01</answer>", [60, 61.5], 0.5),
        ("<answer>7 s</answer>", "5 to 7", 0),
        ("none", "5 to 7", 0),
    ],
)
def test_temporal_iou(text: str, gold: Any, value: float) -> None:
    assert score("temporal_iou(column='span')", text, span=gold) == pytest.approx(value)


def test_temporal_iou_of_timestamps() -> None:
    """Time-R1: the overlap times 1 - |distance| / duration of either end."""
    spec = "temporal_iou(duration='length')"
    assert score(spec, "2 to 6", answer=[4, 8], length=10) == pytest.approx(1 / 3 * 0.8 * 0.8)
    assert score(spec, "4 to 8", answer=[4, 8], length="0:10") == 1
    assert score(spec, "4 to 80", answer=[4, 8], length=10) == 0
    for gold in ("4", [4], [4, 6, 8]):
        with refused("'temporal_iou'", f"{gold!r}"):
            score(spec, "4 to 8", answer=gold, length=10)
    for length in (0, math.nan):
        with refused("temporal_iou", "duration", length):
            score(spec, "2 to 6", answer=[4, 8], length=length)
    with refused("temporal_iou", "column 'length'", "answer", "options"):
        score(spec, "2 to 6", answer=[4, 8])


def test_ordering() -> None:
    texts = ["<answer>C, A, B</answer>", "[c; a; b]", "C > A > B", "CAB", "C, A", "A, C, B", ""]
    assert score("ordering", texts, answer="C, A, B") == [1, 1, 1, 1, 0, 0, 0]
    labels = [r"\boxed{C. cat, A. dog}", r"\boxed{A. cat, C. dog}"]
    for spec in ("ordering", "ordering(kendall=True)"):
        assert score(spec, labels, answer="C, A") == [1, 0]
    assert score("ordering", "C < A", answer="C > A") == 0
    shares = score("ordering(kendall=True)", texts, answer="CAB")
    assert shares == pytest.approx([1, 1, 1, 1, 0, 2 / 3, 0])
    assert score("ordering(kendall=True)", "B, A, C", answer="C, A, B") == 0
    with refused("'ordering'", "'A, A'", "twice", "data"):
        score("ordering(kendall=True)", "A", answer="A, A")


@given(st.permutations(range(6)))
def test_kendall_tau_is_scipys(ranks: list[int]) -> None:
    assert kendall_tau(ranks) == pytest.approx(kendalltau(range(6), ranks)[0])
    text = ", ".join("ABCDEF"[r] for r in ranks)
    value = score("ordering(kendall=True)", text, answer="A, B, C, D, E, F")
    assert value == pytest.approx((1 + kendall_tau(ranks)) / 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<index>1, 3</index>", 1),
        ("<index>[3 1]</index>", 1),
        ("<index>1, 1</index>", 0),
        ("<index>1</index>", 0),
        ("<index>1, 2, 3</index>", 0),
        ("<index>0, 1</index>", 0),
        ("<index>3, 4</index>", 0),
        ("1, 3", 0),
    ],
)
def test_frame_index(text: str, value: float) -> None:
    assert score("frame_index(count=2)", text, order=[2, 0, 1]) == value
    assert score("frame_index(count=2, frames=3)", text) == value
    with refused("frame_index", "frames"):
        score("frame_index(count=2)", text)


def test_frames_may_count_from_zero() -> None:
    texts = ["<index>0, 2</index>", "<index>1, 3</index>"]
    assert score("frame_index(count=2, frames=3, first=0)", texts) == [1, 0]
