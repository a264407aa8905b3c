"""One optimizer step over packed micro-batches."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from perl.config import REWARD_SPEC, TrainConfig
from perl.distributed import Processes
from perl.failures import install_command
from perl.model.head import HeadLoss, PolicyLoss, step_normalizer
from perl.model.layers import uncompiled
from perl.model.sharding import tower_gathered
from perl.model.vision import StepFeatures
from perl.rewards.loading import read_options
from perl.rollout.mismatch import Mismatch
from perl.timing import span
from perl.training.parallel.gradients import as_sharded, sum_over_processes, total_norm
from perl.types import PackedBatch, UserError, one_line


class Schedule:
    """Learning rate over optimizer steps: a linear warm-up, then one of transformers' schedulers.

    A function of the step alone, so that a resumed run has no state of it to restore. The warm-up is our own, as theirs
    start at 0, which wastes the first batch of rollouts.

    Args:
        peak: the highest rate.
        kind: a scheduler's name, with options as in `cosine_with_min_lr(min_lr_rate=0.1)`.
        warmup_steps: before the scheduler begins.
        steps: in all.
        key: that `kind` is the value of, for messages.

    Raises:
        UserError: no such scheduler, or options that it does not take.
    """

    def __init__(
        self, peak: float, kind: str, warmup_steps: int, steps: int, key: str = "train.schedule"
    ) -> None:
        self.peak, self.warmup_steps = peak, warmup_steps
        self._factor = _scheduler(kind, peak, max(1, steps - warmup_steps), key)

    def __call__(self, step: int) -> float:
        """Learning rate of the optimizer step number `step`, from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * max(0.0, self._factor(step - self.warmup_steps))


def _scheduler(kind: str, peak: float, steps: int, key: str) -> Callable[[int], float]:
    """The share of the peak that a scheduler of transformers gives each of `steps` steps, from 0."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    # Left out: those that follow the loss of an evaluation.
    known = {
        str(name.value): function
        for name, function in TYPE_TO_SCHEDULER_FUNCTION.items()
        if name.value not in ("reduce_lr_on_plateau", "greedy")
    }
    match = REWARD_SPEC.fullmatch(kind.strip())
    if match is None or match["module"] or match["name"] not in known:
        raise UserError(f"{key} = {kind!r} is none of {', '.join(sorted(known))}")
    function = known[match["name"]]
    options = read_options(f"{key} = {kind!r}", match["options"] or "")
    wanted = inspect.signature(function).parameters
    given = {"num_warmup_steps": 0, "num_training_steps": steps}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak or 1.0)  # For the peak alone.
    try:
        scheduler: Any = function(
            optimizer, **{k: v for k, v in given.items() if k in wanted}, **options
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} = {kind!r}: {one_line(error)}; correct its options") from error
    return scheduler.lr_lambdas[0]


class Optimizer:
    """AdamW with clipping, over any number of micro-batches and processes.

    Losses come normalised by the whole step's count, so gradients are summed over micro-batches and over processes.
    Weights narrower than float32 have a float32 master each: it is what AdamW steps and what gradients add up on, and
    the weight is its rounding. torch's optimizers keep moments in the dtype of the weight, and no master. Of a weight that
    is sharded each process steps its shard: AdamW goes element by element, so that it need not know of the others.

    Args:
        accelerator: device and processes.
        head: the loss of the policy whose weights with `requires_grad` are trained.
        schedule: learning rate by optimizer step.
        config: weight decay, betas and the limit of the gradient's norm.
    """

    def __init__(
        self, accelerator: Any, head: HeadLoss, schedule: Schedule, config: TrainConfig
    ) -> None:
        self.accelerator, self.processes = accelerator, Processes(accelerator)
        self.head, self.policy, self.schedule = head, head.policy, schedule
        self.max_grad_norm = config.max_grad_norm or math.inf
        self.updates = 0
        """How often the weights have changed since the optimizer was made."""
        self.masters: dict[torch.Tensor, nn.Parameter] = {
            p: _master(p) for p in self.policy.parameters() if p.requires_grad
        }
        """By the weight that is computed with; one of float32 or wider is its own."""
        self._narrow = [weight for weight, master in self.masters.items() if master is not weight]
        self._stepped = {w: _stepped(master) for w, master in self.masters.items()}
        """What AdamW sees of each weight: its master, of a sharded one this process's shard."""
        # Norms and biases are not decayed: they have no scale that decay would bound.
        decayed = [p for p in self._stepped.values() if p.ndim >= 2]
        plain = [p for p in self._stepped.values() if p.ndim < 2]
        self.adamw = self._adamw(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            config,
        )
        # Made at once, so that memory that does not suffice shows before the first rollout.
        for weight, parameter in self._stepped.items():
            self.adamw.state[parameter] = self._fresh(weight, parameter)

    def _adamw(self, groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
        lr, betas = self.schedule.peak, config.betas
        self._in_8_bits = config.optimizer == "adamw_8bit"
        if self._in_8_bits:
            check_optimizer(config)
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

            return AdamW8bit(groups, lr=lr, betas=betas)
        fused = True if self.policy.device.type == "cuda" else None
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)

    def _fresh(self, weight: torch.Tensor, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state before its first step."""

        def zeros(signed: bool) -> torch.Tensor:
            if self._in_8_bits and in_blocks(weight) and parameter.numel():
                from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

                shape, where = parameter.shape, parameter.device
                return OptimState8bit.zeros(shape, signed, _BLOCK, where, parameter.dtype)
            return torch.zeros_like(parameter)

        # The step counter lies on the host unless AdamW is fused.
        there = parameter.device if self.adamw.defaults.get("fused") else "cpu"
        step = torch.zeros((), device=there)
        return {"step": step, "exp_avg": zeros(True), "exp_avg_sq": zeros(False)}

    def state(self) -> dict[str, torch.Tensor]:
        """AdamW's own tensors, to be saved and to be copied into, by the weight's name in the policy and theirs.

        `NAME/step`, float32 []; `NAME/exp_avg` and `NAME/exp_avg_sq`, float32 and of the weight's shape. In 8 bits each of
        the two is `/codes`, uint8 of the weight's shape, and `/scale`, float32 [rows, blocks of a row], but for weights that
        are not kept in 8 bits. Where the weight is a DTensor, all but the step are, sharded as it, and rows of any number of
        processes go together again.
        """
        out = {}
        for name, weight in self.policy.named_parameters():
            if weight not in self.masters:
                continue
            for key, tensor in self.adamw.state[self._stepped[weight]].items():
                if key == "step":
                    out[f"{name}/{key}"] = tensor
                elif self._in_8_bits and in_blocks(weight):
                    for part, own in _parts_of(tensor, weight):
                        out[f"{name}/{key}/{part}"] = own
                else:
                    out[f"{name}/{key}"] = as_sharded(tensor, weight)
        return out

    def step(
        self,
        number: int,
        batches: Sequence[PackedBatch],
        loss: PolicyLoss,
        old: Sequence[torch.Tensor] | None = None,
        ref: Sequence[torch.Tensor] | None = None,
        mismatch: Mismatch | None = None,
    ) -> dict[str, float]:
        """Forward, backward, clip, step.

        Args:
            number: of the optimizer step, for the schedule.
            batches: this process's micro-batches; may be empty, gradients are summed over processes all the same.
            loss: whose denominator is that of all micro-batches of all processes.
            old: float32 [N] for each batch, log-probs of the policies that sampled; None: the present one did.
            ref: float32 [N] for each batch, log-probs of the reference, if the loss has a KL term.
            mismatch: takes in what the engine's log-probs of the batches are beside the policy's.

        Raises:
            UserError: the gradient is NaN or infinite; the weights are as before the step.

        Returns:
            `loss` (the whole step's), `grad_norm` before clipping, `lr`, and the loss's metrics as means over tokens.
            Nothing, and no step, if no process has a token to learn from.
        """
        tokens, sequences = self.processes.total(
            sum(b.num_scored for b in batches), sum(len(b.advantages) for b in batches)
        )
        if not tokens:
            return {}
        normalizer = step_normalizer(loss, tokens, sequences)
        self.policy.train()
        totals: defaultdict[str, torch.Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float64, device=self.policy.device)
        )
        # A trained tower encodes an image once for all micro-batches that show it; see StepFeatures.
        vision = self.policy.vision
        shared = StepFeatures(vision.encode, batches) if vision.trained else None
        with tower_gathered(self.policy):
            for index, batch in enumerate(batches):
                # The tower's backward runs when the inner context ends.
                with (
                    self._wide_gradients(),
                    shared.of(index) if shared else nullcontext() as features,
                ):
                    output = self.head(
                        batch,
                        loss,
                        normalizer,
                        features,
                        old[index] if old else None,
                        ref[index] if ref else None,
                    )
                    with span("language_model.backward"):
                        output.loss.backward()
                if mismatch:
                    mismatch.add(batch, old[index] if old else output.logprobs)
                totals["loss"] += output.loss.detach()
                totals["scored"] += batch.num_scored
                for name in _OF_LOSS:
                    value = output.metrics[name]
                    if name.endswith("_max"):
                        totals[name] = torch.maximum(totals[name], value)
                    elif name in _COUNTS:
                        totals[name] += value
                    else:  # Means over the batch's tokens, all of which the trainer gives the weight 1.
                        totals[name] += value.double() * batch.num_scored
        # Summed, not averaged: each loss was divided by the count of the whole step already.
        with span("sync"):
            if self.processes.count > 1:
                sum_over_processes([m for m in self.masters.values() if not isinstance(m, DTensor)])
        with span("optimizer"):
            self._complete_gradients()
            total = total_norm(self._stepped, self.accelerator.device)
            torch.nn.utils.clip_grads_with_norm_(self._stepped.values(), self.max_grad_norm, total)
        with span("sync"):  # Here the host waits for the device.
            norm = float(total)
        # Before AdamW sees it: one NaN in its moments would spoil every later step.
        if not math.isfinite(norm):
            self._zero_grad()
            raise UserError(
                f"the gradient of optimizer step {number + 1} is not finite ({norm}); "
                "lower the learning rate or lengthen the warm-up, and start from the last checkpoint"
            )
        lr = self.schedule(number)
        for group in self.adamw.param_groups:
            group["lr"] = group["lr"].fill_(lr) if self._in_8_bits else lr
        self.updates += 1  # Also one that fails half-way has changed some weights.
        with span("optimizer"), torch.no_grad():
            with self._as_written():
                self.adamw.step()
            if self._narrow:
                masters = [self.masters[weight] for weight in self._narrow]
                cast(Any, torch)._foreach_copy_(self._narrow, masters)
        # Fused AdamW does not count its changes, by which the vision tower's cache knows that its features are old.
        torch.autograd.graph.increment_version(self.masters)
        self._zero_grad()
        with span("sync"):
            return {**self._reduced(totals), "grad_norm": norm, "lr": lr}

    def _as_written(self) -> AbstractContextManager[None]:
        """torchao compiles its step for each shape of weights; a CPU takes longer to compile than to step."""
        on_gpu = all(p.device.type == "cuda" for p in self._stepped.values())
        return uncompiled() if self._in_8_bits and not on_gpu else nullcontext()

    @contextmanager
    def _wide_gradients(self) -> Iterator[None]:
        """What a backward gives a narrow weight is added to its master's gradient at once, and not kept beside it."""
        hooks = [w.register_post_accumulate_grad_hook(self._add_gradient) for w in self._narrow]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add_gradient(self, weight: torch.Tensor) -> None:
        master, grad = self.masters[weight], weight.grad
        assert grad is not None
        master.grad = grad.to(master.dtype) if master.grad is None else master.grad.add_(grad)
        weight.grad = None

    def _complete_gradients(self) -> None:
        """Let AdamW see the shards and their gradients as they lie now: fully_shard may have moved them.

        A weight that the step did not reach has a gradient of 0, as it has where another process reached it: it decays
        and goes on by its momentum, which AdamW would spare it without one.
        """
        with torch.no_grad():
            for weight, shard in self._stepped.items():
                if isinstance(weight, DTensor):
                    grad: Any = weight.grad
                    shard.data = weight.to_local()
                    shard.grad = None if grad is None else grad.to_local()
                if shard.grad is None:
                    shard.grad = torch.zeros_like(shard)

    def _zero_grad(self) -> None:
        for parameter in (*self.masters.values(), *self._stepped.values()):
            parameter.grad = None

    def _reduced(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        """Means over all tokens of all processes; one transfer to the host."""
        # Every process reduces the same names in the same order, also one that had no micro-batch.
        names = sorted({"loss", "scored", *_OF_LOSS})
        values = torch.stack([totals[name] for name in names])
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


def _master(weight: nn.Parameter) -> nn.Parameter:
    if torch.finfo(weight.dtype).bits >= 32:
        return weight
    return nn.Parameter(weight.detach().float())


def _stepped(master: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(master.to_local().detach()) if isinstance(master, DTensor) else master


def check_optimizer(config: TrainConfig) -> None:
    """See that `train.optimizer` is there.

    Raises:
        UserError: its package is not installed.
    """
    if config.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"train.optimizer = adamw_8bit needs torchao: {install_command('adamw-8bit')}, or take adamw"
        )


def in_blocks(weight: torch.Tensor) -> bool:
    """Whether moments of a weight are kept in 8 bits, in blocks that share a scale.

    Only where rows are whole blocks, so that the numbers do not depend on how many processes the rows are spread over; and,
    as in bitsandbytes, not of small weights.
    """
    row = math.prod(weight.shape[1:])
    return weight.ndim >= 2 and row % _BLOCK == 0 and weight.numel() >= 4096


def _parts_of(moment: Any, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Codes and scales of a moment in 8 bits; a process that has no row of the weight has none."""
    codes = moment.codes if moment.numel() else moment.to(torch.uint8)
    scale = moment.scale if moment.numel() else moment
    blocks = math.prod(weight.shape[1:]) // _BLOCK
    yield "codes", as_sharded(codes, weight)
    yield "scale", as_sharded(scale.view(len(codes), blocks), weight, (len(weight), blocks))


_BLOCK = 256
"""Elements of a moment in 8 bits that share a scale, torchao's default."""

_COUNTS = ("tokens", "invalid_rows")
"""Metrics that add up."""

_OF_LOSS = (
    *("kl", "entropy", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
    *("dual_clip_fraction", "ratio_mean", "ratio_max", "correction_mean", *_COUNTS),
)
"""The loss's metrics that are taken over; its `rollout_kl` counts what earlier policies sampled as well, see `Mismatch`."""
