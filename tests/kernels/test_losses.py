"""Every objective against the formulas written out token by token, values and gradients, fp64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    reference,
)
from perl_kernels.objective import KL, Aggregation, Correction
from tests.kernels.call import BACKENDS, DEVICE
from tests.kernels.naive import Problem, naive_logprobs, naive_loss
from tests.kernels.test_objective import PRESETS

COMPILED = [name for name in BACKENDS if name != "torch"]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def preset(name: str, **overrides: Any) -> PolicyLoss:
    if name == "dr_grpo":
        overrides.setdefault("max_completion_length", 9)
    if name.startswith(("gspo", "luspo")):
        # Wide enough for both sides of the clip to occur in a random batch.
        overrides = {"clip_low": 0.1, "clip_high": 0.15, **overrides}
    return PolicyLoss.preset(name, **overrides)


def check(
    loss: PolicyLoss,
    problem: Problem,
    *,
    old: bool = True,
    others: Iterable[str] = (),
    **options: Any,
) -> None:
    """The three entry points against the formulas, values and gradients: in fp64, and in fp32, within
    its rounding of a few hundred terms, on `others`."""
    arguments = {**problem.loss_arguments(old=old), **options}
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    logprobs, entropy = naive_logprobs(*leaves[:2], problem.targets, leaves[2])
    truth = naive_loss(loss, logprobs, entropy, **arguments)
    gradients = torch.autograd.grad(truth, leaves)
    for backend in ("torch", *others):
        dtype, close, per_scale = torch.float64, EXACT, 0.0
        if backend != "torch":
            dtype, close, per_scale = torch.float32, {"rtol": 1e-4, "atol": 1e-5}, 1e-5

        def given(x: Any, dtype: torch.dtype = dtype) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)

        mine = [given(x.detach()).requires_grad_() for x in leaves]
        hidden, weight, bias = mine
        targets, chosen = given(problem.targets), {"backend": backend}
        common = {name: given(x) for name, x in arguments.items()}
        common |= {"loss": loss, **chosen}
        fused = linear_grpo_loss(hidden, weight, targets, bias=bias, chunk_size=4, **common)
        from_logits = grpo_loss(hidden @ weight.T + bias, targets, **common)
        seen = linear_token_logprobs(hidden, weight, targets, bias=bias, **chosen)
        split = policy_loss(seen.logprobs, entropy=seen.entropy, **common)
        for output in (fused, from_logits, split):
            values = (output.loss, output.logprobs, output.entropy)
            for got, wanted in zip(values, (truth, logprobs, entropy), strict=True):
                torch.testing.assert_close(got.cpu().double(), wanted.double(), **close)
            for got, wanted in zip(torch.autograd.grad(output.loss, mine), gradients, strict=True):
                atol = max(close["atol"], per_scale * float(wanted.abs().max()))
                torch.testing.assert_close(
                    got.cpu().double(), wanted, rtol=close["rtol"], atol=atol
                )


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str, old: bool) -> None:
    check(preset(name), Problem.make(), old=old)


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_with_kl_entropy_and_token_advantages(name: str, old: bool) -> None:
    loss = preset(name, kl="k3", kl_coef=0.1, entropy_coef=0.02)
    check(loss, Problem.make(seed=1).token_level(), old=old, others=COMPILED)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("normalizer", [None, 11.0])
def test_aggregation(aggregation: str, name: str, normalizer: float | None) -> None:
    loss = preset(name, aggregation=aggregation, max_completion_length=9)
    check(loss, Problem.make(seed=2), others=COMPILED, normalizer=normalizer)
    if normalizer is None:
        check(loss, Problem.make(seed=2), old=False, weights=None)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("kl", get_args(KL))
def test_kl(kl: str, bias_correction: bool) -> None:
    for name, old in (("grpo", True), ("gspo", True), ("gspo", False), ("gspo_token", True)):
        loss = preset(name, kl=kl, kl_coef=0.3, kl_bias_correction=bias_correction)
        check(loss, Problem.make(seed=3), old=old, others=COMPILED if name == "gspo" else ())


@pytest.mark.parametrize(
    ("kl", "backend"),
    [*((kl, "torch") for kl in get_args(KL)), ("abs", "triton"), ("k3", "triton")],
)
def test_kl_by_distance(kl: str, backend: Any) -> None:
    """To the last digits of fp32 and fp64, also where exp(d) - 1 - d would lose them; k3 is bounded at 20."""
    loss = PolicyLoss(surrogate="reinforce", kl=kl, kl_coef=1.0)  # type: ignore[arg-type]
    bounds, distances = torch.tensor([0, 1], dtype=torch.int32), (0.0, 2.0**-12, 0.375, 0.625, 25.0)
    dtypes = [torch.float32] if backend == "triton" else [torch.float32, torch.float64]
    signed = [sign * d for d in distances for sign in (1, -1)]
    for d, dtype in itertools.product(signed, dtypes):
        ref = torch.tensor([-32.0], dtype=dtype)
        inside = max(-20.0, min(d, 20.0))
        k3, k3_slope = math.expm1(inside) - inside, -math.expm1(inside) * (d == inside)
        if abs(d) < 1:
            k3 = sum(d**n / math.factorial(n) for n in range(20, 1, -1))
        value, slope = {
            "k1": (-d, 1.0),
            "k1+": (-d, -d),
            "abs": (abs(d), -math.copysign(1.0, d) if d else 0.0),
            "k2": (d * d / 2, -d),
            "k3": (k3, k3_slope),
            "k3+": (k3, -d),
        }[kl]
        logprobs = (ref - d).requires_grad_()
        given = {"ref_logprobs": ref, "backend": backend}
        output = policy_loss(logprobs, torch.zeros(1), bounds, loss, **given)
        (gradient,) = torch.autograd.grad(output.loss, logprobs)
        found = torch.stack([output.loss.detach(), output.metrics["kl"], gradient[0]])
        wanted = torch.tensor([value, value, slope], dtype=dtype)
        rtol = 2e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_ratio(surrogate: str, ratio: str) -> None:
    loss = PolicyLoss(surrogate=surrogate, ratio=ratio, clip_low=0.1, clip_high=0.1)  # type: ignore[arg-type]
    for old in (True, False):
        others = COMPILED if old else ()
        check(loss, Problem.make(seed=4).token_level(), old=old, others=others)


@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize("name", ["perl", "gspo", "cispo", "sapo", "vespo", "gmpo", "dppo_tv"])
def test_correction(name: str, correction: str) -> None:
    loss = preset(name, correction=correction, correction_low=0.8, correction_high=1.3)
    loss = replace(loss, kl="k3", kl_coef=0.1)
    rare = name in ("perl", "gspo", "vespo", "gmpo")
    check(loss, Problem.make(seed=5), others=COMPILED if rare else ())
    if rare:
        check(loss, Problem.make(seed=5), old=False)


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_cap_of_the_ratio(name: str) -> None:
    check(
        preset(name, clip_low=0.9, clip_high=0.9, dppo_ratio_cap=1.05),
        Problem.make(seed=6),
        others=COMPILED,
    )


@pytest.mark.parametrize("bound", [{"dual_clip": 1.3}, {"delta": 1.5}])
def test_bounds_of_the_ratio_of_negative_advantages(bound: dict[str, float]) -> None:
    problem = Problem.make(seed=6)
    problem = replace(problem, advantages=-problem.advantages.abs() - 0.1)
    check(PolicyLoss(**bound), problem, others=COMPILED)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_packed_equals_one_completion_at_a_time(name: str) -> None:
    problem = Problem.make(seed=8)
    loss = preset(name, aggregation="seq-mean-token-sum")
    arguments = problem.loss_arguments()
    whole = policy_loss(problem.ref_logprobs + 0.1, loss=loss, **arguments)
    parts = []
    bounds = problem.cu_seqlens.tolist()
    for b, (start, stop) in enumerate(pairwise(bounds)):
        one = {
            key: value[start:stop]
            for key, value in arguments.items()
            if key not in ("advantages", "cu_seqlens")
        }
        one["advantages"] = problem.advantages[b : b + 1]
        one["cu_seqlens"] = torch.tensor([0, stop - start], dtype=torch.int32)
        parts.append(policy_loss(problem.ref_logprobs[start:stop] + 0.1, loss=loss, **one).loss)
    torch.testing.assert_close(whole.loss, torch.stack(parts).mean(), **EXACT)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_micro_batches_with_a_normalizer_are_one_batch(aggregation: str) -> None:
    problem = Problem.make(seed=9)
    loss = PolicyLoss(aggregation=aggregation, max_completion_length=9)  # type: ignore[arg-type]
    hidden = problem.hidden.clone().requires_grad_()
    arguments = problem.loss_arguments()
    whole = linear_grpo_loss(hidden, problem.weight, problem.targets, loss=loss, **arguments)
    (wanted,) = torch.autograd.grad(whole.loss, hidden)

    bounds = problem.cu_seqlens
    sequences = 4 if aggregation == "seq-mean-token-mean" else 5
    normalizer = problem.weights.sum() if aggregation == "token-mean" else torch.tensor(sequences)
    total = torch.zeros((), dtype=torch.float64)
    for first, last in ((0, 2), (2, 5)):
        tokens = slice(int(bounds[first]), int(bounds[last]))
        micro = {
            key: value[tokens]
            for key, value in arguments.items()
            if key not in ("advantages", "cu_seqlens")
        }
        output = linear_grpo_loss(
            hidden[tokens],
            problem.weight,
            problem.targets[tokens],
            problem.advantages[first:last],
            bounds[first : last + 1] - bounds[first],
            loss,
            normalizer=normalizer,
            **micro,
        )
        output.loss.backward()
        total += output.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach(), **EXACT)
    torch.testing.assert_close(hidden.grad, wanted, **EXACT)


def test_metrics() -> None:
    logprobs = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.9]))
    old = torch.log(torch.tensor([0.25, 0.5, 0.9, 0.1]))
    ref = logprobs - 1.0
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0])
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    loss = PolicyLoss(kl="k1", kl_coef=0.1)
    metrics = policy_loss(
        logprobs,
        advantages,
        bounds,
        loss,
        old_logprobs=old,
        ref_logprobs=ref,
        rollout_logprobs=old + 0.5,
        weights=weights,
        entropy=torch.tensor([1.0, 2.0, 3.0, 100.0]),
    ).metrics
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    got = {name: round(float(value), 4) for name, value in metrics.items()}
    assert got == {
        "kl": 1.0,
        "entropy": 2.0,
        "clip_fraction": 0.6667,
        "clip_fraction_low": 0.3333,
        "clip_fraction_high": 0.3333,
        "dual_clip_fraction": 0.0,
        "ratio_mean": round((2 + 1 + 5 / 9) / 3, 4),
        "ratio_max": 2.0,
        "rollout_kl": 0.5,
        "correction_mean": 1.0,
        "tokens": 3,
        "invalid_rows": 0,
    }


@pytest.mark.parametrize(
    ("surrogate", "low", "high"),
    [
        # Nothing to gain: no side is clipped for it; gmpo counts it as gaining, dppo as not.
        *(("clip", 0.0, 0.0), ("cispo", 0.0, 0.0), ("gmpo", 0.0, 0.5)),
        *(("dppo_tv", 0.5, 0.0), ("dppo_kl", 0.5, 0.0)),
    ],
)
def test_clipped_without_an_advantage(surrogate: Any, low: float, high: float) -> None:
    """Two tokens whose advantage is 0: one has become much likelier, the other less."""
    old, new = torch.tensor([-2.0, -0.1]), torch.tensor([-0.1, -2.0])
    given = (new, torch.zeros(1), torch.tensor([0, 2], dtype=torch.int32))
    loss = PolicyLoss(surrogate=surrogate)
    functions = [reference.policy_loss]
    functions += [functools.partial(policy_loss, backend=x) for x in BACKENDS]
    for function in functions:
        output = function(*given, loss, old_logprobs=old)
        names = ("clip_fraction_low", "clip_fraction_high", "clip_fraction")
        assert [output.metrics[name].item() for name in names] == [low, high, low + high]
        assert output.loss == 0


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_as_many_tokens_as_completions_in_a_block(chunk_size: int) -> None:
    """An advantage per token stays one, where the tokens of a block are as many as its completions."""
    problem = Problem.make((0, 2, 0, 1, 1, 1, 0, 4)).token_level()
    loss = PolicyLoss(ratio="sequence", clip_low=0.1, clip_high=0.1)
    results = []
    for size in (chunk_size, 100):
        hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
        output = linear_grpo_loss(
            hidden, weight, problem.targets, loss=loss, chunk_size=size, **problem.loss_arguments()
        )
        results.append((output.loss, *torch.autograd.grad(output.loss, (hidden, weight))))
    torch.testing.assert_close(*results, **EXACT)
