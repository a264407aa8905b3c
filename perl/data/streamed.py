"""Training examples of data too large to be brought here first: read through `datasets`, a block at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from perl.config import DataConfig
from perl.data.dataset import Dataset, RowDataset
from perl.data.readers import Source
from perl.data.sources import open_streamed
from perl.data.streams import Epochs
from perl.types import Example, UserError

BLOCK = 1000
"""Rows that are shuffled among themselves."""


class StreamedExamples(Epochs):
    """Epochs of a streamed data set: its shards in a seeded order, and the rows of each block of them shuffled.

    A block is read again to go on from a position in it, so that the same examples follow: `datasets` would lose those
    in a shuffle buffer. `find` finds only what the present block holds.
    """

    size = None

    def __init__(
        self,
        source: str,
        config: DataConfig,
        seed: int,
        accept: Callable[[Example], None] | None = None,
    ) -> None:
        super().__init__(accept)
        self.name, self.root, self._data = open_streamed(source, "train")
        self.config, self.seed = config, seed
        self._shard, self._inner = 0, None
        self._rows = self._iterate(0, None)
        self._now: Any = None
        self._begin_block()

    def read(self, index: int) -> Example:
        """Row `index` of the block."""
        example = self._read(self._block, index)
        if example.id != f"row-{index:06d}":
            return example
        # Rows without an id go by their place in the epoch.
        return replace(example, id=f"row-{self._first + index:06d}")

    def upcoming(self) -> Iterator[tuple[Dataset, int]]:
        """Of the block alone."""
        return ((self._block, index) for index in self._order[self._position :])

    def _go_on(self) -> None:
        self._first += len(self._order)
        self._begin_block()

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        block = {"shard": self._shard, "inner": self._inner, "before": self._first}
        own = {"seed": self.seed, "shards": self._data.num_shards, "epoch": self.epoch}
        return {**own, **block, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if it belongs to other data or seed."""
        shards = self._data.num_shards
        if (state.get("seed"), state.get("shards")) != (self.seed, shards):
            raise UserError(
                f"the checkpoint's data are no stream of {shards} shards with the seed {self.seed}; resume with the data, "
                "data.streaming and seed it was trained on, or start a new run"
            )
        self.epoch, self._first = int(state["epoch"]), int(state["before"])
        self._shard, self._inner, self._now = int(state["shard"]), state["inner"], None
        self._rows = self._iterate(self._shard, self._inner)
        self._begin_block()
        self._position = int(state["position"])

    def _begin_block(self) -> None:
        if self._now:
            self._shard, self._inner = self._now[0], self._now[1].state_dict()
        rows = list(islice(self._rows, BLOCK))
        if not rows:
            if self._first == 0:
                raise UserError(f"{self.name}: the data set is empty; give one with rows")
            self.epoch, self._first = self.epoch + 1, 0
            self._shard, self._inner, self._now = 0, None, None
            self._rows = self._iterate(0, None)
            rows = list(islice(self._rows, BLOCK))
        self._block = RowDataset(_Block(self.name, self.root, rows, self._first), self.config)
        self._order, self._position = list(range(len(rows))), 0
        random.Random(f"{self.seed}/{self.epoch}/{self._first}").shuffle(self._order)

    def _iterate(self, first: int, inner: Any) -> Iterator[Any]:
        """The epoch's rows from a shard on, and from a state in it."""
        count = self._data.num_shards
        order = list(range(count))
        random.Random(f"{self.seed}/{self.epoch}/shards").shuffle(order)
        for k in range(first, count):
            shard = self._data.shard(count, order[k])
            if inner:
                shard.load_state_dict(inner)
                inner = None
            self._now = (k, shard)
            yield from shard


class _Block(Source):
    """Rows of a stream, named by their place in the epoch."""

    def __init__(self, name: str, root: Any, rows: Any, before: int) -> None:
        super().__init__(name, root, rows)
        self._before = before

    def place(self, i: int) -> str:
        return f"{self.name} row {self._before + i + 1} of the stream"
