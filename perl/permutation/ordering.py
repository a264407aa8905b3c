"""Questions for the right sequence of images, with sequences as options.

    <image> <image> <image> In which order were they taken?  A. 1, 3, 2  B. 2, 1, 3  C. 3, 2, 1

Moving images freely would make most sequences wrong, or none right. Instead another option is drawn
to be the right one, and the images are arranged so that it is; the text stays. That is what the
paper's released code does with its ordering questions.
"""

from __future__ import annotations

from perl.permutation.plan import plan_of
from perl.types import Example, UserError, one_line

Slots = tuple[int, ...]


def sequences(example: Example) -> dict[str, Slots]:
    """The options that are sequences of the same images as the right one, by letter, it first.

    Raises:
        UserError: the text has no such options, or the answer is none of them.
    """
    options = plan_of(example).sequences
    right = example.answer.strip().strip("().").upper()
    gold = options.get(right)
    if gold is None or len(gold) < 2 or len(set(gold)) < len(gold):
        listed = ", ".join(options) or "none"
        raise UserError(
            f"example '{example.id}': kind 'ordering' needs an answer that is the letter of an option "
            f"such as 'A. 2, 1, 3' (options that are sequences: {listed}), got "
            f"'{one_line(example.answer, 60)}'; correct it, or set kind to none"
        )
    alike = {letter: slots for letter, slots in options.items() if sorted(slots) == sorted(gold)}
    distinct = {slots: letter for letter, slots in reversed(alike.items())} | {gold: right}
    return {right: gold} | {letter: slots for slots, letter in sorted(distinct.items())}


def rearranged(gold: Slots, wanted: Slots, count: int) -> Slots:
    """The order of images in which the sequence `wanted` shows what `gold` shows in the original.

    Example: `rearranged((0, 2, 1), (1, 0, 2), 3) == (2, 0, 1)`: slot 1 comes first and shows image 0.
    """
    order = list(range(count))
    for slot, original in zip(wanted, gold, strict=True):
        order[slot] = original
    return tuple(order)


def letter_in(example: Example, order: Slots) -> str:
    """The option that is right when the images stand in `order`, written like the answer."""
    options = sequences(example)
    gold = next(iter(options.values()))
    for letter, slots in options.items():
        if tuple(order[slot] for slot in slots) == gold:
            old = example.answer.strip().strip("().")
            return example.answer.replace(old, letter if old.isupper() else letter.lower())
    raise ValueError(f"no option of '{example.id}' is right when its images stand as {order}")


def pictures_chosen(example: Example, order: Slots, answer: str) -> str | None:
    """The sequence of original images that an option shows in `order`; None if there is no option.

    Equal results from two orders mean that the same sequence of pictures was chosen.
    """
    slots = sequences(example).get(answer.strip().strip("().").upper())
    return None if slots is None else ", ".join(str(order[slot] + 1) for slot in slots)
