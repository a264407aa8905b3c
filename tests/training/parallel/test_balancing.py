"""Groups go from busy processes to idle ones, each exactly once, with everything that training needs of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.config import ModelConfig
from perl.distributed import Processes
from perl.model.loading import load_policy, load_processor
from perl.training.parallel.balancing import ModelFlops, Piece, Work, balance, deal, share_out
from perl.types import EncodedImage, EncodedPrompt, Segment
from tests.training.two_tokens import Accelerator, Together

PICTURE = Image.new("RGB", (112, 56))
FLOPS = ModelFlops(token=10.0, pair=1.0, scored=5.0, visual=20.0)


def group(name: int, prompt: int, images: int = 0) -> Work:
    shown = tuple(
        EncodedImage(f"{name}-{k}", torch.ones(4, 6), (1, 2, 2), 1) for k in range(images)
    )
    encoded = EncodedPrompt(np.full(prompt, name), np.arange(prompt)[None], prompt, shown, -1)
    return [Segment(encoded, (np.array([1, 2]), np.array([3])), (1.0, -1.0))] * 2


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """A function from the work of each process to the groups that each has afterwards."""

    def run(*work: list[Work]) -> list[list[int]]:
        together = Together(len(work), monkeypatch)

        def process(index: int) -> list[Work]:
            return share_out(work[index], FLOPS, Processes(Accelerator(together)))

        out = together.run(process)
        assert all([len(s.completions) for s in w] == [2, 2] for own in out for w in own)
        return [names(own) for own in out]

    return run


def names(work: list[Work]) -> list[int]:
    return [int(w[0].prompt.input_ids[0]) for w in work]


def test_a_busy_process_hands_a_group_on_whole(shared: Callable[..., list[list[int]]]) -> None:
    """Costs are 12695, 10575 and 455 beside 1015."""
    busy = [group(0, 100), group(1, 90, images=2), group(2, 10)]
    out = shared(busy, [group(3, 20)])
    assert [sorted(own) for own in out] == [[0], [1, 2, 3]]


def test_work_stays_where_it_is_equal_and_half_of_it_goes_to_who_has_none(
    shared: Callable[..., list[list[int]]],
) -> None:
    assert shared([group(0, 50)], [group(1, 50)]) == [[0], [1]]
    assert [len(own) for own in shared([group(0, 50), group(1, 40)], [])] == [1, 1]
    assert shared([], []) == [[], []]


def test_the_cost_of_a_group_counts_prompts_once_an_order_and_images_once() -> None:
    [segment, _] = work = group(0, 10, images=3)
    tokens, scored = 2 * (10 + 3), 2 * 3
    pairs = 2 * (10**2 / 2 + 2 * 10 + 2**2 / 2 + 10 + 1 / 2)
    assert FLOPS.group(work) == 10 * tokens + pairs + 5 * scored + 20 * 3
    assert FLOPS.group([segment]) == pytest.approx((FLOPS.group(work) - 60) / 2 + 60)


def test_a_piece_follows_its_group_to_where_it_went() -> None:
    """At most 7.35 each: the owner would have room for the second piece too, and would encode the images again."""
    whole, first, second, other = (Piece(*p) for p in ((0, 0, 6), (1, 0, 5), (1, 0, 1), (2, 1, 1)))
    dealt = deal([whole, first, second, other, replace(other, group=3)], 2)
    assert dealt == [(0, 0), (1, 0), (1, 0), (1, 0), (0, 0)]


def test_unshared_prompts_are_counted_for_each_completion() -> None:
    unshared = replace(FLOPS, shared=False)
    [segment, _] = group(0, 10)
    single = [replace(segment, completions=(c,)) for c in segment.completions]
    assert unshared.group([segment]) == sum(FLOPS.group([s]) for s in single)


@pytest.mark.parametrize(
    ("name", "frozen", "patches"),
    [
        ("tiny-qwen2.5-vl", False, 4),
        ("tiny-qwen3-vl", True, 4),
        ("tiny-internvl", False, 4),
    ],
)
def test_flops_come_from_the_model(
    name: str, frozen: bool, patches: int, tiny_folder: Callable[[str], Path]
) -> None:
    config = ModelConfig(freeze_vision=frozen)
    policy = load_policy(str(tiny_folder(name)), config, torch.device("cpu"))
    flops = ModelFlops.of(policy)
    assert flops.scored == policy.head_weight.numel() and flops.shared
    # Four layers of q, k, v, o of 128 x 128 and three matrices of 128 x 512, and some vectors.
    assert flops.token == pytest.approx(4 * (4 * 128**2 + 3 * 128 * 512), rel=0.01)
    assert flops.pair == 2 * 4 * 128
    [processor_image] = [load_processor(str(tiny_folder(name)), config).encode_image(PICTURE)]
    made = processor_image.pixel_values.shape
    # Patches of 14 or 16 pixels, whether they come as such or inside tiles.
    total = made[0] if len(made) == 2 else made[0] * (made[2] // 14) * (made[3] // 14)
    assert total / processor_image.tokens == patches
    # All of the tower works on patches, but what makes visual tokens of them, and positions that are only added.
    weights = sum(p.numel() for p in policy.vision.weights)
    if name == "tiny-internvl":
        mergers = [policy.core.multi_modal_projector]
        added = policy.core.vision_tower.embeddings.position_embeddings.numel()
    else:
        visual = policy.core.visual
        mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", ())]
        added = visual.pos_embed.weight.numel() if hasattr(visual, "pos_embed") else 0
    merging = sum(p.numel() for m in mergers for p in m.parameters())
    expected = patches * (weights - merging - added) + merging
    assert merging and flops.visual == pytest.approx(expected / (3 if frozen else 1))
    assert not ModelFlops.of(policy, share_prompts=False).shared


COSTS = st.lists(st.lists(st.floats(0, 100), max_size=8), min_size=1, max_size=5)


@given(COSTS)
def test_work_is_balanced_within_grahams_bound(costs: list[list[float]]) -> None:
    owners = balance(costs, tolerance=1.0)
    assert [len(o) for o in owners] == [len(c) for c in costs]
    pieces = [
        (o, c) for os, cs in zip(owners, costs, strict=True) for o, c in zip(os, cs, strict=True)
    ]
    loads = [sum(c for o, c in pieces if o == p) for p in range(len(costs))]
    longest = max((c for _, c in pieces), default=0)
    # What giving each piece to the least busy never exceeds.
    assert max(loads) <= sum(loads) / len(loads) + longest + 1e-9
    assert max(loads) <= max(sum(c) for c in costs) + 1e-9


def test_little_work_moves() -> None:
    assert balance([[3.0, 3.0], [3.0, 3.1]]) == [[0, 0], [1, 1]]
    # 6.1 and 5.9 could become 6.0 and 6.0: within 5 % of the mean it is not worth a move.
    uneven = [[3.0, 3.0, 0.1], [3.0, 2.9]]
    assert balance(uneven) == [[0, 0, 0], [1, 1]]
    assert balance(uneven, tolerance=1.01) != [[0, 0, 0], [1, 1]]
    # The second process keeps what it has and gets one piece more.
    assert balance([[4.0, 4.0, 1.0], [1.0]]) == [[0, 1, 0], [1]]
    assert balance([[], [5.0, 4.0]]) == [[], [1, 0]]
    assert balance([[], []]) == [[], []]
    # Dealt out anew they would be 5.2 and 7.2.
    assert balance([[3.2, 3.2], [2.0, 2.0, 2.0]], tolerance=1.0) == [[0, 0], [1, 1, 1]]
