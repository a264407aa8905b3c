"""Data that are read as they come: every row once an epoch, and the same ones after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import datasets.config as settings
import pytest

from perl.config import DataConfig
from perl.data import streamed
from perl.data.dataset import load_examples
from perl.data.streamed import StreamedExamples
from perl.types import Example, UserError
from tests.messages import refused

STREAMED = DataConfig(streaming=True)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three shards of seven rows, in blocks of five."""
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streamed, "BLOCK", 5)
    for k in range(3):
        rows = [{"question": "?", "images": [], "answer": f"{k}{i}"} for i in range(7)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{k}.parquet")
    return f"{tmp_path}/*.parquet"


def test_every_row_comes_once_an_epoch_in_another_order(source: str) -> None:
    stream = StreamedExamples(source, STREAMED, 0)
    drawn = stream.draw(42)
    first, second = ([d.example.answer for d in drawn[k : k + 21]] for k in (0, 21))
    assert sorted(first) == sorted(second) == [f"{k}{i}" for k in range(3) for i in range(7)]
    assert first != second and [d.epoch for d in drawn] == [0] * 21 + [1] * 21
    assert sorted(d.example.id for d in drawn[:21]) == [f"row-{i:06d}" for i in range(21)]
    assert sorted(d.key for d in drawn[:21]) == [(i,) for i in range(21)]
    last = drawn[-1]
    assert stream.find(last.key) == last.example
    assert [d.example.answer for d in StreamedExamples(source, STREAMED, 1).draw(21)] != first


def test_a_warning_comes_once_for_a_check_and_a_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_examples("*.parquet", STREAMED, "train", 0)[0].images == ()
    StreamedExamples(source, STREAMED, 0).draw(21)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("taken", [0, 3, 5, 7, 16, 20, 21, 22, 50])
def test_it_goes_on_at_the_next_row(source: str, taken: int) -> None:
    stream, resumed = (StreamedExamples(source, STREAMED, 0) for _ in range(2))
    stream.draw(taken)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.draw(30) == stream.draw(30)
    with refused("seed", "data.streaming"):
        StreamedExamples(source, STREAMED, 1).load_state_dict(stream.state_dict())
    with refused("2 shards", "data.streaming"):
        StreamedExamples(source.replace("*", "[01]"), STREAMED, 0).load_state_dict(
            stream.state_dict()
        )


def test_faulty_rows_are_skipped_and_first_rows_stand_for_all(source: str, tmp_path: Path) -> None:
    def accept(example: Example) -> None:
        if example.answer[0] == "1":
            raise UserError("bad")

    stream = StreamedExamples(source, STREAMED, 0, accept)
    assert {d.example.answer[0] for d in stream.draw(28)} == {"0", "2"} and stream.skipped >= 7
    assert len(load_examples(source, STREAMED, "test", 0, 4)) == 4
    (tmp_path / "a.jsonl").write_text("{}")
    with refused("a.jsonl", "data.streaming"):
        StreamedExamples(str(tmp_path / "a.jsonl"), STREAMED, 0)
    # What is measured on need not be streamed where training is.
    (tmp_path / "a.jsonl").write_text('{"question": "?", "images": [], "answer": "A"}\n' * 3)
    assert load_examples(str(tmp_path / "a.jsonl"), STREAMED, "test", 0)[2].answer == "A"
    with refused("nowhere/x/y.parquet", "hub"):
        StreamedExamples("nowhere/x/y.parquet", STREAMED, 0)
