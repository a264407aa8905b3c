"""Losses of packed log-probs in PyTorch: what `coefficient.py` leaves open are the sums over
completions and the aggregation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..axes import axes, numbers
from ..coefficient import (
    LOG_RATIO_BOUND,
    bounded,
    correction_weight,
    pessimistic,
    token_term,
    vespo_log,
    vespo_weight,
)
from ..inputs import Coefficients, Evaluated, LossInputs, Prepared, compute_dtype
from ..objective import PolicyLoss
from ..onepass import Fold
from .advantage import group_advantages
from .segments import Segments


class _Tokens:
    """The inputs, each [N] in `dtype`, 0 where `mask` is False; see `evaluate`."""

    def __init__(self, loss: PolicyLoss, inputs: LossInputs, n_tokens: int, dtype: torch.dtype):
        self.segments = Segments.from_cu_seqlens(inputs.cu_seqlens, n_tokens)
        self.dtype = dtype
        weights = inputs.weights
        if weights is None:
            weights = torch.ones(n_tokens, dtype=dtype, device=inputs.cu_seqlens.device)
        self.weights = weights.to(dtype)
        self.mask = self.weights != 0
        advantages = inputs.advantages
        if advantages is None:
            assert inputs.rewards is not None
            advantages = group_advantages(inputs.rewards).advantages
        if not inputs.per_token:
            advantages = self.segments.spread(advantages)
        # The advantage is a factor of every policy term, so that the row and the loss become NaN.
        usable = (self.weights >= 0) & self.weights.isfinite()
        self.advantages = torch.where(usable, self.masked(advantages), torch.nan)
        self.old = self.optional(inputs.old)
        self.ref = self.optional(inputs.ref)
        self.rollout = self.optional(inputs.rollout)
        self.scale, self.denominator, self.valid = self._aggregation(loss, inputs)

    def masked(self, tensor: Tensor) -> Tensor:
        return torch.where(self.mask, tensor.to(self.dtype), 0.0)

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.masked(tensor)

    def mean(self, tokens: Tensor) -> Tensor:
        return self.segments.mean(tokens, self.mask)

    def _aggregation(self, loss: PolicyLoss, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Factor of each token's term, what the sum is divided by (NaN where that cannot be told),
        and whether `cu_seqlens` and `normalizer` can be used."""
        scale = self.weights
        match loss.aggregation:
            case "token-mean":
                count = self.weights.sum()
            case "seq-mean-token-mean":
                per_sequence = self.segments.sum(self.weights)
                count = (per_sequence != 0).sum().to(self.dtype)
                shares = self.weights / self.segments.spread(per_sequence)
                # Only tokens without weight can meet a sum of 0; 0 / 0 is 0 there, not NaN.
                scale = torch.where(self.weights == 0, 0.0, shares)
            case _:
                count = self.weights.new_zeros(()) + self.segments.count
        valid = self.segments.valid
        if inputs.count is not None or inputs.normalizer is not None:
            given = inputs.count if inputs.normalizer is None else inputs.normalizer
            assert given is not None
            count = torch.zeros_like(count) + given
            valid = valid & (count > 0) & count.isfinite()
        if loss.aggregation == "seq-mean-token-sum-norm":
            assert loss.max_completion_length is not None
            count = count * loss.max_completion_length
        return scale, torch.where(valid, count, torch.nan), valid

    def correction(self, loss: PolicyLoss, old: Tensor) -> Tensor | None:
        """Importance weight of trainer against rollout engine, [N]."""
        if loss.correction is None or self.rollout is None:
            return None
        log_weight = old - self.rollout
        if loss.correction.startswith("sequence"):
            log_weight = self.segments.spread(self.segments.sum(log_weight))
        return correction_weight(
            loss.correction, log_weight, loss.correction_low, loss.correction_high
        )


def prepare(
    loss: PolicyLoss, inputs: LossInputs, fold: Fold, n_tokens: int, dtype: torch.dtype
) -> Prepared:
    """What a row needs that does not follow from the row alone; see `Prepared`."""
    tokens = _Tokens(loss, inputs, n_tokens, dtype)
    advantages, weights = tokens.advantages, tokens.weights
    if fold == "correction":
        assert tokens.old is not None
        correction = tokens.correction(loss, tokens.old)
        assert correction is not None
        advantages = advantages * correction
    elif fold == "shared":
        advantages = tokens.mean(torch.where(tokens.mask, weights * advantages, 0.0)) / weights
    elif fold == "shared_gmpo":
        advantages = tokens.mean(advantages) * tokens.mean(weights) / weights
    return Prepared(torch.where(tokens.mask, advantages, 0.0), tokens.scale)


def row_coefficients(
    loss: PolicyLoss, logprobs: Tensor, prepared: Prepared, inputs: LossInputs
) -> Coefficients:
    """Derivatives of the loss by the log-probs [n] and entropies of some rows of a token-level
    loss; the per-token tensors of `prepared` and `inputs` are those of the same rows."""
    mask, dtype = prepared.scale != 0, logprobs.dtype

    def masked(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.where(mask, tensor.to(dtype), 0.0)

    logprobs = torch.where(mask, logprobs, 0.0)
    old = logprobs if inputs.old is None else masked(inputs.old)
    assert old is not None
    correction: Tensor | float = 1.0
    if loss.correction is not None:
        rollout = masked(inputs.rollout)
        assert rollout is not None
        correction = correction_weight(
            loss.correction, old - rollout, loss.correction_low, loss.correction_high
        )
    _, by_ratio, kl_by_ratio, by_logprob, *_ = token_term(
        **axes(loss, inputs.ref is not None),
        log_ratio=logprobs - old,
        logprob=logprobs,
        old=old,
        ref=masked(inputs.ref),
        advantage=prepared.advantages,
        correction=correction,
        sequence=1.0,
        **numbers(loss),
    )
    by_logprob = prepared.scale * (by_ratio + kl_by_ratio + by_logprob)
    return _coefficients(loss, mask, prepared.scale, by_logprob)


def _coefficients(
    loss: PolicyLoss, mask: Tensor, scale: Tensor, by_logprob: Tensor
) -> Coefficients:
    by_entropy = None
    if loss.entropy_coef != 0:
        by_entropy = torch.where(mask, -loss.entropy_coef * scale, 0.0)
    return Coefficients(torch.where(mask, by_logprob, 0.0), by_entropy)


def evaluate(
    loss: PolicyLoss, inputs: LossInputs, logprobs: Tensor, entropy: Tensor | None
) -> Evaluated:
    """The loss of all tokens, its metrics, and its derivatives by log-probs and entropies."""
    tokens = _Tokens(loss, inputs, logprobs.shape[0], compute_dtype(logprobs))
    mask, advantages = tokens.mask, tokens.advantages
    logprobs = tokens.masked(logprobs)
    entropy = tokens.optional(entropy)
    old = logprobs if tokens.old is None else tokens.old
    log_ratio = logprobs - old
    correction = tokens.correction(loss, old)

    shared = None  # the log-ratio that a completion's tokens have in common
    sequence: Tensor | float = 1.0
    low = high = torch.zeros_like(mask)
    if loss.surrogate == "vespo":
        sequence = _vespo(loss, tokens, log_ratio, correction)
    elif loss.surrogate == "gmpo":
        clipped, low, high = pessimistic(log_ratio, advantages, loss.clip_low, loss.clip_high)
        shared = tokens.mean(clipped)
        sequence = bounded(shared).exp()
        advantages = tokens.mean(advantages)
    elif loss.ratio != "token":
        shared = log_ratio = tokens.mean(log_ratio)

    term, by_ratio, kl_by_ratio, by_logprob, ratio, kl, *clipped_by = token_term(
        **axes(loss, tokens.ref is not None),
        log_ratio=log_ratio,
        logprob=logprobs,
        old=old,
        ref=tokens.ref,
        advantage=advantages,
        correction=1.0 if correction is None else correction,
        sequence=sequence,
        **numbers(loss),
    )
    if loss.surrogate == "gmpo":
        inside = mask & ~(shared.abs() > LOG_RATIO_BOUND)  # type: ignore[union-attr]
        moved = torch.where(inside, tokens.scale * by_ratio, 0.0)
        direct = tokens.scale * (kl_by_ratio + by_logprob)
        by_logprob = direct + torch.where(low | high, 0.0, tokens.mean(moved))
        clipped_by[:2] = low, high
    elif loss.ratio == "sequence":
        moved = torch.where(mask, tokens.scale * (by_ratio + kl_by_ratio), 0.0)
        by_logprob = tokens.scale * by_logprob + tokens.mean(moved)
    else:
        by_logprob = tokens.scale * (by_ratio + kl_by_ratio + by_logprob)
    if entropy is not None and loss.entropy_coef != 0:
        term = term - loss.entropy_coef * entropy

    total = torch.where(mask, tokens.scale * term, 0.0).sum()
    empty = tokens.denominator == 0
    value = torch.where(empty, 0.0, total / tokens.denominator)
    measured = {
        "kl": None if tokens.ref is None else kl,
        "entropy": entropy,
        "clip_fraction": clipped_by[0] | clipped_by[1],
        "clip_fraction_low": clipped_by[0],
        "clip_fraction_high": clipped_by[1],
        "dual_clip_fraction": clipped_by[2],
        "ratio_mean": ratio,
        "rollout_kl": None if tokens.rollout is None else tokens.rollout - old,
        "correction_mean": correction,
    }
    finite = term.isfinite() & logprobs.isfinite()
    invalid = torch.where(tokens.valid, (mask & ~finite).sum(), max(mask.numel(), 1))
    return Evaluated(
        torch.where(value.isfinite(), value, torch.nan),
        _metrics(measured, mask, ratio, invalid),
        _coefficients(loss, mask, tokens.scale, by_logprob),
        torch.where(empty, 0.0, 1.0 / tokens.denominator),
    )


def _vespo(
    loss: PolicyLoss, tokens: _Tokens, log_ratio: Tensor, correction: Tensor | None
) -> Tensor:
    segments = tokens.segments
    log_weight = segments.spread(segments.sum(bounded(log_ratio)))
    if correction is not None and loss.correction is not None:
        log_correction = vespo_log(correction.log())
        if loss.correction.startswith("token"):
            log_correction = torch.where(tokens.mask, log_correction, 0.0)
            log_correction = segments.spread(segments.sum(log_correction))
        log_weight = log_weight + log_correction
    return vespo_weight(
        tokens.advantages,
        vespo_log(log_weight),
        loss.vespo_k_pos,
        loss.vespo_lambda_pos,
        loss.vespo_k_neg,
        loss.vespo_lambda_neg,
    )


def _metrics(
    measured: dict[str, Tensor | None], mask: Tensor, ratio: Tensor, invalid: Tensor
) -> Tensor:
    """The metrics in the order of `outputs.METRICS`, [12]."""
    count = mask.sum()

    def mean(name: str, default: float = 0.0) -> Tensor:
        values = measured[name]
        if values is None:
            return torch.full((), default, dtype=ratio.dtype, device=ratio.device)
        total = torch.where(mask, values.to(ratio.dtype), 0.0).sum()
        return torch.where(count > 0, total / count, default)

    largest = torch.where(mask, ratio, 0.0).amax() if mask.numel() else ratio.new_zeros(())
    return torch.stack(
        [
            mean("kl"),
            mean("entropy"),
            mean("clip_fraction"),
            mean("clip_fraction_low"),
            mean("clip_fraction_high"),
            mean("dual_clip_fraction"),
            mean("ratio_mean", 1.0),
            torch.where(count > 0, largest, 1.0),
            mean("rollout_kl"),
            mean("correction_mean", 1.0),
            count.to(ratio.dtype),
            invalid.to(ratio.dtype),
        ]
    )
