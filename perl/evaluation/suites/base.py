"""What a public benchmark is here: where its files lie, how a row becomes an Example, how an answer is judged."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perl.data.pictures import open_image
from perl.permutation.permute import check_moves, letter_slots, movable, named_images
from perl.rewards.answers import extract_answer
from perl.types import Example, UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")

THINK = (
    "You first think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process must be enclosed within <think> </think> tags. The final answer must be put in \\boxed{}."
)
"""The instruction PeRL is trained and evaluated with (arXiv 2506.14907, appendix A.3.2)."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer read out of a completion, None where there is none to be read, and its score from 0 to 1."""

    answer: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a completion answers with: the content of its last `\\boxed{}`, or else what follows its thinking."""

    text: str
    boxed: bool

    @classmethod
    def of(cls, completion: str) -> Reply:
        boxed = extract_answer(completion)
        if boxed is None:
            return cls(completion.rpartition("</think>")[2].strip(), False)
        return cls(" ".join(_WRAPPED.sub(r"\1", boxed).split()), True)


@dataclass(frozen=True)
class Item:
    """One row of a benchmark's files, with what is needed to make an Example of it.

    `index` counts the rows of all files from 0; `folder` is the benchmark's; `think` asks for the paper's
    instruction in place of the benchmark's own; with `decode=False` only the headers of pictures are read.
    """

    row: Mapping[str, Any]
    index: int
    folder: Path
    place: str
    think: bool
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


@dataclass(frozen=True)
class Suite:
    """One public benchmark.

    `files` are patterns relative to its folder, each of which must match; those of `rows` hold the items.
    `judge(example, gold, reply)` scores what a completion answers; `gold` is right in the order that was shown.
    """

    name: str
    title: str
    home: str
    """Where the files are published."""
    expected: int
    """Items in the published split."""
    files: tuple[str, ...]
    rows: tuple[str, ...]
    example: Callable[[Item], Example]
    judge: Callable[[Example, str, Reply], Judgement]
    averaged: Literal["items", "tasks"] = "items"
    """What the benchmark's own score is a mean over."""
    check: Callable[[], None] = lambda: None
    """Raises UserError where a package that its rules use is not installed."""
    check_item: Callable[[Item], None] | None = None
    """Raises UserError for an item that could be asked but not judged."""
    needs: Callable[[Item], Sequence[Path]] | None = None
    """Picture files that an item needs, where they are not stored in the rows."""

    def missing(self, folder: Path) -> list[str]:
        """Patterns of `files` that match nothing in the folder."""
        return [pattern for pattern in self.files if not any(folder.glob(pattern))]

    def score(self, example: Example, gold: str, completion: str) -> Judgement:
        """What a completion answers, and whether that is right."""
        return self.judge(example, gold, Reply.of(completion))


class Items:
    """The items of a benchmark's folder as Examples, made one at a time."""

    def __init__(self, suite: Suite, folder: Path, think: bool) -> None:
        from perl.data.sources import open_source

        self.suite, self.folder, self.think = suite, folder, think
        paths = [path for pattern in suite.rows for path in sorted(folder.glob(pattern))]
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
        return self.get(i)

    def get(self, i: int, decode: bool = True) -> Example:
        """Example i; with `decode=False` only the headers of its pictures are read."""
        return checked(self.suite.example(self._item(i, decode)))

    def missing(self) -> list[Path]:
        """Picture files that items need and that are not there."""
        if self.suite.needs is None:
            return []
        needed = (p for i in range(len(self)) for p in self.suite.needs(self._item(i, False)))
        return [path for path in dict.fromkeys(needed) if not path.is_file()]

    def check(self) -> None:
        """Raise UserError for the first item that could be asked but not judged."""
        if self.suite.check_item is not None:
            for i in range(len(self)):
                self.suite.check_item(self._item(i, False))

    def _item(self, i: int, decode: bool) -> Item:
        source, row = self._where[i]
        place = source.place(row)
        return Item(source.row(row), i, self.folder, place, self.think, decode)


def open_items(suite: Suite, root: Path, think: bool) -> Items:
    """The items of a benchmark under `root`.

    Raises:
        UserError: its folder, or files in it, are missing; the message lists them and where they come from. Or an
            item could be asked but not judged.
    """
    suite.check()
    folder = root / suite.name
    missing = suite.missing(folder)
    if not missing:
        items = Items(suite, folder, think)
        missing = [str(path.relative_to(folder)) for path in items.missing()]
        if not missing:
            items.check()
            return items
    shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if missing[20:] else "")
    raise UserError(
        f"suite {suite.name}: {folder} lacks {shown}; get them from {suite.home} "
        "(perl-rl evaluate --list-suites shows the layout)"
    )


def checked(example: Example) -> Example:
    """The example; its images stay in place if its answer or its letters would not follow those that may move."""
    if example.kind == "none":
        return example
    count, letters = len(example.images), letter_slots(example)
    moving = movable(example.kind, count)[0]
    named = named_images(example.answer, count, letters)
    if letters[: len(moving)] == moving and named and len(named) == 1:
        with suppress(UserError):
            check_moves(example, "slots")
            return example
    return replace(example, kind="none", should_change=False)
