"""Rows and pictures of a benchmark's files, as published or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.evaluation.suites import SUITES
from perl.evaluation.suites.base import Item, open_items
from perl.types import UserError
from tests.evaluation.benchmarks import mv_math
from tests.messages import refused, tells
from tests.pictures import encoded


@pytest.fixture
def item(tmp_path: Path) -> Callable[..., Item]:
    (tmp_path / "9.png").write_bytes(encoded((9, 0, 0)))

    def made(decode: bool = True, **row: Any) -> Item:
        return Item(row, 0, tmp_path, "file row 3", think=False, decode=decode)

    return made


def test_columns(item: Callable[..., Item]) -> None:
    row = item(a=None, b=7, c=[1, "x"])
    assert (row.text("a"), row.text("b")) == ("", "7")
    assert (row.texts("a"), row.texts("c")) == ([], ["1", "x"])
    for read in (row.value, row.text, row.texts):
        with refused("file row 3", "nope"):
            read("nope")


def test_pictures_in_every_form(item: Callable[..., Item], tmp_path: Path) -> None:
    row = item(a={"bytes": encoded((5, 0, 0)), "path": "9.png"}, b=None, c={"path": "9.png"})
    assert [p.getpixel((0, 0))[0] for p in row.pictures(["a", "b", "c", "none"])] == [5, 9]
    for value in ("9.png", tmp_path / "9.png", (tmp_path / "9.png").read_bytes()):
        assert row.picture(value).getpixel((0, 0)) == (9, 0, 0)
    for value in (3, None, {"bytes": None, "path": None}):
        with refused("file row 3"):
            row.picture(value)
    with refused("file row 3", "nope.png"):
        row.picture("nope.png")
    assert item(decode=False).picture("9.png").size == (6, 4)


def test_many_missing_pictures_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "mv_math"
    mv_math(folder)
    file = folder / "data" / "MV-MATH.json"
    (row, *_) = json.loads(file.read_text())
    for missing in (20, 22):
        names = [f"missing_{k}.jpg" for k in range(missing)]
        file.write_text(json.dumps([{**row, "input_image": [*names, names[0]]}]))
        with pytest.raises(UserError) as caught:
            open_items(SUITES["mv_math"], tmp_path, think=False)
        tells(caught.value, "mv_math", folder, "images/missing_19.jpg", "--list-suites")
        assert str(caught.value).count("images/missing_") == 20
        assert (" 2 more" in str(caught.value)) == (missing == 22)


def test_a_library_that_is_missing_is_told_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those suites that ask it."""

    def lacking(name: str) -> None:
        raise UserError(name)

    monkeypatch.setattr("perl.evaluation.suites.base.check_math", lacking)
    for name, suite in SUITES.items():
        if name in ("mathverse", "mathvision", "mv_math"):
            with refused(name):
                open_items(suite, tmp_path, think=False)
        else:
            assert len(open_items(suite, root, think=False)) > 1
