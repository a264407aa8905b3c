"""Rows of several processes: each completion once, within the budget, equally many, and alike where they meet."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perl.config import LossConfig, ModelConfig, TrainConfig
from perl.distributed import Processes
from perl.files import RunFolder
from perl.model.head import HeadLoss, make_policy_loss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.pack import empty_row, pack
from perl.model.packed.plan import Load, Share
from perl.training.optimizer import Optimizer, Schedule
from perl.training.parallel.balancing import ModelFlops, Work
from perl.training.parallel.rows import GroupSize, Part, joint_rows, plan_rows, row_flops, rows_in
from perl.training.session import Session
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment
from tests.command_line import untimed
from tests.model.steps import segments_of
from tests.training.test_run import both, staged
from tests.training.two_tokens import Accelerator, Together, TwoTokens

TOKENS = ModelFlops(token=1.0, pair=0.0, scored=0.0, visual=0.0)
"""Work is tokens of the language model."""


def group(owner: int, prompt: int, *orders: tuple[int, ...], visual: int = 0) -> GroupSize:
    return GroupSize(owner, tuple(Load(prompt, lengths) for lengths in orders), visual)


def times(groups: list[GroupSize], processes: int, budget: int) -> list[list[float]]:
    """The tokens in each row of each process, as planned."""
    parts = plan_rows(groups, processes, TOKENS, budget)
    return row_flops(groups, parts, processes, TOKENS).tolist()


def test_the_longest_goes_first_to_who_holds_it_and_then_to_who_has_least() -> None:
    """18,000 tokens on two processes: at most 9,450 each, else 5,000 and 4,000 would stay."""
    groups = [group(0, 4000, ()), group(1, 3000, ()), group(0, 6000, ()), group(0, 5000, ())]
    everything = (Share(0, ()),)
    assert plan_rows(groups, 2, TOKENS, 10_000) == [
        Part(g, everything, p, 0) for g, p in enumerate([1, 0, 0, 1])
    ]


def test_rows_of_one_number_are_alike_and_as_many_as_the_budget_needs() -> None:
    """Of 10,000 tokens both 6,000 stand alone; each process has a long row first."""
    groups = [group(0, 6000, ()), group(0, 2000, ()), group(1, 2000, ()), group(1, 6000, ())]
    assert times(groups, 2, 6000) == [[6000, 2000], [6000, 2000]]
    assert times(groups, 2, 8000) == [[8000], [8000]]
    # Nobody has the second row's work but the first process; it would have waited for itself.
    assert times([group(0, 6000, ())] * 3, 2, 6000) == [[6000, 6000], [6000, 0]]


def test_a_long_group_is_cut_where_that_is_shorter() -> None:
    """By orders, then by completions, each with the prompt again; images on both sides."""
    two_orders = group(1, 3000, (1000, 1000), (1000,), visual=500)
    assert times([two_orders], 2, 20_000) == [[4000], [5000]]
    one_order = group(0, 1000, (2000, 1500, 500))
    assert plan_rows([one_order], 2, TOKENS, 20_000) == [
        Part(0, (Share(0, (0,)),), 0, 0),
        Part(0, (Share(0, (1, 2)),), 1, 0),
    ]
    # Those without a token are halved too.
    assert times([group(0, 5000, (0, 0, 0))], 2, 20_000) == [[5000], [0]]
    # 5,040 in place of 5,080 are not worth a second prompt, and 8,700 not the sending of 8,000 visual tokens.
    assert times([group(0, 5000, (40, 40))], 2, 20_000) == [[5080], [0]]
    images = replace(TOKENS, visual=1.0)
    dear = [group(0, 100, (600, 600), visual=8000)]
    assert row_flops(dear, plan_rows(dear, 2, images, 20_000), 2, images).tolist() == [[9300], [0]]


@pytest.mark.parametrize(
    ("scored", "rows"),
    [
        # One of 9,000 tokens has no room for another, so that the second process would have three of 6,500.
        (10.0, [[9000, 6500], [6500, 6500]]),
        # Of 4,700: 9,000 + 4,700 are 400 less than 14,100, and a row costs 1,024.
        (6.4, [[9000], [14_100]]),
    ],
)
def test_another_row_is_taken_where_it_saves_more_than_it_costs(
    scored: float, rows: list[list[float]]
) -> None:
    groups = [group(1, 1000, (500,))] * 2 + [group(0, 1000, (500,)), group(0, 9000, ())]
    flops = replace(TOKENS, scored=scored)
    assert row_flops(groups, plan_rows(groups, 2, flops, 10_000), 2, flops).tolist() == rows


def test_a_group_in_several_rows_stays_and_shows_its_images_in_the_first() -> None:
    """6,000 tokens and 1,000 of images are more than a row: orders of 3,000, of which each process keeps its own two."""
    groups = [group(p, 2000, (1000,), (1000,), visual=500) for p in (1, 0)]
    flops = replace(TOKENS, visual=2.0)
    parts = plan_rows(groups, 2, flops, 4000)
    assert [(p.group, p.process, p.row) for p in parts] == [
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
    ]
    assert row_flops(groups, parts, 2, flops).tolist() == [[4000, 3000], [4000, 3000]]


def test_nothing_to_learn() -> None:
    assert plan_rows([], 4, TOKENS, 100) == []
    assert times([group(2, 10, (5,))], 3, 100) == [[0], [0], [15]]
    # Over the budget, which a prompt and one completion may be: then in a row to themselves.
    assert times([group(0, 90, (20,)), group(0, 3, (5,))], 1, 100) == [[110, 8]]


LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=4).map(tuple)
GROUPS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 40),
        st.lists(LENGTHS, min_size=1, max_size=3),
        st.integers(0, 50),
    ),
    max_size=9,
)


@given(GROUPS, st.integers(20, 300), st.booleans())
@settings(max_examples=60, deadline=None)
def test_plans(drawn: list[Any], budget: int, share: bool) -> None:
    groups = [group(p, prompt, *orders, visual=v) for p, prompt, orders, v in drawn]
    flops = ModelFlops(token=100.0, pair=1.0, scored=30.0, visual=200.0, shared=share)
    parts = plan_rows(groups, 4, flops, budget)
    every = Counter(
        (part.group, s.segment, c) for part in parts for s in part.shares for c in s.completions
    )
    assert set(every.values()) <= {1}
    assert every.keys() == {
        (g, i, c)
        for g, size in enumerate(groups)
        for i, load in enumerate(size.loads)
        for c in range(len(load.completions))
    }
    tokens: Counter[tuple[int, int]] = Counter()
    held: Counter[tuple[int, int]] = Counter()
    for part in parts:
        for s in part.shares:
            load = groups[part.group].loads[s.segment]
            tokens[part.process, part.row] += load.prompt
            tokens[part.process, part.row] += sum(load.completions[c] for c in s.completions)
            held[part.process, part.row] += len(s.completions)
    assert all(n <= budget or held[at] == 1 for at, n in tokens.items())
    assert {row for _, row in tokens} == set(range(rows_in(parts)))
    assert plan_rows(groups, 4, flops, budget) == parts


def work(name: int, orders: int, images: int = 1) -> Work:
    """A group whose prompts are its name, of completions that say theirs."""
    shown = tuple(
        EncodedImage(f"{name}-{k}", torch.full((4, 6), float(name)), (1, 2, 2), 1)
        for k in range(images)
    )
    prompt = EncodedPrompt(np.full(2000, name), np.zeros((3, 2000), int), 2000, shown, -1)
    each = tuple(np.full(500 * (c + 1), 10 * name + c) for c in range(3))
    logprobs = tuple(np.full(len(c), -c[0], dtype=np.float32) for c in each)
    segment = Segment(prompt, each, (0.0, 1.0, 2.0), 0, logprobs, off_policy=name % 2 == 1)
    return [segment] * orders


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "held", [[[1, 2, 3, 4], [], [5]], [[7], [], []], [[], [], []]], ids=["many", "one", "none"]
)
def test_rows_arrive_with_all_that_training_needs(
    held: list[list[int]], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Together(len(held), monkeypatch)
    flops = replace(TOKENS, shared=share)

    def process(index: int) -> tuple[list[PackedBatch], list[Segment]]:
        own = [work(name, orders=2) for name in held[index]]
        return joint_rows(own, flops, Processes(Accelerator(together)), 12_000)

    out = together.run(process)
    assert len({len(batches) for batches, _ in out}) == 1
    found = Counter()
    for batches, segments in out:
        assert sum(len(b.source) for b in batches) == sum(len(s.completions) for s in segments)
        for batch in batches:
            assert len(batch.position_ids) == (3 if any(held) else 1) and batch.num_tokens <= 12_000
            for b, start in enumerate(batch.completion_cu_seqlens[:-1].tolist()):
                says = int(batch.targets[start])
                name, number = divmod(says, 10)
                end = int(batch.completion_cu_seqlens[b + 1])
                assert batch.targets[start:end].tolist() == [says] * (500 * (number + 1))
                assert (
                    batch.advantages[b] == number and batch.input_ids[batch.scored[start]] == name
                )
                assert batch.sampled_logprobs is not None and batch.sampled_logprobs[start] == -says
                assert (batch.off_policy is not None and bool(batch.off_policy[start])) == name % 2
                assert f"{name}-0" in [image.key for image in batch.images]
                found[says] += 1
            for image in batch.images:
                assert image.pixel_values[0, 0] == int(image.key.partition("-")[0])
    tokens = sum(batch.num_tokens for batches, _ in out for batch in batches if batch.source)
    repeated = sum(2000 + 500 * (says % 10 + 1) for says in found.elements())
    assert share or tokens == repeated
    expected = {10 * name + c: 2 for own in held for name in own for c in range(3)}
    assert found == expected
    # A group of one process is cut for another; in three parts it would have three prompts.
    assert held[0] != [7] or [bool(segments) for _, segments in out] == [True, True, not share]


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl"])
def test_a_row_without_scored_tokens_changes_no_bit_of_a_step(name: str, tiny_folder: Any) -> None:
    folder, config = str(tiny_folder(name)), ModelConfig(max_pixels=28 * 28 * 16)
    segments = segments_of(load_processor(folder, config))
    sampled = [tuple(np.full(len(c), -3.0) for c in s.completions) for s in segments]
    segments = [replace(s, sampled_logprobs=x) for s, x in zip(segments, sampled, strict=True)]
    loss = make_policy_loss(LossConfig(kl_coef=0.1, correction="token_truncate"), 64)

    def step(empty: int) -> tuple[dict[str, float], list[torch.Tensor]]:
        policy = load_policy(folder, config, torch.device("cpu"))
        rows = pack(segments, 60)
        rows += [empty_row(len(segments[0].prompt.position_ids))] * empty
        head = HeadLoss(policy, torch.tensor([3]), 1.0)
        logprobs = [head.logprobs(row).logprobs for row in rows]
        assert [len(x) for x in logprobs[len(logprobs) - empty :]] == [0] * empty
        optimizer = Optimizer(Accelerator(), head, Schedule(0.1, "constant", 0, 4), TrainConfig())
        metrics = optimizer.step(0, rows, loss, [x - 0.1 for x in logprobs], logprobs)
        return metrics, [p.detach() for p in policy.parameters()]

    metrics, weights = step(0)
    again, others = step(1)
    assert again == metrics
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_processes_with_sharded_weights_run_equally_many_rows(
    tmp_path: Path, two_processes: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cold start, with two updates a batch, with replay, and where all is left of one process: the same run."""
    step, packed, counts = Optimizer.step, Session.pack, [[], []]

    def pack_of_one(self: Session, work: list[Work]) -> Any:
        return packed(self, [] if self.stage.name == "hard" and self.processes.index else work)

    def counted(self: Optimizer, number: int, batches: list[PackedBatch], *args: Any) -> Any:
        counts[two_processes.here.index].append([b.num_scored for b in batches])
        return step(self, number, batches, *args)

    monkeypatch.setattr(Optimizer, "step", counted)
    monkeypatch.setattr(Session, "pack", pack_of_one)
    config, runs = staged(tmp_path), []
    for sharding in (None, SimpleNamespace(vision=False)):
        monkeypatch.setattr(TwoTokens, "sharding", sharding)
        RunFolder(folder := tmp_path / f"{len(runs)}").create(overwrite=False)
        counts[:] = [[], []]
        both(two_processes, folder, config)
        runs.append(untimed(folder))
    ours, theirs = counts
    assert len(ours) == 3 + 2 * 3 + 4
    assert [len(rows) for rows in ours] == [len(rows) for rows in theirs]
    scored = [[sum(rows) for rows in own] for own in counts]
    assert any(mine and not its for mine, its in zip(*scored, strict=True))
    for plain, sharded in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "kl", "reward/mean"):
            if key in plain:
                assert sharded[key] == pytest.approx(plain[key], rel=1e-5), key
