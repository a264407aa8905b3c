"""LM heads by the name of their model, completions behind them, and the loss that every provider computes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from benchmarks.harness.contest import Contest, Provider, Work
from benchmarks.harness.proof import Proven, Results

CLIP, KL = 0.2, 0.5
"""The options of the loss, which all of them have: PPO's clip on both sides, and the k3 estimate of the KL term, with more
weight than in training, so that a gradient without it cannot pass for rounding in 16 bits."""

_BLOCK_BYTES = 2**30
"""Of logits in fp64, when truths are computed."""

Level = Literal["token", "sequence"]

# hidden_size and vocab_size of config.json (text_config where there is one).
_MODELS = {
    "Mistral-7B": (4096, 32_768),
    "Qwen3-0.6B": (1024, 151_936),
    "Qwen2.5-VL-3B": (2048, 151_936),
    "Qwen2.5-VL-7B": (3584, 152_064),
    "Qwen3-VL-4B": (2560, 151_936),
    "Qwen3-VL-8B": (4096, 151_936),
    "Qwen3.5-4B": (2560, 248_320),
}

MODELS = tuple(_MODELS)


@dataclass(frozen=True)
class Head:
    """N rows of H features before a vocabulary of V tokens, `itemsize` bytes an element."""

    model: str
    N: int
    H: int
    V: int
    itemsize: int

    @property
    def case(self) -> str:
        return f"{self.model}, N = {self.N}"


def head(model: str, n: int, itemsize: int, fraction: int = 1) -> Head:
    """The head of a model behind `n` rows; of `1/fraction` of its width and vocabulary, for a CPU."""
    hidden, vocabulary = _MODELS[model]
    name = model if fraction == 1 else f"{model} / {fraction}"
    return Head(name, n, hidden // fraction, vocabulary // fraction, itemsize)


def logits_head(model: str, n: int, itemsize: int) -> Head:
    """With the whole vocabulary of a model, and a width with which logits are soon made."""
    hidden, vocabulary = _MODELS[model]
    return Head(f"vocabulary of {model}", n, hidden // 32, vocabulary, itemsize)


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

    @staticmethod
    def work(size: Head, frozen: bool = False) -> Work:
        """Forward and backward: a product of 2NHV for the logits, one for the gradient of the hidden states, one for
        that of the head unless it is frozen. Hidden states and head are read once, gradients written once. The logits
        need not be kept.
        """
        hidden, weight = size.N * size.H, size.V * size.H
        elements = 2 * (hidden + weight) - weight * frozen
        return Work((4 if frozen else 6) * hidden * size.V, size.itemsize * elements)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, L)"""
        return len(self.advantages), len(self.targets) // len(self.advantages)

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @classmethod
    def of(cls, p: HeadProblem) -> Self:
        """On the inputs of `p`."""
        return cls(**{field.name: getattr(p, field.name) for field in fields(HeadProblem)})

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
        inputs = {"grad hidden": self.hidden, "grad weight": self.weight}
        if self.frozen:
            del inputs["grad weight"]
        found = torch.autograd.grad(loss, list(inputs.values()))
        return {"loss": loss.detach(), **dict(zip(inputs, found, strict=True))}

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        """Loss, entropies and gradients with products in `dtype` and everything between them at least in fp32, a block
        of rows after the other, so that it fits where all logits do not."""
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        logprobs, entropy = logprobs_by_blocks(hidden, weight, self.targets)
        loss, slopes = self._loss_and_slopes(logprobs)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None if self.frozen else torch.zeros_like(weight, dtype=wide)
        for rows in _blocks(hidden, weight):
            p = self._logits_gradient((hidden[rows] @ weight.T).to(wide), slopes, rows).to(dtype)
            grad_hidden[rows] = p @ weight
            if grad_weight is not None:
                grad_weight += p.T @ hidden[rows]
        results = {"loss": loss, "entropy": entropy, "grad hidden": grad_hidden}
        return results if grad_weight is None else {**results, "grad weight": grad_weight}

    @torch.enable_grad()
    def _loss_and_slopes(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its derivative [N] by the log-probs."""
        leaf = logprobs.requires_grad_()
        loss = self.loss(leaf)
        return loss.detach(), torch.autograd.grad(loss, (leaf,))[0]

    def _logits_gradient(self, logits: Tensor, slopes: Tensor, rows: slice) -> Tensor:
        """slope * (1[target] - p) for some rows."""
        p = logits.softmax(1).mul_(-slopes[rows, None])
        return p.scatter_add_(1, self.targets[rows, None], slopes[rows, None])


@dataclass(frozen=True)
class CrossEntropyProblem(HeadProblem):
    """The same, asked for the mean cross entropy of the tokens."""

    def loss(self, logprobs: Tensor) -> Tensor:
        return -logprobs.mean()


@dataclass(frozen=True)
class ProductsProblem(HeadProblem):
    """The same, asked for the products alone that a loss needs: logits, and what leads from their gradient to those of
    hidden states and head. The logits stand in for their gradient, which costs the same."""

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _blocks(hidden, weight):
            logits = hidden[rows] @ weight.T
            grad_hidden[rows] = logits @ weight
            grad_weight += logits.T @ hidden[rows]
        results = {"grad hidden": grad_hidden}
        return results if self.frozen else {**results, "grad weight": grad_weight}


@dataclass(frozen=True)
class LogprobsProblem(HeadProblem):
    """The same, asked for log-probs and entropies alone, as of an older policy."""

    @staticmethod
    def work(size: Head, frozen: bool = False) -> Work:
        """Forward alone."""
        hidden, weight = size.N * size.H, size.V * size.H
        return Work(2 * hidden * size.V, size.itemsize * (hidden + weight) + 8 * size.N)

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        hidden, weight = self.hidden.to(dtype), self.weight.to(dtype)
        logprobs, entropy = logprobs_by_blocks(hidden, weight, self.targets)
        return {"logprobs": logprobs, "entropy": entropy}


@dataclass(frozen=True)
class LogitsProblem(HeadProblem):
    """The same behind the product: `logits` [N, V] are the input, and the gradient is theirs."""

    @staticmethod
    def work(size: Head, frozen: bool = False) -> Work:
        """Logits in, their gradient out: each is moved once. A row is larger than what a multiprocessor holds, so
        real kernels read twice, unless a cache helps."""
        return Work(0, 2 * size.itemsize * size.N * size.V)

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.hidden @ self.weight.T

    def _logprobs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        blocks = _blocks(self.hidden, self.weight)
        return _joined(selected(self.logits[b].to(dtype), self.targets[b]) for b in blocks)

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        wide = torch.promote_types(dtype, torch.float32)
        logprobs, entropy = self._logprobs(dtype)
        loss, slopes = self._loss_and_slopes(logprobs)
        # The truth is kept in fp32, half the memory of fp64 and far more digits than 16 bits have.
        gradient = torch.empty_like(self.logits, dtype=torch.float32)
        for rows in _blocks(self.hidden, self.weight):
            p = self._logits_gradient(self.logits[rows].to(wide), slopes, rows)
            gradient[rows] = p.to(dtype).float()
        return {"loss": loss, "entropy": entropy, "grad logits": gradient}


@dataclass(frozen=True)
class ScaledLogitsProblem(LogitsProblem):
    """The same, asked for half of each logit: the least that a gradient over the logits costs."""

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        return {"grad logits": self.logits / 2}  # Exact in every dtype.


@dataclass(frozen=True)
class LogitsLogprobsProblem(LogitsProblem):
    """The same, asked for log-probs and entropies alone."""

    @staticmethod
    def work(size: Head, frozen: bool = False) -> Work:
        """Forward alone: the logits are read once."""
        return Work(0, size.itemsize * size.N * size.V + 8 * size.N)

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Results:
        logprobs, entropy = self._logprobs(dtype)
        return {"logprobs": logprobs, "entropy": entropy}


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


def head_contest(
    op: str,
    kind: type[HeadProblem],
    size: Head,
    providers: Sequence[Provider],
    case: str = "",
    axis: str = "",
    **options: Any,
) -> Contest:
    """`options` are those of `make_problem`, and stand in the contest's shape."""
    return Contest(
        op,
        case or size.case,
        {**asdict(size), **options},
        partial(make_problem, kind, size, **options),
        providers,
        kind.work(size, options.get("frozen", False)),
        axis=axis,
    )


@torch.no_grad()
def logprobs_by_blocks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of the products' rows, at least in fp32, a block of rows after the other."""
    return _joined(
        selected(hidden[rows] @ weight.T, targets[rows]) for rows in _blocks(hidden, weight)
    )


@torch.no_grad()
def selected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of logits [N, V], at least in fp32."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _blocks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows whose logits take no more than `_BLOCK_BYTES` in fp64."""
    size = max(1, _BLOCK_BYTES // (8 * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
