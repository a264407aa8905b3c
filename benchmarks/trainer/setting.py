"""What is run, and what both trainers are given alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

LEARNING_RATE, WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 1e-6, 0.01, (0.9, 0.999), 1.0
CLIP = 0.2
MODELS = ("tiny", "0.6b", "3b", "7b")
"""`tiny` is the demo's model, the others are shapes of `benchmarks/shapes.py`; all with random weights."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One optimizer step, where it runs and how often; see the options of `bench_trainer.py`.

    `images` of each question, one question for each number; `orders` of them; `per_order` completions of each
    order, all of `completion` tokens; `tokens_per_image` visual tokens; `budget` most tokens of a micro-batch,
    padded or packed; `steps` that are timed in each of `rounds`, after one that is not.
    """

    device: str
    model: str
    dtype: Literal["float32", "bfloat16"]
    images: tuple[int, ...]
    orders: int
    per_order: int
    completion: int
    tokens_per_image: int
    budget: int
    steps: int
    rounds: int
    seed: int = 0
    trl_attention: str = "sdpa"

    @property
    def prompts(self) -> int:
        """Ordered prompts of a step."""
        return len(self.images) * self.orders

    @property
    def sequences(self) -> int:
        """Completions of a step."""
        return self.prompts * self.per_order

    @property
    def half(self) -> bool:
        """Whether forward and backward run in bfloat16, over float32 weights."""
        return self.dtype == "bfloat16"

    @property
    def side(self) -> int:
        """Visual tokens along an edge of an image: pictures stay square, so a number that is none is rounded up."""
        return math.ceil(math.sqrt(self.tokens_per_image))

    def padded_micro_batch(self, longest: int) -> int:
        """Most sequences of `longest` tokens within the budget, a divisor of all, as TRL's batches have to be."""
        fits = max(1, self.budget // longest)
        return max(n for n in range(1, fits + 1) if self.sequences % n == 0)


Report = dict[str, Any]
