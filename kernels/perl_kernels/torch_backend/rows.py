"""Rows of logits in PyTorch: log-prob, entropy, and the gradient back to the row.

With s the logits after softcap and temperature, p = softmax(s) and H its entropy, the gradient of
any loss with dL/dlogprob = g and dL/dentropy = h is, per row,

    dL/ds_j = g (1[j = target] - p_j) - h p_j (log p_j + H)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import Coefficients, LossInputs, Prepared
from ..objective import PolicyLoss
from ..scores import RowStats, Scoring
from .losses import row_coefficients


def row_stats(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> RowStats:
    """Statistics of the logits `tile [n, V]`, computed in `dtype`."""
    return _stats(_log_probs(tile, scoring, dtype), scoring)


def row_gradient(
    tile: Tensor, scoring: Scoring, stats: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """Write the gradient by the logits to `out [n, V]`, which may be `tile`: exactly 0 in rows
    where both coefficients are 0, whatever the scores."""
    dtype = stats.logprobs.dtype
    scores = _scores(tile, scoring, dtype)
    centred = scores - stats.shift[:, None]
    _write_gradient(scores, centred - stats.log_sum[:, None], scoring, stats, coefficients, out)


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
    work = _log_probs(tile, scoring, dtype)
    stats = _stats(work, scoring)
    coefficients = row_coefficients(loss, stats.logprobs, prepared, inputs)
    if out is not None:
        _write_gradient(work[0], work[1], scoring, stats, coefficients, out)
    return stats, coefficients


def _scores(tile: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    logits = tile.to(dtype)
    if scoring.bias is not None:
        logits = logits + scoring.bias.to(dtype)
    if scoring.softcap is not None:
        logits = torch.tanh(logits / scoring.softcap) * scoring.softcap
    column = _column(scoring.temperature)
    return logits / column if isinstance(column, Tensor) or column != 1 else logits


def _log_probs(
    tile: Tensor, scoring: Scoring, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = _scores(tile, scoring, dtype)
    shift = scores.amax(1)
    centred = scores - shift[:, None]
    log_sum = centred.exp().sum(1).log()
    return scores, centred.sub_(log_sum[:, None]), shift, log_sum


def _stats(work: tuple[Tensor, Tensor, Tensor, Tensor], scoring: Scoring) -> RowStats:
    _, log_probs, shift, log_sum = work
    entropy = -(log_probs.exp() * log_probs).sum(1)
    index = scoring.targets.to(torch.int64)
    safe = index.clamp(0, log_probs.shape[1] - 1)
    logprobs = log_probs.gather(1, safe[:, None])[:, 0]
    # An infinite score makes the entropy NaN (0 * inf), whether or not the target is concerned.
    valid = entropy.isfinite() & (safe == index)
    return RowStats(torch.where(valid, logprobs, torch.nan), entropy, shift, log_sum)


def _write_gradient(
    scores: Tensor,
    log_probs: Tensor,
    scoring: Scoring,
    stats: RowStats,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    by_logprob, by_entropy = coefficients
    if by_entropy is None:
        grad = log_probs.exp().mul_(-by_logprob[:, None])
    else:
        slope = (log_probs + stats.entropy[:, None]).mul_(by_entropy[:, None])
        grad = slope.add_(by_logprob[:, None]).neg_().mul_(log_probs.exp())
    index = scoring.targets.to(torch.int64)
    safe = index.clamp(0, scores.shape[1] - 1)
    # A target in another rank's part of the vocabulary adds nothing here.
    here = torch.where(safe == index, by_logprob, 0.0)
    grad.scatter_add_(1, safe[:, None], here[:, None])
    column = _column(scoring.temperature)
    if scoring.softcap is not None:
        grad *= 1 - (scores * column / scoring.softcap).square()
    if isinstance(column, Tensor) or column != 1:
        grad /= column
    out.copy_(grad.masked_fill_(coefficients.idle()[:, None], 0.0))


def _column(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    # Values that a check could not look at: the row becomes NaN, not a plausible number.
    usable = (temperature > 0) & temperature.isfinite()
    return torch.where(usable, temperature, torch.nan)[:, None]
