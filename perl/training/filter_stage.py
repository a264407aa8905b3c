"""Offline rollout filtering as a stage: how hard each question is for the present policy, and which ones go on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from perl.data.dataset import RowDataset, load_examples
from perl.data.resample import parse_histogram, resample
from perl.data.rows import write_rows
from perl.data.tasks import BundledTasks
from perl.distributed import on_main_process
from perl.evaluation.difficulty import measure_chunks, measuring, warn_if_all_wrong
from perl.evaluation.difficulty_file import MeasuredFile
from perl.evaluation.difficulty_plot import draw_difficulty
from perl.recipe import Stage, filtered_file, measured_function
from perl.report.metrics import mean
from perl.training.session import Session
from perl.types import Interrupted, UserError


def filter_data(session: Session, stage: Stage) -> None:
    """Roll out every question of the stage's data and leave a resampled data set to the stages behind it.

    The accuracies, the data set and a picture lie in the run folder under `filtered/`. A stage that was stopped goes
    on behind the last questions it has measured.

    Raises:
        UserError: no question could be measured.
    """
    if not session.reach(stage.name):
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
            _check_measured(session, any(sampled for *_, sampled in found), accuracies.values())
            numbers = _resample(session, dataset, output, [accuracies[i] for i in indices])
            session.record({"stage": "filter", "step": 0, "name": stage.name, **numbers})
    session.leave()


def _count(asked: int, size: int | None) -> int:
    """Questions to measure of `size`, None being endless; 0 asks for all."""
    if size is None:
        return asked
    return min(asked, size) if asked else size


def _measure(
    session: Session, stage: Stage, dataset: BundledTasks | RowDataset, indices: list[int]
) -> list[tuple[int, float, int]]:
    """Of this process's questions the index, the accuracy, and how many completions were sampled."""
    config, components, processes = session.config, session.components, session.processes
    own = f"-{processes.index}" if processes.count > 1 else ""
    measure = measured_function(config)
    sampling: dict[str, Any] = {
        "orders": config.resample.orders,
        "text": config.permutation.text,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed * processes.count + processes.index,
    }
    settings = {
        "measure": measure,
        "min_pixels": config.model.min_pixels,
        "max_pixels": config.model.max_pixels,
        **sampling,
    }
    file = MeasuredFile(
        session.folder.root / "filtered" / f"{stage.name}.accuracies{own}.jsonl",
        indices,
        config.resample.rollouts,
        settings,
        lambda i: dataset.check(i).id,
        advice="go on with as many processes and the data of before, or delete it to measure again",
        limit=components.encoder.limit.tokens,
    )
    session.display.stage(stage.name, len(indices), file.done, unit="questions")
    for chunk in measure_chunks(
        components.engine,
        components.encoder,
        dataset,
        indices,
        scorer=measuring(measure, config.reward.timeout),
        rollouts=config.resample.rollouts,
        done=file.done,
        **sampling,
    ):
        file.add(chunk)
        session.display.advance(len(chunk))
        # Several processes have different numbers of chunks, and stop together after the stage.
        if session.stop.requested and processes.count == 1:
            raise Interrupted(f"stopped in stage {stage.name} after {file.done} questions")
    return list(zip(indices, file.accuracies, file.sampled, strict=True))


def _check_measured(session: Session, any_sampled: bool, accuracies: Iterable[float]) -> None:
    """Raise UserError if there is no number at all, and warn where all are 0."""
    config, limit = session.config, session.components.encoder.limit
    if not any_sampled:
        raise UserError(
            f"every question of {config.data.train} has a prompt over {limit.name}; {limit.advice}"
        )
    found, measure = list(accuracies), measured_function(config)
    if all(math.isnan(a) for a in found):
        raise UserError(
            f"no completion for {config.data.train} can be scored by the reward function '{measure}'; "
            "check that it fits the data's answers"
        )
    warn_if_all_wrong(found, measure)


def _resample(
    session: Session, dataset: BundledTasks | RowDataset, output: Path, accuracies: list[float]
) -> dict[str, float]:
    """Write what is kept; counts and mean accuracies before and after."""
    config = session.config.resample
    histogram = parse_histogram(config.histogram)
    kept = resample(accuracies, histogram, config.size or None, session.config.run.seed)
    write_rows(dataset, output, kept, [accuracies[i] for i in kept])
    draw_difficulty(accuracies, kept, histogram, output.with_suffix(""))
    return {
        "filter/measured": sum(not math.isnan(a) for a in accuracies),
        "filter/kept": len(kept),
        "filter/accuracy_before": mean(accuracies),
        "filter/accuracy_after": mean([accuracies[i] for i in kept]),
    }
