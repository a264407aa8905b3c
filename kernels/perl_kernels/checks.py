"""Argument checks of the public functions: each names the argument, what it got and what it wants.

Shapes and types are always checked. Values are checked where looking costs no synchronisation: for
CPU tensors, or everywhere with PERL_CHECKS=1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .advantage import GroupedRewards
from .dispatch import values_visible
from .objective import PolicyLoss, check_number

_SPLIT_HEAD = (
    ", or, of a head that is split over ranks, each rank's rows, weight.to_local(), with group="
)


def check_tensor(name: str, got: object, ndim: int, shape: str) -> Tensor:
    if not isinstance(got, Tensor):
        raise TypeError(f"{name} is a {type(got).__name__}, must be a tensor {shape}")
    if type(got).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, must be a plain tensor {shape}: give {name}.full_tensor()"
            + (_SPLIT_HEAD if name == "weight" else "")
        )
    if got.ndim != ndim:
        rows = got.ndim == ndim + 1 and shape.startswith("[N") and got.shape[-1] != 1
        padded = f"; padded rows go in as {name}[mask]" if rows else ""
        raise ValueError(f"{name} has shape {list(got.shape)}, must be {shape}{padded}")
    return got


def check_floating(name: str, got: object, ndim: int, shape: str) -> Tensor:
    tensor = check_tensor(name, got, ndim, shape)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, must be floating point, of 16 bits or more"
        )
    return tensor


def check_length(name: str, got: object, n_tokens: int, shape: str = "[N]") -> Tensor:
    tensor = check_tensor(name, got, 1, shape)
    if tensor.shape[0] != n_tokens:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, must be {shape} with N = {n_tokens}"
        )
    return tensor


def check_logprobs(name: str, got: object, n_tokens: int) -> None:
    check_floating(name, check_length(name, got, n_tokens), 1, "[N]")


def check_same_device(expected: Tensor, **others: object) -> None:
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != expected.device:
            raise ValueError(f"{name} is on {other.device}, must be on {expected.device}")


def check_targets(targets: object, n_tokens: int, vocab: int) -> None:
    tensor = check_length("targets", targets, n_tokens)
    if n_tokens and not vocab:
        raise ValueError("the vocabulary is empty, V = 0, but there are targets")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets has dtype {tensor.dtype}, must be int64 or int32")
    if values_visible(tensor) and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"targets holds {low if low < 0 else high}, must be in [0, V) with V = {vocab}; "
                "give tokens that do not count a weight of 0 and any valid target"
            )


def check_temperature(temperature: object, n_tokens: int) -> None:
    if isinstance(temperature, Tensor):
        if temperature.ndim == 0:
            raise ValueError("temperature has shape [], must be a float or a tensor [N]")
        check_length("temperature", temperature, n_tokens)
        if values_visible(temperature):
            refused = temperature[~((temperature > 0) & temperature.isfinite())]
            if refused.numel():
                raise ValueError(
                    f"temperature holds {refused[0].item()}, must be above 0 and finite in every row"
                )
    else:
        number = check_number("temperature", temperature, "a float or a tensor [N]")
        _check_positive("temperature", number)


def _check_positive(name: str, number: float, otherwise: str = "") -> None:
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for a float that has
    # changed between calls.
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {number}, must be above 0 and finite{otherwise}")


def check_logits(logits: object, targets: object, temperature: object) -> None:
    tensor = check_floating("logits", logits, 2, "[N, V]")
    check_targets(targets, *tensor.shape)
    check_temperature(temperature, tensor.shape[0])
    check_same_device(tensor, targets=targets, temperature=temperature)


def check_linear(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    temperature: object,
    softcap: object,
) -> None:
    rows = check_floating("hidden", hidden, 2, "[N, H]")
    matrix = check_floating("weight", weight, 2, "[V, H]")
    if matrix.shape[1] != rows.shape[1]:
        raise ValueError(
            f"weight has shape {list(matrix.shape)}, must be [V, H] with the H of hidden, "
            f"{rows.shape[1]}"
        )
    vocab = matrix.shape[0]
    check_targets(targets, rows.shape[0], vocab)
    if bias is not None:
        shape = list(check_floating("bias", bias, 1, "[V]").shape)
        if shape != [vocab]:
            raise ValueError(f"bias has shape {shape}, must be [V] with V = {vocab}")
    if rows.dtype != matrix.dtype and not torch.is_autocast_enabled(rows.device.type):
        raise TypeError(
            f"weight has dtype {matrix.dtype}, must be that of hidden, {rows.dtype}, outside of "
            "autocast: give weight.to(hidden.dtype); logits_dtype=torch.float32 keeps fp32 sums"
        )
    check_temperature(temperature, rows.shape[0])
    if softcap is not None:
        number = check_number("softcap", softcap, "a float or None")
        _check_positive("softcap", number, ", or None")
    check_same_device(rows, weight=weight, targets=targets, bias=bias, temperature=temperature)


def check_blocks(logits_dtype: object, chunk_size: object, memory_budget: object) -> None:
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"logits_dtype is {logits_dtype}, must be torch.float32 or None")
    for name, got in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
        if got is not None:
            if isinstance(got, bool) or not isinstance(got, int):
                raise TypeError(f"{name} is a {type(got).__name__}, must be an int or None")
            if got < 1:
                raise ValueError(f"{name} is {got}, must be at least 1")
    if chunk_size is not None and memory_budget is not None:
        raise ValueError("chunk_size and memory_budget both say how large a block is; choose one")


def check_cu_seqlens(cu_seqlens: object, n_tokens: int) -> Tensor:
    bounds = check_tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]")
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {bounds.dtype}, must be int32 or int64")
    if bounds.numel() == 0:
        raise ValueError("cu_seqlens has shape [0], must be [B + 1]")
    if n_tokens and bounds.numel() == 1:
        raise ValueError(f"cu_seqlens has shape [1], so B = 0, but there are N = {n_tokens} tokens")
    if values_visible(bounds):
        values = bounds.tolist()
        if values[0] != 0 or values[-1] != n_tokens:
            raise ValueError(
                f"cu_seqlens runs from {values[0]} to {values[-1]}, must run from 0 to N = "
                f"{n_tokens}: it is cumulative, [0, length 1, length 1 + length 2, ...]"
            )
        for before, after in pairwise(values):
            if after < before:
                raise ValueError(
                    f"cu_seqlens decreases from {before} to {after}, must be monotone: it is "
                    "cumulative, [0, length 1, length 1 + length 2, ...]"
                )
    return bounds


def check_advantages(advantages: object, count: int, n_tokens: int) -> None:
    if isinstance(advantages, GroupedRewards):
        if len(advantages.rewards) != count:
            raise ValueError(
                f"advantages.rewards has length {len(advantages.rewards)}, must be [B] with "
                f"B = {count}"
            )
        return
    tensor = check_tensor("advantages", advantages, 1, "[B] or [N]")
    if tensor.is_complex():
        raise TypeError(f"advantages has dtype {tensor.dtype}, must be real numbers")
    # Not `in`: torch.compile takes a length that it knows and one that it does not for different.
    if not (tensor.shape[0] == count or tensor.shape[0] == n_tokens):
        raise ValueError(
            f"advantages has shape {list(tensor.shape)}, must be [B] or [N] with B = {count}, "
            f"N = {n_tokens}"
        )


def check_objective(
    loss: object, ref_logprobs: object, rollout_logprobs: object, entropy_given: bool
) -> PolicyLoss:
    if not isinstance(loss, PolicyLoss):
        hint = f", as PolicyLoss.preset({loss.lower()!r})" if isinstance(loss, str) else ""
        raise TypeError(f"loss is a {type(loss).__name__}, must be a PolicyLoss{hint}")
    if loss.has_kl and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs is None, but the loss has kl={loss.kl!r}; kl=None, kl_coef=0.0 leave it out"
        )
    if loss.correction is not None and rollout_logprobs is None:
        raise ValueError(
            f"rollout_logprobs is None, but the loss has correction={loss.correction!r}; "
            "correction=None leaves it out"
        )
    if loss.entropy_coef != 0 and not entropy_given:
        raise ValueError(f"entropy is None, but the loss has entropy_coef={loss.entropy_coef}")
    norm = loss.aggregation == "seq-mean-token-sum-norm"
    if norm and loss.max_completion_length is None:
        raise ValueError(
            "PolicyLoss.max_completion_length is None, but aggregation='seq-mean-token-sum-norm' "
            "divides by it"
        )
    return loss


def check_normalizer(normalizer: object) -> None:
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, 0, "[] or a float")
        if values_visible(normalizer):
            _check_positive("normalizer", normalizer.item())
    else:
        number = check_number("normalizer", normalizer, "a float or 0-dim tensor")
        _check_positive("normalizer", number)


def check_weights(weights: object, n_tokens: int) -> None:
    tensor = check_length("weights", weights, n_tokens)
    if values_visible(tensor) and tensor.dtype != torch.bool and (tensor < 0).any():
        # Of the negative ones: the least of all is NaN where there is one.
        raise ValueError(f"weights holds {tensor[tensor < 0].min().item()}, must be at least 0")
