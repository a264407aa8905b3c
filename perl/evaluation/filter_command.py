"""`perl-rl filter`: measure, keep what is measured, resample, write."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from perl.config import AboveZero, Command, Config, EngineConfig, Positive, RewardConfig, Seed
from perl.model.sources import run_of
from perl.recipe import check_config, check_options, measured_function
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.rollout.opening import config_of, engine_and_encoder, fingerprint
from perl.types import Interrupted, UserError


@dataclass(frozen=True)
class Filter(Command):
    """Roll every question of a data set out with a model, and keep a selection whose accuracies have the wanted
    histogram. Stopped, the same command goes on where it was."""

    model: Positional[str] = ""
    """A run folder (its newest model and its settings), a checkpoint, a model or LoRA adapter folder, or a hub name."""
    data: str = ""
    """JSONL or Parquet file, hub dataset or bundled:digits; empty: the training data of the run."""
    rollouts: Positive = 10
    """Completions per question."""
    orders: Positive = 1
    """Image orders that they are spread over; 1: the original one."""
    measure: str | None = None
    """Reward function that they are scored by: one of the run's by its name, or any other, written as in
    reward.functions; empty: the run's filter.measure."""
    histogram: str = "paper"
    """Target shares of the accuracies 0.0, 0.1, ..., 1.0: paper (its Fig. 3b), uniform, or eleven numbers with commas."""
    size: Positive | None = None
    """Questions to keep; empty: as many as meet the histogram without repeats."""
    repeat: bool = False
    """Take questions of accuracies that are too rare more than once."""
    output: Path | None = None
    """JSONL file; empty: NAME.filtered.jsonl beside the data."""
    accuracies: Path | None = None
    """JSONL file with the measurements; empty: NAME.accuracies.jsonl beside the data."""
    limit: Positive | None = None
    """Measure a sample of this many questions; endless bundled ones need it."""
    rollout: EngineConfig = field(default_factory=EngineConfig)
    temperature: AboveZero = 1.0
    """Sampling temperature."""
    max_new_tokens: Positive | None = None
    """Longest completion; empty: the run's."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt, image tokens included; empty: the run's data.max_prompt_tokens."""
    overlong: Literal["error", "drop"] | None = None
    """What to do with a longer prompt; a dropped one is left out; empty: the run's."""
    control_tokens: Literal["error", "escape"] | None = None
    """What to do with a control token in a row's text, as data.control_tokens; empty: the run's."""
    seed: Seed = 0
    """Of the sampling and of the selection."""
    map: tuple[str, ...] | None = None
    """What columns of ours are called in the data, as in "question=problem_text"; empty: the run's data.map."""
    image_root: str | None = None
    """Folder that image paths of the data start from and may not leave; empty: the data file's, for a run's own data its
    data.image_root. The rows written need none."""
    overwrite: bool = False
    """Measure again what another model or other settings have measured."""
    instruction: str | None = None
    """What asks for the answer, as data.instruction; empty: the run's."""
    text: Literal["slots", "references"] | None = None
    """How text and images are kept consistent in other orders; empty: the run's."""

    def execute(self) -> None:
        from perl.data.dataset import load_examples
        from perl.data.resample import parse_histogram
        from perl.data.rows import check_output, file_beside
        from perl.evaluation.difficulty import MeasuredFile, Measurement, check_measured
        from perl.evaluation.selection import write_selection
        from perl.rewards.scorer import Scorer

        check_options(self)
        if self.orders > self.rollouts:
            raise UserError(
                f"--orders {self.orders} is more than --rollouts {self.rollouts}; "
                "each order needs a completion"
            )
        histogram = parse_histogram(self.histogram)
        config = _settings(self)
        check_config(config)
        data = config.data.train
        if not data:
            raise UserError(f"{self.model} is no run, so there is no data of its own; give --data")
        output = self.output or file_beside(data, "filtered.jsonl")
        record = self.accuracies or file_beside(data, "accuracies.jsonl")
        for file in (output, record):
            check_output(file, data)
        if output.resolve() == record.resolve():
            raise UserError(f"--output and --accuracies are both {output}; choose two files")
        dataset = load_examples(data, config.data, "train", config.run.seed)
        indices = _indices(dataset.size, self, data)
        how = Measurement.of(config, measured_function(config, self.measure), self.seed)
        scorer = Scorer((how.measure,), (1.0,), config.reward.timeout)
        limit = config.data.max_prompt_tokens
        measured = MeasuredFile(
            record,
            indices,
            how,
            lambda i: dataset.check(i).id,
            limit=limit,
            model={"model": self.model, "weights": fingerprint(config.model.path)},
            overwrite=self.overwrite,
        )
        _measure(measured, dataset, config, scorer)
        check_measured(
            measured.accuracies,
            measured.sampled,
            data,
            how.measure,
            f"data.max_prompt_tokens = {limit}; raise it with --max-prompt-tokens",
        )
        chosen = write_selection(
            dataset,
            indices,
            measured.accuracies,
            output,
            config.resample,
            self.seed,
            self.repeat,
        )
        _print_selection(measured.accuracies, chosen, histogram, why_few=self.size is None)
        print(f"measured: {record}\nfiltered: {output}\npicture: {output.with_suffix('.png')}")


def _settings(command: Filter) -> Config:
    """The settings of the model's run with those of the command line. A model without a run is asked for what the
    measuring function reads."""
    own = (
        {}
        if run_of(command.model) or command.measure is None
        else {"functions": (command.measure,)}
    )
    root = "" if command.data and command.image_root is None else command.image_root
    return config_of(
        command.model,
        permutation={"text": command.text},
        reward=own | {"weights": (1.0,)} if own else {},
        data={
            "train": command.data or None,
            "image_root": root,
            "map": command.map,
            "streaming": False,  # All rows are measured.
            "max_prompt_tokens": command.max_prompt_tokens,
            "overlong": command.overlong,
            "control_tokens": command.control_tokens,
            "instruction": command.instruction,
        },
        rollout=asdict(command.rollout)
        | {"max_new_tokens": command.max_new_tokens, "temperature": command.temperature},
        resample={
            "rollouts": command.rollouts,
            "orders": command.orders,
            "histogram": command.histogram,
            "size": command.size or 0,
        },
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


def _measure(file: Any, dataset: Any, config: Config, scorer: Any) -> None:
    """Measure what is not in the file yet."""
    from perl.evaluation.difficulty import measure_chunks
    from perl.rollout.instruction import tell_prompts

    if file.done == len(file.indices):
        print(f"all {file.done} questions are measured in {file.path}")
        return
    engine, encoder = engine_and_encoder(config)
    asked = replace(config, reward=RewardConfig(functions=(file.how.measure,), weights=(1.0,)))
    tell_prompts(asked, encoder.instruction, encoder.processor, [(config.data.train, dataset)])
    try:
        with Display() as display:
            display.stage("measure", len(file.indices), file.done, unit="question")
            for chunk in measure_chunks(engine, encoder, dataset, file, scorer):
                file.add(chunk)
                display.advance(len(chunk))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {file.done} of {len(file.indices)} questions are measured in {file.path}; "
            "the same command goes on"
        ) from None


def _print_selection(
    accuracies: Sequence[float], chosen: Sequence[int], histogram: Sequence[float], why_few: bool
) -> None:
    """Shares before and after; and what keeps the selection small where it is less than half of what was measured."""
    from perl.data.resample import LEVELS, scarce_level, shares_of
    from perl.report.metrics import mean

    kept = [accuracies[k] for k in chosen]
    before, after = shares_of(accuracies), shares_of(kept)
    measured = sum(not math.isnan(a) for a in accuracies)
    rows = [["accuracy", "before", "after", "target"]]
    for level, shares in enumerate(zip(before, after, histogram, strict=True)):
        rows.append([f"{level / (LEVELS - 1):.1f}", *(f"{100 * share:.1f} %" for share in shares)])
    rows.append(["questions", str(measured), str(len(chosen)), ""])
    rows.append(["mean", f"{mean(accuracies):.3f}", f"{mean(kept):.3f}", ""])
    print_table(rows, rules=(LEVELS + 1,))
    if why_few and 2 * len(chosen) < measured:
        level = scarce_level(accuracies, histogram, chosen)
        print(
            f"kept {len(chosen)} of {measured}: of accuracy {level / (LEVELS - 1):.1f} there are only "
            f"{100 * before[level]:.1f} %, and {100 * histogram[level]:.1f} % are "
            "wanted; --size and --repeat keep more"
        )
