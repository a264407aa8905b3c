"""Results are proven before they are timed: in low precision, against the same formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

Results = Mapping[str, Tensor]
"""Names to tensors; the names of gradients start with `grad`."""


class Checked(Protocol):
    """Times `run` if `prove` accepts what it returns; see the fixture `checked`."""

    def __call__(
        self,
        run: Callable[[], R],
        prove: Callable[[R], None],
        *,
        group: str,
        flops: float | None = None,
        **info: object,
    ) -> None: ...


def near(truth: Results, plain: Results, dtype: torch.dtype) -> Callable[[Results], None]:
    """The proof that results are as exact as plain PyTorch's, up to a small factor.

    Per tensor, with maxima over its elements: |got - truth| <= k max|plain - truth| + 16 eps
    max|truth|, k = 2 for values and 3 for gradients.

    Args:
        truth: the results in fp64.
        plain: the same from plain PyTorch in `dtype`.
        dtype: of the inputs that are timed; gives eps.
    """
    eps = torch.finfo(dtype).eps

    def prove(got: Results) -> None:
        assert got.keys() == truth.keys(), f"results {set(got)}, expected {set(truth)}"
        for name, exact in truth.items():
            scale = exact.abs().max().item()
            loss = _distance(plain[name], exact)
            # A yardstick that is far off itself would accept anything.
            assert loss <= math.sqrt(eps) * scale, f"{name}: plain PyTorch is off by {loss:.2e}"
            bound = (3 if name.startswith("grad") else 2) * loss + 16 * eps * scale
            error = _distance(got[name], exact)
            assert error <= bound, f"{name}: off by {error:.2e}, {bound:.2e} allowed; not timed"

    return prove


def _distance(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    return (got.double() - exact).abs().max().item()
