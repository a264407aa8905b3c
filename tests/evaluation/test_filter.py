"""The filter command on a tiny model: what it measures, keeps, refuses, and goes on with."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.config import Config, DataConfig, FilterConfig, ModelConfig, RewardConfig
from perl.data.dataset import load_examples, validate
from perl.evaluation.difficulty import CHUNK
from perl.recipe import measured_function, save_config
from perl.rewards.scorer import BUILT_IN
from perl.types import UserError
from tests.command_line import ErrorOf
from tests.command_line import run as run_command

ROWS = 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions over pictures in a sub-folder."""
    (tmp_path / "pictures").mkdir()
    for k in range(5):
        Image.new("RGB", (28, 28), (50 * k, 30, 0)).save(tmp_path / "pictures" / f"{k}.png")
    rows = []
    for k in range(ROWS):
        row = {"id": f"q{k}", "question": "A <image> B <image> Which image shows three ?", "own": k}
        row |= {"images": [f"pictures/{k % 5}.png", f"pictures/{(k + 1) % 5}.png"], "answer": "A"}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def run(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int | str | None]:
    """The command on a tiny model. Its weights are random and it is never right: a hash of what it writes decides."""

    def chance(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(hashlib.sha256(text.encode()).digest()[0] < 100) for text in completions]

    monkeypatch.setitem(BUILT_IN, "accuracy", chance)

    def filter_with(*options: object) -> int | str | None:
        return run_command(
            "filter", tiny_folder("tiny-qwen2.5-vl"), "--max-new-tokens", 3, *options
        )

    return filter_with


@pytest.fixture
def trained(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A run folder with the tiny model and the settings of a run."""

    def folder(**sections: Any) -> Path:
        root = tmp_path / "run"
        (root / "models").mkdir(parents=True, exist_ok=True)
        if not (root / "models" / "final").exists():
            (root / "models" / "final").symlink_to(tiny_folder("tiny-qwen2.5-vl"))
        save_config(Config(**sections), root / "config.toml")
        return root

    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_filtered_data_trains_directly(
    data: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", data, "--histogram", "uniform") == 0
    measured = read(data.with_name("rows.accuracies.jsonl"))
    assert [row["index"] for row in measured] == list(range(ROWS))
    assert all(row["rollouts"] == 10 for row in measured)
    kept = read(data.with_name("rows.filtered.jsonl"))
    originals = read(data)
    assert 0 < len(kept) < ROWS
    for row in kept:
        number = row["own"]
        assert row == {**originals[number], "accuracy": measured[number]["accuracy"]}
    counts = np.bincount([round(10 * row["accuracy"]) for row in kept])
    assert counts[counts > 0].max() - counts[counts > 0].min() <= 1
    examples = load_examples(str(data.with_name("rows.filtered.jsonl")), DataConfig(), "train", 0)
    validate(examples)
    assert examples[0].images[0].size == (28, 28)
    with Image.open(data.with_name("rows.filtered.png")) as picture:
        assert picture.width > 1000
    assert "<svg" in data.with_name("rows.filtered.svg").read_text()
    assert "before" in capsys.readouterr().out


def test_a_stopped_measurement_goes_on_with_the_same_numbers(
    data: Path,
    run: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [data.with_name(f"rows.{name}.jsonl") for name in ("accuracies", "filtered")]
    assert run("--data", data, "--orders", 2) == 0
    whole = [name.read_bytes() for name in names]
    names[0].write_bytes(whole[0][: 7 * len(whole[0]) // 8])
    assert run("--data", data, "--orders", 2) == 0
    assert [name.read_bytes() for name in names] == whole
    assert "questions are measured" not in capsys.readouterr().out
    assert run("--data", data, "--orders", 2, "--size", 5) == 0
    assert "all 40 questions are measured" in capsys.readouterr().out
    assert len(read(names[1])) == 5 and names[0].read_bytes() == whole[0]

    def interrupt(self: Any, steps: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("perl.report.progress.Display.advance", interrupt)
    assert run("--data", data, "--orders", 2, "--overwrite") == 130
    assert "stopped: 32 of 40 questions are measured" in capsys.readouterr().err
    monkeypatch.undo()
    assert whole[0].startswith(names[0].read_bytes())


def test_what_limits_the_size_is_told(
    data: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: object) -> list[str]:
        assert run("--data", data, *options) == 0
        return re.findall("^kept .*$", capsys.readouterr().out, re.MULTILINE)

    (line,) = said("--histogram", "1,1,1,1,1,1,1,1,1,1,1")
    measured = [row["accuracy"] for row in read(data.with_name("rows.accuracies.jsonl"))]
    kept = [row["accuracy"] for row in read(data.with_name("rows.filtered.jsonl"))]
    numbers = re.fullmatch(
        r"kept (\d+) of 40: of accuracy (0\.\d) there are only (\S+) %, and 9.1 % are wanted; "
        "--size and --repeat keep more",
        line,
    )
    assert numbers is not None and int(numbers[1]) == len(kept) < 20
    scarce = float(numbers[2])
    assert kept.count(scarce) == measured.count(scarce) == round(float(numbers[3]) * 40 / 100)
    assert said("--size", 3) == said("--repeat") == []
    assert said("--histogram", ",".join(str(measured.count(k / 10)) for k in range(11))) == []


def test_other_settings_are_refused(
    data: Path, run: Callable[..., Any], trained: Callable[..., Path], error_of: ErrorOf
) -> None:
    assert run("--data", data, "--limit", 4, "--max-prompt-tokens", 100) == 0
    measured = data.with_name("rows.accuracies.jsonl").read_bytes()
    four, same = ("--limit", 4), ModelConfig()
    for options, model, match in (
        ((*four, "--seed", 1), same, "was measured with seed = 0, not seed = 1"),
        ((*four, "--rollouts", 4), same, "was measured with rollouts = 10, not rollouts = 4"),
        (
            (*four, "--max-prompt-tokens", 60),
            same,
            "with max_prompt_tokens = 100, not max_prompt_tokens = 60",
        ),
        (four, ModelConfig(min_pixels=3136), "not min_pixels = 3136"),
        (four, ModelConfig(max_pixels=3136), "not max_pixels = 3136"),
        (("--limit", 3), same, "was measured on other questions"),
        ((), same, "was measured on other questions"),
    ):
        folder = trained(model=model)
        said = error_of("filter", folder, "--data", data, "--max-new-tokens", 3, *options)
        assert f"{match}; measure again with --overwrite" in said
    assert data.with_name("rows.accuracies.jsonl").read_bytes() == measured
    assert run("--data", data, "--limit", 5, "--overwrite", "--repeat", "--size", 9) == 0
    kept = read(data.with_name("rows.filtered.jsonl"))
    assert len(kept) == 9 and len({row["id"] for row in kept}) == 9 > len({r["own"] for r in kept})


def test_a_higher_limit_measures_what_was_left_out(
    data: Path, run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A question of the second chunk has a longer prompt than the others."""
    originals = read(data)
    originals[35]["question"] += " Which image shows three ?" * 20
    data.write_text("".join(json.dumps(row) + "\n" for row in originals))
    record = data.with_name("rows.accuracies.jsonl")

    def measured() -> list[tuple[str, float | None, int]]:
        return [(row["id"], row["accuracy"], row["rollouts"]) for row in read(record)]

    assert run("--data", data) == 0
    whole = measured()
    short = ("--data", data, "--max-prompt-tokens", 60, "--overlong", "drop")
    assert run(*short, "--overwrite") == 0
    left = record.read_bytes()
    assert measured()[35] == ("q35", None, 0) and measured()[:CHUNK] == whole[:CHUNK]
    assert run(*short) == 0 and record.read_bytes() == left and "again" not in caplog.text
    assert run("--data", data, "--max-prompt-tokens", 400) == 0
    assert "1 questions were left out with max_prompt_tokens = 60; question 32" in caplog.text
    assert measured() == whole
    limits = [row["max_prompt_tokens"] for row in read(record)]
    assert limits == [60] * CHUNK + [400] * (ROWS - CHUNK)  # The first chunk was not done again.
    assert run("--data", data) == 0 and measured() == whole


def command(*words: object) -> int | str | None:
    return run_command("filter", *words, "--max-new-tokens", "3", "--limit", "4")


TAGGED = RewardConfig(functions=("accuracy(tags=True)", "format"), weights=(0.9, 0.1))


def test_questions_are_measured_by_the_reward_of_the_run(
    data: Path,
    trained: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from perl.model.processor import Processor

    monkeypatch.setattr(Processor, "decode", lambda self, ids: "<answer> A </answer>")
    assert command(trained(reward=TAGGED), "--data", data) == 0
    measured = read(data.with_name("rows.accuracies.jsonl"))
    assert {row["accuracy"] for row in measured} == {1.0}
    assert {row["measure"] for row in measured} == {"accuracy(tags=True)"}
    assert "accuracy of 0 by" not in caplog.text
    assert command(trained(reward=TAGGED), "--data", data, "--measure", "accuracy()") == 2
    assert "not measure = accuracy();" in capsys.readouterr().err
    assert command(trained(), "--data", data) == 2  # The plain measure is another setting.
    assert "not measure = accuracy;" in capsys.readouterr().err
    assert command(trained(), "--data", data, "--overwrite", "--histogram", "uniform") == 0
    said = [r.message for r in caplog.records if "accuracy of 0 by" in r.message]
    assert len(said) == 1 and "all 4 questions" in said[0] and "'accuracy'" in said[0]


ALIKE = ("accuracy(tags=True)", "accuracy(unordered=True)")
SEVERAL = r"may be any of accuracy\(tags=True\), "


@pytest.mark.parametrize(
    ("functions", "named", "option", "found"),
    [
        (ALIKE, "accuracy(unordered=True)", None, "accuracy(unordered=True)"),
        (("format",), "accuracy", None, "format"),  # the only one
        (TAGGED.functions, "accuracy", "accuracy", "accuracy(tags=True)"),
        (TAGGED.functions, "accuracy", "accuracy()", "accuracy()"),
        (TAGGED.functions, "accuracy", "choice", "choice"),
        (("choice", "format"), "accuracy", None, r"filter.measure = 'accuracy' is none of"),
        (ALIKE, "accuracy", None, f"filter.measure = 'accuracy' {SEVERAL}"),
        (ALIKE, "accuracy", "accuracy", f"--measure = 'accuracy' {SEVERAL}"),
    ],
)
def test_which_reward_measures(
    functions: tuple[str, ...], named: str, option: str | None, found: str
) -> None:
    reward = RewardConfig(functions=functions, weights=(1.0,) * len(functions))
    config = Config(reward=reward, filter=FilterConfig(measure=named))
    if " " in found:
        with pytest.raises(UserError, match=found):
            measured_function(config, option)
    else:
        assert measured_function(config, option) == found


def test_a_selection_elsewhere_shares_the_pictures(
    data: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "some.jsonl"
    assert run("--data", data, "--limit", 8, "--size", 8, "--repeat", "--output", output) == 0
    names = {name for row in read(output) for name in row["images"]}
    sources = [data.with_name("pictures") / f"{k}.png" for k in range(5)]
    assert len(names) <= 5
    for name in names:
        assert any((output.parent / name).samefile(source) for source in sources)


def test_images_from_nowhere_are_written(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--data", "bundled:digits", "--limit", 6, "--repeat", "--size", 6) == 0
    filtered = load_examples("digits.filtered.jsonl", DataConfig(), "train", 0)
    bundled = load_examples("bundled:digits", DataConfig(), "train", 0)
    for i, row in enumerate(read(tmp_path / "digits.filtered.jsonl")):
        example = filtered[i]
        original = next(e for e in (bundled[k] for k in range(6)) if e.id == row["id"])
        assert (example.question, example.answer) == (original.question, original.answer)
        assert (example.kind, example.demonstration) == (original.kind, original.demonstration)
        for image, other in zip(example.images, original.images, strict=True):
            assert image.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--rollouts", "0"], "--rollouts 0: must be greater than or equal to 1"),
        (["--orders", "11"], "--orders 11 is more than --rollouts 10"),
        (["--temperature", "0"], "--temperature 0.0: must be greater than 0"),
        (["--limit", "0"], "--limit 0: must be greater than or equal to 1"),
        (["--size", "0"], "--size 0: must be greater than or equal to 1"),
        (["--seed", "-1"], "--seed -1: must be greater than or equal to 0"),
        (["--measure", "accuraccy"], "unknown reward function 'accuraccy'"),
        (["--histogram", "1,2"], "write paper, uniform, or 11 shares"),
        (["--output", "DATA"], "is the data itself"),
        (["--accuracies", "DATA"], "is the data itself"),
        (["--accuracies", "OTHER"], "holds no accuracies"),
        (["--output", "OTHER", "--accuracies", "OTHER"], "choose two files"),
        (
            ["--data", "bundled:digits"],
            "is endless; say how many questions to measure with --limit",
        ),
        (["--max-prompt-tokens", "5"], "raise it with --max-prompt-tokens"),
        (
            ["--max-prompt-tokens", "5", "--overlong", "drop"],
            "has a prompt over data.max_prompt_tokens = 5; raise it with --max-prompt-tokens",
        ),
        (["--measure", "NOTHING", "--limit", "4", "--max-new-tokens", "3"], "no completion for"),
    ],
)
def test_what_is_refused(
    options: list[str],
    match: str,
    data: Path,
    tiny_folder: Callable[[str], Path],
    error_of: ErrorOf,
) -> None:
    other, mine = data.with_name("other.jsonl"), data.with_name("mine.py")
    other.write_text('{"mine": 1}\n')
    mine.write_text(
        "def nothing(prompts, completions, **columns):\n    return [None] * len(completions)\n"
    )
    names = {"DATA": str(data), "OTHER": str(other), "NOTHING": f"{mine}:nothing"}
    given = [names.get(option, option) for option in options]
    source = [] if "--data" in options else ["--data", str(data)]
    assert match in error_of("filter", tiny_folder("tiny-qwen2.5-vl"), *source, *given)
    assert other.read_text() == '{"mine": 1}\n'
    assert not data.with_name("rows.filtered.jsonl").exists()
