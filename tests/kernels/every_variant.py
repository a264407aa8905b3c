"""Compiles what the public functions launch, as far as Triton's own intermediate form, for every kind
of loss and of input, and counts what other numbers compile anew.

Run as a script, without TRITON_INTERPRET: what the interpreter accepts, the compiler may not. Prints
JSON: how many variants of each kernel there are, how many barriers these have, which calls fail, and
which kernels calls with other numbers compile again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
import triton.compiler
from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler import make_backend

import perl_kernels
from benchmarks.machine_code import EVERYTHING, pretended
from perl_kernels import GroupedRewards, PolicyLoss, rows_triton
from perl_kernels.objective import KL, Aggregation, Correction, Ratio, Surrogate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


DROPS_NAN: list[str] = []
BARRIERS: dict[str, set[int]] = defaultdict(set)


def intermediate(source: Any, target: Any, options: Any = None, **_: Any) -> object:
    """In place of `triton.compile`. Notes statistics of rows whose maximum with NaN is a number, which
    the interpreter's never is."""
    backend: Any = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(parsed)
    made = source.make_ir(target, parsed, code, backend.get_module_map(), context)
    BARRIERS[source.name].add(len(re.findall(r"^\s+\S*barrier", str(made), re.MULTILINE)))
    if source.name in ("row_stats_kernel", "row_loss_kernel") and "maximumf" not in str(made):
        DROPS_NAN.append(source.name)
    return SimpleNamespace()


def objectives() -> Iterator[PolicyLoss]:
    surrogate: Any
    ratio: Any
    for surrogate in get_args(Surrogate):
        several = surrogate in ("clip", "cispo", "sapo")
        for ratio in get_args(Ratio) if several else ("token",):
            yield PolicyLoss(surrogate=surrogate, ratio=ratio)
    for surrogate, ratio in (("clip", "token"), ("clip", "sequence"), ("vespo", "token")):
        for correction in get_args(Correction):
            yield PolicyLoss(surrogate=surrogate, ratio=ratio, correction=correction)
    for surrogate in ("clip", "gmpo"):
        for kl in get_args(KL) if surrogate == "clip" else ("k3",):
            for bias in (False, True):
                kind: dict[str, Any] = {"kl": kl, "kl_coef": 0.1, "kl_bias_correction": bias}
                yield PolicyLoss(surrogate=surrogate, entropy_coef=0.1, **kind)
    bounds: tuple[dict[str, Any], ...] = ({"dual_clip": 3.0}, {"delta": 4.0})
    for bound in bounds:
        for ratio in ("token", "sequence"):
            yield PolicyLoss(ratio=ratio, **bound)
    for aggregation in get_args(Aggregation):
        yield PolicyLoss(aggregation=aggregation, max_completion_length=9)
    yield EVERYTHING


def losses(
    loss: PolicyLoss,
    *,
    n: int = 6,
    old: bool = True,
    dtype: torch.dtype = FP32,
    logits: torch.dtype = BF16,
    columns: int = 96,
    scoring: bool = False,
    cu_dtype: torch.dtype = torch.int32,
    per_token: bool = False,
    temperature: float = 0.8,
    **options: Any,
) -> None:
    """The loss from log-probs, logits and hidden states, with gradients."""
    given: dict[str, Any] = {"backend": "triton", **options}
    near = torch.zeros(n, dtype=dtype)
    if old:
        given["old_logprobs"] = near
    if loss.has_kl:
        given["ref_logprobs"] = near
    if loss.correction is not None:
        given["rollout_logprobs"] = near
    advantages = given.pop("advantages", torch.zeros(n if per_token else 2, dtype=dtype))
    packed = (advantages, torch.tensor([0, 1, n], dtype=cu_dtype), loss)
    targets = torch.zeros(n, dtype=torch.int64)
    own = FP32 if dtype == torch.float64 else dtype
    logprobs, entropy = torch.zeros(2, n, dtype=own, requires_grad=True)
    perl_kernels.policy_loss(logprobs, *packed, entropy=entropy, **given).loss.backward()
    x = torch.zeros(n, columns, dtype=logits, requires_grad=True)
    tau: Any = torch.ones(n) if scoring else temperature
    scores: dict[str, Any] = {"temperature": tau, **given}
    perl_kernels.grpo_loss(x, targets, *packed, **scores).loss.backward()
    perl_kernels.grpo_loss(x.clone(), targets, *packed, inplace=True, **scores).loss.backward()
    hidden = torch.zeros(n, 8, dtype=logits, requires_grad=True)
    weight = torch.zeros(columns, 8, dtype=logits, requires_grad=True)
    if scoring:
        scores |= {"bias": torch.zeros(columns, dtype=FP32, requires_grad=True), "softcap": 30.0}
    perl_kernels.linear_grpo_loss(hidden, weight, targets, *packed, **scores).loss.backward()


def log_probs(dtype: torch.dtype, *, n: int = 6, columns: int = 96, temperature: Any = 0.8) -> None:
    x = torch.zeros(n, columns, dtype=dtype, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int32)
    found = perl_kernels.token_logprobs(x, targets, temperature=temperature, backend="triton")
    found.logprobs.sum().backward(retain_graph=True)
    (found.logprobs.sum() + found.entropy.sum()).backward()


def groups(rewards: Tensor, sizes: Any = (2, 4), **options: Any) -> None:
    perl_kernels.group_advantages(rewards, list(sizes), backend="triton", **options)


def scaled(n: int, dtype: torch.dtype = BF16) -> None:
    """What a backward does with a gradient other than 1, on a GPU only."""
    rows_triton.scale_(torch.zeros(n, dtype=dtype), torch.ones(()))


def calls() -> Iterator[tuple[str, Any]]:
    for loss in objectives():
        for old in (True, False):
            yield f"{loss} {old=}", lambda loss=loss, old=old: losses(loss, old=old)
    rewards = GroupedRewards(torch.zeros(2), torch.tensor([2]))
    several = GroupedRewards(
        torch.zeros(2, 3),
        torch.tensor([2]),
        reward_weights=[1.0, 2.0, 3.0],
        combine="normalize_then_sum",
    )
    inputs: list[dict[str, Any]] = [
        {"scoring": True, "logits": FP32},
        {"scoring": True, "logits": FP16, "dtype": BF16, "columns": 97},
        {"cu_dtype": torch.int64, "per_token": True, "dtype": torch.float64},
        {"weights": torch.ones(6, dtype=torch.bool)},
        {"weights": torch.ones(6, dtype=torch.int64)},
        {"weights": torch.ones(6, dtype=BF16)},
        {"normalizer": torch.tensor(3.0)},
        {"normalizer": torch.tensor(3, dtype=torch.int64)},
        {"normalizer": torch.tensor(3.0, dtype=torch.float64)},
        {"normalizer": 3.5},
        {"advantages": rewards},
        {"advantages": several},
    ]
    for given in inputs:
        for loss in (PolicyLoss(), PolicyLoss.preset("gspo"), EVERYTHING):
            yield f"{loss} {given}", lambda loss=loss, given=given: losses(loss, **given)
    for dtype in (FP32, BF16, FP16):
        yield f"scale_ {dtype}", lambda dtype=dtype: scaled(9, dtype)
        yield f"token_logprobs {dtype}", lambda dtype=dtype: log_probs(dtype)
        yield f"group_advantages {dtype}", lambda dtype=dtype: groups(torch.zeros(6, dtype=dtype))
    two: dict[str, Any] = {"reward_weights": [1.0, 2.0], "combine": "normalize_then_sum"}
    for options in ({"scale": "batch"}, {"scale": "none", "baseline": "leave_one_out"}, two):
        yield f"groups {options}", lambda options=options: groups(torch.zeros(6, 2), **options)


def with_other_numbers() -> dict[str, list[str]]:
    """The kernels that each call compiles again after one like it; none should be."""
    loss = dataclasses.replace(EVERYTHING, surrogate="clip", dual_clip=3.0)
    pairs: dict[str, tuple[Any, Any]] = {}
    changed: dict[str, dict[str, Any]] = {
        "rows": {"n": 16},
        "one row": {"n": 1},
        "columns": {"columns": 1},
        "odd columns": {"columns": 4097},
        "even columns": {"columns": 4096},
        "temperature": {"temperature": 1.0},
        "normalizer": {"normalizer": 16.0},
    }
    for name, given in changed.items():
        like: dict[str, Any] = {"columns": 5000} if given.get("columns", 0) > 2048 else {}
        like |= {"normalizer": 2.5} if name == "normalizer" else {}
        pairs[name] = (lambda like=like: losses(loss, **like), lambda g=given: losses(loss, **g))
    numbers: dict[str, Any] = {
        "clip_low": 0.1,
        "clip_high": 0.28,
        "kl_coef": 1.0,
        "dual_clip": 16.0,
    }
    other = dataclasses.replace(loss, entropy_coef=1.0, correction_high=16.0, **numbers)
    pairs["coefficients"] = (lambda: losses(loss), lambda: losses(other))
    pairs["groups"] = (
        lambda: groups(torch.zeros(6)),
        lambda: groups(torch.zeros(17), [16, 1], eps=1.0),
    )
    pairs["scale"] = (lambda: scaled(9), lambda: scaled(160))
    pairs["offset"] = (
        lambda: _offset(0, 5000),
        lambda: _offset(1, 4999),
    )
    found = {}
    with pretended(90) as launches:
        for name, (first, second) in pairs.items():
            first()
            launches.clear()
            second()
            found[name] = [launch.kernel for launch in launches if launch.new]
            assert launches, name
    return found


def _offset(start: int, columns: int) -> None:
    """Logits that start anywhere in memory."""
    wide = torch.zeros(4, 5003, dtype=BF16)[:, start : start + columns].requires_grad_()
    found = perl_kernels.token_logprobs(wide, torch.zeros(4, dtype=torch.int64), backend="triton")
    found.logprobs.sum().backward()


def main() -> None:
    failed: dict[str, str] = {}
    variants: Counter[str] = Counter()
    with mock.patch.object(triton.compiler, "compile", intermediate):
        with pretended(90) as launches:
            for name, call in calls():
                try:
                    call()
                except Exception as error:
                    failed[name] = repr(error)
            variants.update(launch.kernel for launch in launches if launch.new)
        again = with_other_numbers()
    barriers = {name: sorted(counts) for name, counts in BARRIERS.items() if max(counts)}
    found = {"variants": variants, "barriers": barriers, "failed": failed, "again": again}
    found["drops NaN"] = DROPS_NAN
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
