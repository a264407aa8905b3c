"""Providers of a contest in turn: each is proven once, then timed a few rounds at a time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import memory
from benchmarks.clock import cool
from benchmarks.contest import Contest, Problem, Provider, Refused, Run, Unavailable
from benchmarks.results import Findings, Row

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


@dataclass
class _Lane:
    """A provider in the present contest; without a run it is out, for the reason in its row."""

    row: Row
    run: Run | None = None
    seconds: float = 0.0
    """Of one call, warm."""


class Race:
    """The present contest, with its inputs and what its providers have prepared of them."""

    def __init__(
        self,
        device: torch.device,
        results: Findings,
        budget: float,
        minutes: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.device, self.results, self.budget, self.say = device, results, budget, say
        self.end = time.monotonic() + 60 * minutes if minutes else None
        self.contest: Contest | None = None
        self.problem: Problem | None = None
        self.lanes: dict[str, _Lane] = {}
        self.obstacle: tuple[str, str] | None = None
        """Why nobody takes part in the present contest: a status and a reason."""
        self.unusable = ""
        """Why nothing can run any more."""

    def run(self, contest: Contest, provider: Provider, benchmark: BenchmarkFixture) -> None:
        """Prove at the first turn, time at every turn."""
        if contest is not self.contest:
            self._enter(contest)
        lane = self.lanes.get(provider.name)
        if lane is None:
            # A case that began in time may be a long one.
            if self._over(_GRACE) and not self.obstacle:
                self.obstacle = ("left out", _OVER)
            lane = self.lanes[provider.name] = self._line_up(contest, provider)
        elif lane.row.turns and (self._over() or lane.seconds > _VERY_LONG):
            pytest.skip("timed in an earlier turn")
        if lane.run is not None and not self.unusable:
            benchmark.group = contest.id
            if not benchmark.enabled:
                benchmark.pedantic(lambda: None)
                return
            with self._failures(lane):
                self._time(lane, benchmark)
                return
        if provider.ours and lane.row.status in ("refused", "failed"):
            pytest.fail(f"{contest.id}, {provider.name}: {lane.row.reason}", pytrace=False)
        pytest.skip(f"{lane.row.status}: {lane.row.reason}")

    def leave(self) -> None:
        """The present contest is over: say how it went, keep it, and free its memory."""
        rows = [lane.row for lane in self.lanes.values()]
        if self.contest and rows:
            found = [_said(row) for row in rows if row.status != "missing"]
            missing = len(rows) - len(found)
            found += [f"{missing} missing"] * (missing > 0)
            self.say(f"{self.contest.id}: {'; '.join(found)}")
        self.lanes.clear()
        self.contest = self.problem = None

    def _enter(self, contest: Contest) -> None:
        self.leave()
        self.contest, self.obstacle = contest, None
        if self.unusable:
            self.obstacle = ("left out", self.unusable)
        elif self._over():
            self.obstacle = ("left out", _OVER)
        if self.obstacle:
            return
        try:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            # Before anything that could fail for good, as a kernel that leaves the GPU unusable.
            self.results.measure_peaks()
            self.problem = contest.problem(self.device)
            self.problem.find_truth()
        except (Unavailable, torch.OutOfMemoryError) as error:
            self.obstacle = ("left out", f"inputs and truth: {_line(error)}")
        except Exception as error:
            self.obstacle = ("failed", f"inputs and truth: {type(error).__name__}: {_line(error)}")

    def _over(self, grace: float = 0.0) -> bool:
        return self.end is not None and time.monotonic() >= self.end + grace

    def _line_up(self, contest: Contest, provider: Provider) -> _Lane:
        lane = _Lane(self.results.row(contest, provider))
        if self.obstacle or self.unusable:
            lane.row.out(*(self.obstacle or ("left out", self.unusable)))
            return lane
        assert self.problem is not None
        with self._failures(lane):
            problem = provider.asked(self.problem)
            run = provider.prepare(problem)
            results = run.read(run.once(self.device))
            slack = 1.0 if provider.ours else _PEERS_SLACK
            lane.row.error = problem.prove(results, provider.omits, slack)
            lane.run = run
        return lane

    @contextmanager
    def _failures(self, lane: _Lane) -> Iterator[None]:
        """What goes wrong with a provider, as its row says it; a peer may fail in any way."""
        row = lane.row
        try:
            yield
            return
        except Refused as error:
            row.out("refused", str(error))
        except (Unavailable, ImportError) as error:
            row.out("missing", _line(error))
        except torch.OutOfMemoryError as error:
            row.out("out of memory", _line(error))
        except Exception as error:
            row.out("failed", f"{type(error).__name__}: {_line(error)}")
            self._probe(row)
        lane.run = None

    def _probe(self, row: Row) -> None:
        """Whether the GPU still works: after a bad access of memory it does no more in this process."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            self.unusable = f"the GPU cannot be used since {row.provider.name} failed"

    def _time(self, lane: _Lane, benchmark: BenchmarkFixture) -> None:
        run = lane.run
        assert run is not None
        if not lane.row.turns:
            if not lane.row.contest.host:
                if run.reset:
                    run.reset()
                _, lane.row.peak_extra_bytes = memory.peak(run.call, self.device)
            start = time.perf_counter()
            run.once(self.device)
            lane.seconds = max(1e-9, time.perf_counter() - start)
        wanted = max(1, round(self.budget / lane.seconds))
        rounds = min(wanted, _MOST_ROUNDS)
        on_host = self.device.type == "cpu" or lane.row.contest.host
        again = on_host and run.reset is None and lane.seconds < _SHORT
        iterations = max(1, round(_SHORT / lane.seconds)) if again else 1

        def before() -> None:
            if run.reset:
                run.reset()
            if not on_host:
                cool(self.device)

        benchmark.pedantic(
            run.call,
            setup=None if on_host and run.reset is None else before,
            # A turn begins with what the one before it left in caches, which is soon over.
            warmup_rounds=int(lane.seconds < _LONG),
            rounds=max(1, min(rounds, wanted // iterations)),
            iterations=iterations,
        )
        found = benchmark.stats.stats.data  # pyright: ignore[reportOptionalMemberAccess]
        lane.row.turns.append(list(found))
        lane.row.status = "timed"


def _said(row: Row) -> str:
    if row.status != "timed" or not row.seconds:
        return f"{row.provider.name} {row.status}"
    return f"{row.provider.name} {1e3 * statistics.median(row.seconds):.4g} ms"


def _line(error: BaseException) -> str:
    """The first line of a message, shortened."""
    first = str(error).strip().partition("\n")[0]
    return first if len(first) < 200 else first[:197] + "..."
