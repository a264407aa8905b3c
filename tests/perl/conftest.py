"""Tiny models, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from perl.tasks import vocabulary
from perl.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a tiny model's name to a folder with it, random weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            make_tiny_model(name, vocabulary(), made[name], seed=0)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps its precision for the life of a process; each test chooses its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
