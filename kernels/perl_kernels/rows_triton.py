"""Rows of logits in Triton, one program per row: log-sum-exp, log-prob, entropy, coefficient of the
loss, and the gradient in place.

A row is read once for its statistics and, where there is a gradient, a second time backwards, so
that what was read last, and is still in the L2 cache, comes first. Formulas: `torch_backend/rows.py`
and `coefficient.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..axes import axes, numbers
from ..inputs import Coefficients, LossInputs, Prepared
from ..objective import PolicyLoss
from ..scores import RowStats, Scoring
from .compile_case import CompileCase
from .device import correction_weight, token_term
from .launch import architecture, compile_case, kernel
from .numerics import scaled, scaled_slope

_BLOCK_BYTES = {80: 16384, 90: 16384, 100: 8192}
_WARPS = 8
_MAX_REGISTERS = 128
"""On sm_80 and sm_90 four 128-bit loads at once per thread, and two rows at a time on each
multiprocessor, of which a good part is still in the L2 cache when it is read again. On sm_100 that
many columns spill. Chosen from the resources alone, see docs/kernels.md; not measured yet."""


@triton.jit
def _score(
    row_ptr,
    bias_ptr,
    columns,
    inside,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
):
    """The scores of some columns of a row; 0 outside."""
    logit = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return scaled(logit, softcap, temperature, HAS_SOFTCAP)


@triton.jit
def _row_statistics(
    row_ptr,
    bias_ptr,
    target,
    n_columns,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-prob of `target` (NaN if it is no column), entropy, largest score, log sum exp(s - max)."""
    shift = float("-inf")
    # Sums per lane: one reduction a block, for the maximum, instead of three.
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < n_columns
        score = _score(row_ptr, bias_ptr, columns, inside, softcap, temperature, HAS_SOFTCAP)
        score = tl.where(inside, score, float("-inf"))
        higher = tl.maximum(shift, tl.max(score, axis=0))
        # Nothing is there to be shifted before the first block.
        moved = tl.where(shift == float("-inf"), 0.0, shift - higher)
        shrunk = tl.exp(moved)
        distance = score - higher
        mass = tl.exp(distance)
        weighted = shrunk * (weighted + moved * total) + mass * tl.where(inside, distance, 0.0)
        total = shrunk * total + mass
        shift = higher
    all_mass = tl.sum(total, axis=0)
    log_sum = tl.log(all_mass)
    # An infinite score makes it NaN (0 * inf), whether or not the target is concerned.
    entropy = log_sum - tl.sum(weighted, axis=0) / all_mass
    known = (target >= 0) & (target < n_columns)
    chosen = _score(row_ptr, bias_ptr, target, known, softcap, temperature, HAS_SOFTCAP)
    valid = known & (tl.abs(entropy) < float("inf"))
    logprob = tl.where(valid, chosen - shift - log_sum, float("nan"))
    return logprob, entropy, shift, log_sum


@triton.jit
def _write_gradient(
    row_ptr,
    out_ptr,
    bias_ptr,
    target,
    n_columns,
    softcap,
    temperature,
    entropy,
    shift,
    log_sum,
    by_logprob,
    by_entropy,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a row, which may be written over it; 0 if both coefficients are."""
    idle = by_logprob == 0
    if HAS_ENTROPY:
        idle = idle & (by_entropy == 0)
    # An idle row is not read a second time.
    n_read = tl.where(idle, 0, n_columns)
    n_blocks = tl.cdiv(n_columns, BLOCK)
    for i in range(0, n_blocks):
        columns = (n_blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n_columns
        score = _score(
            row_ptr, bias_ptr, columns, columns < n_read, softcap, temperature, HAS_SOFTCAP
        )
        log_prob = score - shift - log_sum
        by = by_logprob
        if HAS_ENTROPY:
            by = by_logprob + by_entropy * (log_prob + entropy)
        gradient = tl.where(columns == target, by_logprob, 0.0) - tl.exp(log_prob) * by
        gradient = gradient * scaled_slope(score, softcap, temperature, HAS_SOFTCAP)
        gradient = tl.where(idle, 0.0, gradient)
        tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _temperature_of(temperatures_ptr, temperature, row):
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    return temperature


@kernel
def row_stats_kernel(
    tile_ptr,
    tile_stride,
    bias_ptr,
    targets_ptr,
    temperatures_ptr,
    stats_ptr,
    n_rows,
    n_columns,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`stats [4, n]`: log-prob, entropy, largest score, log sum exp of each row."""
    row = tl.program_id(0).to(tl.int64)
    tau = _temperature_of(temperatures_ptr, temperature, row)
    target = tl.load(targets_ptr + row).to(tl.int64)
    logprob, entropy, shift, log_sum = _row_statistics(
        tile_ptr + row * tile_stride, bias_ptr, target, n_columns, softcap, tau, HAS_SOFTCAP, BLOCK
    )
    tl.store(stats_ptr + row, logprob)
    tl.store(stats_ptr + n_rows + row, entropy)
    tl.store(stats_ptr + 2 * n_rows + row, shift)
    tl.store(stats_ptr + 3 * n_rows + row, log_sum)


@kernel
def row_gradient_kernel(
    tile_ptr,
    tile_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    targets_ptr,
    temperatures_ptr,
    entropy_ptr,
    shift_ptr,
    log_sum_ptr,
    by_logprob_ptr,
    by_entropy_ptr,
    n_columns,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out [n, V]`, which may be the tile: the gradient of a loss with these derivatives by
    log-prob and entropy of each row."""
    row = tl.program_id(0).to(tl.int64)
    tau = _temperature_of(temperatures_ptr, temperature, row)
    target = tl.load(targets_ptr + row).to(tl.int64)
    by_entropy = 0.0
    if by_entropy_ptr is not None:
        by_entropy = tl.load(by_entropy_ptr + row).to(tl.float32)
    _write_gradient(
        tile_ptr + row * tile_stride,
        out_ptr + row * out_stride,
        bias_ptr,
        target,
        n_columns,
        softcap,
        tau,
        tl.load(entropy_ptr + row),
        tl.load(shift_ptr + row),
        tl.load(log_sum_ptr + row),
        tl.load(by_logprob_ptr + row).to(tl.float32),
        by_entropy,
        HAS_SOFTCAP,
        by_entropy_ptr is not None,
        BLOCK,
    )


@kernel
def row_loss_kernel(
    tile_ptr,
    tile_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    targets_ptr,
    temperatures_ptr,
    advantages_ptr,
    scale_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    stats_ptr,
    n_rows,
    n_columns,
    softcap,
    temperature,
    entropy_coef,
    correction_low,
    correction_high,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    ratio_cap,
    kl_coef,
    SURROGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    DELTA: tl.constexpr,
    KL: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One launch from logits to their gradient, for a token-level loss.

    `stats [6, n]`: log-prob, entropy, largest score, log sum exp, derivatives by log-prob and by
    entropy. `out [n, V]`, which may be the tile and may be left out: the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    tau = _temperature_of(temperatures_ptr, temperature, row)
    target = tl.load(targets_ptr + row).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    logprob, entropy, shift, log_sum = _row_statistics(
        row_ptr, bias_ptr, target, n_columns, softcap, tau, HAS_SOFTCAP, BLOCK
    )
    scale = tl.load(scale_ptr + row)
    counts = scale != 0
    known = tl.where(counts, logprob, 0.0)
    old = known
    if old_ptr is not None:
        old = tl.load(old_ptr + row, mask=counts, other=0.0).to(tl.float32)
    ref = known
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + row, mask=counts, other=0.0).to(tl.float32)
    correction = 1.0
    if CORRECTION != "":
        rollout = tl.load(rollout_ptr + row, mask=counts, other=0.0).to(tl.float32)
        correction = correction_weight(CORRECTION, old - rollout, correction_low, correction_high)
    _, by_ratio, kl_by_ratio, by_itself, _, _, _, _, _ = token_term(
        SURROGATE,
        DUAL_CLIP,
        DELTA,
        KL,
        HAS_KL,
        HAS_REF,
        KL_BIAS_CORRECTION,
        known - old,
        known,
        old,
        ref,
        tl.load(advantages_ptr + row, mask=counts, other=0.0),
        correction,
        1.0,
        clip_low,
        clip_high,
        dual_clip,
        delta,
        tau_pos,
        tau_neg,
        ratio_cap,
        kl_coef,
    )
    by_logprob = tl.where(counts, scale * (by_ratio + kl_by_ratio + by_itself), 0.0)
    by_entropy = tl.where(counts, -entropy_coef * scale, 0.0)
    tl.store(stats_ptr + row, logprob)
    tl.store(stats_ptr + n_rows + row, entropy)
    tl.store(stats_ptr + 2 * n_rows + row, shift)
    tl.store(stats_ptr + 3 * n_rows + row, log_sum)
    tl.store(stats_ptr + 4 * n_rows + row, by_logprob)
    tl.store(stats_ptr + 5 * n_rows + row, by_entropy)
    if out_ptr is not None:
        # The target's logit has been read by every thread before any of them writes over the row.
        tl.debug_barrier()
        _write_gradient(
            row_ptr,
            out_ptr + row * out_stride,
            bias_ptr,
            target,
            n_columns,
            softcap,
            tau,
            entropy,
            shift,
            log_sum,
            by_logprob,
            by_entropy,
            HAS_SOFTCAP,
            HAS_ENTROPY,
            BLOCK,
        )


def row_stats(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> RowStats:
    """As `torch_backend.row_stats`."""
    n_rows, n_columns = tile.shape
    stats = torch.empty(4, n_rows, dtype=torch.float32, device=tile.device)
    if n_rows:
        tile = _rows_contiguous(tile)
        row_stats_kernel[(n_rows,)](
            tile_ptr=tile,
            tile_stride=tile.stride(0),
            stats_ptr=stats,
            n_rows=n_rows,
            n_columns=n_columns,
            **_scoring_arguments(scoring),
            **_launch(tile),
        )
    return RowStats(*stats.unbind())


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """As `torch_backend.row_gradient`."""
    n_rows, n_columns = tile.shape
    if not n_rows:
        return
    source = _rows_contiguous(tile)
    target = _rows_contiguous(out)
    by_logprob, by_entropy = coefficients
    row_gradient_kernel[(n_rows,)](
        tile_ptr=source,
        tile_stride=source.stride(0),
        out_ptr=target,
        out_stride=target.stride(0),
        entropy_ptr=stats.entropy.contiguous(),
        shift_ptr=stats.shift.contiguous(),
        log_sum_ptr=stats.log_sum.contiguous(),
        by_logprob_ptr=by_logprob.contiguous(),
        by_entropy_ptr=None if by_entropy is None else by_entropy.contiguous(),
        n_columns=n_columns,
        **_scoring_arguments(scoring),
        **_launch(tile),
    )
    if target is not out:
        out.copy_(target)


def row_loss(
    tile: Tensor,
    scoring: Scoring,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    dtype: torch.dtype,
    out: Tensor | None,
) -> tuple[RowStats, Coefficients]:
    """As `torch_backend.row_loss`, in one launch."""
    n_rows, n_columns = tile.shape
    stats = torch.empty(6, n_rows, dtype=torch.float32, device=tile.device)
    has_entropy = loss.entropy_coef != 0
    if n_rows:
        source = _rows_contiguous(tile)
        target = None if out is None else _rows_contiguous(out)
        row_loss_kernel[(n_rows,)](
            tile_ptr=source,
            tile_stride=source.stride(0),
            out_ptr=target,
            out_stride=0 if target is None else target.stride(0),
            advantages_ptr=prepared.advantages.contiguous(),
            scale_ptr=prepared.scale.contiguous(),
            old_ptr=_contiguous(inputs.old),
            ref_ptr=_contiguous(inputs.ref),
            rollout_ptr=_contiguous(inputs.rollout),
            stats_ptr=stats,
            n_rows=n_rows,
            n_columns=n_columns,
            entropy_coef=float(loss.entropy_coef),
            correction_low=float(loss.correction_low),
            correction_high=float(loss.correction_high),
            CORRECTION=loss.correction or "",
            HAS_ENTROPY=has_entropy,
            **numbers(loss),
            **axes(loss, inputs.ref is not None),
            **_scoring_arguments(scoring),
            **_launch(tile),
        )
        if out is not None and target is not out:
            out.copy_(target)  # type: ignore[arg-type]
    by_logprob, by_entropy = stats[4], stats[5] if has_entropy else None
    return RowStats(*stats[:4].unbind()), Coefficients(by_logprob, by_entropy)


def _scoring_arguments(scoring: Scoring) -> dict[str, Any]:
    tau, softcap = scoring.temperature, scoring.softcap
    per_row = isinstance(tau, Tensor)
    return {
        "bias_ptr": _contiguous(scoring.bias),
        "targets_ptr": scoring.targets.contiguous(),
        "temperatures_ptr": tau.contiguous() if per_row else None,
        "temperature": 1.0 if per_row else float(tau),
        "softcap": 0.0 if softcap is None else float(softcap),
        "HAS_SOFTCAP": softcap is not None,
    }


def _launch(tile: Tensor) -> dict[str, int]:
    blocks = _blocks(tile.shape[1], tile.element_size(), architecture(tile.device))
    return {**blocks, "maxnreg": _MAX_REGISTERS}


def _blocks(n_columns: int, itemsize: int, arch: int) -> dict[str, int]:
    enough = 1 << (n_columns - 1).bit_length()
    block = min(enough, _BLOCK_BYTES[arch] // itemsize)
    return {"BLOCK": block, "num_warps": max(1, min(_WARPS, block // 256))}


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """With columns next to each other; rows may be apart."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def compile_cases() -> list[CompileCase]:
    """The launch variants, see `perl_kernels.resources`: the barest and the fullest."""
    return [case for arch in _BLOCK_BYTES for case in _cases_on(arch)]


def _cases_on(arch: int) -> list[CompileCase]:
    narrow, wider = (_blocks(151_936, itemsize, arch) for itemsize in (2, 4))
    block, warps = narrow["BLOCK"], narrow["num_warps"]
    half = {"tile_ptr": "*bf16", "out_ptr": "*bf16", "targets_ptr": "*i64", "bias_ptr": "*bf16"}
    bare: dict[str, Any] = {
        "bias_ptr": None,
        "temperatures_ptr": None,
        "HAS_SOFTCAP": False,
        "BLOCK": block,
    }
    full: dict[str, Any] = {"HAS_SOFTCAP": True, "BLOCK": block}

    def loss(objective: PolicyLoss, has_ref: bool) -> dict[str, Any]:
        return {
            **axes(objective, has_ref),
            "CORRECTION": objective.correction or "",
            "HAS_ENTROPY": objective.entropy_coef != 0,
        }

    plain = {"ref_ptr": None, "rollout_ptr": None, **loss(PolicyLoss(), False)}
    everything = PolicyLoss(
        surrogate="dppo_kl",
        kl="k3",
        kl_coef=0.1,
        kl_bias_correction=True,
        entropy_coef=0.1,
        correction="token_mask",
    )
    wide = {"tile_ptr": "*fp32"}
    cases = []
    for name, launched, constants, types in (
        ("bf16", row_stats_kernel, bare, {}),
        ("bf16, bias, softcap, row temperature", row_stats_kernel, full, {}),
        ("fp32", row_stats_kernel, {**bare, "BLOCK": wider["BLOCK"]}, wide),
        ("bf16", row_gradient_kernel, {**bare, "by_entropy_ptr": None}, {}),
        ("bf16, bias, softcap, row temperature, entropy", row_gradient_kernel, full, {}),
        ("bf16, clip", row_loss_kernel, {**bare, **plain}, {}),
        (
            "fp32 to bf16, clip",
            row_loss_kernel,
            {**bare, **plain, "BLOCK": wider["BLOCK"]},
            wide,
        ),
        (
            "bf16, bias, softcap, row temperature, dppo_kl, corrected k3, entropy, token mask",
            row_loss_kernel,
            {**full, **loss(everything, True)},
            {},
        ),
    ):
        cases.append(
            compile_case(
                name,
                launched,
                {**half, **types},
                constants,
                num_warps=warps,
                vector_loads=True,
                max_registers=_MAX_REGISTERS,
                architectures=(arch,),
            )
        )
    return cases
