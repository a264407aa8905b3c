"""From examples to groups with signal: permute, generate, reward, filter, refill."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from perl.config import Config
from perl.filtering import GroupFilter
from perl.loss import advantages_of
from perl.metrics import Stopwatch
from perl.permutation import orders, permute
from perl.processes import Processes
from perl.processor import Processor
from perl.reward import Scorer
from perl.rollout import InProcessEngine, SamplingParams
from perl.types import EncodedPrompt, Example, Group, Rollout, UserError, Variant

logger = logging.getLogger(__name__)


@dataclass
class Collected:
    """The groups of one step, and what became of all that were rolled out."""

    groups: list[Group] = field(default_factory=list)
    seen: list[Group] = field(default_factory=list)
    """Every group that was rolled out, the dropped ones included."""
    tries: int = 0
    surplus: int = 0
    """Groups with signal over the batch size, which were not used."""
    counts: dict[str, int] = field(default_factory=dict)
    """Groups by what the filter found them to be."""
    dropped: int = 0
    """Examples left out because a prompt of theirs is over the budget."""


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """Most tokens of a prompt, the setting that says so, and what to do about a longer one."""

    tokens: int
    name: str
    advice: str = 'raise it, lower model.max_pixels, or set data.overlong = "drop"'

    @classmethod
    def to_generate(cls, config: Config) -> PromptLimit:
        """`data.max_prompt_tokens`."""
        wanted = config.data.max_prompt_tokens
        return cls(wanted, f"data.max_prompt_tokens = {wanted}")

    @classmethod
    def to_train(cls, config: Config) -> PromptLimit:
        """That, or what a micro-batch leaves beside the longest completion if it is less."""
        budget, completion = config.train.tokens_per_micro_batch, config.rollout.max_new_tokens
        if budget - completion < config.data.max_prompt_tokens:
            name = (
                f"the {budget - completion} that train.tokens_per_micro_batch = {budget} "
                f"leaves beside rollout.max_new_tokens = {completion}"
            )
            return cls(budget - completion, name)
        return cls.to_generate(config)


class PromptEncoder:
    """Tokens of variants within the prompt budget."""

    def __init__(self, processor: Processor, limit: PromptLimit, overlong: str) -> None:
        self.processor, self.limit, self.overlong = processor, limit, overlong
        self.dropped = 0

    def encode(self, variants: Sequence[Variant]) -> list[EncodedPrompt] | None:
        """Prompts of one example's variants; None if they are over the budget and are to be dropped.

        Raises:
            UserError: over the budget and `overlong` is "error".
        """
        prompts = [self.processor.encode(v) for v in variants]
        longest = max(len(p.input_ids) for p in prompts)
        if longest <= self.limit.tokens:
            return prompts
        if self.overlong == "error":
            raise UserError(
                f"example {variants[0].example.id}: its prompt has {longest} tokens, over {self.limit.name}; "
                f"{self.limit.advice}"
            )
        if not self.dropped:
            logger.warning(
                "example %s is left out: its prompt has %d tokens, over %s (said once; metrics.jsonl counts them as "
                "prompts/dropped)",
                variants[0].example.id,
                longest,
                self.limit.name,
            )
        self.dropped += 1
        return None


class Collector:
    """Rolls examples out in several image orders until a batch of groups with signal is full."""

    def __init__(
        self,
        config: Config,
        engine: InProcessEngine,
        encoder: PromptEncoder,
        scorer: Scorer,
        watch: Stopwatch,
    ) -> None:
        self.config, self.engine, self.encoder, self.scorer, self.watch = (
            config,
            engine,
            encoder,
            scorer,
            watch,
        )
        self.filter = GroupFilter(config.filter.zero_variance)
        self._said_nothing_learnt = False

    def collect(
        self,
        draw: Callable[[], list[tuple[int, Example]]],
        count: int,
        seed: int,
        processes: Processes,
    ) -> Collected:
        """Groups for one step; processes try equally often, so that they stay at one place in the data.

        Args:
            draw: gives the next examples of the data, each with its epoch.
            count: groups wanted.
            seed: of the sampling; the same one gives the same groups.
            processes: that share the step.
        """
        out = Collected()
        self.filter.reset()
        dropped_before = self.encoder.dropped
        while out.tries < self.config.filter.max_tries:
            with processes.jointly():
                groups = self.roll_out(draw(), seed * self.config.filter.max_tries + out.tries)
                out.seen += groups
                out.groups += self.filter(groups)
            out.tries += 1
            if processes.every(len(out.groups) >= count):
                break
        with processes.jointly():
            if not out.seen:
                raise UserError(
                    f"all {self.encoder.dropped - dropped_before} examples drawn have prompts over "
                    f"{self.encoder.limit.name}; raise it or lower model.max_pixels"
                )
        out.surplus = max(0, len(out.groups) - count)
        del out.groups[count:]
        out.counts = self.filter.counts
        out.dropped = self.encoder.dropped - dropped_before
        if not out.groups and not self._said_nothing_learnt:
            self._said_nothing_learnt = True
            logger.warning(
                "no group of %d has signal: a step learns nothing (said once; metrics.jsonl has groups/kept)",
                len(out.seen),
            )
        return out

    def roll_out(self, examples: Sequence[tuple[int, Example]], seed: int) -> list[Group]:
        """One group per example, given with its epoch: every order, `per_order` completions each, scored."""
        config = self.config
        with self.watch("permute"):
            per_example = [
                [
                    permute(e, o)
                    for o in orders(e, config.permutation.orders, config.run.seed, epoch)
                ]
                for epoch, e in examples
            ]
        with self.watch("preprocess"):
            encoded = [(v, p) for v in per_example if (p := self.encoder.encode(v)) is not None]
        params = SamplingParams(
            config.rollout.per_order, config.rollout.temperature, config.rollout.max_new_tokens
        )
        flat = [prompt for _, prompts in encoded for prompt in prompts]
        with self.watch("rollout"):
            completions = self.engine.generate(flat, params, seed)
        rollouts: list[list[Rollout]] = []
        start = 0
        for variants, prompts in encoded:
            mine = completions[start : start + len(prompts)]
            start += len(prompts)
            rollouts.append(
                [
                    Rollout(
                        v,
                        p,
                        c.token_ids,
                        c.logprobs,
                        self.encoder.processor.decode(c.token_ids),
                        c.finished,
                    )
                    for v, p, cs in zip(variants, prompts, mine, strict=True)
                    for c in cs
                ]
            )
        return self._score(rollouts)

    def _score(self, rollouts: Sequence[Sequence[Rollout]]) -> list[Group]:
        with self.watch("reward"):
            totals, parts = self.scorer.score_rollouts([r for group in rollouts for r in group])
            ends = np.cumsum([len(group) for group in rollouts])[:-1]
            advantages = advantages_of(np.split(totals, ends)) if rollouts else []
        groups, start = [], 0
        for group, advantage in zip(rollouts, advantages, strict=True):
            span = slice(start, start + len(group))
            start += len(group)
            groups.append(
                Group(
                    example=group[0].variant.example,
                    variants=tuple({r.variant.order: r.variant for r in group}.values()),
                    rollouts=tuple(group),
                    rewards=totals[span],
                    reward_parts={name: values[span] for name, values in parts.items()},
                    advantages=advantage,
                )
            )
        return groups
