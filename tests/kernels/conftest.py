"""Options of `test_fuzz.py`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "random cases of the kernels")
    group.addoption(
        "--fuzz", type=int, metavar="N", help="run N random cases, over the backends that are there"
    )
    group.addoption("--fuzz-seed", type=int, metavar="SEED", help="repeat the cases of this seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fuzz", None) is None:
        return
    for item in items:
        # As many cases as somebody asks for take as long as they take.
        if item.path.name == "test_fuzz.py":
            item.add_marker(pytest.mark.timeout(0), append=False)
