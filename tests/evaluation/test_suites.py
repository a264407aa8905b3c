"""The eight benchmarks through the command line, over small local files in the published layouts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.evaluation.suites import SUITES
from perl.evaluation.suites.comparison import compare_folders
from perl.evaluation.suites.summary import PUBLISHED, summarise
from tests.command_line import ErrorOf, run
from tests.evaluation.benchmarks import (
    mantis_choice,
    mantis_eval,
    mathvision,
)
from tests.messages import tells
from tests.stand_ins import Asked, TableEngine

Evaluate = Callable[..., int | str | None]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())["suites"]


def always(text: str) -> Callable[[Asked], str]:
    return lambda asked: text


@pytest.fixture
def evaluate(root: Path, engine: TableEngine, without_weights: Path, tmp_path: Path) -> Evaluate:
    """Evaluates what the engine answers on some suites, into the folder `out`."""

    def command(
        *options: object, suite: str = "mantis_eval", suites: Path = root
    ) -> int | str | None:
        words = ["--suite", suite, "--suite-root", suites, "--output", tmp_path / "out"]
        return run("evaluate", without_weights, *words, *options)

    return command


def test_all_eight_in_one_go(
    evaluate: Evaluate,
    engine: TableEngine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The gold answers in a box, which the rule of ReMI takes as wrong where several would be right ("1,3")."""
    engine.answer = lambda asked: rf"\boxed{{{asked.variant.answer}}}"
    out = tmp_path / "out"
    assert evaluate("--orders", "2", "--published", suite="all") == 0
    said = capsys.readouterr()
    assert {(c.params.n, c.params.temperature, c.params.max_new_tokens) for c in engine.calls} == {
        (1, 0.0, 2048)
    }
    counts = {"mantis_eval": 2, "blink": 14, "mmiu": 2, "mathvista": 4}
    counts |= {"mathverse": 2, "mathvision": 2, "remi": 6, "mv_math": 4}
    numbers = summary(out)
    assert {name: values["items"] for name, values in numbers.items()} == counts
    for name, values in numbers.items():
        (warned,) = [m for m in caplog.messages if m.startswith(f"{name}: ")]
        tells(warned, counts[name], SUITES[name].expected)
        score = 5 / 6 if name == "remi" else 1.0
        assert (values["score"], values["accuracy"]) == pytest.approx((score, score))
        assert (values["too_long"], values["unfinished"], values["unread"]) == (0, 0, 0)
    for name in ("mantis_eval", "blink", "mmiu", "mv_math"):
        moved = numbers[name]["orders"]
        assert (moved["items"], moved["orders"], moved["consistency"]) == (1, 2, 1)
        orders = [tuple(row["order"]) for row in rows(out / f"{name}.jsonl") if row["movable"]]
        assert len(set(orders)) == 2
    found = [r for r in rows(out / "mv_math.jsonl") if r["id"] == "1"]
    assert len(found) == 2 and found[0]["order"] == [0, 1, 2, 3] and found[0]["gold"] == "C"
    for row in found:  # The answer follows its image.
        assert row["order"]["ABCD".index(row["gold"])] == 2 and row["chosen"] == "c"
    assert all(numbers[name]["orders"] is None for name in ("mathvista", "mathverse", "remi"))
    table = (out / "table.md").read_text()
    header = (
        "Mantis-Eval | BLINK | MMIU | MathVista | MathVerse | MathVision | ReMI | MV-MATH | AVG"
    )
    assert header in table and "| n | 2 | 14 | 2 | 4 | 2 | 2 | 6 | 4 | 36 |" in table
    # The average is (7 + 5 / 6) / 8.
    assert "| 100.00 | 100.00 | 83.33 | 100.00 | 97.92 |" in table
    assert "| PeRL 7B † | 76.39 | 58.53 |" in table
    source = "† published, arXiv 2506.14907"
    assert table.count(source) == said.out.count(source) == 1
    tells(said.err, "blink: 14 items")


@pytest.mark.slow
def test_a_real_model_is_asked(
    root: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ("--suite", "mantis_eval", "--suite-root", root, "--output", tmp_path / "out")
    model = tiny_folder("tiny-qwen2.5-vl")
    assert run("evaluate", model, *words, "--max-new-tokens", 3, "--orders", 2) == 0
    found = rows(tmp_path / "out" / "mantis_eval.jsonl")
    assert [row["order"] for row in found] == [[0, 1], [1, 0], [0, 1, 2]]
    assert "| n | 2 | - |" in (tmp_path / "out" / "table.md").read_text()


def test_answers_are_kept_and_not_asked_for_again(
    evaluate: Evaluate, engine: TableEngine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert evaluate("--limit", "1", suite="mathvista") == 0
    assert len(rows(out / "mathvista.jsonl")) == 1
    # More than there are is all.
    assert evaluate("--limit", "9", suite="mathvista") == 0
    whole = (out / "mathvista.jsonl").read_bytes()
    assert [row["id"] for row in rows(out / "mathvista.jsonl")] == ["0", "1", "2", "3"]
    (out / "mathvista.jsonl").write_bytes(whole[:-20])  # as a kill leaves it
    engine.calls.clear()
    assert evaluate(suite="mathvista") == 0
    assert [[v.example.id for v in call.variants] for call in engine.calls] == [["3"]]
    assert (out / "mathvista.jsonl").read_bytes() == whole
    engine.calls.clear()
    assert evaluate("--instruction", "think", suite="mathvista") == 2
    assert not engine.calls and (out / "mathvista.jsonl").read_bytes() == whole


def test_other_settings_are_not_mixed(
    root: Path, engine: TableEngine, without_weights: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    out = tmp_path / "out"
    (without_weights / "model.safetensors").write_bytes(b"one")
    words = ("evaluate", without_weights, "--suite", "mathvista", "--suite-root", root)
    words = (*words, "--output", out)
    assert run(*words, "--limit", 1) == 0
    before = (out / "mathvista.jsonl").read_bytes()
    settings = json.loads((out / "settings.json").read_text())
    assert len(settings.pop("weights")) == 16
    assert settings == {
        **{"model": str(without_weights), "instruction": "official", "max_new_tokens": 2048},
        **{"orders": 1, "extract": "rules", "min_pixels": 784, "max_pixels": 262144},
        "dtype": "auto",
    }
    for options, key, change in (
        (("--instruction", "think"), "instruction", ("official", "think-box")),
        (("--max-new-tokens", 3), "max_new_tokens", (2048, 3)),
        (("--orders", 2), "orders", (1, 2)),
    ):
        tells(error_of(*words, *options), "--output", out, key, *change)
    (without_weights / "model.safetensors").write_bytes(b"two")
    tells(error_of(*words), "--output", out, "weights")
    assert (out / "mathvista.jsonl").read_bytes() == before


def test_prompts_that_are_too_long(
    evaluate: Evaluate, engine: TableEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They count as wrong, and are asked once the limit is higher."""
    engine.answer = always(r"\boxed{B}")
    short = ("--max-prompt-tokens", "5")
    assert evaluate(*short) == 2
    tells(capsys.readouterr().err, "me_0", "data.max_prompt_tokens = 5")
    assert evaluate(*short, "--overlong", "drop") == 0
    values = summary(tmp_path / "out")["mantis_eval"]
    assert (values["items"], values["too_long"], values["accuracy"]) == (2, 2, 0.0)
    assert (values["unread"], values["unfinished"]) == (0, 0) and not engine.calls
    before = (tmp_path / "out" / "mantis_eval.jsonl").read_bytes()
    assert evaluate(*short, "--overlong", "drop") == 0
    assert (tmp_path / "out" / "mantis_eval.jsonl").read_bytes() == before
    assert evaluate() == 0
    found = rows(tmp_path / "out" / "mantis_eval.jsonl")
    assert [(row["id"], row["completion"]) for row in found] == [
        *(("me_0", None), ("me_1", None)),
        *(("me_0", r"\boxed{B}"), ("me_1", r"\boxed{B}")),
    ]
    assert [row["finished"] for row in found] == [False, False, True, True]
    values = summary(tmp_path / "out")["mantis_eval"]
    assert (values["items"], values["too_long"], values["accuracy"]) == (2, 0, 0.5)


def test_items_are_asked_in_chunks_and_kept_as_they_come(
    evaluate: Evaluate, engine: TableEngine, tmp_path: Path
) -> None:
    items = [mantis_choice(2) | {"id": f"me_{k}"} for k in range(18)]
    mantis_eval(tmp_path / "suites" / "mantis_eval", items)
    written: list[int] = []
    file = tmp_path / "out" / "mantis_eval.jsonl"

    def answer(asked: Asked) -> str:
        written.append(len(rows(file)) if file.exists() else 0)
        return "long " * 9 if asked.variant.example.id == "me_3" else r"\boxed{A}"

    engine.answer = answer
    words = ("--orders", 2, "--max-new-tokens", 4)
    assert evaluate(*words, "--limit", 17, suites=tmp_path / "suites") == 0
    assert [len(call.variants) for call in engine.calls] == [32, 2]
    assert written == [0] * 32 + [32] * 2
    assert {(call.seed, call.params) for call in engine.calls} == {
        (engine.calls[0].seed, engine.calls[0].params)
    }
    values = summary(tmp_path / "out")["mantis_eval"]
    assert (values["items"], values["unfinished"], values["unread"]) == (17, 1, 1)
    first, second, *_ = rows(file)
    assert first == {
        **{"id": "me_0", "task": "retrieval", "problem": "me_0", "order": [0, 1], "movable": True},
        **{"completion": r"\boxed{A}", "finished": True, "answer": "A", "gold": "B"},
        **{"score": 0.0, "chosen": "a"},
    }
    # A is the other picture now, and right.
    assert second == first | {"order": [1, 0], "gold": "A", "score": 1.0, "chosen": "b"}
    assert [row["finished"] for row in rows(file)].index(False) == 6


def test_two_items_of_one_id(evaluate: Evaluate, tmp_path: Path, error_of: ErrorOf) -> None:
    mantis_eval(tmp_path / "suites" / "mantis_eval", [mantis_choice(2)] * 2)
    words = ("--suite", "mantis_eval", "--suite-root", tmp_path / "suites")
    tells(error_of("evaluate", tmp_path / "model", *words, "--output", tmp_path / "out"), "me_0")


def test_what_is_missing_is_listed_before_a_model_is_loaded(
    root: Path, without_weights: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    other = tmp_path / "root"
    shutil.copytree(root, other)
    shutil.rmtree(other / "blink" / "Jigsaw")
    shutil.rmtree(other / "blink" / "Counting")
    (other / "mv_math" / "images" / "batch10_2.jpg").unlink()
    next((other / "mmiu").rglob("spot_the_diff_0_1.jpg")).unlink()
    shutil.rmtree(other / "remi")
    words = ("evaluate", without_weights, "--suite-root", other, "--output", tmp_path / "out")
    for suite, lacks in {
        "blink": ["Counting/val-*.parquet, Jigsaw/val-*.parquet"],
        "mv_math": ["images/batch10_2.jpg"],
        "mmiu": ["Low-level-semantic/spot_the_diff/spot_the_diff_0_1.jpg"],
        "remi": ["test.parquet"],
    }.items():
        said = error_of(*words, "--suite", suite)
        tells(said, suite, *lacks, SUITES[suite].home.split()[0], "--list-suites")
        assert said.count("/val-") == (2 if suite == "blink" else 0)
    assert not (tmp_path / "out").exists()


REMI = ("--suite", "remi", "--suite-root", "ROOT")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--suite", "blinc"], ["--suite blinc", "blink?"]),
        (["--suite", "xyz"], ["--suite xyz", *SUITES, "all"]),
        (["--suite", "blink"], ["--suite", "--suite-root", "--list-suites"]),
        (["--suite", "blink", "--suite-root", "."], ["--suite", "--output"]),
        (["--suite", "blink", "--data", "x.jsonl"], ["--data", "--suite"]),
        (["--suite", "blink", "--text", "slots"], ["--text"]),
        (["--suite", "blink", "--map", "answer=gold"], ["--map"]),
        (["--suite", "blink", "--image-root", "."], ["--image-root"]),
        (["--orders", "2"], ["--orders", "--suite"]),
        (["--limit", "2"], ["--limit", "--suite"]),
        (["--published"], ["--published", "--suite"]),
        (["--extract", "llm"], ["--extract", "--suite"]),
        (["--instruction", "think"], ["data.instruction", "think", "think-box"]),
        (
            ["--suite", "blink", "--instruction", "tags"],
            ["--instruction tags", "official", "think-tags"],
        ),
        (["--suite-root", "."], ["--suite-root", "--suite"]),
        (["--suite", "blink", "--orders", "0"], ["--orders 0", "1"]),
        (["--suite", "blink", "--limit", "0"], ["--limit 0", "1"]),
        ([*REMI, "--output", "full"], ["--output full", "settings.json"]),
        ([*REMI, "--output", "full/x"], ["--output full/x", "--suite"]),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    names: list[str],
    root: Path,
    without_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: ErrorOf,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/x").write_text("x")
    given = [str(root) if option == "ROOT" else option for option in options]
    tells(error_of("evaluate", without_weights, *given), *names)


def test_the_layout_is_printed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--list-suites") == 0
    said = capsys.readouterr().out
    for suite in SUITES.values():
        assert f"{suite.name}: {suite.title}, {suite.expected} items" in said and suite.home in said
    assert "DIR/blink/Jigsaw/val-*.parquet" in said


def test_a_model_reads_the_answers(
    evaluate: Evaluate, engine: TableEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the endpoint makes of a completion without a box is judged by the benchmark's rule."""
    from perl.llm import Endpoint

    items = [mantis_choice(2) | {"id": id} for id in ("boxed", "read", "none")]
    mantis_eval(tmp_path / "suites" / "mantis_eval", items)
    engine.answer = lambda asked: (
        r"\boxed{A}"
        if asked.variant.example.id == "boxed"
        else (f"I am for {asked.variant.example.id}")
    )
    asked: list[tuple[list[str], dict[str, Any]]] = []

    def complete(self: Endpoint, prompts: list[str], **settings: Any) -> list[str]:
        asked.append((prompts, settings))
        return [" B " if "I am for read" in prompt else " none" for prompt in prompts]

    monkeypatch.setenv("PERL_LLM_URL", "http://localhost:1/v1")
    monkeypatch.setenv("PERL_LLM_MODEL", "judge")
    monkeypatch.setattr(Endpoint, "complete", complete)
    assert evaluate("--extract", "llm", suites=tmp_path / "suites") == 0
    boxed, read, none = rows(tmp_path / "out" / "mantis_eval.jsonl")
    assert "extracted" not in boxed and (boxed["answer"], boxed["score"]) == ("A", 0.0)
    assert (read["extracted"], read["answer"], read["score"]) == ("B", "B", 1.0)
    assert (none["extracted"], none["answer"], none["score"]) == ("", None, 0.0)
    assert summary(tmp_path / "out")["mantis_eval"]["unread"] == 1
    ((prompts, settings),) = asked
    assert len(prompts) == 2 and "<image>" not in prompts[0] and "I am for none" in prompts[1]
    assert "Which one shows three ?\n (A) Image 1\n (B) Image 2" in prompts[0]
    assert settings == {"max_tokens": 256, "temperature": 0.0}
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["extract"] == "llm judge"


def answers(folder: Path, scores: dict[str, list[int]], model: str, tokens: int = 8) -> Path:
    """An output folder as `evaluate` writes it."""
    folder.mkdir()
    settings = {"model": model, "max_new_tokens": tokens}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, of_suite in scores.items():
        row = {"task": "", "movable": True, "completion": "", "finished": True, "answer": ""}
        lines = [
            json.dumps(row | {"id": f"{k}", "order": [0, 1], "score": float(score)})
            for k, score in enumerate(of_suite)
        ]
        other = json.dumps(row | {"id": "0", "order": [1, 0], "score": 0.0})
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, other]) + "\n")
    return folder


def test_two_models_are_compared_item_by_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the official order of images; the probability of 2 of 2 is 1/2, that of 2 of 3 is 1."""
    one = answers(tmp_path / "a", {"blink": [1, 0, 0, 1], "remi": [1, 1], "mmiu": [1]}, "a")
    other = answers(tmp_path / "b", {"blink": [1, 1, 1, 1], "remi": [1, 0]}, "b", tokens=16)
    found, remarks = compare_folders(one, other)
    assert {
        name: (c.items, c.first, c.second, c.difference, c.first_only, c.second_only, c.p)
        for name, c in found.items()
    } == {
        "blink": (4, 0.5, 1.0, 0.5, 0, 2, 0.5),
        "remi": (2, 1.0, 0.5, -0.5, 1, 0, 1.0),
        "all": (6, *(pytest.approx(k / 6) for k in (4, 5, 1)), 1, 2, 1.0),
    }
    settings, missing = remarks
    tells(settings, "max_new_tokens", f"8 in {one}", f"16 in {other}")
    tells(missing, "mmiu", one)
    assert run("compare", one, other) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (blink,) = [line for line in said if line.startswith("BLINK ")]
    assert blink.startswith("BLINK 4 50.00 100.00 +50.00 +0.00 to +100.00 0.5 0 2")
    (together,) = [line for line in said if line.startswith("all items ")]
    assert together.startswith("all items 6 66.67 83.33 +16.67 ") and together.endswith(" 1 1 2")
    text = "".join(said)
    assert settings.replace(" ", "") in text.replace(" ", "") and f"2nd: {other}" in text


def test_what_cannot_be_compared(tmp_path: Path, error_of: ErrorOf) -> None:
    one = answers(tmp_path / "a", {"blink": [1, 0, 0, 1], "remi": [1, 1], "mmiu": [1]}, "a")
    more = answers(tmp_path / "c", {"blink": [1, 1, 1, 1, 0]}, "c")
    for pair in ((one, more), (more, one)):
        tells(error_of("compare", *pair), "blink", "1 of 5", more, "(4)", "--limit")
    alone = answers(tmp_path / "d", {"mathvista": [1]}, "d")
    tells(error_of("compare", one, alone), one, alone, "--suite")
    tells(error_of("compare", one, tmp_path), tmp_path, "settings.json", "perl-rl evaluate --suite")
    tells(error_of("compare", one), "perl-rl evaluate", "--suite", "--output")
    assert error_of("compare")
    for line in ('{"id": ', '{"id": "1"}'):
        (more / "blink.jsonl").write_text(line + "\n")
        tells(error_of("compare", one, more), more / "blink.jsonl", "line 1")
    for content in ("{", "[1]"):
        (more / "settings.json").write_text(content)
        tells(error_of("compare", one, more), more / "settings.json")


def row(id: str, score: float, task: str = "", order: tuple[int, ...] = (0, 1), **more: Any) -> Any:
    usual = {"movable": False, "completion": "x", "finished": True, "answer": "A", "chosen": None}
    return {"id": id, "score": score, "task": task, "order": list(order), **usual, **more}


def test_a_summary_by_hand() -> None:
    """Tasks of 3, 1 and 1 items: 3/5 over items, (1/3 + 1 + 1)/3 over tasks."""
    given = [
        row("1", 1.0, "a"),
        row("2", 0.0, "a", completion=None, finished=False, answer=None),
        row("3", 0.0, "a", finished=False, answer=None),
        row("4", 1.0, "c"),
        row("5", 1.0, "b"),
    ]
    values = summarise(SUITES["blink"], given)
    assert (values["items"], values["expected"], values["title"]) == (5, 1901, "BLINK")
    assert values["accuracy"] == pytest.approx(3 / 5) == values["score"]
    assert values["task_mean"] == pytest.approx(7 / 9)
    assert summarise(SUITES["remi"], given)["score"] == pytest.approx(7 / 9)
    assert summarise(SUITES["mmiu"], given)["score"] == pytest.approx(7 / 9)
    # Wilson's interval of 3 in 5: (x + z^2 / 2 +- z sqrt(x (n - x) / n + z^2 / 4)) / (n + z^2)
    z = 1.959963984540054
    centre, reach = 3 + z * z / 2, z * math.sqrt(3 * 2 / 5 + z * z / 4)
    bounds = [(centre - reach) / (5 + z * z), (centre + reach) / (5 + z * z)]
    assert values["interval"] == pytest.approx(bounds)
    assert (values["too_long"], values["unfinished"], values["unread"]) == (1, 1, 1)
    assert list(values["by_task"]) == ["a", "b", "c"]
    assert values["by_task"]["a"] == {"items": 3, "accuracy": pytest.approx(1 / 3)}
    assert values["orders"] is None


def test_a_summary_of_orders_by_hand() -> None:
    """Item 1 in three orders, two of which choose one picture; item 2 in two; items 3 and 4 do not count."""
    given = [
        row("1", 1.0, order=(0, 1, 2), movable=True, chosen="a"),
        row("1", 0.0, order=(1, 0, 2), movable=True, chosen="b"),
        row("1", 0.0, order=(2, 1, 0), movable=True, chosen="a"),
        row("2", 0.0, order=(0, 1), movable=True, chosen="b"),
        row("2", 1.0, order=(1, 0), movable=True, chosen="b"),
        row("3", 1.0, order=(0, 1), movable=True, chosen="a"),
        row("4", 1.0),
    ]
    values = summarise(SUITES["blink"], given)
    assert (values["items"], values["accuracy"]) == (4, 3 / 4)
    assert values["orders"] == {
        "items": 2,
        "orders": 2.5,
        "official_accuracy": 0.5,
        "accuracy": pytest.approx((1 / 3 + 1 / 2) / 2),
        "consistency": pytest.approx((1 / 3 + 1) / 2),
    }


def test_what_was_published_adds_up() -> None:
    """Averages of the paper's Table 1 are means of their rows to two digits, but for these differences (in hundredths)."""
    off = {}
    for model, (*scores, average) in PUBLISHED.items():
        assert len(scores) == len(SUITES)
        if difference := round(100 * sum(scores) / 8) - round(100 * average):
            off[model] = difference
    assert off == {"R1-VL-7B": -41, "MM-Eureka 7B": -62, "Qwen2.5-VL-7B": -110}
    assert sum(suite.expected for suite in SUITES.values()) == 26405


def test_a_policy_that_likes_one_letter_is_found_out(
    evaluate: Evaluate, engine: TableEngine, tmp_path: Path
) -> None:
    """It is right in half of the orders, and chooses another picture in each."""
    engine.answer = always("<think>x</think>\\boxed{B}")
    assert evaluate("--orders", "2") == 0
    assert evaluate("--orders", "2", suite="mmiu") == 0
    numbers = summary(tmp_path / "out")
    assert numbers["mmiu"]["score"] == 1.0 and numbers["mmiu"]["averaged"] == "tasks"
    for values in (numbers["mmiu"], numbers["mantis_eval"]):
        moved = values["orders"]
        assert (moved["official_accuracy"], moved["accuracy"]) == (1.0, 0.5)
        assert moved["consistency"] == 0.0
    assert numbers["mantis_eval"]["by_task"]["retrieval"] == {"items": 1, "accuracy": 1.0}
    assert numbers["mantis_eval"]["by_task"]["counting"] == {"items": 1, "accuracy": 0.0}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| Mantis-Eval | 1 | 2 | 100.00 | 50.00 | 0.00 |" in table
    assert "| MMIU | 2 of 11698 | 100.00 | 34.24 to 100.00 | 100.00 | 0 | 0 | 0 |" in table
    assert "published" not in table


@pytest.mark.parametrize("gold", ["42", "", "F"])
def test_options_without_a_right_letter_are_found_before_a_model_is_loaded(
    gold: str, without_weights: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    mathvision(tmp_path / "mathvision", "A", gold)
    words = ["--suite", "mathvision", "--suite-root", tmp_path, "--output", tmp_path / "out"]
    said = error_of("evaluate", without_weights, *words)
    tells(said, "row 2", f"'{gold}'", "5 options")
    assert not (tmp_path / "out").exists()


def test_versions_of_one_problem_are_drawn_together(evaluate: Evaluate, tmp_path: Path) -> None:
    """MathVerse asks each problem in five versions."""
    assert evaluate(suite="mathverse") == 0
    template, other = rows(tmp_path / "out" / "mathverse.jsonl")
    assert template["problem"] == other["problem"] == "1"

    def folder(name: str, old: bool, score: Callable[[int], int]) -> Path:
        path = answers(tmp_path / name, {}, name)
        lines = []
        for k in range(100):
            row = template | {"id": str(k), "problem": str(k // 5), "score": float(score(k // 5))}
            if old:  # Answers of older versions do not say the problem.
                del row["problem"]
            lines.append(json.dumps(row) + "\n")
        (path / "mathverse.jsonl").write_text("".join(lines))
        return path

    def width(old: bool) -> float:
        one = folder(f"one-{old}", old, lambda problem: problem % 2)
        found, _ = compare_folders(one, folder(f"other-{old}", old, lambda problem: 1))
        assert found["mathverse"].difference == found["all"].difference == 0.5
        assert found["mathverse"].interval == found["all"].interval
        low, high = found["mathverse"].interval
        return high - low

    assert width(old=False) > 2 * width(old=True)
