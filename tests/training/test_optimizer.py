"""What an optimizer step does to the weights of a policy over two tokens, whose gradient is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from perl.config import TrainConfig
from perl.model.head import SUPERVISED, HeadLoss, PolicyLoss
from perl.model.packed.pack import pack_row
from perl.training.optimizer import Optimizer, Schedule
from perl.training.parallel.gradients import sum_over_processes
from perl.types import PackedBatch
from tests.messages import refused
from tests.training.two_tokens import Accelerator, Together, TwoTokens, segment


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8]),
        ("linear", 0, [8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        # Half of 1 + cos of 0, 45, 90 and 135 degrees.
        ("cosine", 2, [4, 8, 8, 4 + 4 * 0.5**0.5, 4, 4 - 4 * 0.5**0.5]),
        ("linear", 6, [8 / 6, 16 / 6, 4, 32 / 6, 40 / 6, 8]),
        # The same between 8 and 2.
        ("cosine_with_min_lr(min_lr=2.0)", 2, [4, 8, 8, 5 + 3 * 0.5**0.5, 5, 5 - 3 * 0.5**0.5]),
        ("cosine_with_restarts(num_cycles=2)", 2, [4, 8, 8, 4, 8, 4]),
        ("polynomial(power=2.0, lr_end=0.0)", 2, [4, 8, 8, 8 * 9 / 16, 8 * 4 / 16, 8 / 16]),
        ("warmup_stable_decay(num_decay_steps=2, decay_type='linear')", 2, [4, 8, 8, 8, 8, 4]),
    ],
)
def test_learning_rates(kind: str, warmup: int, rates: list[float]) -> None:
    schedule = Schedule(8.0, kind, warmup, 6)
    assert [schedule(step) for step in range(6)] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("cosin", ["cosine", "linear"]),
        ("reduce_lr_on_plateau", ["cosine", "linear"]),
        ("cosine(cycles=2)", ["cycles"]),
        ("constant(min_lr=1.0)", ["min_lr"]),
        ("polynomial(lr_end=9.0)", ["lr_end"]),
    ],
)
def test_what_is_no_schedule(kind: str, names: list[str]) -> None:
    with refused("train.schedule", kind.replace("'", ""), *names):
        Schedule(8.0, kind, 0, 6)


Rows = Sequence[tuple[Sequence[int], float]]
"""Completions with their advantages."""

STEPS: list[list[Rows]] = [
    [[([1], 1.0), ([0, 0], -3.0)], [([1], 0.5)]],
    [[([0, 1], 2.0)], [([1, 1], 0.25)], [([0], -0.5)]],
    [[([0], 0.125), ([1], -0.125)]],
]
"""Three optimizer steps of some micro-batches each."""


def batch(rows: Rows) -> PackedBatch:
    completions, advantages = zip(*rows, strict=True)
    return pack_row([segment(completions, advantages)])


def optimizer_of(policy: Any, accelerator: Any = None, **train: Any) -> Optimizer:
    head = HeadLoss(policy, torch.empty(0, dtype=torch.long), temperature=1.0)
    config = TrainConfig(**{"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.0, **train})
    rate = Schedule(config.lr, "linear", 0, 4)
    return Optimizer(accelerator or Accelerator(), head, rate, config)


def weights_of(policy: TwoTokens) -> list[float]:
    """The two of the head, and the gain."""
    return [*policy.head_weight.flatten().tolist(), *policy.gain.tolist()]


def gradient(weights: Sequence[float], tokens: Sequence[tuple[int, float]]) -> list[float]:
    """Of -mean(A log p(y)) over tokens y with advantages A, where the logits are a * g and b * g."""
    a, b, g = weights
    p = 1 / (1 + math.exp((a - b) * g))  # of token 1
    slope = sum(A * (y - p) for y, A in tokens) / len(tokens)  # of log p(1) / p(0), times -1
    return [slope * g, -slope * g, -slope * (b - a)]


def flat(rows: Sequence[Rows]) -> list[tuple[int, float]]:
    return [(y, A) for micro in rows for completion, A in micro for y in completion]


@pytest.mark.parametrize("limit", [10.0, 0.05])
def test_steps_are_adamw_s_with_the_clipped_gradient_of_all_micro_batches(limit: float) -> None:
    policy = TwoTokens(0.3, -0.2)
    optimizer = optimizer_of(policy, max_grad_norm=limit, weight_decay=0.5)
    w, mean, square = [*weights_of(policy)], [0.0] * 3, [0.0] * 3
    for number, rows in enumerate(STEPS):
        found = optimizer.step(number, [batch(micro) for micro in rows], SUPERVISED)
        # Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2; the gain is not decayed.
        g, lr = gradient(w, flat(rows)), 0.1 * (1 - number / 4)
        norm = math.sqrt(sum(x * x for x in g))
        p = 1 / (1 + math.exp((w[0] - w[1]) * w[2]))
        loss = -sum(A * math.log(p if y else 1 - p) for y, A in flat(rows)) / len(flat(rows))
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        expected = {"loss": loss, "grad_norm": norm, "lr": lr, "entropy": entropy}
        expected |= {"tokens": len(flat(rows)), "ratio_mean": 1, "ratio_max": 1}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        for i in range(3):
            x = g[i] * min(1, limit / norm)
            mean[i] = 0.5 * mean[i] + 0.5 * x
            square[i] = 0.75 * square[i] + 0.25 * x * x
            unbiased = mean[i] / (1 - 0.5 ** (number + 1))
            scale = math.sqrt(square[i] / (1 - 0.75 ** (number + 1))) + 1e-8
            w[i] -= lr * ((0.5 * w[i] if i < 2 else 0) + unbiased / scale)
        assert weights_of(policy) == pytest.approx(w, rel=1e-4)
    assert optimizer.updates == 3


def half(*logits: float) -> TwoTokens:
    return TwoTokens(*logits).bfloat16()


def masters_of(optimizer: Optimizer) -> list[float]:
    """As `weights_of`, of what AdamW steps."""
    assert {master.dtype for master in optimizer.masters.values()} == {torch.float32}
    return [x for master in optimizer.masters.values() for x in master.flatten().tolist()]


def test_weights_in_bfloat16_are_the_rounding_of_masters_in_float32() -> None:
    """Steps of 0.0009 from 1, where numbers of bfloat16 lie 1/256 apart, 1/128 above."""
    policy = half(1.0, 1.0)
    optimizer = optimizer_of(policy)
    optimizer.schedule = Schedule(9e-4, "constant", 0, 3)
    for number, weights in enumerate([[1.0, 1.0], [1.0, 1.0], [1.0, 1 - 1 / 256]]):
        # The gradient is -1/2 and 1/2 as long as the weights are equal: AdamW moves by its sign.
        optimizer.step(number, [batch([([0], 1.0)])], SUPERVISED)
        moved = (number + 1) * 9e-4
        assert masters_of(optimizer) == pytest.approx([1 + moved, 1 - moved, 1], rel=1e-7)
        assert weights_of(policy) == [*weights, 1]
        assert all(p.grad is None for p in policy.parameters())


def test_gradients_of_micro_batches_in_bfloat16_add_up_in_float32() -> None:
    """256 and 63 halves over 64 tokens: a sum in bfloat16, whose numbers lie 2 apart there, would stay at 256."""
    rows = [batch([([1], 512.0)]), *[batch([([1], 1.0)])] * 63]
    found = optimizer_of(half(0.0, 0.0)).step(0, rows, SUPERVISED)
    assert found["grad_norm"] == pytest.approx(math.sqrt(2) * (256 + 63 / 2) / 64, rel=1e-6)


def test_an_optimizer_takes_no_gradients_but_those_of_its_own_steps() -> None:
    policy = half(1.0, 1.0)
    before, now = optimizer_of(policy), optimizer_of(policy)
    now.step(0, [batch([([0], 1.0)])], SUPERVISED)
    assert masters_of(before) == [1, 1, 1] != masters_of(now)
    assert all(master.grad is None for master in before.masters.values())
    policy.gain.sum().backward()
    assert policy.gain.grad is not None


def test_a_weight_of_float32_is_its_own_master_and_adamw_is_fused_on_a_gpu() -> None:
    policy = TwoTokens()
    head = HeadLoss(policy, torch.empty(0, dtype=torch.long), 1.0)  # type: ignore[arg-type]
    for kind, fused in (("cpu", None), ("cuda", True)):
        policy.device = torch.device(kind)
        optimizer = Optimizer(Accelerator(), head, Schedule(1.0, "constant", 0, 1), TrainConfig())
        assert all(master is weight for weight, master in optimizer.masters.items())
        assert optimizer.adamw.defaults["fused"] is fused


def test_without_a_gradient_matrices_decay_and_vectors_stay() -> None:
    policy = TwoTokens(2.0, -1.0)
    optimizer_of(policy, weight_decay=0.5).step(0, [batch([([0, 1], 0.0)])], SUPERVISED)
    # 1 - 0.1 * 0.5 of what it was.
    assert weights_of(policy) == pytest.approx([1.9, -0.95, 1.0])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_weight_that_nothing_reaches_decays_too(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a vision tower's in a step of texts alone, on any number of processes."""
    together = Together(processes, monkeypatch)

    def left(index: int) -> float:
        policy = TwoTokens(2.0, -1.0)
        policy.idle = torch.nn.Parameter(torch.full((1, 1), 2.0))
        optimizer = optimizer_of(policy, Accelerator(together), weight_decay=0.5)
        optimizer.step(0, [batch([([0, 1], 1.0)])], SUPERVISED)
        return policy.idle.item()

    assert together.run(left) == pytest.approx([2.0 * (1 - 0.1 * 0.5)] * processes)


def test_a_step_is_taken_in_training_mode() -> None:
    """Dropout and recomputed activations depend on it; the rollouts before it were sampled in the other."""
    policy, modes = TwoTokens(0.3, -0.2).eval(), []
    policy.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    optimizer_of(policy).step(0, [batch([([1], 1.0)]), batch([([0], 1.0)])], SUPERVISED)
    assert modes == [True, True]


@pytest.mark.parametrize(
    ("advantage", "dtype"), [(math.inf, torch.float32), (math.nan, torch.bfloat16)]
)
def test_a_gradient_that_is_not_finite_changes_nothing(
    advantage: float, dtype: torch.dtype
) -> None:
    policy, other = TwoTokens(0.3, -0.2).to(dtype), TwoTokens(0.3, -0.2).to(dtype)
    optimizer, unharmed = optimizer_of(policy), optimizer_of(other)
    with refused("optimizer step 8", "learning rate", "warm-up", "checkpoint"):
        optimizer.step(7, [batch([([1], advantage)])], SUPERVISED)
    assert weights_of(policy) == weights_of(other) and optimizer.updates == 0
    # Nothing of it is left in the moments or the gradient of the steps that follow.
    for each in (optimizer, unharmed):
        each.step(0, [batch(micro) for micro in STEPS[0]], SUPERVISED)
    assert weights_of(policy) == weights_of(other)
    assert masters_of(optimizer) == masters_of(unharmed)


def test_a_step_needs_one_token() -> None:
    policy = TwoTokens(2.0, -1.0)
    optimizer = optimizer_of(policy, weight_decay=0.5)
    assert optimizer.step(0, [], SUPERVISED) == {}
    assert optimizer.step(0, [batch([([], 1.0)])], SUPERVISED) == {}
    assert weights_of(policy) == [2.0, -1.0, 1.0] and optimizer.updates == 0
    found = optimizer_of(TwoTokens()).step(0, [batch([([1], 1.0)])], SUPERVISED)
    assert (found["tokens"], found["entropy"]) == (1, pytest.approx(math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_counts_as_a_change_of_the_weights(dtype: torch.dtype) -> None:
    """The vision tower's cache goes by it; pixels on its device stay for the step's next update."""
    policy = TwoTokens().to(dtype)
    optimizer = optimizer_of(policy)
    for group in optimizer.adamw.param_groups:
        group["fused"] = True
    for number in range(2):
        before = [p._version for p in policy.parameters()]
        optimizer.step(number, [batch(STEPS[0][0])], SUPERVISED)
        assert all(p._version > v for p, v in zip(policy.parameters(), before, strict=True))
    assert policy.vision.cleared == 0


CLIPPED = PolicyLoss(aggregation="seq-mean-token-sum", kl="k2", kl_coef=0.5)


@pytest.mark.parametrize(
    ("share", "dtype"),
    [
        *(((3, 0), torch.float32), ((2, 1), torch.float32), ((0, 3), torch.float32)),
        ((2, 1), torch.bfloat16),
    ],
)
def test_processes_take_one_step_together(
    share: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the micro-batches: weights and metrics are those of one process that has all."""
    rows = [batch(micro) for micro in STEPS[1]]
    now = TwoTokens(0.3, -0.2).to(dtype).float().logprobs()
    old = [now[b.targets] - 0.1 * (1 + i) for i, b in enumerate(rows)]
    ref = [now[b.targets] + 0.3 * (1 + i) for i, b in enumerate(rows)]

    def step(own: slice, accelerator: Any) -> tuple[dict[str, float], list[float]]:
        policy = TwoTokens(0.3, -0.2).to(dtype)
        optimizer = optimizer_of(policy, accelerator, max_grad_norm=0.1)
        return optimizer.step(0, rows[own], CLIPPED, old[own], ref[own]), masters_of(optimizer)

    metrics, weights = step(slice(None), None)
    # Ratios e^0.1, e^0.2 and e^0.3 of 2, 2 and 1 tokens; the KL's estimate is half of the square.
    ratios = [math.exp(0.1)] * 2 + [math.exp(0.2)] * 2 + [math.exp(0.3)]
    assert metrics["ratio_max"] == pytest.approx(math.exp(0.3))
    assert metrics["ratio_mean"] == pytest.approx(sum(ratios) / 5)
    assert metrics["kl"] == pytest.approx((2 * 0.3**2 + 2 * 0.6**2 + 0.9**2) / 2 / 5)
    assert (metrics["tokens"], metrics["invalid_rows"]) == (5, 0)
    together = Together(2, monkeypatch)
    first = slice(0, share[0]), slice(share[0], 3)
    found = together.run(lambda index: step(first[index], Accelerator(together)))
    for own, left in found:
        assert own == pytest.approx(metrics, rel=1e-5)
        assert left == pytest.approx(weights, rel=1e-5)


def test_small_gradients_are_summed_in_buckets_and_large_ones_where_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 8, 4, 16, 4, 4 and 4 bytes, 12 together; each process has gradients that the other lacks."""
    monkeypatch.setattr("perl.training.parallel.gradients._BUCKET_BYTES", 12)
    together = Together(2, monkeypatch)
    sizes: list[list[int]] = [[], []]
    reduce = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *op: Any) -> None:
        sizes[together.here.index].append(tensor.numel())
        reduce(tensor, *op)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def summed(index: int) -> list[list[float] | None]:
        policy = TwoTokens()
        policy.more = nn.ParameterList([torch.zeros(n) for n in (4, 1, 1, 1)])
        optimizer = optimizer_of(policy, Accelerator(together))
        for number, master in enumerate(optimizer.masters.values()):
            if number % 3 != index:
                master.grad = torch.full_like(master, number + 10 * index + 1)
        pointers = {m: m.grad.data_ptr() for m in optimizer.masters.values() if m.grad is not None}
        sum_over_processes(list(optimizer.masters.values()))
        assert all(m.grad is not None and m.grad.data_ptr() == p for m, p in pointers.items())
        return [m.grad.flatten().tolist() for m in optimizer.masters.values() if m.grad is not None]

    found = together.run(summed)
    assert found[0] == found[1]
    assert found[0] == [[11.0] * 2, [2.0], [3 + 13.0] * 4, [14.0], [5.0], [6 + 16.0]]
    assert sizes == [[3, 4, 3]] * 2
