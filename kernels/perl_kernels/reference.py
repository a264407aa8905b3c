"""Every operation as one would write it down: all logits at once, gradients by autograd.

The truth that the other implementations are measured against, in fp64; shares no formula of the
losses with `coefficient.py`. Differentiable any number of times. Takes the arguments of the public
functions of the same name and returns the same, without their checks and without an eye to memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import completions_torch
from .advantage import GroupedRewards
from .objective import PolicyLoss
from .values import METRICS, GroupAdvantages, LossOutput, TokenLogprobs, compute_dtype

_LOG_RATIO_BOUND = 20.0
_VESPO_LOG_FLOOR = math.log(1e-8)
_DPPO_EPS = 1e-8


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0
) -> TokenLogprobs:
    """log softmax(logits / temperature) at the targets, and -sum p log p."""
    dtype = compute_dtype(logits)
    by = temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    log_probs = torch.log_softmax(logits.to(dtype) / by, dim=1)
    chosen = log_probs.gather(1, targets.to(torch.int64)[:, None])[:, 0]
    # A score of -inf is a probability of 0, whose p log p is 0.
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return TokenLogprobs(chosen, -(log_probs.exp() * finite).sum(1))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    """`token_logprobs` of the softcapped hidden @ weight.T + bias."""
    logits = (hidden @ weight.t()).to(compute_dtype(hidden))
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs(logits, targets, temperature=temperature)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    temperature: float | Tensor = 1.0,
    **others: Any,
) -> LossOutput:
    """`policy_loss(..., **others)` of `token_logprobs`."""
    logprobs, entropy = token_logprobs(logits, targets, temperature=temperature)
    return policy_loss(logprobs, advantages, cu_seqlens, loss, entropy=entropy, **others)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **others: Any,
) -> LossOutput:
    """`policy_loss(..., **others)` of `linear_token_logprobs`."""
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap
    )
    return policy_loss(logprobs, advantages, cu_seqlens, loss, entropy=entropy, **others)


def group_advantages(rewards: Tensor, group_sizes: Any, **options: Any) -> GroupAdvantages:
    """What the PyTorch backend computes, in fp64 as it is."""
    return completions_torch.group_advantages(
        GroupedRewards(rewards, group_sizes, **options).checked()
    )


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor | GroupedRewards,
    cu_seqlens: Tensor,
    loss: PolicyLoss,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """The formulas of `PolicyLoss`."""
    n_tokens, dtype = logprobs.shape[0], compute_dtype(logprobs)
    completions = _Completions.of(cu_seqlens.to(logprobs.device))
    if isinstance(advantages, GroupedRewards):
        advantages = completions_torch.group_advantages(advantages.checked()).advantages
    if advantages.shape[0] == completions.count:
        advantages = completions.spread(advantages)
    factors = torch.ones_like(logprobs) if weights is None else weights
    factors = factors.detach().to(dtype)
    mask = factors != 0

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else masked(tensor.detach())

    # The advantage is a factor of every policy term, so that the row and the loss become NaN.
    usable = (factors >= 0) & factors.isfinite()
    rows = _Rows(
        mask,
        masked(logprobs),
        masked(torch.where(usable, advantages.detach(), torch.nan)),
        constant(old_logprobs),
        constant(ref_logprobs),
        constant(rollout_logprobs),
    )
    terms = _terms(loss, rows, completions)
    seen = None if entropy is None else masked(entropy)
    value = terms.value
    if seen is not None and loss.entropy_coef != 0:
        value = value - loss.entropy_coef * seen
    total = (_scale(loss, factors, completions, normalizer) * torch.where(mask, value, 0.0)).sum()
    # Added rather than selected, so that the gradients are not silenced.
    total = total + torch.where(total.isfinite(), 0.0, torch.nan)
    with torch.no_grad():
        metrics = _metrics(rows, terms._replace(value=value), seen)
    given = torch.full((n_tokens,), torch.nan) if entropy is None else entropy.detach()
    given = given.to(logprobs.device, dtype)
    return LossOutput(total, logprobs.detach().to(dtype), given, metrics)


class _Completions(NamedTuple):
    """`index [N]`: the completion of each token; `count`: B."""

    index: Tensor
    count: int

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> _Completions:
        lengths = cu_seqlens.to(torch.int64).diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return cls(numbers.repeat_interleave(lengths), len(lengths))

    def sum(self, tokens: Tensor) -> Tensor:
        """[N] -> [B]."""
        return tokens.new_zeros(self.count).index_add(0, self.index, tokens)

    def spread(self, per_completion: Tensor) -> Tensor:
        """[B] -> [N]."""
        return per_completion[self.index]

    def mean(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[N] -> [N]: the mean over the completion's tokens where `mask`; `tokens` is 0 elsewhere."""
        lengths = self.sum(mask.to(tokens.dtype)).clamp(min=1)
        return self.spread(self.sum(tokens) / lengths)


class _Rows(NamedTuple):
    """What the loss reads per token, each [N]. Where `mask` is False every entry is 0, so that
    padding of any content, NaN included, gives log-ratios of 0 before `exp`."""

    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None

    def sampled(self) -> Tensor:
        return self.logprobs.detach() if self.old is None else self.old

    def log_ratio(self) -> Tensor:
        return self.logprobs - self.sampled()


class _Terms(NamedTuple):
    """`value [N]` is what is aggregated, differentiable; the rest is for the metrics."""

    value: Tensor
    ratio: Tensor
    kl: Tensor | None
    correction: Tensor | None
    low: Tensor
    high: Tensor
    dual: Tensor


def _terms(loss: PolicyLoss, rows: _Rows, completions: _Completions) -> _Terms:
    """surrogate * correction + kl_coef * KL of every token."""
    log_ratio = rows.log_ratio()
    if loss.ratio != "token":
        mean = completions.mean(log_ratio, rows.mask)
        log_ratio = mean
        if loss.ratio == "sequence_token":
            log_ratio = rows.logprobs - rows.logprobs.detach() + mean.detach()
    ratio = _exp(log_ratio)
    correction = _correction(loss, rows, completions)
    value, low, high, dual = _surrogate(loss, rows, completions, ratio, correction)
    # vespo has taken the correction into the weight of the sequence.
    if correction is not None and loss.surrogate != "vespo":
        value = value * correction
    kl = None
    if rows.ref is not None:
        kl = _kl(loss.kl or "k3", rows.logprobs, rows.ref)
        if loss.has_kl:
            value = value + loss.kl_coef * (kl * ratio if loss.kl_bias_correction else kl)
    flags = (rows.mask & flag for flag in (low, high, dual))
    return _Terms(value, ratio, kl, correction, *flags)


def _correction(loss: PolicyLoss, rows: _Rows, completions: _Completions) -> Tensor | None:
    """Importance weight of trainer against rollout engine, [N], without gradient."""
    if loss.correction is None or rows.rollout is None:
        return None
    log_weight = rows.sampled() - rows.rollout
    if loss.correction.startswith("sequence"):
        log_weight = completions.spread(completions.sum(log_weight))
    weight = _exp(log_weight)
    if loss.correction.endswith("truncate"):
        return weight.clamp(loss.correction_low, loss.correction_high)
    # Written so that a NaN weight is not outside: it stays NaN rather than becoming 0.
    outside = (weight < loss.correction_low) | (weight > loss.correction_high)
    return weight.masked_fill(outside, 0.0)


def _kl(kind: str, logprobs: Tensor, ref: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), [N]; `kind` is a value of `PolicyLoss.kl`."""
    if kind.endswith("+"):
        gradient = _kl("k2", logprobs, ref)
        return gradient + (_kl(kind[:-1], logprobs, ref) - gradient).detach()
    difference = ref - logprobs
    if kind == "k1":
        return -difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    difference = _bounded(difference)
    return difference.expm1() - difference


def _surrogate(
    loss: PolicyLoss,
    rows: _Rows,
    completions: _Completions,
    ratio: Tensor,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The policy term, and where it is clipped below, above, and by the dual clip."""
    advantages, logprobs = rows.advantages, rows.logprobs
    never = torch.zeros_like(rows.mask)
    low = high = dual = never
    clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    if loss.surrogate in ("clip", "cispo"):
        low = (ratio < 1 - loss.clip_low) & (advantages < 0)
        high = (ratio > 1 + loss.clip_high) & (advantages > 0)
    match loss.surrogate:
        case "clip":
            unclipped = ratio if loss.delta is None else ratio.clamp(max=loss.delta)
            term = -torch.minimum(unclipped * advantages, clipped * advantages)
            if loss.dual_clip is not None:
                ceiling = -advantages * loss.dual_clip
                dual = (advantages < 0) & (term > ceiling)
                term = torch.where(dual, ceiling, term)
        case "cispo":
            term = -clipped.detach() * advantages * logprobs
        case "sapo":
            tau = _by_sign(advantages > 0, loss.sapo_tau_pos, loss.sapo_tau_neg, ratio)
            term = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
        case "vespo":
            term = -_vespo_weight(loss, rows, completions, correction) * advantages * logprobs
        case "gmpo":
            log_ratio, gain = rows.log_ratio(), advantages >= 0
            high = gain & (log_ratio > loss.clip_high)
            low = ~gain & (log_ratio < -loss.clip_low)
            above, below = log_ratio.clamp(max=loss.clip_high), log_ratio.clamp(min=-loss.clip_low)
            pessimistic = torch.where(gain, above, below)
            shared = _exp(completions.mean(pessimistic, rows.mask))
            term = -completions.mean(advantages, rows.mask) * shared
        case "dppo_tv" | "dppo_kl":
            low, high = _dppo_rejects(loss, rows)
            kept = ratio.detach().clamp(max=loss.dppo_ratio_cap).masked_fill(low | high, 0.0)
            term = -advantages * kept * logprobs
        case "reinforce":
            term = -advantages * logprobs
    return term, low, high, dual


def _vespo_weight(
    loss: PolicyLoss, rows: _Rows, completions: _Completions, correction: Tensor | None
) -> Tensor:
    log_weight = completions.spread(completions.sum(_bounded(rows.log_ratio().detach())))
    if correction is not None and loss.correction is not None:
        log_correction = correction.log().clamp(_VESPO_LOG_FLOOR, _LOG_RATIO_BOUND)
        log_correction = torch.where(rows.mask, log_correction, 0.0)
        if loss.correction.startswith("token"):
            log_correction = completions.spread(completions.sum(log_correction))
        log_weight = log_weight + log_correction
    log_weight = log_weight.clamp(_VESPO_LOG_FLOOR, _LOG_RATIO_BOUND)
    gain = rows.advantages >= 0
    k = _by_sign(gain, loss.vespo_k_pos, loss.vespo_k_neg, log_weight)
    rate = _by_sign(gain, loss.vespo_lambda_pos, loss.vespo_lambda_neg, log_weight)
    return torch.exp(rate + k * log_weight - rate * log_weight.exp())


def _dppo_rejects(loss: PolicyLoss, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Tokens whose update would leave the trust region: downwards (A <= 0) and upwards (A > 0)."""
    new_log, old_log = rows.logprobs.detach(), rows.sampled()
    new, old = new_log.exp(), old_log.exp()
    if loss.surrogate == "dppo_tv":
        too_high, too_low = new - old > loss.clip_high, new - old < -loss.clip_low
    else:
        # An engine may round a log-prob to a little more than 0.
        rest = [(1 - p).clamp(min=0) + _DPPO_EPS for p in (old, new)]
        divergence = old * (old_log - new_log) + (1 - old) * (rest[0] / rest[1]).log()
        too_high = (divergence > loss.clip_high) & (new > old)
        too_low = (divergence > loss.clip_low) & (new < old)
    gain = rows.advantages > 0
    return too_low & ~gain, too_high & gain


def _by_sign(gain: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    # where() of two Python numbers would round them to fp32.
    return torch.where(gain, torch.full_like(like, positive), negative)


def _bounded(log_ratio: Tensor) -> Tensor:
    # An infinity is a broken input, not a large ratio: bounding it would hide it.
    bounded = log_ratio.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    return torch.where(log_ratio.isinf(), torch.nan, bounded)


def _exp(log_ratio: Tensor) -> Tensor:
    return _bounded(log_ratio).exp()


def _scale(
    loss: PolicyLoss,
    weights: Tensor,
    completions: _Completions,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Factor of each token's term, [N], such that the loss is sum(scale * term).

    `normalizer` replaces the count in the denominator: sum(weights) for `token-mean`, otherwise
    the number of sequences.
    """
    count: float | Tensor = completions.count
    match loss.aggregation:
        case "token-mean":
            count = weights.sum()
        case "seq-mean-token-mean":
            per_completion = completions.sum(weights)
            count = (per_completion != 0).sum()
            weights = _divide(weights, completions.spread(per_completion))
        case "seq-mean-token-sum-norm":
            assert loss.max_completion_length is not None
            weights = weights / loss.max_completion_length
    return _divide(weights, count if normalizer is None else normalizer)


def _divide(weights: Tensor, by: float | Tensor) -> Tensor:
    # Only tokens without weight can meet a denominator of 0; 0 / 0 is 0 there, not NaN.
    return torch.where(weights == 0, 0.0, weights / by)


def _metrics(rows: _Rows, terms: _Terms, entropy: Tensor | None) -> dict[str, Tensor]:
    """Means over the unmasked tokens, as 0-dim tensors; see `LossOutput`."""
    mask, zero = rows.mask, rows.logprobs.new_zeros(())
    count = mask.sum()

    def mean(values: Tensor | None, default: float = 0.0) -> Tensor:
        if values is None:
            return zero + default
        total = torch.where(mask, values.to(zero.dtype), 0.0).sum()
        return torch.where(count > 0, total / count, default)

    gap = None if rows.rollout is None else rows.rollout - rows.sampled()
    largest = torch.where(mask, terms.ratio, 0.0).amax() if mask.numel() else zero
    finite = terms.value.isfinite() & rows.logprobs.isfinite()
    values = {
        "kl": mean(terms.kl),
        "entropy": mean(entropy),
        "clip_fraction": mean(terms.low | terms.high),
        "clip_fraction_low": mean(terms.low),
        "clip_fraction_high": mean(terms.high),
        "dual_clip_fraction": mean(terms.dual),
        "ratio_mean": mean(terms.ratio, default=1.0),
        "ratio_max": torch.where(count > 0, largest, 1.0),
        "rollout_kl": mean(gap),
        "correction_mean": mean(terms.correction, default=1.0),
        "tokens": count,
        "invalid_rows": (mask & ~finite).sum(),
    }
    return {name: values[name] for name in METRICS}
