"""What enters the model in a step, seen at the doors of its two parts, so that no trainer counts itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Counts:
    """By `generation` and `update`: tokens through the language model, padding included, and images through the tower."""

    lm_tokens: dict[str, int] = field(default_factory=lambda: {"generation": 0, "update": 0})
    images: dict[str, int] = field(default_factory=lambda: {"generation": 0, "update": 0})
    largest: int = 0
    """Tokens of the largest micro-batch that is trained on, padding included."""


@contextmanager
def counting(core: Any, wanted: Callable[[], bool]) -> Iterator[Counts]:
    """Count what the block runs. Sampling is what runs without gradients.

    Args:
        core: transformers' model of text and images, without the head.
        wanted: whether what enters now counts.
    """
    counts = Counts()

    def language(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not wanted():
            return
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs["input_ids"] if tokens is None else tokens
        number, part = tokens.shape[:2].numel(), _part()
        counts.lm_tokens[part] += number
        if part == "update":
            counts.largest = max(counts.largest, number)

    def tower(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not wanted():
            return
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        counts.images[_part()] += len(grids)

    hooks = [
        core.language_model.register_forward_pre_hook(language, with_kwargs=True),
        core.visual.register_forward_pre_hook(tower, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _part() -> str:
    return "update" if torch.is_grad_enabled() else "generation"
