"""`perl-rl filter`: measure, keep what is measured, resample, write."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from perl.config import Command, Config
from perl.report.progress import Display
from perl.types import UserError


@dataclass(frozen=True)
class Filter(Command):
    """Roll every question of a data set out with a model, and keep a selection whose accuracies have the wanted
    histogram. Stopped, the same command goes on where it was."""

    model: Positional[str] = ""
    """A run folder (its last model and its settings), a model folder, or a hub name."""
    data: str = ""
    """JSONL or Parquet file, hub dataset or bundled:digits; empty: the training data of the run."""
    rollouts: int = 10
    """Completions per question."""
    orders: int = 1
    """Image orders that they are spread over; 1: the original one."""
    measure: str | None = None
    """Reward function that they are scored by: one of the run's by its name, or any other, written as in
    reward.functions; empty: the run's filter.measure."""
    histogram: str = "paper"
    """Target shares of the accuracies 0.0, 0.1, ..., 1.0: paper (its Fig. 3b), uniform, or eleven numbers with commas."""
    size: int | None = None
    """Questions to keep; empty: as many as meet the histogram without repeats."""
    repeat: bool = False
    """Take questions of accuracies that are too rare more than once."""
    output: Path | None = None
    """JSONL file; empty: NAME.filtered.jsonl beside the data."""
    accuracies: Path | None = None
    """JSONL file with the measurements; empty: NAME.accuracies.jsonl beside the data."""
    limit: int | None = None
    """Measure a sample of this many questions; endless bundled ones need it."""
    temperature: float = 1.0
    """Sampling temperature."""
    max_new_tokens: int | None = None
    """Longest completion; empty: the run's."""
    max_prompt_tokens: int | None = None
    """Longest prompt, image tokens included; empty: the run's data.max_prompt_tokens."""
    overlong: Literal["error", "drop"] | None = None
    """What to do with a longer prompt; a dropped one is left out; empty: the run's."""
    seed: int = 0
    """Of the sampling and of the selection."""
    overwrite: bool = False
    """Measure again what another model or other settings have measured."""
    text: Literal["slots", "references"] | None = None
    """How text and images are kept consistent in other orders; empty: the run's."""

    def execute(self) -> None:
        import numpy as np

        from perl.data.dataset import load_examples
        from perl.data.resample import parse_histogram, resample
        from perl.data.rows import check_output, file_beside, write_rows
        from perl.evaluation.difficulty import measuring, warn_if_all_wrong
        from perl.evaluation.difficulty_file import MeasuredFile
        from perl.evaluation.difficulty_plot import draw_difficulty
        from perl.recipe import measured_function
        from perl.rollout.opening import fingerprint, model_and_config

        _check_numbers(self)
        histogram = parse_histogram(self.histogram)
        config, path = model_and_config(self.model)
        config = _with_options(self, config, path)
        data = config.data.train
        output = self.output or file_beside(data, "filtered.jsonl")
        record = self.accuracies or file_beside(data, "accuracies.jsonl")
        for file in (output, record):
            check_output(file, data)
        if output.resolve() == record.resolve():
            raise UserError(f"--output and --accuracies are both {output}; choose two files")
        dataset = load_examples(data, config.data, "train", config.run.seed)
        indices = _indices(dataset.size, self, data)
        measure = measured_function(config, self.measure)
        scorer = measuring(measure, config.reward.timeout)
        sampling = {
            "orders": self.orders,
            "text": config.permutation.text,
            "temperature": self.temperature,
            "max_new_tokens": config.rollout.max_new_tokens,
            "seed": self.seed,
        }
        settings = {
            "model": self.model,
            "weights": fingerprint(path),
            "measure": measure,
            "min_pixels": config.model.min_pixels,
            "max_pixels": config.model.max_pixels,
            **sampling,
        }
        file = MeasuredFile(
            record,
            indices,
            self.rollouts,
            settings,
            lambda i: dataset.check(i).id,
            self.overwrite,
            limit=config.data.max_prompt_tokens,
        )
        _measure(file, dataset, config, scorer, sampling)
        if not any(file.sampled):
            raise UserError(
                f"every question of {data} has a prompt over data.max_prompt_tokens = "
                f"{config.data.max_prompt_tokens}; raise it with --max-prompt-tokens"
            )
        if all(math.isnan(accuracy) for accuracy in file.accuracies):
            raise UserError(
                f"no completion for {data} can be scored by the reward function '{measure}'; "
                "check that it fits the data's answers"
            )
        warn_if_all_wrong(file.accuracies, measure)
        chosen = resample(file.accuracies, histogram, self.size, self.seed, self.repeat)
        kept = [indices[k] for k in chosen]
        write_rows(dataset, output, kept, [file.accuracies[k] for k in chosen])
        picture, _ = draw_difficulty(
            file.accuracies, chosen, histogram, output.with_name(output.stem)
        )
        _print_table(np.asarray(file.accuracies), chosen, histogram)
        if self.size is None:
            _print_limit(np.asarray(file.accuracies), chosen, histogram)
        print(f"measured: {record}\nfiltered: {output}\npicture: {picture}")


def _check_numbers(command: Filter) -> None:
    for name in ("rollouts", "orders", "size", "limit", "max_new_tokens", "max_prompt_tokens"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if command.orders > command.rollouts:
        raise UserError(
            f"--orders {command.orders} is more than --rollouts {command.rollouts}; "
            "each order needs a completion"
        )
    if not 0 < command.temperature < math.inf:
        raise UserError(f"--temperature {command.temperature}: must be above 0")
    if not 0 <= command.seed < 2**31:
        raise UserError(f"--seed {command.seed}: must be from 0 to {2**31 - 1}")


def _with_options(command: Filter, config: Config, path: str) -> Config:
    data, rollout = config.data, config.rollout
    text = command.text or config.permutation.text
    return replace(
        config,
        model=replace(config.model, path=path),
        permutation=replace(config.permutation, text=text),
        data=replace(
            data,
            train=command.data or data.train,
            image_root="" if command.data else data.image_root,
            max_prompt_tokens=command.max_prompt_tokens or data.max_prompt_tokens,
            overlong=command.overlong or data.overlong,
        ),
        rollout=replace(rollout, max_new_tokens=command.max_new_tokens or rollout.max_new_tokens),
    )


def _indices(size: int | None, command: Filter, data: str) -> list[int]:
    """The questions to measure: all, or a sample of `--limit`, in the data's sequence."""
    if size is None:
        if command.limit is None:
            raise UserError(f"{data} is endless; say how many questions to measure with --limit")
        return list(range(command.limit))
    if command.limit is None or command.limit >= size:
        return list(range(size))
    return sorted(random.Random(f"{command.seed}/limit").sample(range(size), command.limit))


def _measure(
    file: Any, dataset: Any, config: Config, scorer: Any, sampling: Mapping[str, Any]
) -> None:
    from perl.evaluation.difficulty import measure_chunks
    from perl.rollout.opening import engine_and_encoder
    from perl.types import Interrupted

    if file.done == len(file.indices):
        print(f"all {file.done} questions are measured in {file.path}")
        return
    engine, encoder = engine_and_encoder(config)
    chunks = measure_chunks(
        engine,
        encoder,
        dataset,
        file.indices,
        scorer=scorer,
        rollouts=file.rollouts,
        done=file.done,
        **sampling,
    )
    try:
        with Display() as display:
            display.stage("measure", len(file.indices), file.done, unit="questions")
            for chunk in chunks:
                file.add(chunk)
                display.advance(len(chunk))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {file.done} of {len(file.indices)} questions are measured in {file.path}; "
            "the same command goes on"
        ) from None


def _print_table(accuracies: Any, chosen: Sequence[int], histogram: Sequence[float]) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from perl.data.resample import shares_of

    table = Table()
    columns = {
        "before": shares_of(accuracies, len(histogram)),
        "after": shares_of(accuracies[list(chosen)], len(histogram)),
        "target": np.asarray(histogram),
    }
    for name in ("accuracy", *columns):
        table.add_column(name, justify="right")
    for level in range(len(histogram)):
        shares = (f"{100 * values[level]:.1f} %" for values in columns.values())
        table.add_row(f"{level / (len(histogram) - 1):.1f}", *shares)
    table.add_section()
    counts = int((~np.isnan(accuracies)).sum()), len(chosen)
    table.add_row("questions", *map(str, counts), "")
    means = np.nanmean(accuracies), np.mean(accuracies[list(chosen)])
    table.add_row("mean", *(f"{mean:.3f}" for mean in means), "")
    Console().print(table)


def _print_limit(accuracies: Any, chosen: Sequence[int], histogram: Sequence[float]) -> None:
    """What keeps the selection small, where it is less than half of what was measured."""
    import numpy as np

    from perl.data.resample import scarce_level, shares_of

    measured = int((~np.isnan(accuracies)).sum())
    if 2 * len(chosen) >= measured:
        return
    level, count = scarce_level(accuracies, histogram, chosen), len(histogram)
    print(
        f"kept {len(chosen)} of {measured}: of accuracy {level / (count - 1):.1f} there are only "
        f"{100 * shares_of(accuracies, count)[level]:.1f} %, and {100 * histogram[level]:.1f} % are "
        "wanted; --size and --repeat keep more"
    )
