"""Held-out examples in every order of their pictures: what is asked, what is counted, what a command tells of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import (
    INSTRUCTIONS,
    Config,
    DataConfig,
    EvalConfig,
    FilterConfig,
    PermutationConfig,
    RewardConfig,
    RolloutConfig,
)
from perl.evaluation.evaluate import ExampleResult, Scored, aggregate, evaluate, unmeasured
from perl.rewards.scorer import Scorer
from perl.rollout.engine import SamplingParams
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Example
from tests.command_line import ErrorOf, run
from tests.messages import refused, tells
from tests.stand_ins import Asked, TableEngine, example


def measured(
    answer: Callable[[Asked], str], *examples: Example, **sections: Any
) -> tuple[list[ExampleResult], list[Scored], TableEngine]:
    rollout = RolloutConfig(max_new_tokens=4, temperature=0.3, top_p=0.5, top_k=2, stop=("!",))
    config = Config(**{"rollout": rollout, **sections})
    engine: Any = TableEngine(answer)
    encoder = PromptEncoder(engine.processor, PromptLimit.to_generate(config), config.data.overlong)
    results, shown = evaluate(engine, encoder, examples, range(len(examples)), config)
    return results, shown, engine


def by_hand(asked: Asked) -> str:
    """Of two samples the first says A, the second what is right; the greedy completion says A, well formed."""
    if asked.params.temperature == 0:
        return r"<think></think>\boxed{A}"
    letter = "A" if asked.number == 0 else asked.variant.answer
    return (
        rf"<think></think>\boxed{{{letter}}}"
        if asked.variant.order == (0, 1)
        else rf"\boxed{{{letter}}}"
    )


def test_numbers_by_hand() -> None:
    """Right are A and B. Samples say A, A and A, B, that is picture 1, 1 and 2, 1; greedy ones A and A, picture 1 and 2."""
    (one, single), shown, _ = measured(
        by_hand, example("q", 10, 20, task="t"), example("s", 10), eval=EvalConfig(samples=2)
    )
    assert replace(one, content="", pictures="") == ExampleResult(
        id="q",
        task="t",
        accuracy=3 / 4,
        greedy=1 / 2,
        consistency=2 / 4,
        greedy_consistency=0.0,
        format=2 / 4,
        orders=2,
        unread=0.0,
        rewards={
            **{"reward/accuracy": 3 / 4, "reward/format": 2 / 4},
            **{"greedy_reward/accuracy": 1 / 2, "greedy_reward/format": 1},
            "reward": pytest.approx(0.9 * 3 / 4 + 0.1 * 2 / 4),
            "greedy_reward": pytest.approx(0.9 / 2 + 0.1),
        },
    )
    assert (single.accuracy, single.greedy, single.orders) == (1, 1, 1)
    assert math.isnan(single.consistency) and math.isnan(single.greedy_consistency)
    assert [(s.rollout.variant.order, s.rollout.text, s.parts) for s in shown] == [
        ((0, 1), r"<think></think>\boxed{A}", {"accuracy": 1, "format": 1}),
        ((1, 0), r"\boxed{A}", {"accuracy": 0, "format": 0}),
        ((0,), r"\boxed{A}", {"accuracy": 1, "format": 0}),
    ]
    assert [s.reward for s in shown] == pytest.approx([1.0, 0.0, 0.9])


def test_what_the_model_is_asked() -> None:
    """Chunks of 32 examples are sampled at temperature 1 from all tokens, each with a seed of its own, and then greedily."""
    results, shown, engine = measured(
        by_hand,
        *(example(f"q{i}", 10, 20) for i in range(33)),
        example("q0", 10, 20, 30, 40),
        eval=EvalConfig(samples=3, max_orders=5),
    )
    calls = engine.calls
    sampled = SamplingParams(3, 1.0, 4, stop=("!",))
    greedy = SamplingParams(1, 0.0, 4, stop=("!",))
    assert [c.params for c in calls] == [sampled, greedy] * 2
    assert [len(c.variants) for c in calls] == [64, 64, 7, 7]
    assert calls[0].seed != calls[2].seed
    # Equal ids stay two examples, and the original order is one of those that are drawn.
    assert [r.id for r in results] == [*(f"q{i}" for i in range(33)), "q0"]
    assert [r.orders for r in results] == [2] * 33 + [5]
    orders = [v.order for v in calls[2].variants]
    assert orders[:3] == [(0, 1), (1, 0), (0, 1, 2, 3)] and len(set(orders)) == 7
    assert len(shown) == 64  # The first chunk's.
    again = measured(
        by_hand,
        *(example(f"q{i}", 10, 20) for i in range(33)),
        example("q0", 10, 20, 30, 40),
        eval=EvalConfig(samples=3, max_orders=5),
    )[2]
    assert [(c.seed, c.params) for c in again.calls] == [(c.seed, c.params) for c in calls]
    assert [v.order for v in again.calls[2].variants] == orders


def test_examples_are_taken_by_index_a_few_at_a_time() -> None:
    class Counting(list[Example]):
        loaded = 0

        def __getitem__(self, i: Any) -> Any:
            self.loaded += 1
            return super().__getitem__(i)

    data, config = Counting(example(f"q{i}", 1) for i in range(70)), Config()
    engine: Any = TableEngine(lambda asked: "")
    encoder = PromptEncoder(engine.processor, PromptLimit(99, ""), "error")
    told: list[tuple[int, int]] = []
    results, shown = evaluate(
        engine,
        encoder,
        data,
        range(69, 1, -2),
        config,
        lambda done: told.append((done, data.loaded)),
    )
    assert [r.id for r in results] == [f"q{i}" for i in range(69, 1, -2)]
    assert told == [(32, 32), (2, 34)] and len(shown) == 32


def test_examples_over_the_budget_are_left_out() -> None:
    """Prompts of two pictures have 7 words, those of three 9."""
    config = {"data": DataConfig(max_prompt_tokens=8, overlong="drop")}
    two, three = (10, 20), (10, 20, 30)
    data = [example("a", *three), example("b", *two), example("c", *three), example("d", *two)]
    results, shown, _ = measured(
        lambda asked: rf"\boxed{{{asked.variant.answer}}}", *data, **config
    )
    assert [(r.id, r.accuracy, r.greedy) for r in results] == [("b", 1, 1), ("d", 1, 1)]
    assert [s.rollout.variant.example.id for s in shown] == ["b", "b", "d", "d"]
    results, *_ = measured(by_hand, data[0], **config)
    with refused("data.max_prompt_tokens", "train.tokens_per_micro_batch", "model.max_pixels"):
        aggregate(results)


def test_texts_follow_where_the_run_says_so() -> None:
    question = "<image> <image> Is the second image darker?"
    asked = example("q", 10, 20, question=question, answer="no", should_change=False)
    references = PermutationConfig(text="references")
    *_, engine = measured(by_hand, asked, permutation=references)
    for call in engine.calls:
        texts = [v.messages[0].content for v in call.variants]
        assert texts == [question, question.replace("second", "first")]


def tens(completions: list[str], **_: Any) -> list[float | None]:
    """10 for A, nothing for B, else a fault."""
    scores = {"A": 10.0, "B": None}
    return [scores.get(c[-2:-1], math.nan) for c in completions]


def fails(completions: list[str], **_: Any) -> list[float]:
    raise RuntimeError("no")


TENS, FAILS = (f"{__name__}:{name}" for name in ("tens", "fails"))


@pytest.mark.parametrize(
    ("functions", "form", "numbers"),
    [
        # Samples say A and A, picture 1 and 2; right are A and B.
        (["accuracy(tags=True)"], "<answer>A</answer>", (1 / 2, 0.0, 1 / 2)),
        (["accuracy(tags=True)"], r"\boxed{A}", (0.0, 0.0, 0.0)),
        (["accuracy"], "<answer>A</answer>", (0.0, 0.0, 0.0)),
        (["choice"], "<answer>A</answer>", (1 / 2, 0.0, 1 / 2)),
        (["ordering"], "<answer>A</answer>", (1 / 2, 0.0, 1 / 2)),
        (["ordering(kendall=True)"], "<answer>A</answer>", (None, 0.0, 1 / 2)),
        # Where no function reads a right answer nothing is called accuracy, and nothing consistency.
        (["box_iou"], r"\boxed{A}", (None, None, None)),
        ([TENS], r"\boxed{A}", (None, None, 10.0)),
        ([TENS], r"\boxed{B}", (None, None, None)),
        ([FAILS], r"\boxed{A}", (None, None, None)),
        (["accuracy", TENS], r"\boxed{A}", (1 / 2, 0.0, 1 / 2 + 20.0)),
        # One of them fails: the completion has no sum, but the other's score.
        (["accuracy", TENS], r"\boxed{Z}", (0.0, 0.0, None)),
    ],
)
def test_what_is_right_is_what_the_run_is_rewarded_for(
    functions: list[str], form: str, numbers: tuple[float | None, ...]
) -> None:
    reward = RewardConfig(functions=tuple(functions), weights=(1.0, 2.0)[: len(functions)])
    results, *_ = measured(lambda _: form, example("q", 10, 20), reward=reward)
    found = aggregate(results)
    assert (found["accuracy"], found["consistency"], found["reward"]) == numbers
    assert found["greedy"] == found["accuracy"] and found["greedy_reward"] == found["reward"]
    assert found["unscored"] == (4 if numbers[2] is None else 0)


def test_of_several_accuracies_the_one_that_is_measured_counts() -> None:
    both = ("accuracy", "accuracy(tags=True)")
    for measure, accuracy in (("accuracy", 0.0), (both[1], 1 / 2), ("format", 0.0)):
        results, *_ = measured(
            lambda _: "<answer>A</answer>",
            example("q", 10, 20),
            reward=RewardConfig(functions=both, weights=(1.0, 1.0)),
            filter=FilterConfig(measure=measure),
        )
        assert results[0].accuracy == accuracy


def test_answers_that_nobody_knows_have_no_accuracy() -> None:
    (one,), *_ = measured(lambda _: r"\boxed{A}", replace(example("q", 10, 20), answer=""))
    assert math.isnan(one.accuracy) and one.consistency == 0 and one.format == 0
    assert one.rewards["reward"] == 0  # of the form alone


def accuracy(completions: list[str], **columns: Any) -> list[float]:
    """A user's own."""
    return [float("A" in text) for text in completions]


@pytest.mark.parametrize(
    ("functions", "answer", "names"),
    [
        (["accuracy"], "A", []),
        (["box_iou"], "A", ["accuracy", "greedy", "consistency", "reward.functions"]),
        (["choice"], "A", []),
        (["ordering(kendall=True)"], "A", ["accuracy", "greedy", "reward.functions"]),
        (["tests.evaluation.test_evaluate:accuracy"], "A", ["consistency", "filter.measure"]),
        (["choice", "ordering"], "A", ["accuracy", "greedy", "choice, ordering", "filter.measure"]),
        (["accuracy(tags=True)"], "A", ["accuracy(tags=True)", 0, "data.instruction"]),
        (["accuracy"], "", ["accuracy", "greedy", "data.map"]),
        (["accuracy(tags=True)", "accuracy(tags=False)"], "A", ["accuracy", "filter.measure"]),
    ],
)
def test_why_there_is_no_accuracy(functions: list[str], answer: str, names: list[str]) -> None:
    reward = RewardConfig(functions=tuple(functions), weights=(1.0,) * len(functions))
    one = replace(example("q", 10, 20), answer=answer)
    results, *_ = measured(lambda _: r"\boxed{A}", one, reward=reward)
    scorer = Scorer(reward.functions, reward.weights)
    said = unmeasured(aggregate(results), Config(reward=reward), scorer)
    assert bool(said) == bool(names) and (
        not said or ("consistency" in said) == ("consistency" in names)
    )
    if said:
        tells(said, *names)


def test_formulas_that_are_equal_are_one_answer() -> None:
    """In one order the sampled and the greedy completion say it in one way, in the other order in another."""
    asked = example("q", 10, 20, question="<image> <image> How long?", should_change=False)
    asked = replace(asked, answer=r"2\sqrt{3}")
    ways = {(0, 1): r"\sqrt{12}", (1, 0): r"\sqrt{4 \cdot 3}"}
    for function, accuracy, consistency in (("math", 1, 1), ("accuracy", 0, 0)):
        reward = RewardConfig(functions=(function,), weights=(1.0,))
        results, *_ = measured(
            lambda a: rf"\boxed{{{ways[a.variant.order]}}}", asked, reward=reward
        )
        found = aggregate(results)
        assert (found["accuracy"], found["greedy"]) == (accuracy, accuracy)
        assert (found["consistency"], found["greedy_consistency"]) == (consistency, consistency)


def test_with_the_weight_0_all_three_are_back() -> None:
    reward = RewardConfig(functions=(TENS, "accuracy"), weights=(1.0, 0.0))
    results, *_ = measured(lambda _: r"\boxed{A}", example("q", 10, 20), reward=reward)
    found = aggregate(results)
    assert (found["accuracy"], found["greedy"], found["consistency"]) == (0.5, 0.5, 0.0)


def result(task: str, accuracy: float, consistency: float = 0.5, orders: int = 2) -> ExampleResult:
    rewards = {"reward": 4 * accuracy}
    means = (accuracy, 0.25, consistency, 1.0, 0.0, orders)
    return ExampleResult("q", task, *means, rewards=rewards, unscored=1)


def test_means_in_all_and_by_task() -> None:
    nan = math.nan
    found = aggregate(
        [result("a", 1.0), result("", 0.0, nan, 1), result("b", 0.0, nan, 1), result("a", 1 / 3)]
    )
    same = {"greedy": 0.25, "greedy_consistency": 1.0, "format": 0.0, "unread": None}
    assert found == {
        **same,
        "accuracy": 0.333333,
        "consistency": 0.5,  # of those that have one
        "orders": 1.5,
        "examples": 4,
        "reward": 1.333333,
        "unscored": 4,
        "by_task": {
            "a": {
                **{**same, "accuracy": 0.666667, "consistency": 0.5, "orders": 2, "examples": 2},
                **{"reward": 2.666667, "unscored": 2},
            },
            "b": {
                **{**same, "accuracy": 0.0, "consistency": None, "orders": 1, "examples": 1},
                **{"reward": 0.0, "unscored": 1},
            },
        },
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions over two pictures and a longer one over three; the darkest is right."""
    rows = []
    for number, count in enumerate((2, 3, 2)):
        names = [f"{20 * k}.png" for k in range(count)]
        for k, name in enumerate(names):
            Image.new("RGB", (1, 1), (20 * k,) * 3).save(tmp_path / name)
        slots = " ".join(f"{letter} <image>" for letter in "ABC"[:count])
        row = {
            "kind": "all",
            "id": f"q{number}",
            "question": f"{slots} Which is darkest?",
            "images": names,
        }
        rows.append(json.dumps({**row, "answer": "A", "task": f"of {count}"}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return tmp_path / "rows.jsonl"


def test_the_command_tells_and_writes_its_numbers(
    data: Path, engine: TableEngine, without_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are always right; greedy completions say A, which is right in 1/2 and 1/3 of the orders."""
    engine.answer = lambda asked: (
        r"\boxed{A}" if asked.params.temperature == 0 else rf"\boxed{{{asked.variant.answer}}}"
    )
    out = data.with_name("out.json")
    words = ("evaluate", without_weights, "--data", data, "--output", out, "--max-new-tokens", 7)
    assert run(*words, "--eval.samples", 2) == 0
    last = engine.calls[0].variants[0].messages[0].content.splitlines()[-1]
    assert last == INSTRUCTIONS["think-box"]
    assert [(c.params.n, c.params.max_new_tokens) for c in engine.calls] == [(2, 7), (1, 7)]
    numbers = json.loads(out.read_text())
    assert (numbers["examples"], numbers["accuracy"], numbers["consistency"]) == (3, 1.0, 1.0)
    assert numbers["greedy"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3, abs=1e-6)
    wanted = {
        **{"id": "q1", "task": "of 3", "orders": 6, "format": 0.0},
        **{"accuracy": 1.0, "greedy": pytest.approx(1 / 3), "consistency": 1.0},
        "rewards": {
            **{"reward": pytest.approx(0.9), "reward/accuracy": 1.0, "reward/format": 0.0},
            **{"greedy_reward": pytest.approx(0.3), "greedy_reward/format": 0.0},
            "greedy_reward/accuracy": pytest.approx(1 / 3),
        },
        "unscored": 0,
    }
    assert {k: numbers["by_example"][1][k] for k in wanted} == wanted
    assert numbers["settings"]["rollout.max_new_tokens"] == 7
    said = capsys.readouterr()
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "task examples orders accuracy greedy consistency reward format" in lines
    assert "of 3 1 6 100.0 % 33.3 % 100.0 % 0.900 0.000" in lines
    assert "all 3 3.33 100.0 % 44.4 % 100.0 % 0.900 0.000" in lines
    tells(said.out, "by accuracy", "0.9 accuracy + 0.1 format")
    tells(said.err, "3 examples")
    words = (*words, "--instruction", "")
    assert run(*words, "--max-prompt-tokens", 8, "--overlong", "drop", "--eval.max-orders", 1) == 0
    said = capsys.readouterr()
    tells(said.out, "1", "data.max_prompt_tokens = 8")
    assert [(r["id"], r["consistency"]) for r in json.loads(out.read_text())["by_example"]] == [
        ("q0", None),
        ("q2", None),
    ]
    assert "all 2 1 100.0 % 100.0 % 0.900 0.000" in [
        " ".join(x.split()) for x in said.out.splitlines()
    ]


def test_columns_of_other_data_have_other_names(
    data: Path, engine: TableEngine, trained: Callable[..., Path]
) -> None:
    run_folder = trained(data=DataConfig(train="x", map=("answer=gold",)))
    data.write_text(data.read_text().replace('"answer"', '"truth"'))
    out = data.with_name("out.json")
    engine.answer = lambda asked: rf"\boxed{{{asked.variant.answer}}}"
    words = ("--data", data, "--map", "answer=truth", "--output", out)
    assert run("evaluate", run_folder, *words) == 0
    assert json.loads(out.read_text())["accuracy"] == 1
    elsewhere = out.parent / "texts" / "rows.jsonl"
    elsewhere.parent.mkdir()
    data.rename(elsewhere)
    words = ("--data", elsewhere, *words[2:], "--image-root", out.parent)
    assert run("evaluate", run_folder, *words) == 0


def test_what_evaluate_refuses(
    data: Path, engine: TableEngine, without_weights: Path, error_of: ErrorOf
) -> None:
    for options, names in (
        (("--eval.examples", 0), ["eval.examples = 0", "1"]),
        (("--output", data), ["--output", data]),
        (
            ("--max-prompt-tokens", 6, "--overlong", "drop"),
            ["data.max_prompt_tokens", "model.max_pixels"],
        ),
    ):
        tells(error_of("evaluate", without_weights, "--data", data, *options), *names)


@pytest.mark.slow
def test_what_a_run_was_set_to_holds_when_its_model_is_asked(
    data: Path,
    trained: Callable[..., Path],
    tiny_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    error_of: ErrorOf,
) -> None:
    """A real model, which is asked by `evaluate` and by `generate`."""
    own = DataConfig(eval=str(data), max_prompt_tokens=5)
    folder = trained(data=own, rollout=RolloutConfig(max_new_tokens=1))
    shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), folder / "models" / "final", dirs_exist_ok=True)
    tells(
        error_of("evaluate", folder),
        "q0",
        "data.max_prompt_tokens = 5",
        "--max-prompt-tokens",
        "--overlong drop",
    )
    assert run("evaluate", folder, "--max-prompt-tokens", 99, "--eval.examples", 2) == 0
    tells(capsys.readouterr().err, "2 examples")
    assert run("generate", folder, "--prompt", "three", "--n", "8") == 0
    tells(capsys.readouterr().out, "cut at 1 tokens")


def test_help_shows_what_evaluate_uses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--help") == 0
    said = capsys.readouterr().out
    assert "--eval.samples" in said and "--eval.every" not in said
