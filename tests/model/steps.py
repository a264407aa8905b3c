"""A training step of packed rows, to be held to one sequence at a time through the stock model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from perl.model.families import ImageFeatures
from perl.model.policy import Policy
from perl.model.vision import StepFeatures
from perl.types import PackedBatch, Segment

Logprobs = dict[tuple[int, int], torch.Tensor]
"""By segment and number of the completion in it, [L] each."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def stock_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )


def weights(segment: int, completion: int, length: int) -> torch.Tensor:
    """What the log-probs of a completion are multiplied by in the loss of a step."""
    generator = torch.Generator().manual_seed(100 * segment + completion)
    return torch.randn(length, generator=generator, dtype=torch.float64)


def completions_of(segments: list[Segment]) -> list[tuple[int, int]]:
    """Segment and number of every completion, in order."""
    return [(i, r) for i, s in enumerate(segments) for r in range(len(s.completions))]


def batch_logprobs(
    policy: Policy, batch: PackedBatch, features: ImageFeatures | None = None
) -> Logprobs:
    logits = policy(batch, features) @ policy.head_weight.T
    targets = batch.targets[:, None].to(logits.device)
    flat = logits.log_softmax(-1).gather(1, targets).squeeze(1)
    parts = flat.split(batch.completion_cu_seqlens.diff().tolist())
    return dict(zip(batch.source, parts, strict=True))


def shared_step(
    policy: Policy, segments: list[Segment], budget: int, share: bool = True
) -> Logprobs:
    """In micro-batches of a budget, images encoded once for all; gradients of the weighted log-probs stay on the policy."""
    return step_of(policy, policy.pack(segments, budget, share))


def step_of(policy: Policy, batches: list[PackedBatch]) -> Logprobs:
    """The same for micro-batches in an order of one's own."""
    out: Logprobs = {}
    features = StepFeatures(policy.vision.encode, batches) if policy.vision.trained else None
    for number, batch in enumerate(batches):
        with features.of(number) if features else nullcontext() as shared:
            logprobs = batch_logprobs(policy, batch, shared)
            sum((x * weights(*at, len(x)).to(x)).sum() for at, x in logprobs.items()).backward()
        out |= {at: x.detach() for at, x in logprobs.items()}
    return out


def furthest_value(got: Logprobs, expected: Logprobs) -> float:
    """Largest difference of a log-prob; both must hold the same completions."""
    assert got.keys() == expected.keys()
    return max((got[at] - e).abs().max().item() for at, e in expected.items() if len(e))


def furthest_gradient(policy: Policy, stock: nn.Module) -> tuple[float, int]:
    """max|d gradient| / max|gradient| over the parameters that are trained, and how many were compared.

    Left out is what has no gradient but rounding, as the bias of a key.
    """
    theirs = {n: p.grad for n, p in stock.named_parameters()}
    off = []
    for name, parameter in policy.model.named_parameters():
        exact = theirs[name]
        if not parameter.requires_grad or exact is None or exact.abs().max() < 1e-14:
            continue
        assert parameter.grad is not None, name
        off.append(((parameter.grad - exact).abs().max() / exact.abs().max()).item())
    return max(off), len(off)
