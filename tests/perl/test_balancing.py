"""Groups go from busy processes to idle ones, each exactly once, with everything that training needs of them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perl.balancing import ModelFlops, Work, share_out
from perl.config import ModelConfig
from perl.loading import load_policy
from perl.types import EncodedImage, EncodedPrompt, Segment

FLOPS = ModelFlops(token=10.0, pair=1.0, scored=5.0, visual=20.0)


class Together:
    """Stands for the processes of a run: threads that exchange lists."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count)
        self.lists: list[list[Any]] = [[] for _ in range(count)]
        self.sent = 0

    def process(self, index: int) -> Any:
        together = self

        class Process:
            count = together.count

            def __init__(self) -> None:
                self.index = index

            def gather(self, items: list[Any]) -> list[Any]:
                together.lists[index] = items
                together.barrier.wait(10)
                out = [x for items in together.lists for x in items]
                together.barrier.wait(10)
                together.sent += index == 0
                return out

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


def test_equal_work_stays_and_only_costs_are_told() -> None:
    work = [[group(0, 50)], [group(1, 50)]]
    out, exchanges = shared(work)
    assert [names(own) for own in out] == [[0], [1]] and exchanges == 1


def test_a_process_without_work_and_one_process() -> None:
    out, _ = shared([[group(0, 50), group(1, 40)], []])
    assert [len(own) for own in out] == [1, 1]
    out, exchanges = shared([[], []])
    assert out == [[], []] and exchanges == 1
    assert len(share_out([group(0, 5)], FLOPS, Together(1).process(0))) == 1


def test_the_cost_of_a_group_counts_prompts_once_an_order_and_images_once() -> None:
    [segment, _] = work = group(0, 10, images=3)
    tokens, scored = 2 * (10 + 3), 2 * 3
    pairs = 2 * (10**2 / 2 + 2 * 10 + 2**2 / 2 + 10 + 1 / 2)
    assert FLOPS.group(work) == 10 * tokens + pairs + 5 * scored + 20 * 3
    assert FLOPS.group([segment]) == pytest.approx((FLOPS.group(work) - 60) / 2 + 60)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_flops_come_from_the_model(name: str, tiny_folder: Callable[[str], Path]) -> None:
    policy = load_policy(str(tiny_folder(name)), ModelConfig(), torch.device("cpu"))
    flops = ModelFlops.of(policy)
    assert flops.scored == policy.head_weight.numel()
    # Four layers of q, k, v, o of 128 x 128 and three matrices of 128 x 512, and some vectors.
    assert flops.token == pytest.approx(4 * (4 * 128**2 + 3 * 128 * 512), rel=0.01)
    assert flops.pair == 2 * 4 * 128
    assert flops.visual == 4 * sum(p.numel() for p in policy.core.visual.parameters())
