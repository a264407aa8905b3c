"""What a vLLM engine is checked with, on a server of ours and on real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from perl.model.head import HeadLoss
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import Completion
from perl.types import EncodedPrompt, Message, Segment


def prompt(processor: Processor, *order: int) -> EncodedPrompt:
    """Pictures of one, two and four tokens, the last of which is resized."""
    draw = np.random.default_rng(0)
    sizes = ((28, 28), (28, 56), (45, 70))
    pictures = [Image.fromarray(draw.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]
    question = "A <image> B <image> C <image> Which image shows 3"
    return processor.encode_messages([Message("user", question)], [pictures[i] for i in order])


def differences(
    policy: Policy, processor: Processor, prompt: EncodedPrompt, found: Sequence[Completion]
) -> list[np.ndarray]:
    """log p(engine) - log p(trainer) of the tokens of each completion."""
    segment = Segment(prompt, tuple(c.token_ids for c in found), (0.0,) * len(found))
    head = HeadLoss(policy, processor.unsampled_token_ids(), 1.0)
    out = {}
    for batch in policy.pack([segment], 4096, True):
        ours = head.logprobs(batch).logprobs.numpy()
        ends = batch.completion_cu_seqlens.tolist()
        for (_, i), start, end in zip(batch.source, ends, ends[1:], strict=False):
            out[i] = found[i].logprobs - ours[start:end]
    return [out[i] for i in range(len(found))]


def apart(
    policy: Policy, processor: Processor, prompt: EncodedPrompt, found: Sequence[Completion]
) -> float:
    """Most |log p(engine) - log p(trainer)| of the tokens of some completions."""
    return max(float(np.abs(d).max()) for d in differences(policy, processor, prompt, found))


def changed(policy: Policy) -> None:
    """Head and tower in a step as large as none in training is."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
