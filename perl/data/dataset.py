"""Examples by number: of a file, folder or hub data set, or bundled questions."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from perl.config import DataConfig
from perl.data.columns import choose_layout, may_move, read_row, tell_once, with_first_index
from perl.data.held_out import Shown, held_out_rows, largest_group, shown_by
from perl.data.pictures import Split, open_stored
from perl.data.sources import Source, is_streamable, open_source, open_streamed
from perl.data.tasks import BundledTasks
from perl.data.videos import Frame, open_frame
from perl.kept import kept
from perl.permutation import check_answer, from_json, plan_of
from perl.recipe import is_split, source_key, split_of
from perl.types import Example, UserError

log = logging.getLogger(__name__)

BUNDLED = "bundled:"
_FIRST = 100
"""Rows of a streamed data set that are looked at before a run."""


def load_examples(
    source: str, config: DataConfig, split: Split, seed: int, limit: int | None = None
) -> Dataset:
    """The examples of a source; images are decoded one item at a time.

    `source` is `bundled:digits`, `bundled:folder:PATH`, what `open_source` takes, or `split:SHARE`: what `config`
    holds out of a training source, which then has only the other rows. `limit` keeps that many examples: the first of the bundled
    ones, a seeded sample of a file, in its order. Raises UserError for a source that cannot be read,
    is empty, or lacks columns.
    """
    held, (share, of) = is_split(source), split_of(config) or (0.0, "")
    apart = held or (split == "train" and share > 0 and source_key(source) == source_key(of))
    source = of if held else source
    if not source:
        raise UserError(f"data.{'train' if split == 'train' else 'eval'} is empty; name a data set")
    if source.startswith(BUNDLED):  # They keep the pictures of both splits apart.
        return BundledTasks(source.removeprefix(BUNDLED), split, config, seed, limit)
    if config.streaming and (split == "train" or is_streamable(source)):
        # The first rows stand for all.
        name, root, streamed = open_streamed(source, split)
        return RowDataset(Source(name, root, list(islice(streamed, limit or _FIRST))), config)
    rows = open_source(source, "train" if apart else split)
    if not apart:
        return RowDataset(rows, config, seed, limit)
    chosen = _held_out(RowDataset(rows, config), share)
    if not held:
        chosen = sorted(set(range(len(rows))).difference(chosen))
    return RowDataset(rows, config, seed, limit, chosen)


def check_apart(measured: Dataset, trained: Sequence[Dataset]) -> None:
    """Say how many examples to measure on show pictures that training shows too, as far as pictures are files.

    Raises:
        UserError: they are the same data.
    """
    if not isinstance(measured, RowDataset):
        return
    own, common = [measured.shown(i) for i in range(len(measured))], set()
    names = {key for shown in own for key in shown}
    for each in trained:
        if not isinstance(each, RowDataset):
            continue
        if measured.source.identities & each.source.identities:
            if measured.part and each.part:
                continue
            if measured.part:
                raise UserError(
                    f"{each.source.name} holds rows of {measured.source.name}, a part of which data.eval holds out, and "
                    "would train on that too; name these data once, in data.train"
                )
            raise UserError(
                f"data.eval is {each.source.name}, which is trained on, and has no split of its own to measure on; name "
                "other data, or hold a part of it out with data.eval = split:0.05"
            )
        if all(map(os.path.isabs, each.shown(0))):
            common.update(_shown_too(each, names))
    if common:
        log.warning(
            "data.eval: %d of %d examples show pictures that training shows too, as %s: they may be answered by heart; "
            "data.eval = split:0.05 would keep such rows together",
            *(sum(not common.isdisjoint(shown) for shown in own), len(own), min(common)),
        )


class Stored(NamedTuple):
    """The images of a row as the data hold them, and what to know to open them, in whatever process."""

    images: Sequence[Any]
    root: Path
    where: str

    def open(self, *, decode: bool = True) -> tuple[Any, ...]:
        """The pictures; without `decode` only their headers are read.

        Raises:
            UserError: one is missing, broken or too large.
        """
        try:
            return tuple(
                (open_frame if isinstance(image, Frame) else open_stored)(
                    image, self.root, f"{self.where}, image {k}", decode=decode
                )
                for k, image in enumerate(self.images, start=1)
            )
        except UserError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            raise _of_kind("image missing" if missing else "image", error) from error.__cause__


class RowDataset:
    """The rows of a file, folder or hub data set as Examples, or a seeded sample of `limit` of them.

    `rows` are those of the source to take, a part of it; None: all.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        seed: int = 0,
        limit: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.source, self.part = source, rows is not None
        self._reading = [config.columns, config.map, config.frames, config.image_root]
        self._said: set[str] = set()
        self._image_root: Path | None = None
        if config.image_root:
            self._image_root = Path(os.path.abspath(Path(config.image_root).expanduser()))
        layout = choose_layout(config, source.columns(), source.name)
        self.layout = with_first_index(layout, source)
        self.rows: Sequence[int] = range(len(source)) if rows is None else rows
        """By example its row of the source."""
        if limit is not None and limit < len(self.rows):
            self.rows = sorted(random.Random(f"{seed}/limit").sample(self.rows, limit))
        self.size = len(self.rows)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        index = self.rows[i]
        return self.read(self.source.row(index), index)

    def check(self, i: int) -> Example:
        """Example i without decoding its images; raises the UserError that it would raise."""
        index = self.rows[i]
        return self.read(self.source.row(index), index, decode=False)

    def place(self, i: int) -> str:
        """How messages name example i."""
        return self.source.place(self.rows[i])

    def id_of(self, i: int) -> str:
        """The id of example i; by its row in the source where it has none or cannot be read."""
        id = None
        with suppress(UserError):
            id = self.layout.ours(self.row(i)).get("id")
        return self._unnamed(self.rows[i]) if id is None else str(id)

    @staticmethod
    def _unnamed(index: int) -> str:
        return f"row-{index:06d}"

    def shown(self, i: int) -> Shown:
        """What example i shows, by which rows that share pictures are found; nothing if it cannot be read."""
        index = self.rows[i]
        try:
            example = read_row(self.source.row(index), self.layout, "")
        except UserError:
            return {}
        return shown_by(example, self.root_of(index))

    def about(self, whole: bool = False) -> list[Any]:
        """What tells its examples, or all that the source has, from others while the source's files stay as they are."""
        return [self.source.about, self._reading, range(len(self.source)) if whole else self.rows]

    def row(self, i: int) -> Mapping[str, Any]:
        """Example i as the source has it."""
        return self.source.row(self.rows[i])

    def read(self, row: Mapping[str, Any], index: int, *, decode: bool = True) -> Example:
        """The example of row `index` of the source, as `row` has it."""
        example = self._unopened(row, index)
        return replace(example, images=self.open_images(example.images, index, decode=decode))

    def unopened(self, i: int) -> tuple[Example, Stored]:
        """Example i but for its images, and these."""
        index = self.rows[i]
        example = self._unopened(self.source.row(index), index)
        return example, Stored(example.images, self.root_of(index), self.source.place(index))

    def _unopened(self, row: Mapping[str, Any], index: int) -> Example:
        where = self.source.place(index)
        example = read_row(row, self.layout, where, id=self._unnamed(index))
        if labelled := from_json(example.extra.get("plan")):
            extra = {key: value for key, value in example.extra.items() if key != "plan"}
            example = replace(example, plan=labelled, extra=extra)
        if not example.images:
            self._tell(where, "a row without images is a question of text alone")
        elif len(example.images) > 1 and not may_move(self.layout.ours(row)):
            self._tell(
                where,
                "it has neither kind nor should_change, so its images keep their order; perl-rl label "
                f"{self.source.name} says which may move",
            )
        example = replace(example, plan=plan_of(example))
        try:
            check_answer(example)
        except UserError as error:
            raise _of_kind("label", UserError(f"{where}: {error}")) from None
        return example

    def root_of(self, index: int) -> Path:
        """The folder that relative image paths of row `index` start from."""
        return self._image_root or self.source.root_of(index)

    def open_images(
        self, images: Sequence[Any], index: int, *, decode: bool = True
    ) -> tuple[Any, ...]:
        """The images of row `index` from what the data holds; without `decode` only their headers are read."""
        stored = Stored(images, self.root_of(index), self.source.place(index))
        return stored.open(decode=decode)

    def _tell(self, where: str, what: str) -> None:
        """Once for a source, however many of its rows are so."""
        if what not in self._said:  # Many files take long to be told apart.
            self._said.add(what)
            about = (sorted(self.source.identities), what)
            tell_once(logging.WARNING, f"{where}: {what} (said once)", about)


def _held_out(dataset: RowDataset, share: float) -> list[int]:
    """The rows to hold out of a whole data set; those that cannot be read are not among them."""
    name = dataset.source.name

    def find() -> tuple[list[int], int, int]:
        shown = [dataset.shown(i) for i in range(len(dataset))]
        if not any(shown):
            dataset.check(0)
        held = held_out_rows(shown, share, name)
        return held, len({key for i in held for key in shown[i]}), largest_group(shown)

    held, pictures, largest = kept(["held out", share, dataset.about()], dataset.source.files, find)
    text = (
        f"data.eval = split:{share:g}: {len(held)} of the {len(dataset)} rows of {name} are held out, with {pictures} "
        "pictures that no other row shows"
    )
    tell_once(logging.INFO, text, text)
    if largest > max(len(held), len(dataset) // 2):
        text = (
            f"{name}: {largest} of its {len(dataset)} rows hang together by shared images and are all trained on; what is "
            "held out may be unlike them, so name data of its own with data.eval if there is any"
        )
        tell_once(logging.WARNING, text, text)
    return held


def _shown_too(trained: RowDataset, names: Collection[str]) -> list[str]:
    """Which of these pictures are trained on."""

    def find() -> list[str]:
        shown = {key for i in range(len(trained)) for key in trained.shown(i)}
        return sorted(shown.intersection(names))

    return kept(["shown too", sorted(names), trained.about()], trained.source.files, find)


def _of_kind(kind: str, error: UserError) -> UserError:
    error.kind = kind
    return error


Dataset = BundledTasks | RowDataset
"""Examples by index; `size` is None where they are endless, and then `len()` raises TypeError."""
