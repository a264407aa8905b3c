"""The cold start: supervised fine-tuning on demonstrations, so that RL finds something to reinforce."""

from __future__ import annotations

import random

from perl.data.tasks import with_noise
from perl.model.head import SUPERVISED
from perl.recipe import Stage
from perl.training.optimizer import Schedule
from perl.training.saving.export import save_model
from perl.training.session import Session
from perl.types import Example, Segment, UserError, Variant


def cold_start(session: Session, stage: Stage) -> None:
    """Train on demonstrations in the original image order, and export the result as `models/<stage>`."""
    if not session.begin(stage):
        return
    config, components = session.config.cold_start, session.components
    optimizer = session.make_optimizer(
        Schedule(
            config.lr, config.schedule, config.warmup_steps, config.steps, "cold_start.schedule"
        )
    )
    for step in session.steps():
        with components.watch("preprocess"):
            with session.processes.jointly():
                drawn = session.source.draw(config.batch_size)
                work = [_segment(session, d.example) for d in drawn]
            batches, _ = session.pack([segments for segments in work if segments])
        with components.watch("cold_start"):
            metrics = optimizer.step(step, batches, SUPERVISED)
        if not metrics:
            raise UserError(
                f"all {config.batch_size} examples of a cold-start step have prompts over "
                f"{components.encoder.limit.name}; raise it or lower model.max_pixels"
            )
        row = {k: metrics[k] for k in ("loss", "grad_norm", "lr")}
        session.record_step(step, {"tokens": int(metrics["tokens"]), **row}, {"loss": row["loss"]})
        session.end_step(step)
    save_model(components, session.processes, stage.name)
    session.finish_stage()


def _segment(session: Session, example: Example) -> list[Segment]:
    """The example's prompt with its demonstration; nothing if the prompt is over the budget and is dropped."""
    config, components = session.config, session.components
    if example.demonstration is None:
        raise UserError(
            f"example {example.id} has no demonstration for the cold start; "
            "add a column `demonstration` or set cold_start.steps = 0"
        )
    # Whether an example's answer is spoilt depends on nothing else that is drawn.
    rng = random.Random(f"{config.run.seed}/{example.id}")
    text = components.encoder.plain(with_noise(example, config.cold_start.noise, rng))
    if not components.encoder.escapes:
        components.processor.check_texts(example)
    variant = Variant(example, tuple(range(len(example.images))), example.images, example.answer)
    shown = components.encoder.encode([variant])
    completion = components.processor.encode_completion(
        text, f"example {example.id}: its demonstration"
    )
    return [Segment(prompt, (completion,), (1.0,)) for _, prompt in shown]
