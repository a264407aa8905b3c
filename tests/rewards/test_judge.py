"""Rewards that ask a language model: what is asked, what its replies mean, and what happens when it is not there."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from perl.rewards.scorer import Scorer
from tests.chat_server import Model, Reply, says, serving
from tests.messages import refused, tells
from tests.rewards.scoring import totals

NAN = float("nan")


def test_the_judge_compares_final_answers(model: Model) -> None:
    model.answer = lambda text: "<think>no, no</think>Yes." if "a red car" in text else "no"
    texts = ["<think>hm</think><answer>a red car</answer>", "<answer>a dog</answer>", "x"]
    gold = {"answer": ["the red automobile", "a cat", None]}
    scorer = Scorer(("judge",), (1.0,))
    scores, _ = scorer.score(["What is it?"] * 3, texts, gold)
    np.testing.assert_array_equal(scores, [1, 0, NAN])
    assert scorer.faults == {"judge": 0}
    assert len(model.asked) == 3  # One to see whether it is there.
    question = next(text for text in model.asked if "a red car" in text)
    assert "What is it?" in question and "the red automobile" in question and "hm" not in question


def test_facts_are_counted(model: Model) -> None:
    def reply(text: str) -> str:
        facts = [line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()]
        reasoning = text.partition("reasoning about the question:\n")[2].partition("\n")[0]
        return ", ".join(str(int(fact in reasoning)) for fact in facts)

    model.answer = reply
    facts = [["red", "round"], "red\nround\n\nbig\n", ["red"], [], None]
    texts = ["it is red", "red and round", "it is blue", "red", "red"]
    _, scores = totals("caption_facts", texts, facts=facts)
    np.testing.assert_allclose(scores, [1 / 2, 2 / 3, 0, NAN, NAN])
    with refused("caption_facts", "column 'notes'", "facts"):
        totals("caption_facts(column='notes')", ["x"], facts=[["a"]])


COLUMNS = {"judge": {"answer": ["A"] * 2}, "caption_facts": {"facts": [["x", "y", "z"]] * 2}}
JUDGED = {
    1: ("Yes, there is no contradiction.", "**Yes**", "<think>maybe no</think>\n\nYes.",
        "it opens before the reply, no</think>yes"),
    0: ("No, because yes is not what it says", "'no.'"),
    NAN: ("<think>... maybe yes", says("yes", "length"), says("<think>maybe</think> yes", "length"), "Perhaps yes", "yes/no", "Nothing", ""),
}  # fmt: skip
COUNTED = {
    2 / 3: ("1, 0, 1.", "1. 1\n2. 0\n3. 1"),
    1 / 3: ("<think>1, 1, 1</think>\n0, 0, 1\n",),
    NAN: ("1, 0.5, 1", "1, 0", "<think>1, 0, 1", says("1, 0, 1", "length")),
}


@pytest.mark.parametrize(
    ("function", "reply", "value"),
    [("judge", reply, value) for value, replies in JUDGED.items() for reply in replies]
    + [("caption_facts", reply, value) for value, replies in COUNTED.items() for reply in replies],
)
def test_only_a_whole_reply_with_the_wanted_words_counts(
    function: str, reply: str | Reply, value: float, model: Model
) -> None:
    """A first word that judges, or a number for each fact."""
    model.answer = lambda text: (
        reply if "odd" in text else "yes" if function == "judge" else "1, 1, 1"
    )
    _, scores = totals(function, ["odd", "a"], **COLUMNS[function])
    np.testing.assert_allclose(scores, [value, 1])


@pytest.mark.parametrize(("bad", "named"), [((400, {}), "400"), ("perhaps", "'perhaps'")])
def test_one_request_that_fails_costs_one_rollout(
    bad: str | Reply, named: str, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    model.answer = lambda text: bad if "poison" in text else "yes"
    columns = {"answer": ["A"] * 3, "id": ["q1", "q2", "q3"]}
    scorer, scores = totals("judge", ["a", "poison", "b"], **columns)
    np.testing.assert_array_equal(scores, [1, NAN, 1])
    assert scorer.faults == {"judge": 1}
    tells(caplog.text, "'judge'", named, "example 'q2'")


@pytest.mark.parametrize("function", ["judge", "caption_facts"])
def test_the_options_of_what_is_asked(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, running, most = [], 0, 0
    lock, three = threading.Lock(), threading.Barrier(3)

    def reply(body: dict[str, Any], headers: Any) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            asked.append(body["max_tokens"])
        if body["max_tokens"] == 77:
            three.wait(20)
        with lock:
            running -= 1
        return says("yes" if function == "judge" else "1")

    with serving(reply) as url:
        monkeypatch.setenv("PERL_LLM_URL", url)
        monkeypatch.setenv("PERL_LLM_MODEL", "m")
        columns = {"answer": ["A"] * 6, "facts": ["x"] * 6}
        assert (
            totals(f"{function}(concurrency=3, max_tokens=77)", ["a"] * 6, **columns)[1] == [1] * 6
        )
        assert totals(function, ["a"], answer=["A"], facts=["x"])[1] == [1]
    assert asked == [8, *[77] * 6, 512] and most == 3


def test_a_model_that_is_not_served_is_one_error(model: Model) -> None:
    """Before a run starts, and again if it happens later."""
    model.answer = lambda text: (404, {})
    with refused("404"):
        Scorer(("caption_facts",), (1.0,))
    model.answer = lambda text: "yes"
    scorer = Scorer(("judge",), (1.0,))
    model.answer = lambda text: (404, {})
    with refused("404"):
        scorer.score(["q"] * 3, ["a"] * 3, {"answer": ["A"] * 3})


def test_no_endpoint_is_an_error_before_the_run(no_endpoint: None) -> None:
    with refused("PERL_LLM_URL"):
        Scorer(("judge",), (1.0,))
