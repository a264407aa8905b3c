"""Seconds by stage, and what a CUDA device tells of its memory."""

import ctypes
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from perl.timing import StageClock, Stopwatch, device_memory, listening, peak_rss_bytes


def seconds(lap: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in lap.items() if name.startswith("time/")}


def test_a_stopwatch_counts_laps_and_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 5.0, 7.5, 10.0, 10.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    for _ in range(2):
        with watch("a"):
            pass
    assert seconds(watch.lap()) == {"time/a": 1.0 + 2.5} and watch.lap() == {}
    with pytest.raises(KeyError), watch("a"):
        raise KeyError
    assert seconds(watch.lap()) == {"time/a": 0.25} and watch.total_seconds == {"a": 3.75}


class Device:
    """A CUDA device that is asked for 4 seconds of work at once, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.asked = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * self.peak)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 2})
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.restart)
        monkeypatch.setattr("perl.timing._most", defaultdict(int))
        self.held = self.peak = 0

    def take(self, count: int) -> None:
        """Of memory; given back where it is negative."""
        self.held += count
        self.peak = max(self.peak, self.held)

    def restart(self) -> None:
        self.peak = self.held

    def launch(self) -> None:
        self.now, self.asked = self.now + 1, self.asked + 4

    def wait(self) -> None:
        self.now, self.asked = self.now + self.asked, 0.0


def test_a_stage_ends_when_the_device_has_done_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device, watch = Device(monkeypatch), Stopwatch()
    clock = StageClock(lambda: device.now)
    with listening(clock):
        device.launch()
        for name in ("a", "b", "a"):
            with watch(name):
                device.launch()
    assert seconds(watch.lap()) == {"time/a": 10.0, "time/b": 5.0}
    assert clock.lap()["stages"] == {"a": 10.0, "b": 5.0, "other": 0.0}
    # What is launched before a stage is none of its work; a stage that fails asks nothing of the device.
    assert device.now == 20.0
    with pytest.raises(KeyError), watch("a"):
        device.launch()
        raise KeyError
    assert device.asked == 4.0


def test_each_stage_has_a_peak_of_its_own_and_the_run_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, watch = Device(monkeypatch), Stopwatch()

    def peaks() -> dict[str, float]:
        return {k: v for k, v in watch.lap().items() if k.endswith("/device_bytes")}

    with watch("a"):
        device.take(50)
        device.take(-40)
    device.take(90)  # Between stages: of no stage, and of the run.
    device.take(-90)
    with watch("b"):
        device.take(5)
    with watch("a"):
        device.take(10)
    assert peaks() == {"memory/a/device_bytes": 50, "memory/b/device_bytes": 15}
    with watch("a"):
        device.take(-20)
    assert peaks() == {"memory/a/device_bytes": 25}
    assert watch.total_bytes["a/device_bytes"] == 50
    assert device_memory()["memory/peak_allocated_bytes"] == 100
    assert device_memory()["memory/peak_reserved_bytes"] == 200


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux has it")
def test_resident_memory_by_stage() -> None:
    """80 MB are there in one of three stages alone."""
    watch = Stopwatch()
    for name in "abc":
        with watch(name):
            if name == "b":
                torch.ones(20_000_000)
    lap = watch.lap()
    a, b, c = (lap[f"memory/{name}/rss_bytes"] for name in "abc")
    # The kernel counts resident pages by thread, and gathers them now and then.
    assert b > max(a, c) + 70_000_000 and peak_rss_bytes() > b - 1_000_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc has it")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux has it")
def test_a_stage_begins_without_what_was_freed_before() -> None:
    watch = Stopwatch()
    with watch("many"):
        pieces = [
            torch.zeros(25_000) for _ in range(2_000)
        ]  # Of 100 kB: none has a mapping of its own.
    last = pieces[-1]  # What lies before it is not given back by itself.
    del pieces
    with watch("after"):
        pass
    lap = watch.lap()
    assert lap["memory/after/rss_bytes"] < lap["memory/many/rss_bytes"] - 150_000_000
    assert not last.any()


def test_a_stage_has_no_peak_where_it_cannot_be_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.timing._PROCESS", tmp_path / "not there")
    watch, before = Stopwatch(), peak_rss_bytes()
    with watch("a"):
        pass
    assert not any(name.endswith("rss_bytes") for name in watch.lap())
    assert peak_rss_bytes() >= before


def test_what_a_device_tells_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory() == {} or torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 2})
    assert device_memory() == {
        "memory/peak_allocated_bytes": 5,
        "memory/peak_reserved_bytes": 7,
        "memory/allocator_retries": 2,
    }
