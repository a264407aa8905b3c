"""What the command lines of the benchmarks share: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from perl.types import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def count(text: str) -> int:
    """A whole number above 0, for `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)
