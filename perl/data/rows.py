"""Rows written as JSON Lines that load again: their images lie where the new file finds them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from perl.data.dataset import BUNDLED
from perl.data.pictures import SUFFIXES
from perl.files import replacing
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
    name = data.removeprefix(BUNDLED).rstrip("/").rpartition("/")[2].replace(":", "-")
    return Path(f"{name}.{ending}")


def check_output(output: Path, data: str) -> None:
    """Raise UserError if `output` is the data itself or lies in no folder."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder to write it to; make it first")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    source = Path(data).expanduser()
    if source.exists() and output.resolve() == source.resolve():
        raise UserError(f"--output {output} is the data itself; choose another file")


class RowWriter:
    """Makes rows fit for a JSON Lines file `output`.

    Relative image paths start from `root`, and stay where the image lies in the folder of `output`
    or below. Every other image gets a file in `<output's stem>-images` beside it. A file becomes a
    hard link, or a copy on another file system, named by a hash of its content, so that rows which
    show the same picture share it. PNG, JPEG and WebP bytes are written as they are, the rest as PNG.
    """

    def __init__(self, output: Path, root: Path | None) -> None:
        self._folder = output.resolve().parent
        self._root = None if root is None else root.resolve()
        self._images = self._folder / f"{output.stem}-images"
        self._linked: dict[Path, str] = {}

    def portable(
        self,
        row: Mapping[str, Any],
        images: Sequence[Any],
        example: Callable[[], Example],
        number: int,
    ) -> dict[str, Any]:
        """The row as JSON can hold it.

        Args:
            row: all columns.
            images: its images as the data holds them.
            example: gives it with its images decoded; called only if one has to be encoded anew, or
                cannot be found, which it raises a UserError for.
            number: of the row, for the names of the images that are no files.
        """
        stems = _stems(number, len(images))
        names = [self._name(image, stem) for image, stem in zip(images, stems, strict=True)]
        if None in names:
            decoded = zip(names, example().images, stems, strict=True)
            names = [name or self._encode(image, stem) for name, image, stem in decoded]
        return dict(row) if list(images) == names else _with_images(row, names)

    def bundled(self, example: Example, number: int) -> dict[str, Any]:
        """A row for an example that comes from no file."""
        if isinstance(example.question, str):
            question: dict[str, Any] = {"question": example.question}
        else:
            turns = [{"role": m.role, "content": m.content} for m in example.messages]
            question = {"messages": turns}
        stems = _stems(number, len(example.images))
        row = {
            "id": example.id,
            **question,
            "images": [
                self._encode(image, stem) for image, stem in zip(example.images, stems, strict=True)
            ],
            "answer": example.answer,
            "kind": example.kind,
            "should_change": example.should_change,
            "demonstration": example.demonstration,
            "task": example.task,
            **example.extra,
        }
        return {key: value for key, value in row.items() if value is not None}

    def _name(self, image: Any, stem: str) -> str | None:
        """What stands for the image in the new file; None if it must be encoded anew."""
        while isinstance(image, dict):
            image = next(
                (image[k] for k in ("bytes", "image", "path", "url") if image.get(k)), None
            )
        if isinstance(image, bytes):
            suffix = _suffix_of(image)
            return suffix and self._add(f"{stem}{suffix}", partial(Path.write_bytes, data=image))
        if not isinstance(image, str) or self._root is None:
            return None
        if image.startswith("data:") or self._root == self._folder:
            return image
        path = (self._root / image.removeprefix("file://")).resolve()
        if not path.is_relative_to(self._root) or not path.is_file():
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


def _with_images(row: Mapping[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    """The row with its images in a column `images`, and none inside the parts of a chat."""
    rest = {key: _without_embedded(value) for key, value in row.items() if key != "image"}
    return {**rest, "images": list(names)}


def _without_embedded(value: Any) -> Any:
    if not (isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)):
        return value
    return [
        {**turn, "content": [_bare_part(part) for part in turn["content"]]}
        if isinstance(turn.get("content"), list)
        else turn
        for turn in value
    ]


def _bare_part(part: Any) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "image":
        return {"type": "image"}
    return part
