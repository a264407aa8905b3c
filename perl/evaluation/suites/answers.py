"""The answers of one model, kept as they come: one JSON Lines file a benchmark, and the settings they were given under."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perl.files import write_json
from perl.types import UserError

SETTINGS = "settings.json"

_KEYS = frozenset({"id", "task", "order", "movable", "completion", "finished", "answer", "score"})

Key = tuple[str, tuple[int, ...]]


class AnswerFile:
    """The answers to one benchmark, by item and order of its images.

    A line that was being written when a process was killed is dropped, and its item is asked again. A row is a
    dictionary with `id`, `task`, `problem` (the same for versions of one question), `order` (0-based original images by slot), `movable`, `completion` (None where the
    prompt was too long to be asked), `finished`, `answer`, `gold`, `score` and `chosen`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._whole = 0
        if not path.exists():
            return

        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._whole += len(line)
                row = _parse(line, f"{path} line {number}")
                if not row.keys() >= _KEYS:
                    raise UserError(f"{path} line {number}: is no answer; remove the line")
                self.rows[_key(row)] = row

    def has(self, id: str, order: Sequence[int]) -> bool:
        """Whether there is an answer; a prompt that was too long is none, as the limit may have been raised."""
        row = self.rows.get((id, tuple(order)))
        return row is not None and row["completion"] is not None

    def cut(self) -> None:
        """Drop a last line that was not written to its end."""
        if self.path.exists():
            os.truncate(self.path, self._whole)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, on disk when this returns; a row that is there already is not written again."""
        new = [row for row in rows if self.rows.get(_key(row)) != row]
        self.rows |= {_key(row): row for row in new}
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make the output folder for answers given under `settings`, or go on in it if they are the same.

    Raises:
        UserError: it holds something else, or answers given under other settings.
    """
    path = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; with --suite it is a folder for the answers")
    if path.exists():
        if wrong := different(read_settings(folder), settings):
            said = "; ".join(f"{key} was {old} and is {new}" for key, old, new in wrong)
            raise UserError(
                f"--output {folder} holds answers given under other settings: {said}; "
                "choose another folder, or the same settings"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"--output {folder} is not empty and holds no answers ({SETTINGS} is missing); choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the answers in a folder were given under; raises UserError if it holds none."""
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(
            f"{folder} holds no answers: there is no {SETTINGS}; give a folder that perl-rl evaluate --suite wrote"
        )
    return _parse(path.read_bytes(), str(path))


def different(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values are not the same, with both."""
    return [(k, one.get(k), other.get(k)) for k in {**one, **other} if one.get(k) != other.get(k)]


def _parse(text: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{place}: malformed JSON ({error}); correct it, or remove the file"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: is no JSON object; correct it, or remove the file")
    return value


def _key(row: dict[str, Any]) -> Key:
    return row["id"], tuple(row["order"])
