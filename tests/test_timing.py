"""Seconds by stage, and what a CUDA device tells of its memory."""

import pytest
import torch

from perl.timing import StageClock, Stopwatch, device_memory, listening


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


class Device:
    """A CUDA device that is asked for 4 seconds of work at once, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.asked = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

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
    assert watch.lap() == {"time/a": 10.0, "time/b": 5.0}
    assert clock.lap()["stages"] == {"a": 10.0, "b": 5.0, "other": 0.0}
    # What is launched before a stage is none of its work; a stage that fails asks nothing of the device.
    assert device.now == 20.0
    with pytest.raises(KeyError), watch("a"):
        device.launch()
        raise KeyError
    assert device.asked == 4.0


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
