"""Rewards that ask a language model: what is asked, what its replies mean, and what happens when it is not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from perl.rewards.scorer import Scorer
from perl.types import UserError

NAN = float("nan")
Reply = Callable[[str], str | int | list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], list[str]]]:
    """Starts an endpoint that replies as told, and lists what it was asked. A number is an HTTP
    status, a text in a list one that was cut."""
    servers = []

    def start(reply: Reply) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                asked.append(text)
                answer = reply(text)
                status = answer if isinstance(answer, int) else 200
                self.send_response(status)
                self.end_headers()
                said, end = (answer[0], "length") if isinstance(answer, list) else (answer, "stop")
                content = {"choices": [{"message": {"content": str(said)}, "finish_reason": end}]}
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("PERL_LLM_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("PERL_LLM_MODEL", "judge")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_judge_compares_final_answers(serve: Callable[[Reply], list[str]]) -> None:
    asked = serve(lambda text: "<think>no, no</think>Yes." if "a red car" in text else "no")
    scorer = Scorer(("judge",), (1.0,))
    texts = ["<think>hm</think><answer>a red car</answer>", "<answer>a dog</answer>", "x"]
    gold = {"answer": ["the red automobile", "a cat", None]}
    totals, _ = scorer.score(["What is it?"] * 3, texts, gold)
    np.testing.assert_array_equal(totals, [1, 0, NAN])
    assert scorer.faults == {"judge": 0}
    assert len(asked) == 3  # One to see whether it is there.
    question = next(text for text in asked if "a red car" in text)
    assert "What is it?" in question and "the red automobile" in question and "hm" not in question


def test_facts_are_counted(serve: Callable[[Reply], list[str]]) -> None:
    def reply(text: str) -> str:
        facts = [line.partition(". ")[2] for line in text.splitlines() if line[:1].isdigit()]
        reasoning = text.partition("reasoning about the question:\n")[2].partition("\n")[0]
        return ", ".join(str(int(fact in reasoning)) for fact in facts)

    serve(reply)
    scorer = Scorer(("caption_facts",), (1.0,))
    facts = [["red", "round"], "red\nround\n\nbig\n", ["red"], [], None]
    texts = ["it is red", "red and round", "it is blue", "red", "red"]
    totals, _ = scorer.score(["q"] * 5, texts, {"facts": facts})
    np.testing.assert_allclose(totals, [1 / 2, 2 / 3, 0, NAN, NAN])
    with pytest.raises(UserError, match="no column 'notes'"):
        Scorer(("caption_facts(column='notes')",), (1.0,)).score(["q"], ["x"], {"facts": [["a"]]})


FACTS = [["x", "y", "z"]] * 2
JUDGED = {
    1: ("Yes, there is no contradiction.", "**Yes**", "<think>maybe no</think>\n\nYes.",
        "it opens before the reply, no</think>yes"),
    0: ("No, because yes is not what it says", "'no.'"),
    NAN: ("<think>... maybe yes", ["yes"], ["<think>maybe</think> yes"], "Perhaps yes", "yes/no", "Nothing", ""),
}  # fmt: skip
COUNTED = {
    2 / 3: ("1, 0, 1.", "1. 1\n2. 0\n3. 1"),
    1 / 3: ("<think>1, 1, 1</think>\n0, 0, 1\n",),
    NAN: ("1, 0.5, 1", "1, 0", "<think>1, 0, 1", ["1, 0, 1"]),
}


@pytest.mark.parametrize(
    ("function", "reply", "value"),
    [("judge", reply, value) for value, replies in JUDGED.items() for reply in replies]
    + [("caption_facts", reply, value) for value, replies in COUNTED.items() for reply in replies],
)
def test_only_a_whole_reply_with_the_wanted_words_counts(
    function: str, reply: str | list[str], value: float, serve: Callable[[Reply], list[str]]
) -> None:
    """A first word that judges, or a number for each fact."""
    serve(lambda text: reply if "odd" in text else "yes" if function == "judge" else "1, 1, 1")
    columns = {"answer": ["A"] * 2} if function == "judge" else {"facts": FACTS}
    totals, _ = Scorer((function,), (1.0,)).score(["q"] * 2, ["odd", "a"], columns)
    np.testing.assert_allclose(totals, [value, 1])


@pytest.mark.parametrize(
    ("bad", "reason"), [(400, "answered 400"), ("perhaps", "replied 'perhaps' where yes or no")]
)
def test_one_request_that_fails_costs_one_rollout(
    bad: str | int,
    reason: str,
    serve: Callable[[Reply], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve(lambda text: bad if "poison" in text else "yes")
    scorer = Scorer(("judge",), (1.0,))
    columns = {"answer": ["A"] * 3, "id": ["q1", "q2", "q3"]}
    totals, _ = scorer.score(["q"] * 3, ["a", "poison", "b"], columns)
    np.testing.assert_array_equal(totals, [1, NAN, 1])
    assert scorer.faults == {"judge": 1}
    assert reason in caplog.text and "on example 'q2'" in caplog.text


def test_a_model_that_is_not_served_is_one_error(serve: Callable[[Reply], list[str]]) -> None:
    """Before a run starts, and again if it happens later."""
    gone = False
    serve(lambda text: 404 if gone else "yes")
    scorer = Scorer(("judge",), (1.0,))
    gone = True
    with pytest.raises(UserError, match="answered 404"):
        scorer.score(["q"] * 3, ["a"] * 3, {"answer": ["A"] * 3})
    serve(lambda text: 404)
    with pytest.raises(UserError, match="answered 404"):
        Scorer(("caption_facts",), (1.0,))


def test_no_endpoint_is_an_error_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERL_LLM_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set PERL_LLM_URL"):
        Scorer(("judge",), (1.0,))
