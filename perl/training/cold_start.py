"""The cold start: supervised fine-tuning on demonstrations, so that RL finds something to reinforce."""

from __future__ import annotations

from perl.data.tasks import with_noise
from perl.model.head import SUPERVISED
from perl.recipe import Stage
from perl.training.components import demonstration_rng, save_model
from perl.training.optimizer import Schedule
from perl.training.session import Session
from perl.types import Example, Segment, UserError, Variant


def cold_start(session: Session, stage: Stage) -> None:
    """Train on demonstrations in the original image order, and export the result as `models/<stage>`."""
    if not session.reach(stage.name):
        return
    config, components = session.config.cold_start, session.components
    if config.steps == 0:
        session.leave(save=False)
        return
    session.display.stage(stage.name.replace("_", " "), config.steps, session.progress.step)
    updater = session.make_updater(
        Schedule(config.lr, config.schedule, config.warmup_steps, config.steps)
    )
    stream = session.stream()
    for step in range(session.progress.step, config.steps):
        components.policy.vision.clear_cache()
        with components.watch("preprocess"), session.processes.jointly():
            examples = [drawn.example for drawn in components.draw(stream, config.batch_size)]
            batches = session.pack(
                [s for e in examples for s in _demonstration_segment(session, e)]
            )
        total = session.processes.total(sum(b.num_scored for b in batches))[0]
        if total == 0:
            raise UserError(
                f"all {config.batch_size} examples of a cold-start step have prompts over "
                f"{components.encoder.limit.name}; raise it or lower model.max_pixels"
            )
        with components.watch("cold_start"):
            metrics = updater.step(
                step,
                batches,
                lambda _, batch, features, total=total: components.head(
                    batch, SUPERVISED, total, features
                ),
            )
        row = {"tokens": int(total), **{k: metrics[k] for k in ("loss", "grad_norm", "lr")}}
        session.after_step(step, row, stream, {"loss": row["loss"]})
    save_model(components, stage.name)
    session.leave()


def _demonstration_segment(session: Session, example: Example) -> list[Segment]:
    """The example's prompt with its demonstration; nothing if the prompt is over the budget and is dropped."""
    config, components = session.config.cold_start, session.components
    if example.demonstration is None:
        raise UserError(
            f"example {example.id} has no demonstration for the cold start; "
            "add a column `demonstration` or set cold_start.steps = 0"
        )
    text = with_noise(example, config.noise, demonstration_rng(session.config, example))
    variant = Variant(example, tuple(range(len(example.images))), example.images, example.answer)
    shown = components.encoder.encode([variant])
    completion = components.processor.encode_completion(
        text, f"example {example.id}: its demonstration"
    )
    return [Segment(p, (completion,), (1.0,)) for _, p in shown]
