"""The training step on its own: patches, attention, decoding, faster layers, repeated updates, ragged rows.

All in bfloat16 with heads as Qwen2.5-VL has them; on a CPU tiny, in the same order.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.first.bench import Bench
from benchmarks.harness.device import free_memory, peak_memory, synchronize
from benchmarks.harness.models import shape, special_tokens
from benchmarks.train_step.workload import Workload
from perl.model.families import family_of
from perl.model.head import HeadLoss
from perl.model.layers import check_compiler, check_liger, compile_layers, use_liger
from perl.model.packed.attention import IMPLEMENTATIONS, choose, use_packed_attention
from perl.model.packed.layout import AttentionArgs, PackedLayout
from perl.model.policy import Policy
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.training.components import deterministic
from perl.types import EncodedPrompt, PackedBatch, UserError
from perl_kernels import PolicyLoss

LOSS = PolicyLoss.preset("perl", kl=None, kl_coef=0.0)
_LOST = 2.0
"""How many times as much as PyTorch's own operation in bfloat16 another may lose against fp32."""


def patches(bench: Bench) -> None:
    """The patch embedding of a Qwen tower, Conv3d against the product that it is."""
    number, hidden = (64, 32) if bench.dry else (16384, 1280)
    torch.manual_seed(0)
    conv = nn.Conv3d(3, hidden, (2, 14, 14), (2, 14, 14), bias=False)
    conv = conv.to(bench.device, torch.bfloat16)
    weight = conv.weight
    x = torch.randn(number, 3 * 2 * 14 * 14, device=bench.device, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], Tensor]] = {
        "Conv3d": lambda: conv(x.view(-1, 3, 2, 14, 14)).flatten(1),
        "linear": lambda: F.linear(x, weight.flatten(1)),
    }
    exact = F.linear(x.float(), weight.detach().float().flatten(1))
    gradient = torch.randn_like(exact)
    for name, forward in ways.items():

        def both(forward: Callable[[], Tensor] = forward) -> None:
            weight.grad = None
            forward().backward(gradient.to(torch.bfloat16))

        try:
            lost = _off(forward(), exact)
            figures = {"forward_ms": 1e3 * bench.seconds(forward, 3)}
            figures["both_ms"] = 1e3 * bench.seconds(both, 3)
        except RuntimeError as error:  # cuDNN has no backward of it in some versions.
            bench.say(f"patches, {name}", missing=str(error).partition("\n")[0])
            continue
        assert weight.grad is not None
        lost = max(lost, _off(weight.grad.flatten(1), gradient.T @ x.float()))
        wrong = f"off by {lost:.1e}" if lost > 2**-7 else ""
        bench.say(f"patches, {name}", wrong, **figures, error=lost)


def attention(bench: Bench) -> None:
    """Each implementation on a packed row with shared prompts, 28 heads over 4 of dimension 128."""
    prompt, completion, prompts = (40, 9, 2) if bench.dry else (2130, 512, 4)
    heads, kv_heads, dim, rollouts = 28, 4, 128, 6
    starts, prefixes, at = [], [], 0
    for _ in range(prompts):
        for rollout in range(rollouts):  # The first goes on in its prompt's sequence.
            starts.append(at + (prompt + rollout * completion if rollout else 0))
            prefixes.append((at, prompt if rollout else 0))
        at += prompt + rollouts * completion
    places, lengths = (torch.tensor(x) for x in zip(*prefixes, strict=True))
    layout = PackedLayout(torch.tensor([*starts, at]), places, lengths, bench.device)
    torch.manual_seed(0)
    given = [torch.randn(1, n, at, dim, device=bench.device) for n in (heads, kv_heads, kv_heads)]
    given = [x.to(torch.bfloat16) for x in given]
    gradient = torch.randn(1, at, heads, dim, device=bench.device).to(torch.bfloat16)
    # As flash kernels count: pairs that meet, two products forward and five backward.
    own = layout.lengths.double()
    pairs = float((own * (layout.prefix_lengths + own / 2)).sum())
    flops = 4 * heads * dim * pairs

    def run(
        name: str, dtype: torch.dtype
    ) -> tuple[list[Tensor], Callable[[], Any], Callable[[], Any]]:
        q, k, v = (x.to(dtype).requires_grad_() for x in given)

        def forward() -> Tensor:
            return IMPLEMENTATIONS[name](q, k, v, layout, AttentionArgs())

        def both() -> list[Tensor]:
            out = forward()
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.to(dtype))]

        return both(), forward, both

    exact, *_ = run("sdpa", torch.float32)
    allowed = []
    for name in ("sdpa", *(n for n in IMPLEMENTATIONS if n != "sdpa")):
        try:
            choose(name, bench.device)
            found, forward, both = run(name, torch.bfloat16)
        except (UserError, RuntimeError) as error:
            bench.say(f"attention, {name}", missing=str(error).partition("\n")[0])
            continue
        lost = [_off(x, e) for x, e in zip(found, exact, strict=True)]
        allowed = allowed or [_LOST * x for x in lost]
        once, twice = bench.seconds(forward, 3), bench.seconds(both, 3)
        bench.say(
            f"attention, {name}",
            "" if all(x <= a for x, a in zip(lost, allowed, strict=True)) else f"loses {lost}",
            forward_ms=1e3 * once,
            backward_ms=1e3 * (twice - once),
            forward_tflops=flops / once / 1e12,
            backward_tflops=2.5 * flops / max(twice - once, 1e-9) / 1e12,
            error=max(lost),
        )


class _Ids:
    """What an engine asks of a processor: nothing ends."""

    pad_token_id, eos_token_id = 0, -1

    @staticmethod
    def unsampled_token_ids() -> Tensor:
        return torch.tensor([1])


def decode(bench: Bench) -> None:
    """192, 48 and 12 completions, six a prompt, through the trainer's engine, which is to wait in one step of sixteen."""
    policy, processor = _policy(bench, 36), _Ids()
    length, new = (20, 8) if bench.dry else (2130, 128)
    rng = np.random.default_rng(0)
    for prompts in (2,) if bench.dry else (32, 8, 2):
        given = [
            EncodedPrompt(
                rng.integers(5, 900, length), np.tile(np.arange(length), (3, 1)), length, (), -1
            )
            for _ in range(prompts)
        ]
        budget = prompts * (length + 6 * new)
        engine = InProcessEngine(policy, processor, budget)  # pyright: ignore[reportArgumentType]

        def sample(tokens: int, engine: Any = engine, given: Any = given) -> int:
            found = engine.generate(given, SamplingParams(6, 1.0, tokens), 0)
            synchronize(bench.device)
            return sum(len(c.token_ids) for completions in found for c in completions)

        sample(new)  # Compiles and captures.
        seconds, waits, made = {}, {}, 0
        for tokens in (1, new):
            start = time.perf_counter()
            made = sample(tokens)
            seconds[tokens] = time.perf_counter() - start
            with _waits(bench) as said:
                sample(tokens)
            waits[tokens] = sum("synchronizing" in str(each.message) for each in said)
        _, peak = peak_memory(lambda: sample(new), bench.device)
        step = (seconds[new] - seconds[1]) / (new - 1)
        waited = (waits[new] - waits[1]) / (new - 1)  # Prefill waits once for both.
        wrong = f"{made} tokens" if made != 6 * prompts * new else ""
        bench.say(
            f"decode, {6 * prompts} sequences",
            wrong or (f"{waited:.2f} waits a step" if waited > 1 / 8 else ""),
            ms_per_step=1e3 * step,
            tokens_per_s=6 * prompts / step,
            prefill_s=seconds[1],
            waits_per_step=waited,
            peak_mib=peak >> 20,
        )


def layers(bench: Bench) -> None:
    """A micro-batch with transformers' layers, with Liger's kernels, compiled, and both."""
    workload = _workload(bench)
    expected: Tensor | None = None
    # Liger's rotary embedding stays in the process: it comes last.
    for name in ("stock", "compiled", "liger", "liger and compiled"):
        free_memory()
        policy = _policy(bench, 36)
        decoder = policy.core.language_model
        try:
            if "liger" in name:
                check_liger(bench.device)
                use_liger(decoder)
            if "compiled" in name:
                check_compiler()
                compile_layers(decoder, "eager" if bench.dry else "inductor")
        except UserError as error:
            bench.say(f"layers, {name}", missing=str(error))
            continue
        batch = _rows(policy, workload, 16384)[0]

        def call(policy: Policy = policy, batch: PackedBatch = batch) -> Tensor:
            return _backward(policy, batch)

        start = time.perf_counter()
        logprobs = call()
        synchronize(bench.device)
        first = time.perf_counter() - start
        expected = logprobs if expected is None else expected
        off = float((logprobs - expected).abs().max())
        bench.say(
            f"layers, {name}",
            f"log-probs differ by {off:.2f}" if off > 0.25 else "",
            ms=1e3 * bench.seconds(call, 3),
            first_s=first,
            peak_mib=peak_memory(call, bench.device)[1] >> 20,
            largest_difference=off,
        )
        del policy, decoder, call


def repeat(bench: Bench) -> None:
    """One update twice, with and without PyTorch's deterministic algorithms: are the gradients equal to the bit?"""
    policy = _policy(bench, 8)
    batches = _rows(policy, _workload(bench), 8192)
    weights = [p for p in policy.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        policy.zero_grad(set_to_none=True)
        for batch in batches:
            _backward(policy, batch)
        return [p.grad.cpu() for p in weights if p.grad is not None]

    for wanted in (True, False):  # In this order: cuBLAS reads its setting when it is first used.
        try:
            with deterministic(wanted):
                first, second = gradients(), gradients()
                seconds = bench.seconds(gradients, 3)
        except RuntimeError as error:  # PyTorch has no such algorithm for an operation.
            bench.say(f"repeat, deterministic {wanted}", str(error).partition("\n")[0])
            continue
        same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
        bench.say(
            f"repeat, deterministic {wanted}",
            "" if all(same) or not wanted else f"{same.count(False)} gradients differ",
            ms=1e3 * seconds,
            equal=all(same),
            tensors=len(same),
        )


def segments(bench: Bench) -> None:
    """Thirty rows of different lengths, with and without segments of the allocator that grow."""
    policy = _policy(bench, 12)
    longest, number = (200, 3) if bench.dry else (12000, 30)
    # In the order of their lengths every row would fit where the last one lay.
    lengths = np.random.default_rng(0).permutation(np.linspace(0.2, 1.0, number)) * longest
    rows = [_rows(policy, _ragged(int(n)), 10**6)[0] for n in lengths]
    for expandable in (False, True):
        free_memory()
        if not bench.dry:
            torch.cuda.memory._set_allocator_settings(f"expandable_segments:{expandable}")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["num_alloc_retries"]
        start = time.perf_counter()
        for row in rows:
            policy.zero_grad(set_to_none=True)
            _backward(policy, row)
        synchronize(bench.device)
        figures: dict[str, Any] = {"s": time.perf_counter() - start}
        if not bench.dry:
            stats = torch.cuda.memory_stats()
            figures["peak_reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
            figures["peak_allocated_mib"] = torch.cuda.max_memory_allocated() >> 20
            figures["retries"] = stats["num_alloc_retries"] - before
        bench.say(f"segments, expandable {expandable}", **figures)
        policy.zero_grad(set_to_none=True)


def _off(found: Tensor, exact: Tensor) -> float:
    """Euclidean norm of the error over that of the result."""
    found, exact = found.detach().float(), exact.detach().float()
    return float((found - exact).norm() / exact.norm())


@contextmanager
def _waits(bench: Bench) -> Iterator[list[Any]]:
    """What PyTorch warns of where the host waits for the GPU; a CPU has none."""
    if bench.dry:
        yield []
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _policy(bench: Bench, depth: int) -> Policy:
    """A Qwen2.5-VL with the widths of 3B and so many layers, random weights, all trained."""
    from transformers import AutoModelForImageTextToText

    gc.collect()
    config = shape("tiny" if bench.dry else "3b")
    text = config.text_config
    text.num_hidden_layers = min(depth, text.num_hidden_layers)
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    torch.manual_seed(0)
    with bench.device:
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    family = family_of(config.model_type)
    assert family is not None
    name, _ = choose("auto", bench.device)
    use_packed_attention(model.model.language_model, family.tower(model.model), name)
    return Policy(model, family).train()


def _workload(bench: Bench) -> Workload:
    if bench.dry:
        return Workload(images=(2,), rollouts=3, completion=20, tokens_per_image=6)
    return Workload(images=(6,))


def _rows(policy: Policy, workload: Workload, budget: int) -> list[PackedBatch]:
    segments = workload.segments(policy.base.config, policy.family)
    return policy.pack(segments, budget, True)


def _ragged(tokens: int) -> Workload:
    """A short prompt with two completions, of about so many tokens together."""
    return Workload(images=(1,), orders=1, rollouts=2, completion=tokens // 2, tokens_per_image=4)


def _backward(policy: Policy, batch: PackedBatch) -> Tensor:
    """Forward and backward of a row; log-probs [N]."""
    banned = torch.tensor(special_tokens(policy.base.config))
    output = HeadLoss(policy, banned, temperature=1.0)(batch, LOSS, float(batch.num_scored))
    output.loss.backward()
    return output.logprobs.detach().float()
