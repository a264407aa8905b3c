"""Completions and groups in PyTorch: advantages, the scale of each token, and the loss of all.

What `coefficient.py` leaves open are the sums over completions and the aggregation. Sums over a
completion or a group are in fp64: in fp32, one after the other, they lose digits with its length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .coefficient import (
    LOG_RATIO_BOUND,
    Axes,
    Numbers,
    Token,
    bounded,
    correction_weight,
    pessimistic,
    token_term,
    vespo_log,
    vespo_weight,
)
from .objective import PolicyLoss, coefficient_arguments
from .values import (
    Coefficients,
    Evaluated,
    GroupAdvantages,
    LossInputs,
    Prepared,
    Rewards,
    compute_dtype,
)


class Completions(NamedTuple):
    """`index [N]` int64: the completion of each token; `lengths [B]` int64; `valid []` bool:
    whether the bounds describe the N tokens (looked at without a synchronisation)."""

    index: Tensor
    lengths: Tensor
    valid: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, n_tokens: int) -> Completions:
        bounds = cu_seqlens.to(torch.int64).contiguous()
        lengths = bounds.diff()
        positions = torch.arange(n_tokens, device=bounds.device)
        # right=True skips empty completions: the first end strictly behind the position. Tokens
        # that no completion has are put in the last one, to stay in bounds.
        index = torch.searchsorted(bounds[1:], positions, right=True)
        index = index.clamp_(max=max(lengths.shape[0] - 1, 0))
        valid = (bounds[0] == 0) & (bounds[-1] == n_tokens) & (lengths >= 0).all()
        return cls(index, lengths, valid)

    def sum(self, tokens: Tensor) -> Tensor:
        """[N] -> [B] fp64."""
        zeros = tokens.new_zeros(max(self.lengths.shape[0], 1), dtype=torch.float64)
        return zeros.index_add_(0, self.index, tokens.to(torch.float64))[: self.lengths.shape[0]]

    def spread(self, per_completion: Tensor) -> Tensor:
        """[B] -> [N]."""
        if not self.lengths.shape[0]:
            return per_completion.new_full(self.index.shape, torch.nan)
        return per_completion[self.index]

    def mean(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[N] -> [N]: each token gets the mean over its completion's tokens where `mask`. What is
        masked in `tokens` must be 0 already."""
        means = self.sum(tokens) / self.sum(mask).clamp_(min=1)
        return self.spread(means.to(tokens.dtype))


def prepare(loss: PolicyLoss, inputs: LossInputs, n_tokens: int, dtype: torch.dtype) -> Prepared:
    """What a token's term needs beside log-probs; see `Prepared`."""
    completions = Completions.of(inputs.cu_seqlens, n_tokens)
    valid, weights = completions.valid, inputs.weights
    weights = None if weights is None else weights.to(dtype)
    totals = completions.lengths.double() if weights is None else completions.sum(weights)
    if inputs.normalizer is not None:
        denominator = inputs.normalizer.to(torch.float64)
        valid = valid & (denominator > 0) & denominator.isfinite()
    elif inputs.count is not None:
        denominator = inputs.count
        valid = valid & (0 < denominator < torch.inf)
    elif loss.aggregation == "token-mean":
        denominator = totals.sum()
    elif loss.aggregation == "seq-mean-token-mean":
        denominator = (totals != 0).sum()
    else:
        denominator = totals.shape[0]
    if loss.aggregation == "seq-mean-token-mean":
        denominator = totals * denominator
    elif loss.aggregation == "seq-mean-token-sum-norm":
        assert loss.max_completion_length is not None
        denominator = denominator * loss.max_completion_length
    share = torch.where(valid, 1.0, torch.nan).to(torch.float64) / denominator
    # An infinite weight must not take the others out.
    share = share.masked_fill_(share == 0, torch.nan).to(dtype)
    scale = completions.spread(share) if share.ndim else share.repeat(n_tokens)

    advantages = inputs.advantages
    if advantages is None:
        assert inputs.rewards is not None
        advantages = group_advantages(inputs.rewards).advantages
    advantages = advantages.to(dtype)
    advantages = advantages.contiguous() if inputs.per_token else completions.spread(advantages)
    if weights is None:
        return Prepared(advantages, scale, valid)
    # The advantage is a factor of every policy term, so that the row and the loss become NaN.
    usable = (weights >= 0) & weights.isfinite()
    advantages = torch.where(usable, advantages, torch.nan)
    counts = weights != 0
    # Where nothing counts, the denominator may be 0.
    scale = torch.where(counts, weights * scale, 0.0)
    return Prepared(torch.where(counts, advantages, 0.0), scale, valid)


def evaluate(
    loss: PolicyLoss,
    prepared: Prepared,
    inputs: LossInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> Evaluated:
    """The loss of all tokens, its metrics, and its derivatives by log-probs and entropies."""
    dtype = compute_dtype(logprobs)
    axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
    advantages, scale, valid = prepared
    mask = scale != 0

    def masked(tokens: Tensor) -> Tensor:
        tokens = tokens.to(dtype)
        return tokens if inputs.weights is None else torch.where(mask, tokens, 0.0)

    logprobs = masked(logprobs)
    old = logprobs if inputs.old is None else masked(inputs.old)
    ref = logprobs if inputs.ref is None else masked(inputs.ref)
    gap = None if inputs.rollout is None else old - masked(inputs.rollout)
    log_ratio = logprobs - old

    by_completion = loss.ratio != "token" or loss.surrogate in ("vespo", "gmpo")
    by_sequence = loss.correction is not None and loss.correction.startswith("sequence")
    completions = None
    if by_completion or by_sequence:
        completions = Completions.of(inputs.cu_seqlens, mask.shape[0])
    correction = None
    if loss.correction is not None and gap is not None:
        log_weight = gap
        if completions is not None and by_sequence:
            log_weight = completions.spread(completions.sum(gap).to(dtype))
        correction = correction_weight(axes, numbers, log_weight)

    shared = None  # the log-ratio that a completion's tokens have in common
    sequence: Tensor | float = 1.0
    low = high = None
    if completions is not None and by_completion:
        if loss.surrogate == "vespo":
            sequence = _vespo(axes, numbers, completions, log_ratio, advantages, correction, mask)
        elif loss.surrogate == "gmpo":
            clipped, low, high = pessimistic(numbers, log_ratio, advantages)
            shared = completions.mean(clipped, mask)
            sequence = bounded(shared).exp()
            advantages = completions.mean(advantages, mask)
        else:
            shared = log_ratio = completions.mean(log_ratio, mask)
    term = token_term(
        axes,
        numbers,
        Token(
            log_ratio,
            logprobs,
            old,
            ref,
            advantages,
            1.0 if correction is None else correction,
            sequence,
        ),
    )
    if low is None or high is None:
        low, high = term.low, term.high
    value = term.value
    if entropy is not None:
        entropy = masked(entropy)
        if loss.entropy_coef != 0:
            value = value - loss.entropy_coef * entropy

    if completions is not None and shared is not None and loss.ratio != "sequence_token":
        moved = scale * (term.by_ratio + term.kl_by_ratio)
        by_logprob = scale * term.by_logprob
        if loss.surrogate == "gmpo":
            moved = scale * term.by_ratio
            moved = torch.where(shared.abs() > LOG_RATIO_BOUND, 0.0, moved)
            by_logprob = scale * (term.kl_by_ratio + term.by_logprob)
        moved = completions.mean(masked(moved), mask)
        if loss.surrogate == "gmpo":
            moved = torch.where(low | high, 0.0, moved)
        by_logprob = by_logprob + moved
    else:
        by_logprob = scale * (term.by_ratio + term.kl_by_ratio + term.by_logprob)
    by_entropy = -loss.entropy_coef * scale if loss.entropy_coef != 0 else None

    finite = value.isfinite() & logprobs.isfinite()
    none = torch.zeros_like(logprobs)
    table = torch.stack(
        [
            # In the order of METRICS, then the loss.
            none if inputs.ref is None else term.kl,
            none if entropy is None else entropy,
            low | high,
            low,
            high,
            term.dual,
            term.ratio,
            none,
            none if gap is None else -gap,
            none + 1.0 if correction is None else correction,
            none + 1.0,
            ~finite,
            scale * value,
        ]
    )
    if inputs.weights is not None:
        table = torch.where(mask, table, 0.0)
    sums = table.sum(1)
    total, metrics = sums[12], sums[:12]
    metrics[:10] /= metrics[10].clamp(min=1)
    if mask.shape[0]:
        metrics[7] = table[6].amax()
    # Without tokens, ratios and weights are 1.
    empty = metrics[10] == 0
    metrics[6:8] += empty
    metrics[9] += empty
    metrics[11] = torch.where(valid, metrics[11], max(mask.shape[0], 1))
    return Evaluated(
        torch.where((metrics[11] == 0) & total.isfinite(), total, torch.nan),
        metrics,
        Coefficients(masked(by_logprob), by_entropy),
    )


def _vespo(
    axes: Axes,
    numbers: Numbers,
    completions: Completions,
    log_ratio: Tensor,
    advantages: Tensor,
    correction: Tensor | None,
    mask: Tensor,
) -> Tensor:
    log_weight = completions.spread(completions.sum(bounded(log_ratio)))
    if correction is not None:
        log_correction = vespo_log(correction.log())
        if axes.correction.startswith("token"):
            log_correction = torch.where(mask, log_correction, 0.0)
            log_correction = completions.spread(completions.sum(log_correction))
        log_weight = log_weight + log_correction
    return vespo_weight(numbers, advantages, vespo_log(log_weight).to(log_ratio.dtype))


class _Statistics(NamedTuple):
    centred: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    active: Tensor


def group_advantages(rewards: Rewards) -> GroupAdvantages:
    """See `perl_kernels.group_advantages`."""
    dtype = compute_dtype(rewards.rewards)
    table = rewards.rewards.to(torch.float64)
    table = table if table.ndim == 2 else table[:, None]
    known = ~table.isnan()
    n_groups = rewards.sizes.shape[0]
    bounds = torch.nn.functional.pad(rewards.sizes.cumsum(0), (1, 0))
    groups, _, valid = Completions.of(bounds, table.shape[0])
    valid = valid & (rewards.sizes >= 0).all()
    weighted = table if rewards.weights is None else table * rewards.weights
    total = torch.where(known, weighted, 0.0).sum(1, keepdim=True)
    scored = known.any(1, keepdim=True)
    statistics = _statistics(total, scored, groups, n_groups, rewards.unbiased)
    if rewards.combine == "normalize_then_sum":
        each = _statistics(table, known, groups, n_groups, rewards.unbiased)
        parts = _normalised(each, table, known, groups, rewards)
        parts = parts if rewards.weights is None else parts * rewards.weights
        summed = parts.sum(1, keepdim=True)
        spread = _statistics(summed, scored, torch.zeros_like(groups), 1, rewards.unbiased)
        advantages = _divide(spread.centred, spread.std + rewards.eps)
    else:
        advantages = _normalised(statistics, total, scored, groups, rewards)
    advantages, mean, std = (
        torch.where(valid, values[:, 0], torch.nan).to(dtype)
        for values in (advantages, statistics.mean, statistics.std)
    )
    return GroupAdvantages(advantages, mean, std, statistics.active[:, 0] & valid)


def _statistics(
    values: Tensor, known: Tensor, groups: Tensor, n_groups: int, unbiased: bool
) -> _Statistics:
    """Of each column of `values [B, C]` where `known`: [B, C], then [P, C] each."""
    zeros = values.new_zeros(n_groups, values.shape[1])
    count = zeros.index_add(0, groups, known.to(values.dtype))
    mean = zeros.index_add(0, groups, torch.where(known, values, 0.0)) / count.clamp(min=1)
    # Equal rewards must give exactly 0: their rounded mean may differ from them, and dividing that
    # by a standard deviation as small would make a signal of it.
    rows = groups[:, None].expand(values.shape)
    highest = torch.full_like(zeros, -torch.inf)
    highest.scatter_reduce_(0, rows, torch.where(known, values, -torch.inf), "amax")
    lowest = torch.full_like(zeros, torch.inf)
    lowest.scatter_reduce_(0, rows, torch.where(known, values, torch.inf), "amin")
    active = (count > 1) & ~(highest == lowest)
    centred = torch.where(known & active[groups], values - mean[groups], 0.0)
    squares = zeros.index_add(0, groups, centred.square())
    std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    return _Statistics(centred, count, mean, std, active)


def _normalised(
    found: _Statistics, values: Tensor, known: Tensor, groups: Tensor, rewards: Rewards
) -> Tensor:
    centred = found.centred
    if rewards.baseline == "leave_one_out":
        count = found.count[groups]
        # r - mean of the others = n / (n - 1) * (r - mean of all)
        centred = centred * count / (count - 1).clamp(min=1)
    if rewards.scale == "none":
        return centred
    std = found.std[groups]
    if rewards.scale == "batch":
        std = _statistics(values, known, torch.zeros_like(groups), 1, rewards.unbiased).std
    return _divide(centred, std + rewards.eps)


def _divide(centred: Tensor, by: Tensor) -> Tensor:
    # With eps = 0 a group of equal rewards would be 0 / 0.
    return torch.where(centred == 0, 0.0, centred / by)
