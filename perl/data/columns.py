"""Whose column names a data set uses, and what its rows mean; images stay as the data holds them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perl.types import IMAGE_SLOT, Example, Message, UserError, one_line

log = logging.getLogger(__name__)

IMAGES = ("images", "image")
SHOULD_CHANGE = ("should_change", "change_needed")
_TRL_ANSWERS = ("answer", "solution", "ground_truth", "target", "label")
_OPTIONAL = (*SHOULD_CHANGE, "kind", "demonstration", "task", "id")
_ANSWER_TAG = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
_BOXED = re.compile(r"[\s$]*\\boxed\s*\{([^{}]*)\}[\s$]*")
_NUMBERED = re.compile(r"<image[_ ]?([0-9]{1,2})>")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Convention:
    """One way of naming columns: those that question and answer may stand in."""

    name: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    task: str = "task"
    images_first: bool = False
    """Whether images without a slot in the text stand before it (TRL's rule)."""

    def missing(self, columns: Iterable[str]) -> list[str]:
        """The columns that are needed and not there."""
        needed, found = (self.question, self.answer, IMAGES), set(columns)
        missing = [" or ".join(names) for names in needed if found.isdisjoint(names)]
        # A chat may carry its images in its own parts.
        in_chat = missing == [" or ".join(IMAGES)] and not found.isdisjoint(("messages", "prompt"))
        return [] if in_chat else missing

    def __str__(self) -> str:
        return ", ".join(self.missing(()))


CONVENTIONS = (
    Convention("verl", ("prompt",), ("reward_model",), task="data_source"),
    Convention("perl", ("question", "messages"), ("answer",)),
    Convention("trl", ("prompt",), _TRL_ANSWERS, images_first=True),
    Convention("easyr1", ("problem",), ("answer",)),
)
"""The most telling one first."""


def choose_convention(name: str, columns: Collection[str], where: str) -> Convention:
    """The convention called `name`; for `auto` the first whose needed columns are all there.

    Raises:
        UserError: a needed column is missing, or no convention fits.
    """
    if name != "auto":
        chosen = next(convention for convention in CONVENTIONS if convention.name == name)
        _check_columns(chosen, columns, where)
        return chosen
    for convention in CONVENTIONS:
        if not convention.missing(columns):
            log.info("%s: columns are named as by %s", where, convention.name)
            return convention
    known = "; ".join(sorted(f"{convention.name}: {convention}" for convention in CONVENTIONS))
    raise UserError(
        f"{where}: columns {', '.join(columns) or '(none)'} fit no known convention ({known}); "
        "rename the columns, and give questions without images an empty list of them"
    )


def _check_columns(convention: Convention, columns: Iterable[str], where: str) -> None:
    if missing := convention.missing(columns):
        raise UserError(
            f"{where}: no column {' and no '.join(missing)}; data.columns={convention.name} wants "
            f"{convention}, found {', '.join(columns) or '(none)'}"
        )


def may_move(convention: Convention, columns: Iterable[str]) -> bool:
    """Whether data under a convention says something about moving its images."""
    return convention.name == "perl" or not {"kind", *SHOULD_CHANGE}.isdisjoint(columns)


def read_row(row: Mapping[str, Any], convention: Convention, where: str, id: str = "") -> Example:
    """What a row means under a convention, its images as the data holds them: paths, bytes, dicts or PIL.

    Data that says neither `kind` nor `should_change` keeps its images in place unless it is in
    PeRL's own convention, since nothing tells whether its answers would still be right. A row whose
    images are empty and whose question has no slot is a question of text alone. `id` is for a row
    that has none. Raises UserError, naming `where`, for one that is incomplete or contradicts itself.
    """
    _check_columns(convention, row, where)
    if row.get("worked") is not None and "demonstration" not in row:
        raise UserError(
            f"{where}: the column worked is now called demonstration; rename it in the data"
        )
    present = {key: value for key, value in row.items() if value is not None}
    question_key = _first(convention.question, present, where)
    answer_key = _first(convention.answer, present, where)
    messages, embedded = _messages(present[question_key], where)
    images_key = next((key for key in IMAGES if key in present), None)
    images = present[images_key] if images_key else ()
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    images = images or embedded
    messages = _with_slots(messages, len(images), convention.images_first, where)
    change_key = next((key for key in SHOULD_CHANGE if key in present), None)
    kind = str(present.get("kind", "all" if may_move(convention, present) else "none")).strip()
    should_change = _truth(present[change_key], change_key, where) if change_key else True
    if not images:  # A question of text alone: nothing can move.
        kind, should_change = "none", False
    used = {question_key, answer_key, images_key, *_OPTIONAL}
    return Example(
        id=str(present.get("id", id)),
        images=images,
        question=messages[0].content if isinstance(present[question_key], str) else messages,
        answer=_answer(present[answer_key], where),
        kind=kind,
        should_change=should_change,
        demonstration=str(present["demonstration"]) if "demonstration" in present else None,
        task=str(present.get("task", present.get(convention.task, ""))),
        extra={key: value for key, value in row.items() if key not in used},
    )


def labels_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says itself of `kind` and `should_change`."""
    change = next((row[key] for key in SHOULD_CHANGE if row.get(key) is not None), None)
    labels: dict[str, Any] = {"kind": str(row["kind"])} if row.get("kind") is not None else {}
    truth = _TRUTH.get(str(change).strip().lower())
    return labels if truth is None else {**labels, "should_change": truth}


def _first(keys: tuple[str, ...], row: Mapping[str, Any], where: str) -> str:
    for key in keys:
        if key in row:
            return key
    raise UserError(f"{where}: {' or '.join(keys)} is null; fill it in or leave the row out")


def _messages(value: Any, where: str) -> tuple[Messages, tuple[Any, ...]]:
    """A text or a chat as messages, and the images that stand inside the chat's parts."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the question is empty; fill it in or leave the row out")
        return (Message("user", value),), ()
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(
            f"{where}: the question is a {type(value).__name__}; write a text or a list of "
            "messages with role and content"
        )
    images: list[Any] = []
    return tuple(_message(turn, images, where) for turn in value), tuple(images)


def _message(turn: Any, images: list[Any], where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise UserError(
            f"{where}: a chat message must have role and content, got {one_line(turn, 80)}"
        )
    content = turn.get("content")
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, (list, tuple)):
        raise UserError(
            f"{where}: the content of a chat message must be a text or a list of parts, "
            f"got {one_line(content, 80)}"
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
    raise UserError(
        f"{where}: a part of a message must be a text or an image, got {one_line(part, 80)}"
    )


def _with_slots(messages: Messages, images: int, images_first: bool, where: str) -> Messages:
    """The messages with one slot for each image."""
    if _count_slots(messages) == 0:
        messages = _numbered_slots(messages, images, where)
    if images_first and _count_slots(messages) == 0:
        at = next((i for i, message in enumerate(messages) if message.role == "user"), 0)
        asked = Message(messages[at].role, IMAGE_SLOT * images + messages[at].content)
        messages = (*messages[:at], asked, *messages[at + 1 :])
    if (slots := _count_slots(messages)) != images:
        raise UserError(
            f"{where}: {images} images but {slots} {IMAGE_SLOT} slots in the question; "
            "write one slot for each image"
        )
    return messages


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

    numbered = tuple(Message(m.role, _NUMBERED.sub(replaced, m.content)) for m in messages)
    if not seen or set(seen) != set(range(1, count + 1)):
        return messages  # They are mentions of images that stand elsewhere.
    if seen != sorted(seen):
        raise UserError(
            f"{where}: <image_{seen[0]}> comes first in the text; number the images in the sequence in which "
            f"they stand there, or write {IMAGE_SLOT} for each"
        )
    return numbered


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
        raise UserError(f"{where}: {key} is '{one_line(value, 80)}'; write true or false")
    return truth
