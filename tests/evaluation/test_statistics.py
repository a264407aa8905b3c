"""Intervals and tests against their definitions and against scipy's own bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from perl.evaluation.statistics import bootstrap_interval, compare_scores, mcnemar, wilson
from tests.messages import refused

ITEMS = st.integers(1, 400)


@given(ITEMS, st.data())
def test_wilson_is_where_the_score_test_rejects(items: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, items))
    z = stats.norm.ppf(0.975)
    share = right / items
    low, high = wilson(right, items)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert math.isclose(abs(share - p) / math.sqrt(p * (1 - p) / items), z, rel_tol=1e-6)


def test_what_one_question_of_mantis_eval_is_worth() -> None:
    """The paper's gain of permutation over plain GRPO there is 0.46 points: one question of 217."""
    low, high = wilson(166, 217)
    assert (round(100 * low, 1), round(100 * high, 1)) == (70.4, 81.6)
    assert low < 165 / 217 < high
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    with pytest.raises(ValueError):
        wilson(1, 0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sign_test_of_the_discordant(one: int, other: int) -> None:
    n, most = one + other, max(one, other)
    tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
    assert math.isclose(mcnemar(one, other), min(1.0, 2 * tail), rel_tol=1e-9)
    assert mcnemar(one, other) == mcnemar(other, one)


def test_the_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(0)
    differences = rng.integers(0, 2, 300) - rng.integers(0, 2, 300)
    ours = bootstrap_interval(differences.tolist(), range(300), resamples=20_000)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=1, batch=1000
    ).confidence_interval
    assert np.allclose(ours, theirs, atol=0.006)
    assert ours == bootstrap_interval(differences.tolist(), range(300), resamples=20_000)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_a_comparison_counts_what_one_alone_got_right(pairs: list[tuple[bool, bool]]) -> None:
    one, other = ([float(p[side]) for p in pairs] for side in (0, 1))
    alone = range(len(pairs))
    found, turned = compare_scores(one, other, alone), compare_scores(other, one, alone)
    assert found.items == len(pairs)
    assert math.isclose(found.difference, (found.second_only - found.first_only) / len(pairs))
    assert math.isclose(found.difference, found.second - found.first, abs_tol=1e-12)
    low, high = found.interval
    assert low - 1e-12 <= found.difference <= high + 1e-12 or len(pairs) < 30
    assert (turned.p, turned.difference) == (found.p, -found.difference)


def test_a_comparison_by_hand() -> None:
    """A higher score counts, however little. Of three items that differ two or more go one way with probability 1."""
    found = compare_scores([0.5, 1.0, 0.5, 0.0], [0.5, 0.9, 0.6, 1.0], range(4))
    assert (found.items, found.first_only, found.second_only, found.p) == (4, 1, 2, 1.0)
    assert (found.first, found.second) == pytest.approx((2 / 4, 3 / 4))
    assert found.difference == pytest.approx(1 / 4)
    assert compare_scores([0.0] * 6, [1.0] * 6, range(6)).p == pytest.approx(2 / 2**6)
    one, other = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1
    assert one != other and compare_scores([other], [one], [0]).second_only == 0


def test_many_kinds_of_differences_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards have as many as there are items; the draws are the same."""
    differences = np.random.default_rng(0).normal(0.1, 1, 50).tolist()
    whole = bootstrap_interval(differences, range(50), resamples=1001)
    monkeypatch.setattr("perl.evaluation.statistics._DRAWN_AT_ONCE", 500)
    assert bootstrap_interval(differences, range(50), resamples=1001) == whole


def test_equal_answers_do_not_differ() -> None:
    same = compare_scores([1, 0, 1], [1, 0, 1], range(3))
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    for pair in (([1.0], [1.0, 0.0]), ([], [])):
        with refused(f"{len(pair[0])} and {len(pair[1])}", error=ValueError):
            compare_scores(*pair, range(2))


def test_versions_of_one_problem_are_no_further_evidence() -> None:
    """Five equal versions give the interval of the problems alone; items taken as independent one too narrow."""
    rng = np.random.default_rng(0)
    problems = rng.integers(-1, 2, 200)
    versions, owner = np.repeat(problems, 5).tolist(), np.repeat(np.arange(200), 5).tolist()
    low, high = bootstrap_interval(versions, owner)
    few = bootstrap_interval(problems.tolist(), range(200))
    many = bootstrap_interval(versions, range(1000))
    assert np.allclose((low, high), few, atol=0.006)
    assert (high - low) / (many[1] - many[0]) == pytest.approx(math.sqrt(5), rel=0.05)
    one_problem = bootstrap_interval(versions, [0] * 1000)
    assert one_problem == pytest.approx([np.mean(problems)] * 2)


def test_clusters_of_different_sizes_weigh_by_their_items() -> None:
    """A large one whose items the second model won, and small ones that it lost: the mean over items is above 0."""
    differences, owner = [1] * 50 + [-1] * 10, [0] * 50 + list(range(1, 11))
    low, high = bootstrap_interval(differences, owner)
    assert low == -1 and high > 50 / 60
    for clusters in ([0], []):
        with refused("2 items", f"{len(clusters)} clusters", error=ValueError):
            bootstrap_interval([1, 0], clusters)
    with refused("0 items", error=ValueError):
        bootstrap_interval([], [])
