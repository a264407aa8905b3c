"""Pictures of any kind as 8-bit RGB, upright."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_ENDS = ((340, 341), (280, 281))
"""TIFF's tags for the least and the greatest value, of any type and of integers."""


class Unfit(ValueError):
    """A picture that is sound and cannot be taken: what it is, and what to do."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB; transparent parts become white.

    Values of more than 8 bits are scaled from black and white as the type or the file defines them. Raises ValueError if
    neither does.
    """
    ends = black_and_white(image)  # A copy has lost the file's tags.
    image = ImageOps.exif_transpose(image)
    if ends:
        image = _scaled(image, *ends)
    clear = image.info.get("transparency")
    if image.mode == "RGB" and clear and max(clear) > 255:  # It has 16 bits, and the image 8.
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode in ("RGBA", "LA", "PA") or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def black_and_white(image: Image.Image) -> tuple[float, float] | None:
    """The values of more than 8 bits that are black and white; None: there are only 8.

    Pillow has 16 bits without a sign as mode `I;16`, with one as `I` like 32 bits, and numbers with a point as `F`.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    tags = getattr(image, "tag_v2", {})
    bits, signed = (_first(tags.get(tag)) for tag in (_BITS, _SAMPLE_FORMAT))
    if image.mode.startswith("I;16"):
        ends = 0.0, 2.0 ** (bits or 16) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits to Pillow.
        ends = 0.0, 65535.0
    elif image.mode == "I" and (bits, signed) == (16, 2):
        ends = -32768.0, 32767.0
    else:
        given = [[_first(tags.get(tag)) for tag in pair] for pair in _ENDS]
        ends = next(((a, b) for a, b in given if a is not None and b is not None and a < b), None)
    if ends is None:
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise Unfit(
            f"holds {kind}, of which neither type nor file says which are black and white; convert it to 8 bits, in NumPy "
            "with ((a - black) * 255 / (white - black)).clip(0, 255).astype('uint8')"
        )
    black, white = ends
    return (white, black) if _first(tags.get(_PHOTOMETRIC)) == 0 else (black, white)


def _first(value: Any) -> Any:
    """A tag's value, or that of its first band."""
    return value[0] if isinstance(value, tuple) else value


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    """A picture of 8 bits, from one with more."""
    values = np.asarray(image)
    low, high = min(black, white), max(black, white)
    if not (low <= values.min() and values.max() <= high):  # Nor if one is no number.
        raise Unfit(f"holds values outside of {low:g} to {high:g}, its range; convert it to 8 bits")

    def scale(some: Any) -> Any:
        return np.floor((some - black) * 255 / (white - black) + 0.5).clip(0, 255).astype("uint8")

    if image.mode.startswith("I;16"):  # By a table, as pictures may be large.
        grey = scale(np.arange(65536.0))[values]
    else:
        grey = scale(values.astype("float64"))
    if (clear := image.info.get("transparency")) is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey)
