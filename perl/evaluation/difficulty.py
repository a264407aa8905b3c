"""How hard questions are for a policy: the mean score of its sampled completions, 1 being right and 0 wrong.

`measure_chunks` measures, and a `MeasuredFile` keeps what was measured, so that a measurement that was stopped goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perl.config import Config
from perl.data.dataset import Dataset
from perl.files import append_rows, keep_rows, read_rows
from perl.permutation import Consistency, orders, permute, shares
from perl.report.metrics import mean
from perl.rewards.scorer import Scorer
from perl.rollout.engine import Engine, SamplingParams
from perl.rollout.instruction import Instruction
from perl.rollout.prompts import PromptEncoder, Shown
from perl.rollout.sample import Sampling
from perl.types import Example, UserError

logger = logging.getLogger(__name__)

CHUNK = 32
"""Questions rolled out together. A measurement that goes on must begin at a multiple of it."""

_LIMIT = "max_prompt_tokens"


@dataclass(frozen=True, slots=True)
class Measurement:
    """How questions are rolled out and scored; what was measured in another way is not mixed with it."""

    rollouts: int
    """Completions of each question, in all its orders together."""
    measure: str
    """The reward function, as it is written in `reward.functions`."""
    min_pixels: int
    max_pixels: int
    orders: int
    """Of the images, the original one first; fewer where fewer exist."""
    text: Consistency
    """How text and images are kept consistent in the other orders."""
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    max_new_tokens: int
    seed: int
    """Of orders and sampling; the same gives the same numbers."""
    instruction: str
    """What questions are followed by: a name of `INSTRUCTIONS`, or the text."""
    instruction_in: str
    system: str

    @classmethod
    def of(cls, config: Config, measure: str, seed: int) -> Measurement:
        """As the sections of a configuration say."""
        asked = Instruction.of(config)
        return cls(
            rollouts=config.resample.rollouts,
            measure=measure,
            min_pixels=config.model.min_pixels,
            max_pixels=config.model.max_pixels,
            orders=config.resample.orders,
            text=config.permutation.text,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=seed,
            instruction=asked.name,
            instruction_in=asked.place,
            system=asked.system,
        )


@dataclass(frozen=True, slots=True)
class Difficulty:
    """One question: `accuracy` 0 to 1, the mean score of `rollouts` completions without those that cannot be scored.

    It is NaN where none can be, and where the prompt was left out, which has 0 rollouts.
    """

    index: int
    id: str
    accuracy: float
    rollouts: int


def measure_chunks(
    engine: Engine,
    encoder: PromptEncoder,
    dataset: Dataset | Sequence[Example],
    file: MeasuredFile,
    scorer: Scorer,
) -> Iterator[list[Difficulty]]:
    """Roll out and score the questions that `file` lacks, which is left as it is, a chunk at a time.

    The sampling of a chunk depends on the seed and its place alone, so that a measurement that goes on
    at a multiple of `CHUNK` gives the numbers of one that was never stopped.

    Args:
        engine: samples with the policy to measure for.
        encoder: leaves out prompts over the budget, or raises, as it is set to.
        dataset: examples; loaded a chunk at a time.
        scorer: of the one reward function.

    Raises:
        UserError: as `Scorer.score`, or a mean score is not from 0 to 1.
    """
    how = file.how
    for start in range(file.done, len(file.indices), CHUNK):
        chunk = file.indices[start : start + CHUNK]
        examples = [dataset[i] for i in chunk]
        shown: list[Shown] = []
        counts: list[int] = []
        asked: list[int] = []
        for example in examples:
            drawn = orders(example, how.orders, how.seed, 0)
            pairs = encoder.encode([permute(example, order, how.text) for order in drawn])
            shown += pairs
            counts += shares(how.rollouts, len(pairs)) if pairs else []
            asked.append(how.rollouts if pairs else 0)
        sampled = Sampling(
            engine,
            encoder.processor,
            shown,
            counts,
            SamplingParams(
                how.rollouts,
                how.temperature,
                how.max_new_tokens,
                how.top_p,
                how.top_k,
                how.stop,
            ),
            # Different for each call of a measurement; torch takes 64 bits.
            lambda _, count, start=start: (how.seed * 1_000_003 + start) * 1_009 + count,
        ).all()
        rollouts = [rollout for of_variant in sampled for rollout in of_variant]
        totals = scorer.score_rollouts(rollouts)[0] if rollouts else np.zeros(0)
        scores = np.split(totals, np.cumsum(asked)[:-1])
        yield [
            Difficulty(i, e.id, _mean(of_question, e.id, scorer.names[0]), len(of_question))
            for i, e, of_question in zip(chunk, examples, scores, strict=True)
        ]


class MeasuredFile:
    """A JSON Lines file with one measured question a line: index, id, accuracy, rollouts, and how it was measured.

    `accuracies` has what is measured so far, NaN where there is no number, and `sampled` how many
    completions that took, 0 for a question that was left out. What is there already counts, up to the
    last whole chunk.

    Args:
        indices: the questions, in the sequence in which they are measured.
        id_of: gives the id of a question, to tell other data.
        limit: most tokens of a prompt. Where it is higher than the one that a question was left out by,
            the measurement goes on at that question's chunk.
        model: what is known of the model: its name, and a fingerprint of its `weights`.
        overwrite: begin again where other settings were used.
        advice: what to do about other settings; None: what the options of `perl-rl filter` can do.

    Raises:
        UserError: the file is of other questions or settings, or of longer prompts than `limit`.
    """

    def __init__(
        self,
        path: Path,
        indices: Sequence[int],
        how: Measurement,
        id_of: Callable[[int], str],
        *,
        limit: int,
        model: Mapping[str, str] | None = None,
        overwrite: bool = False,
        advice: str | None = None,
    ) -> None:
        self.path, self.indices, self.how, self.limit = path, list(indices), how, limit
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(how).items()}
        self._settings = {"asked": settings.pop("rollouts"), **(model or {}), **settings}
        self._advice = advice
        self.accuracies: list[float] = []
        self.sampled: list[int] = []
        if path.exists():
            self._read(id_of, overwrite)

    @property
    def done(self) -> int:
        return len(self.accuracies)

    def add(self, chunk: Sequence[Difficulty]) -> None:
        """Append what was measured."""
        rows: list[dict[str, Any]] = []
        for d in chunk:
            accuracy = None if math.isnan(d.accuracy) else round(d.accuracy, 6)
            rows.append({**asdict(d), "accuracy": accuracy, **self._settings, _LIMIT: self.limit})
        append_rows(self.path, rows)
        self._take(rows)

    def _take(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.accuracies += [
            math.nan if row["accuracy"] is None else float(row["accuracy"]) for row in rows
        ]
        self.sampled += [row["rollouts"] for row in rows]

    def _read(self, id_of: Callable[[int], str], overwrite: bool) -> None:
        rows = list(read_rows(self.path))
        advice = self._advice or "name another file with --accuracies"
        if any("accuracy" not in row or "index" not in row for row in rows):
            raise UserError(f"{self.path} is there and holds no accuracies; {advice}")
        if overwrite:
            self.path.unlink()
            return
        if self._advice is None:
            advice = f"measure again with --overwrite, or {advice}"
        same = len(rows) <= len(self.indices)
        for row, index in zip(rows, self.indices, strict=False):
            self._check_settings(row, advice)
            same = same and row["index"] == index and row.get("id") == id_of(index)
        if not same:
            raise UserError(f"{self.path} was measured on other questions; {advice}")
        whole = self._whole(rows)
        keep_rows(self.path, whole)
        self._take(rows[:whole])

    def _check_settings(self, row: Mapping[str, Any], advice: str) -> None:
        wanted = dict(self._settings)
        if wanted.get("weights"):  # They say what the model is, wherever it lies.
            wanted.pop("model", None)
        other = [key for key, value in wanted.items() if row.get(key, value) != value]
        if row["accuracy"] is not None and row.get(_LIMIT, 0) > self.limit:
            other.append(_LIMIT)
        # A file of an older version lacks some; what is known to differ says more.
        other = other or [key for key in (*wanted, "rollouts", _LIMIT) if key not in row]
        if other:
            raise UserError(
                f"{self.path} was measured with {_shown(row, other)}, not "
                f"{_shown({**wanted, _LIMIT: self.limit}, other)}; {advice}"
            )

    def _whole(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many rows count: whole chunks, up to the first with a question that may fit now."""
        again = [
            i for i, row in enumerate(rows) if not row["rollouts"] and row[_LIMIT] < self.limit
        ]
        if again:
            start = again[0] // CHUNK * CHUNK
            logger.warning(
                "%s: %d questions were left out with %s = %d; question %d and those behind it are "
                "measured again, with %d",
                self.path,
                len(again),
                _LIMIT,
                rows[again[0]][_LIMIT],
                start,
                self.limit,
            )
            return start
        return len(rows) if len(rows) == len(self.indices) else len(rows) // CHUNK * CHUNK


def check_measured(
    accuracies: Sequence[float], sampled: Sequence[int], data: str, measure: str, too_long: str
) -> None:
    """Raise UserError if no question has an accuracy, and warn where all are 0.

    Args:
        accuracies: 0 to 1, NaN where there is none.
        sampled: completions of each question, 0 where its prompt was left out.
        data: what was measured.
        measure: by which reward function.
        too_long: the limit of prompts, and what to do about it.
    """
    if not any(sampled):
        raise UserError(f"every question of {data} has a prompt over {too_long}")
    measured = [a for a in accuracies if not math.isnan(a)]
    if not measured:
        raise UserError(
            f"no completion for {data} can be scored by the reward function '{measure}'; "
            "check that it fits the data's answers"
        )
    if not any(measured):
        logger.warning(
            "all %d questions have an accuracy of 0 by the reward function '%s'; check that it reads answers "
            "in the form in which the model writes them",
            len(measured),
            measure,
        )


def _mean(scores: np.ndarray, id: str, measure: str) -> float:
    value = mean(scores.tolist())
    if value < 0 or value > 1:
        raise UserError(
            f"question '{id}' has a mean of {value:g} by the reward function '{measure}'; "
            "questions are measured by one whose scores are from 0 to 1"
        )
    return value


def _shown(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    names = {"asked": "rollouts", "weights": "the weights"}
    return ", ".join(f"{names.get(key, key)} = {row.get(key)}" for key in keys)
