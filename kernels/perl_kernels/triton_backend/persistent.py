"""Log-prob, entropy and log-sum-exp per row straight from hidden states and LM head, forward only.

A persistent matrix product whose tiles of logits stay in registers: of each half of a tile only the
maximum of the row, two sums and the target's logit are written, [parts, N] numbers in place of
[N, V]. A second kernel joins the parts of a row. With x the logits after softcap, T the temperature
and m a maximum, everything is summed in powers of two, a = (x - m) log2(e) / T:

    sums = sum of 2^a        moments = sum of a 2^a
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .compile_case import CompileCase
from .numerics import tanh, usable

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Exponent of a column that does not exist: 2^a is 0 and a 2^a too, which -inf would make NaN.
_ABSENT = tl.constexpr(-1e4)

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What one launch may write for its parts, 24 bytes for each row and tile: 19000 rows where the
# vocabulary is 152000.
_PARTS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Tiling:
    """How the product is cut: tiles of `rows` by `columns` logits, summed over `depth` features at
    a time. `group` row tiles share their columns in the L2 cache, `blocks` tiles share a
    multiprocessor."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    group: int = 16
    blocks: int = 1


# 192 KB of shared memory in 4 stages, of the 227 KB that a block may have; the logits take 128
# registers of each thread.
_SM90 = Tiling(rows=128, columns=256, depth=64, num_warps=8, num_stages=4)
# Two of these fit on a multiprocessor: one computes a product while the other sums up its tile.
_SM100 = Tiling(rows=128, columns=128, depth=64, num_warps=8, num_stages=3, blocks=2)
# Exact fp32 products do not run on the tensor cores.
_FP32 = Tiling(rows=64, columns=64, depth=32, num_warps=8, num_stages=2)

_JOIN_PARTS, _JOIN_ROWS = 32, 32


@triton.jit
def _store_targets(logits, targets, width, out, COLUMNS: tl.constexpr):
    """The logit of each row whose target is in [0, width), stored at `out`."""
    here = (targets >= 0) & (targets < width)
    # Few tiles hold the target of one of their rows.
    if tl.max(here.to(tl.int32), 0) > 0:
        chosen = tl.arange(0, COLUMNS)[None, :] == targets[:, None]
        tl.store(out, tl.sum(tl.where(chosen, logits, 0.0), 1), here)


@triton.jit
def _powers(logits, width, rate, COLUMNS: tl.constexpr, RAGGED: tl.constexpr):
    """Of each row of the first `width` columns, all of them unless RAGGED, the maximum m, and the
    sums of 2^a and of a 2^a with a = (logit - m) rate."""
    inside = (tl.arange(0, COLUMNS) < width)[None, :]
    if RAGGED:
        logits = tl.where(inside, logits, float("-inf"))
    top = tl.max(logits, 1)
    exponent = (logits - top[:, None]) * rate[:, None]
    if RAGGED:
        exponent = tl.where(inside, exponent, _ABSENT)
    power = tl.exp2(exponent)
    return top, tl.sum(power, 1), tl.sum(power * exponent, 1)


@triton.jit(
    do_not_specialize=["n_rows", "vocab", "features"],
    do_not_specialize_on_alignment=["targets", "bias", "temperature"],
)
def _tile_statistics(
    hidden,
    weight,
    targets,
    bias,
    temperature,
    maxima,
    sums,
    moments,
    target_logits,
    n_rows,
    vocab,
    features,
    pitch,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Fills maxima, sums, moments [parts, pitch], a part being HALF of a tile's columns, and
    target_logits [N] where the target is in [0, vocab). hidden [N, H] and weight [V, H] are
    descriptors, which read 0 out of bounds."""
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles = tl.cdiv(n_rows, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first_of_group = tile // (GROUP * column_tiles) * GROUP
        group_rows = tl.minimum(row_tiles - first_of_group, GROUP)
        in_group = tile % (GROUP * column_tiles)
        row_start = (first_of_group + in_group % group_rows) * ROWS
        column_tile = in_group // group_rows
        column_start = column_tile * COLUMNS

        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.range(tl.cdiv(features, DEPTH)):
            left = hidden.load([row_start, step * DEPTH])
            right = weight.load([column_start, step * DEPTH])
            if WIDEN:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            logits = tl.dot(left, right.T, logits, input_precision="ieee")

        rows = row_start + tl.arange(0, ROWS)
        present = rows < n_rows
        target = tl.load(targets + rows, present, -1)
        if ROW_TEMPERATURE:
            tau = tl.load(temperature + rows, present, 1.0).to(tl.float32)
        else:
            tau = tl.full((ROWS,), temperature, tl.float32)
        # One that is not usable spoils the row when its parts are joined.
        rate = _LOG2E / tau

        # One half after the other: the registers hold the logits of both, but little more.
        halves = tl.split(tl.permute(tl.reshape(logits, (ROWS, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            start = column_start + half * HALF
            columns = start + tl.arange(0, HALF)
            part = halves[half]
            if bias is not None:
                part += tl.load(bias + columns, columns < vocab, 0.0).to(tl.float32)[None, :]
            if HAS_SOFTCAP:
                part = softcap * tanh(part / softcap)
            width = tl.minimum(vocab - start, HALF)
            _store_targets(part, target - start, width, target_logits + rows, HALF)
            # A quarter of the instructions is for ragged tiles, of which there are few.
            if width < HALF:
                top, total, moment = _powers(part, width, rate, HALF, True)
            else:
                top, total, moment = _powers(part, width, rate, HALF, False)
            out = (2 * column_tile + half).to(tl.int64) * pitch + rows
            tl.store(maxima + out, top, present)
            tl.store(sums + out, total, present)
            tl.store(moments + out, moment, present)


@triton.jit(
    do_not_specialize=["n_rows", "vocab", "parts"],
    do_not_specialize_on_alignment=["targets", "temperature"],
)
def _join_parts(
    maxima,
    sums,
    moments,
    target_logits,
    targets,
    temperature,
    logprobs,
    entropies,
    logsumexps,
    n_rows,
    vocab,
    parts,
    pitch,
    ROW_TEMPERATURE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logprobs, entropies, logsumexps [N] from what `_tile_statistics` left; one program for ROWS
    rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    if ROW_TEMPERATURE:
        tau = tl.load(temperature + rows, present, 1.0).to(tl.float32)
    else:
        tau = tl.full((ROWS,), temperature, tl.float32)
    tau = usable(tau)
    # Up to the pitch, a multiple of 16, so that the loads are wide; what lies beyond N is not used.
    padded = (rows < pitch)[None, :]

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in tl.range(0, parts, PARTS):
        index = (start + tl.arange(0, PARTS))[:, None]
        at = index.to(tl.int64) * pitch + rows[None, :]
        tops = tl.load(maxima + at, padded & (index < parts), float("-inf"))
        top = tl.maximum(top, tl.max(tops, 0))

    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, parts, PARTS):
        index = (start + tl.arange(0, PARTS))[:, None]
        at = index.to(tl.int64) * pitch + rows[None, :]
        inside = padded & (index < parts)
        sums_here = tl.load(sums + at, inside, 0.0)
        moments_here = tl.load(moments + at, inside, 0.0)
        shift = (tl.load(maxima + at, inside, float("-inf")) - top[None, :]) * (_LOG2E / tau)
        shift = tl.where(index < parts, shift, _ABSENT)
        factor = tl.exp2(shift)
        total += tl.sum(sums_here * factor, 0)
        moment += tl.sum((moments_here + sums_here * shift) * factor, 0)

    log_total = tl.log(total)
    entropy = log_total - _LN2 * moment / total
    target = tl.load(targets + rows, present, -1)
    inside = present & (target >= 0) & (target < vocab)
    target_logit = tl.load(target_logits + rows, inside, float("nan"))
    logprob = (target_logit - top) / tau - log_total
    # An infinite score makes the entropy NaN, whether or not the target is concerned.
    finite = tl.abs(entropy) < float("inf")
    tl.store(logprobs + rows, tl.where(finite, logprob, float("nan")), present)
    tl.store(entropies + rows, entropy, present)
    tl.store(logsumexps + rows, top / tau + log_total, present)


_INTERPRETED = not isinstance(_tile_statistics, triton.JITFunction)


def supported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why `persistent_logprobs` can not take these two, or None if it can."""
    if not _INTERPRETED:
        if not hidden.is_cuda:
            return f"hidden is on {hidden.device}, must be on a CUDA device"
        major, minor = torch.cuda.get_device_capability(hidden.device)
        # Older ones have no TMA; later ones not made for servers have less shared memory.
        if major not in (9, 10):
            return f"the device has compute capability {major}.{minor}, must be 9.x or 10.x"
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dtype not in _DTYPES:
            return f"{name} has dtype {matrix.dtype}, must be bfloat16, float16 or float32"
        if matrix.shape[1] == 0 or (name == "weight" and matrix.shape[0] == 0):
            return f"{name} has shape {list(matrix.shape)}, must have at least one element"
        pitch = matrix.stride(0) * matrix.element_size()
        packed = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
        if not packed or pitch % 16 or matrix.data_ptr() % 16:
            return (
                f"{name} has shape {list(matrix.shape)}, strides {list(matrix.stride())} and "
                f"address {matrix.data_ptr():#x}, must have contiguous rows that begin at "
                "multiples of 16 bytes"
            )
    if hidden.dtype != weight.dtype:
        return f"weight has dtype {weight.dtype}, must be that of hidden, {hidden.dtype}"
    return None


def persistent_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    *,
    _tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the rows of softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature.

    Products and sums are in fp32. N, V, H and all numbers may change without a new compilation.

    Args:
        hidden: [N, H] bf16, fp16 or fp32; rows contiguous and 16-byte aligned.
        weight: [V, H], of the dtype of `hidden`, aligned likewise.
        targets: [N] int64 or int32.
        bias: [V] or None.
        temperature: above 0, a float or [N].
        softcap: above 0, or None.
        _tiling: for tests; chosen by dtype and device if left out.

    Returns:
        `(logprobs, entropy, lse)`, each [N] fp32. A log-prob is NaN where the target is outside
        [0, V), a score of the row is not finite or the temperature is not above 0 and finite; the
        entropy for the last two reasons.

    Raises:
        ValueError: the device, dtype or memory layout is not served; what `supported` says.
    """
    reason = supported(hidden, weight)
    if reason is not None:
        raise ValueError(reason)
    n_rows = hidden.shape[0]
    out = tuple(hidden.new_empty(n_rows, dtype=torch.float32) for _ in range(3))
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    if isinstance(temperature, Tensor):
        temperature = temperature.contiguous()
    tiling = _tiling or _default_tiling(hidden)
    column_tiles = -(-weight.shape[0] // tiling.columns)
    step = max(_PARTS_BYTES // (24 * column_tiles) // tiling.rows, 1) * tiling.rows
    with torch.cuda.device_of(hidden):
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            tau = temperature[part] if isinstance(temperature, Tensor) else float(temperature)
            pieces = [whole[part] for whole in out]
            _launch(hidden[part], weight, targets[part], bias, tau, softcap, tiling, pieces)
    return out[0], out[1], out[2]


def _launch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    tiling: Tiling,
    out: list[Tensor],
) -> None:
    (n_rows, features), vocab = hidden.shape, weight.shape[0]
    row_tiles, column_tiles = -(-n_rows // tiling.rows), -(-vocab // tiling.columns)
    pitch = -(-n_rows // 16) * 16
    partials = hidden.new_empty((3, 2 * column_tiles, pitch), dtype=torch.float32)
    target_logits = hidden.new_empty(n_rows, dtype=torch.float32)
    per_row = isinstance(temperature, Tensor)
    # Launches are not in the signatures that type checkers see.
    statistics: Any = _tile_statistics
    join: Any = _join_parts
    programs = min(_multiprocessors(hidden.device) * tiling.blocks, row_tiles * column_tiles)
    statistics[(programs,)](
        TensorDescriptor.from_tensor(hidden, [tiling.rows, tiling.depth]),
        TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth]),
        targets,
        bias,
        temperature,
        *partials,
        target_logits,
        n_rows,
        vocab,
        features,
        pitch,
        softcap or 0.0,
        HAS_SOFTCAP=softcap is not None,
        ROW_TEMPERATURE=per_row,
        # The interpreter multiplies the bits of bf16 as integers.
        WIDEN=_INTERPRETED,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        GROUP=tiling.group,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    join[(-(-n_rows // _JOIN_ROWS),)](
        *partials,
        target_logits,
        targets,
        temperature,
        *out,
        n_rows,
        vocab,
        # Not what a last tile writes that ends in its first half.
        -(-vocab // (tiling.columns // 2)),
        pitch,
        ROW_TEMPERATURE=per_row,
        PARTS=_JOIN_PARTS,
        ROWS=_JOIN_ROWS,
        num_warps=4,
    )


def _default_tiling(hidden: Tensor) -> Tiling:
    if hidden.dtype == torch.float32:
        return _FP32
    hopper = not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device)[0] == 9
    return _SM90 if hopper else _SM100


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Under the interpreter, few enough that one program works through several tiles.
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )


def compile_cases() -> list[CompileCase]:
    """The launch variants, see `perl_kernels.resources`."""
    statistics = dict.fromkeys(("maxima", "sums", "moments", "target_logits"), "*fp32")
    return [
        _product_case("bf16", _SM90, "bf16", 90),
        _product_case("bf16, bias, softcap, row temperature", _SM90, "bf16", 90, plain=False),
        _product_case("bf16", _SM100, "bf16", 100),
        _product_case("bf16, bias, softcap, row temperature", _SM100, "bf16", 100, plain=False),
        _product_case("fp32", _FP32, "fp32", 90),
        CompileCase(
            name="row temperature",
            kernel=_join_parts,
            signature={
                **statistics,
                "targets": "*i64",
                "temperature": "*fp32",
                **dict.fromkeys(("logprobs", "entropies", "logsumexps"), "*fp32"),
                **dict.fromkeys(("n_rows", "vocab", "parts", "pitch"), "i32"),
            },
            constexprs={"ROW_TEMPERATURE": True, "PARTS": _JOIN_PARTS, "ROWS": _JOIN_ROWS},
            divisible_by_16=(
                *statistics,
                *("targets", "temperature", "logprobs", "entropies", "logsumexps", "pitch"),
            ),
            num_warps=4,
            vector_loads=True,
            architectures=(90, 100),
        ),
    ]


def _product_case(
    name: str, tiling: Tiling, dtype: str, architecture: int, *, plain: bool = True
) -> CompileCase:
    tensors = ["targets", "maxima", "sums", "moments", "target_logits"]
    signature = {
        "hidden": f"tensordesc<{dtype}[{tiling.rows}, {tiling.depth}]>",
        "weight": f"tensordesc<{dtype}[{tiling.columns}, {tiling.depth}]>",
        "targets": "*i64",
        "temperature": "fp32" if plain else "*fp32",
        **dict.fromkeys(tensors[1:], "*fp32"),
        **dict.fromkeys(("n_rows", "vocab", "features", "pitch"), "i32"),
        "softcap": "fp32",
    }
    if not plain:
        signature["bias"] = "*bf16"
        tensors += ["bias", "temperature"]
    return CompileCase(
        name=name,
        kernel=_tile_statistics,
        signature=signature,
        constexprs={
            **({"bias": None} if plain else {}),
            "HAS_SOFTCAP": not plain,
            "ROW_TEMPERATURE": not plain,
            "WIDEN": False,
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
            "DEPTH": tiling.depth,
            "GROUP": tiling.group,
        },
        divisible_by_16=(*tensors, "pitch"),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        vector_loads=True,
        wgmma=tiling is _SM90,
        architectures=(architecture,),
    )
