"""token_logprobs, linear_token_logprobs and the chunked gradients of linear_grpo_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perl_kernels import (
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    ops,
    policy_loss,
    reference,
    token_logprobs,
)
from perl_kernels.tiles import HeadTiles
from tests.kernels.naive import Problem, naive_logprobs
from tests.messages import refused

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


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """The blocks of logits that are made from now on."""
    calls: list[slice] = []
    original = HeadTiles.tile

    def counted(self: HeadTiles, part: slice) -> Tensor:
        calls.append(part)
        return original(self, part)

    monkeypatch.setattr(HeadTiles, "tile", counted)
    return calls


@pytest.mark.parametrize(
    ("name", "old", "one_pass"),
    [
        ("perl", True, True),
        ("cispo", True, True),
        ("gspo", True, False),
        ("gmpo", True, False),
        ("vespo", True, False),
        ("gspo", False, True),
        ("gspo_token", False, True),
        ("luspo", False, True),
        ("gmpo", False, True),
        ("vespo", False, True),
    ],
)
def test_passes_over_the_logits(
    name: str, old: bool, one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of 5, 1, 0, 7 and 3 tokens. In blocks of 4, those of 5 and 7 fit in none and are
    made twice; the others, and everything in blocks of 7, are made once for any loss."""
    problem, calls = Problem.make(), count_blocks(monkeypatch)
    hidden, weight = leaves_of(problem)
    arguments = problem.loss_arguments(old=old)
    loss = PolicyLoss.preset(name)
    for chunk_size, blocks in ((4, 4 if one_pass else 2 * 2 + 1 + 2 * 2 + 1), (7, 3)):
        calls.clear()
        linear_grpo_loss(
            hidden, weight, problem.targets, loss=loss, chunk_size=chunk_size, **arguments
        ).loss.backward()
        assert len(calls) == blocks


class Inside(TorchDispatchMode):
    """What the operators of this package do, which a mode around them does not see: the matrix
    products, and the largest tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.products, self.largest = 0, 0
        for name in ("loss_pass", "stats_pass", "gradient_pass"):
            monkeypatch.setattr(ops, name, self.around(getattr(ops, name)))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return within

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in func.name()
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_logits_of_all_tokens_never_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 50
    problem = Problem.make((60, 4, 36), vocab)
    hidden, weight = leaves_of(problem)
    inside, loss = Inside(monkeypatch), PolicyLoss.preset(name)
    given = {"loss": loss, "chunk_size": 8, **problem.loss_arguments()}
    linear_grpo_loss(hidden, weight, problem.targets, **given).loss.backward()
    assert inside.largest == 8 * vocab


@pytest.mark.parametrize("name", ["perl", "gspo"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_products_of_what_needs_a_gradient(
    needs: tuple[bool, bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the logits, and one for each gradient that somebody asks for."""
    problem = Problem.make()
    leaves = leaves_of(problem)
    arguments = {"loss": PolicyLoss.preset(name), **problem.loss_arguments()}
    whole = linear_grpo_loss(*leaves, problem.targets, **arguments).loss
    wanted = torch.autograd.grad(whole, leaves)
    inside = Inside(monkeypatch)
    for leaf, needed in zip(leaves, needs, strict=True):
        leaf.requires_grad_(needed)
    output = linear_grpo_loss(*leaves, problem.targets, **arguments)
    assert inside.products == 1 + sum(needs)
    if any(needs):
        output.loss.backward()
        assert inside.products == 1 + sum(needs)
    for leaf, gradient, needed in zip(leaves, wanted, needs, strict=True):
        if needed:
            torch.testing.assert_close(leaf.grad, gradient, **EXACT)
        else:
            assert leaf.grad is None
    inside.products = 0
    with torch.no_grad():
        linear_grpo_loss(*leaves, problem.targets, **arguments)
    assert inside.products == 1
    # Without the loss the logits are made again in the backward.
    seen = linear_token_logprobs(*leaves, problem.targets).logprobs.sum()
    assert inside.products == 2
    if any(needs):
        seen.backward()
        assert inside.products == 3 + sum(needs)


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


@pytest.mark.parametrize(
    ("argument", "dynamic"),
    [("temperature", None), ("temperature", True), ("softcap", True), ("normalizer", None)],
)
def test_compiles_for_every_value_of_a_number(
    argument: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    problem = Problem.make((3, 2))
    hidden, weight = leaves_of(problem)
    loss, arguments = PolicyLoss.preset("perl"), problem.loss_arguments()

    def linear(hidden: Tensor, weight: Tensor, value: float) -> Tensor:
        options = {argument: value, **arguments}
        return linear_grpo_loss(hidden, weight, problem.targets, loss=loss, **options).loss

    def logits(hidden: Tensor, weight: Tensor, value: float) -> Tensor:
        options = {argument: value, **arguments}
        return grpo_loss(hidden @ weight.t(), problem.targets, loss=loss, **options).loss

    for function in (linear,) if dynamic else (logits,):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for value in (1.0, 0.7, 1.3):
            wanted = torch.autograd.grad(function(hidden, weight, value), (hidden, weight))
            got = torch.autograd.grad(compiled(hidden, weight, value), (hidden, weight))
            torch.testing.assert_close(got, wanted, **EXACT)
