"""Which images of an example show the same picture."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

ENCODED = "encoded"
"""Of the header of an image that is no file: where `info` has its bytes."""

_last: tuple[Sequence[Any], tuple[int, ...]] = ((), ())


def alike(images: Sequence[Any]) -> tuple[int, ...]:
    """For each image the first that shows the same: `alike((cat, dog, cat)) == (0, 1, 0)`.

    Decoded pictures are compared by size, mode and pixels. Where headers alone have been read, a file that comes twice is
    found, and a copy of it, and equal bytes; of images as the data hold them, equal paths and equal bytes. Another encoding
    of the same picture is then taken for another picture.
    """
    global _last
    known, first = _last  # An example is asked about many times in a row, and pictures are large.
    if known is images:
        return first

    @cache
    def content(k: int) -> bytes:
        pixels = hashlib.sha1(images[k].tobytes(), usedforsecurity=False)
        pixels.update(bytes(images[k].getpalette() or ()))
        return pixels.digest()

    def same(i: int, k: int) -> bool:
        one, other = images[i], images[k]
        if one is other:
            return True
        if not (hasattr(one, "tobytes") and hasattr(other, "tobytes")):
            return type(one) is type(other) and bool(one == other)
        if (one.size, one.mode) != (other.size, other.mode):
            return False
        if _is_header(one) or _is_header(other):
            return _same_source(one, other)
        return content(i) == content(k)

    out: list[int] = []
    for k in range(len(images)):
        out.append(next((i for i in range(k) if out[i] == i and same(i, k)), k))
    _last = images, tuple(out)
    return tuple(out)


def _is_header(image: Any) -> bool:
    return bool(getattr(image, "tile", None))


def _same_source(one: Any, other: Any) -> bool:
    if ENCODED in one.info:
        return one.info[ENCODED] == other.info.get(ENCODED)
    a, b = (getattr(image, "filename", "") for image in (one, other))
    try:
        # Of files of one size; `shallow` would believe equal times.
        return bool(a and b) and (a == b or filecmp.cmp(a, b, shallow=False))
    except OSError:
        return False
