"""The packer: nothing lost, nothing twice, no row over its budget, indices that point where they should."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perl.model.packed.pack import empty_row, pack, pack_row, packing_counts, packing_report
from perl.model.packed.plan import Load, Share, plan
from perl.types import EncodedImage, EncodedPrompt, PackedBatch, Segment

IMAGE = 99
LOADS = st.lists(
    st.builds(
        Load,
        st.integers(1, 30),
        st.lists(st.integers(0, 12), max_size=5).map(tuple),
        st.integers(0, 4),
    ),
    max_size=20,
)


def image(key: str, tokens: int) -> EncodedImage:
    return EncodedImage(key, torch.zeros(tokens * 4, 6), (1, 2, 2 * tokens), tokens)


def prompt(length: int, *images: EncodedImage) -> EncodedPrompt:
    """Text of `length` tokens after the images' tokens."""
    ids = np.array([IMAGE] * sum(i.tokens for i in images) + list(range(length)), dtype=np.int64)
    positions = np.tile(np.arange(len(ids)), (3, 1))
    return EncodedPrompt(ids, positions, len(ids), images, IMAGE)


def segment(p: EncodedPrompt, *completions: list[int], group: int = 0) -> Segment:
    advantages = tuple(0.5 - i for i in range(len(completions)))
    return Segment(p, tuple(np.array(c, dtype=np.int64) for c in completions), advantages, group)


def tokens_of(loads: list[Load], row: list[Share]) -> int:
    return sum(
        loads[s.segment].prompt + sum(loads[s.segment].completions[i] for i in s.completions)
        for s in row
    )


@given(LOADS, st.integers(1, 80))
def test_every_completion_once_and_no_row_over_budget(loads: list[Load], budget: int) -> None:
    rows = plan(loads, budget)
    placed = [(s.segment, i) for row in rows for s in row for i in s.completions]
    every = [(i, r) for i, x in enumerate(loads) for r in range(len(x.completions))]
    assert sorted(placed) == every
    for row in rows:
        # Only a prompt that is over the budget with one completion may be, and it stands alone.
        assert tokens_of(loads, row) <= budget or (
            len(row) == 1 and len(row[0].completions) == 1
        ), row
        assert len({s.segment for s in row}) == len(row)
    assert rows == plan(loads, budget)


@given(LOADS)
def test_a_prompt_is_repeated_only_when_it_must_be(loads: list[Load]) -> None:
    budget = 60
    copies = [s.segment for row in plan(loads, budget) for s in row]
    for index, load in enumerate(loads):
        if load.tokens <= budget:
            assert copies.count(index) == 1
        else:
            # Two parts of a best fit are together more than one part may hold.
            room = budget - load.prompt
            assert copies.count(index) <= 2 * sum(load.completions) // room + 1


@given(LOADS)
def test_a_group_stays_together_if_it_fits(loads: list[Load]) -> None:
    budget = 200
    rows = plan(loads, budget)
    for group in {x.group for x in loads}:
        members = {i for i, x in enumerate(loads) if x.group == group}
        if sum(loads[i].tokens for i in members) <= budget:
            assert sum(any(s.segment in members for s in row) for row in rows) == 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_two_rows_never_fit_into_one(lengths: list[int]) -> None:
    """Best fit leaves at most one row half empty."""
    budget = 20
    loads = [Load(n, (0,), group) for group, n in enumerate(lengths)]
    used = sorted(tokens_of(loads, row) for row in plan(loads, budget))
    assert sum(n <= budget // 2 for n in used) <= 1


def test_two_prompts_in_a_row() -> None:
    """The example in the docstring of PackedBatch."""
    batch = pack_row([segment(prompt(5), [7, 8, 9], [5, 6]), segment(prompt(4), [3])])
    assert batch.num_tokens == 15 and batch.num_scored == 6
    assert batch.cu_seqlens_q.tolist() == [0, 8, 10, 15]
    assert batch.prefix_starts.tolist() == [0, 0, 0]
    assert batch.prefix_lengths.tolist() == [0, 5, 0]
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 5, 6, 0, 1, 2, 3, 3]
    assert batch.scored.tolist() == [4, 5, 6, 4, 8, 13]
    assert batch.targets.tolist() == [7, 8, 9, 5, 6, 3]
    assert batch.completion_cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.advantages.tolist() == [0.5, -0.5, 0.5]
    assert batch.source == ((0, 0), (0, 1), (1, 0))
    wide, narrow = torch.int64, torch.int32
    dtypes = {
        "input_ids position_ids scored targets visual_positions visual_source": wide,
        "cu_seqlens_q prefix_starts prefix_lengths completion_cu_seqlens": narrow,
        "advantages": torch.float32,
    }
    for names, dtype in dtypes.items():
        for each in (batch, pack_row([segment(prompt(3))])):
            assert {getattr(each, name).dtype for name in names.split()} == {dtype}


def test_every_completion_takes_the_positions_behind_its_prompt() -> None:
    p = replace(prompt(2), next_position=31)
    batch = pack_row([segment(p, [1, 2, 3], [4, 5])])
    assert batch.position_ids.tolist() == [[0, 1, 31, 32, 33, 31, 32]] * 3
    one_axis = replace(p, position_ids=p.position_ids[:1])
    assert pack_row([segment(one_axis, [1], [4])]).position_ids.tolist() == [[0, 1, 31, 31]]


def test_log_probs_of_the_engine_stand_beside_their_tokens() -> None:
    first = segment(prompt(2), [1, 2])
    assert (pack_row([first]).sampled_logprobs, pack_row([first]).off_policy) == (None, None)
    logprobs = [np.array(own, np.float32) for own in ([-2.5, -1.5], [-0.5, -3.5], [-4.5])]
    first = replace(first, sampled_logprobs=(logprobs[0],))
    second = replace(segment(prompt(3), [4, 5], [6]), sampled_logprobs=tuple(logprobs[1:]))
    batch = pack_row([first, second])
    assert batch.sampled_logprobs is not None and batch.sampled_logprobs.dtype == torch.float32
    assert batch.sampled_logprobs.tolist() == [-2.5, -1.5, -0.5, -3.5, -4.5]
    assert batch.off_policy is None
    off_policy = pack_row([first, replace(second, off_policy=True)]).off_policy
    assert off_policy is not None and off_policy.tolist() == [False] * 2 + [True] * 3


def test_an_image_shown_twice_stands_once() -> None:
    cat, dog = image("cat", 2), image("dog", 1)
    batch = pack_row([segment(prompt(1, cat, dog), [5]), segment(prompt(1, dog, cat), [6])])
    assert [i.key for i in batch.images] == ["cat", "dog"]
    assert batch.visual_positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert batch.visual_source.tolist() == [0, 1, 2, 2, 0, 1]


def test_an_image_token_in_a_completion_is_text() -> None:
    batch = pack_row([segment(prompt(1, image("cat", 2)), [IMAGE, IMAGE], [IMAGE])])
    assert batch.visual_positions.tolist() == [0, 1]


def test_empty_completions_are_packed_and_score_nothing() -> None:
    batch = pack_row([segment(prompt(3), [], [8, 9], [], [7]), segment(prompt(2), [])])
    assert batch.completion_cu_seqlens.tolist() == [0, 0, 2, 2, 3, 3]
    assert batch.scored.tolist() == [2, 3, 2]
    # The first completion with tokens goes on in the prompt's piece; the empty ones are no piece.
    assert batch.cu_seqlens_q.tolist() == [0, 5, 6, 8]
    assert batch.prefix_lengths.tolist() == [0, 3, 0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [16, 30, 1000])
def test_pack_tells_where_completions_came_from(share: bool, budget: int) -> None:
    segments = [
        segment(prompt(n), *([10 * n + r] * (r + 1) for r in range(3)), group=n % 2)
        for n in (9, 2, 8, 1)
    ]
    batches = pack(segments, budget, share)
    sources = [source for b in batches for source in b.source]
    assert sorted(sources) == [(i, r) for i in range(4) for r in range(3)]
    for batch in batches:
        assert batch.num_tokens <= budget
        parts = batch.targets.split(batch.completion_cu_seqlens.diff().tolist())
        for (i, r), targets, advantage in zip(batch.source, parts, batch.advantages, strict=True):
            assert targets.tolist() == segments[i].completions[r].tolist()
            assert advantage == segments[i].advantages[r]
    if not share:
        assert all(b.prefix_lengths.sum() == 0 for b in batches)


@pytest.mark.parametrize("share", [True, False])
def test_rows_hold_whole_groups(share: bool) -> None:
    """By size alone best fit would put the prompts 0 and 2 together, and 1 and 3."""
    sizes = ((6, 0), (6, 1), (4, 1), (3, 0))
    segments = [segment(prompt(n - 1), [7], group=group) for n, group in sizes]
    rows = [[i for i, _ in batch.source] for batch in pack(segments, 10, share)]
    assert rows == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("loads", "budget", "share", "rows"),
    [
        pytest.param(
            [(2, (1,), 0), (2, (1,), 1), (2, (1,), 0), (2, (1,), 1)],
            12,
            True,
            ["0:0 1:0 2:0 3:0"],
            id="shares of interleaved groups in the order of segments",
        ),
        pytest.param(
            [(4, (1,), 0), (4, (1,), 1), (4, (1,), 0)],
            6,
            True,
            ["0:0", "1:0", "2:0"],
            id="rows in the order of their first segment",
        ),
        pytest.param(
            [(4, (3, 1, 2, 3, 1), 0)],
            10,
            True,
            ["0:0,3", "0:1,2,4"],
            id="completions over two rows, each full",
        ),
        pytest.param(
            [(4, (3, 1), 0)], 8, False, ["0:0", "0:1"], id="a copy of the prompt for each"
        ),
        pytest.param(
            [(4, (3, 1), 0)], 12, False, ["0:0 0:1"], id="the copies of a group in one row"
        ),
        pytest.param(
            [(5, (), 0), (5, (), 0)], 5, True, ["0:", "1:"], id="prompts without completions"
        ),
        pytest.param([(4, (), 0), (2, (1,), 0)], 5, False, ["1:0"], id="of which no copy is made"),
        pytest.param(
            [(3, (9, 1, 1), 0), (1, (2,), 1)],
            5,
            True,
            ["0:0", "0:1,2", "1:0"],
            id="one over the budget stands alone",
        ),
        pytest.param(
            [(6, (1, 1, 1), 0)], 5, True, ["0:0", "0:1", "0:2"], id="a prompt over the budget"
        ),
        pytest.param(
            [(n, (0,), i) for i, n in enumerate((3, 6, 5, 2, 4))],
            10,
            True,
            ["0:0 2:0 3:0", "1:0 4:0"],
            id="the largest first, each where it leaves least",
        ),
    ],
)
def test_plans(
    loads: list[tuple[int, tuple[int, ...], int]], budget: int, share: bool, rows: list[str]
) -> None:
    planned = plan([Load(*load) for load in loads], budget, share)
    written = [
        " ".join(f"{s.segment}:{','.join(map(str, s.completions))}" for s in row) for row in planned
    ]
    assert written == rows


def sees(batch: PackedBatch) -> list[list[int]]:
    """The rows that each token of a batch may read, from its pieces alone."""
    out = []
    for start, end, first, length in zip(
        batch.cu_seqlens_q[:-1].tolist(),
        batch.cu_seqlens_q[1:].tolist(),
        batch.prefix_starts.tolist(),
        batch.prefix_lengths.tolist(),
        strict=True,
    ):
        prefix = list(range(first, first + length))
        out += [prefix + list(range(start, token + 1)) for token in range(start, end)]
    return out


@given(LOADS.filter(bool), st.integers(5, 80), st.booleans())
def test_each_token_reads_what_it_would_read_alone(
    loads: list[Load], budget: int, share: bool
) -> None:
    """Every scored row reads exactly its prompt and its own completion before the target, in order."""
    segments, token = [], 0
    for load in loads:
        ids = np.arange(token, token + load.tokens)
        token += load.tokens
        ends = np.cumsum([load.prompt, *load.completions])
        parts = np.split(ids, ends[:-1])
        p = EncodedPrompt(parts[0], np.arange(load.prompt)[None], load.prompt, (), -1)
        segments.append(segment(p, *parts[1:], group=load.group))
    for batch in pack(segments, budget, share):
        reads, row = sees(batch), 0
        for i, r in batch.source:
            alone = [*segments[i].prompt.input_ids, *segments[i].completions[r]]
            for k in range(len(segments[i].completions[r])):
                seen = reads[batch.scored[row]]
                length = len(segments[i].prompt.input_ids) + k
                assert batch.input_ids[seen].tolist() == alone[:length]
                assert batch.position_ids[0, seen].tolist() == list(range(length))
                assert batch.targets[row] == alone[length]
                row += 1
        assert row == batch.num_scored


def test_the_report() -> None:
    cat, dog = image("cat", 2), image("dog", 1)
    segments = [
        segment(prompt(7, cat, dog), [1, 2], [3, 4]),
        segment(prompt(7, dog, cat), [1, 2], [3, 4]),
    ]
    alone = packing_counts(pack(segments, 28), segments, 28)
    assert packing_report(alone) == {
        **{"rows": 1, "tokens": 28, "images": 2, "fill": 1.0},
        **{"token_sharing": 48 / 28, "image_sharing": 4.0},
    }
    repeated = packing_report(packing_counts(pack(segments, 28, share=False), segments, 28))
    assert repeated.items() >= {"rows": 2, "token_sharing": 1.0, "fill": 48 / 56}.items()
    # A row that only takes part is a row without tokens.
    rows = [*pack(segments, 28), empty_row(1)]
    waiting = packing_report(packing_counts(rows, segments, 28))
    assert (
        waiting.items() >= {"rows": 2, "tokens": 28, "fill": 0.5, "token_sharing": 48 / 28}.items()
    )
    nothing = packing_report(packing_counts([], [], 28))
    assert nothing.items() >= {"fill": 0.0, "token_sharing": 1.0, "image_sharing": 1.0}.items()
