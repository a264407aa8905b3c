"""Evaluation as a stage of a run: measure, record, keep some rollouts to look at."""

from __future__ import annotations

import logging
from typing import Any

from perl.data.columns import tell_once
from perl.evaluation.evaluate import accuracy_of, aggregate, evaluate, unmeasured
from perl.evaluation.record import save_evaluation
from perl.rollout.instruction import Instruction
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.training.session import Session
from perl.types import Interrupted


def measure(session: Session, at: str, step: int) -> dict[str, Any] | None:
    """Evaluate the policy on the held-out examples and write it down; None if there are none.

    Args:
        at: "before" or "after" RL, "after <stage>", or "step" along the way.
        step: RL steps done, over all stages.
    """
    config, components = session.config, session.components
    if config.eval.examples == 0 or not config.data.eval:
        return None
    dataset = components.held_out()
    mine = range(len(dataset))[session.processes.index :: session.processes.count]
    if at == "step":
        session.display.close()
    share = f", a share of {len(dataset)}" if session.processes.count > 1 else ""
    session.display.stage(f"evaluate {at}{share}", len(mine), unit="example")

    components.policy.vision.clear_cache()

    said = f"{at} RL" if at in ("before", "after") else at

    def advance(examples: int) -> None:
        session.display.advance(examples)
        # Along the way the step is saved first; several processes stop together, after the evaluation.
        if session.stop.requested and at != "step" and session.processes.count == 1:
            raise Interrupted(f"stopped in the evaluation {said}")

    limit = PromptLimit.to_generate(config)
    asked = Instruction.of(config)
    encoder = PromptEncoder(
        components.processor, limit, config.data.overlong, asked, config.data.control_tokens
    )
    with (
        components.watch("evaluate"),
        components.engine.serving(session.progress.steps),
        session.processes.jointly(),
    ):
        scorer = components.collector.scorer
        results, shown = evaluate(
            components.engine, encoder, dataset, mine, config, advance, scorer
        )
    results = session.processes.gather(results)
    numbers = aggregate(results)
    session.display.close()
    if components.is_main:
        if lost := unmeasured(numbers, config, scorer):
            tell_once(logging.WARNING, lost, lost)
        _, right = accuracy_of(config) or ("", None)
        more = {"at": at, "accuracy_by": right} if right else {"at": at}
        session.record({"stage": "evaluate", "step": step, **more, **numbers})
        name = f"step-{step}" if at == "step" else at.replace(" ", "-")
        save_evaluation(session.folder.evaluations / f"{name}.json", results, numbers, config)
        session.show(session.gallery.keep_rollouts("evaluate", step, shown[:24]))
    # Last, as one that failed before it is made again when the run goes on, and must count once.
    session.judge(numbers)
    return numbers
