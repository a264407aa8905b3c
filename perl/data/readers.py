"""One class for each way that rows are stored; of any of them a row can be had by its number."""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from perl.data.questions.literals import read_literal
from perl.types import UserError

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_FIRST = 100


class Source:
    """Rows with random access, here those of a list in memory.

    `root` is the folder that relative image paths start from and may not leave. `files` are those the rows come from;
    without any it cannot be told whether they have changed.
    """

    def __init__(self, name: str, root: Path, rows: Any, files: Sequence[Path] = ()) -> None:
        self.name, self.root, self.files, self._rows = name, root, tuple(files), rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Mapping[str, Any]:
        """Row i, images as stored; raises UserError if it cannot be read."""
        return self._as_object(self._rows[i], i)

    def columns(self) -> list[str]:
        """Their names; those of the first hundred rows, where each may have others."""
        rows = list(self.first_rows()) or [self.row(0)]
        return list(dict.fromkeys(key for row in rows for key in row))

    def first_rows(self) -> Iterator[Mapping[str, Any]]:
        """The first hundred rows, without those that cannot be read."""
        for i in range(min(_FIRST, len(self))):
            with suppress(UserError):
                yield self.row(i)

    def place(self, i: int) -> str:
        """How messages name row i, counting from 1."""
        return f"{self.name} row {i + 1}"

    def root_of(self, i: int) -> Path:
        """The folder that the image paths of row i start from."""
        return self.root

    @property
    def identities(self) -> frozenset[str]:
        """Equal for the same rows by whatever name; one for each of several sources."""
        return frozenset({os.path.realpath(self.files[0]) if self.files else self.name})

    @property
    def about(self) -> list[Any]:
        """What tells its rows from those of others while its files stay as they are, JSON-able."""
        return [self.name, str(self.root), len(self), sorted(self.identities)]

    def _as_object(self, row: Any, i: int) -> Mapping[str, Any]:
        if not isinstance(row, dict):
            raise UserError(
                f"{self.place(i)}: is a {type(row).__name__}; write an object with named columns"
            )
        return row


class JsonLines(Source):
    """A JSON Lines file: only the offsets of its lines are kept in memory.

    `datasets` is not asked here: it gives every row the columns and types of all, and refuses files whose rows differ in
    them. A compressed file is unpacked into a temporary one without a name.
    """

    def __init__(self, path: Path) -> None:
        self._file = _unpacked(path)
        self._offsets, self._lines = array("Q"), array("Q")
        self._ends = array("Q")
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                self._offsets.append(offset)
                self._ends.append(offset + len(line))
                self._lines.append(number)
            offset += len(line)
        super().__init__(str(path), _root_of(path), self._offsets, [path])

    def row(self, i: int) -> Mapping[str, Any]:
        start = self._offsets[i]
        # It moves no position of the file, which processes and threads share.
        line = os.pread(self._file.fileno(), self._ends[i] - start, start)
        return self._as_object(_parsed(line, self.place(i), "line"), i)

    def place(self, i: int) -> str:
        return f"{self.name} line {self._lines[i]}"


class ArrowRows(Source):
    """A data set of the `datasets` library, memory-mapped; its images are not decoded here."""

    def __init__(self, name: str, root: Path, dataset: Any) -> None:
        files = [Path(each["filename"]) for each in dataset.cache_files]
        super().__init__(name, root, dataset.with_format("arrow"), files)
        self._features = _undecoded(dataset.features)

    @property
    def identities(self) -> frozenset[str]:
        return frozenset({self._rows._fingerprint})

    def columns(self) -> list[str]:
        return list(self._features)

    def row(self, i: int) -> Mapping[str, Any]:
        return self._features.decode_example(self._rows[i : i + 1].to_pylist()[0])


class Csv(Source):
    """CSV: every cell a text, so that an answer `007` or `None` stays what it is; an empty cell is null. A cell that holds an
    object, or a list of texts or objects, as JSON or as pandas writes it, is read as one: `["a.png", "b.png"]`.
    """

    # `datasets` reads it by pandas, which guesses types: `007` becomes 7, and `None` nothing.

    def __init__(self, path: Path, separator: str) -> None:
        self._lines = array("Q")
        rows = []
        csv.field_size_limit(2**31 - 1)
        with _unpacked(path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            reader = csv.DictReader(text, delimiter=separator, strict=True)
            names = Counter(reader.fieldnames or ())
            if again := [name for name, count in names.items() if count > 1]:
                raise UserError(
                    f"{path}: has two columns {again[0]}; rename one, or put a list into one cell"
                )
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path} line {reader.line_num}: has more cells than the header; put those with a "
                        "separator into quotes"
                    )
                rows.append({key: _cell(value) for key, value in row.items()})
                self._lines.append(reader.line_num)
        super().__init__(str(path), _root_of(path), rows, [path])

    def place(self, i: int) -> str:
        return f"{self.name} line {self._lines[i]}"


class Several(Source):
    """Sources one after the other, each with its own root."""

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        whole = all(source.files for source in sources)
        files = [file for source in sources for file in source.files if whole]
        super().__init__(name, sources[0].root, sources, files)
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for source in self._rows for name in source.columns()))

    def row(self, i: int) -> Mapping[str, Any]:
        source, own = self._at(i)
        return source.row(own)

    def place(self, i: int) -> str:
        source, own = self._at(i)
        return source.place(own)

    def root_of(self, i: int) -> Path:
        source, own = self._at(i)
        return source.root_of(own)

    @property
    def identities(self) -> frozenset[str]:
        return frozenset().union(*(source.identities for source in self._rows))

    def _at(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect.bisect_right(self._ends, i)
        return self._rows[number], i - (self._ends[number - 1] if number else 0)


def open_file(path: Path) -> Source:
    """The rows of a file, by the ending of its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] and suffixes[-1] in COMPRESSED
    suffix = suffixes[-2 if packed and len(suffixes) > 1 else -1] if suffixes else ""
    if suffix == ".jsonl":
        return JsonLines(path)
    if suffix == ".json":
        with _unpacked(path) as file:
            text = file.read()
        try:
            rows = _parsed(text, str(path), "file")
        except UserError as error:
            if getattr(error.__cause__, "msg", "") == "Extra data":  # JSON Lines by another name
                return JsonLines(path)
            raise
        if not isinstance(rows, list):
            raise UserError(f"{path}: holds no list of rows; write [{{...}}, ...] or a .jsonl file")
        return Source(str(path), _root_of(path), rows, [path])
    if suffix == ".parquet" and not packed:
        return open_parquet(str(path), [path])
    if suffix in (".csv", ".tsv"):
        return Csv(path, "," if suffix == ".csv" else "\t")
    raise UserError(
        f"{path}: cannot read '{path.suffix}' files; use {', '.join(FILE_TYPES)}, "
        f"JSON and CSV also with {', '.join(COMPRESSED)}"
    )


def open_parquet(name: str, paths: Sequence[str | Path]) -> ArrowRows:
    """The rows of Parquet files with the same columns."""
    import datasets

    patterns = [as_pattern(path) for path in paths]
    table = datasets.load_dataset("parquet", data_files=patterns, split="train")
    return ArrowRows(name, _root_of(paths[0]), table)


def as_pattern(path: str | Path) -> str:
    """A pattern that matches the path alone."""
    return re.sub(r"([*?\[])", r"[\1]", os.path.abspath(path))


def _parsed(text: bytes, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON ({error}); correct the {what}") from error


def _cell(text: str | None) -> Any:
    if not text or not text.startswith(("[", "{")):
        return text or None
    try:
        value = read_literal(text)
    except ValueError:
        return text
    listed = isinstance(value, list) and all(isinstance(v, str | dict) for v in value)
    return value if listed or isinstance(value, dict) else text


def _root_of(file: str | Path) -> Path:
    # As it is written: in the hub's cache a file is a link to where no picture lies beside it.
    return Path(os.path.abspath(file)).parent


def _unpacked(path: Path) -> IO[bytes]:
    """The file, or what it holds packed."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import fsspec
    from fsspec.compression import available_compressions

    if path.suffix.lower() == ".zst" and "zstd" not in available_compressions():
        raise UserError(f"{path}: to read it, pip install zstandard, or unpack it with zstd -d")
    whole: Any = tempfile.TemporaryFile()  # noqa: SIM115
    with fsspec.open(str(path), "rb", compression="infer") as packed:
        shutil.copyfileobj(cast(IO[bytes], packed), whole)
    whole.seek(0)
    return whole


def _undecoded(features: Any) -> Any:
    """The features with every image and video left as its bytes and path, so that errors can name the row."""
    import datasets

    def visit(feature: Any) -> Any:
        if isinstance(feature, (datasets.Image, datasets.Video)):
            return type(feature)(decode=False)
        if isinstance(feature, dict):
            return {key: visit(value) for key, value in feature.items()}
        if isinstance(feature, datasets.List):
            return datasets.List(visit(feature.feature), length=feature.length)
        return feature

    return datasets.Features({key: visit(value) for key, value in features.items()})
