"""The stream of training examples: shuffled epochs, and a position that can be saved."""

import json

import pytest

from perl.config import DataConfig
from perl.data.dataset import ExampleStream, load_examples
from perl.types import Example, UserError

AUTO = DataConfig()


def numbered(count: int) -> list[Example]:
    return [Example(str(i), (), "", "A") for i in range(count)]


def test_the_stream_goes_through_shuffled_epochs() -> None:
    stream = ExampleStream(numbered(5), seed=0)
    first, second = stream.next(5), stream.next(5)
    assert stream.epoch == 1
    assert sorted(e.id for e in first) == sorted(e.id for e in second) == list("01234")
    ids = [[e.id for e in epoch] for epoch in (first, second)]
    assert ids[0] != ids[1]
    assert [e.id for e in ExampleStream(numbered(5), seed=1).next(5)] != ids[0]
    assert len(ExampleStream(numbered(3), seed=0).next(10)) == 10


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_a_stream_resumes_at_the_next_example(taken: int) -> None:
    stream = ExampleStream(numbered(5), seed=0)
    stream.next(taken)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = ExampleStream(numbered(5), seed=0)
    resumed.load_state_dict(state)
    assert [e.id for e in resumed.next(7)] == [e.id for e in stream.next(7)]
    assert resumed.epoch == stream.epoch


def test_an_endless_stream_counts_on() -> None:
    data = load_examples("bundled:digits", AUTO, "train", 0)
    stream = ExampleStream(data, seed=0)
    assert [e.id[-2:] for e in stream.next(3)] == ["00", "01", "02"]
    resumed = ExampleStream(data, seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.next(1)[0].id.endswith("03") and resumed.epoch == 0


def test_a_stream_of_other_data_does_not_resume() -> None:
    state = ExampleStream(numbered(5), seed=0).state_dict()
    with pytest.raises(UserError, match="size is 6 but the checkpoint was written with 5"):
        ExampleStream(numbered(6), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="seed is 1 but the checkpoint was written with 0"):
        ExampleStream(numbered(5), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="empty"):
        ExampleStream([], seed=0)


def test_an_epoch_begins_with_its_first_example() -> None:
    stream = ExampleStream([Example(str(i), (), "?", "A") for i in range(3)], seed=0)
    drawn = stream.draw(8)
    assert all(stream.find(d.key) is d.example for d in drawn)
    assert [d.epoch for d in drawn] == [0, 0, 0, 1, 1, 1, 2, 2]
