"""Operations and agreement of training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.attention.varlen  # Registers the operators named below.
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from perl_kernels import ops

T = TypeVar("T")

Gradients = Mapping[str, torch.Tensor]
"""By the name of the parameter; those without a gradient are left out."""


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
    head = ops.linear_grpo_loss.overloadpacket
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


def gradients(model: torch.nn.Module, device: torch.device | None = None) -> Gradients:
    """The parameters' gradients, themselves or copied to a device."""
    return {
        name: p.grad if device is None else p.grad.to(device)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


class Difference(NamedTuple):
    """Of a gradient `got` from `reference`, relative, or how much of it is allowed.

    `most` is max|got - reference| / max|reference|; `norm` is |got - reference| / |reference| in Euclidean norms; `scale`
    is |<got, reference> / <reference, reference> - 1|, which roundings hardly move, as they point anywhere.
    """

    most: float
    norm: float
    scale: float

    def excess(self, allowed: Difference) -> str:
        """What is more than allowed, as in "2.0e-02 of its norm, 1.0e-02 allowed"; empty if nothing is."""
        of = ("of its maximum", "of its norm", "in scale")
        for found, most, what in zip(self, allowed, of, strict=True):
            if not found <= most:  # Nor is NaN.
                return f"{found:.2e} {what}, {most:.2e} allowed"
        return ""


def relative_differences(got: Gradients, reference: Gradients, eps: float) -> dict[str, Difference]:
    """Of each parameter's gradient.

    A parameter whose whole gradient is below `eps` times the largest of the model has noise for a gradient, as a bias
    that a softmax cancels; its difference is divided by what a gradient of that bound throughout would have instead.

    Args:
        eps: of the precision that forwards run in.
    """
    if got.keys() != reference.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(got.keys() ^ reference)[:3]}")
    noise = max(float(g.abs().max()) for g in reference.values()) * eps
    return {name: _difference(got[name].to(g.device), g, noise) for name, g in reference.items()}


def _difference(got: torch.Tensor, reference: torch.Tensor, noise: float) -> Difference:
    error = got - reference
    largest, square = float(reference.abs().max()), float(reference.square().sum())
    if largest < noise:
        largest, square = noise, noise**2 * reference.numel()
    return Difference(
        float(error.abs().max()) / largest,
        math.sqrt(float(error.square().sum()) / square),
        abs(float((error * reference).sum())) / square,
    )


def allowances(
    lost: Mapping[str, Difference], reference: Gradients, eps: float
) -> dict[str, Difference]:
    """What a gradient may differ by from another one in the same low precision.

    Three times what that precision costs the other one against float32, and a floor: 16 eps of the largest element,
    0.004 of norm and scale. In bfloat16 the first floor is an eighth, and only the other two refuse a factor of 1.03.
    Roundings in n elements also move the scale by chance, by their norm over the square root of n, which is little but
    for small parameters, and in which the other one may have been lucky.

    Args:
        lost: what the precision costs the other one.
        reference: its gradients.
        eps: of the precision.
    """
    return {
        name: Difference(
            most=3 * d.most + 16 * eps,
            norm=3 * d.norm + 0.004,
            scale=3 * d.scale + 3 * d.norm / math.sqrt(reference[name].numel()) + 0.004,
        )
        for name, d in lost.items()
    }


def logprob_difference(got: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Largest |difference| of log-probs; completions have to be as many and as long."""
    if list(map(len, got)) != list(map(len, reference)):
        raise AssertionError("log-probs of other completions")
    return max(float((a - b).abs().max()) for a, b in zip(got, reference, strict=True))
