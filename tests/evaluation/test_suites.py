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
from perl.model.processor import Processor
from perl.rollout.engine import InProcessEngine
from tests.command_line import ErrorOf, run
from tests.evaluation.benchmarks import make_benchmarks, mantis_choice, mantis_eval, mathvision

Evaluate = Callable[..., int | str | None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())["suites"]


@pytest.fixture
def evaluate(root: Path, tiny_folder: Callable[[str], Path], tmp_path: Path) -> Evaluate:
    """Evaluates the tiny model on some suites, three tokens each, into the folder `out`."""

    def command(
        *options: object, suite: str = "mantis_eval", suites: Path = root
    ) -> int | str | None:
        model, output = tiny_folder("tiny-qwen2.5-vl"), tmp_path / "out"
        words = ["--suite", suite, "--suite-root", suites, "--max-new-tokens", "3"]
        return run("evaluate", model, *words, "--output", output, *options)

    return command


@pytest.fixture
def without_weights(tmp_path: Path) -> Path:
    """A model folder that no model can be loaded from."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_all_eight_in_one_go(
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    assert evaluate("--orders", "2", "--published", suite="all") == 0
    said = capsys.readouterr()
    counts = {"mantis_eval": 2, "blink": 14, "mmiu": 2, "mathvista": 4}
    counts |= {"mathverse": 2, "mathvision": 2, "remi": 6, "mv_math": 4}
    numbers = summary(out)
    assert {name: values["items"] for name, values in numbers.items()} == counts
    for name, values in numbers.items():
        expected = SUITES[name].expected
        warning = f"holds {counts[name]} items, where the published benchmark has {expected}"
        assert warning in caplog.text
        assert values["interval"][0] <= values["accuracy"] <= values["interval"][1]
        assert 0 <= values["score"] <= 1 and values["too_long"] == 0
    for name in ("mantis_eval", "blink", "mmiu", "mv_math"):
        assert numbers[name]["orders"]["items"] == 1
        assert 0 <= numbers[name]["orders"]["consistency"] <= 1
        orders = [tuple(row["order"]) for row in rows(out / f"{name}.jsonl") if row["movable"]]
        assert len(set(orders)) == 2
    found = [r for r in rows(out / "mv_math.jsonl") if r["id"] == "1"]
    assert len(found) == 2 and found[0]["order"] == [0, 1, 2, 3] and found[0]["gold"] == "C"
    for row in found:  # The answer follows its image.
        assert row["order"]["ABCD".index(row["gold"])] == 2
    assert all(numbers[name]["orders"] is None for name in ("mathvista", "mathverse", "remi"))
    table = (out / "table.md").read_text()
    header = (
        "Mantis-Eval | BLINK | MMIU | MathVista | MathVerse | MathVision | ReMI | MV-MATH | AVG"
    )
    assert header in table and "| n | 2 | 14 | 2 | 4 | 2 | 2 | 6 | 4 | 36 |" in table
    assert "| PeRL 7B † | 76.39 | 58.53 |" in table
    assert "† published, arXiv 2506.14907" in table and "† published" in said.out
    assert "blink: 14 items" in said.err and "steps" not in said.err


def test_answers_are_kept_and_not_asked_for_again(
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert evaluate("--limit", "1", suite="mathvista") == 0
    assert len(rows(out / "mathvista.jsonl")) == 1
    assert evaluate(suite="mathvista") == 0
    whole = (out / "mathvista.jsonl").read_bytes()
    assert [row["id"] for row in rows(out / "mathvista.jsonl")] == ["0", "1", "2", "3"]
    (out / "mathvista.jsonl").write_bytes(whole[:-20])  # as a kill leaves it

    asked: list[int] = []
    generate = InProcessEngine.generate

    def counting(self: Any, prompts: Any, *arguments: Any) -> Any:
        asked.append(len(prompts))
        return generate(self, prompts, *arguments)

    monkeypatch.setattr(InProcessEngine, "generate", counting)
    assert evaluate(suite="mathvista") == 0
    assert asked == [1] and (out / "mathvista.jsonl").read_bytes() == whole
    capsys.readouterr()
    assert evaluate("--instruction", "think", suite="mathvista") == 2
    said = capsys.readouterr().err
    assert "given under other settings: instruction was official and is think; choose" in said
    assert (out / "mathvista.jsonl").read_bytes() == whole


def test_another_model_at_the_same_place_is_noticed(
    root: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, error_of: ErrorOf
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), model)
    words = ("--suite", "mantis_eval", "--suite-root", root, "--output", tmp_path / "out")
    assert run("evaluate", model, *words, "--max-new-tokens", "1", "--limit", "1") == 0
    weights = next(model.glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert "weights was" in error_of("evaluate", model, *words, "--max-new-tokens", "1")


def test_prompts_that_are_too_long(
    evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--max-prompt-tokens", "30")
    assert evaluate(*short) == 2
    assert "raise it with --max-prompt-tokens" in capsys.readouterr().err
    assert evaluate(*short, "--overlong", "drop") == 0
    values = summary(tmp_path / "out")["mantis_eval"]
    assert (values["items"], values["too_long"], values["accuracy"]) == (2, 2, 0.0)
    assert evaluate() == 0
    assert all(row["completion"] for row in rows(tmp_path / "out" / "mantis_eval.jsonl")[2:])


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
        "blink": "lacks Counting/val-*.parquet, Jigsaw/val-*.parquet; get them from https://",
        "mv_math": "lacks images/batch10_2.jpg; get",
        "mmiu": "lacks Low-level-semantic/spot_the_diff/spot_the_diff_0_1.jpg",
        "remi": "remi lacks test.parquet",
    }.items():
        assert lacks in error_of(*words, "--suite", suite)
    assert not (tmp_path / "out").exists()


REMI = ("--suite", "remi", "--suite-root", "ROOT")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--suite", "blinc"], "--suite blinc: there is no such benchmark; did you mean blink?"),
        (["--suite", "blink"], "--suite needs --suite-root"),
        (["--suite", "blink", "--suite-root", "."], "--suite needs --output, a folder"),
        (["--suite", "blink", "--data", "x.jsonl"], "--data and --suite exclude each other"),
        (["--orders", "2"], "--orders is for --suite"),
        (["--suite", "blink", "--orders", "0"], "--orders 0: must be greater than or equal to 1"),
        (["--suite", "blink", "--limit", "0"], "--limit 0: must be greater than or equal to 1"),
        ([*REMI, "--output", "full"], "is not empty and holds no answers"),
        ([*REMI, "--output", "full/x"], "is a file; with --suite it is a folder"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str],
    match: str,
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
    assert match in error_of("evaluate", without_weights, *given)


def test_the_layout_is_printed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--list-suites") == 0
    said = capsys.readouterr().out
    for suite in SUITES.values():
        assert f"{suite.name}: {suite.title}, {suite.expected} items" in said and suite.home in said
    assert "DIR/blink/Jigsaw/val-*.parquet" in said


def test_a_model_reads_the_answers(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the endpoint makes of a completion is judged by the benchmark's rule."""
    from perl.llm import Endpoint

    asked: list[str] = []

    def complete(self: Endpoint, prompts: list[str], **settings: Any) -> list[str]:
        asked.extend(prompts)
        return ["B" if "Image 2" in prompt else "NONE" for prompt in prompts]

    monkeypatch.setenv("PERL_LLM_URL", "http://localhost:1/v1")
    monkeypatch.setenv("PERL_LLM_MODEL", "judge")
    monkeypatch.setattr(Endpoint, "complete", complete)
    assert evaluate("--extract", "llm") == 0
    first, second = rows(tmp_path / "out" / "mantis_eval.jsonl")
    assert (first["extracted"], first["answer"], first["score"]) == ("B", "B", 1.0)
    assert (second["extracted"], second["answer"], second["score"]) == ("", None, 0.0)
    assert len(asked) == 2 and "<image>" not in asked[0]
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    one = answers(tmp_path / "a", {"blink": [1, 0, 0, 1], "remi": [1, 1], "mmiu": [1]}, "a")
    other = answers(tmp_path / "b", {"blink": [1, 1, 1, 1], "remi": [1, 0]}, "b", tokens=16)
    assert run("compare", one, other) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "+50.00" in said and "-50.00" in said and "+16.67" in said and "0.5" in said
    assert f"max_new_tokens: 8 in {one}, 16 in {other}".replace("\n", "") in said
    assert f"mmiu: only in {one}" in said
    more = answers(tmp_path / "c", {"blink": [1, 1, 1, 1, 0]}, "c")
    assert f"blink: 1 of 5 items are only in {more} (4)" in error_of("compare", one, more)
    alone = answers(tmp_path / "d", {"mathvista": [1]}, "d")
    assert "no benchmark in common" in error_of("compare", one, alone)
    assert "holds no answers: there is no settings.json" in error_of("compare", one, tmp_path)
    assert "needs two folders" in error_of("compare", one)
    assert "needs a folder first" in error_of("compare")
    (more / "blink.jsonl").write_text('{"id": \n')
    assert "blink.jsonl line 1: is no answer" in error_of("compare", one, more)
    (more / "blink.jsonl").write_text('{"id": "1"}\n')
    assert "blink.jsonl line 1: is no answer" in error_of("compare", one, more)


def test_a_policy_that_likes_one_letter_is_found_out(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right in half of the orders, and chooses another picture in each."""
    monkeypatch.setattr(Processor, "decode", lambda self, ids: "<think>x</think>\\boxed{B}")
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


@pytest.mark.parametrize(("images", "consistency"), [(2, 0.0), (3, 0.2), (4, 5 / 23)])
def test_one_letter_and_several_images(
    images: int,
    consistency: float,
    evaluate: Evaluate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among all orders of n images some have the same one in the first place."""
    mantis_eval(tmp_path / "suites" / "mantis_eval", [mantis_choice(images)])
    monkeypatch.setattr(Processor, "decode", lambda self, ids: "\\boxed{A}")
    assert evaluate("--orders", 24, suites=tmp_path / "suites") == 0
    moved = summary(tmp_path / "out")["mantis_eval"]["orders"]
    assert moved["orders"] == math.factorial(images)
    assert moved["accuracy"] == pytest.approx(1 / images)
    assert moved["consistency"] == pytest.approx(consistency)


@pytest.mark.parametrize("gold", ["42", "", "F"])
def test_options_without_a_right_letter_are_found_before_a_model_is_loaded(
    gold: str, without_weights: Path, tmp_path: Path, error_of: ErrorOf
) -> None:
    mathvision(tmp_path / "mathvision", "A", gold)
    words = ["--suite", "mathvision", "--suite-root", tmp_path, "--output", tmp_path / "out"]
    said = error_of("evaluate", without_weights, *words)
    assert ".parquet row 2" in said and f"the answer '{gold}' is no letter of its 5 options" in said
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
