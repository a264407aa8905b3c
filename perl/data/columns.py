"""Whose column names a data set uses, and what its rows mean; images stay as the data holds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perl.types import IMAGE_SLOT, Message, UserError

_TRL_ANSWERS = ("answer", "solution", "ground_truth", "target", "label")
_IMAGES = ("images", "image")
_SHOULD_CHANGE = ("should_change", "change_needed")
_OPTIONAL = (*_SHOULD_CHANGE, "kind", "demonstration", "task", "id")
_ANSWER_TAG = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
_BOXED = re.compile(r"[\s$]*\\boxed\s*\{([^{}]*)\}[\s$]*")
_NUMBERED = re.compile(r"<image[_ ]?([0-9]{1,2})>")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Row:
    """A row's fields as an Example will have them, but for the images: paths, bytes, dicts or PIL.

    `id` is None where the data has none.
    """

    question: str | tuple[Message, ...]
    images: tuple[Any, ...]
    answer: str
    kind: str
    should_change: bool
    demonstration: str | None
    task: str
    id: str | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class Convention:
    """One way of naming columns: `wants` lists the needed ones, each with its alternatives."""

    wants: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]
    task: str = "task"
    images_first: bool = False
    """Whether images without a slot in the text stand before it (TRL's rule)."""


CONVENTIONS: dict[str, Convention] = {
    "verl": Convention(
        wants=(("prompt",), ("reward_model",), _IMAGES),
        question=("prompt",),
        answer=("reward_model",),
        task="data_source",
    ),
    "perl": Convention(
        wants=(("question", "messages"), ("answer",), _IMAGES),
        question=("question", "messages"),
        answer=("answer",),
    ),
    "trl": Convention(
        wants=(("prompt",), _TRL_ANSWERS, _IMAGES),
        question=("prompt",),
        answer=_TRL_ANSWERS,
        images_first=True,
    ),
    "easyr1": Convention(
        wants=(("problem",), ("answer",), _IMAGES),
        question=("problem",),
        answer=("answer",),
    ),
}
"""By name, the most telling one first."""


def detect_convention(columns: Iterable[str], where: str) -> str:
    """The name of the first convention whose needed columns are all there; UserError if none is."""
    columns = list(columns)
    for name, convention in CONVENTIONS.items():
        if not _missing(convention, columns):
            return name
    wanted = "; ".join(f"{name}: {_wanted(c)}" for name, c in sorted(CONVENTIONS.items()))
    raise UserError(
        f"{where}: columns {', '.join(columns) or '(none)'} fit no known convention ({wanted}); "
        "rename the columns, and give questions without images an empty list of them"
    )


def check_columns(name: str, columns: Iterable[str], where: str) -> None:
    """Raise UserError if a column that the convention `name` needs is not among `columns`."""
    columns = list(columns)
    if missing := _missing(CONVENTIONS[name], columns):
        raise UserError(
            f"{where}: no column {' and no '.join(missing)}; data.columns={name} wants "
            f"{_wanted(CONVENTIONS[name])}, found {', '.join(columns) or '(none)'}"
        )


def may_move(name: str, columns: Iterable[str]) -> bool:
    """Whether data under the convention `name` says something about moving its images."""
    return name == "perl" or not {"kind", *_SHOULD_CHANGE}.isdisjoint(columns)


def read_row(row: Mapping[str, Any], name: str, where: str) -> Row:
    """What a row means under the convention `name`; raises UserError, `where` naming the row.

    Data that says neither `kind` nor `should_change` keeps its images in place unless it is in
    PeRL's own convention, since nothing tells whether its answers would still be right. A row whose
    images are empty and whose question has no slot is a question of text alone.
    """
    convention = CONVENTIONS[name]
    check_columns(name, row, where)
    present = {key: value for key, value in row.items() if value is not None}
    question_key = _first(convention.question, present, where)
    answer_key = _first(convention.answer, present, where)
    question, embedded = _question(present[question_key], where)
    images_key = next((key for key in _IMAGES if key in present), None)
    images = tuple(_as_list(present[images_key])) if images_key else ()
    images = images or embedded
    if _count_slots(question) == 0:
        question = _numbered_slots(question, len(images), where)
    if convention.images_first and _count_slots(question) == 0:
        question = _prepend_slots(question, len(images))
    _check_slots(question, len(images), where)
    change_key = next((key for key in _SHOULD_CHANGE if key in present), None)
    kind = str(present.get("kind", "all" if may_move(name, present) else "none")).strip()
    should_change = _truth(present[change_key], change_key, where) if change_key else True
    if not images:  # A question of text alone: nothing can move.
        kind, should_change = "none", False
    used = {question_key, answer_key, images_key, *_OPTIONAL}
    return Row(
        question=question,
        images=images,
        answer=_answer(present[answer_key], where),
        kind=kind,
        should_change=should_change,
        demonstration=str(present["demonstration"]) if "demonstration" in present else None,
        task=str(present.get("task", present.get(convention.task, ""))),
        id=str(present["id"]) if "id" in present else None,
        extra={key: value for key, value in row.items() if key not in used},
    )


def _missing(convention: Convention, columns: Iterable[str]) -> list[str]:
    found = set(columns)
    missing = [options for options in convention.wants if not found.intersection(options)]
    # A chat may carry its images in its own parts.
    if missing == [_IMAGES] and found.intersection(("messages", "prompt")):
        return []
    return [" or ".join(options) for options in missing]


def _wanted(convention: Convention) -> str:
    return ", ".join(" or ".join(options) for options in convention.wants)


def _first(keys: tuple[str, ...], row: Mapping[str, Any], where: str) -> str:
    for key in keys:
        if key in row:
            return key
    raise UserError(f"{where}: {' or '.join(keys)} is null; fill it in or leave the row out")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _question(value: Any, where: str) -> tuple[str | tuple[Message, ...], tuple[Any, ...]]:
    """A text or a chat, and the images that stand inside the chat's parts."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the question is empty; fill it in or leave the row out")
        return value, ()
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(
            f"{where}: the question is a {type(value).__name__}; write a text or a list of "
            "messages with role and content"
        )
    images: list[Any] = []
    messages = tuple(_message(turn, images, where) for turn in value)
    return messages, tuple(images)


def _message(turn: Any, images: list[Any], where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise UserError(f"{where}: a chat message must have role and content, got {_short(turn)}")
    content = turn.get("content")
    if isinstance(content, str):
        return Message(turn["role"], content)
    if not isinstance(content, (list, tuple)):
        raise UserError(
            f"{where}: the content of a chat message must be a text or a list of parts, "
            f"got {_short(content)}"
        )
    return Message(turn["role"], "".join(_part(part, images, where) for part in content))


def _part(part: Any, images: list[Any], where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        if part.get("image") is not None:
            images.append(part["image"])
        return IMAGE_SLOT
    raise UserError(f"{where}: a part of a message must be a text or an image, got {_short(part)}")


def _texts(question: str | tuple[Message, ...]) -> list[str]:
    return [question] if isinstance(question, str) else [message.content for message in question]


def _count_slots(question: str | tuple[Message, ...]) -> int:
    return sum(text.count(IMAGE_SLOT) for text in _texts(question))


def _numbered_slots(
    question: str | tuple[Message, ...], count: int, where: str
) -> str | tuple[Message, ...]:
    """`<image_1> ... <image_2>` as slots where the text has no others; what is named again stays a mention."""
    seen: list[int] = []

    def replaced(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in seen:
            return match[0]
        seen.append(number)
        return IMAGE_SLOT

    texts = [_NUMBERED.sub(replaced, text) for text in _texts(question)]
    if not seen or set(seen) != set(range(1, count + 1)):
        return question  # They are mentions of images that stand elsewhere.
    if seen != sorted(seen):
        raise UserError(
            f"{where}: <image_{seen[0]}> comes first in the text; number the images in the sequence in which "
            f"they stand there, or write {IMAGE_SLOT} for each"
        )
    if isinstance(question, str):
        return texts[0]
    return tuple(Message(m.role, text) for m, text in zip(question, texts, strict=True))


def _prepend_slots(question: str | tuple[Message, ...], count: int) -> str | tuple[Message, ...]:
    slots = IMAGE_SLOT * count
    if isinstance(question, str):
        return slots + question
    at = next((i for i, message in enumerate(question) if message.role == "user"), 0)
    asked = Message(question[at].role, slots + question[at].content)
    return (*question[:at], asked, *question[at + 1 :])


def _check_slots(question: str | tuple[Message, ...], images: int, where: str) -> None:
    slots = _count_slots(question)
    if slots != images:
        raise UserError(
            f"{where}: {images} images but {slots} {IMAGE_SLOT} slots in the question; "
            "write one slot for each image"
        )


def _answer(value: Any, where: str) -> str:
    if isinstance(value, Mapping):  # verl's reward_model
        value = value.get("ground_truth")
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # A column of whole numbers with gaps is read as floats.
    text = "" if value is None else str(value).strip()
    for wrapped in (_ANSWER_TAG, _BOXED):
        if match := wrapped.fullmatch(text):
            text = match[1].strip()
    if not text:
        raise UserError(f"{where}: the answer is empty; fill it in or leave the row out")
    return text


def _truth(value: Any, key: str, where: str) -> bool:
    truth = _TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise UserError(f"{where}: {key} is {_short(value)}; write true or false")
    return truth


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= limit else text[: limit - 3] + "..."
