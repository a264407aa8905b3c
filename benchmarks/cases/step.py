"""A training step of a small model three ways, over images and rollouts per prompt.

The setting of the paper, on a model of its size, is `bench_train_step.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench_train_step import parse
from benchmarks.harness.contest import Contest, Problem, Provider, Refused, Run
from benchmarks.train_step.measure import Reference, fresh, make_trainee
from benchmarks.train_step.variants import Step

OP = "Training step"
SHARED, PACKED, PADDED = (
    "no padding; each prompt and each image once",
    "no padding; a prompt and images for each completion",
    "stock model: padding, and a prompt and images for each completion",
)


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """One question in two orders; images or rollouts of each order vary."""
    return [
        *[_contest("images per prompt", images=(n,), rollouts=2) for n in (2, 4, 8, 16, 32)],
        *[_contest("rollouts per prompt", images=(4,), rollouts=n) for n in (1, 2, 4, 8, 16)],
    ]


def _contest(axis: str, images: tuple[int, ...], rollouts: int) -> Contest:
    shape = {"images per prompt": images[0], "rollouts per prompt": rollouts, "orders": 2}
    return Contest(
        OP,
        f"{images[0]} images, 2 orders, {rollouts} rollouts of each",
        shape,
        partial(StepProblem, images, rollouts),
        [
            Provider("PeRL, shared", partial(_run, "shared"), note=SHARED),
            Provider("PeRL, packed", partial(_run, "packed"), note=PACKED),
            Provider("transformers, padded", partial(_run, "padded"), "transformers", PADDED),
        ],
        axis=axis,
    )


class StepProblem(Problem):
    """A model and the completions of one step; what padded computes of them is the truth."""

    def __init__(self, images: tuple[int, ...], rollouts: int, device: torch.device) -> None:
        model = "0.6b" if device.type == "cuda" else "tiny"
        setting, _ = parse([f"--device={device.type}", f"--model={model}"])
        sizes = {"tokens_per_image": 64, "completion": 128}
        if device.type == "cpu":
            sizes = {"tokens_per_image": 40, "completion": 48}
        workload = replace(setting.workload, images=images, rollouts=rollouts, orders=2, **sizes)
        self.trainee = make_trainee(replace(setting, workload=workload))

    def find_truth(self) -> None:
        self.reference = Reference(self.trainee, fresh(self.trainee, "padded")())

    def prove(
        self, results: tuple[str, Step], omits: frozenset[str] = frozenset(), slack: float = 1.0
    ) -> float:
        try:
            return self.reference.check(*results, self.trainee)
        except AssertionError as error:
            raise Refused(f"{error}; not timed") from error


def _run(variant: str, p: StepProblem) -> Run:
    """A step from no gradients."""
    step: Callable[[], Step] = partial(p.trainee.step, variant)
    clear = partial(p.trainee.model.zero_grad, set_to_none=True)
    return Run(step, clear, lambda found: (variant, found))
