"""Examples from several sources: in proportion, and going on where a checkpoint was."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from perl.data.dataset import ExampleStream
from perl.data.mixing import MixedStream, read_mix
from perl.types import Example, UserError


def stream(source: str, count: int, seed: int = 0) -> ExampleStream:
    return ExampleStream([Example(f"{source}{i}", (), "", "A") for i in range(count)], seed)


def mixed(seed: int = 0) -> MixedStream:
    return MixedStream([stream("a", 50), stream("b", 7)], [1.0, 3.0], seed)


def ids(stream: MixedStream, n: int) -> list[str]:
    return [drawn.example.id for drawn in stream.draw(n)]


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


@pytest.mark.parametrize("taken", [0, 1, 33])
def test_a_mix_goes_on_where_it_was(taken: int) -> None:
    whole = mixed()
    expected = ids(whole, taken + 40)[taken:]
    first = mixed()
    ids(first, taken)
    state = json.loads(json.dumps(first.state_dict()))
    again = mixed()
    again.load_state_dict(state)
    assert ids(again, 40) == expected


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(UserError, match="now come from 2 sources, those of the checkpoint from 1"):
        mixed().load_state_dict(stream("a", 50).state_dict())
    with pytest.raises(UserError, match="now come from 2 sources, those of the checkpoint from 3"):
        mixed().load_state_dict({"drawn": 0, "streams": [{}, {}, {}]})


def test_how_a_mix_is_written() -> None:
    entries = ("k12.jsonl", "a*b.jsonl*0.5", "bundled:digits*2")
    assert read_mix(entries) == [("k12.jsonl", 1.0), ("a*b.jsonl", 0.5), ("bundled:digits", 2.0)]
    for wrong in ("x*0", "x*-1", "x*nan", "x*inf", "x*half", "*2"):
        with pytest.raises(UserError, match=r"must be SOURCE or SOURCE\*WEIGHT"):
            read_mix([wrong])
