"""Forms of questions whose answers name images, each with the label that a careful person would give it."""

from __future__ import annotations

import re
from itertools import combinations, permutations
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.permutation.cases import (
    LETTERS,
    NUMBERS,
    ORDINALS,
    Case,
    Layout,
    all_but,
    ask,
    layouts,
    listed,
    options_in,
    stem,
    subjects,
)
from tests.permutation.world import Shown, worlds

ANSWERS = ("{t}", "{N} {t}", "({t})", "The {o} image", "the {o} image")


def answer_of(draw: Any, layout: Layout, slot: int) -> str:
    style = draw(st.sampled_from(ANSWERS))
    return style.format(t=layout.tokens[slot], N=layout.noun.capitalize(), o=ORDINALS[slot])


@st.composite
def which(draw: st.DrawFn, by_itself: bool = True, hint: bool = False) -> Case:
    """One image; the text may also name others."""
    subject = draw(subjects(by_itself))
    layout = draw(layouts(subject.count))
    asked = ("Which image {p}?", "Which of the images {p}?", "Find the image that {p}.")
    question = draw(st.sampled_from(asked)).format(p=subject.phrase)
    hinted = draw(st.sampled_from(["Look at {x} and then at {y}. ", "Compare {x} with {y}. "]))
    x, y = (layout.name(draw, j) for j in draw(st.permutations(range(subject.count)))[:2])
    text = stem(draw, layout, (hinted.format(x=x, y=y) if hint else "") + question)

    def names(text: str, shown: Shown) -> tuple[int, ...]:
        said = r"(?:Look at|Compare) ([^.]+?) (?:and then at|with) ([^.]+?)\. (?:Which|Find)"
        found = re.search(said, text)
        assert found, text
        return tuple(shown[slot] for words in found.groups() for slot in layout.slots(words))

    return Case(
        ask(draw, text, answer_of(draw, layout, subject.slots[0])),
        layout.named,
        subject.holds,
        layout.answers(),
        by_itself,
        names if hint else None,
    )


@st.composite
def counted_otherwise(draw: st.DrawFn) -> Case:
    """The question itself says how images are counted."""
    subject = draw(subjects())
    n = subject.count
    nought = NOUGHT[:n]
    said, tokens = draw(
        st.sampled_from(
            [
                ("Count from 0.", nought),
                ("Give the index (0-based).", nought),
                (f"Answer with a number from 0 to {n - 1}.", nought),
                (f"Answer {', '.join(nought[:-1])} or {nought[-1]}.", nought),
                ("Number the images from right to left.", NUMBERS[:n][::-1]),
                ("The images are numbered from 3 on.", ("3", "4", "5", "6")[:n]),
                ("Answer with the number of the image.", NUMBERS[:n]),
            ]
        )
    )
    layout = Layout("<image> ", tokens)
    text = f"{layout.images()}\nWhich image {subject.phrase}? {said}"
    example = ask(draw, text, tokens[subject.slots[0]])
    return Case(example, layout.named, subject.holds, tokens)


NOUGHT = ("0", "1", "2", "3")


@st.composite
def coded(draw: st.DrawFn) -> Case:
    """The text says what to answer for which image."""
    subject = draw(subjects())
    n = subject.count
    codes = draw(st.permutations(draw(st.sampled_from(["1234", "0123", "ABCD", "XYZW"]))[:n]))
    form = draw(
        st.sampled_from(["{c} for the {o} image", "{c} if it is image {k}", "{c} = image {k}"])
    )
    parts = [form.format(c=c, o=ORDINALS[k], k=k + 1) for k, c in enumerate(codes)]
    told = f"Answer {', '.join(parts[:-1])} and {parts[-1]}."
    text = f"{'<image> ' * n}Which image {subject.phrase}? {told}"
    layout = Layout("", NUMBERS[:n])

    def meaning(answer: str, text: str, shown: Shown) -> Any:
        code = dict(re.findall(r"(\w) (?:for|if|=)([^,.]*?)(?= and \w |[,.])", text))
        return layout.named(code[answer], text, shown) if answer in code else None

    return Case(ask(draw, text, codes[subject.slots[0]]), meaning, subject.holds, codes)


@st.composite
def several(draw: st.DrawFn, by_itself: bool = True) -> Case:
    """All images that something is true of: a set."""
    subject = draw(subjects(by_itself, 3, (2, 3, 4)))
    layout = draw(layouts(subject.count))
    asked = draw(st.sampled_from(["Which images {p}?", "Select all images that {p}."]))
    text = stem(draw, layout, asked.format(p=subject.plural))
    answer = ", ".join(layout.tokens[j] for j in subject.slots)
    answers = [", ".join(x) for k in (1, 2, 3) for x in combinations(layout.tokens, k)]
    return Case(ask(draw, text, answer), layout.named, subject.holds, answers, by_itself)


@st.composite
def sequence(draw: st.DrawFn) -> Case:
    """Images in a sequence that their contents give."""
    p = draw(worlds(3)).pictures
    n = len(p)
    layout = draw(layouts(n))
    asked = {
        "Sort the images by the size of the animal, smallest first.": range(n),
        "Order the images from the smallest to the largest animal.": range(n),
        "In which order do the images go from the smallest to the largest animal?": range(n),
        "Which images show the largest and the smallest animal?": (n - 1, 0),
        "Which image shows the largest animal and which image shows the second largest?": (
            n - 1,
            n - 2,
        ),
    }
    question = draw(st.sampled_from([*asked]))
    ranks = asked[question]

    def right(text: str, shown: Shown) -> tuple[Any, ...]:
        by_size = sorted(shown, key=lambda i: p[i].size)
        return tuple(by_size[k] for k in ranks)

    answer = ", ".join(layout.tokens[j] for j in right("", range(n)))
    return Case(
        ask(draw, stem(draw, layout, question), answer),
        lambda answer, text, shown: tuple(shown[j] for j in layout.slots(answer)),
        right,
        [", ".join(x) for x in [*permutations(layout.tokens, len(ranks))][::4]],
    )


@st.composite
def optioned(draw: st.DrawFn, by_itself: bool = True) -> Case:
    """Options in words that name images."""
    subject = draw(subjects(by_itself, true_of=(0, 1, 2)))
    n, slots = subject.count, frozenset(subject.slots)
    layout = draw(layouts(n).filter(lambda x: x.tokens[0].isdigit()))
    style = draw(
        st.sampled_from(
            ["{N} {t}", "the {o} image", "Only {n} {t}", "{O}", "{t}", "The {o} one", ""]
        )
    )
    noun = layout.noun
    names = [
        style.format(n=noun, N=noun.capitalize(), t=t, o=o, O=o.capitalize())
        or layout.name(draw, j)
        for j, (t, o) in enumerate(zip(layout.tokens, ORDINALS, strict=False))
    ]
    some = draw(st.permutations(range(n)))[: draw(st.integers(2, n))]
    said = {names[j]: frozenset({j}) for j in (range(n) if draw(st.booleans()) else some)}
    for two in combinations(range(n), 2):
        if draw(st.booleans()):
            first, second = (layout.tokens[j] for j in two)
            said[f"{noun.capitalize()}s {first} and {second}"] = frozenset(two)
    said["None of them"] = frozenset()
    options = [*said][-6:]
    assume(slots in [said[x] for x in options])
    right = [said[x] for x in options].index(slots)
    text, answer = listed(draw, f"{layout.images()}\nWhich image {subject.phrase}?", options, right)
    if draw(st.integers(0, 3)) == 0:
        answer = f"{LETTERS[right]}. {options[right]}"

    def meaning(answer: str, text: str, shown: Shown) -> Any:
        """Of a letter, and of the words behind it, which have to agree."""
        match = re.match(r"\(?([A-H])\b[).]*(.*)", answer)
        said = options_in(text).get(match[1]) if match else None
        if match is None or said is None:
            return None
        meant, words = (frozenset(shown[j] for j in layout.slots(x)) for x in (said, match[2]))
        return meant if not match[2] or words == meant else None

    return Case(
        ask(draw, text, answer, follows=bool(slots)),
        meaning,
        subject.holds,
        LETTERS[: len(options)],
        by_itself,
    )


@st.composite
def pictured(draw: st.DrawFn) -> Case:
    """Options that are images, after one of the question's own or two."""
    p = draw(worlds(3)).pictures
    n, own = len(p), draw(st.integers(1, len(p) - 2))
    alike = [j for j in range(own, n) if p[j].animal == p[0].animal]
    assume(len(alike) == 1)
    mark = draw(st.sampled_from(["{}. <image>", "({}) <image>", "{}: <image>"]))
    options = draw(st.sampled_from("\n ")).join(mark.format(x) for x in LETTERS[: n - own])
    asked = ("Which option shows the same animal?", "Which of these images shows the same animal?",
             "Which picture shows that animal too?")  # fmt: skip
    text = f"{'<image> ' * own}{draw(st.sampled_from(asked))}\n{options}"
    answer = draw(st.sampled_from(["{}", "({})"])).format(LETTERS[alike[0] - own])
    letters = Layout("", LETTERS[: n - own])
    return Case(
        ask(draw, text, answer, "first_fixed" if own == 1 else f"last:{n - own}"),
        lambda answer, text, shown: letters.named(answer, text, shown[own:]),
        lambda text, shown: frozenset(i for i in shown[own:] if p[i].animal == p[shown[0]].animal),
        letters.tokens,
    )


@st.composite
def referred(draw: st.DrawFn) -> Case:
    """Another image that is like one that the text names."""
    p = draw(worlds(3)).pictures
    n = len(p)
    layout = draw(layouts(n))
    target = draw(st.integers(0, n - 1))
    alike = [j for j in range(n) if j != target and p[j].animal == p[target].animal]
    assume(len(alike) == 1)
    noun = draw(st.sampled_from(["", "", "chart", "sample", "Fig."]))
    name = f"{noun} {layout.tokens[target]}" if noun else layout.name(draw, target)
    asked = (
        "Which of the other images shows the same animal as {x}?",
        "Which image, other than {x}, shows the animal of that image?",
        "Which image shows the same animal as {x}?",
    )
    text = stem(draw, layout, draw(st.sampled_from(asked)).format(x=name))

    def names(text: str, shown: Shown) -> int:
        found = re.search(r"(?:animal as|other than) ([^,?]+)[,?]", text)
        assert found, text
        return shown[layout.slots(found[1])[0]]

    def right(text: str, shown: Shown) -> Any:
        one = names(text, shown)
        return frozenset(i for i in shown if i != one and p[i].animal == p[one].animal)

    return Case(
        ask(draw, text, answer_of(draw, layout, alike[0]), all_but([target], n)),
        layout.named,
        right,
        layout.answers(),
        names=names,
    )


@st.composite
def ordering(draw: st.DrawFn) -> Case:
    """Options that are sequences of images."""
    p = draw(worlds(3)).pictures
    n = len(p)
    right = tuple(sorted(range(n), key=lambda j: p[j].size))
    others = draw(st.permutations([*permutations(range(n))]))[:3]
    options = draw(st.permutations([*dict.fromkeys([right, *others])]))
    joint = draw(st.sampled_from([", ", "-", " - "]))
    said = [joint.join(NUMBERS[j] for j in option) for option in options]
    asked = ("In which order should the images stand to go from the smallest to the largest animal?",
             "In which order are the animals sorted from small to large?")  # fmt: skip
    question = f"{'<image> ' * n}\n{draw(st.sampled_from(asked))}"
    text, answer = listed(draw, question, said, options.index(right))

    def meaning(answer: str, text: str, shown: Shown) -> Any:
        found = options_in(text).get(answer.strip("()"), "")
        return tuple(shown[int(x) - 1] for x in re.findall(r"[0-9]", found)) or None

    return Case(
        ask(draw, text, answer, "ordering"),
        meaning,
        lambda text, shown: tuple(sorted(shown, key=lambda i: p[i].size)),
        LETTERS[: len(options)],
    )


FORMS = {
    "which": which(),
    "which, by the order": which(by_itself=False),
    "which, with a hint": which(hint=True),
    "several": several(),
    "several, by the order": several(by_itself=False),
    "optioned": optioned(),
    "optioned, by the order": optioned(by_itself=False),
    "counted otherwise": counted_otherwise(),
    "coded": coded(),
    "sequence": sequence(),
    "pictured": pictured(),
    "referred": referred(),
    "ordering": ordering(),
}
