"""Floating-point operations of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.attention.varlen  # Registers the operators named below.
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import perl_kernels  # noqa: F401  # Registers its operators.

T = TypeVar("T")


def flops(run: Callable[[], T], core: Any) -> tuple[T, dict[str, int]]:
    """What `run` gives, and its floating-point operations of matrix products, convolutions and attention, in `tower`, `language_model`, `head`.

    Attention counts as queries times keys, whether a mask hides half of them or not: of `varlen_attn` piece by piece,
    of SDPA with the padding of its batch, which `perl.model.packed.sdpa` has too, as it spreads pieces to the longest. What
    a checkpoint computes again counts again. PyTorch's counter has no formula for the operators below, and does not
    look into them.

    Args:
        core: transformers' model of text and images, without the head.
    """
    varlen: Any = torch.ops.torch_attn
    head = torch.ops.perl_kernels.linear_grpo_loss
    formulas: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
        varlen._varlen_attn: _raw(_varlen),
        varlen._varlen_attn_backward: _raw(_varlen_backward),
        head: _head,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        with _parts(core, counter.get_total_flops) as spent:
            result = run()
        in_head = counter.flop_counts["Global"][head]
    return result, {
        "tower": spent["tower"],
        "language_model": spent["language_model"] - in_head,
        "head": in_head,
    }


@contextmanager
def _parts(core: Any, total: Callable[[], int]) -> Iterator[dict[str, int]]:
    """What of `total` was spent in the tower: in its forward, and from the gradient of its output to what follows.

    The counter's own account by module does not hold for backwards that are run in two parts.
    """
    spent = {"tower": 0, "language_model": 0}
    part, before = "language_model", 0

    def enter(new: str) -> None:
        nonlocal part, before
        now = total()
        spent[part] += now - before
        part, before = new, now

    def leave_tower(module: Any, args: Any, output: Any) -> None:
        enter("language_model")
        for x in tree_leaves(dict(output)):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda grad: enter("tower"))

    hooks = [
        core.visual.register_forward_pre_hook(lambda *_: enter("tower")),
        core.visual.register_forward_hook(leave_tower),
        core.language_model.register_forward_pre_hook(lambda *_: enter("language_model")),
    ]
    try:
        yield spent
        enter("language_model")
    finally:
        for hook in hooks:
            hook.remove()


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, *_of_each_query(query, key, value))


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, *_of_each_query(query, key, value))


def _of_each_query(query: Any, *shapes: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of keys and values [B, heads, n, d] with as many heads as queries, which PyTorch 2.11's formula wants."""
    return ((shape[0], query[1], *shape[2:]) for shape in shapes)


def _varlen(
    query: torch.Tensor, key: Any, value: Any, cu_query: Any, cu_key: Any, *_: Any, **__: Any
) -> int:
    """Two products: scores, and values."""
    return 4 * _pairs(cu_query, cu_key) * query.shape[1:].numel()


def _varlen_backward(grad: torch.Tensor, *arguments: Any, **_: Any) -> int:
    """Five products: scores again, and the gradients of weights, values, queries and keys."""
    return 10 * _pairs(*arguments[5:7]) * grad.shape[1:].numel()


def _pairs(cu_query: torch.Tensor, cu_key: torch.Tensor) -> int:
    return int((cu_query.diff().long() * cu_key.diff()).sum())


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Make the counter hand over tensors; it would hand over shapes."""
    formula._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]
    return formula


def _head(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """6NHV: logits, and the gradients of hidden states and weight, which are made in the forward."""
    return 6 * math.prod(hidden) * weight[0]
