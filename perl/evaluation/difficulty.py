"""How hard questions are for a policy: the mean score of its sampled completions, 1 being right and 0 wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from perl.data.dataset import Dataset
from perl.permutation.orders import shares
from perl.permutation.permute import Consistency, orders, permute
from perl.report.metrics import mean
from perl.rewards.scorer import Scorer
from perl.rollout.engine import InProcessEngine
from perl.rollout.prompts import PromptEncoder
from perl.rollout.sample import sample_counts
from perl.types import EncodedPrompt, Example, Rollout, UserError, Variant

logger = logging.getLogger(__name__)

CHUNK = 32
"""Questions rolled out together. A measurement that goes on must begin at a multiple of it."""


@dataclass(frozen=True, slots=True)
class Difficulty:
    """One question: `accuracy` 0 to 1, the mean score of `rollouts` completions without those that cannot be scored.

    It is NaN where none can be, and where the prompt was left out, which has 0 rollouts.
    """

    index: int
    id: str
    accuracy: float
    rollouts: int


def measuring(function: str, timeout: float = 60.0) -> Scorer:
    """The scores of one reward function alone, as in `reward.functions`; `timeout` is in seconds."""
    return Scorer((function,), (1.0,), timeout)


def measure_difficulty(
    engine: InProcessEngine,
    encoder: PromptEncoder,
    dataset: Dataset | Sequence[Example],
    indices: Sequence[int],
    *,
    scorer: Scorer | None = None,
    rollouts: int = 10,
    orders: int = 1,
    text: Consistency = "slots",
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Difficulty]:
    """Roll questions out and score their completions by one reward function.

    Args:
        engine: samples with the policy to measure for.
        encoder: leaves out prompts over the budget, or raises, as it is set to.
        dataset: examples; loaded a chunk at a time.
        indices: which of them.
        scorer: from `measuring`; None: accuracy.
        rollouts: completions of each question, in all its orders together.
        orders: of the images, the original one first; fewer where fewer exist.
        text: how text and images are kept consistent in the other orders.
        seed: of orders and sampling; the same gives the same numbers.
        advance: told how many questions are done.

    Returns:
        One for each index, in their sequence.

    Raises:
        UserError: as `Scorer.score`, or a mean score is not from 0 to 1.
    """
    out: list[Difficulty] = []
    for chunk in measure_chunks(
        engine,
        encoder,
        dataset,
        indices,
        scorer=scorer or measuring("accuracy"),
        rollouts=rollouts,
        orders=orders,
        text=text,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
    ):
        out += chunk
        advance(len(chunk))
    return out


def measure_chunks(
    engine: InProcessEngine,
    encoder: PromptEncoder,
    dataset: Dataset | Sequence[Example],
    indices: Sequence[int],
    *,
    scorer: Scorer,
    rollouts: int,
    orders: int,
    text: Consistency,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    done: int = 0,
) -> Iterator[list[Difficulty]]:
    """As `measure_difficulty`, a chunk at a time, beginning behind the first `done` indices.

    The sampling of a chunk depends on `seed` and its place alone, so that a measurement that goes on
    at a multiple of `CHUNK` gives the numbers of one that was never stopped.
    """
    for start in range(done, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        examples = [dataset[i] for i in chunk]
        encoded = [_encode(encoder, e, orders, text, seed) for e in examples]
        tasks = [
            (number, variant, prompt, count)
            for number, pairs in enumerate(encoded)
            for (variant, prompt), count in zip(
                pairs, shares(rollouts, len(pairs)) if pairs else [], strict=True
            )
        ]
        sampled = sample_counts(
            engine,
            encoder.processor,
            [(variant, prompt) for _, variant, prompt, _ in tasks],
            [count for *_, count in tasks],
            temperature,
            max_new_tokens,
            lambda _, count, start=start: _seed(seed, start, count),
        )
        completed: list[list[Rollout]] = [[] for _ in chunk]
        for (number, *_), rollouts_of in zip(tasks, sampled, strict=True):
            completed[number] += rollouts_of
        scores = _scores(scorer, completed)
        yield [
            Difficulty(i, e.id, _mean(of_question, e, scorer), len(of_question))
            for i, e, of_question in zip(chunk, examples, scores, strict=True)
        ]


def warn_if_all_wrong(accuracies: Sequence[float], measure: str) -> None:
    """Say so if no question has an accuracy other than 0: the measure may not fit what the model writes."""
    measured = [a for a in accuracies if not math.isnan(a)]
    if measured and not any(measured):
        logger.warning(
            "all %d questions have an accuracy of 0 by the reward function '%s'; check that it reads answers "
            "in the form in which the model writes them",
            len(measured),
            measure,
        )


def _scores(scorer: Scorer, completed: Sequence[Sequence[Rollout]]) -> list[np.ndarray]:
    """float64 [rollouts] for each question, NaN where a completion cannot be scored."""
    together = [rollout for of_question in completed for rollout in of_question]
    if not together:
        return [np.zeros(0) for _ in completed]
    totals, _ = scorer.score_rollouts(together)
    return np.split(totals, np.cumsum([len(of_question) for of_question in completed])[:-1])


def _mean(scores: np.ndarray, example: Example, scorer: Scorer) -> float:
    value = mean(scores.tolist())
    if value < 0 or value > 1:
        raise UserError(
            f"question '{example.id}' has a mean of {value:g} by the reward function '{scorer.names[0]}'; "
            "questions are measured by one whose scores are from 0 to 1"
        )
    return value


def _encode(
    encoder: PromptEncoder, example: Example, count: int, text: Consistency, seed: int
) -> list[tuple[Variant, EncodedPrompt]]:
    variants = [permute(example, order, text) for order in orders(example, count, seed, 0)]
    return encoder.encode(variants)


def _seed(seed: int, start: int, count: int) -> int:
    """Different for each call of a measurement; torch takes 64 bits."""
    return (seed * 1_000_003 + start) * 1_009 + count
