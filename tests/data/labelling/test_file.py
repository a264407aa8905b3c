"""Labelled files: what the command writes, keeps and goes on with, by rules and by a model in a thread."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.labelling.label import Label, kind_of
from tests.chat_server import Model
from tests.command_line import ErrorOf
from tests.command_line import run as run_command
from tests.messages import tells

ROWS: list[dict[str, Any]] = [
    {"question": "A <image> B <image> Which image shows a fox?", "images": 2, "answer": "B"},
    {"question": "<image> Which view is it? A. <image> B. <image>", "images": 3, "answer": "A"},
    {"question": "<image><image> How many images show a fox?", "images": 2, "answer": "1", "n": 7},
    {"question": "<image><image> What happens next?", "images": 2, "answer": "rain"},
    {"question": "<image><image> What is it?", "images": 2, "answer": "a lamp"},
    {"question": "<image> What is it?", "images": 1, "answer": "a lamp"},
]
LABELS = [("all", True), ("first_fixed", True), ("all", False)] + [("none", False)] * 3


DOCUMENT = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows whose images are counted; the pictures lie beside the file."""
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    for k in range(4):
        Image.new("RGB", (4, 4), (60 * k, 0, 0)).save(folder / f"{k}.png")
    full = [{**row, "images": [f"pictures/{k}.png" for k in range(row["images"])]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object) -> int | str | None:
    return run_command("label", *arguments)


def labels(path: Path) -> list[tuple[str, bool]]:
    return [(row["kind"], row["should_change"]) for row in read(path)]


def test_a_plan_of_the_user_s_own_stays(data: Path) -> None:
    rows = read(data)
    data.write_text("".join(json.dumps(row | {"plan": "B"}) + "\n" for row in rows))
    assert run(data) == 0
    output = data.with_name("rows.labelled.jsonl")
    assert [row["plan"] for row in read(output)] == ["B"] * len(rows)
    example = load_examples(str(output), DataConfig(), "train", 0)[0]
    assert example.extra["plan"] == "B" and example.plan is not None


def label_json(kind: str, change: bool) -> str:
    return json.dumps({"kind": kind, "should_change": change, "reason": "because"})


def test_rows_keep_their_columns_and_load_with_their_labels(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    assert run(data) == 0
    output = data.with_name("rows.labelled.jsonl")
    assert labels(output) == LABELS
    added = {"kind", "should_change", "label_reason", "label_text", "plan"}
    kept = [{k: v for k, v in row.items() if k not in added} for row in read(output)]
    assert kept == read(data) and data.read_bytes() == before
    assert all(row["label_reason"] for row in read(output))
    examples = load_examples(str(output), DataConfig(), "train", 0)
    assert [(examples[i].kind, examples[i].should_change) for i in range(6)] == LABELS
    table = capsys.readouterr().out
    assert re.search(r"none +false +a single \w+ +1\b", table)


def test_elsewhere_the_images_go_along(data: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    output = tmp_path / "other" / "out.jsonl"
    assert run(data, "--output", output, "--limit", 2) == 0
    (tmp_path / "other").rename(tmp_path / "moved")
    examples = load_examples(str(tmp_path / "moved" / "out.jsonl"), DataConfig(), "train", 0)
    assert len(examples) == 2
    assert [image.getpixel((0, 0))[0] for image in examples[1].images] == [0, 60, 120]


def test_columns_named_by_the_user(data: Path, tmp_path: Path) -> None:
    names = {"question": "q", "answer": "gt", "images": "pics", "kind": "k", "should_change": "s"}
    old = {"kind": None, "should_change": None}
    theirs = [{names.get(k, k): v for k, v in {**row, **old}.items()} for row in read(data)]
    theirs[5] |= {"k": "none", "s": "no"}
    mapped = data.with_name("theirs.jsonl")
    mapped.write_text("".join(json.dumps(row) + "\n" for row in theirs))
    (tmp_path / "other").mkdir()
    output, given = tmp_path / "other" / "out.jsonl", [f"{k}={v}" for k, v in names.items()]
    assert run(mapped, "--map", *given, "--output", output) == 0
    assert [(row["k"], row["s"]) for row in read(output)] == LABELS
    assert read(output)[0].keys() == {*names.values(), "label_reason", "label_text", "plan"}
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:3]))
    assert run(mapped, "--map", *given, "--output", output) == 0 and len(read(output)) == 6
    again = load_examples(str(output), DataConfig(map=tuple(given)), "train", 0)
    assert [image.getpixel((0, 0))[0] for image in again[1].images] == [0, 60, 120]


def test_images_below_another_root(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    """Paths from the folder where the command runs, and from the root of the file system."""
    texts, output = tmp_path / "texts", tmp_path / "texts" / "rows.labelled.jsonl"
    texts.mkdir()
    rows = read(data)
    rows[1]["images"] = [str(tmp_path / name) for name in rows[1]["images"]]
    (texts / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    tells(error_of("label", "texts/rows.jsonl"), "line 1", "--image-root .")
    assert run("texts/rows.jsonl", "--image-root", ".") == 0
    assert labels(output) == LABELS
    examples = load_examples(str(output), DataConfig(), "train", 0)
    assert [image.getpixel((0, 0))[0] for image in examples[1].images] == [0, 60, 120]
    one = {"question": "<image> What is it?", "pic": "pictures/0.png", "answer": "a lamp"}
    (texts / "rows.jsonl").write_text((json.dumps(one) + "\n") * 2)
    words = ("texts/rows.jsonl", "--image-root", ".", "--map", "image=pic")
    assert run(*words, "--limit", 1, "--overwrite") == 0 == run(*words) and len(read(output)) == 2


@pytest.mark.parametrize("labeller", ["rules", "llm"])
def test_faulty_rows(
    labeller: str, tmp_path: Path, model: Model, error_of: ErrorOf, caplog: pytest.LogCaptureFixture
) -> None:
    model.answer = lambda task: label_json("all", False)
    rows = [{**ROWS[4], "answer": f"a lamp {k}"} for k in range(6)]
    data = write(tmp_path / "rows.jsonl", rows)
    output, lines = tmp_path / "rows.labelled.jsonl", data.read_text().splitlines(keepends=True)
    faulty = [*lines[:2], lines[2].replace("0.png", "9.png"), lines[3], lines[4][1:], lines[5]]
    data.write_text("".join(faulty))

    def answers() -> list[str]:
        return [row["answer"][-1] for row in read(output)]

    tells(
        error_of("label", data, "--labeller", labeller),
        *("line 3", "9.png", "2 of 6", output, "--on-error skip"),
    )
    assert answers() == ["0", "1"]
    skip = ("--labeller", labeller, "--on-error", "skip")
    assert run(data, *skip, "--limit", 4) == 0 and answers() == ["0", "1", "3"]
    tells(caplog.messages[-1], "line 3", "9.png")
    assert run(data, *skip) == 0 and answers() == ["0", "1", "3", "5"]  # It goes on.
    output.unlink()
    data.write_text("".join([*faulty[:2], *lines[2:3], *faulty[3:]]))
    tells(error_of("label", data), "line 5", "4 of 6")
    data.write_text("".join(lines))
    assert run(data) == 0 and answers() == [str(k) for k in range(6)]
    data.write_text("".join(line[1:] for line in lines))
    tells(error_of("label", data, "--overwrite"), "line 1")


def test_no_sound_row(data: Path, error_of: ErrorOf) -> None:
    data.write_text(data.read_text().replace(".png", ".gif"))
    tells(error_of("label", data, "--on-error", "skip"), "6", "perl-rl check")
    assert not data.with_name("rows.labelled.jsonl").exists()


def test_parquet_with_embedded_images(data: Path) -> None:
    import datasets

    images = [
        [{"bytes": (data.parent / name).read_bytes(), "path": None} for name in row["images"]]
        for row in read(data)
    ]
    columns = {key: [row[key] for row in ROWS] for key in ("question", "answer")}
    table = datasets.Dataset.from_dict({**columns, "images": images})
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(str(data.with_name("rows.parquet")))
    assert run(data.with_name("rows.parquet")) == 0
    output = data.with_name("rows.labelled.jsonl")
    assert labels(output) == LABELS
    examples = load_examples(str(output), DataConfig(), "train", 0)
    assert [image.getpixel((0, 0))[0] for image in examples[1].images] == [0, 60, 120]


def test_labels_that_are_there_stay(tmp_path: Path) -> None:
    three = {"question": "<image> <image> <image> How many images show it?", "images": 3}
    fixed, none = ("first_fixed", True), ("none", False)
    rows: list[tuple[dict[str, Any], tuple[str, bool]]] = [
        ({**ROWS[0], "kind": "none", "should_change": False}, none),
        ({**ROWS[0], "should_change": False}, none),  # "B" labels an image, and would stay.
        ({**ROWS[2], "kind": "none"}, none),
        ({**ROWS[2], "kind": "all", "should_change": True, "answer": "many"}, none),
        ({**ROWS[1], "change_needed": True}, fixed),
        ({**ROWS[0], "should_change": "perhaps", "note": "\ud800 ä"}, ("all", True)),
        ({**ROWS[1], "kind": "all"}, none),  # The picture of the question would get the letter.
        ({**ROWS[2], **three, "kind": "first_fixed"}, ("first_fixed", False)),
        ({**ROWS[0], "kind": "all", "should_change": False}, none),
    ]
    data = write(tmp_path / "rows.jsonl", [row for row, _ in rows])
    output = tmp_path / "rows.labelled.jsonl"
    assert run(data) == 0
    assert labels(output) == [label for _, label in rows]
    assert read(output)[5]["note"] == "\ud800 ä"
    for i in (1, 3, 6, 8):
        assert read(output)[i]["label_reason"].startswith("unsure: ")
    assert run(data, "--overwrite", "--relabel") == 0
    assert labels(output)[:3] == [("all", True), ("all", True), ("all", False)]


def test_mentions_follow_where_the_training_lets_them(tmp_path: Path) -> None:
    question = "<image><image> Is the dog in image 1 larger than the one in image 2?"
    data = write(tmp_path / "r.jsonl", [{"question": question, "images": 2, "answer": "Yes"}])
    assert run(data) == 0
    assert labels(tmp_path / "r.labelled.jsonl") == [("none", False)]
    assert run(data, "--text", "references", "--overwrite") == 0
    assert labels(tmp_path / "r.labelled.jsonl") == [("all", False)]


def test_a_stopped_labelling_goes_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data) == 0
    output = data.with_name("rows.labelled.jsonl")
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace('"label_reason": "', '"label_reason": "kept: ')
    output.write_text(marked + lines[1] + lines[2][:40])
    capsys.readouterr()
    assert run(data) == 0
    assert output.read_text() == marked + "".join(lines[1:])
    assert "kept: " in capsys.readouterr().out
    assert run(data) == 0
    tells(capsys.readouterr().out, "6 rows", output, "--overwrite")
    assert run(data, "--text", "references") == 2
    tells(
        capsys.readouterr().err, f"--output {output}", "--text slots", "references", "--overwrite"
    )
    assert run(data, "--text", "references", "--overwrite") == 0


@pytest.mark.usefixtures("no_endpoint")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["perl-rl label", "file"]),
        (["bundled:digits"], ["bundled:digits"]),
        (["none.jsonl"], ["none.jsonl", "path"]),
        (["DATA", "--limit", "0"], ["--limit 0", 1]),
        (["DATA", "--output", "DATA"], ["--output DATA", "another"]),
        (["DATA", "--output", "no/folder.jsonl"], ["--output no/folder.jsonl", "folder"]),
        (["DATA", "--labeller", "llm"], ["PERL_LLM_URL", "PERL_LLM_MODEL"]),
        (["DATA", "--rephrase"], ["PERL_LLM_URL", "PERL_LLM_MODEL"]),
        (["DATA", "--labeller", "gpt"], ["--labeller", "'gpt'"]),
        (["DATA", "--output", "OTHER"], ["--output OTHER", "--overwrite"]),
        (["DATA", "--output", "OTHER", "--overwrite"], ["--output OTHER", "another"]),
    ],
)
def test_what_is_refused(
    options: list[str], names: list[object], data: Path, error_of: ErrorOf
) -> None:
    other = data.with_name("other.jsonl")
    other.write_text('{"mine": 1}\n')

    def placed(text: object) -> str:
        return str(text).replace("DATA", str(data)).replace("OTHER", str(other))

    before = sorted(data.parent.iterdir())
    tells(error_of("label", *map(placed, options)), *map(placed, names))
    assert sorted(data.parent.iterdir()) == before and other.read_text() == '{"mine": 1}\n'


def test_a_row_that_cannot_be_read_is_named(data: Path, error_of: ErrorOf) -> None:
    data.write_text(data.read_text().replace("pictures/1.png", "pictures/9.png", 1))
    tells(error_of("label", data), "rows.jsonl line 1, image 2", "pictures/9.png", "path")
    assert not data.with_name("rows.labelled.jsonl").exists()


def test_a_model_labels(data: Path, model: Model) -> None:
    said = {
        "happens next": f"<think>{{}}</think>\n```json\n{label_json('none', False)}\n```",
        "Which view": label_json("first_fixed", True),
        "Which image shows a fox": label_json("all", True),
        "": label_json("all", False),
    }
    model.answer = lambda task: next(label for words, label in said.items() if words in task)
    assert run(data, "--labeller", "llm") == 0
    output = data.with_name("rows.labelled.jsonl")
    assert labels(output) == [*LABELS[:4], ("all", False), LABELS[5]]
    found = read(output)
    assert len(model.asked) == 5 and found[0]["label_reason"] == "model: because"
    assert ROWS[0]["question"] in "\n".join(model.asked) and not found[5][
        "label_reason"
    ].startswith("model: ")


def test_a_model_is_asked_where_the_rules_are_unsure(data: Path, model: Model) -> None:
    model.answer = lambda task: label_json("all", False)
    assert run(data, "--labeller", "rules+llm") == 0
    assert labels(data.with_name("rows.labelled.jsonl")) == [*LABELS[:4], ("all", False), LABELS[5]]
    assert len(model.asked) == 1 and "What is it?" in model.asked[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I cannot tell", "JSON object"),
        ("{'kind': 'all'}", "malformed JSON"),
        ('{"kind": "all", "should_change": "yes", "reason": ""}', "should_change"),
        (label_json("most", False), "'most'"),
        (label_json("last:9", False), "last:9"),
        (label_json("all", True), "2 images"),
        (label_json("ordering", True), "'ordering'"),
        ((400, {"error": {"message": "too long"}}), "too long"),
    ],
)
def test_a_model_that_gives_no_label_leaves_the_images_alone(
    answer: Any, reason: str, tmp_path: Path, model: Model
) -> None:
    model.answer = lambda task: answer
    data = write(tmp_path / "rows.jsonl", [ROWS[4]])
    assert run(data, "--labeller", "llm") == 0
    (row,) = read(tmp_path / "rows.labelled.jsonl")
    assert (row["kind"], row["should_change"]) == ("none", False)
    assert row["label_reason"].startswith("unsure: ") and reason in row["label_reason"]
    assert len(model.asked) == (1 if isinstance(answer, tuple) else 2)
    if len(model.asked) == 2:
        assert reason in model.asked[1]


def test_a_model_may_not_say_that_a_letter_of_an_image_stays(tmp_path: Path, model: Model) -> None:
    model.answer = lambda task: label_json("all", len(model.asked) > 1)
    data = write(tmp_path / "rows.jsonl", [ROWS[0]])
    assert run(data, "--labeller", "llm") == 0
    assert labels(tmp_path / "rows.labelled.jsonl") == [("all", True)]
    assert len(model.asked) == 2
    tells(model.asked[1], "'B'", "image 2")


def test_an_endpoint_that_goes_down_loses_nothing(
    tmp_path: Path, model: Model, error_of: ErrorOf
) -> None:
    rows = [{**ROWS[4], "answer": f"a lamp {k}"} for k in range(40)]
    data = write(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "rows.labelled.jsonl"
    model.answer = lambda task: (500, {}) if "lamp 35" in task else label_json("all", False)
    said = error_of("label", data, "--labeller", "llm")
    tells(said, 500, "35 of 40", output)
    assert [row["answer"] for row in read(output)] == [f"a lamp {k}" for k in range(35)]
    model.asked.clear()
    model.answer = lambda task: label_json("all", False)
    assert run(data, "--labeller", "llm") == 0
    assert len(model.asked) == 5 and labels(output) == [("all", False)] * 40
    assert [row["answer"] for row in read(output)] == [row["answer"] for row in rows]


def test_the_documents_example_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n([^`]*pets.*?)```", DOCUMENT, flags=re.DOTALL)
    (table,) = re.findall(r"```\n(pets.labelled.jsonl\n.*?)```", DOCUMENT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert run("pets.jsonl") == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown == table.splitlines()
    assert run("pets.jsonl", "--text", "references", "--overwrite") == 0
    assert labels(tmp_path / "pets.labelled.jsonl")[1] == ("all", True)


def test_the_documents_rows_are_read(tmp_path: Path) -> None:
    rows, *_ = re.findall(r"```json\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for name in re.findall(r"[\w/]+\.png", rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "train.jsonl").write_text(rows)
    examples = load_examples(str(tmp_path / "train.jsonl"), DataConfig(), "train", 0)
    written = [json.loads(line) for line in rows.splitlines() if line.strip()]
    found = [examples[i] for i in range(len(examples))]
    assert [(e.answer, len(e.images)) for e in found] == [
        (row["answer"], len(row["images"])) for row in written
    ]


def test_names_of_kinds() -> None:
    assert [kind_of(slots, 4) for slots in ([0, 1, 2, 3], [3, 2, 1], [2, 3], [0, 2], [3], [])] == (
        ["all", "first_fixed", "last:2", "blocks:1,3", "none", "none"]
    )
    assert Label("all", True, "x").sure and not Label("none", False, "unsure: x").sure
