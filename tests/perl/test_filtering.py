"""Which groups carry signal, and the counts of the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.filtering import GroupFilter, has_signal
from perl.types import Example, Group, UserError

NAN = float("nan")


def make_group(*rewards: float) -> Group:
    return Group(
        example=Example("q1", (), "", "A"),
        variants=(),
        rollouts=(),
        rewards=np.array(rewards),
        reward_parts={},
        advantages=np.zeros(len(rewards), dtype=np.float32),
    )


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, NAN]), max_size=6))
def test_signal_is_a_second_value_among_the_scorable(rewards: list[float]) -> None:
    assert has_signal(rewards) == (len({value for value in rewards if value == value}) > 1)


def test_the_filter_keeps_signal_in_order_and_counts() -> None:
    groups = [
        make_group(0, 1),
        make_group(1, 1),
        make_group(0, 0),
        make_group(NAN, NAN),
        make_group(1, NAN),
        make_group(0.5, NAN, 0.6),
    ]
    keep = GroupFilter()
    assert keep(groups) == [groups[0], groups[5]]
    expected = {"kept": 2, "all_best": 1, "all_worst": 1, "unscorable": 2, "zero_variance": 2}
    assert keep.counts == expected
    keep(groups[:1])
    assert keep.counts["kept"] == 3
    keep.reset()
    assert set(keep.counts.values()) == {0}


def test_without_it_only_the_unscorable_go() -> None:
    groups = [make_group(0, 1), make_group(1, 1), make_group(NAN, NAN)]
    keep = GroupFilter(zero_variance=False)
    assert keep(groups) == groups[:2]
    assert keep.counts["zero_variance"] == 1


def test_a_batch_that_nothing_can_score_is_an_error() -> None:
    with pytest.raises(UserError, match="no rollout of 2 groups can be scored, example 'q1'"):
        GroupFilter()([make_group(NAN), make_group(NAN, NAN)])


def test_no_groups_are_no_error() -> None:
    assert GroupFilter()([]) == []
