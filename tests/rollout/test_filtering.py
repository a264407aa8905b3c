"""Which groups carry signal, and the counts of the others."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.rollout.filtering import GroupFilter, shortfall, unscorable
from perl.types import Example, Group
from tests.messages import tells

NAN = float("nan")


def make_group(*rewards: float, **parts: list[float]) -> Group:
    return Group(
        example=Example("q1", (), "", "A"),
        variants=(),
        rollouts=(),
        rewards=np.array(rewards),
        reward_parts={name: np.array(values) for name, values in parts.items()},
        advantages=np.zeros(len(rewards), dtype=np.float32),
    )


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, NAN]), max_size=6))
def test_signal_is_a_second_value_among_the_scorable(rewards: list[float]) -> None:
    signal = len({value for value in rewards if value == value}) > 1
    assert len(GroupFilter()([make_group(*rewards)])) == signal


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
    assert keep.counts == expected | {"too_hard": 0, "too_easy": 0}
    keep(groups[:1])
    assert keep.counts["kept"] == 3
    keep.reset()
    assert set(keep.counts.values()) == {0}


def test_without_it_only_the_unscorable_go() -> None:
    groups = [make_group(0, 1), make_group(1, 1), make_group(NAN, NAN)]
    keep = GroupFilter(zero_variance=False)
    assert keep(groups) == groups[:2]
    assert keep.counts["zero_variance"] == 1
    assert keep([]) == []


def test_a_try_that_nothing_can_score_is_no_error_yet() -> None:
    """Another process or the next try may have what this one lacks; the step decides."""
    keep = GroupFilter()
    groups = [make_group(NAN), make_group(NAN, NAN)]
    assert keep(groups) == [] and keep.counts["unscorable"] == 2
    tells(unscorable(groups, 5), "5", "'q1'", "reward.functions")
    tells(unscorable([], 5), "5", "reward.functions")


def of_ten(right: int) -> Group:
    """A group of ten rollouts; a reward beside accuracy gives it signal in any case."""
    accuracy = [1.0] * right + [0.0] * (10 - right)
    return make_group(*(a + 0.1 * (i % 2) for i, a in enumerate(accuracy)), accuracy=accuracy)


def test_the_band_includes_its_ends() -> None:
    groups = [of_ten(right) for right in range(11)]
    keep = GroupFilter(min_accuracy=0.1, max_accuracy=0.9)
    assert keep(groups) == groups[1:10]
    assert keep.counts["too_hard"] == keep.counts["too_easy"] == 1 and keep.counts["kept"] == 9
    strict = GroupFilter(min_accuracy=0.01, max_accuracy=0.99)
    assert strict(groups) == groups[1:10]
    assert GroupFilter()(groups) == groups


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=1, max_size=5), max_size=6),
    st.booleans(),
    st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.0, 0.4)]),
)
def test_every_group_has_one_fate(
    rewards: list[list[float]], zero_variance: bool, band: tuple[float, float]
) -> None:
    groups = [make_group(*values, accuracy=values) for values in rewards]
    if groups and all(np.isnan(values).all() for values in rewards):
        return
    keep = GroupFilter(zero_variance, *band)
    kept = keep(groups)
    counts = keep.counts
    assert counts["zero_variance"] == counts["all_best"] + counts["all_worst"]
    assert sum(counts.values()) - counts["zero_variance"] == len(groups)
    assert len(kept) == counts["kept"] + (0 if zero_variance else counts["zero_variance"])
    for group in kept:
        assert band[0] <= np.nanmean(group.rewards) <= band[1]
        assert np.nanmin(group.rewards) < np.nanmax(group.rewards) or not zero_variance


def test_the_band_is_about_one_reward_part() -> None:
    group = make_group(0.0, 1.0, format=[1.0, NAN], accuracy=[NAN, NAN])
    keep = GroupFilter(max_accuracy=0.5, measure="format")
    assert keep([group]) == [] and keep.counts["too_easy"] == 1
    assert GroupFilter(max_accuracy=0.5)([group]) == []


def test_a_batch_that_is_not_filled_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    keep = GroupFilter(min_accuracy=0.2)
    keep([of_ten(1), of_ten(0), of_ten(5), make_group(1, 1)])
    for have in (4, 1, 0):
        keep.tell_shortfall(have, 4, 3)
    (record,) = caplog.records
    tells(
        record.getMessage(),
        "1 of 4",
        "3 tries",
        "4 groups",
        "2",
        "filter.min_accuracy",
        "filter.max_tries",
    )


@pytest.mark.parametrize(
    ("counts", "groups", "number", "keys"),
    [
        ({"all_worst": 3, "all_best": 2}, 5, "3", ["rollout.per_order", "reward.functions"]),
        ({"all_best": 2, "too_easy": 1, "kept": 1}, 4, "2", []),
        ({"too_easy": 1}, 1, "1", ["filter.max_accuracy"]),
        ({"too_hard": 7, "kept": 9}, 16, "7", ["filter.min_accuracy"]),
        ({"unscorable": 5}, 5, "5", ["reward.functions"]),
        ({"kept": 1, "zero_variance": 9}, 1, None, []),
    ],
)
def test_the_commonest_reason_is_named(
    counts: dict[str, int], groups: int, number: str | None, keys: list[str]
) -> None:
    line = shortfall(1, 4, 2, counts)
    tells(line, "1 of 4", "2 tries", f"{groups} groups")
    assert re.findall(r"\w+\.\w+", line) == [*keys, "filter.max_tries"]
    assert re.findall(r": (\d+)", line) == ([number] if number else [])
