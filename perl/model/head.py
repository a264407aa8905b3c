"""Where the policy meets `perl_kernels`: log-probs, the policy loss and the supervised loss at its head."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from perl.config import Config, LossConfig
from perl.model.families import ImageFeatures
from perl.model.policy import Policy
from perl.timing import span, span_of_backward
from perl.types import PackedBatch, UserError
from perl_kernels import (
    LossOutput,
    PolicyLoss,
    TokenLogprobs,
    linear_grpo_loss,
    linear_token_logprobs,
)

SUPERVISED = PolicyLoss(surrogate="reinforce", aggregation="token-mean")
"""With advantage 1 this is cross entropy."""

_BANNED_LOGIT = -1e4
"""Added to the logits of tokens that are never sampled: probability 0 in every precision, and 0 * log 0 stays 0."""


def make_policy_loss(config: LossConfig, max_completion_length: int) -> PolicyLoss:
    """The preset with the config's overrides.

    Raises:
        UserError: an unknown preset, a value out of range, or axes that exclude each other.
    """
    overrides: dict[str, Any] = {
        name: None if name in _OFF and value == _OFF[name] else value
        for name, value in dataclasses.asdict(config).items()
        if name != "preset" and value is not None
    }
    preset = PolicyLoss()
    try:
        preset = PolicyLoss.preset(config.preset)
        if overrides.get("aggregation", preset.aggregation) == "seq-mean-token-sum-norm":
            overrides.setdefault("max_completion_length", max_completion_length)
        if overrides.get("kl_coef") and preset.kl is None:
            overrides.setdefault("kl", "k3")
        if config.kl == "none":
            overrides = {"kl_coef": 0.0, "kl_bias_correction": False} | overrides
        return dataclasses.replace(preset, **overrides)
    except ValueError as error:
        said = str(error)
        of_preset = [
            f"preset {config.preset} has loss.{name} = {value!r}"
            + (f", switched off by {_OFF[name]!r}" if name in _OFF else "")
            for name, value in dataclasses.asdict(preset).items()
            if name not in overrides and value != getattr(PolicyLoss, name) and f".{name} " in said
        ]
        where = "loss.preset: " if said.startswith("no preset") else ""
        raise UserError(
            where + "; ".join([said.replace("PolicyLoss.", "loss."), *of_preset])
        ) from error


def policy_loss_of(config: Config) -> PolicyLoss:
    """The loss of an RL stage: that of `[loss]`, which weighs by `token_truncate` what vLLM sampled unless it says how.

    Raises:
        UserError: as `make_policy_loss`.
    """
    loss = config.loss
    # Another prompt's log-probs correct nothing.
    compares = config.permutation.condition == "permuted"
    if config.rollout.engine == "vllm" and loss.correction is None and compares:
        loss = dataclasses.replace(loss, correction="token_truncate")
    return make_policy_loss(loss, config.rollout.max_new_tokens)


_OFF = {"dual_clip": 0, "delta": 0, "kl": "none", "correction": "none"}
"""How a recipe, which cannot write None, switches off what a preset has."""


def needs_reference(loss: PolicyLoss) -> bool:
    """Whether reference log-probs enter the loss."""
    return loss.kl is not None and loss.kl_coef != 0


def step_normalizer(loss: PolicyLoss, tokens: float, sequences: float) -> float:
    """The denominator of a whole optimizer step: scored tokens, or sequences, as the aggregation divides."""
    return max(1.0, tokens if loss.aggregation == "token-mean" else sequences)


class HeadLoss:
    """The loss at the language-model head of a policy, over packed batches.

    Args:
        policy: whose hidden states and head are used.
        banned: int64 [K] ids that are never sampled and so have no probability.
        temperature: the sampling temperature, which log-probs are taken at.
    """

    def __init__(self, policy: Policy, banned: torch.Tensor, temperature: float) -> None:
        self.policy = policy
        self.temperature = temperature
        vocabulary = policy.head_weight.shape[0]
        self.bias = torch.zeros(vocabulary, dtype=policy.dtype, device=policy.device)
        # The loss divides by the temperature after it has added the bias.
        self.bias[banned.to(policy.device)] = _BANNED_LOGIT * max(1.0, temperature)

    def __call__(
        self,
        batch: PackedBatch,
        loss: PolicyLoss,
        normalizer: float,
        features: ImageFeatures | None = None,
        old_logprobs: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
    ) -> LossOutput:
        """Loss of a micro-batch as its share of the optimizer step's (`normalizer`).

        `features` are those of the batch's images where several micro-batches share them.
        """
        with span("language_model"):
            hidden = self.policy(batch, features)
        device = hidden.device
        with span("loss"):
            output = linear_grpo_loss(
                hidden,
                self.policy.head_weight,
                batch.targets.to(device),
                batch.advantages.to(device),
                # On the host as it is: the loss then knows the lengths without waiting for the device.
                batch.completion_cu_seqlens,
                loss,
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                rollout_logprobs=None
                if batch.sampled_logprobs is None
                else batch.sampled_logprobs.to(device),
                normalizer=normalizer,
                bias=self.bias,
                temperature=self.temperature,
            )
        span_of_backward("loss.backward", output.loss, hidden)
        return output

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> TokenLogprobs:
        """Log-probs and entropies of the scored tokens, [N] each, without gradient and without dropout."""
        training = self.policy.training
        self.policy.eval()
        try:
            with span("language_model"):
                hidden = self.policy(batch)
        finally:
            self.policy.train(training)
        with span("loss"):
            return linear_token_logprobs(
                hidden,
                self.policy.head_weight,
                batch.targets.to(hidden.device),
                bias=self.bias,
                temperature=self.temperature,
            )
