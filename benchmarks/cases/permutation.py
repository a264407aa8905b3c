"""Orders of the images of an example, and the example in one of them."""

from __future__ import annotations

import torch
from PIL import Image

from benchmarks.harness.contest import Contest, Inputs, own_contest
from perl.permutation import Order, orders, permute
from perl.types import Example, Variant

COUNTS = (4, 8, 16, 32, 64)
ORDERS = 8


def contests(cuda: bool, quick: bool) -> list[Contest]:
    return [*map(_orders, COUNTS), *map(_permute, COUNTS)]


def _orders(images: int) -> Contest:
    def problem(device: torch.device) -> Inputs:
        """Eight orders, as one training example gets."""

        def check(found: list[Order]) -> None:
            assert found[0] == tuple(range(images)), "the original order is not the first"
            assert len(set(found)) == len(found) == ORDERS, "orders are missing or equal"
            assert all(sorted(order) == list(range(images)) for order in found)

        return Inputs(_example(images), check)

    def call(example: Example) -> list[Order]:
        return orders(example, ORDERS, seed=0, epoch=0)

    op = f"{ORDERS} orders of an example"
    return own_contest(op, f"{images} images", "images", images, problem, call)


def _permute(images: int) -> Contest:
    def problem(device: torch.device) -> Inputs:
        """An answer that names every image, the longest there is to rewrite."""
        example = _example(images)
        order = orders(example, 2, seed=0, epoch=0)[1]

        def check(variant: Variant) -> None:
            assert len(variant.images) == images
            moved = [variant.images[j] is example.images[i] for j, i in enumerate(order)]
            assert all(moved), "images do not stand in the order"
            # The answer names the same pictures, where they are now.
            pictures = [variant.images[int(name) - 1] for name in variant.answer.split(", ")]
            same = [a is b for a, b in zip(pictures, example.images, strict=True)]
            assert all(same), "the answer names other pictures"

        return Inputs((example, order), check)

    def call(inputs: tuple[Example, Order]) -> Variant:
        return permute(*inputs)

    op = "An example in another order"
    return own_contest(op, f"{images} images", "images", images, problem, call)


def _example(count: int) -> Example:
    return Example(
        id="example",
        images=tuple(Image.new("RGB", (1, 1), (slot, 0, 0)) for slot in range(count)),
        question="<image>" * count + "Put the images in order.",
        answer=", ".join(str(slot + 1) for slot in range(count)),
    )
