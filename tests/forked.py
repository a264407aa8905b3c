"""Processes of Python, forked from one that has imported what they need: that takes seconds, and is done once."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

_SERVER = forkserver.ForkServer()  # Not the one that reads pictures ahead.
_SERVER.set_forkserver_preload(["tests.imported"])


class Forked(ForkServerProcess):
    """A process that runs a module or a file; as much of `subprocess.Popen` as tests ask, with one stream for all it prints."""

    def __init__(self, what: str | Path, *arguments: object, **environment: str) -> None:
        file, name = tempfile.mkstemp()
        os.close(file)
        self._printed = Path(name)
        given = (str(what), *map(str, arguments))
        super().__init__(target=_run, args=(given, os.environ | environment, self._printed))
        self.start()

    @staticmethod
    def _Popen(process: Any) -> Any:
        with mock.patch.object(
            forkserver, "connect_to_new_process", _SERVER.connect_to_new_process
        ):
            return popen_forkserver.Popen(process)

    def poll(self) -> int | None:
        return self.exitcode

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        text = self._printed.read_text()
        self._printed.unlink()
        return text, None


def _run(given: tuple[str, ...], environment: dict[str, str], printed: Path) -> None:
    file = os.open(printed, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(given)
    if given[0].endswith(".py"):
        runpy.run_path(given[0], run_name="__main__")
    else:
        runpy.run_module(given[0], run_name="__main__", alter_sys=True)
