"""A question as data hold it, a text or a chat, as messages with one slot for each image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from perl.data.questions.literals import read_literal
from perl.types import IMAGE_SLOT, Message, UserError, one_line

Messages = tuple[Message, ...]

_STORED = re.compile(
    r"""\s*"?(?:array\(\s*)?\[?\s*\{\s*\\?['"](?:role|content|from|value|human|assistant|ground_truth|style)\\?['"]\s*:"""
)
_NUMBERED = re.compile(r"<image[_ ]?([0-9]{1,2})>")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""ShareGPT's and others', in whatever case, as the roles of chat templates."""


class Chat(NamedTuple):
    """What is asked, the images that stand inside its parts, and the response that the data give."""

    messages: Messages
    images: tuple[Any, ...] = ()
    response: str | None = None


def stored(value: Any, column: str, where: str) -> Any:
    """A chat, or verl's `reward_model`, that a column holds as JSON or as pandas writes it; any other value as it is.

    Raises:
        UserError: it begins as one of these does and cannot be read.
    """
    while isinstance(value, str) and _STORED.match(value):
        try:
            value = read_literal(value)
        except ValueError as error:
            raise UserError(
                f"{where}: the column {column} begins as a chat in JSON does and is none ({error}); correct it"
            ) from error
    return value


def read_chat(value: Any, where: str) -> Chat:
    """A text; or turns of `role` and `content`, of `from` and `value`, or of `human` and `assistant`.

    Last turns of the assistant are the response and none of the messages.
    """
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the question is empty; fill it in or leave the row out")
        return Chat((Message("user", value),))
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(
            f"{where}: the question is a {type(value).__name__}; write a text or a list of "
            "messages with role and content"
        )
    images: list[Any] = []
    messages = tuple(
        Message(role, _content(content, images, where))
        for turn in value
        for role, content in _turns(turn, where)
    )
    end = len(messages)
    while end and messages[end - 1].role == "assistant":
        end -= 1
    response = "\n".join(message.content for message in messages[end:]) or None
    messages = messages[:end]
    if not messages or messages[-1].role != "user":
        last = f", the last is from '{one_line(messages[-1].role, 40)}'" if messages else ""
        raise UserError(
            f"{where}: the chat has no turn of the user to answer{last}; end it with role user or assistant, or leave the row out"
        )
    if response and IMAGE_SLOT in response:
        raise UserError(f"{where}: the last turn, the assistant's, shows an image; leave it out")
    return Chat(messages, tuple(images), response)


def with_turns(chat: Chat, row: Mapping[str, Any], where: str) -> Chat:
    """The chat with what the columns `input`, `history` and `system` hold of it."""
    messages = list(chat.messages)
    if row.get("input"):
        messages[-1] = Message("user", f"{messages[-1].content}\n{row['input']}")
    for exchange in reversed(row.get("history") or ()):
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise UserError(
                f"{where}: history holds {one_line(exchange, 80)}; write pairs of question and response"
            )
        asked, said = map(str, exchange)
        messages[:0] = [Message("user", asked), Message("assistant", said)]
    if row.get("system") and messages[0].role != "system":
        messages.insert(0, Message("system", str(row["system"])))
    return chat._replace(messages=tuple(messages))


def read_response(value: Any, where: str) -> str | None:
    """A completion, as a text or as a chat of the assistant's turn alone (TRL)."""
    if isinstance(value, str):
        return value.strip()
    return read_chat([{"role": "user", "content": ""}, *value], where).response


def with_slots(messages: Messages, images: int, images_first: bool, where: str) -> Messages:
    """The messages with one slot for each image; a single image without one stands first."""
    if _count_slots(messages) == 0:
        messages = _numbered_slots(messages, images, where)
    if _count_slots(messages) == 0 and (images_first or images == 1):
        at = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
        asked = replace(messages[at], content=IMAGE_SLOT * images + messages[at].content)
        messages = (*messages[:at], asked, *messages[at + 1 :])
    if (slots := _count_slots(messages)) != images:
        raise UserError(
            f"{where}: {images} image{'s' * (images != 1)} but {slots} {IMAGE_SLOT} slot{'s' * (slots != 1)} in the question; "
            "write one slot for each image"
        )
    return messages


def _turns(turn: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The role and the content of a turn, or of the two that an exchange is."""
    if isinstance(turn, Mapping):
        if isinstance(turn.get("role"), str):
            role: str = turn["role"].strip()
            yield _SPEAKERS.get(role.lower(), role), turn.get("content")
            return
        if isinstance(turn.get("from"), str):
            speaker = turn["from"].strip().lower()
            if speaker not in _SPEAKERS:
                raise UserError(
                    f"{where}: a turn is from '{one_line(turn['from'], 40)}'; known are {', '.join(_SPEAKERS)}"
                )
            yield _SPEAKERS[speaker], turn.get("value")
            return
        if isinstance(turn.get("human"), str):
            yield "user", turn["human"]
            if turn.get("assistant") is not None:
                yield "assistant", turn["assistant"]
            return
    raise UserError(f"{where}: a chat message must have role and content, got {one_line(turn, 80)}")


def _content(content: Any, images: list[Any], where: str) -> str:
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, (list, tuple)):
        raise UserError(
            f"{where}: the content of a chat message must be a text or a list of parts, "
            f"got {one_line(content, 80)}"
        )
    return "".join(_part(part, images, where) for part in content)


def _part(part: Any, images: list[Any], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        if (
            image := next((part[k] for k in (kind, "path", "url") if part.get(k)), None)
        ) is not None:
            images.append(image)
        return IMAGE_SLOT
    raise UserError(
        f"{where}: a part of a message must be a text or an image, got {one_line(part, 80)}"
    )


def _count_slots(messages: Messages) -> int:
    return sum(message.content.count(IMAGE_SLOT) for message in messages)


def _numbered_slots(messages: Messages, count: int, where: str) -> Messages:
    """`<image_1> ... <image_2>` as slots where the text has no others; what is named again stays a mention."""
    seen: list[int] = []

    def replaced(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in seen:
            return match[0]
        seen.append(number)
        return IMAGE_SLOT

    numbered = tuple(replace(m, content=_NUMBERED.sub(replaced, m.content)) for m in messages)
    if not seen or set(seen) != set(range(1, count + 1)):
        return messages  # They are mentions of images that stand elsewhere.
    if seen != sorted(seen):
        raise UserError(
            f"{where}: <image_{seen[0]}> comes first in the text; number the images in the sequence in which "
            f"they stand there, or write {IMAGE_SLOT} for each"
        )
    return numbered
