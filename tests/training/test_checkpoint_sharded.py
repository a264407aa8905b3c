"""Checkpoints of several processes: whatever holds the weights saves each once, and any other number of them reads it."""

from __future__ import annotations

import errno
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from perl.distributed import Processes
from perl.model.sources import checkpoints_in, read_manifest, stored_shapes
from perl.training.saving.checkpoint import CheckpointManager, Progress
from perl.types import UserError
from tests.command_line import finish
from tests.forked import Forked
from tests.messages import refused
from tests.training.threads import in_threads

SHAPES = {"wide": (5, 3), "narrow": (1, 2), "bias": (3,), "tower": (4,)}
"""Of four shards of the first one is shorter and one is empty; of the second three are."""


def values(name: str, plus: float) -> torch.Tensor:
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + plus


class Held:
    """Weights and an optimizer's state as a process of some holds them: of `tower` it has all, of the others its shard."""

    def __init__(self, sharding: str, plus: float = 0.0) -> None:
        self.mesh: Any = None
        if sharding != "none":
            copies = 2 if sharding == "hybrid" else 1
            world = torch.distributed.get_world_size()
            self.mesh = init_device_mesh(
                "cpu", (copies, world // copies), mesh_dim_names=("copy", "shard")
            )
        self.model = nn.Module()
        for number, name in enumerate(SHAPES):
            tensor = self._placed(name, plus + 100 * number)
            self.model.register_parameter(name, nn.Parameter(tensor))
        self.moments = {f"{name}/exp_avg": self._placed(name, plus + 0.5) for name in SHAPES}
        self.steps = {f"{name}/step": torch.tensor(plus) for name in SHAPES}

    def _placed(self, name: str, plus: float) -> torch.Tensor:
        tensor = values(name, plus)
        if self.mesh is None or name == "tower":
            return tensor
        return distribute_tensor(tensor, self.mesh, [Replicate(), Shard(0)])

    @property
    def masters(self) -> dict[torch.Tensor, nn.Parameter]:
        return {p: p for p in self.model.parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        return self.moments | self.steps

    def whole(self) -> dict[str, list[float]]:
        tensors = dict(self.model.named_parameters()) | self.state()
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).flatten().tolist()
            for name, t in tensors.items()
        }


def manager_of(folder: Path, accelerator: Any = None, **options: Any) -> CheckpointManager:
    processes = Processes(accelerator) if accelerator else None
    return CheckpointManager(folder, 2, processes, **options)


def load(held: Any, manager: CheckpointManager, path: Path) -> dict[str, list[float]]:
    manager.restore_model(path, held.model)
    manager.restore_optimizer(path, held.model, held)
    return held.whole()


def test_any_number_of_processes_and_any_sharding_reads_what_another_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one, then two sharded, four in two copies, four sharded, two not sharded, and one again; in several files each."""
    monkeypatch.setattr("perl.training.saving.checkpoint._FILE_BYTES", 40)
    expected, path = Held("none", 7.0).whole(), None
    for step, (count, sharding) in enumerate(
        [(1, "none"), (2, "fsdp"), (4, "hybrid"), (4, "fsdp"), (2, "none"), (1, "none")]
    ):

        def work(accelerator: Any, before: Path | None = path, step: int = step, s=sharding) -> Any:
            held: Any = Held(s, 0.0 if before else 7.0)
            manager = manager_of(
                tmp_path,
                accelerator,
            )
            found = load(held, manager, before) if before else held.whole()
            written = manager.save(held.model, held, Progress("rl", step))
            return found, written

        for found, written in in_threads(count, work):
            assert found == expected
            path = written
        assert path is not None and path.name == f"step-{step}"
        # Each element once, whoever else has it.
        elements = 0
        for file in path.glob("tensors/*"):
            with safe_open(file, "np") as tensors:
                elements += sum(tensors.get_tensor(n).size for n in tensors.keys())  # noqa: SIM118
        assert elements == sum(map(len, expected.values()))
        assert read_manifest(path)["files"].keys() == {
            str(p.relative_to(path)) for p in path.glob("tensors/*")
        }
        assert {n: tuple(s) for n, s in stored_shapes(path).items() if "/" not in n} == SHAPES
    assert {p.name for p in tmp_path.iterdir()} == {"step-4", "step-5"}


def test_another_model_is_refused_by_all_before_anything_changes(tmp_path: Path) -> None:
    held: Any = Held("none", 7.0)
    path = manager_of(tmp_path).save(held.model, None, Progress())

    def work(accelerator: Any) -> None:
        held = Held("fsdp")
        held.model.register_parameter("more", nn.Parameter(torch.zeros(1)))
        before = held.whole()
        with refused(path, "config.toml", "[model]", "--overwrite"):
            manager_of(tmp_path, accelerator).restore_model(path, held.model)
        assert held.whole() == before

    in_threads(2, work)


def changed_behind_a_save(folder: Path, manager: CheckpointManager, held: Any) -> Path:
    """The checkpoint of a save in the background; what comes behind it is not in it."""
    go_on, write = threading.Event(), safetensors.torch.save

    def slow(*arguments: Any, **options: Any) -> bytes:
        assert go_on.wait(20)
        return write(*arguments, **options)

    safetensors.torch.save = slow
    try:
        progress = Progress("rl", 1)
        path = manager.save(held.model, held, progress)
        assert not path.exists() and not checkpoints_in(folder)
        progress.elapsed = 9.0
        with torch.no_grad():
            for tensor in (*held.model.parameters(), *held.state().values()):
                tensor.zero_()
        go_on.set()
        manager.wait()
    finally:
        safetensors.torch.save = write
    return path


def test_the_writer_in_the_background_is_waited_for_and_its_error_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: Any = Held("none", 7.0)
    manager = manager_of(tmp_path, asynchronous=True)
    path = changed_behind_a_save(tmp_path, manager, held)
    assert CheckpointManager(tmp_path, 2).load() == (path, Progress("rl", 1))
    assert load(Held("none"), manager, path) == Held("none", 7.0).whole()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save", full)
        manager.save(held.model, held, Progress("rl", 2))
        with pytest.raises(OSError) as error:
            manager.save(held.model, held, Progress("rl", 3))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "step-2"))
    assert list(tmp_path.iterdir()) == [path]
    # It is not taken to be there.
    manager.save(held.model, held, Progress("rl", 2))
    manager.wait()
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_of_what_all_have_each_copies_a_share_and_no_memory_for_one_s_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the shards two tensors of 4 numbers, and four of one number."""
    copied: dict[int, list[str]] = {}

    def stage(self: Any, state: dict[str, Any]) -> dict[str, Any]:
        rank = torch.distributed.get_rank()
        copied[rank] = sorted(name for name, t in state.items() if not isinstance(t, DTensor))
        if rank:
            raise MemoryError
        return state

    monkeypatch.setattr("perl.training.saving.checkpoint.second_group", lambda: None)
    monkeypatch.setattr(FileSystemWriter, "stage", stage)

    def work(accelerator: Any) -> None:
        held: Any = Held("fsdp")
        manager = manager_of(tmp_path, accelerator, asynchronous=True)
        with pytest.raises(MemoryError if accelerator.process_index else UserError):
            manager.save(held.model, held, Progress())
        manager.wait()
        assert manager.present is None

    in_threads(2, work)
    assert copied == {
        0: ["bias/step", "tower", "wide/step"],
        1: ["narrow/step", "tower/exp_avg", "tower/step"],
    }
    assert not list(tmp_path.iterdir())


def _save_behind_a_step(index: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=index, world_size=2, init_method=f"file://{folder / 'store'}"
    )
    accelerator = SimpleNamespace(
        num_processes=2, process_index=index, device="cpu", reduce=_summed
    )
    manager, held = manager_of(folder / "run", accelerator, asynchronous=True), Held("fsdp", 7.0)
    path = changed_behind_a_save(folder / "run", manager, held)
    assert load(held, manager, path) == Held("none", 7.0).whole()
    torch.distributed.destroy_process_group()


def _summed(values: torch.Tensor, reduction: str) -> torch.Tensor:
    torch.distributed.all_reduce(values)
    return values


@pytest.mark.slow
def test_two_processes_save_in_the_background(tmp_path: Path) -> None:
    done = finish([Forked(__name__, index, tmp_path) for index in range(2)])
    assert [code for code, _ in done] == [0, 0], done
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"step-1"}


if __name__ == "__main__":
    _save_behind_a_step(int(sys.argv[1]), Path(sys.argv[2]))
