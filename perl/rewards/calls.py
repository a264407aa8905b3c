"""Calls of reward functions, sync or async, that may fail or hang without taking the run along."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from perl.types import UserError, one_line

_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no score: `what` the function did, read before the name of an example."""

    what: str
    advice: str = (
        "correct the function (it is called with prompts, completions and every column by name)"
    )
    error: BaseException | None = None


class Call:
    """One call under way, in a daemon thread: a thread that hangs does not keep Python from ending.

    With `limit` 0 seconds there is no limit. `within` seconds are waited for it where calls share
    the limit.
    """

    def __init__(
        self, function: Callable[[], Any], limit: float, within: float | None = None
    ) -> None:
        self.limit = limit
        self._deadline = time.monotonic() + (limit if within is None else within)
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        """What the function returned, or a Fault; a UserError of the function's is raised."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()) if self.limit else None)
        if self._thread.is_alive():
            _stop(self._thread)
            return _too_long(self.limit)
        return _unwrap(self._outcome)

    def _run(self, function: Callable[[], Any]) -> None:
        with suppress(_GivenUp):
            self._outcome = _attempt(function, self.limit)


def call_here(function: Callable[[], Any]) -> Any:
    """The same without a limit, in the calling thread."""
    return _unwrap(_attempt(function, 0))


def call_in_turn(functions: Sequence[Callable[[], Any]], limit: float) -> list[Any]:
    """What each returned, or a Fault, one after the other: a function that keeps a state would see
    another thread change it. All share one limit; each may use half of what is left of it, so that
    one that hangs leaves time for the rest."""
    if not limit:
        return [call_here(function) for function in functions]
    deadline = time.monotonic() + limit
    return [
        Call(function, limit, (deadline - time.monotonic()) / 2).result() for function in functions
    ]


def call_side_by_side(functions: Sequence[Callable[[], Any]], limit: float) -> list[Any]:
    """What each returned, or a Fault. Several threads share the work, and all of it one limit."""
    if not limit:
        return [call_here(function) for function in functions]
    todo, outcomes = deque(enumerate(functions)), {}

    def work() -> None:
        with suppress(_GivenUp, IndexError):  # There are no more, or the time is over.
            while True:
                i, function = todo.popleft()
                outcomes[i] = _attempt(function, limit)

    threads = [threading.Thread(target=work, daemon=True) for _ in functions[:_WORKERS]]
    deadline = time.monotonic() + limit
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    todo.clear()
    for thread in threads:
        if thread.is_alive():
            _stop(thread)
    done = dict(outcomes)
    return [_unwrap(done[i]) if i in done else _too_long(limit) for i in range(len(functions))]


class _GivenUp(SystemExit):
    """Ends a thread whose result nobody waits for; no `except Exception` of a function catches it."""


@dataclass(frozen=True, slots=True)
class _Escape:
    """An exception that is not the function's fault, to be raised where the call was made."""

    error: BaseException


def _attempt(function: Callable[[], Any], limit: float) -> Any:
    try:
        value = function()
        return asyncio.run(_awaited(value, limit)) if inspect.isawaitable(value) else value
    except _GivenUp:
        raise
    except UserError as error:
        return _Escape(error)
    except (Exception, SystemExit) as error:  # A script's exit() must not end the run unsaved.
        return failed(error)
    except BaseException as error:
        return _Escape(error)


def failed(error: BaseException) -> Fault:
    """The Fault of a function that raised `error`."""
    return Fault(f"raised {type(error).__name__}: {one_line(error)} on", error=error)


async def _awaited(value: Awaitable[Any], limit: float) -> Any:
    clock = asyncio.timeout(limit or None)
    try:
        async with clock:
            return await value
    except TimeoutError:
        if clock.expired():
            return _too_long(limit)
        raise


def _unwrap(outcome: Any) -> Any:
    if isinstance(outcome, _Escape):
        raise outcome.error
    return outcome


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
