"""Commands that ask a model, with an engine that answers as a test says in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.config import Config
from perl.recipe import save_config
from perl.rollout.instruction import Instruction
from perl.rollout.prompts import PromptEncoder, PromptLimit
from tests.evaluation.benchmarks import make_benchmarks
from tests.stand_ins import TableEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TableEngine:
    """What `evaluate`, `filter` and `generate` ask whatever their model is; the test sets its `answer`."""
    engine = TableEngine(lambda asked: "")

    def engine_and_encoder(config: Config) -> tuple[TableEngine, PromptEncoder]:
        limit = replace(PromptLimit.to_generate(config), advice="")
        asked = Instruction.of(config)
        return engine, PromptEncoder(engine.processor, limit, config.data.overlong, asked)  # type: ignore[arg-type]

    for module in ("evaluation.commands", "evaluation.filter_command", "rollout.opening"):
        monkeypatch.setattr(f"perl.{module}.engine_and_encoder", engine_and_encoder)
    return engine


@pytest.fixture
def without_weights(tmp_path: Path) -> Path:
    """A model folder that no model can be loaded from."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """A function from sections of settings to the folder of a run with them, whose model cannot be loaded."""

    def folder(**sections: Any) -> Path:
        root = tmp_path / "run"
        (root / "models" / "final").mkdir(parents=True, exist_ok=True)
        (root / "models" / "final" / "config.json").write_text("{}")
        save_config(Config(**sections), root / "config.toml")
        return root

    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small benchmarks; whoever changes them copies them first."""
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"))
