"""Every provider of every contest takes turns: proven at the first, timed at each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import NAMES, contests_of
from benchmarks.conftest import RESULTS, chosen_device
from benchmarks.harness.contest import Contest, Provider
from benchmarks.harness.device import clock
from benchmarks.harness.race import Race


class Turn(NamedTuple):
    """A provider's place in one pass over the providers of a contest."""

    name: str
    """Of the contest's file."""
    place: int
    """Of the contest among those of its file."""
    contest: Contest
    provider: Provider
    number: int

    @property
    def id(self) -> str:
        """Of letters, digits, dots and dashes, so that `-k` can name it."""
        words = f"{self.name} {self.contest.id} {self.provider.name} {self.number}"
        return re.sub(r"[^\w.]+", "-", words)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The first contests of all files come before the second ones: time may be over before all have run."""
    option, device = metafunc.config.getoption, chosen_device(metafunc.config)
    timed_there = pytest.mark.benchmark(timer=clock(device))
    turns = [
        Turn(name, place, contest, provider, number)
        for name in NAMES
        for place, contest in enumerate(contests_of(name, device.type == "cuda", option("quick")))
        for number in range(option("passes"))
        for provider in contest.providers
    ]
    every = [
        pytest.param(turn, id=turn.id, marks=() if turn.contest.host else timed_there)
        for turn in sorted(turns, key=lambda turn: turn.place)
    ]
    metafunc.parametrize("turn", every)


@pytest.fixture(scope="session")
def race(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[Race]:
    option = pytestconfig.getoption
    turns = (item.callspec.params["turn"] for item in request.session.items)
    contests = len({(turn.name, turn.place) for turn in turns})
    told = count(1)

    def say(line: str) -> None:
        if file := option("results"):
            # What is known is kept, however this process ends.
            pytestconfig.stash[RESULTS].write(file)
            capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
            with capture.global_and_fixture_disabled():
                print(f"[{next(told)}/{contests}] {line}", flush=True)

    race = Race(pytestconfig.stash[RESULTS], option("budget"), option("minutes"), say)
    yield race
    race.leave()


def test_case(race: Race, benchmark: BenchmarkFixture, turn: Turn) -> None:
    """A provider that is missing, wrong or out of memory is a row that says so and has no time; a wrong result of this
    repository also fails the benchmark."""
    race.run(turn.contest, turn.provider, benchmark)
