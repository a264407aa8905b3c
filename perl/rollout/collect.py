"""From examples to groups with signal: permute, generate, reward, filter, refill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from perl.config import part_name
from perl.data.streams import Drawn
from perl.distributed import Processes
from perl.permutation import Order, is_permuted, orders, permute, rate_at, released_orders, shares
from perl.recipe import Stage
from perl.rewards.columns import TrainerState
from perl.rewards.scorer import Scorer
from perl.rollout.advantages import advantages_of, group_mean, group_weight
from perl.rollout.engine import Engine, SamplingParams
from perl.rollout.filtering import GroupFilter, unscorable
from perl.rollout.prompts import PromptEncoder, Shown
from perl.rollout.replay import Replay
from perl.rollout.sample import Sampling
from perl.timing import Stopwatch
from perl.types import Example, Group, Rollout, UserError


class Source(Protocol):
    """Where a process gets its examples from."""

    def draw(self, count: int) -> list[Drawn]:
        """This process's share of the next `count` examples of all processes."""
        ...

    def find(self, key: Sequence[int]) -> Example:
        """An example that was drawn before."""
        ...


@dataclass
class Collected:
    """The groups of one step, and what became of all that were rolled out."""

    groups: list[Group]
    """To train on: those that waited since earlier steps, this step's own, then the replayed ones."""
    seen: list[Group]
    """Every group that this step rolled out, the dropped ones included."""
    replayed: int
    """How many of `groups` are replayed."""
    overflow: int
    """Groups with signal over the batch size, which this step does not use."""
    short: int
    """Groups that the batch lacks after all tries."""
    tries: int
    rate: float
    """The permutation rate of the step."""
    dropped: int
    """Examples left out because a prompt of theirs is over the budget."""
    late: int = 0
    """Groups that `rollout.surplus` did not wait for."""
    ages: list[int] = field(default_factory=list)
    """How many steps ago each of the groups that waited was sampled."""
    faults: dict[str, int] = field(default_factory=dict)
    """Rollouts that a reward function failed on, by its name."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """The metrics that reward functions logged, by name."""
    counts: dict[str, int] = field(default_factory=dict)
    """Groups by what the filter found them to be."""


def drawn_orders(stage: Stage, example: Example, rate: float, epoch: int) -> list[Order]:
    """The image orders that an example is rolled out in; the original one alone where it is not permuted."""
    permutation = stage.config.permutation
    # A later stage of the same kind gets others.
    seed = stage.config.run.seed + 1_000_003 * stage.number
    if not is_permuted(example, rate, seed, epoch):
        return orders(example, 1, seed, epoch)
    if permutation.draw == "released":
        return released_orders(example)[: permutation.orders]
    return orders(example, permutation.orders, seed, epoch)


@dataclass
class Batch:
    """Examples that are being rolled out."""

    collector: Collector
    all_drawn: Sequence[Drawn]
    """Those whose prompts are over the budget too."""
    drawn: Sequence[Drawn]
    counts: Sequence[Sequence[int]]
    """Of each example the rollouts of each of its orders."""
    sampling: Sampling
    step: int
    dropped: int
    """Examples that were left out for their prompts."""
    left: int = 0
    """Groups that were given up."""

    def groups(self) -> Iterator[list[Group]]:
        """All groups at once, in the sequence of their examples."""
        with self.collector.watch("rollout"):
            sampled = self.sampling.all()
        yield self.collector.scored(self.drawn, self.counts, sampled, self.step)

    def groups_as_they_end(self) -> Iterator[list[Group]]:
        """One by one; those that have not ended when the iterator is closed are given up."""
        owners = [i for i, own in enumerate(self.counts) for _ in own]
        found: dict[int, dict[int, list[Rollout]]] = {i: {} for i in range(len(self.drawn))}
        self.left, ended = len(self.drawn), iter(self.sampling)
        try:
            while self.left:
                with self.collector.watch("rollout"):
                    variant, rollouts = next(ended)
                i = owners[variant]
                found[i][variant] = rollouts
                if len(found[i]) < len(self.counts[i]):
                    continue
                self.left -= 1
                sampled = [own for _, own in sorted(found.pop(i).items())]
                yield self.collector.scored([self.drawn[i]], [self.counts[i]], sampled, self.step)
        finally:
            self.sampling.close()


class Collector:
    """Rolls a stage's examples out in several image orders until a batch of groups with signal is full."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        encoder: PromptEncoder,
        scorer: Scorer,
        watch: Stopwatch,
    ) -> None:
        self.config, self.first_step = stage.config, stage.first_step
        self.engine, self.encoder, self.scorer, self.watch = engine, encoder, scorer, watch
        config = self.config
        self.filter = GroupFilter(
            config.filter.zero_variance,
            config.filter.min_accuracy,
            config.filter.max_accuracy,
            part_name(config.reward.functions, config.filter.measure) or config.filter.measure,
        )
        self.replay = Replay(config.filter)
        self.stage = stage
        self._ahead: Batch | None = None

    def collect(self, source: Source, processes: Processes, step: int) -> Collected:
        """This process's groups for one step of the stage.

        All processes make the same number of tries, so that their streams stay in step: one is made while any lacks groups.

        Raises:
            UserError: not a single rollout of the step can be scored, or no prompt fits the budget.
        """
        config = self.config
        wanted = config.train.examples_per_step // processes.count
        progress = step / config.train.steps
        seed = self._seed(processes, step)
        self.filter.reset()
        self.scorer.reset()
        dropped = 0
        rebuild = partial(self._rebuild, source.find)
        # A UserError in one process must stop all; otherwise the rest hang in a collective.
        with processes.jointly():
            waited = self.replay.take_overflow(wanted, rebuild)
        lacking, tries, late = wanted - len(waited), 0, 0
        seen: list[Group] = []
        fresh: list[Group] = []
        while tries < config.filter.max_tries and not processes.every(len(fresh) >= lacking):
            batch, self._ahead = self._ahead, None
            if batch is None:
                batch = self._draw(source, processes, step, tries)
            with processes.jointly():
                self.scorer.state = TrainerState(
                    global_step=self.first_step + step,
                    max_steps=self.first_step + config.train.steps,
                    epoch=float(max((d.epoch for d in batch.all_drawn), default=0)),
                )
                surplus = config.rollout.surplus > 0
                for groups in batch.groups_as_they_end() if surplus else batch.groups():
                    seen += groups
                    fresh += self.filter(groups)
                    if surplus and len(fresh) >= lacking:
                        break
            tries += 1
            dropped += batch.dropped
            late += batch.left
        self._check_seen(seen, tries, dropped, processes)
        share, rest = divmod(config.filter.replay, processes.count)
        with processes.jointly():
            replayed = self.replay.draw(share + (processes.index < rest), seed, rebuild)
        # Replayed groups come on top of the batch: they must not take the place of groups of the present policy.
        trained, overflow = fresh[:lacking], fresh[lacking:]
        self.replay.keep(trained, overflow, wanted)
        short = lacking - len(trained)
        self.filter.tell_shortfall(wanted - short, wanted, tries)
        return Collected(
            groups=[*waited, *trained, *replayed],
            seen=seen,
            replayed=len(replayed),
            overflow=len(overflow),
            short=short,
            tries=tries,
            rate=self._rate(progress),
            dropped=dropped,
            late=late,
            ages=[step - group.step for group in waited],
            faults=dict(self.scorer.faults),
            logged=dict(self.scorer.metrics),
            counts=self.filter.counts,
        )

    def begin_ahead(self, source: Source, processes: Processes, step: int) -> None:
        """Begin with the first batch of a coming step, which its `collect` goes on with."""
        self._ahead = self._draw(source, processes, step, 0)

    def give_up(self) -> None:
        """Let go of a batch that no step will take."""
        if self._ahead:
            self._ahead.sampling.close()
            self._ahead = None

    def _draw(self, source: Source, processes: Processes, step: int, tries: int) -> Batch:
        config = self.config
        count, share = config.train.examples_per_step, 1 + config.rollout.surplus
        count = processes.count * math.ceil(count // processes.count * share)
        with processes.jointly():
            with self.watch("data"):
                drawn = source.draw(count)
            seed = self._seed(processes, step) * config.filter.max_tries + tries
            return self.begin(drawn, seed, step / config.train.steps, step)

    def _seed(self, processes: Processes, step: int) -> int:
        """Different in every step, process and run seed."""
        seed = self.config.run.seed * 1_000_003 + self.first_step + step
        return seed * processes.count + processes.index

    def roll_out(
        self, drawn: Sequence[Drawn], seed: int, progress: float = 0.0, step: int = 0
    ) -> list[Group]:
        """One group per example; see `begin`."""
        (groups,) = self.begin(drawn, seed, progress, step).groups()
        return groups

    def begin(
        self, drawn: Sequence[Drawn], seed: int, progress: float = 0.0, step: int = 0
    ) -> Batch:
        """Have examples rolled out over their orders.

        Args:
            seed: of the sampling; the same one gives the same groups in process.
            progress: share of the stage that is done, 0 to 1, for the permutation rate.
            step: that the groups belong to.
        """
        config, rate, dropped = self.config, self._rate(progress), self.encoder.dropped
        with self.watch("permute"):
            variants = [
                [
                    permute(d.example, o, config.permutation.text)
                    for o in drawn_orders(self.stage, d.example, rate, d.epoch)
                ]
                for d in drawn
            ]
        with self.watch("preprocess"):
            encoded = [
                (d, shown)
                for d, v in zip(drawn, variants, strict=True)
                if (shown := self.encoder.encode(v))
            ]
        per_example = config.permutation.orders * config.rollout.per_order
        # An example with fewer orders than asked for gets as many rollouts, more in each.
        counts = [shares(per_example, len(shown)) for _, shown in encoded]
        with self.watch("rollout"):
            sampling = Sampling(
                self.engine,
                self.encoder.processor,
                [pair for _, shown in encoded for pair in shown],
                [n for own in counts for n in own],
                SamplingParams.of(config.rollout, per_example),
                # The first seed is the step's own; the others are far from those of other steps.
                lambda number, _: seed + (number << 56),
            )
        own = [d for d, _ in encoded]
        return Batch(self, drawn, own, counts, sampling, step, self.encoder.dropped - dropped)

    def scored(
        self,
        drawn: Sequence[Drawn],
        counts: Sequence[Sequence[int]],
        sampled: Sequence[Sequence[Rollout]],
        step: int,
    ) -> list[Group]:
        """Groups of rollouts.

        Args:
            drawn: the examples.
            counts: of each example the rollouts of each of its orders.
            sampled: the rollouts of each order of the first example, of the second, ...
        """
        config = self.config
        per_example = config.permutation.orders * config.rollout.per_order
        with self.watch("reward"):
            rollouts = [rollout for of_variant in sampled for rollout in of_variant]
            rewards, parts = self.scorer.score_rollouts(rollouts)
            logged = self.scorer.logged
            advantages = advantages_of(
                rewards,
                [per_example] * len(drawn),
                [n for own in counts for n in own if n],
                config.advantage,
            )
        groups = []
        for number, d in enumerate(drawn):
            own = slice(number * per_example, (number + 1) * per_example)
            own_parts = {name: values[own] for name, values in parts.items()}
            groups.append(
                Group(
                    example=d.example,
                    variants=tuple({r.variant.order: r.variant for r in rollouts[own]}.values()),
                    rollouts=tuple(rollouts[own]),
                    rewards=rewards[own],
                    reward_parts=own_parts,
                    advantages=advantages[own] * np.float32(self._weight(own_parts)),
                    key=d.key,
                    step=step,
                    logged={name: values[own] for name, values in logged.items()},
                )
            )
        return groups

    def _rate(self, progress: float) -> float:
        permutation = self.config.permutation
        return rate_at(permutation.rate, permutation.rate_schedule, progress)

    def _rebuild(
        self, find: Callable[[Sequence[int]], Example], key: Sequence[int], orders: Sequence[Order]
    ) -> list[Shown]:
        """The variants of an example that was rolled out before, with their prompts."""
        example = find(key)
        return self.encoder.encode(
            [permute(example, o, self.config.permutation.text) for o in orders]
        )

    def _weight(self, parts: dict[str, np.ndarray]) -> float:
        """How much a group counts, by the mean of one of its rewards."""
        config = self.config.reward
        if config.group_weight == "none":
            return 1.0
        values = parts[str(part_name(config.functions, config.group_weight_of))]
        return group_weight(group_mean(values), config.group_weight, config.group_weight_power)

    def _check_seen(
        self, seen: Sequence[Group], tries: int, dropped: int, processes: Processes
    ) -> None:
        """Raise UserError if no try in any process produced a rollout that can be scored."""
        scorable = sum(int((~np.isnan(group.rewards)).sum()) for group in seen)
        all_tries, all_seen, found = processes.total(tries, len(seen), scorable)
        with processes.jointly():
            if all_tries and not all_seen:
                raise UserError(
                    f"all {dropped} examples drawn have prompts over "
                    f"{self.encoder.limit.name}; raise it or lower model.max_pixels"
                )
            if all_seen and not found:
                raise unscorable(seen, int(all_seen))
