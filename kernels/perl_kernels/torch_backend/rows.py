"""Rows of logits in PyTorch: log-prob, entropy, and the gradient back to the row.

With s the logits after softcap and temperature, p = softmax(s) and H its entropy, the gradient of
any loss with dL/dlogprob = g and dL/dentropy = h is, per row,

    dL/ds_j = g (1[j = target] - p_j) - h p_j (log p_j + H)

The exponentials are computed once and serve the sum, the entropy and the gradient: with m the largest score, c = s - m
and Z = sum_j exp c_j, H = log Z - sum_j exp(c_j) c_j / Z, where nothing cancels, as no term is negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Coefficients, LossInputs, Prepared
from ..objective import PolicyLoss
from ..scores import RowStats, Scoring
from .losses import row_coefficients


class _Row(NamedTuple):
    scores: Tensor
    centred: Tensor
    exp: Tensor
    shift: Tensor
    total: Tensor


def row_stats(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> RowStats:
    """Statistics of the logits `tile [n, V]`, computed in `dtype`."""
    return _stats(_row(tile, scoring, dtype), scoring)


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """Write the gradient by the logits to `out [n, V]`, which may be `tile`: exactly 0 in rows
    where both coefficients are 0, whatever the scores."""
    scores = _scores(tile, scoring, stats.logprobs.dtype)
    centred = scores - stats.shift[:, None]
    row = _Row(scores, centred, centred.exp(), stats.shift, stats.log_sum.exp())
    _write_gradient(row, scoring, stats, coefficients, out)


def row_loss(
    tile: Tensor,
    scoring: Scoring,
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    dtype: torch.dtype,
    out: Tensor | None,
) -> tuple[RowStats, Coefficients]:
    """Statistics of the rows and coefficients of the token-level `loss`, and in `out [n, V]`, if
    given, the gradient by the logits; `out` may be `tile`. The per-token tensors are those of
    these rows."""
    row = _row(tile, scoring, dtype)
    stats = _stats(row, scoring)
    coefficients = row_coefficients(loss, stats.logprobs, prepared, inputs)
    if out is not None:
        _write_gradient(row, scoring, stats, coefficients, out)
    return stats, coefficients


def _scores(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    logits = tile.to(dtype)
    if scoring.bias is not None:
        logits = logits + scoring.bias.to(dtype)
    if scoring.softcap is not None:
        logits = torch.tanh(logits / scoring.softcap) * scoring.softcap
    column = _column(scoring.temperature)
    return logits / column if isinstance(column, Tensor) or column != 1 else logits


def _row(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> _Row:
    scores = _scores(tile, scoring, dtype)
    shift = scores.amax(1)
    centred = scores - shift[:, None]
    exp = centred.exp()
    return _Row(scores, centred, exp, shift, exp.sum(1))


def _stats(row: _Row, scoring: Scoring) -> RowStats:
    log_sum = row.total.log()
    # Not a product of matrices, whose running sums lose digits over a long row; `sum` adds pairwise.
    entropy = log_sum - (row.exp * row.centred).sum(1) / row.total
    index = scoring.targets.to(torch.int64)
    safe = index.clamp(0, row.exp.shape[1] - 1)
    logprobs = row.centred.gather(1, safe[:, None])[:, 0] - log_sum
    # An infinite score makes the entropy NaN (0 * inf), whether or not the target is concerned.
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
    column = _column(scoring.temperature)
    if scoring.softcap is not None:
        grad *= 1 - (row.scores * column / scoring.softcap).square()
    if isinstance(column, Tensor) or column != 1:
        grad /= column
    idle = coefficients.idle()[:, None]
    out.copy_(grad.masked_fill_(idle, 0.0))


def _column(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    # Values that a check could not look at: the row becomes NaN, not a plausible number.
    usable = (temperature > 0) & temperature.isfinite()
    return torch.where(usable, temperature, torch.nan)[:, None]
