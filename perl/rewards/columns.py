"""What reward functions are given about rollouts: columns under our names and the data's, chats, how far the run is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perl.permutation import answer_form
from perl.rewards.reading import GOLD_COLUMNS, gold_text, with_answer
from perl.types import IMAGE_SLOT, Message, Rollout, Variant

Columns = dict[str, list[Any]]
"""Name -> one value for each rollout."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """How far a run is, in the words of transformers' `TrainerState`; all 0 outside of training."""

    global_step: int = 0
    """RL steps that are done, those of earlier stages too."""
    max_steps: int = 0
    """RL steps up to the end of the stage."""
    epoch: float = 0.0
    """How often the data have been gone through whole."""


def rollout_columns(rollouts: Sequence[Rollout]) -> tuple[list[str], list[str], Columns]:
    """Prompts and completions of rollouts as texts, and columns, as reward functions take them.

    `answer` is the one that is right in the rollout's order, `images` are in it. `order` is that order, a list in which
    place j holds the original index (from 0) of the image in slot j: what a column says about original image i holds for
    slot `order.index(i)`. `completion_length` counts tokens, `completion_ids` are those. The columns that question, answer
    and images were read from are there under the data's names and follow the images (`gold_in`), and so do others of
    `GOLD_COLUMNS` that say the same answer; all others are as in the data, and None where an example lacks them.
    `ground_truth` is the data's own answer, of its type, in the rollout's order; `answer_form` what a list in it is
    (`perl.permutation.answer_form`).
    """
    rows = [
        {**rollout.variant.example.extra, **_of_the_data(rollout.variant)} for rollout in rollouts
    ]
    columns: Columns = {
        key: [row.get(key) for row in rows]
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in ("prompts", "completions")
    }
    variants = [rollout.variant for rollout in rollouts]
    columns.setdefault("ground_truth", [_ground_truth(variant) for variant in variants])
    columns.setdefault("answer_form", [answer_form(variant.example) for variant in variants])
    columns["answer"] = [variant.answer or None for variant in variants]
    columns["id"] = [variant.example.id for variant in variants]
    columns["task"] = [variant.example.task for variant in variants]
    columns["order"] = [list(variant.order) for variant in variants]
    columns["images"] = [list(variant.images) for variant in variants]
    columns["completion_length"] = [len(rollout.token_ids) for rollout in rollouts]
    columns["completion_ids"] = [rollout.token_ids.tolist() for rollout in rollouts]
    prompts = ["\n".join(m.content for m in variant.messages) for variant in variants]
    return prompts, [rollout.text for rollout in rollouts], columns


def conversations(
    rollouts: Sequence[Rollout], prompts: Sequence[str], completions: Sequence[str]
) -> Columns:
    """`prompts` and `completions` as TRL gives them: messages where the data hold a chat, else the texts."""
    chats: Columns = {"prompts": list(prompts), "completions": list(completions)}
    for i, rollout in enumerate(rollouts):
        variant = rollout.variant
        if not isinstance(variant.example.question, str):
            chats["prompts"][i] = as_chat(variant.messages, variant.images)
            chats["completions"][i] = [{"role": "assistant", "content": rollout.text}]
    return chats


def as_chat(messages: Sequence[Message], images: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as dicts; with images their content is a list of parts, text and image, as TRL's are then."""
    shown = iter(images)
    return [
        {
            "role": message.role,
            "content": _parts(message.content, shown) if images else message.content,
        }
        for message in messages
    ]


def _parts(content: str, images: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(content.split(IMAGE_SLOT)):
        if number:
            parts.append({"type": "image", "image": next(images)})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def gold_in(value: Any, old: str, new: str) -> Any:
    """The data's answer `value` where `new` is right instead of `old`, which was read off it.

    What stands around the answer stays (`with_answer`), and the type if it can.

    Example: `gold_in("<answer> B </answer>", "B", "A") == "<answer> A </answer>"`, `gold_in(2, "2", "1") == 1`.
    """
    if old == new or value is None:
        return value
    if isinstance(value, Mapping):
        return {**value, "ground_truth": gold_in(value.get("ground_truth"), old, new)}
    if isinstance(value, (list, tuple)):
        items = new.split(", ")
        if len(items) != len(value):
            return type(value)([new])
        return type(value)(
            gold_in(own, str(own).strip(), item) for own, item in zip(value, items, strict=True)
        )
    if not isinstance(value, str):
        try:
            return type(value)(new)
        except (TypeError, ValueError):
            return new
    return with_answer(value, old, new)


def _of_the_data(variant: Variant) -> dict[str, Any]:
    """The columns that the example's own fields were read from, as they are right in the variant's order."""
    example, out = variant.example, {}
    for ours, (column, value) in example.origin.items():
        if ours == "answer":
            value = gold_in(value, example.answer, variant.answer)
        elif ours == "images":
            value = list(variant.images) if isinstance(value, (list, tuple)) else variant.images[0]
        elif ours == "question" and not isinstance(value, str):
            value = as_chat(variant.rewritten or example.messages, variant.images)
        elif ours == "question" and variant.rewritten is not None:
            value = "\n".join(message.content for message in variant.rewritten)
        out[column] = value
    for column in (*GOLD_COLUMNS, "reward_model"):
        if (again := example.extra.get(column)) and gold_text(again) == example.answer:
            out[column] = gold_in(again, example.answer, variant.answer)
    return out


def _ground_truth(variant: Variant) -> Any:
    _, value = variant.example.origin.get("answer", ("", variant.example.answer))
    gold = gold_in(value, variant.example.answer, variant.answer)
    return gold.get("ground_truth") if isinstance(gold, Mapping) else gold
