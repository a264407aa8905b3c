"""The answers of one model, kept as they come: one JSON Lines file a benchmark, and the settings they were given under."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl.files import append_rows, keep_rows, read_rows, write_json
from perl.types import UserError

SETTINGS = "settings.json"

_KEYS = frozenset({"id", "task", "order", "movable", "completion", "finished", "answer", "score"})

Row = dict[str, Any]
"""One answer: `id`, `task`, `problem` (the same for versions of one question), `order` (0-based original images by
slot), `movable`, `completion` (None where the prompt was too long to be asked), `finished`, `answer`, `gold`, `score`
and `chosen`."""


class AnswerFile:
    """The answers to one benchmark, by item and order of its images.

    A line that was being written when a process was killed does not count, and its item is asked again. Of two
    lines for one item and order the later one counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, tuple[int, ...]], Row] = {}
        self._lines = 0
        for row in read_rows(path):
            self._lines += 1
            if not row.keys() >= _KEYS:
                raise UserError(f"{path} line {self._lines}: is no answer; remove the line")
            self.rows[_key(row)] = row

    def has(self, id: str, order: Sequence[int]) -> bool:
        """Whether there is an answer; a prompt that was too long is none, as the limit may have been raised."""
        row = self.rows.get((id, tuple(order)))
        return row is not None and row["completion"] is not None

    def cut(self) -> None:
        """Drop a last line that was not written to its end."""
        if self.path.exists():
            keep_rows(self.path, self._lines)

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows, on disk when this returns; a row that is there already is not written again."""
        new = [row for row in rows if self.rows.get(_key(row)) != row]
        self.rows |= {_key(row): row for row in new}
        append_rows(self.path, new)


def official(rows: Sequence[Row]) -> list[Row]:
    """The rows of the order in which the benchmark shows its images."""
    return [row for row in rows if row["order"] == sorted(row["order"])]


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make the output folder for answers given under `settings`, or go on in it if they are the same.

    Raises:
        UserError: it holds something else, or answers given under other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; with --suite it is a folder for the answers")
    if (folder / SETTINGS).exists():
        if wrong := different(read_settings(folder), settings):
            changes = "; ".join(f"{key} was {old} and is {new}" for key, old, new in wrong)
            raise UserError(
                f"--output {folder} holds answers given under other settings: {changes}; "
                "choose another folder, or the same settings"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--output {folder} is not empty and holds no answers ({SETTINGS} is missing); choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the answers in a folder were given under; raises UserError if it holds none."""
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(
            f"{folder} holds no answers: there is no {SETTINGS}; give a folder that perl-rl evaluate --suite wrote"
        )
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON ({error}); correct or remove the file") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is no JSON object; correct or remove the file")
    return settings


def different(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values are not the same, with both."""
    return [(k, one.get(k), other.get(k)) for k in {**one, **other} if one.get(k) != other.get(k)]


def _key(row: Row) -> tuple[str, tuple[int, ...]]:
    return row["id"], tuple(row["order"])
