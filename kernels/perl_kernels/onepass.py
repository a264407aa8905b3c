"""When the gradients can be computed in the same pass as the log-probs.

That needs each token's coefficient to follow from its own log-prob. Sequence-level losses couple
the tokens of a completion, but without `old_logprobs` every ratio is 1 and what couples them is
known beforehand: it is folded into the advantages.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import torch

from .coefficient import correction_weight
from .completions_torch import Completions
from .objective import PolicyLoss, coefficient_arguments
from .values import LossInputs, Prepared

Fold = Literal["none", "correction", "shared", "shared_gmpo"]
"""What the advantage A_t of a token with weight w_t is replaced by, over the tokens of its completion:
`correction`: A_t times the importance weight of old policy against rollout engine;
`shared`: mean(w A) / w_t; `shared_gmpo`: mean(w) mean(A) / w_t."""


class OnePass(NamedTuple):
    """A token-level loss that has the gradient, not the value, of the one asked for, once the
    advantages have been replaced."""

    loss: PolicyLoss
    fold: Fold


@functools.lru_cache(maxsize=256)
def one_pass_form(loss: PolicyLoss, has_old: bool) -> OnePass | None:
    """The token-level loss with the same gradient, or None where there is none."""
    return _off_policy(loss) if has_old else _on_policy(loss)


def _off_policy(loss: PolicyLoss) -> OnePass | None:
    if loss.ratio != "token" or loss.surrogate in ("vespo", "gmpo"):
        return None
    if loss.correction is None or loss.correction.startswith("token"):
        return OnePass(loss, "none")
    # The correction is a constant here, and every token-level surrogate is linear in A >= 0 and in
    # A <= 0: folded into A, a correction per sequence costs no second pass either.
    return OnePass(dataclasses.replace(loss, correction=None), "correction")


def _on_policy(loss: PolicyLoss) -> OnePass | None:
    couples_advantages = loss.surrogate == "gmpo" or (
        loss.ratio == "sequence" and loss.surrogate in ("clip", "sapo")
    )
    # Log-probs of the whole completion enter the correction or the KL term: two passes.
    if loss.correction is not None and (
        couples_advantages or loss.surrogate == "vespo" or loss.correction.startswith("sequence")
    ):
        return None
    if loss.ratio == "sequence" and loss.has_kl and loss.kl_bias_correction:
        return None
    if loss.ratio == "token" and loss.surrogate not in ("vespo", "gmpo"):
        return OnePass(loss, "none")
    # At a ratio of 1 the derivative of every surrogate is -A times that of the log-ratio.
    reduced = dataclasses.replace(
        loss, surrogate="reinforce", ratio="token", dual_clip=None, delta=None
    )
    if not couples_advantages:
        return OnePass(reduced, "none")
    return OnePass(reduced, "shared_gmpo" if loss.surrogate == "gmpo" else "shared")


def folded(fold: Fold, loss: PolicyLoss, prepared: Prepared, inputs: LossInputs) -> Prepared:
    """`prepared` for the token-level form of `loss`."""
    if fold == "none":
        return prepared
    advantages, scale, _ = prepared
    mask = scale != 0
    completions = Completions.of(inputs.cu_seqlens, scale.shape[0])
    if fold == "correction":
        assert inputs.old is not None and inputs.rollout is not None
        axes, numbers = coefficient_arguments(loss, inputs.ref is not None)
        gap = inputs.old.to(scale.dtype) - inputs.rollout.to(scale.dtype)
        log_weight = completions.sum(torch.where(mask, gap, 0.0)).to(scale.dtype)
        weight = correction_weight(axes, numbers, log_weight)
        advantages = advantages * completions.spread(weight)
    else:
        # Within a completion, scales are proportional to weights.
        if fold == "shared":
            shared = completions.mean(torch.where(mask, scale * advantages, 0.0), mask)
        else:
            shared = completions.mean(advantages, mask) * completions.mean(scale, mask)
        advantages = shared / scale
    return prepared._replace(advantages=torch.where(mask, advantages, 0.0))
