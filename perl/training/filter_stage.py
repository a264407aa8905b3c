"""Offline rollout filtering as a stage: how hard each question is for the present policy, and which ones go on."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from perl.data.dataset import Dataset, load_examples
from perl.data.resample import parse_histogram
from perl.distributed import on_main_process
from perl.evaluation.difficulty import (
    MeasuredFile,
    Measurement,
    check_measured,
    measure_chunks,
)
from perl.evaluation.selection import write_selection
from perl.recipe import Stage, filtered_file, measured_function
from perl.report.metrics import mean
from perl.rewards.scorer import Scorer
from perl.training.session import Session
from perl.types import Interrupted


def filter_data(session: Session, stage: Stage) -> None:
    """Roll out every question of the stage's data and leave a resampled data set to the stages behind it.

    The accuracies, the data set and a picture lie in the run folder under `filtered/`. A stage that was stopped goes
    on behind the last questions it has measured.

    Raises:
        UserError: no question could be measured.
    """
    if not session.advance_to(stage.name):
        return
    config, components = session.config, session.components
    output = filtered_file(session.folder.root, stage.name)
    on_main_process(partial(output.parent.mkdir, exist_ok=True))
    source, data = components.source(config.data.train)
    dataset = load_examples(source, data, "train", config.run.seed)
    indices = list(range(_count(config.resample.examples, dataset.size)))
    components.policy.vision.clear_cache()
    with components.watch("filter"), session.processes.jointly():
        mine = _measure(
            session, stage, dataset, indices[session.processes.index :: session.processes.count]
        )
    found = session.processes.gather(mine)
    accuracies = {i: accuracy for i, accuracy, _ in found}
    session.display.close()
    with session.processes.jointly():
        if components.is_main:
            limit = components.encoder.limit
            check_measured(
                [accuracies[i] for i in indices],
                [sampled for *_, sampled in found],
                config.data.train,
                measured_function(config),
                f"{limit.name}; {limit.advice}",
            )
            numbers = _select(session, dataset, output, [accuracies[i] for i in indices])
            session.record({"stage": "filter", "step": 0, "name": stage.name, **numbers})
    session.finish_stage()


def _count(asked: int, size: int | None) -> int:
    """Questions to measure of `size`, None being endless; 0 asks for all."""
    if size is None:
        return asked
    return min(asked, size) if asked else size


def _measure(
    session: Session, stage: Stage, dataset: Dataset, indices: list[int]
) -> list[tuple[int, float, int]]:
    """Of this process's questions the index, the accuracy, and how many completions were sampled."""
    config, components, processes = session.config, session.components, session.processes
    own = f"-{processes.index}" if processes.count > 1 else ""
    how = Measurement(
        rollouts=config.resample.rollouts,
        measure=measured_function(config),
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        orders=config.resample.orders,
        text=config.permutation.text,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.run.seed * processes.count + processes.index,
    )
    file = MeasuredFile(
        session.folder.root / "filtered" / f"{stage.name}.accuracies{own}.jsonl",
        indices,
        how,
        lambda i: dataset.check(i).id,
        limit=components.encoder.limit.tokens,
        advice="go on with as many processes and the data of before, or delete it to measure again",
    )
    session.display.stage(stage.name, len(indices), file.done, unit="questions")
    scorer = Scorer((how.measure,), (1.0,), config.reward.timeout)
    for chunk in measure_chunks(
        components.engine, components.encoder, dataset, indices, how, scorer, file.done
    ):
        file.add(chunk)
        session.display.advance(len(chunk))
        # Several processes have different numbers of chunks, and stop together after the stage.
        if session.stop.requested and processes.count == 1:
            raise Interrupted(f"stopped in stage {stage.name} after {file.done} questions")
    return list(zip(indices, file.accuracies, file.sampled, strict=True))


def _select(
    session: Session, dataset: Dataset, output: Path, accuracies: list[float]
) -> dict[str, float]:
    """Write what is kept; counts and mean accuracies before and after."""
    config, seed = session.config.resample, session.config.run.seed
    histogram, indices = parse_histogram(config.histogram), range(len(accuracies))
    kept = write_selection(
        dataset, indices, accuracies, output, histogram, config.size or None, seed
    )
    return {
        "filter/measured": sum(not math.isnan(a) for a in accuracies),
        "filter/kept": len(kept),
        "filter/accuracy_before": mean(accuracies),
        "filter/accuracy_after": mean([accuracies[i] for i in kept]),
    }
