"""The client of chat endpoints, against servers in a thread: order, retries, what it says, what it keeps to itself."""

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from perl.llm import Endpoint, EndpointError
from perl.types import UserError
from tests.chat_server import Reply, says, serving
from tests.messages import refused, tells

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl.llm._FIRST_WAIT", 0.01)


def endpoint(url: str, **values: Any) -> Endpoint:
    return Endpoint(url, "m", **{"api_key": KEY, "max_retries": 2, **values})


def text_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def test_completions_come_in_order_and_side_by_side() -> None:
    under_way, most, lock, three = 0, 0, threading.Lock(), threading.Barrier(3)

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        text = text_of(body)
        if text != "x":  # Three at a time wait for each other; the first of them answers last.
            three.wait(10)
            time.sleep(0.02 if text == "0" else 0)
        with lock:
            under_way -= 1
        assert body["path"] == "/v1/chat/completions" and body["model"] == "m"
        assert headers["Authorization"] == f"Bearer {KEY}"
        return says(f"{text} {body['max_tokens']} {body['temperature']}")

    with serving(reply) as url:
        texts = endpoint(url, concurrency=3).complete([str(i) for i in range(9)], max_tokens=7)
        whole = endpoint(f"{url}/chat/completions/")
        assert whole.complete(["x"]) == ["x 512 0.0"]
    assert texts == [f"{i} 7 0.0" for i in range(9)]
    assert most == 3


def test_messages_with_images_go_as_they_are() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    chat = [
        {"role": "system", "content": "judge"},
        {"role": "user", "content": [{"type": "text", "text": "?"}, image]},
    ]
    with serving(lambda body, _: says(json.dumps(body["messages"]))) as url:
        (text,) = endpoint(url).complete([chat])
    assert json.loads(text) == chat


def test_an_empty_answer_is_an_empty_text() -> None:
    with serving(lambda *_: says(None)) as url:
        assert endpoint(url).complete(["x"]) == [""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(status: int) -> None:
    times: list[float] = []

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        times.append(time.monotonic())
        if len(times) < 3:
            return status, {"error": {"message": "busy"}}, {"Retry-After": "0.2"}
        return says("well")

    with serving(reply) as url:
        assert endpoint(url).complete(["x"]) == ["well"]
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))


def test_a_connection_that_breaks_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"

        def serve() -> None:
            for k in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    if k:
                        content = json.dumps(says("again")[1]).encode()
                        head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(content)}\r\n\r\n"
                        connection.sendall(head.encode() + content)

        thread = threading.Thread(target=serve)
        thread.start()
        assert endpoint(url).complete(["x"]) == ["again"]
        thread.join()


@pytest.mark.parametrize(
    ("status", "tries", "advice"),
    [
        (400, 1, "shorten"),
        (401, 1, "PERL_LLM_API_KEY"),
        (403, 1, "PERL_LLM_API_KEY"),
        (404, 1, "PERL_LLM_MODEL = m"),
        (429, 3, "wait"),
        (500, 3, "log"),
    ],
)
def test_a_refusal_says_where_what_and_what_to_do(status: int, tries: int, advice: str) -> None:
    asked = []

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        asked.append(body)
        return status, {"error": {"message": f"no, {headers['Authorization']}"}}

    with serving(reply) as url, pytest.raises(EndpointError) as error:
        endpoint(url).complete(["x"])
    said = str(error.value)
    tells(said, url, status, advice, "no, Bearer [key]")
    assert KEY not in said and error.value.status == status and len(asked) == tries
    assert error.value.of_request == (status == 400)
    assert isinstance(error.value, UserError)


def test_an_endpoint_that_is_down_is_not_asked_for_every_prompt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    down = endpoint(f"http://127.0.0.1:{port}/v1", concurrency=1)
    start = time.monotonic()
    failures = down.complete_each(["x"] * 50)
    assert time.monotonic() - start < 2
    assert len(failures) == 50
    assert all(isinstance(f, EndpointError) and f.status is None for f in failures)
    with refused(f"127.0.0.1:{port}/v1", "PERL_LLM_URL"):
        down.complete(["x"])


def test_one_prompt_that_fails_leaves_the_others_alone() -> None:
    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        text = text_of(body)
        return says(text) if text != "bad" else (400, b"not even JSON")

    with serving(reply) as url:
        good, bad, also = endpoint(url).complete_each(["a", "bad", "b"])
    assert (good, also) == ("a", "b")
    assert isinstance(bad, EndpointError) and bad.status == 400


def test_a_late_answer_is_given_up() -> None:
    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        time.sleep(0.4)
        return says("late")

    with serving(reply) as url, refused(url, "0.1 s", error=EndpointError):
        endpoint(url, timeout=0.1, max_retries=0).complete(["x"])


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        {"choices": []},
        [1],
        {"choices": [{"message": "x"}]},
        b"[" * 99_999,
        {"choices": [{"text": "x"}]},
    ],
)
def test_what_is_no_chat_completion_is_an_error(answer: Any) -> None:
    with serving(lambda *_: (200, answer)) as url, refused(url, "/v1", error=EndpointError):
        endpoint(url).complete(["x"])


def test_an_answer_that_is_no_completion_fails_alone_and_after_more_tries() -> None:
    asked: list[str] = []

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        text = text_of(body)
        asked.append(text)
        if text == "bad" or (text == "once" and asked.count(text) == 1):
            return 200, {"error": {"message": f"overloaded {KEY}"}}
        return says(text)

    with serving(reply) as url:
        answers = endpoint(url, concurrency=1).complete_each(["a", "bad", "once", "b"])
    assert [answers[i] for i in (0, 2, 3)] == ["a", "once", "b"] and asked.count("bad") == 3
    bad = answers[1]
    assert isinstance(bad, EndpointError) and bad.status == 200
    assert "(overloaded [key])" in str(bad)


def test_a_completion_says_whether_it_was_cut() -> None:
    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        text = text_of(body)
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": text}]}

    with serving(reply) as url:
        texts = endpoint(url).complete(["stop", "length"])
    assert texts == ["stop", "length"] and [text.cut for text in texts] == [False, True]


@contextmanager
def dripping(head: bytes) -> Iterator[str]:
    """The address of a server that sends `head` and then blanks for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(head)
                    while True:
                        connection.sendall(b" ")
                        time.sleep(0.02)
                except OSError:  # The client has given up.
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 500 No\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: "]
)
def test_the_limit_is_of_the_whole_try(head: bytes) -> None:
    start = time.monotonic()
    with dripping(head) as url, refused(url, "0.2 s", error=EndpointError):
        endpoint(url, timeout=0.2, max_retries=0).complete(["x"])
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("status", [200, 503])
def test_an_interrupt_waits_for_nobody(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for answers under way nor for the waits between tries, and nothing more is sent."""
    monkeypatch.setattr("perl.llm._FIRST_WAIT", 5)
    asked, release = [], threading.Event()

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        asked.append(time.monotonic())
        if len(asked) == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        if status == 200:
            release.wait(10)
        return status, {}

    with serving(reply) as url:
        with pytest.raises(KeyboardInterrupt):
            endpoint(url, concurrency=2).complete(["x"] * 6)
        assert time.monotonic() - asked[1] < 1
        release.set()
        time.sleep(0.1)
    assert len(asked) == 2


def test_a_prompt_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(TypeError), serving(lambda *_: says("x")) as url:
        endpoint(url).complete(["a", [{"role": b"user"}], "b"])  # type: ignore[list-item]


def test_the_key_does_not_follow_a_redirection() -> None:
    seen: list[dict[str, str]] = []

    def elsewhere(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        seen.append(headers)
        return says("from elsewhere")

    with serving(elsewhere) as target, serving(lambda *_: (302, {}, {"Location": target})) as url:
        assert endpoint(url).complete(["x"]) == ["from elsewhere"]
    assert seen and "Authorization" not in seen[0]


@pytest.mark.parametrize(
    ("environment", "url", "key"),
    [
        ({"PERL_LLM_URL": "http://a/v1"}, "http://a/v1", None),
        ({"PERL_LLM_URL": "http://a/v1", "PERL_LLM_API_KEY": " k \n"}, "http://a/v1", "k"),
        ({"PERL_LLM_URL": "http://a/v1", "OPENAI_API_KEY": "k"}, "http://a/v1", None),
        ({"OPENAI_BASE_URL": "http://b/v1", "OPENAI_API_KEY": "k"}, "http://b/v1", "k"),
    ],
)
def test_the_environment_names_the_endpoint(
    environment: dict[str, str], url: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's key is sent to OpenAI's address alone."""
    for name, value in {**environment, "PERL_LLM_MODEL": "m"}.items():
        monkeypatch.setenv(name, value)
    found = Endpoint.from_env()
    assert (found.url, found.model, found.api_key) == (url, "m", key)


def test_an_environment_without_an_endpoint_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refused("PERL_LLM_URL", "PERL_LLM_MODEL"):
        Endpoint.from_env()
    monkeypatch.setenv("PERL_LLM_URL", "http://a/v1")
    with refused("http://a/v1", "PERL_LLM_MODEL"):
        Endpoint.from_env()


@pytest.mark.parametrize(
    ("url", "values", "names"),
    [
        ("localhost:8000", {}, ["localhost:8000", "http"]),
        ("http://[::x", {}, ["address", "http://localhost:8000/v1"]),
        ("ftp://a", {}, ["ftp://a", "http"]),
        ("http:///v1", {}, ["http:///v1", "http"]),
        ("http://me:hush@a", {}, ["http://a", "PERL_LLM_API_KEY"]),
        ("http://me@a", {}, ["http://a", "PERL_LLM_API_KEY"]),
        (f"http://a/v1?api-key={KEY} x", {}, ["blanks", "percent-encoded"]),
        ("http://a/v1?api-key=hush\x00", {}, ["control characters", "percent-encoded"]),
        ("http://a/v\u00e4", {}, ["ASCII", "percent-encoded"]),
        ("http://a", {"timeout": 0.0}, ["http://a", "timeout", 0]),
        ("http://a", {"concurrency": 0}, ["http://a", "concurrency 1"]),
        ("http://a", {"max_retries": -1}, ["http://a", "max_retries 0"]),
        ("http://a", {"api_key": f"{KEY}\nX: y"}, ["http://a", "key", "HTTP"]),
    ],
)
def test_values_that_cannot_work(url: str, values: dict[str, Any], names: list[object]) -> None:
    with pytest.raises(UserError) as error:
        endpoint(url, **values)
    tells(error.value, *names)
    assert KEY not in str(error.value) and "hush" not in str(error.value)


def test_neither_key_nor_query_is_ever_shown() -> None:
    secret = endpoint("http://127.0.0.1:9/v1?api=hush", max_retries=0)
    with pytest.raises(UserError) as error:
        secret.complete(["x"])
    assert "hush" not in str(error.value) and KEY not in repr(secret)
    assert "hush" not in repr(secret) and "http://127.0.0.1:9/v1" in repr(secret)


def test_a_key_in_the_query_is_hidden_where_the_server_repeats_it() -> None:
    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        return 400, {"error": {"message": f"no: {body['path']} (hush%hush)"}}

    with serving(reply) as url, pytest.raises(UserError) as error:
        endpoint(f"{url}?api-key=hush%25hush&v=2").complete(["x"])
    assert "no: /v1/chat/completions?[key] ([key])" in str(error.value)
