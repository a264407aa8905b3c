"""How an operator of `torch.ops.perl_kernels` is registered: implementation, fake, gradient formula."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Not torch.library.custom_op, which imports torch._dynamo at the first call: a second, 150 MB.
_library = torch.library.Library("perl_kernels", "DEF")
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as `torch.ops.perl_kernels.<name>`; gives the operator."""

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(*arguments: Any) -> Any:
            # Triton launches on the current device, whatever the tensors are on.
            with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
                return function(*arguments)

        IMPLEMENTATIONS[name] = function
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        return getattr(torch.ops.perl_kernels, name).default

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"perl_kernels::{name}", lib=_library)


def differentiable(
    name: str, save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    torch.library.register_autograd(
        f"perl_kernels::{name}", _once(backward), setup_context=save, lib=_library
    )


def _once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A gradient formula that refuses a graph of its own: its operators have no formula."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "functions of perl_kernels can be differentiated once only (create_graph=True was "
                "given); perl_kernels.reference has the same functions, differentiable any number "
                "of times"
            )
        return backward(ctx, *grads)

    return checked
