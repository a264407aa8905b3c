"""Rows written out again: where their images go, what is written once, and the ids of rows that come again."""

import base64
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.rows import write_rows
from tests.messages import refused
from tests.pictures import encoded

QUESTION = "A <image> B <image> Which image shows three ?"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Where data lie, with a JPEG and two equal PNG files, and where they are written to."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (data / "a" / "one.JPG").write_bytes(encoded((9, 30, 0), "JPEG"))
    (data / "two.png").write_bytes(encoded((200, 30, 0), "PNG"))
    (data / "three.png").write_bytes(encoded((200, 30, 0), "PNG"))
    return data, elsewhere


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(data: Path, output: Path, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The rows after they have been written out, which load again."""
    dataset = load_examples(str(data), DataConfig(), "train", 0)
    write_rows(dataset, output, indices, [0.5] * len(indices))
    written = load_examples(str(output), DataConfig(), "train", 0)
    assert all(written.check(i) for i in range(len(indices)))
    return rows_of(output)


def write(folder: Path, *images: list[Any]) -> Path:
    rows = [{"question": QUESTION, "images": each, "answer": "A"} for each in images]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def pixels(path: Path) -> list[list[bytes]]:
    dataset = load_examples(str(path), DataConfig(), "train", 0)
    return [[image.tobytes() for image in dataset[i].images] for i in range(len(dataset))]


def test_files_are_linked_once_and_keep_their_form(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"], ["two.png", "three.png"], ["two.png"] * 2)
    before = pixels(data)
    monkeypatch.setattr(Image.Image, "save", lambda *_: pytest.fail("an image was encoded anew"))
    rows = rewrite(data, elsewhere / "new.jsonl", [0, 1, 2, 2])
    assert pixels(elsewhere / "new.jsonl") == [*before, before[2]]
    first, second = rows[0]["images"]
    assert first.startswith("new-images/") and first.endswith(".jpg") and second.endswith(".png")
    assert (elsewhere / first).samefile(folder / "a" / "one.JPG")
    assert (elsewhere / second).samefile(folder / "two.png")
    # The other PNG file has the same content.
    assert [row["images"] for row in rows[1:]] == [[second] * 2] * 3
    assert len(list((elsewhere / "new-images").iterdir())) == 2
    assert rewrite(data, elsewhere / "new.jsonl", [0, 1, 2, 2]) == rows


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.link", refuse)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_refused_files_are_copied(
    number: int, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"])
    refuse_links(monkeypatch, number)
    for _ in range(2):
        (row,) = rewrite(data, elsewhere / "new.jsonl", [0])
    copy = elsewhere / row["images"][0]
    assert copy.read_bytes() == (folder / "a" / "one.JPG").read_bytes()
    assert copy.stat().st_nlink == 1


def test_a_link_left_by_a_kill_does_not_harm_the_source(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of a link is the source itself: nothing may be written through it."""
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"])
    content = (folder / "a" / "one.JPG").read_bytes()
    (name, _) = rewrite(data, elsewhere / "new.jsonl", [0])[0]["images"]
    path = elsewhere / name
    path.rename(path.with_name(f".{path.name}.tmp"))
    refuse_links(monkeypatch, errno.EPERM)
    rewrite(data, elsewhere / "new.jsonl", [0])
    assert (folder / "a" / "one.JPG").read_bytes() == content == path.read_bytes()
    assert not path.with_name(f".{path.name}.tmp").exists()


def test_a_changed_picture_is_another_file(folders: tuple[Path, Path]) -> None:
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"])
    (old,) = rewrite(data, elsewhere / "new.jsonl", [0])
    (folder / "new.png").write_bytes(encoded((77, 30, 0), "PNG"))
    os.replace(folder / "new.png", folder / "two.png")
    (new,) = rewrite(data, elsewhere / "new.jsonl", [0])
    assert new["images"][0] == old["images"][0] and new["images"][1] != old["images"][1]
    assert pixels(elsewhere / "new.jsonl") == pixels(data)


def test_pictures_below_the_new_file_stay(folders: tuple[Path, Path]) -> None:
    folder, _ = folders
    data = write(folder, ["a/one.JPG", {"path": "two.png", "bytes": None}])
    (row,) = rewrite(data, folder / "new.jsonl", [0])
    assert row["images"] == ["a/one.JPG", "two.png"]
    (row,) = rewrite(data, folder.parent / "new.jsonl", [0])
    assert row["images"] == ["data/a/one.JPG", "data/two.png"]
    assert not list(folder.parent.rglob("*-images"))


@pytest.mark.parametrize(
    ("form", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("BMP", None)]
)
def test_embedded_images(form: str, suffix: str | None, tmp_path: Path) -> None:
    """As they are if they are files of a common form, else as PNG."""
    from datasets import Dataset

    content = [encoded((40 * k, 30, 0), form) for k in range(4)]
    images = [[{"bytes": c} for c in pair] for pair in (content[:2], content[2:])]
    rows = [{"question": QUESTION, "answer": "A", "images": pair} for pair in images]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    written = rewrite(tmp_path / "rows.parquet", tmp_path / "new.jsonl", [1])
    files = [tmp_path / name for name in written[0]["images"]]
    assert [f.name for f in files] == [f"000001-{k}{suffix or '.png'}" for k in (1, 2)]
    if suffix:
        assert [f.read_bytes() for f in files] == content[2:]
    assert pixels(tmp_path / "new.jsonl") == pixels(tmp_path / "rows.parquet")[1:]


def test_only_what_needs_it_is_encoded_anew(folders: tuple[Path, Path]) -> None:
    from datasets import Dataset

    folder, elsewhere = folders
    images = [
        {"bytes": None, "path": "a/one.JPG"},
        {"bytes": encoded((80, 30, 0), "BMP"), "path": "x.bmp"},
    ]
    row = {"question": QUESTION, "answer": "A", "images": images}
    Dataset.from_list([row]).to_parquet(folder / "rows.parquet")
    (new,) = rewrite(folder / "rows.parquet", elsewhere / "new.jsonl", [0])
    assert (elsewhere / new["images"][0]).samefile(folder / "a" / "one.JPG")
    assert new["images"][1] == "new-images/000000-2.png"
    assert pixels(elsewhere / "new.jsonl") == pixels(folder / "rows.parquet")


def test_texts_that_hold_an_image_stay(folders: tuple[Path, Path]) -> None:
    folder, elsewhere = folders
    inside = "data:image/png;base64," + base64.b64encode(encoded((5, 30, 0), "PNG")).decode()
    data = write(folder, [inside, "two.png"])
    (row,) = rewrite(data, elsewhere / "new.jsonl", [0])
    assert row["images"][0] == inside and row["images"][1].startswith("new-images/")


def test_an_image_that_is_gone_leaves_the_old_rows(folders: tuple[Path, Path]) -> None:
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"], ["a/one.JPG", "three.png"])
    rewrite(data, elsewhere / "new.jsonl", [0])
    before = (elsewhere / "new.jsonl").read_bytes(), pixels(elsewhere / "new.jsonl")
    (folder / "three.png").unlink()
    with refused("line 2, image 2", folder / "three.png", "path"):
        rewrite(data, elsewhere / "new.jsonl", [0, 1])
    assert ((elsewhere / "new.jsonl").read_bytes(), pixels(elsewhere / "new.jsonl")) == before
    assert not list(elsewhere.rglob("*.tmp"))


IDS = st.one_of(st.sampled_from(["a", "b", "a#2", "a#2#2", "3"]), st.integers(1, 3))


@given(
    st.lists(IDS, min_size=1, max_size=6, unique_by=str),
    st.lists(st.integers(0, 5), min_size=1, max_size=14),
)
def test_rows_that_come_again_have_ids_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | int], drawn: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    indices = sorted(i % len(ids) for i in drawn)
    rows = [{"id": i, "question": "How many?", "images": [], "answer": "1"} for i in ids]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = rewrite(folder / "rows.jsonl", folder / "new.jsonl", indices)
    found = [str(row["id"]) for row in written]
    assert len(set(found)) == len(found)
    for place, i in enumerate(indices):
        if i not in indices[:place]:
            assert written[place]["id"] == ids[i]
        else:
            assert found[place].startswith(f"{ids[i]}#")


def test_copies_of_rows_without_ids_go_by_their_line(folders: tuple[Path, Path]) -> None:
    folder, elsewhere = folders
    data = write(folder, ["a/one.JPG", "two.png"], ["two.png", "a/one.JPG"])
    rows = rewrite(data, elsewhere / "new.jsonl", [0, 0, 0, 1, 1])
    assert all("id" not in row for row in rows)
    dataset = load_examples(str(elsewhere / "new.jsonl"), DataConfig(), "train", 0)
    assert len({dataset.check(i).id for i in range(5)}) == 5


def test_copies_of_bundled_questions(tmp_path: Path) -> None:
    dataset = load_examples("bundled:digits", DataConfig(), "train", 0)
    write_rows(dataset, tmp_path / "new.jsonl", [0, 0, 0, 1], [0.5] * 4)
    ids = [row["id"] for row in rows_of(tmp_path / "new.jsonl")]
    assert ids[1:3] == [f"{ids[0]}#2", f"{ids[0]}#3"] and len(set(ids)) == 4
