"""An example of a small world with the means to read it: which pictures an answer or a text names, and which are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from perl.types import Example, Message
from tests.permutation.world import Predicate, Shown, World, neighbours, predicates, worlds

ORDINALS = ("first", "second", "third", "fourth")
WORDS = ("one", "two", "three", "four")
NUMBERS = ("1", "2", "3", "4")
LETTERS = "ABCDEFGH"
MARKS = ("{l}. {o}", "({l}) {o}", "{l}) {o}", "{l}: {o}")


@dataclass(frozen=True)
class Case:
    """An example labelled by hand, and how it is to be read."""

    example: Example
    meaning: Callable[[str, str, Shown], Hashable]
    """Of an answer to a text over shown pictures; None: nothing."""
    right: Callable[[str, Shown], Hashable]
    answers: Sequence[str] = ()
    """Answers that one may give, for `original_answer`."""
    by_hand: bool = True
    """Whether the label of the example is right; False: its images have to stay."""
    names: Callable[[str, Shown], Hashable] | None = None
    """The pictures that the text names. Where names follow, any image may move."""


@dataclass(frozen=True)
class Layout:
    """What stands at the slots, and what names them."""

    slot: str
    tokens: Sequence[str]
    noun: str = "image"

    def images(self) -> str:
        named = zip(self.tokens, ORDINALS, strict=False)
        return "".join(self.slot.format(t=t, o=o.capitalize()) for t, o in named).rstrip(" ")

    def name(self, draw: Any, slot: int) -> str:
        """The slot, in a text."""
        token, styles = self.tokens[slot], ["{noun} {t}", "the {o} image", "the {o} picture"]
        if token.isdigit():
            styles += ["picture number {t}", "photo #{t}"]
        if self.tokens == NUMBERS[: len(self.tokens)]:
            styles += ["<image_{t}>", "image {w}"]
        style = draw(st.sampled_from(styles))
        return style.format(noun=self.noun, t=token, o=ORDINALS[slot], w=WORDS[slot])

    def slots(self, said: str) -> tuple[int, ...]:
        """The slots that a few words name."""
        known = {token: slot for slot, token in enumerate(self.tokens)}
        known |= {word: slot for words in (ORDINALS, WORDS) for slot, word in enumerate(words)}
        known["last"] = len(self.tokens) - 1
        said = re.sub(r"\b(first|second|third|fourth|last) one\b", r"\1", said)
        span = r"\b(first|last) (two|three) (?:images|pictures)"
        said = re.sub(span, lambda x: self._span(x[1], WORDS.index(x[2]) + 1), said)
        found = re.findall(r"[0-9]+|\b[A-D]\b|[A-Za-z]{3,}", said)
        names = [x.lower() if len(x) > 2 else x for x in found]
        return tuple(known[x] for x in names if x in known or len(x) < 3)

    def _span(self, end: str, length: int) -> str:
        known = ORDINALS[: len(self.tokens)]
        return " ".join(known[:length] if end == "first" else known[-length:])

    def named(self, said: str, text: str, shown: Shown) -> frozenset[int] | None:
        """The pictures that an answer names."""
        try:
            return frozenset(shown[slot] for slot in self.slots(said)) or None
        except (KeyError, IndexError):
            return None

    def answers(self) -> list[str]:
        return [*self.tokens, *(f"the {ORDINALS[k]} image" for k in range(len(self.tokens)))]


@st.composite
def layouts(draw: st.DrawFn, count: int) -> Layout:
    one, abc = NUMBERS[:count], tuple(LETTERS[:count])
    start = draw(st.sampled_from([0, 0, 2, 5]))
    mixed = draw(st.permutations(range(count)))
    known = [
        Layout("<image> ", one),
        Layout("<image>\n", one),
        Layout("Image {t}: <image>\n", one),
        Layout("<image> (Image {t})\n", one),
        Layout("({t}) <image> ", one),
        Layout("{o} image: <image>\n", one),
        Layout("{t}. <image> ", abc),
        Layout("({t}) <image>\n", abc),
        Layout("{t}: <image> ", abc),
        Layout("Image {t}: <image>\n", abc),
        Layout("Image {t}: <image>\n", tuple(str(start + k) for k in range(count))),
        Layout("Image {t}: <image> ", tuple(one[k] for k in mixed)),
        Layout("({t}) <image> ", tuple(abc[k] for k in mixed)),
        Layout("Chart {t}: <image>\n", one, "chart"),
        Layout("View {t}: <image> ", abc, "view"),
    ]
    return draw(st.sampled_from(known))


@dataclass(frozen=True)
class Subject:
    """A world and something that is true of some of its pictures, in words."""

    world: World
    phrase: str
    predicate: Predicate

    @property
    def count(self) -> int:
        return len(self.world.pictures)

    @property
    def slots(self) -> list[int]:
        """Where it is true in the original order."""
        return [j for j in range(self.count) if self.predicate(self.world.pictures, j)]

    @property
    def plural(self) -> str:
        verb, _, rest = self.phrase.partition(" ")
        return f"{'are' if verb == 'is' else verb.removesuffix('s')} {rest}"

    def holds(self, text: str, shown: Shown) -> frozenset[int]:
        row = self.world.row(shown)
        return frozenset(shown[j] for j in range(len(row)) if self.predicate(row, j))


@st.composite
def subjects(
    draw: st.DrawFn, by_itself: bool = True, least: int = 2, true_of: Sequence[int] = (1,)
) -> Subject:
    """Something that is true of so many pictures; of each `by_itself`, or because of those beside it."""
    world = draw(worlds(least))
    found = predicates() if by_itself else neighbours()
    some = [Subject(world, phrase, predicate) for phrase, predicate in found.items()]
    some = [subject for subject in some if len(subject.slots) in true_of]
    assume(some)
    return draw(st.sampled_from(some))


def ask(draw: Any, text: str, answer: str, kind: str = "all", follows: bool = True) -> Example:
    """An example; some are chats."""
    images: Any = tuple(range(text.count("<image>")))
    question: Any = text
    if draw(st.integers(0, 5)) == 0:
        question = (Message("system", "Be brief."), Message("user", text))
    return Example("q", images, question, answer, kind, follows)


def stem(draw: Any, layout: Layout, question: str) -> str:
    """Images and question; either comes first."""
    instruction = draw(st.sampled_from(["", "", "Look closely. ", "Look at these pictures. "]))
    if draw(st.integers(0, 3)) == 0:
        return f"{instruction}{question}\n{layout.images()}"
    return f"{layout.images()}\n{instruction}{question}"


def listed(draw: Any, text: str, options: Sequence[str], right: int) -> tuple[str, str]:
    """A text with options, and the answer that gives the letter of the right one."""
    mark = draw(st.sampled_from(MARKS))
    between = "\n" if draw(st.integers(0, 2)) else " "
    lines = [mark.format(l=LETTERS[k], o=option) for k, option in enumerate(options)]
    after = draw(st.sampled_from(["", "", "\nAnswer with the letter."]))
    answer = draw(st.sampled_from(["{}", "({})"])).format(LETTERS[right])
    return f"{text}{between}{between.join(lines)}{after}", answer


def options_in(text: str) -> dict[str, str]:
    tail = text.rpartition("?")[2].partition("\nAnswer with")[0]
    marks = [*re.finditer(r"\(?\b([A-H])(?:\)|\.|:) ", tail), None]
    return {
        mark[1]: tail[mark.end() : after.start() if after else None].strip()
        for mark, after in pairwise(marks)
        if mark
    }


def all_but(slots: Sequence[int], count: int) -> str:
    """The kind of which just these slots stay."""
    free = [str(slot + 1) for slot in range(count) if slot not in slots]
    return f"blocks:{','.join(free)}" if len(free) > 1 else "none"
