"""A part of a data set that is held out: by groups of rows that share pictures, the same ones in every run."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perl.config import EVAL_SEED
from perl.data.pictures import stored_image
from perl.data.videos import Frame
from perl.types import Example, UserError

Shown = Mapping[str, str]
"""What a row shows: of each picture a key that no other picture has, and its name, which says nothing of the folder the
data lies in."""


def shown_by(example: Example, root: Path) -> Shown:
    """What an example shows whose images are as the data holds them; of a question of text alone that is its text."""
    if not example.images:
        text = _digest(repr(example.question).encode())
        return {text: text}
    return dict(_named(stored_image(image), root) for image in example.images)


def held_out_rows(shown: Sequence[Shown], share: float, where: str) -> list[int]:
    """The rows to hold out, ascending: about `share` of all, and no picture of theirs is shown by any other row.

    Which ones depends on the pictures' names alone, so that the same data is split alike in every run.

    Args:
        shown: by row what it shows; a row with nothing is never held out.
        where: the data's name, for messages.

    Raises:
        UserError: all rows hang together by their pictures, so that none can be held out.
    """
    groups = _groups(shown)
    if len(groups) < 2:
        raise UserError(
            f"data.eval = split:{share:g} can hold nothing of {where} out: its {len(shown)} rows hang together by the "
            "images that they share; name other data, or leave data.eval empty"
        )
    wanted, held = min(max(1, round(share * len(shown))), len(shown) - 1), []
    for group in groups:
        if len(held) + len(group) <= wanted:
            held += group
    return sorted(held or min(groups, key=len))


def largest_group(shown: Sequence[Shown]) -> int:
    """How many rows hang together by shared pictures at most; they are held out together or not at all."""
    return max(map(len, _groups(shown)))


def _groups(shown: Sequence[Shown]) -> list[list[int]]:
    """Rows that share pictures, directly or through others, in a random sequence that the pictures' names decide."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    links = [
        (row, len(shown) + numbers.setdefault(key, len(numbers)))
        for row, pictures in enumerate(shown)
        for key in pictures
    ]
    size = len(shown) + len(numbers)
    graph = coo_array(
        (np.ones(len(links), dtype=bool), tuple(zip(*links, strict=True))), (size, size)
    )
    _, labels = connected_components(graph, directed=False)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels[: len(shown)].tolist()):
        if shown[row]:
            groups[label].append(row)

    def rank(rows: Sequence[int]) -> tuple[str, int]:
        first = min(name for row in rows for name in shown[row].values())
        return _digest(f"{EVAL_SEED}/{first}".encode()), rows[0]

    return sorted(groups.values(), key=rank)


def _named(image: Any, root: Path) -> tuple[str, str]:
    """Key and name of a picture or video."""
    if isinstance(image, Frame):
        image = stored_image(image.video)
    if isinstance(image, str) and not image.startswith("data:"):
        name = os.path.normpath(image.removeprefix("file://"))
        return os.path.join(root, name), name
    if isinstance(image, Image.Image):
        image = image.tobytes()
    content = _digest(image if isinstance(image, bytes) else str(image).encode())
    return content, content


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
