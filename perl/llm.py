"""A client for any OpenAI-compatible chat endpoint: vLLM, llama.cpp, Ollama, OpenAI and others."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from perl.types import UserError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages as the protocol has them. An image is a part of a message's content:
`{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`."""

_LONGEST_WAIT = 60.0
_SHORTEST_SECRET = 6
"""Characters of a query's value from which on it is blotted out wherever it turns up."""


class Completion(str):
    """A completion's text; `cut` says that it ended at `max_tokens` (finish_reason "length")."""

    cut: bool = False


class EndpointError(UserError):
    """A request that failed for good; `status` is the HTTP status, None if no answer came.

    It is 200 for an answer that is no chat completion.
    """

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def of_request(self) -> bool:
        """True: the endpoint works and refuses this one prompt; others may fare better."""
        return self.status in (400, 413, 422)


class _Passing(Exception):
    """A failure that another try may mend: the error to end with, and seconds to wait if asked to."""

    def __init__(self, error: EndpointError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where requests go and how long to try.

    `url` is the base address, as in `http://localhost:8000/v1`; `timeout` in seconds, of each try
    as a whole; a request is tried `1 + max_retries` times, `backoff * 2**k` seconds (with jitter)
    after try k, or as long as the server asks for; `concurrency` requests are under way at a time.
    Raises UserError for values that cannot work.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 60.0
    max_retries: int = 3
    concurrency: int = 8
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not all("!" <= character <= "~" for character in self.url):
            raise UserError(
                "the LLM endpoint's address holds blanks, control characters or letters beyond "
                "ASCII; write it percent-encoded, as in http://localhost:8000/v1"
            )
        try:
            parts = urlsplit(self.url)
        except ValueError as error:
            raise UserError(
                f"the LLM endpoint's address cannot be read ({error}); "
                "write one such as http://localhost:8000/v1"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"the LLM endpoint '{self.shown}' is no http address; "
                "write one such as http://localhost:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(
                f"the LLM endpoint {self.shown} is given with a user name or password in its "
                "address; put a key into PERL_LLM_API_KEY instead"
            )
        if not self.model:
            raise UserError(
                f"no model is named for the LLM endpoint {self.shown}; set PERL_LLM_MODEL"
            )
        if self.timeout <= 0 or self.max_retries < 0 or self.concurrency < 1 or self.backoff < 0:
            raise UserError(
                f"LLM endpoint {self.shown}: timeout must be above 0, concurrency 1 or more, "
                "max_retries and backoff 0 or more"
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(
                f"the API key for {self.shown} holds characters that no HTTP header can carry; "
                "copy it again"
            )

    @classmethod
    def from_env(cls) -> Endpoint:
        """From PERL_LLM_URL, PERL_LLM_MODEL and, where one is needed, PERL_LLM_API_KEY.

        Without PERL_LLM_URL, OPENAI_BASE_URL and its OPENAI_API_KEY serve; that key is sent
        nowhere else. Raises UserError if there is no address or no model.
        """
        url, key = os.environ.get("PERL_LLM_URL"), os.environ.get("PERL_LLM_API_KEY")
        if not url:
            url = os.environ.get("OPENAI_BASE_URL")
            key = key or os.environ.get("OPENAI_API_KEY")
        if not url:
            raise UserError(
                "no LLM endpoint is set; set PERL_LLM_URL, as in http://localhost:8000/v1, and "
                "PERL_LLM_MODEL (and PERL_LLM_API_KEY where one is needed)"
            )
        model = os.environ.get("PERL_LLM_MODEL", "")
        return cls(url.strip(), model, (key or "").strip() or None)

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r}, {self.model!r})"

    @property
    def shown(self) -> str:
        """The address as messages show it: without a password or query."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def complete(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 512, temperature: float = 0.0
    ) -> list[Completion]:
        """One completion for each prompt, in their order; raises the first EndpointError."""
        answers = self.complete_each(prompts, max_tokens=max_tokens, temperature=temperature)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, Completion)]

    def complete_each(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 512, temperature: float = 0.0
    ) -> list[Completion | Exception]:
        """For each prompt its completion, or the EndpointError that its request ended in.

        Once the endpoint cannot be reached or refuses the key or the model, the prompts that have
        not been sent share that error. An interrupt (Ctrl-C) waits for no request under way.
        """
        refused: list[EndpointError] = []
        todo, over = deque(enumerate(prompts)), threading.Event()
        answers: dict[int, Completion | Exception] = {}
        broken: list[BaseException] = []

        def ask(prompt: Prompt) -> Completion | Exception:
            if refused:
                return refused[0]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            body = {
                "model": self.model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
            try:
                return self._ask(json.dumps(body).encode(), over)
            except EndpointError as error:
                if error.status in (None, 401, 403, 404):
                    refused.append(error)
                return error

        def work() -> None:
            while True:
                try:
                    i, prompt = todo.popleft()
                except IndexError:  # There are no more.
                    return
                try:
                    answers[i] = ask(prompt)
                except BaseException as error:
                    todo.clear()
                    broken.append(error)

        # Daemon threads: neither an interrupt nor the end of Python waits for them.
        workers = min(self.concurrency, len(todo))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            todo.clear()
            over.set()
        if broken:
            raise broken[0]
        return [answers[i] for i in range(len(prompts))]

    def _ask(self, body: bytes, over: threading.Event) -> Completion:
        """The completion, after as many tries as it takes; none is begun once it is `over`."""
        for failures in range(self.max_retries + 1):
            try:
                return self._try_in_time(body)
            except _Passing as problem:
                if failures == self.max_retries:
                    raise problem.error from None
                wait = problem.wait
                if wait is None:
                    wait = self.backoff * 2**failures * random.uniform(0.5, 1.0)
                if over.wait(min(wait, _LONGEST_WAIT)):
                    raise problem.error from None
        raise AssertionError("the last failure is raised")

    def _try_in_time(self, body: bytes) -> Completion:
        """One try in a thread: a socket's timeout starts again with each byte, this one does not."""
        future: Future[Completion] = Future()
        deadline = time.monotonic() + self.timeout

        def work() -> None:
            try:
                future.set_result(self._try(body, deadline))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return future.result(self.timeout)
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> _Passing:
        late = f"the LLM endpoint {self.shown} gave no answer within {self.timeout:g} s"
        return _Passing(EndpointError(f"{late}; check its load, or ask it for less at a time", 408))

    def _try(self, body: bytes, deadline: float) -> Completion:
        content = bytearray()
        try:
            with urllib.request.urlopen(self._request(body), timeout=self.timeout) as response:
                while piece := response.read1(65536):
                    content += piece
                    if time.monotonic() > deadline:
                        raise TimeoutError
            return _completion_of(json.loads(content))
        except urllib.error.HTTPError as error:
            with error:
                said = self._without_key(_message_of(error))
            refusal = EndpointError(
                f"the LLM endpoint {self.shown} answered {error.code}: {said}; "
                + _advice(error.code, self.model),
                error.code,
            )
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _Passing(refusal, _seconds_asked_for(error)) from None
            raise refusal from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors.
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise self._late() from None
            said = self._without_key(f"{type(cause).__name__}: {cause}")
            raise _Passing(
                EndpointError(
                    f"the LLM endpoint {self.shown} cannot be reached ({said}); "
                    "start it, or correct PERL_LLM_URL",
                    None,
                )
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = self._without_key(_said(content.decode("utf-8", "replace")))
            raise _Passing(
                EndpointError(
                    f"the LLM endpoint {self.shown} answered with something that is no chat "
                    f"completion ({said[:100]}); the address must be that of an OpenAI-compatible "
                    "API, mostly ending in /v1",
                    200,
                )
            ) from None

    def _request(self, body: bytes) -> urllib.request.Request:
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        url = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        if self.api_key:
            # Unredirected: another host that an answer points to is not given the key.
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        return request

    def _without_key(self, text: str) -> str:
        """A text of the server's, without the key and without what the address's query holds."""
        query = urlsplit(self.url).query
        values = [value for _, value in parse_qsl(query)]
        values += [part.partition("=")[2] for part in query.split("&")]
        secrets = [value for value in values if len(value) >= _SHORTEST_SECRET]
        secrets += [query, unquote(query), self.api_key or ""]
        text = " ".join(text.split())
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, "[key]")
        return text[:300]


def _completion_of(answer: Any) -> Completion:
    choice = answer["choices"][0]
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError
    completion = Completion(text)
    completion.cut = choice.get("finish_reason") == "length"
    return completion


def _message_of(error: urllib.error.HTTPError) -> str:
    """What the body of a refusal says: the protocol's `error.message`, or its beginning."""
    try:
        body = error.read(10_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    return _said(body) or str(error.reason)


def _said(body: str) -> str:
    try:
        said = json.loads(body)
        said = said.get("error", said)
        return str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError, RecursionError):
        return body.strip()


def _seconds_asked_for(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None


def _advice(status: int, model: str) -> str:
    if status in (401, 403):
        return "set PERL_LLM_API_KEY to a key that it accepts"
    if status == 404:
        return f"check PERL_LLM_URL (mostly it ends in /v1) and that it serves PERL_LLM_MODEL = {model}"
    if status == 429:
        return "wait, or use an account with a higher limit"
    if status >= 500:
        return "look into its log and start it again"
    return "it does not take this request; shorten it or choose another model"
