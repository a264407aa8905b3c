"""What every benchmark shares: the device, the clock, providers in turn, and no time without a proof."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.device import clock, machine
from benchmarks.harness.race import Race
from benchmarks.harness.results import Findings

TakeTurn = Callable[[], None]
"""What a benchmark calls; see the fixture `race`."""

_FIRST = (
    *("bench_linear_loss", "bench_logprobs", "bench_logits_loss", "bench_attention"),
    *("bench_growth", "bench_step", "bench_advantages"),
)

RESULTS = pytest.StashKey[Findings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perl benchmarks")
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), help="where tensors live (cuda if there is one)")
    add("--threads", type=int, help="CPU threads of PyTorch (OMP_NUM_THREADS, else all cores)")
    add("--quick", action="store_true", help="fewer and smaller cases")
    add("--passes", type=int, default=1, help="how often the providers of a case take turns")
    add("--budget", type=float, default=0.1, help="seconds of a provider's turn")
    add("--minutes", type=float, help="cases that would start later are left out, and named")
    add("--results", type=Path, help="JSON file for all rows and the machine")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads") or torch.get_num_threads())
    # What a library would fetch is no part of a measurement.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config.stash[RESULTS] = Findings(chosen_device(config))


def pytest_report_header(config: pytest.Config) -> str:
    return "benchmarks: " + ", ".join(
        f"{key} {value}" for key, value in machine(chosen_device(config)).items() if value
    )


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, object]
) -> None:
    machine_info.update(machine(chosen_device(config)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    device = chosen_device(config)
    for item in items:
        turn = item.callspec.params["turn"] if hasattr(item, "callspec") else None
        if turn and not turn.contest.host:
            item.add_marker(pytest.mark.benchmark(timer=clock(device)))


def _place(item: pytest.Item) -> tuple[int, int]:
    """The first cases of all files before the second ones: time may be over before all have run."""
    turn = item.callspec.params["turn"] if hasattr(item, "callspec") else None
    file = _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST)
    return (turn.place if turn else 0, file)


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """With results in a file, a line for each case in place of dots."""
    if config.getoption("results") and not report.failed:
        return report.outcome if report.when == "call" or report.skipped else "", "", ""
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if file := config.getoption("results"):
        config.stash[RESULTS].write(file)


@dataclass(frozen=True)
class Turn:
    """A provider's place in one pass over the providers of a contest."""

    contest: Contest
    place: int
    """Of the contest among those of its file."""
    provider: Provider
    number: int

    @property
    def id(self) -> str:
        """Of letters, digits, dots and dashes, so that `-k` can name it."""
        words = f"{self.contest.op} {self.contest.case} {self.provider.name} {self.number}"
        return re.sub(r"[^\w.]+", "-", words)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark every provider of every contest of its module, `--passes` times in turn."""
    if "turn" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    cuda = chosen_device(metafunc.config).type == "cuda"
    every = [
        Turn(contest, place, provider, number)
        for place, contest in enumerate(metafunc.module.contests(cuda, option("quick")))
        for number in range(option("passes"))
        for provider in contest.providers
    ]
    metafunc.parametrize("turn", every, ids=[turn.id for turn in every])


def chosen_device(config: pytest.Config) -> torch.device:
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@pytest.fixture(scope="session")
def _race(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Race]:
    option = pytestconfig.getoption
    plugin = pytestconfig.pluginmanager.get_plugin

    contests = len(
        {(item.path, item.callspec.params["turn"].place) for item in request.session.items}
    )
    told = count(1)

    def say(line: str) -> None:
        if file := option("results"):
            # What is known is kept, however this process ends.
            pytestconfig.stash[RESULTS].write(file)
            with plugin("capturemanager").global_and_fixture_disabled():
                print(f"[{next(told)}/{contests}] {line}", flush=True)

    race = Race(pytestconfig.stash[RESULTS], option("budget"), option("minutes"), say)
    yield race
    race.leave()


@pytest.fixture
def race(_race: Race, benchmark: BenchmarkFixture, turn: Turn) -> TakeTurn:
    """Takes a turn: proves what the provider computes, then times it.

    A provider that is missing, wrong or out of memory is a row that says so and has no time; a wrong result of this
    repository also fails the benchmark.
    """
    return partial(_race.run, turn.contest, turn.provider, benchmark)
