"""The registered operators: opcheck, torch.compile, CUDA graphs, gradients that are given once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    ops,
    policy_loss,
    token_logprobs,
)
from tests.kernels.naive import Problem
from tests.messages import refused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


class Call:
    """Arguments of every function on `DEVICE` in fp32."""

    def __init__(self, backend: str, old: bool = True) -> None:
        problem = Problem.make()
        self.backend = backend
        self.hidden, self.weight, self.bias = (
            x.to(DEVICE, torch.float32).requires_grad_()
            for x in (problem.hidden, problem.weight, problem.bias)
        )
        self.targets = problem.targets.to(DEVICE)
        self.common = {
            name: x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype)
            for name, x in problem.loss_arguments().items()
        }
        if not old:
            self.common["old_logprobs"] = None
        self.sizes = torch.tensor([2, 3], device=DEVICE)

    def logits(self) -> Tensor:
        return (self.hidden @ self.weight.T + self.bias).detach().requires_grad_()

    def run(self, name: str, loss: PolicyLoss, **changes: Any) -> Tensor:
        """A scalar through the function `name`."""
        given = {**self.common, **changes, "loss": loss, "backend": self.backend}
        head = (self.hidden, self.weight, self.targets)
        match name:
            case "linear_grpo_loss":
                return linear_grpo_loss(*head, bias=self.bias, **given).loss
            case "grpo_loss":
                return grpo_loss(self.hidden @ self.weight.T, self.targets, **given).loss
            case "policy_loss":
                seen = linear_token_logprobs(*head, bias=self.bias, backend=self.backend)
                return policy_loss(seen.logprobs, entropy=seen.entropy, **given).loss
            case "token_logprobs":
                logits = self.hidden @ self.weight.T
                seen = token_logprobs(logits, self.targets, backend=self.backend)
                return (seen.logprobs + 0.3 * seen.entropy).sum()
            case _:
                raise ValueError(name)


NAMES = ("linear_grpo_loss", "grpo_loss", "policy_loss", "token_logprobs")
LOSSES = {
    "perl": PolicyLoss.preset("perl", entropy_coef=0.01),
    "gspo": PolicyLoss.preset("gspo"),
}


def recorded(monkeypatch: pytest.MonkeyPatch, operator: str) -> list[tuple[Any, ...]]:
    """The arguments of the calls of an operator from now on."""
    original, calls = getattr(ops, operator), []

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ops, operator, record)
    return calls


@pytest.mark.parametrize(
    ("operator", "function", "loss", "backend"),
    [
        ("linear_grpo_loss", "linear_grpo_loss", "perl", "torch"),
        ("linear_grpo_loss", "linear_grpo_loss", "gspo", "triton"),
        ("grpo_loss", "grpo_loss", "perl", "torch"),
        ("policy_loss", "policy_loss", "perl", "triton"),
        ("policy_loss", "policy_loss", "gspo", "torch"),
        ("linear_token_logprobs", "policy_loss", "perl", "torch"),
        ("token_logprobs", "token_logprobs", "perl", "torch"),
        ("group_advantages", "group_advantages", "", "torch"),
        ("group_advantages", "group_advantages", "", "triton"),
    ],
)
def test_opcheck(
    operator: str, function: str, loss: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Allocation functions replaced by Python ones, as in every other test, cannot be traced.
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        calls = recorded(patch, operator)
        call = Call(backend)
        if function == "group_advantages":
            group_advantages(torch.rand(5, device=DEVICE), call.sizes, backend=backend)
        else:
            call.run(function, LOSSES[loss])
    arguments = [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in calls[0]
    ]
    results = torch.library.opcheck(
        getattr(torch.ops.perl_kernels, operator).default, tuple(arguments)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "loss", "backend"),
    [
        *((name, "perl", "torch") for name in NAMES),
        *((NAMES[0], "gspo", "torch"), (NAMES[0], "perl", "triton"), (NAMES[2], "gspo", "triton")),
    ],
)
def test_compiles_without_a_graph_break(
    name: str, loss: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    call = Call(backend)
    leaves = (call.hidden, call.weight)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        call.hidden, call.weight = hidden, weight
        return call.run(name, LOSSES[loss])

    wanted = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_compiled_loss_makes_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is computed in the forward of the operator, which torch.compile does not open."""
    monkeypatch.undo()
    torch._dynamo.reset()
    calls: list[slice] = []
    original = ops.HeadTiles.tile

    def counted(self: ops.HeadTiles, part: slice) -> Tensor:
        calls.append(part)
        return original(self, part)

    call = Call("torch")
    compiled = torch.compile(
        lambda: call.run("linear_grpo_loss", LOSSES["perl"], chunk_size=4),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.HeadTiles, "tile", counted)
        compiled().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_place_of_the_logits(backend: str) -> None:
    call, loss = Call(backend), LOSSES["perl"]
    given = {**call.common, "loss": loss, "backend": backend}
    apart, inplace = call.logits(), call.logits()
    storage = inplace.data_ptr()
    wanted = grpo_loss(apart, call.targets, **given)
    output = grpo_loss(inplace * 1.0, call.targets, inplace=True, **given)
    torch.testing.assert_close(output.loss, wanted.loss)
    torch.testing.assert_close(output.logprobs, wanted.logprobs)
    (gradient,) = torch.autograd.grad(3 * output.loss, inplace, retain_graph=True)
    (expected,) = torch.autograd.grad(3 * wanted.loss, apart)
    torch.testing.assert_close(gradient, expected)
    with refused("grpo_loss(inplace=True)", "inplace", error=RuntimeError):
        torch.autograd.grad(output.loss, inplace)
    # A leaf is served too, and its gradient lies where it was.
    grpo_loss(inplace, call.targets, inplace=True, **given).loss.backward()
    assert inplace.grad is not None and inplace.grad.data_ptr() == storage
    torch.testing.assert_close(inplace.grad * 3, expected)
    # Without a gradient nothing is written.
    kept = apart.detach().clone()
    grpo_loss(kept, call.targets, inplace=True, **given)
    torch.testing.assert_close(kept, apart.detach(), rtol=0, atol=0)


def test_in_place_of_logits_that_another_backward_needs() -> None:
    """The producer of the logits has saved them, and must not read a gradient instead."""
    call = Call("torch")
    logits = torch.tanh(call.logits())
    output = grpo_loss(logits, call.targets, loss=LOSSES["perl"], inplace=True, **call.common)
    with refused("inplace", error=RuntimeError):
        output.loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_differentiating_twice_is_refused(name: str) -> None:
    call = Call("torch")
    loss = call.run(name, LOSSES["perl"])
    with refused("create_graph=True", "perl_kernels.reference", error=RuntimeError):
        torch.autograd.grad(loss, call.hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_idle_rows_are_left_out(name: str, backend: str) -> None:
    """Zero advantages and masked tokens: the same gradients, from products of fewer rows."""
    call = Call(backend)
    call.common["advantages"] = torch.tensor([1.0, 0.0, 0.5, 0.0, -0.7], device=DEVICE)
    leaves = (call.hidden, call.weight, call.bias)
    rows: list[int] = []
    original = ops.HeadTiles._add_weight

    def counted(self: ops.HeadTiles, gradient: Tensor, hidden: Tensor) -> None:
        rows.append(gradient.shape[0])
        original(self, gradient, hidden)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.HeadTiles, "_add_weight", counted)
        for skip in (False, True):
            rows.clear()
            loss = call.run(
                "linear_grpo_loss", PolicyLoss.preset(name), skip_idle=skip, chunk_size=6
            )
            results.append(torch.autograd.grad(loss, leaves))
            assert sum(rows) == 16 if not skip else 0 < sum(rows) < 12
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_survive_fp16(backend: str) -> None:
    """Divided by the number of tokens before the backward, they would be 0 in fp16."""
    torch.manual_seed(0)
    count, vocab = 16, 50
    hidden = (torch.randn(count, 8) / 30).to(DEVICE, torch.float16).requires_grad_()
    weight = torch.randn(vocab, 8).to(DEVICE, torch.float16).requires_grad_()
    targets = torch.randint(0, vocab, (count,), device=DEVICE)
    bounds = torch.tensor([0, count], dtype=torch.int32, device=DEVICE)
    arguments = (torch.ones(1, device=DEVICE), bounds, PolicyLoss.preset("dapo"))
    results = []
    for normalizer, scale in ((1e6, 65536.0), (1.0, 65536.0 / 1e6)):
        output = linear_grpo_loss(
            hidden, weight, targets, *arguments, normalizer=normalizer, backend=backend
        )
        results.append(torch.autograd.grad(output.loss * scale, (hidden, weight)))
    for small, large in zip(*results, strict=True):
        assert large.abs().max() > 0
        torch.testing.assert_close(small, large, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_budget(backend: str) -> None:
    call = Call(backend)
    seen: list[int] = []
    original = ops.HeadTiles.tile

    def counted(self: ops.HeadTiles, part: slice) -> Tensor:
        tile = original(self, part)
        seen.append(tile.shape[0] * tile.shape[1] * tile.element_size())
        return tile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.HeadTiles, "tile", counted)
        for budget in (1, 13 * 4 * 5, 10**9):
            seen.clear()
            call.run("linear_grpo_loss", LOSSES["perl"], memory_budget=budget)
            assert max(seen) <= max(budget, 13 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_are_normalised_within_the_loss(backend: str) -> None:
    call = Call(backend)
    rewards = torch.tensor(
        [[0.1, 1.0], [0.7, 0.0], [float("nan"), 1.0], [0.2, 0.5], [0.9, float("nan")]],
        device=DEVICE,
    )
    for name, options in (
        ("perl", {}),
        ("gspo", {"scale": "batch", "unbiased": False, "reward_weights": [1.0, 0.3]}),
        ("perl", {"scale": "none", "baseline": "leave_one_out"}),
        ("gspo", {"combine": "normalize_then_sum"}),
    ):
        grouped = GroupedRewards(rewards, call.sizes, **options)
        apart = group_advantages(rewards, call.sizes, backend="torch", **options).advantages
        inside, outside = (
            call.run("linear_grpo_loss", LOSSES[name], advantages=advantages)
            for advantages in (grouped, apart)
        )
        torch.testing.assert_close(inside, outside)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES[:3])
def test_cuda_graph(name: str) -> None:
    call = Call("triton")

    def step() -> Tensor:
        loss = (
            call.run(name, LOSSES["perl"], chunk_size=8)
            if name == NAMES[0]
            else call.run(name, LOSSES["perl"])
        )
        return torch.autograd.grad(loss, call.hidden)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call.hidden.mul_(1.1)
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("linear_grpo_loss", "torch"),
        ("grpo_loss", "torch"),
        ("linear_token_logprobs", "torch"),
        ("grpo_loss", "triton"),
    ],
)
def test_compiled_once_for_every_number_of_tokens(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    weight = torch.randn(13, 6, device=DEVICE, requires_grad=True)
    loss = PolicyLoss.preset("dapo")

    def function(hidden: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        if name == "linear_token_logprobs":
            return linear_token_logprobs(hidden, weight, targets, backend=backend).logprobs.sum()
        given = (targets, bounds.new_ones(2), bounds, loss)
        if name == "linear_grpo_loss":
            return linear_grpo_loss(hidden, weight, *given, backend=backend).loss
        return grpo_loss(hidden @ weight.T, *given, backend=backend).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    # Across the default size of a block on a CPU as well.
    for count in (6, 5, 7, 200) if backend == "torch" else (6, 5, 7):
        hidden = torch.randn(count, 6, device=DEVICE, requires_grad=True)
        bounds = torch.tensor([0, 1, count], dtype=torch.int32, device=DEVICE)
        given = (hidden, torch.randint(0, 13, (count,), device=DEVICE), bounds)
        wanted = torch.autograd.grad(function(*given), hidden)
        torch.testing.assert_close(torch.autograd.grad(compiled(*given), hidden), wanted)
    assert counter.frame_count <= 2


def test_an_objective_made_in_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch._dynamo.reset()
    call = Call("torch")

    def function(high: float) -> Tensor:
        return call.run("linear_grpo_loss", PolicyLoss.preset("dapo", clip_high=high))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for high in (0.28, 0.3, 0.31):
        torch.testing.assert_close(compiled(high), function(high))


@pytest.mark.parametrize("layout", ["transposed", "frozen bf16"])
def test_fakes_are_like_the_real_outputs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    call = Call("torch")
    if layout == "transposed":
        call.hidden = call.hidden.detach().T.contiguous().T.requires_grad_()
        call.weight = call.weight.detach().T.contiguous().T.requires_grad_()
    else:
        call.hidden = call.hidden.detach().bfloat16().requires_grad_()
        call.weight, call.bias = call.weight.detach().bfloat16(), call.bias.detach().bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        calls = {
            operator: recorded(patch, operator)
            for operator in ("linear_grpo_loss", "linear_token_logprobs_backward")
        }
        call.run("linear_grpo_loss", LOSSES["perl"]).backward()
        call.run("policy_loss", LOSSES["perl"]).backward()
    for operator, (arguments, *_) in calls.items():
        given = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        torch.library.opcheck(getattr(torch.ops.perl_kernels, operator).default, tuple(given))


def test_in_place_of_logits_that_share_memory() -> None:
    logits = torch.randn(1, 7, requires_grad=True).expand(4, 7)
    given = (torch.arange(4), torch.ones(1), torch.tensor([0, 4]), PolicyLoss())
    with refused("logits", [0, 1], "inplace=True", error=ValueError):
        grpo_loss(logits, *given, inplace=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one() -> None:
    torch.cuda.set_device(0)
    hidden = torch.randn(9, 8, device="cuda:1", requires_grad=True)
    weight = torch.randn(50, 8, device="cuda:1", requires_grad=True)
    targets = torch.randint(0, 50, (9,), device="cuda:1")
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = (hidden, weight, targets, torch.ones(2, device="cuda:1"), bounds, PolicyLoss())
    losses = [linear_grpo_loss(*given, backend=backend).loss for backend in BACKENDS]
    torch.testing.assert_close(*losses)
