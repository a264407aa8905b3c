"""Numbers made from a run's records."""

import math

from perl.report.metrics import mean, smoothed


def test_mean_leaves_out_what_is_missing() -> None:
    assert mean([1.0, None, math.nan, 3.0]) == 2
    assert math.isnan(mean([]))


def test_smoothing_is_centred() -> None:
    line = {float(i): 2.0 * i for i in range(40)}
    assert [smoothed(line)[i] for i in (0.0, 1.0, 20.0, 39.0)] == [2.0, 3.0, 40.0, 76.0]
