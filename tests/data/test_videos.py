"""Videos are shown as frames, evenly spaced, in the place of their slots; every mistake is one line that says where."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.rows import RowWriter
from perl.types import Example
from tests.messages import refused


def grey(level: int) -> Image.Image:
    return Image.new("L", (6, 4), level)


@pytest.fixture(autouse=True)
def films(tmp_path: Path) -> None:
    """Of nine pictures in grey 0, 10, ..., 80: a GIF, a WebP, a folder; and a file that needs a decoder."""
    first, *rest = [grey(10 * k) for k in range(9)]
    first.save(tmp_path / "film.gif", save_all=True, append_images=rest)
    first.save(tmp_path / "film.webp", save_all=True, append_images=rest, lossless=True)
    (tmp_path / "film").mkdir()
    for k in range(9):
        grey(10 * k).save(tmp_path / "film" / f"{k}.png")
    (tmp_path / "film" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    grey(200).save(tmp_path / "still.png")
    (tmp_path / "film.mp4").write_bytes(b"....ftypisom")


def load(folder: Path, frames: int = 3, **row: Any) -> Example:
    row = {"question": "<video> What moves?", "answer": "A", **row}
    kept = {key: value for key, value in row.items() if value is not None}
    (folder / "data.jsonl").write_text(json.dumps(kept))
    data = load_examples(str(folder / "data.jsonl"), DataConfig(frames=frames), "train", 0)
    assert [i.size for i in data.check(0).images] == [(6, 4)] * len(data[0].images)
    return data[0]


def greys(example: Example) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in example.images]  # type: ignore[index]


LISTED = [f"film/{k}.png" for k in range(9)]


@pytest.mark.parametrize(
    "row",
    [
        {"videos": ["film.gif"]},
        {"videos": [{"video": "film.webp", "fps": 2}]},
        {"videos": ["film"]},
        {"videos": [LISTED]},
        {"video": LISTED},
        {"video": "film.gif"},
        {"question": None, "messages": [{"role": "user", "content": [{"type": "video", "video": "film.gif"}]}]},
        {"question": None, "messages": [{"role": "user", "content": [{"type": "video"}]}], "videos": ["film.gif"]},
    ],
)  # fmt: skip
def test_frames_are_evenly_spaced(tmp_path: Path, row: dict[str, Any]) -> None:
    example = load(tmp_path, **row)
    assert greys(example) == [0, 40, 80]
    assert example.messages[0].content.startswith("<image><image><image>")
    assert example.kind == "none"
    assert greys(load(tmp_path, 1, **row)) == [0]


def test_few_frames_come_twice(tmp_path: Path) -> None:
    assert greys(load(tmp_path, videos=[LISTED[:2]])) == [0, 0, 10]
    assert greys(load(tmp_path, videos=["still.png"])) == [200] * 3


def test_videos_and_images_stand_where_their_slots_are(tmp_path: Path) -> None:
    pictures = {
        "images": ["still.png"],
        "videos": ["film", "film.gif"],
        "kind": "all",
        "should_change": True,
    }
    row = {**pictures, "question": "<video>, then <image>, then <video> Which?", "answer": "1"}
    example = load(tmp_path, 2, **row)
    assert greys(example) == [0, 80, 200, 0, 80]
    assert example.question == "<image><image>, then <image>, then <image><image> Which?"
    assert example.kind == "all"  # as the data say
    query = {"question": None, "query": "Which?", "answer": None, "response": "1"}
    assert greys(load(tmp_path, 2, **pictures, **query)) == [0, 80, 0, 80, 200]


def test_rows_are_written_with_their_frames(tmp_path: Path) -> None:
    both = {"videos": ["film.gif"], "images": ["still.png"], "should_change": False}
    load(tmp_path, question="<image> <video> ?", **both)
    data = load_examples(str(tmp_path / "data.jsonl"), DataConfig(frames=3), "train", 0)
    row = RowWriter(tmp_path / "new.jsonl", data).row(0)
    (tmp_path / "new.jsonl").write_text(json.dumps(row))
    again = load_examples(str(tmp_path / "new.jsonl"), DataConfig(), "train", 0)
    assert again[0].kind == "none"
    assert greys(again[0]) == [200, 0, 40, 80] and again[0].question == data[0].question


class Container:
    """Of PyAV, a film of nine frames whose header does not say how many there are."""

    streams = SimpleNamespace(video=[SimpleNamespace(width=6, height=4)])

    def __init__(self, file: Any) -> None:
        self.at_start = True

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None: ...

    def demux(self, stream: Any) -> Iterator[Any]:
        self.at_start = False
        yield from (SimpleNamespace(size=1) for _ in range(9))
        yield SimpleNamespace(size=0)

    def seek(self, offset: int) -> None:
        self.at_start = offset == 0

    def decode(self, stream: Any) -> Iterator[Any]:
        assert self.at_start
        for k in range(9):
            yield SimpleNamespace(to_image=lambda k=k: grey(10 * k).convert("RGB"))


def test_files_are_decoded_where_there_is_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=Container))
    assert greys(load(tmp_path, videos=["film.mp4"])) == [0, 40, 80]
    monkeypatch.setitem(sys.modules, "av", None)
    with refused("data.jsonl line 1, image 1", "av"):
        load(tmp_path, 2, videos=["film.mp4"])


@pytest.mark.parametrize(
    ("frames", "row", "names"),
    [
        (0, {"videos": ["film"]}, ["data.jsonl line 1", "data.frames"]),
        (0, {"images": ["still.png"]}, ["data.jsonl line 1", "data.frames"]),
        (2, {"videos": ["film", "film"]}, ["2 videos", "1 <video>"]),
        (2, {"videos": [], "images": ["still.png"]}, ["0 videos", "1 images", "1 <video>"]),
        (2, {"videos": ["none.gif"]}, ["line 1, image 1", "none.gif", "path"]),
        (2, {"videos": ["empty"]}, ["line 1, image 1", "empty", "path"]),
        (2, {"videos": [7]}, ["line 1, image 1", "int"]),
        (2, {"videos": ["../film.gif"]}, ["../film.gif", "data.image_root"]),
        (2, {"videos": [["film/0.png", "film/none.png"]]}, ["line 1, image 2", "none.png"]),
        (2, {"videos": ["film/notes.txt"]}, ["line 1, image 1", "notes.txt"]),
    ],
)
def test_videos_that_cannot_be_shown(
    tmp_path: Path, frames: int, row: dict[str, Any], names: list[str]
) -> None:
    with refused(*names):
        load(tmp_path, frames, **row)
