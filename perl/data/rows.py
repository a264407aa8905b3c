"""Rows written as JSON Lines that load again: their images lie where the new file finds them."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from perl.data.columns import IMAGES, read_row
from perl.data.dataset import BUNDLED, Dataset
from perl.data.pictures import SUFFIXES, path_inside, stored_image
from perl.data.tasks import BundledTasks
from perl.files import replacing, to_line
from perl.types import Example, UserError

_AS_IS = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}


def file_beside(data: str, ending: str) -> Path:
    """Where what belongs to a data set is written: beside its file or folder, else in this folder.

    Example: `file_beside("data/train.jsonl", "labelled.jsonl")` is `data/train.labelled.jsonl`, and
    for `bundled:digits` it is `digits.labelled.jsonl`.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return path.with_name(f"{path.stem}.{ending}")
    if path.is_dir():
        return path.with_name(f"{path.name}.{ending}")
    name = data.removeprefix(BUNDLED).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[:*?\[\],]+", "-", name).strip("-")
    return Path(f"{name}.{ending}")


def check_output(output: Path, data: str, option: str = "--output") -> None:
    """Raise UserError, naming the option, if `output` is the data itself or lies in no folder."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"{option} {output}: there is no folder to write it to; make it first")
    if output.is_dir():
        raise UserError(f"{option} {output} is a folder; name a file")
    source = Path(data).expanduser()
    if source.exists() and output.resolve() == source.resolve():
        raise UserError(f"{option} {output} is the data itself; choose another file")


def write_rows(
    dataset: Dataset,
    output: Path,
    indices: Sequence[int],
    accuracies: Sequence[float],
) -> None:
    """Write rows of a data set with a column `accuracy`, whole or not at all; images as `RowWriter` has them.

    A question that comes again has the id `<id>#2`, `<id>#3`, ..., so that its image orders are drawn
    anew. Where the data has no ids, rows go by their line in the new file.
    """
    writer, ids = RowWriter(output, dataset), _ids_of_copies(dataset, indices)
    id_column = "id" if isinstance(dataset, BundledTasks) else dataset.layout.names.get("id", "id")
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for place, (i, accuracy) in enumerate(zip(indices, accuracies, strict=True)):
            row = {**writer.row(i), "accuracy": accuracy}
            if place in ids:
                row[id_column] = ids[place]
            file.write(to_line(row))


def _ids_of_copies(dataset: Dataset, indices: Sequence[int]) -> dict[int, str]:
    """The new ids, by the place in `indices` where a question comes again."""
    if len(set(indices)) == len(indices):
        return {}
    if isinstance(dataset, BundledTasks):
        own = {i: dataset[i].id for i in set(indices)}
    else:
        own = {i: dataset.layout.ours(dataset.source.row(i)).get("id") for i in set(indices)}
    given = {i: None if value is None else str(value) for i, value in own.items()}
    taken, times = set(given.values()), Counter[int]()
    out: dict[int, str] = {}
    for place, i in enumerate(indices):
        times[i] += 1
        if times[i] > 1 and given[i] is not None:
            names = (f"{given[i]}#{k}" for k in itertools.count(times[i]))
            out[place] = next(name for name in names if name not in taken)
            taken.add(out[place])
    return out


class RowWriter:
    """Makes rows of a data set fit for a JSON Lines file `output`.

    Relative image paths stay where the image lies in the folder of `output` or below. Every other image gets a file in
    `<output's stem>-images` beside it. A file becomes a hard link, or a copy on another file system, named by a hash of its
    content, so that rows which show the same picture share it. PNG, JPEG and WebP bytes are written as they are, the rest as PNG.
    """

    def __init__(self, output: Path, dataset: Dataset) -> None:
        self._dataset = dataset
        self._folder = Path(os.path.abspath(output)).parent
        self._images = self._folder / f"{output.stem}-images"
        self._linked: dict[Path, str] = {}

    def row(self, i: int) -> dict[str, Any]:
        """Row i of the data set as JSON can hold it; images that are no files are named by i.

        Raises:
            UserError: an image that cannot be found or read.
        """
        dataset = self._dataset
        if isinstance(dataset, BundledTasks):
            return self._bundled(dataset[i], i)
        layout, where = dataset.layout, dataset.source.place(i)
        row = dataset.source.row(i)
        ours = layout.with_chats(layout.ours(row), where)
        framed = layout.with_frames(ours, where)
        if framed is not ours:  # As images they would move where the row says that its answer may.
            row = layout.theirs({**framed, "kind": framed.get("kind") or "none"})
        # Its labels do not matter here, and a labeller may be about to replace wrong ones.
        labels = layout.theirs({"kind": "none", "should_change": False})
        images = read_row({**row, **labels}, layout, where).images
        stems = _stems(i, len(images))
        names = [
            self._name(image, stem, dataset.root_of(i))
            for image, stem in zip(images, stems, strict=True)
        ]
        if None in names:
            decoded = zip(names, dataset.open_images(images, i), stems, strict=True)
            names = [name or self._encode(image, stem) for name, image, stem in decoded]
        return dict(row) if list(images) == names else _with_images(row, names, layout.images)

    def _bundled(self, example: Example, number: int) -> dict[str, Any]:
        names = zip(example.images, _stems(number, len(example.images)), strict=True)
        row = {
            "id": example.id,
            "question": example.question,
            "images": [self._encode(image, stem) for image, stem in names],
            "answer": example.answer,
            "kind": example.kind,
            "should_change": example.should_change,
            "demonstration": example.demonstration,
            "task": example.task,
        }
        return row | example.extra

    def _name(self, image: Any, stem: str, root: Path) -> str | None:
        """What stands for the image in the new file; None if it must be encoded anew."""
        image = stored_image(image)
        if isinstance(image, bytes):
            suffix = _suffix_of(image)
            return suffix and self._add(f"{stem}{suffix}", partial(Path.write_bytes, data=image))
        if not isinstance(image, str):
            return None
        if image.startswith("data:") or root == self._folder:
            return image
        path = path_inside(image, root)
        if path is None or not path.is_file():
            return None
        if path.is_relative_to(self._folder):
            return str(path.relative_to(self._folder))
        if path not in self._linked:
            self._linked[path] = self._link(path)
        return self._linked[path]

    def _link(self, path: Path) -> str:
        with path.open("rb") as file:
            name = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if path.suffix.lower() in SUFFIXES:
            name += path.suffix.lower()
        if (self._images / name).exists():
            return f"{self._images.name}/{name}"
        return self._add(name, partial(_link_or_copy, path))

    def _encode(self, image: Image.Image, stem: str) -> str:
        return self._add(f"{stem}.png", partial(image.save, format="PNG"))

    def _add(self, name: str, write: Callable[[Path], Any]) -> str:
        """A file of the image folder, whole or not there; its name in the new file."""
        self._images.mkdir(exist_ok=True)
        with replacing(self._images / name) as new:
            write(new)
        return f"{self._images.name}/{name}"


def _link_or_copy(source: Path, new: Path) -> None:
    # What a killed run left there may be a link to the source, which a copy would truncate.
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copy2(source, new)


def _stems(number: int, count: int) -> list[str]:
    return [f"{number:06d}-{k}" for k in range(1, count + 1)]


def _suffix_of(data: bytes) -> str | None:
    """The suffix of an image file that is written as it is."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _AS_IS.items() if data.startswith(magic)), None)


def _with_images(
    row: Mapping[str, Any], names: Sequence[str | None], column: str
) -> dict[str, Any]:
    """The row with its images in this column, and none inside the parts of a chat."""
    rest = {
        key: [_bare_turn(turn) for turn in value] if isinstance(value, list) else value
        for key, value in row.items()
        if key not in IMAGES
    }
    return {**rest, column: list(names)}


def _bare_turn(turn: Any) -> Any:
    parts = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(parts, list):
        return turn
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
    images = [kind in ("image", "image_url") for kind in kinds]
    bare = [{"type": "image"} if k else part for k, part in zip(images, parts, strict=True)]
    return {**turn, "content": bare}
