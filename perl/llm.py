"""A client for any OpenAI-compatible chat endpoint: vLLM, llama.cpp, Ollama, OpenAI and others."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from perl.failures import install_command
from perl.types import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages as the protocol has them. An image is a part of a message's content:
`{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`."""

_FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
_SHORTEST_SECRET = 6
"""Characters of a query's value from which on it is blotted out wherever it turns up."""


class Completion(str):
    """A completion's text; `cut` says that it ended at `max_tokens` (finish_reason "length")."""

    cut: bool = False


class EndpointError(UserError):
    """A request that failed for good; `status` is the HTTP status, None if no answer came.

    It is 200 for an answer that is no chat completion. `wait` is the number of seconds that the server asks for
    before another try.
    """

    def __init__(self, message: str, status: int | None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait

    @property
    def of_request(self) -> bool:
        """True: the endpoint works and refuses this one prompt; others may fare better."""
        return self.status in (400, 413, 422)

    @property
    def of_endpoint(self) -> bool:
        """True: it cannot be reached, or refuses the key or the model; no other prompt fares better."""
        return self.status in (None, 401, 403, 404)

    @property
    def passing(self) -> bool:
        """True: another try may succeed."""
        return self.status in (None, 200, 408, 409, 429) or self.status >= 500


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where requests go and how long to try.

    `url` is the base address, as in `http://localhost:8000/v1`; `timeout` in seconds, of each try
    as a whole; a request is tried `1 + max_retries` times, 1, 2, 4, ... seconds (with jitter) after
    one another, or as long as the server asks for; `concurrency` requests are under way at a time.
    Raises UserError for values that cannot work.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 60.0
    max_retries: int = 3
    concurrency: int = 8

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
        if self.timeout <= 0 or self.max_retries < 0 or self.concurrency < 1:
            raise UserError(
                f"LLM endpoint {self.shown}: timeout must be above 0, concurrency 1 or more, "
                "max_retries 0 or more"
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
        if importlib.util.find_spec("openai") is None:  # Now, not at the first request of a run.
            raise UserError(f"an LLM endpoint needs openai; {install_command('train')}")
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
            if isinstance(answer, EndpointError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Completion)]

    def complete_each(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 512, temperature: float = 0.0
    ) -> list[Completion | EndpointError]:
        """`ask` for code that is not async. An interrupt (Ctrl-C) waits for no request under way."""
        return asyncio.run(self.ask(prompts, max_tokens=max_tokens, temperature=temperature))

    async def ask(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 512, temperature: float = 0.0
    ) -> list[Completion | EndpointError]:
        """For each prompt its completion, or the EndpointError that its request ended in.

        Once the endpoint cannot be reached or refuses the key or the model, the prompts that have
        not been sent share that error.
        """
        refused: list[EndpointError] = []
        free = asyncio.Semaphore(self.concurrency)

        async def ask_in_turn(client: AsyncOpenAI, prompt: Prompt) -> Completion | EndpointError:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            async with free:
                if refused:
                    return refused[0]
                try:
                    return await self._ask(client, list(messages), max_tokens, temperature)
                except EndpointError as error:
                    if error.of_endpoint:
                        refused.append(error)
                    return error

        async with self._client() as client:
            return await asyncio.gather(*(ask_in_turn(client, prompt) for prompt in prompts))

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return AsyncOpenAI(
            base_url=urlunsplit((parts.scheme, parts.netloc, path, "", "")),
            api_key=self.api_key or "none",
            default_query=dict(parse_qsl(parts.query, keep_blank_values=True)),
            timeout=self.timeout,
            # Its own retries limit each wait for a byte but not a try as a whole, and take any answer of status 200.
            max_retries=0,
        )

    def _headers(self) -> dict[str, Any]:
        """No endpoint but OpenAI's is told what the environment holds for OpenAI: key, organization and project."""
        from openai import Omit

        headers = {
            name: Omit() for name in ("Authorization", "OpenAI-Organization", "OpenAI-Project")
        }
        return headers | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})

    async def _ask(
        self, client: AsyncOpenAI, messages: list[Any], max_tokens: int, temperature: float
    ) -> Completion:
        """The completion, after as many tries as it takes."""
        failures = 0
        while True:
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await client.chat.completions.with_raw_response.create(
                        model=self.model,
                        messages=messages,
                        max_tokens=max_tokens,
                        temperature=temperature,
                        extra_headers=self._headers(),
                    )
                return self._read(answer.http_response.text)
            except Exception as problem:
                error = self._explain(problem)
            if not error.passing or failures == self.max_retries:
                raise error
            wait = error.wait
            if wait is None:
                wait = _FIRST_WAIT * 2**failures * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(wait, _LONGEST_WAIT))
            failures += 1

    def _read(self, content: str) -> Completion:
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(
                f"the LLM endpoint {self.shown} answered with something that is no chat "
                f"completion ({self._without_key(_said(content))[:100]}); the address must be that "
                "of an OpenAI-compatible API, mostly ending in /v1",
                200,
            ) from None
        completion = Completion(text)
        completion.cut = choice.get("finish_reason") == "length"
        return completion

    def _explain(self, problem: Exception) -> EndpointError:
        """What went wrong with a request, and what to do; raises anew what is no matter of the endpoint's."""
        import openai

        if isinstance(problem, EndpointError):
            return problem
        if isinstance(problem, TimeoutError | openai.APITimeoutError):
            late = f"the LLM endpoint {self.shown} gave no answer within {self.timeout:g} s"
            return EndpointError(f"{late}; check its load, or ask it for less at a time", 408)
        if isinstance(problem, openai.APIStatusError):
            status, response = problem.status_code, problem.response
            said = self._without_key(_said(response.text) or response.reason_phrase)
            try:
                wait = max(0.0, float(response.headers.get("Retry-After", "")))
            except ValueError:
                wait = None
            return EndpointError(
                f"the LLM endpoint {self.shown} answered {status}: {said}; "
                + _advice(status, self.model),
                status,
                wait,
            )
        if isinstance(problem, openai.APIConnectionError):
            cause = problem.__cause__ or problem
            said = self._without_key(f"{type(cause).__name__}: {cause}")
            return EndpointError(
                f"the LLM endpoint {self.shown} cannot be reached ({said}); "
                "start it, or correct PERL_LLM_URL",
                None,
            )
        raise problem

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


def _said(body: str) -> str:
    try:
        said = json.loads(body)
        said = said.get("error", said)
        return str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError, RecursionError):
        return body.strip()


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
