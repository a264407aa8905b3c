"""Measuring how hard questions are, with an engine that answers as told."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perl.evaluation.difficulty import (
    CHUNK,
    Difficulty,
    MeasuredFile,
    Measurement,
    check_measured,
    measure_chunks,
)
from perl.rewards.scorer import Scorer
from perl.rollout.engine import SamplingParams
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Example
from tests.messages import refused, tells
from tests.stand_ins import Asked, Call, TableEngine, darkest, example


def examples(count: int) -> list[Example]:
    """Of three pictures, the first the darkest."""
    return [example(f"q{i}", 10, 20, 30) for i in range(count)]


HOW: dict[str, Any] = {"rollouts": 10, "orders": 1, "seed": 0, "measure": "accuracy"}
HOW |= {"text": "slots", "temperature": 0.8, "max_new_tokens": 5, "min_pixels": 1, "max_pixels": 9}
HOW |= {"top_p": 0.9, "top_k": 7, "stop": ("!",)}
HOW |= {"instruction": "box", "instruction_in": "user", "system": ""}


def measure(
    answer: Callable[[Asked], str],
    asked: list[Example],
    scorer: Scorer | None = None,
    done: int = 0,
    **how: Any,
) -> tuple[list[Difficulty], list[Call]]:
    engine: Any = TableEngine(lambda one: rf"\boxed{{{answer(one)}}}")
    # Prompts of three pictures have nine words.
    encoder = PromptEncoder(engine.processor, PromptLimit(9, ""), "drop")
    measurement = Measurement(**{**HOW, **how})
    file = MeasuredFile(Path("none"), range(len(asked)), measurement, lambda i: f"q{i}", limit=9)
    file.accuracies = [0.0] * done
    chunks = measure_chunks(engine, encoder, asked, file, scorer or Scorer(("accuracy",), (1.0,)))
    return [difficulty for chunk in chunks for difficulty in chunk], engine.calls


def guess(asked: Asked) -> str:
    return "ABC"[asked.draw.integers(3)]


def test_the_share_of_right_completions() -> None:
    found, calls = measure(lambda asked: "A" if asked.number < 7 else "B", examples(40))
    assert found == [Difficulty(i, f"q{i}", 0.7, 10) for i in range(40)]
    assert [(len(c.variants), c.params.n) for c in calls] == [(32, 10), (8, 10)]
    assert {c.params for c in calls} == {SamplingParams(10, 0.8, 5, 0.9, 7, ("!",))}
    assert calls[0].seed != calls[1].seed


def test_completions_are_spread_over_orders_and_the_answer_follows() -> None:
    """Ten completions in four orders: 3, 3, 2 and 2, sampled by number."""
    found, calls = measure(lambda asked: darkest(asked.variant), examples(4), orders=4)
    assert found == [Difficulty(i, f"q{i}", 1.0, 10) for i in range(4)]
    assert sorted((len(c.variants), c.params.n) for c in calls) == [(8, 2), (8, 3)]
    assert len({c.seed for c in calls}) == 2
    assert calls[1].variants[0].order == (0, 1, 2)  # It has one of the larger shares.
    found, _ = measure(lambda asked: "A", examples(20), rollouts=12, orders=6)
    assert [d.accuracy for d in found] == pytest.approx([1 / 3] * 20)


def test_texts_follow_where_the_measurement_says_so() -> None:
    question = "<image> <image> Is the second image darker?"
    asked = example("q", 10, 20, question=question, answer="no", should_change=False)
    (found,), (call,) = measure(lambda a: "no", [asked], orders=2, text="references")
    texts = [v.messages[0].content for v in call.variants]
    assert texts == [question, question.replace("second", "first")] and found.accuracy == 1


def test_a_prompt_that_is_left_out_has_no_accuracy() -> None:
    asked = examples(3)
    asked[1] = example("long", 10, 20, 30, 40)
    found, _ = measure(lambda asked: darkest(asked.variant), asked)
    assert [d.rollouts for d in found] == [10, 0, 10] and math.isnan(found[1].accuracy)
    assert [d.accuracy for d in (found[0], found[2])] == [1, 1]
    found, calls = measure(guess, [asked[1]])
    assert [d.rollouts for d in found] == [0] and not calls


def test_a_measurement_that_goes_on_gives_the_same_numbers() -> None:
    settings: dict[str, Any] = {"rollouts": 5, "orders": 2, "seed": 3}
    asked = examples(2 * CHUNK)
    whole, calls = measure(guess, asked, **settings)
    again, _ = measure(guess, asked, **settings)
    rest, _ = measure(guess, asked, done=CHUNK, **settings)
    assert whole == again and rest == whole[CHUNK:]
    other, more = measure(guess, asked, **{**settings, "seed": 4})
    assert other != whole and len({c.seed for c in [*calls, *more]}) == 8
    orders = [[v.order for v in c.variants] for c in (calls[0], more[0])]
    assert orders[0] != orders[1]


@given(st.lists(st.sampled_from(["1", "0", "0.25", "none"]), min_size=1, max_size=6))
def test_the_mean_of_what_can_be_scored(given: list[str]) -> None:
    def graded(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float | None]:
        found = [text.removeprefix(r"\boxed{").removesuffix("}") for text in completions]
        return [None if text == "none" else float(text) for text in found]

    scorer = Scorer((graded,), (1.0,))
    (found,), _ = measure(
        lambda asked: given[asked.number], examples(1), rollouts=len(given), scorer=scorer
    )
    assert found.rollouts == len(given)
    scored = [float(text) for text in given if text != "none"]
    if scored:
        assert found.accuracy == pytest.approx(sum(scored) / len(scored))
    else:
        assert math.isnan(found.accuracy)


@pytest.mark.parametrize("points", [5.0, -0.5, 1.0, 0.0])
def test_a_measure_that_is_no_share_is_refused(points: float) -> None:
    def graded(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
        return [points] * len(completions)

    scorer = Scorer((graded,), (1.0,))
    if 0 <= points <= 1:
        ((found,), _) = measure(guess, examples(1), scorer=scorer)
        assert found.accuracy == points
        return
    with refused("'q0'", f"{points:g}", "'graded'", "0 to 1"):
        measure(guess, examples(1), scorer=scorer)


def opened(path: Path, count: int = 40, limit: int = 9, **options: Any) -> MeasuredFile:
    how = {**HOW, **{k: options.pop(k) for k in list(options) if k in HOW}}
    return MeasuredFile(
        path, range(count), Measurement(**how), lambda i: f"q{i}", limit=limit, **options
    )


def filled(path: Path, count: int, left_out: int | None = None, **options: Any) -> Path:
    """Question i has i right completions of 64, but one that was left out."""
    file = opened(path, **options)
    rows = [Difficulty(i, f"q{i}", i / 64, 10) for i in range(count)]
    if left_out is not None:
        rows[left_out] = Difficulty(left_out, f"q{left_out}", math.nan, 0)
    file.add(rows)
    assert file.done == count and file.sampled[:2] == [10, 10][:count]
    return path


@pytest.mark.parametrize(
    ("written", "count", "done"),
    [(0, 40, 0), (31, 40, 0), (32, 40, 32), (39, 40, 32), (40, 40, 40), (64, 70, 64), (69, 70, 64)],
)
def test_whole_chunks_count(written: int, count: int, done: int, tmp_path: Path) -> None:
    """32 questions each, the last one fewer; what follows them is cut off the file."""
    path = filled(tmp_path / "m.jsonl", written)
    lines = path.read_bytes().splitlines(keepends=True)
    file = opened(path, count)
    assert (file.done, file.accuracies) == (done, [round(i / 64, 6) for i in range(done)])
    assert file.sampled == [10] * done
    assert path.read_bytes() == b"".join(lines[:done])


def test_what_stands_in_a_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "m.jsonl", 2, left_out=None, model={"model": "m", "weights": "w"})
    opened(path, overwrite=True).add(
        [Difficulty(0, "q0", 1 / 3, 10), Difficulty(1, "q1", math.nan, 0)]
    )
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    how = {k: v for k, v in HOW.items() if k != "rollouts"}
    assert first == {
        **{"index": 0, "id": "q0", "accuracy": 0.333333, "rollouts": 10, "asked": 10},
        **{**how, "stop": ["!"], "max_prompt_tokens": 9},
    }
    assert (second["accuracy"], second["rollouts"], second["asked"]) == (None, 0, 10)


def test_a_question_that_may_fit_now_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "m.jsonl", 40, left_out=35)
    assert opened(path).done == 40 and not caplog.records
    assert math.isnan(opened(path).accuracies[35]) and opened(path).sampled[35] == 0
    with refused("max_prompt_tokens = 9", "max_prompt_tokens = 8", "--overwrite", "--accuracies"):
        opened(path, limit=8)
    assert opened(path, limit=10).done == 32
    (record,) = caplog.records
    tells(record.getMessage(), path, "1 questions", "max_prompt_tokens = 9", "question 32", "10")
    assert len(path.read_text().splitlines()) == 32
    # A file in which nothing was left out serves a higher limit as well; so does one in which all of it was, a lower one.
    assert opened(filled(tmp_path / "whole.jsonl", 40), limit=10).done == 40
    none = [Difficulty(i, f"q{i}", math.nan, 0) for i in range(2)]
    opened(tmp_path / "none.jsonl", 2).add(none)
    assert opened(tmp_path / "none.jsonl", 2, limit=8).done == 2


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"rollouts": 4}, ["rollouts = 10", "rollouts = 4"]),
        ({"seed": 1, "orders": 2}, ["orders = 1, seed = 0", "orders = 2, seed = 1"]),
        ({"model": {"model": "m", "weights": "v"}}, ["the weights = w", "the weights = v"]),
        ({"model": {"model": "n", "weights": ""}}, ["model = m", "model = n"]),
    ],
)
def test_other_settings_are_refused(
    changed: dict[str, Any], shown: list[str], tmp_path: Path
) -> None:
    model = {"model": "m", "weights": "w"}
    path = filled(tmp_path / "m.jsonl", 40, model=model)
    before = path.read_bytes()
    with refused(path, *shown, "--overwrite", "--accuracies"):
        opened(path, **{"model": model, **changed})
    with refused(path, *shown, "delete it"):
        opened(path, **{"model": model, "advice": "delete it", **changed})
    assert path.read_bytes() == before
    # A model is known by its weights, wherever it lies.
    assert opened(path, model={"model": "elsewhere", "weights": "w"}).done == 40
    assert opened(path, overwrite=True, **changed).done == 0 and not path.exists()


def test_files_of_something_else(tmp_path: Path) -> None:
    path = filled(tmp_path / "m.jsonl", 40)
    lines = path.read_text().splitlines(keepends=True)
    with refused(path, "--overwrite", "--accuracies"):
        opened(path, 39)
    for other in ({"id": "p39"}, {"index": 40}):
        path.write_text("".join([*lines[:39], json.dumps(json.loads(lines[39]) | other) + "\n"]))
        with refused(path, "--overwrite", "--accuracies"):
            opened(path)
    old = [json.dumps({k: v for k, v in json.loads(x).items() if k != "text"}) for x in lines]
    path.write_text("\n".join(old) + "\n")
    with refused(path, "text = None", "text = slots", "--overwrite"):
        opened(path)
    mine = tmp_path / "mine.jsonl"
    for row in ('{"index": 1}', '{"accuracy": 1}', "no JSON"):
        mine.write_text(f"{row}\n")
        for overwrite in (False, True):
            with refused(mine, "--accuracies"):
                opened(mine, overwrite=overwrite)
        with refused(mine, "delete it"):
            opened(mine, advice="delete it")
        assert mine.read_text() == f"{row}\n"


def test_what_nothing_can_be_said_of(caplog: pytest.LogCaptureFixture) -> None:
    nan = math.nan
    with refused("rows.jsonl", "limit = 5"):
        check_measured([nan, nan], [0, 0], "rows.jsonl", "accuracy", "limit = 5")
    with refused("rows.jsonl", "'accuracy'"):
        check_measured([nan, nan], [0, 4], "rows.jsonl", "accuracy", "limit = 5")
    check_measured([nan, 0.1, 0.0], [0, 4, 4], "rows.jsonl", "accuracy", "limit = 5")
    assert not caplog.records
    check_measured([nan, 0.0, 0.0], [0, 4, 4], "rows.jsonl", "accuracy", "limit = 5")
    (record,) = caplog.records
    tells(record.getMessage(), "2", "'accuracy'")
