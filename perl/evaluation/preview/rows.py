"""The rows of data, each in some orders of its images as a run would show it, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from perl.config import Config
from perl.data.check import Checks, Fault, fault_of, sound
from perl.data.columns import SHOULD_CHANGE, read_row
from perl.data.dataset import RowDataset, load_examples
from perl.data.pictures import stored_image
from perl.data.videos import Frame
from perl.evaluation.check_command import checks_for, named_processor
from perl.permutation import (
    Consistency,
    Order,
    all_orders,
    num_orders,
    orders,
    permute,
    released_orders,
)
from perl.types import Example, UserError, Variant

MOST_ORDERS = 120
"""Of a row, where all are wanted: those of five images."""
FIRST = 200
"""Rows shown where nothing says how many."""


@dataclass(frozen=True)
class Row:
    """One row as the model would see it."""

    id: str
    variants: tuple[Variant, ...] = ()
    """By order, the original one first; none where the row is refused."""
    images: tuple[str, ...] = ()
    """What the images are called, in the original order."""
    reason: str = ""
    """Why they may move, or may not."""
    total: int = 1
    """Orders that there are, those that are not shown included."""
    fault: Fault | None = None

    @property
    def example(self) -> Example:
        return self.variants[0].example

    @property
    def moves(self) -> bool:
        return self.total > 1


class Rows:
    """The first `limit` rows of data, or all that there are, each in `count` orders; None: in all, up to MOST_ORDERS.

    Raises:
        UserError: data that cannot be read at all; a faulty row becomes one with a `fault`.
    """

    def __init__(
        self, data: str, config: Config, count: int | None, limit: int | None = None
    ) -> None:
        self.data, self._count = data, count
        self.text: Consistency = config.permutation.text
        self._draw, self._seed = config.permutation.draw, config.run.seed
        few = limit or FIRST
        some = few if config.data.streaming else None
        self._dataset = load_examples(data, config.data, "train", self._seed, some)
        size = self._dataset.size
        self.total = None if some else size
        """Rows that there are; None: nobody knows, or no end of them."""
        self.shown = few if size is None else min(size, limit or size)
        self._checks: Checks = checks_for(config, named_processor(config))

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, range(self.shown))

    def _row(self, i: int) -> Row:
        dataset = self._dataset
        try:
            _, example, _ = sound(dataset, i, self._checks)
            variants = [permute(example, order, self.text) for order in self._orders(example)]
        except UserError as error:
            id = dataset.id_of(i) if isinstance(dataset, RowDataset) else dataset.place(i)
            return Row(id, fault=fault_of(error, dataset, i))
        if isinstance(dataset, RowDataset):
            images, reason = _names(dataset, i), reason_of(example)
        else:
            images = [f"image {k}" for k in range(1, len(example.images) + 1)]
            reason = "a bundled question, made with its label"
        return Row(example.id, tuple(variants), tuple(images), reason, num_orders(example))

    def _orders(self, example: Example) -> list[Order]:
        if self._count is None:
            return all_orders(example, MOST_ORDERS, self._seed)
        if self._draw == "released":
            return released_orders(example)[: self._count]
        return orders(example, self._count, self._seed, epoch=0)


def reason_of(example: Example) -> str:
    """Why the images of a row may move, or may not."""
    given = str(example.extra.get("label_reason") or "").strip()
    if not given and len(example.images) < 2:
        return "a single image" if example.images else "no images"
    if given or "kind" in example.origin:
        alone = len(example.images) > 1 and example.kind != "none" and num_orders(example) == 1
        return (given or "as labelled") + ", and no other order shows anything else" * alone
    if example.origin.keys() & set(SHOULD_CHANGE):
        return "as labelled" if example.kind != "none" else "frames of a video keep their sequence"
    return "no labels, so that images keep their order; perl-rl label says which may move"


def _names(dataset: RowDataset, i: int) -> list[str]:
    """Of the images of a row: their files' names, the whole paths where two of them have one name."""
    stored = read_row(dataset.row(i), dataset.layout, dataset.place(i)).images
    paths = [_path(image) for image in stored]
    files = {path for path in paths if path}
    unique = len({PurePath(path).name for path in files}) == len(files)
    return [
        (PurePath(path).name if unique else path) if path else f"image {k}"
        for k, path in enumerate(paths, 1)
    ]


def _path(image: Any) -> str:
    """That of an image as the data hold it; empty where it is embedded."""
    if isinstance(image, Frame):
        video = _path(image.video)
        return video and f"{video} frame {image.k + 1}"
    if isinstance(image, dict) and (path := image.get("path")):
        return str(path)
    image = stored_image(image)
    return image if isinstance(image, str) and not image.startswith("data:") else ""
