"""What each key of a recipe changes in a run: the numbers that it records, what it asks the engine, where its weights end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command_line import metrics
from tests.training.two_tokens import OwnEngine, config_of, stand_in, train_in


def recorded(folder: Path, more: str) -> dict[str, Any]:
    """By column the values of two steps of two questions, in two orders of two completions each; besides, what the engine
    was asked and the final model."""
    OwnEngine.asked.clear()
    train_in(folder / "run", config_of(folder, more))
    columns: dict[str, Any] = {}
    for row in metrics(folder / "run"):
        for name, value in row.items():
            columns.setdefault(f"{row['stage']}/{name}", []).append(value)
    columns["seeds"] = [seed for seed, *_ in OwnEngine.asked]
    for name in ("temperature", "n", "max_new_tokens"):
        columns[name] = [getattr(params, name) for _, params, _ in OwnEngine.asked]
    columns["weights"] = (folder / "run" / "models" / "final" / "weights").read_bytes()
    return columns


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the recipe without a change."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return recorded(tmp_path_factory.mktemp("usual"), "")


@pytest.mark.parametrize(
    ("key", "column", "values"),
    [
        ("run.seed = 1", "seeds", None),
        ("train.steps = 3", "rl/step", [1, 2, 3]),
        ("train.lr = 0.03", "rl/lr", [0.03, 0.03]),
        ("train.schedule = 'linear'", "rl/lr", [0.01, 0.005]),
        ("train.schedule = 'cosine'", "rl/lr", [0.01, 0.005]),
        ("train.warmup_steps = 2", "rl/lr", [0.005, 0.01]),
        ("train.examples_per_step = 3", "rl/groups/seen", [3, 3]),
        ("train.weight_decay = 0.9", "weights", None),
        ("train.betas = [0.1, 0.2]", "weights", None),
        ("train.max_grad_norm = 1e-9", "weights", None),
        ("train.updates_per_batch = 2", "weights", None),
        # A prompt of 7 tokens and two completions of at most 3 in a row: one for each of four orders.
        ("train.tokens_per_micro_batch = 13", "rl/packing/rows", [4, 4]),
        ("train.share_prompts = false", "rl/packing/token_sharing", [1, 1]),
        ("rollout.per_order = 3", "n", [3, 3]),
        ("rollout.temperature = 0.5", "temperature", [0.5, 0.5]),
        ("rollout.temperature = 0.5", "rl/entropy", None),
        ("rollout.max_new_tokens = 5", "max_new_tokens", [5, 5]),
        ("permutation.orders = 1", "rl/permutation/orders", [1, 1]),
        ("permutation.rate = 0.0", "rl/permutation/orders", [1, 1]),
        ("permutation.rate_schedule = 'linear'", "rl/permutation/rate", [1, 0.5]),
        # Two prompts of 7 tokens instead of four.
        ("permutation.condition = 'original'", "rl/packing/tokens", None),
        ("advantage.over = 'order'", "weights", None),
        ("advantage.scale = 'none'", "rl/loss", None),
        ("advantage.baseline = 'leave_one_out'", "rl/loss", None),
        ("loss.preset = 'dr_grpo'", "rl/loss", None),
        ("loss.kl_coef = 0.0", "rl/kl", [0, 0]),
        ("loss.entropy_coef = 0.5", "rl/loss", None),
        ("loss.aggregation = 'seq-mean-token-sum'", "rl/loss", None),
        (
            "loss.clip_low = 0.0\ntrain = { updates_per_batch = 2, lr = 0.9 }",
            "rl/clip_fraction",
            None,
        ),
        (
            "loss.clip_high = 0.0\ntrain = { updates_per_batch = 2, lr = 0.9 }",
            "rl/clip_fraction",
            None,
        ),
        (
            "filter.zero_variance = true\npermutation.orders = 1\ntrain.examples_per_step = 6",
            "rl/groups/zero_variance",
            None,
        ),
        ("filter = { max_tries = 2, min_accuracy = 1.0 }", "rl/groups/tries", [2, 2]),
        ("filter.min_accuracy = 1.0", "rl/groups/too_hard", None),
        ("filter.max_accuracy = 0.0", "rl/groups/too_easy", None),
        ("filter.replay = 1", "rl/groups/replayed", [0, 1]),
        ("reward.weights = [2.0]", "rl/reward/mean", None),
        ("reward.group_weight = 'exp'\nreward.group_weight_of = 'share_of_b'", "rl/loss", None),
        ("cold_start.steps = 2", "cold_start/step", [1, 2]),
        ("cold_start = { steps = 2, lr = 0.5 }", "cold_start/lr", [0.01, 0.02]),
        ("cold_start = { steps = 2, lr = 0.5, warmup_steps = 1 }", "cold_start/lr", [0.5, 0.5]),
        ("cold_start = { steps = 1, batch_size = 3 }", "cold_start/tokens", [9]),
        ("eval.examples = 3", "evaluate/examples", [3, 3]),
        ("eval = { examples = 1, max_orders = 1 }", "evaluate/orders", [1, 1]),
        ("eval = { examples = 1, samples = 3 }", "n", [3, 1, 2, 2, 3, 1]),
        ("eval = { examples = 1, every = 1 }", "evaluate/at", ["before", "step", "after"]),
    ],
    ids=lambda value: value.replace("\n", ", ") if isinstance(value, str) else "",
)
def test_what_a_key_changes(
    key: str,
    column: str,
    values: list[Any] | None,
    tmp_path: Path,
    two_tokens: None,
    usual: dict[str, Any],
) -> None:
    found = recorded(tmp_path, key)[column]
    assert found != usual.get(column)
    if values is not None:
        assert found == pytest.approx(values)
