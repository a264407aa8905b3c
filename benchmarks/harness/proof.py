"""Results are proven before they are timed, up to what low precision costs plain PyTorch at the same work."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.contest import Problem, Refused, Unavailable

Results = Mapping[str, Tensor]
"""Names to tensors; the names of gradients start with `grad`."""


class Difference(NamedTuple):
    """Of a tensor `got` from `exact`, relative, or how much of it is allowed.

    `most` is max|got - exact| / max|exact|; `norm` is |got - exact| / |exact| in Euclidean norms; `scale` is
    |<got, exact> / <exact, exact> - 1|, which roundings hardly move, as they point anywhere.
    """

    most: float
    norm: float
    scale: float

    def excess(self, allowed: Difference) -> str:
        """What is more than allowed, as in "2.00e-02 of its norm, 1.00e-02 allowed"; empty if nothing is."""
        of = ("of its norm", "in scale", "of its maximum")
        for found, most, what in zip(
            self[1:] + self[:1], allowed[1:] + allowed[:1], of, strict=True
        ):
            if not found <= most:  # Nor is NaN.
                return f"{found:.2e} {what}, {most:.2e} allowed"
        return ""


def difference(got: Tensor, exact: Tensor, noise: float = 0.0) -> Difference:
    """In fp64. Where all of `exact` is below `noise`, what it would be relative to if it were `noise` throughout."""
    if got.shape != exact.shape:
        raise Refused(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    # In parts: fp64 copies of a whole gradient need not fit.
    parts = zip(got.detach().flatten().split(2**26), exact.flatten().split(2**26), strict=True)
    sums = exact.new_zeros(3, dtype=torch.float64)
    most, largest = [], []
    for a, b in parts:
        a, b = a.double(), b.double()
        error = a - b
        sums += torch.stack([error.square().sum(), (error * b).sum(), b.square().sum()])
        most.append(error.abs().max())
        largest.append(b.abs().max())
    error, product, square = sums.tolist()
    size = torch.stack(largest).max().item()
    if size < noise:
        size, square = noise, noise**2 * exact.numel()
    if square == 0:
        return Difference(*[0.0 if error == 0 else math.inf] * 3)
    return Difference(
        torch.stack(most).max().item() / size, math.sqrt(error / square), abs(product) / square
    )


def allowance(
    lost: Difference, elements: int, eps: float, k: float, k_scale: float, floor: float
) -> Difference:
    """What results may differ by in a precision that costs plain PyTorch `lost`: k times that, and a little.

    In 16 bits the largest element says little, as one element's rounding is a large share of it; the others refuse a
    factor of 1.03. Roundings in n elements also move the scale by chance, by their norm over the square root of n, in
    which plain PyTorch may have been lucky.
    """
    return Difference(
        most=k * lost.most + 16 * eps if elements > 1 else math.inf,
        norm=k * lost.norm + floor,
        scale=k_scale * (lost.scale + lost.norm / math.sqrt(elements)) + floor,
    )


class Proven(Problem):
    """A problem whose results are tensors: its own formula in plain PyTorch, in fp64, is the truth.

    Results have to be as exact as plain PyTorch's in the dtype of the inputs, up to a small factor (see `allowance`): k = 2
    for values and 3 for gradients, 1 for the scale, all times the slack; floor = 64 eps, but no more than 0.004, so a
    factor of 1.01 is refused in 16 bits as well.
    """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the inputs that are timed."""

    @abstractmethod
    def expected(self, dtype: torch.dtype) -> Results:
        """The results as plain PyTorch has them, products in `dtype`."""

    @cached_property
    def truth(self) -> dict[str, tuple[Tensor, Difference]]:
        """Of each result, and what plain PyTorch loses of it.

        Raises:
            Unavailable: plain PyTorch is so far off itself that it would let anything pass.
        """
        exact, plain = self.expected(torch.float64), self.expected(self.dtype)
        found = {name: (tensor, difference(plain[name], tensor)) for name, tensor in exact.items()}
        for name, (_, lost) in found.items():
            if not lost.norm <= math.sqrt(torch.finfo(self.dtype).eps):
                raise Unavailable(
                    f"{name}: plain PyTorch is off by {lost.norm:.2e} of the norm, which proves nothing"
                )
        return found

    def find_truth(self) -> None:
        _ = self.truth

    def prove(
        self, results: Results, omits: frozenset[str] = frozenset(), slack: float = 1.0
    ) -> float:
        """The largest max|e| / max|truth|; raises Refused."""
        expected, eps = self.truth.keys() - omits, torch.finfo(self.dtype).eps
        if results.keys() != expected:
            raise Refused(f"results {sorted(results)}, expected {sorted(expected)}")
        worst = 0.0
        for name, tensor in results.items():
            exact, lost = self.truth[name]
            k = slack * (3 if name.startswith("grad") else 2)
            found = difference(tensor, exact)
            allowed = allowance(lost, tensor.numel(), eps, k, slack, min(64 * eps, 4e-3))
            if excess := found.excess(allowed):
                raise Refused(f"{name}: off by {excess}; not timed")
            worst = max(worst, found.most)
        return worst


Gradients = Mapping[str, Tensor]
"""By the name of the parameter; those without a gradient are left out."""


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def copied_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU that outlive the step."""
    return {name: g.to("cpu", copy=True) for name, g in gradients(model).items()}


class GradientProof:
    """How far the gradients of a training step may be from those of another implementation.

    In float32: 1e-3, relative. In bfloat16, where exact arithmetic in another order gives other roundings, the
    yardstick is what bfloat16 costs the other implementation itself: three times that (see `allowance`).

    Args:
        reference: gradients of the other implementation.
        exact: its gradients of the same step in float32, where it ran in bfloat16.
    """

    def __init__(self, reference: Gradients, exact: Gradients | None = None) -> None:
        self.reference = reference
        self.eps = torch.finfo(torch.float32 if exact is None else torch.bfloat16).eps
        if exact is None:
            self.allowed = dict.fromkeys(reference, Difference(1e-3, 1e-3, 1e-3))
            return
        lost = _differences(reference, exact, self.eps)
        self.allowed = {
            name: allowance(d, exact[name].numel(), self.eps, 3, 3, 0.004)
            for name, d in lost.items()
        }

    def check(self, got: Gradients, ours: str, theirs: str) -> dict[str, Difference]:
        """Of each parameter's gradient.

        Raises:
            AssertionError: a gradient is too far off; the message says which.
        """
        found = _differences(got, self.reference, self.eps)
        for name, d in found.items():
            excess = d.excess(self.allowed[name])
            assert not excess, f"{ours} gradient of {name} differs from {theirs} by {excess}"
        return found


def _differences(got: Gradients, reference: Gradients, eps: float) -> dict[str, Difference]:
    """A parameter whose whole gradient is below `eps` times the largest of the model has noise for a gradient, as a bias
    that a softmax cancels."""
    if got.keys() != reference.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(got.keys() ^ reference)[:3]}")
    noise = max(float(g.abs().max()) for g in reference.values()) * eps
    return {name: difference(got[name].to(g.device), g, noise) for name, g in reference.items()}
