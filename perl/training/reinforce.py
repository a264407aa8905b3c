"""The reinforcement stage: GRPO over groups whose rollouts saw their images in different orders."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from perl.evaluation.agreement import group_agreement
from perl.model.head import HeadLoss, make_policy_loss, needs_reference, step_normalizer
from perl.model.loading import load_policy
from perl.model.packed.pack import packing_report
from perl.recipe import Stage
from perl.report.metrics import mean
from perl.rollout.collect import Collected
from perl.training.balancing import ModelFlops, share_out
from perl.training.components import save_model
from perl.training.measure import measure
from perl.training.optimizer import Schedule, Updater
from perl.training.session import Session
from perl.types import Group, PackedBatch, Segment


def reinforce(session: Session, stage: Stage) -> None:
    """Roll out, reward, filter, pack, step; `train.steps` times."""
    if not session.reach(stage.name):
        return
    config, components = session.config, session.components
    loss = make_policy_loss(config.loss, config.rollout.max_new_tokens)
    if config.train.steps == 0:
        session.leave(save=False)
        return
    session.display.stage(_title(stage), config.train.steps, session.progress.step)
    step_of = PolicyStep(session, loss)
    stream = session.stream()
    per_process = config.train.examples_per_step // components.accelerator.num_processes
    for step in range(session.progress.step, config.train.steps):
        components.policy.vision.clear_cache()
        started, encoded = time.perf_counter(), components.policy.vision.images_encoded
        collected = components.collector.collect(
            lambda: components.draw(stream, config.train.examples_per_step),
            stream.find,
            per_process,
            step,
            _sampling_seed(session, step),
            session.processes,
            step / config.train.steps,
        )
        row = {**_group_metrics(collected), **step_of(step, collected.groups, collected.late)}
        seconds = time.perf_counter() - started
        tokens_per_second = (row["tokens/prompt"] + row["tokens/completion"]) / seconds
        row |= {"time/step": seconds, "throughput/tokens_per_second": tokens_per_second}
        row["throughput/images_encoded"] = components.policy.vision.images_encoded - encoded
        _show_rollouts(session, step, collected)
        shown = {"reward": row["reward/mean"], "tokens/s": tokens_per_second}
        session.after_step(step, row, stream, shown, partial(_measure_if_due, session, step))
    if stage != session.stages[-1]:
        save_model(components, stage.name)
    session.leave()


class PolicyStep:
    """Optimizer steps on the groups of one rollout batch."""

    def __init__(self, session: Session, loss: Any) -> None:
        self.session, self.loss, self.head = session, loss, session.components.head
        config = session.config.train
        self.updates = config.updates_per_batch
        steps = config.steps * self.updates
        self.updater: Updater = session.make_updater(
            Schedule(config.lr, config.schedule, config.warmup_steps, steps)
        )
        self.reference = _Reference(session) if needs_reference(loss) else None

    def __call__(
        self, step: int, groups: Sequence[Group], late: Sequence[Group] = ()
    ) -> dict[str, float]:
        """Metrics of the step, means over its optimizer steps, and what packing saved in this process.

        `late` are those of `groups` that an earlier policy sampled.
        """
        session, watch = self.session, self.session.components.watch
        if self.reference:
            self.reference.begin_step()
        with watch("pack"):
            earlier = {id(group) for group in late}
            segments = [
                self._share(groups[k :: self.updates], earlier) for k in range(self.updates)
            ]
            parts = [session.pack(s) for s in segments]
        with watch("logprobs"), session.components.accelerator.autocast():
            old = [self._old(p, s) for p, s in zip(parts, segments, strict=True)]
            ref = [[self.reference(b) for b in p] if self.reference else None for p in parts]
        report = packing_report(
            [b for p in parts for b in p],
            [s for part in segments for s in part],
            session.config.train.tokens_per_micro_batch,
        )
        rows = []
        with watch("update"):
            for k, part in enumerate(parts):
                normalizer = self._normalizer(part)
                if normalizer:
                    rows.append(
                        self._update(step * self.updates + k, part, normalizer, old[k], ref[k])
                    )
        means = {name: mean([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        return means | {f"packing/{name}": value for name, value in asdict(report).items()}

    def _old(
        self, batches: Sequence[PackedBatch], segments: Sequence[Segment]
    ) -> list[torch.Tensor] | None:
        """Log-probs [N] under the policies that sampled; None where that is the present one everywhere.

        With one update per batch the loss then knows that its ratios are 1.
        """
        late = any(s.sampled_logprobs is not None for s in segments)
        if self.updates == 1 and not late:
            return None
        old = [self.head.logprobs(batch).logprobs for batch in batches]
        for batch, logprobs in zip(batches, old, strict=True):
            ends = batch.completion_cu_seqlens.tolist()
            for (segment, number), start, end in zip(batch.source, ends, ends[1:], strict=False):
                sampled = segments[segment].sampled_logprobs
                if sampled is not None:
                    logprobs[start:end] = torch.from_numpy(sampled[number])
        return old

    def _share(self, groups: Sequence[Group], earlier: Collection[int]) -> list[Segment]:
        """What this process trains on of all processes' groups; `earlier` are ids of those sampled before."""
        condition = self.session.config.permutation.condition
        work = [
            segments for g in groups if (segments := segments_of(g, condition, id(g) in earlier))
        ]
        if self.session.processes.count > 1:
            work = share_out(work, self.flops, self.session.processes)
        return [replace(s, group=number) for number, w in enumerate(work) for s in w]

    @cached_property
    def flops(self) -> ModelFlops:
        """What groups cost this policy."""
        return ModelFlops.of(
            self.session.components.policy, self.session.config.train.share_prompts
        )

    def _update(
        self,
        number: int,
        batches: Sequence[PackedBatch],
        normalizer: float,
        old: Sequence[torch.Tensor] | None,
        ref: Sequence[torch.Tensor] | None,
    ) -> dict[str, float]:
        return self.updater.step(
            number,
            batches,
            lambda i, batch, features: self.head(
                batch,
                self.loss,
                normalizer,
                features,
                old[i] if old else None,
                ref[i] if ref else None,
            ),
        )

    def _normalizer(self, batches: Sequence[PackedBatch]) -> float:
        """The denominator over all micro-batches and processes; 0 if nobody has anything to learn from."""
        tokens, sequences = self.session.processes.total(
            sum(b.num_scored for b in batches), sum(len(b.advantages) for b in batches)
        )
        return step_normalizer(self.loss, tokens, sequences) if tokens else 0.0


class _Reference:
    """Log-probs of the policy that this stage started from, on the same prompts."""

    def __init__(self, session: Session) -> None:
        config, components = session.config, session.components
        self.adapters_off = nullcontext
        self.own_tower = False
        trained = (name for name, p in components.policy.named_parameters() if p.requires_grad)
        start = session.trained_before
        if start is None and all("lora_" in name for name in trained):
            self.head, self.adapters_off = components.head, components.policy.without_adapters
            return
        path = str(session.folder.models / start) if start else components.model_path
        plain = load_policy(path, replace(config.model, lora_rank=0), components.accelerator.device)
        plain = plain.to(components.accelerator.device).requires_grad_(False).eval()
        self.own_tower = not config.model.freeze_vision
        if not self.own_tower:
            plain.share_tower(components.policy)
        self.head = HeadLoss(
            plain, components.processor.unsampled_token_ids(), config.rollout.temperature
        )

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        with self.adapters_off():
            return self.head.logprobs(batch).logprobs

    def begin_step(self) -> None:
        """Keep no features of earlier steps; where the tower is the policy's, they have gone already."""
        if self.own_tower:
            self.head.policy.vision.clear_cache()


def segments_of(group: Group, condition: str, late: bool = False) -> list[Segment]:
    """What can be learnt from a group: rollouts that could be scored, behind the prompts they are conditioned on.

    Those are the prompts they were sampled from (`permuted`), or all the original one, which stands first
    (`original`). A `late` group was sampled by an earlier policy, and brings its log-probs.
    """
    scored = [i for i, reward in enumerate(group.rewards) if not np.isnan(reward)]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i in scored:
        shown = group.rollouts[i if condition == "permuted" else 0].variant
        by_prompt.setdefault(shown.order, []).append(i)
    return [
        Segment(
            group.rollouts[members[0] if condition == "permuted" else 0].prompt,
            tuple(group.rollouts[i].token_ids for i in members),
            tuple(float(group.advantages[i]) for i in members),
            sampled_logprobs=tuple(group.rollouts[i].logprobs for i in members) if late else None,
        )
        for members in by_prompt.values()
    ]


def _show_rollouts(session: Session, step: int, collected: Collected) -> None:
    every = session.config.run.save_rollouts_every
    if every and step % every == 0 and session.components.is_main:
        session.gallery.keep_groups("rl", session.stage.first_step + step + 1, collected.seen[:2])


def _measure_if_due(session: Session, step: int) -> None:
    config = session.config
    if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < config.train.steps:
        measure(session, "step", session.stage.first_step + step + 1)
        session.display.stage(_title(session.stage), config.train.steps, step + 1)


def _title(stage: Stage) -> str:
    return "RL" if stage.name == "rl" else f"RL: {stage.name}"


def _group_metrics(collected: Collected) -> dict[str, float]:
    """What this process's rollouts of a step were like, the dropped groups included."""
    seen, counts = collected.seen, collected.counts
    rollouts = [r for g in seen for r in g.rollouts]
    prompt = sum(len(r.prompt.input_ids) for r in rollouts)
    completion = sum(len(r.token_ids) for r in rollouts)
    names = seen[0].reward_parts if seen else ()
    return {
        "reward/mean": mean([r for g in seen for r in g.rewards]),
        **{
            f"reward/{name}": mean([r for g in seen for r in g.reward_parts[name]])
            for name in names
        },
        **{f"reward/faults/{name}": n for name, n in collected.faults.items()},
        "consistency": mean([group_agreement(g) for g in seen]),
        "permutation/rate": collected.rate,
        "permutation/orders": mean([len(g.variants) for g in seen]),
        "length/mean": mean([len(r.token_ids) for r in rollouts]),
        "length/truncated": mean([not r.finished for r in rollouts]),
        "groups/seen": len(seen),
        **{
            f"groups/{name}": counts[name]
            for name in ("kept", "zero_variance", "too_hard", "too_easy", "unscorable")
        },
        "groups/surplus": collected.surplus,
        "groups/reused": len(collected.late) - collected.replayed,
        "groups/replayed": collected.replayed,
        "groups/age": mean(collected.ages),
        "groups/short": collected.short,
        "groups/tries": collected.tries,
        "prompts/dropped": collected.dropped,
        "tokens/prompt": prompt,
        "tokens/completion": completion,
        "images/shown": sum(len(r.prompt.images) for r in rollouts),
    }


def _sampling_seed(session: Session, step: int) -> int:
    """Different in every step, process and run seed."""
    accelerator = session.components.accelerator
    return (
        session.config.run.seed * 1_000_003 + session.stage.first_step + step
    ) * accelerator.num_processes + accelerator.process_index
