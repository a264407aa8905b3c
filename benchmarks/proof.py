"""Results are proven before they are timed: in low precision, against the same formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.contest import Refused

Results = Mapping[str, Tensor]
"""Names to tensors; the names of gradients start with `grad`."""

Proof = Callable[[Results, frozenset[str], float], float]
"""Of results, the names of those that are left out, and slack: the largest relative error; see `near`."""


def near(truth: Results, plain: Results, dtype: torch.dtype) -> Proof:
    """The proof that results are as exact as plain PyTorch's, up to a small factor.

    Per tensor, with maxima over its elements: |got - truth| <= k max|plain - truth| + 16 eps
    max|truth|, k = 2 for values and 3 for gradients, times the slack. What it returns is the largest
    max|got - truth| / max|truth|; it raises Refused.

    Args:
        truth: the results in fp64.
        plain: the same from plain PyTorch in `dtype`.
        dtype: of the inputs that are timed; gives eps.
    """
    eps = torch.finfo(dtype).eps
    losses, scales = {}, {}
    for name, exact in truth.items():
        scales[name] = exact.abs().max().item()
        losses[name] = loss = _distance(plain[name], exact)
        # A yardstick that is far off itself would accept anything.
        assert loss <= math.sqrt(eps) * scales[name], f"{name}: plain PyTorch is off by {loss:.2e}"

    def prove(got: Results, omits: frozenset[str] = frozenset(), slack: float = 1.0) -> float:
        expected = truth.keys() - omits
        if got.keys() != expected:
            raise Refused(f"results {sorted(got)}, expected {sorted(expected)}")
        worst = 0.0
        for name, tensor in got.items():
            error = _distance(tensor, truth[name])
            # Also NaN is not below its bound.
            k = slack * (3 if name.startswith("grad") else 2)
            bound = k * losses[name] + 16 * eps * scales[name]
            if not error <= bound:
                raise Refused(f"{name}: off by {error:.2e}, {bound:.2e} allowed; not timed")
            worst = max(worst, error / scales[name] if scales[name] else 0.0)
        return worst

    return prove


def _distance(got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        raise Refused(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    # In parts: fp64 copies of a whole gradient need not fit.
    pairs = zip(got.detach().flatten().split(2**26), exact.flatten().split(2**26), strict=True)
    return torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()
