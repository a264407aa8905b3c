"""A run whose rewards read `<answer>` tags is measured by those wherever it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import INSTRUCTIONS, DataConfig, FilterConfig, RewardConfig
from tests.command_line import ErrorOf, json_lines, run
from tests.messages import tells
from tests.stand_ins import Asked, TableEngine
from tests.training.two_tokens import Letters, config_of, stand_in, train_in

TAGS = "accuracy(tags=True)"
Trained = Callable[..., Path]


def tagged(asked: Asked) -> str:
    """What is right, and in the thoughts and in a box what is not."""
    return (
        rf"<think>\boxed{{Z}}, or the answer is Z?</think> <answer>{asked.variant.answer}</answer>"
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for k in range(3):
        Image.new("L", (1, 1), k).save(tmp_path / f"{k}.png")
    row = {"kind": "all", "question": "A <image> B <image> Which is darkest?", "answer": "A"}
    rows = [{"id": f"q{k}", **row, "images": ["0.png", f"{k}.png"]} for k in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def of_tags(engine: TableEngine, trained: Trained, data: Path) -> Path:
    """A run whose model answers in tags; its own data are others."""
    engine.answer = tagged
    reward = RewardConfig(functions=(TAGS, "format_tags"), weights=(0.9, 0.1))
    return trained(reward=reward, data=DataConfig(train=str(data), eval=str(data)))


def yes_or_no(self: Letters, ids: Sequence[int]) -> str:
    return f"<think>\\boxed{{Z}}</think><answer>{['yes', 'no'][ids[0]]}</answer>"


@pytest.mark.parametrize(("answer", "accuracy"), [("yes", 1), ("no", 0)])
def test_in_a_run(
    answer: str, accuracy: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, along the way, and after; the policy says yes in every order."""
    stand_in(monkeypatch)
    monkeypatch.setattr(Letters, "decode", yes_or_no)
    monkeypatch.setattr(
        "tests.training.two_tokens.TwoTokens.logprobs",
        lambda self: self.gain.new_tensor([0.0, -99.0]),
    )
    more = f'eval = {{ examples = 6, samples = 2, every = 1 }}\nreward = {{ functions = ["{TAGS}"], weights = [] }}\ntrain.steps = 1\nfilter.measure = "accuracy"'
    config = config_of(tmp_path, more)
    rows = json_lines(tmp_path / "data.jsonl")
    own = {"answer": answer, "should_change": False, "question": "<image> <image> Is one darker?"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r | own) + "\n" for r in rows))
    summary = train_in(tmp_path / "run", config)
    metrics = json_lines(tmp_path / "run" / "metrics.jsonl")
    found = [r for r in metrics if r["stage"] == "evaluate"]
    assert [r["at"] for r in found] == ["before", "after"]
    for row in found:
        assert (row["accuracy"], row["greedy"], row["accuracy_by"]) == (accuracy, accuracy, TAGS)
        assert (row["consistency"], row["greedy_consistency"], row["unread"]) == (1, 1, 0)
    assert {r["consistency"] for r in metrics if r["stage"] == "rl"} == {1}
    assert (summary["accuracy_after"], summary["accuracy_by"]) == (accuracy, TAGS)


def numbers(model: Path, folder: Path, *options: object) -> dict[str, Any]:
    out = folder / "out.json"
    assert run("evaluate", model, *options, "--output", out) == 0
    return json.loads(out.read_text())


ALL_RIGHT = {"accuracy": 1, "greedy": 1, "consistency": 1, "format": None, "unread": 0}


def test_by_evaluate(of_tags: Path, data: Path, tmp_path: Path) -> None:
    """The run, and its model, on the run's data and on others."""
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace('"id": "q', '"id": "r'))
    for model in (of_tags, of_tags / "models" / "final"):
        for options in ((), ("--data", other)):
            found = numbers(model, tmp_path, *options)
            assert {k: found[k] for k in ALL_RIGHT} == ALL_RIGHT
            assert found["reward/format_tags"] == 1


def test_a_model_that_is_no_run_s(
    engine: TableEngine,
    without_weights: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error_of: ErrorOf,
) -> None:
    """It is asked for a box and read by it; else what is to read it is named, and the question asks for that."""
    engine.answer = tagged
    asked = (without_weights, tmp_path, "--data", data)
    found = numbers(*asked)
    # What the box says, Z.
    assert (found["accuracy"], found["consistency"], found["unread"]) == (0, 0, 0)
    found = numbers(*asked, "--functions", TAGS)
    assert {k: found[k] for k in ALL_RIGHT} == ALL_RIGHT
    assert engine.calls[-1].variants[0].messages[-1].content.endswith(INSTRUCTIONS["think-tags"])
    engine.answer = lambda asked: r"\boxed{A}"
    capsys.readouterr()
    found = numbers(*asked, "--functions", TAGS, "choice")
    assert (found["accuracy"], found["unread"], found["reward/choice"]) == (0, 1, 0.5)
    tells(capsys.readouterr().out, "100.0", TAGS, data, "data.instruction", "reward.functions")
    tells(
        error_of("evaluate", without_weights, "--data", data, "--functions", "acuracy"),
        "acuracy",
        "accuracy",
    )


def test_a_run_measured_by_other_functions(
    engine: TableEngine, trained: Trained, data: Path, tmp_path: Path
) -> None:
    """Its own filter, and the weights of its groups, go by a function that is not among them."""
    engine.answer = tagged
    reward = RewardConfig(
        functions=("choice", "format"),
        weights=(1.0, 1.0),
        group_weight="exp",
        group_weight_of="choice",
    )
    own = FilterConfig(measure="choice", min_accuracy=0.1)
    run = trained(reward=reward, filter=own, data=DataConfig(eval=str(data)))
    assert numbers(run, tmp_path)["accuracy"] == 1
    found = numbers(run, tmp_path, "--functions", "ordering")
    assert (found["accuracy"], found["format"], found["reward"]) == (1, None, 1)


def test_by_filter(
    of_tags: Path, data: Path, without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perl.evaluation.selection._draw", lambda *_: None)
    for model, options in ((of_tags, ()), (without_weights, ("--data", data, "--measure", TAGS))):
        assert (
            run("filter", model, *options, "--orders", 2, "--histogram", "uniform", "--overwrite")
            == 0
        )
        measured = json_lines(data.with_name("rows.accuracies.jsonl"))
        assert [(row["accuracy"], row["measure"]) for row in measured] == [(1.0, TAGS)] * 2


def test_by_benchmarks(of_tags: Path, root: Path, engine: TableEngine, tmp_path: Path) -> None:
    """Asked as the run is, or officially, all eight read the tags; of ReMI's one gold answer is several ("1,3")."""
    for instruction, ends in (("think", INSTRUCTIONS["think-tags"]), ("official", "directly.")):
        out = tmp_path / instruction
        words = ("--suite", "all", "--suite-root", root, "--instruction", instruction)
        engine.calls.clear()
        assert run("evaluate", of_tags, *words, "--output", out) == 0
        assert engine.calls[0].variants[0].messages[-1].content.endswith(ends)
        found = json.loads((out / "summary.json").read_text())["suites"]
        assert {
            name: values["accuracy"] for name, values in found.items() if values["accuracy"] < 1
        } == {"remi": pytest.approx(5 / 6)}
        assert {values["unread"] for values in found.values()} == {0}
