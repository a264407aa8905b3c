"""What holds for every test: seeded, few threads, no network, uninitialised memory is NaN. Tiny models and recipes."""

from __future__ import annotations

import os

# Read when transformers, datasets and tokenizers are imported, hence before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import gc
import json
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._device import _device_constructors

# Read when Triton is imported, hence also before everything else: without a GPU its kernels are
# interpreted, and `backend="triton"` works on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest
import tomli_w
from PIL import Image

from tests.chat_server import Model, serving
from tests.command_line import run

# A busy machine is not a failure, and CI runs the same examples each time.
hypothesis.settings.register_profile("perl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("perl")

torch.set_num_threads(min(torch.get_num_threads(), 8))

# `with torch.device("meta")` keeps a list of what makes tensors when it is first used: before torch.empty is replaced, or
# weights that are to take no memory would take all of it.
_device_constructors()


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Triton's interpreter replaces the functions of triton.language anew for every device function
    that is called, which takes most of its time; mostly they have been replaced already. It also
    makes a table of all types anew for each value whose NumPy type it looks up."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
        from triton.runtime.errors import InterpreterError
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return

    def call(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        language = self.fn.__globals__.get("core") or self.fn.__globals__.get("tl")
        if core.is_builtin(getattr(language, "where", core.where)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointers = np.dtype(np.uint64)

    def np_dtype(kind: core.dtype) -> np.dtype:
        scalar = kind.scalar  # A block's own type cannot be hashed.
        return pointers if isinstance(scalar, core.pointer_type) else of_scalar(scalar)

    InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = np_dtype


def pytest_collection_finish() -> None:
    """What has been imported stays, and is not looked through at each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_llm_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own is never asked."""
    for name in list(os.environ):
        if name.startswith(("PERL_LLM_", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check of data has found is not kept from one test to another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> None:
    """Also for the processes that a test starts: nohup and a shell's background jobs ignore them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _nan_filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if result.is_floating_point() or result.is_complex():
            result.detach().fill_(float("nan"))
        return result

    return allocate_nan


@pytest.fixture(autouse=True)
def _uninitialised_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves an element of its output unwritten gives NaN, not what lay there before."""
    monkeypatch.setattr(torch, "empty", _nan_filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _nan_filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _nan_filled(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a tiny model's name to a folder with it, random weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        from perl.data.tasks import vocabulary
        from perl.model.tiny import make_tiny_model

        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            make_tiny_model(name, vocabulary(), made[name], seed=0)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps its precision for the life of a process; each test chooses its own."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _log_levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets those of ours for the life of a process.

    Handlers of others hold the stderr of the test that made them, which is closed by now: that is no error.
    """
    monkeypatch.setattr(logging, "raiseExceptions", False)
    yield
    for ours in ("perl", "perl_kernels"):
        logging.getLogger(ours).setLevel(logging.NOTSET)


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line, which must fail by one line of error with code 2, and returns what it says."""

    def said_by(*arguments: object) -> str:
        capsys.readouterr()
        code = run(*arguments)
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1, said
        assert said.endswith(f"{errors[0]}\n") and "Traceback" not in said
        return errors[0].removeprefix("error: ")

    return said_by


@pytest.fixture
def short_recipe(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A recipe over six rows of `data.jsonl` beside it: one RL step of a second, into the folder `run`."""
    rows = []
    for k in range(6):
        Image.new("RGB", (28, 28), (40 * k, 30, 0)).save(tmp_path / f"{k}.png")
        row = {
            "kind": "all",
            "id": f"row-{k}",
            "question": "A <image> B <image> Which image shows three ?",
        }
        row |= {"images": [f"{k}.png", f"{(k + 1) % 6}.png"], "answer": "AB"[k % 2]}
        rows.append(json.dumps(row | {"demonstration": "<answer> A </answer>"}) + "\n")
    for name in ("data.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(rows))
    values = {
        "run": {"dir": str(tmp_path / "run"), "trackers": [], "save_rollouts_every": 0},
        "model": {"path": str(tiny_folder("tiny-qwen2.5-vl"))},
        "data": {
            k: str(tmp_path / f) for k, f in (("train", "data.jsonl"), ("eval", "test.jsonl"))
        },
        "rollout": {"max_new_tokens": 4, "per_order": 2},
        "train": {"steps": 1, "examples_per_step": 2},
        "eval": {"examples": 0},
    }
    (tmp_path / "short.toml").write_text(tomli_w.dumps(values))
    return tmp_path / "short.toml"


@pytest.fixture
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """No language model is set, whatever the environment of the tests says."""
    for name in ("PERL_LLM_URL", "PERL_LLM_MODEL", "PERL_LLM_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, no_endpoint: None) -> Iterator[Model]:
    """A language model in a thread, the one that is set, which answers as the test says."""
    model = Model()
    with serving(model.reply) as url:
        monkeypatch.setenv("PERL_LLM_URL", url)
        monkeypatch.setenv("PERL_LLM_MODEL", "m")
        monkeypatch.setattr("perl.llm._LONGEST_WAIT", 0.01)
        yield model
