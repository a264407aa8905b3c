"""How an answer is written, and what holds for every function of a text."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.types import UserError
from tests.rewards.scoring import score, totals

EVERY_COLUMN = {"answer": "A", "image": 1, "box": "(0,0),(1,1)", "span": "1-2", "order": [0, 1]}


def test_length_penalty_is_dapos() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 1000]
    spec = "length_penalty(longest=100, buffer=20)"
    values = totals(spec, [""] * 7, completion_length=lengths)[1]
    np.testing.assert_allclose(values, [0, 0, -0.05, -0.5, -1, -1, -1])
    words = "length_penalty(longest=4, buffer=2, unit='words')"
    assert score(words, ["a b", "a b c", "a b c d", "a b c d e"]) == [0, -0.5, -1, -1]
    assert score("length_penalty(longest=4, buffer=2, unit='characters')", "a b") == -0.5
    for options, match in (
        ("longest=4, buffer=0", "buffer = 0 must be above 0"),
        ("longest=4, buffer=2, unit='lines'", "choose tokens, words, characters"),
        ("longest=4, buffer=2", "no column completion_length"),
    ):
        with pytest.raises(UserError, match=match):
            score(f"length_penalty({options})", "a")


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_counts_what_was_there_before(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    value = score(f"repetition(n={n})", " ".join(words))
    assert value == pytest.approx(before / len(grams) if grams else 0)
    assert 0 <= value <= 1


@given(
    st.sampled_from(["<answer>", "</answer>", "(", "1,", " ", "A", "box ", "image 2", "[1,2"]),
    st.integers(0, 9),
)
def test_any_text_has_a_score(part: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [part, "<index>", "</index>", "\n", "and", "->", "-3.5", "B", r"\boxed{", "}", "1:02"]
    text = "".join(rng.choice(pieces, 40))
    specs = (
        "accuracy(tags=True, unordered=True)", "choice", "choice(unordered=True)", "format_tags",
        "box_iou(column='box')", "detection(column='box')", "grounding", "temporal_iou(column='span')",
        "ordering(kendall=True)", "frame_index(count=1)", "repetition",
    )  # fmt: skip
    for spec in specs:
        assert 0 <= score(spec, text, **EVERY_COLUMN) <= 1


@pytest.mark.parametrize(
    "text",
    [
        *(
            piece * 50_000
            for piece in ("(1,", "<answer>", "A, ", " ", "1:", "image ", "[", "option ")
        ),
        "<think>" + "</think>" * 10_000 + r"\boxed{" * 10_000,
    ],
    ids=lambda text: text[:16],
)
def test_a_looping_model_costs_no_time(text: str) -> None:
    start = time.process_time()
    for spec in (
        "choice",
        "grounding",
        "temporal_iou(column='span')",
        "ordering",
        "format_tags",
        "format",
    ):
        score(spec, [text, f"<answer>{text}</answer>"], **EVERY_COLUMN)
    assert time.process_time() - start < 3
