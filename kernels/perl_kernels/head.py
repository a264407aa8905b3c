"""One block of rows of logits: log-prob and entropy of each row, and the gradient back to the row.

With s the logits after softcap and temperature, p = softmax(s) and H its entropy, the gradient of
any loss with dL/dlogprob = g and dL/dentropy = h is, per row,

    dL/ds_j = g (1[j = target] - p_j) - h p_j (log p_j + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of one fp32 block of logits; a few blocks live at once.
_BLOCK_BYTES = 256 * 2**20


class RowStats(NamedTuple):
    """`logprobs [n]` of the targets and `entropy [n]`."""

    logprobs: Tensor
    entropy: Tensor


def block_rows(vocab: int, chunk_size: int | None = None) -> int:
    """How many rows of logits to hold at once."""
    return chunk_size or max(16, _BLOCK_BYTES // (4 * max(vocab, 1)))


def blocks(n_rows: int, size: int) -> Iterator[slice]:
    """The rows [0, n_rows) in slices of `size`; the last may be shorter."""
    # Only their number is fixed when torch.compile unrolls this, not n_rows itself.
    count = -(-n_rows // size)
    for i in range(count):
        yield slice(i * size, n_rows if i == count - 1 else (i + 1) * size)


def scaled(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), then divided by the temperature (of each row; NaN where it
    is not above 0 and finite)."""
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    column = _column(temperature)
    return logits / column if isinstance(column, Tensor) or column != 1 else logits


def row_stats(log_probs: Tensor, targets: Tensor) -> RowStats:
    """Statistics of `log_probs [n, V]`. A row with a score that is not finite, or a target outside
    [0, V), has log-prob NaN."""
    entropy = -(log_probs.exp() * log_probs).sum(1)
    index = targets.to(torch.int64)
    safe = index.clamp(0, log_probs.shape[1] - 1)
    logprobs = log_probs.gather(1, safe[:, None])[:, 0]
    # An infinite score makes the entropy NaN (0 * inf), whether or not the target is concerned.
    valid = entropy.isfinite() & (safe == index)
    return RowStats(torch.where(valid, logprobs, torch.nan), entropy)


def logits_gradient(
    scores: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """Gradient with respect to the logits before softcap and temperature, [n, V]; exactly 0 in
    rows where both coefficients are 0, whatever the scores. `grad_entropy` None is 0."""
    if grad_entropy is None:
        grad = log_probs.exp().mul_(-grad_logprobs[:, None])
    else:
        slope = (log_probs + entropy[:, None]).mul_(grad_entropy[:, None])
        grad = slope.add_(grad_logprobs[:, None]).neg_().mul_(log_probs.exp())
    index = targets.to(torch.int64).clamp(0, scores.shape[1] - 1)
    grad.scatter_add_(1, index[:, None], grad_logprobs[:, None])
    column = _column(temperature)
    if softcap is not None:
        grad *= 1 - (scores * column / softcap).square()
    if isinstance(column, Tensor) or column != 1:
        grad /= column
    return grad.masked_fill_(idle_rows(grad_logprobs, grad_entropy)[:, None], 0.0)


def idle_rows(grad_logprobs: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Rows that no gradient flows to, [n] bool."""
    idle = grad_logprobs == 0
    return idle if grad_entropy is None else idle & (grad_entropy == 0)


def rows_of(value: Any, part: slice) -> Any:
    """The rows `part` of what may be a tensor [N], or the same for all rows."""
    return value[part] if isinstance(value, Tensor) else value


def _column(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    # Values that a check could not look at: the row becomes NaN, not a plausible number.
    usable = (temperature > 0) & temperature.isfinite()
    return torch.where(usable, temperature, torch.nan)[:, None]
