"""Liger's fused linear GRPO loss as an outside oracle: same loss, same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perl_kernels import PolicyLoss, linear_grpo_loss, linear_token_logprobs

liger = pytest.importorskip("liger_kernel.chunked_loss")

B, T, H, V, MAX_LENGTH = 4, 6, 8, 23, 10
PER_SEQUENCE = {"aggregation": "seq-mean-token-mean"}
TOKEN_MEAN = {"aggregation": "token-mean"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, PER_SEQUENCE),
    "bnpo": ({}, TOKEN_MEAN),
    "dapo": ({}, TOKEN_MEAN),
    "dr_grpo": (
        {"max_completion_length": MAX_LENGTH},
        {"aggregation": "seq-mean-token-sum-norm", "max_completion_length": MAX_LENGTH},
    ),
    # Liger's bound of cispo is the ratio itself and there is no lower one.
    "cispo": (
        {"epsilon_high": 1.3},
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 1.3 - 1, **TOKEN_MEAN},
    ),
    "sapo": ({}, {"surrogate": "sapo", **PER_SEQUENCE}),
    "vespo": ({}, {"surrogate": "vespo", **TOKEN_MEAN}),
}
SEQUENCE = ({"importance_sampling_level": "sequence"}, {"ratio": "sequence"})


def compare(
    loss_type: str,
    liger_options: dict[str, Any],
    our_options: dict[str, Any],
    *,
    old: bool = True,
    kl_coef: float = 0.0,
    ratio: bool = False,
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    bias, targets = torch.randn(V), torch.randint(0, V, (B, T))
    lengths = torch.tensor([6, 1, 4, 3])
    mask = torch.arange(T) < lengths[:, None]
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.2])
    current = linear_token_logprobs(
        hidden.reshape(-1, H), weight, targets.reshape(-1), bias=bias, temperature=0.8
    ).logprobs.reshape(B, T)
    old_logprobs, ref = current + 0.3 * torch.randn(B, T), current + 0.5 * torch.randn(B, T)
    # 1 in the padding, as TRL has it: vespo sums the logarithms without a mask.
    is_ratio = torch.exp(0.2 * torch.randn(B, T)).where(mask, 1.0) if ratio else None

    options = {"epsilon_low": 0.2, "epsilon_high": 0.28, **liger_options}
    theirs_function = liger.LigerFusedLinearGRPOLoss(
        beta=kl_coef,
        compiled=False,
        use_ref_model=kl_coef != 0,
        loss_type=loss_type,
        temperature=0.8,
        **options,
    )
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    theirs, _ = theirs_function(
        leaves[0],
        leaves[1],
        targets,
        mask.float(),
        advantages,
        bias=leaves[2],
        ref_per_token_logps=ref if kl_coef else None,
        old_per_token_logps=old_logprobs if old else None,
        vllm_is_ratio=is_ratio,
    )
    wanted = torch.autograd.grad(theirs, leaves)

    fields = {"clip_low": 0.2, "clip_high": 0.28, **our_options}
    if kl_coef:
        fields |= {"kl": "k3", "kl_coef": kl_coef}
    rollout = None
    if is_ratio is not None:
        rollout = (old_logprobs - is_ratio.log())[mask]
        fields |= {"correction": "token_truncate", "correction_high": 100.0}
    ours = linear_grpo_loss(
        leaves[0][mask],
        leaves[1],
        targets[mask],
        advantages,
        torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
        PolicyLoss(**fields),
        old_logprobs=old_logprobs[mask] if old else None,
        ref_logprobs=ref[mask] if kl_coef else None,
        rollout_logprobs=rollout,
        bias=leaves[2],
        temperature=0.8,
        chunk_size=5,
    )
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(ours.loss, leaves)
    for got, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", CASES)
def test_loss_type(loss_type: str, kl_coef: float, old: bool) -> None:
    compare(loss_type, *CASES[loss_type], old=old, kl_coef=kl_coef)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_sequence_ratio(loss_type: str) -> None:
    theirs, ours = CASES[loss_type]
    compare(loss_type, {**theirs, **SEQUENCE[0]}, {**ours, **SEQUENCE[1]}, kl_coef=0.1)


def test_luspo() -> None:
    compare("luspo", SEQUENCE[0], {**SEQUENCE[1], "aggregation": "seq-mean-token-sum"})


def test_delta() -> None:
    compare("grpo", {"delta": 1.4}, {"delta": 1.4, **PER_SEQUENCE})


def test_kl_bias_correction() -> None:
    options = {"use_bias_correction_kl": True}, {"kl_bias_correction": True, **PER_SEQUENCE}
    compare("grpo", *options, kl_coef=0.1)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
def test_importance_weights_of_the_rollout_engine(loss_type: str) -> None:
    compare(loss_type, *CASES[loss_type], ratio=True, kl_coef=0.1)
