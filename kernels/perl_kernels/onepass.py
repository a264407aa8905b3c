"""When the gradients can be computed in the same pass as the log-probs.

That needs each token's coefficient to follow from its own log-prob. Sequence-level losses couple
the tokens of a completion, but without `old_logprobs` every ratio is 1 and what couples them is
known beforehand.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .coefficient import correction_weight
from .inputs import LossInputs
from .objective import PolicyLoss


class OnePass(NamedTuple):
    """A token-level loss with the gradient (not the value) of the one asked for."""

    loss: PolicyLoss
    inputs: LossInputs


def one_pass_form(loss: PolicyLoss, inputs: LossInputs) -> OnePass | None:
    """The token-level loss with the same gradient, or None where there is none."""
    if inputs.old is not None:
        return _off_policy(loss, inputs, inputs.old)
    return _on_policy(loss, inputs)


def _off_policy(loss: PolicyLoss, inputs: LossInputs, old: Tensor) -> OnePass | None:
    if loss.ratio != "token" or loss.surrogate in ("vespo", "gmpo"):
        return None
    # The correction is a constant here, and every token-level surrogate is linear in A >= 0 and in
    # A <= 0: folded into A, a correction per sequence costs no second pass either.
    correction = correction_weight(loss, inputs.rows(old, None), inputs.segments)
    if correction is None:
        return OnePass(loss, inputs)
    folded = torch.where(inputs.mask, inputs.advantages * correction, 0.0)
    plain = dataclasses.replace(loss, correction=None)
    return OnePass(plain, inputs._replace(advantages=folded))


def _on_policy(loss: PolicyLoss, inputs: LossInputs) -> OnePass | None:
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
        return OnePass(loss, inputs)
    # At a ratio of 1 the derivative of every surrogate is -A times that of the log-ratio.
    reduced = dataclasses.replace(
        loss, surrogate="reinforce", ratio="token", dual_clip=None, delta=None
    )
    if couples_advantages:
        inputs = inputs._replace(advantages=_shared_advantages(loss, inputs))
    return OnePass(reduced, inputs)


def _shared_advantages(loss: PolicyLoss, inputs: LossInputs) -> Tensor:
    """Each token moves the mean log-ratio of its completion, so the gradient of all its terms is
    shared equally among its tokens; divided by the token's own weight, which the scale applies."""
    segments, mask, weights = inputs.segments, inputs.mask, inputs.weights
    if loss.surrogate == "gmpo":
        shared = segments.mean(inputs.advantages, mask) * segments.mean(weights, mask)
    else:
        shared = segments.mean(weights * inputs.advantages, mask)
    return torch.where(mask, shared / weights, 0.0)
