"""The next step's rollouts begin before this one is trained on: the same questions in the same steps, one step old."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.rollout.engine import Completion, SamplingParams
from perl.rollout.engines import check_sampling
from perl.training.reinforce import PolicyStep
from perl.types import EncodedPrompt, Group, Interrupted, WeightSpan
from tests.command_line import json_lines
from tests.messages import refused
from tests.training.two_tokens import OwnEngine, Parts, config_of, train_in

FOUR = """
rollout.engine = "vllm"
train.steps = 4
cold_start.steps = 0
"""
AHEAD = FOUR + "rollout.ahead = 1\n"


class Elsewhere(OwnEngine):
    """Samples as soon as it is asked, as servers do, by the weights that it was given last."""

    version = 0

    @contextmanager
    def serving(self, version: int) -> Iterator[None]:
        self.version = version
        yield

    def begin(self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int) -> Any:
        Told.events.append("begin")
        return iter(list(enumerate(self.generate(prompts, params, seed))))

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        found = super().generate(prompts, params, seed)
        return [
            [
                replace(c, weight_versions=(WeightSpan(self.version, 0, len(c.token_ids)),))
                for c in own
            ]
            for own in found
        ]


class Told:
    """What happened in which sequence, and the questions of each step."""

    events: list[str]
    trained: list[list[tuple[int, ...]]]


@pytest.fixture
def told(two_tokens: None, monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    Told.events, Told.trained = [], []
    step = PolicyStep.__call__

    def update(self: PolicyStep, number: int, groups: Sequence[Group]) -> Any:
        Told.events.append(f"update {number}")
        Told.trained.append([group.key for group in groups])
        return step(self, number, groups)

    monkeypatch.setattr(PolicyStep, "__call__", update)
    engines: dict[int, Elsewhere] = {}

    def engine(self: Parts) -> Elsewhere:
        return engines.setdefault(id(self.policy), Elsewhere(self.policy))  # type: ignore[arg-type]

    monkeypatch.setattr(Parts, "engine", property(engine))
    return Told


def ages(folder: Path) -> list[float]:
    rows = json_lines(folder / "metrics.jsonl")
    return [row["rollout/age"] for row in rows if row["stage"] == "rl"]


def test_a_batch_is_begun_before_the_last_one_is_trained_on(
    told: type[Told], tmp_path: Path
) -> None:
    train_in(tmp_path / "now", config_of(tmp_path, FOUR))
    now, told.trained = told.trained, []
    assert told.events == [e for n in range(4) for e in ("begin", f"update {n}")]
    assert ages(tmp_path / "now") == [0, 0, 0, 0]
    told.events = []
    train_in(tmp_path / "ahead", config_of(tmp_path, AHEAD))
    first, *others = (("begin", "begin"), ("begin",), ("begin",), ())
    assert told.events == [
        *(*first, "update 0"),
        *(e for n, own in enumerate(others, 1) for e in (*own, f"update {n}")),
    ]
    assert ages(tmp_path / "ahead") == [0, 1, 1, 1]
    assert told.trained == now


def test_a_run_that_goes_on_trains_on_each_question_once(
    told: type[Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of its second step knows nothing of the batch that the third had begun with."""
    config = config_of(tmp_path, AHEAD)
    train_in(tmp_path / "whole", config)
    whole, told.trained = told.trained, []
    step, left = PolicyStep.__call__, iter([False, True])

    def stopped(self: PolicyStep, number: int, groups: Sequence[Group]) -> Any:
        if next(left, False):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, groups)

    monkeypatch.setattr(PolicyStep, "__call__", stopped)
    with pytest.raises(Interrupted):
        train_in(tmp_path / "run", config)
    assert len(told.trained) == 2
    train_in(tmp_path / "run", config, resume=True)
    assert told.trained == whole


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("rollout.ahead = 1", ["rollout.ahead", "rollout.engine = vllm"]),
        ("rollout.surplus = 0.5", ["rollout.surplus", "rollout.engine = vllm"]),
        (AHEAD + 'rollout.placement = "colocated"', ["rollout.ahead = 1", "rollout.placement"]),
        (AHEAD + "filter.reuse_overflow = true", ["rollout.ahead = 1", "filter.reuse_overflow"]),
        (
            FOUR + 'rollout.surplus = 0.5\nadvantage.scale = "batch"',
            ["rollout.surplus", "advantage.scale = batch"],
        ),
    ],
)
def test_what_does_not_go_together(more: str, names: list[str], tmp_path: Path) -> None:
    with refused(*names):
        check_sampling(config_of(tmp_path, more))
    check_sampling(config_of(tmp_path, AHEAD))
