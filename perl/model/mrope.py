"""Positions of Qwen-VL prompts: M-RoPE's temporal, height and width axes (arXiv 2409.12191 §2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    input_ids: np.ndarray,
    grids: Sequence[tuple[int, int, int]],
    image_token_id: int,
) -> tuple[np.ndarray, int]:
    """Positions of one prompt on three axes.

    Text advances all axes by one a token. The axes of an image of t x h x w tokens count inside it from the position
    it starts at; the text after it goes on from its largest position + 1.

    Args:
        input_ids: int64 [P], each image's tokens already expanded.
        grids: (t, h, w) in tokens of the images, in the order of the prompt.
        image_token_id: the id that marks an image token.

    Returns:
        int64 [3, P] and the position that the next text token takes.
    """
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    is_image = input_ids == image_token_id
    index = next_position = 0
    for shape in grids:
        start = index + int(np.argmax(is_image[index:]))
        end = start + int(np.prod(shape))
        text = np.arange(next_position, next_position + start - index)
        positions[:, index:start] = text
        next_position += start - index
        positions[:, start:end] = np.indices(shape).reshape(3, -1) + next_position
        next_position += max(shape)
        index = end
    rest = len(input_ids) - index
    positions[:, index:] = np.arange(next_position, next_position + rest)
    return positions, next_position + rest
