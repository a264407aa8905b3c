"""`reference.policy_loss`: the formulas of `PolicyLoss` as one would write them down, all at once,
with gradients by autograd. Shares no formula with `coefficient.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .advantage import GroupedRewards
from .arguments import loss_inputs
from .inputs import compute_dtype
from .objective import PolicyLoss
from .outputs import METRICS, LossOutput
from .reference_advantage import group_advantages

LOG_RATIO_BOUND = 20.0
_VESPO_LOG_FLOOR = math.log(1e-8)
_DPPO_EPS = 1e-8


class Completions(NamedTuple):
    """`index [N]`: the completion of each token; `count`: B; `valid []` bool."""

    index: Tensor
    count: int
    valid: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, n_tokens: int) -> Completions:
        lengths = cu_seqlens.to(torch.int64).diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == n_tokens) & (lengths >= 0).all()
        return cls(numbers.repeat_interleave(lengths), len(lengths), valid)

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


class Rows(NamedTuple):
    """What the loss reads per token, each [N]. Where `mask` is False every entry is 0, so that
    padding of any content, NaN included, gives log-ratios of 0 before `exp`."""

    mask: Tensor
    logprobs: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    entropy: Tensor | None

    def log_ratio(self) -> Tensor:
        old = self.logprobs.detach() if self.old is None else self.old
        return self.logprobs - old


class Terms(NamedTuple):
    """`value [N]` is what is aggregated, differentiable; the rest is for the metrics."""

    value: Tensor
    ratio: Tensor
    kl: Tensor | None
    correction: Tensor | None
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor


class _Surrogate(NamedTuple):
    term: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


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
    """As `perl_kernels.policy_loss`; differentiable any number of times."""
    inputs = loss_inputs(
        logprobs,
        advantages,
        cu_seqlens,
        loss,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        weights=weights,
        normalizer=normalizer,
        has_entropy=entropy is not None,
    )
    n_tokens, dtype = logprobs.shape[0], compute_dtype(logprobs)
    segments = Completions.of(inputs.cu_seqlens.to(logprobs.device), n_tokens)
    spread = inputs.advantages
    if inputs.rewards is not None:
        grouped, sizes, weighting, grouping = inputs.rewards
        options = {**grouping._asdict(), "reward_weights": weighting}
        spread = group_advantages(grouped, sizes, **options).advantages
    assert spread is not None
    if spread.shape[0] == segments.count:
        spread = segments.spread(spread)
    factors = logprobs.new_ones(n_tokens) if inputs.weights is None else inputs.weights
    factors = factors.to(dtype)
    mask, valid = factors != 0, segments.valid
    if isinstance(normalizer, Tensor):
        valid = valid & (normalizer > 0) & normalizer.isfinite()

    def masked(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.where(mask, tensor.to(dtype), 0.0)

    # The advantage is a factor of every policy term, so that the row and the loss become NaN.
    usable = (factors >= 0) & factors.isfinite()
    rows = Rows(
        mask,
        masked(logprobs),  # type: ignore[arg-type]
        masked(torch.where(usable, spread, torch.nan)),  # type: ignore[arg-type]
        masked(inputs.old),
        masked(inputs.ref),
        masked(inputs.rollout),
        masked(entropy),
    )
    terms = token_terms(loss, rows, segments)
    scale = _row_scale(loss, factors, segments, normalizer, valid)
    value = _aggregate(scale, mask, terms.value, valid)
    seen = torch.full_like(logprobs, torch.nan) if entropy is None else entropy
    metrics = _loss_metrics(rows, terms, valid)
    return LossOutput(value, logprobs.detach().to(dtype), seen.detach().to(dtype), metrics)


def token_terms(loss: PolicyLoss, rows: Rows, segments: Completions) -> Terms:
    """Loss term of every token: surrogate * correction + kl_coef * KL - entropy_coef * entropy."""
    ratio = importance_ratio(loss, rows, segments)
    correction = correction_weight(loss, rows, segments)
    surrogate = _policy_term(loss, rows, segments, ratio, correction)
    value = surrogate.term
    # vespo has taken the correction into the weight of the sequence.
    if correction is not None and loss.surrogate != "vespo":
        value = value * correction
    kl = None
    if rows.ref is not None:
        kl = kl_estimate(loss.kl or "k3", rows.logprobs, rows.ref)
        if loss.has_kl:
            weighted = kl * ratio if loss.kl_bias_correction else kl
            value = value + loss.kl_coef * weighted
    if loss.entropy_coef != 0 and rows.entropy is not None:
        value = value - loss.entropy_coef * rows.entropy
    flags = (surrogate.low, surrogate.high, surrogate.dual)
    return Terms(value, ratio, kl, correction, *(rows.mask & flag for flag in flags))


def importance_ratio(loss: PolicyLoss, rows: Rows, segments: Completions) -> Tensor:
    """pi / pi_old of each token at the level `loss.ratio` says, [N]."""
    log_ratio = rows.log_ratio()
    if loss.ratio == "token":
        return _exp(log_ratio)
    mean = segments.mean(log_ratio, rows.mask)
    if loss.ratio == "sequence":
        return _exp(mean)
    return _exp(rows.logprobs - rows.logprobs.detach() + mean.detach())


def correction_weight(loss: PolicyLoss, rows: Rows, segments: Completions) -> Tensor | None:
    """Importance weight of trainer against rollout engine, [N], without gradient."""
    if loss.correction is None or rows.rollout is None:
        return None
    old = rows.logprobs.detach() if rows.old is None else rows.old
    log_weight = old - rows.rollout
    if loss.correction.startswith("sequence"):
        log_weight = segments.spread(segments.sum(log_weight))
    weight = _exp(log_weight)
    if loss.correction.endswith("truncate"):
        return weight.clamp(loss.correction_low, loss.correction_high)
    # Written so that a NaN weight is not outside: it stays NaN rather than becoming 0.
    outside = (weight < loss.correction_low) | (weight > loss.correction_high)
    return weight.masked_fill(outside, 0.0)


def kl_estimate(kind: str, logprobs: Tensor, ref: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), [N]; `kind` is a value of `PolicyLoss.kl`."""
    if kind.endswith("+"):
        gradient = kl_estimate("k2", logprobs, ref)
        return gradient + (kl_estimate(kind[:-1], logprobs, ref) - gradient).detach()
    difference = ref - logprobs
    if kind == "k1":
        return -difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    difference = _bounded(difference)
    return difference.expm1() - difference


def _policy_term(
    loss: PolicyLoss, rows: Rows, segments: Completions, ratio: Tensor, correction: Tensor | None
) -> _Surrogate:
    never = torch.zeros_like(rows.mask)
    advantages, logprobs = rows.advantages, rows.logprobs
    match loss.surrogate:
        case "clip":
            return _clip(loss, ratio, advantages)
        case "cispo":
            clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high).detach()
            return _Surrogate(
                -clipped * advantages * logprobs, *_clip_flags(loss, ratio, advantages), never
            )
        case "sapo":
            tau = _by_sign(advantages > 0, loss.sapo_tau_pos, loss.sapo_tau_neg, ratio)
            gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
            return _Surrogate(-gate * advantages, never, never, never)
        case "vespo":
            phi = _vespo_weight(loss, rows, segments, correction)
            return _Surrogate(-phi * advantages * logprobs, never, never, never)
        case "gmpo":
            return _gmpo(loss, rows, segments)
        case "dppo_tv" | "dppo_kl":
            low, high = _dppo_rejects(loss, rows)
            kept = ratio.detach().clamp(max=loss.dppo_ratio_cap).masked_fill(low | high, 0.0)
            return _Surrogate(-advantages * kept * logprobs, low, high, never)
        case "reinforce":
            return _Surrogate(-advantages * logprobs, never, never, never)


def _clip_flags(loss: PolicyLoss, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    low = (ratio < 1 - loss.clip_low) & (advantages < 0)
    high = (ratio > 1 + loss.clip_high) & (advantages > 0)
    return low, high


def _clip(loss: PolicyLoss, ratio: Tensor, advantages: Tensor) -> _Surrogate:
    clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
    unclipped = ratio if loss.delta is None else ratio.clamp(max=loss.delta)
    term = -torch.minimum(unclipped * advantages, clipped * advantages)
    dual = torch.zeros_like(advantages, dtype=torch.bool)
    if loss.dual_clip is not None:
        ceiling = -advantages * loss.dual_clip
        dual = (advantages < 0) & (term > ceiling)
        term = torch.where(dual, ceiling, term)
    return _Surrogate(term, *_clip_flags(loss, ratio, advantages), dual)


def _vespo_weight(
    loss: PolicyLoss, rows: Rows, segments: Completions, correction: Tensor | None
) -> Tensor:
    log_weight = segments.sum(_bounded(rows.log_ratio().detach()))
    log_weight = segments.spread(log_weight)
    if correction is not None and loss.correction is not None:
        log_correction = correction.log().clamp(_VESPO_LOG_FLOOR, LOG_RATIO_BOUND)
        log_correction = torch.where(rows.mask, log_correction, 0.0)
        if loss.correction.startswith("token"):
            log_correction = segments.spread(segments.sum(log_correction))
        log_weight = log_weight + log_correction
    log_weight = log_weight.clamp(_VESPO_LOG_FLOOR, LOG_RATIO_BOUND)
    gain = rows.advantages >= 0
    k = _by_sign(gain, loss.vespo_k_pos, loss.vespo_k_neg, log_weight)
    rate = _by_sign(gain, loss.vespo_lambda_pos, loss.vespo_lambda_neg, log_weight)
    return torch.exp(rate + k * log_weight - rate * log_weight.exp())


def _gmpo(loss: PolicyLoss, rows: Rows, segments: Completions) -> _Surrogate:
    log_ratio = rows.log_ratio()
    gain = rows.advantages >= 0
    high = gain & (log_ratio > loss.clip_high)
    low = ~gain & (log_ratio < -loss.clip_low)
    pessimistic = torch.where(
        gain, log_ratio.clamp(max=loss.clip_high), log_ratio.clamp(min=-loss.clip_low)
    )
    ratio = _exp(segments.mean(pessimistic, rows.mask))
    advantage = segments.mean(rows.advantages, rows.mask)
    return _Surrogate(-advantage * ratio, low, high, torch.zeros_like(rows.mask))


def _dppo_rejects(loss: PolicyLoss, rows: Rows) -> tuple[Tensor, Tensor]:
    """Tokens whose update would leave the trust region: downwards (A <= 0) and upwards (A > 0)."""
    new_log = rows.logprobs.detach()
    old_log = new_log if rows.old is None else rows.old
    new, old = new_log.exp(), old_log.exp()
    if loss.surrogate == "dppo_tv":
        too_high, too_low = new - old > loss.clip_high, new - old < -loss.clip_low
    else:
        # An engine may round a log-prob to a little more than 0.
        rest = [(1 - p).clamp(min=0) + _DPPO_EPS for p in (old, new)]
        complement = (rest[0] / rest[1]).log()
        divergence = old * (old_log - new_log) + (1 - old) * complement
        too_high = (divergence > loss.clip_high) & (new > old)
        too_low = (divergence > loss.clip_low) & (new < old)
    gain = rows.advantages > 0
    return too_low & ~gain, too_high & gain


def _by_sign(gain: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    # where() of two Python numbers would round them to fp32.
    return torch.where(gain, torch.full_like(like, positive), negative)


def _bounded(log_ratio: Tensor) -> Tensor:
    # An infinity is a broken input, not a large ratio: bounding it would hide it.
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.where(log_ratio.isinf(), torch.nan, bounded)


def _exp(log_ratio: Tensor) -> Tensor:
    return _bounded(log_ratio).exp()


def _row_scale(
    loss: PolicyLoss,
    weights: Tensor,
    segments: Completions,
    normalizer: float | Tensor | None,
    valid: Tensor,
) -> Tensor:
    """Factor of each token's term, [N], such that the loss is sum(scale * term).

    `normalizer` replaces the count in the denominator: sum(weights) for `token-mean`, otherwise
    the number of sequences. All NaN where `valid []` is False.
    """
    match loss.aggregation:
        case "token-mean":
            count = weights.sum()
        case "seq-mean-token-mean":
            per_sequence = segments.sum(weights)
            count = (per_sequence != 0).sum()
            weights = _divide(weights, segments.spread(per_sequence))
        case "seq-mean-token-sum":
            count = segments.count
        case "seq-mean-token-sum-norm":
            count = segments.count
            assert loss.max_completion_length is not None
            weights = weights / loss.max_completion_length
    scale = _divide(weights, count if normalizer is None else normalizer)
    return torch.where(valid, scale, torch.nan)


def _divide(weights: Tensor, by: float | Tensor) -> Tensor:
    # Only tokens without weight can meet a denominator of 0; 0 / 0 is 0 there, not NaN. A number
    # stays one: made a tensor on the GPU, it would be copied there, and the copy waited for.
    return torch.where(weights == 0, 0.0, weights / by)


def _aggregate(scale: Tensor, mask: Tensor, terms: Tensor, valid: Tensor) -> Tensor:
    """The loss, []; NaN if anything in it is not finite, or `valid []` is False."""
    loss = (scale * torch.where(mask, terms, 0.0)).sum()
    # Added rather than selected, so that the gradients are not silenced.
    return loss + torch.where(valid & loss.isfinite(), 0.0, torch.nan)


@torch.no_grad()
def _loss_metrics(rows: Rows, terms: Terms, valid: Tensor) -> dict[str, Tensor]:
    """Means over the unmasked tokens, as 0-dim tensors; see `LossOutput`. Where `valid []` is
    False, all rows are invalid ones, and at least one is counted."""
    mask, zero = rows.mask, rows.logprobs.new_zeros(())
    count = mask.sum()

    def mean(values: Tensor | None, default: float = 0.0) -> Tensor:
        if values is None:
            return zero + default
        total = torch.where(mask, values.to(zero.dtype), 0.0).sum()
        return torch.where(count > 0, total / count, default)

    rollout_gap = None
    if rows.rollout is not None:
        rollout_gap = rows.rollout - (rows.logprobs if rows.old is None else rows.old)
    ratio_max = torch.where(mask, terms.ratio, 0.0).amax() if mask.numel() else zero
    finite = terms.value.isfinite() & rows.logprobs.isfinite()
    values = {
        "kl": mean(terms.kl),
        "entropy": mean(rows.entropy),
        "clip_fraction": mean(terms.clipped_low | terms.clipped_high),
        "clip_fraction_low": mean(terms.clipped_low),
        "clip_fraction_high": mean(terms.clipped_high),
        "dual_clip_fraction": mean(terms.dual_clipped),
        "ratio_mean": mean(terms.ratio, default=1.0),
        "ratio_max": torch.where(count > 0, ratio_max, 1.0),
        "rollout_kl": mean(rollout_gap),
        "correction_mean": mean(terms.correction, default=1.0),
        "tokens": count,
        "invalid_rows": torch.where(valid, (mask & ~finite).sum(), max(mask.numel(), 1)),
    }
    return {name: values[name] for name in METRICS}
