"""Resampling to a histogram: what is promised about counts, repeats and nesting, on random data."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from perl.data.resample import PAPER, levels_of, parse_histogram, resample, scarce_level, shares_of
from tests.messages import refused, tells

LEVEL = st.integers(0, 10).map(lambda k: k / 10)
ACCURACIES = st.lists(st.one_of(LEVEL, st.just(float("nan"))), min_size=1, max_size=120)
HISTOGRAM = st.lists(st.floats(0, 1), min_size=11, max_size=11).filter(lambda h: sum(h) > 0.01)
UNIFORM = (1.0,) * 11


def counts(accuracies: list[float], chosen: list[int]) -> np.ndarray:
    return np.bincount(levels_of([accuracies[i] for i in chosen]), minlength=11)


def target(accuracies: list[float], histogram: list[float]) -> np.ndarray:
    """Shares over the levels that the data has."""
    wanted = np.where(shares_of(accuracies) > 0, histogram, 0.0)
    assume(wanted.sum() > 1e-3)
    return wanted / wanted.sum()


@given(ACCURACIES, HISTOGRAM, st.integers(0, 3))
def test_the_largest_exact_selection(
    accuracies: list[float], histogram: list[float], seed: int
) -> None:
    wanted = target(accuracies, histogram)
    chosen = resample(accuracies, histogram, seed=seed)
    assert chosen == sorted(set(chosen)) == resample(accuracies, histogram, seed=seed)
    assert all(0 <= i < len(accuracies) and not np.isnan(accuracies[i]) for i in chosen)
    found = counts(accuracies, chosen)
    assert (abs(found - len(chosen) * wanted) < 1 + 1e-6).all()
    # One more would need a question that is not there: some level would be exhausted or over.
    have = np.bincount([k for k in levels_of(accuracies) if k >= 0], minlength=11)
    assert ((found == have) & (wanted > 0)).any()


@given(ACCURACIES, HISTOGRAM, st.data())
def test_a_smaller_selection_is_part_of_a_larger(
    accuracies: list[float], histogram: list[float], data: st.DataObject
) -> None:
    wanted = target(accuracies, histogram)
    usable = sum(wanted[k] > 0 for k in levels_of(accuracies) if k >= 0)
    size = data.draw(st.integers(1, int(usable)))
    chosen = resample(accuracies, histogram, size)
    assert len(chosen) == len(set(chosen)) == size
    assert size == 1 or set(resample(accuracies, histogram, size - 1)) < set(chosen)
    assert all(wanted[k] > 0 for k in levels_of([accuracies[i] for i in chosen]))


@given(ACCURACIES, HISTOGRAM, st.integers(1, 300))
def test_repeats_meet_the_histogram_at_any_size(
    accuracies: list[float], histogram: list[float], size: int
) -> None:
    wanted = target(accuracies, histogram)
    chosen = resample(accuracies, histogram, size, repeat=True)
    assert len(chosen) == size
    assert (abs(counts(accuracies, chosen) - size * wanted) < 1 + 1e-6).all()
    times = Counter(chosen)
    levels = levels_of(accuracies)
    for level in set(levels[chosen].tolist()):
        often = [times[i] for i in np.flatnonzero(levels == level).tolist()]
        assert max(often) - min(often) <= 1


def test_a_level_that_is_wanted_most_gets_no_more_than_its_share() -> None:
    """Dividing by the next count alone would give it all twenty."""
    accuracies = [k / 10 for k in range(11)] * 20
    found = counts(accuracies, resample(accuracies, (0.9, *(0.01,) * 10), 20))
    assert found[0] in (18, 19) and found.max() == found[0] and found.sum() == 20


def test_with_repeats_as_many_as_were_measured() -> None:
    accuracies = [0.0] * 2 + [1.0] * 8 + [float("nan")]
    found = counts(accuracies, resample(accuracies, UNIFORM, repeat=True))
    assert found.tolist() == [5, *[0] * 9, 5]


def test_what_is_short_is_spread_in_proportion() -> None:
    """Wanted 2 : 1 : 1; of the first there are only 4."""
    accuracies = [0.0] * 4 + [0.5] * 50 + [1.0] * 50
    histogram = [2.0, *[0.0] * 4, 1.0, *[0.0] * 4, 1.0]
    for size, expected in ((None, (4, 2, 2)), (44, (4, 20, 20))):
        found = counts(accuracies, resample(accuracies, histogram, size))
        assert tuple(found[::5]) == expected and found.sum() == sum(expected)


def test_seeds_choose_other_questions_of_the_same_levels() -> None:
    accuracies = [0.2] * 30 + [0.8] * 30
    first, second = (resample(accuracies, UNIFORM, 20, seed) for seed in (0, 1))
    assert first != second
    assert (counts(accuracies, first) == counts(accuracies, second)).all()


def test_levels_that_the_data_lacks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    resample([0.3, 0.4], (0.0, *(1.0,) * 4, *(0.0,) * 6))
    tells(caplog.text, "0.1, 0.2")


def test_levels() -> None:
    assert levels_of([0, 0.04, 0.05, 1 / 3, 0.26, 0.25, 1, float("nan")]).tolist() == (
        [0, 0, 1, 3, 3, 3, 10, -1]
    )
    assert shares_of([0.5, 0.5, 1.0, float("nan")])[[5, 10]].tolist() == [2 / 3, 1 / 3]


def test_histograms_are_read() -> None:
    assert parse_histogram("paper") == pytest.approx([v / sum(PAPER) for v in PAPER])
    assert sum(parse_histogram("paper")) == pytest.approx(1)
    # The paper gives the mean accuracy of what it keeps as 0.38.
    assert np.dot(parse_histogram("paper"), np.arange(11) / 10) == pytest.approx(0.38, abs=0.005)
    assert parse_histogram("uniform") == pytest.approx([1 / 11] * 11)
    assert parse_histogram("0,0,0,0,0,3,1,0,0,0,0")[5:7] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    "text",
    ["", "flat", "1,2,3", "0" + ",0" * 10, "-1" + ",1" * 10, "nan" + ",1" * 10, "inf" + ",1" * 10],
)
def test_histograms_that_make_no_sense(text: str) -> None:
    with refused("histogram", f"'{text}'", "paper", "uniform", 11):
        parse_histogram(text)


def test_what_cannot_be_selected() -> None:
    with refused("size = 3", 2, "lower", "repeats"):
        resample([0.0, 0.0, 1.0], (1.0, *(0.0,) * 10), 3)
    with refused("histogram", "another"):
        resample([0.0, float("nan")], (0.0, *(1.0,) * 10))


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=60),
    st.lists(st.floats(0, 1), min_size=11, max_size=11).filter(lambda h: sum(h) > 0.01),
)
def test_more_questions_of_other_levels_do_not_help(found: list[int], shares: list[float]) -> None:
    assume(any(shares[level] > 1e-3 for level in found))
    accuracies = [level / 10 for level in found]
    chosen = resample(accuracies, shares)
    scarce = scarce_level(accuracies, shares, chosen)
    others = [a for a, level in zip(accuracies, found, strict=True) if level != scarce]
    assert len(others) < len(found)
    assert len(resample(accuracies + 3 * others, shares)) == len(chosen)
