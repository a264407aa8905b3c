"""How good and how consistent a policy is on held-out examples, over all or many orders of their images."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perl.config import EVAL_SEED, Config
from perl.data.dataset import Dataset
from perl.evaluation.agreement import agreement, chosen_picture
from perl.model.processor import content_key
from perl.permutation import all_orders, permute
from perl.report.metrics import mean
from perl.rewards.answers import accuracy, format_reward
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.rollout.prompts import PromptEncoder
from perl.rollout.sample import sample
from perl.types import Example, Rollout, UserError

NUMBERS = ("accuracy", "greedy", "consistency", "greedy_consistency", "format")
"""What an evaluation comes to, by the fields of `ExampleResult`: the higher the better."""
_CHUNK = 32


def content_of(example: Example) -> tuple[str, str]:
    """Hashes of an example with its texts and pictures, and of its pictures alone, whatever their sequence."""
    pictures = [content_key(image.convert("RGB")) for image in example.images]
    texts = [[m.role, m.content] for m in example.messages]
    return _hash([texts, example.answer, example.kind, pictures]), _hash(sorted(pictures))


def _hash(value: Any) -> str:
    return hashlib.sha1(json.dumps(value).encode(), usedforsecurity=False).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ExampleResult:
    """One example over its orders. All numbers are 0 to 1; consistencies are NaN with a single order."""

    id: str
    task: str
    accuracy: float
    """Of completions sampled at temperature 1, mean over orders and samples."""
    greedy: float
    """Of the greedy completion, mean over orders."""
    consistency: float
    """How often sampled completions of two different orders choose the same picture."""
    greedy_consistency: float
    format: float
    orders: int
    content: str = ""
    """A hash of the example, so that evaluations of different data are not compared."""
    pictures: str = ""
    """A hash of its pictures: questions about the same ones have the same."""


def evaluate(
    engine: InProcessEngine,
    encoder: PromptEncoder,
    dataset: Dataset | Sequence[Example],
    indices: Sequence[int],
    config: Config,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[ExampleResult], list[Rollout]]:
    """Measure a policy as `config.eval` says; the seed is the same for all, so that policies can be compared.

    Args:
        dataset: held-out examples; those over the prompt budget are left out if the encoder drops them.
        indices: which of them to measure on; they are loaded a few at a time.
        advance: told how many examples are done, for a progress bar.

    Returns:
        Results by example, and one sampled rollout for each order of the first chunk's examples, to look at.
    """
    results: list[ExampleResult] = []
    shown: list[Rollout] = []
    longest, text = config.rollout.max_new_tokens, config.permutation.text
    stop = config.rollout.stop
    sampling = SamplingParams(config.eval.samples, 1.0, longest, stop=stop)
    greedily = SamplingParams(1, 0.0, longest, stop=stop)
    for start in range(0, len(indices), _CHUNK):
        chunk = [dataset[i] for i in indices[start : start + _CHUNK]]
        encoded = [
            encoder.encode(
                [permute(e, o, text) for o in all_orders(e, config.eval.max_orders, EVAL_SEED)]
            )
            for e in chunk
        ]
        flat = [pair for pairs in encoded for pair in pairs]
        sampled = sample(engine, encoder.processor, flat, sampling, EVAL_SEED + indices[start])
        greedy = sample(engine, encoder.processor, flat, greedily, EVAL_SEED)
        both = iter(zip(sampled, greedy, strict=True))
        for pairs in filter(None, encoded):
            rollouts = [[*s, *g] for _, (s, g) in zip(pairs, both, strict=False)]
            results.append(_summarise(rollouts))
            if not start:
                shown += [r[0] for r in rollouts]
        advance(len(chunk))
    return results, shown


def aggregate(results: Sequence[ExampleResult]) -> dict[str, Any]:
    """Means over examples, in all and by task.

    Raises:
        UserError: nothing was measured.
    """
    if not results:
        raise UserError(
            "every held-out example has a prompt over the token budget; raise data.max_prompt_tokens and "
            "train.tokens_per_micro_batch, or lower model.max_pixels"
        )
    tasks: defaultdict[str, list[ExampleResult]] = defaultdict(list)
    for result in results:
        tasks[result.task].append(result)
    by_task = {name: _means(of_task) for name, of_task in tasks.items() if name}
    return {**_means(results), "by_task": by_task}


def accuracies_of(rollouts: Sequence[Rollout]) -> list[float | None]:
    """1 where a rollout's answer is right in its order, else 0; None without a right answer."""
    return accuracy(
        [""] * len(rollouts),
        [r.text for r in rollouts],
        [r.variant.answer or None for r in rollouts],
    )


def _summarise(by_order: Sequence[Sequence[Rollout]]) -> ExampleResult:
    """Each order's rollouts are its samples and, last, its greedy completion."""
    example = by_order[0][0].variant.example
    right = [accuracies_of(rollouts) for rollouts in by_order]
    picks = [[chosen_picture(r) for r in rollouts] for rollouts in by_order]
    texts = [r.text for rollouts in by_order for r in rollouts[:-1]]
    content, pictures = content_of(example)
    return ExampleResult(
        id=example.id,
        task=example.task,
        accuracy=mean([a for accuracies in right for a in accuracies[:-1]]),
        greedy=mean([accuracies[-1] for accuracies in right]),
        consistency=agreement([p[:-1] for p in picks]),
        greedy_consistency=agreement([p[-1:] for p in picks]),
        format=mean(format_reward([""] * len(texts), texts)),
        orders=len(by_order),
        content=content,
        pictures=pictures,
    )


def _means(results: Sequence[ExampleResult]) -> dict[str, Any]:
    means = {name: mean([getattr(r, name) for r in results]) for name in (*NUMBERS, "orders")}
    return {k: None if math.isnan(v) else round(v, 6) for k, v in means.items()} | {
        "examples": len(results)
    }
