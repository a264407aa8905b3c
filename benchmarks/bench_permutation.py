"""Orders of the images of an example, and the example in one of them."""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks.proof import Checked
from perl.permutation import Order, orders, permute
from perl.types import Example, Variant

COUNTS = [4, 8, 16, 32]
ORDERS = 8


@pytest.mark.parametrize("count", COUNTS)
def test_orders(checked: Checked, count: int) -> None:
    """Eight orders, as one training example gets."""
    example = make_example(count)

    def prove(found: list[Order]) -> None:
        assert found[0] == tuple(range(count))
        assert len(set(found)) == len(found) == ORDERS
        assert all(sorted(order) == list(range(count)) for order in found)

    checked(
        lambda: orders(example, ORDERS, seed=0, epoch=0),
        prove,
        group=f"orders, {ORDERS} of them, by images",
    )


@pytest.mark.parametrize("count", COUNTS)
def test_permute(checked: Checked, count: int) -> None:
    """An answer that names every image, the longest there is to rewrite."""
    example = make_example(count)
    order = orders(example, 2, seed=0, epoch=0)[1]

    def prove(variant: Variant) -> None:
        assert len(variant.images) == count
        assert all(variant.images[j] is example.images[i] for j, i in enumerate(order))
        # The answer names the same pictures, where they are now.
        pictures = [variant.images[int(name) - 1] for name in variant.answer.split(", ")]
        assert all(a is b for a, b in zip(pictures, example.images, strict=True))

    checked(lambda: permute(example, order), prove, group="permute, by images")


def make_example(count: int) -> Example:
    return Example(
        id="example",
        images=tuple(Image.new("RGB", (1, 1)) for _ in range(count)),
        question="<image>" * count + "Put the images in order.",
        answer=", ".join(str(slot + 1) for slot in range(count)),
    )
