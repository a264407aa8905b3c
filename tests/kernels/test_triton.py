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
from torch import Tensor

from perl_kernels import (
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    policy_loss,
    token_logprobs,
)
from perl_kernels.grouping import Baseline, Combine
from perl_kernels.grouping import Scale as RewardScale
from perl_kernels.objective import KL, Aggregation, Correction, Ratio
from tests.kernels import test_arguments
from tests.kernels.naive import Problem
from tests.kernels.test_edges import bad_copy
from tests.kernels.test_fuzz import Case, Groups, NearThreshold, check, check_groups
from tests.kernels.test_losses import PRESETS, preset

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


def narrow(problem: Problem) -> dict[str, Tensor]:
    """What `linear_grpo_loss` takes, in fp32."""
    given = {
        "hidden": problem.hidden,
        "weight": problem.weight,
        "targets": problem.targets,
        **problem.loss_arguments(),
    }
    return {
        name: (x.float() if x.is_floating_point() else x).to(DEVICE) for name, x in given.items()
    }


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("hidden", value) for value in BAD),
        *(("weight", math.nan), ("advantages", -math.inf), ("old_logprobs", math.inf)),
        *(("ref_logprobs", -math.inf), ("rollout_logprobs", math.nan)),
    ],
)
def test_broken_input_is_a_nan_loss(argument: str, value: float) -> None:
    given: dict[str, Any] = {**narrow(Problem.make((3, 1, 0, 4))), "weights": None}
    given[argument] = bad_copy(given[argument], value)
    for name, correction in (("perl", "token_mask"), ("gspo", "sequence_truncate")):
        loss = PolicyLoss.preset(name, correction=correction, kl="k3", kl_coef=0.1)
        broken = {}
        for backend in ("triton", "torch"):
            hidden = given["hidden"].clone().requires_grad_()
            output = linear_grpo_loss(**{**given, "hidden": hidden}, loss=loss, backend=backend)
            assert output.loss.isnan()
            broken[backend] = int(output.metrics["invalid_rows"])
        assert broken["triton"] == broken["torch"] > 0


@pytest.mark.parametrize("value", BAD)
def test_broken_logits_and_logprobs(value: float) -> None:
    problem = narrow(Problem.make((3, 1, 0, 4)))
    common = {name: problem[name] for name in ("advantages", "cu_seqlens")}
    logits = bad_copy(torch.randn(8, 13, device=DEVICE), value)
    found = {}
    for backend in ("triton", "torch"):
        loss, targets = PolicyLoss.preset("grpo"), problem["targets"]
        output = grpo_loss(logits, targets, loss=loss, **common, backend=backend)
        assert output.loss.isnan()
        seen = token_logprobs(logits, targets, backend=backend)
        assert seen.logprobs[0].isnan() and seen.logprobs[1:].isfinite().all()
        given = bad_copy(problem["old_logprobs"], value)
        split = policy_loss(given, entropy=given, loss=loss, **common, backend=backend)
        assert split.loss.isnan()
        found[backend] = [int(x.metrics["invalid_rows"]) for x in (output, split)]
    assert found["triton"] == found["torch"] == [1, 1]


@pytest.mark.parametrize("name", ["perl", "gspo", "gmpo", "vespo"])
def test_masked_rows_are_not_looked_at(name: str) -> None:
    given = narrow(Problem.make((3, 1, 0, 5)))
    loss = PolicyLoss.preset(name, kl="k3", kl_coef=0.1, entropy_coef=0.1)
    masked = given["weights"] == 0
    results = []
    for filler in (0.5, math.nan, math.inf):
        dirty = {
            key: value.masked_fill(masked, filler) if key.endswith("_logprobs") else value
            for key, value in given.items()
        }
        dirty["hidden"] = given["hidden"].masked_fill(masked[:, None], filler).requires_grad_()
        dirty["weight"] = given["weight"].clone().requires_grad_()
        output = linear_grpo_loss(**dirty, loss=loss, backend="triton")
        gradients = torch.autograd.grad(output.loss, (dirty["hidden"], dirty["weight"]))
        assert (gradients[0][masked] == 0).all() and output.metrics["invalid_rows"] == 0
        results.append((output.loss.detach(), *gradients))
    for other in results[1:]:
        # A product may take another order of summation from call to call, on a GPU.
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=["no-completion", "empty"])
@pytest.mark.parametrize("name", ["perl", "grpo", "gspo", "luspo", "gmpo", "vespo"])
def test_nothing_to_score(name: str, bounds: list[int]) -> None:
    weight = torch.randn(7, 4, device=DEVICE, requires_grad=True)
    hidden = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    empty = torch.zeros(0, device=DEVICE)
    for old in (None, empty):
        output = linear_grpo_loss(
            hidden,
            weight,
            empty.long(),
            torch.ones(len(bounds) - 1, device=DEVICE),
            torch.tensor(bounds, dtype=torch.int32),
            PolicyLoss.preset(name),
            old_logprobs=old,
            ref_logprobs=empty,
            backend="triton",
        )
        assert output.loss == 0 and output.metrics["tokens"] == 0
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        assert all((gradient == 0).all() for gradient in gradients)
        assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("name", ["perl", "grpo", "luspo", "gspo", "gmpo", "vespo"])
def test_all_tokens_masked(name: str) -> None:
    given = narrow(Problem.make((3, 1, 0, 4)))
    given["weights"] = torch.zeros(8, device=DEVICE)
    leaves = [given[key].requires_grad_() for key in ("hidden", "weight")]
    for old in (given["old_logprobs"], None):
        given["old_logprobs"] = old  # type: ignore[assignment]
        output = linear_grpo_loss(**given, loss=PolicyLoss.preset(name), backend="triton")
        gradients = torch.autograd.grad(output.loss, leaves)
        assert output.loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("vocab", [5, 8197])
def test_logits_far_below_zero(vocab: int) -> None:
    """A log-sum-exp that started at 0 would lose rows whose logits are all very negative."""
    logits = torch.full((2, vocab), -1e4, device=DEVICE)
    targets = torch.tensor([0, vocab - 1], device=DEVICE)
    seen = token_logprobs(logits, targets, backend="triton")
    wanted = torch.full((2,), math.log(vocab))
    torch.testing.assert_close(-seen.logprobs.cpu(), wanted)
    torch.testing.assert_close(seen.entropy.cpu(), wanted)
