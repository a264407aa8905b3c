"""A process with the packages of one tree and the benchmarks beside this file, which does what it is told.

    python -P benchmarks/comparing/worker.py '{"tree": "/some/checkout", "device": null, "threads": null, "quick": true}'

It reads a JSON object a line, {"do": ..., more arguments}, and answers each by one line: {"value": ...}, or
{"refusal": text} where it cannot work at all. The first answer comes by itself, when all is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

BENCHMARKS = Path(__file__).resolve().parents[1]


def main() -> None:
    requests, answers = _channel()

    def answer(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=answers, flush=True)

    options = json.loads(sys.argv[1])
    try:
        _take_packages(Path(options["tree"]))
        bench = _bench(options)
    except Exception as error:
        known = isinstance(error, _Refusal)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        answer("refusal", said.partition("\n")[0])
        return
    answer("value", bench.machine)
    for line in requests:
        request = json.loads(line)
        do = getattr(bench, request.pop("do"))
        answer("value", do(**request))


class _Refusal(Exception):
    """The text is for the user."""


def _bench(options: dict[str, Any]) -> Any:
    # Their packages are known only now.
    from benchmarks.comparing.bench import Bench
    from benchmarks.contest import Unavailable

    try:
        return Bench(options["device"], options["threads"], options["quick"])
    except Unavailable as error:
        raise _Refusal(str(error)) from error


def _channel() -> tuple[TextIO, TextIO]:
    """Requests and answers, out of reach of what libraries read and print: their output goes to stderr."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def _take_packages(tree: Path) -> None:
    """`perl` and `perl_kernels` of the tree, whatever is installed; their modules follow their packages.

    Raises:
        ImportError: the tree has not got them.
    """
    # Before the finder of an editable install, which would answer for its own folder.
    sys.meta_path.insert(0, importlib.machinery.PathFinder)
    sys.path[:0] = [str(tree), str(tree / "kernels")]
    for name, folder in (("perl", tree), ("perl_kernels", tree / "kernels")):
        file = importlib.import_module(name).__file__
        if file is None or Path(file).resolve() != (folder / name / "__init__.py").resolve():
            raise ImportError(f"there is no {name} in it (found: {file})")
    benchmarks = ModuleType("benchmarks")
    benchmarks.__path__ = [str(BENCHMARKS)]
    sys.modules["benchmarks"] = benchmarks


if __name__ == "__main__":
    main()
