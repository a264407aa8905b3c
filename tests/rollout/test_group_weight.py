"""Weights of groups: hard examples first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.config import Config, RewardConfig
from perl.recipe import check_config
from perl.rollout.advantages import group_mean, group_weight
from perl.types import UserError

NAN = float("nan")


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
    assert group_mean(np.array([0.0, NAN, 1.0])) == 0.5
    assert group_weight(group_mean(np.array([NAN])), "exp") == 1
    assert group_weight(7.0, "power") == pytest.approx(0.05)


def test_group_weights_name_a_reward_that_there_is() -> None:
    def wrong(**keys: Any) -> str:
        try:
            check_config(Config(reward=RewardConfig(**keys)))
        except UserError as error:
            return str(error)
        return ""

    functions = ("box_iou(column='a:b')", "mine.py:f(scale=2)")
    for of in ("box_iou", "f"):
        assert wrong(functions=functions, group_weight="exp", group_weight_of=of) == ""
    said = wrong(functions=functions, group_weight="exp", group_weight_of="accuracy")
    assert "'accuracy' is none of reward.functions (box_iou, f)" in said
    assert wrong(timeout=-1.0).startswith("reward.timeout = -1.0: must be")
