"""torch.compile, make_fx, fake and meta tensors: no graph break, and no other number compiles anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from tests.kernels.call import BACKENDS, DEVICE, NAMES, TAKING, Call

H, V = 6, 13


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Allocation functions replaced by Python ones, as in every other test, cannot be traced.
    monkeypatch.undo()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_often(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> int:
    """How often `function`, compiled whole, is compiled for all these calls; its results are those of
    the eager one."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counter.frame_count


@pytest.mark.parametrize(
    ("name", "loss", "backend"),
    [
        *((name, "perl", backend) for name in NAMES for backend in BACKENDS),
        *((NAMES[0], "gspo", backend) for backend in BACKENDS),
    ],
)
def test_no_graph_break(name: str, loss: str, backend: Any) -> None:
    call = Call(backend)
    leaves = (call.hidden, call.weight)

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        call.hidden, call.weight = hidden, weight
        return call.run(name, PolicyLoss.preset(loss))

    wanted = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {
    "clip": (
        {"kl": "k3", "correction": "token_truncate", "aggregation": "seq-mean-token-sum-norm"},
        {
            "clip_low": [0.1, 0.2, 0.3, 0.15],
            "clip_high": [2, 3, 5, 4],
            "dual_clip": [3.0, 2.5, 4.5, 3.5],
            "kl_coef": [0.1, 0.01, 0.2, 0.3],
            "entropy_coef": [0.1, -0.01, 0.2, 0.3],
            "correction_high": [2.5, 3.5, 1.5, 4.5],
            "max_completion_length": [7, 9, 11, 13],
        },
    ),
    "delta": ({}, {"delta": [3, 2, 4]}),
    "sapo": ({"surrogate": "sapo"}, {"sapo_tau_pos": [1.0, 2.5, 1.05]}),
    "vespo": (
        {"surrogate": "vespo"},
        {"vespo_k_neg": [3, 2, 4], "vespo_lambda_pos": [3.0, 2.5, 1.5]},
    ),
    "dppo": ({"surrogate": "dppo_tv"}, {"dppo_ratio_cap": [20.0, 2.5, 1.5]}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("policy_loss", kind) for kind in OBJECTIVES), ("linear_grpo_loss", "clip")],
)
def test_numbers_of_the_objective(name: str, kind: str) -> None:
    """All change at once: one that is compiled into the graph shows in the count."""
    axes, fields = OBJECTIVES[kind]
    call = Call("torch")

    def function(*values: float) -> Tensor:
        return call.run(name, PolicyLoss(**axes, **dict(zip(fields, values, strict=True))))

    assert compiled_often(function, list(zip(*fields.values(), strict=True))) <= 2


@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        *((name, "float", [a for a in TAKING if name in TAKING[a]]) for name in NAMES),
        ("policy_loss", "int", ["normalizer"]),
        ("linear_token_logprobs", "int", ["temperature", "softcap"]),
        ("grpo_loss", "tensor", ["normalizer", "temperature"]),
    ],
)
def test_numbers_of_a_call(name: str, kind: str, arguments: list[str]) -> None:
    """All change at once, each to numbers of its own."""
    call = Call("torch")

    def value(number: int, argument: str) -> Any:
        if kind == "int":
            return number + 2
        of_one = 1.125 + number / 8 + arguments.index(argument) / 64
        rows = () if argument == "normalizer" else (len(call.targets),)
        return torch.full(rows, of_one, device=DEVICE) if kind == "tensor" else of_one

    def function(*values: Any) -> Tensor:
        return call.run(name, PolicyLoss(), **dict(zip(arguments, values, strict=True)))

    calls = [tuple(value(number, a) for a in arguments) for number in range(12)]
    assert compiled_often(function, calls) <= 2


def test_numbers_of_advantages() -> None:
    rewards = torch.rand(6)

    def function(eps: float, weight: float) -> Tensor:
        table = torch.stack([rewards, rewards.flip(0)], 1)
        return group_advantages(table, [2, 4], eps=eps, reward_weights=[1.0, weight]).advantages

    assert compiled_often(function, [(1e-6, 1.5), (1e-4, 0.5), (0.1, 0.75), (0.5, 0.25)]) <= 2


def of_lengths(lengths: list[int]) -> tuple[Any, ...]:
    count, bounds = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    hidden = torch.randn(count, H, device=DEVICE, requires_grad=True)
    targets = torch.randint(0, V, (count,), device=DEVICE)
    return hidden, targets, torch.randn(len(lengths), device=DEVICE), bounds


@pytest.mark.parametrize(
    ("name", "backend", "grouped"),
    [
        *((name, backend, False) for name in NAMES for backend in BACKENDS),
        *((name, "torch", True) for name in NAMES[:3]),
    ],
)
def test_numbers_of_tokens_and_completions(name: str, backend: Any, grouped: bool) -> None:
    """Several, then one completion, then one token, and across the size of a block."""
    weight, loss = torch.randn(V, H, device=DEVICE), PolicyLoss.preset("dapo")

    def function(hidden: Tensor, targets: Tensor, values: Tensor, bounds: Tensor) -> Tensor:
        if grouped:
            values = GroupedRewards(values, torch.tensor([0, len(values)], device=values.device))
        given = (targets, values, bounds, loss)
        logits = hidden @ weight.T
        match name:
            case "linear_grpo_loss":
                return linear_grpo_loss(hidden, weight, *given, backend=backend).loss
            case "grpo_loss":
                return grpo_loss(logits, *given, backend=backend).loss
            case "policy_loss":
                logprobs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
                return policy_loss(logprobs, *given[1:], backend=backend).loss
            case "linear_token_logprobs":
                return linear_token_logprobs(
                    hidden, weight, targets, backend=backend
                ).logprobs.sum()
            case _:
                return token_logprobs(logits, targets, backend=backend).entropy.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    many = [[4, 5], [2, 0, 2], [1, 1, 1, 3], [6], [1], [9]]
    for lengths in [*many, [120, 80]] if backend != "triton" else many:
        given = of_lengths(lengths)
        wanted = torch.autograd.grad(function(*given), given[0])
        torch.testing.assert_close(torch.autograd.grad(compiled(*given), given[0]), wanted)
    # A size of 1 is one of its own for the compiler, of tokens and of completions.
    assert counter.frame_count <= 4


def everything(device: str = "cpu") -> list[torch.Size]:
    """All functions, forward and backward; the shapes of what came out."""
    hidden, weight = (torch.randn(s, H, device=device, requires_grad=True) for s in (9, V))
    logits = torch.randn(9, V, device=device, requires_grad=True)
    targets = torch.zeros(9, dtype=torch.int64, device=device)
    bounds = torch.tensor([0, 4, 9], device=device)
    options = {"old_logprobs": torch.zeros(9, device=device), "normalizer": 3.0}
    rewards = torch.rand(2, device=device)
    outputs: list[Tensor] = list(group_advantages(torch.rand(4, device=device), [2, 2]))
    for name in ("dapo", "gspo"):
        for advantages in (rewards, GroupedRewards(rewards, [2])):
            given = (targets, advantages, bounds, PolicyLoss.preset(name))
            fused = linear_grpo_loss(hidden, weight, *given, **options)
            plain = grpo_loss(logits, *given, **options)
            seen = linear_token_logprobs(hidden, weight, targets)
            split = policy_loss(seen.logprobs, *given[1:], **options)
            scored = token_logprobs(logits, targets, temperature=torch.ones(9, device=device))
            for output in (fused, plain, split):
                outputs += [*output[:3], *output.metrics.values()]
            outputs += [*seen, *scored]
            losses = [x.loss for x in (fused, plain, split)] + [x.sum() for x in (*seen, *scored)]
            outputs += torch.autograd.grad(
                losses, (hidden, weight, logits), [x * 0 + 1 for x in losses]
            )
    return [tensor.shape for tensor in outputs]


def test_fake_tensors() -> None:
    real = everything()
    with FakeTensorMode():
        assert everything() == real
    with torch.device("meta"):
        assert everything("meta") == real


def test_traced_by_make_fx() -> None:
    call = Call("torch")
    logits = call.logits().detach()

    def function(logits: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        seen = token_logprobs(logits, targets)
        output = policy_loss(seen.logprobs, torch.ones(5), bounds, PolicyLoss())
        return output.loss + seen.entropy.sum()

    given = (logits, call.targets, call.common["cu_seqlens"])
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(function, tracing_mode=mode)(*given)
        torch.testing.assert_close(traced(*given), function(*given))
