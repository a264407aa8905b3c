"""Training examples without end: shuffled epochs of one data set, or several data sets in proportion.

A stream's position can be saved and gone on from, and `key` finds an example again whatever has been drawn since.
"""

from __future__ import annotations

import glob
import logging
import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from perl.config import Config, DataConfig
from perl.data.dataset import Dataset, load_examples
from perl.recipe import Stage, filtered_sources, plan, source_key
from perl.types import Example, UserError

log = logging.getLogger(__name__)

_MOST_IN_TURN = 10_000
"""Faulty rows one after the other of data without an end."""


class Drawn(NamedTuple):
    """An example of a stream, the key that finds it again, and the epoch of its data set."""

    key: tuple[int, ...]
    epoch: int
    example: Example


class Draws(ABC):
    """Examples without end."""

    @property
    @abstractmethod
    def reads_all(self) -> bool:
        """Whether examples that are not wanted are read too, as those left out must be known."""

    @abstractmethod
    def draw_one(self, wanted: bool = True) -> Drawn | None:
        """The next example. One that is not wanted is passed by."""

    @abstractmethod
    def upcoming(self) -> Iterator[tuple[Dataset, int]]:
        """What `draw_one` would read, as far as that is known; nothing changes by it."""

    @abstractmethod
    def read_by(self, read: Callable[[Dataset, int], Example]) -> None:
        """Let `read` give an example of a data set, in place of the data set itself."""

    def draw(self, n: int) -> list[Drawn]:
        """The next `n` examples; an epoch may end and the next begin among them."""
        return [drawn for _ in range(n) if (drawn := self.draw_one())]


class Epochs(Draws):
    """Endless epochs of examples. With `accept` those that cannot be read, or that it raises UserError for, are left out
    and counted in `skipped`. `epoch` counts from 0."""

    size: int | None
    _order: Sequence[int]
    _first = 0
    """The number of the example that `_order` calls 0."""

    def __init__(self, accept: Callable[[Example], None] | None) -> None:
        self.accept, self.skipped, self._in_turn = accept, 0, 0
        self._read: Callable[[Dataset, int], Example] = getitem
        self.epoch, self._position = 0, 0

    @property
    def reads_all(self) -> bool:
        return self.accept is not None

    def draw_one(self, wanted: bool = True) -> Drawn | None:
        while True:
            if self._position == len(self._order):
                self._go_on()
            index = self._order[self._position]
            read = wanted or self.reads_all
            example = self._attempt(index) if read else None
            self._position += 1
            if example and wanted:
                return Drawn((self._first + index,), self.epoch, example)
            if example or not read:
                return None

    def read_by(self, read: Callable[[Dataset, int], Example]) -> None:
        self._read = read

    @abstractmethod
    def read(self, index: int) -> Example:
        """Example `index` as `_order` counts; raises UserError if it cannot be read."""

    @abstractmethod
    def _go_on(self) -> None:
        """To the examples behind those of `_order`."""

    def find(self, key: Sequence[int]) -> Example:
        """The example that was drawn with this key."""
        return self.read(key[0] - self._first)

    def _attempt(self, index: int) -> Example | None:
        """Example `index`; None if it is left out."""
        try:
            example = self.read(index)
            if self.accept:
                self.accept(example)
        except UserError as error:
            if self.accept is None:
                raise
            if not self.skipped:
                log.warning("%s: the row is left out, as others like it will be (said once)", error)
            self.skipped, self._in_turn = self.skipped + 1, self._in_turn + 1
            if self._in_turn == (self.size or _MOST_IN_TURN):
                raise UserError(
                    f"{self._in_turn} rows in turn are faulty, the last: {error}"
                ) from error
            return None
        self._in_turn = 0
        return example


class ExampleStream(Epochs):
    """Epochs of a data set, each in its own seeded order; an endless one goes in order.

    `state_dict()` holds plain numbers, and a stream that loads it goes on at the next example.
    """

    def __init__(
        self, dataset: Dataset, seed: int, accept: Callable[[Example], None] | None = None
    ) -> None:
        super().__init__(accept)
        self.dataset = dataset
        self.size = dataset.size
        if self.size == 0:
            raise UserError("the data set is empty; give one with rows")
        self.seed = seed
        self._order = self._shuffled(0)

    def read(self, index: int) -> Example:
        return self._read(self.dataset, index)

    def upcoming(self) -> Iterator[tuple[Dataset, int]]:
        order, position = self._order, self._position
        for epoch in count(self.epoch + 1):
            yield from ((self.dataset, order[k]) for k in range(position, len(order)))
            order, position = self._shuffled(epoch), 0

    def _go_on(self) -> None:
        self.epoch, self._position = self.epoch + 1, 0
        self._order = self._shuffled(self.epoch)

    def state_dict(self) -> dict[str, Any]:
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
        self._order = self._shuffled(self.epoch)

    def _shuffled(self, epoch: int) -> Sequence[int]:
        if self.size is None:
            return range(sys.maxsize)
        order = list(range(self.size))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class MixedStream(Draws):
    """Draws from several streams in turn, at random in proportion to their weights.

    Which source the k-th draw comes from depends on `(seed, k)` alone.
    """

    # `datasets.interleave_datasets` begins an exhausted source again in the same sequence, and does not tell
    # which row and epoch of which source an example is: image orders are drawn by epoch, and replay needs the row.

    def __init__(self, streams: Sequence[Any], weights: Sequence[float], seed: int):
        self.streams, self.weights, self.seed = list(streams), list(weights), seed
        self._drawn = 0

    @property
    def skipped(self) -> int:
        """Rows left out so far."""
        return sum(stream.skipped for stream in self.streams)

    @property
    def reads_all(self) -> bool:
        return any(stream.reads_all for stream in self.streams)

    def draw_one(self, wanted: bool = True) -> Drawn | None:
        """Its `epoch` is that of its source, and its `key` begins with the source's number."""
        source = self._source_of(self._drawn)
        drawn = self.streams[source].draw_one(wanted)
        self._drawn += 1
        return drawn and drawn._replace(key=(source, *drawn.key))

    def upcoming(self) -> Iterator[tuple[Dataset, int]]:
        each = [stream.upcoming() for stream in self.streams]
        for number in count(self._drawn):
            found = next(each[self._source_of(number)], None)
            if found is None:
                return
            yield found

    def read_by(self, read: Callable[[Dataset, int], Example]) -> None:
        for stream in self.streams:
            stream.read_by(read)

    def _source_of(self, number: int) -> int:
        dice = random.Random(f"{self.seed}/mix/{number}")
        return dice.choices(range(len(self.streams)), self.weights)[0]

    def find(self, key: Sequence[int]) -> Example:
        """The example that was drawn with this key."""
        source, *rest = key
        return self.streams[source].find(rest)

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        states = [stream.state_dict() for stream in self.streams]
        return {"drawn": self._drawn, "weights": self.weights, "streams": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; raises UserError if it belongs to other data or seed."""
        own = state.get("streams", ())
        if len(own) != len(self.streams):
            raise UserError(
                f"the data now come from {len(self.streams)} sources, those of the checkpoint from "
                f"{len(own) or 1}; resume with the data it was trained on"
            )
        if state["weights"] != self.weights:
            raise UserError(
                f"data.mix now has the weights {self.weights[1:]}, the checkpoint {state['weights'][1:]}; "
                "resume with those it was trained on, or start a new run"
            )
        self._drawn = int(state["drawn"])
        for stream, its in zip(self.streams, own, strict=True):
            stream.load_state_dict(its)


Stream = ExampleStream | MixedStream


def read_mix(entries: Sequence[str]) -> list[tuple[str, float]]:
    """`data.mix` as sources with weights: `"k12.jsonl*0.5"` is `("k12.jsonl", 0.5)`, without a weight 1.

    Raises:
        UserError: a weight that is no positive number.
    """
    out = []
    for entry in entries:
        source, star, weight = entry.rpartition("*")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if entry and (not star or (math.isnan(value) and glob.glob(entry, recursive=True))):
            out.append((entry, 1.0))
            continue
        if not source or not 0 < value < math.inf:
            raise UserError(
                f"data.mix: '{entry}' must be SOURCE or SOURCE*WEIGHT with a weight above 0"
            )
        out.append((source, value))
    return out


def training_sources(data: DataConfig) -> list[tuple[str, float]]:
    """`data.train` and what is mixed into it, with weights."""
    return [(data.train, 1.0), *read_mix(data.mix)]


def with_steps(config: Config) -> Config:
    """The config with `train.epochs` worked out as `train.steps`, in every stage.

    Raises:
        UserError: data whose number of rows is not known before the run.
    """
    stages = plan(config)
    steps = {
        stage.name: _steps_of_epochs(stage, stages)
        for stage in stages
        if stage.kind == "rl" and stage.config.train.epochs
    }
    if not steps:
        return config
    length = {name: {"steps": count, "epochs": 0.0} for name, count in steps.items()}
    common = replace(config.train, steps=max(steps.values()), epochs=0.0)
    own = tuple(
        replace(s, set={**s.set, "train": {**s.set.get("train", {}), **length.get(s.name, {})}})
        for s in config.stages
    )
    return replace(config, train=common if config.train.epochs else config.train, stages=own)


def _steps_of_epochs(stage: Stage, stages: Sequence[Stage]) -> int:
    config, where = stage.config, f"stage {stage.name}: train.epochs"
    source, data = config.data.train, config.data
    if source_key(source) in filtered_sources(stage, stages, Path()):
        raise UserError(
            f"{where}: how many rows a filter stage leaves is not known; give train.steps"
        )
    size = load_examples(source, data, "train", config.run.seed).size
    if size is None:
        raise UserError(f"{where}: {source} is endless; give train.steps")
    draws = config.train.epochs * size * sum(weight for _, weight in training_sources(data))
    steps = math.ceil(round(draws / config.train.examples_per_step, 6))
    log.info("%s = %g over %d rows: %d steps", where, config.train.epochs, size, steps)
    return steps
