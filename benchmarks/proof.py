"""Results are proven before they are timed: in low precision, against the same formula in fp64."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Refused, Unavailable

Results = Mapping[str, Tensor]
"""Names to tensors; the names of gradients start with `grad`."""

Proof = Callable[[Results, frozenset[str], float], float]
"""Of results, the names of those that are left out, and slack: the largest relative error; see `near`."""


def near(truth: Results, plain: Results, dtype: torch.dtype) -> Proof:
    """The proof that results are as exact as plain PyTorch's, up to a small factor.

    Of each tensor, with e = got - truth, d = plain - truth and Euclidean norms:

        |e| <= k |d| + floor |truth|                          as much noise
        |<got, truth> / |truth|^2 - 1| <= b + floor           no other scale; b the same of plain, and |d| / |truth| / sqrt(n)
        max|e| <= k max|d| + 16 eps max|truth|                no single element that is wrong

    k = 2 for values and 3 for gradients; k and b times the slack; floor = 64 eps, but no more than 0.004. In 16 bits the last line
    says little, as one element's rounding is a large share of the largest element; the others refuse a factor of 1.01.
    What it returns is the largest max|e| / max|truth|; it raises Refused.

    Args:
        truth: the results in fp64.
        plain: the same from plain PyTorch in `dtype`.
        dtype: of the inputs that are timed; gives eps.

    Raises:
        Unavailable: plain PyTorch is so far off itself that it would let anything pass.
    """
    eps = torch.finfo(dtype).eps
    floor = min(64 * eps, 4e-3)
    lost = {name: _difference(plain[name], exact) for name, exact in truth.items()}
    for name, loss in lost.items():
        if not loss.norm <= math.sqrt(eps):
            raise Unavailable(
                f"{name}: plain PyTorch is off by {loss.norm:.2e} of the norm, which proves nothing"
            )

    def prove(got: Results, omits: frozenset[str] = frozenset(), slack: float = 1.0) -> float:
        expected = truth.keys() - omits
        if got.keys() != expected:
            raise Refused(f"results {sorted(got)}, expected {sorted(expected)}")
        worst = 0.0
        for name, tensor in got.items():
            k = slack * (3 if name.startswith("grad") else 2)
            found, loss = _difference(tensor, truth[name]), lost[name]
            _check(f"{name}: off by", found.norm, k * loss.norm + floor, "of the norm")
            few = tensor.numel() ** -0.5 if tensor.numel() > 1 else 0.0
            scale = slack * (loss.scale + few * loss.norm) + floor
            _check(f"{name}: its scale is off by", found.scale, scale, "")
            if tensor.numel() > 1:
                most = k * loss.most + 16 * eps
                _check(f"{name}: an element is off by", found.most, most, "of the largest")
            worst = max(worst, found.most)
        return worst

    return prove


class Proven(ABC):
    """A problem whose results are tensors: `benchmarks.contest.Problem` by its `proof`."""

    @property
    @abstractmethod
    def proof(self) -> Proof:
        """By `near`; a cached property, as it takes longer than what is timed."""

    def find_truth(self) -> None:
        _ = self.proof

    def prove(
        self, results: Results, omits: frozenset[str] = frozenset(), slack: float = 1.0
    ) -> float:
        return self.proof(results, omits, slack)


class _Difference(NamedTuple):
    """Of results from the truth, relative: Euclidean norms, the projection on the truth, the largest element."""

    norm: float
    scale: float
    most: float


def _difference(got: Tensor, exact: Tensor) -> _Difference:
    if got.shape != exact.shape:
        raise Refused(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    # In parts: fp64 copies of a whole gradient need not fit.
    parts = zip(got.detach().flatten().split(2**26), exact.flatten().split(2**26), strict=True)
    sums = exact.new_zeros(3, dtype=torch.float64)
    most, largest = [], []
    for a, b in parts:
        a, b = a.double(), b.double()
        error = a - b
        sums += torch.stack([error.square().sum(), (a * b).sum(), b.square().sum()])
        most.append(error.abs().max())
        largest.append(b.abs().max())
    error, product, square = sums.tolist()
    if square == 0:
        return _Difference(*[0.0 if error == 0 else math.inf] * 3)
    return _Difference(
        math.sqrt(error / square),
        abs(product / square - 1),
        (torch.stack(most).max() / torch.stack(largest).max()).item(),
    )


def _check(what: str, found: float, allowed: float, of: str) -> None:
    # Also NaN is not below its bound.
    if not found <= allowed:
        raise Refused(f"{what} {found:.2e} {of}".rstrip() + f", {allowed:.2e} allowed; not timed")
