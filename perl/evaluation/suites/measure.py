"""Asks a model the items of a benchmark, greedily and in one or more orders of their images, and keeps the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perl.evaluation.suites.answers import AnswerFile
from perl.evaluation.suites.base import Items, Judgement, Reply
from perl.permutation.permute import all_orders, num_orders, original_answer, permute
from perl.rewards.answers import normalise
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.rollout.prompts import PromptEncoder
from perl.types import EncodedPrompt, Example, UserError, Variant

_CHUNK = 16


class Extractor(Protocol):
    """Reads the final answers out of completions; see `LlmExtractor`."""

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[str]: ...


@dataclass(frozen=True)
class Procedure:
    """How every item is asked: `orders` of its images at most, and the longest completion in tokens.

    `seed` draws the orders where there are more than that. `extractor` reads completions without a boxed answer.
    """

    orders: int
    max_new_tokens: int
    seed: int
    extractor: Extractor | None = None


def measure(
    items: Items,
    answers: AnswerFile,
    engine: InProcessEngine,
    encoder: PromptEncoder,
    how: Procedure,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Answer the items, or the first `limit`, that `answers` has no answer to yet.

    The answers to every chunk of items are on disk before the next is asked. A prompt that the encoder drops counts
    as a wrong answer.

    Raises:
        UserError: two items have one id, or a prompt is over the limit and is not to be dropped.
    """
    seen: set[str] = set()
    answers.cut()
    count = len(items) if limit is None else min(limit, len(items))
    for start in range(0, count, _CHUNK):
        chunk = range(start, min(start + _CHUNK, count))
        asked: list[tuple[Variant, EncodedPrompt]] = []
        rows: list[dict[str, Any]] = []
        for i in chunk:
            variants = _waiting(items, i, answers, how, seen)
            if not variants:
                continue
            shown = encoder.encode(_with_pixels(items, i, variants))
            if not shown:
                rows += [_row(v, None, False, Judgement(None, 0.0)) for v in variants]
            else:
                asked += [(v, prompt) for v, (_, prompt) in zip(variants, shown, strict=True)]
        answers.add(rows + _answered(asked, items, engine, encoder, how))
        advance(len(chunk))


def _waiting(
    items: Items, i: int, answers: AnswerFile, how: Procedure, seen: set[str]
) -> list[Variant]:
    """Item i in the orders that have no answer yet, of its pictures only the headers."""
    example = items.get(i, decode=False)
    if example.id in seen:
        raise UserError(f"suite {items.suite.name}: two items have the id {example.id}")
    seen.add(example.id)
    orders = all_orders(example, how.orders, how.seed)
    return [permute(example, order) for order in orders if not answers.has(example.id, order)]


def _with_pixels(items: Items, i: int, variants: Sequence[Variant]) -> list[Variant]:
    """The same variants with their pictures decoded, which are not kept while others are asked."""
    example = items.get(i)
    return [permute(example, variant.order) for variant in variants]


def _answered(
    asked: Sequence[tuple[Variant, EncodedPrompt]],
    items: Items,
    engine: InProcessEngine,
    encoder: PromptEncoder,
    how: Procedure,
) -> list[dict[str, Any]]:
    if not asked:
        return []
    params = SamplingParams(1, 0.0, how.max_new_tokens)
    completions = [c for (c,) in engine.generate([p for _, p in asked], params, how.seed)]
    texts = [encoder.processor.decode(c.token_ids) for c in completions]
    variants = [variant for variant, _ in asked]
    extracted = _extracted(variants, texts, how.extractor)
    rows = []
    for i, (variant, text) in enumerate(zip(variants, texts, strict=True)):
        reply = Reply(extracted[i], True) if i in extracted else Reply.of(text)
        judgement = items.suite.judge(variant.example, variant.answer, reply)
        row = _row(variant, text, completions[i].finished, judgement)
        rows.append({**row, "extracted": extracted[i]} if i in extracted else row)
    return rows


def _extracted(
    variants: Sequence[Variant], texts: Sequence[str], extractor: Extractor | None
) -> dict[int, str]:
    """What the extractor reads, for the completions that box nothing."""
    if extractor is None:
        return {}
    unread = [i for i, text in enumerate(texts) if not Reply.of(text).boxed]
    replies = extractor([(variants[i].example, texts[i]) for i in unread])
    return dict(zip(unread, replies, strict=True))


def _row(
    variant: Variant, text: str | None, finished: bool, judgement: Judgement
) -> dict[str, Any]:
    example = variant.example
    chosen = original_answer(variant, judgement.answer)
    return {
        "id": example.id,
        "task": example.task,
        "problem": example.extra.get("problem", example.id),
        "order": list(variant.order),
        "movable": num_orders(example) > 1,
        "completion": text,
        "finished": finished,
        "answer": judgement.answer,
        "gold": variant.answer,
        "score": judgement.score,
        "chosen": None if chosen is None else normalise(chosen),
    }
