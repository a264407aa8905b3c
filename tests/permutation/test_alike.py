"""Images that show the same picture: fewer orders, and no prompt with two right answers."""

from __future__ import annotations

import math
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.data.pictures import open_image
from perl.permutation import (
    alike,
    all_orders,
    check_answer,
    check_moves,
    movable,
    num_orders,
    orders,
    permute,
    released_orders,
)
from perl.types import Example
from tests.messages import refused
from tests.permutation.questions import ask, kinds, lettered
from tests.pictures import encoded


def of(pictures: str, answer: str = "A", **fields: Any) -> Example:
    """A question over lettered slots that show these pictures, one a letter."""
    return lettered(len(pictures), answer, images=tuple(pictures), **fields)


def shown(example: Example, order: tuple[int, ...]) -> str:
    return "".join(str(example.images[i]) for i in order)


@pytest.mark.parametrize(
    ("pictures", "kind", "wanted"),
    [
        ("aa", "all", ["aa"]),
        ("aab", "all", ["aab", "aba", "baa"]),
        ("aaa", "all", ["aaa"]),
        ("aba", "first_fixed", ["aba", "aab"]),  # The scene is one of the candidates.
        ("aab", "last:2", ["aab", "aba"]),
        ("baa", "first_fixed", ["baa"]),
        ("abab", "blocks:1,3/2,4", ["abab"]),
        ("aabb", "blocks:1,3/2,4", ["aabb", "baab", "abba", "bbaa"]),
        ("aab", "none", ["aab"]),
    ],
)
def test_orders_that_change_nothing_are_none(pictures: str, kind: str, wanted: list[str]) -> None:
    example = of(pictures, kind=kind, should_change=False)
    every = all_orders(example, 99, 0)
    assert every[0] == tuple(range(len(pictures)))
    assert sorted(shown(example, o) for o in every) == sorted(wanted)
    assert num_orders(example) == len(wanted)


@given(st.data())
def test_all_that_differ_are_there_once(data: st.DataObject) -> None:
    pictures = data.draw(st.text("abc", min_size=1, max_size=6))
    example = of(pictures, kind=data.draw(kinds(len(pictures))))
    every = all_orders(example, 720, 0)
    blocks = movable(example.kind, len(pictures))
    wanted = set()
    for moved in product(*(permutations(block) for block in blocks)):
        order = list(range(len(pictures)))
        for block, new in zip(blocks, moved, strict=True):
            for slot, original in zip(block, new, strict=True):
                order[slot] = original
        wanted.add(shown(example, tuple(order)))
    assert sorted(shown(example, order) for order in every) == sorted(wanted)
    assert shown(example, every[0]) == pictures and every[0] == tuple(range(len(pictures)))
    drawn = orders(example, 3, 0, 0)
    assert len({shown(example, o) for o in drawn}) == len(drawn) == min(3, len(wanted))
    for order in every:  # Equal pictures of a block keep their sequence.
        for block in blocks:
            for picture in set(pictures):
                own = [order[s] for s in block if pictures[order[s]] == picture]
                assert own == [s for s in block if pictures[s] == picture]


def test_orders_of_many_images_some_of_them_equal() -> None:
    example = lettered(26, images=(0, 0, *range(1, 25)))
    assert num_orders(example) == math.factorial(26) // 2
    assert len(set(orders(example, 50, 0, 0))) == 50
    twice = lettered(20, images=tuple(k // 2 for k in range(20)))
    assert num_orders(twice) == math.factorial(20) // 2**10
    # As many as there are: the last rank is the reverse of the first.
    assert all_orders(of("aabb"), 6, 0)[-1] == (2, 3, 0, 1)


def test_the_released_order_may_change_nothing() -> None:
    assert released_orders(of("aab", "C")) == [(0, 1, 2)]
    assert released_orders(of("abb", "A")) == [(0, 1, 2), (1, 0, 2)]


@pytest.mark.parametrize("text", ["slots", "references"])
def test_equal_prompts_have_one_answer(text: Any) -> None:
    for named, images in (("A", (1, 2)), ("B", (1, 2))):
        example = of("aab", named)
        with refused("'q'", f"images {images[0]} and {images[1]}", "A", "B", "none"):
            check_moves(example, text)
        for order in all_orders(example, 9, 0)[1:]:
            with refused("'q'", "images 1 and 2"):
                permute(example, order, text)
    with refused("images 2 and 4"):
        permute(of("abcb", "D"), (1, 0, 2, 3), text)
    # What names the other picture, or stays, has one; so has the only order of two equal pictures.
    check_moves(of("aab", "C"), text)
    assert permute(of("aab", "C"), (0, 2, 1), text).answer == "B"
    check_moves(ask("<image>" * 3, "2", images=tuple("aab"), should_change=False), text)
    for answer in ("A", "B"):
        check_moves(of("aa", answer), text)
        check_answer(of("aa", answer))
    # A scene beside its copy among the candidates.
    scene = ask(
        "Scene: <image>\nA. <image>\nB. <image>\nWhich shows it?",
        "A",
        images=tuple("aab"),
        kind="first_fixed",
    )
    check_moves(scene, text)
    assert permute(scene, (0, 2, 1), text).answer == "B"
    with refused("images 1 and 3"):
        check_moves(of("abac", "A", kind="blocks:1,3,4"), text)


def test_a_block_of_one_picture_stays() -> None:
    """Whatever the other block shows: its answer is that of the original."""
    for pictures, answer, other in (("aabc", "A", "aacb"), ("bcaa", "D", "cbaa")):
        example = of(pictures, answer, kind="blocks:1,2/3,4")
        check_moves(example, "slots")
        every = all_orders(example, 9, 0)
        assert [shown(example, order) for order in every] == [pictures, other]
        assert [permute(example, order).answer for order in every] == [answer, answer]


def test_a_set_of_both_is_one_answer() -> None:
    question = "A <image> B <image> C <image> {}"
    which, order = question.format("Which images show a cat?"), question.format("In which order?")
    images = tuple("aab")
    check_moves(ask(which, "A, B", images=images), "slots")
    with refused("images 1 and 2"):
        check_moves(ask(which, "B, C", images=images), "slots")
    with refused("images 1 and 2"):
        check_moves(ask(order, "A, B, C", images=images), "slots")


def test_options_that_are_sequences_of_equal_pictures() -> None:
    question = "<image><image><image> Order?\nA. 1, 3, 2\nB. 2, 1, 3\nC. {}"
    example = ask(question.format("2, 3, 1"), kind="ordering", images=tuple("abb"))
    # C shows a, b, b with its images as 3, 1, 2: the orders are 1 2 3, 3 1 2 and 2 1 3.
    assert [shown(example, o) for o in all_orders(example, 9, 0)] == ["abb", "bab"]
    with refused("'q'", "images 2 and 3", "B", "C"):
        check_moves(example, "slots")
    alone = ask("<image><image> Order?\nA. 1, 2\nB. 2, 1", kind="ordering", images=("a", "a"))
    assert all_orders(alone, 9, 0) == [(0, 1)]
    check_moves(alone, "slots")


def test_pictures_are_compared_by_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def painted(*values: int, mode: str = "L", size: tuple[int, int] = (2, 1)) -> Image.Image:
        image = Image.new(mode, size)
        image.putdata(values)
        return image

    red, blue = (painted(1, 0, mode="P") for _ in range(2))
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue.putpalette([0, 0, 0, 0, 0, 255])
    images = (painted(3, 4), painted(3, 5), painted(3, 4), painted(3, 4, size=(1, 2)), red, blue)
    images[2].info["file"] = "another"
    assert alike(images) == (0, 1, 0, 3, 4, 5)
    # Once for an example, however often it is asked.
    monkeypatch.setattr(Image.Image, "tobytes", lambda _: pytest.fail("asked again"))
    assert alike(images) == (0, 1, 0, 3, 4, 5)
    # Of headers: a file by two names, and a copy.
    for name, value in (("a.png", 1), ("b.png", 1), ("c.png", 2), ("d.jpg", 1)):
        Image.new("L", (2, 2), value).save(tmp_path / name)
    opened = tuple(Image.open(tmp_path / name) for name in ("a.png", "c.png", "b.png", "d.jpg"))
    assert alike((*opened, opened[1], Image.open(tmp_path / "c.png"))) == (0, 1, 0, 3, 1, 1)
    png, bmp = encoded((1, 1, 1)), encoded((1, 1, 1), "BMP")
    inside = [open_image(data, "", decode=False) for data in (png, bmp, bytes(bytearray(png)))]
    assert alike((*inside, open_image(png, ""))) == (0, 1, 0, 3)
    for name in ("a.webp", "b.webp"):
        (tmp_path / name).write_bytes(encoded((1, 1, 1), "WEBP"))
    assert alike([open_image(tmp_path / f"{k}.webp", "", decode=False) for k in "ab"]) == (0, 0)
    (tmp_path / "a.png").unlink()
    assert alike((opened[0], opened[2])) == (0, 1)
    assert alike(({"bytes": b"x"}, "a.png", {"bytes": b"x"}, b"x", "a.png")) == (0, 1, 0, 3, 1)
