"""Numbered places of images in a benchmark's text, as `<image>` slots."""

from __future__ import annotations

import re

from perl.types import IMAGE_SLOT


def numbered_slots(text: str, mark: str, count: int) -> tuple[str, tuple[int, ...]]:
    """The text with a slot where each image is first marked, and the 0-based images in the sequence of their slots.

    `mark` is a pattern whose first group is the image's number from 1, as `<image_([0-9]+)>`. A later mark of an
    image becomes the words "image k"; an image without a mark stands before the text; a mark of an image that is
    not there is left as it is.

    Example: `numbered_slots("<image2> or <image1>?", "<image([0-9])>", 3) == ("<image><image> or <image>?", (2, 1, 0))`.
    """
    seen: list[int] = []

    def slot(match: re.Match[str]) -> str:
        image = int(match[1]) - 1
        if not 0 <= image < count:
            return match[0]
        if image in seen:
            return f"image {image + 1}"
        seen.append(image)
        return IMAGE_SLOT

    text = re.sub(mark, slot, text)
    before = [image for image in range(count) if image not in seen]
    return IMAGE_SLOT * len(before) + text, (*before, *seen)
