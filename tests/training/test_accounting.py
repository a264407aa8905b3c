"""What a step of several processes counts, by hand: sums, means over all of it, FLOPs of each stage and shares of a peak."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.distributed import Processes
from perl.training.accounting import StepFlops, Tally, rolled_out, row_of
from perl.training.parallel.balancing import Met, ModelFlops
from perl.training.roofline.devices import Peak, peak_of
from tests.training.two_tokens import FACTS, Accelerator, Together, segment

FLOPS = ModelFlops(token=10.0, pair=1.0, scored=5.0, visual=20.0)
WHOLE = replace(FACTS, flops=FLOPS, trained_layers=10)
ADAPTERS = replace(WHOLE, trained_layers=2, head_trained=False, tower_trained_weights=0)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("perl.training.accounting.facts_of", lambda policy, _: policy.facts)
    vision = SimpleNamespace(encoded=Counter({4: 7}))
    return SimpleNamespace(shares_prompts=True, dtype=torch.float32, vision=vision, facts=WHOLE)


def test_flops_of_a_step_by_hand(policy: Any) -> None:
    """A prompt of 2 tokens with completions of 3 and 1, beside 2 images of 3 tokens, which are 6 patches each."""
    flops = StepFlops(policy, share_prompts=True)
    flops.begin_step()
    met = flops.met(segment([[0, 1, 0], [1]], [1.0, -1.0]))
    # Half of 2 x 2 in the prompt; 3 x 2 and half of 3 x 3; 1 x 2 and a half.
    assert met == Met(tokens=6, pairs=2 + 6 + 4.5 + 2 + 0.5, scored=4)
    policy.vision.encoded[3] += 2
    # One block sees all 6 patches, the other 5.
    image = 2 * 3 * 20 + 4 * 3 * 6 * (6 + 5)
    text = {"language": 2 * 6 * 10 + 2 * 15, "head": 2 * 4 * 5}
    assert flops("rollout", [met]) == {
        "flops/rollout/language": text["language"],
        "flops/rollout/head": text["head"],
        "flops/rollout/vision": 2 * image,
    }
    # The images were counted; of a tower of 4 weights one is trained, and gradients go through all.
    policy.vision.encoded[3] += 1
    assert flops("update", [met, met], gradients=True) == {
        "flops/update/language": 2 * 3 * text["language"],
        "flops/update/head": 2 * 3 * text["head"],
        "flops/update/vision": image * (1 + 1 + 1 / 4),
    }
    assert set(flops("logprobs", []).values()) == {0}
    unshared = StepFlops(policy, share_prompts=False)
    assert unshared.met(segment([[0, 1, 0], [1]], [1.0, -1.0])).tokens == 8


def test_what_is_frozen_costs_no_gradient_of_weights(policy: Any) -> None:
    policy.facts = ADAPTERS
    flops = StepFlops(policy, share_prompts=True)
    met = Met(tokens=6, pairs=15, scored=4)
    # Forward, gradients of inputs, and of 2 of 10 weights; attention has no weights. The head passes gradients on.
    found = flops("update", [met], gradients=True)
    assert found["flops/update/language"] == 2 * 6 * (10 + 10 + 2) + 3 * 2 * 15
    assert found["flops/update/head"] == 2 * 2 * 4 * 5
    # Images from before the step's beginning; of a frozen tower they go forward alone.
    policy.vision.encoded[1] += 1
    assert (
        flops("update", [], gradients=True)["flops/update/vision"] == 2 * 20 * 3 * 1 + 4 * 3 * 2 * 4
    )
    # The reference goes without the adapters, of which the two trained weights are.
    assert flops("logprobs", [met], adapters=False)["flops/logprobs/language"] == 2 * 6 * 8 + 30


def test_padded_policies_are_not_counted(policy: Any) -> None:
    policy.shares_prompts = False
    flops = StepFlops(policy, share_prompts=True)
    flops.begin_step()
    assert flops("rollout", []) == {} and flops.peak(torch.device("cpu")) is None


def test_two_processes_make_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of 100 FLOPs a second; the second process is the slower one and lacks a reward."""
    together = Together(2, monkeypatch)

    def of(index: int) -> Tally:
        tally = Tally(agreed={"lr": 0.5})
        tally.average("reward/mean", [[1.0, 0.0, np.nan, None], [1.0]][index])
        tally.average("reward/own", [[], []][index])
        if not index:
            tally.average("logged/only_here", [3.0])
        tally.sums = {"tokens/prompt": 30 + index, "tokens/completion": 20, "groups/seen": 1}
        tally.sums |= {
            "flops/rollout/language": 150.0,
            "flops/update/language": 150.0 + 300 * index,
        }
        tally.sums |= {"flops/update/vision": 100.0, "flops/logprobs/language": 0.0}
        packing = {"rows": 1, "tokens": 10 + 10 * index, "images": index, "room": 20}
        packing |= {"unshared_tokens": 45, "unshared_images": 2 * index}
        tally.sums |= {f"packing/{name}": n for name, n in packing.items()}
        tally.largest = {"time/rollout": 2.0 + index, "time/update": 5.0 - index, "time/step": 10.0}
        return tally

    def process(index: int) -> dict[str, float]:
        gathered = Processes(Accelerator(together)).gather([of(index)])
        return row_of(gathered, Peak(100.0, "given"))

    one, other = together.run(process)
    np.testing.assert_equal(one, other)
    assert np.isnan(one.pop("reward/own"))
    assert one == {
        "lr": 0.5,
        "reward/mean": 2 / 3,
        "logged/only_here": 3.0,
        **{"tokens/prompt": 61, "tokens/completion": 40, "groups/seen": 2},
        **{"flops/rollout/language": 300.0, "flops/update/language": 600.0},
        **{"flops/update/vision": 200.0, "flops/logprobs/language": 0.0},
        **{"packing/rows": 2, "packing/tokens": 30, "packing/images": 1, "packing/fill": 0.75},
        **{"packing/token_sharing": 3.0, "packing/image_sharing": 2.0},
        **{"time/rollout": 3.0, "time/update": 5.0, "time/step": 10.0},
        "throughput/tokens_per_second": 10.1,
        "throughput/tokens_per_second_per_gpu": 5.05,
        # Of 2 x 100 a second, in 3, 5 and 10 seconds.
        **{"mfu/rollout": 0.5, "mfu/update": 0.8, "mfu/step": 0.55},
    }
    assert not any(name.startswith("mfu/") for name in row_of([of(0)], None))


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H20", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_makers(
    name: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(0))
    took = iter([9.0, 2.0, 1.0, 3.0, 2.0, 2.0])
    monkeypatch.setattr("perl.training.roofline.devices._seconds_of_product", lambda _: next(took))
    cuda = torch.device("cuda", 0)
    peak = peak_of.__wrapped__(cuda, torch.bfloat16)
    if flops:
        assert peak.flops == flops and "NVIDIA" in peak.source
        # The table's is of bfloat16.
        peak = peak_of.__wrapped__(cuda, torch.float32)
    assert peak.flops == 2 * 8192**3 / 1.0 and peak.source.startswith("measured: ")


def test_a_cpus_peak_is_measured() -> None:
    peak = peak_of(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops < 1e15
    assert peak.source == "measured: products of 512 x 512 in float32"


def test_sampling_reads_a_prompt_once() -> None:
    def rollout(order: tuple[int, ...], prompt: int, length: int) -> Any:
        variant, ids = SimpleNamespace(order=order), np.zeros(prompt)
        return SimpleNamespace(
            variant=variant, prompt=SimpleNamespace(input_ids=ids), token_ids=np.zeros(length)
        )

    group: Any = SimpleNamespace(
        rollouts=[rollout((0, 1), 4, 1), rollout((1, 0), 4, 3), rollout((0, 1), 4, 2)]
    )
    assert rolled_out([group]) == [Met.of(4, [1, 2]), Met.of(4, [3])]
