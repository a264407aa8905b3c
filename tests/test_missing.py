"""Which process of a run the others miss."""

import os
import socket
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from perl import missing
from perl.missing import Peers
from tests.messages import tells

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9")
LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Peers]]:
    """So many processes of a run, all of them here; none waits long."""
    monkeypatch.setattr(missing, "_GRACE", 0.2)
    monkeypatch.setattr(missing, "_LAST", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def make(count: int) -> list[Peers]:
        store = HashStore()
        for index in range(1, count):  # Each waits for what all have written.
            store.set(f"perl/process/{index}", "elsewhere 1 127.0.0.1 1")
        out = [Peers(store, 0, count)]
        out += [Peers(store, index, count) for index in range(1, count)]
        for peers in out:
            peers.all = [peers._read(i) for i in range(count)]
        return out

    return make


def end(peers: Peers) -> None:
    """The system does so when a process ends, however it does."""
    peers._listening.close()


def test_one_that_has_ended_is_named_and_those_that_are_busy_are_not(
    make: Callable[[int], list[Peers]],
) -> None:
    first, _second, third, _fourth = make(4)
    assert first.ended() == []
    end(third)
    assert first.ended() == [2]
    said = first.reason(CLOSED)
    assert said is not None and said == first.reason(CLOSED)
    tells(said, "process 2 of 4", socket.gethostname(), f"pid {os.getpid()}", "ended")
    assert "1 of 4" not in said and "3 of 4" not in said


def test_those_that_ended_for_it_are_not_taken_for_it(make: Callable[[int], list[Peers]]) -> None:
    first, second, third = make(3)
    end(third)
    assert second.reason(CLOSED) is not None
    end(second)
    said = first.reason(CLOSED)
    tells(said, "process 2 of 3")
    assert "1 of 3" not in str(said)


def test_an_error_of_its_own_is_the_others_reason(make: Callable[[int], list[Peers]]) -> None:
    first, second = make(2)
    assert second.reason(ValueError("planted")) is None
    end(second)
    tells(first.reason(CLOSED), "process 1 of 2", "stopped")


def test_a_server_that_does_not_answer_is_no_process(make: Callable[[int], list[Peers]]) -> None:
    first, second = make(2)
    assert second.reason(TimeoutError("the judge's connection timed out")) is None
    tells(first.reason(CLOSED), "process 1 of 2", "stopped")


def test_processes_may_meet_by_ipv6(
    make: Callable[[int], list[Peers]], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    first, second = make(2)
    assert second.all[0].address[0] == "::1" and first.ended() == []
    end(second)
    assert first.ended() == [1]


def test_one_that_does_not_answer_is_named_after_the_time_out(
    make: Callable[[int], list[Peers]],
) -> None:
    first, second, third = make(3)
    said = [peers.reason(LATE) for peers in (second,)]
    assert said != [None]  # Nobody else has said that it fails.
    tells(first.reason(LATE), "process 2 of 3", "answer")
    assert third.ended() == []


def test_asked_to_end_with_all_there_none_is_missing(make: Callable[[int], list[Peers]]) -> None:
    first, _second = make(2)
    assert first.reason(None) is None
