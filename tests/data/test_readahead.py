"""Pictures that are read ahead: the same examples in the same order, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from perl.config import DataConfig
from perl.data import readahead
from perl.data.dataset import RowDataset, load_examples
from perl.data.readahead import ReadAhead
from perl.data.streamed import StreamedExamples
from perl.data.streams import ExampleStream, MixedStream
from perl.model.processor import ENCODED
from perl.permutation.alike import content_key
from perl.training.session import ProcessShare
from perl.types import EncodedImage
from tests.messages import refused, tells
from tests.stand_ins import HereWorker, processes

CPU = torch.device("cpu")
SIDE, ONCE, DEADLY, SLOW = 3, 4, 5, 6
"""Widths of pictures: of any, and of those that `encode` dies of once, dies of, and never returns from."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[HereWorker]:
    monkeypatch.setattr(readahead, "Worker", HereWorker)
    monkeypatch.setattr(HereWorker, "opened", [])
    return HereWorker


@pytest.fixture
def reader() -> Iterator[Callable[..., ReadAhead]]:
    made: list[ReadAhead] = []

    def make(*given: Any) -> ReadAhead:
        made.append(ReadAhead(*(given or (2, None)), CPU))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(folder: Path, count: int, name: str = "data", **widths: int) -> str:
    """A file of questions over two pictures each; `_3=5` gives the first picture of row 3 that width, 0 no pixels."""
    lines = []
    for k in range(count):
        files = [f"{name}-{k}-{i}.png" for i in range(2)]
        for i, file in enumerate(files):
            width = widths.get(f"_{k}", SIDE) if i == 0 else SIDE
            (folder / file).write_bytes(b"cut")
            if width:
                Image.new("RGB", (width, 2), (k, i, len(name))).save(folder / file)
        row = {"images": files, "question": "<image> <image> ?", "answer": "B", "kind": "none"}
        lines.append({**row, "id": f"{name}{k}"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def stream_of(source: str, accept: Any = None) -> ExampleStream:
    return ExampleStream(load_examples(source, DataConfig(), "train", 0), 0, accept)


def share(stream: Any, ahead: ReadAhead | None = None, index: int = 0, of: int = 1) -> ProcessShare:
    return ProcessShare(stream, processes(of, index), ahead)


def seen(drawn: Any) -> list[Any]:
    """Keys, epochs, texts and every pixel."""
    return [
        (
            d.key,
            d.epoch,
            d.example.id,
            [(i.mode, i.size, i.tobytes(), i.info) for i in d.example.images],
        )
        for d in drawn
    ]


@pytest.mark.parametrize("kind", ["one", "mixed", "streamed"])
@pytest.mark.parametrize("of", [1, 2])
def test_the_same_examples_and_the_same_state(
    kind: str,
    of: int,
    here: type[HereWorker],
    reader: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In draws of all sizes, past the ends of epochs, and where a run goes on that was stopped in between."""
    monkeypatch.setattr("perl.data.streamed.BLOCK", 4)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, more = rows(tmp_path, 7), rows(tmp_path, 3, "more")
    if kind == "streamed":
        listed = [json.loads(line) for line in Path(data).read_text().splitlines()]
        datasets.Dataset.from_list(listed).to_parquet(tmp_path / "data.parquet")

    def make() -> Any:
        if kind == "streamed":
            return StreamedExamples(str(tmp_path / "data.parquet"), DataConfig(streaming=True), 0)
        if kind == "one":
            return stream_of(data)
        return MixedStream([stream_of(data), stream_of(more)], [2.0, 1.0], 0)

    plain, ahead = share(make(), None, of - 1, of), share(make(), reader(), of - 1, of)
    for number, count in enumerate((4, 4, 2, 6, 8, 4, 4)):
        assert seen(ahead.draw(count)) == seen(plain.draw(count))
        state = json.loads(json.dumps(plain.stream.state_dict()))
        assert ahead.stream.state_dict() == state
        if number == 3:
            ahead.ahead.close()
            ahead = share(make(), reader(), of - 1, of)
            ahead.stream.load_state_dict(state)
    drawn = ahead.draw(2)
    assert seen([d._replace(example=ahead.find(d.key)) for d in drawn]) == seen(drawn)
    assert len(here.opened) > 8


def test_a_process_reads_no_more_than_its_own(
    here: type[HereWorker], reader: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as many ahead as it draws at once."""
    whole = stream_of(rows(tmp_path, 30)).draw(24)
    read: list[str] = []
    original = RowDataset.read
    monkeypatch.setattr(
        RowDataset, "read", lambda *a, **k: read.append("here") or original(*a, **k)
    )
    second = share(stream_of(str(tmp_path / "data.jsonl")), reader(), 1, 2)
    own = [d for k in (0, 8) for d in second.draw(8)]
    assert [d.key for d in own] == [d.key for d in whole[:16][1::2]] and not read
    for _, (_, future) in second.ahead._coming.items():
        future.result()
    assert sorted(here.opened) == sorted(str(d.key[0] + 1) for d in whole[1::2])


def test_what_waits_is_bounded(
    here: type[HereWorker], reader: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the size of a draw, and by bytes; before a row is read nobody knows its bytes."""
    most: list[int] = []
    has_room = ReadAhead._has_room
    monkeypatch.setattr(
        ReadAhead, "_has_room", lambda self: most.append(len(self._coming)) or has_room(self)
    )
    source = share(stream_of(rows(tmp_path, 300)), reader())
    source.draw(6)
    assert most[:5] == [0, 1, 2, 3, 4]  # Two for each of two workers.
    assert len(source.ahead._coming) == 6 == max(most) + 1
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 2999)
    source.draw(6)
    assert len(source.ahead._coming) == 2
    most.clear()
    assert len(source.draw(40)) == 40 and len(source.ahead._coming) == max(most) == 2


def test_what_does_not_come_is_let_go(
    here: type[HereWorker], reader: Callable, tmp_path: Path
) -> None:
    source = share(stream_of(rows(tmp_path, 20)), reader())
    source.draw(3)
    before = set(source.ahead._coming)
    source.stream.load_state_dict({**source.stream.state_dict(), "position": 15})
    source.draw(2)
    assert len(before) == 3 and not before & set(source.ahead._coming)


def test_a_broken_picture_is_what_it_is_without_workers(
    here: type[HereWorker], reader: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = rows(tmp_path, 5, _2=0)
    errors = []
    for ahead in (None, reader()):
        with refused("data.jsonl", "data-2-0.png") as caught:
            share(stream_of(data), ahead).draw(5)
        errors.append(caught)
    skipping = [share(stream_of(data, lambda _: None), ahead) for ahead in (None, reader())]
    assert seen(skipping[0].draw(9)) == seen(skipping[1].draw(9))
    assert skipping[0].stream.skipped == skipping[1].stream.skipped == 2
    # All processes have to know which rows are left out.
    both = [share(stream_of(data, lambda _: None), reader(), k, 2) for k in (0, 1)]
    drawn = [seen(each.draw(8)) for each in both]
    whole = seen(stream_of(data, lambda _: None).draw(8))
    assert [drawn[k % 2][k // 2] for k in range(8)] == whole
    assert len({record.getMessage() for record in caplog.records}) == 1


def test_without_a_worker_the_run_reads_by_itself(
    reader: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ends(encode: Any) -> None:
        raise EOFError

    monkeypatch.setattr(readahead, "Worker", ends)
    data = rows(tmp_path, 5)
    source = share(stream_of(data), reader())
    assert seen(source.draw(7)) == seen(stream_of(data).draw(7))
    (record,) = caplog.records
    tells(record.getMessage(), "data.workers", "EOFError")


class Red:
    """In a worker: the red of a picture's pixels."""

    @property
    def image_processor(self) -> Any:
        return self  # So that the server imports this module, once for all workers.

    def __call__(self, image: Image.Image) -> EncodedImage:
        flag = Path(os.environ.get("PERL_TEST_FLAG", ""))
        if image.width == DEADLY or (image.width == ONCE and not flag.exists()):
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if image.width == SLOW:
            time.sleep(60)
        red = torch.frombuffer(bytearray(image.tobytes()[::3]), dtype=torch.uint8)
        pixels = red.to(torch.bfloat16)[None]
        return EncodedImage(content_key(image), pixels, (1, 1, red.numel()), 1)


encode = Red()


@pytest.mark.gpu
def test_pixels_for_a_gpu_are_in_pinned_memory(tmp_path: Path) -> None:
    dataset: Any = load_examples(rows(tmp_path, 1), DataConfig(), "train", 0)
    ahead = ReadAhead(1, encode, torch.device("cuda", 0))
    ahead.upcoming = lambda: iter([(dataset, 0)])
    pixels = [vars(image)[ENCODED].pixel_values for image in ahead.read(dataset, 0).images]
    ahead.close()
    assert all(each.is_pinned() for each in pixels)
    wanted = [encode(image).pixel_values for image in dataset[0].images]
    assert all(map(torch.equal, [each.cuda().cpu() for each in pixels], wanted))


@pytest.mark.slow
def test_workers(
    reader: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Real ones: what they give is equal to the bit; one that dies or hangs is replaced, and the row named if it is the
    row's fault, which it is not if all die that have nothing to do; Ctrl-C is not for them; none is left."""
    monkeypatch.setenv("PERL_TEST_FLAG", str(tmp_path / "died"))
    data = rows(tmp_path, 12, _1=ONCE, _4=DEADLY, _7=SLOW, _9=0)
    readahead.warm_up(encode)
    ahead = reader(2, encode)
    dataset: Any = load_examples(data, DataConfig(), "train", 0)
    ahead.upcoming = lambda: ((dataset, i) for i in range(4))
    for i in (0, 1, 2, 3):
        example = ahead.read(dataset, i)
        assert seen([SimpleNamespace(key=i, epoch=0, example=example)]) == seen(
            [SimpleNamespace(key=i, epoch=0, example=dataset[i])]
        )
        for image in example.images:
            got, wanted = vars(image)[ENCODED], encode(image)
            assert torch.equal(got.pixel_values, wanted.pixel_values)
            assert astuple(got)[2:] == astuple(wanted)[2:] and got.key == wanted.key
            assert got.pixel_values.dtype == torch.bfloat16
    (record,) = caplog.records
    tells(record.getMessage(), "data.jsonl line 2", "SIGKILL")
    workers = list(ahead._running)
    for worker in workers:
        os.kill(worker._process.pid, signal.SIGINT)
    monkeypatch.setattr(readahead, "TIMEOUT", 2.0)
    ahead.upcoming = lambda: ((dataset, i) for i in range(4, 12))
    with refused("data.jsonl line 5", "SIGKILL", "data.workers = 0"):
        ahead.read(dataset, 4)
    assert ahead.read(dataset, 5).id == "data5"
    with refused("data.jsonl line 8", "2 seconds"):
        ahead.read(dataset, 7)
    with refused("data.jsonl line 10", "data-9-0.png"):
        ahead.read(dataset, 9)
    assert ahead.read(dataset, 11).id == "data11"
    for i in (2, 3):
        ahead.upcoming = lambda i=i: iter([(dataset, i)])
        assert ENCODED in vars(ahead.read(dataset, i).images[0])
        assert len(caplog.records) == 5  # None of them for a worker that died while it was idle.
        for worker in ahead._running:
            os.kill(worker._process.pid, signal.SIGTERM)
            worker._process.join(10)
    processes = [worker._process for worker in ahead._running]
    ahead.close()
    for process in processes:
        process.join(10)
    assert not any(process.is_alive() for process in processes)
