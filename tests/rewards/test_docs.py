"""The examples of docs/rewards.md give what it says, and its table has every function and option."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from perl.rewards.forms import READS
from perl.rewards.reading import chosen_letters
from perl.rewards.scorer import BUILT_IN, Scorer
from tests.rewards.scoring import score

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
COLUMNS: dict[str, dict[str, Any]] = {
    "grounding": {"image": 1, "box": "(0,0),(4,4)", "order": [1, 0]},
    "frame_index": {"order": [0, 1, 2]},
    "length_penalty": {"completion_length": 90},
    'temporal_iou(duration="length")': {"answer": [4, 8], "length": 10},
}


def table(title: str) -> list[list[str]]:
    rows = DOCS.partition(f"| {title} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.split("|")[1:-1]] for row in rows]


EXAMPLES = table("completion")
EQUAL = [
    (gold.strip("`"), answer, right)
    for _, gold, *sides in table("form")
    for right, side in zip((1, 0), sides, strict=True)
    for answer in f"`{side}`".strip("`").split("` `")
]


@pytest.mark.parametrize(("text", "gold", "function", "value"), EXAMPLES)
def test_examples(text: str, gold: str, function: str, value: str) -> None:
    if function == "math":
        pytest.importorskip("math_verify")
    columns = COLUMNS.get(function) or COLUMNS.get(function.partition("(")[0], {"answer": gold})
    assert score(function, text, **columns) == pytest.approx(float(value), abs=5e-4)


@pytest.mark.parametrize(("gold", "given", "right"), EQUAL)
def test_what_counts_as_equal(gold: str, given: str, right: int) -> None:
    assert score("accuracy", rf"\boxed{{{given}}}", answer=gold) == right


@pytest.mark.parametrize(("text", "letters"), table("says"))
def test_the_letters_of_a_choice(text: str, letters: str) -> None:
    assert ", ".join(chosen_letters(text) or "") == letters


def test_every_function_and_option_is_listed() -> None:
    listed = {}
    for cell, *_ in table("name and options"):
        name, _, options = cell.partition("(")
        listed[name] = options.removesuffix(")")
    assert set(listed) == set(BUILT_IN)
    for name, function in BUILT_IN.items():
        options = [
            p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"')
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        assert listed[name] == ", ".join(options)
    forms = {
        cell.partition("(")[0]: set(re.findall(r"\\boxed|<\w+>", form))
        for cell, _, form, *_ in table("name and options")
    }
    for name, form in forms.items():
        options = ({"tags": ()},) if name == "format_tags" else ({}, {"tags": True})
        assert form == {mark for given in options for marks in READS[name](given) for mark in marks}
    shown = {re.split(r"\W", function)[0] for _, _, function, _ in EXAMPLES}
    assert shown == set(BUILT_IN) - {"judge", "caption_facts"}


def test_the_functions_run_and_the_asynchronous_one_asks_at_the_same_time() -> None:
    running, most = 0, 0

    async def ask(text: str, gold: str) -> float:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.01)
        running -= 1
        return float(text == gold)

    codes = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    names: list[dict[str, Any]] = [{"ask": ask} for _ in codes]
    for code, own in zip(codes, names, strict=True):
        exec(code, own)
    own, trl, verl, easyr1 = names

    def scores(function: Any, texts: list[Any], **columns: Any) -> dict[str, list[float]]:
        chats = columns.pop("chats", None)
        found = Scorer((function,)).score(["q"] * len(texts), texts, columns, chats)[1]
        return {name: values.tolist() for name, values in found.items()}

    assert scores(own["brief"], ["a", "a " * 101]) == {"brief": [1, 0]}
    texts, golds = ["A", "A", "<think>B"], ["A", "B", "B"]
    assert scores(own["asks_somebody"], texts, answer=golds) == {"asks_somebody": [1, 0, 0]}
    assert most == 3
    chats = {"completions": [[{"content": f"no, <answer>{text}</answer>"}] for text in texts]}
    solutions = [f"<answer>{gold}</answer>" for gold in golds]
    found = scores(trl["solution_reward"], texts, solution=solutions, chats=chats)
    assert found == {"solution_reward": [1, 0, 0]}
    found = scores(verl["compute_score"], texts, answer=golds)
    assert found == {"compute_score": [1, 0, 0], "compute_score/length": [1, 1, 8]}
    found = scores(easyr1["compute_score"], texts, answer=golds)
    overall, parts = found.pop("compute_score"), {"format": [0, 0, 1], "accuracy": [1, 0, 1]}
    assert overall == pytest.approx([0.9, 0, 1])
    assert found == {f"compute_score/{name}": values for name, values in parts.items()}
