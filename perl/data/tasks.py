r"""Bundled questions over a collection of labelled pictures, made on the fly, each with a
demonstration.

Every text is a row of plain tokens with one space between two, so that a word-level tokenizer
covers it:

    which   A <image> B <image> which image shows three ?
            <think> A two three no B three three yes </think> \boxed{ B }

A demonstration goes over all images, whatever it has found, and repeats what it compares with at
each step: a small model learns the look-up only from comparisons that are written out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perl.config import DataConfig
from perl.data.pictures import PictureCollection, Split, load_collection
from perl.permutation import LETTERS, letter_slots, plan_of
from perl.types import IMAGE_SLOT, Example, UserError

THINK, END_THINK, BOXED, END_BOXED = "<think>", "</think>", "\\boxed{", "}"

_WORDS = (
    *("which", "image", "shows", "differs", "how", "many", "images", "show", "comes", "first", "?"),
    *("do", "and", "the", "same", "what", "does", "yes", "no", "most", "by", "value", "name"),
)


@dataclass(frozen=True)
class Draft:
    """A question before its pictures are drawn: the class that each slot shows, and the texts.

    `choices` are the possible answers; None: the letters of the images.
    """

    classes: Sequence[int]
    ask: str
    steps: str
    answer: str
    choices: Sequence[str] | None = None
    kind: str = "all"
    should_change: bool = True


class _Dice(random.Random):
    """What drafts are drawn with: any random choice, and the slot of the right picture."""

    first_slot = 0.0

    def right_slot(self, count: int) -> int:
        if not self.first_slot:
            return self.randrange(count)
        return 0 if self.random() < self.first_slot else self.randrange(1, count)


class BundledTasks:
    """Questions over one split of a collection, endless or the first `limit` of them; question i depends
    on (seed, split, i) alone.

    The tasks take turns. The number of images is uniform between `min_images` and `max_images`,
    within what the task needs: `single` shows one and `odd` at least three. Only training questions
    have `first_slot`. Raises UserError for settings that no question satisfies.
    """

    def __init__(
        self, collection: str, split: Split, config: DataConfig, seed: int, limit: int | None = None
    ) -> None:
        tasks, fewest, most = config.tasks, config.min_images, config.max_images
        known = f"choose among {', '.join(TASKS)}"
        if not tasks:
            raise UserError(f"data.tasks is empty; {known}")
        if unknown := [task for task in tasks if task not in TASKS]:
            raise UserError(f"unknown task '{unknown[0]}' in data.tasks; {known}")
        if not 2 <= fewest <= most <= len(LETTERS):
            raise UserError(
                f"data.min_images={fewest} and data.max_images={most} must satisfy "
                f"2 <= min_images <= max_images <= {len(LETTERS)}"
            )
        if "odd" in tasks and most < 3:
            raise UserError("task odd needs three images or more; raise data.max_images to 3")
        self.collection = load_collection(collection)
        self.split, self.config, self.seed, self.size = split, config, seed, limit

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("bundled examples are endless; ask for `size`, or give a limit")
        return self.size

    def check(self, i: int) -> Example:
        return self[i]

    def place(self, i: int) -> str:
        """How messages name example i."""
        return f"{self.collection.name} question {i + 1}"

    def __getitem__(self, i: int) -> Example:
        if i < 0 or (self.size is not None and i >= self.size):
            raise IndexError(i)
        rng = _Dice(f"{self.seed}/{self.split}/{i}")
        if self.split == "train":
            rng.first_slot = self.config.first_slot
        task = self.config.tasks[i % len(self.config.tasks)]
        fewest = max(self.config.min_images, 3) if task == "odd" else self.config.min_images
        count = rng.randint(fewest, self.config.max_images)
        draft = TASKS[task](rng, count, self.collection.labels)
        ask = f"{draft.ask} {self.collection.ordered_by}" if task == "first" else draft.ask
        letters = tuple(LETTERS[: len(draft.classes)])
        slots = " ".join(f"{letter} {IMAGE_SLOT}" for letter in letters)
        slots = slots if len(letters) > 1 else IMAGE_SLOT
        example = Example(
            id=f"{self.collection.name}-{self.split}-{task}-{i:06d}",
            images=_pictures(self.collection, self.split, draft.classes, rng),
            question=f"{slots} {ask} ?",
            answer=draft.answer,
            kind=draft.kind,
            should_change=draft.should_change,
            demonstration=f"{THINK} {draft.steps} {END_THINK} {BOXED} {draft.answer} {END_BOXED}",
            task=task,
            extra={"choices": letters if draft.choices is None else tuple(draft.choices)},
        )
        return replace(example, plan=plan_of(example))


def vocabulary(collection: str = "digits") -> list[str]:
    """Every token that questions and demonstrations over the collection use, each once."""
    numbers = [str(k) for k in range(len(LETTERS) + 1)]
    marks = [IMAGE_SLOT, THINK, END_THINK, BOXED, END_BOXED]
    labels = load_collection(collection).labels
    return list(dict.fromkeys([*marks, *LETTERS, *numbers, *_WORDS, *labels]))


def with_noise(example: Example, p: float, rng: random.Random) -> str:
    """The demonstration, its final answer replaced with probability `p` by another, wrong one,
    uniformly drawn.

    That is how an imperfect annotator labels: the steps are right, the conclusion is not. The
    possible answers are `example.extra["choices"]`, or the letters of the images where an answer
    names one.
    """
    if example.demonstration is None:
        raise UserError(
            f"example '{example.id}' has no demonstration; "
            "add the column demonstration or set cold_start.steps to 0"
        )
    if rng.random() >= p:
        return example.demonstration
    wrong = [choice for choice in _choices(example) if choice != example.answer]
    before, boxed, after = example.demonstration.rpartition(BOXED)
    if not wrong or not boxed or not example.answer:
        return example.demonstration
    return before + boxed + after.replace(example.answer, rng.choice(wrong), 1)


def _choices(example: Example) -> Sequence[str]:
    if "choices" in example.extra:
        return [str(choice) for choice in example.extra["choices"]]
    return LETTERS[: len(letter_slots(example))] if example.answer in tuple(LETTERS) else ()


def _which(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    target = rng.randrange(len(labels))
    others = [c for c in range(len(labels)) if c != target]
    right = rng.right_slot(count)
    classes = [target if slot == right else rng.choice(others) for slot in range(count)]
    word = labels[target]
    steps = [
        f"{letter} {labels[c]} {word} {_yes(c == target)}"
        for letter, c in zip(LETTERS, classes, strict=False)
    ]
    return Draft(classes, f"which image shows {word}", " ".join(steps), LETTERS[right])


def _odd(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    most, odd = rng.sample(range(len(labels)), 2)
    right = rng.right_slot(count)
    classes = [odd if slot == right else most for slot in range(count)]
    seen = [f"{letter} {labels[c]}" for letter, c in zip(LETTERS, classes, strict=False)]
    compared = [
        f"{step} {labels[most]} {_yes(c == odd)}" for step, c in zip(seen, classes, strict=True)
    ]
    steps = " ".join([*seen, "most", labels[most], *compared])
    return Draft(classes, "which image differs", steps, LETTERS[right])


def _count(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    target = rng.randrange(len(labels))
    others = [c for c in range(len(labels)) if c != target]
    shown = rng.randint(0, count)
    classes = [target] * shown + [rng.choice(others) for _ in range(count - shown)]
    rng.shuffle(classes)
    word = labels[target]
    steps, so_far = [], 0
    for letter, c in zip(LETTERS, classes, strict=False):
        so_far += c == target
        steps.append(f"{letter} {labels[c]} {word} {_yes(c == target)} {so_far}")
    numbers = [str(k) for k in range(count + 1)]
    ask = f"how many images show {word}"
    return Draft(classes, ask, " ".join(steps), str(shown), numbers, should_change=False)


def _first(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    first = rng.randrange(len(labels) - 1)
    right = rng.right_slot(count)
    classes = [
        first if slot == right else rng.randrange(first + 1, len(labels)) for slot in range(count)
    ]
    steps, best = [], 0
    for slot, c in enumerate(classes):
        best = slot if c < classes[best] else best
        steps.append(f"{LETTERS[slot]} {labels[c]} {LETTERS[best]} {labels[classes[best]]}")
    return Draft(classes, "which image comes first by", " ".join(steps), LETTERS[right])


def _same(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    pair = sorted(rng.sample(range(count), 2))
    answer = rng.random() < 0.5
    classes = [rng.randrange(len(labels)) for _ in range(count)]
    if answer:
        classes[pair[1]] = classes[pair[0]]
    else:
        classes[pair[1]] = rng.choice([c for c in range(len(labels)) if c != classes[pair[0]]])
    one, two = pair
    seen = " ".join(f"{LETTERS[slot]} {labels[classes[slot]]}" for slot in pair)
    steps = f"{seen} {_yes(answer)}"
    rest = [slot for slot in range(count) if slot not in pair]
    blocks = "/".join(",".join(str(slot + 1) for slot in block) for block in (pair, rest) if block)
    return Draft(
        classes,
        f"do image {LETTERS[one]} and image {LETTERS[two]} show the same",
        steps,
        _yes(answer),
        ("yes", "no"),
        kind=f"blocks:{blocks}",
        should_change=False,
    )


def _single(rng: _Dice, count: int, labels: Sequence[str]) -> Draft:
    shown = rng.randrange(len(labels))
    ask, word = "what does the image show", labels[shown]
    return Draft((shown,), ask, word, word, labels, kind="none", should_change=False)


TASKS: dict[str, Callable[[_Dice, int, Sequence[str]], Draft]] = {
    "which": _which,
    "odd": _odd,
    "count": _count,
    "first": _first,
    "same": _same,
    "single": _single,
}
"""Each drafts a question from a random generator, a number of images and the class words."""


def _pictures(
    collection: PictureCollection, split: str, classes: Sequence[int], rng: random.Random
) -> tuple[Any, ...]:
    """One picture per slot, different ones within a class as long as the class has that many."""
    drawn: dict[int, list[str]] = {}
    for c, needed in Counter(classes).items():
        keys = collection.keys[split][c]
        extra = [rng.choice(keys) for _ in range(needed - len(keys))]
        drawn[c] = rng.sample(keys, min(needed, len(keys))) + extra
    return tuple(collection.open(drawn[c].pop()) for c in classes)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
