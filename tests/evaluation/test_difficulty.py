"""Measuring how hard questions are, with an engine that answers as told."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.evaluation.difficulty import CHUNK, Difficulty, MeasuredFile, Measurement, measure_chunks
from perl.rewards.scorer import Scorer
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.rollout.prompts import PromptEncoder
from perl.types import Example, UserError, Variant


@dataclass
class Stub:
    """Engine, encoder and processor at once: prompts are variants, and completions number texts to be decoded."""

    answer: Callable[[Variant, np.random.Generator], str]
    calls: list[tuple[int, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def processor(self) -> Any:
        return self

    def encode(self, variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
        return [] if variants[0].example.id == "long" else [(v, v) for v in variants]

    def generate(
        self, prompts: Sequence[Variant], params: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        self.calls.append((len(prompts), params.n))
        draw = np.random.default_rng(seed)
        return [[self._completion(v, draw) for _ in range(params.n)] for v in prompts]

    def _completion(self, variant: Variant, draw: np.random.Generator) -> Completion:
        self.texts.append(rf"\boxed{{{self.answer(variant, draw)}}}")
        return Completion(np.array([len(self.texts) - 1]), np.zeros(1, np.float32), True)

    def decode(self, token_ids: np.ndarray) -> str:
        return self.texts[int(token_ids[0])]


def examples(count: int, images: int = 3) -> list[Example]:
    pictures = tuple(Image.new("L", (1, 1), k) for k in range(images))
    question = "A <image> B <image> C <image> Which is darkest?"
    return [Example(f"q{i}", pictures, question, "A", "all", True) for i in range(count)]


HOW: dict[str, Any] = {"rollouts": 10, "orders": 1, "seed": 0, "measure": "accuracy"}
HOW |= {"text": "slots", "temperature": 1.0, "max_new_tokens": 8, "min_pixels": 1, "max_pixels": 9}


def measure(
    stub: Stub, asked: list[Example], scorer: Scorer | None = None, done: int = 0, **how: Any
) -> list[Difficulty]:
    engine, encoder = cast(InProcessEngine, stub), cast(PromptEncoder, stub)
    measurement = Measurement(**{**HOW, **how})
    file = MeasuredFile(Path("none"), range(len(asked)), measurement, lambda i: f"q{i}", limit=9)
    file.accuracies = [0.0] * done
    scorer = scorer or Scorer(("accuracy",), (1.0,))
    chunks = measure_chunks(engine, encoder, asked, file, scorer)
    return [difficulty for chunk in chunks for difficulty in chunk]


def darkest(variant: Variant, draw: np.random.Generator) -> str:
    """The right answer in any order."""
    return "ABC"[[image.getpixel((0, 0)) for image in variant.images].index(0)]


def test_the_share_of_right_completions() -> None:
    def often_a(variant: Variant, draw: np.random.Generator) -> str:
        return "A" if len(stub.texts) % 10 < 7 else "B"

    stub = Stub(often_a)
    found = measure(stub, examples(40))
    assert [d.accuracy for d in found] == pytest.approx([0.7] * 40)
    assert [(d.index, d.id, d.rollouts) for d in found] == [(i, f"q{i}", 10) for i in range(40)]
    assert stub.calls == [(32, 10), (8, 10)]


def test_completions_are_spread_over_orders_and_the_answer_follows() -> None:
    stub = Stub(darkest)
    found = measure(stub, examples(4), rollouts=10, orders=4)
    assert [(d.accuracy, d.rollouts) for d in found] == [(1.0, 10)] * 4
    assert sorted(stub.calls) == [(8, 2), (8, 3)]
    first_slot = measure(Stub(lambda variant, draw: "A"), examples(20), rollouts=12, orders=6)
    assert [d.accuracy for d in first_slot] == pytest.approx([1 / 3] * 20)


def test_a_prompt_that_is_left_out_has_no_accuracy() -> None:
    asked = examples(3)
    asked[1] = Example("long", asked[1].images, asked[1].question, "A")
    found = measure(Stub(darkest), asked)
    assert [d.rollouts for d in found] == [10, 0, 10] and math.isnan(found[1].accuracy)


def test_a_measurement_that_goes_on_gives_the_same_numbers() -> None:
    def guess(variant: Variant, draw: np.random.Generator) -> str:
        return "ABC"[draw.integers(3)]

    settings: dict[str, Any] = {"rollouts": 5, "orders": 2, "seed": 3}
    asked = examples(2 * CHUNK)
    whole = measure(Stub(guess), asked, **settings)
    again = measure(Stub(guess), asked, **settings)
    rest = measure(Stub(guess), asked, done=CHUNK, **settings)
    assert whole == again and rest == whole[CHUNK:]
    one_order = [d.accuracy for d in measure(Stub(guess), asked, rollouts=5)]
    assert one_order[:CHUNK] != one_order[CHUNK:]  # Each chunk has draws of its own.
    assert measure(Stub(guess), asked, **{**settings, "seed": 4}) != whole


@given(st.lists(st.sampled_from(["1", "0", "0.25", "none"]), min_size=1, max_size=6))
def test_the_mean_of_what_can_be_scored(given: list[str]) -> None:
    def graded(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float | None]:
        found = [text.removeprefix(r"\boxed{").removesuffix("}") for text in completions]
        return [None if text == "none" else float(text) for text in found]

    stub = Stub(lambda variant, draw: given[len(stub.texts) % len(given)])
    scorer = Scorer((graded,), (1.0,))
    (found,) = measure(stub, examples(1), rollouts=len(given), scorer=scorer)
    assert found.rollouts == len(given)
    scored = [float(text) for text in given if text != "none"]
    if scored:
        assert found.accuracy == pytest.approx(sum(scored) / len(scored))
    else:
        assert math.isnan(found.accuracy)


def test_a_measure_that_is_no_share_is_refused() -> None:
    def points(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
        return [5.0] * len(completions)

    with pytest.raises(UserError, match=r"question 'q0' has a mean of 5 by .* 'points'"):
        measure(Stub(darkest), examples(1), scorer=Scorer((points,), (1.0,)))


def test_the_measurements_of_a_run_are_refused_with_its_own_advice(tmp_path: Path) -> None:
    def measured(seed: int, advice: str | None = None) -> MeasuredFile:
        how = Measurement(**{**HOW, "rollouts": 1, "seed": seed})
        return MeasuredFile(tmp_path / "m.jsonl", [0], how, lambda i: "q", limit=9, advice=advice)

    measured(0).add([Difficulty(0, "q", 0.5, 1)])
    assert measured(0).accuracies == [0.5]
    with pytest.raises(UserError, match=r"seed = 0, not seed = 1; delete it$"):
        measured(1, advice="delete it")
    with pytest.raises(UserError, match=r"measure again with --overwrite, or name another file"):
        measured(1)
    (tmp_path / "m.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"holds no accuracies; delete it$"):
        measured(0, advice="delete it")
