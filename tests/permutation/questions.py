"""Questions whose images are the numbers 0, 1, ..., which is enough of pictures to follow."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from perl.permutation import LETTERS
from perl.types import Example

ODD = st.text(alphabet="ſKİı²①٣३ABab12,. ()", max_size=12)
"""Letters and digits that other scripts fold to, or count as, those of ASCII."""


def ask(question: str, answer: str = "A", **fields: Any) -> Example:
    """A question with one image for each `<image>` in it, unless a field says otherwise."""
    images = tuple(range(question.count("<image>")))
    return Example(
        **{"id": "q", "images": images, "question": question, "answer": answer, **fields}
    )


def lettered(count: int, answer: str = "A", **fields: Any) -> Example:
    """A question over `count` slots with letters as labels."""
    return ask(" ".join(f"{letter} <image>" for letter in LETTERS[:count]), answer, **fields)


@st.composite
def kinds(draw: st.DrawFn, count: int) -> str:
    simple = ["all", "first_fixed", "none", f"last:{draw(st.integers(1, count))}"]
    slots = draw(st.permutations(range(1, count + 1)))
    cut = draw(st.integers(1, count))
    blocks = [slots[:cut], slots[cut:]]
    written = "/".join(",".join(map(str, block)) for block in blocks if block)
    return draw(st.sampled_from([*simple, f"blocks:{written}"]))


@st.composite
def lettered_questions(draw: st.DrawFn) -> Example:
    count = draw(st.integers(1, 26))
    named = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    style = draw(st.sampled_from(["{L}", "({l})", "Image {n}", "{n}", "image {n}.", "[{L}]"]))
    answer = ", ".join(style.format(L=LETTERS[i], l=LETTERS[i].lower(), n=i + 1) for i in named)
    return lettered(count, answer, kind=draw(kinds(count)))
