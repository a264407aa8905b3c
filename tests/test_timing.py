"""Seconds by stage."""

from perl.timing import Stopwatch


def test_stopwatch_laps_and_totals() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("a"):
            pass
    assert set(watch.lap()) == {"time/a"}
    assert watch.lap() == {}
    with watch("a"):
        pass
    assert watch.total_seconds["a"] > 0
