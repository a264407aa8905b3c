"""A training step of packed rows, to be held to one sequence at a time through the stock model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from perl.model.families import ImageFeatures
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.vision import StepFeatures
from perl.rollout.engine import Completion
from perl.types import EncodedPrompt, Message, PackedBatch, Segment

Logprobs = dict[tuple[int, int], torch.Tensor]
"""By segment and number of the completion in it, [L] each."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def stock_model(folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )


def segments_of(processor: Processor) -> list[Segment]:
    """Two orders of two unequal images, three images, no image, one; completions of 5, 2, 1 and 0 tokens."""
    rng = np.random.default_rng(0)
    a, b, c = picture(28, 28, 1), picture(90, 60, 2), picture(56, 140, 3)
    chats = [
        ((a, b), "A <image> B <image> which image shows two ?"),
        ((b, a), "A <image> B <image> which image shows two ?"),
        ((c, a, b), "<image> <image> <image> how many images show one ?"),
        ((), "which image"),
        ((c,), "<image> which image"),
    ]
    prompts = [
        processor.encode_messages((Message("user", text),), images) for images, text in chats
    ]
    return [
        Segment(p, tuple(rng.integers(20, 60, n) for n in (5, 2, 1, 0)), (1.0,) * 4, group)
        for p, group in zip(prompts, (0, 0, 1, 2, 3), strict=True)
    ]


def stock_inputs(
    model: nn.Module, prompt: EncodedPrompt, completion: np.ndarray
) -> dict[str, torch.Tensor]:
    """What a stock model of Qwen-VL or InternVL takes for one sequence."""
    ids = torch.tensor(np.concatenate([prompt.input_ids, completion]))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        pixels = torch.cat([i.pixel_values for i in prompt.images])
        inputs["pixel_values"] = pixels.to(next(model.parameters()).dtype)
    if hasattr(model.model, "rope_deltas"):
        inputs["mm_token_type_ids"] = (ids == prompt.image_token_id).int()
        if prompt.images:
            inputs["image_grid_thw"] = torch.tensor([i.grid for i in prompt.images])
    return inputs


def stock_logprobs(model: nn.Module, prompt: EncodedPrompt, completion: np.ndarray) -> torch.Tensor:
    """[L] of one completion behind its prompt, nothing else."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    logits = model(**stock_inputs(model, prompt, completion)).logits
    logits = logits[0, len(prompt.input_ids) - 1 : -1]
    targets = torch.from_numpy(completion)[:, None]
    return logits.log_softmax(-1).gather(1, targets).squeeze(1)


def naive_step(model: nn.Module, segments: list[Segment]) -> Logprobs:
    """One sequence at a time through the stock model; gradients of the weighted log-probs stay on it."""
    out = {}
    for i, r in completions_of(segments):
        logprobs = stock_logprobs(model, segments[i].prompt, segments[i].completions[r])
        (logprobs * weights(i, r, len(logprobs))).sum().backward()
        out[i, r] = logprobs.detach()
    return out


def weights(segment: int, completion: int, length: int) -> torch.Tensor:
    """What the log-probs of a completion are multiplied by in the loss of a step."""
    generator = torch.Generator().manual_seed(100 * segment + completion)
    return torch.randn(length, generator=generator, dtype=torch.float64)


def completions_of(segments: list[Segment]) -> list[tuple[int, int]]:
    """Segment and number of every completion, in order."""
    return [(i, r) for i, s in enumerate(segments) for r in range(len(s.completions))]


def segments_of_samples(
    prompts: Sequence[EncodedPrompt], sampled: Sequence[Sequence[Completion]]
) -> list[Segment]:
    """What an engine sampled, to be scored."""
    return [
        Segment(p, tuple(c.token_ids for c in cs), (1.0,) * len(cs))
        for p, cs in zip(prompts, sampled, strict=True)
    ]


def batch_logprobs(
    policy: Policy, batch: PackedBatch, features: ImageFeatures | None = None
) -> Logprobs:
    logits = policy(batch, features) @ policy.head_weight.T
    targets = batch.targets[:, None].to(logits.device)
    flat = logits.log_softmax(-1).gather(1, targets).squeeze(1)
    parts = flat.split(batch.completion_cu_seqlens.diff().tolist())
    return dict(zip(batch.source, parts, strict=True))


def shared_step(policy: Policy, segments: list[Segment], budget: int) -> Logprobs:
    """In micro-batches of a budget; see `step_of`."""
    return step_of(policy, policy.pack(segments, budget, True))


def step_of(policy: Policy, batches: list[PackedBatch]) -> Logprobs:
    """Images encoded once for all micro-batches; gradients of the weighted log-probs stay on the policy."""
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
