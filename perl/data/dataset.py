"""Examples by number: of a file, folder or hub data set, or bundled questions."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from perl.config import DataConfig
from perl.data.columns import choose_convention, may_move, read_row
from perl.data.pictures import open_stored
from perl.data.sources import Source, open_source
from perl.data.tasks import BundledTasks
from perl.permutation import check_answer
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
) -> BundledTasks | RowDataset:
    """The examples of a source; images are decoded one item at a time.

    `source` is `bundled:digits`, `bundled:folder:PATH`, a .jsonl, .json or .parquet file, a folder
    saved by `datasets`, or a hub name. `split` is `train`, or `test` (also called `eval`). `limit`
    keeps that many examples: the first of the bundled ones, a seeded sample of a file, in its
    order. Raises UserError for a source that cannot be read, is empty, or lacks columns.
    """
    split = "test" if split == "eval" else split
    if split != "train" and split != "test":
        raise ValueError(f"split must be train, test or eval, got '{split}'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not source:
        raise UserError(f"data.{'train' if split == 'train' else 'eval'} is empty; name a data set")
    if source.startswith(BUNDLED):
        collection = source.removeprefix(BUNDLED)
        return BundledTasks(collection, split, config, seed, limit)
    dataset = RowDataset(open_source(source, split), config, seed, limit)
    if not may_move(dataset.convention, dataset.source.row(0)):
        log.warning(
            "%s: the data has neither kind nor should_change, so its images keep their order",
            dataset.source.place(0),
        )
    return dataset


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


class RowDataset:
    """The rows of a file, folder or hub data set as Examples, or a seeded sample of `limit` of them.

    `source` are the rows, `convention` says how their columns are named, and `root` is the folder that relative
    image paths start from.
    """

    def __init__(
        self, source: Source, config: DataConfig, seed: int = 0, limit: int | None = None
    ) -> None:
        self.source = source
        self.root = source.root
        if config.image_root:
            self.root = Path(config.image_root).expanduser().resolve()
        self.convention = choose_convention(config.columns, source.row(0), source.place(0))
        self._indices: Sequence[int] = range(len(source))
        if limit is not None and limit < len(source):
            drawn = random.Random(f"{seed}/limit").sample(self._indices, limit)
            self._indices = sorted(drawn)
        self.size = len(self._indices)
        self._said_text_only = False

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
        return self.read(self.source.row(index), index, decode=decode)

    def read(self, row: Mapping[str, Any], index: int, *, decode: bool) -> Example:
        """The example of row `index` of the source, as `row` has it."""
        where = self.source.place(index)
        example = read_row(row, self.convention, where, id=f"row-{index:06d}")
        if not example.images and not self._said_text_only:
            self._said_text_only = True
            log.warning("%s: a row without images is a question of text alone (said once)", where)
        try:
            check_answer(example)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return replace(example, images=self.open_images(example.images, index, decode=decode))

    def open_images(self, images: Sequence[Any], index: int, *, decode: bool) -> tuple[Any, ...]:
        """The images of row `index` from what the data holds; without `decode` only their headers are read."""
        where = self.source.place(index)
        return tuple(
            open_stored(image, self.root, f"{where}, image {k}", decode=decode)
            for k, image in enumerate(images, start=1)
        )
