"""`perl-rl preview` of data: each row as the model would see it, in each order, and what training would refuse."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.cli import parse
from perl.data.dataset import load_examples
from perl.evaluation.preview.page import OPEN
from perl.recipe import plan
from perl.rollout.collect import drawn_orders
from tests.command_line import ErrorOf, run
from tests.messages import tells
from tests.pictures import encoded

COLOURS = {"r.png": (250, 0, 0), "g.png": (0, 250, 0), "b.png": (0, 0, 250)}
THREE = ["r.png", "g.png", "b.png"]
LETTERED = "A. <image> B. <image> C. <image> Which is <b>green</b>?"
GREEN = {"1 2 3": "B", "1 3 2": "C", "2 1 3": "A", "2 3 1": "A", "3 1 2": "C", "3 2 1": "B"}
"""The letter of the green picture, which is the second of the data, in each order of the three."""
Said = tuple[list[dict[str, Any]], str]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes rows, or lines as they are, beside the pictures in COLOURS; unlike what is said they have two pictures, labels
    of a hand and the answer A."""
    monkeypatch.chdir(tmp_path)
    for name, colour in COLOURS.items():
        Path(name).write_bytes(encoded(colour))

    def write(*rows: dict[str, Any] | str) -> Path:
        row = {
            "question": "A <image> B <image> Which?",
            "images": THREE[:2],
            "answer": "A",
            "kind": "all",
        }
        lines = [each if isinstance(each, str) else json.dumps(row | each) for each in rows]
        Path("rows.jsonl").write_text("\n".join(lines) + "\n")
        return Path("rows.jsonl")

    return write


@pytest.fixture
def said(rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The objects that the command prints for rows, and what it says beside them."""

    def said(*given: dict[str, Any] | str, options: tuple[object, ...] = ()) -> Said:
        assert run("preview", rows(*given), "--json", *options) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return said


def test_a_row_in_all_orders(said: Callable[..., Said]) -> None:
    row = {"id": "q", "question": LETTERED, "images": THREE, "answer": "B"}
    lines, _ = said(row, options=("--orders", "all"))
    assert lines[0] == {
        "id": "q",
        "order": [1, 2, 3],
        "images": THREE,
        "text": LETTERED,
        "answer": "B",
        "kind": "all",
        "should_change": True,
        "reason": "as labelled",
    }
    assert {" ".join(map(str, line["order"])): line["answer"] for line in lines} == GREEN
    for line in lines:
        assert line["images"] == [THREE[i - 1] for i in line["order"]]
        assert line["text"] == LETTERED


def test_text_that_follows_the_images(
    said: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    question = "<image><image> Is image 1 larger than image 2?"
    row = {"question": question, "answer": "no", "should_change": False}
    lines, _ = said(row, options=("--text", "references"))
    assert [line["text"].partition(" ")[2] for line in lines] == [
        "Is image 1 larger than image 2?",
        "Is image 2 larger than image 1?",
    ]
    assert run("preview", "rows.jsonl", "--text", "references") == 0
    tells(capsys.readouterr().out, "1 to 2, g.png from 2 to 1; the text")
    refused, _ = said(row)
    tells(refused[0]["refused"], "rows.jsonl line 1", "image 1", "permutation.text")


def test_what_keeps_its_images_and_what_is_refused(said: Callable[..., Said]) -> None:
    Path("cut.png").write_bytes(Path("r.png").read_bytes()[:45])
    lines, summary = said(
        {"kind": None, "question": "<image><image> What is next?", "answer": "It rains"},
        {"id": "one", "images": ["r.png"], "question": "<image> What?"},
        {"id": "by rule", "kind": "none", "label_reason": "the text speaks of a sequence"},
        {"id": "twice", "images": ["r.png", "r.png"], "answer": "no", "should_change": False},
        {
            "id": "twice",
            "images": ["r.png", "r.png"],
            "answer": "no",
            "should_change": False,
            "label_reason": "as given",
        },
        {"id": "cut", "images": ["cut.png", "g.png"]},
        {"id": "gone", "images": ["gone.png", "g.png"]},
        {"id": "no label", "answer": "a dog"},
        "{broken",
        {"id": "last"},
    )
    shown = [line for line in lines if "order" in line]
    assert [(line["id"], line["order"], line["kind"]) for line in shown] == [
        ("row-000000", [1, 2], "none"),
        ("one", [1], "all"),
        ("by rule", [1, 2], "none"),
        ("twice", [1, 2], "all"),
        ("twice", [1, 2], "all"),
        ("last", [1, 2], "all"),
        ("last", [2, 1], "all"),
    ]
    tells(shown[0]["reason"], "perl-rl label")
    assert shown[2]["reason"] == "the text speaks of a sequence"
    alone = ", and no other order shows anything else"
    reasons = [line["reason"] for line in shown[3:6]]
    assert reasons == [f"as labelled{alone}", f"as given{alone}", "as labelled"]
    refused = [line for line in lines if "order" not in line]
    assert [list(line) for line in refused] == [["id", "refused"]] * 4
    assert [line["id"] for line in refused] == ["cut", "gone", "no label", "row-000008"]
    for line, names in zip(refused, (["cut.png"], ["gone.png"], ["a dog"], ["JSON"]), strict=True):
        tells(line["refused"], *names)
    for number, line in enumerate(refused, 6):
        tells(line["refused"], f"line {number}")
    tells(summary.splitlines()[-1], "10 rows", "1 permuted", "5 kept", "4 refused")


def test_a_named_model_refuses_what_it_cannot_take(
    said: Callable[..., Said], tiny_folder: Callable[[str], Path]
) -> None:
    model = ("--model.path", tiny_folder("tiny-qwen2.5-vl"))
    given = {"question": "A <image> B <image> <|image_pad|> Which?"}, {"id": "taken"}
    lines, _ = said(*given, options=model)
    tells(lines[0]["refused"], "<|image_pad|>", "line 1")
    assert [line["id"] for line in lines[1:]] == ["taken", "taken"]


def test_without_a_model_rows_are_held_to_qwen_vl(said: Callable[..., Said]) -> None:
    for name, size in (("long.png", (1000, 5)), ("longer.png", (1001, 5))):
        Image.new("RGB", size).save(name)
    lines, _ = said(
        {"id": "fine", "images": ["long.png", "g.png"]},
        {"id": "thin", "images": ["r.png", "longer.png"]},
        {"id": "ends", "question": "A <image> B <image> Which?<|im_end|>"},
        {"id": "sign", "question": "A <image> B <image> Which <|sign|>?"},
        options=("--orders", 1),
    )
    assert [line["id"] for line in lines if "order" in line] == ["fine", "sign"]
    tells(lines[1]["refused"], "image 2", "1001 x 5", "200")
    tells(lines[2]["refused"], "<|im_end|>", "data.control_tokens")


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["x/p.png", "y/q.png"], ["p.png", "q.png"]),
        (["x/p.png", "y/p.png"], ["x/p.png", "y/p.png"]),
        (["x/p.png", "x/p.png"], ["p.png", "p.png"]),
        ([{"bytes": None, "path": "x/p.png"}, "DATA"], ["p.png", "image 2"]),
    ],
)
def test_what_images_are_called(
    images: list[Any], names: list[str], said: Callable[..., Said]
) -> None:
    for folder, name in (("x", "p.png"), ("y", "q.png"), ("y", "p.png")):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).write_bytes(encoded((len(folder), 9, ord(folder))))
    embedded = "data:image/png;base64," + base64.b64encode(encoded((1, 2, 3))).decode()
    images = [embedded if image == "DATA" else image for image in images]
    lines, _ = said({"images": images, "kind": "none"})
    assert lines[0]["images"] == names


def test_turns_columns_and_parquet(
    said: Callable[..., Said], capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat with its roles, but not the answer it ends with; the columns of the data; pictures in a Parquet file."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><image> Which?"},
        {"role": "assistant", "content": "\\boxed{B}"},
    ]
    row = {"question": None, "pics": THREE[:2], "images": None, "messages": chat, "answer": None}
    lines, _ = said(row, options=("--data.map", "images=pics", "--data.columns", "ms-swift"))
    assert lines[0]["text"] == "system: Be brief.\nuser: <image><image> Which?"
    assert (lines[0]["answer"], lines[1]["answer"]) == ("B", "A")

    import datasets

    pictures = [{"bytes": Path(name).read_bytes(), "path": None} for name in THREE[:2]]
    column = datasets.Features(
        {"images": datasets.List(datasets.Image()), "question": datasets.Value("string")}
        | {key: datasets.Value("string") for key in ("answer", "kind")}
    )
    table = {"images": [pictures], "question": ["A <image> B <image> ?"], "answer": ["A"]}
    datasets.Dataset.from_dict({**table, "kind": ["all"]}, features=column).to_parquet("p.parquet")
    for options in ((), ("--data.streaming",)):
        assert run("preview", "p.parquet", "--json", *options) == 0
        _, turned = map(json.loads, capsys.readouterr().out.splitlines())
        assert (turned["order"], turned["images"]) == ([2, 1], ["image 2", "image 1"])


@pytest.mark.parametrize("draw", ["random", "released"])
def test_the_orders_are_those_of_the_first_epoch(draw: str, said: Callable[..., Said]) -> None:
    options = ("--run.seed", 7, "--permutation.orders", 2, "--permutation.draw", draw)
    names = [f"{k}.png" for k in range(5)]
    for k, name in enumerate(names):
        Path(name).write_bytes(encoded((k, 0, 2 * k)))
    row = {"question": "<image>" * 5 + "How many?", "images": names, "should_change": False}
    lines, _ = said({**row, "id": "q"}, {**row, "id": "r"}, options=options)
    stage = next(
        s for s in plan(parse("train", ["default", *map(str, options)]).config) if s.kind == "rl"
    )
    examples = load_examples("rows.jsonl", stage.config.data, "train", 7)
    drawn = [order for i in range(2) for order in drawn_orders(stage, examples[i], 1.0, epoch=0)]
    assert [line["order"] for line in lines] == [[i + 1 for i in order] for order in drawn]
    assert len(lines) == 4


def test_how_many_rows_and_orders(
    said: Callable[..., Said], rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{"id": str(k)} for k in range(203)]
    lines, _ = said(*many, options=("--orders", 1))
    assert [line["id"] for line in lines] == [str(k) for k in range(203)]
    lines, summary = said(*many, options=("--limit", 3))
    assert [line["id"] for line in lines] == ["0", "0", "1", "1", "2", "2"]
    tells(summary.splitlines()[-1], "3 of 203 rows")
    assert run("preview", "rows.jsonl") == 0
    tells(capsys.readouterr().out, "200 of 203 rows")
    six = {"images": (2 * THREE)[:6], "question": "<image>" * 6 + "How many?", "answer": "2"}
    six["images"] = [f"{k}.png" for k in range(6)]
    for k, name in enumerate(six["images"]):
        Path(name).write_bytes(encoded((k, 2 * k, 0)))
    summary = said({}, options=("--orders", 1))[1].splitlines()[-1]
    assert summary.startswith("1 row: 1 permuted, ")
    lines, _ = said({**six, "should_change": False}, options=("--orders", "all"))
    assert len({tuple(line["order"]) for line in lines}) == len(lines) == 120
    assert run("preview", "rows.jsonl", "--orders", "all") == 0
    tells(capsys.readouterr().out, "120 of 720 orders")


def test_for_people(rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 2000
    given = {"id": "q", "question": f"A. <image> B. <image> \x1b[2J{long} Which?", "answer": "B"}
    assert run("preview", rows(given, {"id": "bad", "images": []})) == 0
    out = capsys.readouterr().out
    assert "A. [image: r.png] B. [image: g.png]" in out
    assert "A. [image: g.png] B. [image: r.png]" in out
    assert "\x1b" not in out and long not in out and "Which?" in out
    tells(out, "q", "A (was B)", "r.png from 1 to 2", "bad", "refused", "as labelled")


def test_the_page_has_every_picture_in_its_slot(rows: Callable[..., Path]) -> None:
    row = {"id": "q<i>", "question": LETTERED, "images": THREE, "answer": "B"}
    file = rows(row, {"id": "bad", "answer": "</p>a dog"})
    assert run("preview", file, "--orders", "all", "--html", "page.html") == 0
    page = Path("page.html").read_text()
    styles = re.findall(
        r"\.(p\d+) \{ background-image: url\(data:image/webp;base64,([^)]+)\)", page
    )
    assert len(styles) == 3  # Each picture once, in however many orders.
    colours = {}
    for name, data in styles:
        pixel: Any = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((2, 2))
        colours[name] = "RGB"[max(range(3), key=pixel.__getitem__)]
    orders = page.split('<section class="order">')[1:]
    assert len(orders) == 6 <= OPEN
    for text in orders:
        (order,) = re.findall(r"<h3>Order ([123 ]+?) ?<", text)
        shown = re.findall(r'<i class="(p\d+)"></i><b>slot (\d)</b>', text)
        assert [slot for _, slot in shown] == ["1", "2", "3"]
        assert "".join(colours[name] for name, _ in shown) == "".join(
            "RGB"[int(i) - 1] for i in order.split()
        )
        (gold,) = re.findall(r'class="gold good">(.*?)</span>', text)
        assert gold.split()[0] == GREEN[order]
        assert "Which is &lt;b&gt;green" in text
    assert "q&lt;i&gt;" in page and "</p>a dog" not in page and "</p>a dog" in unescape(page)
    assert page.count("card row refused") == 1
    assert not re.search(r"(?:src|href)=|https?:", page)


def test_bundled_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("preview", "bundled:digits", "--limit", 4, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["id"] for line in lines}) == 4
    assert lines[0]["images"][0] == "image 1"


def test_what_it_refuses(rows: Callable[..., Path], error_of: ErrorOf, tmp_path: Path) -> None:
    file = rows({})
    for arguments, names in (
        ((file, "--n", 1), ["--n", file]),
        ((file, "--stage", "rl"), ["--stage", file]),
        ((file, "--data.train", "x.jsonl"), ["--data.train", file]),
        (("demo", "--json"), ["--json", "demo"]),
        (("demo", "--orders", "all"), ["--orders", "demo"]),
        (("demo", "--html", "x.html"), ["--html", "demo"]),
        ((file, "--orders", 0), ["--orders 0", "1"]),
        ((file, "--limit", 0), ["--limit 0", "1"]),
        ((file, "--html", "no/folder/x.html"), ["--html no/folder/x.html", "folder"]),
        ((file, "--html", file), [f"--html {file}"]),
        (("--json", file), [file, "RECIPE"]),
        (("demoo",), ["demoo", "demo"]),
        (("rowz",), ["rowz", "recipe", ".toml", "OWNER/NAME"]),
        (("no.jsonl",), ["no.jsonl"]),
        ((file, "--data.columns", "verl"), ["verl", "prompt"]),
    ):
        tells(error_of("preview", *arguments), *names)
    assert file.read_text().startswith("{") and not Path("x.html").exists()
