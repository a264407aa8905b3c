"""Examples by number: of a file, folder or hub data set, or bundled questions."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perl.config import DataConfig
from perl.data.columns import choose_layout, may_move, read_row, tell_once
from perl.data.pictures import Split, open_stored
from perl.data.sources import Source, open_source
from perl.data.tasks import BundledTasks
from perl.data.videos import Frame, open_frame
from perl.permutation import check_answer
from perl.types import Example, UserError

BUNDLED = "bundled:"


def load_examples(
    source: str, config: DataConfig, split: Split, seed: int, limit: int | None = None
) -> Dataset:
    """The examples of a source; images are decoded one item at a time.

    `source` is `bundled:digits`, `bundled:folder:PATH`, or what `open_source` takes. `limit` keeps that many examples: the first of the bundled
    ones, a seeded sample of a file, in its order. Raises UserError for a source that cannot be read,
    is empty, or lacks columns.
    """
    if not source:
        raise UserError(f"data.{'train' if split == 'train' else 'eval'} is empty; name a data set")
    if source.startswith(BUNDLED):
        return BundledTasks(source.removeprefix(BUNDLED), split, config, seed, limit)
    return RowDataset(open_source(source, split), config, seed, limit)


def validate(dataset: Dataset, inspect: Callable[[Example], None] = lambda _: None) -> None:
    """Visit every example and raise the first UserError; of images only the headers are read.

    `inspect` is given each and may raise too. Endless bundled examples need no check.
    """
    for i in range(dataset.size or 0):
        example = dataset.check(i)
        try:
            inspect(example)
        except UserError as error:
            raise UserError(f"{dataset.place(i)}: {error}") from None


class RowDataset:
    """The rows of a file, folder or hub data set as Examples, or a seeded sample of `limit` of them."""

    def __init__(
        self, source: Source, config: DataConfig, seed: int = 0, limit: int | None = None
    ) -> None:
        self.source = source
        self._image_root: Path | None = None
        if config.image_root:
            self._image_root = Path(os.path.abspath(Path(config.image_root).expanduser()))
        self.layout = choose_layout(config, source.row(0), source.place(0))
        self._indices: Sequence[int] = range(len(source))
        if limit is not None and limit < len(source):
            self._indices = sorted(random.Random(f"{seed}/limit").sample(self._indices, limit))
        self.size = len(self._indices)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        index = self._indices[i]
        return self.read(self.source.row(index), index)

    def check(self, i: int) -> Example:
        """Example i without decoding its images; raises the UserError that it would raise."""
        index = self._indices[i]
        return self.read(self.source.row(index), index, decode=False)

    def place(self, i: int) -> str:
        """How messages name example i."""
        return self.source.place(self._indices[i])

    def read(self, row: Mapping[str, Any], index: int, *, decode: bool = True) -> Example:
        """The example of row `index` of the source, as `row` has it."""
        where = self.source.place(index)
        example = read_row(row, self.layout, where, id=f"row-{index:06d}")
        if not example.images:
            self._tell(where, "a row without images is a question of text alone")
        elif len(example.images) > 1 and not may_move(self.layout.ours(row)):
            self._tell(
                where, "it has neither kind nor should_change, so its images keep their order"
            )
        try:
            check_answer(example)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return replace(example, images=self.open_images(example.images, index, decode=decode))

    def root_of(self, index: int) -> Path:
        """The folder that relative image paths of row `index` start from."""
        return self._image_root or self.source.root_of(index)

    def open_images(
        self, images: Sequence[Any], index: int, *, decode: bool = True
    ) -> tuple[Any, ...]:
        """The images of row `index` from what the data holds; without `decode` only their headers are read."""
        where, root = self.source.place(index), self.root_of(index)
        return tuple(
            (open_frame if isinstance(image, Frame) else open_stored)(
                image, root, f"{where}, image {k}", decode=decode
            )
            for k, image in enumerate(images, start=1)
        )

    def _tell(self, where: str, what: str) -> None:
        """Once for a source, however many of its rows are so."""
        about = (self.root_of(0), self.source.name, what)
        tell_once(logging.WARNING, f"{where}: {what} (said once)", about)


Dataset = BundledTasks | RowDataset
"""Examples by index; `size` is None where they are endless, and then `len()` raises TypeError."""
