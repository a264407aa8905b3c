"""What is lost in fp32, bf16 and fp16: no more than PyTorch loses, and nothing overflows or vanishes."""

from __future__ import annotations

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
    reference,
)
from tests.kernels.call import BACKENDS, DEVICE
from tests.kernels.naive import Problem
from tests.kernels.test_logprobs import leaves_of
from tests.messages import refused

LOSSES = {
    "perl": PolicyLoss.preset("perl", entropy_coef=0.01),
    "gspo": PolicyLoss.preset("gspo"),
}
HALF = [name for name in BACKENDS if name != "native"]
"""Those that compute in fp16."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_error_is_that_of_pytorch_in_the_same_dtype(name: str, dtype: torch.dtype) -> None:
    problem = Problem.make((40, 1, 60), vocab=300)
    arguments = {"loss": PolicyLoss.preset(name), **problem.loss_arguments()}

    def run(function: Any, dtype: torch.dtype, **extra: Any) -> list[Tensor]:
        hidden, weight = leaves_of(problem, dtype)
        output = function(hidden, weight, problem.targets, **arguments, **extra)
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        return [x.detach().double() for x in (output.logprobs, output.entropy, *gradients)]

    # Rounding the inputs is not an error of the computation: the truth starts from them rounded.
    problem = Problem(
        **{
            **vars(problem),
            "hidden": problem.hidden.to(dtype).double(),
            "weight": problem.weight.to(dtype).double(),
        }
    )
    truth = run(reference.linear_grpo_loss, torch.float64)
    theirs = run(reference.linear_grpo_loss, dtype)
    ours = run(linear_grpo_loss, dtype, chunk_size=7)
    for got, other, wanted, factor in zip(ours, theirs, truth, (2, 2, 3, 3), strict=True):
        allowed = factor * (other - wanted).abs().max() + 1e-6
        assert (got - wanted).abs().max() <= allowed


@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_autocast(name: str) -> None:
    problem = Problem.make((40, 1, 60), vocab=100)
    arguments = {"loss": PolicyLoss.preset(name), **problem.loss_arguments()}
    hidden, weight = leaves_of(problem, torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    wanted = linear_grpo_loss(half[0], half[1], problem.targets, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear_grpo_loss(hidden, weight, problem.targets, **arguments)
    output.loss.backward()
    wanted.loss.backward()
    assert output.loss.dtype == torch.float32 and weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(output.loss, wanted.loss)
    # The gradient of a weight kept in fp32 is not rounded to bf16 on its way.
    torch.testing.assert_close(weight.grad.bfloat16(), half[1].grad)  # type: ignore[union-attr]
    # Autocast off: operands of two dtypes are a mistake.
    with refused("weight", "torch.float32", "torch.bfloat16", "autocast", error=TypeError):
        linear_grpo_loss(half[0], weight, problem.targets, **arguments)


def test_weight_gradient_is_accumulated_in_fp32() -> None:
    """Many small contributions after a large one, all of which bf16 sums would lose."""
    count = 513
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((count,), 2.0**-9)
    upstream[0] = 1.0
    targets = torch.zeros(count, dtype=torch.int64)
    logprobs = linear_token_logprobs(hidden, weight, targets, chunk_size=1).logprobs
    logprobs.backward(upstream)
    assert weight.grad is not None
    assert weight.grad[0] == 0.5 * (1 + 512 * 2.0**-9)


def test_bias_gradient_is_a_sum_in_fp32() -> None:
    """257 halves are 128.5, of which bf16 leaves 128."""
    hidden, weight = (torch.zeros(n, 1, dtype=torch.bfloat16) for n in (257, 2))
    bias = torch.zeros(2, requires_grad=True)
    targets = torch.zeros(257, dtype=torch.int64)
    linear_token_logprobs(hidden, weight, targets, bias=bias).logprobs.sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [128.5, -128.5]
    bounds = torch.tensor([0, 257], dtype=torch.int32)
    loss = PolicyLoss(surrogate="reinforce", aggregation="seq-mean-token-sum")
    given = (targets, -torch.ones(1), bounds, loss)
    output = linear_grpo_loss(hidden, weight, *given, bias=bias)
    assert torch.autograd.grad(output.loss, bias)[0].tolist() == [128.5, -128.5]


def test_autocast_leaves_fp64_alone() -> None:
    problem = Problem.make()
    leaves = leaves_of(problem)
    arguments = {"loss": PolicyLoss.preset("perl"), **problem.loss_arguments()}
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = linear_grpo_loss(*leaves, problem.targets, **arguments)
        found.append((output.logprobs, *torch.autograd.grad(output.loss, leaves)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_wide_logits(name: str, backend: str) -> None:
    """fp32 logits of bf16 operands: as exact as the product itself, and nothing else changes."""
    problem = Problem.make((9, 1, 12), vocab=100)
    hidden, weight = (
        (8 * x).to(DEVICE, torch.bfloat16).requires_grad_()
        for x in (problem.hidden, problem.weight)
    )
    targets = problem.targets.to(DEVICE)
    truth = linear_token_logprobs(
        hidden.double(), weight.double(), targets, backend="torch"
    ).logprobs
    errors = []
    for dtype in (None, torch.float32):
        given = {"logits_dtype": dtype, "backend": backend, "chunk_size": 10}
        seen = linear_token_logprobs(hidden, weight, targets, **given)
        errors.append(float((seen.logprobs - truth).detach().abs().max()))
        common = {
            name: x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype)
            for name, x in problem.loss_arguments().items()
        }
        output = linear_grpo_loss(hidden, weight, targets, loss=LOSSES[name], **common, **given)
        gradients = torch.autograd.grad(output.loss, (hidden, weight))
        assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(output.logprobs, seen.logprobs)
    assert errors[1] < 1e-4 < errors[0]


def of_fp16(count: int, vocab: int = 50, features: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Hidden states, head and targets of one completion, and log-probs before the update."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(count, features, generator=generator) / 6).half()
    weight = torch.randn(vocab, features, generator=generator).half()
    targets = torch.randint(0, vocab, (count,), generator=generator)
    old = reference.linear_token_logprobs(hidden.double(), weight.double(), targets).logprobs
    given = {"hidden": hidden, "weight": weight, "targets": targets, "old": old.float()}
    return {name: tensor.to(DEVICE) for name, tensor in given.items()}


@pytest.mark.parametrize("function", ["linear_grpo_loss", "grpo_loss", "in place"])
@pytest.mark.parametrize("backend", HALF)
@pytest.mark.parametrize(
    ("count", "gap", "scale", "normalizer"),
    [
        # one off-policy token of 64, whose ratio is above the largest number of fp16
        (64, 12.0, 1.0, None),
        # with all its ratio may be
        (64, 25.0, 2.0**-12, None),
        # as a scaler of gradients has it, to undo the division by the number of tokens
        (4096, 0.0, 2.0**16, None),
        (64, 0.0, 2.0**16, 1e6),
        (64, 12.0, 2.0**-8, 64.0),
    ],
)
@pytest.mark.parametrize("name", ["dapo", "gspo_token", "gspo"])
def test_fp16_gradients(
    name: str,
    count: int,
    gap: float,
    scale: float,
    normalizer: float | None,
    backend: Any,
    function: str,
) -> None:
    """Three times the error of plain PyTorch in fp16, which divides before it rounds, and the places
    of fp16 at most."""
    if backend == "triton" and DEVICE == "cpu":
        count = min(count, 64)
    given = of_fp16(count)
    targets, old = given["targets"], given["old"]
    old[3 if name == "dapo" else slice(None)] -= gap
    bounds = torch.tensor([0, count], device=DEVICE)
    loss = PolicyLoss.preset(name)
    common: tuple[Any, ...] = (targets, -torch.ones(1, device=DEVICE), bounds, loss)
    options: dict[str, Any] = {"old_logprobs": old, "normalizer": normalizer}

    def gradients(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        hidden, weight = (given[x].to(dtype).requires_grad_() for x in ("hidden", "weight"))
        chosen: dict[str, Any] = {"backend": backend} if ours else {}
        if function == "linear_grpo_loss":
            call = linear_grpo_loss if ours else reference.linear_grpo_loss
            value = call(hidden, weight, *common, **options, **chosen).loss
        else:
            chosen |= {"inplace": True} if ours and function == "in place" else {}
            call = grpo_loss if ours else reference.grpo_loss
            value = call(hidden @ weight.T, *common, **options, **chosen).loss
        return list(torch.autograd.grad(value * scale, (hidden, weight)))

    truth, plain = gradients(torch.float64, False), gradients(torch.float16, False)
    for got, other, exact in zip(gradients(torch.float16, True), plain, truth, strict=True):
        assert got.isfinite().all() or exact.abs().max() > 6e4
        rounded = 2.0**-10 * exact.abs().max() + 2.0**-24
        lost = (other.double() - exact).abs().max().nan_to_num(torch.inf)
        assert (got.double() - exact).abs().max() <= 3 * lost.clamp(max=8 * rounded) + 2 * rounded


@pytest.mark.parametrize("backend", HALF)
@pytest.mark.parametrize("temperature", [1.0, 2.0**-10])
@pytest.mark.parametrize(
    "advantages",
    [(2.0**-8, 1.0, 0.0), (1.0, 2.0**-8, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)],
)
def test_fp16_blocks_of_different_scales(
    advantages: tuple[float, ...], temperature: float, backend: Any
) -> None:
    """Tokens of two equal scores, a block each: A / 2 (1 - 1/2) / temperature is exact in fp16."""
    given = (torch.zeros(3, dtype=torch.int64), torch.tensor(advantages))
    given = tuple(x.to(DEVICE) for x in given)
    half: Any = {"dtype": torch.float16, "device": DEVICE}
    weight, bias = (torch.zeros(*n, **half, requires_grad=True) for n in ((2, 1), (2,)))
    options: Any = {"temperature": temperature, "normalizer": 2.0, "chunk_size": 1}
    right = sum(advantages) / 4 / temperature
    for skip in (False, True):
        output = linear_grpo_loss(
            *(torch.ones(3, 1, **half), weight, *given, torch.tensor([0, 3])),
            PolicyLoss(surrogate="reinforce"),
            **{**options, "bias": bias, "skip_idle": skip, "backend": backend},
        )
        found = torch.autograd.grad(output.loss, (weight, bias))
        assert [x.flatten().tolist() for x in found] == 2 * [[-right, right]]


@pytest.mark.parametrize("backend", HALF)
def test_fp16_gradient_of_the_entropy_alone(backend: Any) -> None:
    given = of_fp16(8)
    loss = PolicyLoss(surrogate="reinforce", entropy_coef=0.5)
    common: Any = (given["targets"], torch.zeros(1, device=DEVICE), torch.tensor([0, 8]), loss)
    found = []
    for dtype, call, options in (
        (torch.float16, linear_grpo_loss, {"backend": backend}),
        (torch.float64, reference.linear_grpo_loss, {}),
    ):
        weight = given["weight"].to(dtype, copy=True).requires_grad_()
        call(given["hidden"].to(dtype), weight, *common, **options).loss.backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0].double(), found[1], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1024, 32_768, 131_072])
def test_sums_over_a_long_completion(count: int, backend: Any) -> None:
    """The ratio of a sequence is the exponential of a mean: what a sum loses is in every gradient."""
    logprobs = -torch.rand(count, device=DEVICE)
    old = logprobs - 0.02 * torch.randn(count, device=DEVICE)
    weights = torch.rand(count, device=DEVICE) + 0.5
    given = (torch.ones(1, device=DEVICE), torch.tensor([0, count]))
    sequence = PolicyLoss.preset("gspo", clip_low=1.0, clip_high=1.0)
    mean = PolicyLoss(surrogate="reinforce", aggregation="seq-mean-token-mean")
    for loss, options in (
        (sequence, {"old_logprobs": old}),
        (sequence, {"old_logprobs": old, "weights": weights}),
        (mean, {"weights": weights}),
    ):
        leaf = logprobs.clone().requires_grad_()
        output = policy_loss(leaf, *given, loss, **options, backend=backend)
        wide = logprobs.double().requires_grad_()
        exact = reference.policy_loss(
            wide, *given, loss, **{name: x.double() for name, x in options.items()}
        )
        assert abs(output.loss.item() / exact.loss.item() - 1) <= 1e-6
        (got,) = torch.autograd.grad(output.loss, leaf)
        (wanted,) = torch.autograd.grad(exact.loss, wide)
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
