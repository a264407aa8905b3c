"""Rows of logits in PyTorch: log-prob, entropy, and the gradient back to the row.

With s the logits after softcap and temperature, p = softmax(s) and H its entropy, the gradient of
any loss with dL/dlogprob = g and dL/dentropy = h is, per row,

    dL/ds_j = g (1[j = target] - p_j) - h p_j (log p_j + H)

The exponentials are computed once and serve the sum, the entropy and the gradient: with m the
largest score, c = s - m and Z = sum_j exp c_j, H = log Z - sum_j exp(c_j) c_j / Z, where nothing
cancels, as no term is negative. A score of -inf adds 0 to everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .coefficient import Token, correction_weight, token_term
from .objective import PolicyLoss, coefficient_arguments
from .values import Coefficients, LossInputs, Prepared, RowStats, Scoring, compute_dtype

_BYTES = 32 * 2**20
"""Of rows worked on at once: a handful of temporaries of this size are made."""


_NEVER = -1e4  # exp of it is 0 in fp64 too


class _Row(NamedTuple):
    scores: Tensor
    centred: Tensor
    exp: Tensor
    shift: Tensor
    total: Tensor


def row_stats(tile: Tensor, scoring: Scoring) -> RowStats:
    """Statistics of the logits `tile [n, V]`."""
    stats = []
    for part in _parts(tile):
        mine = scoring.rows(part)
        stats.append(_stats(_row(tile[part], mine), mine))
    return RowStats.joined(stats)


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """Write the gradient by the logits to `out [n, V]`, which may be `tile`: exactly 0 in rows
    where both coefficients are 0, whatever the scores."""
    for part in _parts(tile):
        mine, of_rows = scoring.rows(part), stats.rows(part)
        scores = _scores(tile[part], mine)
        centred = _centred(scores, of_rows.shift)
        row = _Row(scores, centred, centred.exp(), of_rows.shift, of_rows.log_sum.exp())
        _write_gradient(row, mine, of_rows, coefficients.rows(part), out[part])


def row_loss(
    tile: Tensor,
    scoring: Scoring,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    out: Tensor | None,
) -> tuple[RowStats, Coefficients]:
    """Statistics of the rows and coefficients of the token-level `loss`, and in `out [n, V]`, if
    given, the gradient by the logits; `out` may be `tile`. The per-token tensors of `prepared` and
    `inputs` are those of these rows."""
    stats, found = [], []
    for part in _parts(tile):
        mine = scoring.rows(part)
        row = _row(tile[part], mine)
        of_rows = _stats(row, mine)
        stats.append(of_rows)
        coefficients = row_coefficients(
            loss, of_rows.logprobs, prepared.rows(part), inputs.rows(part)
        )
        found.append(coefficients)
        if out is not None:
            _write_gradient(row, mine, of_rows, coefficients, out[part])
    by_logprob = torch.cat([each.logprobs for each in found])
    by_entropy = None
    if loss.entropy_coef != 0:
        by_entropy = torch.cat([each.entropy for each in found if each.entropy is not None])
    return RowStats.joined(stats), Coefficients(by_logprob, by_entropy)


def _parts(tile: Tensor) -> Iterator[slice]:
    rows = max(16, _BYTES // (compute_dtype(tile).itemsize * max(tile.shape[1], 1)))
    for start in range(0, max(tile.shape[0], 1), rows):
        yield slice(start, start + rows)


def row_coefficients(
    loss: PolicyLoss, logprobs: Tensor, prepared: Prepared, inputs: LossInputs
) -> Coefficients:
    """Derivatives of the loss by the log-probs [n] and entropies of some rows of a token-level
    loss."""
    scale = prepared.scale
    mask, dtype = scale != 0, logprobs.dtype

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    logprobs = masked(logprobs)
    old = logprobs if inputs.old is None else masked(inputs.old)
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    correction: Tensor | float = 1.0
    if loss.correction is not None:
        assert inputs.rollout is not None
        correction = correction_weight(axes, numbers, old - masked(inputs.rollout))
    ref = logprobs if inputs.ref is None else masked(inputs.ref)
    advantage = masked(prepared.advantages)
    token = Token(logprobs - old, logprobs, old, ref, advantage, correction, 1.0)
    term = token_term(axes, numbers, token)
    by_logprob = scale * (term.by_ratio + term.kl_by_ratio + term.by_logprob)
    by_entropy = None
    if loss.entropy_coef != 0:
        by_entropy = masked(-loss.entropy_coef * scale)
    return Coefficients(masked(by_logprob), by_entropy)


def _scores(tile: Tensor, scoring: Scoring) -> Tensor:
    dtype = compute_dtype(tile)
    logits = tile.to(dtype)
    if scoring.bias is not None:
        logits = logits + scoring.bias.to(dtype)
    if scoring.softcap is not None:
        logits = torch.tanh(logits / scoring.softcap) * scoring.softcap
    column = _column(scoring.temperature, dtype)
    return logits / column if isinstance(column, Tensor) or column != 1 else logits


def _row(tile: Tensor, scoring: Scoring) -> _Row:
    scores = _scores(tile, scoring)
    shift = scores.amax(1)
    centred = _centred(scores, shift)
    exp = centred.exp()
    return _Row(scores, centred, exp, shift, exp.sum(1))


def _centred(scores: Tensor, shift: Tensor) -> Tensor:
    # Of -inf, whose probability is 0, a number: 0 times it is 0. NaN stays NaN, and a row of nothing
    # but -inf becomes it.
    return (scores - shift[:, None]).clamp_(min=_NEVER)


def _stats(row: _Row, scoring: Scoring) -> RowStats:
    log_sum = row.total.log()
    # Not a product of matrices, whose running sums lose digits over a long row; `sum` adds pairwise.
    weighted = (row.exp * row.centred).sum(1)
    entropy = log_sum - weighted / row.total
    index = scoring.targets.to(torch.int64)
    safe = index.clamp(0, row.exp.shape[1] - 1)
    logprobs = row.scores.gather(1, safe[:, None])[:, 0] - row.shift - log_sum
    # A NaN or +inf makes the entropy NaN, whether or not the target is concerned.
    valid = entropy.isfinite() & (safe == index)
    return RowStats(torch.where(valid, logprobs, torch.nan), entropy, row.shift, log_sum)


def _write_gradient(
    row: _Row, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    by_logprob, by_entropy = coefficients
    if by_entropy is None:
        grad = row.exp.mul_((-by_logprob / row.total)[:, None])
    else:
        offset = (stats.entropy - stats.log_sum)[:, None]
        slope = (row.centred + offset).mul_(by_entropy[:, None]).add_(by_logprob[:, None])
        grad = slope.mul_(row.exp).div_(-row.total[:, None])
    index = scoring.targets.to(torch.int64)
    safe = index.clamp(0, grad.shape[1] - 1)
    # A target in another rank's part of the vocabulary adds nothing here.
    here = torch.where(safe == index, by_logprob, 0.0)
    grad.scatter_add_(1, safe[:, None], here[:, None])
    column = _column(scoring.temperature, grad.dtype)
    if scoring.softcap is not None:
        grad *= 1 - (row.scores * column / scoring.softcap).square()
    if isinstance(column, Tensor) or column != 1:
        grad /= column
    idle = coefficients.idle()[:, None]
    out.copy_(grad.masked_fill_(idle, 0.0))


def _column(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    # Values that a check could not look at: the row becomes NaN, not a plausible number.
    usable = (temperature > 0) & temperature.isfinite()
    return torch.where(usable, temperature.to(dtype), torch.nan)[:, None]
