"""What an error must say: where, what came and what to do, by the names that a user types, whatever the sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from perl.types import UserError

_SENTENCE = re.compile(r"[A-Za-z']{2,} [A-Za-z']+ [A-Za-z']{2,}")


def tells(said: object, *names: object) -> None:
    """Fails unless the text has each of these, as whole words: keys, options, commands, files, values."""
    assert names, "a message names a place or a remedy: say which"
    for name in map(str, names):
        assert not _SENTENCE.search(name), f"{name!r} is a sentence, which may be reworded"
        found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(said))
        assert found, f"{name!r} is not named in: {said}"


@contextmanager
def refused(*names: object, error: type[Exception] = UserError) -> Iterator[None]:
    """The block must fail by this kind of error, whose text `tells` these names."""
    with pytest.raises(error) as caught:
        yield
    tells(caught.value, *names)
