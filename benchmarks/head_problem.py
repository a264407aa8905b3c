"""Hidden states, head and sampled tokens of completions, and the loss that every provider computes of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from benchmarks.heads import Head
from benchmarks.proof import Proof, Proven, Results, near

CLIP, KL = 0.2, 0.5
"""The options of the loss, which all of them have: PPO's clip on both sides, and the k3 estimate of the KL term, with more
weight than in training, so that a gradient without it cannot pass for rounding in 16 bits."""

_BLOCK_BYTES = 2**30
"""Of logits in fp64, when truths are computed."""

Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class HeadProblem(Proven):
    """S completions of L = N / S tokens each.

    Hidden states and weights are random, and the tokens are sampled from what they predict, whose entropy is a few
    tenths of a nat to a few nats, as a trained model's is: logits have a standard deviation of 5. The policies that
    sampled and that the KL term refers to are off by log-ratios that are far from the clip's bounds, so that rounding
    does not decide on which side a token falls.
    """

    head: Head
    level: Level
    frozen: bool
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] int64
    advantages: Tensor  # [S] float32
    cu_seqlens: Tensor  # [S+1] int32, on the host, where a trainer knows it
    old: Tensor  # [N] float32
    ref: Tensor  # [N] float32

    @property
    def shape(self) -> tuple[int, int]:
        """(S, L)"""
        return len(self.advantages), len(self.targets) // len(self.advantages)

    def loss(self, logprobs: Tensor) -> Tensor:
        """GRPO on log-probs [N] of the present policy, in their dtype, in plain PyTorch.

        Token level: mean over tokens of -min(r A, clip(r) A) + KL * k3, r each token's ratio (Shao et al.,
        arXiv 2402.03300). Sequence level: r = exp(mean of log-ratios) of each completion, mean over completions, no KL
        term (GSPO, arXiv 2507.18071).
        """
        old, ref, advantages = (x.to(logprobs.dtype) for x in (self.old, self.ref, self.advantages))
        ratios = logprobs - old
        if self.level == "sequence":
            ratios = ratios.view(self.shape).mean(1)
        else:
            advantages = advantages.repeat_interleave(self.shape[1])
        ratio = ratios.exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        if self.level == "sequence":
            return policy
        k3 = (ref - logprobs).exp() - (ref - logprobs) - 1
        return policy + KL * k3.mean()

    def gradients(self, loss: Tensor) -> Results:
        """What a training step needs of `loss`."""
        if self.frozen:
            (hidden,) = torch.autograd.grad(loss, (self.hidden,))
            return {"loss": loss.detach(), "grad hidden": hidden}
        hidden, weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return {"loss": loss.detach(), "grad hidden": hidden, "grad weight": weight}

    @cached_property
    def proof(self) -> Proof:
        dtype = self.hidden.dtype
        return near(self._exact(torch.float64), self._exact(dtype), dtype)

    @torch.no_grad()
    def _exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Loss, entropies and gradients with products in `dtype` and everything between them at least in fp32, a block
        of rows after the other, so that it fits where all logits do not."""
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        logprobs, entropy = logprobs_by_blocks(hidden, weight, self.targets)
        with torch.enable_grad():
            leaf = logprobs.requires_grad_()
            loss = self.loss(leaf)
            (coefficients,) = torch.autograd.grad(loss, (leaf,))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None if self.frozen else torch.zeros_like(weight, dtype=wide)
        for rows in _blocks(hidden, weight):
            p = (hidden[rows] @ weight.T).to(wide).softmax(1)
            p = p.mul_(-coefficients[rows, None])
            p.scatter_add_(1, self.targets[rows, None], coefficients[rows, None])
            p = p.to(dtype)
            grad_hidden[rows] = p @ weight
            if grad_weight is not None:
                grad_weight += p.T @ hidden[rows]
        results = {"loss": loss.detach(), "entropy": entropy, "grad hidden": grad_hidden}
        return results if grad_weight is None else {**results, "grad weight": grad_weight}


@dataclass(frozen=True)
class CrossEntropyProblem(HeadProblem):
    """The same, asked for the mean cross entropy of the tokens."""

    @classmethod
    def of(cls, p: HeadProblem) -> CrossEntropyProblem:
        return cls(**{field.name: getattr(p, field.name) for field in fields(HeadProblem)})

    def loss(self, logprobs: Tensor) -> Tensor:
        return -logprobs.mean()


@dataclass(frozen=True)
class LogprobsProblem(HeadProblem):
    """The same, asked for log-probs and entropies alone, as of an older policy."""

    @cached_property
    def proof(self) -> Proof:
        def results(dtype: torch.dtype) -> Results:
            hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
            logprobs, entropy = logprobs_by_blocks(hidden, weight, self.targets)
            return {"logprobs": logprobs, "entropy": entropy}

        return near(results(torch.float64), results(self.hidden.dtype), self.hidden.dtype)


@dataclass(frozen=True)
class LogitsProblem(HeadProblem):
    """The same behind the product: `logits` [N, V] are the input, and the gradient is theirs."""

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.hidden @ self.weight.T

    def gradients(self, loss: Tensor) -> Results:
        raise TypeError("ask for the gradient of the logits that the provider was given")

    @cached_property
    def proof(self) -> Proof:
        return near(self._exact(torch.float64), self._exact(self.logits.dtype), self.logits.dtype)

    @torch.no_grad()
    def _exact(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        parts = []
        blocks = list(_blocks(self.hidden, self.weight))
        for rows in blocks:
            parts.append(selected(self.logits[rows].to(dtype), self.targets[rows]))
        logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        with torch.enable_grad():
            leaf = logprobs.requires_grad_()
            loss = self.loss(leaf)
            (coefficients,) = torch.autograd.grad(loss, (leaf,))
        # The truth is kept in fp32, half the memory of fp64 and far more digits than 16 bits have.
        gradient = torch.empty_like(self.logits, dtype=torch.float32)
        for rows in blocks:
            p = self.logits[rows].to(wide).softmax(1).mul_(-coefficients[rows, None])
            p.scatter_add_(1, self.targets[rows, None], coefficients[rows, None])
            gradient[rows] = p.to(dtype).float()
        return {"loss": loss.detach(), "entropy": entropy, "grad logits": gradient}


@dataclass(frozen=True)
class LogitsLogprobsProblem(LogitsProblem):
    """The same, asked for log-probs and entropies alone."""

    @cached_property
    def proof(self) -> Proof:
        def results(dtype: torch.dtype) -> Results:
            parts = [
                selected(self.logits[rows].to(dtype), self.targets[rows])
                for rows in _blocks(self.hidden, self.weight)
            ]
            logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
            return {"logprobs": logprobs, "entropy": entropy}

        return near(results(torch.float64), results(self.logits.dtype), self.logits.dtype)


def make_problem(
    kind: type[HeadProblem],
    head: Head,
    device: torch.device,
    level: Level = "token",
    frozen: bool = False,
) -> HeadProblem:
    """Inputs in bfloat16 on a GPU and float32 on a CPU; the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sequences = max(2, head.N // 1024)
    hidden = normal(head.N, head.H).to(dtype)
    weight = (normal(head.V, head.H) * (5 / head.H**0.5)).to(dtype)
    targets = torch.empty(head.N, dtype=torch.int64, device=device)
    for rows in _blocks(hidden, weight):
        p = (hidden[rows] @ weight.T).float().softmax(1)
        targets[rows] = torch.multinomial(p, 1, generator=generator)[:, 0]
    current, _ = logprobs_by_blocks(hidden.double(), weight.double(), targets)
    shifts = torch.tensor([-0.6, -0.05, 0.05, 0.6], device=device)

    def other_policy() -> Tensor:
        size = (sequences, 1) if level == "sequence" else (sequences, head.N // sequences)
        chosen = shifts[torch.randint(4, size, generator=generator, device=device)]
        return (current.view(sequences, -1) + chosen).flatten().float()

    # More weight on the negative ones: policy and KL terms then add up to a loss that is no small difference, in which
    # rounding would be all there is.
    advantages = torch.tensor([0.5, -1.7, 1.0, -1.5, -0.8, -1.2, 0.3, -2.0], device=device)
    return kind(
        head=replace(head, itemsize=dtype.itemsize),
        level=level,
        frozen=frozen,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(not frozen),
        targets=targets,
        advantages=advantages.repeat(-(-sequences // 8))[:sequences],
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32) * (head.N // sequences),
        old=other_policy(),
        ref=other_policy(),
    )


@torch.no_grad()
def logprobs_by_blocks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of the products' rows, at least in fp32, a block of rows after the other."""
    parts = [selected(hidden[rows] @ weight.T, targets[rows]) for rows in _blocks(hidden, weight)]
    logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return logprobs, entropy


@torch.no_grad()
def selected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of logits [N, V], at least in fp32."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows whose logits take no more than `_BLOCK_BYTES` in fp64."""
    size = max(1, _BLOCK_BYTES // (8 * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
