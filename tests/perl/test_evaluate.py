"""Evaluation takes examples as they come: by position, in every order, loaded a few at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from perl.collect import PromptEncoder, PromptLimit
from perl.config import EvalConfig, ModelConfig
from perl.evaluate import aggregate, evaluate
from perl.loading import load_policy, load_processor
from perl.rollout import InProcessEngine
from perl.types import Example, UserError

PICTURES = tuple(Image.new("RGB", (28, 28), c) for c in ("red", "green", "blue"))


def example(name: str, count: int = 2) -> Example:
    slots = " ".join(f"{letter} <image>" for letter in "ABC"[:count])
    return Example(name, PICTURES[:count], f"{slots} which image shows two ?", "A", task="which")


@pytest.fixture
def tools(tiny_folder: Callable[[str], Path]) -> tuple[InProcessEngine, PromptEncoder]:
    folder, config = str(tiny_folder("tiny-qwen2.5-vl")), ModelConfig()
    processor = load_processor(folder, config)
    policy = load_policy(folder, config, torch.device("cpu"))
    return InProcessEngine(policy, processor, 64), PromptEncoder(
        processor, PromptLimit(20, "20"), "drop"
    )


def test_equal_ids_stay_two_examples(tools: tuple[InProcessEngine, PromptEncoder]) -> None:
    data = [example("0"), example("0"), example("1")]
    results, shown = evaluate(*tools, data, range(3), EvalConfig(samples=2), 4, seed=0)
    assert [(r.id, r.orders) for r in results] == [("0", 2), ("0", 2), ("1", 2)]
    assert len(shown) == 6
    assert aggregate(results)["by_task"]["which"]["examples"] == 3


def test_examples_over_the_budget_are_left_out(
    tools: tuple[InProcessEngine, PromptEncoder],
) -> None:
    data = [example("short"), example("long", 3), example("short too")]
    results, _ = evaluate(*tools, data, [0, 1, 2], EvalConfig(), 4, seed=0)
    assert [r.id for r in results] == ["short", "short too"]
    with pytest.raises(UserError, match="every held-out example has a prompt over"):
        aggregate(evaluate(*tools, data, [1], EvalConfig(), 4, seed=0)[0])


def test_pictures_with_the_same_bytes_and_other_palettes_are_two(
    tools: tuple[InProcessEngine, PromptEncoder],
) -> None:
    one, other = Image.new("P", (28, 28), 1), Image.new("P", (28, 28), 1)
    one.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 0, 255])
    encode = tools[1].processor.encode_image
    assert encode(one).key != encode(other).key
