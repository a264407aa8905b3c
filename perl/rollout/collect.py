"""From examples to groups with signal: permute, generate, reward, filter, refill."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from perl.config import Config, part_name
from perl.data.streams import Drawn
from perl.distributed import Processes
from perl.permutation import Order, is_permuted, orders, permute, rate_at, released_orders, shares
from perl.rewards.scorer import Scorer
from perl.rollout.advantages import advantages_of, group_mean, group_weight
from perl.rollout.engine import InProcessEngine
from perl.rollout.filtering import GroupFilter, unscorable
from perl.rollout.prompts import PromptEncoder
from perl.rollout.reuse import Reuse
from perl.rollout.sample import sample_counts
from perl.timing import Stopwatch, span
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
    """Groups with signal over the batch size, which this step does not use."""
    short: int = 0
    """Groups that the batch lacks after all tries."""
    late: list[Group] = field(default_factory=list)
    """Those of `groups` that earlier steps sampled: surplus of theirs, and replayed ones."""
    replayed: int = 0
    """How many of the late ones are replayed."""
    ages: list[int] = field(default_factory=list)
    """How many steps ago the others of the late ones were sampled."""
    faults: dict[str, int] = field(default_factory=dict)
    """Rollouts that a reward function failed on, by its name."""
    rate: float = 1.0
    """The permutation rate of the step."""
    counts: dict[str, int] = field(default_factory=dict)
    """Groups by what the filter found them to be."""
    dropped: int = 0
    """Examples left out because a prompt of theirs is over the budget."""


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
        self.filter = GroupFilter(
            config.filter.zero_variance,
            config.filter.min_accuracy,
            config.filter.max_accuracy,
            part_name(config.reward.functions, config.filter.measure) or config.filter.measure,
        )
        self.reuse = Reuse(config.filter)
        self.seed = config.run.seed
        """Of image orders and of the coin that decides about them."""

    def collect(
        self,
        draw: Callable[[], list[Drawn]],
        find: Callable[[Sequence[int]], Example],
        count: int,
        step: int,
        seed: int,
        processes: Processes,
        progress: float = 0.0,
    ) -> Collected:
        """Groups for one step; processes try equally often, so that they stay at one place in the data.

        Args:
            draw: gives the next examples of the data.
            find: gives an example that was drawn before, by its key.
            count: groups wanted, replayed ones not counted.
            step: of the stage.
            seed: of the sampling; the same one gives the same groups.
            processes: that share the step.
            progress: share of the stage that is done, 0 to 1, for the permutation rate.
        """
        out = Collected(rate=self._rate(progress))
        self.filter.reset()
        self.scorer.reset_faults()
        dropped_before = self.encoder.dropped
        rebuild = partial(self._rebuild, find)
        keys: dict[int, tuple[int, ...]] = {}
        with processes.jointly():
            out.ages = self.reuse.ages(count, step)
            out.late += self.reuse.waiting(count, rebuild)
        fresh: list[Group] = []
        wanted = count - len(out.late)
        while out.tries < self.config.filter.max_tries and not (
            self.config.filter.reuse_surplus and processes.every(len(fresh) >= wanted)
        ):
            with processes.jointly():
                with span("data"):
                    drawn = draw()
                groups = self.roll_out(
                    drawn, seed * self.config.filter.max_tries + out.tries, progress
                )
                keys |= {id(d.example): d.key for d in drawn}
                out.seen += groups
                fresh += self.filter(groups)
            out.tries += 1
            if processes.every(len(fresh) >= wanted):
                break
        self._check_seen(out, self.encoder.dropped - dropped_before, processes)
        with processes.jointly():
            again = self.reuse.again(seed, rebuild, processes.index, processes.count)
        trained, surplus = fresh[:wanted], fresh[wanted:]
        self.reuse.keep(trained, surplus, lambda group: keys[id(group.example)], step, count)
        out.groups = [*out.late, *trained, *again]
        out.late += again
        out.replayed, out.surplus = len(again), len(surplus)
        out.short = wanted - len(trained)
        out.counts, out.faults = self.filter.counts, dict(self.scorer.faults)
        out.dropped = self.encoder.dropped - dropped_before
        self.filter.tell_shortfall(count - out.short, count, out.tries)
        return out

    def _check_seen(self, out: Collected, dropped: int, processes: Processes) -> None:
        """Raise UserError if a step that rolled out has nothing to look at, in no try and no process."""
        scorable = sum(int((~np.isnan(group.rewards)).sum()) for group in out.seen)
        tries, seen, found = processes.total(out.tries, len(out.seen), scorable)
        with processes.jointly():
            if tries and not seen:
                raise UserError(
                    f"all {dropped} examples drawn have prompts over "
                    f"{self.encoder.limit.name}; raise it or lower model.max_pixels"
                )
            if seen and not found:
                raise unscorable(out.seen, int(seen))

    def _rebuild(
        self, find: Callable[[Sequence[int]], Example], key: Sequence[int], orders: Sequence[Order]
    ) -> list[tuple[Variant, EncodedPrompt]] | None:
        """The variants of an example that was rolled out before, with their prompts."""
        example = find(key)
        variants = [permute(example, order, self.config.permutation.text) for order in orders]
        return self.encoder.encode(variants) or None

    def _rate(self, progress: float) -> float:
        permutation = self.config.permutation
        return rate_at(permutation.rate, permutation.rate_schedule, progress)

    def roll_out(self, examples: Sequence[Drawn], seed: int, progress: float = 0.0) -> list[Group]:
        """One group per example: its rollouts over its orders, scored."""
        config = self.config
        rate = self._rate(progress)
        with self.watch("permute"):
            per_example = [
                [permute(e, o, config.permutation.text) for o in self._orders(e, epoch, rate)]
                for _, epoch, e in examples
            ]
        with self.watch("preprocess"):
            encoded = [shown for v in per_example if (shown := self.encoder.encode(v))]
        rollouts_of = config.permutation.orders * config.rollout.per_order
        counts = [n for shown in encoded for n in shares(rollouts_of, len(shown))]
        with self.watch("rollout"):
            sampled = iter(
                sample_counts(
                    self.engine,
                    self.encoder.processor,
                    [pair for shown in encoded for pair in shown],
                    counts,
                    config.rollout.temperature,
                    config.rollout.max_new_tokens,
                    # The first seed is the step's own; the others are far from those of other steps.
                    lambda number, _: seed + (number << 56),
                )
            )
        return self._score([[r for _ in shown for r in next(sampled)] for shown in encoded])

    def _orders(self, example: Example, epoch: int, rate: float) -> list[Order]:
        permutation, seed = self.config.permutation, self.seed
        if not is_permuted(example, rate, seed, epoch):
            return orders(example, 1, seed, epoch)
        if permutation.draw == "released":
            return released_orders(example)[: permutation.orders]
        return orders(example, permutation.orders, seed, epoch)

    def _score(self, rollouts: Sequence[Sequence[Rollout]]) -> list[Group]:
        with self.watch("reward"):
            totals, parts = self.scorer.score_rollouts([r for group in rollouts for r in group])
            ends = np.cumsum([len(group) for group in rollouts])[:-1]
            advantages = advantages_of(
                np.split(totals, ends) if rollouts else [],
                [_order_numbers(group) for group in rollouts],
                self.config.advantage,
            )
        groups, start = [], 0
        for group, advantage in zip(rollouts, advantages, strict=True):
            own = slice(start, start + len(group))
            start += len(group)
            weight = self._weight({name: values[own] for name, values in parts.items()})
            groups.append(
                Group(
                    example=group[0].variant.example,
                    variants=tuple({r.variant.order: r.variant for r in group}.values()),
                    rollouts=tuple(group),
                    rewards=totals[own],
                    reward_parts={name: values[own] for name, values in parts.items()},
                    advantages=advantage * np.float32(weight),
                )
            )
        return groups

    def _weight(self, parts: dict[str, np.ndarray]) -> float:
        """How much a group counts, by the mean of one of its rewards."""
        config = self.config.reward
        if config.group_weight == "none":
            return 1.0
        values = parts[str(part_name(config.functions, config.group_weight_of))]
        return group_weight(group_mean(values), config.group_weight, config.group_weight_power)


def _order_numbers(rollouts: Sequence[Rollout]) -> np.ndarray:
    """int64 [R]: which of the group's orders each rollout saw, in the sequence they were rolled out."""
    number = {order: i for i, order in enumerate(dict.fromkeys(r.variant.order for r in rollouts))}
    return np.array([number[r.variant.order] for r in rollouts], dtype=np.int64)
