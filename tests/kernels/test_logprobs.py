"""token_logprobs, linear_token_logprobs and the gradients of linear_grpo_loss block by block, in fp64."""

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
    token_logprobs,
)
from tests.kernels.naive import Problem, naive_logprobs

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "row-temperature": {"temperature": torch.linspace(0.5, 2.0, 16, dtype=torch.float64)},
    "softcap": {"softcap": 1.5, "temperature": 1.3, "bias": True},
}


def options_of(name: str, problem: Problem) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if options.pop("bias", False):
        options["bias"] = problem.bias.clone().requires_grad_()
    return options


def leaves_of(problem: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    hidden = problem.hidden.to(dtype).requires_grad_()
    return hidden, problem.weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("name", OPTIONS)
def test_linear_token_logprobs(name: str) -> None:
    problem = Problem.make()
    options = options_of(name, problem)
    hidden, weight = leaves_of(problem)
    leaves = [hidden, weight, *([options["bias"]] if "bias" in options else [])]
    truth = naive_logprobs(hidden, weight, problem.targets, **options)
    ours = linear_token_logprobs(hidden, weight, problem.targets, chunk_size=3, **options)
    plain = reference.linear_token_logprobs(hidden, weight, problem.targets, **options)
    upstream = [torch.randn(16, dtype=torch.float64) for _ in range(2)]
    gradients = torch.autograd.grad(truth, leaves, upstream)
    for output in (ours, plain):
        torch.testing.assert_close(tuple(output), truth, **EXACT)
        got = torch.autograd.grad(tuple(output), leaves, upstream)
        torch.testing.assert_close(got, gradients, **EXACT)


def test_token_logprobs() -> None:
    logits = torch.randn(9, 11, dtype=torch.float64, requires_grad=True)
    targets, tau = torch.randint(0, 11, (9,)), torch.rand(9, dtype=torch.float64) + 0.5
    for temperature in (0.6, tau):
        ours = token_logprobs(logits, targets, temperature=temperature)
        plain = reference.token_logprobs(logits, targets, temperature=temperature)
        torch.testing.assert_close(tuple(ours), tuple(plain), **EXACT)
        upstream = [torch.randn(9, dtype=torch.float64) for _ in range(2)]
        torch.testing.assert_close(
            torch.autograd.grad(tuple(ours), logits, upstream),
            torch.autograd.grad(tuple(plain), logits, upstream),
            **EXACT,
        )


def test_gradcheck() -> None:
    problem = Problem.make((3, 2), vocab=5)
    hidden, weight = leaves_of(problem)
    targets, bias = problem.targets, problem.bias.clone().requires_grad_()
    loss = PolicyLoss.preset("gspo", clip_low=0.5, clip_high=0.5, entropy_coef=0.1)

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_token_logprobs(
            hidden, weight, targets, bias=bias, softcap=2.0, temperature=0.8, chunk_size=2
        )

    def two_pass(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = problem.loss_arguments()
        return linear_grpo_loss(
            hidden, weight, targets, loss=loss, bias=bias, chunk_size=2, **arguments
        ).loss

    def one_pass(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = problem.loss_arguments()
        sapo = PolicyLoss.preset("sapo", kl="k2", kl_coef=0.1, entropy_coef=0.1)
        return linear_grpo_loss(
            hidden, weight, targets, loss=sapo, bias=bias, chunk_size=2, **arguments
        ).loss

    for function in (logprobs, two_pass, one_pass):
        assert torch.autograd.gradcheck(function, (hidden, weight, bias))
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(token_logprobs(x, targets)), logits)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, targets, loss=loss, **problem.loss_arguments()).loss, logits
    )
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, loss=PolicyLoss(), **problem.loss_arguments()).loss,
        problem.ref_logprobs.clone().requires_grad_(),
    )


@pytest.mark.parametrize("name", ["perl", "gspo", "sapo", "gmpo"])
def test_the_reference_is_differentiable_twice(name: str) -> None:
    problem = Problem.make((3, 2), vocab=5)
    # Nowhere near a bound, where there is no second derivative.
    loss = PolicyLoss.preset(name, clip_low=0.9, clip_high=50.0, dual_clip=None, entropy_coef=0.1)

    def linear(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"temperature": 0.8, "softcap": 2.0, **problem.loss_arguments()}
        return reference.linear_grpo_loss(
            hidden, weight, problem.targets, loss=loss, **options
        ).loss

    leaves = leaves_of(problem)
    assert torch.autograd.gradcheck(linear, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(linear, leaves, fast_mode=True)
    logits = (leaves[0] @ leaves[1].T).detach().requires_grad_()
    for function in (
        lambda x: tuple(reference.token_logprobs(x, problem.targets)),
        lambda x: (
            reference.grpo_loss(x, problem.targets, loss=loss, **problem.loss_arguments()).loss
        ),
    ):
        assert torch.autograd.gradcheck(function, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, logits, fast_mode=True)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 1000, None])
def test_chunking_changes_nothing(chunk_size: int | None, old: bool) -> None:
    problem = Problem.make()
    hidden, weight = leaves_of(problem)
    for name in ("perl", "gspo"):
        loss = PolicyLoss.preset(name)
        arguments = problem.loss_arguments(old=old)
        results = []
        for size in (5, chunk_size):
            loss_output = linear_grpo_loss(
                hidden, weight, problem.targets, loss=loss, chunk_size=size, **arguments
            )
            results.append(torch.autograd.grad(loss_output.loss, (hidden, weight)))
        torch.testing.assert_close(*results, **EXACT)


def test_no_grad_and_scaled_backward() -> None:
    problem = Problem.make()
    hidden, weight = leaves_of(problem)
    arguments = {"loss": PolicyLoss.preset("perl"), **problem.loss_arguments()}
    with torch.no_grad():
        silent = linear_grpo_loss(hidden, weight, problem.targets, **arguments)
    assert not silent.loss.requires_grad
    output = linear_grpo_loss(hidden, weight, problem.targets, **arguments)
    assert not output.logprobs.requires_grad and not output.entropy.requires_grad
    torch.testing.assert_close(silent.loss, output.loss.detach(), **EXACT)
    (once,) = torch.autograd.grad(output.loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(output.loss * -3, hidden)
    torch.testing.assert_close(scaled, -3 * once, **EXACT)
