"""Examples from a source, in order or as an endless shuffled stream that can be resumed."""

from __future__ import annotations

import base64
import binascii
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from perl.config import DataConfig
from perl.data.columns import Row, check_columns, detect_convention, may_move, read_row
from perl.data.pictures import open_image
from perl.data.sources import Source, open_source
from perl.data.tasks import BundledTasks
from perl.permutation.permute import check_answer, movable
from perl.types import Example, UserError

log = logging.getLogger(__name__)

BUNDLED = "bundled:"


class Dataset(Protocol):
    """Examples by index; `size` is None where they are endless, and then `len()` raises TypeError."""

    @property
    def size(self) -> int | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...

    def check(self, i: int) -> Example:
        """Example i without decoding its images; raises the UserError that it would raise."""
        ...


def load_examples(
    source: str, config: DataConfig, split: str, seed: int, limit: int | None = None
) -> Dataset:
    """The examples of a source; images are decoded one item at a time.

    `source` is `bundled:digits`, `bundled:folder:PATH`, a .jsonl, .json or .parquet file, a folder
    saved by `datasets`, or a hub name. `split` is `train`, or `test` (also called `eval`). `limit`
    keeps that many examples: the first of the bundled ones, a seeded sample of a file, in its
    order. Raises UserError for a source that cannot be read, is empty, or lacks columns.
    """
    split = "test" if split == "eval" else split
    if split not in ("train", "test"):
        raise ValueError(f"split must be train, test or eval, got '{split}'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not source:
        raise UserError(f"data.{'train' if split == 'train' else 'eval'} is empty; name a data set")
    if source.startswith(BUNDLED):
        tasks = BundledTasks(
            source.removeprefix(BUNDLED),
            "train" if split == "train" else "test",
            config.tasks,
            config.min_images,
            config.max_images,
            seed,
            config.first_slot,
        )
        return BundledDataset(tasks, limit)
    return RowDataset(open_source(source, split), config, seed, limit)


def validate(
    dataset: Dataset,
    progress: Callable[[int, int], None] | None = None,
    inspect: Callable[[Example], None] | None = None,
) -> None:
    """Visit every example and raise the first UserError; of images only the headers are read.

    `progress(done, total)` is called after each, `inspect` is given each and may raise too. Endless bundled examples
    need no check.
    """
    for i in range(dataset.size or 0):
        example = dataset.check(i)
        if inspect is not None:
            inspect(example)
        if progress is not None:
            progress(i + 1, dataset.size or 0)


class BundledDataset:
    """The bundled questions, endless or the first `limit` of them."""

    def __init__(self, tasks: BundledTasks, limit: int | None = None) -> None:
        self.tasks = tasks
        self.size = limit

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("bundled examples are endless; ask for `size`, or give a limit")
        return self.size

    def __getitem__(self, i: int) -> Example:
        if i < 0 or (self.size is not None and i >= self.size):
            raise IndexError(i)
        return self.tasks.example(i)

    def check(self, i: int) -> Example:
        return self[i]


class RowDataset:
    """The rows of a file, folder or hub data set as Examples."""

    def __init__(
        self, source: Source, config: DataConfig, seed: int = 0, limit: int | None = None
    ) -> None:
        self._source = source
        self._said_text_only = False
        self._root = Path(config.image_root).expanduser().resolve() if config.image_root else None
        count = len(source)
        self._indices: Sequence[int] = range(count)
        if limit is not None and limit < count:
            self._indices = sorted(random.Random(f"{seed}/limit").sample(range(count), limit))
        columns = list(source.row(0))
        if config.columns == "auto":
            self.convention = detect_convention(columns, source.place(0))
            log.info("%s: columns are named as by %s", source.place(0), self.convention)
        else:
            self.convention = config.columns
            check_columns(self.convention, columns, source.place(0))
        if not may_move(self.convention, columns):
            log.warning(
                "%s: the data has neither kind nor should_change, so its images keep their order",
                source.place(0),
            )

    @property
    def size(self) -> int:
        return len(self._indices)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        return self._example(i, decode=True)

    def check(self, i: int) -> Example:
        return self._example(i, decode=False)

    def _example(self, i: int, *, decode: bool) -> Example:
        if not 0 <= i < self.size:
            raise IndexError(i)
        index = self._indices[i]
        where = self._source.place(index)
        row = read_row(self._source.row(index), self.convention, where)
        if not row.images and not self._said_text_only:
            self._said_text_only = True
            log.warning("%s: a row without images is a question of text alone (said once)", where)
        try:
            movable(row.kind, len(row.images))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        example = Example(
            id=row.id if row.id is not None else f"row-{index:06d}",
            images=self._images(row, where, decode),
            question=row.question,
            answer=row.answer,
            kind=row.kind,
            should_change=row.should_change,
            demonstration=row.demonstration,
            task=row.task,
            extra=row.extra,
        )
        try:
            check_answer(example)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return example

    def _images(self, row: Row, where: str, decode: bool) -> tuple[Any, ...]:
        root = self._root or self._source.root
        return tuple(
            open_image(_locate(value, root, place), place, decode=decode)
            for place, value in (
                (f"{where}, image {k}", value) for k, value in enumerate(row.images, start=1)
            )
        )


def _locate(value: Any, root: Path, where: str) -> Any:
    """What `open_image` takes: a path inside `root`, bytes or a PIL image."""
    if isinstance(value, dict):
        options = (value.get(key) for key in ("bytes", "image", "path", "url"))
        value = next((option for option in options if option), None)
    if isinstance(value, dict):
        return _locate(value, root, where)
    if isinstance(value, str):
        return _locate_text(value, root, where)
    if isinstance(value, bytes) or hasattr(value, "getbbox"):
        return value
    raise UserError(
        f"{where}: an image is a {type(value).__name__}; give a path, "
        "bytes, or an object with bytes or path"
    )


def _locate_text(text: str, root: Path, where: str) -> Path | bytes:
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise UserError(
                f"{where}: broken base64 in a data: image ({error}); replace it"
            ) from error
    if text.startswith(("http://", "https://")):
        raise UserError(
            f"{where}: {text[:80]} is not fetched; download the image and give its path"
        )
    if "\0" in text:
        raise UserError(f"{where}: the image path holds a NUL character; correct it")
    path = (root / text.removeprefix("file://")).resolve()
    if not path.is_relative_to(root):
        raise UserError(
            f"{where}: image path {text} leaves {root}; move the image there or set data.image_root"
        )
    return path


class Drawn(NamedTuple):
    """An example of a stream; `key` finds it again, whatever has been drawn since."""

    key: tuple[int, ...]
    epoch: int
    example: Example


class ExampleStream:
    """Endless epochs of a data set, each in its own seeded order; an endless one goes in order.

    `epoch` counts from 0. `state_dict()` holds plain numbers, and a stream that loads it goes on at
    the next example.
    """

    def __init__(self, dataset: Dataset | Sequence[Example], seed: int) -> None:
        self.dataset = dataset
        self.size: int | None = dataset.size if hasattr(dataset, "size") else len(dataset)  # type: ignore[union-attr]
        if self.size == 0:
            raise UserError("the data set is empty; give one with rows")
        self.seed = seed
        self.epoch = 0
        self._position = 0
        self._order = self._shuffled()

    def next(self, n: int) -> list[Example]:
        """The next `n` examples; an epoch may end and the next begin among them."""
        return [drawn.example for drawn in self.draw(n)]

    def draw(self, n: int) -> list[Drawn]:
        """The next `n` examples, each with its key and the epoch it belongs to."""
        return [self._next() for _ in range(n)]

    def find(self, key: Sequence[int]) -> Example:
        """The example that was drawn with this key."""
        (index,) = key
        return self.dataset[index]

    def state_dict(self) -> dict[str, int | None]:
        """The position, JSON-able."""
        return {
            "seed": self.seed,
            "size": self.size,
            "epoch": self.epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if it belongs to other data or seed."""
        if "streams" in state:
            raise UserError(
                f"the data now come from one source, those of the checkpoint from {len(state['streams'])}; "
                "resume with the data.mix it was trained on, or start a new run"
            )
        for key, mine in (("size", self.size), ("seed", self.seed)):
            if state[key] != mine:
                raise UserError(
                    f"the data's {key} is {mine} but the checkpoint was written with {state[key]}; "
                    "resume with the data and seed it was trained on, or start a new run"
                )
        self.epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()

    def _next(self) -> Drawn:
        if self.size is not None and self._position == self.size:
            self.epoch, self._position = self.epoch + 1, 0
            self._order = self._shuffled()
        index = self._position if self._order is None else self._order[self._position]
        example = self.dataset[index]
        self._position += 1
        return Drawn((index,), self.epoch, example)

    def _shuffled(self) -> list[int] | None:
        if self.size is None:
            return None
        order = list(range(self.size))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order
