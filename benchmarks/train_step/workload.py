"""What one optimizer step is made of: questions over images, in several orders, each continued several times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.harness.models import special_tokens
from perl.config import AdvantageConfig
from perl.model.families import Family
from perl.rollout.advantages import advantages_of
from perl.types import EncodedImage, EncodedPrompt, Segment

_TEXT_TOKENS = 64
"""Of a prompt: the question, and what stands around its images."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step; the defaults are the paper's.

    `images` of each question; `orders` of them; `rollouts` of each order; `completion` tokens of one on
    average, `tokens_per_image` likewise; both are uniform from 70 % to 130 % of that.
    """

    images: tuple[int, ...] = (4, 8)
    orders: int = 2
    rollouts: int = 6
    completion: int = 512
    tokens_per_image: int = 330
    seed: int = 0

    def segments(self, config: Any, family: Family) -> list[Segment]:
        """A segment for each order of each question; the images of a question have equal keys in all of them.

        Args:
            config: of the model: token ids, and the sizes of its patches.
        """
        rng = np.random.default_rng(self.seed)
        of_group = self.orders * self.rollouts
        rewards = np.concatenate([rng.normal(size=of_group) for _ in self.images])
        sizes = [of_group] * len(self.images)
        advantages_of_all = advantages_of(rewards, sizes, sizes, AdvantageConfig())
        segments = []
        for group, (number, advantages) in enumerate(
            zip(self.images, advantages_of_all.reshape(-1, of_group), strict=True)
        ):
            images = [self._image(f"{group}-{k}", config.vision_config, rng) for k in range(number)]
            text = _text(rng, config, _TEXT_TOKENS)
            for order, weights in zip(
                self._orders(number, rng), advantages.reshape(self.orders, -1), strict=True
            ):
                prompt = _prompt([images[k] for k in order], text, config, family)
                completions = tuple(_text(rng, config, n) for n in self._lengths(rng))
                segments.append(Segment(prompt, completions, tuple(weights.tolist()), group))
        return segments

    def _image(self, key: str, vision: Any, rng: np.random.Generator) -> EncodedImage:
        tokens = self.tokens_per_image * rng.uniform(0.7, 1.3)
        height = max(1, round(math.sqrt(tokens * rng.uniform(0.6, 1.6))))
        width = max(1, round(tokens / height))
        merge = vision.spatial_merge_size
        grid = (1, merge * height, merge * width)
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = rng.normal(size=(math.prod(grid), channels)).astype(np.float32)
        return EncodedImage(key, torch.from_numpy(pixels), grid, height * width, merge)

    def _orders(self, number: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Different orders, the original one first."""
        orders = {tuple(range(number)): None}
        while len(orders) < self.orders:
            orders[tuple(int(k) for k in rng.permutation(number))] = None
        return list(orders)

    def _lengths(self, rng: np.random.Generator) -> list[int]:
        least, most = math.ceil(0.7 * self.completion), math.floor(1.3 * self.completion)
        return rng.integers(least, most + 1, self.rollouts).tolist()


def one_each(segments: Sequence[Segment]) -> list[Segment]:
    """A segment for every completion, with its own prompt and its own images: equal pixels under different keys."""
    return [
        replace(
            s,
            prompt=replace(
                s.prompt,
                images=tuple(
                    replace(image, key=f"{image.key} {i} {r}") for image in s.prompt.images
                ),
            ),
            completions=(completion,),
            advantages=(s.advantages[r],),
        )
        for i, s in enumerate(segments)
        for r, completion in enumerate(s.completions)
    ]


def _text(rng: np.random.Generator, config: Any, tokens: int) -> np.ndarray:
    """Any tokens but the special ones; embeddings of the others are all alike, as weights are random."""
    words = np.setdiff1d(np.arange(config.text_config.vocab_size), special_tokens(config))
    return rng.choice(words, tokens)


def _prompt(
    images: Sequence[EncodedImage], text: np.ndarray, config: Any, family: Family
) -> EncodedPrompt:
    half = len(text) // 2
    shown = [
        part
        for image in images
        for part in (
            [config.vision_start_token_id],
            [config.image_token_id] * image.tokens,
            [config.vision_end_token_id],
        )
    ]
    ids = np.concatenate([text[:half], *shown, text[half:]]).astype(np.int64)
    positions, following = family.positions(ids, images, config.image_token_id)
    return EncodedPrompt(ids, positions, following, tuple(images), config.image_token_id)
