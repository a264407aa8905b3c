"""Reading final answers out of free text with a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence

from perl.types import IMAGE_SLOT, Example

_PROMPT = """Below are a question and a response to it. Write only the final answer that the response gives: \
the letter if the question has lettered options, else the value, the list, or one "(k) answer" for each numbered \
part. Do not solve the question and do not correct the response. Write NONE if the response gives no final answer.

Question:
{question}

Response:
{response}

Final answer:"""
_LONGEST_REPLY = 256


class LlmExtractor:
    """Asks the endpoint that `Endpoint.from_env()` finds; the replies are then judged by the benchmark's rules."""

    def __init__(self) -> None:
        from perl.llm import Endpoint

        self.endpoint = Endpoint.from_env()

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[str]:
        """One final answer for each question and completion, empty where the completion gives none."""
        if not asked:
            return []
        prompts = [
            _PROMPT.format(
                question=example.messages[-1].content.replace(IMAGE_SLOT, "").strip(), response=text
            )
            for example, text in asked
        ]
        replies = self.endpoint.complete(prompts, max_tokens=_LONGEST_REPLY, temperature=0.0)
        return ["" if r.strip().upper() == "NONE" else r.strip() for r in replies]
