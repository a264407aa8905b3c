"""Whose column names a data set uses, and what its rows mean; images stay as the data holds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from perl.config import DataConfig
from perl.data.questions.chats import read_chat, read_response, stored, with_slots, with_turns
from perl.data.questions.golds import check_response, first_index, gold_by_options, gold_by_text
from perl.data.questions.options import OPTIONS, Options, listed, read_options
from perl.data.readers import Source
from perl.data.videos import VIDEOS, Frame, with_frames
from perl.permutation import answer_form
from perl.rewards.reading import GOLD_COLUMNS, gold_text
from perl.types import Example, UserError, one_line

log = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()

IMAGES = ("images", "image")
SHOULD_CHANGE = ("should_change", "change_needed")
_CHATS = ("messages", "conversations", "conversation")
_OPTIONAL = (*SHOULD_CHANGE, "kind", "demonstration", "task", "id")
_GROUNDING = ("<ref-object>", "<bbox>")
_OURS = ("question", "messages", "answer", *IMAGES, *VIDEOS, *OPTIONS, *_OPTIONAL)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Convention:
    """One way of naming columns: those that question, answer and a whole response may stand in."""

    name: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    response: tuple[str, ...] = ()
    """A completion that the data give: the answer is read off it where no column holds one."""
    task: str = "task"
    images_first: bool = True
    """Whether images without a slot in the text stand before it."""
    turns: tuple[str, ...] = ()
    """Columns that hold more of the chat."""
    instead: tuple[str, ...] = ()
    """Those of the question in rows without the former, beside others that have them."""

    def missing(self, columns: Iterable[str], gold: bool = False) -> list[str]:
        """The columns that are needed and not there; with `gold` an answer is needed too."""
        needed, found = [self.question, IMAGES], set(columns)
        if gold and found.isdisjoint({*self.question} & {*_CHATS}):
            needed.insert(1, (*self.answer, *self.response))
        missing = [" or ".join(names) for names in needed if found.isdisjoint(names)]
        # A chat may carry its images in its own parts.
        elsewhere = not found.isdisjoint((*VIDEOS, "messages", "prompt"))
        return [] if missing == [" or ".join(IMAGES)] and elsewhere else missing

    def answer_key(self, row: Mapping[str, Any]) -> str:
        """The column of a row with our names that its answer stands in."""
        return next((key for key in self.answer if _is_given(row.get(key))), "answer")

    def __str__(self) -> str:
        return ", ".join(self.missing((), gold=True))


CONVENTIONS = (
    Convention("verl", ("prompt",), ("reward_model",), task="data_source", images_first=False),
    Convention("perl", ("question",), ("answer",), images_first=False, instead=("messages",)),
    Convention("trl", ("prompt",), GOLD_COLUMNS, ("completion",)),
    Convention("easyr1", ("problem",), ("answer",), images_first=False),
    Convention("open-r1", ("problem",), GOLD_COLUMNS),
    Convention(
        "ms-swift", ("messages", "query"), GOLD_COLUMNS, ("response",), turns=("system", "history")
    ),
    Convention("sharegpt", _CHATS[1:], GOLD_COLUMNS, turns=("system",)),
    Convention(
        "alpaca", ("instruction",), GOLD_COLUMNS, ("output",), turns=("system", "history", "input")
    ),
)
"""The most telling one first."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a data set are read."""

    convention: Convention
    names: Mapping[str, str] = field(default_factory=dict)
    """What columns of ours are called in the data."""
    frames: int = 0
    """Frames that a video is shown as; 0: a row with one is refused."""
    first_index: int | None = None
    """What the first of a row's options has where answers are indices; None: not known."""

    @property
    def images(self) -> str:
        """The column that images are written to."""
        return next((self.names[key] for key in IMAGES if key in self.names), IMAGES[0])

    def ours(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with our names for its columns."""
        if not self.names:
            return row
        theirs = set(self.names.values())
        rest = {key: value for key, value in row.items() if key not in theirs}
        return {**rest, **{ours: row.get(key) for ours, key in self.names.items()}}

    def theirs(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with our names under the data's again."""
        return {self.names.get(key, key): value for key, value in row.items()}

    def with_chats(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """A row with our names, its chats and its `reward_model` read where they are stored as texts."""
        keys = (self.question(row, where), *self.convention.response, "reward_model")
        read = {key: stored(row.get(key), self.names.get(key, key), where) for key in keys}
        changed = {key: value for key, value in read.items() if value is not row.get(key)}
        return {**row, **changed} if changed else row

    def with_frames(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """A row with our names, its videos as images."""
        return with_frames(row, self.question(row, where), self.frames, where)

    def question(self, row: Mapping[str, Any], where: str) -> str:
        """The column of a row with our names that its question stands in; UserError if all are null."""
        keys = (*self.convention.question, *self.convention.instead)
        for key in keys:
            if _is_given(row.get(key)):
                return key
        names = " or ".join(keys)
        raise UserError(f"{where}: {names} is missing or null; fill it in or leave the row out")


def choose_layout(config: DataConfig, columns: Iterable[str], where: str) -> Layout:
    """The layout of a data set with such columns: those of `config.map` renamed, then the convention
    `config.columns`; for `auto` the first whose needed columns are all there, an answer among them if possible.

    Raises:
        UserError: a needed column is missing, or no convention fits.
    """
    theirs = dict.fromkeys(columns)
    names = _read_map(config.map, theirs, where)
    columns = list(Layout(CONVENTIONS[0], names).ours(theirs))
    if config.columns != "auto":
        chosen = next(c for c in CONVENTIONS if c.name == config.columns)
        if missing := chosen.missing(columns):
            raise UserError(
                f"{where}: no column {' and no '.join(missing)}; data.columns={chosen.name} wants "
                f"{chosen}, found {', '.join(columns) or '(none)'}"
            )
        return Layout(chosen, names, config.frames)
    for gold in (True, False):
        for convention in CONVENTIONS:
            # Without its answer, a convention that differs by it alone says nothing.
            telling = gold or convention.name not in ("verl", "easyr1")
            if telling and not convention.missing(columns, gold):
                text = f"{where}: columns are named as by {convention.name}"
                tell_once(logging.INFO, text, text)
                return Layout(convention, names, config.frames)
    questions = ", ".join(sorted({name for each in CONVENTIONS for name in each.question}))
    raise UserError(
        f"{where}: columns {', '.join(columns) or '(none)'} fit no known layout, which has a question ({questions}), "
        f'{" or ".join(IMAGES)}, and mostly an answer; name yours with data.map, as in "question=THEIRS", and give '
        "questions without images an empty list of them"
    )


def with_first_index(layout: Layout, source: Source) -> Layout:
    """The layout with what the first option of a row counts as, as far as the first rows of the data tell."""
    if layout.ours(dict.fromkeys(source.columns())).keys().isdisjoint((*OPTIONS, "A")):
        return layout

    def golds() -> Iterator[tuple[Options, Any]]:
        for row in map(layout.ours, source.first_rows()):
            with suppress(UserError):
                if options := read_options(row, ""):
                    yield options, row.get(layout.convention.answer_key(row))

    return replace(layout, first_index=first_index(golds()))


def tell_once(level: int, text: str, of: object) -> None:
    """Log a text that each stage of a run would log again; `of` says what it is about, by whatever name of its files: a
    run names them from the root."""
    here = os.path.join(os.getcwd(), "")
    about = (here, str(of).replace(here, ""))
    if about not in _told:
        _told.add(about)
        log.log(level, "%s", text)


def _read_map(entries: Iterable[str], row: Mapping[str, Any], where: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for entry in entries:
        ours, _, theirs = (part.strip() for part in entry.partition("="))
        if ours not in _OURS or not theirs or ours in names:
            raise UserError(
                f'data.map has "{one_line(entry, 80)}"; write our name once, = and the name in the data, where ours '
                f"is one of {', '.join(_OURS)}"
            )
        if theirs not in row:
            raise UserError(
                f'{where}: data.map has "{ours}={theirs}" but there is no column {theirs}; there are {", ".join(row)}'
            )
        names[ours] = theirs
    return names


def read_row(row: Mapping[str, Any], layout: Layout, where: str, id: str = "") -> Example:
    """What a row means in a layout, its images as the data holds them: paths, bytes, dicts, PIL, or `Frame`.

    Images keep their places where a row says neither `kind` nor `should_change`, since nothing tells
    whether its answer would still be right, and so do frames without `kind`. A row whose images are
    empty and whose question has no slot is a question of text alone. The last turns of a chat, if they are
    the assistant's, are the demonstration and are not asked; where no column holds the answer, that is
    what they conclude with. Options in columns of their own are asked too, and the answer is then a letter.
    `id` is for a row that has none. Raises UserError, naming `where`, for one that is incomplete or
    contradicts itself.
    """
    convention, row = layout.convention, layout.ours(row)
    if row.get("worked") is not None and "demonstration" not in row:
        raise UserError(
            f"{where}: the column worked is now called demonstration; rename it in the data"
        )
    if row.get("audios"):
        raise UserError(f"{where}: there is sound, which is not read; leave the row out")
    question_key = layout.question(row, where)
    row = layout.with_frames(layout.with_chats(row, where), where)
    present = {key: value for key, value in row.items() if _is_given(value)}
    chat = read_chat(present[question_key], where)
    more = {key: present[key] for key in convention.turns if key in present}
    chat = with_turns(chat, more, where)
    images_key = next((key for key in IMAGES if present.get(key)), None)
    images = present[images_key] if images_key else ()
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    images = images or chat.images
    options = read_options(present, where)
    listing = listed(chat.messages, options, len(images), where) if options else None
    messages = listing.messages if listing else chat.messages
    messages = with_slots(messages, len(images), convention.images_first, where)
    if present.get("objects") and any(tag in m.content for m in messages for tag in _GROUNDING):
        raise UserError(
            f"{where}: {' and '.join(_GROUNDING)} are not filled in from objects; write the boxes into the text"
        )
    answer_key = convention.answer_key(present)
    response_key = next((key for key in convention.response if key in present), None)
    response = (
        chat.response or (response_key and read_response(present[response_key], where)) or None
    )
    gold_key = answer_key if answer_key in present else response_key
    gold = present.get(answer_key, response)
    if listing:
        answer = gold_by_options(gold, listing, layout.first_index, where)
    else:
        text = "\n".join(message.content for message in messages)
        said = present.get("demonstration", response)
        answer = gold_by_text(gold_text(gold), text, gold_text(said))
    kind, should_change = _labels(present, images, answer, where)
    used = {question_key, answer_key, response_key, *more, *_OPTIONAL, *IMAGES, *VIDEOS}
    plain = len(messages) == 1 and isinstance(present[question_key], str)
    fields = {question_key: "question", gold_key: "answer", images_key: "images"}
    example = Example(
        id=str(present.get("id", id)),
        images=images,
        question=messages[0].content if plain else messages,
        answer=answer,
        kind=kind,
        should_change=should_change,
        demonstration=str(present["demonstration"]) if "demonstration" in present else response,
        task=str(present.get("task", present.get(convention.task, ""))),
        extra={key: value for key, value in row.items() if key not in used},
        origin={
            fields.get(key, key): (layout.names.get(key, key), value)
            for key, value in present.items()
            if key in used
        },
    )
    if response and answer_key == "label" and isinstance(gold, bool):
        raise UserError(
            f"{where}: its label {gold} beside a response may judge that response or be the answer; put the answer into a "
            "column answer, or take label out"
        )
    if response and answer_key in present:
        check_response(response, answer, answer_form(example), listing, where)
    return example


def may_move(row: Mapping[str, Any]) -> bool:
    """Whether a row says something about moving its images."""
    return any(_is_given(row.get(key)) for key in ("kind", *SHOULD_CHANGE))


def _is_given(value: Any) -> bool:
    """Whether a cell holds something: pandas writes those that are empty as NaN."""
    return value is not None and not (isinstance(value, float) and value != value)


def labels_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says itself of `kind` and `should_change`."""
    change = next((row[key] for key in SHOULD_CHANGE if _is_given(row.get(key))), None)
    labels: dict[str, Any] = {"kind": str(row["kind"])} if _is_given(row.get("kind")) else {}
    truth = _TRUTH.get(str(change).strip().lower())
    return labels if truth is None else {**labels, "should_change": truth}


def _labels(
    row: Mapping[str, Any], images: Sequence[Any], answer: str, where: str
) -> tuple[str, bool]:
    """`kind` and `should_change` of a row that has both, one, or none of them."""
    key = next((key for key in SHOULD_CHANGE if row.get(key) is not None), None)
    should_change = may_move(row) if key is None else _truth(row[key], key, where)
    moves = may_move(row) and not any(isinstance(image, Frame) for image in images)
    kind = str(row.get("kind", "all" if moves else "none")).strip()
    if not images:  # A question of text alone: nothing can move.
        return "none", False
    if key is None and kind != "none" and answer.isdecimal() and 0 < int(answer) <= len(images):
        raise UserError(
            f"{where}: its answer {answer} may name an image or count something; write should_change = true or false"
        )
    return kind, should_change


def _truth(value: Any, key: str, where: str) -> bool:
    truth = _TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise UserError(f"{where}: {key} is '{one_line(value, 80)}'; write true or false")
    return truth
