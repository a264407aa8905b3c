"""Processes of PyTorch's own, as threads: collectives and DTensors work between them, without a start of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded


def in_threads(count: int, work: Callable[[Any], Any]) -> list[Any]:
    """What each process returns, given an accelerator as far as an optimizer asks it."""
    out: list[Any] = [None] * count
    store = dist.HashStore()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()

    def process(index: int) -> None:
        dist.init_process_group("threaded", rank=index, world_size=count, store=store)
        try:
            out[index] = work(_accelerator(index, count))
        except BaseException as error:
            out[index] = error
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=process, args=(i,), daemon=True) for i in range(count)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    for error in out:
        if isinstance(error, BaseException):
            raise error
    return out


def _accelerator(index: int, count: int) -> Any:
    def reduce(values: torch.Tensor, reduction: str) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    return SimpleNamespace(
        num_processes=count, process_index=index, device=torch.device("cpu"), reduce=reduce
    )
