"""Calls of reward functions, sync or async, that may fail or hang without taking the run along.

Threads of our own rather than an executor's: those are waited for when Python ends, so that one function
that hangs would keep the run from ending, and cannot be stopped.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from perl.types import UserError, one_line

_THREADS = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no score: `what` the function did, read before the name of an example."""

    what: str
    advice: str = (
        "correct the function (it is called with prompts, completions and every column by name; completions are "
        "messages where the data hold a chat, else texts)"
    )
    error: BaseException | None = None


class Calls:
    """Calls under way side by side in daemon threads, all within one limit of seconds.

    `within` seconds are waited for them where others share the limit.
    """

    def __init__(
        self, functions: Sequence[Callable[[], Any]], limit: float, within: float | None = None
    ) -> None:
        self._limit = limit
        self._deadline = time.monotonic() + (limit if within is None else within)
        self._futures: list[Future[Any]] = [Future() for _ in functions]
        self._todo = deque(zip(self._futures, functions, strict=True))
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in functions[:_THREADS]
        ]
        for thread in self._threads:
            thread.start()

    def results(self) -> list[Any]:
        """What each returned, or a Fault; a UserError of a function's is raised."""
        wait(self._futures, max(0.0, self._deadline - time.monotonic()) if self._limit else None)
        self._todo.clear()
        done = [future.done() for future in self._futures]
        for thread in self._threads if not all(done) else ():
            if thread.is_alive():
                _stop(thread)
        late = _too_long(self._limit)
        return [f.result() if d else late for f, d in zip(self._futures, done, strict=True)]

    def _work(self) -> None:
        with suppress(_GivenUp, IndexError):  # There are no more, or the time is over.
            while True:
                future, function = self._todo.popleft()
                try:
                    future.set_result(_attempt(function, self._limit))
                except _GivenUp:
                    raise
                except BaseException as error:  # Raised where the result is asked for.
                    future.set_exception(error)


def call_each(functions: Sequence[Callable[[], Any]], limit: float, at_once: bool) -> list[Any]:
    """What each returned, or a Fault, all within one limit; 0: none, and the calling thread calls.

    Only with `at_once` several are called at a time: a function that keeps a state would see another
    thread change it. Each of the others may use half of what is left of the limit, so that one that
    hangs leaves time for the rest.
    """
    if not limit:
        return [_attempt(function, 0) for function in functions]
    if at_once:
        return Calls(functions, limit).results()
    deadline = time.monotonic() + limit
    return [
        Calls([function], limit, (deadline - time.monotonic()) / 2).results()[0]
        for function in functions
    ]


def failed(error: BaseException) -> Fault:
    """The Fault of a function that raised `error`."""
    return Fault(f"raised {type(error).__name__}: {one_line(error)} on", error=error)


class _GivenUp(SystemExit):
    """Ends a thread whose result nobody waits for; no `except Exception` of a function catches it."""


def _attempt(function: Callable[[], Any], limit: float) -> Any:
    try:
        value = function()
        return asyncio.run(_awaited(value, limit)) if inspect.isawaitable(value) else value
    except (_GivenUp, UserError):
        raise
    except (Exception, SystemExit) as error:  # A script's exit() must not end the run unsaved.
        return failed(error)


async def _awaited(value: Awaitable[Any], limit: float) -> Any:
    clock = asyncio.timeout(limit or None)
    try:
        async with clock:
            return await value
    except TimeoutError:
        if clock.expired():
            return _too_long(limit)
        raise


def _too_long(limit: float) -> Fault:
    return Fault(
        f"took longer than reward.timeout = {limit:g} s on",
        "make it faster or raise reward.timeout",
    )


def _stop(thread: threading.Thread) -> None:
    """Raise in the thread as soon as it runs Python code again, so that a loop ends."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUp)
        )
