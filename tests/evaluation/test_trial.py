"""Rewards tried on right answers before a run: those that cannot be called, and those that no right answer reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.config import DataConfig, RewardConfig
from perl.data.dataset import load_examples
from perl.evaluation.trial import try_rewards
from perl.rollout.instruction import Instruction
from perl.rollout.prompts import PromptEncoder, PromptLimit
from tests.command_line import ErrorOf
from tests.messages import refused, tells
from tests.stand_ins import Words

FUNCTIONS = """
def typo(completions, soluton, **kw):
    return [1.0] * len(completions)

def letter(solution_str, ground_truth):
    return float("{" + ground_truth in solution_str)

def tagged(solution_str, ground_truth):
    return float(f"{{{ground_truth[8]}}}" in solution_str)

def brief(completions, **kw):
    return [float(len(text) < 1) for text in completions]

def style(completions, **kw):
    return [float("</answer>" in text) for text in completions]

def silent(completions, **kw):
    return [None] * len(completions)

def fails_on_nothing(completions, **kw):
    return [text[0] == "z" for text in completions]
"""


class Writes(Words):
    encode_completion = Words.tokens


@pytest.fixture
def tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., list[str]]:
    """What is said of some rewards, over questions that B answers."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(FUNCTIONS)

    def tried(
        *functions: str, weights: tuple[float, ...] = (), gold: Any = "<answer>B</answer>"
    ) -> list[str]:
        row = {"question": "Which ?", "answer": gold, "images": [], "kind": "none"}
        rows = [{**row, "id": f"q{k}"} for k in range(5)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = load_examples("rows.jsonl", DataConfig(), "train", 0)
        limit = PromptLimit(99, "most")
        encoder: Any = PromptEncoder(Writes(), limit, "error", Instruction())  # type: ignore[arg-type]
        caplog.clear()
        try_rewards(
            "rows.jsonl",
            dataset,
            "slots",
            RewardConfig(functions=functions, weights=weights),
            encoder,
        )
        return [r.getMessage() for r in caplog.records if r.name == "perl.evaluation.trial"]

    return tried


@pytest.mark.parametrize(
    ("functions", "weights", "named"),
    [
        (["accuracy", "format"], (), []),
        (["own.py:letter", "accuracy"], (1, 0), ["letter"]),
        # The form alone gives the sum something.
        (["own.py:letter", "format"], (), ["letter"]),
        (["own.py:tagged", "format"], (), []),
        (["own.py:brief"], (), ["brief"]),
        (["own.py:brief", "accuracy"], (0.5, 1), []),
        (["own.py:brief", "accuracy"], (1, 0.5), ["brief"]),
        # Two that count alike are enough if one of them is reached; but the sum must gain by it.
        (["own.py:tagged", "own.py:letter"], (), []),
        (["own.py:tagged", "repetition", "own.py:brief"], (1, 0, 1), ["tagged", "brief"]),
        (["own.py:fails_on_nothing"], (), ["fails_on_nothing"]),
        (["format", "length_penalty(longest=9, buffer=1)"], (), []),
        (["own.py:silent"], (), []),
        # Nothing asks for a form: one that it reads will do.
        (["own.py:style"], (), []),
        (["own.py:letter"], (-1,), []),
    ],
)  # fmt: skip
def test_what_no_right_answer_reaches(
    functions: list[str],
    weights: tuple[float, ...],
    named: list[str],
    tried: Callable[..., list[str]],
) -> None:
    said = tried(*functions, weights=weights)
    assert len(said) == bool(named)
    for line in said:
        tells(line, *named, "rows.jsonl", "perl-rl preview", "<answer>B</answer>")
        assert "accuracy" not in line


def test_only_answers_that_are_known_are_compared(tried: Callable[..., list[str]]) -> None:
    assert tried("own.py:letter", gold="") == []
    assert tried("own.py:letter", gold="B") == []


def test_a_function_that_asks_something_outside_is_not_called(
    tried: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.rewards.scorer.check_judge", lambda: None)
    monkeypatch.setattr("perl.rewards.scorer._OUTSIDE", dict.fromkeys(_outside(), lambda: None))
    monkeypatch.setattr("perl.rewards.judge.Endpoint.from_env", lambda: pytest.fail("asked"))
    assert tried("judge") == []
    # It may give what the others do not.
    assert tried("judge", "own.py:letter") == []


def _outside() -> list[Any]:
    from perl.rewards.scorer import _OUTSIDE

    return list(_OUTSIDE)


def test_a_function_that_cannot_be_called_is_found_before_the_run(
    tried: Callable[..., list[str]], error_of: ErrorOf
) -> None:
    with refused("rows.jsonl", "typo", "TypeError", "soluton", "ground_truth", "perl-rl preview"):
        tried("accuracy", "own.py:typo")
    words = ("--run.dir", "run", "--reward.functions", "own.py:typo", "--reward.weights", 1)
    tells(error_of("train", "demo", *words), "typo", "soluton", "perl-rl preview")
    assert not Path("run").exists()
