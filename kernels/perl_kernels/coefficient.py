"""The mathematics of the losses, once: the term of a token and its derivatives.

A loss is sum_t scale_t * term_t. Given the log-prob of a token, `token_term` returns the term and
its derivatives, which are the row coefficients that all gradients follow from. Formulas and their
sources: `PolicyLoss`.

Every function here has two lives. As it stands it works on PyTorch tensors of any floating dtype,
with `tl` from `language.py`. `triton_backend/device.py` compiles the same source for Triton, with
`tl` being `triton.language`. So nothing may be used that only one of them has: arithmetic,
comparisons, `&`, `|`, `~`, `if` on the axes (strings and booleans known when compiling, in
capitals), and `tl.where` with at least one tensor. Comparisons are written such that NaN stays NaN.
"""

from __future__ import annotations

from .language import tl

LOG_RATIO_BOUND = 20.0
LOG_WEIGHT_FLOOR = -18.420680743952367  # log 1e-8, TRL's bound for vespo
DPPO_EPS = 1e-8


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


def kl_and_slope(KL, logprob, ref):
    """Estimate of KL(policy || reference) from one token, and its derivative by `logprob`.

    `KL` is a value of `PolicyLoss.kl`; the empty string is reported as k3.
    """
    difference = ref - logprob
    if KL == "k1" or KL == "k1+":
        value = -difference
        slope = difference * 0.0 + 1.0
    elif KL == "abs":
        value = tl.abs(difference)
        slope = tl.where(
            difference > 0, difference * 0.0 - 1.0, tl.where(difference < 0, 1.0, difference)
        )
    elif KL == "k2":
        value = 0.5 * difference * difference
        slope = -difference
    else:
        difference_in = bounded(difference)
        value = exp_tail(difference_in)
        slope = tl.where(
            tl.abs(difference) > LOG_RATIO_BOUND, value * 0.0, -(value + difference_in)
        )
    if KL == "k1+" or KL == "k3+":
        slope = -difference
    return value, slope


def correction_weight(CORRECTION, log_weight, low, high):
    """Importance weight of trainer against rollout engine, from its logarithm."""
    weight = tl.exp(bounded(log_weight))
    if CORRECTION == "token_truncate" or CORRECTION == "sequence_truncate":
        weight = at_most(at_least(weight, low), high)
    else:
        weight = tl.where((weight < low) | (weight > high), 0.0, weight)
    return weight


def vespo_log(x):
    """Logarithm of a weight in the bounds of vespo."""
    return at_most(at_least(x, LOG_WEIGHT_FLOOR), LOG_RATIO_BOUND)


def vespo_weight(advantage, log_weight, k_pos, lambda_pos, k_neg, lambda_neg):
    """exp(lam + k log w - lam w), with k and lam by the sign of the advantage."""
    weight = tl.exp(log_weight)
    positive = tl.exp(lambda_pos + k_pos * log_weight - lambda_pos * weight)
    negative = tl.exp(lambda_neg + k_neg * log_weight - lambda_neg * weight)
    return tl.where(advantage >= 0, positive, negative)


def pessimistic(log_ratio, advantage, clip_low, clip_high):
    """gmpo's log-ratio, clipped where the advantage would gain by it: value, low, high."""
    high = (advantage >= 0) & (log_ratio > clip_high)
    low = (advantage < 0) & (log_ratio < -clip_low)
    return tl.where(high, clip_high, tl.where(low, -clip_low, log_ratio)), low, high


def leaves_trust_region(SURROGATE, logprob, old, clip_low, clip_high):
    """Whether the probability has fallen, or risen, further than dppo allows."""
    new_p = tl.exp(logprob)
    old_p = tl.exp(old)
    if SURROGATE == "dppo_tv":
        too_low = new_p - old_p < -clip_low
        too_high = new_p - old_p > clip_high
    else:
        # An engine may round a log-prob to a little more than 0.
        old_rest = at_least(1.0 - old_p, 0.0) + DPPO_EPS
        complement = tl.log(old_rest / (at_least(1.0 - new_p, 0.0) + DPPO_EPS))
        divergence = old_p * (old - logprob) + (1.0 - old_p) * complement
        too_low = (divergence > clip_low) & (new_p < old_p)
        too_high = (divergence > clip_high) & (new_p > old_p)
    return too_low, too_high


def policy_term(
    SURROGATE,
    DUAL_CLIP,
    DELTA,
    ratio,
    slope,
    logprob,
    old,
    advantage,
    sequence,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    ratio_cap,
):
    """The surrogate: value, derivative by the log-ratio, derivative by the log-prob directly, and
    whether the token is clipped below, above, or by the dual clip.

    `slope` is the derivative of `ratio` by the log-ratio. `sequence` is what the tokens of a
    completion share: the weight in vespo, the ratio in gmpo (whose `advantage` is shared as well).
    """
    never = ratio < 0
    low = never
    high = never
    dual = never
    by_ratio = ratio * 0.0
    by_logprob = ratio * 0.0
    clipped = ratio
    if SURROGATE == "clip" or SURROGATE == "cispo":
        clipped = at_most(at_least(ratio, 1.0 - clip_low), 1.0 + clip_high)
        low = (ratio < 1.0 - clip_low) & (advantage < 0)
        high = (ratio > 1.0 + clip_high) & (advantage > 0)
    if SURROGATE == "clip":
        unclipped = ratio
        if DELTA:
            unclipped = at_most(ratio, delta)
            slope = tl.where(ratio > delta, 0.0, slope)
        flat = unclipped * advantage > clipped * advantage
        term = -tl.where(flat, clipped * advantage, unclipped * advantage)
        if DUAL_CLIP:
            ceiling = -advantage * dual_clip
            dual = (advantage < 0) & (term > ceiling)
            term = tl.where(dual, ceiling, term)
        by_ratio = tl.where(flat | dual, 0.0, -advantage * slope)
    elif SURROGATE == "cispo":
        by_logprob = -clipped * advantage
        term = by_logprob * logprob
    elif SURROGATE == "sapo":
        gate_pos = tl.sigmoid(tau_pos * (ratio - 1.0))
        gate_neg = tl.sigmoid(tau_neg * (ratio - 1.0))
        gate = tl.where(advantage > 0, gate_pos, gate_neg)
        over = tl.where(advantage > 0, gate_pos * (4.0 / tau_pos), gate_neg * (4.0 / tau_neg))
        term = -over * advantage
        by_ratio = -4.0 * gate * (1.0 - gate) * advantage * slope
    elif SURROGATE == "vespo":
        by_logprob = -sequence * advantage
        term = by_logprob * logprob
    elif SURROGATE == "gmpo":
        term = -sequence * advantage
        by_ratio = term
    elif SURROGATE == "dppo_tv" or SURROGATE == "dppo_kl":
        too_low, too_high = leaves_trust_region(SURROGATE, logprob, old, clip_low, clip_high)
        low = too_low & ~(advantage > 0)
        high = too_high & (advantage > 0)
        kept = tl.where(low | high, 0.0, at_most(ratio, ratio_cap))
        by_logprob = -advantage * kept
        term = by_logprob * logprob
    else:
        by_logprob = -advantage
        term = by_logprob * logprob
    return term, by_ratio, by_logprob, low, high, dual


def token_term(
    SURROGATE,
    DUAL_CLIP,
    DELTA,
    KL,
    HAS_KL,
    HAS_REF,
    KL_BIAS_CORRECTION,
    log_ratio,
    logprob,
    old,
    ref,
    advantage,
    correction,
    sequence,
    clip_low,
    clip_high,
    dual_clip,
    delta,
    tau_pos,
    tau_neg,
    ratio_cap,
    kl_coef,
):
    """Surrogate * correction + kl_coef * KL, of one token.

    Args:
        log_ratio: policy against old policy, at the level of `PolicyLoss.ratio`.
        logprob, old, ref: of the token; `old` is `logprob` if there is none.
        correction: importance weight of trainer against rollout engine; 1 if there is none.
        sequence: see `policy_term`.

    Returns:
        value; derivatives of surrogate and of KL term by the log-ratio; derivative by the log-prob
        directly; ratio; KL estimate; clipped below, above, by the dual clip.
    """
    ratio, slope = ratio_and_slope(log_ratio)
    term, by_ratio, by_logprob, low, high, dual = policy_term(
        SURROGATE,
        DUAL_CLIP,
        DELTA,
        ratio,
        slope,
        logprob,
        old,
        advantage,
        sequence,
        clip_low,
        clip_high,
        dual_clip,
        delta,
        tau_pos,
        tau_neg,
        ratio_cap,
    )
    # vespo has taken the correction into the weight of the sequence.
    if SURROGATE != "vespo":
        term = term * correction
        by_ratio = by_ratio * correction
        by_logprob = by_logprob * correction
    kl = ratio * 0.0
    kl_by_ratio = ratio * 0.0
    if HAS_REF:
        kl, kl_slope = kl_and_slope(KL, logprob, ref)
        if HAS_KL:
            if KL_BIAS_CORRECTION:
                term = term + kl_coef * kl * ratio
                kl_by_ratio = kl_coef * kl * slope
                by_logprob = by_logprob + kl_coef * kl_slope * ratio
            else:
                term = term + kl_coef * kl
                by_logprob = by_logprob + kl_coef * kl_slope
    return term, by_ratio, kl_by_ratio, by_logprob, ratio, kl, low, high, dual
