"""One operation at one size, and those who do it: what is asked of a benchmark before and beside its time."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Unavailable(Exception):
    """A provider cannot take part; the text says why, for the reader of the table."""


class Refused(AssertionError):
    """A result is wrong, so its time means nothing."""


@dataclass(frozen=True)
class Work:
    """The least that an operation costs, by its formula: nobody is faster than the device's peaks allow."""

    flops: float = 0.0
    """Floating-point operations, a multiply-add counted as two."""
    bytes: float = 0.0
    """Read once from memory and written once."""


@dataclass(frozen=True)
class Run:
    """How a provider does the work of a problem."""

    call: Callable[[], Any]
    """What is timed, again and again."""
    reset: Callable[[], object] | None = None
    """Before every round, not timed: what a call has used up."""
    read: Callable[[Any], Any] = lambda output: output
    """The output of a call as the problem's results, not timed."""

    def once(self, device: torch.device) -> Any:
        """The output of one call, which a GPU has ended."""
        if self.reset:
            self.reset()
        output = self.call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return output


@dataclass(frozen=True)
class Provider:
    """An implementation that somebody could use.

    `prepare` takes the problem, and raises `Unavailable` (or ImportError) where it cannot take part.
    """

    name: str
    prepare: Callable[[Any], Run]
    package: str = ""
    """Distribution on PyPI, whose version is shown; empty for this repository."""
    note: str = ""
    """Where its work differs from the others'."""
    omits: frozenset[str] = frozenset()
    """Results that it does not give."""
    asked: Callable[[Any], Any] = lambda problem: problem
    """The contest's problem as another one on the same inputs, with a truth of its own, where it computes something
    else; its note says what."""

    @property
    def ours(self) -> bool:
        return not self.package

    @property
    def version(self) -> str:
        """`torch 2.13.0`; the name alone where it is not installed."""
        if not self.package:
            return ""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package


class Problem(ABC):
    """Inputs on their device, and the truth about them."""

    def find_truth(self) -> None:
        """Compute what results are compared with, once, before anybody's turn."""
        return

    @abstractmethod
    def prove(
        self, results: Any, omits: frozenset[str] = frozenset(), slack: float = 1.0
    ) -> float | None:
        """The largest relative error; raises Refused if it is more than low precision explains.

        None where results are right or wrong. See `benchmarks.harness.proof.Proven` for `slack`.
        """


@dataclass(frozen=True)
class Inputs(Problem):
    """A problem whose results are right or wrong: `check` raises AssertionError for a wrong one."""

    value: Any
    check: Callable[[Any], None]

    def prove(self, results: Any, omits: frozenset[str] = frozenset(), slack: float = 1.0) -> None:
        try:
            self.check(results)
        except AssertionError as error:
            # Under pytest an assertion goes on with what was compared.
            first = str(error).partition("\n")[0]
            raise Refused(first or "a wrong result; not timed") from error


@dataclass(frozen=True)
class Contest:
    """Providers that do the same work on the same inputs, round by round in turn."""

    op: str
    """The operation, which a section of the table is about."""
    case: str
    """What size it is done at."""
    shape: Mapping[str, Any]
    problem: Callable[[torch.device], Problem]
    providers: Sequence[Provider]
    work: Work = field(default_factory=Work)
    host: bool = False
    """Whether the work is the host's, whatever the device: by the wall clock, and without a figure for memory, as
    PyTorch's allocators do not see it."""
    axis: str = ""
    """The key of `shape` that a series of contests varies, to see how cost grows."""

    @property
    def id(self) -> str:
        return f"{self.op}, {self.case}"


def own_contest(
    op: str,
    case: str,
    axis: str,
    size: int,
    problem: Callable[[torch.device], Inputs],
    call: Callable[[Any], Any],
) -> Contest:
    """Of this repository alone, on the host; `call` takes what the problem's `Inputs` hold."""
    provider = Provider("PeRL", lambda p: Run(lambda: call(p.value)))
    return Contest(op, case, {axis: size}, problem, [provider], host=True, axis=axis)
