"""No endpoint but the one in a thread, which answers as a test says."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chat_server import Reply, says, serving

Answer = Callable[[str], Any]


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERL_LLM_URL", "PERL_LLM_MODEL", "PERL_LLM_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Answer], list[str]]]:
    """An endpoint whose `answer` a test sets, and the last messages that it was sent."""
    asked: list[str] = []
    behaviour: dict[str, Answer] = {}

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        asked.append(body["messages"][-1]["content"])
        answer = behaviour["answer"](body["messages"][0]["content"])
        return answer if isinstance(answer, tuple) else says(answer)

    with serving(reply) as url:
        monkeypatch.setenv("PERL_LLM_URL", url)
        monkeypatch.setenv("PERL_LLM_MODEL", "m")
        monkeypatch.setattr("perl.llm._LONGEST_WAIT", 0.01)
        yield behaviour, asked
