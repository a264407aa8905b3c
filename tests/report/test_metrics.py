"""Numbers made from a run's records."""

import math

from perl.report.metrics import mean


def test_mean_leaves_out_what_is_missing() -> None:
    assert mean([1.0, None, math.nan, 3.0]) == 2
    assert math.isnan(mean([]))
