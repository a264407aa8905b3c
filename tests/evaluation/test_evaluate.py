"""Evaluation takes examples as they come: by position, in every order, loaded a few at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from perl.config import Config, EvalConfig, ModelConfig, RolloutConfig
from perl.evaluation.evaluate import aggregate, evaluate
from perl.model.loading import load_policy, load_processor
from perl.rollout.engine import InProcessEngine
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Example, UserError
from tests.command_line import run

PICTURES = tuple(Image.new("RGB", (28, 28), c) for c in ("red", "green", "blue"))


def example(name: str, count: int = 2) -> Example:
    slots = " ".join(f"{letter} <image>" for letter in "ABC"[:count])
    return Example(name, PICTURES[:count], f"{slots} which image shows two ?", "A", task="which")


def config(**measured: int) -> Config:
    return Config(eval=EvalConfig(**measured), rollout=RolloutConfig(max_new_tokens=4))


@pytest.fixture
def tools(tiny_folder: Callable[[str], Path]) -> tuple[InProcessEngine, PromptEncoder]:
    folder, model = str(tiny_folder("tiny-qwen2.5-vl")), ModelConfig()
    processor = load_processor(folder, model)
    engine = InProcessEngine(load_policy(folder, model, torch.device("cpu")), processor, 64)
    return engine, PromptEncoder(processor, PromptLimit(20, "20"), "drop")


def test_equal_ids_stay_two_examples(tools: tuple[InProcessEngine, PromptEncoder]) -> None:
    data = [example("0"), example("0"), example("1")]
    results, shown = evaluate(*tools, data, range(3), config(samples=2))
    assert [(r.id, r.orders) for r in results] == [("0", 2), ("0", 2), ("1", 2)]
    assert len(shown) == 6
    assert aggregate(results)["by_task"]["which"]["examples"] == 3


def test_examples_over_the_budget_are_left_out(
    tools: tuple[InProcessEngine, PromptEncoder],
) -> None:
    data = [example("short"), example("long", 3), example("short too")]
    results, _ = evaluate(*tools, data, [0, 1, 2], config())
    assert [r.id for r in results] == ["short", "short too"]
    with pytest.raises(UserError, match="every held-out example has a prompt over"):
        aggregate(evaluate(*tools, data, [1], config())[0])


def test_pictures_with_the_same_bytes_and_other_palettes_are_two(
    tools: tuple[InProcessEngine, PromptEncoder],
) -> None:
    one, other = Image.new("P", (28, 28), 1), Image.new("P", (28, 28), 1)
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 0, 255])
    encode = tools[1].processor.encode_image
    assert encode(one).key != encode(other).key


def test_what_a_run_was_set_to_holds_when_its_model_is_asked(
    short_recipe: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]
) -> None:
    folder = short_recipe.parent / "run"
    assert run("train", short_recipe, "--train.steps", "0", "--rollout.max-new-tokens", "1") == 0
    capsys.readouterr()
    assert run("generate", folder, "--prompt", "three", "--n", "8") == 0
    assert "[cut at 1 tokens]" in capsys.readouterr().out
    words = ("evaluate", folder, "--eval.examples", "2", "--max-prompt-tokens")
    assert "raise it with --max-prompt-tokens, or leave" in error_of(*words, "5")
    assert "every held-out example has a prompt over" in error_of(*words, "5", "--overlong", "drop")
    data = short_recipe.parent / "data.jsonl"
    first, second, *_ = data.read_text().splitlines()
    longer = second.replace("Which image", "Which image " + "image " * 20)
    data.write_text(f"{first}\n{longer}\n")
    capsys.readouterr()
    assert run(*words, "30", "--overlong", "drop") == 0
    said = capsys.readouterr()
    assert "1 examples are left out" in said.out
    assert "evaluate: 2 examples" in said.err and "steps" not in said.err


def test_names_that_are_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for command in (("generate", "runs/nope", "--prompt", "x"), ("evaluate", "runs/nope")):
        assert "runs/nope: there is no such folder; give a run folder" in error_of(*command)


def test_help_shows_what_evaluate_uses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--help") == 0
    said = capsys.readouterr().out
    assert "--eval.samples" in said and "--eval.every" not in said
