"""Compiles the kernels, as far as Triton's own intermediate form, for every kind of loss and of input.

Run as a script, without TRITON_INTERPRET: what the interpreter accepts, the compiler may not. Prints
the number of variants, and each that fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from perl_kernels import PolicyLoss, resources
from perl_kernels.axes import axes
from perl_kernels.grouping import Grouping
from perl_kernels.objective import KL, Aggregation, Correction, Ratio, Surrogate
from perl_kernels.onepass import Fold, one_pass_form
from perl_kernels.triton_backend import losses, preparation, rows
from perl_kernels.triton_backend.advantage import grouping_arguments
from perl_kernels.triton_backend.completion import TOKENS_AT_ONCE
from perl_kernels.triton_backend.launch import compile_case

TARGET = GPUTarget("cuda", 90, 32)
REWARDS = ("rewards_ptr", "sizes_ptr", "reward_weights_ptr")
TYPES = {"cu_seqlens_ptr": "*i32", "sizes_ptr": "*i64", "reward_weights_ptr": "*fp64"}
OTHER_TYPES = {
    "cu_seqlens_ptr": "*i64",
    "advantages_ptr": "*fp64",
    "weights_ptr": "*i64",
    "old_ptr": "*bf16",
    "logprobs_ptr": "*bf16",
    "tile_ptr": "*fp16",
    "targets_ptr": "*i32",
}

Variant = tuple[Any, dict[str, str], dict[str, Any]]


def objectives() -> Iterator[PolicyLoss]:
    shared: dict[str, Any] = {"entropy_coef": 0.1}
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
                yield PolicyLoss(surrogate=surrogate, **kind, **shared)
    for bound in ({"dual_clip": 3.0}, {"delta": 4.0}):
        for ratio in ("token", "sequence"):
            yield PolicyLoss(ratio=ratio, **bound)


def variants() -> Iterator[Variant]:
    grouping = grouping_arguments(Grouping())
    del grouping["eps"]
    tokens = {**grouping, "TOKENS": TOKENS_AT_ONCE}
    for loss in objectives():
        absent = {
            **({} if loss.has_kl else {"ref_ptr": None}),
            **({} if loss.correction else {"rollout_ptr": None}),
        }
        common = {
            **axes(loss, loss.has_kl),
            **absent,
            "CORRECTION": loss.correction or "",
            "HAS_ENTROPY": loss.entropy_coef != 0,
        }
        for other in (False, True):
            types = {**TYPES, **(OTHER_TYPES if other else {})}
            left_out = {} if other else {"old_ptr": None, "weights_ptr": None}
            constants = {
                **tokens,
                **common,
                **left_out,
                **dict.fromkeys(REWARDS),
                "RATIO": loss.ratio,
                "SEQUENCE_MEAN": other,
                "PER_TOKEN": other,
            }
            if loss.entropy_coef == 0:
                constants["by_entropy_ptr"] = None
            yield losses.completion_kernel, types, constants
            if one_pass_form(loss, True) is not None:
                scoring: dict[str, Any] = {"bias_ptr": None, "temperatures_ptr": None}
                row = {**scoring, **common, "HAS_SOFTCAP": other, "BLOCK": 1 if other else 8192}
                left_out = {} if other else {"old_ptr": None, "out_ptr": None}
                yield rows.row_loss_kernel, types, {**row, **left_out}
    for fold in get_args(Fold):
        for correction in get_args(Correction) if fold == "correction" else ("",):
            for mode in ("completion", "token", "rewards"):
                constants = {**tokens, "SEQUENCE_MEAN": mode == "token", "FOLD": fold}
                constants |= {"CORRECTION": correction, "PER_TOKEN": mode == "token"}
                constants |= (
                    {"advantages_ptr": None} if mode == "rewards" else dict.fromkeys(REWARDS)
                )
                constants |= {} if correction else {"old_ptr": None, "rollout_ptr": None}
                yield preparation.prepare_kernel, TYPES, constants
    for aggregation in get_args(Aggregation):
        for kind in (None, "*fp32", "*fp64", "*i64"):
            constants = {"AGGREGATION": aggregation, "BLOCK": 1024, "HAS_NORMALIZER": bool(kind)}
            constants |= {} if kind else {"normalizer_ptr": None}
            types = {**TYPES, **({"normalizer_ptr": kind} if kind else {})}
            yield losses.finish_kernel, types, constants


def main() -> None:
    backend = make_backend(TARGET)
    options = backend.parse_options({"num_warps": 8})
    implementations, modules = (
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
    )
    count = 0
    for kernel, types, constants in variants():
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        known = {name: value for name, value in types.items() if name in kernel.arg_names}
        case = compile_case("", kernel, known, constants, num_warps=8)
        count += 1
        try:
            resources._source(case).make_ir(TARGET, options, implementations, modules, context)
        except Exception as error:
            print(f"FAILED {kernel.__name__} {constants}: {error!r}")
    print(f"{count} variants")


if __name__ == "__main__":
    main()
