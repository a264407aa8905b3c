"""The registered operators: opcheck, CUDA graphs, gradients that are given once, forward or twice not at
all, and outputs that are nobody's memory but their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    operators,
    policy_loss,
    token_logprobs,
    top_entropy_weights,
)
from tests.kernels.call import BACKENDS, DEVICE, NAMES, Call
from tests.messages import refused

LOSSES = {
    "perl": PolicyLoss.preset("perl", entropy_coef=0.01),
    "gspo": PolicyLoss.preset("gspo"),
}


def recorded(monkeypatch: pytest.MonkeyPatch, operator: str) -> list[tuple[Any, ...]]:
    """The arguments of the calls of an operator from now on."""
    original, calls = getattr(operators, operator), []

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(operators, operator, record)
    return calls


# The operator, the function that calls it, and the objective.
OPERATORS = [
    ("token_logprobs", "token_logprobs", "perl"),
    ("token_logprobs_backward", "grpo_loss", "perl"),
    ("linear_token_logprobs", "linear_token_logprobs", "perl"),
    ("linear_token_logprobs_backward", "linear_token_logprobs", "perl"),
    ("policy_loss", "policy_loss", "perl"),
    ("policy_loss", "grpo_loss", "gspo"),
    ("grpo_loss_", "in place", "perl"),
    ("linear_grpo_loss", "linear_grpo_loss", "perl"),
    ("linear_grpo_loss", "linear_grpo_loss", "gspo"),
    ("group_advantages", "group_advantages", ""),
]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*(("fp32", x) for x in BACKENDS), ("transposed", "torch"), ("frozen bf16", "torch")],
)
@pytest.mark.parametrize(("operator", "function", "loss"), OPERATORS)
def test_opcheck(
    operator: str,
    function: str,
    loss: str,
    kind: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Allocation functions replaced by Python ones, as in every other test, cannot be traced.
    monkeypatch.undo()
    call = Call(backend)
    if kind == "transposed":
        call.hidden = call.hidden.detach().T.contiguous().T.requires_grad_()
        call.weight = call.weight.detach().T.contiguous().T.requires_grad_()
    elif kind == "frozen bf16":
        call.hidden = call.hidden.detach().bfloat16().requires_grad_()
        call.weight, call.bias = call.weight.detach().bfloat16(), call.bias.detach().bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        calls = recorded(patch, operator)
        if function == "group_advantages":
            rewards = torch.rand(5, device=DEVICE)
            group_advantages(rewards, call.sizes, backend=backend)  # type: ignore[arg-type]
        elif function == "in place":
            logits = call.logits()
            given = {**call.common, "loss": LOSSES[loss], "backend": backend}
            grpo_loss(logits, call.targets, inplace=True, **given)
        else:
            call.run(function, LOSSES[loss]).backward()
    detached = "backward" in operator or kind != "fp32"
    arguments = [
        x.detach().requires_grad_(x.requires_grad and not detached) if isinstance(x, Tensor) else x
        for x in calls[0]
    ]
    checked = getattr(torch.ops.perl_kernels, operator).default
    assert set(torch.library.opcheck(checked, tuple(arguments)).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    assert {operator for operator, *_ in OPERATORS} == set(operators.IMPLEMENTATIONS)


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


@pytest.mark.parametrize("name", NAMES)
def test_forward_derivatives_are_refused(name: str) -> None:
    """They would be 0."""
    call = Call("torch")
    tangent = torch.randn_like(call.hidden)

    def function(hidden: Tensor) -> Tensor:
        call.hidden = hidden
        return call.run(name, LOSSES["perl"])

    with refused("perl_kernels.reference", error=RuntimeError):
        torch.func.jvp(function, (call.hidden.detach(),), (tangent,))
    with forward_ad.dual_level(), refused("perl_kernels.reference", error=RuntimeError):
        function(forward_ad.make_dual(call.hidden.detach(), tangent))
    # One level of it that no tensor of the call is in is no matter.
    with forward_ad.dual_level():
        function(Call("torch").hidden).backward()


def storages(values: Any) -> Iterator[tuple[int, int]]:
    """First and last byte of every tensor."""
    if isinstance(values, Tensor):
        if values.numel():
            storage = values.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes() - 1
    elif isinstance(values, GroupedRewards):
        yield from storages([values.rewards, values.group_sizes])
    elif isinstance(values, dict):
        yield from storages(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from storages(value)


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_not_arguments(backend: Any, needs: bool) -> None:
    """What is written to an output changes nothing that the caller has given."""
    call = Call(backend)
    logits, logprobs = call.logits().detach(), call.common["old_logprobs"]
    hidden, weight, bias = (x.detach() for x in (call.hidden, call.weight, call.bias))
    entropy, rewards = -logprobs, torch.rand(5, device=DEVICE)
    for leaf in (logits, logprobs, hidden, weight, bias, entropy):
        leaf.requires_grad_(needs)
    loss = PolicyLoss.preset("perl", entropy_coef=0.1)
    common = {**call.common, "loss": loss, "backend": backend}
    common["old_logprobs"] = logprobs.detach()
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
        (policy_loss, (logprobs,), {**common, "entropy": entropy}),
        (token_logprobs, (logits, call.targets), {"backend": backend}),
        (grpo_loss, (logits, call.targets), common),
        (linear_grpo_loss, (hidden, weight, call.targets), {**common, "bias": bias}),
        (group_advantages, (rewards, call.sizes), {"scale": "none", "backend": backend}),
        (top_entropy_weights, (entropy.detach(), 1.0), {"weights": torch.ones_like(entropy)}),
    ]
    for function, arguments, options in calls:
        before = list(storages([arguments, options]))
        output = function(*arguments, **options)
        for low, high in storages(output):
            assert all(high < first or last < low for first, last in before), function.__name__


def test_a_second_import() -> None:
    """As a notebook does that reloads, or a test that clears `sys.modules`."""
    script = (
        "import sys, torch\n"
        "import perl_kernels\n"
        "for name in [n for n in sys.modules if n.startswith('perl_kernels')]: del sys.modules[name]\n"
        "from perl_kernels import PolicyLoss, linear_grpo_loss, reference\n"
        "hidden, weight = (torch.randn(n, 2, requires_grad=True) for n in (3, 5))\n"
        "given = (torch.arange(3), torch.ones(1), torch.tensor([0, 3]), PolicyLoss())\n"
        "found = [torch.autograd.grad(f(hidden, weight, *given).loss, (hidden, weight))\n"
        "         for f in (linear_grpo_loss, reference.linear_grpo_loss)]\n"
        "torch.testing.assert_close(*found)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


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
