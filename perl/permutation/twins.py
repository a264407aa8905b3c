"""Orders of images that cannot be told apart by what they show, and what must hold in them."""

from __future__ import annotations

from collections.abc import Callable

from perl.permutation.alike import alike
from perl.permutation.orders import (
    Order,
    distinct_options,
    movable,
    num_orders,
    option_orders,
    shown,
)
from perl.types import Example, UserError, Variant, one_line


def twins(example: Example) -> list[tuple[Order, Order]]:
    """Pairs of orders that show the same pictures and so count as one; what is right in both of each pair is right in all
    such. None where the images have no order but the original.

    Example: pictures a, a, b that all may move: `[((0, 1, 2), (1, 0, 2))]`.
    """
    count, first = len(example.images), alike(example.images)
    if len(set(first)) == count or num_orders(example) == 1:
        return []
    if example.kind == "ordering":
        distinct = distinct_options(example, first)
        pairs = [(distinct[shown(order, first)], order) for order in option_orders(example)]
        return [(one, other) for one, other in pairs if one != other]
    original, out = tuple(range(count)), []
    for block in movable(example.kind, count):
        if len({first[slot] for slot in block}) == 1:
            continue  # It stays as it is.
        seen: dict[int, int] = {}
        for slot in sorted(block):
            other = seen.setdefault(first[slot], slot)
            if other != slot:
                order = list(original)
                order[other], order[slot] = slot, other
                out.append((original, tuple(order)))
    return out


def check_twins(example: Example, written: Callable[[Order], Variant]) -> None:
    """Raise UserError if prompts that show the same pictures would have different right answers.

    `written` gives the example in an order.
    """
    for pair in twins(example):
        one, other = map(written, pair)
        if one.messages != other.messages or one.answer == other.answer:
            continue
        i, k = next(sorted(p) for p in zip(one.order, other.order, strict=True) if p[0] != p[1])
        raise UserError(
            f"example '{example.id}': images {i + 1} and {k + 1} show the same picture, so that '{one_line(one.answer, 60)}' and "
            f"'{one_line(other.answer, 60)}' would both be right; take one of them out, or set kind to none"
        )
