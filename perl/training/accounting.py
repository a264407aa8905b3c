"""What a step of all processes was like: their numbers put together, its FLOPs, and the share of the devices' peak they are."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from perl.model.packed.pack import packing_report
from perl.model.policy import Policy
from perl.model.vision import Vision
from perl.training.parallel.balancing import Met, segment_met
from perl.training.roofline.devices import Peak, peak_of
from perl.training.roofline.model import facts_of
from perl.types import Group, Segment

STAGES = ("rollout", "logprobs", "update")
"""Of a step, as far as they compute with the model; the names that `time/` has for them."""


@dataclass
class Tally:
    """What one process knows of a step's numbers, by name, in such a form that those of all can be put together."""

    agreed: dict[str, float] = field(default_factory=dict)
    """The same in all processes."""
    sums: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Sum and number of the values that a mean over all processes is of."""
    largest: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: Tally) -> Tally:
        """With the numbers of other names."""
        return Tally(
            self.agreed | other.agreed,
            self.sums | other.sums,
            self.means | other.means,
            self.largest | other.largest,
        )

    def average(self, name: str, values: Iterable[float | None]) -> None:
        """Take values into a mean, but None and NaN."""
        kept = [float(v) for v in values if v is not None and not math.isnan(v)]
        self.means[name] = sum(kept), len(kept)


def _together(tallies: Sequence[Tally]) -> dict[str, float]:
    """One row of the tallies of all processes; a mean of nothing is NaN."""
    row = dict(tallies[0].agreed)
    means: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for tally in tallies:
        for name, value in tally.sums.items():
            row[name] = row.get(name, 0) + value
        for name, value in tally.largest.items():
            row[name] = max(row.get(name, value), value)
        for name, mean in tally.means.items():
            means[name].append(mean)
    for name, parts in means.items():
        total, count = map(sum, zip(*parts, strict=True))
        row[name] = total / count if count else math.nan
    return row


class StepFlops:
    """Counts what this process computes with the model, by stage and part: `flops/<stage>/<part>` of vision, language and head.

    Those of the model: a prompt once in each process that trains on some of its completions, an image whenever it goes
    through the tower, a layer that is computed again in the backward once. Nothing is counted of policies that train on
    padded batches.
    """

    def __init__(self, policy: Policy, share_prompts: bool) -> None:
        self.facts = facts_of(policy, share_prompts) if policy.shares_prompts else None
        self.dtype, self.shared = policy.dtype, share_prompts
        """Whether training reads a prompt once for all its completions."""
        self.towers: list[Vision] = [policy.vision]
        """Whose images count."""
        self._encoded: Counter[int] = Counter()

    def peak(self, device: torch.device) -> Peak | None:
        """What the FLOPs are compared with: of the dtype that the policy computes in."""
        return None if self.facts is None else peak_of(device, self.dtype)

    def met(self, segment: Segment) -> Met:
        return segment_met(segment, self.shared)

    def begin_step(self) -> None:
        """What went through the towers before is of no step."""
        if self.facts:
            self._new_images()

    def __call__(
        self, stage: str, met: Iterable[Met], gradients: bool = False, adapters: bool = True
    ) -> dict[str, float]:
        """Of one pass of a stage, with the images since the last one.

        Args:
            met: of the prompts and their completions.
            gradients: with the backward.
            adapters: False: a pass without the policy's adapters.
        """
        if self.facts is None:
            return {}
        met = list(met)
        whole = Met(*map(sum, zip(*met, strict=True))) if met else Met(0, 0, 0)
        parts = self.facts.text_flops(whole, gradients, adapters)
        parts["vision"] = self.facts.vision_flops(self._new_images(), gradients)
        return {f"flops/{stage}/{part}": amount for part, amount in parts.items()}

    def _new_images(self) -> Counter[int]:
        so_far = sum((tower.encoded for tower in self.towers), Counter[int]())
        new = so_far - self._encoded
        self._encoded = so_far
        return new


def add(amounts: dict[str, float], more: Mapping[str, float]) -> None:
    for name, amount in more.items():
        amounts[name] = amounts.get(name, 0.0) + amount


def rolled_out(groups: Sequence[Group]) -> list[Met]:
    """Of sampling: each prompt of a group is read once."""
    found = []
    for group in groups:
        lengths: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        prompts: dict[tuple[int, ...], int] = {}
        for rollout in group.rollouts:
            order = rollout.variant.order
            prompts[order] = len(rollout.prompt.input_ids)
            lengths[order].append(len(rollout.token_ids))
        found += [Met.of(prompt, lengths[order]) for order, prompt in prompts.items()]
    return found


def row_of(tallies: Sequence[Tally], peak: Peak | None) -> dict[str, float]:
    """The row of a step's metrics, of the tallies of all processes; no `mfu/` without a peak."""
    row = _together(tallies)
    packing = [name for name in row if name.startswith("packing/")]
    report = packing_report({name.removeprefix("packing/"): row.pop(name) for name in packing})
    row |= {f"packing/{name}": value for name, value in report.items()}
    return row | _rates(row, len(tallies), peak)


def _rates(row: Mapping[str, float], processes: int, peak: Peak | None) -> dict[str, float]:
    """Tokens a second, and what share of their peak the devices reached (MFU), from a step's row of all processes.

    Tokens are counted as EasyR1 does (`verl/trainer/metrics.py`): prompt and completion of every rollout, also where prompts
    were shared. FLOPs are those of `StepFlops`, of work that was done.
    """
    tokens = (row["tokens/prompt"] + row["tokens/completion"]) / row["time/step"]
    out = {
        "throughput/tokens_per_second": tokens,
        "throughput/tokens_per_second_per_gpu": tokens / processes,
    }
    done = {
        stage: sum(n for name, n in row.items() if name.startswith(f"flops/{stage}/"))
        for stage in STAGES
    }
    if peak is None or not sum(done.values()):
        return out
    for stage, flops in {**done, "step": sum(done.values())}.items():
        if flops and row.get(f"time/{stage}"):
            seconds = row[f"time/{stage}"] * processes
            out[f"mfu/{stage}"] = flops / (seconds * peak.flops)
    return out
