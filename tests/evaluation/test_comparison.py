"""`perl-rl compare` of two evaluations on the same held-out examples."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import Config, EvalConfig
from perl.evaluation.comparison import (
    Pair,
    changed_rows,
    compare_pairs,
    comparison_rows,
    read_pairs,
)
from perl.evaluation.evaluate import ExampleResult, aggregate, content_of
from perl.evaluation.record import SETTINGS, read_evaluation, save_evaluation
from tests.command_line import ErrorOf, run
from tests.messages import tells
from tests.stand_ins import example
from tests.training.two_tokens import config_of, stand_in, train_in

NAN = float("nan")


def result(id: str, greedy: float, accuracy: float, **fields: Any) -> ExampleResult:
    one = ExampleResult(id, "which", accuracy, greedy, NAN, NAN, 1.0, 2)
    return replace(one, **{"content": f"content {id}", "pictures": f"pictures {id}", **fields})


def saved(path: Path, *results: ExampleResult, **settings: Any) -> Path:
    config = Config(eval=EvalConfig(**settings))
    save_evaluation(path, results, aggregate(results), config)
    return path


FIRST = [("a", 1.0, 0.5), ("b", 0.0, 0.25), ("c", 0.0, 0.5), ("d", 1.0, 1.0), ("e", 1.0, 0.75)]
SECOND = [("a", 1.0, 0.5), ("b", 1.0, 0.75), ("c", 1.0, 0.5), ("d", 1.0, 0.0), ("e", 0.0, 0.75)]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return tuple(  # type: ignore[return-value]
        saved(tmp_path / f"{name}.json", *(result(*scores) for scores in rows))
        for name, rows in (("first", FIRST), ("second", SECOND))
    )


def test_the_same_examples_are_paired(both: tuple[Path, Path], capsys: Any) -> None:
    """Greedy: two of five better, one worse, and four splits of eight as uneven as that: p = 1."""
    pairs, remarks = read_pairs(*both)
    found = compare_pairs(pairs)
    assert remarks == [] and list(found) == ["accuracy", "greedy", "format"]
    greedy = found["greedy"]
    assert (greedy.items, greedy.first_only, greedy.second_only, greedy.p) == (5, 1, 2, 1)
    assert (greedy.first, greedy.second) == (0.6, 0.8)
    assert greedy.interval == (pytest.approx(-0.4), pytest.approx(0.8))
    sampled = found["accuracy"]
    assert (sampled.first_only, sampled.second_only) == (1, 1)
    assert sampled.difference == pytest.approx(-0.1)
    assert comparison_rows(found)[2] == [
        *("greedy, %", "5", "60.0", "80.0", "+20.0", "-40.0 to +80.0", "1", "1", "2"),
    ]
    assert changed_rows(pairs, 3)[1:] == [
        ["b", "which", "0.0", "100.0", "25.0", "75.0"],
        ["c", "which", "0.0", "100.0", "50.0", "50.0"],
        ["e", "which", "100.0", "0.0", "75.0", "75.0"],
    ]
    assert [row[0] for row in changed_rows(pairs, 9)[1:]] == ["b", "c", "e", "d"]
    assert run("compare", *both, "--changed", 1) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert ["b", "which", "0.0", "100.0", "25.0", "75.0"] in lines and "c" not in [
        x[:1] for x in lines
    ]
    tells(said, both[0], both[1], "p", "sign test")


def test_questions_about_the_same_pictures_are_drawn_together(tmp_path: Path) -> None:
    """Five questions that all changed alike, about one set of pictures or about five."""
    wide = []
    for name in ("shared", "own"):
        rows = [
            [result(f"{k}", 0.0, (k < 3) * side) for k in range(5)] for side in (0.0, 1.0)
        ]  # fmt: skip
        if name == "shared":
            rows = [[replace(r, pictures="one") for r in of_side] for of_side in rows]
        files = [saved(tmp_path / f"{name}{i}.json", *r) for i, r in enumerate(rows)]
        wide.append(compare_pairs(read_pairs(files[0], files[1])[0])["accuracy"].interval)
    assert wide[0] == (pytest.approx(0.6), pytest.approx(0.6)) and wide[1] == (0.2, 1.0)


def test_rewards_are_measures_too(tmp_path: Path) -> None:
    rows = [
        asdict(result("a", 1.0, 1.0))
        | {"unscored": 3, "rewards": {"reward": None, "reward/brief": s, "reward/accuracy": s}}
        for s in (0.25, 2.0)
    ]
    for name, row in zip("xy", rows, strict=True):
        record = {"settings": {}, "by_example": [row]}
        (tmp_path / f"{name}.json").write_text(
            json.dumps(record, default=str).replace("NaN", "null")
        )
    found = compare_pairs(read_pairs(tmp_path / "x.json", tmp_path / "y.json")[0])
    assert list(found) == ["accuracy", "greedy", "format", "reward/brief"]
    assert comparison_rows({"reward/brief": found["reward/brief"]})[1] == [
        *("reward/brief", "1", "0.250", "2.000", "+1.750", "+1.750 to +1.750", "1", "0", "1"),
    ]


def test_without_an_accuracy_rewards_say_what_changed() -> None:
    pairs = [
        Pair(id, "", id, {"greedy_reward": 1.0, "reward": 0.5}, {"greedy_reward": g, "reward": r})
        for id, g, r in (("a", 1.0, 0.5), ("b", 1.0, 2.5), ("c", 0.5, 0.5))
    ]
    heading, *rows = changed_rows(pairs, 5)
    assert heading == ["example", "task", "greedy_reward: 1st", "2nd", "reward: 1st", "2nd"]
    assert rows == [
        ["c", "", "1.000", "0.500", "0.500", "0.500"],
        ["b", "", "1.000", "1.000", "0.500", "2.500"],
    ]


def test_what_one_side_lacks_has_not_changed() -> None:
    rewarded = {"greedy_reward": 1.0, "reward": 0.5}
    pairs = [Pair("a", "", "a", {**rewarded, "greedy": 1.0, "accuracy": 1.0}, rewarded)]
    assert changed_rows(pairs, 5)[1:] == []
    pairs = [*pairs, Pair("b", "", "b", {"reward": 1.0}, {"reward": 2.0})]
    assert changed_rows(pairs, 5)[1:] == [["b", "", "-", "-", "1.000", "2.000"]]


def test_what_differs_is_said(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.json", *(result(k, 1.0, 1.0) for k in "abc"), samples=1)
    other = saved(tmp_path / "other.json", *(result(k, 1.0, 1.0) for k in "bcde"), samples=4)
    pairs, remarks = read_pairs(one, other)
    assert [pair.id for pair in pairs] == ["b", "c"]
    tells(remarks[0], "eval.samples", "1", "4")
    tells(remarks[1], "1", "1st")
    tells(remarks[2], "2", "2nd")
    assert len(remarks) == 3
    settings, _ = read_evaluation(one)
    assert tuple(settings) == SETTINGS and settings["eval.samples"] == 1


def test_questions_that_share_an_id_are_all_compared(tmp_path: Path) -> None:
    rows = [
        result("zoo", score, score, content=content) for content, score in (("x", 1.0), ("y", 0.0))
    ]
    one = saved(tmp_path / "one.json", *rows, result("b", 1.0, 1.0))
    other = saved(tmp_path / "other.json", *rows[::-1], result("b", 0.0, 1.0))
    greedy = compare_pairs(read_pairs(one, other)[0])["greedy"]
    assert (greedy.items, greedy.first_only, greedy.second_only) == (3, 1, 0)


def test_what_cannot_be_compared(
    both: tuple[Path, Path], tmp_path: Path, error_of: ErrorOf
) -> None:
    first, second = both
    elsewhere = saved(tmp_path / "elsewhere.json", result("z", 1.0, 1.0))
    tells(error_of("compare", first, elsewhere), first, elsewhere, "data.eval")
    changed = saved(tmp_path / "changed.json", result("b", 1.0, 1.0, content="new"))
    tells(error_of("compare", first, changed), "example b", "data.eval")
    (tmp_path / "old.json").write_text(json.dumps({"by_example": [{"id": "a"}], "settings": {}}))
    tells(
        error_of("compare", first, tmp_path / "old.json"), tmp_path / "old.json", "evaluate again"
    )
    (tmp_path / "broken.json").write_text("{")
    tells(
        error_of("compare", tmp_path / "broken.json", second), tmp_path / "broken.json", "--output"
    )
    tells(error_of("compare", first, tmp_path / "none.json"), tmp_path / "none.json", "--output")
    tells(error_of("compare", first), "evaluate")
    seeds = tmp_path / "seeds"
    (seeds / "seed-3").mkdir(parents=True)
    tells(error_of("compare", seeds, first), seeds / "seed-3")
    unfinished = tmp_path / "unfinished" / "evaluations" / "before.json"
    saved(unfinished, result("a", 1.0, 1.0))
    tells(error_of("compare", tmp_path / "unfinished", first), "after.json", unfinished)


def test_an_example_is_known_by_its_content() -> None:
    one = example("a", 10, 20)
    content, pictures = content_of(one)
    assert content_of(replace(one, id="b", task="x")) == (content, pictures)
    for change in (
        {"answer": "B"},
        {"kind": "none"},
        {"question": "A <image> B <image> ?"},
    ):
        other, same = content_of(replace(one, **change))
        assert other != content and same == pictures
    swapped = content_of(replace(one, images=one.images[::-1]))
    assert swapped[0] != content and swapped[1] == pictures
    images = (Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 21))
    assert not {content, pictures} & set(content_of(replace(one, images=images)))


def test_runs_are_compared_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each evaluation of a run is a file; the first ones of two runs of different rates are the same."""
    stand_in(monkeypatch)
    for name, rate in (("slow", 0.0), ("fast", 9.0)):
        config = config_of(
            tmp_path, f"eval = {{examples = 4, every = 1}}\ntrain = {{lr = {rate}}}"
        )  # fmt: skip
        train_in(tmp_path / name, config)
    kept = {p.name for p in (tmp_path / "fast" / "evaluations").iterdir()}
    assert kept == {"before.json", "step-1.json", "after.json"}
    before, after = (
        compare_pairs(read_pairs(tmp_path / "slow" / where, tmp_path / "fast" / where)[0])
        for where in ("evaluations/before.json", ".")
    )
    numbers = json.loads((tmp_path / "fast" / "evaluations" / "after.json").read_text())
    assert before["reward"].difference == 0 and after["reward"].items == 4
    assert after["reward"].second == pytest.approx(numbers["reward"], abs=1e-6)
    assert after["greedy_reward"].difference != 0 or after["reward"].difference != 0
    assert run("compare", tmp_path / "slow", tmp_path / "fast") == 0
    tells(capsys.readouterr().out, "4")
