"""What a call costs, counted below the operators: products, bytes that live at once, passes over the
logits, and what Triton launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from tests.kernels.call import BACKENDS, DEVICE, NAMES, Call
from tests.kernels.naive import Problem

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="counts what a CPU does")
backends = pytest.mark.parametrize("backend", BACKENDS)
VIEWS = {
    *("as_strided", "slice", "select", "alias", "detach", "detach_", "t", "transpose", "numpy_T"),
    *("view", "expand", "to", "reshape", "empty", "empty_like", "empty_strided", "new_empty"),
    *("resolve_conj", "resolve_neg", "unsqueeze", "result_type", "is_nonzero", "lift_fresh"),
    *("set_", "permute", "view_as", "narrow", "contiguous", "unbind", "matmul"),
}


class Cost(NamedTuple):
    """`peak`: bytes that were allocated at once beyond those before the call. `products`: shapes of
    the operands of each matrix product. `passes`: operations by name with an operand of `size`
    elements or more, other than products and views."""

    peak: int
    products: list[tuple[tuple[int, ...], tuple[int, ...]]]
    passes: Counter[str]


def cost(function: Callable[[], Any], size: int = 0) -> Cost:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as p:
        function()
    total = peak = 0
    products, passes = [], Counter[str]()
    for event in p.profiler.kineto_results.events():  # type: ignore[union-attr]
        space, _, name = event.name().partition("::")
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
        elif space == "aten" and "mm" in name:
            matrices = [tuple(s) for s in event.shapes() if len(s) == 2]
            products.append(tuple(matrices[-2:] if name.startswith("addmm") else matrices[:2]))
        elif space == "aten" and name not in VIEWS:
            sizes = [torch.Size(s).numel() for s in event.shapes() if s]
            passes[name] += max(sizes, default=0) >= size > 0
    return Cost(peak, products, +passes)


@pytest.fixture(autouse=True)
def _no_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory filled with NaN, as in every other test, is a pass over it."""
    monkeypatch.undo()


def leaves_of(problem: Problem, needs: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    given = (problem.hidden, problem.weight)
    return [x.float().requires_grad_(need) for x, need in zip(given, needs, strict=True)]


def arguments_of(problem: Problem, **changes: Any) -> dict[str, Any]:
    given = {**problem.loss_arguments(), **changes}
    return {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


@on_cpu
@backends
@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_logits_of_all_tokens_never_exist(name: str, backend: Any) -> None:
    """Four times the tokens need no more than their own hidden states, gradients and log-probs."""
    vocab, rows = 400, 8
    peaks = []
    for lengths in ((30, 2, 18), (120, 8, 72)):
        problem = Problem.make(lengths, vocab)
        given = arguments_of(
            problem, chunk_size=rows, loss=PolicyLoss.preset(name), backend=backend
        )

        leaves = leaves_of(problem)

        def call(problem: Problem = problem, given: Any = given, leaves: Any = leaves) -> None:
            linear_grpo_loss(*leaves, problem.targets, **given).loss.backward()
            options: Any = {"chunk_size": rows, "backend": backend}
            seen = linear_token_logprobs(*leaves, problem.targets, **options)
            seen.logprobs.sum().backward()

        peaks.append(cost(call).peak)
    assert peaks[0] > rows * vocab * 4
    # 150 tokens more: each its hidden state and the gradient of it, and 64 numbers besides.
    assert peaks[1] - peaks[0] < 150 * 4 * (2 * 6 + 64) < 150 * vocab * 4


@on_cpu
@backends
@pytest.mark.parametrize("name", ["perl", "gspo"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_products_of_what_needs_a_gradient(
    needs: tuple[bool, bool], name: str, backend: Any
) -> None:
    """One for the logits of a block, and one for each gradient that somebody asks for."""
    problem = Problem.make((5, 1, 0, 6))
    n, (v, h) = 12, problem.weight.shape
    leaves = leaves_of(problem, needs)
    given = arguments_of(problem, loss=PolicyLoss.preset(name), backend=backend)
    logits, by_hidden, by_weight = ((n, h), (h, v)), ((n, v), (v, h)), ((v, n), (n, h))
    gradients = [p for p, need in zip((by_hidden, by_weight), needs, strict=True) if need]

    def fused() -> None:
        output = linear_grpo_loss(*leaves, problem.targets, **given)
        if any(needs):
            output.loss.backward()

    assert sorted(cost(fused).products) == sorted([logits, *gradients])
    with torch.no_grad():
        assert cost(lambda: linear_grpo_loss(*leaves, problem.targets, **given)).products == [
            logits
        ]

    # Without the loss the logits are made again in the backward.
    def scored() -> None:
        seen = linear_token_logprobs(*leaves, problem.targets, backend=backend)
        if any(needs):
            seen.logprobs.sum().backward()

    again = [logits] if any(needs) else []
    assert sorted(cost(scored).products) == sorted([logits, *again, *gradients])


@on_cpu
@pytest.mark.parametrize(
    ("name", "old", "one_pass"),
    [
        *(("perl", True, True), ("cispo", True, True)),
        *(("gspo", True, False), ("gmpo", True, False), ("vespo", True, False)),
        *((name, False, True) for name in ("gspo", "gspo_token", "luspo", "gmpo", "vespo")),
    ],
)
def test_passes_over_the_head(name: str, old: bool, one_pass: bool) -> None:
    """Completions of 5, 1, 0, 7 and 3 tokens. In blocks of 4, those of 5 and 7 fit in none and are
    made twice; the others, and everything in blocks of 7, are made once for any loss."""
    problem = Problem.make()
    leaves, (v, h) = leaves_of(problem), problem.weight.shape
    given = arguments_of(problem, loss=PolicyLoss.preset(name))
    if not old:
        given["old_logprobs"] = None
    for chunk_size, blocks in ((4, 4 if one_pass else 2 * 2 + 1 + 2 * 2 + 1), (7, 3)):

        def call(size: int = chunk_size) -> None:
            output = linear_grpo_loss(*leaves, problem.targets, chunk_size=size, **given)
            output.loss.backward()

        made = [left for left, right in cost(call).products if right == (h, v)]
        assert len(made) == blocks and max(n for n, _ in made) <= chunk_size


@on_cpu
@backends
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_idle_rows_are_left_out(name: str, backend: Any) -> None:
    """Zero advantages and masked tokens: the same gradients, from products of fewer rows."""
    problem = Problem.make()
    v, h = problem.weight.shape
    advantages = torch.tensor([1.0, 0.0, 0.5, 0.0, -0.7])
    loss = PolicyLoss.preset(name, clip_low=0.9, clip_high=9.0)
    given = arguments_of(problem, advantages=advantages, loss=loss, chunk_size=6, backend=backend)
    found = []
    for skip in (False, True):
        leaves = leaves_of(problem)

        def call(skip: bool = skip, leaves: Any = leaves) -> None:
            output = linear_grpo_loss(*leaves, problem.targets, skip_idle=skip, **given)
            output.loss.backward()

        products = cost(call).products
        found.append([leaf.grad for leaf in leaves])
        rows = sum(right[0] for left, right in products if (left[0], right[1]) == (v, h))
        assert 0 < rows < 12 if skip else rows == 16
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@on_cpu
@backends
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_gradient_of_the_head_is_written_once(chunk_size: int | None, backend: Any) -> None:
    """By the products alone: not filled with 0 before, not copied or scaled afterwards."""
    n, v, h = 4, 64, 32
    hidden, weight = (torch.randn(k, h, requires_grad=True) for k in (n, v))
    given = (torch.arange(n), torch.ones(1), torch.tensor([0, n]), PolicyLoss())

    def call() -> None:
        output = linear_grpo_loss(hidden, weight, *given, chunk_size=chunk_size, backend=backend)
        output.loss.backward()

    call()
    weight.grad = None
    assert not cost(call, size=v * h).passes


@on_cpu
@backends
def test_one_block_has_no_wide_gradient_of_the_head(backend: Any) -> None:
    n, v, h = 4, 512, 256
    hidden, weight = (torch.randn(k, h).bfloat16().requires_grad_() for k in (n, v))
    given = (torch.arange(n), torch.ones(1), torch.tensor([0, n]), PolicyLoss())

    def call() -> None:
        linear_grpo_loss(hidden, weight, *given, backend=backend).loss.backward()

    call()
    hidden.grad = weight.grad = None
    found = cost(call, size=v * h)
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    # Beside it, the block of logits and what PyTorch makes of it in fp32.
    assert found.peak < 1.5 * 2 * v * h and not found.passes


class Launch(NamedTuple):
    """Bytes of different addresses that a kernel has read, and written."""

    kernel: str
    read: int
    written: int


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What Triton's interpreter runs from now on."""
    pytest.importorskip("triton")
    if DEVICE != "cpu":
        pytest.skip("counts what the interpreter does")
    from triton.runtime import interpreter

    found: list[Launch] = []
    touched: dict[str, set[int]] = {"read": set(), "written": set()}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.GridExecutor.__call__

    def addresses(pointers: Any, mask: Any) -> set[int]:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        return {int(x) + k for x in pointers.data[mask.data].flat for k in range(size)}

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        touched["read"] |= addresses(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched["written"] |= addresses(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        for kind in touched.values():
            kind.clear()
        run(self, *arguments, **named)
        found.append(Launch(self.fn.__name__, *(len(kind) for kind in touched.values())))

    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    # The interpreter copies tensors back from the host, where these are already.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    return found


N, V = 6, 512
NV = 2 * N * V
"""Bytes of the logits below, and of their gradient."""


def logits_call(loss: PolicyLoss) -> tuple[Tensor, dict[str, Any]]:
    logits = torch.randn(N, V).bfloat16().requires_grad_()
    given = {
        "targets": torch.arange(N),
        "advantages": torch.tensor([1.0, -1.0]),
        "cu_seqlens": torch.tensor([0, 2, N]),
        "loss": loss,
        "old_logprobs": torch.full((N,), -6.0),
        "ref_logprobs": torch.full((N,), -6.0),
        "backend": "triton",
    }
    return logits, given


def over_logits(launches: list[Launch]) -> list[tuple[int, int]]:
    """How often each kernel that goes over all logits reads them, and writes their gradient."""
    return [(x.read // NV, x.written // NV) for x in launches if max(x.read, x.written) >= NV]


@pytest.mark.parametrize("name", ["perl", "gspo"])
def test_bytes_of_the_loss_of_logits(name: str, launches: list[Launch]) -> None:
    """Statistics and gradient: two kernels, 6NV bytes in bf16, and no pass in PyTorch."""
    logits, given = logits_call(
        PolicyLoss.preset(name, clip_low=0.9, clip_high=9.0, dual_clip=None)
    )
    found = cost(lambda: grpo_loss(logits, **given).loss.backward(), size=N * V)
    assert over_logits(launches) == [(1, 0), (1, 1)] and not found.passes
    # Memory: the gradient, and numbers per row.
    assert found.peak < NV + N * 400


@pytest.mark.parametrize(("name", "kernels"), [("perl", [(1, 1)]), ("gspo", [(1, 0), (1, 1)])])
def test_bytes_in_place(name: str, kernels: Any, launches: list[Launch]) -> None:
    """4NV bytes where a row knows its coefficient; nothing is scaled by an upstream gradient of 1."""
    logits, given = logits_call(
        PolicyLoss.preset(name, clip_low=0.9, clip_high=9.0, dual_clip=None)
    )
    for upstream, scaled in ((1.0, 0), (-3.0, 1)):
        written_over = logits * 1.0
        launches.clear()
        outputs: list[Tensor] = []

        def forward(x: Tensor = written_over, outputs: Any = outputs) -> None:
            outputs.append(grpo_loss(x, inplace=True, **given).loss)

        found = cost(forward, size=N * V)
        assert over_logits(launches) == kernels and not found.passes and found.peak < N * 400
        launches.clear()
        factor = torch.tensor(upstream)
        found = cost(lambda: torch.autograd.grad(outputs[0], written_over, factor), size=N * V)  # noqa: B023
        assert not launches and found.passes.total() == scaled


def test_bytes_of_log_probs(launches: list[Launch]) -> None:
    logits, given = logits_call(PolicyLoss())
    seen = token_logprobs(logits, given["targets"], backend="triton")
    (seen.logprobs.sum() + seen.entropy.sum()).backward()
    assert over_logits(launches) == [(1, 0), (1, 1)]


def test_advantages_are_one_launch(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_kernels.advantage.values_visible", lambda tensor: False)
    sizes = torch.tensor([3, 4, 1])
    for scale in ("group", "batch", "none"):
        for rewards in (torch.rand(8), torch.rand(8, 2)):

            def call(rewards: Tensor = rewards, scale: Any = scale) -> None:
                group_advantages(rewards, sizes, scale=scale, backend="triton")

            launches.clear()
            assert not cost(call, size=1).passes and len(launches) == 1


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("policy_loss", {}, {"perl": 5, "gspo": 5}),
        ("grpo_loss", {}, {"perl": 5, "gspo": 5}),
        ("grpo_loss", {"inplace": True}, {"perl": 4, "gspo": 7}),
        ("linear_grpo_loss", {}, {"perl": 4, "gspo": 7}),
        ("linear_grpo_loss", {"chunk_size": 4}, {"perl": 5, "gspo": 11}),
        ("token_logprobs", {}, {"perl": 2}),
        ("linear_token_logprobs", {"chunk_size": 4}, {"perl": 4}),
    ],
)
def test_launches(
    name: str, options: dict[str, Any], expected: dict[str, int], launches: list[Launch]
) -> None:
    """Of forward and backward, for `policy_loss` with those of its log-probs; rewards that the loss
    normalises itself are one more, as weights are."""
    call, lengths = Call("triton"), (2, 2, 2, 2, 0)
    call.hidden, call.targets = call.hidden.detach()[:8].requires_grad_(), call.targets[:8]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    call.common = {n: x if n == "advantages" else x[:8] for n, x in call.common.items()}
    call.common |= {"cu_seqlens": bounds, "weights": None}
    for preset, count in expected.items():
        for advantages in (call.common["advantages"], GroupedRewards(torch.rand(5), [5])):
            grouped = isinstance(advantages, GroupedRewards)
            given = {"advantages": advantages} if name in NAMES[:3] else {}
            launches.clear()
            call.run(name, PolicyLoss.preset(preset), **given, **options).backward()
            assert len(launches) == count + (grouped and bool(given)), launches
