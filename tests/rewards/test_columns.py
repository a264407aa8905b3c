"""What functions written for TRL are given: the data's own columns, right in the order shown, in TRL's forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.columns import choose_layout, read_row
from perl.permutation import permute
from perl.rewards.columns import TrainerState, as_chat, conversations, gold_in, rollout_columns
from perl.rewards.gold import gold_check
from perl.rewards.scorer import Scorer
from perl.types import Message, Rollout
from tests.messages import refused

CAT, DOG = Image.new("L", (1, 1), 1), Image.new("L", (1, 1), 2)
ASKED = "A. <image> B. <image> Which image shows a dog?"


def rollouts(
    row: dict[str, Any],
    *texts: str,
    order: tuple[int, ...] = (1, 0),
    names: tuple[str, ...] = (),
) -> list[Rollout]:
    """Of a row as a user has it, in another order of its images; text i has tokens 0 to i."""
    row = {"images": [CAT, DOG], "kind": "all", **row}
    example = read_row(row, choose_layout(DataConfig(map=names), row, "here"), "here")
    variant = permute(example, order)
    return [
        Rollout(variant, None, np.arange(i + 1), np.zeros(i + 1), text, True)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    ]


def given(
    row: dict[str, Any], order: tuple[int, ...] = (1, 0), names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What a function is given of one rollout of the row, by name."""
    seen: dict[str, Any] = {}

    def look(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0]

    Scorer((look,)).score_rollouts(rollouts(row, "B", order=order, names=names))
    return {k: v[0] if isinstance(v, list) else v for k, v in seen.items()}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"problem": ASKED, "answer": "B", "level": 3},
            {"problem": ASKED, "answer": "A", "ground_truth": "A", "level": 3},
        ),
        (
            {"prompt": ASKED, "solution": "<answer> B </answer>"},
            {"solution": "<answer> A </answer>", "answer": "A", "prompt": ASKED},
        ),
        (
            {
                "prompt": [{"role": "user", "content": ASKED}],
                "reward_model": {"ground_truth": "B", "style": "rule"},
                "data_source": "zoo",
                "extra_info": {"index": 3},
            },
            {
                "reward_model": {"ground_truth": "A", "style": "rule"},
                "ground_truth": "A",
                "data_source": "zoo",
                "extra_info": {"index": 3},
                "task": "zoo",
            },
        ),
        (
            {"question": ASKED, "answer": 2, "should_change": True},
            {"answer": "1", "ground_truth": 1},
        ),
        (  # The answer again in other columns, and one that says something else.
            {
                "problem": ASKED,
                "answer": "B",
                "ground_truth": "B",
                "label": "X",
                "solution": r"\textbf{B} is dark: \boxed{B}",
            },
            {"ground_truth": "A", "solution": r"\textbf{B} is dark: \boxed{A}", "label": "X"},
        ),
    ],
)
def test_the_columns_of_the_data_are_right_in_the_order_shown(
    row: dict[str, Any], expected: dict[str, Any]
) -> None:
    seen = given(row)
    assert {name: seen[name] for name in expected} == expected
    assert (seen["images"], seen["order"]) == ([DOG, CAT], [1, 0])
    as_it_is = given(row, (0, 1))
    own = {name: value for name, value in row.items() if name not in ("prompt", "answer")}
    assert {name: as_it_is[name] for name in own} == own


@pytest.mark.parametrize(
    ("value", "old", "new", "expected"),
    [
        ("B", "B", "A", "A"),
        (" (B). ", "(B).", "(A).", " (A). "),
        ("<answer>a</answer>", "a", "b", "<answer>b</answer>"),
        (r"$\boxed{ 2 }$", "2", "1", r"$\boxed{ 1 }$"),
        (r"<think>B, so \boxed{B}</think><answer>B</answer>", "B", "A",
         r"<think>B, so \boxed{A}</think><answer>A</answer>"),
        (r"\boxed{B} since \textbf{B} is {B}", "B", "A", r"\boxed{A} since \textbf{B} is {B}"),
        (r"<answer>B</answer>, that is \boxed{B}", "B", "A", r"<answer>A</answer>, that is \boxed{A}"),
        (r"<answer>\boxed{a.*}</answer>", r"\boxed{a.*}", r"\1", r"<answer>\1</answer>"),
        ("B or <answer>C</answer>", "B", "A", "A"),
        ("the second", "2", "1", "1"),
        (2, "2", "1", 1),
        (2.0, "2", "1", 1.0),
        (2, "2", "A", "A"),
        (["A", "C"], "A, C", "B, C", ["B", "C"]),
        ([2, 3], "2, 3", "1, 3", [1, 3]),
        (["A", "C"], "A, C", "B", ["B"]),
        ({"ground_truth": 2, "style": "rule"}, "2", "1", {"ground_truth": 1, "style": "rule"}),
        (None, "", "", None),
        ({"ground_truth": [1]}, "1", "1", {"ground_truth": [1]}),
    ],
)  # fmt: skip
def test_gold_keeps_its_type_and_what_stands_around_it(
    value: Any, old: str, new: str, expected: Any
) -> None:
    found = gold_in(value, old, new)
    assert (found, type(found)) == (expected, type(expected))


def test_chats_are_messages_and_plain_questions_are_texts() -> None:
    """Parts where there are images, as TRL gives them; one batch may hold both. Ours read texts."""
    system = {"role": "system", "content": "Look."}
    chat = {"messages": [system, {"role": "user", "content": ASKED}], "answer": "B"}
    plain = {"question": ASKED, "answer": "B"}
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0] * len(prompts)

    both = [*rollouts(chat, r"\boxed{A}", "no"), *rollouts(plain, r"\boxed{A}")]
    totals, _ = Scorer((look, "accuracy"), (1.0, 2.0)).score_rollouts(both)
    assert totals.tolist() == [2, 0, 2]
    parts = [
        *({"type": "text", "text": "A. "}, {"type": "image", "image": DOG}),
        *({"type": "text", "text": " B. "}, {"type": "image", "image": CAT}),
        {"type": "text", "text": " Which image shows a dog?"},
    ]
    asked = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": parts},
    ]
    assert seen["prompts"] == [asked, asked, ASKED]
    answered = [[{"role": "assistant", "content": text}] for text in (r"\boxed{A}", "no")]
    assert seen["completions"] == [*answered, r"\boxed{A}"]
    assert seen["ids"] == [[0], [0, 1], [0]]
    assert given(chat)["messages"] == asked
    # What the run adds to a chat stands in the prompt alone.
    (rollout,) = rollouts(chat, "B")
    added = (*rollout.variant.messages[1:], Message("user", "Think."))
    rollout = replace(rollout, variant=replace(rollout.variant, asked=added))
    prompts, texts, columns = rollout_columns([rollout])
    assert columns["messages"] == [asked]
    thought = {"role": "user", "content": [{"type": "text", "text": "Think."}]}
    assert conversations([rollout], prompts, texts)["prompts"] == [[asked[1], thought]]
    only_text = [Message("user", "Which?")]
    assert as_chat(only_text, ()) == [{"role": "user", "content": "Which?"}]


def test_rewritten_text_stands_in_the_data_s_column_too() -> None:
    row = {"problem": "<image><image> Is image 1 darker?", "answer": "yes", "should_change": False}
    row |= {"images": [CAT, DOG]}
    example = read_row(row, choose_layout(DataConfig(), row, "here"), "here")
    variant = permute(example, (1, 0), "references")
    rollout = Rollout(variant, None, np.zeros(1), np.zeros(1), "", True)  # type: ignore[arg-type]
    (own,) = rollout_columns([rollout])[2]["problem"]
    assert own == "<image><image> Is image 2 darker?"


def test_columns_that_were_mapped_keep_the_data_s_names() -> None:
    row = {"asked": ASKED, "right": r"\boxed{B}"}
    seen = given(row, names=("question=asked", "answer=right"))
    assert (seen["asked"], seen["right"], seen["answer"]) == (ASKED, r"\boxed{A}", "A")


def test_gold_that_a_response_concludes_with_follows_too() -> None:
    row = {"instruction": ASKED, "output": r"<think>B is one</think> \boxed{B}"}
    seen = given(row)
    assert (seen["output"], seen["answer"]) == (r"<think>B is one</think> \boxed{A}", "A")


def test_one_image_is_given_as_the_data_has_it() -> None:
    row = {"image": CAT, "images": None, "question": "<image> What?", "answer": "cat"}
    seen = given(row | {"kind": "none"}, (0,))
    assert seen["image"] is CAT and seen["images"] == [CAT]


def test_how_far_the_run_is_and_what_functions_log() -> None:
    def steps(completions: Any, trainer_state: TrainerState) -> list[float]:
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    def logs(completions: Any, log_metric: Any, log_extra: Any, **columns: Any) -> list[float]:
        if "bad" in completions and len(completions) > 1:
            raise ValueError
        log_metric("share", len(completions))
        log_extra("read", [text.upper() for text in completions])
        return [1.0] * len(completions)

    scorer = Scorer((steps, logs))
    scorer.state = TrainerState(global_step=3, max_steps=12)
    assert scorer.score(["q"] * 2, ["a", "b"], {})[1]["steps"].tolist() == [0.25] * 2
    assert (scorer.metrics, scorer.logged) == ({"share": [2.0]}, {"read": ["A", "B"]})
    scorer.score(["q"] * 3, ["c", "bad", "d"], {})
    assert scorer.metrics == {"share": [2.0, 1.0, 1.0, 1.0]}
    assert scorer.logged == {"read": ["C", "BAD", "D"]}
    scorer.reset()
    assert (scorer.metrics, scorer.logged) == ({}, {})


def test_a_class_of_ms_swift_gets_texts_of_chats_too() -> None:
    chat = {"messages": [{"role": "user", "content": ASKED}], "solution": "<answer> B </answer>"}
    for spec, scores in (("Orm", [1, 0]), ("Orm(right=3.0)", [3, 0]), ("Later", [1, 0])):
        scorer = Scorer((f"{__name__}:{spec}",), (1.0,))
        assert scorer.score_rollouts(rollouts(chat, "A", "B"))[0].tolist() == scores
    with refused("Needs()", "TypeError", "'tokenizer'", "options"):
        Scorer((f"{__name__}:Needs",), (1.0,))


class Orm:
    def __init__(self, right: float = 1.0) -> None:
        self.right = right

    def __call__(self, completions: Any, solution: Any, **kwargs: Any) -> list[float]:
        assert kwargs["trainer_state"].global_step == 0
        return [self.right * (c in s) for c, s in zip(completions, solution, strict=True)]


class Later(Orm):
    async def __call__(self, completions: Any, solution: Any, **kwargs: Any) -> list[float]:  # type: ignore[override]
        return super().__call__(completions, solution, **kwargs)


class Needs:
    def __init__(self, tokenizer: Any) -> None: ...


def test_golds_are_checked_under_the_names_of_the_data() -> None:
    row = {"prompt": ASKED, "solution": "(1,2),(3,4)", "kind": "none"}
    (one,) = rollouts(row, "", order=(0, 1))
    gold_check(["box_iou(column='solution')"])(one.variant.example)
    with refused("box_iou(column='boxes')", "boxes"):
        gold_check(["box_iou(column='boxes')"])(one.variant.example)
