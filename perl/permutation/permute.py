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
    Lettering,
    NoAnswer,
    back,
    follow,
    inverse,
    is_choice,
    lettering,
    meanings,
    named_images,
    plainly_named,
    rename,
    text_of,
)
from perl.permutation.layout import images_in, numbers_its_options
from perl.permutation.ordering import letter_in, pictures_chosen, sequences
from perl.permutation.orders import Order, movable, num_orders
from perl.permutation.references import LETTERS, read, unsupported_mentions, write
from perl.permutation.twins import check_twins
from perl.types import Example, Message, UserError, Variant, one_line

Consistency = Literal["slots", "references"]


def permute(example: Example, order: Sequence[int], text: Consistency = "slots") -> Variant:
    """The example with its images in `order`, and the text and the answer that are right there.

    `order[j]` is the original index of the image shown in slot j. An answer that names original
    image i becomes the slot where i is now, written in the same style; a list such as `A, C` keeps
    the sequence it is written in. With `text="references"` the mentions of images in the text
    follow their images too. Raises UserError if the answer should change and names no image, or
    cannot be written for the new order, if the text cannot be rewritten for certain, or if two images show the same
    picture and the answer names one of them.
    """
    order = tuple(order)
    if sorted(order) != list(range(len(example.images))):
        raise ValueError(
            f"order {order} is no permutation of the {len(example.images)} images of '{example.id}'"
        )
    images = tuple(example.images[i] for i in order)
    if order == tuple(range(len(order))):
        return Variant(example=example, order=order, images=images, answer=example.answer)
    check_twins(example, lambda other: _written(example, other, text))
    return _written(example, order, text)


def _written(example: Example, order: Order, text: Consistency) -> Variant:
    images = tuple(example.images[i] for i in order)
    if example.kind == "ordering":
        return Variant(example, order, images, letter_in(example, order))
    names = _lettering(example)
    if text == "slots":
        _check_that_the_text_stays(example, order, names)
    rewritten = _rewritten(example, order, names) if text == "references" else None
    answer = _answer_in(example, order, text, names)
    return Variant(example, order, images, answer, rewritten)


def original_answer(variant: Variant, answer: str | None) -> str | None:
    """An answer given to `variant`, written in the original indexing; None if it names no image.

    Equal results across orders mean that the same picture was chosen. An answer that does not change
    when images move comes back as it is.
    """
    example = variant.example
    if answer is None or not example.should_change:
        return answer
    if example.kind == "ordering":
        return pictures_chosen(example, variant.order, answer)
    names = _lettering(example)
    if names.lines:
        return back(names, answer, variant.order, variant.rewritten is not None)
    return rename(answer, variant.order, names.in_answers)


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
    if num_orders(example) == 1:
        return
    check_twins(example, lambda other: _written(example, other, text))
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
    if not example.answer:
        return
    if not example.should_change:
        moving = {slot for block in movable(example.kind, names.count) for slot in block}
        if named := sorted(moving & set(plainly_named(example.answer, names))):
            raise UserError(
                f"example '{example.id}': should_change is false, but answer '{one_line(example.answer, 60)}' names "
                f"image {named[0] + 1}, which may move; set should_change to true, or kind to none"
            )
        return
    known = names.in_text if names.lines else names.in_answers
    named = named_images(example.answer, known.count, known.letters, known.numbers)
    if named is None and not is_choice(names, example.answer):
        letters = names.lines or names.slots
        numbers = f"1 to {len(names.numbers)}"
        raise UserError(
            f"example '{example.id}': answer '{one_line(example.answer, 60)}' names none of its {names.count} images "
            f"({f'A to {LETTERS[len(letters) - 1]} or {numbers}' if letters else numbers}); "
            "correct it, or set should_change to false if the answer stays when images move"
        )
    if why := _unclear(example, names):
        raise UserError(f"example '{example.id}': {why}")


def _unclear(example: Example, names: Lettering) -> str:
    """Why it cannot be told what the answer names; empty if it can."""
    said = [example.answer, *(line.text for line in names.lines)]
    if "number" in names.labels.conflicts and any(c.isdigit() for text in said for c in text):
        return (
            f"'{names.labels.ambiguous[0]}' may label an image slot or not, so that numbers are unclear; "
            "write 'Image 1: <image>' before each image, or set kind to none"
        )
    if "letter" in names.labels.conflicts and not names.lines:
        return (
            f"it is unclear which image slot the letter '{names.labels.ambiguous[0]}' labels; "
            "write 'A: <image>' before each image, or set kind to none"
        )
    if example.answer.strip(" ().").isdigit() and numbers_its_options(text_of(example)):
        return "its answer may be an image or one of its numbered options; letter the options"
    if names.some_bare and not names.bare:
        return "some of its options are bare numbers; write 'Image 1' if they name images"
    return ""


def _check_that_the_text_stays(example: Example, order: Order, names: Lettering) -> None:
    """A question about an image that moves is about another one then: raise UserError.

    Blocks of slots are chosen for one question by whoever knows what it says of them.
    """
    if example.kind.startswith("blocks:"):
        return
    found, _ = read(text_of(example), names.in_text, names.labels.spans)
    for m in found:
        in_option = any(line.start <= m.start < line.end for line in names.lines)
        if order[m.slot] != m.slot and not in_option:
            raise UserError(
                f"example '{example.id}': its text names image {m.slot + 1}, which moves; set "
                'permutation.text = "references", or a kind that keeps it in place'
            )


def _rewritten(example: Example, order: Order, names: Lettering) -> tuple[Message, ...]:
    text, labels = text_of(example), names.labels
    found, ambiguous = read(text, names.in_text, labels.spans)
    found = sorted([*found, *names.bare], key=lambda m: (m.start, m.slot))
    if unsure := [*labels.ambiguous, *unsupported_mentions(text, found), *ambiguous]:
        raise UserError(
            f"example '{example.id}': its text may name an image by '{one_line(unsure[0], 60)}', which cannot "
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
            content = write(message.content, own, inverse(order), names.in_text)
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
    answer = example.answer
    if not answer:
        return answer
    if not example.should_change:
        # An option that names images does not stay right where they move and its text does not.
        said = meanings(names).get(answer.strip().strip("().").upper(), ())
        moving = [slot + 1 for slot in sorted(images_in(said)) if order[slot] != slot]
        if moving and text == "slots":
            raise UserError(
                f"example '{example.id}': should_change is false, but option '{one_line(answer, 60)}' names "
                f'image {moving[0]}, which moves; set it to true, or use permutation.text = "references"'
            )
        return answer
    if names.lines:
        try:
            return follow(names, answer, inverse(order), text == "references")
        except NoAnswer as error:
            other = ', or use permutation.text = "references"' if text == "slots" else ""
            raise UserError(
                f"example '{example.id}': answer '{one_line(answer, 60)}' cannot follow its image: {error}; "
                f"set should_change to false if the answer stays when images move{other}"
            ) from None
    new = rename(answer, inverse(order), names.in_answers)
    if new is None:
        raise UserError(
            f"example '{example.id}': answer '{one_line(answer, 60)}' moves to a slot that has no "
            f"letter or number among its {len(order)} images; "
            "label every movable slot, use numbers, or restrict its kind"
        )
    return new
