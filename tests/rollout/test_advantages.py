"""Advantages over the group, over each order, and over both."""

from __future__ import annotations

import numpy as np
import pytest

from perl.config import AdvantageConfig
from perl.rollout.advantages import advantages_of

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])
ORDERS = np.array([0, 0, 0, 1, 1, 1])


def z(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


def test_over_the_group_over_each_order_and_both() -> None:
    per_order = np.concatenate([z(REWARDS[:3]), z(REWARDS[3:])])
    for over, expected in (
        ("group", z(REWARDS)),
        ("order", per_order),
        ("order+group", z(REWARDS) + per_order),
    ):
        config = AdvantageConfig(over=over)  # type: ignore[arg-type]
        (got,) = advantages_of([REWARDS], [ORDERS], config)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_order_that_is_harder_than_another() -> None:
    """All wrong in one order, all right in the other: only a comparison across orders sees it."""
    rewards = np.array([1.0, 1.0, 0.0, 0.0])
    orders = np.array([0, 0, 1, 1])
    (group,) = advantages_of([rewards], [orders], AdvantageConfig(over="group"))
    (order,) = advantages_of([rewards], [orders], AdvantageConfig(over="order"))
    assert np.all(group * (rewards - 0.5) > 0)
    np.testing.assert_array_equal(order, 0)


def test_scale_and_baseline_are_handed_on() -> None:
    other = np.array([0.0, 0.5])
    rewards, orders = [REWARDS, other], [ORDERS, np.array([0, 0])]
    plain = advantages_of(rewards, orders, AdvantageConfig(scale="none"))
    np.testing.assert_allclose(plain[0], REWARDS - REWARDS.mean(), rtol=1e-5)
    batch = advantages_of(rewards, orders, AdvantageConfig(scale="batch"))
    deviation = np.concatenate(rewards).std(ddof=1)
    np.testing.assert_allclose(batch[1], (other - 0.25) / deviation, rtol=1e-4)
    left_out = advantages_of(
        rewards, orders, AdvantageConfig(scale="none", baseline="leave_one_out")
    )
    np.testing.assert_allclose(left_out[1], [-0.5, 0.5], rtol=1e-5)


def test_what_cannot_be_scored_counts_nowhere() -> None:
    rewards = np.array([1.0, np.nan, 0.0, 1.0])
    (got,) = advantages_of([rewards], [np.array([0, 0, 1, 1])], AdvantageConfig(over="order"))
    assert got[1] == 0 and got[0] == 0 and got[2] == -got[3] != 0


def test_orders_are_needed_where_they_matter() -> None:
    with pytest.raises(ValueError, match="need the orders"):
        advantages_of([REWARDS], config=AdvantageConfig(over="order"))
    assert advantages_of([]) == []
