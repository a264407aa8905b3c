"""Image orders of an example, and the text and the answer that go with each.

Two ways keep text and images consistent when images move. *Slots*: the text stays as it is, so a
question about "image 2" is about whatever slot 2 shows, and an answer that names an image
(`should_change`) follows it. *References*: the text is rewritten, so that "image 2", "the second
picture" or an option `A. Image 2` goes on naming the same picture; an answer by number follows, and
an answer by letter follows where letters label slots, and stays where they label rewritten options.
Where text and answer cannot be kept consistent for certain, the example is refused.

What names what was read once, into the example's plan (`perl.permutation.plan`); here it is put in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from perl.permutation.answers import (
    NoAnswer,
    back,
    follow,
    inverse,
    is_choice,
    plainly_named,
    rearranged_values,
    rename,
    slots_named,
)
from perl.permutation.layout import images_in
from perl.permutation.ordering import letter_in, pictures_chosen, sequences
from perl.permutation.orders import Order, movable, num_orders
from perl.permutation.plan import names_in_answers, names_in_text, plan_of, text_of
from perl.permutation.references import FIXED, LETTERS, write
from perl.permutation.twins import check_twins
from perl.types import Example, Mention, Message, Plan, UserError, Variant, one_line

Consistency = Literal["slots", "references"]
AnswerForm = Literal["set", "sequence", "values"]


def permute(example: Example, order: Sequence[int], text: Consistency = "slots") -> Variant:
    """The example with its images in `order`, and the text and the answer that are right there.

    `order[j]` is the original index of the image shown in slot j. An answer that names original
    image i becomes the slot where i is now, written in the same style; a list such as `A, C` keeps
    the sequence it is written in, or is sorted where the question asks for a set, and one value for each image in turn
    moves with its image. With `text="references"` the mentions of images in the text
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
    plan = plan_of(example)
    if why := plan.faults.get("any"):
        raise UserError(f"example '{example.id}': {why}, or set kind to none")
    if text == "slots":
        _check_that_the_text_stays(example, order, plan)
    rewritten = _rewritten(example, order, plan) if text == "references" else None
    answer = _answer_in(example, order, text, plan)
    return Variant(example, order, images, answer, rewritten)


def original_answer(variant: Variant, answer: str | None) -> str | None:
    """An answer given to `variant`, written in the original indexing; None if it names no image.

    Equal results across orders mean that the same picture was chosen, or the same set of pictures. An answer that does not
    change when images move comes back as it is.
    """
    example = variant.example
    if answer is None or not example.should_change:
        return answer
    if example.kind == "ordering":
        return pictures_chosen(example, variant.order, answer)
    plan = plan_of(example)
    if plan.form == "values":
        return rearranged_values(answer, inverse(variant.order))
    if plan.options:
        return back(plan, answer, variant.order, variant.rewritten is not None)
    return rename(answer, variant.order, names_in_answers(plan, len(variant.order)), plan.form)


def answer_form(example: Example) -> AnswerForm | None:
    """What a list in the gold answer is: a `set` of images in any sequence, a `sequence`, or one of the `values` of each
    image in turn; None where the question does not say.

    Example: "Which images show a bicycle?" asks for a set, "In which order were they taken?" for a sequence.
    """
    form = plan_of(example).form
    return form if form in ("set", "sequence", "values") else None


def letter_slots(example: Example) -> Order:
    """The 0-based slot that each letter names, A first; see `perl.permutation.plan`.

    Example: kind `last:2` over four images without labels gives `(2, 3)`: A is the third image.
    """
    return plan_of(example).letters


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
        _check_named(example, plan_of(example))


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


def _check_named(example: Example, plan: Plan) -> None:
    count = len(example.images)
    if not example.answer or (plan.form == "values" and example.should_change):
        return
    moving = {slot for block in movable(example.kind, count) for slot in block}
    if not example.should_change:
        turned = rearranged_values(example.answer, range(count)[::-1])
        if plan.form in ("values", "sequence") and turned not in (None, example.answer):
            raise UserError(
                f"example '{example.id}': should_change is false, but answer '{one_line(example.answer, 60)}' lists something for "
                "each image in turn; set should_change to true, or kind to none"
            )
        if named := sorted(moving & set(plainly_named(example.answer, plan, count))):
            raise UserError(
                f"example '{example.id}': should_change is false, but answer '{one_line(example.answer, 60)}' names "
                f"image {named[0] + 1}, which may move; set should_change to true, or kind to none"
            )
        return
    names = (names_in_text if plan.options else names_in_answers)(plan, count)
    if slots_named(example.answer, names) is None and not is_choice(plan, example.answer):
        letters = plan.options or plan.letters
        numbers = f"{plan.start} to {plan.start + len(plan.numbers) - 1}"
        raise UserError(
            f"example '{example.id}': answer '{one_line(example.answer, 60)}' names none of its {count} images "
            f"({f'A to {LETTERS[len(letters) - 1]} or {numbers}' if letters else numbers}); "
            "correct it, or set should_change to false if the answer stays when images move"
        )
    if why := plan.faults.get("answer"):
        raise UserError(f"example '{example.id}': {why}")
    own = not plan.options and not plan.nouns and not plan.lettered
    if own and not moving & set(slots_named(example.answer, names) or moving):
        raise UserError(
            f"example '{example.id}': answer '{one_line(example.answer, 60)}' names no image that may move by kind "
            f"'{example.kind}'; label each slot as in 'Image 1: <image>' if its numbers count candidates, or set kind to none"
        )


def _check_that_the_text_stays(example: Example, order: Order, plan: Plan) -> None:
    """A question about an image that moves is about another one then: raise UserError.

    Blocks of slots are chosen for one question by whoever knows what it says of them.
    """
    if example.kind.startswith("blocks:"):
        return
    if words := plan.faults.get("stem"):
        raise UserError(
            f"example '{example.id}': its text may name an image that moves by '{one_line(words, 60)}'; "
            "set a kind that keeps it in place, or none"
        )
    for m in _moved(plan, order):
        if not any(start <= m.start < end for start, end in plan.lines):
            raise UserError(
                f"example '{example.id}': its text names image {m.slot + 1}, which moves; set "
                'permutation.text = "references", or a kind that keeps it in place'
            )


def _moved(plan: Plan, order: Order) -> list[Mention]:
    """Mentions that another image than before is named by: "the last two images" name the same two when these change places."""
    together: defaultdict[int, set[int]] = defaultdict(set)
    for m in plan.mentions:
        together[m.start].add(m.slot)
    moved = {start for start, slots in together.items() if slots != {order[slot] for slot in slots}}
    return [m for m in plan.mentions if m.start in moved]


def _rewritten(example: Example, order: Order, plan: Plan) -> tuple[Message, ...]:
    text, where = text_of(example), inverse(order)
    fixed = [m for m in _moved(plan, order) if m.style in FIXED]
    words = plan.faults.get("text") or (fixed and text[fixed[0].start : fixed[0].end])
    if words:
        raise UserError(
            f"example '{example.id}': its text may name an image by '{one_line(words, 60)}', which cannot "
            "be rewritten for certain; write 'Image 2' or the like, or set kind to none"
        )
    out, start = [], 0
    for message in example.messages:
        end = start + len(message.content)
        own = [
            replace(m, start=m.start - start, end=m.end - start)
            for m in plan.mentions
            if start <= m.start and m.end <= end and m.style not in FIXED
        ]
        try:
            content = write(message.content, own, where, names_in_text(plan, len(order)))
        except LookupError as error:
            raise UserError(
                f"example '{example.id}': its text names an image by number that moves to slot "
                f"{error.args[0] + 1}, which is not numbered; number every movable slot, or restrict its kind"
            ) from None
        out.append(replace(message, content=content))
        start = end + 1
    return tuple(out)


def _answer_in(example: Example, order: Order, text: Consistency, plan: Plan) -> str:
    if num_orders(example) > 1:
        _check_named(example, plan)
    answer, count = example.answer, len(order)
    if not answer:
        return answer
    if not example.should_change:
        # An option that names images does not stay right where they move and its text does not.
        said = plan.options.get(answer.strip().strip("().").upper(), ())
        moving = [slot + 1 for slot in sorted(images_in(said)) if order[slot] != slot]
        if moving and text == "slots":
            raise UserError(
                f"example '{example.id}': should_change is false, but option '{one_line(answer, 60)}' names "
                f'image {moving[0]}, which moves; set it to true, or use permutation.text = "references"'
            )
        return answer
    if plan.form == "values":
        values = rearranged_values(answer, order)
        if values is None:
            raise UserError(
                f"example '{example.id}': answer '{one_line(answer, 60)}' does not hold one value for each of its "
                f"{count} images; correct it, or set kind to none"
            )
        return values
    if plan.options:
        try:
            return follow(plan, answer, inverse(order), text == "references")
        except NoAnswer as error:
            other = ', or use permutation.text = "references"' if text == "slots" else ""
            raise UserError(
                f"example '{example.id}': answer '{one_line(answer, 60)}' cannot follow its image: {error}; "
                f"set should_change to false if the answer stays when images move{other}"
            ) from None
    new = rename(answer, inverse(order), names_in_answers(plan, count), plan.form, gold=True)
    if new is None:
        raise UserError(
            f"example '{example.id}': answer '{one_line(answer, 60)}' moves to a slot that has no "
            f"letter or number among its {count} images; "
            "label every movable slot, use numbers, or restrict its kind"
        )
    return new
