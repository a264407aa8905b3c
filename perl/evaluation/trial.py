"""What a run's rewards give for right answers, tried before any model has written one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from perl.config import RewardConfig
from perl.data.dataset import Dataset
from perl.permutation import Consistency, permute
from perl.rewards.columns import rollout_columns
from perl.rewards.forms import BOX, Form, forms_of, opened, written
from perl.rewards.scorer import BUILT_IN, Scorer, is_outside
from perl.rollout.instruction import spread
from perl.rollout.prompts import PromptEncoder
from perl.types import Rollout, UserError, Variant, one_line

logger = logging.getLogger(__name__)

Scores = tuple[np.ndarray, dict[str, np.ndarray]]
"""As `Scorer.score` gives them."""

_TRIED = 4
"""Examples of a data set."""


def right_answer(
    prompt: str, demonstration: str, answer: str, read: Mapping[str, Sequence[Form]]
) -> tuple[str, bool]:
    """The right answer in the form that the prompt asks for, else in that of the demonstration, else in the one that
    rewards read (`read`, by function); and whether the last was so, as nothing asks for a form."""
    forms = [form for of_function in read.values() for form in of_function]
    around = {BOX, "<answer>"}
    known = frozenset(around.union({"<think>"}, *forms))
    # Of several forms that a function reads the first, unless another one does.
    first = {mark for of_function in read.values() for form in of_function[:1] for mark in form}
    for text in (prompt, demonstration, " ".join(first)):
        if marks := {mark for mark in known if mark in text}:
            needed = {mark for form in forms if form <= marks for mark in form}
            # A prompt that mentions both is answered as rewards read it.
            completion = written(answer, marks - (around - needed if around & needed else set()))
            unasked = text not in (prompt, demonstration)
            return completion.removeprefix("".join(opened(prompt, [known]))), unasked
    return answer, False


def try_rewards(
    name: str, dataset: Dataset, text: Consistency, reward: RewardConfig, encoder: PromptEncoder
) -> None:
    """See that the rewards can be called, and warn if none of some right answers is worth more than an empty completion.
    Functions that ask something outside this process are not called.

    Args:
        name: of the data set.
        text: `permutation.text`.

    Raises:
        UserError: a function fails on all of them.
    """
    weights = Scorer(reward.functions, reward.weights, reward.timeout).weights.values()
    inside = [(f, w) for f, w in zip(reward.functions, weights, strict=True) if not is_outside(f)]
    if not inside:
        return
    scorer = Scorer([f for f, _ in inside], [w for _, w in inside], reward.timeout)
    variants = []
    for i in spread(dataset.size, _TRIED):
        with suppress(UserError):  # Such a row is left out of training too, or was refused.
            example = dataset[i]
            scorer.check_answer(example)
            variants.append(encoder.ask(permute(example, range(len(example.images)), text)))
    if not variants:
        return
    read = forms_of(reward.functions, reward.weights)
    right = [r for variant in variants for r in _answered(variant, encoder, read)]
    try:
        given = scorer.score_rollouts(right)
    except UserError as error:
        raise UserError(
            f"{name}: {error}; so it would go in the run: it was tried on right answers, as perl-rl preview does; columns "
            f"are {', '.join(rollout_columns(right)[2])}"
        ) from error
    known = [k for k, rollout in enumerate(right) if rollout.variant.answer]
    if known and len(inside) == len(reward.functions):
        nothing = [replace(r, text="", token_ids=r.token_ids[:0]) for r in right]
        empty = scorer.score_rollouts(nothing, lenient=True)
        _warn_of_worthless(
            name, scorer, [right[k] for k in known], _at(known, given), _at(known, empty)
        )


def _warn_of_worthless(
    name: str, scorer: Scorer, right: Sequence[Rollout], given: Scores, empty: Scores
) -> None:
    """Warn if the sum, or all functions that count most, give no right answer more than an empty completion. Those of ours
    that read no answer, as `format`, are not looked at."""
    weights = {
        n: scorer.weights[n]
        for n, f in scorer.functions.items()
        if scorer.weights[n] > 0 and (f.function not in BUILT_IN.values() or f.reads_answer)
    }
    most = [n for n, weight in weights.items() if weight == max(weights.values())]

    def worthless(some: np.ndarray, none: np.ndarray) -> bool:
        scored = ~np.isnan(some)
        return bool(scored.any() and (some <= np.nan_to_num(none))[scored].all())

    if not most or not (
        all(worthless(given[1][n], empty[1][n]) for n in most) or worthless(given[0], empty[0])
    ):
        return
    gold = rollout_columns(right[:1])[2]["ground_truth"][0]
    logger.warning(
        "%s: RIGHT ANSWERS ARE WORTH NO MORE THAN EMPTY COMPLETIONS, so that a model may have nothing to learn: %d were "
        "tried, the first %s, where ground_truth is %s; %s. Either the function is wrong, or the form of the answers in the "
        "data, or it is not about the answer; perl-rl preview shows what each gives",
        name,
        len(right),
        one_line(right[0].text, 60),
        one_line(repr(gold), 60),
        "; ".join(
            f"{n} gives at most {_most(given[1][n])}, without a completion {_most(empty[1][n])}"
            for n in most
        ),
    )


def _answered(
    variant: Variant, encoder: PromptEncoder, read: Mapping[str, Sequence[Form]]
) -> list[Rollout]:
    """The right answer as if it was sampled; in the usual forms where none is known to be asked for or read."""
    processor = encoder.processor
    prompt, answer = processor.render(variant.messages, variant.example.id), variant.answer
    text, _ = right_answer(prompt, variant.example.demonstration or "", answer, read)
    forms = [text]
    if text == answer:
        forms += [written(answer, marks) for marks in ({BOX}, {"<think>", "<answer>"})]
    unread: Any = None  # No reward reads the prompt's tokens.
    tokens = [processor.encode_completion(encoder.plain(form)) for form in forms]
    return [
        Rollout(variant, unread, ids, np.zeros(len(ids), np.float32), form, finished=True)
        for ids, form in zip(tokens, forms, strict=True)
    ]


def _at(places: Sequence[int], scores: Scores) -> Scores:
    return scores[0][places], {n: own[places] for n, own in scores[1].items()}


def _most(values: np.ndarray) -> str:
    scored = values[~np.isnan(values)]
    return f"{scored.max():.4g}" if scored.size else "none"
