"""Questions of every form over a small world: whoever labels one, in every order that its label allows the gold answer is
true of the pictures as they are shown, the text names the pictures it named, and equal choices are equal pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perl.data.labelling.rules import label_by_rules
from perl.permutation import (
    Consistency,
    all_orders,
    check_moves,
    num_orders,
    original_answer,
    permute,
    text_of,
)
from perl.permutation.plan import from_json, plan_of, to_json
from perl.types import Example, UserError
from tests.permutation import forms_named, forms_told
from tests.permutation.cases import Case

MODES: tuple[Consistency, ...] = ("slots", "references")
FORMS = forms_named.FORMS | forms_told.FORMS

LEAST_MOVED = {
    "which": (0.4, 0.5),
    "which, with a hint": (0, 0.1),
    "several": (0.3, 0.5),
    "optioned": (0.02, 0.2),
    "counted otherwise": (0.1,),
    "coded": (0, 0.1),
    "sequence": (0.2, 0.4),
    "pictured": (0.8, 0.8),
    "referred": (0.1, 0.2),
    "ordering": (0.1, 0.8),
    "counted": (0.2, 0.4),
    "stated": (0.1, 0.4),
    "shared": (0, 0.3),
    "values": (0.05, 0.2),
    "limited": (0, 0.1),
    "particular": (0.02, 0.2),
}
"""The shares of examples whose images can move, at the least: as labelled by rules, and by hand."""


def check_every_order(case: Case, example: Example, mode: Consistency) -> None:
    originals: dict[str, Hashable] = {}
    meanings: dict[Hashable, str] = {}
    for order in all_orders(example, 24, 0):
        variant = permute(example, order, mode)
        text = text_of(replace(example, question=variant.messages))
        where = (text, order, variant.answer)
        said = case.meaning(variant.answer, text, variant.images)
        assert said is not None, where
        assert said == case.right(text, variant.images), where
        if mode == "slots":
            assert variant.messages == example.messages
        elif case.names:
            assert case.names(text, variant.images) == case.names(
                text_of(example), example.images
            ), where
        if not example.should_change:
            continue
        # Answers that count as the same choice in two orders mean the same pictures, and the other way round.
        for answer in {variant.answer, *case.answers}:
            meant = case.meaning(answer, text, variant.images)
            original = original_answer(variant, answer)
            if original is None or meant is None:
                continue
            assert originals.setdefault(original, meant) == meant, (where, answer, original)
            style = re.sub(r"\b([A-H]|[0-9]+|first|second|third|fourth)\b", "x", answer)
            assert meanings.setdefault((style, meant), original) == original, (where, answer)


def labels(case: Case, mode: Consistency) -> dict[str, Example]:
    """The example as it is labelled by rules, with its plan as in a labelled file, and by hand."""
    hand = case.example
    if mode == "references" and case.names:
        hand = replace(hand, kind="all")
    label = label_by_rules(replace(hand, kind="all", should_change=True), mode)
    ruled = replace(hand, kind=label.kind, should_change=label.should_change)
    ruled = replace(ruled, plan=from_json(to_json(plan_of(ruled))))
    found = {"rules": ruled}
    if case.by_hand:
        found["hand"] = hand
    if case.names or hand.kind == "ordering":
        # Whoever forgets what text or options name has a right answer all the same, or is refused.
        found["all"] = replace(hand, kind="all")
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_gold_answer_is_true_in_every_order(form: str) -> None:
    seen, moved = Counter[str](), Counter[str]()

    @given(FORMS[form], st.sampled_from(MODES))
    @settings(max_examples=70, deadline=None)
    def holds(case: Case, mode: Consistency) -> None:
        for by, example in labels(case, mode).items():
            seen[by] += 1
            try:
                check_moves(example, mode)
            except UserError as error:
                assert by != "rules", error
                assert "\n" not in str(error)
                continue
            moved[by] += num_orders(example) > 1
            check_every_order(case, example, mode)

    holds()
    # Whoever keeps or refuses everything is never wrong.
    for by, least in zip(("rules", "hand"), LEAST_MOVED.get(form, ()), strict=False):
        assert moved[by] >= least * seen[by], (by, moved, seen)


def test_a_plan_counts_for_what_it_was_read_in_and_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images: tuple[Any, ...] = (1, 2)
    asked = Example("q", images, "A: <image> B: <image> Which is a dog?", "B")
    own = from_json(to_json(plan_of(asked)))
    assert own == plan_of(asked)
    assert plan_of(replace(asked, plan=own)) is own
    for changes in (
        {"answer": "A"},
        {"question": "<image> <image>"},
        {"kind": "first_fixed"},
        {"should_change": False},
    ):
        assert plan_of(replace(asked, plan=own, **changes)).key != plan_of(asked).key
    monkeypatch.setattr("perl.permutation.plan._reader", lambda: "another")
    assert plan_of(replace(asked, plan=own)) is not own
    for text in (
        None,
        5,
        "",
        "[]",
        "{}",
        "none",
        '{"key": "x", "mentions": 5}',
    ):
        assert from_json(text) is None
