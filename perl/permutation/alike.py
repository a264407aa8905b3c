"""Which images of an example show the same picture."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Sequence
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

    def same(i: int, k: int) -> bool:
        one, other = images[i], images[k]
        if one is other or outlines[i] != outlines[k]:
            return one is other
        if not hasattr(one, "tobytes"):
            return type(one) is type(other) and bool(one == other)
        if _is_header(one):
            return _same_source(one, other)
        return content_key(one) == content_key(other)

    outlines = [_outline(image) for image in images]
    out: list[int] = []
    for k in range(len(images)):
        out.append(next((i for i in range(k) if out[i] == i and same(i, k)), k))
    _last = images, tuple(out)
    return tuple(out)


def content_key(image: Any) -> str:
    """A hash of a picture's size, pixels and palette: equal pictures of one mode have equal keys.

    It is made once for a picture, and kept on it. What Pillow makes of the picture is another one; who writes into it in
    its place would leave it with the key of what it was.
    """
    kept = vars(image)
    if "content_key" not in kept:
        pixels = hashlib.sha1(f"{image.size}".encode(), usedforsecurity=False)
        pixels.update(image.tobytes())
        pixels.update(bytes(image.getpalette() or ()))
        kept["content_key"] = pixels.hexdigest()
    return kept["content_key"]


def _outline(image: Any) -> tuple[Any, ...]:
    """What is known of a picture at once."""
    if not hasattr(image, "tobytes"):
        return ()
    if not _is_header(image):
        return image.size, image.mode
    inside = image.info.get(ENCODED)
    try:
        return image.size, image.mode, len(inside) if inside else os.stat(image.filename).st_size
    except (OSError, AttributeError):
        return image.size, image.mode, -1


def _is_header(image: Any) -> bool:
    return bool(getattr(image, "tile", None))


def _same_source(one: Any, other: Any) -> bool:
    if ENCODED in one.info or ENCODED in other.info:
        return one.info.get(ENCODED) == other.info.get(ENCODED)
    a, b = (getattr(image, "filename", "") for image in (one, other))
    try:
        return bool(a and b) and (a == b or filecmp.cmp(a, b, shallow=False))
    except OSError:
        return False
