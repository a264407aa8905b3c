"""From examples to groups: how many rollouts in which orders, and what they are conditioned on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.config import (
    Config,
    DataConfig,
    EvalConfig,
    FilterConfig,
    ModelConfig,
    PermutationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from perl.data.streams import Drawn
from perl.distributed import Processes
from perl.files import RunFolder
from perl.recipe import Stage
from perl.rollout.collect import Collected
from perl.training.components import Components, build
from perl.training.reinforce import segments_of
from perl.types import Example, Group, UserError

CONFIG = Config(
    run=RunConfig(trackers=()),
    model=ModelConfig(path="tiny-qwen2.5-vl"),
    data=DataConfig(tasks=("which", "single"), min_images=2, max_images=3),
    rollout=RolloutConfig(per_order=2, max_new_tokens=3),
    eval=EvalConfig(examples=0),
)


def stage_of(config: Config) -> Stage:
    return Stage("rl", "rl", config, first_step=0, number=0)


@pytest.fixture
def components(tmp_path: Path) -> Components:
    folder = RunFolder(tmp_path)
    folder.make_parts()
    return build(CONFIG, stage_of(CONFIG), folder)


def groups(components: Components, progress: float = 0.0, **permutation: Any) -> list[Group]:
    config = replace(CONFIG, permutation=PermutationConfig(**permutation))
    own = components.for_stage(stage_of(config))
    examples = [own.held_out()[i] for i in range(12)]
    return own.collector.roll_out([Drawn((i,), 0, e) for i, e in enumerate(examples)], 7, progress)


@pytest.fixture(autouse=True)
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    from perl.data.dataset import load_examples

    def held_out(self: Components) -> Any:
        return load_examples("bundled:digits", self.config.data, "test", 0, 12)

    monkeypatch.setattr(Components, "held_out", held_out)


def orders_of(group: Group) -> Counter[tuple[int, ...]]:
    return Counter(r.variant.order for r in group.rollouts)


def test_every_question_gets_equally_many_rollouts(components: Components) -> None:
    found = groups(components, orders=4)
    assert {len(g.rollouts) for g in found} == {8}
    for group in found:
        images = len(group.example.images)
        shares = sorted(orders_of(group).values())
        # One image has one order, two have two, three have six of which four are drawn.
        assert shares == {1: [8], 2: [4, 4], 3: [2, 2, 2, 2]}[images]
    assert {len(g.example.images) for g in found} == {1, 2, 3}


def test_completions_belong_to_their_prompts(components: Components) -> None:
    for group in groups(components, orders=3):
        for rollout in group.rollouts:
            assert rollout.variant.example is group.example
            keys = [components.processor.encode_image(i).key for i in rollout.variant.images]
            assert [image.key for image in rollout.prompt.images] == keys


def test_an_example_that_is_not_permuted_keeps_its_order(components: Components) -> None:
    for group in groups(components, orders=2, rate=0.0):
        assert orders_of(group) == {tuple(range(len(group.example.images))): 4}
    late = groups(components, progress=0.999, orders=2, rate_schedule="linear")
    assert all(len(orders_of(g)) == 1 for g in late)
    early = groups(components, progress=0.0, orders=2, rate_schedule="linear")
    assert [len(orders_of(g)) for g in early] == [
        2 if len(g.example.images) > 1 else 1 for g in early
    ]


def test_the_released_draw_is_one_order(components: Components) -> None:
    drawn = {o for g in groups(components, orders=2, draw="released") for o in orders_of(g)}
    assert drawn == {(0,), (0, 1), (1, 0), (0, 1, 2), (1, 0, 2)}


def test_what_loss_and_kl_are_conditioned_on(components: Components) -> None:
    group = next(g for g in groups(components, orders=2) if len(g.example.images) == 3)
    permuted, original = segments_of(group, "permuted"), segments_of(group, "original")
    assert [len(s.completions) for s in permuted] == [2, 2]
    assert [s.prompt for s in permuted] == [group.rollouts[0].prompt, group.rollouts[2].prompt]
    (one,) = original
    assert one.prompt is group.rollouts[0].prompt
    assert one.advantages == tuple(group.advantages)
    assert all(a is r.token_ids for a, r in zip(one.completions, group.rollouts, strict=True))
    # The original prompt serves even where none of its own rollouts could be scored.
    group.rewards[:2] = float("nan")
    (one,) = segments_of(group, "original")
    assert one.prompt is group.rollouts[0].prompt and len(one.completions) == 2
    assert len(segments_of(group, "permuted")) == 1


def test_texts_follow_where_the_recipe_says_so(components: Components) -> None:
    config = replace(
        CONFIG,
        data=replace(CONFIG.data, tasks=("same",), min_images=3),
        permutation=PermutationConfig(orders=2, text="references"),
    )
    own = components.for_stage(stage_of(config))
    example = replace(own.held_out()[0], kind="all")
    (group,) = own.collector.roll_out([Drawn((0,), 0, example)], 0)
    for rollout in group.rollouts:
        shown = rollout.variant
        letters = [w for w in shown.messages[0].content.split("do")[1].split() if w in "ABC"]
        before = [w for w in example.messages[0].content.split("do")[1].split() if w in "ABC"]
        pictures = [shown.images["ABC".index(w)] for w in letters]
        assert pictures == [example.images["ABC".index(w)] for w in before]
        assert shown.answer == example.answer


class Rows:
    """Held-out examples in a row, two at a time."""

    def __init__(self, examples: Any) -> None:
        self.examples, self.next = examples, 0

    def draw(self, count: int) -> list[Drawn]:
        self.next += count
        return [Drawn((i,), 0, self.examples[i]) for i in range(self.next - count, self.next)]

    def find(self, key: Sequence[int]) -> Example:
        return self.examples[key[0]]


def collect(components: Components, reward: Path, tries: int) -> Collected:
    config = replace(
        CONFIG,
        reward=RewardConfig(functions=(f"{reward}:f",), weights=(1.0,)),
        filter=FilterConfig(max_tries=tries),
        train=TrainConfig(examples_per_step=2),
    )
    own = components.for_stage(stage_of(config))
    return own.collector.collect(Rows(own.held_out()), Processes(components.accelerator), step=0)


def test_a_step_without_a_single_reward_is_an_error(components: Components, tmp_path: Path) -> None:
    """One try may have none; a whole step without any means that rewards and data do not fit."""
    never, late = tmp_path / "never.py", tmp_path / "late.py"
    never.write_text("def f(completions, **c): return [None] * len(completions)")
    late.write_text(
        "calls = 0\n\ndef f(completions, **columns):\n    global calls\n    calls += 1\n"
        "    return [None if calls == 1 else i % 2 for i in range(len(completions))]\n"
    )
    with pytest.raises(UserError, match="no rollout of 4 groups can be scored"):
        collect(components, never, 2)
    found = collect(components, late, 2)
    assert (found.tries, len(found.groups), found.counts["unscorable"]) == (2, 2, 2)
