"""What rows of other layouts mean: chats and whose answer they hold, columns named by the user, rows without an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.config import DataConfig
from perl.data.columns import choose_layout, read_row
from perl.types import Example, Message
from tests.command_line import ErrorOf, json_lines, metrics, run
from tests.messages import refused, tells

PAIR = {"images": ["0.png", "1.png"]}
ASKED = "<image> <image> Which?"
NAN = float("nan")


def read(row: dict[str, Any], **config: Any) -> Example:
    return read_row(row, choose_layout(DataConfig(**config), row, "here"), "here")


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """A chat in which user and assistant take turns."""
    roles = ["user", "assistant"][:: 1 if first == "user" else -1] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def said(*contents: str) -> list[dict[str, str]]:
    """The same in ShareGPT's words."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in turns(*contents)]


EARLIER = (Message("user", ASKED), Message("assistant", "Both."), Message("user", "And now?"))


@pytest.mark.parametrize(
    ("row", "messages", "answer", "demonstration"),
    [
        # the last turn: the answer; what is in its box or tags; no answer where a column has one
        ({"messages": turns(ASKED, "B")}, EARLIER[:1], "B", "B"),
        ({"messages": turns(ASKED, r"So \boxed{\text{B}}.")}, EARLIER[:1], r"\text{B}", r"So \boxed{\text{B}}."),
        ({"messages": turns(ASKED, "<answer>B</answer>")}, EARLIER[:1], "B", "<answer>B</answer>"),
        ({"messages": turns(ASKED, "See A"), "solution": "B"}, EARLIER[:1], "B", "See A"),
        ({"messages": turns(ASKED, "B"), "demonstration": "So B"}, EARLIER[:1], "B", "So B"),
        ({"prompt": turns(ASKED, "See A"), "answer": "B"}, EARLIER[:1], "B", "See A"),
        # what stands behind the thinking, and an answer that a sentence ends with
        ({"messages": turns(ASKED, "<think>A?</think>\n\nB")}, EARLIER[:1], "B", "<think>A?</think>\n\nB"),
        ({"messages": turns(ASKED, "A dog. The answer is **B**.")}, EARLIER[:1], "B", "A dog. The answer is **B**."),
        ({"prompt": ASKED, "solution": "What the answer is"}, EARLIER[:1], "What the answer is", None),
        ({"prompt": ASKED, "solution": "It is whether the answer is right. So no."}, EARLIER[:1], "It is whether the answer is right. So no.", None),
        # several of the assistant's in the end are one response
        ({"messages": [*turns(ASKED, "Hm."), *turns(r"\boxed{B}", first="assistant")], "answer": "B"}, EARLIER[:1], "B", "Hm.\n\\boxed{B}"),
        # whatever the data call who says it
        ({"messages": [{"role": "Human", "content": ASKED}, {"role": "model", "content": "B"}]}, EARLIER[:1], "B", "B"),
        ({"conversations": [{"from": "User", "value": ASKED}, {"from": "GPT", "value": "B"}]}, EARLIER[:1], "B", "B"),
        # turns before it stay, and one of the assistant's that begins
        ({"messages": [*turns("Hi", first="assistant"), *turns(ASKED, "B")]}, (Message("assistant", "Hi"), *EARLIER[:1]), "B", "B"),
        ({"messages": turns(ASKED, "Both.", "And now?", "B")}, EARLIER, "B", "B"),
        ({"conversations": said(ASKED, "Both.", "And now?", "B")}, EARLIER, "B", "B"),
        ({"conversations": said(ASKED, "Both.", "And now?"), "label": "B"}, EARLIER, "B", None),
        ({"conversation": [{"human": ASKED, "assistant": "Both."}, {"human": "And now?", "assistant": "B"}]}, EARLIER, "B", "B"),
        ({"query": "And now?", "response": "B", "history": [[ASKED, "Both."]]}, EARLIER, "B", "B"),
        ({"instruction": "And now?", "output": "B", "history": [[ASKED, "Both."]]}, EARLIER, "B", "B"),
        # what other columns hold of the chat
        ({"instruction": ASKED, "input": "Look.", "output": "B"}, (Message("user", f"{ASKED}\nLook."),), "B", "B"),
        ({"conversations": said(ASKED, "B"), "system": "Be brief."}, (Message("system", "Be brief."), *EARLIER[:1]), "B", "B"),
        ({"conversations": [{"from": "system", "value": "Hm"}, *said(ASKED, "B")], "system": "Be brief."},
            (Message("system", "Hm"), *EARLIER[:1]), "B", "B"),
        # a completion of TRL's, as a text or as a chat
        ({"prompt": ASKED, "completion": "So \\boxed{B}"}, EARLIER[:1], "B", "So \\boxed{B}"),
        ({"prompt": ASKED, "completion": turns("B", first="assistant")}, EARLIER[:1], "B", "B"),
        # images without a slot stand first, though one among words of ours must be alone
        ({"query": "Which?", "response": "B"}, (Message("user", "<image><image>Which?"),), "B", "B"),
        ({"question": "Which?", "answer": "B", "images": ["0.png"]}, (Message("user", "<image>Which?"),), "B", None),
        # the answer among several columns
        ({"problem": ASKED, "answer": "B", "solution": "See A"}, EARLIER[:1], "B", None),
        ({"problem": ASKED, "solution": "<think>A</think> <answer> B </answer>"}, EARLIER[:1], "B", None),
        ({"prompt": ASKED, "ground_truth": 3.0}, EARLIER[:1], "3", None),
        # none at all
        ({"messages": turns(ASKED)}, EARLIER[:1], "", None),
        ({"prompt": ASKED}, EARLIER[:1], "", None),
        ({"problem": ASKED, "solution": None}, EARLIER[:1], "", None),
        ({"question": ASKED, "answer": " "}, EARLIER[:1], "", None),
        # pandas' empty cells
        ({"question": ASKED, "answer": NAN, "kind": NAN, "should_change": NAN, "demonstration": NAN}, EARLIER[:1], "", None),
        ({"prompt": ASKED, "answer": NAN, "solution": "B"}, EARLIER[:1], "B", None),
        ({"query": NAN, "messages": turns(ASKED, "B")}, EARLIER[:1], "B", "B"),
    ],
)  # fmt: skip
def test_what_is_asked_and_what_is_right(
    row: dict[str, Any], messages: tuple[Message, ...], answer: str, demonstration: str | None
) -> None:
    example = read({**PAIR, **row})
    assert example.messages == messages
    assert (example.answer, example.demonstration) == (answer, demonstration)


def test_what_is_left_is_for_the_rewards() -> None:
    row = {"query": ASKED, "response": "B", "system": "Hm", "history": [], "input": 3, "level": 2}
    assert read({**PAIR, **row}).extra == {"input": 3, "level": 2}
    assert read({**PAIR, "question": ASKED, "system": "Hm"}).extra == {"system": "Hm"}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": turns("B", first="assistant")}, ["user"]),
        ({"messages": turns(ASKED, "Both.", first="assistant")[:1] * 2}, ["user"]),
        ({"messages": [{"role": "system", "content": ASKED}]}, ["user"]),
        ({"messages": [*turns(ASKED), {"role": "expert", "content": "B"}], "answer": "B"}, ["'expert'", "user"]),
        ({"messages": turns("Which?", "<image> <image>")}, ["image", "last turn"]),
        ({"conversations": [*said(ASKED), {"from": "observation", "value": "1"}]}, ["'observation'", "human", "gpt"]),
        ({"conversations": [{"from": "human"}]}, ["content", "None"]),
        ({"query": ASKED, "response": "B", "history": ["Hm"]}, ["history", "Hm"]),
        ({"messages": turns(f"{ASKED} Is <bbox> a cat?", "B"), "objects": {"bbox": [[1, 2, 3, 4]]}}, ["<bbox>", "objects"]),
        ({"messages": turns(ASKED, "B"), "audios": ["a.wav"]}, ["sound"]),
        # a preference (KTO): whether the response is a good one
        ({"messages": turns(ASKED, "B"), "label": False}, ["label False"]),
        ({"prompt": ASKED, "completion": "So B", "label": True}, ["label True"]),
        ({"messages": turns("<image> Which?", "B")}, ["2 images", "1 <image>"]),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_asked(row: dict[str, Any], names: list[str]) -> None:
    with refused("here", *names):
        read({**PAIR, **row})


CHAT = turns('<image> <image> "Which", isn\'t } { it?\n\\frac', r"So \boxed{B}")
PARTS = [
    {
        "role": "user",
        "content": np.array([{"type": "image"}, {"type": "text", "text": "Which?"}], dtype=object),
    }
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CHAT),
        json.dumps(CHAT, indent=2),
        str(CHAT),
        str(np.array(CHAT)),
        repr(np.array(CHAT)),
    ],
)
@pytest.mark.parametrize("columns", [("messages",), ("prompt", "answer"), ("question", "answer")])
def test_a_chat_that_is_stored_as_a_text(text: str, columns: tuple[str, ...]) -> None:
    """Its last turn is not shown, and it is a chat for the rewards."""
    example = read({**PAIR, columns[0]: text, **dict.fromkeys(columns[1:], "B")})
    assert example.question == (Message("user", CHAT[0]["content"]),)
    assert (example.answer, example.demonstration) == ("B", CHAT[1]["content"])
    assert example.origin["question"] == (columns[0], CHAT)


def test_texts_inside_of_stored_chats() -> None:
    example = read({"images": ["0.png"], "messages": str(np.array(PARTS)), "answer": "B"})
    assert example.messages == (Message("user", "<image>Which?"),)
    completion = json.dumps(turns(r"So \boxed{B}", first="assistant"))
    assert (
        read({**PAIR, "prompt": ASKED, "completion": completion}).demonstration == r"So \boxed{B}"
    )
    assert read({**PAIR, "messages": json.dumps(json.dumps(CHAT))}).answer == "B"
    gold = json.dumps({"style": "rule", "ground_truth": "B"})
    assert read({**PAIR, "prompt": ASKED, "reward_model": gold}).answer == "B"
    gold = '[{"content": "a cat"}]'
    assert read({**PAIR, "question": ASKED, "answer": gold}).answer == gold
    # No chat: a text about one.
    text = '<image> <image> Is [{"role": "user"}] on both?'
    assert read({**PAIR, "question": text, "answer": "B"}).question == text


@pytest.mark.parametrize("column", ["messages", "question"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CHAT)[:-9],
        str(CHAT)[:-9],
        '[{"role": "user", "content": "\\sqrt"}]',
        "[{'role': open('x')}]",
        "[{'role': 'user', ...}]",
    ],
)
def test_a_stored_chat_that_is_broken(text: str, column: str) -> None:
    with refused("here", column, "JSON"):
        read({**PAIR, column: text, "answer": "B"})


@pytest.mark.parametrize(
    ("response", "gold", "fits"),
    [
        (r"\boxed{A}", "B", False),
        ("<answer> A </answer>", "B", False),
        (r"<answer>B</answer>, that is \boxed{A}", "B", True),  # the tags are read first
        ("A", "B", False),
        (r"\boxed{(b).}", "B", True),
        (r"\boxed{Image 2}", "2", True),
        (r"\boxed{3}", 2, False),
        (r"\boxed{1/2}", 0.5, True),
        (r"\boxed{no}", "yes", False),
        (r"\boxed{C, A}", ["A", "C"], True),
        (r"\boxed{C, A}", "A, B", False),
        (r"\boxed{2, 1, 3}", "3, 1, 2", True),  # a set for all that is known
        # What one reward takes for equal and another does not.
        (r"\boxed{a dog}", "the dog", True),
        (r"\boxed{second}", "2", True),
        (r"\boxed{B. a dog}", "B", True),
        ("<answer>[1, 2, 30.5, 4]</answer>", "[1, 2, 30, 4]", True),
        ("See A", "B", True),
        # no answer to compare with
        (r"\boxed{A}", "", True),
    ],
)
def test_a_last_turn_that_contradicts_the_answer(response: str, gold: Any, fits: bool) -> None:
    for row in (
        {"messages": turns(ASKED, response), "answer": gold},
        {"prompt": ASKED, "completion": response, "answer": gold},
    ):
        if fits:
            assert read({**PAIR, **row}).demonstration == response
        else:
            with refused("here", gold):
                read({**PAIR, **row})


def test_a_last_turn_with_a_list() -> None:
    row = {**PAIR, "answer": "2, 1"}
    for asked, fits in (
        ("In which order were they taken?", False),
        ("Which images show it?", True),
    ):
        chat = {**row, "messages": turns(f"<image> <image> {asked}", r"\boxed{1, 2}")}
        if fits:
            assert read(chat).answer == "2, 1"
        else:
            with refused("here", "'1, 2'", "'2, 1'"):
                read(chat)


def test_a_last_turn_answers_by_an_option() -> None:
    row = {**PAIR, "messages": turns(ASKED, r"\boxed{a dog}"), "options": ["a cat", "a dog"]}
    assert read(row).answer == read({**row, "answer": 2}).answer == "B"
    with refused("here", "'a dog'", "'A'"):
        read({**row, "answer": "A"})


@pytest.mark.parametrize(
    ("labels", "kind", "should_change"),
    [
        ({}, "none", False),
        ({"kind": None, "should_change": None}, "none", False),
        ({"kind": "none"}, "none", True),
        ({"kind": "first_fixed"}, "first_fixed", True),
        ({"should_change": True}, "all", True),
        ({"should_change": False}, "all", False),
    ],
)
@pytest.mark.parametrize("question", ["question", "prompt", "problem", "query", "instruction"])
def test_labels_that_a_row_has_not(
    labels: dict[str, Any], kind: str, should_change: bool, question: str
) -> None:
    example = read({**PAIR, question: ASKED, "answer": "B", **labels})
    assert (example.kind, example.should_change) == (kind, should_change)


def test_a_number_with_a_kind_alone_may_be_a_count() -> None:
    row = {**PAIR, "question": ASKED, "kind": "all"}
    for answer in (1, "2", r"\boxed{2}"):
        with refused("here", "should_change"):
            read({**row, "answer": answer})
    for more in ({"should_change": False}, {"answer": 3}, {"answer": "Image 2"}, {"kind": "none"}):
        assert read({**row, "answer": 2, **more}).answer


THEIRS = {"q": ASKED, "gt": "B", "pics": ["0.png", "1.png"], "hint": "look"}
NAMES = ("question=q", "answer = gt", "images=pics")


def test_columns_named_by_the_user() -> None:
    example = read(THEIRS, map=NAMES)
    assert (example.question, example.answer, example.images) == (ASKED, "B", ("0.png", "1.png"))
    assert example.extra == {"hint": "look"}
    # Before the convention is chosen; the same column may be two of ours.
    assert read({**PAIR, "messages": turns(ASKED, "See A"), "gold": "B"}, map=("answer=gold",)).answer == "B"  # fmt: skip
    assert read(THEIRS, map=(*NAMES, "demonstration=gt")).demonstration == "B"
    # What is mapped stands before what is there.
    assert read({**THEIRS, "answer": "A"}, map=NAMES).answer == "B"


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (("question=text",), ["here", "question=text", "q, gt, pics, hint"]),
        (("query=q",), ["query=q", "question, messages, answer"]),
        (("question",), ["question"]),
        (("question=",), ["question="]),
        ((*NAMES, "question=hint"), ["question=hint", "once"]),
    ],
)
def test_names_that_fit_nothing(entries: tuple[str, ...], names: list[str]) -> None:
    with refused("data.map", *names):
        read(THEIRS, map=entries)


def test_only_rewards_that_read_the_answer_need_one(short_recipe: Path, error_of: ErrorOf) -> None:
    folder = short_recipe.with_name("run")

    def forget(name: str, *numbers: int) -> None:
        file = short_recipe.with_name(name)
        rows = json_lines(file)
        for number in numbers:
            del rows[number]["answer"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    forget("data.jsonl", 3)
    forget("test.jsonl", *range(6))
    train = ["train", short_recipe, "--reward.weights", 1, 1, "--reward.functions", "format"]
    for reward in ("accuracy", "box_iou", "math"):
        error = error_of(*train, reward)
        tells(error, "data.jsonl line 4", f"'{reward}'", "answer", "'row-3'", "data.map")
    assert not folder.exists()
    # What is measured without answers has no accuracy.
    assert run(*train, "repetition", "--eval.examples", 6) == 0
    after = metrics(folder, "evaluate")[-1]
    assert (after["examples"], after["accuracy"], after["greedy"]) == (6, None, None)
    measure = ["filter", folder, "--data", short_recipe.with_name("data.jsonl")]
    tells(error_of(*measure, "--measure", "accuracy"), "'row-3'", "'accuracy'", "answer")
