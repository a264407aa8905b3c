"""What the kernels with one program per completion have in common: how a program reads the tokens of
its completion, and their arguments. Rewards of groups are normalised where advantages are read."""

# Triton, not Python, compiles the device functions, whose results a type checker cannot tell.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouping import Grouping
from ..inputs import LossInputs
from ..objective import PolicyLoss
from .advantage import group_advantages, grouping_arguments, rollout_advantage

TOKENS_AT_ONCE = 1024
"""Of a completion, worked on at once."""
WARPS = 8
MAX_REGISTERS = 255
"""All that 8 warps can have: left alone, the assembler spills a few to fit more blocks."""
COMPILE_TYPES = {"cu_seqlens_ptr": "*i32", "sizes_ptr": "*i64", "reward_weights_ptr": "*fp64"}


@triton.jit
def bounds(cu_seqlens_ptr, completion, n_tokens):
    """First token of a completion and of the next; within the tokens, whatever is written there."""
    start = tl.load(cu_seqlens_ptr + completion).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + completion + 1).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), n_tokens)
    return start, tl.minimum(tl.maximum(stop, start), n_tokens)


@triton.jit
def weights(weights_ptr, token, inside):
    """Weight of each token, 0 outside, and whether it counts."""
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.where(inside, 1.0, 0.0)
    return weight, weight != 0


@triton.jit
def advantages(advantages_ptr, shared, token, weight, counts, PER_TOKEN: tl.constexpr):
    """Advantage of each token, 0 where it does not count, NaN where its weight cannot be used: the
    advantage is a factor of every policy term, so that the row and the loss become NaN."""
    if PER_TOKEN:
        value = tl.load(advantages_ptr + token, mask=counts, other=0.0).to(tl.float32)
    else:
        value = tl.where(counts, shared, 0.0)
    usable = (weight >= 0) & (weight < float("inf"))
    return tl.where(usable, value, float("nan"))


@triton.jit
def optional(pointer, token, counts, otherwise):
    """A tensor [N] that may be missing; 0 where the token does not count."""
    if pointer is not None:
        otherwise = tl.load(pointer + token, mask=counts, other=0.0).to(tl.float32)
    return otherwise


@triton.jit
def shared_advantage(
    completion,
    n_completions,
    advantages_ptr,
    rewards_ptr,
    sizes_ptr,
    reward_weights_ptr,
    n_groups,
    n_rewards,
    eps,
    PER_TOKEN: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Advantage of a completion, if there is one for all its tokens."""
    value = 0.0
    if rewards_ptr is not None:
        value = rollout_advantage(
            rewards_ptr,
            sizes_ptr,
            reward_weights_ptr,
            completion,
            n_completions,
            n_groups,
            n_rewards,
            eps,
            SCALE,
            LEAVE_ONE_OUT,
            UNBIASED,
            BLOCK,
            SCAN,
        ).to(tl.float32)
    elif not PER_TOKEN:
        value = tl.load(advantages_ptr + completion).to(tl.float32)
    return value


def completion_arguments(loss: PolicyLoss, inputs: LossInputs, n_tokens: int) -> dict[str, Any]:
    """The arguments that both kernels over completions have."""
    n_completions = inputs.cu_seqlens.shape[0] - 1
    advantages, rewards = inputs.advantages, inputs.rewards
    if rewards is not None and rewards.grouping.combine == "normalize_then_sum":
        # Its last step is over the batch, which no program of a completion sees.
        advantages, rewards = group_advantages(rewards).advantages, None
    table = None if rewards is None else rewards.rewards.contiguous()
    grouping = Grouping() if rewards is None else rewards.grouping
    return {
        "cu_seqlens_ptr": inputs.cu_seqlens,
        "advantages_ptr": advantages,
        "rewards_ptr": table,
        "sizes_ptr": None if rewards is None else rewards.sizes.contiguous(),
        "reward_weights_ptr": None if rewards is None else rewards.weights,
        "weights_ptr": inputs.weights,
        "n_tokens": n_tokens,
        "n_completions": n_completions,
        "n_groups": 0 if rewards is None else rewards.sizes.shape[0],
        "n_rewards": table.shape[1] if table is not None and table.ndim == 2 else 1,
        "SEQUENCE_MEAN": loss.aggregation == "seq-mean-token-mean",
        "PER_TOKEN": inputs.per_token,
        "TOKENS": TOKENS_AT_ONCE,
        "num_warps": WARPS,
        "maxnreg": MAX_REGISTERS,
        **grouping_arguments(grouping),
    }


def contiguous(inputs: LossInputs) -> LossInputs:
    tensors = {
        name: tensor.contiguous()
        for name, tensor in inputs._asdict().items()
        if isinstance(tensor, Tensor)
    }
    if "weights" in tensors and tensors["weights"].dtype == torch.bool:
        tensors["weights"] = tensors["weights"].to(torch.float32)
    return inputs._replace(**tensors)


def compile_constants(*, full: bool) -> dict[str, Any]:
    """Of a launch with advantages and nothing else, or with rewards and all that there is."""
    grouping = grouping_arguments(Grouping())
    del grouping["eps"]
    common = {**grouping, "TOKENS": TOKENS_AT_ONCE, "PER_TOKEN": False, "SEQUENCE_MEAN": full}
    if full:
        return {**common, "advantages_ptr": None, "SCALE": "batch"}
    rewards = ("rewards_ptr", "sizes_ptr", "reward_weights_ptr")
    return {**common, **dict.fromkeys((*rewards, "weights_ptr", "rollout_ptr"))}
