"""`perl-rl generate`: what the model is asked, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.config import EVAL_SEED, INSTRUCTIONS, DataConfig, EvalConfig, RolloutConfig
from perl.data.dataset import load_examples
from perl.permutation import permute
from perl.rollout.engine import SamplingParams
from perl.types import EncodedImage, Example, Message
from tests.command_line import ErrorOf, run
from tests.messages import tells
from tests.stand_ins import TableEngine, WordPrompt, Words


class Chat(Words):
    def encode_messages(
        self, messages: Sequence[Message], images: Sequence[Any], where: str
    ) -> WordPrompt:
        asked = Example(where, tuple(images), tuple(messages), "")
        encoded = self.encode(permute(asked, range(len(images))))
        seen = (EncodedImage("", np.zeros(0), (), 0, size=(3, 2)) for _ in images)  # type: ignore[arg-type]
        return replace(encoded, images=tuple(seen))

    def unknown_words(self, messages: Sequence[Message]) -> list[str]:
        return [w for w in messages[-1].content.split() if w.startswith("un")]


@pytest.fixture
def folder(
    engine: TableEngine,
    trained: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A run over two held-out questions, whose model says so many words as its number."""
    engine.processor = Chat()
    engine.answer = lambda asked: "word " * asked.number + "end"
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (1, 1), (9, 0, 0)).save("nine.png")
    Image.new("RGB", (1, 1), (5, 0, 0)).save("five.png")
    rows = [
        {"question": f"<image> Which {i} ?", "images": [f"{name}.png"], "answer": name}
        for i, name in enumerate(("nine", "five"))
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = DataConfig(eval=str(tmp_path / "rows.jsonl"))
    return trained(data=own, rollout=RolloutConfig(max_new_tokens=3, top_p=0.9, stop=("!",)))


@pytest.mark.parametrize(
    ("options", "n", "temperature", "longest", "seed"),
    [
        ((), 1, 0.0, 3, 0),
        (("--n", 5), 5, 1.0, 3, 0),
        (("--n", 5, "--temperature", 0), 5, 0.0, 3, 0),
        (("--temperature", 0.5, "--max-new-tokens", 4, "--seed", 7), 1, 0.5, 4, 7),
    ],
)
def test_how_it_samples(
    options: tuple[object, ...],
    n: int,
    temperature: float,
    longest: int,
    seed: int,
    folder: Path,
    engine: TableEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("generate", folder, "--prompt", "Which unlike one ?", *options) == 0
    (call,) = engine.calls
    assert call.params == SamplingParams(n, temperature, longest, 0.9, 0, ("!",))
    assert call.seed == seed
    said = capsys.readouterr()
    tells(said.err, "unlike")
    lines = said.out.splitlines()
    assert len(lines) == n and lines[:3] == ["end", "word end", "word word end"][:n]
    for line in lines[3:]:
        assert line.startswith("word " * longest) and "end" not in line
        tells(line, f"cut at {longest} tokens")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("Which ?", "<image> <image> Which ?"),
        ("A <image> B <image> Which ?", "A <image> B <image> Which ?"),
    ],
)
def test_pictures_stand_before_a_text_without_slots(
    prompt: str, shown: str, folder: Path, engine: TableEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--images", "nine.png", "five.png")
    assert run("generate", folder, "--prompt", prompt, *words) == 0
    ((asked,),) = [call.variants for call in engine.calls]
    assert asked.messages == (Message("user", shown),)
    assert [image.getpixel((0, 0))[0] for image in asked.images] == [9, 5]
    assert "unknown" not in capsys.readouterr().err


def test_the_pictures_are_named_and_saved_as_the_model_sees_them(
    folder: Path, engine: TableEngine, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    words = ("--prompt", "Which ?", "--images", "five.png", "nine.png")
    assert run("generate", folder, *words, "--save-images", "seen/here") == 0
    one, two = capsys.readouterr().err.splitlines()[-2:]
    tells(one, "image 1", "five.png", "1 x 1", "3 x 2")
    tells(two, "image 2", "nine.png", "1 x 1", "3 x 2")
    for number, red in ((1, 5), (2, 9)):
        with Image.open(f"seen/here/image-{number}.png") as image:
            assert (image.size, image.getpixel((0, 0))) == ((3, 2), (red, 0, 0))
    assert run("generate", folder, "--example", 1) == 0
    tells(capsys.readouterr().err.splitlines()[-1], "image 1", "five.png")
    tells(error_of("generate", folder, *words, "--save-images", "nine.png"), "nine.png")


def test_a_held_out_example(
    folder: Path, engine: TableEngine, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    for number, (red, name) in enumerate(((9, "nine"), (5, "five"))):
        assert run("generate", folder, "--example", number) == 0
        question, instruction, answer, completion = capsys.readouterr().out.splitlines()
        assert instruction == INSTRUCTIONS["think-box"]
        assert question.endswith(f": <image> Which {number} ?") and completion == "end"
        assert answer.endswith(f": {name}")
        ((asked,),) = [call.variants for call in engine.calls[number:]]
        assert asked.images[0].getpixel((0, 0))[0] == red
    tells(error_of("generate", folder, "--example", 2), "--example 2", "2 examples", "0")


def test_the_system_message_is_shown(
    folder: Path, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own = DataConfig(
        eval=str(Path("rows.jsonl").resolve()), system="Look .", instruction_in="system"
    )
    assert run("generate", trained(data=own), "--example", 0) == 0
    system, instruction, question, *_ = capsys.readouterr().out.splitlines()
    assert (system, instruction) == ("system: Look .", INSTRUCTIONS["think-box"])
    assert question.endswith(": <image> Which 0 ?")


def test_examples_are_numbered_as_the_evaluation_has_them(
    folder: Path, engine: TableEngine, trained: Callable[..., Path]
) -> None:
    """A sample of the file: the same rows whatever the number."""
    rows = [{"question": f"Which {i} ?", "images": [], "answer": "x"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = DataConfig(eval=str(Path("rows.jsonl").resolve()))
    trained(data=own, eval=EvalConfig(examples=4))
    evaluated = load_examples(own.eval, own, "test", EVAL_SEED, 4)
    for number in range(4):
        assert run("generate", folder, "--example", number) == 0
        assert engine.calls[-1].variants[0].example.id == evaluated[number].id


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["--prompt", "--images", "--example"]),
        (["--images", "nine.png"], ["--prompt"]),
        (["--example", 0, "--prompt", "x"], ["--example", "--prompt"]),
        (["--example", 0, "--images", "nine.png"], ["--example", "--images"]),
        (["--prompt", "x", "--n", 0], ["--n 0", "1"]),
        (["--prompt", "x", "--temperature", -1], ["--temperature -1.0", "0"]),
        (["--prompt", "x", "--max-new-tokens", 0], ["--max-new-tokens 0", "1"]),
        (["--prompt", "x", "--seed", -1], ["--seed -1", "0"]),
        (["--example", -1], ["--example -1", "0"]),
        (["--prompt", "x", "--images", "ten.png"], ["ten.png"]),
    ],
)
def test_what_it_refuses(
    options: list[object], names: list[str], folder: Path, error_of: ErrorOf
) -> None:
    tells(error_of("generate", folder, *options), *names)
