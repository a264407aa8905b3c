"""Which implementation of attention runs where, and what cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from perl.model.packed import attention
from perl.model.packed.attention import IMPLEMENTATIONS, choose
from perl.model.packed.flash import flash_attn_problem
from tests.messages import refused, tells

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine look as if it had a GPU and packages."""

    def look(flash_attn: bool = False, capability=(9, 0), built: bool = True) -> None:
        problem = "" if flash_attn else "not installed"
        monkeypatch.setattr(attention, "flash_attn_problem", lambda: problem)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)

    return look


@pytest.mark.parametrize(
    ("device", "bfloat16", "has", "name", "because"),
    [
        (CPU, True, {"flash_attn": True}, "sdpa", "GPU"),
        (CUDA, True, {"flash_attn": True}, "flash_attention_2", "flash-attn"),
        (CUDA, True, {"flash_attn": True, "capability": (8, 0)}, "flash_attention_2", "flash-attn"),
        (CUDA, True, {}, "varlen", "not installed"),
        (CUDA, True, {"capability": (8, 0)}, "varlen", "not installed"),
        (CUDA, True, {"built": False}, "flex", "GPU"),
        (CUDA, True, {"flash_attn": True, "capability": (7, 5)}, "flex", "GPU"),
        (CUDA, False, {"flash_attn": True}, "flex", "float32"),
    ],
)
def test_what_auto_chooses(machine, device, bfloat16, has, name: str, because: str) -> None:
    machine(**has)
    chosen, said = choose("auto", device, bfloat16)
    assert chosen == name
    tells(said, because)


def test_what_is_asked_for_is_chosen(machine) -> None:
    machine(flash_attn=True)
    assert [choose(name, CUDA) for name in IMPLEMENTATIONS] == [
        (name, "asked for") for name in IMPLEMENTATIONS
    ]
    machine(built=False, capability=(6, 1))
    for device in (CPU, CUDA):
        assert choose("sdpa", device, False)[0] == "sdpa"
        assert choose("flex", device, False)[0] == "flex"


@pytest.mark.parametrize(
    ("wanted", "device", "bfloat16", "has", "names"),
    [
        ("flash_attention_2", CUDA, True, {}, ("not installed", "pip install", "varlen")),
        ("flash_attention_2", CPU, True, {"flash_attn": True}, ("cpu", "sdpa")),
        ("varlen", CPU, True, {}, ("cpu", "sdpa")),
        ("flash_attention_2", CUDA, False, {"flash_attn": True}, ("model.dtype", "bfloat16")),
        ("varlen", CUDA, False, {}, ("model.dtype", "bfloat16")),
        ("varlen", CUDA, True, {"capability": (7, 5)}, ("8.0", "flex")),
        ("varlen", CUDA, True, {"built": False}, ("PyTorch", "flex")),
    ],
)
def test_what_cannot_run_is_refused(machine, wanted, device, bfloat16, has, names) -> None:
    machine(**has)
    with refused("model.attention", wanted, *names):
        choose(wanted, device, bfloat16)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put something under the name of flash-attn."""

    def install(module: ModuleType | None, **contents: Any) -> None:
        flash_attn_problem.cache_clear()
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        for name, value in contents.items():
            setattr(module, name, value)

    yield install
    flash_attn_problem.cache_clear()


def test_what_is_wrong_with_flash_attn(
    installed: Callable[..., None], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = {"flash_attn_varlen_func": print}
    installed(ModuleType("flash_attn"), **function, __version__="2.8.3")
    assert flash_attn_problem() == ""
    # Its flash_attn_with_kvcache has no return_softmax_lse.
    installed(ModuleType("flash_attn"), **function, __version__="2.5.9.post1")
    tells(flash_attn_problem(), "2.5.9.post1", "2.6")
    installed(ModuleType("flash_attn"), **function, __version__="2.6.0.post1")
    assert flash_attn_problem() == ""
    installed(ModuleType("flash_attn"), **function)
    tells(flash_attn_problem(), "2.6")
    # flash-attn-4 brings a package of the same name.
    installed(ModuleType("flash_attn"))
    tells(flash_attn_problem(), "flash_attn_varlen_func")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    flash_attn_problem.cache_clear()
    tells(flash_attn_problem(), "undefined symbol", "_ZN3c10")
    assert "more" not in flash_attn_problem()
    installed(None)
    assert flash_attn_problem() == "not installed"
