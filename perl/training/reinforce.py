"""The reinforcement stage: GRPO over groups whose rollouts saw their images in different orders."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from perl.data.columns import tell_once
from perl.evaluation.agreement import Reading, group_agreement
from perl.evaluation.evaluate import answer_reading
from perl.model.head import HeadLoss, needs_reference, policy_loss_of
from perl.model.loading import load_policy
from perl.model.packed.pack import packing_counts
from perl.model.sharding import gathered
from perl.model.weights import trains_adapters_alone
from perl.recipe import Stage
from perl.report.metrics import mean
from perl.rollout.collect import Collected
from perl.rollout.mismatch import MISMATCH, Mismatch
from perl.timing import peak_memory
from perl.training.accounting import StepFlops, Tally, add, rolled_out, row_of
from perl.training.measure import measure
from perl.training.optimizer import Schedule
from perl.training.saving.export import save_model
from perl.training.session import Session
from perl.types import Group, PackedBatch, Segment


def reinforce(session: Session, stage: Stage) -> None:
    """Example -> Variant -> Rollout -> Group -> Segment -> PackedBatch -> step; `train.steps` times."""
    if not session.begin(stage):
        return
    components, vision = session.components, session.components.policy.vision
    policy_step = PolicyStep(session)
    reading = answer_reading(session.config, components.collector.scorer)
    # A step whose evaluation failed was kept without it.
    if not session.progress.ended:
        _measure_if_due(session, session.progress.step - 1)
        session.end_step(session.progress.step - 1)
    peak = policy_step.flops.peak(components.accelerator.device)
    for step in session.steps():
        started, encoded = time.perf_counter(), vision.images_encoded
        policy_step.flops.begin_step()
        with components.engine.serving(session.progress.steps):
            collected = components.collector.collect(session.source, session.processes, step)
            session.look_ahead(step)
        flops = policy_step.flops("rollout", rolled_out(collected.seen))
        tally = group_tally(collected, reading, session.progress.steps)
        tally |= policy_step(step, collected.groups)
        tally.sums |= flops | components.engine.counts()
        tally.sums |= {"throughput/images_encoded": vision.images_encoded - encoded}
        tally.largest |= components.watch.lap() | peak_memory()
        tally.largest["time/step"] = time.perf_counter() - started
        row = row_of(session.processes.gather([tally]), peak)
        session.record_step(step, row, _shown(row, session))
        if components.is_main:
            _tell_mismatch(row, session.stage.name)
        _keep_rollouts(session, step, collected)
        # An evaluation belongs to its step: a run that goes on from the step's checkpoint does not repeat it.
        _measure_if_due(session, step)
        session.end_step(step)
    components.collector.give_up()
    # The last stage's model is exported as `final` when the run ends.
    if stage != session.stages[-1]:
        save_model(components, session.processes, stage.name)
    session.finish_stage()


class PolicyStep:
    """Optimizer steps on the groups of one rollout batch: `train.updates_per_batch` of them."""

    def __init__(self, session: Session) -> None:
        self.session, self.head = session, session.components.head
        config = session.config
        self.loss = policy_loss_of(config)
        self.updates = config.train.updates_per_batch
        steps = config.train.steps * self.updates
        self.optimizer = session.make_optimizer(
            Schedule(config.train.lr, config.train.schedule, config.train.warmup_steps, steps)
        )
        self.reference = Reference(session) if needs_reference(self.loss) else None
        policy = session.components.policy
        self.flops = StepFlops(policy, config.train.share_prompts)
        if self.reference and self.reference.own_tower:
            self.flops.towers.append(self.reference.head.policy.vision)

    def __call__(self, step: int, groups: Sequence[Group]) -> Tally:
        """Metrics of the step, means over its optimizer steps; FLOPs, and what packing saved in this process."""
        session, watch = self.session, self.session.components.watch
        if self.reference:
            self.reference.begin_step()
        # Every k-th group, so that each update sees the whole of the batch's data order.
        with watch("pack"):
            condition = session.config.permutation.condition
            minibatches = [
                session.pack(
                    [w for g in groups[k :: self.updates] if (w := segments_of(g, condition))]
                )
                for k in range(self.updates)
            ]
            packed = [batches for batches, _ in minibatches]
        # All old log-probs before the first update, under the policy that sampled.
        with watch("logprobs"):
            old = self._old_logprobs(packed)
            ref = self.reference(packed) if self.reference else [None] * self.updates
        segments = [segment for _, own in minibatches for segment in own]
        again = [s for (_, own), found in zip(minibatches, old, strict=True) if found for s in own]
        flops = self.flops("logprobs", map(self.flops.met, again))
        if self.reference:
            met = map(self.flops.met, segments)
            add(flops, self.flops("logprobs", met, adapters=False))
        mismatch = Mismatch(self.loss, session.components.accelerator.device)
        rows = []
        with watch("update"):
            for k, batches in enumerate(packed):
                number = step * self.updates + k
                row = self.optimizer.step(number, batches, self.loss, old[k], ref[k], mismatch)
                rows += [row] if row else []
        flops |= self.flops("update", map(self.flops.met, segments), gradients=True)
        budget = session.config.train.tokens_per_micro_batch
        packing = packing_counts([b for batches in packed for b in batches], segments, budget)
        means = {name: mean([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        sums = flops | {f"packing/{name}": n for name, n in packing.items()}
        averages, largest = mismatch.numbers()
        return Tally(means, sums, averages, largest)

    def _old_logprobs(
        self, packed: Sequence[Sequence[PackedBatch]]
    ) -> Sequence[list[torch.Tensor] | None]:
        """Of each batch of each update; None where the present policy sampled everything, so that the loss knows that ratios
        are 1. Weights are gathered where some process needs it."""
        needed = self.updates > 1 or any(b.off_policy is not None for own in packed for b in own)
        if not self.session.processes.any(needed):
            return [None] * self.updates
        with gathered(self.session.components.policy):
            return [[old_logprobs(self.head, b) for b in own] if needed else None for own in packed]


def old_logprobs(head: HeadLoss, batch: PackedBatch) -> torch.Tensor:
    """Log-probs [N] under the policies that sampled: the current one's, or those stored at sampling time."""
    logprobs = head.logprobs(batch).logprobs
    if batch.off_policy is None or batch.sampled_logprobs is None:
        return logprobs
    off_policy = batch.off_policy.to(logprobs.device)
    return torch.where(off_policy, batch.sampled_logprobs.to(logprobs), logprobs)


class Reference:
    """Log-probs of the policy that a stage started from, on the same prompts."""

    def __init__(self, session: Session) -> None:
        config, components = session.config, session.components
        self.without_adapters, self.own_tower = nullcontext, False
        start = session.trained_before
        # Adapters start at zero, so without them the policy is what it started from: no second copy of the weights.
        if start is None and trains_adapters_alone(components.policy):
            self.head, self.without_adapters = components.head, components.policy.without_adapters
            return
        path = str(session.folder.models / start) if start else components.model_path
        device, sharding = components.accelerator.device, components.policy.sharding
        model = replace(config.model, lora_rank=0)
        policy = load_policy(path, model, device, sharding, trained=False).eval()
        # A tower in shards is whole only together with its own language model.
        self.own_tower = components.policy.vision.trained or bool(sharding and sharding.vision)
        if not self.own_tower:
            policy.share_tower(components.policy)
        self.head = HeadLoss(
            policy, components.processor.unsampled_token_ids(), config.rollout.temperature
        )

    def __call__(self, packed: Sequence[Sequence[PackedBatch]]) -> list[list[torch.Tensor]]:
        """float32 [N] of the scored tokens of each batch of each update; all processes take part."""
        with gathered(self.head.policy), self.without_adapters():
            return [[self.head.logprobs(batch).logprobs for batch in own] for own in packed]

    def begin_step(self) -> None:
        """Of a tower of its own; one that is shared with the policy has begun the step with it."""
        if self.own_tower:
            self.head.policy.vision.clear_cache()


def segments_of(group: Group, condition: str) -> list[Segment]:
    """What can be learnt from a group: rollouts that could be scored, behind the prompts they are conditioned on.

    Those are the prompts they were sampled from (`permuted`), or all the original one, which stands first (`original`). Under
    `original` old log-probs are taken on the original prompt too, so the first update's ratio is 1 by definition; those that the
    engine gave are on another prompt, so that nothing compares with them: neither replay nor `loss.correction` goes with it.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in np.flatnonzero(~np.isnan(group.rewards)):
        shown = group.rollouts[i if condition == "permuted" else 0].variant
        by_prompt.setdefault(shown.order, []).append(int(i))
    return [
        Segment(
            group.rollouts[members[0] if condition == "permuted" else 0].prompt,
            tuple(group.rollouts[i].token_ids for i in members),
            tuple(float(group.advantages[i]) for i in members),
            sampled_logprobs=tuple(group.rollouts[i].logprobs for i in members)
            if condition == "permuted"
            else None,
            off_policy=group.off_policy,
        )
        for members in by_prompt.values()
    ]


def group_tally(collected: Collected, reading: Reading | None, version: int = 0) -> Tally:
    """What this process's rollouts of a step were like, the dropped groups included; no consistency without a reader."""
    seen, counts, tally = collected.seen, collected.counts, Tally()
    rollouts = [r for g in seen for r in g.rollouts]
    tally.average("reward/mean", (r for g in seen for r in g.rewards))
    for name in dict.fromkeys(name for g in seen for name in g.reward_parts):
        values = (r for g in seen for r in g.reward_parts.get(name, ()))
        tally.average(f"reward/{name}", values)
    for name, values in collected.logged.items():
        tally.average(f"logged/{name}", values)
    if reading:
        tally.average("consistency", (group_agreement(g, reading) for g in seen))
    tally.average("permutation/orders", (len(g.variants) for g in seen))
    tally.average("length/mean", (len(r.token_ids) for r in rollouts))
    tally.average("length/truncated", (not r.finished for r in rollouts))
    tally.average("groups/age", collected.ages)
    spans = [span for r in rollouts for span in r.weight_versions]
    if spans:
        ages = sum((version - span.version) * (span.end - span.start) for span in spans)
        tally.means["rollout/age"] = float(ages), sum(span.end - span.start for span in spans)
    tally.agreed |= {"permutation/rate": collected.rate, "groups/tries": collected.tries}
    tally.sums |= {
        **{f"reward/faults/{name}": n for name, n in collected.faults.items()},
        "groups/seen": len(seen),
        **{
            f"groups/{name}": counts[name]
            for name in ("kept", "zero_variance", "too_hard", "too_easy", "unscorable")
        },
        "groups/overflow": collected.overflow,
        "groups/reused": len(collected.ages),
        "groups/replayed": collected.replayed,
        "groups/short": collected.short,
        **({"groups/late": collected.late} if collected.late else {}),
        "prompts/dropped": collected.dropped,
        "tokens/prompt": sum(len(r.prompt.input_ids) for r in rollouts),
        "tokens/completion": sum(len(r.token_ids) for r in rollouts),
        "images/shown": sum(len(r.prompt.images) for r in rollouts),
    }
    return tally


def _keep_rollouts(session: Session, step: int, collected: Collected) -> None:
    # Two groups of the main process are enough to look at; pictures of all would be most of a run folder.
    every = session.config.run.save_rollouts_every
    if every and step % every == 0 and session.components.is_main:
        number = session.first_step + step + 1
        session.show(session.gallery.keep_groups("rl", number, collected.seen[:2]))
        session.progress.records = session.folder.positions()


def _measure_if_due(session: Session, step: int) -> None:
    config = session.config
    if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.train.steps:
        measure(session, "step", session.first_step + step + 1)
        session.show_stage(step + 1)


def _tell_mismatch(row: Mapping[str, float], stage: str) -> None:
    apart = row.get("rollout/mismatch_mean", 0.0)
    if apart > MISMATCH:
        tell_once(
            logging.WARNING,
            f"rollout/mismatch_mean = {apart:.2g}: log-probs of sampled tokens differ that much between what sampled them and "
            f"what is trained, where rounding gives less than {MISMATCH:g} (said once); what comes of it is weighted only as far "
            "as loss.correction goes. See that the servers have the dtype and the flags that docs/rollouts.md names, under "
            "Mismatch",
            f"mismatch of {stage}",
        )


def _shown(row: Mapping[str, float], session: Session) -> dict[str, float]:
    """Behind the progress bar; a CPU's MFU says nothing, nor does the mismatch of weights that sample themselves."""
    shown = {"reward": row["reward/mean"], "s/step": row["time/step"]}
    if session.components.servers and "rollout/mismatch_mean" in row:
        shown["mismatch"] = row["rollout/mismatch_mean"]
    per_gpu = row["throughput/tokens_per_second_per_gpu"]
    if session.components.accelerator.device.type != "cuda":
        return shown | {"tokens/s": row["throughput/tokens_per_second"]}
    mfu = {"MFU": row["mfu/step"]} if "mfu/step" in row else {}
    return shown | {"tokens/s/GPU": per_gpu} | mfu
