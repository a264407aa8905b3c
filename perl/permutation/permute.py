"""Image orders of an example, and the text and the answer that go with each.

Two ways keep text and images consistent when images move. *Slots*: the text stays as it is, so a
question about "image 2" is about whatever slot 2 shows, and an answer that names an image
(`should_change`) follows it. *References*: the text is rewritten, so that "image 2", "the second
picture" or an option `A. Image 2` goes on naming the same picture; an answer by number follows, and
an answer by letter follows where letters label slots, and stays where they label rewritten options.
Where text and answer cannot be kept consistent for certain, the example is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from perl.permutation.answers import (
    LETTERS,
    Lettering,
    lettering,
    named_images,
    no_image_named,
    plainly_named,
    rename,
    short,
    text_of,
)
from perl.permutation.choices import NoAnswer, back, follow, is_choice, meanings
from perl.permutation.doubts import unfollowed
from perl.permutation.options import images_in
from perl.permutation.ordering import letter_in, pictures_chosen, sequences
from perl.permutation.orders import (
    Order,
    all_orders,
    movable,
    num_orders,
    orders,
    released_orders,
)
from perl.permutation.references import doubts, mentions, write
from perl.types import Example, Message, UserError, Variant

__all__ = [
    "LETTERS",
    "Consistency",
    "Order",
    "all_orders",
    "check_answer",
    "check_moves",
    "letter_slots",
    "movable",
    "named_images",
    "num_orders",
    "orders",
    "original_answer",
    "permute",
    "released_orders",
    "unpermute_answer",
]

Consistency = Literal["slots", "references"]


def permute(example: Example, order: Sequence[int], text: Consistency = "slots") -> Variant:
    """The example with its images in `order`, and the text and the answer that are right there.

    `order[j]` is the original index of the image shown in slot j. An answer that names original
    image i becomes the slot where i is now, written in the same style; a list such as `A, C` keeps
    the sequence it is written in. With `text="references"` the mentions of images in the text
    follow their images too. Raises UserError if the answer should change and names no image, or
    cannot be written for the new order, or if the text cannot be rewritten for certain.
    """
    order = tuple(order)
    if sorted(order) != list(range(len(example.images))):
        raise ValueError(
            f"order {order} is no permutation of the {len(example.images)} images of '{example.id}'"
        )
    images = tuple(example.images[i] for i in order)
    if order == tuple(range(len(order))):
        return Variant(example=example, order=order, images=images, answer=example.answer)
    if example.kind == "ordering":
        return Variant(example, order, images, letter_in(example, order))
    names = _lettering(example)
    if text == "slots":
        _check_that_the_text_stays(example, order, names)
    rewritten = _rewritten(example, order, names) if text == "references" else None
    answer = _answer_in(example, order, text, names)
    return Variant(example, order, images, answer, rewritten)


def unpermute_answer(
    answer: str | None,
    order: Sequence[int],
    should_change: bool,
    letters: Sequence[int] | None = None,
    letters_move: bool = True,
    numbers: Sequence[int] | None = None,
) -> str | None:
    """An answer given in `order`, written in the original indexing; None if it names no image.

    Equal results across orders mean that the same picture was chosen. `letters` is
    `letter_slots(example)`; left out, letter k names slot k. `letters_move=False`: letters label
    options whose text follows its image, so they mean the same in every order. Number k + 1 names
    slot `numbers[k]`, or slot k. With `should_change=False` the answer comes back as it is.
    """
    if answer is None or not should_change:
        return answer
    if letters is None:
        letters = range(min(len(order), len(LETTERS)))
    return rename(answer, order, letters, letters_move, numbers)


def original_answer(variant: Variant, answer: str | None) -> str | None:
    """`unpermute_answer` for an answer given to `variant`, its letters as the text labels them."""
    example = variant.example
    if answer is not None and example.kind == "ordering" and example.should_change:
        return pictures_chosen(example, variant.order, answer)
    if answer is None or not example.should_change:
        return answer
    names = _lettering(example)
    if names.lines:
        return back(names, answer, variant.order, variant.rewritten is not None)
    return unpermute_answer(answer, variant.order, True, names.slots, True, names.numbers)


def letter_slots(example: Example) -> Order:
    """The 0-based slot that each letter names, A first; see `perl.permutation.answers`.

    Example: kind `last:2` over four images without labels gives `(2, 3)`: A is the third image.
    """
    return _lettering(example).slots


def check_answer(example: Example) -> None:
    """Raise UserError if images can move and the answer would have to follow but names no image.

    So too if it is to stay although it plainly names an image that may move: by a letter that labels a
    slot, or with a noun (`Image 2`, `the second image`). A bare number may be a count and is not judged.
    """
    if example.kind == "ordering":
        sequences(example)
        if not example.should_change:
            raise UserError(
                f"example '{example.id}': kind 'ordering' draws a new right option, but should_change "
                "is false; set it to true, or the kind to none"
            )
    elif num_orders(example) > 1:
        _check_named(example, _lettering(example))


def check_moves(example: Example, text: Consistency) -> None:
    """Raise UserError if in some order of the images the answer could not be written.

    That is so where a letter or number names an image that may move to a slot without one.
    """
    check_answer(example)
    if example.kind == "ordering":
        return
    for block in movable(example.kind, len(example.images)):
        # Every pair of slots of the block comes up when its images go round.
        for shift in range(1, len(block)):
            order = list(range(len(example.images)))
            for k, slot in enumerate(block):
                order[slot] = block[(k + shift) % len(block)]
            permute(example, order, text)


def _lettering(example: Example) -> Lettering:
    counted: Order = tuple(range(len(example.images)))
    if example.kind == "first_fixed" or example.kind.startswith("last:"):
        counted = movable(example.kind, len(example.images))[0]
    return lettering(example, counted)


def _check_named(example: Example, names: Lettering) -> None:
    if not example.should_change:
        _check_that_it_names_none(example, names)
        return
    letters, numbers = names.in_text if names.lines else names.slots, names.numbers
    named = named_images(example.answer, len(example.images), letters, numbers)
    if named is None and not is_choice(names, example.answer):
        raise no_image_named(example, names)
    if why := _unclear(example, names):
        raise UserError(f"example '{example.id}': {why}")


def _unclear(example: Example, names: Lettering) -> str:
    """Why it cannot be told what the answer names; empty if it can."""
    said = [example.answer, *(line.text for line in names.lines)]
    if "number" in names.labels.conflicts and any(c.isdigit() for text in said for c in text):
        return (
            f"'{names.labels.doubtful[0]}' may label an image slot or not, so that numbers are unclear; "
            "write 'Image 1: <image>' before each image, or set kind to none"
        )
    if "letter" in names.labels.conflicts and not names.lines:
        return (
            f"it is unclear which image slot the letter '{names.labels.doubtful[0]}' labels; "
            "write 'A: <image>' before each image, or set kind to none"
        )
    if names.numbered and example.answer.strip(" ().").isdigit():
        return "its answer may be an image or one of its numbered options; letter the options"
    if names.lines and not names.bare and names.some_bare:
        return "some of its options are bare numbers; write 'Image 1' if they name images"
    return ""


def _rewritten(example: Example, order: Order, names: Lettering) -> tuple[Message, ...]:
    text = text_of(example)
    count, letters, labels = len(order), names.in_text, names.labels.spans
    found = mentions(text, count, letters, names.numbers, labels) + list(names.bare)
    found.sort(key=lambda m: (m.start, m.slot))
    unsure = [
        *names.labels.doubtful,
        *unfollowed(text, found),
        *doubts(text, count, letters, names.numbers, labels),
    ]
    if unsure:
        raise UserError(
            f"example '{example.id}': its text may name an image by '{short(unsure[0])}', which cannot "
            "be rewritten for certain; write 'Image 2' or the like, or set kind to none"
        )
    out, start = [], 0
    for message in example.messages:
        end = start + len(message.content)
        own = [
            replace(m, start=m.start - start, end=m.end - start)
            for m in found
            if start <= m.start and m.end <= end
        ]
        try:
            content = write(message.content, own, _inverse(order), letters, names.numbers)
        except LookupError as error:
            raise UserError(
                f"example '{example.id}': its text names an image by number that moves to slot "
                f"{error.args[0] + 1}, which is not numbered; number every movable slot, or restrict its kind"
            ) from None
        out.append(replace(message, content=content))
        start = end + 1
    return tuple(out)


def _answer_in(example: Example, order: Order, text: Consistency, names: Lettering) -> str:
    if num_orders(example) > 1:
        _check_named(example, names)
    if not example.should_change:
        _check_that_it_stays(example, names, order, text)
        return example.answer
    if names.lines:
        try:
            return follow(names, example.answer, _inverse(order), text == "references")
        except NoAnswer as error:
            other = ', or use permutation.text = "references"' if text == "slots" else ""
            raise UserError(
                f"example '{example.id}': answer '{short(example.answer)}' cannot follow its image: {error}; "
                f"set should_change to false if the answer stays when images move{other}"
            ) from None
    answer = rename(example.answer, _inverse(order), names.slots, True, names.numbers)
    if answer is None:
        raise UserError(
            f"example '{example.id}': answer '{short(example.answer)}' moves to a slot that has no "
            f"letter or number among its {len(order)} images; "
            "label every movable slot, use numbers, or restrict its kind"
        )
    return answer


def _check_that_it_names_none(example: Example, names: Lettering) -> None:
    moving = {slot for block in movable(example.kind, len(example.images)) for slot in block}
    if named := sorted(moving & set(plainly_named(example.answer, names))):
        raise UserError(
            f"example '{example.id}': should_change is false, but answer '{short(example.answer)}' names "
            f"image {named[0] + 1}, which may move; set should_change to true, or kind to none"
        )


def _check_that_it_stays(
    example: Example, names: Lettering, order: Order, text: Consistency
) -> None:
    """An option that names images does not stay right where they move and its text does not."""
    said = meanings(names).get(example.answer.strip().strip("().").upper(), ())
    moving = [slot + 1 for slot in sorted(images_in(said)) if order[slot] != slot]
    if moving and text == "slots":
        raise UserError(
            f"example '{example.id}': should_change is false, but option '{short(example.answer)}' names "
            f'image {moving[0]}, which moves; set it to true, or use permutation.text = "references"'
        )


def _check_that_the_text_stays(example: Example, order: Order, names: Lettering) -> None:
    """A question about an image that moves is about another one then: Raise UserError.

    Blocks of slots are chosen for one question by whoever knows what it says of them.
    """
    if example.kind.startswith("blocks:"):
        return
    text = text_of(example)
    options = [(line.start, line.end) for line in names.lines]
    for m in mentions(text, len(order), names.in_text, names.numbers, names.labels.spans):
        if order[m.slot] != m.slot and not any(a <= m.start < b for a, b in options):
            raise UserError(
                f"example '{example.id}': its text names image {m.slot + 1}, which moves; set "
                'permutation.text = "references", or a kind that keeps it in place'
            )


def _inverse(order: Order) -> list[int]:
    """For each original image the slot where it is now."""
    inverse = [0] * len(order)
    for slot, original in enumerate(order):
        inverse[original] = slot
    return inverse
