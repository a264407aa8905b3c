"""Which orders there are and which are drawn, and how often an example is permuted at all."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import (
    all_orders,
    is_permuted,
    misplaced,
    movable,
    num_orders,
    orders,
    permute,
    rate_at,
    released_orders,
    shares,
)
from perl.types import Example
from tests.messages import refused
from tests.permutation.questions import ask, lettered, lettered_questions


@given(lettered_questions(), st.integers(1, 8), st.integers(0, 3), st.integers(0, 3))
def test_orders_are_distinct_reproducible_and_of_their_kind(
    example: Example, n: int, seed: int, epoch: int
) -> None:
    got = orders(example, n, seed, epoch)
    count = len(example.images)
    assert got == orders(example, n, seed, epoch)
    assert got[0] == tuple(range(count))
    assert len(got) == len(set(got)) == min(n, num_orders(example))
    home = {slot: b for b, block in enumerate(movable(example.kind, count)) for slot in block}
    for order in got:
        assert sorted(order) == list(range(count))
        for slot, original in enumerate(order):
            assert slot == original or home[slot] == home[original]


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("all", [None] * 6),
        ("none", [None, 1, 0, 0, 0, 0]),
        ("first_fixed", [None, None, 0, 0, 0, 0]),
        ("blocks:1,3", [None, 1, 0, 0, 1, None]),
        # Images 1, 3, 2 stand in slots 2, 1, 3.
        ("ordering", [None, 1, 0, 0, None, 0]),
    ],
)
def test_which_image_its_kind_does_not_let_stand_where_it_does(
    kind: str, slots: list[int | None]
) -> None:
    """By order of three images, in the sequence of the alphabet."""
    text = "<image> <image> <image> In which order? A. 1, 3, 2 B. 2, 1, 3"
    example = ask(text, "A", kind=kind)
    every = list(permutations(range(3)))
    assert [misplaced(example, order) for order in every] == slots
    allowed = [order for order, slot in zip(every, slots, strict=True) if slot is None]
    assert allowed == sorted(all_orders(example, 6, 0))


def test_orders_of_many_images() -> None:
    example = ask("<image>" * 32, "31")
    got = orders(example, 50, 0, 0)
    assert len(set(got)) == 50
    assert num_orders(example) == math.factorial(32)
    assert permute(example, got[1]).answer == str(got[1].index(30) + 1)


def test_orders_depend_on_seed_epoch_and_example_alone() -> None:
    one, other = lettered(8), lettered(8, id="q2")
    assert orders(one, 4, 0, 0) == orders(lettered(8, answer="C"), 4, 0, 0)
    different = {tuple(orders(e, 4, s, k)) for e in (one, other) for s in (0, 1) for k in (0, 1)}
    assert len(different) == 8
    # Every process and every version draws these.
    assert orders(one, 3, 0, 0)[1:] == [(7, 2, 3, 0, 6, 5, 4, 1), (6, 0, 3, 4, 5, 7, 1, 2)]


def test_all_orders_are_all_or_a_sample() -> None:
    every = all_orders(lettered(4), 24, 0)
    assert len(every) == 24 and sorted(every) == sorted(set(every))
    sampled = all_orders(lettered(5), 24, 0)
    assert len(set(sampled)) == 24 and sampled[0] == (0, 1, 2, 3, 4)
    assert all_orders(lettered(5, answer="B"), 24, 0) == sampled
    assert all_orders(lettered(5), 24, 1) != sampled != all_orders(lettered(5, id="q2"), 24, 0)
    assert all_orders(lettered(3, kind="none"), 24, 0) == [(0, 1, 2)]
    assert all_orders(lettered(2), 1, 0) == [(0, 1)]


def test_every_order_but_the_original_is_drawn() -> None:
    seen = {tuple(orders(lettered(3, id=str(i)), 2, 0, 0)[1]) for i in range(100)}
    assert len(seen) == 5
    with refused("n=0", error=ValueError):
        orders(lettered(3), 0, 0, 0)


def test_the_released_code_has_one_order_per_number_of_images() -> None:
    """The values are those that random.seed(42); random.shuffle gives before every call."""
    for count, order in ((2, (1, 0)), (3, (1, 0, 2)), (4, (2, 1, 3, 0)), (5, (3, 1, 2, 4, 0))):
        assert released_orders(lettered(count)) == [tuple(range(count)), order]
    assert released_orders(lettered(3, kind="first_fixed")) == [(0, 1, 2), (0, 2, 1)]
    assert released_orders(lettered(1)) == [(0,)]
    several = ask(
        "<image><image><image> Order?\nA. 1, 3, 2\nB. 2, 1, 3\nC. 3, 2, 1", kind="ordering"
    )
    assert released_orders(several) == [(0, 1, 2), (2, 0, 1)]


KINDS = ["all", "first_fixed", "last:K", "ordering", "none", "blocks:2,4/1,3"]


@pytest.mark.parametrize(
    ("count", "kind", "names"),
    [
        *((3, kind, KINDS) for kind in ("some", "", "last:x", "blocks:", "blocks:1,,2")),
        (3, "last:0", ["1 to 3"]),
        (3, "last:4", ["1 to 3"]),
        (0, "last:2", ["no images"]),
        (3, "blocks:1,1", ["twice"]),
        (3, "blocks:1,2/2,3", ["twice"]),
        (3, "blocks:0,1", ["1..3"]),
        (3, "blocks:1,4", ["1..3"]),
    ],
)
def test_bad_kinds(count: int, kind: str, names: list[str]) -> None:
    with refused(f"'{kind}'", *names):
        num_orders(lettered(count, kind=kind))


def test_the_rate_falls_as_its_schedule_says() -> None:
    assert [rate_at(0.8, "constant", p) for p in (0, 0.5, 1)] == [0.8, 0.8, 0.8]
    assert [rate_at(0.8, "linear", p) for p in (0, 0.5, 1)] == pytest.approx([0.8, 0.4, 0])
    cosine = [0.8, 0.6, 0.4, 0.2, 0]  # times (1 + cos(pi progress)) / 2
    assert [rate_at(0.8, "cosine", k / 6) for k in (0, 2, 3, 4, 6)] == pytest.approx(cosine)
    released = [rate_at(0.8, "released", p) for p in (0, 0.975, 0.9751, 1)]
    assert released == pytest.approx([0.8, 0.8, 0.04, 0.04])


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_the_coin_is_the_examples_own(one: float, other: float, epoch: int) -> None:
    low, high = sorted((one, other))
    example = lettered(3)
    assert is_permuted(example, low, 0, epoch) <= is_permuted(example, high, 0, epoch)
    assert not is_permuted(example, 0, 0, epoch) and is_permuted(example, 1, 0, epoch)


def test_the_rate_is_the_share_of_examples_that_are_permuted() -> None:
    """A coin of its own for each seed and epoch: two of them agree on 0.3^2 + 0.7^2 of the examples."""
    coins = {
        (seed, epoch): [is_permuted(lettered(3, id=str(i)), 0.3, seed, epoch) for i in range(1000)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    for coin in coins.values():  # within four standard errors
        assert sum(coin) == pytest.approx(300, abs=60)
    for one, other in combinations(coins.values(), 2):
        alike = sum(a == b for a, b in zip(one, other, strict=True))
        assert alike == pytest.approx(580, abs=65)
    # Every process and every version tosses this one.
    assert "".join("01"[up] for up in coins[1, 1][:20]) == "00100000001101001001"


@given(st.integers(1, 100), st.integers(1, 30))
def test_rollouts_are_shared_out_evenly(total: int, parts: int) -> None:
    got = shares(total, parts)
    assert sum(got) == total and len(got) == parts and max(got) - min(got) <= 1
    assert got == sorted(got, reverse=True)  # the first ones take the rest
