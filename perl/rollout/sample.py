"""Prompts in, rollouts out: the one place where completions are asked for and become rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from perl.model.processor import Processor
from perl.rollout.engine import Engine, SamplingParams
from perl.rollout.prompts import Shown
from perl.types import Rollout


def sample(
    engine: Engine,
    processor: Processor,
    shown: Sequence[Shown],
    params: SamplingParams,
    seed: int,
) -> list[list[Rollout]]:
    """`params.n` rollouts of each variant; the same seed gives the same ones."""
    sampled = engine.generate([prompt for _, prompt in shown], params, seed)
    return [
        [
            Rollout(
                variant,
                prompt,
                c.token_ids,
                c.logprobs,
                processor.decode(c.token_ids),
                c.finished,
                c.weight_versions,
            )
            for c in completions
        ]
        for (variant, prompt), completions in zip(shown, sampled, strict=True)
    ]


def sample_counts(
    engine: Engine,
    processor: Processor,
    shown: Sequence[Shown],
    counts: Sequence[int],
    params: SamplingParams,
    seed_of: Callable[[int, int], int],
) -> list[list[Rollout]]:
    """`counts[i]` rollouts of variant i, in place of `params.n`; those that want equally many are sampled together.

    Args:
        seed_of: the seed of a batch, given its number from 0 (the smallest count first) and its count.
    """
    out: list[list[Rollout]] = [[] for _ in shown]
    for number, count in enumerate(sorted({count for count in counts if count})):
        members = [i for i, n in enumerate(counts) if n == count]
        own, seed = [shown[i] for i in members], seed_of(number, count)
        rollouts = sample(engine, processor, own, replace(params, n=count), seed)
        for i, completions in zip(members, rollouts, strict=True):
            out[i] = completions
    return out
