"""Groups go from busy processes to idle ones, each exactly once, with everything that training needs of them."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.training.balancing import ModelFlops, Work, balance, share_out
from perl.types import EncodedImage, EncodedPrompt, Segment

PICTURE = Image.new("RGB", (112, 56))
FLOPS = ModelFlops(token=10.0, pair=1.0, scored=5.0, visual=20.0)


class Together:
    """Stands for the processes of a run: threads that exchange things."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.lists: list[list[Any]] = [[] for _ in range(count)]
        self.sent = 0

    def process(self, index: int) -> Any:
        together = self

        class Process:
            def __init__(self) -> None:
                self.index = index

            def gather(self, items: list[Any]) -> list[Any]:
                together.lists[index] = items
                together.barrier.wait(10)
                out = [x for items in together.lists for x in items]
                together.barrier.wait(10)
                return out

            def exchange(self, moves: list[tuple[int, int]], leaving: list[Any]) -> list[Any]:
                assert len(leaving) == sum(source == index for source, _ in moves)
                every = self.gather(leaving)
                sources = sorted(source for source, _ in moves)
                assert sources == [source for source, _ in moves]
                together.sent += index == 0 and len(moves)
                return [x for x, (_, target) in zip(every, moves, strict=True) if target == index]

        return Process()


def group(name: int, prompt: int, images: int = 0) -> Work:
    shown = tuple(
        EncodedImage(f"{name}-{k}", torch.ones(4, 6), (1, 2, 2), 1) for k in range(images)
    )
    encoded = EncodedPrompt(np.full(prompt, name), np.arange(prompt)[None], prompt, shown, -1)
    return [Segment(encoded, (np.array([1, 2]), np.array([3])), (1.0, -1.0))] * 2


def shared(work: list[list[Work]]) -> tuple[list[list[Work]], int]:
    together = Together(len(work))
    out: list[list[Work]] = [[] for _ in work]

    def run(index: int) -> None:
        out[index] = share_out(work[index], FLOPS, together.process(index))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return out, together.sent


def names(work: list[Work]) -> list[int]:
    return [int(w[0].prompt.input_ids[0]) for w in work]


def test_a_busy_process_hands_a_group_on() -> None:
    work = [[group(0, 100), group(1, 90, images=2), group(2, 10)], [group(3, 20)]]
    out, _ = shared(work)
    assert sorted(names(out[0]) + names(out[1])) == [0, 1, 2, 3]
    costs = [sum(FLOPS.group(w) for w in own) for own in out]
    assert max(costs) < 0.7 * sum(FLOPS.group(w) for w in work[0])
    moved = next(w for w in out[1] if names([w]) != [3])
    assert moved[0].completions[0].tolist() == [1, 2]


def test_equal_work_stays() -> None:
    work = [[group(0, 50)], [group(1, 50)]]
    out, moved = shared(work)
    assert [names(own) for own in out] == [[0], [1]] and moved == 0


def test_a_process_without_work() -> None:
    out, moved = shared([[group(0, 50), group(1, 40)], []])
    assert [len(own) for own in out] == [1, 1] and moved == 1
    assert shared([[], []]) == ([[], []], 0)


def test_the_cost_of_a_group_counts_prompts_once_an_order_and_images_once() -> None:
    [segment, _] = work = group(0, 10, images=3)
    tokens, scored = 2 * (10 + 3), 2 * 3
    pairs = 2 * (10**2 / 2 + 2 * 10 + 2**2 / 2 + 10 + 1 / 2)
    assert FLOPS.group(work) == 10 * tokens + pairs + 5 * scored + 20 * 3
    assert FLOPS.group([segment]) == pytest.approx((FLOPS.group(work) - 60) / 2 + 60)


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
    weights = sum(p.numel() for p in policy.vision.weights)
    assert flops.visual == pytest.approx(patches * weights / (3 if frozen else 1))
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
