"""Labels by rules on questions in the styles of public multi-image data, half of them traps, and the right answers that
were written from what the pictures would show: no label may lead to another text or answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.data.labelling.rules import label_by_rules
from perl.permutation import Consistency, check_moves, movable, permute
from perl.types import Example, Message, UserError

QUESTIONS = [
    json.loads(line)
    for line in Path(__file__).with_name("questions.jsonl").read_text("utf-8").splitlines()
]


def messages(question: Any) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return tuple(Message(**turn) for turn in turns)


def rights(row: dict[str, Any], text: Consistency) -> tuple[list[str], dict[str, Any]]:
    """The widest kinds that are right, and what is right in some of their orders: pairs of a question and an answer."""
    if text == "references" and "references" in row:
        return row["references"]["kinds"], row["references"]["orders"]
    golds = {o: [g] if isinstance(g, str) else g for o, g in row.get("orders", {}).items()}
    pairs = {o: [[row["question"], gold] for gold in accepted] for o, accepted in golds.items()}
    return row.get("kinds", []), pairs


def allows(kind: str, order: Sequence[int]) -> bool:
    """Whether the images of an order stand as a kind allows. An `ordering` is not a matter of its kind."""
    blocks = movable(kind, len(order))
    free = {slot for block in blocks for slot in block}
    kept = all(order[slot] == slot for slot in range(len(order)) if slot not in free)
    return kind == "ordering" or (
        kept and all({order[slot] for slot in block} == set(block) for block in blocks)
    )


def within(kind: str, other: str, count: int) -> bool:
    if "ordering" in (kind, other):
        return kind == other
    blocks = movable(other, count)
    return all(any(set(b) <= set(block) for block in blocks) for b in movable(kind, count))


def example_of(row: dict[str, Any]) -> Example:
    images: tuple[Any, ...] = tuple(range(row["images"]))
    asked = row["question"] if isinstance(row["question"], str) else messages(row["question"])
    return Example(row["id"], images, asked, row["answer"])


def by_rules(row: dict[str, Any], text: Consistency) -> Example:
    example = example_of(row)
    label = label_by_rules(example, text)
    return replace(example, kind=label.kind, should_change=label.should_change)


def by_hand(row: dict[str, Any], text: Consistency) -> Example:
    kind = (rights(row, text)[0] or ["none"])[0]
    return replace(example_of(row), kind=kind, should_change=row.get("should_change", False))


def outcome(row: dict[str, Any], text: Consistency, labelled: Example) -> str:
    """`right`; `kept`: its images stay; `refused`; or what is wrong with its label or with a variant of it."""
    kinds, orders = rights(row, text)
    kind, follows = labelled.kind, labelled.should_change
    said = f"{kind}, should_change={follows}"
    if kind == "none":
        return "kept"
    if not any(within(kind, other, row["images"]) for other in kinds):
        return said
    if text == "slots" and follows != row["should_change"]:
        return said
    try:
        check_moves(labelled, text)
    except UserError:
        return "refused"
    tried = 0
    for written, accepted in orders.items():
        order = [int(slot) - 1 for slot in written.split(",")]
        if not allows(kind, order):
            continue
        tried += 1
        variant = permute(labelled, order, text)
        wanted = [(messages(question), answer) for question, answer in accepted]
        if (variant.messages, variant.answer) not in wanted:
            return f"{said}: in order {written} {variant.answer!r} to {variant.messages}"
    assert tried, f"{row['id']}: none of its orders is one of {said}; write one"
    return "right"


def outcomes(text: Consistency, label: Callable[..., Example]) -> tuple[Counter[str], list[str]]:
    """How many are right, kept, refused or wrong, after printing it by class, and what is wrong."""
    wrong: list[str] = []
    table: dict[str, Counter[str]] = {}
    for row in QUESTIONS:
        found = outcome(row, text, label(row, text))
        if found not in COLUMNS:
            wrong.append(f"{row['id']}: {found}\n    {row['question']} -> {row['answer']}")
            found = "wrong"
        name = f"trap: {row['trap']}" if row["trap"] else row["style"]
        table.setdefault(name, Counter())[found] += 1
    total = sum(table.values(), Counter[str]())
    heads = "".join(f"{column:>8}" for column in COLUMNS)
    print(f"\n{f'{text}, {label.__name__}':24}{heads}")
    for name, counts in [*table.items(), ("all", total)]:
        print(f"{name:24}" + "".join(f"{counts[column]:8}" for column in COLUMNS))
    return total, wrong


COLUMNS = ("right", "kept", "refused", "wrong")


@pytest.mark.parametrize(
    ("text", "label", "least"),
    [
        ("slots", by_rules, 130),
        ("references", by_rules, 131),
        ("slots", by_hand, 150),
        ("references", by_hand, 145),
    ],
)
def test_no_label_makes_a_wrong_answer(
    text: Consistency, label: Callable[..., Example], least: int
) -> None:
    counts, wrong = outcomes(text, label)
    assert not wrong, "\n".join(wrong)
    assert counts["right"] >= least, counts
    assert label is by_hand or not counts["refused"], counts
