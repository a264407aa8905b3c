"""A question over two pictures that a server answers, and whether its log-probs are the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from perl.model.head import HeadLoss
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import Completion, SamplingParams
from perl.rollout.mismatch import MISMATCH
from perl.types import EncodedPrompt, Message, Segment

PARAMS = SamplingParams(n=4, temperature=1.0, max_new_tokens=16)
BOUND = 1e-4
"""Of float32, where rounding gives 1e-6; of 16 bits it is `MISMATCH`."""


class Probe:
    """The same each time, so that what a server kept of it from earlier weights shows.

    In 16 bits the step of a small learning rate is below rounding: that such an update came is seen by its version alone.
    """

    def __init__(self, policy: Policy, processor: Processor, tolerance: float) -> None:
        self.policy, self.processor = policy, processor
        wide = policy.dtype in (torch.float32, torch.float64)
        self.tolerance = tolerance or (BOUND if wide else MISMATCH)

    @cached_property
    def prompt(self) -> EncodedPrompt:
        draw = np.random.default_rng(0)
        pictures = [Image.fromarray(draw.integers(0, 256, (56, 84, 3), np.uint8)) for _ in range(2)]
        return self.processor.encode_messages([Message("user", "<image> 1 <image> 2")], pictures)

    def apart(self, found: Sequence[Completion]) -> float:
        """Mean |log p(server) - log p(trainer)| of the tokens of completions; weights are whole while it is called."""
        segment = Segment(self.prompt, tuple(c.token_ids for c in found), (0.0,) * len(found))
        head = HeadLoss(self.policy, self.processor.unsampled_token_ids(), PARAMS.temperature)
        (batch,) = self.policy.pack([segment], 2**14, True)
        theirs = np.concatenate([found[i].logprobs for _, i in batch.source])
        return float(np.abs(head.logprobs(batch).logprobs.float().cpu().numpy() - theirs).mean())
