"""Where the logits of a block of rows come from, and where their gradient goes.

`LogitsTiles`: they are there. `HeadTiles`: they are a product of hidden states and LM head, made
anew for each block, and their gradient becomes that of hidden states, head and bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .inputs import Coefficients, compute_dtype
from .scores import Scoring
from .tuning import head_rows

_ALIGNMENT = 16  # bytes; rows that start there are read 128 bits at a time


class Tiles(Protocol):
    """Blocks of rows of logits, one in use at a time."""

    scoring: Scoring
    n_tokens: int
    rows: int
    dtype: torch.dtype
    """That of statistics and coefficients: fp32 or fp64."""

    def tile(self, part: slice) -> Tensor:
        """The logits [n, V] of the rows `part`."""
        ...

    def gradient(self, part: slice, tile: Tensor) -> Tensor:
        """Where to write the gradient [n, V] of these logits; may be `tile` itself."""
        ...

    def accept(self, part: slice, gradient: Tensor, coefficients: Coefficients) -> None:
        """Take over what was written there."""
        ...

    def accept_rows(
        self, part: slice, index: Tensor, gradient: Tensor, coefficients: Coefficients
    ) -> None:
        """Take over the gradient of the rows `part.start + index` alone; the others' is 0."""
        ...


def chunks(part: slice, rows: int) -> Iterator[slice]:
    """`part` in slices of at most `rows` rows."""
    for start in range(part.start, part.stop, rows):
        yield slice(start, min(start + rows, part.stop))


class LogitsTiles:
    """Blocks of `logits [N, V]`; their gradient is written to `out [N, V]`, which may be `logits`."""

    def __init__(self, logits: Tensor, scoring: Scoring, rows: int, out: Tensor | None) -> None:
        self.logits, self.scoring, self.rows, self.out = logits, scoring, rows, out
        self.n_tokens = logits.shape[0]
        self.dtype = compute_dtype(logits)

    def tile(self, part: slice) -> Tensor:
        return self.logits[part]

    def gradient(self, part: slice, tile: Tensor) -> Tensor:
        assert self.out is not None
        return self.out[part]

    def accept(self, part: slice, gradient: Tensor, coefficients: Coefficients) -> None:
        pass

    def accept_rows(
        self, part: slice, index: Tensor, gradient: Tensor, coefficients: Coefficients
    ) -> None:
        raise NotImplementedError("there is no product to leave rows out of")


def no_autocast(hidden: Tensor) -> torch.autocast:
    """The casts of autocast are made by hand: its own would undo the fp32 accumulation."""
    return torch.autocast(hidden.device.type, enabled=False)


class HeadTiles:
    """Blocks of hidden [N, H] @ weight [V, H].T, and the sums of their gradients.

    Args:
        hidden, weight: [N, H] and [V, H].
        scoring: what is done to the logits.
        chunk_size, memory_budget: rows of a block, or its bytes; see `tuning.head_rows`.
        matmul_dtype: of the products' operands.
        logits_dtype: of a block: that of the operands, or fp32, which keeps what the product has
            accumulated without an fp32 product.
        needs: whether the gradients of hidden, weight and bias are wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        scoring: Scoring,
        chunk_size: int | None,
        memory_budget: int | None,
        matmul_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.hidden = hidden
        self.weight = weight.to(matmul_dtype)
        self.scoring, self.matmul_dtype = scoring, matmul_dtype
        self.n_tokens, self.dtype = hidden.shape[0], compute_dtype(hidden)
        blocks = (hidden.device, chunk_size, memory_budget)
        rows = head_rows(self.n_tokens, weight.shape[0], logits_dtype, *blocks)
        self.rows = min(rows, max(self.n_tokens, 1))
        self.buffer = self._buffer(logits_dtype)
        # Written in place unless the block is wider than what the next products read.
        in_place = logits_dtype == matmul_dtype or not any(needs)
        self.written = self.buffer if in_place else self._buffer(matmul_dtype)
        self.wide = None
        if logits_dtype != matmul_dtype and hidden.device.type == "cpu":
            # There is no product of fp16 or bf16 into fp32 on a CPU.
            self.wide = self.weight.to(logits_dtype)
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        if needs[0]:
            self.grad_hidden = hidden.new_zeros(hidden.shape)
        if needs[1]:
            self.grad_weight = weight.new_zeros(weight.shape, dtype=self.dtype)
        if needs[2] and scoring.bias is not None:
            self.grad_bias = weight.new_zeros(scoring.bias.shape, dtype=self.dtype)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        vocab = self.weight.shape[0]
        step = max(_ALIGNMENT // dtype.itemsize, 1)
        padded = -(-vocab // step) * step
        return torch.empty(self.rows, padded, dtype=dtype, device=self.weight.device)[:, :vocab]

    def tile(self, part: slice) -> Tensor:
        hidden = self.hidden[part].to(self.matmul_dtype)
        out = self.buffer[: hidden.shape[0]]
        if out.dtype == self.matmul_dtype:
            return torch.mm(hidden, self.weight.t(), out=out)
        if self.wide is not None:
            return torch.mm(hidden.to(out.dtype), self.wide.t(), out=out)
        return torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)

    def gradient(self, part: slice, tile: Tensor) -> Tensor:
        return self.written[: tile.shape[0]]

    def accept(self, part: slice, gradient: Tensor, coefficients: Coefficients) -> None:
        if self.grad_hidden is not None:
            if self.grad_hidden.dtype == self.matmul_dtype:
                torch.mm(gradient, self.weight, out=self.grad_hidden[part])
            else:
                self.grad_hidden[part] = gradient @ self.weight
        if self.grad_weight is not None:
            # Rows without gradient are masked ones too, and those may hold NaN: 0 * NaN is NaN.
            idle = coefficients.idle()[:, None]
            self._add_weight(gradient, self.hidden[part].masked_fill(idle, 0.0))
        self._add_bias(gradient)

    def accept_rows(
        self, part: slice, index: Tensor, gradient: Tensor, coefficients: Coefficients
    ) -> None:
        if self.grad_hidden is not None:
            rows = (gradient @ self.weight).to(self.grad_hidden.dtype)
            self.grad_hidden[part].index_copy_(0, index, rows)
        if self.grad_weight is not None:
            self._add_weight(gradient, self.hidden[part].index_select(0, index))
        self._add_bias(gradient)

    def _add_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        total, hidden = self.grad_weight, hidden.to(self.matmul_dtype)
        assert total is not None
        if total.dtype == self.matmul_dtype:
            total.addmm_(gradient.t(), hidden)
        elif total.device.type == "cpu":
            total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype))
        else:
            # Tensor cores on the narrow operands, sums in fp32.
            torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)

    def _add_bias(self, gradient: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0, dtype=self.grad_bias.dtype)
