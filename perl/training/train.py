"""The training run: its stages in turn, by default cold start, measure, reinforce, measure.

    Example -> Variant -> Rollout -> Group -> Segment -> PackedBatch -> linear_grpo_loss -> step

Everything is decided in the stages and their components; after every step a run can be interrupted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from perl.config import Config
from perl.data.streams import with_steps
from perl.distributed import StopSignal, called_exit, on_main_process
from perl.files import RunFolder, is_main_process, write_json
from perl.recipe import Stage, save_config
from perl.report.progress import Display
from perl.training.cold_start import cold_start
from perl.training.components import deterministic
from perl.training.filter_stage import filter_data
from perl.training.measure import measure
from perl.training.reinforce import reinforce
from perl.training.saving.export import save_model
from perl.training.session import Session
from perl.training.summary import summarise, summarise_seeds
from perl.types import Interrupted


def train(
    config: Config, folder: RunFolder, display: Display, resume: bool = False
) -> dict[str, Any]:
    """Run a recipe, for one seed or for each of `run.seeds`, and return what `summary.json` holds.

    Raises:
        UserError: a mistake in config, data, model or reward.
        Exception: whatever else ends a run. Of every error the last complete step is kept in a checkpoint, if the weights are
            still that step's, and the error's notes say where it came and what is saved.
        Interrupted: stopped by a signal, after a checkpoint.
    """
    config = with_steps(config)
    if not config.run.seeds:
        return _train_seed(config, folder, display, resume)
    summaries = []
    for seed in config.run.seeds:
        one = replace(config, run=replace(config.run, seed=seed, seeds=()))
        mine = RunFolder(folder.root / f"seed-{seed}")
        display.say(f"seed {seed}")
        on_main_process(partial(_begin, one, mine))
        summaries.append(_train_seed(one, mine, display, resume))
    summary = summarise_seeds(summaries)
    if is_main_process():
        write_json(folder.summary, summary)
    return summary


def _train_seed(
    config: Config, folder: RunFolder, display: Display, resume: bool
) -> dict[str, Any]:
    """All stages of one run."""
    on_main_process(folder.make_parts)
    with StopSignal() as stop, deterministic(config.run.deterministic):
        session = Session(config, folder, display, stop)
        if resume:
            session.restore()
        session.start_trackers()
        try:
            summary = _run_stages(session)
        except Interrupted:
            raise
        except (Exception, KeyboardInterrupt) as error:
            session.rescue(error)
            raise
        except SystemExit as left:
            error = called_exit(left)
            session.rescue(error)
            raise error from left
        finally:
            session.end()
    return summary


def _run_stages(session: Session) -> dict[str, Any]:
    for stage in session.stages:
        session.enter_stage(stage)
        if stage.kind == "rl" and stage.number == 0:
            _measure_once(session, "before", 0)
        RUNS[stage.kind](session, stage)
        if f"after {stage.name}" in session.points:
            _measure_once(
                session, f"after {stage.name}", session.first_step + session.taken([stage])
            )
    _measure_once(session, "after", session.taken(s for s in session.stages if s.kind == "rl"))
    session.settle()
    save_model(session.components, session.processes, "final")
    if session.restore_best():
        save_model(session.components, session.processes, "best")
    summary = summarise(session)
    if session.components.is_main:
        write_json(session.folder.summary, summary)
    return summary


def _begin(config: Config, folder: RunFolder) -> None:
    if not folder.config.exists():
        folder.create(overwrite=False)
        save_config(config, folder.config)


RUNS: dict[str, Callable[[Session, Stage], None]] = {
    "cold_start": cold_start,
    "filter": filter_data,
    "rl": reinforce,
}
"""What each kind of stage does."""


def _measure_once(session: Session, at: str, step: int) -> None:
    """An evaluation that is done once, whatever interrupts the run later."""
    if session.advance_to(at):
        results = session.progress.results[at] = measure(session, at, step)
        # A run that has done nothing yet leaves no checkpoint, so that what it replaced still comes back.
        begun = results is not None or at != "before" or session.trained_before is not None
        session.finish_stage(save=begun)
