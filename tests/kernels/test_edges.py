"""Padding, broken inputs, nothing to score, and extreme values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from tests.kernels.call import BACKENDS, DEVICE
from tests.kernels.naive import Problem
from tests.messages import refused

BAD = [math.nan, math.inf, -math.inf]
PRESETS = ["perl", "grpo", "gspo", "luspo", "gmpo", "vespo"]

backends = pytest.mark.parametrize("backend", BACKENDS)


def given_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What `linear_grpo_loss` takes."""
    problem = Problem.make(lengths)
    given = {"hidden": problem.hidden, "weight": problem.weight, "targets": problem.targets}
    return {
        name: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)
        for name, x in {**given, **problem.loss_arguments()}.items()
    }


@backends
@pytest.mark.parametrize("name", ["perl", "gspo", "gmpo", "vespo"])
def test_masked_rows_are_not_looked_at(name: str, backend: Any) -> None:
    # A product of fp32 may take another order of summation from call to call, on a GPU.
    dtype, rtol, atol = torch.float32, 1e-5, 1e-6
    if backend == "torch":
        dtype, rtol, atol = torch.float64, 1e-10, 1e-12
    given = given_of((3, 1, 0, 5), dtype)
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
        output = linear_grpo_loss(**dirty, loss=loss, backend=backend)
        gradients = torch.autograd.grad(output.loss, (dirty["hidden"], dirty["weight"]))
        assert (gradients[0][masked] == 0).all() and output.metrics["invalid_rows"] == 0
        results.append((output.loss.detach(), *gradients))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=rtol, atol=atol)


def bad_copy(tensor: Tensor, value: float) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[1] = value
    return copy


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "argument",
    ["hidden", "weight", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages"],
)
def test_broken_input_is_a_nan_loss(argument: str, value: float) -> None:
    """All backends count the same rows, with a gradient and without."""
    given = {**given_of((3, 1, 0, 4)), "weights": None}
    given[argument] = bad_copy(given[argument], value)
    for name, correction in (("perl", "token_mask"), ("gspo", "sequence_truncate")):
        loss = PolicyLoss.preset(name, correction=correction, kl="k3", kl_coef=0.1)
        broken = set()
        for backend, differentiated in [("torch", False), *((name, True) for name in BACKENDS)]:
            hidden = given["hidden"].clone().requires_grad_(differentiated)
            output = linear_grpo_loss(**{**given, "hidden": hidden}, loss=loss, backend=backend)  # type: ignore[arg-type]
            assert output.loss.isnan()
            broken.add(int(output.metrics["invalid_rows"]))
        assert len(broken) == 1 and min(broken) > 0


@backends
@pytest.mark.parametrize("value", BAD)
def test_broken_logits_and_logprobs(value: float, backend: Any) -> None:
    given = given_of((3, 1, 0, 4))
    common: dict[str, Any] = {name: given[name] for name in ("advantages", "cu_seqlens")}
    logits, targets = torch.randn(8, 13, device=DEVICE), given["targets"]
    # A score of -inf is a probability of 0, which matters to the target alone.
    logits[0, targets[0] if value < 0 else (targets[0] + 1) % 13] = value
    loss, chosen = PolicyLoss.preset("grpo"), {"backend": backend}
    broken = bad_copy(given["old_logprobs"], value)
    output = grpo_loss(logits, targets, loss=loss, **common, **chosen)
    seen = token_logprobs(logits, targets, **chosen)
    assert not seen.logprobs[0].isfinite() and seen.logprobs[1:].isfinite().all()
    assert seen.entropy[0].isnan() == (value != -math.inf)
    split = policy_loss(broken, entropy=broken, loss=loss, **common, **chosen)
    for found in (output, split):
        assert found.loss.isnan() and found.metrics["invalid_rows"] == 1


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floor", ["-inf", "finfo.min"])
@pytest.mark.parametrize(
    ("vocab", "kept"),
    [(13, slice(0, None, 2)), (8230, slice(8200, None))],
    ids=["every-other", "last"],
)
def test_columns_of_probability_zero(
    vocab: int, kept: slice, floor: str, dtype: torch.dtype, backend: Any
) -> None:
    """As if they were not there, also where whole blocks of a row are; and their gradient is 0."""
    count = 2
    logits = torch.full((count, vocab), -torch.inf, device=DEVICE)
    if floor == "finfo.min":
        # Divided by a temperature below 1, it is beyond what fp32 holds.
        logits[:] = torch.finfo(dtype).min
    logits[:, kept] = torch.randn(count, vocab, device=DEVICE)[:, kept]
    columns = torch.arange(vocab, device=DEVICE)[kept]
    targets = torch.tensor([0, len(columns) - 1], device=DEVICE)
    given = (torch.tensor([1.0, -1.0], device=DEVICE), torch.arange(count + 1))
    loss = PolicyLoss(entropy_coef=0.1)

    def results(logits: Tensor, targets: Tensor, inplace: bool = False) -> list[Tensor]:
        chosen: Any = {"temperature": 0.7, "backend": backend}
        leaf = logits.to(dtype, copy=True).requires_grad_()
        seen = token_logprobs(leaf, targets, **chosen)
        (first,) = torch.autograd.grad((seen.logprobs + 0.3 * seen.entropy).sum(), leaf)
        output = grpo_loss(leaf, targets, *given, loss, inplace=inplace, **chosen)
        (second,) = torch.autograd.grad(output.loss, leaf)
        assert output.metrics["invalid_rows"] == 0
        return [*seen, output.loss, first, second]

    wanted = results(logits[:, kept], targets)
    for inplace in (False, True):
        *values, first, second = results(logits, columns[targets], inplace)
        for gradient in (first, second):
            assert gradient.sum(1).abs().max() < 1e-2
            assert (gradient.index_fill(1, columns, 0.0) == 0).all()
        got = [*values, first[:, kept], second[:, kept]]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@backends
@pytest.mark.parametrize("how", ["bias", "padded head"])
def test_head_with_columns_of_probability_zero(how: str, backend: Any) -> None:
    """A mask in the bias, and rows that a head has been padded with: gradients of 0."""
    given, vocab = given_of((3, 1, 0, 5)), 13
    padding = torch.tensor([2, 7, 11, 12], device=DEVICE)
    bias = torch.randn(vocab, device=DEVICE)
    kept = torch.ones(vocab, dtype=torch.bool, device=DEVICE).index_fill(0, padding, False)
    given["targets"] = kept.nonzero()[:, 0][given["targets"] % len(kept.nonzero())]
    inside = kept.cumsum(0)[given["targets"]] - 1
    loss = PolicyLoss.preset("perl", entropy_coef=0.1)

    def results(weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (given["hidden"], weight, bias)]
        changed = {**given, "hidden": leaves[0], "weight": leaves[1], "targets": targets}
        options: Any = {"bias": leaves[2], "temperature": 0.7, "backend": backend}
        output = linear_grpo_loss(**changed, loss=loss, chunk_size=4, **options)
        assert output.metrics["invalid_rows"] == 0
        seen = linear_token_logprobs(*leaves[:2], targets, **options)
        total = output.loss + seen.logprobs.sum() + seen.entropy.sum()
        return [output.loss, *seen, *torch.autograd.grad(total, leaves)]

    wanted = results(given["weight"][kept], bias[kept], inside)
    weight = given["weight"].clone()
    if how == "padded head":
        weight[padding] = 0.0
    got = results(weight, bias.masked_fill(~kept, -torch.inf), given["targets"])
    for gradient in got[-2:]:
        assert (gradient[padding] == 0).all()
    got[-2:] = [gradient[kept] for gradient in got[-2:]]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=["no-completion", "empty"])
@pytest.mark.parametrize("name", PRESETS)
def test_nothing_to_score(name: str, bounds: list[int], backend: Any) -> None:
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
            backend=backend,
        )
        assert output.loss == 0 and output.metrics["tokens"] == 0
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        assert all((gradient == 0).all() for gradient in gradients)
        assert all(value.isfinite() for value in output.metrics.values())
    logits = torch.zeros(0, 7, device=DEVICE)
    assert token_logprobs(logits, empty.long(), backend=backend).logprobs.shape == (0,)


@backends
@pytest.mark.parametrize("name", PRESETS)
def test_all_tokens_masked(name: str, backend: Any) -> None:
    given = given_of((3, 1, 0, 4))
    given["weights"] = torch.zeros(8, device=DEVICE)
    leaves = [given[key].requires_grad_() for key in ("hidden", "weight")]
    for old in (given["old_logprobs"], None):
        given["old_logprobs"] = old
        output = linear_grpo_loss(**given, loss=PolicyLoss.preset(name), backend=backend)
        gradients = torch.autograd.grad(output.loss, leaves)
        assert output.loss == 0 and all((gradient == 0).all() for gradient in gradients)


@backends
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


@backends
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


@backends
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
