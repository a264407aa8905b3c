"""The packer: nothing lost, nothing twice, no row over its budget, indices that point where they should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perl.packing import pack, pack_row, plan
from perl.types import EncodedImage, EncodedPrompt, Segment

IMAGE = 99


def image(key: str, tokens: int) -> EncodedImage:
    return EncodedImage(key, torch.zeros(tokens * 4, 6), (1, 2, 2 * tokens), tokens)


def prompt(length: int, *images: EncodedImage) -> EncodedPrompt:
    """Text of `length` tokens after the images' tokens."""
    ids = np.array([IMAGE] * sum(i.tokens for i in images) + list(range(length)), dtype=np.int64)
    positions = np.tile(np.arange(len(ids)), (3, 1))
    return EncodedPrompt(ids, positions, len(ids), images, IMAGE)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 60))
def test_every_sequence_once_and_no_row_over_budget(lengths: list[int], budget: int) -> None:
    rows = plan(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= budget or len(row) == 1
    assert rows == plan(lengths, budget)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_two_rows_never_fit_into_one(lengths: list[int]) -> None:
    """Best fit leaves at most one row half empty."""
    budget = 20
    loads = sorted(sum(lengths[i] for i in row) for row in plan(lengths, budget))
    assert sum(load <= budget // 2 for load in loads) <= 1


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        plan([1], 0)


def test_a_row_of_two_segments() -> None:
    segments = [
        Segment(prompt(5), np.array([7, 8, 9]), 0.5),
        Segment(prompt(4), np.array([3, 4]), -1.0),
    ]
    batch = pack_row(segments)
    assert batch.num_tokens == 14
    assert batch.cu_seqlens.tolist() == [0, 8, 14]
    assert batch.max_seqlen == 8
    assert batch.scored.tolist() == [4, 5, 6, 11, 12]
    assert batch.targets.tolist() == [7, 8, 9, 3, 4]
    assert batch.input_ids[batch.scored + 1].tolist() == batch.targets.tolist()
    assert batch.completion_cu_seqlens.tolist() == [0, 3, 5]
    assert batch.advantages.tolist() == [0.5, -1.0]
    assert batch.position_ids[0].tolist() == [*range(8), *range(6)]


def test_completion_positions_go_on_from_the_prompt() -> None:
    p = prompt(2)
    p = EncodedPrompt(p.input_ids, p.position_ids, 31, p.images, IMAGE)
    batch = pack_row([Segment(p, np.array([1, 2, 3]))])
    assert batch.position_ids[1:, 2:].tolist() == [[31, 32, 33]] * 3
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4]


def test_an_image_shown_twice_stands_once() -> None:
    cat, dog = image("cat", 2), image("dog", 1)
    segments = [
        Segment(prompt(1, cat, dog), np.array([5])),
        Segment(prompt(1, dog, cat), np.array([6])),
    ]
    batch = pack_row(segments)
    assert [i.key for i in batch.images] == ["cat", "dog"]
    assert batch.visual_positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert batch.visual_source.tolist() == [0, 1, 2, 2, 0, 1]


def test_an_image_token_in_a_completion_is_text() -> None:
    batch = pack_row([Segment(prompt(1, image("cat", 2)), np.array([IMAGE, IMAGE]))])
    assert batch.visual_positions.tolist() == [0, 1]


def test_empty_completions_are_packed_and_score_nothing() -> None:
    batch = pack_row(
        [Segment(prompt(3), np.array([], dtype=np.int64)), Segment(prompt(2), np.array([1]))]
    )
    assert batch.completion_cu_seqlens.tolist() == [0, 0, 1]
    assert batch.scored.tolist() == [4]


def test_pack_tells_where_segments_came_from() -> None:
    segments = [Segment(prompt(n), np.arange(n)) for n in (9, 2, 8, 1)]
    batches = pack(segments, 20)
    assert sorted(i for b in batches for i in b.segment_index) == [0, 1, 2, 3]
    for batch in batches:
        lengths = batch.cu_seqlens.diff().tolist()
        assert lengths == [2 * len(segments[i].completion_ids) for i in batch.segment_index]


def test_no_segments() -> None:
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="at least one segment"):
        pack_row([])
