"""Image orders of an example, and the answer that is right in each.

Images move between fixed slots; the text is never rewritten. A question about "image 2" is about
whatever slot 2 shows, so only an answer that names an image (`should_change`) is re-indexed: it
follows its picture.

Which image a letter names: where the text labels its slots (`A <image> B <image>`, `(A) <image>`,
`A. <image>`) the labels decide. Without labels the letters count the options: all images, or for
the kinds `first_fixed` and `last:K` those that may move, the others being the question's own. A
number, as in `2` or `Image 2`, always counts all slots from 1.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Sequence

from perl.types import IMAGE_SLOT, Example, UserError, Variant

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Order = tuple[int, ...]

_LABELLED_SLOT = re.compile(r"(?:(?<![A-Za-z0-9'])([A-Z])\s*[).:\]]*\s*)?" + re.escape(IMAGE_SLOT))
_LONGEST_ANSWER = 400  # Any text may come out of a model; a longer one names no image.
_SEPARATOR = re.compile(r"(\s*(?:,|;|->|→|>|<|&|\band\b)\s*)", re.IGNORECASE)
_NAME = re.compile(
    r"(\s*[(\[]*\s*(?:(?:image|picture|option)\s*)?)([A-Za-z]|[0-9]{1,4})(\s*[)\]]*\s*\.?\s*)",
    re.IGNORECASE,
)


def movable(kind: str, n: int) -> tuple[Order, ...]:
    """The blocks of 0-based slots whose images may change places; see `Example.kind`.

    Example: `movable("blocks:2,4/1,3", 4) == ((1, 3), (0, 2))`. Raises UserError for an unknown
    kind or for slots that `n` images do not have.
    """
    if kind == "none":
        return ()
    if kind == "all":
        return (tuple(range(n)),)
    if kind == "first_fixed":
        return (tuple(range(1, n)),)
    if match := re.fullmatch(r"last:([0-9]{1,4})", kind):
        last = int(match[1])
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
        "use all, first_fixed, last:K, none, or blocks such as blocks:2,4/1,3"
    )


def num_orders(kind: str, n: int) -> int:
    """How many orders `n` images have under `kind`, the original one included."""
    return math.prod(math.factorial(len(block)) for block in movable(kind, n))


def orders(example: Example, n: int, seed: int, epoch: int) -> list[Order]:
    """Up to `n` distinct orders: the original first, then permutations drawn without replacement.

    They depend on `(seed, epoch, example.id)` alone. There are fewer than `n` where fewer exist.
    """
    return _draw(example, n, f"{seed}/{epoch}/{example.id}")


def all_orders(example: Example, limit: int, seed: int) -> list[Order]:
    """The orders to evaluate in: all if there are no more than `limit`, else `limit` distinct ones.

    The original order comes first; the sample depends on `(seed, example.id)` alone.
    """
    blocks = movable(example.kind, len(example.images))
    total = num_orders(example.kind, len(example.images))
    if total <= limit:
        return [_unrank(rank, blocks, len(example.images)) for rank in range(total)]
    return _draw(example, limit, f"{seed}/all/{example.id}")


def permute(example: Example, order: Sequence[int]) -> Variant:
    """The example with its images in `order` and the answer that is right there; the text stays.

    `order[j]` is the original index of the image shown in slot j. An answer that names original
    image i becomes the slot where i is now, written in the same style; a list such as `A, C` keeps
    the sequence it is written in. Raises UserError if the answer should change and names no image,
    or if the new slot has no letter.
    """
    order = tuple(order)
    if sorted(order) != list(range(len(example.images))):
        raise ValueError(
            f"order {order} is no permutation of the {len(example.images)} images of '{example.id}'"
        )
    images = tuple(example.images[i] for i in order)
    moved = order != tuple(range(len(order)))
    answer = _reindex_gold(example, order) if moved and example.should_change else example.answer
    return Variant(example=example, order=order, images=images, answer=answer)


def unpermute_answer(
    answer: str | None,
    order: Sequence[int],
    should_change: bool,
    letters: Sequence[int] | None = None,
) -> str | None:
    """An answer given in `order`, written in the original indexing; None if it names no image.

    Equal results across orders mean that the same picture was chosen. `letters` is
    `letter_slots(example)`; left out, letter k names slot k. With `should_change=False` the answer
    comes back as it is.
    """
    if answer is None or not should_change:
        return answer
    if len(answer) > _LONGEST_ANSWER:
        return None
    if letters is None:
        letters = range(min(len(order), len(LETTERS)))
    return _rename(answer, order, letters)


def original_answer(variant: Variant, answer: str | None) -> str | None:
    """`unpermute_answer` for an answer given to `variant`, its letters as the text labels them."""
    example = variant.example
    return unpermute_answer(answer, variant.order, example.should_change, letter_slots(example))


def letter_slots(example: Example) -> Order:
    """The 0-based slot that each letter names, A first; see the module's description.

    Example: kind `last:2` over four images without labels gives `(2, 3)`: A is the third image.
    """
    text = "\n".join(message.content for message in example.messages)
    labels = [match[1] for match in _LABELLED_SLOT.finditer(text)]
    named = {label: slot for slot, label in enumerate(labels) if label}
    given = "".join(sorted(label for label in labels if label))
    # Only an unbroken A, B, ... is a labelling; a lone capital before a slot is a word of the text.
    enough = len(given) >= (1 if len(labels) == 1 else 2)
    if enough and given == LETTERS[: len(given)]:
        return tuple(named[letter] for letter in given)
    if example.kind == "first_fixed" or example.kind.startswith("last:"):
        return movable(example.kind, len(example.images))[0][: len(LETTERS)]
    return tuple(range(min(len(example.images), len(LETTERS))))


def named_images(answer: str, count: int, letters: Sequence[int]) -> Order | None:
    """The 0-based slots that an answer names, in the sequence written; None if it names none.

    `count` is the number of images and `letters` their `letter_slots`.
    """
    slots = []
    for item in _SEPARATOR.split(answer)[::2]:
        match = _NAME.fullmatch(item)
        slot = _slot(match[2], count, letters) if match else None
        if slot is None:
            return None
        slots.append(slot)
    return tuple(slots)


def check_answer(example: Example) -> None:
    """Raise UserError if images can move and the answer would have to follow but names no image."""
    count = len(example.images)
    if not example.should_change or num_orders(example.kind, count) == 1:
        return
    letters = letter_slots(example)
    if named_images(example.answer, count, letters) is None:
        names = f"A to {LETTERS[len(letters) - 1]} or 1 to {count}" if letters else f"1 to {count}"
        raise UserError(
            f"example '{example.id}': answer '{_short(example.answer)}' names none of its "
            f"{count} images ({names}); "
            "correct it, or set should_change to false if the answer stays when images move"
        )


def _reindex_gold(example: Example, order: Order) -> str:
    check_answer(example)
    inverse = [0] * len(order)
    for slot, original in enumerate(order):
        inverse[original] = slot
    answer = _rename(example.answer, inverse, letter_slots(example))
    if answer is None:
        raise UserError(
            f"example '{example.id}': answer '{_short(example.answer)}' moves to a slot that has no "
            f"letter among its {len(order)} images; "
            "label every movable slot, use numbers, or restrict its kind"
        )
    return answer


def _rename(answer: str, slot_map: Sequence[int], letters: Sequence[int]) -> str | None:
    """The answer with every named slot s replaced by `slot_map[s]`; None if a name fits no slot."""
    parts = _SEPARATOR.split(answer)
    for i in range(0, len(parts), 2):
        match = _NAME.fullmatch(parts[i])
        slot = _slot(match[2], len(slot_map), letters) if match else None
        if match is None or slot is None:
            return None
        name = _write(slot_map[slot], match[2], letters)
        if name is None:
            return None
        parts[i] = match[1] + name + match[3]
    return "".join(parts)


def _slot(name: str, count: int, letters: Sequence[int]) -> int | None:
    if name.isdigit():
        return int(name) - 1 if 1 <= int(name) <= count else None
    index = LETTERS.index(name.upper())
    return letters[index] if index < len(letters) else None


def _write(slot: int, like: str, letters: Sequence[int]) -> str | None:
    if like.isdigit():
        return str(slot + 1)
    if slot not in letters:
        return None
    letter = LETTERS[list(letters).index(slot)]
    return letter if like.isupper() else letter.lower()


def _draw(example: Example, n: int, key: str) -> list[Order]:
    if n < 1:
        raise ValueError(f"at least one order is needed, got n={n}")
    count = len(example.images)
    blocks = movable(example.kind, count)
    total = num_orders(example.kind, count)
    # A text seeds the same generator in every process; hash(text) would differ.
    ranks = _distinct(random.Random(key), total, min(n, total) - 1)
    return [_unrank(rank, blocks, count) for rank in (0, *ranks)]


def _distinct(rng: random.Random, total: int, k: int) -> list[int]:
    """`k` distinct ranks out of 1..total-1."""
    if total <= sys.maxsize:
        return rng.sample(range(1, total), k)
    # More than 20! orders: a range is too long for len(), and a repeated draw next to impossible.
    ranks: dict[int, None] = {}
    while len(ranks) < k:
        ranks[rng.randrange(1, total)] = None
    return list(ranks)


def _unrank(rank: int, blocks: Sequence[Order], n: int) -> Order:
    """The order of a given rank, 0 being the original: each digit of a mixed radix is a choice."""
    order = list(range(n))
    for block in blocks:
        rest = list(block)
        for slot in block:
            rank, choice = divmod(rank, len(rest))
            order[slot] = rest.pop(choice)
    return tuple(order)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
