"""Rewards that ask a language model behind an OpenAI-compatible endpoint (PERL_LLM_URL, PERL_LLM_MODEL).

They are `async def` so that the Scorer calls them beside other functions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from perl.llm import Completion, Endpoint
from perl.rewards.answers import column_of
from perl.rewards.reading import final_answer
from perl.types import UserError

_JUDGE = """\
Question:
{question}

Reference answer:
{gold}

Answer to be judged:
{given}

Does the answer to be judged agree with the reference answer? Wording and notation do not matter, \
what it says does. Reply with one word: yes or no."""

_FACTS = """\
Facts about the images of a question:
{facts}

Somebody's reasoning about the question:
{text}

For each fact in turn: does the reasoning state it, in whatever words? Reply with one line of \
{count} numbers, 1 for yes and 0 for no, separated by commas."""


async def judge(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | None],
    *,
    concurrency: int = 16,
    max_tokens: int = 512,
    **columns: Any,
) -> list[Any]:
    """1 where a language model finds that the final answer agrees with the gold one, else 0.

    For answers in free text; None without gold. A request that fails, or a reply whose first word
    (after any thinking) is neither yes nor no, or that was cut at `max_tokens`, is a fault of that
    rollout.
    """
    asked = [
        None
        if gold is None
        else _JUDGE.format(question=prompt, gold=gold, given=final_answer(text))
        for prompt, text, gold in zip(prompts, completions, answer, strict=True)
    ]
    return await _scores(asked, lambda i, reply: _yes_or_no(reply), concurrency, max_tokens)


async def caption_facts(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    column: str = "facts",
    concurrency: int = 16,
    max_tokens: int = 512,
    **columns: Any,
) -> list[Any]:
    """The share of known facts about the images that a language model finds in the completion.

    The visual perception reward of Perception-R1, arXiv 2506.07218. `column` names a list of
    texts, or one text with a fact a line; None without facts. A request that fails, or a reply
    without one number for each fact, or that was cut at `max_tokens`, is a fault of that rollout.
    """
    known = [_lines(value or ()) for value in column_of("caption_facts", columns, column)]
    asked = [
        _FACTS.format(
            facts="\n".join(f"{k}. {fact}" for k, fact in enumerate(facts, 1)),
            text=text,
            count=len(facts),
        )
        if facts
        else None
        for text, facts in zip(completions, known, strict=True)
    ]
    return await _scores(
        asked, lambda i, reply: _share(reply, len(known[i])), concurrency, max_tokens
    )


def check_judge() -> None:
    """Raise UserError if no endpoint is set, or the one that is does not answer; it is asked once."""
    _ask_for_a_sign(Endpoint.from_env())


@functools.cache
def _ask_for_a_sign(endpoint: Endpoint) -> None:
    endpoint.complete(["Reply with one word: yes"], max_tokens=8)


async def _scores(
    asked: Sequence[str | None],
    read: Callable[[int, str], float],
    concurrency: int,
    max_tokens: int,
) -> list[Any]:
    """For each completion a score, None where nothing is asked, or the exception that it ended in.

    Raises UserError if no request succeeds.
    """
    endpoint = replace(Endpoint.from_env(), concurrency=concurrency)
    questions = {i: question for i, question in enumerate(asked) if question is not None}
    replies = await endpoint.ask(list(questions.values()), max_tokens=max_tokens)
    refused = [reply for reply in replies if isinstance(reply, UserError)]
    if refused and len(refused) == len(replies):
        raise refused[0]
    scores: list[Any] = [None] * len(asked)
    for i, reply in zip(questions, replies, strict=True):
        try:
            scores[i] = read(i, _spoken(reply)) if isinstance(reply, Completion) else reply
        except ValueError as error:
            scores[i] = error
    return scores


def _yes_or_no(said: str) -> float:
    # The first word only: "Yes, there is no contradiction" and "No, because yes is wrong" hold both.
    match = re.match(r"[\W_]*(yes|no)(?![\w/|])", said, re.I)
    if match is None:
        raise _unclear(said, "yes or no")
    return float(match[1].lower() == "yes")


def _share(said: str, count: int) -> float:
    # A full stop may end the reply; elsewhere it makes a decimal or the number of a list.
    numbers = re.findall(r"(?<![0-9.])[01](?![0-9])(?!\.(?!\s*$))", said)
    if len(numbers) != count:
        raise _unclear(said, f"{count} numbers")
    return numbers.count("1") / count


def _spoken(reply: Completion) -> str:
    """What a model says after it has thought; ValueError if it did not get to the end."""
    _, thought, said = reply.rpartition("</think>")
    if reply.cut or (not thought and "<think>" in reply):
        raise ValueError("the judge's reply was cut before its end; raise the option max_tokens")
    return said


def _unclear(said: str, wanted: str) -> ValueError:
    return ValueError(f"the judge replied '{said.strip()[:60]}' where {wanted} was asked for")


def _lines(facts: Any) -> list[str]:
    lines = facts.splitlines() if isinstance(facts, str) else facts
    return [str(line).strip() for line in lines if str(line).strip()]
