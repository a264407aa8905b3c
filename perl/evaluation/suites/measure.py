"""Asks a model the items of a benchmark, greedily and in one or more orders of their images, and keeps the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perl.config import EVAL_SEED
from perl.evaluation.suites.answers import AnswerFile, Row
from perl.evaluation.suites.base import Items
from perl.evaluation.suites.reading import Judgement, Reply
from perl.llm import Endpoint
from perl.permutation import all_orders, answer_form, num_orders, original_answer, permute
from perl.rewards.reading import canonical
from perl.rollout.engine import Engine, SamplingParams
from perl.rollout.prompts import PromptEncoder, Shown
from perl.rollout.sample import sample
from perl.types import IMAGE_SLOT, Rollout, UserError, Variant

_CHUNK = 16
_EXTRACTION = """Below are a question and a response to it. Write only the final answer that the response gives: \
the letter if the question has lettered options, else the value, the list, or one "(k) answer" for each numbered \
part. Do not solve the question and do not correct the response. Write NONE if the response gives no final answer.

Question:
{question}

Response:
{response}

Final answer:"""
_LONGEST_EXTRACT = 256


@dataclass(frozen=True)
class Procedure:
    """How items are asked: the first `limit`, in `orders` of their images at most, the longest completion in tokens.

    A model behind `reader` reads the answers of completions without a box; None: the rules of the benchmark do.
    """

    orders: int
    max_new_tokens: int
    reader: Endpoint | None
    limit: int | None

    def count(self, items: Items) -> int:
        return min(self.limit or len(items), len(items))


def measure(
    items: Items,
    answers: AnswerFile,
    engine: Engine,
    encoder: PromptEncoder,
    how: Procedure,
    advance: Callable[[int], None],
) -> None:
    """Answer the items that `answers` has no answer to yet.

    The answers to every chunk of items are on disk before the next is asked. A prompt that the encoder drops counts
    as a wrong answer.

    Raises:
        UserError: two items have one id, or a prompt is over the limit and is not to be dropped.
    """
    seen: set[str] = set()
    answers.cut()
    count = how.count(items)
    params = SamplingParams(1, 0.0, how.max_new_tokens)
    for start in range(0, count, _CHUNK):
        chunk = range(start, min(start + _CHUNK, count))
        asked: list[Shown] = []
        rows: list[Row] = []
        for i in chunk:
            # A variant that waits for its answer has its pictures undecoded: those of a whole chunk may fill the memory.
            bare = items.without_pixels(i)
            if bare.id in seen:
                raise UserError(
                    f"suite {items.suite.name}: two items have the id {bare.id}; "
                    "get the published files again, in a folder of their own"
                )
            seen.add(bare.id)
            variants = [
                permute(bare, order)
                for order in all_orders(bare, how.orders, EVAL_SEED)
                if not answers.has(bare.id, order)
            ]
            if not variants:
                continue
            example = items[i]
            if shown := encoder.encode([permute(example, v.order) for v in variants]):
                asked += [(v, prompt) for v, (_, prompt) in zip(variants, shown, strict=True)]
            else:
                rows += [_row(v, None, False, Judgement(None, 0.0)) for v in variants]
        if asked:
            sampled = sample(engine, encoder.processor, asked, params, EVAL_SEED)
            rows += _judged([rollout for (rollout,) in sampled], items, how.reader)
        answers.add(rows)
        advance(len(chunk))


def _judged(rollouts: Sequence[Rollout], items: Items, reader: Endpoint | None) -> list[Row]:
    replies = [Reply.of(rollout.text) for rollout in rollouts]
    extracted: dict[int, str] = {}
    if reader is not None and (unread := [i for i, r in enumerate(replies) if not r.marked]):
        texts = _extract(reader, [rollouts[i] for i in unread])
        extracted = dict(zip(unread, texts, strict=True))
    rows = []
    for i, (rollout, reply) in enumerate(zip(rollouts, replies, strict=True)):
        read = {"extracted": extracted[i]} if i in extracted else {}
        if read:
            reply = Reply(extracted[i], True)
        variant = rollout.variant
        judgement = items.suite.judge(variant.example, variant.answer, reply)
        rows.append(_row(variant, rollout.text, rollout.finished, judgement) | read)
    return rows


def _extract(reader: Endpoint, rollouts: Sequence[Rollout]) -> list[str]:
    """The final answer of each rollout, empty where it gives none."""
    questions = [r.variant.example.messages[-1].content for r in rollouts]
    prompts = [
        _EXTRACTION.format(question=q.replace(IMAGE_SLOT, "").strip(), response=r.text)
        for q, r in zip(questions, rollouts, strict=True)
    ]
    replies = reader.complete(prompts, max_tokens=_LONGEST_EXTRACT, temperature=0.0)
    return ["" if r.strip().upper() == "NONE" else r.strip() for r in replies]


def _row(variant: Variant, text: str | None, finished: bool, judgement: Judgement) -> Row:
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
        "chosen": None if chosen is None else canonical(chosen, answer_form(example)),
    }
