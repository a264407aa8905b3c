"""A small world of pictures, and what is true of a row of them. A picture is a number; `World` knows what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

ANIMALS = ("dog", "cat", "fish", "bird")


@dataclass(frozen=True)
class Picture:
    animal: str
    number: int
    """Of animals."""
    size: int
    """No two are alike."""


Shown = Sequence[Any]
Row = Sequence[Picture]
Predicate = Callable[[Row, int], bool]
"""Of the picture at a place of a row."""
Statement = Callable[[Row], bool]


@dataclass(frozen=True)
class World:
    """What the pictures 0, 1, ... show."""

    pictures: tuple[Picture, ...]

    def row(self, shown: Shown) -> list[Picture]:
        return [self.pictures[i] for i in shown]


@st.composite
def worlds(draw: st.DrawFn, least: int = 2) -> World:
    count = draw(st.integers(least, 4))
    animals = [draw(st.sampled_from(ANIMALS)) for _ in range(count)]
    numbers = [draw(st.integers(1, 5)) for _ in range(count)]
    sizes = draw(st.permutations(range(1, count + 1)))
    return World(tuple(map(Picture, animals, numbers, sizes)))


def predicates() -> dict[str, Predicate]:
    """What may be said of a picture wherever it stands."""
    found: dict[str, Predicate] = {
        "shows the largest animal": lambda r, j: r[j].size == max(x.size for x in r),
        "shows the smallest animal": lambda r, j: r[j].size == min(x.size for x in r),
        "shows the most animals": lambda r, j: r[j].number == max(x.number for x in r),
        "shows the fewest animals": lambda r, j: r[j].number == min(x.number for x in r),
    }
    found |= {f"shows a {a}": lambda r, j, a=a: r[j].animal == a for a in ANIMALS}
    for k in range(1, 6):
        found[f"contains exactly {k} animals"] = lambda r, j, k=k: r[j].number == k
    return found


def neighbours() -> dict[str, Predicate]:
    """What may be said of a picture because of where it stands."""
    found: dict[str, Predicate] = {
        "shows more animals than the one before it": lambda r, j: (
            j > 0 and r[j].number > r[j - 1].number
        ),
        "shows a larger animal than the image to its left": lambda r, j: (
            j > 0 and r[j].size > r[j - 1].size
        ),
        "shows a smaller animal than its right neighbour": lambda r, j: (
            j + 1 < len(r) and r[j].size < r[j + 1].size
        ),
        "shows the same animal as the previous image": lambda r, j: (
            j > 0 and r[j].animal == r[j - 1].animal
        ),
        "shows fewer animals than the picture that follows it": lambda r, j: (
            j + 1 < len(r) and r[j].number < r[j + 1].number
        ),
        "shows as many animals as a picture beside it": lambda r, j: any(
            abs(k - j) == 1 and r[k].number == r[j].number for k in range(len(r))
        ),
        "shows an animal that no earlier image shows": lambda r, j: (
            r[j].animal not in {x.animal for x in r[:j]}
        ),
        "shows an animal for the second time": lambda r, j: (
            [x.animal for x in r[:j]].count(r[j].animal) == 1
        ),
        "shows more animals than any image so far": lambda r, j: all(
            x.number < r[j].number for x in r[:j]
        ),
        "is the penultimate": lambda r, j: j == len(r) - 2,
        "is out of order by size": lambda r, j: r[j].size != j + 1,
        "is where the number of animals first drops": lambda r, j: (
            [k for k in range(1, len(r)) if r[k].number < r[k - 1].number][:1] == [j]
        ),
    }
    for a in ANIMALS:
        found |= {
            f"comes right after the {a}": lambda r, j, a=a: j > 0 and r[j - 1].animal == a,
            f"is next to the {a}": lambda r, j, a=a: any(abs(k - j) == 1 for k in _where(r, a)),
            f"is subsequent to the {a}": lambda r, j, a=a: any(k < j for k in _where(r, a)),
            f"is flanked by a {a}": lambda r, j, a=a: any(abs(k - j) == 1 for k in _where(r, a)),
            f"is where the {a} reappears": lambda r, j, a=a: j in _where(r, a)[1:],
            f"stands to the left of the {a}": lambda r, j, a=a: (
                j + 1 < len(r) and r[j + 1].animal == a
            ),
            f"is the first to show a {a}": lambda r, j, a=a: _where(r, a)[:1] == [j],
            f"is the last with a {a}": lambda r, j, a=a: _where(r, a)[-1:] == [j],
            f"shows the {a} again": lambda r, j, a=a: j in _where(r, a)[1:],
        }
    return found


def symmetrical() -> dict[str, Statement]:
    """What may be said of all images, whatever their order."""
    found: dict[str, Statement] = {
        "All images show the same animal.": lambda r: len({x.animal for x in r}) == 1,
        "No two images show the same animal.": lambda r: len({x.animal for x in r}) == len(r),
        "There are more than six animals in total in the images.": lambda r: (
            sum(x.number for x in r) > 6
        ),
    }
    for a in ANIMALS:
        found |= {
            f"All images show a {a}.": lambda r, a=a: len(_where(r, a)) == len(r),
            f"Each image shows a {a}.": lambda r, a=a: len(_where(r, a)) == len(r),
            f"At least one image shows a {a}.": lambda r, a=a: bool(_where(r, a)),
            f"Exactly one image shows a {a}.": lambda r, a=a: len(_where(r, a)) == 1,
            f"None of the images shows a {a}.": lambda r, a=a: not _where(r, a),
        }
    for a in ANIMALS:
        for b in ANIMALS:
            found[f"One image shows a {a} and another image shows a {b}."] = lambda r, a=a, b=b: (
                any(j != k for j in _where(r, a) for k in _where(r, b))
            )
    return found


def by_order() -> dict[str, Statement]:
    """What may be said of all images in their order."""
    found: dict[str, Statement] = {
        "From left to right, the animals get larger.": lambda r: _rises(r, lambda x: x.size),
        "The images are sorted by the size of the animals.": lambda r: _rises(r, lambda x: x.size),
        "The animals get smaller from image to image.": lambda r: _rises(r, lambda x: -x.size),
        "Each image shows more animals than the one before.": lambda r: _rises(
            r, lambda x: x.number
        ),
        "There are more animals on the left than on the right.": lambda r: (
            r[0].number > r[-1].number
        ),
        "The number of animals grows from the beginning to the end.": lambda r: (
            r[0].number < r[-1].number
        ),
        "Neighbouring images show different animals.": lambda r: all(
            x.animal != y.animal for x, y in pairwise(r)
        ),
    }
    for a in ANIMALS:
        found |= {
            f"The left image shows a {a}.": lambda r, a=a: r[0].animal == a,
            f"The {a} comes last.": lambda r, a=a: r[-1].animal == a,
            f"One image shows a {a} and the next image shows none.": lambda r, a=a: any(
                x.animal == a != y.animal for x, y in pairwise(r)
            ),
        }
    for a in ANIMALS:
        for b in ANIMALS:
            found |= {
                f"One image shows a {a} and the image after it shows a {b}.": lambda r, a=a, b=b: (
                    any((x.animal, y.animal) == (a, b) for x, y in pairwise(r))
                ),
                f"The left image shows a {a} and the right image shows a {b}.": lambda r, a=a, b=b: (
                    (r[0].animal, r[-1].animal) == (a, b)
                ),
            }
    return found


def _where(row: Row, animal: str) -> list[int]:
    return [j for j, picture in enumerate(row) if picture.animal == animal]


def _rises(row: Row, value: Callable[[Picture], int]) -> bool:
    return all(value(x) < value(y) for x, y in pairwise(row))
