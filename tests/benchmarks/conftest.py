"""How a program of the benchmarks ends that cannot do what was asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs `main(arguments)` in this process; gives the one error line, behind which there is nothing."""

    def run(main: Callable[[list[str]], int], arguments: list[str], code: int = 2) -> str:
        assert main(arguments) == code
        said = capsys.readouterr()
        assert not said.out and "Traceback" not in said.err
        *progress, last = said.err.splitlines()
        assert last.startswith("error: ") and not any("error: " in line for line in progress)
        assert code != 2 or not progress
        return last.removeprefix("error: ")

    return run
