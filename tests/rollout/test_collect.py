"""From examples to groups: how many rollouts in which orders, what they score, and which groups a step gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perl.config import (
    AdvantageConfig,
    Config,
    DataConfig,
    FilterConfig,
    PermutationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from perl.data.streams import Drawn
from perl.distributed import Processes
from perl.recipe import Stage
from perl.rewards.scorer import Scorer
from perl.rollout.collect import Collector
from perl.rollout.engine import SamplingParams
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.timing import Stopwatch
from perl.types import Example, Group
from tests.messages import refused, tells
from tests.stand_ins import Asked, InARow, TableEngine, darkest, example, processes

BASE = Config(
    rollout=RolloutConfig(per_order=2, temperature=0.7, max_new_tokens=9),
    reward=RewardConfig(functions=("accuracy",), weights=(1.0,)),
    train=TrainConfig(steps=4, examples_per_step=2),
)


def always_a(asked: Asked) -> str:
    return r"\boxed{A}"


def signal_in(ids: str) -> Callable[[Asked], str]:
    """Of these examples every second completion of a prompt is right; everything else is wrong."""

    def answer(asked: Asked) -> str:
        right = asked.variant.example.id in ids and asked.number % 2 == 0
        return rf"\boxed{{{darkest(asked.variant) if right else 'Z'}}}"

    return answer


def collector(
    answer: Callable[[Asked], str] = always_a,
    number: int = 0,
    first_step: int = 0,
    scorer: Scorer | None = None,
    **sections: Any,
) -> Any:
    config = replace(BASE, **sections)
    engine: Any = TableEngine(answer)
    limit = PromptLimit.to_train(config)
    return Collector(
        Stage("rl", "rl", config, first_step=first_step, number=number),
        engine,
        PromptEncoder(engine.processor, limit, config.data.overlong),
        scorer or Scorer(config.reward.functions, config.reward.weights),
        Stopwatch(),
    )


def roll_out(own: Collector, *examples: Example, **options: Any) -> list[Group]:
    drawn = [Drawn((i,), 0, e) for i, e in enumerate(examples)]
    return own.roll_out(drawn, options.pop("seed", 7), **options)


def pairs(ids: str) -> list[Example]:
    """One example of two pictures for each letter."""
    return [example(id, 10, 20) for id in ids]


def ids(groups: Sequence[Group]) -> str:
    return "".join(group.example.id for group in groups)


def orders_of(group: Group) -> Counter[tuple[int, ...]]:
    return Counter(r.variant.order for r in group.rollouts)


def test_a_group_by_hand() -> None:
    """A is right in the original order only: rewards 1, 1, 0, 0, of mean 1/2 and variance 4 * (1/2)^2 / 3."""
    own = collector()
    (group,) = own.roll_out([Drawn((3, 5), 0, example("q", 10, 20))], seed=7, step=6)
    assert [r.variant.order for r in group.rollouts] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert [r.variant.answer for r in group.rollouts] == ["A", "A", "B", "B"]
    assert [v.order for v in group.variants] == [(0, 1), (1, 0)]
    np.testing.assert_array_equal(group.rewards, [1, 1, 0, 0])
    assert list(group.reward_parts) == ["accuracy"]
    np.testing.assert_array_equal(group.reward_parts["accuracy"], [1, 1, 0, 0])
    own_z = 0.5 / math.sqrt(1 / 3)
    np.testing.assert_allclose(group.advantages, [own_z, own_z, -own_z, -own_z], rtol=1e-5)
    assert (group.key, group.step, group.off_policy) == ((3, 5), 6, False)
    for rollout in group.rollouts:
        assert (
            rollout.prompt.variant is rollout.variant and rollout.variant.example is group.example
        )
        assert (rollout.text, rollout.finished) == (r"\boxed{A}", True)
        np.testing.assert_array_equal(rollout.logprobs, [-1])
    (call,) = own.engine.calls
    assert (call.params.n, call.params.temperature, call.params.max_new_tokens) == (2, 0.7, 9)
    assert call.seed == 7
    assert set(own.watch.lap_seconds) == {"permute", "preprocess", "rollout", "reward"}


def test_every_question_gets_equally_many_rollouts() -> None:
    """One picture has one order, two have two, three have six of which four are drawn: 8 rollouts each."""
    own = collector(permutation=PermutationConfig(orders=4))
    found = roll_out(own, example("c", 1, 2, 3), example("a", 1), example("b", 1, 2))
    assert ids(found) == "cab" and {len(g.rollouts) for g in found} == {8}
    assert [sorted(orders_of(g).values()) for g in found] == [[2, 2, 2, 2], [8], [4, 4]]
    calls = own.engine.calls
    assert [(call.params.n, len(call.variants)) for call in calls] == [(2, 4), (4, 2), (8, 1)]
    assert len({call.seed for call in calls}) == 3
    # Each has its own scores, however the engine was asked: A is right in one order of b, and always in a.
    assert [g.rewards.tolist() for g in found[1:]] == [[1] * 8, [1] * 4 + [0] * 4]
    own = collector(permutation=PermutationConfig(orders=3), rollout=RolloutConfig(per_order=3))
    (uneven,) = roll_out(own, example("b", 1, 2))
    assert orders_of(uneven) == {(0, 1): 5, (1, 0): 4}
    assert uneven.rewards.tolist() == [1] * 5 + [0] * 4


def test_groups_of_one_step_are_scored_apart() -> None:
    """Means and weights are each group's own: of `hard` 1 of 4 is right, of `even` 2 of 4."""

    def answer(asked: Asked) -> str:
        own = asked.variant.example.id == "even" or asked.variant.order == (0, 1)
        return rf"\boxed{{{darkest(asked.variant) if own and not asked.number else 'Z'}}}"

    own = collector(
        answer,
        advantage=AdvantageConfig(scale="none"),
        reward=RewardConfig(
            functions=("accuracy", "format"),
            weights=(1.0, 0.5),
            group_weight="power",
            group_weight_power=2.0,
            group_weight_of="accuracy",
        ),
    )
    hard, even = roll_out(own, *(example(id, 10, 20) for id in ("hard", "even")))
    assert hard.reward_parts["accuracy"].tolist() == [1, 0, 0, 0]
    assert even.reward_parts["format"].tolist() == [0, 0, 0, 0]
    # (reward - mean) * (1.05 - mean)^2
    hard_by_hand = np.array([0.75, -0.25, -0.25, -0.25]) * 0.8**2
    np.testing.assert_allclose(hard.advantages, hard_by_hand, rtol=1e-5)
    even_by_hand = np.array([0.5, -0.5, 0.5, -0.5]) * 0.55**2
    np.testing.assert_allclose(even.advantages, even_by_hand, rtol=1e-5)


def test_how_many_are_permuted_falls_over_the_stage() -> None:
    examples = [example(f"q{i}", 1, 2) for i in range(200)]

    def share(step: int, **permutation: Any) -> float:
        own = collector(
            permutation=PermutationConfig(**permutation),
            train=TrainConfig(steps=4, examples_per_step=200),
            filter=FilterConfig(zero_variance=False),
        )
        found = own.collect(InARow(examples), processes(), step)
        assert found.rate == pytest.approx(permutation["rate"] * (1 - step / 4))
        for group in found.seen:
            assert list(orders_of(group).values()) in ([4], [2, 2])
            assert next(iter(orders_of(group))) == (0, 1)
        return sum(len(orders_of(group)) == 2 for group in found.seen) / 200

    linear = {"rate_schedule": "linear"}
    assert share(0, rate=1.0, **linear) == 1 and share(0, rate=0.0, **linear) == 0
    # Of 200 coins three standard deviations are at most 0.11.
    assert share(1, rate=0.8, **linear) == pytest.approx(0.6, abs=0.11)
    assert share(3, rate=0.8, **linear) == pytest.approx(0.2, abs=0.09)


def test_orders_differ_between_runs_stages_and_epochs() -> None:
    asked = [example(f"q{i}", 1, 2, 3, 4) for i in range(20)]

    def drawn(number: int, seed: int, epoch: int) -> tuple[Any, ...]:
        own = collector(number=number, run=RunConfig(seed=seed))
        groups = own.roll_out([Drawn((i,), epoch, e) for i, e in enumerate(asked)], 7)
        return tuple(v.order for g in groups for v in g.variants)

    cases = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [drawn(*case) for case in cases]
    assert len(set(found)) == len(cases)
    assert [drawn(*case) for case in cases] == found


def test_the_released_draw_is_one_order() -> None:
    own = collector(permutation=PermutationConfig(orders=2, draw="released"))
    found = roll_out(own, example("a", 1), example("b", 1, 2), example("c", 1, 2, 3))
    expected = [{(0,): 4}, {(0, 1): 2, (1, 0): 2}, {(0, 1, 2): 2, (1, 0, 2): 2}]
    assert [orders_of(g) for g in found] == expected
    own = collector(permutation=PermutationConfig(orders=1, draw="released"))
    assert orders_of(*roll_out(own, example("b", 1, 2))) == {(0, 1): 2}


def test_texts_follow_where_the_recipe_says_so() -> None:
    """Also in a group that waited, whose prompts are made again."""
    question = "<image> <image> Is the second image darker?"
    own = collector(
        lambda asked: rf"\boxed{{{'no' if asked.number else 'yes'}}}",
        permutation=PermutationConfig(text="references"),
        filter=FilterConfig(reuse_overflow=True),
        train=TrainConfig(examples_per_step=1),
    )
    asked = example("q", 10, 20, question=question, answer="no", should_change=False)
    (fresh,) = roll_out(own, asked)
    own.replay.keep([], [fresh], 1)
    (waited,) = own.collect(InARow([asked]), processes(), 1).groups
    assert waited.off_policy and not fresh.off_policy
    for group in (fresh, waited):
        texts = [own.encoder.processor.decode(r.prompt.input_ids) for r in group.rollouts]
        assert texts == [question] * 2 + [question.replace("second", "first")] * 2
        assert [r.variant.messages[0].content for r in group.rollouts] == texts


def test_a_batch_is_filled_up_over_several_tries() -> None:
    own = collector(signal_in("acd"))
    found = own.collect(InARow(pairs("abcdefgh")), processes(), step=3)
    assert (ids(found.groups), ids(found.seen)) == ("ac", "abcd")
    assert (found.tries, found.short, found.overflow, found.replayed) == (2, 0, 1, 0)
    assert (found.rate, found.dropped, found.ages) == (1.0, 0, [])
    assert found.faults == {"accuracy": 0}
    some = {"kept": 3, "all_worst": 1, "zero_variance": 1}
    assert {name: n for name, n in found.counts.items() if n} == some
    assert [g.step for g in found.groups] == [3, 3] and not any(g.off_policy for g in found.groups)


def test_tries_end(caplog: pytest.LogCaptureFixture) -> None:
    own = collector(signal_in("d"), filter=FilterConfig(max_tries=3))
    source = InARow(pairs("abcdefghijklmnopqr"))
    found = own.collect(source, processes(), step=0)
    assert (ids(found.groups), ids(found.seen)) == ("d", "abcdef")
    assert (found.tries, found.short, found.overflow) == (3, 1, 0)
    (record,) = caplog.records
    tells(record.getMessage(), "1 of 2", "3 tries", "6 groups", "rollout.per_order")
    found = own.collect(source, processes(), step=1)
    # The counts are each step's own; the log speaks once.
    assert (ids(found.groups), found.short, found.counts["all_worst"]) == ("", 2, 6)
    assert len(caplog.records) == 1


def test_what_was_too_much_is_trained_on_in_the_next_step() -> None:
    own = collector(signal_in("acdefi"), filter=FilterConfig(reuse_overflow=True, max_tries=2))
    source = InARow(pairs("abcdefghijkl"))
    first = own.collect(source, processes(), step=0)
    assert (ids(first.groups), first.overflow, first.ages) == ("ac", 1, [])
    second = own.collect(source, processes(), step=1)
    # d counts: one more is enough, and f waits.
    assert (ids(second.groups), ids(second.seen)) == ("de", "ef")
    assert (second.tries, second.short, second.overflow, second.ages) == (1, 0, 1, [1])
    assert [(g.off_policy, g.step) for g in second.groups] == [(True, 0), (False, 1)]
    third = own.collect(source, processes(), step=3)
    assert (ids(third.groups), third.tries, third.ages, third.overflow) == ("fi", 2, [2], 0)
    own = collector(signal_in("acdef"))  # Without it what was too much is gone.
    source = InARow(pairs("abcdefgh"))
    assert ids(own.collect(source, processes(), 0).groups) == "ac"
    assert ids(own.collect(source, processes(), 1).groups) == "ef"


class Behind(Processes):
    """Another process lacks groups until it has been asked so often."""

    def __init__(self, lacking: int) -> None:
        super().__init__(processes().accelerator)
        self.lacking = lacking

    def every(self, flag: bool) -> bool:
        self.lacking -= 1
        return flag and self.lacking < 0


def test_no_process_stops_before_the_others() -> None:
    own = collector(
        lambda a: signal_in(a.variant.example.id)(a), filter=FilterConfig(reuse_overflow=True)
    )
    source = InARow(pairs("abcdefghijkl"))
    found = own.collect(source, Behind(3), step=0)
    assert (found.tries, ids(found.seen), ids(found.groups), found.overflow) == (
        3,
        "abcdef",
        "ab",
        4,
    )
    # As many wait as a step takes, the newest; so there is nothing to try.
    found = own.collect(source, processes(), step=1)
    assert (found.tries, ids(found.seen), ids(found.groups), found.ages) == (0, "", "ef", [1, 1])


@pytest.mark.parametrize(("index", "replayed"), [(0, 2), (1, 1)])
def test_processes_share_batch_and_replay(index: int, replayed: int) -> None:
    """Replayed groups come on top of the batch."""
    own = collector(
        signal_in("abcdef"),
        train=TrainConfig(examples_per_step=4),
        filter=FilterConfig(replay=3),
    )
    source, both = InARow(pairs("abcdef"), processes=2), processes(2, index)
    first, second = (own.collect(source, both, step) for step in (0, 1))
    assert (ids(first.groups), first.replayed) == ("ab", 0)
    assert second.replayed == replayed == len(second.groups) - 2
    assert ids(second.groups[:2]) == "cd" and set(ids(second.groups[2:])) <= set("ab")
    assert [g.off_policy for g in second.groups] == [False] * 2 + [True] * replayed
    third = own.collect(source, both, 2)
    assert ids(third.groups[:2]) == "ef" and third.replayed == replayed


def test_all_samplings_of_a_run_have_seeds_of_their_own() -> None:
    """Runs, processes, steps of all stages, tries, and within a try prompts with other counts."""
    seeds = []
    for run in (0, 1):
        for first_step in (0, 10):
            for index in (0, 1):
                own = collector(
                    signal_in(""),
                    first_step=first_step,
                    run=RunConfig(seed=run),
                    filter=FilterConfig(max_tries=3),
                    train=TrainConfig(examples_per_step=4),
                )
                source = InARow([example("a", 1), example("b", 1, 2)] * 12, processes=2)
                for step in range(2):
                    own.collect(source, processes(2, index), step)
                assert len(own.engine.calls) == 2 * 3 * 2
                seeds += [call.seed for call in own.engine.calls]
    assert len(set(seeds)) == len(seeds) == 96 and max(seeds) < 2**63


def test_a_step_counts_its_own_faults_and_dropped_prompts() -> None:
    """Prompts of two pictures have 7 words, those of three 9."""

    def picky(prompts: Any, completions: Sequence[str], id: Sequence[str], **columns: Any) -> Any:
        return [math.nan if name == "f" else i % 2 for i, name in enumerate(id)]

    own = collector(
        scorer=Scorer((picky,), (1.0,)),
        data=DataConfig(max_prompt_tokens=8, overlong="drop"),
    )
    long = example("l", 1, 2, 3)
    a, b, c, d, f = pairs("abcdf")
    source = InARow([long, a, f, b, c, f, f, d])
    found = own.collect(source, processes(), 0)
    assert (found.dropped, ids(found.seen), found.faults) == (1, "afb", {"picky": 4})
    assert found.counts["unscorable"] == 1 and np.isnan(found.seen[1].rewards).all()
    found = own.collect(source, processes(), 1)
    assert (found.dropped, ids(found.seen), found.faults) == (0, "cffd", {"picky": 8})


def test_a_step_that_nothing_can_be_learnt_from_is_an_error() -> None:
    """One try may have no score; a whole step without any means that rewards and data do not fit."""
    calls = iter(range(9))

    def late(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float | None]:
        first = next(calls) == 0
        return [None if first else i % 2 for i in range(len(completions))]

    def never(prompts: Any, completions: Sequence[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    own = collector(scorer=Scorer((late,), (1.0,)))
    found = own.collect(InARow(pairs("abcd")), processes(), 0)
    assert (found.tries, ids(found.groups), found.counts["unscorable"]) == (2, "cd", 2)
    own = collector(scorer=Scorer((never,), (1.0,)), filter=FilterConfig(max_tries=2))
    with refused("4", "'a'", "reward.functions"):
        own.collect(InARow(pairs("abcd")), processes(), 0)
    own = collector(data=DataConfig(max_prompt_tokens=6, overlong="drop"))
    with refused("8", "data.max_prompt_tokens = 6", "model.max_pixels"):
        own.collect(InARow(pairs("abcdefgh")), processes(), 0)
    own = collector(data=DataConfig(max_prompt_tokens=6))
    with refused("a", "7", "data.max_prompt_tokens = 6", 'data.overlong = "drop"'):
        own.collect(InARow(pairs("ab")), processes(), 0)


class OneByOne(TableEngine):
    """Its prompts end in a given sequence; what was given up is counted."""

    def __init__(self, answer: Callable[[Asked], str], sequence: Sequence[int]) -> None:
        super().__init__(answer)
        self.sequence, self.given_up = sequence, 0

    def begin(self, prompts: Any, params: SamplingParams, seed: int) -> Any:
        found = self.generate(prompts, params, seed)
        left = [*self.sequence]
        try:
            while left:
                number = left.pop(0)
                yield number, found[number]
        finally:
            self.given_up = len(left)


def test_a_step_with_a_surplus_takes_the_first_groups_that_end() -> None:
    """Four questions in two orders each, of which it needs two: those of the last and the first have both orders first."""
    rollout = replace(BASE.rollout, surplus=1.0)
    answer = signal_in("dabc")
    own = collector(answer, rollout=rollout, permutation=PermutationConfig(orders=2))
    own.engine = engine = OneByOne(answer, [6, 7, 2, 0, 1, 3, 4, 5])
    own.encoder.processor = engine.processor
    questions = [example(id, 10, 20) for id in "abcd"]
    collected = own.collect(InARow(questions), processes(), 0)
    assert [g.example.id for g in collected.groups] == ["d", "a"]
    assert (collected.late, len(collected.seen), engine.given_up) == (2, 2, 3)
    # Each has the advantages that it has where all are waited for.
    for group in roll_out(collector(answer, permutation=PermutationConfig(orders=2)), *questions):
        for found in collected.groups:
            if found.example.id == group.example.id:
                assert found.advantages.tolist() == group.advantages.tolist()
                assert [r.variant.order for r in found.rollouts] == [
                    r.variant.order for r in group.rollouts
                ]
