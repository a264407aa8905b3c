"""Device functions on scores: what is done to a logit before the softmax, and exact elementary functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh in fp32 to a few units in the last place, small `x` included; NaN stays NaN."""
    square = x * x
    # Below 0.3 the quotient cancels; the series has converged to fp32 there.
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series)))
    decayed = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def scaled(logit, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(logit / softcap) / temperature, fp32. A temperature that is not above 0 and
    finite gives NaN."""
    if HAS_SOFTCAP:
        logit = softcap * tanh(logit / softcap)
    return logit / usable(temperature)


@triton.jit
def usable(temperature):
    """`temperature`, or NaN where it is not above 0 and finite."""
    return tl.where((temperature > 0) & (temperature < float("inf")), temperature, float("nan"))


@triton.jit
def scaled_slope(score, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Derivative of `scaled` with respect to the logit, from its value `score`."""
    slope = 1.0 / temperature
    if HAS_SOFTCAP:
        capped = score * temperature / softcap
        slope = slope * (1.0 - capped * capped)
    return slope
