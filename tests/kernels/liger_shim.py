"""Liger's names and call conventions over our losses, so that Liger's own tests run against us.

A pytest plugin (`-p liger_shim`) for its `test/chunked_loss/test_grpo_loss.py`, started by
`test_liger_suite.py`. Padded batches are packed; everything numerical is done by the public
functions of `perl_kernels`. What differs between the two is mapped here, and said here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import liger_kernel.chunked_loss
import liger_kernel.chunked_loss.fused_linear_ppo as liger_ppo
import liger_kernel.transformers.grpo_loss as liger_logits
import pytest
import torch
from torch import Tensor

from perl_kernels import (
    LossOutput,
    PolicyLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
)

Metrics = tuple[Tensor, ...]

EXCLUDED = {
    "test_sequence_level_rejects_unsupported_loss_types": "sequence ratios of cispo and sapo are "
    "refused by Liger and defined here",
    "test_selective_logprob_backward_skips_frozen_params": "spies on a private function of Liger",
    "test_functional_correctness": "the KL against an unrelated reference, whose log-ratios lie "
    "beyond the bound of 20 that we have, as verl has",
    "test_ref_per_token_logps_preferred_over_ref_input": "the wording of a warning of Liger",
}
# In bf16, the KL is of log-probs that the reference of the test rounds to bf16; Liger's own function
# differs from it by as much, in the same 17 elements.
EXCLUDED_CASE = "luspo-True-False-False-0.1-0.2-0.2-1.0-True-1.0-dtype0-0.1-0.5-8-128-1024-4096"
# The second shape of each test; minutes on a CPU.
LARGE = ("8-128-1024-4096", "1-4096-256-5000", "test_correctness_large_seq")

AGGREGATION = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}


class Packed(NamedTuple):
    """The unmasked tokens of a padded batch."""

    mask: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Packed:
        ends = mask.bool().sum(1).cumsum(0)
        return cls(mask.bool(), torch.cat([ends.new_zeros(1), ends]).to(torch.int32))

    def pack(self, padded: Tensor | None) -> Tensor | None:
        return None if padded is None else padded[self.mask]


def chunk_forward(
    hidden: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs [B, T] of hidden states [B, T, H]."""
    scored = linear_token_logprobs(
        hidden.flatten(0, 1),
        weight,
        selected_token_ids.flatten(),
        bias=bias,
        temperature=temperature,
    )
    return scored.logprobs.view(selected_token_ids.shape)


def normalizer(
    loss_type: str, mask: Tensor, num_items_in_batch: float | Tensor | None = None
) -> float:
    """Liger counts completions without tokens, and at least one token."""
    if loss_type in ("grpo", "sapo", "dr_grpo", "luspo"):
        return float(mask.shape[0])
    if num_items_in_batch is not None and loss_type != "bnpo":
        return float(num_items_in_batch)
    return max(float(mask.sum()), 1.0)


def fields(
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    max_completion_length: int | None,
) -> dict[str, Any]:
    """Liger's options as fields of `PolicyLoss`."""
    result: dict[str, Any] = {
        "clip_low": epsilon_low,
        "clip_high": epsilon_high,
        "aggregation": AGGREGATION.get(loss_type, "token-mean"),
    }
    if loss_type in ("cispo", "sapo", "vespo"):
        result["surrogate"] = loss_type
    else:
        result["ratio"] = level
    if loss_type == "cispo":
        result |= {"clip_low": 1.0, "clip_high": 0.0}
    if loss_type == "dr_grpo":
        result["max_completion_length"] = max_completion_length
    if beta:
        result |= {"kl": "k3", "kl_coef": beta}
    return result


def rollout_logprobs(loss_type: str, old: Tensor, ratio: Tensor, packed: Packed) -> Tensor:
    """Log-probs [N] of the rollout engine for which our correction is Liger's `vllm_is_ratio`."""
    log_ratio = (ratio[:, None] if ratio.ndim == 1 else ratio).log()
    if loss_type == "vespo":
        # Liger sums what it is given, padding too; here only tokens count. Each gets its share.
        total = log_ratio.clamp(math.log(1e-8), 20.0).sum(1, keepdim=True)
        log_ratio = total / packed.mask.sum(1, keepdim=True).clamp(min=1)
    return old - log_ratio.expand(packed.mask.shape)[packed.mask]


def fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | None = None,
) -> tuple[Tensor, Metrics]:
    """`LigerFusedLinearGRPOFunction.apply`; `compiled` and `chunk_size` choose nothing here."""
    temperature = float(temperature)
    packed = Packed.of(attention_mask)
    with torch.no_grad():
        current = chunk_forward(_input, weight, selected_token_ids, bias, temperature)
        if not use_ref_model:
            ref_per_token_logps = current
        elif ref_per_token_logps is None:
            assert ref_input is not None and ref_weight is not None
            ref_per_token_logps = chunk_forward(
                ref_input, ref_weight, selected_token_ids, ref_bias, temperature
            )
    options = fields(
        loss_type,
        importance_sampling_level,
        epsilon_low,
        epsilon_high,
        beta,
        max_completion_length,
    )
    options |= {"delta": delta, "kl_bias_correction": use_bias_correction_kl}
    if loss_type == "sapo":
        options |= {"sapo_tau_pos": sapo_temperature_pos, "sapo_tau_neg": sapo_temperature_neg}
    for name, value in (
        ("vespo_k_pos", vespo_k_pos),
        ("vespo_lambda_pos", vespo_lambda_pos),
        ("vespo_k_neg", vespo_k_neg),
        ("vespo_lambda_neg", vespo_lambda_neg),
    ):
        options[name] = value

    old = packed.pack(old_per_token_logps)
    # Left out where it can be, so that both the one-pass and the two-pass form are tested.
    if old is None and (vllm_is_ratio is not None or loss_type == "cispo"):
        old = current[packed.mask]
    if loss_type == "cispo":
        # Liger's bound may lie below 1, ours not: min(r, c) A = min(r / c, 1) c A.
        assert old is not None
        old, advantages = old + math.log(epsilon_high), advantages * epsilon_high
    rollout = None
    if vllm_is_ratio is not None:
        assert old is not None
        rollout = rollout_logprobs(loss_type, old, vllm_is_ratio, packed)
        options |= {"correction": "token_truncate", "correction_high": math.inf}

    def run(mask: Packed, loss: PolicyLoss, **arguments: Any) -> LossOutput:
        targets = selected_token_ids[mask.mask]
        return linear_grpo_loss(
            _input[mask.mask],
            weight,
            targets,
            cu_seqlens=mask.cu_seqlens,
            loss=loss,
            bias=bias,
            temperature=temperature,
            **arguments,
        )

    padded_kl = loss_type == "luspo" and beta != 0
    if padded_kl:
        options |= {"kl": None, "kl_coef": 0.0}
    output = run(
        packed,
        PolicyLoss(**options),
        advantages=advantages,
        old_logprobs=old,
        ref_logprobs=packed.pack(ref_per_token_logps) if beta else None,
        rollout_logprobs=rollout,
        normalizer=normalizer(loss_type, attention_mask, num_items_in_batch),
    )
    loss = output.loss
    if padded_kl:
        # Liger's luspo averages the KL over the padding as well, as TRL does not.
        lengths = attention_mask.sum(1, keepdim=True).expand(attention_mask.shape)
        assert ref_per_token_logps is not None
        loss = (
            loss
            + run(
                Packed.of(torch.ones_like(attention_mask)),
                PolicyLoss(surrogate="reinforce", kl="k3", kl_coef=beta),
                advantages=torch.zeros_like(advantages),
                ref_logprobs=ref_per_token_logps.flatten(),
                weights=lengths.flatten(),
                normalizer=float(attention_mask.numel()),
            ).loss
        )
    return loss, metrics(output, beta)


def metrics(output: LossOutput, beta: float) -> Metrics:
    clipped = output.metrics["clip_fraction"]
    return (output.metrics["kl"], clipped) if beta else (clipped,)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger's module: the options are given before the tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *tensors: Any, **named: Any) -> tuple[Tensor, Metrics]:
        return fused_linear_grpo(*tensors, **self.options, **named)


class LigerFusedLinearPPOBase(liger_ppo.LigerFusedLinearPPOBase):
    """Liger's, but for the log-probs; the reference of the tests takes a normaliser from it."""

    chunk_forward = staticmethod(chunk_forward)  # type: ignore[assignment]


def reduce_grpo_loss(
    per_token_loss: Tensor, mask: Tensor, loss_type: str, max_completion_length: int | None
) -> Tensor:
    """`_reduce_grpo_loss`. The term of `reinforce` is -A lp: our aggregations reduce any values."""
    counted, weights = Packed.of(mask), None
    aggregation, count = AGGREGATION.get(loss_type, "token-mean"), normalizer(loss_type, mask)
    if loss_type == "luspo":
        # Unlike TRL's: the padding's terms are in the mean.
        counted = Packed.of(torch.ones_like(mask))
        weights = mask.sum(1, keepdim=True).expand(mask.shape).flatten().float()
        aggregation, count = "token-mean", float(mask.numel())
    loss = PolicyLoss(
        surrogate="reinforce",
        aggregation=aggregation,  # type: ignore[arg-type]
        max_completion_length=max_completion_length or mask.shape[1],
    )
    return policy_loss(
        per_token_loss[counted.mask],
        -torch.ones(len(mask), device=mask.device),
        counted.cu_seqlens,
        loss,
        weights=weights,
        normalizer=count,
    ).loss


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    temperature: float,
    beta: float,
    eps_low: float,
    eps_high: float,
    inplace: bool,
    loss_type: str,
    max_completion_length: int | None,
    reduce: bool,
) -> Any:
    """Liger's loss of logits [B, T + 1, V], the last of which are of no token."""
    packed = Packed.of(completion_mask)
    loss = PolicyLoss(**fields(loss_type, "token", eps_low, eps_high, beta, max_completion_length))

    def run(weights: Tensor | None, count: float) -> LossOutput:
        return grpo_loss(
            logits[:, :-1][packed.mask],
            completion_ids[packed.mask],
            advantages,
            packed.cu_seqlens,
            loss,
            old_logprobs=packed.pack(old_logp),
            ref_logprobs=packed.pack(ref_logp),
            weights=weights,
            normalizer=count,
            temperature=temperature,
        )

    if reduce:
        output = run(None, normalizer(loss_type, completion_mask))
        return output.loss, metrics(output, beta)
    # One token at a time: what our losses return is already a mean.
    outputs = [run(alone, 1.0) for alone in torch.eye(int(packed.mask.sum())).to(logits)]

    def padded(value: Callable[[LossOutput], Tensor]) -> Tensor:
        result = torch.zeros(packed.mask.shape, device=logits.device)
        result[packed.mask] = torch.stack([value(output) for output in outputs])
        return result

    kl = padded(lambda output: output.metrics["kl"]) if beta else None
    return (
        padded(lambda output: output.loss),
        kl,
        padded(lambda output: output.metrics["clip_fraction"]),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before Liger's test file binds the names by importing them."""
    liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss = LigerFusedLinearGRPOLoss
    liger_ppo.LigerFusedLinearPPOBase = LigerFusedLinearPPOBase
    liger_logits._reduce_grpo_loss = reduce_grpo_loss
    liger_logits.triton_grpo_loss = triton_grpo_loss


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    large = os.environ.get("PERL_LIGER_LARGE") == "1"

    def wanted(item: pytest.Item) -> bool:
        name = item.name.partition("[")[0]
        if name in EXCLUDED or EXCLUDED_CASE in item.name:
            return False
        return large or not any(part in item.name for part in LARGE)

    dropped = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if wanted(item)]
