"""Hidden states and LM head to log-probs and to the loss: perl_kernels against all logits at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import chosen_device
from benchmarks.proof import Checked, Results, near
from perl_kernels import PolicyLoss, linear_grpo_loss, linear_token_logprobs
from perl_kernels.dispatch import Backend

# N tokens, H hidden size, V vocabulary.
SMALL = {"256x256x8192": (256, 256, 8192), "1024x256x8192": (1024, 256, 8192)}
MODELS = {
    "qwen2.5-vl-3b": (8192, 2048, 151_936),
    "qwen2.5-vl-7b": (8192, 3584, 152_064),
    "qwen3-vl-8b": (8192, 4096, 151_936),
}
SHAPES = SMALL | MODELS
LOSS = PolicyLoss.preset("perl")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Sizes of models and Triton where there is a GPU, small ones in PyTorch elsewhere."""
    on_a_gpu = chosen_device(metafunc.config).type == "cuda"
    metafunc.parametrize("shape", MODELS if on_a_gpu else SMALL)
    metafunc.parametrize("implementation", ["eager", "torch", *(["triton"] if on_a_gpu else [])])


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    advantages: Tensor  # [S]
    cu_seqlens: Tensor  # [S+1]
    old: Tensor  # [N]
    ref: Tensor  # [N]

    def double(self) -> Problem:
        hidden, weight = (x.detach().double() for x in (self.hidden, self.weight))
        return replace(self, hidden=hidden.requires_grad_(), weight=weight.requires_grad_())


@functools.cache
def make_problem(shape: str, device: torch.device) -> Problem:
    n, h, v = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) / h**0.5
    targets = torch.randint(v, (n,), generator=generator)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, weight, targets = hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)
    current = logprobs_eager(hidden.double(), weight.double(), targets)["logprobs"]
    # Log-ratios far from the clip bounds: rounding must not decide on which side a token falls.
    shifts = torch.tensor([-0.6, -0.05, 0.05, 0.6, 1.6])
    old, ref = (
        (current + shifts[torch.randint(5, (n,), generator=generator)].to(device)).float()
        for _ in range(2)
    )
    advantages = torch.tensor([1.0, 0.5, -0.7, 1.5, 0.8, -1.2, 0.3, 2.0], device=device)
    cu_seqlens = torch.arange(9, dtype=torch.int32, device=device) * (n // 8)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    return Problem(hidden, weight, targets, advantages, cu_seqlens, old, ref)


def logprobs_eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(logits, 1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(1)
    return {"logprobs": log_probs.gather(1, targets[:, None])[:, 0], "entropy": entropy}


def loss_eager(p: Problem) -> dict[str, Tensor]:
    """The preset `perl`: clip 0.2, dual clip 3, k3 with 0.01, mean over all tokens."""
    out = logprobs_eager(p.hidden, p.weight, p.targets)
    ratio = torch.exp(out["logprobs"] - p.old)
    advantages = p.advantages.repeat_interleave(p.cu_seqlens.diff(), output_size=len(p.targets))
    policy = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    policy = torch.where(advantages < 0, torch.minimum(policy, -3 * advantages), policy)
    toward_ref = p.ref - out["logprobs"]
    loss = (policy + 0.01 * (toward_ref.exp() - toward_ref - 1)).mean()
    return with_gradients(p, loss, out["entropy"])


def loss_fused(p: Problem, backend: Backend) -> dict[str, Tensor]:
    out = linear_grpo_loss(
        p.hidden,
        p.weight,
        p.targets,
        p.advantages,
        p.cu_seqlens,
        LOSS,
        old_logprobs=p.old,
        ref_logprobs=p.ref,
        backend=backend,
    )
    return with_gradients(p, out.loss, out.entropy)


def with_gradients(p: Problem, loss: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    hidden, weight = torch.autograd.grad(loss, (p.hidden, p.weight))
    return {"loss": loss.detach(), "entropy": entropy, "grad hidden": hidden, "grad weight": weight}


@functools.cache
def loss_proof(shape: str, device: torch.device) -> Callable[[Results], None]:
    p = make_problem(shape, device)
    return near(loss_eager(p.double()), loss_eager(p), p.hidden.dtype)


@functools.cache
@torch.no_grad()
def logprobs_proof(shape: str, device: torch.device) -> Callable[[Results], None]:
    p = make_problem(shape, device)
    truth, plain = (logprobs_eager(x.hidden, x.weight, x.targets) for x in (p.double(), p))
    return near(truth, plain, p.hidden.dtype)


def test_linear_grpo_loss(
    checked: Checked, device: torch.device, shape: str, implementation: Any
) -> None:
    """Forward and backward, with the gradients of hidden states and head."""
    p = make_problem(shape, device)
    n, h, v = SHAPES[shape]
    checked(
        lambda: loss_eager(p) if implementation == "eager" else loss_fused(p, implementation),
        loss_proof(shape, device),
        group=f"linear_grpo_loss, forward and backward, N={n} H={h} V={v}",
        # Three products of 2NHV: logits, gradient of the hidden states, gradient of the head.
        flops=6 * n * h * v,
    )


def test_linear_token_logprobs(
    checked: Checked, device: torch.device, shape: str, implementation: Any
) -> None:
    """Forward alone, as for the log-probs of an older policy."""
    p = make_problem(shape, device)

    @torch.no_grad()
    def run() -> dict[str, Tensor]:
        if implementation == "eager":
            return logprobs_eager(p.hidden, p.weight, p.targets)
        return linear_token_logprobs(
            p.hidden, p.weight, p.targets, backend=implementation
        )._asdict()

    n, h, v = SHAPES[shape]
    checked(
        run,
        logprobs_proof(shape, device),
        group=f"linear_token_logprobs, forward, N={n} H={h} V={v}",
        # The logits: 2NHV.
        flops=2 * n * h * v,
    )
