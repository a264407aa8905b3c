"""Seconds by stage."""

import pytest

from perl.timing import Stopwatch


def test_a_stopwatch_counts_laps_and_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 5.0, 7.5, 10.0, 10.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    for _ in range(2):
        with watch("a"):
            pass
    assert watch.lap() == {"time/a": 1.0 + 2.5} and watch.lap() == {}
    with pytest.raises(KeyError), watch("a"):
        raise KeyError
    assert watch.lap() == {"time/a": 0.25} and watch.total_seconds == {"a": 3.75}
