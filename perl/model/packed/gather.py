"""Taking rows that several readers share, with gradients that are summed in fp32."""

from __future__ import annotations

from typing import Any

import torch


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]`, differentiable; rows may be taken any number of times.

    Indexing of PyTorch adds the gradients of a repeated row in the dtype of `x`; here bfloat16 and float16 are added
    up in float32 and rounded once. On CUDA the order of the sum changes from run to run, unless PyTorch's algorithms are
    to be deterministic (`run.deterministic`), when index_add_ sorts instead of adding atomically.

    Args:
        x: [T, ...].
        index: int64 [n].

    Returns:
        [n, ...] of the dtype of `x`.
    """
    return _GatherRows.apply(x, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros((ctx.rows, *grad.shape[1:]), dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None
