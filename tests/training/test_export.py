"""What stages leave under `models/`, also of weights that lie in shards: by threads that talk as processes do."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from perl.config import Config, ModelConfig
from perl.distributed import Processes
from perl.files import RunFolder
from perl.model import export
from perl.model.loading import load_policy, load_processor
from perl.model.policy import Policy
from perl.model.sharding import Sharding, shard
from perl.timing import Stopwatch
from perl.training.saving.export import save_model
from perl.types import UserError

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What each of some processes returns, or the error that ends it."""
    out: list[Any] = [None] * count
    store = cast(Any, dist).HashStore()

    def thread(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
            out[rank] = work(rank)
        except Exception as error:
            out[rank] = error

    threaded.ProcessLocalGroup.reset()
    isolate = cast(Any, torch._C)._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=thread, args=(i,), daemon=True) for i in range(count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        assert not any(each.is_alive() for each in threads), "a process waits for ever"
    finally:
        threaded._uninstall_threaded_pg()
        isolate(False)
    return out


class Reducer:
    """The part of an Accelerator that processes agree by."""

    device = CPU

    def __init__(self, rank: int, count: int) -> None:
        self.process_index, self.num_processes = rank, count

    def reduce(self, values: torch.Tensor, _: str) -> torch.Tensor:
        dist.all_reduce(values)
        return values


def policy_of(base: Path, config: ModelConfig) -> Policy:
    torch.manual_seed(0)
    policy = load_policy(str(base), config, CPU)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return policy


def saved(
    base: Path, root: Path, policy: Policy, config: ModelConfig, rank: int, count: int
) -> Path:
    components: Any = SimpleNamespace(
        folder=RunFolder(root),
        policy=policy,
        processor=load_processor(str(base), config),
        model_path=str(base),
        config=Config(model=config),
        is_main=rank == 0,
        watch=Stopwatch(),
    )
    return save_model(components, Processes(Reducer(rank, count)), "final")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-internvl"])
@pytest.mark.parametrize("lora", [0, 2])
def test_weights_in_shards_leave_the_folder_that_whole_ones_leave(
    name: str, lora: int, tiny_folder: Folder, tmp_path: Path
) -> None:
    base = tiny_folder(name)
    config = ModelConfig(path=str(base), lora_rank=lora, freeze_vision=lora > 0)
    expected = files(saved(base, tmp_path / "whole", policy_of(base, config), config, 0, 1))
    policies = [policy_of(base, config) for _ in range(2)]

    def work(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        shard(policies[rank], Sharding(mesh, torch.float32))
        before = [p.detach().clone() for p in policies[rank].parameters()]
        folder = saved(base, tmp_path / "shards", policies[rank], config, rank, 2)
        after = zip(policies[rank].parameters(), before, strict=True)
        return files(folder), all(torch.equal(one, other) for one, other in after)

    for found, unchanged in together(2, work):
        assert unchanged
        assert found == expected
    assert ("adapter/adapter_model.safetensors" in expected) == (lora > 0)


@pytest.mark.parametrize("at", ["PreTrainedConfig", "PeftModel", 2, 93])
def test_a_disk_that_is_full_stops_all_processes(
    at: str | int, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what describes model or adapter, or at one of their tensors."""
    base = tiny_folder("tiny-qwen2.5-vl")
    config = ModelConfig(path=str(base), lora_rank=2, freeze_vision=True)
    policies, written = [policy_of(base, config) for _ in range(2)], []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(tensor: torch.Tensor) -> memoryview:
        written.append(tensor)
        return real(tensor) if len(written) != at else cast(Any, full())

    real = export._bytes
    monkeypatch.setattr(export, "_bytes", counted)
    if isinstance(at, str):
        owner = transformers if at == "PreTrainedConfig" else peft
        monkeypatch.setattr(getattr(owner, at), "save_pretrained", full)

    def work(rank: int) -> Any:
        shard(policies[rank], Sharding(init_device_mesh("cpu", (2,)), torch.float32))
        return saved(base, tmp_path, policies[rank], config, rank, 2)

    one, other = together(2, work)
    assert isinstance(one, OSError) and one.errno == errno.ENOSPC
    assert isinstance(other, UserError)
    assert not [*(tmp_path / "models").iterdir()]


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),  # As transformers before 4.56 wrote it.
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),  # That of the run.
    ],
)
def test_an_export_has_the_dtype_of_what_the_run_began_with(
    said: dict[str, Any], dtype: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_folder("tiny-qwen2.5-vl").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    config["text_config"] |= said.pop("text_config", {})
    (base / "config.json").write_text(json.dumps(config | said))
    model = ModelConfig(path=str(base))
    folder = saved(base, tmp_path, policy_of(base, model), model, 0, 1)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
