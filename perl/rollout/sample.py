"""Prompts in, rollouts out: the one place where completions are asked for and become rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from perl.model.processor import Processor
from perl.rollout.engine import Completion, Ended, Engine, SamplingParams
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
        _rollouts(processor, pair, completions)
        for pair, completions in zip(shown, sampled, strict=True)
    ]


class Sampling:
    """Rollouts that are being sampled: `counts[i]` of variant i, in place of `params.n`; those that want equally many are
    sampled together.

    Args:
        seed_of: the seed of a batch, given its number from 0 (the smallest count first) and its count.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        shown: Sequence[Shown],
        counts: Sequence[int],
        params: SamplingParams,
        seed_of: Callable[[int, int], int],
    ) -> None:
        self.processor, self.shown = processor, shown
        self._none = [i for i, count in enumerate(counts) if not count]
        self._begun: list[tuple[list[int], Ended]] = []
        for number, count in enumerate(sorted({count for count in counts if count})):
            members = [i for i, n in enumerate(counts) if n == count]
            prompts = [shown[i][1] for i in members]
            seed = seed_of(number, count)
            self._begun.append((members, engine.begin(prompts, replace(params, n=count), seed)))

    def __iter__(self) -> Iterator[tuple[int, list[Rollout]]]:
        """The number of each variant and its rollouts, as they end."""
        yield from ((i, []) for i in self._none)
        for members, ended in self._begun:
            for place, completions in ended:
                i = members[place]
                yield i, _rollouts(self.processor, self.shown[i], completions)

    def all(self) -> list[list[Rollout]]:
        """Those of each variant, in their sequence."""
        found = dict(self)
        return [found[i] for i in range(len(self.shown))]

    def close(self) -> None:
        """Give up what has not ended."""
        for _, ended in self._begun:
            ended.close()


def _rollouts(
    processor: Processor, shown: Shown, completions: Sequence[Completion]
) -> list[Rollout]:
    return [
        Rollout(
            *shown,
            c.token_ids,
            c.logprobs,
            processor.decode(c.token_ids),
            c.finished,
            c.weight_versions,
        )
        for c in completions
    ]
