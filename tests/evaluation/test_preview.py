"""`perl-rl preview`: prompts as the template writes them, right answers in every order, and what they are worth."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perl.config import INSTRUCTIONS
from perl.model.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS
from tests.command_line import ErrorOf, run
from tests.messages import tells

Preview = Callable[..., list[str]]


@pytest.fixture(scope="module")
def reads_all(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder whose tokenizer reads every text, a token a byte; its weights are none."""
    folder = tmp_path_factory.mktemp("model") / "bytes"
    shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # A header without tensors: nothing can be loaded.
        weights.write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.fixture
def preview(
    reads_all: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Preview:
    """The command's lines on stdout and then on stderr, over `count` rows of two pictures, without a cold start."""
    monkeypatch.chdir(tmp_path)
    for k, side in enumerate((28, 56)):
        Image.new("RGB", (2 * side, side), (k, 0, 0)).save(f"{k}.png")

    def preview(*options: object, count: int = 5, cold: int = 0, **changes: Any) -> list[str]:
        question = "A. <image> B. <image> Which is larger?"
        row = {"images": ["0.png", "1.png"], "question": question, "answer": "B", "kind": "all"}
        rows = [{**row, "id": f"q{k}", **changes} for k in range(count)]
        Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        words = ("--data.train", "rows.jsonl", "--model.path", reads_all)
        words = (*words, "--cold-start.steps", cold, *options)
        assert run("preview", "demo", "--data.instruction", "auto", *words) == 0
        said = capsys.readouterr()
        return [*said.out.splitlines(), *said.err.splitlines()]

    return preview


def test_what_the_model_is_shown(preview: Preview) -> None:
    """A picture of 56 x 28 pixels is 2 tokens, one of 112 x 56 is 8; every other character is one, but the marks."""
    lines = preview("--n", 2)
    first, *rest = lines
    assert first.endswith(f": {INSTRUCTIONS['think-box']}")
    tells(first, "accuracy", "format", "think-box")
    assert [line for line in rest if line.startswith("=== ")] == [
        "=== rows.jsonl: q0",
        "=== rows.jsonl: q4",
    ]
    start = rest.index("=== rows.jsonl: q0")
    one, two, three, answer, _, other, *_ = rest[start + 2 :]
    small, large = "<image 1: 56x28 -> 2 tokens>", "<image 2: 112x56 -> 8 tokens>"
    shown = "<|im_start|>user A. {} B. {} Which is larger?".format(
        *(f" <|vision_start|>{image}<|vision_end|> " for image in (small, large))
    )
    assert two == shown
    assert three == f"{INSTRUCTIONS['think-box']} <|im_end|><|im_start|>assistant "
    text = f"{two}\n{three}".replace(small, "").replace(large, "")
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    count = len(text) - sum(text.count(mark) * (len(mark) - 1) for mark in marks) + 2 + 8
    tells(one, "1 2", f"{count} of")
    tells(other, "2 1", f"{count} of")
    assert (
        answer
        == r"right answer: B, as <think>...</think>\boxed{B}: reward 1 (accuracy 1, format 1)"
    )
    answers = [line for line in rest if line.startswith("right answer: A")]
    assert len(answers) == 2 and answers[0] == answer.replace("B", "A")


@pytest.mark.parametrize(
    ("options", "changes", "answer", "warned"),
    [
        ((), {}, r"<think>...</think>\boxed{B}: reward 1 (accuracy 1, format 1)", []),
        (
            ("--data.instruction", "box"),
            {},
            r"\boxed{B}: reward 0.9 (accuracy 1, format 0)",
            ["format"],
        ),
        (
            ("--data.instruction", ""),
            {},
            r"<think>...</think>\boxed{B}: reward 1 (accuracy 1, format 1); no prompt asks for this form",
            ["accuracy", "format"],
        ),
        (
            ("--data.instruction", ""),
            {"demonstration": r"<think> B </think> \boxed{ B }"},
            r"<think>...</think>\boxed{B}: reward 1 (accuracy 1, format 1); no prompt asks for this form",
            ["accuracy", "format"],
        ),
        (
            ("--data.instruction", ""),
            {"demonstration": r"<think> B </think> \boxed{ B }", "cold": 9},
            r"<think>...</think>\boxed{B}: reward 1 (accuracy 1, format 1)",
            [],
        ),
        (
            ("--reward.functions", "accuracy(tags=True)", "choice", "--reward.weights", 1, 0.5),
            {},
            "<think>...</think><answer>B</answer>: reward 1.5 (accuracy 1, choice 1)",
            [],
        ),
        (("--reward.functions", "choice"), {}, "B: reward 1 (choice 1)", []),
    ],
)
def test_a_right_answer_as_it_is_asked_for(
    options: tuple[object, ...],
    changes: dict[str, Any],
    answer: str,
    warned: list[str],
    preview: Preview,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = preview(*options, "--n", 1, count=1, **changes)
    (line,) = (x for x in lines if x.startswith("right answer: B"))
    assert line.endswith(f" as {answer}")
    said = [r.getMessage() for r in caplog.records if r.name == "perl.rollout.instruction"]
    assert len(said) == bool(warned)
    for name in warned:
        tells(said[0], "rows.jsonl", name, "data.instruction")


def test_what_is_not_permuted_is_shown_in_its_order(preview: Preview) -> None:
    for rate, orders in ((0.0, ["1 2"]), (1.0, ["1 2", "2 1"])):
        lines = preview("--n", 1, "--permutation.rate", rate, count=1)
        assert re.findall(r"in the order ([0-9 ]+):", "\n".join(lines)) == orders


def test_a_cold_start_is_shown_in_its_order_with_its_demonstrations(preview: Preview) -> None:
    """And nothing is held out of rows that share their pictures."""
    cold = ("--stage", "cold_start", "--n", 1, "--data.eval", "split:0.5")
    lines = preview(*cold, demonstration=r"So <think> \boxed{ B }", cold=9)
    (order,) = [line for line in lines if line.startswith("--- ")]
    assert order.startswith("--- images in the order 1 2: ")
    said = r"demonstration: So <think> \boxed{ B }: reward 0.9 (accuracy 1, format 0)"
    assert lines.count(said) == 1
    (missing,) = [line for line in preview(*cold, cold=9) if line.startswith("demonstration: ")]
    assert "reward" not in missing


def test_a_template_that_opens_the_thought(
    preview: Preview, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The completion goes on behind it, and `format` never finds it."""
    (tmp_path / "thinks.jinja").write_text(CHAT_TEMPLATE + "<think>\n")
    lines = preview("--n", 1, "--model.chat-template", "thinks.jinja", count=1)
    (line,) = (x for x in lines if x.startswith("right answer: B"))
    assert line.endswith(r" as ...</think>\boxed{B}: reward 0.9 (accuracy 1, format 0)")
    (said,) = [r.getMessage() for r in caplog.records if r.name == "perl.rollout.instruction"]
    tells(said, "<think>", "format", "model.chat_template")
    assert "accuracy" not in said


def test_a_question_over_the_budget_and_one_without_an_answer(preview: Preview) -> None:
    lines = preview("--n", 1, "--data.max-prompt-tokens", 100, "--data.overlong", "drop")
    tells("\n".join(lines), "data.max_prompt_tokens = 100", "q0")
    assert not any(line.startswith("right answer") for line in lines)


def test_a_tiny_model_that_is_still_to_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("preview", "demo", "--n", 1, "--data.instruction", "auto") == 0
    out = capsys.readouterr().out
    tells(out.splitlines()[0], "auto", "none")
    assert r"\boxed{A}: reward 1 (accuracy 1, format 1)" in out
    tells(out, "digits-train-which-000000", "28x28", "1 token")


def test_what_it_refuses(error_of: ErrorOf) -> None:
    tells(error_of("preview"), "data.train", "model.path")
    tells(error_of("preview", "demo", "--n", 0), "--n 0", "1")
    tells(error_of("preview", "demo", "--stage", "warm"), "--stage warm", "cold_start", "rl")
