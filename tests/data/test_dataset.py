"""Rows of every convention become Examples; every mistake in the data is one line that says where."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import resource
from pathlib import Path
from typing import Any

import datasets
import datasets.config as settings
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.tasks import BundledTasks
from perl.permutation import orders
from perl.types import Example, Message, UserError
from tests.messages import refused, tells
from tests.pictures import encoded, png_header

AUTO = DataConfig()


@pytest.fixture(autouse=True)
def offline_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_rows(folder: Path, rows: list[Any], name: str = "data.jsonl") -> str:
    for k in range(4):
        (folder / f"{k}.png").write_bytes(encoded((k, 0, 0)))
    file = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(file)
        return str(file)
    if ".json" in name.replace(".jsonl", "").lower():
        text = json.dumps(rows)
    elif ".csv" in name or ".tsv" in name:
        cells = [[v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in rows]
        lines = io.StringIO()
        writer = csv.writer(lines, delimiter="," if ".csv" in name else "\t")
        writer.writerows([list(rows[0]), *cells])
        text = lines.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    file.write_bytes(pack.get(file.suffix, bytes)(text.encode()))
    return str(file)


def perl_row(**changes: Any) -> dict[str, Any]:
    row = {
        "images": ["0.png", "1.png"],
        "question": "A <image> B <image> which?",
        "answer": "B",
        "kind": "all",
        **changes,
    }
    return {key: value for key, value in row.items() if value is not ...}


def load_row(folder: Path, row: dict[str, Any], config: DataConfig = AUTO) -> Example:
    return load_examples(write_rows(folder, [row]), config, "train", 0)[0]


def reds(example: Example) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in example.images]  # type: ignore[index]


def test_perls_own_columns(tmp_path: Path) -> None:
    columns = {"kind": "blocks:1,2", "should_change": "true", "demonstration": "...", "task": "t"}
    example = load_row(tmp_path, perl_row(**columns, id=7, level=3, note=None))
    assert reds(example) == [0, 1]
    assert all(image.mode == "RGB" for image in example.images)
    assert (example.id, example.answer, example.kind) == ("7", "B", "blocks:1,2")
    assert (example.should_change, example.demonstration, example.task) == (True, "...", "t")
    assert example.extra == {"level": 3, "note": None}
    plain = load_row(tmp_path, perl_row(kind=...))
    assert (plain.id, plain.kind) == ("row-000000", "none")
    assert (plain.should_change, plain.demonstration) == (False, None)


def test_chats_with_parts_are_slots(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": " B "}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "image"}]},
    ]
    example = load_row(tmp_path, perl_row(question=..., messages=messages))
    assert example.question == (
        Message("system", "Be brief."),
        Message("user", "A <image> B <image>"),
    )
    inside = [{"type": "image", key: f"{k}.png"} for k, key in ((2, "url"), (3, "path"))]
    chat = [{"role": "user", "content": inside}]
    assert reds(load_row(tmp_path, perl_row(question=..., images=..., messages=chat))) == [2, 3]
    inside = [{"type": "image", "image": f"{k}.png"} for k in (2, 3)]
    chat = [{"role": "user", "content": inside}]
    example = load_row(tmp_path, perl_row(question=..., images=..., messages=chat))
    assert reds(example) == [2, 3]


def test_verl_columns(tmp_path: Path) -> None:
    row = {
        "data_source": "geo",
        "prompt": [{"role": "user", "content": "<image> or <image>?"}],
        "images": [{"image": "0.png"}, {"image": "file://1.png", "max_pixels": 9}],
        "reward_model": {"style": "rule", "ground_truth": "A"},
        "extra_info": {"index": 3},
        "change_needed": True,
    }
    example = load_row(tmp_path, row)
    assert (example.answer, example.task, example.kind) == ("A", "geo", "all")
    assert example.should_change is True
    assert example.extra == {"data_source": "geo", "extra_info": {"index": 3}}
    assert reds(example) == [0, 1]


@pytest.mark.parametrize("question", ["problem", "question"])
def test_images_keep_their_order_unless_the_data_say_more(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    question: str,
) -> None:
    row = {question: "<image> or <image>?", "images": ["0.png", "1.png"], "answer": ["A", "C"]}
    assert load_row(tmp_path, {**row, "answer": "red", "should_change": False}).kind == "all"
    assert load_row(tmp_path, {**row, "answer": "B", "kind": "all"}).should_change is True
    alone = {question: "<image>What?", "images": ["0.png"], "answer": "B"}
    assert load_row(tmp_path, alone).kind == "none"
    assert not caplog.text
    source = write_rows(tmp_path, [alone, row, row])
    monkeypatch.chdir(tmp_path)
    for name in (source, source, "data.jsonl"):
        data = load_examples(name, AUTO, "train", 0)
        examples = [data[i] for i in (2, 1, 0)]
    example = examples[1]
    assert (example.question, example.answer, example.kind) == (row[question], "A, C", "none")
    assert (
        len(caplog.messages) == 1
    )  # once, whichever row comes first and however often it is named and read
    tells(caplog.messages[0], "data.jsonl line 3", "kind", "should_change", f"label {source}")


def test_the_convention_can_be_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {**perl_row(), "prompt": "<image> or <image>?", "reward_model": {"ground_truth": "A"}}
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    assert load_row(tmp_path, row).answer == "A"
    tells(caplog.text, "verl")
    caplog.clear()
    assert load_row(tmp_path, row).answer == "A"
    load_examples("data.jsonl", AUTO, "train", 0)
    assert not caplog.text  # said once
    assert load_row(tmp_path, row, DataConfig(columns="perl")).answer == "B"


def test_images_in_every_form(tmp_path: Path) -> None:
    inside = "data:image/png;base64," + base64.b64encode(encoded((9, 0, 0))).decode()
    forms = [inside, {"path": "1.png"}, {"bytes": None, "path": str(tmp_path / "2.png")}]
    row = perl_row(images=forms, question="<image><image><image>")
    assert reds(load_row(tmp_path, row)) == [9, 1, 2]


def test_a_picture_is_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (6, 4), 100).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((2, 2), 32768, np.uint16)).save(tmp_path / "deep.png")
    names = ["turned.jpg", "clear.png", "deep.png"]
    images = load_row(tmp_path, perl_row(images=names, question="<image>" * 3)).images
    assert [image.mode for image in images] == ["RGB"] * 3
    assert images[0].size == (4, 6)
    assert images[1].getpixel((0, 0)) == (255, 255, 255)
    assert images[2].getpixel((0, 0)) == (128, 128, 128)


FILES = ["data.jsonl", "data.json", "data.parquet", "da[t]a*.parquet", "a,b.jsonl", "x.v2.jsonl"]
FILES += ["data.csv", "data.tsv", "data.jsonl.gz", "data.jsonl.xz", "data.json.bz2", "data.csv.gz"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_type(tmp_path: Path, name: str) -> None:
    source = write_rows(tmp_path, [perl_row(id=str(i)) for i in range(5)], name)
    data = load_examples(source, AUTO, "test", 0)
    assert reds(data[3]) == [0, 1]
    assert len(data) == data.size == 5
    assert [data[i].id for i in range(5)] == list("01234")
    with pytest.raises(IndexError):
        data[5]


def test_parquet_and_saved_folders_with_embedded_images(tmp_path: Path) -> None:
    images = [Image.new("RGB", (4, 4), (red, 0, 0)) for red in (5, 6)]
    row = {"images": images, "question": "<image> <image>", "answer": "A"}
    table = datasets.Dataset.from_list([row])
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "embedded.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    splits: Any = {"train": table, "validation": table}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "loadable").mkdir()
    table.to_parquet(tmp_path / "loadable" / "train.parquet")
    for name in ("embedded.parquet", "saved", "splits", "loadable"):
        for split in ("train", "test"):
            data = load_examples(str(tmp_path / name), AUTO, split, 0)
            assert reds(data[0]) == [5, 6]
            data.check(0)
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "other"))
    with refused("a, b", "train", f"{tmp_path}/other:SPLIT"):
        load_examples(str(tmp_path / "other"), AUTO, "train", 0)


def test_a_folder_with_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(perl_row()) + "\n")
    (tmp_path / "b.jsonl").write_text('{"question": "?"}\n{"question": ?}\n')
    with refused(tmp_path / "b.jsonl", "line 2", "JSON"):
        load_examples(str(tmp_path), AUTO, "train", 0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.parquet").write_bytes(b"PAR1")
    with refused(other, "ArrowInvalid"):
        load_examples(str(other), AUTO, "train", 0)


def test_a_folder_with_its_config_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (datasets.Dataset.from_list([perl_row(id=name)]) for name in "ab")
    splits: Any = {"train": one, "extra": two}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    one.save_to_disk(str(tmp_path / "plain"))
    files = tmp_path / "files"
    files.mkdir()
    one.to_parquet(files / "train-0.parquet")
    two.to_parquet(files / "test-0.parquet")
    (files / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files:\n  - split: other\n    path: test-0.parquet\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    for source, wanted in (("saved", "a"), ("./saved:extra", "b"), ("files:x:other", "b")):
        data: Any = load_examples(source, DataConfig(image_root="."), "train", 0)
        assert data.source.row(0)["id"] == wanted
    for source, names in {
        "saved:dev": ("saved", "dev", "train, extra"),
        "plain:train": ("plain", "train"),
        "saved:x:train": ("saved", "config x"),
        "files:x:no": ("files:no", "other"),
        "nosuch/folder/saved:train": ("nosuch/folder/saved:train", "path"),
    }.items():
        with refused(*names):
            load_examples(source, AUTO, "train", 0)


def test_several_files_are_one_data_set_and_each_row_starts_from_its_own(tmp_path: Path) -> None:
    for k, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        source = write_rows(tmp_path / folder, [perl_row(id=f"{folder}{i}") for i in range(2 + k)])
        (tmp_path / folder / "0.png").write_bytes(encoded((100 + k, 0, 0)))
    Path(source).with_name("more.jsonl").write_text(json.dumps(perl_row(id="m", answer="C")))
    everything = ["a0", "a1", "b0", "b1", "b2", "m"]
    for pattern in ("{0}/a/data.jsonl,{0}/b/data.jsonl,{0}/b/more.jsonl", "{0}/**/*.jsonl"):
        data: Any = load_examples(pattern.format(tmp_path), AUTO, "train", 0)
        assert [data.source.row(i)["id"] for i in range(len(data))] == everything
        assert reds(data[1]) == [100, 1] and reds(data[2]) == [101, 1]
        with refused("b/more.jsonl line 1", "'C'"):
            data[5]
        with pytest.raises(IndexError):
            data.source.row(6)
    table = datasets.Dataset.from_list([perl_row()])
    for k in range(3):
        table.to_parquet(tmp_path / "a" / f"{k}.parquet")
    data = load_examples(f"{tmp_path}/a/*.parquet", AUTO, "train", 0)
    assert len(data) == 3 and reds(data[2]) == [100, 1]


def test_more_files_than_are_usually_open(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for k in range(60):
        (tmp_path / f"{k}.jsonl").write_text(json.dumps(perl_row(id=str(k))))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, before[1]))
        data: Any = load_examples(f"{tmp_path}/*.jsonl", AUTO, "train", 0)
        assert sorted(int(data.row(i)["id"]) for i in range(60)) == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_csv_cells_are_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        '\ufeffid,image,question,answer,note\n007,0.png,<image> ?,None,\n8,0.png,"<image>, a\nb","[1, 2]","[""x""]"\n'
    )
    write_rows(tmp_path, [])
    first, second = (load_examples(str(tmp_path / "a.csv"), AUTO, "train", 0)[i] for i in (0, 1))
    assert (first.id, first.answer, first.extra) == ("007", "None", {"note": None})
    assert (second.question, second.answer, second.extra) == (
        "<image>, a\nb",
        "[1, 2]",
        {"note": ["x"]},
    )


def test_what_pandas_writes_of_lists(tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": "It's <image> or\n<image>?"},
        {"role": "assistant", "content": "A"},
    ]
    row = {
        "messages": np.array(said),
        "images": np.array(["0.png", "1.png"], dtype=object),
        "answer": "{1, 2}",
    }
    rows = [row, {**row, "messages": said, "images": ["1.png", "0.png"], "answer": "[a"}]
    write_rows(tmp_path, [])
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    data = load_examples(str(tmp_path / "a.csv"), AUTO, "train", 0)
    assert [(reds(data[i]), data[i].answer) for i in (0, 1)] == [([0, 1], "{1, 2}"), ([1, 0], "[a")]
    assert data[0].messages == data[1].messages == (Message("user", said[0]["content"]),)
    assert data[0].demonstration == "A"


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    table = datasets.Dataset.from_list([perl_row(images=["/etc/hostname"], question="<image>")])

    def fake(name: str, config: str | None = None, split: str | None = None) -> Any:
        calls.append((name, config, split))
        return table if split else datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    for source in ("me/set", "me/set:dev", "me/set:hard:train[:10%]", "set:train[:5]"):
        data = load_examples(source, AUTO, "train", 0)
    assert calls == [
        ("me/set", None, None),
        ("me/set", None, "dev"),
        ("me/set", "hard", "train[:10%]"),
        ("set", None, "train[:5]"),
    ]
    with refused("row 1, image 1", "/etc/hostname", "data.image_root"):
        data[0]

    def fails(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with refused("me/set", "ConnectionError: no network"):
        load_examples("me/set", AUTO, "train", 0)


def test_image_root(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "pictures", [])
    source = tmp_path / "texts" / "data.jsonl"
    source.write_text(json.dumps(perl_row()))
    with refused("line 1, image 1", tmp_path / "texts" / "0.png"):
        load_examples(str(source), AUTO, "train", 0)[0]
    config = DataConfig(image_root=str(tmp_path / "pictures"))
    assert reds(load_examples(str(source), config, "train", 0)[0]) == [0, 1]


def test_a_root_that_would_find_the_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    for folder in (texts, tmp_path / "pictures"):
        folder.mkdir()
    write_rows(tmp_path / "pictures", [])
    monkeypatch.chdir(tmp_path)
    asked, option = "data.image_root", "--image-root"
    for name, config, names in (
        ("pictures/0.png", AUTO, (texts / "pictures/0.png", f'{asked} = "."', f"{option} .")),
        ("../pictures/0.png", AUTO, ("../pictures/0.png", texts, asked, option)),
        (f"{tmp_path}/pictures/0.png", AUTO, (texts, asked, option, f'"{tmp_path}/pictures"')),
        ("9.png", DataConfig(image_root="pictures"), ("pictures/9.png", asked, option)),
    ):
        source = texts / "data.jsonl"
        source.write_text(json.dumps(perl_row(images=[name, name])))
        with refused("line 1, image 1", *names):
            load_examples(str(source), config, "train", 0)[0]


def test_a_limit_is_a_seeded_sample(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [perl_row(id=str(i)) for i in range(20)])

    def ids(seed: int, limit: int | None) -> list[int]:
        data = load_examples(source, AUTO, "test", seed, limit)
        return [int(data[i].id) for i in range(len(data))]

    assert ids(0, 5) == ids(0, 5) == sorted(ids(0, 5))
    assert len(set(ids(0, 5))) == 5 and ids(0, 5) != ids(1, 5)
    assert ids(0, 50) == ids(0, None) == list(range(20))


def bad_image_files(folder: Path) -> None:
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(encoded((1, 0, 0), size=(64, 64))[:80])
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(png_header(1_000_000, 1_000_000))
    (folder / "large.png").write_bytes(png_header(11_000, 11_000))
    (folder / "long.png").write_bytes(png_header(40_000, 10))
    (folder / "folder.png").mkdir()


BAD_IMAGES: list[tuple[Any, tuple[object, ...]]] = [
    ("missing.png", ("missing.png", "path")),
    ("text.png", ("text.png", "replace")),
    ("empty.png", ("empty.png", "replace")),
    ("folder.png", ("folder.png", "directory", "replace")),
    ("huge.png", ("1000000000000", "shrink")),
    ("large.png", ("11000 x 11000", "32,768", "100,000,000", "shrink")),
    ("long.png", ("40000 x 10", "shrink")),
    ("../out.png", ("../out.png", "data.image_root")),
    ("/etc/hostname", ("/etc/hostname", "data.image_root")),
    ("https://example.org/a.png", ("https://example.org/a.png", "download", "path")),
    ("a\0b.png", ("path", "NUL")),
    ("data:image/png;base64,###", ("data:", "base64", "replace")),
    ("data:image/png;base64,AAAA", ("embedded", "replace")),
    ("/9j/" + "A" * 9999, ("leaves", "data.image_root")),
    ("iVBOR" + "A" * 9999, ("image root", "data.image_root")),
    ({"path": None}, ("NoneType", "path")),
    (17, ("int", "path")),
]


@pytest.mark.parametrize(("image", "names"), BAD_IMAGES)
def test_bad_images(tmp_path: Path, image: Any, names: tuple[object, ...]) -> None:
    bad_image_files(tmp_path)
    rows = [perl_row(), perl_row(images=["0.png", image])]
    data = load_examples(write_rows(tmp_path, rows), AUTO, "train", 0)
    assert data[0].images[0].size == (6, 4)  # Rows are decoded one at a time.
    place = "data.jsonl line 2, image 2"
    with pytest.raises(UserError) as caught:
        data[1]
    tells(caught.value, place, *names)
    assert "\n" not in str(caught.value)
    with refused(place, *names):  # by the header alone
        data.check(1)


def test_a_cut_image_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    bad_image_files(tmp_path)
    with refused("line 1, image 1", tmp_path / "cut.png", "replace"):
        load_row(tmp_path, perl_row(images=["cut.png", "0.png"]))


def test_what_is_written_must_stay_inside_and_links_are_followed(tmp_path: Path) -> None:
    """As in the hub's cache: `snapshots/x/data.jsonl` and its pictures are links to `blobs`."""
    snapshot, blobs = tmp_path / "snapshots" / "x", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_rows(blobs, [perl_row(images=["a/1.png", "2.png"])])
    (snapshot / "a").symlink_to(blobs)
    for name in ("2.png", "data.jsonl"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert reds(load_examples(str(snapshot / "data.jsonl"), AUTO, "train", 0)[0]) == [1, 2]
    assert reds(load_row(blobs, perl_row(images=["x/../1.png", str(snapshot / "2.png")]))) == [1, 2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.png").write_bytes(encoded((3, 0, 0)))
    # `a/..` is the snapshot, not the folder of what `a` points to.
    for outside in ("a/../../other/3.png", "../../other/3.png", "../x2/2.png", str(blobs)[:-1]):
        with refused(outside, snapshot, "data.image_root"):
            load_row(snapshot, perl_row(images=[outside, "2.png"]))


@pytest.mark.parametrize("images", [[], None])
def test_a_question_of_text_alone(
    tmp_path: Path, images: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    example = load_row(tmp_path, perl_row(images=images, question="How much is 2 + 2?", answer="4"))
    assert (example.images, example.kind, example.should_change) == ((), "none", False)
    assert orders(example, 4, 0, 0) == [()]
    tells(caplog.text, "data.jsonl line 1")


BAD_ROWS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"images": ["0.png"]}, ("1 image", "2 <image> slots")),
    ({"question": "<image> Which?"}, ("2 images", "1 <image> slot")),
    ({"question": "which?"}, ("2 images", "0 <image>")),
    ({"images": []}, ("0 images", "2 <image>")),
    ({"images": ...}, ("0 images", "2 <image>")),
    ({"question": ...}, ("question", "missing")),
    ({"answer": "C"}, ("'C'", "2 images", "A to B", "1 to 2")),
    ({"answer": "yes"}, ("should_change", "false")),
    ({"kind": "some"}, ("kind", "'some'")),
    ({"kind": "last:3"}, ("last:3", "1 to 2")),
    ({"kind": "ordering"}, ("kind", "'ordering'", "2, 1, 3")),
    (
        {
            "question": "<image> <image> What is the order of events? A. 2, 1 B. 1, 2",
            "kind": "ordering",
            "should_change": False,
        },
        ("should_change", "true", "kind", "none"),
    ),
    ({"should_change": False}, ("'B'", "image 2", "should_change", "true", "kind", "none")),
    ({"should_change": "perhaps"}, ("should_change", "'perhaps'", "true", "false")),
    ({"worked": "<think>"}, ("worked", "demonstration")),
    ({"question": " "}, ("question", "empty")),
    ({"question": 5}, ("question", "int", "role", "content")),
    ({"question": []}, ("question", "list", "role", "content")),
    ({"question": ["<image><image>"]}, ("role", "content", "<image><image>")),
    ({"question": [{"role": "user", "content": None}]}, ("content", "parts", "None")),
    (
        {"question": [{"role": "user", "content": [{"type": "video"}]}]},
        ("video", "data.frames"),
    ),
    (
        {"question": [{"role": "user", "content": [{"type": "audio"}]}]},
        ("'audio'", "text", "image"),
    ),
]


@pytest.mark.parametrize(("changes", "names"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, changes: dict[str, Any], names: tuple[str, ...]) -> None:
    source = write_rows(tmp_path, [perl_row(), perl_row(**changes)])
    data = load_examples(source, AUTO, "train", 0)
    assert data[0].answer == "B"
    for visit in (lambda: data[1], lambda: data.check(1)):
        with refused("data.jsonl line 2", *names):
            visit()


def test_rows_of_a_file_may_have_different_columns(tmp_path: Path) -> None:
    alone = {"question": "2 + 2?", "answer": "4"}
    source = Path(write_rows(tmp_path, [alone, perl_row(), alone]))
    source.write_text("{broken\n" + source.read_text())
    data = load_examples(str(source), AUTO, "train", 0)
    assert (data[1].images, data[1].answer, len(data[2].images)) == ((), "4", 2)
    with refused("line 1", "JSON"):
        data[0]
    # An empty column says nothing beside another one.
    assert len(load_row(tmp_path, perl_row(image=perl_row()["images"], images=[])).images) == 2
    with refused("','", "commas"):
        load_examples(",", AUTO, "train", 0)


def test_rows_of_a_chat_among_rows_of_a_question(tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": "A <image> B <image> which?"},
        {"role": "assistant", "content": "B"},
    ]
    chat = perl_row(question=..., messages=said)
    data = load_examples(write_rows(tmp_path, [perl_row(), chat, chat | {"messages": None}]), AUTO, "train", 0)  # fmt: skip
    assert data[1].messages == data[0].messages and data[1].demonstration == "B"
    with refused("data.jsonl line 3", "question", "messages"):
        data[2]


def test_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [{"query": "?", "pic": "0.png"}])
    with refused(source, "query, pic", "problem", "prompt", "images", "data.map"):
        load_examples(source, AUTO, "train", 0)
    with refused("prompt", "reward_model", "data.columns=verl", "images, question, answer"):
        load_row(tmp_path, perl_row(), DataConfig(columns="verl"))


def test_lines_are_counted_with_the_blank_ones(tmp_path: Path) -> None:
    source = Path(write_rows(tmp_path, [perl_row()]))
    good = source.read_text()
    source.write_text(f"\ufeff{good}\n\n{good}{{'images': 1}}\n[1]\n")
    data = load_examples(str(source), AUTO, "train", 0)
    assert len(data) == 4
    assert data[1].answer == "B"
    with refused("data.jsonl line 5", "JSON", "line"):
        data[2]
    with refused("data.jsonl line 6", "list", "object"):
        data[3]


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.jsonl", b"", ("empty", "rows")),
        ("a.jsonl", b"\n \n", ("empty", "rows")),
        ("a.json", b"[]", ("empty", "rows")),
        ("a.json", b'{"a": 1}', ("list", ".jsonl")),
        ("a.json", b"[{]", ("JSON", "file")),
        ("a.jsonl", b"\xff\xfe\xff", ("line 1", "JSON")),
        ("a.json", b"[" * 100_000, ("JSON", "file")),
        ("a.parquet", b"garbage", ("ArrowInvalid", "file")),
        ("a.json", b'{"a": 1}\n{"a": 2}', ("columns a", "data.map")),  # JSON Lines
        ("a.csv", b"x,y\n", ("empty", "rows")),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", ("line 3", "header", "quotes")),
        ("a.csv", b"x,y,x\n1,2,3\n", ("columns x", "cell")),
        ("a.csv", b"x\n\xff", ("UnicodeDecodeError", "file")),
        ("a.xlsx", b"x,y", ("'.xlsx'", ".jsonl, .json, .parquet, .csv, .tsv", ".gz")),
        ("a.parquet.gz", b"x", ("'.gz'", ".parquet")),
        ("a.jsonl.zst", b"x", ("zstandard", "unpack")),
        ("a.jsonl.gz", b"x", ("BadGzipFile", "file")),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, names: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path / name, *names):
        load_examples(str(tmp_path / name), AUTO, "train", 0)


# A missing file is not looked for on the hub.
MISSING = [
    "no/such.jsonl",
    "./nothing",
    "/nothing",
    "a/b/c",
    "x.parquet",
    "x.csv.gz",
    "x.json:train",
]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        *((source, (source, "path")) for source in MISSING),
        ("./tren.jsonl", ("./tren.jsonl", "train.jsonl")),
        ("data/*.jsonl", ("data/*.jsonl", "path")),
        ("train.jsonl,no.jsonl", ("no.jsonl", "train.jsonl")),
        (".", (".", "file")),
        ("", ("data.eval",)),
        ("bundled:letters", ("'letters'", "digits", "folder:PATH")),
    ],
)
def test_bad_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, names: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, [perl_row()], "train.jsonl")
    monkeypatch.setattr("perl.data.sources.offline_if_unreachable", lambda: pytest.fail("asked"))
    with refused(*names):
        load_examples(source, AUTO, "test", 0)


def test_bundled_examples_are_endless_or_limited() -> None:
    config = DataConfig(tasks=("which", "single"))
    endless = load_examples("bundled:digits", config, "train", 0)
    assert isinstance(endless, BundledTasks) and endless.size is None
    assert endless[12345].id == "digits-train-single-012345"
    with pytest.raises(TypeError):
        len(endless)
    few = load_examples("bundled:digits", config, "test", 0, 3)
    assert len(few) == 3 and few[0].id == "digits-test-which-000000"
    with pytest.raises(IndexError):
        few[3]


def test_numbered_placeholders_are_slots(tmp_path: Path) -> None:
    row = {"images": ["0.png", "1.png"], "answer": "A"}
    questions = [
        "<image_1> Look. A. <image_2>",
        "<image1> Look. A. <image2> Is <image1> first?",
        [{"role": "user", "content": "<image_1>"}, {"role": "user", "content": "A. <image_2>"}],
        "<image> A. <image> is like <image_1>",  # other slots: a mention
    ]
    source = write_rows(tmp_path, [{**row, "question": q} for q in questions])
    read = load_examples(source, AUTO, "train", 0)
    texts = ["|".join(m.content for m in read[i].messages) for i in range(4)]
    assert texts == [
        "<image> Look. A. <image>",
        "<image> Look. A. <image> Is <image1> first?",
        "<image>|A. <image>",
        questions[3],
    ]
    wrong = write_rows(tmp_path, [{**row, "question": "A. <image_2> B. <image_1>"}], "wrong.jsonl")
    with refused("wrong.jsonl line 1", "<image_2>", "<image>"):
        load_examples(wrong, AUTO, "train", 0)[0]
