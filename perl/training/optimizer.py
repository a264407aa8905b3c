"""One optimizer step over packed micro-batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from perl.model.families import ImageFeatures
from perl.model.head import LossOutput
from perl.model.policy import Policy
from perl.model.vision import StepFeatures
from perl.timing import span
from perl.types import EncodedImage, PackedBatch, UserError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate over optimizer steps: linear warm-up, then constant, linear or cosine decay to zero."""

    peak: float
    kind: str
    warmup_steps: int
    steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step number `step`, from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        left = 1 - (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[
            self.kind
        ]
        return self.peak * max(0.0, factor)


class Updater:
    """AdamW with clipping, over any number of micro-batches and processes.

    Losses come normalised by the whole step's count, so gradients are summed over micro-batches and over processes.

    Args:
        accelerator: device, precision and processes.
        policy: whose weights with `requires_grad` are trained.
        schedule: learning rate by optimizer step.
    """

    def __init__(
        self,
        accelerator: Any,
        policy: Policy,
        schedule: Schedule,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
    ) -> None:
        self.accelerator, self.policy, self.schedule = accelerator, policy, schedule
        self.max_grad_norm = max_grad_norm
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        plain = [p for p in self.parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=schedule.peak,
            betas=betas,
        )

    def step(
        self,
        number: int,
        batches: Sequence[PackedBatch],
        loss_of: Callable[[int, PackedBatch, ImageFeatures | None], LossOutput],
    ) -> dict[str, float]:
        """Forward, backward, clip, step.

        Args:
            number: of the optimizer step, for the schedule.
            batches: this process's micro-batches; may be empty, other processes' gradients still arrive.
            loss_of: loss of the i-th batch, its share of the whole step's, given the features of its images or
                None where the model is to look them up itself.

        Raises:
            UserError: the gradient is NaN or infinite; the weights are as before the step.

        Returns:
            `loss` (the whole step's), `grad_norm` before clipping, `lr`, and the loss's metrics as means over tokens.
        """
        self.policy.train()
        totals: defaultdict[str, torch.Tensor] = defaultdict(
            lambda: torch.zeros((), device=self.policy.device)
        )
        shared = StepFeatures(self._encode, batches) if self.policy.vision.trained else None
        for index, batch in enumerate(batches):
            with shared.of(index) if shared else nullcontext() as features:
                with self.accelerator.autocast():
                    output = loss_of(index, batch, features)
                with span("language_model.backward"):
                    output.loss.backward()
            totals["loss"] += output.loss.detach()
            totals["scored"] += batch.num_scored
            for name, value in output.metrics.items():
                if name.endswith("_max"):
                    totals[name] = torch.maximum(totals[name], value.float())
                elif name in _COUNTS:
                    totals[name] += value.float()
                else:
                    totals[name] += value.float() * batch.num_scored
        with span("sync"):
            self._sum_over_processes()
        with span("optimizer"):
            clipped = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        with span("sync"):  # Here the host waits for the device.
            norm = float(clipped)
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise UserError(
                f"the gradient of optimizer step {number + 1} is not finite ({norm}); "
                "lower the learning rate or lengthen the warm-up, and start from the last checkpoint"
            )
        lr = self.schedule(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimizer"):
            self.optimizer.step()
        if self.policy.vision.trained:
            self.policy.vision.clear_cache()
        self.optimizer.zero_grad(set_to_none=True)
        with span("sync"):
            return {**self._reduced(totals), "grad_norm": norm, "lr": lr}

    def _encode(self, images: Sequence[EncodedImage]) -> ImageFeatures:
        with self.accelerator.autocast():
            return self.policy.vision.encode(images)

    def _sum_over_processes(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def _reduced(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over all tokens of all processes; one transfer to the host."""
        names = sorted({*totals, *_ALWAYS})
        values = torch.stack([totals[name].double() for name in names])
        if self.accelerator.num_processes > 1:
            maxima = values.clone()
            torch.distributed.all_reduce(values)
            torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
            is_max = torch.tensor([name.endswith("_max") for name in names], device=values.device)
            values = torch.where(is_max, maxima, values)
        out = dict(zip(names, values.tolist(), strict=True))
        scored = max(1.0, out.pop("scored"))
        whole = ("loss", *_COUNTS)
        return {k: v if k in whole or k.endswith("_max") else v / scored for k, v in out.items()}


_COUNTS = ("tokens", "invalid_rows")
"""Metrics that add up."""

_ALWAYS = (
    *(
        "loss",
        "scored",
        "kl",
        "entropy",
        "clip_fraction",
        "clip_fraction_low",
        "clip_fraction_high",
    ),
    *(
        "dual_clip_fraction",
        "ratio_mean",
        "ratio_max",
        "rollout_kl",
        "correction_mean",
        "tokens",
        "invalid_rows",
    ),
)
"""Every process reduces the same names in the same order, also one that had no micro-batch."""
