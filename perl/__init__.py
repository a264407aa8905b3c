"""PeRL: reinforcement learning of vision-language models over several images, in permuted orders.

Importing it loads nothing else; the command line is `perl-rl`, or `python -m perl`.
"""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("perl-rl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
