"""Forms of questions whose answers name no image: counts, yes and no, words, a value for each slot."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.permutation.cases import (
    Case,
    all_but,
    ask,
    layouts,
    listed,
    options_in,
    stem,
    subjects,
)
from tests.permutation.world import ANIMALS, Shown, by_order, symmetrical, worlds

NUMBER_WORDS = ("None", "One", "Two", "Three", "Four")


def said(answer: str, text: str, shown: Shown) -> str:
    """The option of a letter, or the answer itself."""
    return options_in(text).get(answer.strip("()"), answer)


@st.composite
def values(draw: st.DrawFn) -> Case:
    """One value for each slot."""
    p = draw(worlds(3)).pictures
    layout = draw(layouts(len(p)))
    asked: dict[str, Callable[[int], str]] = {
        "For each image in turn, give the number of animals.": lambda i: str(p[i].number),
        "Give the rank of each image by the size of its animal, 1 being the smallest.": lambda i: (
            str(p[i].size)
        ),
        "Sort the images by size and give the rank of each.": lambda i: str(p[i].size),
        "Which animals do the images show, respectively?": lambda i: p[i].animal,
        "Rank the images by size, smallest first: give for each image in turn its rank.": lambda i: (
            str(p[i].size)
        ),
    }
    question = draw(st.sampled_from([*asked]))
    value = asked[question]
    return Case(
        ask(draw, stem(draw, layout, question), ", ".join(map(value, range(len(p))))),
        lambda answer, text, shown: frozenset(zip(shown, answer.split(", "), strict=False)),
        lambda text, shown: frozenset((i, value(i)) for i in shown),
    )


@st.composite
def counted(draw: st.DrawFn, by_itself: bool = True) -> Case:
    """How many images, in words or by a lettered option."""
    subject = draw(subjects(by_itself, true_of=range(5)))
    layout = draw(layouts(subject.count))
    text = stem(draw, layout, f"How many of the images {subject.plural}?")
    answer = str(len(subject.slots))
    if draw(st.booleans()):
        numbers = draw(st.permutations(range(5)))
        words = draw(st.sampled_from([NUMBER_WORDS, "01234"]))
        right = numbers.index(len(subject.slots))
        text, answer = listed(draw, text, [words[k] for k in numbers], right)

    def meaning(answer: str, text: str, shown: Shown) -> Any:
        number = said(answer, text, shown)
        return NUMBER_WORDS.index(number) if number in NUMBER_WORDS else int(number)

    return Case(
        ask(draw, text, answer, follows=False),
        meaning,
        lambda text, shown: len(subject.holds(text, shown)),
        by_hand=by_itself,
    )


@st.composite
def stated(draw: st.DrawFn, by_itself: bool = True) -> Case:
    """A statement of all images, true or false."""
    world = draw(worlds())
    layout = draw(layouts(len(world.pictures)))
    said, holds = draw(st.sampled_from([*(symmetrical() if by_itself else by_order()).items()]))
    if len(layout.tokens) == 2:
        said = said.replace("All images", "Both images").replace(
            "None of the images", "Neither image"
        )
        said = said.replace("another image", "the other image")
    after = draw(st.sampled_from(["", " True or false?", " Is this true of the images?"]))
    words = draw(st.sampled_from([("False", "True"), ("No", "Yes"), ("no", "yes")]))
    answer = words[holds(world.pictures)]
    return Case(
        ask(draw, stem(draw, layout, said + after), answer, follows=False),
        lambda answer, text, shown: words.index(answer),
        lambda text, shown: int(holds(world.row(shown))),
        by_hand=by_itself,
    )


@st.composite
def particular(draw: st.DrawFn) -> Case:
    """What is to be seen in images that the text names."""
    p = draw(worlds()).pictures
    n = len(p)
    layout = draw(layouts(n))
    a, b = draw(st.permutations(range(n)))[:2]
    asked: list[tuple[str, str, list[int], Callable[..., Any]]] = [
        ("How many animals are in {x}?", r"are in (.+)\?", [a], lambda x: x.number),
        ("Is the animal in {x} larger than the one in {y}?", r"animal in (.+) larger than the one in (.+)\?",
         [a, b], lambda x, y: x.size > y.size),
        ("Do {x} and {y} show the same animal?", r"Do (.+) show", [a, b], lambda x, y: x.animal == y.animal),
        ("Do {noun}s {s} and {t} show the same animal?", r"Do (.+) show", [a, b], lambda x, y: x.animal == y.animal),
    ]  # fmt: skip
    form, pattern, named, holds = draw(st.sampled_from(asked))
    x, y = layout.name(draw, a), layout.name(draw, b)
    question = form.format(x=x, y=y, s=layout.tokens[a], t=layout.tokens[b], noun=layout.noun)

    def names(text: str, shown: Shown) -> list[int]:
        found = re.search(pattern, text)
        assert found, text
        return [shown[slot] for words in found.groups() for slot in layout.slots(words)]

    def right(text: str, shown: Shown) -> Any:
        return holds(*(p[i] for i in names(text, shown)))

    text = stem(draw, layout, question)
    known = right(text, range(n))
    answer = str(known) if len(named) == 1 else ("Yes" if known else "No")
    return Case(
        ask(draw, text, answer, all_but(named, n), follows=False),
        lambda answer, text, shown: int(answer) if answer.isdigit() else answer == "Yes",
        right,
        names=lambda text, shown: frozenset(names(text, shown)),
    )


@st.composite
def beside(draw: st.DrawFn) -> Case:
    """Words beside single slots, which stay there when the picture goes."""
    subject = draw(subjects())
    known = (("Monday", "Tuesday", "Friday", "Sunday"), ("Before", "Later", "Then", "After"),
             ("Rome", "Oslo", "Paris", "Bern"))  # fmt: skip
    words = draw(st.sampled_from(known))
    form = draw(st.sampled_from(["{}: <image> ", "<image> ({}) ", "This is from {}: <image>\n"]))
    text = f"{''.join(map(form.format, words[: subject.count]))}\nWhich image {subject.phrase}?"
    return Case(
        ask(draw, text, words[subject.slots[0]], follows=False),
        lambda answer, text, shown: frozenset({shown[words.index(answer)]}),
        subject.holds,
        by_hand=False,
    )


@st.composite
def shared(draw: st.DrawFn, by_itself: bool = True) -> Case:
    """A word that is true of every image, or of the order."""
    p = draw(worlds()).pictures
    if by_itself:
        p = (p[0],) * len(p)
    layout = draw(layouts(len(p)))
    asked: dict[str, Callable[[Shown], str]] = {
        "Which animal is shown first?": lambda s: p[s[0]].animal,
        "Which animal is on the right?": lambda s: p[s[-1]].animal,
        "Which animal do the images show next to the last one?": lambda s: p[s[-2]].animal,
    }
    if by_itself:
        asked = {"Which animal do all images show?": lambda s: p[0].animal}
    question = draw(st.sampled_from([*asked]))
    right = asked[question]
    text, answer = stem(draw, layout, question), right(range(len(p)))
    if draw(st.booleans()) and text.endswith("?"):
        text, answer = listed(draw, text, ANIMALS, ANIMALS.index(answer))
    example = ask(draw, text, answer, follows=False)
    return Case(example, said, lambda text, shown: right(shown), by_hand=by_itself)


@st.composite
def limited(draw: st.DrawFn) -> Case:
    """How many images something is true of, of those that the text names, or of the others."""
    subject = draw(subjects(least=3, true_of=range(5)))
    n = subject.count
    layout = draw(layouts(n))
    asked = [
        "How many of {x} {p}?",
        "How many images, not counting {x}, {p}?",
        "Apart from {x}, how many images {p}?",
    ]
    form = draw(st.sampled_from(asked))
    among = form.startswith("How many of")
    named = draw(st.sampled_from([(0, 1), (n - 2, n - 1)]))
    name = f"the {'first' if named[0] == 0 else 'last'} two images"
    if draw(st.booleans()):
        named = tuple(sorted(draw(st.permutations(range(n)))[: 2 if among else 1]))
        name = layout.name(draw, named[0])
        if among:
            name = f"{layout.noun}s {' and '.join(layout.tokens[j] for j in named)}"

    def right(text: str, shown: Shown) -> int:
        true = subject.holds(text, shown)
        return len(true & names(text, shown)) if among else len(true - names(text, shown))

    def names(text: str, shown: Shown) -> frozenset[Any]:
        found = re.search(
            rf"(?:How many of|not counting|Apart from) (.+?),? (?:{subject.plural}|how)", text
        )
        assert found, text
        return frozenset(shown[slot] for slot in layout.slots(found[1]))

    text = stem(draw, layout, form.format(x=name, p=subject.plural))
    example = ask(draw, text, str(right(text, range(n))), all_but(named, n), follows=False)
    return Case(example, lambda answer, text, shown: int(answer), right, names=names)


FORMS = {
    "limited": limited(),
    "counted": counted(),
    "counted, by the order": counted(by_itself=False),
    "stated": stated(),
    "stated, by the order": stated(by_itself=False),
    "shared": shared(),
    "shared, by the order": shared(by_itself=False),
    "values": values(),
    "particular": particular(),
    "beside": beside(),
}
