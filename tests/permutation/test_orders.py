"""Which orders there are and which are drawn, and how often an example is permuted at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.permutation import (
    all_orders,
    is_permuted,
    movable,
    num_orders,
    orders,
    permute,
    rate_at,
    released_orders,
    shares,
)
from perl.types import Example, UserError
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
    assert all_orders(lettered(3, kind="none"), 24, 0) == [(0, 1, 2)]
    assert all_orders(lettered(2), 1, 0) == [(0, 1)]


def test_every_order_but_the_original_is_drawn() -> None:
    seen = {tuple(orders(lettered(3, id=str(i)), 2, 0, 0)[1]) for i in range(100)}
    assert len(seen) == 5
    with pytest.raises(ValueError, match="n=0"):
        orders(lettered(3), 0, 0, 0)


def test_the_released_code_has_one_order_per_number_of_images() -> None:
    """The values are those that random.seed(42); random.shuffle gives before every call."""
    for count, order in ((2, (1, 0)), (3, (1, 0, 2)), (4, (2, 1, 3, 0)), (5, (3, 1, 2, 4, 0))):
        assert released_orders(lettered(count)) == [tuple(range(count)), order]
    assert released_orders(lettered(3, kind="first_fixed")) == [(0, 1, 2), (0, 2, 1)]
    assert released_orders(lettered(1)) == [(0,)]


@pytest.mark.parametrize(
    ("count", "kind", "match"),
    [
        (3, "some", "unknown kind 'some'; use all, first_fixed"),
        (3, "", "unknown kind"),
        (3, "last:0", "needs 1 to 3 images"),
        (3, "last:4", "needs 1 to 3 images"),
        (3, "last:x", "unknown kind"),
        (0, "last:2", r"kind 'last:2' .* there are no images"),
        (3, "blocks:", "unknown kind"),
        (3, "blocks:1,1", "names a slot twice"),
        (3, "blocks:1,2/2,3", "names a slot twice"),
        (3, "blocks:0,1", "outside 1..3"),
        (3, "blocks:1,4", "outside 1..3"),
        (3, "blocks:1,,2", "unknown kind"),
    ],
)
def test_bad_kinds(count: int, kind: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        num_orders(lettered(count, kind=kind))


def test_the_rate_falls_as_its_schedule_says() -> None:
    assert [rate_at(0.8, "constant", p) for p in (0, 0.5, 1)] == [0.8, 0.8, 0.8]
    assert [rate_at(0.8, "linear", p) for p in (0, 0.5, 1)] == pytest.approx([0.8, 0.4, 0])
    assert [rate_at(1, "cosine", p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [rate_at(1, "released", p) for p in (0, 0.97, 0.98)] == [1, 1, 0.05]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_the_coin_is_the_examples_own(one: float, other: float, epoch: int) -> None:
    low, high = sorted((one, other))
    example = lettered(3)
    assert is_permuted(example, low, 0, epoch) <= is_permuted(example, high, 0, epoch)
    assert not is_permuted(example, 0, 0, epoch) and is_permuted(example, 1, 0, epoch)


def test_the_rate_is_the_share_of_examples_that_are_permuted() -> None:
    permuted = [is_permuted(lettered(3, id=str(i)), 0.3, 0, 0) for i in range(2000)]
    assert sum(permuted) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard errors


@given(st.integers(1, 100), st.integers(1, 30))
def test_rollouts_are_shared_out_evenly(total: int, parts: int) -> None:
    got = shares(total, parts)
    assert sum(got) == total and len(got) == parts and max(got) - min(got) <= 1
