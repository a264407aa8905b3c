"""Rows of logits in Triton, one program per row; formulas: `rows_torch.py`, `coefficient.py`.

A row is read once for its statistics and, where there is a gradient, a second time backwards, so
that what was read last, and is still in the L2 cache, comes first. What it costs beside its bytes are
instructions, so:

* A logit becomes `y` (itself, or -1 / (1 + exp(2 logit / softcap))), of which the score in units of
  log 2 is a linear function: an exponential is a subtraction, a multiply-add and one instruction
  for 2^a. At the largest score a is 0 exactly, so that sums are exact where a token is certain.
* Each thread has sums of its own: no thread waits for another before the end of the row.
* The gradient is written without the target's own term, which one thread adds afterwards.
* The body of a row starts and ends at a multiple of 16 elements in memory, whatever the number of
  columns and the distance of the rows, and is read in 128-bit loads; of the edges, at most 15
  elements before and after it, every thread takes one.
"""

# Triton, not Python, compiles the device functions, which a type checker reads otherwise.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

from .coefficient import Token
from .coefficient_triton import correction_weight, token_term
from .objective import PolicyLoss, coefficient_arguments
from .values import Coefficients, LossInputs, Prepared, RowStats, Scoring

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# 2 to the power of it is 0, and so is their product.
_NEVER = tl.constexpr(-1e4)
_ALIGNED = tl.constexpr(16)
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_SCALE_BLOCK, _SCALE_PROGRAMS = 4096, 2048


class _Tiling(NamedTuple):
    """How a block of columns is spread over threads: `vector` neighbours each, `repeats` times.
    `wide_bias, wide_out`: whether the bodies of the rows are aligned there too."""

    vector: int
    repeats: int
    warps: int
    wide_bias: bool
    wide_out: bool


class _Scores(NamedTuple):
    """A `Scoring`: `temperatures [n]` is None or goes before `temperature`."""

    targets: Any
    bias: Any
    softcap: Any
    temperatures: Any
    temperature: Any


class _Row(NamedTuple):
    """`first`, `n_body`: first column and number of columns of the body. `unit`, `rate`: by how much
    the score rises with y, in nats and in units of log 2. `known`: whether the target is a column;
    `chosen`: its y."""

    logits: Any
    n_columns: Any
    first: Any
    n_body: Any
    temperature: Any
    unit: Any
    rate: Any
    target: Any
    known: Any
    chosen: Any


class _Sums(NamedTuple):
    """Of what each thread has seen: largest y, and with a = (y - highest) * rate the sums of 2^a
    and a 2^a."""

    highest: Any
    total: Any
    weighted: Any


class _Mass(NamedTuple):
    """Probabilities are 2^a / total with a = (y - origin) * rate."""

    origin: Any
    total: Any
    log_total: Any


class _Slope(NamedTuple):
    """The gradient is 2^a (constant + linear a) dy/dlogit, with `extra` in the sum at the target."""

    constant: Any
    linear: Any
    extra: Any


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _exact(x, LOG: tl.constexpr):
    """log or exp to the last place; Triton's own are fast and lose more, log most next to 1."""
    if _INTERPRETED:
        return tl.log(x) if LOG else tl.exp(x)
    else:
        return libdevice.log(x) if LOG else libdevice.exp(x)


@triton.jit
def _loaded(pointers, inside):
    if inside is None:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _y(scores, logits, bias, start, lanes, inside):
    """Of the logits at start + lanes of two pointers, all or those `inside`."""
    y = _loaded(logits + start + lanes, inside)
    if bias is not None:
        y += _loaded(bias + start + lanes, inside)
    if scores.softcap is not None:
        y = _reciprocal(-1.0 - tl.exp2(y * (2.0 * _LOG2E / scores.softcap)))
    return y


@triton.jit
def _row(logits, misplaced, stride, n_columns, scores, row):
    """`misplaced`: elements between the last multiple of 16 in memory and the logits."""
    first = (-(misplaced + row * stride)) & (_ALIGNED - 1)
    first = tl.minimum(first, n_columns).to(tl.int32)
    temperature = scores.temperature
    if scores.temperatures is not None:
        temperature = tl.load(scores.temperatures + row).to(tl.float32)
    usable = (temperature > 0) & (temperature < float("inf"))
    temperature = tl.where(usable, temperature, float("nan"))
    unit = tl.div_rn(1.0, temperature)
    if scores.softcap is not None:
        unit *= 2.0 * scores.softcap
    target = tl.load(scores.targets + row).to(tl.int64)
    known = (target >= 0) & (target < n_columns)
    logits += row * stride
    return _Row(
        logits,
        n_columns,
        first,
        (n_columns - first) // _ALIGNED * _ALIGNED,
        temperature,
        unit,
        unit * _LOG2E,
        target,
        known,
        _y(scores, logits, scores.bias, target, 0, known),
    )


@triton.jit
def _edges(row, THREADS: tl.constexpr):
    lanes = tl.arange(0, THREADS)
    before = lanes < _ALIGNED
    columns = tl.where(before, lanes, row.first + row.n_body + lanes - _ALIGNED)
    return columns, tl.where(before, lanes < row.first, columns < row.n_columns)


@triton.jit
def _at_body(pointer, row, ALIGNED: tl.constexpr):
    pointer += row.first
    if ALIGNED:
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        pointer = tl.multiple_of(pointer, _ALIGNED.value * size)
    return pointer


@triton.jit
def _moved(sums, highest, rate):
    a = tl.maximum((sums.highest - highest) * rate, _NEVER)
    shrunk = tl.exp2(a)
    return _Sums(highest, shrunk * sums.total, shrunk * (sums.weighted + a * sums.total))


@triton.jit
def _swept(sums, y, rate):
    """With the elements y [repeats, threads, vector]."""
    highest = tl.maximum(sums.highest, tl.max(tl.max(y, axis=2), axis=0))
    sums = _moved(sums, highest, rate)
    a = (y - highest[None, :, None]) * rate
    # A score of -inf has the probability 0, and its logarithm counts nothing; NaN stays NaN.
    a = tl.maximum(a, _NEVER, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.exp2(a)
    total = sums.total + tl.sum(tl.sum(mass, axis=2), axis=0)
    weighted = sums.weighted + tl.sum(tl.sum(mass * a, axis=2), axis=0)
    return _Sums(highest, total, weighted)


@triton.jit
def _statistics(scores, row, TILING: tl.constexpr):
    THREADS: tl.constexpr = 32 * TILING.warps
    BLOCK: tl.constexpr = TILING.vector * TILING.repeats * THREADS
    sums = _Sums(
        tl.full([THREADS], _LOWEST, tl.float32),
        tl.zeros([THREADS], tl.float32),
        tl.zeros([THREADS], tl.float32),
    )
    if row.n_body < row.n_columns:
        columns, inside = _edges(row, THREADS)
        y = _y(scores, row.logits, scores.bias, 0, columns, inside)
        y = tl.where(inside, y, float("-inf"))
        sums = _swept(sums, tl.reshape(y, [1, THREADS, 1]), row.rate)
    logits = _at_body(row.logits, row, True)
    bias = scores.bias
    if bias is not None:
        bias = _at_body(bias, row, TILING.wide_bias)
    lanes = tl.arange(0, BLOCK)
    whole = row.n_body // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        y = _y(scores, logits, bias, start, lanes, None)
        sums = _swept(sums, tl.reshape(y, [TILING.repeats, THREADS, TILING.vector]), row.rate)
    if whole < row.n_body:
        inside = whole + lanes < row.n_body
        y = _y(scores, logits, bias, whole, lanes, inside)
        y = tl.where(inside, y, float("-inf"))
        sums = _swept(sums, tl.reshape(y, [TILING.repeats, THREADS, TILING.vector]), row.rate)
    highest = tl.max(sums.highest, axis=0)
    sums = _moved(sums, highest, row.rate)
    total = tl.sum(sums.total, axis=0)
    log_total = _exact(total, True)
    entropy = log_total - tl.sum(sums.weighted, axis=0) * _LN2 / total
    logprob = (row.chosen - highest) * row.unit - log_total
    shift = highest
    if scores.softcap is not None:
        shift = scores.softcap * (1.0 + 2.0 * highest)
    # The largest score adds 1 to the total, unless it is -inf.
    shift = tl.where(total == 0, float("-inf"), tl.div_rn(shift, row.temperature))
    entropy = tl.where(tl.abs(shift) < float("inf"), entropy, float("nan"))
    logprob = tl.where(row.known & (tl.abs(entropy) < float("inf")), logprob, float("nan"))
    # A gradient starts there, so that what its rounding loses cancels.
    log_sum = log_total + (highest - _origin(scores, row, shift)) * row.rate * _LN2
    return RowStats(logprob, entropy, shift, log_sum), _Mass(highest, total, log_total)


@triton.jit
def _origin(scores, row, shift):
    """The y of which the score is `shift`."""
    origin = shift * row.temperature
    if scores.softcap is not None:
        origin = 0.5 * (origin / scores.softcap - 1.0)
    return origin


@triton.jit
def _slope(scores, row, mass, entropy, by_logprob, by_entropy, ENTROPY: tl.constexpr):
    factor = 1.0 / row.temperature
    if scores.softcap is not None:
        factor = -4.0 * factor
    share = -factor / mass.total
    linear = share * by_entropy * _LN2
    constant = share * by_logprob
    if ENTROPY:
        constant += share * by_entropy * (entropy - mass.log_total)
    return _Slope(constant, linear, factor * by_logprob)


@triton.jit
def _gradient(scores, row, mass, slope, y, extra, ENTROPY: tl.constexpr):
    a = (y - mass.origin) * row.rate
    factor = slope.constant
    if ENTROPY:
        a = tl.maximum(a, _NEVER, propagate_nan=tl.PropagateNan.ALL)
        factor += slope.linear * a
    gradient = tl.exp2(a) * factor + extra
    if scores.softcap is not None:
        gradient *= y * y + y
    return gradient


@triton.jit
def _write_gradient(
    scores, row, mass, slope, idle, out, ENTROPY: tl.constexpr, TILING: tl.constexpr
):
    THREADS: tl.constexpr = 32 * TILING.warps
    BLOCK: tl.constexpr = TILING.vector * TILING.repeats * THREADS
    dtype: tl.constexpr = out.dtype.element_ty
    logits = _at_body(row.logits, row, True)
    bias = scores.bias
    if bias is not None:
        bias = _at_body(bias, row, TILING.wide_bias)
    body = _at_body(out, row, TILING.wide_out)
    lanes = tl.arange(0, BLOCK)
    whole = row.n_body // BLOCK * BLOCK
    edges, at_edge = _edges(row, THREADS)
    in_rest = whole + lanes < row.n_body
    if idle:
        tl.store(out + edges, tl.zeros([THREADS], dtype), mask=at_edge)
        tl.store(body + whole + lanes, tl.zeros([BLOCK], dtype), mask=in_rest)
        for start in range(0, whole, BLOCK):
            tl.store(body + start + lanes, tl.zeros([BLOCK], dtype))
    else:
        # Every thread has read the target's logit before any of them writes over it.
        tl.debug_barrier()
        if row.n_body < row.n_columns:
            y = _y(scores, row.logits, scores.bias, 0, edges, at_edge)
            gradient = _gradient(scores, row, mass, slope, y, 0.0, ENTROPY)
            tl.store(out + edges, gradient.to(dtype), mask=at_edge)
        if whole < row.n_body:
            y = _y(scores, logits, bias, whole, lanes, in_rest)
            gradient = _gradient(scores, row, mass, slope, y, 0.0, ENTROPY)
            tl.store(body + whole + lanes, gradient.to(dtype), mask=in_rest)
        for done in range(0, whole, BLOCK):
            start = whole - BLOCK - done
            y = _y(scores, logits, bias, start, lanes, None)
            gradient = _gradient(scores, row, mass, slope, y, 0.0, ENTROPY)
            tl.store(body + start + lanes, gradient.to(dtype))
        tl.debug_barrier()
        gradient = _gradient(scores, row, mass, slope, row.chosen, slope.extra, ENTROPY)
        tl.store(out + row.target, gradient.to(dtype), mask=row.known)


@triton.jit
def _store(found, row, values):
    for i in tl.static_range(len(values)):
        tl.store(found[i] + row, values[i])


# Not compiled anew for other numbers or addresses. Inside of tuples Triton asks whether integers are
# 1 or multiples of 16, and addresses multiples of 16: the former are not there, the latter all are.
_kernel = triton.jit(
    do_not_specialize=["misplaced", "stride", "n_columns", "out_stride"],
    do_not_specialize_on_alignment=["logits", "out"],
)


@_kernel
def row_stats_kernel(logits, misplaced, stride, n_columns, scores, found, TILING: tl.constexpr):
    """`found`: a `RowStats`, in tensors of their own, as results of an operator share no memory."""
    index = tl.program_id(0).to(tl.int64)
    row = _row(logits, misplaced, stride, n_columns, scores, index)
    stats, _ = _statistics(scores, row, TILING)
    _store(found, index, stats)


@_kernel
def row_gradient_kernel(
    logits,
    misplaced,
    stride,
    n_columns,
    scores,
    stats,
    coefficients,
    out,
    out_stride,
    TILING: tl.constexpr,
):
    """`out [n, V]`, which may be the tile. `stats`: entropy, shift and log_sum of each row."""
    index = tl.program_id(0).to(tl.int64)
    row = _row(logits, misplaced, stride, n_columns, scores, index)
    by_logprob = tl.load(coefficients[0] + index).to(tl.float32)
    idle = by_logprob == 0
    by_entropy = 0.0
    if coefficients[1] is not None:
        by_entropy = tl.load(coefficients[1] + index).to(tl.float32)
        idle = idle & (by_entropy == 0)
    ENTROPY: tl.constexpr = coefficients[1] is not None
    log_sum = tl.load(stats[2] + index)
    origin = _origin(scores, row, tl.load(stats[1] + index))
    mass = _Mass(origin, _exact(log_sum, False), log_sum)
    entropy = tl.load(stats[0] + index)
    slope = _slope(scores, row, mass, entropy, by_logprob, by_entropy, ENTROPY)
    out += index * out_stride
    _write_gradient(scores, row, mass, slope, idle, out, ENTROPY, TILING)


@_kernel
def row_loss_kernel(
    logits,
    misplaced,
    stride,
    n_columns,
    scores,
    token,
    numbers,
    found,
    out,
    out_stride,
    AXES: tl.constexpr,
    TILING: tl.constexpr,
):
    """From logits to their gradient, for a token-level loss. `found`: a `RowStats`, and
    derivatives by log-prob and entropy. `token`: advantages, scale, old, ref, rollout."""
    index = tl.program_id(0).to(tl.int64)
    row = _row(logits, misplaced, stride, n_columns, scores, index)
    stats, mass = _statistics(scores, row, TILING)
    by_logprob, by_entropy = _coefficients(stats.logprobs, index, token, numbers, AXES)
    _store(found, index, stats)
    tl.store(found[4] + index, by_logprob)
    if AXES.has_entropy:
        tl.store(found[5] + index, by_entropy)
    if out is not None:
        ENTROPY: tl.constexpr = AXES.has_entropy
        idle = (by_logprob == 0) & (by_entropy == 0)
        slope = _slope(scores, row, mass, stats.entropy, by_logprob, by_entropy, ENTROPY)
        out += index * out_stride
        _write_gradient(scores, row, mass, slope, idle, out, ENTROPY, TILING)


@triton.jit(do_not_specialize=["n_values"])
def scale_kernel(values, factor, n_values, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        program = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        whole = n_values // BLOCK * BLOCK
        for start in range(program * BLOCK, whole, tl.num_programs(0) * BLOCK):
            scaled = tl.load(values + start + lanes).to(tl.float32) * by
            tl.store(values + start + lanes, scaled.to(values.dtype.element_ty))
        if program == 0:
            inside = whole + lanes < n_values
            scaled = tl.load(values + whole + lanes, mask=inside).to(tl.float32) * by
            tl.store(values + whole + lanes, scaled.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _coefficients(logprob, index, token, numbers, AXES: tl.constexpr):
    scale = tl.load(token[1] + index)
    old = logprob
    if token[2] is not None:
        old = tl.load(token[2] + index).to(tl.float32)
    ref = logprob
    if token[3] is not None:
        ref = tl.load(token[3] + index).to(tl.float32)
    correction = 1.0
    if AXES.correction != "":
        rollout = tl.load(token[4] + index).to(tl.float32)
        correction = correction_weight(AXES, numbers, old - rollout)
    token = Token(logprob - old, logprob, old, ref, tl.load(token[0] + index), correction, 1.0)
    term = token_term(AXES, numbers, token)
    by_logprob = scale * (term.by_ratio + term.kl_by_ratio + term.by_logprob)
    # A token that does not count may have NaN.
    return tl.where(scale == 0, 0.0, by_logprob), -numbers.entropy_coef * scale


def row_stats(tile: Tensor, scoring: Scoring) -> RowStats:
    """As in `rows_torch`."""
    found = _found(4, tile)
    if len(tile):
        source = _rows_contiguous(tile)
        tiling = _tiling(source, scoring, source)
        row_stats_kernel[(len(tile),)](
            *_placed(source),
            _scores(scoring),
            found,
            tiling,
            num_warps=tiling.warps,
        )
    return RowStats(*found)


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """As in `rows_torch`."""
    if not len(tile):
        return
    source, target = _rows_contiguous(tile), _rows_contiguous(out)
    tiling = _tiling(source, scoring, target)
    row_gradient_kernel[(len(tile),)](
        *_placed(source),
        _scores(scoring),
        _dense(*stats[1:]),
        _dense(*coefficients),
        target,
        target.stride(0),
        tiling,
        num_warps=tiling.warps,
    )
    if target is not out:
        out.copy_(target)


def row_loss(
    tile: Tensor,
    scoring: Scoring,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    out: Tensor | None,
) -> tuple[RowStats, Coefficients]:
    """As in `rows_torch`, in one launch."""
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    found = _found(6 if axes.has_entropy else 5, tile)
    if len(tile):
        source = _rows_contiguous(tile)
        target = None if out is None else _rows_contiguous(out)
        rollout = inputs.rollout if loss.correction else None
        tiling = _tiling(source, scoring, source if target is None else target)
        row_loss_kernel[(len(tile),)](
            *_placed(source),
            _scores(scoring),
            _dense(prepared.advantages, prepared.scale, inputs.old, inputs.ref, rollout),
            numbers,
            found,
            target,
            0 if target is None else target.stride(0),
            axes,
            tiling,
            num_warps=tiling.warps,
        )
        if target is not None and target is not out:
            out.copy_(target)  # type: ignore[union-attr]
    by_entropy = found[5] if axes.has_entropy else None
    return RowStats(*found[:4]), Coefficients(found[4], by_entropy)


def scale_(x: Tensor, by: Tensor) -> None:
    """x *= by, a 0-dim tensor on the same device; neither read nor written if that is 1 and x is
    contiguous."""
    if x.is_contiguous() and x.numel():
        programs = min(triton.cdiv(x.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS)
        scale_kernel[(programs,)](x, by, x.numel(), _SCALE_BLOCK)
    else:
        # A 0-dim factor would be rounded to the dtype of `x` first.
        x.mul_(by.expand(x.shape))


def _found(count: int, tile: Tensor) -> tuple[Tensor, ...]:
    """`count` tensors [n]."""
    numbers: Any = {"dtype": torch.float32, "device": tile.device}
    return tuple(torch.empty(len(tile), **numbers) for _ in range(count))


def _placed(tile: Tensor) -> tuple[Tensor, int, int, int]:
    return tile, _misplaced(tile), tile.stride(0), tile.shape[1]


def _scores(scoring: Scoring) -> _Scores:
    tau, softcap = scoring.temperature, scoring.softcap
    per_row = isinstance(tau, Tensor)
    targets, bias, temperatures = _dense(scoring.targets, scoring.bias, tau if per_row else None)
    return _Scores(
        targets,
        bias,
        None if softcap is None else float(softcap),
        temperatures,
        1.0 if per_row else float(tau),
    )


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Contiguous, and at a multiple of 16 bytes, as nearly all are."""
    dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return tuple(x.clone() if x is not None and x.data_ptr() % 16 else x for x in dense)


def _misplaced(tensor: Tensor) -> int:
    """Elements from the last multiple of 16 in memory."""
    return tensor.data_ptr() // tensor.element_size() % 16


def _tiling(tile: Tensor, scoring: Scoring, out: Tensor) -> _Tiling:
    size, stride, n_columns = tile.element_size(), tile.stride(0), tile.shape[1]
    misplaced, bias = _misplaced(tile), scoring.bias
    # A narrower bias would be given to the threads in another order than the tile.
    wide_bias = (
        bias is not None
        and bias.element_size() >= size
        and not (misplaced or stride % 16 or _misplaced(bias))
    )
    wide_out = misplaced == _misplaced(out) and (stride - out.stride(0)) % 16 == 0
    # 128 bits of the tile or of what is written, whichever is more elements, as Triton does; and on
    # every architecture as many bytes of the tile on their way at once as registers allow.
    vector = 16 // min(size, out.element_size())
    at_once = 64 if bias is None or wide_bias else 32
    warps = 1 if n_columns <= 2048 else 8
    return _Tiling(vector, at_once // (vector * size), warps, wide_bias, wide_out)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """With columns next to each other; rows may be apart."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
