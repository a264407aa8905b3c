"""The computed tables of docs/scaling.md are what the script makes, and its arithmetic is that of the page."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "experiments"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    scaling = importlib.import_module("scaling")


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    page = scaling.DOC.read_text("utf-8")
    made = scaling.filled(page, scaling.tables())
    assert made == page, (
        "run `python docs/experiments/scaling.py`, and read the page around its tables again"
    )
    assert made.count("**computed**") == 3
    lines = scaling.filled("a\n\n| x |\n| old |\n\nb", ["| x |\n| new |"])
    assert lines == "a\n\n| x |\n| new |\n\nb"


def step(gpus: int) -> Any:
    """Of a model of 80 weights, 64 of them in layers, beside a tower of 20; three micro-batches and two updates."""
    facts = SimpleNamespace(weights=100, tower=20, tower_trained_weights=20)
    facts.flops = SimpleNamespace(token=64)
    config = SimpleNamespace(train=SimpleNamespace(updates_per_batch=2))
    return SimpleNamespace(facts=facts, gpus=gpus, row_tokens=[1, 2, 3], config=config)


def test_what_is_sent_by_hand() -> None:
    # Within a node: layers twice and the rest once in two bytes, gradients in four, and all weights once for the rollout.
    inside = 7 / 8 * (3 * (2 * (2 * 64 + 16) + 4 * 80) + 2 * 80)
    tower = 2 * 2 * 7 / 8 * 4 * 20
    assert scaling.seconds_sent(step(1)) == 0
    assert scaling.seconds_sent(step(8)) == pytest.approx((inside + tower) / 450e9 / 0.7)
    # Four nodes: each GPU's eighth of the gradients is summed over them, and the tower's over all.
    outside = 3 * 2 * 3 / 4 * 4 * 80 / 8 + 2 * 2 * 31 / 32 * 4 * 20
    assert scaling.seconds_sent(step(32)) == pytest.approx((inside / 450e9 + outside / 50e9) / 0.7)


def test_the_tail_is_one_round_of_the_longest_completions() -> None:
    work = scaling.work_of(8, 128)
    even, tail = (scaling.seconds(work, tail=t) for t in (False, True))
    decode = next(p for p in work.parts() if p.name == "rollout/decode").seconds(scaling.H100)
    # Rounds of 1,024 tokens, the last of 2,048.
    assert tail["rollout"] - even["rollout"] == pytest.approx(decode / work.rounds)
    assert tail["update"] == even["update"] and set(even) == {"rollout", "logprobs", "update"}


def test_flops_of_a_step_are_those_that_a_run_counts() -> None:
    """Of 128 questions on 8 GPUs: 32 prompts of 2,154 tokens, each with 6 completions of 1,024."""
    work = scaling.work_of(8, 128)
    f, flops = work.facts, scaling.model_flops(work)
    tokens, scored = 32 * (2154 + 6 * 1024), 32 * 6 * 1024
    pairs = 32 * (2154**2 / 2 + 6 * (1024 * 2154 + 1024**2 / 2))
    text = 2 * tokens * f.flops.token + 2 * pairs * f.flops.pair + 2 * scored * f.flops.scored
    images = 16 * 6 * f.tower_flops(334)
    # Everything is trained, so that the reference has a tower of its own.
    assert flops["rollout"] == flops["logprobs"] == pytest.approx(text + images)
    assert flops["update"] == pytest.approx(3 * (text + images))
