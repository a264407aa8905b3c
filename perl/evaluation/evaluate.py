"""How good and how consistent a policy is on held-out examples, over all or many orders of their images."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from perl.config import EVAL_SEED, Config, names_of, places_of
from perl.data.check import acceptance
from perl.data.columns import tell_once
from perl.data.dataset import Dataset
from perl.evaluation.agreement import Reading, agreement, chosen_picture
from perl.permutation import all_orders, permute
from perl.permutation.alike import content_key
from perl.report.metrics import mean
from perl.rewards.forms import says_right
from perl.rewards.scorer import Scorer
from perl.rollout.engine import Engine, SamplingParams
from perl.rollout.prompts import PromptEncoder
from perl.rollout.sample import sample
from perl.types import Example, Rollout, UserError

NUMBERS = ("accuracy", "greedy", "consistency", "greedy_consistency", "format")
"""What an evaluation comes to, by the fields of `ExampleResult`: the higher the better."""

logger = logging.getLogger(__name__)

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
    """One example over its orders. Numbers are 0 to 1 but for rewards, which are what the run's functions give;
    consistencies are NaN with a single order, and where nothing reads the answers."""

    id: str
    task: str
    accuracy: float
    """Of completions sampled at temperature 1, mean over orders and samples; NaN where nothing says what is right."""
    greedy: float
    """Of the greedy completion, mean over orders."""
    consistency: float
    """How often sampled completions of two different orders choose the same picture."""
    greedy_consistency: float
    format: float
    """Of the run's function `format`, on the sampled completions."""
    orders: int
    content: str = ""
    """A hash of the example, so that evaluations of different data are not compared."""
    pictures: str = ""
    """A hash of its pictures: questions about the same ones have the same."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Means over the sampled completions: `reward`, the run's weighted sum, and `reward/NAME` of each function; the same of
    the greedy ones as `greedy_reward` and `greedy_reward/NAME`."""
    unscored: int = 0
    """Completions whose weighted sum has no value, as a function failed on them or none applies."""
    unread: float = math.nan
    """The share of completions that give no answer where the run's rewards look for it; NaN where nothing reads them."""


class Scored(NamedTuple):
    """A completion and what it is worth."""

    rollout: Rollout
    reward: float
    """The weighted sum; NaN: it has none."""
    parts: dict[str, float]
    """By function; NaN where it gives no score."""


def evaluate(
    engine: Engine,
    encoder: PromptEncoder,
    dataset: Dataset | Sequence[Example],
    indices: Sequence[int],
    config: Config,
    advance: Callable[[int], None] = lambda _: None,
    scorer: Scorer | None = None,
) -> tuple[list[ExampleResult], list[Scored]]:
    """Measure a policy as `config.eval` says; the seed is the same for all, so that policies can be compared.

    Args:
        dataset: held-out examples; those over the prompt budget are left out if the encoder drops them, and faulty ones
            as `data.on_error` says.
        indices: which of them to measure on; they are loaded a few at a time.
        advance: told how many examples are done, for a progress bar.
        scorer: of the run's rewards, which are asked once for each completion; None: as `config.reward` says.

    Returns:
        Results by example, and one sampled rollout for each order of the first chunk's examples, to look at.
    """
    results: list[ExampleResult] = []
    shown: list[Scored] = []
    if scorer is None:
        scorer = Scorer(config.reward.functions, config.reward.weights, config.reward.timeout)
    accuracy, _ = accuracy_of(config) or (None, "")
    reading = answer_reading(config, scorer)
    longest, text = config.rollout.max_new_tokens, config.permutation.text
    accept = acceptance(config.data, text, encoder.processor)
    stop = config.rollout.stop
    sampling = SamplingParams(config.eval.samples, 1.0, longest, stop=stop)
    greedily = SamplingParams(1, 0.0, longest, stop=stop)
    for start in range(0, len(indices), _CHUNK):
        numbers = indices[start : start + _CHUNK]
        read_all = (_example(dataset, i, accept) for i in numbers)
        chunk = [example for example in read_all if example]
        encoded = [
            encoder.encode(
                [permute(e, o, text) for o in all_orders(e, config.eval.max_orders, EVAL_SEED)]
            )
            for e in chunk
        ]
        flat = [pair for pairs in encoded for pair in pairs]
        sampled = sample(engine, encoder.processor, flat, sampling, EVAL_SEED + indices[start])
        greedy = sample(engine, encoder.processor, flat, greedily, EVAL_SEED)
        both = [[*s, *g] for s, g in zip(sampled, greedy, strict=True)]
        scored = iter(_scored(scorer, [r for rollouts in both for r in rollouts]) if both else ())
        by_order = iter([list(islice(scored, len(rollouts))) for rollouts in both])
        for pairs in filter(None, encoded):
            own = list(islice(by_order, len(pairs)))
            results.append(_summarise(own, accuracy, reading))
            if not start:
                shown += [scored_of_order[0] for scored_of_order in own]
        advance(len(numbers))
    return results, shown


def _example(
    dataset: Dataset | Sequence[Example], i: int, accept: Callable[[Example], None] | None
) -> Example | None:
    """Example i; None if it is faulty and such are left out."""
    try:
        example = dataset[i]
        if accept:
            accept(example)
    except UserError as error:
        if accept is None:
            raise
        tell_once(logging.WARNING, f"left out of what is measured on: {error}", str(error))
        return None
    return example


def aggregate(results: Sequence[ExampleResult]) -> dict[str, Any]:
    """Means over examples, in all and by task.

    Raises:
        UserError: nothing was measured.
    """
    if not results:
        raise UserError(
            "every held-out example is faulty or has a prompt over the token budget; raise data.max_prompt_tokens and "
            "train.tokens_per_micro_batch, or lower model.max_pixels"
        )
    tasks: defaultdict[str, list[ExampleResult]] = defaultdict(list)
    for result in results:
        tasks[result.task].append(result)
    by_task = {name: _means(of_task) for name, of_task in tasks.items() if name}
    return {**_means(results), "by_task": by_task}


def accuracy_of(config: Config) -> tuple[str, str] | None:
    """The reward function of a run that says whether an answer is right, by its name and as it is written: the one that
    `filter.measure` names, else the one called `accuracy`, else the only one. Those are functions called `accuracy`, and
    built-in ones that compare one answer with the right one. None: there is none, or several and nothing says which.
    """
    functions, found = config.reward.functions, _judges(config)
    for wanted in (config.filter.measure, "accuracy"):
        named = [functions[i] for i in places_of(functions, wanted) if functions[i] in found]
        if len(named) == 1:
            found = named
            break
    return (names_of(functions)[functions.index(found[0])], found[0]) if len(found) == 1 else None


def _judges(config: Config) -> list[str]:
    """The functions that may be called accuracy, as they are written."""
    return [f for f in config.reward.functions if names_of([f]) == ("accuracy",) or says_right(f)]


def answer_reading(config: Config, scorer: Scorer) -> Reading | None:
    """How the run's rewards read a completion's answer; None if none of them is known to read one."""
    found = accuracy_of(config)
    names = [found[0]] if found else scorer.names
    return next(filter(None, (Reading.of(scorer.functions[name]) for name in names)), None)


def unmeasured(numbers: Mapping[str, Any], config: Config, scorer: Scorer) -> str | None:
    """Why the numbers of `aggregate` lack the accuracy, or are of answers that nobody could read, in one line; None: neither."""
    lost = [name for name in ("accuracy", "greedy") if numbers.get(name) is None]
    found = accuracy_of(config)
    if not lost:
        if found and numbers["consistency"] is None and numbers["orders"] > 1:
            return (
                f"consistency is not measured: nothing here knows how {found[1]} reads answers; add a function that is known "
                "to, as choice or math, with the weight 0, and name it in filter.measure"
            )
        if found is None or numbers["unread"] != 1:
            return None
        return (
            f"no completion of {config.data.eval} gives an answer that {found[1]} can read, so that the accuracy is "
            f"{numbers['accuracy']:g} whatever they say; ask for its form in data.instruction, or name a function in "
            "reward.functions that reads the model's (perl-rl evaluate takes --instruction and --functions)"
        )
    if found:
        return (
            f"{' and '.join(lost)} are not measured: no held-out example in {config.data.eval} has an answer that "
            f'{found[1]} compares with; name the column that holds it with data.map, as in "answer=THEIRS"'
        )
    if several := _judges(config):
        return (
            f"{' and '.join(lost)} are not measured: reward.functions has several that say what is right "
            f"({', '.join(several)}); name the one that counts in filter.measure"
        )
    lost += ["consistency"] if answer_reading(config, scorer) is None else []
    return (
        f"{', '.join(lost[:-1])} and {lost[-1]} are not measured: none of reward.functions "
        f"({', '.join(config.reward.functions)}) is known to say whether an answer is right; add accuracy, with its options "
        "and the weight 0, to report it"
    )


def _scored(scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Scored]:
    """Each rollout with its rewards, NaN where a function fails on it; what is measured along the way ends no run."""
    try:
        totals, parts = scorer.score_rollouts(rollouts, lenient=True)
    except UserError as error:
        logger.warning(
            "%d completions that are measured on have no reward: %s", len(rollouts), error
        )
        totals, parts = np.full(len(rollouts), math.nan), {}
    return [
        Scored(rollout, float(total), {name: float(own[i]) for name, own in parts.items()})
        for i, (rollout, total) in enumerate(zip(rollouts, totals, strict=True))
    ]


def _summarise(
    by_order: Sequence[Sequence[Scored]], accuracy: str | None, reading: Reading | None
) -> ExampleResult:
    """Each order's rollouts are its samples and, last, its greedy completion."""
    example = by_order[0][0].rollout.variant.example
    content, pictures = content_of(example)
    samples = [s for scored in by_order for s in scored[:-1]]
    greedy = [scored[-1] for scored in by_order]
    everything = [s for scored in by_order for s in scored]
    consistency, unread = [math.nan, math.nan], math.nan
    if reading:
        picks = [[chosen_picture(s.rollout, reading) for s in scored] for scored in by_order]
        parts = ([p[:-1] for p in picks], [p[-1:] for p in picks])
        consistency = [agreement(part, reading.same_in(example)) for part in parts]
        unread = mean([reading.read(s.rollout.text) is None for s in everything])
    rewards = {}
    for prefix, scored in (("", samples), ("greedy_", greedy)):
        rewards[f"{prefix}reward"] = mean([s.reward for s in scored])
        for name in dict.fromkeys(name for s in scored for name in s.parts):
            rewards[f"{prefix}reward/{name}"] = _part(scored, name)
    return ExampleResult(
        id=example.id,
        task=example.task,
        accuracy=_part(samples, accuracy),
        greedy=_part(greedy, accuracy),
        consistency=consistency[0],
        greedy_consistency=consistency[1],
        format=_part(samples, "format"),
        orders=len(by_order),
        content=content,
        pictures=pictures,
        rewards=rewards,
        unscored=sum(math.isnan(s.reward) for s in everything),
        unread=unread,
    )


def _part(scored: Sequence[Scored], name: str | None) -> float:
    return mean([s.parts.get(name, math.nan) for s in scored]) if name else math.nan


def _means(results: Sequence[ExampleResult]) -> dict[str, Any]:
    means = {
        name: mean([getattr(r, name) for r in results]) for name in (*NUMBERS, "unread", "orders")
    }
    for name in dict.fromkeys(name for r in results for name in r.rewards):
        means[name] = mean([r.rewards.get(name) for r in results])
    return {k: None if math.isnan(v) else round(v, 6) for k, v in means.items()} | {
        "unscored": sum(r.unscored for r in results),
        "examples": len(results),
    }
