"""Who of a run's processes has ended, or does not answer, where the others cannot go on without it.

Each process listens on a port and never accepts: the system answers a connection for as long as the process is there, however
busy or stopped it is, and refuses it when it has ended. Nothing is sent while a run is well, and nothing can end one that is.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.distributed import DistError

_GRACE = 5.0
"""Seconds that the others of a process that fails have to say that they fail too."""
_LAST = 10.0
"""Seconds that the process which hosts the store waits for those that are still there, so that they can ask it. Not long: one
that waits for this very process sees its connection break only when it ends, and then names all that have ended."""
_SIGNS = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "timeout",
    "peer",
    "socket",
    "store",
    "broken pipe",
)
"""Of an error between processes, in its text."""


@dataclass(frozen=True)
class _Process:
    index: int
    host: str
    pid: int
    address: tuple[str, int]


class Peers:
    """The processes of a run, as this one sees them.

    Args:
        store: of the process group, which all reach.
        index: of this process.
        count: of all.
    """

    def __init__(self, store: Any, index: int, count: int) -> None:
        self.store, self.index, self.count = store, index, count
        self._lock = threading.RLock()  # A signal may come while it is held.
        self._told: str | None = None
        own = _own_address()
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        self._listening = socket.create_server((own, 0), family=family, backlog=1024)
        port = self._listening.getsockname()[1]
        store.set(f"perl/process/{index}", f"{socket.gethostname()} {os.getpid()} {own} {port}")
        self.all = [self._read(i) for i in range(count)]

    def _read(self, index: int) -> _Process:
        host, pid, address, port = self.store.get(f"perl/process/{index}").decode().split()
        return _Process(index, host, int(pid), (address, int(port)))

    def ended(self) -> list[int]:
        """The processes that have ended; one that is only not reached may be behind a firewall, and is not among them."""
        out = []
        for process in self.all:
            if process.index == self.index:
                continue
            try:
                socket.create_connection(process.address, 2).close()
            except ConnectionRefusedError:
                out.append(process.index)
            except OSError:
                continue
        return out

    def reason(self, error: BaseException | None) -> str | None:
        """Which process is missing, if it is for that that this one fails; None for an error of its own.

        Args:
            error: of this process; None: it is asked to end.
        """
        with self._lock:
            if self._told is None:
                self._told = self._reason(error) or ""
                if self._hosts:
                    self._wait_for_others()
            return self._told or None

    def _reason(self, error: BaseException | None) -> str | None:
        text = f"{type(error).__name__} {error}".lower()
        between = error is None or (_of_collectives(error) and any(s in text for s in _SIGNS))
        # One that fails for another says so; an error of its own is the reason of the others.
        self._note("follows" if between else "failed")
        if not between:
            return None
        ended: list[int] = []
        silent: list[int] = []
        failed: list[int] = []
        deadline = time.monotonic() + _GRACE
        while True:
            notes = {i: self._noted(i) for i in range(self.count)}
            failed = [i for i, note in notes.items() if note == "failed"]
            ended = [i for i in self.ended() if notes[i] is None]
            silent = [i for i, note in notes.items() if note is None]
            if failed or ended or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if failed:
            return (
                f"{self._called(failed)} stopped for an error of its own, which its message tells"
            )
        if ended:
            return f"{self._called(ended)} {_has(ended)} ended"
        if silent and "time" in text:
            return f"{self._called(silent)} {_does(silent)} not answer"
        return None

    def _called(self, indices: list[int]) -> str:
        names = [
            f"{i} of {self.count} ({self.all[i].host}, pid {self.all[i].pid})" for i in indices
        ]
        return f"process{'es' if len(names) > 1 else ''} {', '.join(names)}"

    @property
    def _hosts(self) -> bool:
        return self.index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def _note(self, what: str) -> None:
        with suppress(Exception):
            self.store.set(f"perl/ends/{self.index}", what)

    def _noted(self, index: int) -> str | None:
        try:
            key = f"perl/ends/{index}"
            return self.store.get(key).decode() if self.store.check([key]) else None
        except Exception:  # Whoever hosted the store has ended.
            return None

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + _LAST
        while time.monotonic() < deadline:
            gone = self.ended()
            if all(self._noted(p.index) or p.index in gone for p in self.all):
                return
            time.sleep(0.1)


def _of_collectives(error: BaseException) -> bool:
    """Gloo's errors are plain RuntimeErrors; what a judge's server or a disk does not answer to has a type of its own."""
    return type(error) is RuntimeError or isinstance(error, DistError)


def _has(indices: list[int]) -> str:
    return "have" if len(indices) > 1 else "has"


def _does(indices: list[int]) -> str:
    return "do" if len(indices) > 1 else "does"


def _own_address() -> str:
    """That the others of a run reach this process at: of the interface that leads to the first."""
    first = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, kind, _, _, there = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)
        return probe.getsockname()[0]
