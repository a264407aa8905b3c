"""Hidden states times LM head in chunks of tokens, with gradients.

Two ways to the gradients: make the logits again in the backward (any use of the log-probs), or make
the gradients in the forward and scale them in the backward (a loss with known coefficients).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import head
from .coefficient import token_terms
from .head import RowStats
from .inputs import LossInputs, compute_dtype
from .objective import PolicyLoss
from .onepass import OnePass
from .outputs import LossOutput
from .policy import evaluate


class HeadCall(NamedTuple):
    """The arguments of a linear function. `matmul_dtype` is that of the products, fp32 or fp64
    `dtype` that of everything after."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float | Tensor
    softcap: float | None
    rows: int
    matmul_dtype: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        chunk_size: int | None,
    ) -> HeadCall:
        device = hidden.device.type
        # Like autocast itself, leave fp64 alone.
        cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        matmul_dtype = torch.get_autocast_dtype(device) if cast else hidden.dtype
        rows = head.block_rows(weight.shape[0], chunk_size)
        dtype = compute_dtype(hidden)
        return cls(hidden, weight, bias, targets, temperature, softcap, rows, matmul_dtype, dtype)

    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (self.hidden, self.weight, self.bias)
        )

    def cast(self) -> HeadCall:
        """With `weight` in `matmul_dtype`: done once for all chunks."""
        return self._replace(weight=self.weight.to(self.matmul_dtype))

    def chunks(self) -> Iterator[slice]:
        return head.blocks(self.hidden.shape[0], self.rows)

    def temperature_of(self, part: slice) -> float | Tensor:
        return head.rows_of(self.temperature, part)

    def scores(self, part: slice) -> Tensor:
        logits = (self.hidden[part].to(self.matmul_dtype) @ self.weight.t()).to(self.dtype)
        if self.bias is not None:
            logits = logits + self.bias.to(self.dtype)
        return head.scaled(logits, self.temperature_of(part), self.softcap)


class _Gradients:
    """Gradients of `hidden`, `weight` and `bias`, those that are needed, summed over chunks."""

    def __init__(self, call: HeadCall, hidden: bool, weight: bool, bias: bool) -> None:
        self.call = call.cast()
        self.hidden = torch.zeros_like(call.hidden) if hidden else None
        self.weight = torch.zeros_like(call.weight, dtype=call.dtype) if weight else None
        self.bias = None
        if bias and call.bias is not None:
            self.bias = torch.zeros_like(call.bias, dtype=call.dtype)
        self.dtypes = (call.weight.dtype, None if call.bias is None else call.bias.dtype)

    def add(
        self,
        part: slice,
        scores: Tensor,
        log_probs: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        call = self.call
        grad_logits = head.logits_gradient(
            scores,
            log_probs,
            call.targets[part],
            entropy,
            grad_logprobs,
            grad_entropy,
            call.temperature_of(part),
            call.softcap,
        )
        if self.hidden is not None:
            self.hidden[part] = grad_logits.to(call.matmul_dtype) @ call.weight
        if self.weight is not None:
            # Rows without gradient are masked ones too, and those may hold NaN: 0 * NaN is NaN.
            idle = head.idle_rows(grad_logprobs, grad_entropy)[:, None]
            hidden = call.hidden[part].masked_fill(idle, 0.0)
            self.weight.addmm_(grad_logits.t(), hidden.to(call.matmul_dtype).to(call.dtype))
        if self.bias is not None:
            self.bias += grad_logits.sum(0)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        bias = None if self.bias is None else self.bias.to(self.dtypes[1])
        return self.hidden, weight, bias


def differentiable_logprobs(call: HeadCall) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, [N] each; the logits are made again for the gradients."""
    return _LinearLogprobs.apply(call.hidden, call.weight, call.bias, call)  # type: ignore[misc]


def one_pass_loss(
    call: HeadCall, loss: PolicyLoss, inputs: LossInputs, form: OnePass
) -> LossOutput:
    """The loss with the gradients already computed; `form` is `one_pass_form(loss, inputs)`."""
    with torch.no_grad(), _full_precision(call):
        needed = [_needed(tensor) for tensor in (call.hidden, call.weight, call.bias)]
        gradients = _Gradients(call, *needed)
        out = _empty_stats(call)
        for part in call.chunks():
            scores = gradients.call.scores(part)
            log_probs = torch.log_softmax(scores, 1)
            stats = head.row_stats(log_probs, call.targets[part])
            coefficients = _coefficients(form, part, stats)
            gradients.add(part, scores, log_probs, stats.entropy, *coefficients)
            _store(out, part, stats)
        output = evaluate(loss, inputs, out.logprobs, out.entropy)
    attached = _Precomputed.apply(
        output.loss, call.hidden, call.weight, call.bias, *gradients.finished()
    )
    return output._replace(loss=attached)


def _coefficients(form: OnePass, part: slice, stats: RowStats) -> tuple[Tensor, Tensor | None]:
    """Derivative of the loss with respect to the log-probs and entropies of one chunk; None where
    the loss has no entropy in it."""
    with torch.enable_grad():
        logprobs = stats.logprobs.detach().requires_grad_()
        entropy = stats.entropy.detach().requires_grad_()
        rows = form.inputs.rows(logprobs, entropy, part.start)
        terms = token_terms(form.loss, rows, form.inputs.segments).value
        total = (form.inputs.scale[part] * torch.where(rows.mask, terms, 0.0)).sum()
        return torch.autograd.grad(total, (logprobs, entropy), allow_unused=True)  # type: ignore[return-value]


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall
    ) -> tuple[Tensor, Tensor]:
        out = _empty_stats(call)
        with _full_precision(call):
            cast = call.cast()
            for part in call.chunks():
                log_probs = torch.log_softmax(cast.scores(part), 1)
                _store(out, part, head.row_stats(log_probs, call.targets[part]))
        tau = call.temperature if isinstance(call.temperature, Tensor) else None
        ctx.temperature = None if tau is not None else call.temperature
        ctx.settings = call[5:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, call.targets, tau, out.entropy)
        return out.logprobs, out.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, tau, entropy = ctx.saved_tensors
        temperature = ctx.temperature if tau is None else tau
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        call = HeadCall(hidden, weight, bias, targets, temperature, *ctx.settings)
        with _full_precision(call):
            gradients = _Gradients(call, *ctx.needs_input_grad[:3])
            for part in call.chunks():
                scores = gradients.call.scores(part)
                gradients.add(
                    part,
                    scores,
                    torch.log_softmax(scores, 1),
                    entropy[part],
                    grad_logprobs[part],
                    head.rows_of(grad_entropy, part),
                )
        return *gradients.finished(), None


class _Precomputed(torch.autograd.Function):
    """Gives `loss` the gradients computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors[3:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [
            None if gradient is None else gradient * grad_loss.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        ]
        return None, *scaled, None, None, None


def _needed(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _full_precision(call: HeadCall) -> torch.autocast:
    # The casts of autocast are made by hand: its own would undo the fp32 accumulation.
    return torch.autocast(call.hidden.device.type, enabled=False)


def _empty_stats(call: HeadCall) -> RowStats:
    n_tokens = call.hidden.shape[0]
    return RowStats(*(call.hidden.new_empty(n_tokens, dtype=call.dtype) for _ in range(2)))


def _store(out: RowStats, part: slice, stats: RowStats) -> None:
    for whole, piece in zip(out, stats, strict=True):
        whole[part] = piece
