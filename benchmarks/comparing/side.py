"""One side of a comparison, as seen from outside: a worker process that is asked and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from perl.types import UserError

_WORKER = Path(__file__).with_name("worker.py")


class Ended(Exception):
    """The worker is gone, of a crash or for want of memory; the text says how."""


class Side:
    """A worker with the packages of `tree`.

    Args:
        name: for messages, as `BASE (93baa22)`.
        options: `device`, `threads` and `quick` of the worker.
        log: the file that takes what the worker and its libraries print.
    """

    def __init__(self, name: str, tree: Path, options: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        self.options = {"tree": str(tree), **options}
        self.machine: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Launch the worker, which imports its packages meanwhile; `ready` waits for it."""
        environment = {
            # Threads of the worker that waits must not spin while the other one is timed.
            "GOMP_SPINCOUNT": "1000",
            "HF_HUB_OFFLINE": "1",
            # glibc keeps what is freed. Else it is chance whether a process gives large temporaries back after each call
            # and has their pages mapped and cleared anew in the next, which can take several times as long as the rest.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**40),
            **os.environ,
            # Sets and dictionaries in the same order on both sides.
            "PYTHONHASHSEED": "0",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), json.dumps(self.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                # Ctrl-C is for the program, which then ends its workers.
                start_new_session=True,
            )

    def ready(self) -> None:
        """
        Raises:
            UserError: the packages of this side cannot be imported, or the device is not there.
        """
        try:
            self.machine = self._answer()
        except Ended as error:
            raise UserError(f"{self.name}: {error}") from error

    def ask(self, do: str, **arguments: Any) -> Any:
        """
        Raises:
            Ended: the worker ended instead of answering; `restart` makes a new one.
        """
        assert self.process is not None and self.process.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Ended(self._last_words()) from None
        return self._answer()

    @property
    def gone(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def restart(self) -> None:
        self.close()
        self.start()
        self.ready()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _answer(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise Ended(self._last_words())
        answer = json.loads(line)
        if "refusal" in answer:
            raise UserError(f"{self.name}: {answer['refusal']}")
        return answer["value"]

    def _last_words(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the process ended with code {code}" + (f": {lines[-1]}" if lines else "")
