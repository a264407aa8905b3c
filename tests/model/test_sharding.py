"""Weights in shards over two processes take the steps of one process, and are whole for rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sharding import MODELS
from tests.command_line import finish, spawn_two
from tests.forked import Forked

Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By process and case; see tests/model/sharded.py."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in MODELS:
        (folder / name).symlink_to(tiny_folder(name))
    done = finish(
        spawn_two(folder, folder / "found.json", start=partial(Forked, "tests.model.sharded"))
    )
    assert [code for code, _ in done] == [0, 0], done
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "gradients"),
    [
        ("all weights", 92),
        ("weights whole", 92),
        ("adapters", 56),
        ("adapters, tower", 113),
        ("all, tower", 105),
        ("frozen tower", 46),
    ],
)
def test_two_processes_take_the_steps_of_one(case: str, gradients: int, found: Found) -> None:
    """Also where one of them has nothing to learn, or no image. float32 has 6e-8 of relative rounding; sums of hundreds of
    terms in another order are off by some ten of it. AdamW makes steps of their sign of gradients that are rounding alone."""
    ours, theirs = (own[case] for own in found)
    assert ours["gradients"] == gradients and ours == pytest.approx(theirs)
    assert max(ours["loss"], ours["norm"]) < 1e-6 and ours["gradient"] < 1e-5
    assert ours["weights"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_checkpoint_goes_on_to_the_bit_and_in_one_process_within_rounding(
    kind: str, found: Found
) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    for own in (process[kind] for process in found):
        coded = 18 if kind == "adamw_8bit" else 0  # Each of two tensors where there was one.
        assert own["in 8 bits"] == coded
        assert own["same"] == own["all"] == 368 + coded
        assert own["alone"] < 1e-6


@pytest.mark.slow
def test_rollouts_wait_for_nobody_and_leave_no_copy_of_the_weights(found: Found) -> None:
    """Before and after a step. The first process asks for nothing, the second for four completions. Also where a forward ends in
    an error, all weights lie in shards again; fully_shard's notes of forwards do not add up."""
    for own in (process["rollouts"] for process in found):
        assert own["tokens"] == [True, True]
        assert own["whole"][0] > 1_000_000 and own["left"] == [0, 0]
        assert own["noted"] == own["whole after an error"] == 0
        assert own["after"]["gradient"] < 1e-5
