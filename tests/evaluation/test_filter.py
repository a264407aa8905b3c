"""The filter command: what it measures, keeps, refuses, and goes on with."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import INSTRUCTIONS, Config, DataConfig, FilterConfig, ModelConfig, RewardConfig
from perl.data.dataset import load_examples
from perl.evaluation.difficulty import CHUNK
from perl.recipe import measured_function
from tests.command_line import ErrorOf
from tests.command_line import run as run_command
from tests.messages import refused, tells
from tests.stand_ins import Asked, TableEngine

ROWS = 40
Run = Callable[..., int | str | None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions over pictures in a sub-folder; A is right."""
    (tmp_path / "pictures").mkdir()
    for k in range(5):
        Image.new("RGB", (28, 28), (50 * k, 30, 0)).save(tmp_path / "pictures" / f"{k}.png")
    rows = []
    for k in range(ROWS):
        row = {
            "kind": "all",
            "id": f"q{k}",
            "question": "A <image> B <image> Which image shows three ?",
            "own": k,
        }
        row |= {"images": [f"pictures/{k % 5}.png", f"pictures/{(k + 1) % 5}.png"], "answer": "A"}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures by the files that they would be drawn to."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, path, **options: drawn.update({path.name: figure}),
    )
    return drawn


@pytest.fixture
def run(engine: TableEngine, without_weights: Path, pictures: dict[str, Any]) -> Run:
    """The command with an engine in place of its model."""
    engine.answer = guess
    return lambda *options: run_command("filter", without_weights, "--max-new-tokens", 3, *options)


def guess(asked: Asked) -> str:
    """Right or wrong as the draws of its seed have it."""
    return rf"\boxed{{{'AB'[asked.draw.integers(2)]}}}"


def right(*counts: int) -> Callable[[Asked], str]:
    """Question i of the data has `counts[i]` right completions of ten."""

    def answer(asked: Asked) -> str:
        return rf"\boxed{{{'A' if asked.number < counts[asked.variant.example.extra['own']] else 'B'}}}"

    return answer


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_columns_named_by_the_user(data: Path, run: Run, engine: TableEngine) -> None:
    theirs = [
        {("asked" if k == "question" else k): v for k, v in row.items()} for row in read(data)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in theirs))
    engine.answer = right(*[2] * 20, *[5] * 20)
    assert run("--data", data, "--histogram", "uniform", "--map", "question=asked") == 0
    kept = read(data.with_name("rows.filtered.jsonl"))
    assert all(row == {**theirs[row["own"]], "accuracy": row["accuracy"]} for row in kept)


def test_the_filtered_data_trains_directly(
    data: Path,
    run: Run,
    engine: TableEngine,
    pictures: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of three levels each gives as many, the lowest one more; then the next has no more."""
    engine.answer = right(*[2] * 20, *[5] * 10, *[8] * 10)
    assert run("--data", data, "--histogram", "uniform", "--temperature", 0.5) == 0
    assert {(c.params.temperature, c.params.max_new_tokens) for c in engine.calls} == {(0.5, 3)}
    measured = read(data.with_name("rows.accuracies.jsonl"))
    assert [(row["index"], row["rollouts"]) for row in measured] == [(i, 10) for i in range(ROWS)]
    assert [row["accuracy"] for row in measured] == [0.2] * 20 + [0.5] * 10 + [0.8] * 10
    kept = read(data.with_name("rows.filtered.jsonl"))
    originals = read(data)
    for row in kept:
        assert row == {**originals[row["own"]], "accuracy": measured[row["own"]]["accuracy"]}
    assert Counter(row["accuracy"] for row in kept) == {0.2: 11, 0.5: 10, 0.8: 10}
    examples = load_examples(str(data.with_name("rows.filtered.jsonl")), DataConfig(), "train", 0)
    for i in range(len(examples)):
        examples.check(i)
    assert examples[0].images[0].size == (28, 28)
    assert set(pictures) == {"rows.filtered.png", "rows.filtered.svg"}
    (axes,) = pictures["rows.filtered.png"].axes
    before, after = axes.containers
    for bars, shares in ((before, [20, 10, 10]), (after, [11, 10, 10])):
        heights = [
            shares[[2, 5, 8].index(k)] / sum(shares) if k in (2, 5, 8) else 0 for k in range(11)
        ]
        assert [bar.get_height() for bar in bars] == pytest.approx(heights)
    assert [b.get_center()[0] for b in before] == pytest.approx([k - 0.2 for k in range(11)])
    assert [b.get_center()[0] for b in after] == pytest.approx([k + 0.2 for k in range(11)])
    tells(before.get_label(), "40", "0.42")
    tells(after.get_label(), "31", "0.49")
    (legend,) = pictures["rows.filtered.png"].legends
    assert len(legend.get_texts()) == 3
    (target,) = axes.lines
    assert target.get_ydata().tolist() == pytest.approx([1 / 11] * 11)
    assert [label.get_text() for label in axes.get_xticklabels()][::5] == ["0.0", "0.5", "1.0"]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    table = ["accuracy before after target", "0.0 0.0 % 0.0 % 9.1 %", "0.2 50.0 % 35.5 % 9.1 %"]
    # The means are (20 * 2 + 10 * 5 + 10 * 8) / 400 and (11 * 2 + 10 * 5 + 10 * 8) / 310.
    table += ["0.5 25.0 % 32.3 % 9.1 %", "questions 40 31", "mean 0.425 0.490"]
    assert [line for line in lines if line in table] == table


def test_a_stopped_measurement_goes_on_with_the_same_numbers(
    data: Path,
    run: Run,
    engine: TableEngine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [data.with_name(f"rows.{name}.jsonl") for name in ("accuracies", "filtered")]
    assert run("--data", data, "--orders", 2) == 0
    whole = [name.read_bytes() for name in names]
    names[0].write_bytes(whole[0][: 7 * len(whole[0]) // 8])
    engine.calls.clear()
    assert run("--data", data, "--orders", 2) == 0
    assert [len(call.variants) for call in engine.calls] == [2 * (ROWS - CHUNK)]
    assert [name.read_bytes() for name in names] == whole
    engine.calls.clear()
    assert run("--data", data, "--orders", 2, "--size", 5) == 0
    assert len(read(names[1])) == 5 and names[0].read_bytes() == whole[0] and not engine.calls
    capsys.readouterr()

    def interrupt(self: Any, steps: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perl.report.progress.Display.advance", interrupt)
    assert run("--data", data, "--orders", 2, "--overwrite") == 130
    tells(capsys.readouterr().err, f"{CHUNK} of {ROWS}", names[0])
    assert whole[0].startswith(names[0].read_bytes()) and len(read(names[0])) == CHUNK


@pytest.mark.parametrize(
    ("counts", "kept", "told"),
    [
        ([2] * 38 + [8] * 2, {0.2: 3, 0.8: 2}, ["5 of 40", "0.8", "5.0 %", "9.1 %"]),
        ([2] * 9 + [8] * 31, {0.2: 9, 0.8: 9}, ["18 of 40", "0.2", "22.5 %", "9.1 %"]),
        ([2] * 10 + [8] * 30, {0.2: 10, 0.8: 10}, []),  # half
    ],
)
def test_what_limits_the_size_is_told(
    counts: list[int],
    kept: dict[float, int],
    told: list[str],
    data: Path,
    run: Run,
    engine: TableEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine.answer = right(*counts)

    def said(*options: object) -> list[str]:
        assert run("--data", data, "--histogram", "1,1,1,1,1,1,1,1,1,1,1", *options) == 0
        return re.findall("^kept .*$", capsys.readouterr().out, re.MULTILINE)

    lines = said()
    assert Counter(r["accuracy"] for r in read(data.with_name("rows.filtered.jsonl"))) == kept
    assert len(lines) == bool(told)
    for line in lines:
        tells(line, *told, "--size", "--repeat")
    assert said("--size", 3) == said("--repeat", "--size", 3) == []


def test_other_settings_are_refused(
    data: Path, run: Run, trained: Callable[..., Path], error_of: ErrorOf
) -> None:
    assert run("--data", data, "--limit", 4, "--max-prompt-tokens", 100) == 0
    measured = data.with_name("rows.accuracies.jsonl").read_bytes()
    four, same = ("--limit", 4), ModelConfig()
    for options, model, shown in (
        ((*four, "--seed", 1), same, ["seed = 0", "seed = 1"]),
        ((*four, "--rollouts", 4), same, ["rollouts = 10", "rollouts = 4"]),
        ((*four, "--orders", 2), same, ["orders = 1", "orders = 2"]),
        ((*four, "--temperature", 0.5), same, ["temperature = 1.0", "temperature = 0.5"]),
        ((*four, "--text", "references"), same, ["text = slots", "text = references"]),
        ((*four, "--max-new-tokens", 4), same, ["max_new_tokens = 3", "max_new_tokens = 4"]),
        ((*four, "--instruction", "box"), same, ["instruction = think-box", "instruction = box"]),
        (
            (*four, "--max-prompt-tokens", 60),
            same,
            ["max_prompt_tokens = 100", "max_prompt_tokens = 60"],
        ),
        (four, ModelConfig(min_pixels=3136), ["min_pixels = 784", "min_pixels = 3136"]),
        (four, ModelConfig(max_pixels=3136), ["max_pixels = 262144", "max_pixels = 3136"]),
        (("--limit", 3), same, []),
        ((), same, []),
    ):
        folder = trained(model=model)
        said = error_of("filter", folder, "--data", data, "--max-new-tokens", 3, *options)
        tells(said, data.with_name("rows.accuracies.jsonl"), *shown, "--overwrite", "--accuracies")
    assert data.with_name("rows.accuracies.jsonl").read_bytes() == measured
    assert run("--data", data, "--limit", 5, "--overwrite", "--repeat", "--size", 9) == 0
    kept = read(data.with_name("rows.filtered.jsonl"))
    assert len(kept) == 9 and len({row["id"] for row in kept}) == 9 > len({r["own"] for r in kept})


def test_other_weights_are_refused(
    data: Path, run: Run, without_weights: Path, error_of: ErrorOf
) -> None:
    for content in (b"one", b"two"):
        (without_weights / "model.safetensors").write_bytes(content)
        words = ("--data", data, "--max-new-tokens", 3, "--limit", 4)
        if content == b"one":
            assert run(*words) == 0
            (row, *_) = read(data.with_name("rows.accuracies.jsonl"))
            assert row["model"] == str(without_weights) and len(row["weights"]) == 16
        else:
            said = error_of("filter", without_weights, *words)
            tells(said, "rows.accuracies.jsonl", f"the weights = {row['weights']}", "--overwrite")


def test_a_sample_of_the_questions(data: Path, run: Run) -> None:
    """In the data's sequence, drawn by the seed; a limit as high as the data takes all."""

    def measured(*options: object) -> list[int]:
        assert run("--data", data, "--overwrite", *options) == 0
        return [row["index"] for row in read(data.with_name("rows.accuracies.jsonl"))]

    few = measured("--limit", 9)
    assert few == sorted(set(few)) and len(few) == 9 and few != list(range(9))
    assert measured("--limit", 9) == few != measured("--limit", 9, "--seed", 1)
    assert measured("--limit", 40) == measured("--limit", 41) == list(range(40))


def test_the_data_of_the_run_or_others(
    data: Path, engine: TableEngine, pictures: dict[str, Any], trained: Callable[..., Path]
) -> None:
    """`data.image_root` is about the run's own."""
    own = data.parent / "own" / "rows.jsonl"
    own.parent.mkdir()
    own.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    engine.answer = right(*[5] * ROWS)
    words = ("--max-new-tokens", 3, "--histogram", "uniform")
    folder = trained(data=DataConfig(train=str(own), image_root=str(data.parent)))
    assert run_command("filter", folder, *words) == 0
    assert len(read(own.with_name("rows.filtered.jsonl"))) == 3
    # Of other data all rows are measured, whatever the run holds out or streams.
    for keys in ({"image_root": str(own.parent)}, {"eval": "split:0.4"}, {"streaming": True}):
        folder = trained(data=DataConfig(train=str(own), **keys))
        assert run_command("filter", folder, *words, "--data", data, "--overwrite") == 0
        assert len(read(data.with_name("rows.filtered.jsonl"))) == ROWS
    root = ("--image-root", data.parent)
    assert run_command("filter", folder, *words, "--data", own, *root, "--overwrite") == 0
    kept = load_examples(str(own.with_name("rows.filtered.jsonl")), DataConfig(), "train", 0)
    assert len(kept) == 3 and kept[0].images


FEW = ("--max-new-tokens", 3, "--limit", 4)
TAGGED = RewardConfig(functions=("accuracy(tags=True)", "format"), weights=(0.9, 0.1))


def test_questions_are_measured_by_the_reward_of_the_run(
    data: Path,
    trained: Callable[..., Path],
    engine: TableEngine,
    pictures: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    error_of: ErrorOf,
) -> None:
    def command(*words: object) -> int | str | None:
        return run_command("filter", *words, *FEW)

    engine.answer = lambda asked: "<answer> A </answer>"
    assert command(trained(reward=TAGGED), "--data", data) == 0
    measured = read(data.with_name("rows.accuracies.jsonl"))
    assert {row["accuracy"] for row in measured} == {1.0}
    assert {row["measure"] for row in measured} == {"accuracy(tags=True)"}
    for folder, options, measure in (
        (trained(reward=TAGGED), ("--measure", "accuracy()"), "accuracy()"),
        (
            trained(reward=TAGGED) / "models" / "final",
            ("--measure", "accuracy"),
            "accuracy(tags=True)",
        ),
        (trained(), (), "accuracy"),  # The plain measure is another setting.
    ):
        said = error_of("filter", folder, "--data", data, *FEW, *options)
        tells(said, "measure = accuracy(tags=True)", f"measure = {measure}", "--overwrite")
    assert command(trained(), "--data", data, "--overwrite", "--histogram", "uniform") == 0
    # None of those before.
    (record,) = [r.getMessage() for r in caplog.records if r.name == "perl.evaluation.difficulty"]
    tells(record, "4", "'accuracy'")


@pytest.mark.parametrize(
    ("measure", "name"), [((), "think-box"), (("--measure", "accuracy(tags=True)"), "think-tags")]
)
def test_a_model_without_a_run_is_asked_for_what_the_measure_reads(
    measure: tuple[str, ...], name: str, data: Path, run: Run, engine: TableEngine
) -> None:
    assert run("--data", data, "--limit", 4, "--histogram", "uniform", *measure) == 0
    (message,) = engine.calls[0].variants[0].messages
    assert message.content.splitlines()[-1] == INSTRUCTIONS[name]
    (row, *_) = read(data.with_name("rows.accuracies.jsonl"))
    assert row["instruction"] == name


ALIKE = ("accuracy(tags=True)", "accuracy(unordered=True)")


@pytest.mark.parametrize(
    ("functions", "named", "option", "found"),
    [
        (ALIKE, "accuracy(unordered=True)", None, "accuracy(unordered=True)"),
        (("format",), "accuracy", None, "format"),  # the only one
        (TAGGED.functions, "accuracy", "accuracy", "accuracy(tags=True)"),
        (TAGGED.functions, "accuracy", "accuracy()", "accuracy()"),
        (TAGGED.functions, "accuracy", "choice", "choice"),
        (
            ("choice", "format"),
            "accuracy",
            None,
            ["filter.measure = 'accuracy'", "choice", "format"],
        ),
        (ALIKE, "accuracy", None, ["filter.measure = 'accuracy'", *ALIKE]),
        (ALIKE, "accuracy", "accuracy", ["--measure = 'accuracy'", *ALIKE]),
    ],
)
def test_which_reward_measures(
    functions: tuple[str, ...], named: str, option: str | None, found: str | list[str]
) -> None:
    reward = RewardConfig(functions=functions, weights=(1.0,) * len(functions))
    config = Config(reward=reward, filter=FilterConfig(measure=named))
    if isinstance(found, list):
        with refused(*found):
            measured_function(config, option)
    else:
        assert measured_function(config, option) == found


def test_a_selection_elsewhere_shares_the_pictures(data: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "some.jsonl"
    assert run("--data", data, "--limit", 8, "--size", 8, "--repeat", "--output", output) == 0
    names = {name for row in read(output) for name in row["images"]}
    sources = [data.with_name("pictures") / f"{k}.png" for k in range(5)]
    assert len(names) <= 5
    for name in names:
        assert any((output.parent / name).samefile(source) for source in sources)


@pytest.mark.slow
def test_images_from_nowhere_are_written(
    tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model is asked."""
    monkeypatch.chdir(tmp_path)
    words = ("--data", "bundled:digits", "--limit", 6, "--repeat", "--size", 6)
    assert run_command("filter", tiny_folder("tiny-qwen2.5-vl"), "--max-new-tokens", 3, *words) == 0
    filtered = load_examples("digits.filtered.jsonl", DataConfig(), "train", 0)
    bundled = load_examples("bundled:digits", DataConfig(), "train", 0)
    for i, row in enumerate(read(tmp_path / "digits.filtered.jsonl")):
        example = filtered[i]
        original = next(e for e in (bundled[k] for k in range(6)) if e.id == row["id"])
        assert (example.question, example.answer) == (original.question, original.answer)
        assert (example.kind, example.demonstration) == (original.kind, original.demonstration)
        for image, other in zip(example.images, original.images, strict=True):
            assert image.tobytes() == other.tobytes()
    with Image.open("digits.filtered.png") as picture:
        assert picture.width > 1000
    assert "<svg" in Path("digits.filtered.svg").read_text()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--rollouts", "0"], ["--rollouts 0", "1"]),
        (["--orders", "11"], ["--orders 11", "--rollouts 10"]),
        (["--temperature", "0"], ["--temperature 0.0", "0"]),
        (["--limit", "0"], ["--limit 0", "1"]),
        (["--size", "0"], ["--size 0", "1"]),
        (["--seed", "-1"], ["--seed -1", "0"]),
        (["--measure", "accuraccy"], ["'accuraccy'", "accuracy"]),
        (["--histogram", "1,2"], ["'1,2'", "paper", "uniform", "11"]),
        (["--output", "DATA"], ["DATA", "--output"]),
        (["--accuracies", "DATA"], ["DATA"]),
        (["--accuracies", "OTHER"], ["OTHER", "--accuracies"]),
        (["--output", "OTHER", "--accuracies", "OTHER"], ["OTHER", "--output", "--accuracies"]),
        (["--data", "bundled:digits"], ["bundled:digits", "--limit"]),
        (["--max-prompt-tokens", "5"], ["q0", "data.max_prompt_tokens = 5"]),
        (
            ["--max-prompt-tokens", "5", "--overlong", "drop"],
            ["DATA", "data.max_prompt_tokens = 5", "--max-prompt-tokens"],
        ),
        (["--measure", "NOTHING", "--limit", "4"], ["DATA", "'NOTHING'"]),
    ],
)
def test_what_is_refused(
    options: list[str],
    names: list[str],
    data: Path,
    engine: TableEngine,
    without_weights: Path,
    error_of: ErrorOf,
) -> None:
    other, mine = data.with_name("other.jsonl"), data.with_name("mine.py")
    other.write_text('{"mine": 1}\n')
    mine.write_text("def nothing(completions, **columns):\n    return [None] * len(completions)\n")
    files = {"DATA": str(data), "OTHER": str(other), "NOTHING": f"{mine}:nothing"}
    given = [files.get(option, option) for option in options]
    source = [] if "--data" in options else ["--data", str(data)]
    said = error_of("filter", without_weights, *source, *given)
    tells(said, *(re.sub("[A-Z]{4,}", lambda m: files[m[0]], name) for name in names))
    assert other.read_text() == '{"mine": 1}\n'
    assert not data.with_name("rows.filtered.jsonl").exists()
