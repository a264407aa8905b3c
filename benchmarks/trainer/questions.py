"""The bundled questions over digits, with as many images as the setting says, in both trainers' forms."""

from __future__ import annotations

from typing import Any

from benchmarks.trainer.setting import Setting
from perl.data.streams import Drawn, ExampleStream
from perl.data.tasks import BundledTasks
from perl.model.processor import parts
from perl.permutation.permute import orders, permute
from perl.types import Example, Variant


class Questions:
    """An endless data set: every step has one question for each number of images, in their sequence."""

    size = None

    def __init__(self, images: tuple[int, ...], seed: int) -> None:
        self.tasks = [BundledTasks(min_images=n, max_images=n, seed=seed) for n in images]

    def __len__(self) -> int:
        raise TypeError("the questions are endless")

    def __getitem__(self, i: int) -> Example:
        return self.tasks[i % len(self.tasks)][i]

    def check(self, i: int) -> Example:
        return self[i]


def stream(setting: Setting, seed: int) -> ExampleStream:
    """The questions in the sequence in which PeRL trains on them."""
    return ExampleStream(Questions(setting.images, seed), seed)


def variants(drawn: Drawn, number: int, seed: int) -> list[Variant]:
    """A question in the orders that PeRL's collector draws for it, with the answers that are right there."""
    chosen = orders(drawn.example, number, seed, drawn.epoch)
    return [permute(drawn.example, order) for order in chosen]


def trl_rows(setting: Setting, steps: int, seed: int) -> list[dict[str, Any]]:
    """TRL knows no orders: each ordered prompt of PeRL's first `steps` steps is a prompt of its own."""
    drawn = stream(setting, seed).draw(steps * len(setting.images))
    return [_row(v) for d in drawn for v in variants(d, setting.orders, seed)]


def _row(variant: Variant) -> dict[str, Any]:
    prompt = [{"role": m.role, "content": parts(m.content)} for m in variant.messages]
    return {"prompt": prompt, "images": list(variant.images)}
