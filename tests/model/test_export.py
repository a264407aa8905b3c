"""Model folders that are written a tensor at a time: byte for byte what transformers writes, and no second copy of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdRef

from perl.config import ModelConfig
from perl.model import export
from perl.model.loading import load_policy
from perl.model.policy import Policy
from perl.model.tiny import TINY_MODELS

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def loaded(folder: Path, **model: Any) -> Policy:
    """A policy whose trained weights are others than those of its model."""
    policy = load_policy(str(folder), ModelConfig(path=str(folder), **model), CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return policy


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 60_000), ("bfloat16", 5 * 10**9)])
def test_without_adapters_a_folder_is_what_transformers_writes(
    name: str,
    dtype: str,
    limit: int,
    tiny_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", limit)
    policy, ours, theirs = loaded(tiny_folder(name), dtype=dtype), tmp_path / "o", tmp_path / "t"
    policy.base.register_buffer("without_axes", torch.tensor(7))
    ours.mkdir()
    policy.save_pretrained(ours)
    policy.base.save_pretrained(theirs, max_shard_size=limit)
    assert files(ours) == files(theirs)
    assert (len(files(ours)) > 10) == (limit == 60_000)


def test_tensors_of_a_folder_that_are_made_of_several(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    model = loaded(tiny_folder("tiny-qwen2.5-vl")).base
    apart = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv.weight", apart, [Chunk(dim=0)])]
    model.save_pretrained(tmp_path / "theirs")
    for name in ("a layer", "all at once"):
        (tmp_path / name).mkdir()
        export.write_model(model, tmp_path / name, torch.float32)
        assert files(tmp_path / name) == files(tmp_path / "theirs")
        # As of a model some of whose tensors are made of more than a layer.
        monkeypatch.setattr(export, "_layers_of", lambda names: [[name] for name in names])


def test_in_the_dtype_of_the_model_folder_each_weight_is_rounded_once(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    policy = loaded(tiny_folder("tiny-qwen2.5-vl"), lora_rank=2, lora_alpha=3.0)
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        policy.save_pretrained(tmp_path / str(dtype), dtype)
    wide, narrow = (
        load_file(tmp_path / f"torch.{d}/model.safetensors") for d in ("float32", "bfloat16")
    )
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(narrow[n], w.bfloat16()) for n, w in wide.items())
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "torch.bfloat16/config.json").read_text())
    said = {part["dtype"] for part in (config, config["text_config"], config["vision_config"])}
    assert said == {"bfloat16"}
    # The run goes on with what it had.
    assert policy.base.config.dtype == torch.float32
    after = policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that are still there, and the most there were."""

    def __init__(self, besides: Any) -> None:
        super().__init__()
        self.besides = {t.untyped_storage().data_ptr() for t in besides}
        self.tensors: dict[WeakIdRef, None] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.tensors[WeakIdRef(out)] = None
        there = [tensor for ref in self.tensors if (tensor := ref()) is not None]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in there)}
        self.most = max(self.most, sum(n for p, n in storages.items() if p not in self.besides))
        return out


def test_an_export_holds_one_tensor_beside_the_model(tiny_folder: Folder, tmp_path: Path) -> None:
    def most(dtype: torch.dtype, **model: Any) -> int:
        policy = loaded(tiny_folder("tiny-qwen2.5-vl"), **model)
        with Live([*policy.parameters(), *policy.buffers()]) as live:
            policy.save_pretrained(tmp_path, dtype)
            if model:
                policy.save_adapter(tmp_path / "adapter", "base")
        return live.most

    # What stands for tied weights is of an element each.
    assert most(torch.float32) < 1000
    policy = loaded(tiny_folder("tiny-qwen2.5-vl"))
    largest, adapted = (
        max(p.nbytes for p in part.parameters())
        for part in (policy, policy.core.language_model.layers)
    )
    # One that is written and the next one, or what is added to it.
    assert most(torch.bfloat16) <= 2 * largest / 2
    assert most(torch.float32, lora_rank=2) <= 2 * adapted
    assert 7 * largest < (tmp_path / "model.safetensors").stat().st_size
