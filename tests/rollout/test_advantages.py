"""Advantages over the group, over each order, and over both; weights of groups, hard examples first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.config import AdvantageConfig
from perl.rollout.advantages import advantages_of, group_mean, group_weight

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])


def z(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


def test_over_the_group_over_each_order_and_both() -> None:
    per_order = np.concatenate([z(REWARDS[:3]), z(REWARDS[3:])])
    both = z(REWARDS) + per_order
    for over, expected in (("group", z(REWARDS)), ("order", per_order), ("order+group", both)):
        got = advantages_of(REWARDS, [6], [3, 3], AdvantageConfig(over=over))  # type: ignore[arg-type]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_order_that_is_harder_than_another() -> None:
    """All wrong in one order, all right in the other: only a comparison across orders sees it."""
    rewards = np.array([1.0, 1.0, 0.0, 0.0])
    group = advantages_of(rewards, [4], [2, 2], AdvantageConfig(over="group"))
    order = advantages_of(rewards, [4], [2, 2], AdvantageConfig(over="order"))
    assert np.all(group * (rewards - 0.5) > 0)
    np.testing.assert_array_equal(order, 0)


def test_scale_and_baseline_are_handed_on() -> None:
    other = np.array([0.0, 0.5])
    rewards, sizes, orders = np.concatenate([REWARDS, other]), [6, 2], [3, 3, 2]
    plain = advantages_of(rewards, sizes, orders, AdvantageConfig(scale="none"))
    np.testing.assert_allclose(plain[:6], REWARDS - REWARDS.mean(), rtol=1e-5)
    batch = advantages_of(rewards, sizes, orders, AdvantageConfig(scale="batch"))
    np.testing.assert_allclose(batch[6:], (other - 0.25) / rewards.std(ddof=1), rtol=1e-4)
    left_out = advantages_of(
        rewards, sizes, orders, AdvantageConfig(scale="none", baseline="leave_one_out")
    )
    np.testing.assert_allclose(left_out[6:], [-0.5, 0.5], rtol=1e-5)


def test_what_cannot_be_scored_counts_nowhere() -> None:
    rewards = np.array([1.0, np.nan, 0.0, 1.0])
    got = advantages_of(rewards, [4], [2, 2], AdvantageConfig(over="order"))
    assert got[1] == 0 and got[0] == 0 and got[2] == -got[3] != 0


def test_a_step_without_rollouts() -> None:
    assert advantages_of(np.zeros(0), [], [], AdvantageConfig(over="order+group")).shape == (0,)


@given(st.floats(0, 1), st.floats(0, 1))
def test_group_weights_are_the_papers_and_fall(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert group_weight(a, "none") == 1
    assert group_weight(a, "exp") == pytest.approx(math.exp(1 - a))
    assert group_weight(a, "power", 2) == pytest.approx((1.05 - a) ** 2)
    assert group_weight(a, "log") == pytest.approx(max(0, -math.log(0.02 + a)))
    for kind in ("exp", "power", "log"):
        assert group_weight(low, kind) >= group_weight(high, kind) >= 0


def test_a_group_without_scores_weighs_one() -> None:
    assert group_mean(np.array([0.0, np.nan, 1.0])) == 0.5
    assert group_weight(group_mean(np.array([np.nan])), "exp") == 1
    assert group_weight(7.0, "power") == pytest.approx(0.05)
    assert group_weight(-7.0, "exp") == pytest.approx(math.e)
