"""Runs whose policy has two tokens, in one process or in two."""

import pytest

from perl.training.parallel.balancing import ModelFlops
from tests.training.two_tokens import Parts, Together, stand_in


@pytest.fixture
def two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the test is of such a policy."""
    stand_in(monkeypatch)


@pytest.fixture
def two_processes(two_tokens: None, monkeypatch: pytest.MonkeyPatch) -> Together:
    """They are threads, each of which trains."""
    together = Together(2, monkeypatch)
    monkeypatch.setattr(Parts, "together", together)
    monkeypatch.setattr(ModelFlops, "of", lambda *_: ModelFlops(1.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr("perl.training.train.StopSignal", together.stop)
    return together
