"""Blocks of logits: where they come from, and where their gradient goes.

`Head`: a block is a product of hidden states and LM head, made when it is needed, and its gradient
becomes that of hidden states, head and bias. `Logits`: they are there already, in one block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .values import Coefficients, Scoring, compute_dtype

_ALIGNMENT = 16  # elements; rows that start there are read 128 bits at a time, in any dtype
_GPU_SHARE = 32  # of a GPU's memory, that a block of logits may take
_CPU_ROWS = 512  # the products of fewer rows run at a worse rate; LOG.md has the measurement
_CPU_BYTES = 16 * 2**20
_MULTIPLE = 128  # rows of a tile of the matrix units
_FP16_BITS = (
    14  # a block's largest gradient is made about 2^14 in fp16, a quarter of the largest number
)


class Products(NamedTuple):
    """How logits are made. `chunk_size`: tokens of a block, `memory_budget`: bytes of one; 0 is a
    default. `operands`: dtype of the products' operands. `logits`: dtype of a block: that of the
    operands, or fp32, which keeps what the product has summed up."""

    chunk_size: int
    memory_budget: int
    operands: torch.dtype
    logits: torch.dtype


def block_rows(
    n_tokens: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    chunk_size: int = 0,
    memory_budget: int = 0,
) -> int:
    """Rows of logits that the `linear_` functions hold at once.

    `chunk_size` rows if given; else as many as fill `memory_budget` bytes; else a 32nd of the
    memory of a GPU (4.4 GB on an H200: 14,000 rows of 152k logits in bf16), and 512 rows or 16 MiB,
    whichever is more, on a CPU. One block is best: then the gradient of the head is written once.
    Several are made equally large, so that the last one does not run at a worse rate.
    """
    if chunk_size:
        return chunk_size
    row = max(vocab, 1) * dtype.itemsize
    if memory_budget:
        fitting = max(memory_budget // row, 1)
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        fitting = max(memory // _GPU_SHARE // row, _MULTIPLE)
    else:
        fitting = max(_CPU_BYTES // row, _CPU_ROWS)
    blocks = max(-(-n_tokens // fitting), 1)
    even = max(-(-n_tokens // blocks), 1)
    rounded = -(-even // _MULTIPLE) * _MULTIPLE
    return rounded if blocks > 1 and rounded <= fitting else even


def no_autocast(hidden: Tensor) -> AbstractContextManager[object]:
    """The casts of autocast are made by hand: its own would undo the fp32 accumulation."""
    if not torch.amp.is_autocast_available(hidden.device.type):
        return nullcontext()
    return torch.autocast(hidden.device.type, enabled=False)


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """That of the operands of products: autocast's where it is on, which leaves fp64 alone."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or hidden.dtype == torch.float64:
        return hidden.dtype
    on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else hidden.dtype


def kept_dtype(hidden: Tensor, operands: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that waits for the caller's: that of its tensor, `dtype`, but fp32 in place of
    fp16, for which it may be too small before it is multiplied by what the caller gives."""
    return compute_dtype(hidden) if torch.float16 in (operands, dtype) else dtype


def _fp16_unit(coefficients: Coefficients, temperature: float | Tensor) -> Tensor:
    by_logprob, by_entropy = coefficients
    bound = by_logprob.abs()
    if by_entropy is not None:
        # |p (log p + H)| is at most 0.4 + log V.
        bound = bound + 16.0 * by_entropy.abs()
    # Masked rows may have any temperature.
    bound = torch.where(bound == 0, 0.0, bound / temperature)
    largest = torch.cat([bound, bound.new_full((1,), 2.0**-100)]).max()
    return torch.exp2(_FP16_BITS - largest.log2().ceil())


class Logits:
    """`logits [N, V]`, one block, whose gradient is written to `out [N, V]`, which may be them."""

    def __init__(self, logits: Tensor, scoring: Scoring, out: Tensor) -> None:
        self.scaled, self.unit = logits.dtype == torch.float16, None
        self.logits, self.scoring, self.out = logits, scoring, out
        self.n_tokens = logits.shape[0]
        self.rows = max(self.n_tokens, 1)
        self.dtype = compute_dtype(logits)

    def tile(self, part: slice) -> Tensor:
        return self.logits[part]

    def gradient(self, part: slice) -> Tensor:
        return self.out[part]

    def rescaled(self, coefficients: Coefficients, temperature: float | Tensor) -> Coefficients:
        """As that of `Head`; the gradient stays multiplied by `unit`."""
        if not self.scaled:
            return coefficients
        self.unit = _fp16_unit(coefficients, temperature)
        return coefficients.times(self.unit)

    def accept(self, part: slice, gradient: Tensor | None, coefficients: Coefficients) -> None:
        pass


class Head:
    """Blocks of hidden [N, H] @ weight [V, H].T, and the sums of their gradients.

    Args:
        hidden, weight: [N, H] and [V, H].
        scoring: what is done to the logits.
        products: how they are made.
        needs: whether the gradients of hidden, weight and bias are wanted.

    `gradients` gives them once every row has been accepted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        scoring: Scoring,
        products: Products,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.operands, logits_dtype = products.operands, products.logits
        self.hidden, self.weight = hidden, weight.to(self.operands)
        self.scoring = scoring
        self.n_tokens, self.dtype = hidden.shape[0], compute_dtype(hidden)
        blocks = {"chunk_size": products.chunk_size, "memory_budget": products.memory_budget}
        device = hidden.device
        rows = block_rows(self.n_tokens, weight.shape[0], logits_dtype, device, **blocks)
        self.rows = max(min(rows, self.n_tokens), 1)
        self.buffer = self._buffer(logits_dtype)
        # Written in place unless the block is wider than what the next products read.
        in_place = logits_dtype == self.operands or not any(needs)
        self.written = self.buffer if in_place else self._buffer(self.operands)
        self.scaled = self.operands == torch.float16
        self.wide = None
        if device.type == "cpu" and (logits_dtype != self.operands or self.scaled):
            # A CPU has no product of fp16 or bf16 into fp32.
            self.wide = self.weight.to(torch.float32)
        self.started = False
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        bias = scoring.bias
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.kept = [
            None if x is None else kept_dtype(hidden, self.operands, x) for x in self.dtypes
        ]
        if needs[0]:
            self.grad_hidden = torch.empty(hidden.shape, dtype=self.kept[0], device=device)
        if needs[1]:
            # A single product is rounded once whatever it is written to; sums are kept in fp32.
            single = self.rows >= self.n_tokens and weight.dtype == self.operands
            dtype = weight.dtype if single and not self.scaled else self.dtype
            self.grad_weight = torch.empty(weight.shape, dtype=dtype, device=device)
        if needs[2] and scoring.bias is not None:
            self.grad_bias = torch.zeros(scoring.bias.shape, dtype=self.dtype, device=device)
        self.unit = torch.full((), torch.inf, device=device) if self.scaled else None

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        vocab = self.weight.shape[0]
        padded = -(-vocab // _ALIGNMENT) * _ALIGNMENT
        return torch.empty(self.rows, padded, dtype=dtype, device=self.weight.device)[:, :vocab]

    def tile(self, part: slice) -> Tensor:
        """The logits [n, V] of the rows `part`."""
        hidden = self.hidden[part].to(self.operands)
        out = self.buffer[: hidden.shape[0]]
        if out.dtype == self.operands:
            return torch.mm(hidden, self.weight.t(), out=out)
        if self.wide is not None:
            return torch.mm(hidden.to(out.dtype), self.wide.t(), out=out)
        return torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)

    def gradient(self, part: slice) -> Tensor:
        """Where to write the gradient [n, V] of these logits; may be the tile itself."""
        return self.written[: part.stop - part.start]

    def rescaled(self, coefficients: Coefficients, temperature: float | Tensor) -> Coefficients:
        """`coefficients` times a power of two at which the gradient of no logit overflows fp16 and as
        few as possible vanish; as they are for other dtypes. The sums over blocks are kept at the
        smallest of these powers."""
        if self.unit is None:
            return coefficients
        unit = torch.minimum(_fp16_unit(coefficients, temperature), self.unit)
        if self.started:
            for total in (self.grad_weight, self.grad_bias):
                if total is not None:
                    total *= unit / self.unit
        self.unit = unit
        return coefficients.times(unit)

    def accept(
        self,
        part: slice,
        gradient: Tensor | None,
        coefficients: Coefficients,
        index: Tensor | None = None,
    ) -> None:
        """Take over the gradient of the rows `part`; with `index`, that of the rows
        `part.start + index` alone, or None of no row, where the others' is 0."""
        if gradient is None or index is not None:
            if self.grad_hidden is not None:
                self.grad_hidden[part] = 0.0
            if gradient is None:
                return
        hidden = self.hidden[part] if index is None else self.hidden[part].index_select(0, index)
        if self.grad_hidden is not None:
            rows = self.grad_hidden[part]
            if index is None and rows.dtype == self.operands:
                torch.mm(gradient, self.weight, out=rows)
            else:
                found = self._by_hidden(gradient).to(rows.dtype)
                rows.copy_(found) if index is None else rows.index_copy_(0, index, found)
        if self.grad_weight is not None:
            if index is None:
                # Rows without gradient are masked ones too, and those may hold NaN: 0 * NaN is NaN.
                hidden = hidden.masked_fill(coefficients.idle()[:, None], 0.0)
            self._add_weight(gradient.t(), hidden.to(self.operands))
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0, dtype=self.grad_bias.dtype)
        self.started = True

    def _by_hidden(self, gradient: Tensor) -> Tensor:
        if self.unit is None:
            return gradient @ self.weight
        if self.wide is not None:
            found = gradient.to(self.wide.dtype) @ self.wide
        else:
            found = torch.mm(gradient, self.weight, out_dtype=self.dtype)
        return found / self.unit

    def _add_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        total = self.grad_weight
        assert total is not None
        if total.dtype != self.operands and total.device.type == "cpu":
            gradient, hidden = gradient.to(total.dtype), hidden.to(total.dtype)
        if not self.started and total.dtype == gradient.dtype:
            torch.mm(gradient, hidden, out=total)
        elif not self.started:
            torch.mm(gradient, hidden, out_dtype=total.dtype, out=total)
        elif total.dtype == gradient.dtype:
            total.addmm_(gradient, hidden)
        else:
            # Tensor cores on the narrow operands, sums in fp32.
            torch.addmm(total, gradient, hidden, out_dtype=total.dtype, out=total)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of hidden, weight and bias, None where they are not wanted; see `kept_dtype`."""
        found = [self.grad_hidden, self.grad_weight, self.grad_bias]
        for i, total in enumerate(found):
            if total is None:
                continue
            if not self.started:
                total.zero_()
            elif self.unit is not None and i > 0:
                total /= self.unit
            found[i] = total.to(self.kept[i])
        return found
