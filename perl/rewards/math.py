"""Answers that are mathematics, compared by the math-verify package in a process of its own.

A tower of powers keeps Python busy within one operation, which no thread can be freed from; a
process can be ended.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from perl.rewards.answers import final_answer
from perl.types import UserError

_MEMORY = 4 * 2**30


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    seconds: float = 5.0,
    **columns: Any,
) -> list[Any]:
    r"""1 where the final answer is mathematically equal to the gold one, else 0; None without gold.

    As in Perception-R1, arXiv 2506.07218: `\frac{2}{4}` equals `0.5`, `x = 3` equals `3`. A gold
    answer that math-verify cannot read, and a comparison longer than `seconds`, is a fault. One is
    made after the other, so R completions may take `R * seconds`.
    """
    return [
        None if gold is None else _WORKER.ask(gold, final_answer(text), seconds)
        for text, gold in zip(completions, answer, strict=True)
    ]


def check_math() -> None:
    """Raise UserError if the package is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("reward math needs math-verify; pip install 'perl-rl[rewards]'")


class _Worker:
    """The process that compares, started when there is something to compare, and again if it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._numbers = itertools.count()

    def ask(self, gold: str, given: str, seconds: float) -> float | Exception:
        """1 or 0, or the exception that the comparison ended in."""
        with self._lock:
            # Only a process that has answered is used again: what an interrupt leaves in the pipe
            # would be taken for the answer to the next question.
            process, self._process = self._process or _start(), None
            try:
                equal = _exchange(process, next(self._numbers), gold, given, seconds)
                self._process = process
            except (OSError, ValueError):
                return RuntimeError("math-verify's process gave no answer that can be read")
            except EOFError:
                if process.wait() == -signal.SIGALRM:
                    return TimeoutError(f"math-verify took longer than {seconds:g} s")
                return RuntimeError(f"math-verify ended with exit code {process.returncode}")
            finally:
                if self._process is None:
                    _end(process)
        if equal is None:
            return ValueError(f"math-verify cannot read the gold answer '{gold}'")
        return float(equal)


_WORKER = _Worker()


def serve() -> None:
    """Answer `[number, gold, given, seconds]` on stdin with `[number, equal]` on stdout, in JSON lines.

    `equal` is true, false, or null for an unreadable gold. The alarm of an answer that takes too
    long ends the process.
    """
    # What anything else prints, as ANTLR does, goes to stderr and not among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import math_verify  # noqa: F401  # Takes a second, which no answer is to be charged with.

    # It warns that its own time limits are off.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        number, gold, given, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        equal = _equal(gold, given)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([number, equal]), file=answers, flush=True)


def _exchange(
    process: subprocess.Popen[str], number: int, gold: str, given: str, seconds: float
) -> bool | None:
    """The process's answer; EOFError if it has ended, ValueError if it is to another question."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([number, gold, given, seconds]) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise EOFError from None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    answered, equal = json.loads(line)
    if answered != number:
        raise ValueError(f"answer {answered} to question {number}")
    return equal


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # What is left to be written has no reader.
            if pipe is not None:
                pipe.close()
    process.wait()


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from perl.rewards.math import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run, which may finish its step.
    )


def _equal(gold: str, given: str) -> bool | None:
    from math_verify import verify

    wanted = _parse(gold)
    return bool(verify(wanted, _parse(given), timeout_seconds=None)) if wanted else None


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    bare = not any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    return parse(f"\\boxed{{{text}}}" if bare else text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
