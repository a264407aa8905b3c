"""Streams of training examples: shuffled epochs, sources in proportion, and positions that can be saved."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perl.config import DataConfig
from perl.data.dataset import load_examples
from perl.data.streams import ExampleStream, MixedStream, Stream, read_mix
from perl.types import Example, UserError
from tests.messages import refused


class Numbered(list[Example]):
    """A data set of so many examples."""

    def __init__(self, count: int, source: str = "") -> None:
        super().__init__(Example(f"{source}{i}", (), "", "A") for i in range(count))
        self.size = count
        self.check = self.__getitem__


class Broken(Numbered):
    def __getitem__(self, i: Any) -> Any:
        raise UserError("row 1 is bad")


def one(count: int = 5, seed: int = 0) -> ExampleStream:
    return ExampleStream(Numbered(count), seed)  # type: ignore[arg-type]


def mixed(seed: int = 0) -> MixedStream:
    streams = [ExampleStream(Numbered(n, source), 0) for source, n in (("a", 50), ("b", 7))]  # type: ignore[arg-type]
    return MixedStream(streams, [1.0, 3.0], seed)


def ids(stream: Stream, n: int) -> list[str]:
    return [drawn.example.id for drawn in stream.draw(n)]


def test_the_stream_goes_through_shuffled_epochs() -> None:
    stream = one()
    first, second = ids(stream, 5), ids(stream, 5)
    assert stream.epoch == 1
    assert sorted(first) == sorted(second) == list("01234") and first != second
    assert ids(one(seed=1), 5) != first
    drawn = one(3).draw(8)
    assert [d.epoch for d in drawn] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(one(3).find(d.key) == d.example for d in drawn)


def test_sources_come_in_proportion_and_go_through_epochs_of_their_own() -> None:
    stream = mixed()
    drawn = stream.draw(800)
    sources = Counter(d.example.id[0] for d in drawn)
    assert sources["b"] / 800 == pytest.approx(0.75, abs=0.06)  # four standard errors
    of_b = [d.example.id for d in drawn if d.example.id[0] == "b"]
    assert sorted(of_b[:7]) == [f"b{i}" for i in range(7)]
    assert max(d.epoch for d in drawn if d.example.id[0] == "b") > 50
    assert all(stream.find(d.key) is d.example for d in drawn)
    assert ids(mixed(1), 20) != ids(mixed(0), 20)


def test_sequences_and_sources_are_drawn_by_seed_and_number_alone() -> None:
    """Whatever program draws them: a resumed run goes on in the same ones."""
    sequences = [random.Random(f"3/{epoch}") for epoch in range(2)]
    epochs = [list(range(5)), list(range(5))]
    for rng, order in zip(sequences, epochs, strict=True):
        rng.shuffle(order)
    assert ids(one(seed=3), 10) == [str(i) for order in epochs for i in order]
    sources = [random.Random(f"4/mix/{k}").choices("ab", [1, 3])[0] for k in range(30)]
    assert [name[0] for name in ids(mixed(4), 30)] == sources


def skipping(bad: set[int], count: int = 5) -> ExampleStream:
    """A stream that leaves rows of these numbers out."""

    def accept(example: Example) -> None:
        if int(example.id) in bad:
            raise UserError(f"row {example.id} is bad")

    return ExampleStream(Numbered(count), 0, accept)  # type: ignore[arg-type]


def test_a_faulty_row_is_left_out_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    stream, resumed = skipping({1, 3}), skipping({1, 3})
    assert [d.key[0] for d in stream.draw(3)] == [
        i for (i,), *_ in one().draw(5) if i not in {1, 3}
    ]
    (drawn,) = stream.draw(1)
    assert drawn.epoch == 1 and stream.skipped >= 2
    stream.draw(20)
    assert len(caplog.records) == 1
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.draw(9) == stream.draw(9)
    both = MixedStream([skipping({0}, 1), skipping({1})], [0.0, 1.0], 0)
    both.draw(12)
    assert both.skipped == both.streams[1].skipped >= 2
    with refused("4", "faulty"):
        skipping({0, 1, 2, 3}, 4).draw(1)
    with refused("row 1"):
        stream = one()
        stream.dataset = Broken(5)  # type: ignore[assignment]
        stream.draw(5)


@pytest.mark.parametrize("make", [one, mixed])
@pytest.mark.parametrize("taken", [0, 1, 3, 5, 12, 33])
def test_a_stream_resumes_at_the_next_example(make: Callable[[], Stream], taken: int) -> None:
    stream, resumed = make(), make()
    ids(stream, taken)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.draw(40) == stream.draw(40)


def test_an_endless_stream_counts_on() -> None:
    data = load_examples("bundled:digits", DataConfig(), "train", 0)
    stream = ExampleStream(data, seed=0)
    assert [name[-2:] for name in ids(stream, 3)] == ["00", "01", "02"]
    resumed = ExampleStream(data, seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert ids(resumed, 1)[0].endswith("03") and resumed.epoch == 0


@pytest.mark.parametrize(
    ("make", "state", "names"),
    [
        (lambda: one(6), one().state_dict(), ("size", 6, 5)),
        (lambda: one(seed=1), one().state_dict(), ("seed", 1, 0)),
        (lambda: one(0), {}, ("empty", "rows")),
        (one, mixed().state_dict(), ("one source", 2, "data.mix")),
        (mixed, one().state_dict(), ("2 sources", 1, "data")),
        (mixed, {"drawn": 0, "streams": [{}] * 3}, ("2 sources", 3, "data")),
        # Only the weights differ: what is stored of both streams would load.
        (mixed, mixed().state_dict() | {"weights": [1.0, 2.5]}, ("data.mix", "[3.0]", "[2.5]")),
    ],
)
def test_a_state_of_other_data_is_refused(
    make: Callable[[], Stream], state: dict, names: tuple[object, ...]
) -> None:
    with refused(*names):
        make().load_state_dict(state)


def test_how_a_mix_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ("k12.jsonl", "a*b.jsonl*0.5", "bundled:digits*2")
    assert read_mix(entries) == [("k12.jsonl", 1.0), ("a*b.jsonl", 0.5), ("bundled:digits", 2.0)]
    (tmp_path / "1.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert read_mix(["*.jsonl", "?.jsonl*3"]) == [("*.jsonl", 1.0), ("?.jsonl", 3.0)]
    for wrong in ("x*0", "x*-1", "x*nan", "x*inf", "x*half", "*2"):
        with refused("data.mix", f"'{wrong}'", "SOURCE*WEIGHT", 0):
            read_mix([wrong])
