"""Rows of files, saved folders and hub data sets, read one at a time."""

from __future__ import annotations

import json
import logging
import re
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perl.files import offline_if_unreachable
from perl.types import UserError, one_line

log = logging.getLogger(__name__)

FILE_TYPES = (".jsonl", ".json", ".parquet")
_HUB = re.compile(r"([^:]+)(?::([^:\[\]]+))??(?::([^:\[\]]+(?:\[[^\[\]]*\])?))?")
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev")}


class Source:
    """Rows with random access, here those of a list in memory.

    `root` is the folder that relative image paths start from and may not leave.
    """

    def __init__(self, name: str, root: Path, rows: Any) -> None:
        self.name, self.root, self._rows = name, root, rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Mapping[str, Any]:
        """Row i, images as stored; raises UserError if it cannot be read."""
        return self._as_object(self._rows[i], i)

    def place(self, i: int) -> str:
        """How messages name row i, counting from 1."""
        return f"{self.name} row {i + 1}"

    def _as_object(self, row: Any, i: int) -> Mapping[str, Any]:
        if not isinstance(row, dict):
            raise UserError(
                f"{self.place(i)}: is a {type(row).__name__}; write an object with named columns"
            )
        return row


def open_source(source: str, split: str) -> Source:
    """The rows behind a path or a hub name; raises UserError if there are none.

    `source` is a .jsonl, .json or .parquet file, a folder that `datasets` saved or can load, or
    `name[:config][:split]` on the hub. Without its own split a data set with several gives `split`,
    and for `test` its validation split where there is no test.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            rows = _open_file(path)
        elif path.is_dir():
            rows = _open_folder(path, split)
        else:
            rows = _open_hub(source, split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read the data set {source}: {type(error).__name__}: {one_line(error, 300)}; "
            "check the name and the file"
        ) from error
    if len(rows) == 0:
        raise UserError(f"{source}: the data set is empty; give one with rows")
    return rows


class JsonLines(Source):
    """A JSON Lines file: only the offsets of its lines are kept in memory."""

    def __init__(self, path: Path) -> None:
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        super().__init__(str(path), path.resolve().parent, self._offsets)

    def row(self, i: int) -> Mapping[str, Any]:
        with open(self.name, "rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        return self._as_object(_parsed(line, self.place(i), "line"), i)

    def place(self, i: int) -> str:
        return f"{self.name} line {self._lines[i]}"


class ArrowRows(Source):
    """A data set of the `datasets` library, memory-mapped; its images are not decoded here."""

    def __init__(self, name: str, root: Path, dataset: Any) -> None:
        super().__init__(name, root, dataset.with_format("arrow"))
        self._features = _undecoded(dataset.features)

    def row(self, i: int) -> Mapping[str, Any]:
        return self._features.decode_example(self._rows[i : i + 1].to_pylist()[0])


def _parsed(text: bytes, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON ({error}); correct the {what}") from error


def _open_file(path: Path) -> Source:
    suffix, root = path.suffix.lower(), path.resolve().parent
    if suffix == ".jsonl":
        return JsonLines(path)
    if suffix == ".json":
        rows = _parsed(path.read_bytes(), str(path), "file")
        if not isinstance(rows, list):
            raise UserError(f"{path}: holds no list of rows; write [{{...}}, ...] or a .jsonl file")
        return Source(str(path), root, rows)
    if suffix == ".parquet":
        import datasets

        # The path as a pattern that matches it alone.
        pattern = re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))
        table = datasets.load_dataset("parquet", data_files=pattern, split="train")
        return ArrowRows(str(path), root, table)
    raise UserError(f"{path}: cannot read '{suffix}' files; use {', '.join(FILE_TYPES)}")


def _open_folder(path: Path, split: str) -> Source:
    import datasets

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    return ArrowRows(str(path), path.resolve(), _choose_split(found, split, str(path)))


def _open_hub(source: str, split: str) -> Source:
    match = _HUB.fullmatch(source)
    looks_local = source.startswith((".", "/", "~")) or source.lower().endswith(FILE_TYPES)
    if match is None or looks_local or source.count("/") > 1:
        raise UserError(
            f"there is no data file or folder {source}; correct the path, "
            "which starts in the folder where the command is run"
        )
    offline_if_unreachable()
    import datasets
    from datasets import config as settings

    name, config, own_split = match.groups()
    log.info("reading %s from the hub", source)
    found = datasets.load_dataset(name, config, split=own_split)
    # Images stored as paths lie in the download cache, and nowhere else.
    root = Path(settings.HF_CACHE_HOME).expanduser().resolve()
    return ArrowRows(source, root, _choose_split(found, split, source))


def _choose_split(found: Any, split: str, where: str) -> Any:
    if not isinstance(found, dict):
        return found
    for name in _SPLITS[split]:
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise UserError(
        f"{where} has the splits {', '.join(found)} but no {split}; name one, as in {where}:SPLIT"
    )


def _undecoded(features: Any) -> Any:
    """The features with every image left as its bytes and path, so that errors can name the row."""
    import datasets

    def visit(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, dict):
            return {key: visit(value) for key, value in feature.items()}
        if isinstance(feature, datasets.List):
            return datasets.List(visit(feature.feature), length=feature.length)
        return feature

    return datasets.Features({key: visit(value) for key, value in features.items()})
