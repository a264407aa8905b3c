"""The orders that the images of an example may stand in: how many there are, all of them, or some drawn; and how often
an example is permuted at all as training goes on (the paper's annealed permutation rate)."""

from __future__ import annotations

import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from perl.permutation.alike import alike
from perl.permutation.ordering import rearranged, sequences
from perl.types import Example, UserError

Order = tuple[int, ...]
RateSchedule = Literal["constant", "linear", "cosine", "released"]


def movable(kind: str, n: int) -> tuple[Order, ...]:
    """The blocks of 0-based slots whose images may change places; see `Example.kind`.

    Example: `movable("blocks:2,4/1,3", 4) == ((1, 3), (0, 2))`. Raises UserError for an unknown
    kind or for slots that `n` images do not have. Images of kind `ordering` move all together, from
    one option to another, and no block of them freely.
    """
    if kind in ("none", "ordering"):
        return ()
    if kind == "all":
        return (tuple(range(n)),)
    if kind == "first_fixed":
        return (tuple(range(1, n)),)
    if match := re.fullmatch(r"last:([0-9]{1,4})", kind):
        last = int(match[1])
        if not n:
            raise UserError(f"kind '{kind}' moves images at the end, but there are no images")
        if not 1 <= last <= n:
            raise UserError(
                f"kind '{kind}' needs 1 to {n} images at the end, as there are {n} images"
            )
        return (tuple(range(n - last, n)),)
    if match := re.fullmatch(r"blocks:([0-9]{1,4}(?:[,/][0-9]{1,4})*)", kind):
        blocks = tuple(
            tuple(int(slot) - 1 for slot in part.split(",")) for part in match[1].split("/")
        )
        slots = [slot for block in blocks for slot in block]
        if len(set(slots)) < len(slots):
            raise UserError(
                f"kind '{kind}' names a slot twice; each slot may stand in one block only"
            )
        if not all(0 <= slot < n for slot in slots):
            raise UserError(
                f"kind '{kind}' names a slot outside 1..{n}; the example has {n} images"
            )
        return blocks
    raise UserError(
        f"unknown kind '{kind}'; "
        "use all, first_fixed, last:K, ordering, none, or blocks such as blocks:2,4/1,3"
    )


def num_orders(example: Example) -> int:
    """How many orders the images of an example have, the original one included.

    Two that show the same picture in every slot are one: of the pictures a, a, b there are three, and of a, a there is
    one. Of images that are not decoded, equal pictures are known as `alike` tells.
    """
    return _orders_of(example)[0]


def misplaced(example: Example, order: Sequence[int]) -> int | None:
    """The first slot of an order whose image the label does not let stand there; None: it allows the order."""
    moved = [slot for slot, original in enumerate(order) if slot != original]
    if example.kind == "ordering":
        return None if tuple(order) in option_orders(example) else moved[0]
    block = {slot: block for block in movable(example.kind, len(example.images)) for slot in block}
    return next((slot for slot in moved if order[slot] not in block.get(slot, ())), None)


def orders(example: Example, n: int, seed: int, epoch: int) -> list[Order]:
    """Up to `n` distinct orders: the original first, then permutations drawn without replacement.

    They depend on `(seed, epoch, example.id)` alone. There are fewer than `n` where fewer exist.
    """
    return _draw(example, n, f"{seed}/{epoch}/{example.id}")


def released_orders(example: Example) -> list[Order]:
    """The original order and the one that the paper's released code puts beside it.

    That code seeds its generator with 42 before each draw, so that its random permutation is one
    and the same for each number of images: two are exchanged, three become (1, 0, 2), and so on.
    """
    if example.kind == "ordering":
        return all_orders(example, 2, 42)
    order = list(range(len(example.images)))
    for block in movable(example.kind, len(order)):
        shuffled = list(block)
        random.Random(42).shuffle(shuffled)
        for slot, original in zip(block, shuffled, strict=True):
            order[slot] = original
    original, first = tuple(range(len(order))), alike(example.images)
    same = all(first[i] == first[slot] for slot, i in enumerate(order))
    return [original] if same else [original, tuple(order)]


def all_orders(example: Example, limit: int, seed: int) -> list[Order]:
    """The orders to evaluate in: all if there are no more than `limit`, else `limit` distinct ones.

    The original order comes first; the sample depends on `(seed, example.id)` alone.
    """
    total, unrank = _orders_of(example)
    if total <= limit:
        return [unrank(rank) for rank in range(total)]
    return _draw(example, limit, f"{seed}/all/{example.id}")


def _draw(example: Example, n: int, key: str) -> list[Order]:
    if n < 1:
        raise ValueError(f"at least one order is needed, got n={n}")
    total, unrank = _orders_of(example)
    # A text seeds the same generator in every process; hash(text) would differ.
    ranks = _distinct(random.Random(key), total, min(n, total) - 1)
    return [unrank(rank) for rank in (0, *ranks)]


def _orders_of(example: Example) -> tuple[int, Callable[[int], Order]]:
    """How many orders there are, and the order of each rank, 0 being the original."""
    count, first = len(example.images), alike(example.images)
    if example.kind == "ordering":
        distinct = list(distinct_options(example, first).values())
        return len(distinct), lambda rank: distinct[rank]
    blocks = movable(example.kind, count)
    if len(set(first)) == count:
        total = math.prod(math.factorial(len(block)) for block in blocks)
    else:
        total = math.prod(_sequences_of([first[slot] for slot in block]) for block in blocks)
    return total, lambda rank: _unrank(rank, blocks, first)


def option_orders(example: Example) -> list[Order]:
    """Of kind `ordering`: the order in which each option is right, first the original."""
    gold, *others = sequences(example).values()
    return [rearranged(gold, option, len(example.images)) for option in (gold, *others)]


def distinct_options(example: Example, first: Order) -> dict[Order, Order]:
    """The first of those orders that show the same, by what they show."""
    out: dict[Order, Order] = {}
    for order in option_orders(example):
        out.setdefault(shown(order, first), order)
    return out


def shown(order: Order, first: Order) -> Order:
    """What the slots show in an order, of images of which `alike` gives the `first` that shows the same."""
    return tuple(first[i] for i in order)


def _sequences_of(pictures: Sequence[int]) -> int:
    """How many sequences these pictures have: of a, a, b there are 3! / 2! = 3."""
    total = math.factorial(len(pictures))
    return total // math.prod(math.factorial(n) for n in Counter(pictures).values())


def _distinct(rng: random.Random, total: int, k: int) -> list[int]:
    """`k` distinct ranks out of 1..total-1."""
    if total <= sys.maxsize:
        return rng.sample(range(1, total), k)
    # More than 20! orders: a range is too long for len(), and a repeated draw next to impossible.
    ranks: dict[int, None] = {}
    while len(ranks) < k:
        ranks[rng.randrange(1, total)] = None
    return list(ranks)


def _unrank(rank: int, blocks: Sequence[Order], first: Order) -> Order:
    """The order of a given rank, 0 being the original; equal pictures keep their sequence.

    Each digit of a mixed radix is a choice: of one slot after the other, or of all of a block that shows a picture twice.
    """
    order = list(range(len(first)))
    for block in blocks:
        pictures, rest = [first[slot] for slot in block], list(block)
        if len(set(pictures)) == len(block):
            for slot in block:
                rank, choice = divmod(rank, len(rest))
                order[slot] = rest.pop(choice)
        else:
            rank, own = divmod(rank, _sequences_of(pictures))
            for slot, picture in zip(block, _sequence(own, pictures), strict=True):
                order[slot] = next(i for i in rest if first[i] == picture)
                rest.remove(order[slot])
    return tuple(order)


def _sequence(rank: int, pictures: Sequence[int]) -> list[int]:
    """The sequence of these pictures of a given rank, 0 being theirs; equal ones are not told apart."""
    if not pictures:
        return []
    rest, total = list(pictures), _sequences_of(pictures)
    for picture, times in Counter(rest).items():
        begin_so = total * times // len(rest)
        if rank < begin_so:
            rest.remove(picture)
            return [picture, *_sequence(rank, rest)]
        rank -= begin_so
    raise IndexError(rank)


def rate_at(start: float, schedule: RateSchedule, progress: float) -> float:
    """The share of examples that are permuted, alpha_t.

    `constant` keeps `start`; `linear` and `cosine` go from `start` to 0. `released` is what the
    paper's released code does in effect: its linear schedule is compared with a coin that is seeded
    anew at each swap, so that nearly everything is swapped until the last 2.5 % of the training and
    nearly nothing afterwards.

    Args:
        start: the rate at the beginning, 0 to 1.
        progress: share of the training that is done, 0 to 1.
    """
    left = 1 - progress
    if schedule == "linear":
        return start * left
    if schedule == "cosine":
        return start * 0.5 * (1 - math.cos(math.pi * left))
    if schedule == "released":
        return start if left >= 0.025 else 0.05 * start
    return start


def is_permuted(example: Example, rate: float, seed: int, epoch: int) -> bool:
    """Whether this example is rolled out in permuted orders this time.

    Depends on `(seed, epoch, example.id)` and the rate alone, and whoever is permuted at a rate is
    so at every higher one.
    """
    return random.Random(f"{seed}/{epoch}/{example.id}/rate").random() < rate


def shares(total: int, parts: int) -> list[int]:
    """`total` rollouts over `parts` orders as evenly as can be, the first ones taking the rest.

    Example: `shares(12, 1) == [12]` for a question of one image, `shares(12, 5) == [3, 3, 2, 2, 2]`.
    """
    least, rest = divmod(total, parts)
    return [least + (i < rest) for i in range(parts)]
