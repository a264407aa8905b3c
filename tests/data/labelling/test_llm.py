"""Open questions made into multiple choice: what is taken, what is refused, and where the original is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.labelling.llm import Rephrased, is_open, rephrase
from perl.llm import Endpoint
from perl.types import Example, Message
from tests.chat_server import Model, Reply, says, serving
from tests.command_line import run
from tests.messages import tells

IMAGES = tuple(Image.new("RGB", (4, 4), (80 * k, 0, 0)) for k in range(3))


def example(question: str, answer: str) -> Example:
    return Example("x", IMAGES[: question.count("<image>")], question, answer, "none", False)


def choice(question: str, answer: str, kind: str = "Other") -> str:
    return json.dumps({"question": question, "answer": answer, "question_type": kind})


WHICH = example("<image><image> Which image shows a fox?", "Image 2")
ANIMAL = example("<image><image> Which animal do both images show?", "a fox")
GOOD = choice("Which image shows a fox? A. <image> B. <image>", "B")
TEXT = choice("<image><image> Which animal?\nA. an owl\nB. a fox\nC. a hare", "(B)")


@pytest.mark.parametrize(
    ("asked", "said", "wanted"),
    [
        (WHICH, GOOD, "B"),
        (ANIMAL, TEXT, "B"),
        (WHICH, choice("A. <image> B. <image> Fox?", "B", "ReferenceComparison"), "B"),
        # Where it is refused, what the model is told.
        (WHICH, choice("A. <image> B. <image> Which?", "A"), ["option A", "image"]),
        (WHICH, choice("A. <image> B. <image> Which?", "C"), ["'C'", "options"]),
        (WHICH, choice("A. <image> Which?", "A"), ["1 <image>", "2 images"]),
        (WHICH, choice("A. <image> B. <image> Which?", "B", "Riddle"), ["question_type", "Other"]),
        (ANIMAL, choice("<image><image>\nA. an owl\nB. a hare", "A"), ["option A", "answer"]),
        (ANIMAL, choice("<image><image> Which animal?", "a fox"), ["'a fox'", "options"]),
        (ANIMAL, "no", ["JSON object"]),
        (ANIMAL, "[1, 2]", ["JSON object"]),
        (ANIMAL, '{"question": 1, "answer": "B"}', ["question", "answer", "texts"]),
    ],
)
def test_only_a_sound_multiple_choice_is_taken(
    asked: Example, said: str, wanted: str | list[str]
) -> None:
    with serving(lambda *_: says(said)) as url:
        (found,) = rephrase([asked], Endpoint(url, "m"))
    if isinstance(wanted, str):
        assert isinstance(found, Rephrased)
        assert found.answer == wanted and found.question == json.loads(said)["question"]
    else:
        assert isinstance(found, str)
        tells(found, *wanted)


def test_what_is_wrong_is_said_once_and_may_be_corrected() -> None:
    chats: list[list[dict[str, str]]] = []

    def reply(body: dict[str, Any], headers: dict[str, str]) -> Reply:
        chats.append(body["messages"])
        return says(GOOD if len(body["messages"]) > 1 else "no")

    with serving(reply) as url:
        (found,) = rephrase([WHICH], Endpoint(url, "m"))
    assert isinstance(found, Rephrased) and len(chats) == 2
    tells(chats[1][-1]["content"], "JSON object")


def test_what_is_an_open_question() -> None:
    assert is_open(WHICH) and is_open(ANIMAL)
    assert not is_open(example("<image> Which animal?", "a fox"))
    assert not is_open(example("A <image> B <image> Which image shows a fox?", "B"))
    assert not is_open(example("<image><image> Which animal? A. an owl B. a fox", "B"))
    turns = tuple(Message("user", text) for text in ("<image><image> Which animal?", "Sure?"))
    assert not is_open(Example("x", IMAGES[:2], turns, "a fox"))


@pytest.mark.parametrize(("chat", "stored"), [(False, False), (True, False), (True, True)], ids=str)
def test_rows_are_rephrased_and_labelled(
    tmp_path: Path, model: Model, chat: bool, stored: bool
) -> None:
    """A chat keeps its system message, also one that is stored as a text."""
    model.answer = lambda task: GOOD if "shows a fox" in task else "no"
    for k, image in enumerate(IMAGES):
        image.save(tmp_path / f"{k}.png")
    rows: list[dict[str, Any]] = []
    for asked in (WHICH, ANIMAL):
        if chat:
            prompt = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": asked.question},
            ]
            row = {"prompt": json.dumps(prompt) if stored else prompt}
            row |= {"reward_model": {"ground_truth": asked.answer, "k": 1}}
        else:
            row = {
                "question": asked.question,
                "answer": asked.answer,
                "demonstration": asked.answer,
            }
        rows.append({"images": ["0.png", "1.png"], **row})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # The second time everything is there.
        assert run("label", data, "--rephrase") == 0
    output = tmp_path / "rows.labelled.jsonl"
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert first["rephrased"] == "Other" and second["rephrased"].startswith("no: ")
    changed = {"prompt", "reward_model"} if chat else {"question", "answer", "demonstration"}
    assert first["original"] == {key: rows[0][key] for key in changed}
    assert {k: second[k] for k in rows[1]} == rows[1]
    examples = load_examples(str(output), DataConfig(), "train", 0)
    new, old = examples[0], examples[1]
    assert new.demonstration is None and (old.demonstration == "a fox") != chat
    assert (new.answer, new.kind, new.should_change) == ("B", "all", True)
    assert (old.answer, old.kind, old.should_change) == ("a fox", "none", False)
    assert new.messages[-1].content == json.loads(GOOD)["question"]
    assert len(new.messages) == (2 if chat else 1)
