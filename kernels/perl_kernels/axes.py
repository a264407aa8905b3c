"""A `PolicyLoss` as the arguments that the functions of `coefficient.py` take by name."""

from __future__ import annotations

import functools
from typing import Any

from .objective import PolicyLoss


@functools.lru_cache(maxsize=256)
def axes(loss: PolicyLoss, has_ref: bool) -> dict[str, Any]:
    """What is known when compiling: strings and booleans."""
    return {
        "SURROGATE": loss.surrogate,
        "DUAL_CLIP": loss.dual_clip is not None,
        "DELTA": loss.delta is not None,
        "KL": loss.kl or "",
        "HAS_KL": loss.has_kl,
        "HAS_REF": has_ref,
        "KL_BIAS_CORRECTION": loss.kl_bias_correction,
    }


@functools.lru_cache(maxsize=256)
def numbers(loss: PolicyLoss) -> dict[str, float]:
    """What may change from call to call."""
    return {
        "clip_low": float(loss.clip_low),
        "clip_high": float(loss.clip_high),
        "dual_clip": float(loss.dual_clip or 0.0),
        "delta": float(loss.delta or 0.0),
        "tau_pos": float(loss.sapo_tau_pos),
        "tau_neg": float(loss.sapo_tau_neg),
        "ratio_cap": float(loss.dppo_ratio_cap),
        "kl_coef": float(loss.kl_coef),
    }
