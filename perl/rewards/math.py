"""Answers that are mathematics, compared by the math-verify package in a process of its own.

A tower of powers keeps Python busy within one operation, which no thread can be freed from; a
process can be ended. It is a plain child process that is sent JSON lines and not one of
multiprocessing's or an executor's: those import the run's main script again (a user's without
`if __name__ == "__main__"` would train twice), and Ctrl-C ends them while the run finishes its step.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from perl.failures import install_command
from perl.permutation import AnswerForm
from perl.rewards.answers import forms_in, score_each
from perl.rewards.reading import equal, gold_text, stated_answer
from perl.rewards.reading.notation import plain
from perl.types import UserError

_MEMORY = 4 * 2**30
_FAULTS = (TimeoutError, RuntimeError, ValueError)
_LONGEST = 500
"""Longer texts are no expressions, and math-verify takes seconds to find that out."""
_DIGITS = 6
"""As math-verify compares numbers that have a point."""
_NO_VALUE = re.compile(
    r"[<>≤≥≠].*"  # x > 3 is a relation, and > 3 would be read as 3.
    r"|[0-9]+(?:[-–x×][0-9.]+|\\times ?[0-9.]+|_\{?[0-9]+\}?)+%?"  # Ranges, sizes, and numbers with a base.
    r"|[0-9]+(?:/[0-9]+){2,}|[a-z]['’′]+"
)
"""What would be computed, though it is no expression, as the date 2024-05-01, which would equal 2024-01-05."""
_TIME = re.compile(r"[0-9]+(?::[0-9]+)+")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_](?:[ '’.-]?[^\W\d_])*")
"""Whose letters would be factors: `left` would equal `felt`."""
_COMPUTED = re.compile(r"\\(?:[dt]?frac|sqrt|times|cdot|div|left|right|pi)(?![a-zA-Z])")
_NAME = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"(?<![^\W_])(?<!\\)[^\W\d_]{2,}")
_MOST_WORDS = 3
"""With more of them a text is a sentence, whatever values stand in it."""
_SAYING_MORE = re.compile(
    r"(?<![^\W_])(?:not|wrong|incorrect|false|more|less|fewer|hundred|thousand|million|billion|trillion|dozen)(?![^\W_])"
)
"""Words that math-verify does not see behind a number."""


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    seconds: float = 5.0,
    **columns: Any,
) -> list[Any]:
    r"""1 where the final answer is mathematically equal to the gold one, else 0; None without gold.

    As in Perception-R1, arXiv 2506.07218: `\frac{2}{4}` equals `0.5`, `x = 3` equals `3`. Letters, numbers and lists
    are compared as `equality` does, what else there is by math-verify. A gold answer that it cannot read, and a
    comparison longer than `seconds`, is a fault. One is made after the other, so R completions may take `R * seconds`.
    """

    def score(text: str, gold: str, form: Any) -> Any:
        try:
            return float(_equal(stated_answer(text), gold_text(gold), *form, seconds=seconds))
        except _FAULTS as error:
            return error

    return score_each(score, completions, answer, forms_in(columns, completions))


def equal_values(
    given: str,
    gold: str,
    form: AnswerForm | None = None,
    digits: int = _DIGITS,
    seconds: float = 15.0,
) -> bool:
    """Whether two answers are equal (`equality.equal`), expressions in LaTeX or plain by their values to `digits` after
    the point.

    False too if one cannot be read, or the comparison takes longer than `seconds`.
    """
    try:
        return _equal(given, gold, form, seconds, digits)
    except _FAULTS:
        return False


def _equal(
    given: str, gold: str, form: AnswerForm | None, seconds: float, digits: int = _DIGITS
) -> bool:
    def same(given: str, gold: str) -> bool:
        one, other = plain(given), plain(gold)
        computed = not any(map(_NO_VALUE.fullmatch, (one, other))) and not any(
            kind.fullmatch(one) and kind.fullmatch(other) for kind in (_TIME, _WORDS)
        )
        most = max(len(_WORD.findall(text)) for text in (one, other))
        if len(given) > _LONGEST or most > _MOST_WORDS or not computed:
            return one == other
        said = [set(_SAYING_MORE.findall(text)) for text in (one, other)]
        return said[0] == said[1] and all(
            _WORKER.ask(gold, side, seconds, digits) for side in _sides(given, gold)
        )

    return equal(given, gold, form) or equal(given, gold, form, same=same, digits=digits)


def _sides(given: str, gold: str) -> list[str]:
    """An answer, and where it is an equation that a value is compared with its sides that are values: all are to equal it."""
    sides = given.split("=") if "=" not in gold else []
    values = [side for side in sides if side.strip() and not _NAME.search(_COMPUTED.sub("", side))]
    return [given, *values] if len(sides) > 1 else [given]


def check_math(user: str = "reward math") -> None:
    """Raise UserError if the package is not installed that `user` needs."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{user} needs math-verify; {install_command('rewards')}")


class _Worker:
    """The process that compares, started when there is something to compare, and again if it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, given: str, seconds: float, digits: int) -> bool:
        """Whether they are equal; raises what the comparison ended in, one of `_FAULTS`."""
        with self._lock:
            # Only a process that has answered is used again: what an interrupt leaves in the pipe
            # would be taken for the answer to the next question.
            process, self._process = self._process or _start(), None
            assert process.stdin is not None and process.stdout is not None
            try:
                line = ""
                with suppress(OSError):  # It has ended.
                    print(
                        json.dumps([gold, given, seconds, digits]), file=process.stdin, flush=True
                    )
                    line = process.stdout.readline()
                if not line:
                    if process.wait() == -signal.SIGALRM:
                        raise TimeoutError(f"math-verify took longer than {seconds:g} s")
                    raise RuntimeError(f"math-verify ended with exit code {process.returncode}")
                try:
                    found = json.loads(line)
                except ValueError as error:  # Cut, as the process was killed while it wrote.
                    raise RuntimeError("math-verify was killed while it answered") from error
                self._process = process
            finally:
                if self._process is None:
                    process.kill()
                    process.communicate()  # Closes the pipes and waits.
        if found is None:
            raise ValueError(f"math-verify cannot read the gold answer '{gold}'")
        return bool(found)


_WORKER = _Worker()


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


def serve() -> None:
    """The process: answers `[gold, given, seconds, digits]` on stdin with what `_same_value` says, in JSON lines.

    The alarm of an answer that takes too long ends it.
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
        gold, given, seconds, digits = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        equal = _same_value(gold, given, digits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), file=answers, flush=True)


_MARKED = re.compile(r"(?<!\\)\$[^$]+(?<!\\)\$|\\boxed|\\\(|\\\[")
"""Mathematics within a text; a single dollar is money."""


def _same_value(gold: str, given: str, digits: int) -> bool | None:
    """Whether two texts have equal values, numbers with a point to so many digits; None for an unreadable gold."""
    from math_verify import verify

    wanted, found = _parsed(gold), _parsed(given)
    if not wanted:
        return None
    return bool(verify(wanted, found, float_rounding=digits, timeout_seconds=None))


@lru_cache(1024)
def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    text = text if _MARKED.search(text) else f"\\boxed{{{text}}}"
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
