"""Rows of a preview on the terminal and as JSON, and what has become of all of them."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from perl.data.labelling.command import kind_of_reason
from perl.files import to_line
from perl.report.gallery import chat_text
from perl.report.metrics import plural
from perl.report.tables import print_table
from perl.types import IMAGE_SLOT, Variant, one_line

if TYPE_CHECKING:
    from perl.evaluation.preview.rows import Row, Rows

_LONG = 300
"""Characters of a text between two images that are shown whole."""
_MOVES = 4
"""Images whose moves are told one by one."""


def print_json(row: Row) -> None:
    for each in as_objects(row):
        print(to_line(each), end="")


def as_objects(row: Row) -> list[dict[str, Any]]:
    """One for each order; one with `refused` for a row that training would refuse."""
    if row.fault:
        return [{"id": row.id, "refused": " ".join(row.fault.message.split())}]
    return [
        {
            "id": row.id,
            "order": [i + 1 for i in variant.order],
            "images": [row.images[i] for i in variant.order],
            "text": chat_text(variant.messages),
            "answer": variant.answer,
            "kind": row.example.kind,
            "should_change": row.example.should_change,
            "reason": row.reason,
        }
        for variant in row.variants
    ]


def print_row(row: Row) -> None:
    """A row for people."""
    if row.fault:
        print(plain(f"=== {row.id}: refused\n    {' '.join(row.fault.message.split())}\n"))
        return
    print(plain(f"=== {row.id}: {label(row)}: {one_line(row.reason)}"))
    for variant in row.variants:
        order = " ".join(str(i + 1) for i in variant.order)
        parts = [f"order {order}" if order else "no images", f"answer {gold(variant, 80)}"]
        parts += [f"moved: {moves}"] if (moves := moved(row, variant)) else []
        print(plain("--- " + "   ".join(parts)))
        print(plain(_indented(_question(row, variant))))
    if len(row.variants) < row.total:
        print(f"    {len(row.variants)} of {row.total:,} orders")
    print()


def label(row: Row) -> str:
    """What moves, and whether the answer goes with it."""
    example = row.example
    if not row.moves:
        return f"{example.kind}, the images stay" if row.images else "a question of text"
    return f"{example.kind}, the answer {'follows' if example.should_change else 'stays'}"


def gold(variant: Variant, limit: int) -> str:
    answer, before = variant.answer, variant.example.answer
    if not answer:
        return "none"
    was = f" (was {one_line(before, limit)})" if answer != before else ""
    return one_line(answer, limit) + was


def moved(row: Row, variant: Variant) -> str:
    """Which images stand elsewhere than in the data, and whether the text has changed with them."""
    found = [(i, j) for j, i in enumerate(variant.order) if i != j]
    moves = [f"{one_line(row.images[i], 40)} from {i + 1} to {j + 1}" for i, j in sorted(found)]
    if len(found) > _MOVES:
        moves = [f"{len(found)} of {len(variant.order)} images"]
    rewritten = variant.messages != variant.example.messages
    return ", ".join(moves) + ("; the text is rewritten" if rewritten else "")


def cut(text: str, limit: int) -> str:
    """Its beginning and its end, where it is longer."""
    if len(text) <= limit:
        return text
    end = limit // 3
    left_out = len(text) - limit
    return f"{text[: limit - end]} […{left_out:,} characters…] {text[-end:]}"


def plain(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _question(row: Row, variant: Variant) -> str:
    first, *rest = chat_text(variant.messages).split(IMAGE_SLOT)
    named = (
        f"[image: {row.images[i]}]{cut(text, _LONG)}"
        for i, text in zip(variant.order, rest, strict=True)
    )
    return cut(first, _LONG) + "".join(named)


def _indented(text: str) -> str:
    lines = [line for line in re.split(r"\n\s*", text.strip()) if line]
    return "\n".join(f"    {line}" for line in lines)


class Totals:
    """Counts of the rows shown."""

    def __init__(self, rows: Rows) -> None:
        self.of = rows.total
        self.permuted, self.kept, self.refused = Counter[str](), Counter[str](), Counter[str]()

    def add(self, row: Row) -> None:
        if row.fault:
            self.refused[row.fault.kind] += 1
        else:
            (self.permuted if row.moves else self.kept)[kind_of_reason(row.reason)] += 1

    @property
    def counts(self) -> dict[str, Counter[str]]:
        return {"permuted": self.permuted, "kept": self.kept, "refused": self.refused}

    @property
    def line(self) -> str:
        shown = sum(each.total() for each in self.counts.values())
        all_of = f" of {self.of:,}" if self.of is not None and self.of > shown else ""
        said = ", ".join(f"{each.total():,} {name}" for name, each in self.counts.items())
        kinds = "; ".join(f"{kind} {count:,}" for kind, count in self.refused.most_common())
        return (
            f"{shown:,}{all_of} {plural('row', self.of if all_of and self.of else shown)}: {said}"
            + (f" ({kinds})" if kinds else "")
        )

    def print(self) -> None:
        table = [("", "reason", "rows")]
        for name, reasons in self.counts.items():
            table += [
                (name, plain(reason), f"{count:,}") for reason, count in reasons.most_common()
            ]
        print_table(table, self.line, left=2)
