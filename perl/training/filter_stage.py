"""Offline rollout filtering as a stage: how hard each question is for the present policy, and which ones go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from perl.data.dataset import Dataset, load_examples
from perl.distributed import on_main_process
from perl.evaluation.difficulty import MeasuredFile, Measurement, check_measured, measure_chunks
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
    # 0 asks for all questions; an endless source has no size, and its recipe a number.
    asked, size = config.resample.examples, dataset.size
    indices = range(asked if size is None else min(asked or size, size))
    components.policy.vision.clear_cache()
    with (
        components.watch("filter"),
        components.engine.serving(session.progress.steps),
        session.processes.jointly(),
    ):
        mine = _measure(
            session, stage, dataset, indices[session.processes.index :: session.processes.count]
        )
    found = session.processes.gather(mine)
    accuracies = {i: accuracy for i, accuracy, _ in found}
    session.display.close()
    with session.processes.jointly():
        if components.is_main:
            limit = components.encoder.limit
            measured = [accuracies[i] for i in indices]
            check_measured(
                measured,
                [sampled for *_, sampled in found],
                config.data.train,
                measured_function(config),
                f"{limit.name}; {limit.advice}",
            )
            kept = write_selection(
                dataset, indices, measured, output, config.resample, config.run.seed
            )
            numbers = {
                "filter/measured": sum(not math.isnan(a) for a in measured),
                "filter/kept": len(kept),
                "filter/accuracy_before": mean(measured),
                "filter/accuracy_after": mean(measured[i] for i in kept),
            }
            session.record({"stage": "filter", "step": 0, "name": stage.name, **numbers})
    session.finish_stage()


def _measure(
    session: Session, stage: Stage, dataset: Dataset, indices: Sequence[int]
) -> list[tuple[int, float, int]]:
    """Of this process's questions the index, the accuracy, and how many completions were sampled."""
    config, components, processes = session.config, session.components, session.processes
    own = f"-{processes.index}" if processes.count > 1 else ""
    seed = config.run.seed * processes.count + processes.index
    how = Measurement.of(config, measured_function(config), seed)
    file = MeasuredFile(
        session.folder.root / "filtered" / f"{stage.name}.accuracies{own}.jsonl",
        indices,
        how,
        lambda i: dataset.check(i).id,
        limit=components.encoder.limit.tokens,
        advice="go on with as many processes and the data of before, or delete it to measure again",
    )
    session.display.stage(stage.name, len(indices), file.done, unit="question")
    scorer = Scorer((how.measure,), (1.0,), config.reward.timeout)
    for chunk in measure_chunks(components.engine, components.encoder, dataset, file, scorer):
        file.add(chunk)
        session.display.advance(len(chunk))
        # Several processes have different numbers of chunks, and stop together after the stage.
        if session.stop.requested and processes.count == 1:
            raise Interrupted(f"stopped in stage {stage.name} after {file.done} questions")
    return list(zip(indices, file.accuracies, file.sampled, strict=True))
