"""Measured accuracies in a file that a measurement can go on from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perl.evaluation.difficulty import CHUNK, Difficulty
from perl.files import to_line
from perl.types import UserError

logger = logging.getLogger(__name__)

_LIMIT = "max_prompt_tokens"


class MeasuredFile:
    """A JSON Lines file with one measured question a line: index, id, accuracy, rollouts, and the settings.

    `accuracies` has what is measured so far, NaN where there is no number, and `sampled` how many
    completions that took, 0 for a question that was left out. What is there already counts, up to the
    last whole chunk. `id_of` gives the id of a question, to tell other data. `limit` is the most tokens
    of a prompt: where it is higher than the one that a question was left out by, the measurement goes
    on at that question's chunk.

    Raises:
        UserError: the file is of other questions or settings, or of longer prompts than `limit`;
            `overwrite` begins again. `advice` ends the message by what to do; None: what the options
            of `perl-rl filter` can do.
    """

    def __init__(
        self,
        path: Path,
        indices: Sequence[int],
        rollouts: int,
        settings: Mapping[str, Any],
        id_of: Callable[[int], str],
        overwrite: bool = False,
        advice: str | None = None,
        *,
        limit: int,
    ) -> None:
        self.path, self.indices, self.rollouts = path, list(indices), rollouts
        self.settings, self.limit = dict(settings), limit
        self._advice = advice
        self.accuracies: list[float] = []
        self.sampled: list[int] = []
        if path.exists():
            self._read(id_of, overwrite)

    @property
    def done(self) -> int:
        return len(self.accuracies)

    def add(self, chunk: Sequence[Difficulty]) -> None:
        """Append what was measured."""
        lines = [
            to_line(
                {
                    "index": d.index,
                    "id": d.id,
                    "accuracy": None if math.isnan(d.accuracy) else round(d.accuracy, 6),
                    "rollouts": d.rollouts,
                    "asked": self.rollouts,
                    **self.settings,
                    _LIMIT: self.limit,
                }
            )
            for d in chunk
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        self.accuracies += [round(d.accuracy, 6) for d in chunk]
        self.sampled += [d.rollouts for d in chunk]

    def _read(self, id_of: Callable[[int], str], overwrite: bool) -> None:
        lines = self.path.read_bytes().split(b"\n")[:-1]  # What a kill has cut has no line's end.
        found = [_object(line) for line in lines]
        if any("accuracy" not in row or "index" not in row for row in found):
            raise UserError(
                f"{self.path} is there and holds no accuracies; "
                f"{self._advice or 'name another file with --accuracies'}"
            )
        if overwrite:
            self.path.unlink()
            return
        advice = (
            self._advice or "measure again with --overwrite, or into another file with --accuracies"
        )
        wanted = {"asked": self.rollouts, **self.settings}
        if wanted.get("weights"):  # They say what the model is, wherever it lies.
            wanted.pop("model", None)
        for row, index in zip(found, self.indices, strict=False):
            other = [key for key, value in wanted.items() if row.get(key, value) != value]
            if row["accuracy"] is not None and row.get(_LIMIT, 0) > self.limit:
                other.append(_LIMIT)
            # A file of an older version lacks some; what is known to differ says more.
            other = other or [key for key in (*wanted, "rollouts", _LIMIT) if key not in row]
            if other:
                raise UserError(
                    f"{self.path} was measured with {_shown(row, other)}, not "
                    f"{_shown({**wanted, _LIMIT: self.limit}, other)}; {advice}"
                )
            if row["index"] != index or row.get("id") != id_of(index):
                break
        else:
            if len(found) <= len(self.indices):
                whole = self._whole(found)
                os.truncate(self.path, sum(len(line) + 1 for line in lines[:whole]))
                self.accuracies = [
                    math.nan if row["accuracy"] is None else float(row["accuracy"])
                    for row in found[:whole]
                ]
                self.sampled = [row["rollouts"] for row in found[:whole]]
                return
        raise UserError(f"{self.path} was measured on other questions; {advice}")

    def _whole(self, found: Sequence[Mapping[str, Any]]) -> int:
        """How many rows count: whole chunks, up to the first with a question that may fit now."""
        again = [
            i for i, row in enumerate(found) if not row["rollouts"] and row[_LIMIT] < self.limit
        ]
        if again:
            start = again[0] // CHUNK * CHUNK
            logger.warning(
                "%s: %d questions were left out with %s = %d; question %d and those behind it are "
                "measured again, with %d",
                self.path,
                len(again),
                _LIMIT,
                found[again[0]][_LIMIT],
                start,
                self.limit,
            )
            return start
        return len(found) if len(found) == len(self.indices) else len(found) // CHUNK * CHUNK


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _shown(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    names = {"asked": "rollouts", "weights": "the weights"}
    return ", ".join(f"{names.get(key, key)} = {row.get(key)}" for key in keys)
