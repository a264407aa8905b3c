"""The Triton backend along every axis, and what it does with values that make no sense; interpreted
where there is no GPU. `test_losses.py` has the formulas in fp32, `test_fuzz.py` the combinations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, get_args

import numpy as np
import pytest
import torch

from perl_kernels import (
    PolicyLoss,
    group_advantages,
)
from perl_kernels.grouping import Baseline, Combine
from perl_kernels.grouping import Scale as RewardScale
from perl_kernels.objective import KL, Aggregation, Correction, Ratio
from tests.kernels import test_arguments
from tests.kernels.test_fuzz import Case, Groups, NearThreshold, check, check_groups
from tests.kernels.test_losses import preset
from tests.kernels.test_objective import PRESETS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAD = [math.nan, math.inf, -math.inf]


def check_case(loss: PolicyLoss, entry: str = "policy_loss", **fields: Any) -> None:
    """One case on Triton, of the first seed for which no token is next to a threshold."""
    given: dict[str, Any] = {"lengths": (3, 1, 0, 4), "vocab": 11, "weights": "zeros", **fields}
    for seed in count():
        try:
            return check(Case(backend="triton", entry=entry, loss=loss, seed=seed, **given))
        except NearThreshold:
            assert seed < 50


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str, old: bool) -> None:
    """In half precision; `test_losses.py` has fp32."""
    entry, dtype = ("linear_grpo_loss", torch.bfloat16) if old else ("grpo_loss", torch.float16)
    check_case(preset(name), entry, old=old, dtype=dtype)


@pytest.mark.parametrize(
    ("old", "advantages"), [(True, "token"), (True, "grouped"), (False, "completion")]
)
@pytest.mark.parametrize("ratio", get_args(Ratio))
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_ratio(surrogate: Any, ratio: Any, old: bool, advantages: str) -> None:
    check_case(PolicyLoss(surrogate=surrogate, ratio=ratio), old=old, advantages=advantages)


@pytest.mark.parametrize("kl", get_args(KL))
def test_kl(kl: Any) -> None:
    """In a row of logits and of a completion; times the ratio, or alone."""
    loss = PolicyLoss(kl=kl, kl_coef=0.3, entropy_coef=0.1)
    corrected = replace(loss, kl_bias_correction=True)
    check_case(corrected, "grpo_loss")
    check_case(replace(loss, ratio="sequence"), upstream=-2.0)
    if kl in ("k1+", "k3"):
        check_case(corrected)
        check_case(replace(corrected, ratio="sequence"))
        check_case(replace(corrected, surrogate="gmpo"))


@pytest.mark.parametrize(
    ("name", "old"), [("perl", True), ("gspo", True), ("vespo", True), ("gmpo", False)]
)
@pytest.mark.parametrize("correction", get_args(Correction))
def test_correction(correction: Any, name: str, old: bool) -> None:
    loss = preset(name, correction=correction, correction_low=0.8, correction_high=1.3)
    check_case(loss, old=old)


@pytest.mark.parametrize(
    ("normalizer", "weights"),
    [("none", "zeros"), ("float", "none"), ("tensor", "bool"), ("int tensor", "zeros")],
)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_aggregation(aggregation: Any, normalizer: str, weights: str) -> None:
    loss = PolicyLoss(aggregation=aggregation, max_completion_length=9)
    check_case(loss, normalizer=normalizer, weights=weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab": 8229, "lengths": (2, 1), "dtype": torch.bfloat16},
        {"layout": "rows", "options": (("inplace", True),)},
        {"layout": "rows"},
        {"layout": "columns"},
        {"layout": "expanded"},
    ],
    ids=["two-blocks", "rows-apart-inplace", "rows-apart", "transposed", "one-row"],
)
def test_logits(fields: dict[str, Any]) -> None:
    check_case(PolicyLoss(entropy_coef=0.1), "grpo_loss", **fields)


def test_long_completion() -> None:
    loss = preset("gspo", aggregation="seq-mean-token-sum")
    check_case(loss, lengths=(2, 100_000, 1))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("combine", get_args(Combine))
@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("scale", get_args(RewardScale))
def test_group_advantages(scale: Any, baseline: Any, combine: Any, unbiased: bool) -> None:
    nan = math.nan
    table = [(1.0, 0.5), (0.0, nan), (0.25, 3.0), (nan, nan), (2.0, 2.0), (1.0, 1.0), (1.0, 1.0)]
    groups = Groups(
        backend="triton",
        rewards=tuple(table),
        sizes=(4, 0, 1, 2),
        dtype=torch.float32,
        flat=False,
        on_host=False,
        reward_weights=(1.0, 0.5),
        scale=scale,
        baseline=baseline,
        unbiased=unbiased,
        eps=1e-4,
        combine=combine,
    )
    check_groups(groups)
    wide = replace(groups, backend="torch", dtype=torch.float64).run()
    for got, exact in zip(groups.run(), wide, strict=True):
        np.testing.assert_allclose(got, exact, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "scale"), [([70], "batch"), ([35, 0, 35], "group"), ([1] * 66 + [4], "none")]
)
def test_groups_larger_than_a_block(sizes: list[int], scale: Any) -> None:
    rewards = torch.randn(70)
    ours = group_advantages(rewards.to(DEVICE), sizes, scale=scale, backend="triton")
    exact = group_advantages(rewards.double(), sizes, scale=scale, backend="torch")
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    "test",
    [
        test_arguments.test_broken_values_that_may_not_be_looked_at,
        test_arguments.test_masked_rows_may_have_any_temperature,
        test_arguments.test_group_sizes_that_may_not_be_looked_at,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_as_in_pytorch(test: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERL_BACKEND", "triton")
    with torch.device(DEVICE):
        test(monkeypatch)
