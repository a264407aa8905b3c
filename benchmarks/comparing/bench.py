"""The cases of the benchmarks within a worker: found, proven, and timed a round at a time."""

from __future__ import annotations

import gc
import importlib
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import perl
from benchmarks import memory
from benchmarks.clock import clock, cool
from benchmarks.contest import Contest, Problem, Provider, Refused, Run, Unavailable
from benchmarks.results import machine

_OURS = {"perl", "perl_kernels", "benchmarks"}


class Bench:
    """Contests of `benchmarks/bench_*.py`, by module and name; one of them is prepared at a time."""

    def __init__(self, device: str | None, threads: int | None, quick: bool) -> None:
        torch.set_num_threads(threads or torch.get_num_threads())
        self.quick = quick
        there = torch.cuda.is_available()
        if device == "cuda" and not there:
            raise Unavailable("--device cuda: there is no GPU that PyTorch can use")
        self.device = torch.device(device or ("cuda" if there else "cpu"))
        self.machine = machine(self.device)
        self.contests: dict[tuple[str, str], Contest] = {}
        self.broken: dict[str, dict[str, Any]] = {}
        """Modules that cannot be imported, and why."""
        for file in sorted(Path(__file__).parents[1].glob("bench_*.py")):
            if "\ndef contests(" in file.read_text(encoding="utf-8"):
                self._find(file.stem)
        self.contest: Contest | None = None
        self.problem: Problem | None = None
        self.run: Run | None = None
        self.timed_on = self.device

    def _find(self, module: str) -> None:
        try:
            contests = importlib.import_module(f"benchmarks.{module}").contests
            for contest in contests(self.device.type == "cuda", self.quick):
                self.contests.setdefault((module, contest.id), contest)
        except Exception as error:
            self.broken[module] = _outcome(error)

    def cases(self) -> dict[str, Any]:
        """What there is of this repository's own, as module, operation, case and provider."""
        found = [
            (module, contest.op, contest.case, provider.name)
            for (module, _), contest in self.contests.items()
            for provider in contest.providers
            if provider.ours
        ]
        return {"cases": found, "broken": self.broken}

    def enter(self, module: str, op: str, case: str, provider: str) -> dict[str, Any]:
        """Prepare and prove one case.

        Returns:
            `state`: "ready", with the `seconds` of a call and the `peak` of its memory in bytes; "wrong",
            "unavailable" or "failed" with a `reason`.
        """
        self.run = None
        if module in self.broken:
            return self.broken[module]
        try:
            contest, competitor = self._look_up(module, f"{op}, {case}", provider)
            return self._line_up(contest, competitor)
        except Exception as error:
            return _outcome(error)

    def _look_up(self, module: str, name: str, provider: str) -> tuple[Contest, Provider]:
        contest = self.contests.get((module, name))
        if contest is None:
            raise LookupError("the case is not there")
        for competitor in contest.providers:
            if competitor.ours and competitor.name == provider:
                return contest, competitor
        raise LookupError("the implementation is not there")

    def _line_up(self, contest: Contest, provider: Provider) -> dict[str, Any]:
        if contest is not self.contest or self.problem is None:
            self.contest, self.problem = contest, None
            self._release()
            _seed()
            problem = contest.problem(self.device)
            problem.find_truth()
            self.problem = problem
        _seed()
        asked = provider.asked(self.problem)
        run = provider.prepare(asked)
        asked.prove(run.read(run.once(self.device)), provider.omits, 1.0)
        peak = None
        if not contest.host:
            if run.reset:
                run.reset()
            peak = memory.peak(run.call, self.device)[1]
        start = time.perf_counter()
        run.once(self.device)
        seconds = time.perf_counter() - start
        self.run, self.timed_on = run, torch.device("cpu") if contest.host else self.device
        self._release()
        return {"state": "ready", "reason": "", "seconds": seconds, "peak": peak}

    def round(self, calls: int, warm: bool) -> float:
        """Seconds of a call, the median of `calls` calls; a first one, not timed, if `warm`."""
        run, now = self.run, clock(self.timed_on)
        assert run is not None
        if warm:
            run.once(self.device)
        spans = []
        for _ in range(calls):
            if run.reset:
                run.reset()
            cool(self.timed_on)
            start = now()
            run.call()
            spans.append((start, now()))
        # On a GPU a difference waits for the device, so all are taken at the end.
        seconds = statistics.median(end - start for start, end in spans)
        self._release()
        return seconds

    def _release(self) -> None:
        """Leave a GPU's memory to the other process."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _outcome(error: Exception) -> dict[str, Any]:
    # Without the tree's path, so that both sides say the same of the same error.
    text = str(error).replace(f"{Path(str(perl.__file__)).parents[1]}/", "")
    first = text.strip().partition("\n")[0][:200]
    if isinstance(error, Refused):
        return {"state": "wrong", "reason": first}
    if isinstance(error, Unavailable) or (
        isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in _OURS
    ):
        return {"state": "unavailable", "reason": first}
    if isinstance(error, torch.OutOfMemoryError):
        return {"state": "failed", "reason": "out of memory"}
    return {"state": "failed", "reason": f"{type(error).__name__}: {first}"}
