"""Completions that are there already: read, and put to the rows of the data that they answer, in their orders of the images."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from perl.data.dataset import RowDataset
from perl.data.readers import JsonLines, Source, open_file
from perl.permutation import Consistency, misplaced, permute
from perl.types import Example, UserError, Variant, one_line


@dataclass(frozen=True, slots=True)
class Given:
    """A completion as its row has it."""

    place: str
    id: str | int
    text: str
    order: tuple[int, ...] | None
    """As `Variant.order`; None: the original one."""
    asked: str | None
    """What the model was asked, if the row is of a run's record."""


def open_completions(path: Path) -> Source:
    """The rows of a file; of standard input for `-`."""
    if str(path) != "-":
        return open_file(path)
    with NamedTemporaryFile(suffix=".jsonl") as file:  # Rows are read by their offsets.
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        source = JsonLines(Path(file.name))
    source.name = "standard input"
    return source


def read_completions(source: Source, stage: str | None = None) -> Iterator[Given]:
    """The completions of a file's rows, of a run's record those of one stage.

    Raises:
        UserError: a row has no id or text, or no list as its order.
    """
    for i in range(len(source)):
        row, place = source.row(i), source.place(i)
        if stage and row.get("stage") != stage:
            continue
        recorded = "example" in row and "text" in row  # A line of rollouts.jsonl.
        names = ("example", "text") if recorded else ("id", "completion")
        id, text = (row.get(name) for name in names)
        if not isinstance(id, str | int):
            raise UserError(f"{place}: {names[0]} is {_shown(id)}; give that of a row of the data")
        if not isinstance(text, str):
            raise UserError(f"{place}: {names[1]} is {_shown(text)}; give a text")
        order = row.get("order")
        if order is None and (
            alike := [k for k, v in row.items() if "order" in k and isinstance(v, list)]
        ):
            raise UserError(f"{place}: has {alike[0]} but no order; call it order, or leave it out")
        if order is not None:
            if not isinstance(order, list) or not all(type(number) is int for number in order):
                raise UserError(
                    f"{place}: order is {_shown(order)}; give the numbers of the images by slot, as in [2, 1]"
                )
            order = tuple(number - (not recorded) for number in order)
        yield Given(place, id, text, order, str(row.get("question")) if recorded else None)


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{one_line(value, 60)} (of type {type(value).__name__})"


def variants_of(
    given: Sequence[Given], dataset: RowDataset, text: Consistency
) -> tuple[list[int], list[Variant]]:
    """The row of the data that each completion answers, and its variant, whose images are not decoded.

    Raises:
        UserError: there is no such row or several, it cannot be read, or its images cannot stand in that order.
    """
    places = _rows_of(given, dataset)
    examples = {i: dataset.check(i) for i in dict.fromkeys(places)}
    known: dict[tuple[int, tuple[int, ...] | None], Variant] = {}
    variants = []
    for each, i in zip(given, places, strict=True):
        if (i, each.order) not in known:
            known[i, each.order] = _variant(each, examples[i], text)
        variant = known[i, each.order]
        if each.asked is not None and not all(m.content in each.asked for m in variant.messages):
            raise UserError(
                f"{each.place}: the run asked something else than {dataset.place(i)} does, which has the same id; give "
                "the run's data, its permutation.text as --text, and --stage where its evaluations had other data"
            )
        variants.append(variant)
    return places, variants


def _rows_of(given: Sequence[Given], dataset: RowDataset) -> list[int]:
    wanted = {str(each.id) for each in given}
    found: dict[str, int] = {}
    for i in range(len(dataset)):
        id = dataset.id_of(i)
        if id in wanted and found.setdefault(id, i) != i:
            raise UserError(
                f"{dataset.place(i)} has the id '{id}' of {dataset.place(found[id])}; give each row an id of its own"
            )
    for each in given:
        if str(each.id) not in found:
            raise UserError(
                f"{each.place}: no row of {dataset.source.name} has the id '{each.id}'; correct it (the first row has "
                f"'{dataset.id_of(0)}'), or give other data"
            )
    return [found[str(each.id)] for each in given]


def _variant(given: Given, example: Example, text: Consistency) -> Variant:
    count = len(example.images)
    order = tuple(range(count)) if given.order is None else given.order
    where = f"{given.place}: order {[i + 1 for i in order]}"
    if sorted(order) != list(range(count)):
        raise UserError(
            f"{where} is no permutation of the {count} images of example '{example.id}'; give each of 1 to {count} once"
        )
    if (slot := misplaced(example, order)) is not None:
        raise UserError(
            f"{where} shows image {order[slot] + 1} in slot {slot + 1}, which kind '{example.kind}' of example "
            f"'{example.id}' does not allow; correct the order, or label the data (perl-rl label)"
        )
    try:
        return permute(example, order, text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
