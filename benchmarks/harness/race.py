"""Providers of a contest in turn: each is proven once, then timed a few rounds at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.contest import Contest, Problem, Provider, Refused, Unavailable
from benchmarks.harness.device import (
    clock,
    cool,
    free_memory,
    measure_peaks,
    peak_memory,
    synchronize,
)
from benchmarks.harness.results import Findings, Row

_MOST_ROUNDS = 50
_SHORT = 2e-3
"""Seconds that a round on a CPU takes at least: calls are repeated within it."""
_LONG = 0.2
"""Seconds of a call from which on no round is spent on warming up."""
_VERY_LONG = 2.0
"""Seconds of a call from which on one turn is all."""

_OVER = "the time for all benchmarks was over; give --minutes more"
_GRACE = 30.0
"""Seconds within which a case that has begun goes on with further providers when time is over."""

_PEERS_SLACK = 4.0
"""A peer may round more than this repository lets itself; the table has every error."""


class Race:
    """The present contest, with its inputs and what its providers have prepared of them."""

    def __init__(
        self,
        findings: Findings,
        budget: float,
        minutes: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.device, self.findings, self.budget, self.say = findings.device, findings, budget, say
        self.end = time.monotonic() + 60 * minutes if minutes else None
        self.contest: Contest | None = None
        self.problem: Problem | None = None
        self.rows: dict[str, Row] = {}
        """Of the present contest, by provider."""
        self.obstacle: tuple[str, str] | None = None
        """Why nobody takes part in the present contest: a status and a reason."""
        self.unusable = ""
        """Why nothing can run any more."""

    def run(self, contest: Contest, provider: Provider, benchmark: BenchmarkFixture) -> None:
        """Prove at the first turn, time at every turn."""
        if contest is not self.contest:
            self._enter(contest)
        row = self.rows.get(provider.name)
        if row is None:
            # A case that began in time may be a long one.
            if self._over(_GRACE) and not self.obstacle:
                self.obstacle = ("left out", _OVER)
            row = self.rows[provider.name] = self._line_up(contest, provider)
        elif row.turns and (self._over() or row.call_seconds > _VERY_LONG):
            pytest.skip("timed in an earlier turn")
        if row.run is not None and not self.unusable:
            benchmark.group = contest.id
            if not benchmark.enabled:
                benchmark.pedantic(lambda: None)
                return
            with self._failures(row):
                self._time(row, benchmark)
                return
        if provider.ours and row.status in ("refused", "failed"):
            pytest.fail(f"{contest.id}, {provider.name}: {row.reason}", pytrace=False)
        pytest.skip(f"{row.status}: {row.reason}")

    def leave(self) -> None:
        """The present contest is over: say how it went, keep it, and free its memory."""
        if self.contest and self.rows:
            found = [_said(row) for row in self.rows.values() if row.status != "missing"]
            missing = len(self.rows) - len(found)
            found += [f"{missing} missing"] * (missing > 0)
            self.say(f"{self.contest.id}: {'; '.join(found)}")
        for row in self.rows.values():
            row.run = None
        self.rows.clear()
        self.contest = self.problem = None

    def _enter(self, contest: Contest) -> None:
        self.leave()
        self.contest, self.obstacle = contest, None
        if self.unusable or self._over():
            self.obstacle = ("left out", self.unusable or _OVER)
            return
        try:
            free_memory()
            # Before anything that could fail for good, as a kernel that leaves the GPU unusable.
            if self.findings.peaks is None:
                self.findings.peaks = measure_peaks(self.device)
            self.problem = contest.problem(self.device)
            self.problem.find_truth()
        except (Unavailable, torch.OutOfMemoryError) as error:
            self.obstacle = ("left out", f"inputs and truth: {_line(error)}")
        except Exception as error:
            self.obstacle = ("failed", f"inputs and truth: {type(error).__name__}: {_line(error)}")

    def _over(self, grace: float = 0.0) -> bool:
        return self.end is not None and time.monotonic() >= self.end + grace

    def _line_up(self, contest: Contest, provider: Provider) -> Row:
        row = Row(contest, provider)
        self.findings.rows.append(row)
        if self.obstacle or self.unusable:
            row.out(*(self.obstacle or ("left out", self.unusable)))
            return row
        assert self.problem is not None
        with self._failures(row):
            prove(row, self.problem, self.device)
        return row

    @contextmanager
    def _failures(self, row: Row) -> Iterator[None]:
        with failures(row):
            yield
        if row.reason and self.device.type == "cuda":
            # After a bad access of memory a GPU does no more in this process.
            try:
                torch.cuda.synchronize()
            except Exception:
                self.unusable = f"the GPU cannot be used since {row.provider.name} failed"

    def _time(self, row: Row, benchmark: BenchmarkFixture) -> None:
        run = row.run
        assert run is not None
        if not row.turns:
            try_out(row, self.device)
        wanted = max(1, round(self.budget / row.call_seconds))
        rounds = min(wanted, _MOST_ROUNDS)
        on_host = self.device.type == "cpu" or row.contest.host
        again = on_host and run.reset is None and row.call_seconds < _SHORT
        iterations = max(1, round(_SHORT / row.call_seconds)) if again else 1

        def before() -> None:
            if run.reset:
                run.reset()
            if not on_host:
                cool(self.device)

        benchmark.pedantic(
            run.call,
            setup=None if on_host and run.reset is None else before,
            # A turn begins with what the one before it left in caches, which is soon over.
            warmup_rounds=int(row.call_seconds < _LONG),
            rounds=max(1, min(rounds, wanted // iterations)),
            iterations=iterations,
        )
        found = benchmark.stats.stats.data  # pyright: ignore[reportOptionalMemberAccess]
        row.turns.append(list(found))
        row.status = "timed"


def prove(row: Row, problem: Problem, device: torch.device) -> None:
    """Prepare a provider's run and compare what it gives with the truth."""
    problem = row.provider.asked(problem)
    run = row.provider.prepare(problem)
    results = run.read(run.once(device))
    slack = 1.0 if row.provider.ours else _PEERS_SLACK
    row.error = problem.prove(results, row.provider.omits, slack)
    row.run = run


def try_out(row: Row, device: torch.device) -> None:
    """The memory of a call, and about how long one takes."""
    run = row.run
    assert run is not None
    if not row.contest.host:
        if run.reset:
            run.reset()
        _, row.peak_extra_bytes = peak_memory(run.call, device)
    if run.reset:
        run.reset()
    synchronize(device)
    start = time.perf_counter()
    run.call()
    synchronize(device)
    row.call_seconds = max(1e-9, time.perf_counter() - start)


def median_seconds(row: Row, device: torch.device, calls: int) -> float:
    """Of a call; a first one, not timed, brings caches back."""
    run, on = row.run, torch.device("cpu") if row.contest.host else device
    assert run is not None
    run.once(on)
    spans = []
    for _ in range(calls):
        if run.reset:
            run.reset()
        cool(on)
        start = clock(on)()
        run.call()
        spans.append((start, clock(on)()))
    # On a GPU a difference waits for the device, so all are taken at the end.
    return statistics.median(end - start for start, end in spans)


@contextmanager
def failures(row: Row) -> Iterator[None]:
    """What goes wrong with a provider, as its row says it; a peer may fail in any way."""
    try:
        yield
    except Refused as error:
        row.out("refused", str(error))
    except (Unavailable, ImportError) as error:
        row.out("missing", _line(error))
    except torch.OutOfMemoryError as error:
        row.out("out of memory", _line(error))
    except Exception as error:
        row.out("failed", f"{type(error).__name__}: {_line(error)}")


def _said(row: Row) -> str:
    if row.median is None:
        return f"{row.provider.name} {row.status}"
    return f"{row.provider.name} {1e3 * row.median:.4g} ms"


def _line(error: BaseException) -> str:
    """The first line of a message, shortened."""
    first = str(error).strip().partition("\n")[0]
    return first if len(first) < 200 else first[:197] + "..."
