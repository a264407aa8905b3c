"""Padding, broken inputs, nothing to score, and extreme values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_kernels import PolicyLoss, linear_grpo_loss, policy_loss, token_logprobs
from tests.kernels.naive import Problem
from tests.messages import refused

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def test_masked_rows_are_not_looked_at() -> None:
    problem = Problem.make()
    arguments = problem.loss_arguments()
    masked = problem.weights == 0
    for name in ("perl", "gspo", "gmpo", "vespo"):
        loss = PolicyLoss.preset(name, kl="k3", kl_coef=0.1, entropy_coef=0.1)
        results = []
        for filler in (0.5, float("nan"), float("inf")):
            dirty = {
                key: value.masked_fill(masked, filler) if key.endswith("_logprobs") else value
                for key, value in arguments.items()
            }
            hidden = problem.hidden.masked_fill(masked[:, None], filler).requires_grad_()
            weight = problem.weight.clone().requires_grad_()
            output = linear_grpo_loss(hidden, weight, problem.targets, loss=loss, **dirty)
            gradients = torch.autograd.grad(output.loss, (hidden, weight))
            assert (gradients[0][masked] == 0).all()
            results.append((output.loss, *gradients))
            assert output.metrics["invalid_rows"] == 0
        torch.testing.assert_close(results[0], results[1], **EXACT)
        torch.testing.assert_close(results[0], results[2], **EXACT)


def bad_copy(tensor: Tensor, value: float) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[1] = value
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "argument",
    ["hidden", "weight", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages"],
)
def test_broken_input_is_a_nan_loss(argument: str, value: float) -> None:
    problem = Problem.make()
    loss = PolicyLoss.preset("perl", correction="token_mask")
    given = {
        "hidden": problem.hidden,
        "weight": problem.weight,
        **problem.loss_arguments(),
        "weights": None,
    }
    given[argument] = bad_copy(given[argument], value)
    output = linear_grpo_loss(targets=problem.targets, loss=loss, **given)
    assert output.loss.isnan()
    assert output.metrics["invalid_rows"] > 0
    given["hidden"] = given["hidden"].clone().requires_grad_()
    assert linear_grpo_loss(targets=problem.targets, loss=loss, **given).loss.isnan()


def test_nothing_to_score() -> None:
    weight = torch.randn(7, 4, requires_grad=True)
    hidden = torch.empty(0, 4, requires_grad=True)
    targets, empty = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for bounds in ([0], [0, 0, 0]):
        advantages = torch.ones(len(bounds) - 1)
        for name in ("perl", "grpo", "gspo", "luspo", "gmpo", "vespo"):
            for old in (None, empty):
                output = linear_grpo_loss(
                    hidden,
                    weight,
                    targets,
                    advantages,
                    torch.tensor(bounds, dtype=torch.int32),
                    PolicyLoss.preset(name),
                    old_logprobs=old,
                    ref_logprobs=empty,
                )
                assert output.loss == 0 and output.metrics["tokens"] == 0
                gradients = torch.autograd.grad(output.loss, (hidden, weight))
                assert all((gradient == 0).all() for gradient in gradients)
                assert all(value.isfinite() for value in output.metrics.values())
    assert token_logprobs(torch.empty(0, 7), targets).logprobs.shape == (0,)


@pytest.mark.parametrize("name", ["perl", "grpo", "luspo", "gspo"])
def test_all_tokens_masked(name: str) -> None:
    problem = Problem.make()
    hidden, weight = (
        problem.hidden.clone().requires_grad_(),
        problem.weight.clone().requires_grad_(),
    )
    arguments = {**problem.loss_arguments(), "weights": torch.zeros(16)}
    loss = PolicyLoss.preset(name)
    output = linear_grpo_loss(hidden, weight, problem.targets, loss=loss, **arguments)
    gradients = torch.autograd.grad(output.loss, (hidden, weight))
    assert output.loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shift", [500.0, -500.0])
@pytest.mark.parametrize("name", ["clip", "sequence", "cispo", "sapo", "gmpo", "dppo_kl"])
def test_log_ratios_beyond_their_bound(name: str, shift: float, backend: str) -> None:
    """They count as +-20 in the value, and have no slope there."""
    lp, tau = math.log(0.5), 1.0
    r = math.exp(math.copysign(20.0, shift))
    clipped = min(r, 1.2)
    # the factor of -A in the loss, and in its derivative by the log-prob; A = 1
    value, slope = {
        "clip": (clipped, 0.0),
        "sequence": (clipped, 0.0),
        "cispo": (lp * max(clipped, 0.8), max(clipped, 0.8)),
        "sapo": (4 / tau / (1 + math.exp(-tau * (r - 1))), 0.0),
        # gmpo bounds the log-ratio itself by 0.4 where the advantage gains
        "gmpo": (math.exp(0.4) if shift > 0 else r, 0.0),
        # a divergence upwards is refused, one downwards is taken with the ratio
        "dppo_kl": (0.0, 0.0) if shift > 0 else (lp * r, r),
    }[name]  # fmt: skip
    axes: Any = {"ratio": name} if name == "sequence" else {"surrogate": name}
    loss = PolicyLoss(**axes, clip_high=0.4 if name == "gmpo" else 0.2)
    logprobs = torch.tensor([lp], requires_grad=True)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    given = (torch.ones(1), bounds, loss)
    output = policy_loss(logprobs, *given, old_logprobs=torch.tensor([lp - shift]), backend=backend)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    found = torch.stack([output.loss.detach(), gradient[0], output.metrics["ratio_max"]])
    torch.testing.assert_close(found, torch.tensor([-value, -slope, r]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("log_ratios", "correction", "log_weight"),
    [
        ((0.5, 0.25), None, 0.75),
        # each in +-20, then the sum, and not below log 1e-8
        ((30.0, -15.0), None, 5.0),
        ((15.0, 15.0), None, 20.0),
        ((-15.0, -15.0), None, math.log(1e-8)),
        # 0.25 is what the trainer's old policy has more than the engine, on both tokens
        ((0.5, 0.25), "token_mask", 1.25),
        ((0.5, 0.25), "sequence_mask", 1.25),
        # dropped, that is a weight of 1e-8 for each token
        ((20.0, 20.0), "token_truncate", 20.0),
        ((19.0, 1.0), "token_drop", 20.0 + 2 * math.log(1e-8)),
        ((19.0, 1.0), "sequence_drop", 20.0 + math.log(1e-8)),
    ],
)
def test_weight_of_a_vespo_sequence(
    log_ratios: tuple[float, ...], correction: str | None, log_weight: float, backend: Any
) -> None:
    """-exp(lam + k log w - lam w) A lp, where w is bounded; small k and lam leave something at the bounds."""
    axes: dict[str, Any] = {"correction": correction, "correction_high": 2.0}
    if correction and correction.endswith("drop"):
        axes = {"correction": correction.replace("drop", "mask"), "correction_high": 1.0}
    loss = PolicyLoss(
        surrogate="vespo",
        vespo_k_pos=0.125,
        vespo_lambda_pos=1e-9,
        vespo_k_neg=0.25,
        vespo_lambda_neg=2e-9,
        **axes,
    )
    old = torch.tensor([-2.0, -1.0])
    for advantage, k, lam in ((1.0, 0.125, 1e-9), (-1.0, 0.25, 2e-9)):
        logprobs = (old + torch.tensor(log_ratios)).requires_grad_()
        output = policy_loss(
            logprobs,
            torch.tensor([advantage]),
            torch.tensor([0, 2], dtype=torch.int32),
            loss,
            old_logprobs=old,
            rollout_logprobs=old - 0.25,
            backend=backend,
        )
        phi = math.exp(lam + k * log_weight - lam * math.exp(log_weight))
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
        value = -phi * advantage * float(logprobs.detach().mean())
        torch.testing.assert_close(output.loss, torch.tensor(value), rtol=1e-5, atol=0)
        wanted = torch.full((2,), -phi * advantage / 2)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=0)


def test_logits_far_below_zero_and_long_rows() -> None:
    """A log-sum-exp that started at 0 would lose rows whose logits are all very negative."""
    logits = torch.full((2, 5), -1e4)
    targets = torch.tensor([0, 4])
    seen = token_logprobs(logits, targets)
    torch.testing.assert_close(seen.logprobs, torch.full((2,), 0.2).log())
    bounds = torch.tensor([0, 100_000, 100_001], dtype=torch.int32)
    logprobs = torch.full((100_001,), -1.0)
    output = policy_loss(
        logprobs, torch.ones(2), bounds, PolicyLoss.preset("gspo"), old_logprobs=logprobs
    )
    torch.testing.assert_close(output.loss, torch.tensor(-1.0))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_is_not_lost_in_a_long_completion(backend: str) -> None:
    """Neither in the largest ratio, nor in the gradient of what shares a ratio with it."""
    old = -torch.rand(2100)
    logprobs = old.clone()
    logprobs[5] = torch.nan
    bounds = torch.tensor([0, 2100], dtype=torch.int32)
    for name in ("dapo", "gmpo", "gspo"):
        leaf = logprobs.clone().requires_grad_()
        output = policy_loss(
            leaf,
            torch.ones(1),
            bounds,
            PolicyLoss.preset(name),
            old_logprobs=old,
            backend=backend,  # type: ignore[arg-type]
        )
        assert output.loss.isnan() and output.metrics["ratio_max"].isnan()
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        assert gradient.isnan().all() if name != "dapo" else gradient.isnan().any()


def test_an_engine_that_rounds_log_probs_above_zero() -> None:
    loss = PolicyLoss.preset("dppo_kl")
    new = torch.tensor([-1.0, -1.0])
    given = (torch.tensor([-1.0]), torch.tensor([0, 2], dtype=torch.int32), loss)
    seen = policy_loss(new, *given, old_logprobs=torch.tensor([1e-7, 0.0]))
    assert seen.loss.isfinite() and seen.metrics["clip_fraction"] == 1


def test_an_empty_vocabulary() -> None:
    with refused("targets", "V = 0", error=ValueError):
        token_logprobs(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64))
