"""What is held out of a data set: about its share, alike in every run, and no picture of it is shown elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import datasets.config as settings
import pytest

from perl import kept
from perl.config import DataConfig
from perl.data.dataset import RowDataset, check_apart, load_examples
from perl.data.held_out import held_out_rows, shown_by
from perl.data.videos import Frame
from perl.types import Example
from tests.messages import refused, tells
from tests.pictures import encoded


def pairs(*rows: str) -> list[dict[str, str]]:
    """Rows that show the pictures of these letters."""
    return [{f"/data/{name}": name for name in row} for row in rows]


def test_rows_that_share_pictures_stay_together() -> None:
    # ab-bc-cd hang together, as do e-ef; 20 others are alone.
    rows = ["ab", "e", "bc", *(chr(200 + k) for k in range(20)), "cd", "ef"]
    for share in (0.04, 0.1, 0.3, 0.5, 0.9):
        held = held_out_rows(pairs(*rows), share, "data")
        assert len(held) == round(share * 25) and held == sorted(set(held))
        out = {rows[i] for i in held}
        for group in ({"ab", "bc", "cd"}, {"e", "ef"}):
            assert group <= out or group.isdisjoint(out)


def test_which_rows_depends_on_the_names_alone() -> None:
    rows = [chr(200 + k) for k in range(40)]
    held = {rows[i] for i in held_out_rows(pairs(*rows), 0.2, "data")}
    elsewhere = [{f"/moved/{name}": name for name in row} for row in reversed(rows)]
    assert {rows[39 - i] for i in held_out_rows(elsewhere, 0.2, "data")} == held
    assert held != set(rows[:8])
    # A larger share holds out what a smaller one does, and more.
    assert held < {rows[i] for i in held_out_rows(pairs(*rows), 0.4, "data")}


def test_there_is_something_on_either_side() -> None:
    assert len(held_out_rows(pairs("a", "b", "c"), 0.01, "data")) == 1
    assert len(held_out_rows(pairs("a", "b", "c"), 0.99, "data")) == 2
    assert held_out_rows(pairs("ab", "bc", "de"), 0.01, "data") == [2]
    with refused("data.eval", "split:0.05", "rows.jsonl", "3 rows"):
        held_out_rows(pairs("ab", "bc", "ca"), 0.05, "rows.jsonl")


def test_rows_that_cannot_be_read_are_not_held_out(file: Path) -> None:
    source = file.with_name("bad.jsonl")
    source.write_text('{"question": "<image>?"\n{"question": 1}\n' + file.read_text())
    config = DataConfig(train=str(source), eval="split:0.9")
    held = load_examples("split:0.9", config, "test", 0)
    assert isinstance(held, RowDataset) and len(held) == 27 and min(held.rows) >= 2
    assert load_examples(str(source), config, "train", 0).size == 5
    source.write_text('{"question": "<image>?", "images": []}\n' * 3)
    with refused("bad.jsonl line 1", "0 images"):
        load_examples("split:0.9", config, "test", 0)


def test_what_is_held_out_is_sought_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(train=str(file), eval="split:0.2")
    read, shown = [], RowDataset.shown
    monkeypatch.setattr(RowDataset, "shown", lambda self, i: read.append(i) or shown(self, i))

    def held(of: DataConfig = config) -> list[str]:
        kept._found.clear()  # As in another process.
        read.clear()
        return ids("split:0.2", of, "test")

    first = held()
    assert len(read) == 30 and held() == first and not read
    assert held(replace(config, mix=("x",))) == first and not read
    held(replace(config, image_root=str(file.parent)))
    assert len(read) == 30
    file.write_text(file.read_text() + json.dumps({"question": "?", "images": [], "answer": "A"}))
    held()
    assert len(read) == 31


def test_what_tells_pictures_apart(tmp_path: Path) -> None:
    def shown(*images: Any, question: str = "?") -> dict[str, str]:
        return dict(shown_by(Example("", images, question, "A"), tmp_path))

    path = str(tmp_path / "a" / "1.png")
    assert shown("a/1.png") == shown("./a/1.png") == {path: "a/1.png"}
    assert shown(f"file://{path}", {"path": path}) == {path: path}
    one, other = encoded((1, 0, 0)), encoded((2, 0, 0))
    assert shown(one) == shown({"bytes": one, "path": "1.png"}) != shown(other)
    assert len(shown(one, other, one)) == 2
    assert shown() == shown() != shown(question="another?")
    video = [Frame("a/1.gif", k, 8) for k in range(8)]
    assert shown(*video) == shown(Frame({"path": "./a/1.gif"}, 0, 2)) == shown("a/1.gif")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 rows; rows 3 k to 3 k + 2 show picture k."""
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = []
    for k in range(30):
        (tmp_path / f"{k // 3}.png").write_bytes(encoded((k // 3, 0, 0)))
        rows.append({"question": f"<image> {k}?", "images": [f"{k // 3}.png"], "answer": "A"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def ids(source: object, config: DataConfig, split: Any) -> list[str]:
    data = load_examples(str(source), config, split, 0)
    return [data[i].id for i in range(len(data))]


def test_training_draws_what_is_not_held_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(train=str(file), eval="split:0.2")
    caplog.set_level("INFO")
    held = ids("split:0.2", config, "test")
    assert held and sum("held out" in m for m in caplog.messages) == 1
    tells(caplog.text, "data.eval", "6 of the 30 rows", "2 pictures")
    every = [f"row-{k:06d}" for k in range(30)]
    # The same file by another path, as in data.mix, is thinned too; other files are not.
    for same in (file, file.parent / "." / "data.jsonl"):
        assert ids(same, config, "train") == [i for i in every if i not in held]
    other = file.with_name("other.jsonl")
    other.write_text(file.read_text())
    assert ids(other, config, "train") == every
    assert ids(file, DataConfig(train=str(file)), "train") == every
    stage = DataConfig(train=str(other), eval=f"split:0.2:{file}")
    assert ids(stage.eval, stage, "test") == held and ids(other, stage, "train") == every
    few = load_examples("split:0.2", config, "test", 0, limit=2)
    assert len(few) == 2 and {few[0].id, few[1].id} < set(held)


@pytest.mark.parametrize("hang_together", [15, 18])
def test_a_group_of_more_than_half_is_warned_of(
    hang_together: int, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:hang_together:3]:  # One row of each picture shows the last one as well.
        row |= {"question": "<image><image>", "images": [*row["images"], "joint.png"]}
    (file.parent / "joint.png").write_bytes(encoded((99, 0, 0)))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids("split:0.2", DataConfig(train=str(file), eval="split:0.2"), "test")
    warned = [
        r.getMessage()
        for r in caplog.records
        if r.levelname == "WARNING" and "hang" in r.getMessage()
    ]
    if hang_together == 15:
        assert not warned
    else:
        tells(warned[0], file, "18 of its 30", "data.eval")


def test_embedded_pictures_are_told_by_their_content(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["images"] = [{"bytes": (file.parent / name).read_bytes()} for name in row["images"]]
    datasets.Dataset.from_list(rows).to_parquet(file.with_suffix(".parquet"))
    config = DataConfig(train=str(file.with_suffix(".parquet")), eval="split:0.1")
    held = [int(i[-2:]) for i in ids("split:0.1", config, "test")]
    assert len(held) == 3 and held == [held[0] + k for k in range(3)] and held[0] % 3 == 0


def test_bundled_pictures_are_apart_already() -> None:
    config = DataConfig(train="bundled:digits", eval="split:0.05")
    held = load_examples("split:0.05", config, "test", 0, limit=2)
    assert held[0].id == "digits-test-which-000000" and held.size == 2
    assert load_examples("bundled:digits", config, "train", 0).size is None


def apart(trained: object, measured: object, limit: int | None = None) -> None:
    config = DataConfig(train=str(trained), eval=str(measured))
    data = load_examples(str(measured), config, "test", 0, limit)
    check_apart(data, [load_examples(str(trained), config, "train", 0)])


def test_what_is_trained_on_is_not_measured_on(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first, second = (datasets.Dataset.from_list(part) for part in (rows[:9], rows[9:]))
    for name, parts in (("one", {"train": first}), ("two", {"train": first, "test": second})):
        datasets.DatasetDict(parts).save_to_disk(str(file.parent / name))
    first.to_parquet(file.parent / "table.parquet")
    one, two = (file.parent / name for name in ("one", "two"))
    for trained, measured in (
        (file, file),
        (file, file.parent / "." / "data.jsonl"),
        (f"{file.parent}/other.jsonl,{file}", file),
        (one, one),
        (one, f"{one}:train"),
        (two, f"{two}:train"),
        *[(file.parent / "table.parquet",) * 2],
    ):
        file.with_name("other.jsonl").write_text(file.read_text().replace("?", "!"))
        with refused("data.eval", "data.eval = split:0.05", str(trained).split(",")[-1]):
            apart(trained, measured)
    apart(two, two)
    apart(file, "split:0.1")
    pattern = DataConfig(train=f"{file.parent}/*.jsonl", eval="split:0.1")
    held, *trained = (
        load_examples(source, pattern, split, 0)
        for source, split in (("split:0.1", "test"), (pattern.train, "train"), (str(file), "train"))
    )
    check_apart(held, trained[:1])
    with refused(file, pattern.train, "data.eval", "data.train"):
        check_apart(held, trained)
    apart("bundled:digits", "bundled:digits", limit=1)


def test_pictures_on_both_sides_are_counted(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = file.read_text().splitlines(keepends=True)
    test, train = file.with_name("test.jsonl"), file.with_name("train.jsonl")
    test.write_text("".join(lines[:5]))
    train.write_text("".join(lines[3:20]))
    apart(train, test)
    tells(caplog.text, "data.eval", "2 of 5 examples", file.parent / "1.png", "split:0.05")
    caplog.clear()
    train.write_text("".join(lines[6:]))
    apart(train, test)
    assert not caplog.messages
