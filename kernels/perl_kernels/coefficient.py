"""The mathematics of the losses, once: the term of a token and its derivatives.

A loss is sum_t scale_t * term_t. Given the log-prob of a token, `token_term` returns the term and
its derivatives, which are the row coefficients that all gradients follow from. Formulas and their
sources: `PolicyLoss`.

Every function here has several lives. As it stands it works on PyTorch tensors of any floating
dtype. `coefficient_triton.py` compiles the same source for Triton, with `tl` being
`triton.language`, and the build of the native backend translates it to C++. So nothing may be used
that only one of them has: arithmetic, comparisons, `&`, `|`, `~`, `if` on the fields of `axes`,
`tl.where` with at least one tensor, and the named tuples below. Comparisons are written such that
NaN stays NaN.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

tl = SimpleNamespace(
    abs=torch.abs, exp=torch.exp, log=torch.log, sigmoid=torch.sigmoid, where=torch.where
)

LOG_RATIO_BOUND = 20.0
LOG_WEIGHT_FLOOR = -18.420680743952367  # log 1e-8, TRL's bound for vespo
DPPO_EPS = 1e-8


class Axes(NamedTuple):
    """What is known of a `PolicyLoss` when compiling; see there. "" is None. `has_ref`: whether
    there is a reference log-prob; `has_kl`: whether its KL term reaches the loss."""

    surrogate: str
    ratio: str
    kl: str
    correction: str
    aggregation: str
    dual_clip: bool
    delta: bool
    has_kl: bool
    has_ref: bool
    has_entropy: bool
    kl_bias_correction: bool


class Numbers(NamedTuple):
    """The numbers of a `PolicyLoss` that a term depends on, 0 for None."""

    clip_low: float
    clip_high: float
    dual_clip: float
    delta: float
    tau_pos: float
    tau_neg: float
    ratio_cap: float
    kl_coef: float
    entropy_coef: float
    correction_low: float
    correction_high: float
    k_pos: float
    lambda_pos: float
    k_neg: float
    lambda_neg: float


class Token(NamedTuple):
    """What a term depends on. `log_ratio`: policy against old policy, at the level of
    `PolicyLoss.ratio`. `logprob, old, ref`: of the token; `old` is `logprob` if there is none.
    `correction`: importance weight of trainer against rollout engine; 1 if there is none.
    `sequence`: what the tokens of a completion share: the weight in vespo, the ratio in gmpo (whose
    `advantage` is shared as well)."""

    log_ratio: Any
    logprob: Any
    old: Any
    ref: Any
    advantage: Any
    correction: Any
    sequence: Any


class Surrogate(NamedTuple):
    """Value, derivative by the log-ratio, derivative by the log-prob directly, and whether the
    token is clipped below, above, or by the dual clip."""

    value: Any
    by_ratio: Any
    by_logprob: Any
    low: Any
    high: Any
    dual: Any


class Term(NamedTuple):
    """Value; derivatives of surrogate and of KL term by the log-ratio; derivative by the log-prob
    directly; ratio; KL estimate; clipped below, above, by the dual clip."""

    value: Any
    by_ratio: Any
    kl_by_ratio: Any
    by_logprob: Any
    ratio: Any
    kl: Any
    low: Any
    high: Any
    dual: Any


def at_most(x, bound):
    """min(x, bound), NaN where `x` is."""
    return tl.where(x > bound, bound, x)


def at_least(x, bound):
    """max(x, bound), NaN where `x` is."""
    return tl.where(x < bound, bound, x)


def bounded(log_ratio):
    """`log_ratio` in +-20. An infinity is a broken input, not a large ratio: it becomes NaN."""
    inside = at_most(at_least(log_ratio, -LOG_RATIO_BOUND), LOG_RATIO_BOUND)
    return tl.where(tl.abs(log_ratio) == float("inf"), float("nan"), inside)


def ratio_and_slope(log_ratio):
    """exp of the bounded log-ratio, and its derivative."""
    ratio = tl.exp(bounded(log_ratio))
    return ratio, tl.where(tl.abs(log_ratio) > LOG_RATIO_BOUND, ratio * 0.0, ratio)


def exp_tail(x):
    """exp(x) - 1 - x, without cancellation for small `x`."""
    series = 1.0 + x * (1.0 / 13.0)
    series = 1.0 + x * (1.0 / 12.0) * series
    series = 1.0 + x * (1.0 / 11.0) * series
    series = 1.0 + x * (1.0 / 10.0) * series
    series = 1.0 + x * (1.0 / 9.0) * series
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


def kl_and_slope(axes, logprob, ref):
    """Estimate of KL(policy || reference) from one token, and its derivative by `logprob`.

    `axes.kl` is the estimator; the empty string is reported as k3.
    """
    difference = ref - logprob
    if axes.kl == "k1" or axes.kl == "k1+":
        value = -difference
        slope = difference * 0.0 + 1.0
    elif axes.kl == "abs":
        value = tl.abs(difference)
        slope = tl.where(
            difference > 0, difference * 0.0 - 1.0, tl.where(difference < 0, 1.0, difference)
        )
    elif axes.kl == "k2":
        value = 0.5 * difference * difference
        slope = -difference
    else:
        difference_in = bounded(difference)
        value = exp_tail(difference_in)
        slope = tl.where(
            tl.abs(difference) > LOG_RATIO_BOUND, value * 0.0, -(value + difference_in)
        )
    if axes.kl == "k1+" or axes.kl == "k3+":
        slope = -difference
    return value, slope


def correction_weight(axes, numbers, log_weight):
    """Importance weight of trainer against rollout engine, from its logarithm."""
    weight = tl.exp(bounded(log_weight))
    if axes.correction == "token_truncate" or axes.correction == "sequence_truncate":
        weight = at_most(at_least(weight, numbers.correction_low), numbers.correction_high)
    else:
        outside = (weight < numbers.correction_low) | (weight > numbers.correction_high)
        weight = tl.where(outside, 0.0, weight)
    return weight


def vespo_log(x):
    """Logarithm of a weight in the bounds of vespo."""
    return at_most(at_least(x, LOG_WEIGHT_FLOOR), LOG_RATIO_BOUND)


def vespo_weight(numbers, advantage, log_weight):
    """exp(lam + k log w - lam w), with k and lam by the sign of the advantage."""
    weight = tl.exp(log_weight)
    positive = tl.exp(numbers.lambda_pos + numbers.k_pos * log_weight - numbers.lambda_pos * weight)
    negative = tl.exp(numbers.lambda_neg + numbers.k_neg * log_weight - numbers.lambda_neg * weight)
    return tl.where(advantage >= 0, positive, negative)


def pessimistic(numbers, log_ratio, advantage):
    """gmpo's log-ratio, clipped where the advantage would gain by it: value, low, high."""
    high = (advantage >= 0) & (log_ratio > numbers.clip_high)
    low = (advantage < 0) & (log_ratio < -numbers.clip_low)
    return tl.where(high, numbers.clip_high, tl.where(low, -numbers.clip_low, log_ratio)), low, high


def leaves_trust_region(axes, numbers, logprob, old):
    """Whether the probability has fallen, or risen, further than dppo allows."""
    new_p = tl.exp(logprob)
    old_p = tl.exp(old)
    if axes.surrogate == "dppo_tv":
        too_low = new_p - old_p < -numbers.clip_low
        too_high = new_p - old_p > numbers.clip_high
    else:
        # An engine may round a log-prob to a little more than 0.
        old_rest = at_least(1.0 - old_p, 0.0) + DPPO_EPS
        complement = tl.log(old_rest / (at_least(1.0 - new_p, 0.0) + DPPO_EPS))
        divergence = old_p * (old - logprob) + (1.0 - old_p) * complement
        too_low = (divergence > numbers.clip_low) & (new_p < old_p)
        too_high = (divergence > numbers.clip_high) & (new_p > old_p)
    return too_low, too_high


def policy_term(axes, numbers, token, ratio, slope):
    """The surrogate; `slope` is the derivative of `ratio` by the log-ratio."""
    advantage = token.advantage
    never = ratio < 0
    low = never
    high = never
    dual = never
    by_ratio = ratio * 0.0
    by_logprob = ratio * 0.0
    clipped = ratio
    if axes.surrogate == "clip" or axes.surrogate == "cispo":
        clipped = at_most(at_least(ratio, 1.0 - numbers.clip_low), 1.0 + numbers.clip_high)
        low = (ratio < 1.0 - numbers.clip_low) & (advantage < 0)
        high = (ratio > 1.0 + numbers.clip_high) & (advantage > 0)
    if axes.surrogate == "clip":
        unclipped = ratio
        if axes.delta:
            unclipped = at_most(ratio, numbers.delta)
            slope = tl.where(ratio > numbers.delta, 0.0, slope)
        flat = unclipped * advantage > clipped * advantage
        term = -tl.where(flat, clipped * advantage, unclipped * advantage)
        if axes.dual_clip:
            ceiling = -advantage * numbers.dual_clip
            dual = (advantage < 0) & (term > ceiling)
            term = tl.where(dual, ceiling, term)
        by_ratio = tl.where(flat | dual, 0.0, -advantage * slope)
    elif axes.surrogate == "cispo":
        by_logprob = -clipped * advantage
        term = by_logprob * token.logprob
    elif axes.surrogate == "sapo":
        tau_pos = numbers.tau_pos
        tau_neg = numbers.tau_neg
        gate_pos = tl.sigmoid(tau_pos * (ratio - 1.0))
        gate_neg = tl.sigmoid(tau_neg * (ratio - 1.0))
        gate = tl.where(advantage > 0, gate_pos, gate_neg)
        over = tl.where(advantage > 0, gate_pos * (4.0 / tau_pos), gate_neg * (4.0 / tau_neg))
        term = -over * advantage
        by_ratio = -4.0 * gate * (1.0 - gate) * advantage * slope
    elif axes.surrogate == "vespo":
        by_logprob = -token.sequence * advantage
        term = by_logprob * token.logprob
    elif axes.surrogate == "gmpo":
        term = -token.sequence * advantage
        by_ratio = term
    elif axes.surrogate == "dppo_tv" or axes.surrogate == "dppo_kl":
        too_low, too_high = leaves_trust_region(axes, numbers, token.logprob, token.old)
        low = too_low & ~(advantage > 0)
        high = too_high & (advantage > 0)
        kept = tl.where(low | high, 0.0, at_most(ratio, numbers.ratio_cap))
        by_logprob = -advantage * kept
        term = by_logprob * token.logprob
    else:
        by_logprob = -advantage
        term = by_logprob * token.logprob
    return Surrogate(term, by_ratio, by_logprob, low, high, dual)


def token_term(axes, numbers, token):
    """Surrogate * correction + kl_coef * KL, of one token."""
    ratio, slope = ratio_and_slope(token.log_ratio)
    found = policy_term(axes, numbers, token, ratio, slope)
    term = found.value
    by_ratio = found.by_ratio
    by_logprob = found.by_logprob
    # vespo has taken the correction into the weight of the sequence.
    if axes.surrogate != "vespo":
        term = term * token.correction
        by_ratio = by_ratio * token.correction
        by_logprob = by_logprob * token.correction
    kl = ratio * 0.0
    kl_by_ratio = ratio * 0.0
    if axes.has_ref:
        kl, kl_slope = kl_and_slope(axes, token.logprob, token.ref)
        if axes.has_kl:
            if axes.kl_bias_correction:
                term = term + numbers.kl_coef * kl * ratio
                kl_by_ratio = numbers.kl_coef * kl * slope
                by_logprob = by_logprob + numbers.kl_coef * kl_slope * ratio
            else:
                term = term + numbers.kl_coef * kl
                by_logprob = by_logprob + numbers.kl_coef * kl_slope
    return Term(
        term, by_ratio, kl_by_ratio, by_logprob, ratio, kl, found.low, found.high, found.dual
    )
