"""What a public benchmark is here: where its files lie, how a row becomes an Example, how an answer is judged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perl.data.pictures import open_image
from perl.evaluation.suites.reading import Judgement, Reply
from perl.permutation import check_moves, letter_slots, movable, named_images
from perl.rewards.math import check_math
from perl.types import IMAGE_SLOT, Example, Message, UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One row of a benchmark's files, with what is needed to make an Example of it.

    `index` counts the rows of all files from 0; `folder` is the benchmark's; `think` is asked
    in place of the benchmark's own instruction, empty: that; with `decode=False` only the headers of pictures are read.
    """

    row: Mapping[str, Any]
    index: int
    folder: Path
    place: str
    think: str
    decode: bool

    def value(self, column: str) -> Any:
        """What stands in a column; raises UserError where the files have no such column."""
        if column not in self.row:
            raise UserError(
                f"{self.place}: there is no column {column}; the file is not the published one"
            )
        return self.row[column]

    def text(self, column: str) -> str:
        """A column as text, empty where it holds nothing."""
        value = self.value(column)
        return "" if value is None else str(value)

    def texts(self, column: str) -> list[str]:
        """A column that holds a list, as texts."""
        return [str(value) for value in self.value(column) or ()]

    def picture(self, value: Any) -> Image.Image:
        """A picture stored as `{"bytes", "path"}` or bytes, or a file: a text starts from the folder."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes | str | Path):
            raise UserError(f"{self.place}: holds no picture; the file is not the published one")
        source = self.folder / value if isinstance(value, str) else value
        return open_image(source, self.place, decode=self.decode)

    def pictures(self, columns: Sequence[str]) -> tuple[Image.Image, ...]:
        """The pictures of those columns that hold one."""
        return tuple(self.picture(self.row[c]) for c in columns if self.row.get(c) is not None)


def make_example(
    id: str,
    images: Sequence[Image.Image],
    question: str | tuple[Message, ...],
    answer: str,
    task: str,
    kind: str = "none",
    **extra: Any,
) -> Example:
    """An item as an Example: images without a slot stand before the text, and where images move the answer follows.

    They stay in place if the answer or its letter could not follow. `extra` is for the judge.
    """
    if isinstance(question, str):
        question = IMAGE_SLOT * (len(images) - question.count(IMAGE_SLOT)) + question
    example = Example(
        id, tuple(images), question, answer, kind, kind != "none", task=task, extra=extra
    )
    if kind == "none" or _can_move(example):
        return example
    return replace(example, kind="none", should_change=False)


def kind_by_rules(images: Sequence[Image.Image], text: str, answer: str) -> str:
    """The `kind` of a question in somebody's own words whose answer names an image: as the labelling rules have it, which
    let images move only where all of the text is of a form that they know; else "none"."""
    from perl.data.labelling.rules import label_by_rules

    label = label_by_rules(make_example("", images, text, answer, ""), "slots")
    return label.kind if label.should_change else "none"


@dataclass(frozen=True)
class Suite:
    """One public benchmark.

    `judge(example, gold, reply)` scores what a completion answers; `gold` is right in the order that was shown.
    """

    name: str
    title: str
    home: str
    """Where the files are published."""
    expected: int
    """Items in the published split."""
    files: tuple[str, ...]
    """Patterns relative to the benchmark's folder, each of which must match; the first ones hold the items."""
    example: Callable[[Item], Example]
    judge: Callable[[Example, str, Reply], Judgement]
    folders: tuple[str, ...] = ()
    """Patterns of folders with pictures, each of which must match too."""
    averaged: Literal["items", "tasks"] = "items"
    """What the benchmark's own score is a mean over."""
    uses_math_verify: bool = False
    check_item: Callable[[Item], None] | None = None
    """Raises UserError for an item that could be asked but not judged."""
    picture_files: Callable[[Item], Sequence[Path]] | None = None
    """Those that an item needs, where pictures are not stored in the rows."""


class Items:
    """The items of a benchmark's folder as Examples, made one at a time."""

    def __init__(self, suite: Suite, folder: Path, think: str) -> None:
        from perl.data.sources import open_source

        self.suite, self.folder, self.think = suite, folder, think
        paths = [path for pattern in suite.files for path in sorted(folder.glob(pattern))]
        sources = [open_source(str(path), "test") for path in paths]
        self._where = [(source, i) for source in sources for i in range(len(source))]
        if len(self) != suite.expected:
            logger.warning(
                "%s: %s holds %d items, where the published benchmark has %d",
                suite.name,
                folder,
                len(self),
                suite.expected,
            )

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, i: int) -> Example:
        return self.suite.example(self.item(i, decode=True))

    def without_pixels(self, i: int) -> Example:
        """Example i, of whose pictures only the headers are read."""
        return self.suite.example(self.item(i))

    def missing_pictures(self) -> list[Path]:
        """Picture files that items need and that are not there."""
        if self.suite.picture_files is None:
            return []
        needed = (p for i in range(len(self)) for p in self.suite.picture_files(self.item(i)))
        return [path for path in dict.fromkeys(needed) if not path.is_file()]

    def item(self, i: int, decode: bool = False) -> Item:
        source, row = self._where[i]
        return Item(source.row(row), i, self.folder, source.place(row), self.think, decode)


def open_items(suite: Suite, root: Path, think: str) -> Items:
    """The items of a benchmark under `root`.

    Raises:
        UserError: its folder, or files in it, are missing; the message lists them and where they come from. Or an
            item could be asked but not judged.
    """
    if suite.uses_math_verify:
        check_math(f"suite {suite.name}")
    folder = root / suite.name
    missing = [p for p in (*suite.files, *suite.folders) if not any(folder.glob(p))]
    if not missing:
        items = Items(suite, folder, think)
        missing = [str(path.relative_to(folder)) for path in items.missing_pictures()]
        if not missing:
            if suite.check_item is not None:
                for i in range(len(items)):
                    suite.check_item(items.item(i))
            return items
    shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if missing[20:] else "")
    raise UserError(
        f"suite {suite.name}: {folder} lacks {shown}; get them from {suite.home} "
        "(perl-rl evaluate --list-suites shows the layout)"
    )


def _can_move(example: Example) -> bool:
    """Whether the answer is one image, labelled by a letter as all that may move, and can follow in every order."""
    count, letters = len(example.images), letter_slots(example)
    moving = movable(example.kind, count)[0]
    named = named_images(example.answer, count, letters)
    if letters[: len(moving)] != moving or not named or len(named) != 1:
        return False
    try:
        check_moves(example, "slots")
    except UserError:
        return False
    return True
