"""What every benchmark shares: the device, the threads, the clock, and no time without a proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.proof import Checked, R


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perl benchmarks")
    group.addoption(
        "--device", choices=("cpu", "cuda"), help="where tensors live (cuda if there is one)"
    )
    group.addoption(
        "--threads", type=int, help="CPU threads of PyTorch (OMP_NUM_THREADS, else all cores)"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads") or torch.get_num_threads())


def pytest_report_header(config: pytest.Config) -> str:
    return "benchmarks: " + ", ".join(f"{key} {value}" for key, value in _machine(config).items())


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.update(_machine(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A GPU still works when the call has returned, so its clock waits for it."""
    if chosen_device(config).type != "cuda":
        return
    for item in items:
        if "checked" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_synchronised_clock))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return chosen_device(pytestconfig)


@pytest.fixture
def checked(benchmark: BenchmarkFixture, device: torch.device) -> Checked:
    """Times `run`, but only after `prove` has accepted what it returns.

    Of a case that `prove` refuses, by an AssertionError, no time is taken: it fails and is in no
    table or file. Cases of one `group` are compared. `extra_info` (in the JSON) gets `info` and, for
    work on tensors, which gives `flops`, its number of operations, the rate, and the memory taken.
    """

    def prove_then_time(
        run: Callable[[], R],
        prove: Callable[[R], None],
        *,
        group: str,
        flops: float | None = None,
        **info: object,
    ) -> None:
        prove(run())
        benchmark.group = group
        benchmark.extra_info.update(info)
        if flops is not None and benchmark.enabled:
            benchmark.extra_info.update(flops=flops, **_memory(run, device))
        benchmark(run)
        if flops is not None and benchmark.stats is not None:
            benchmark.extra_info["gflops_per_s"] = flops / benchmark.stats["median"] / 1e9

    return prove_then_time


def chosen_device(config: pytest.Config) -> torch.device:
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _machine(config: pytest.Config) -> dict[str, str | int]:
    device = chosen_device(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def _synchronised_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What `run` allocates beyond its inputs: the peak on a GPU, the largest tensor on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"peak_extra_bytes": torch.cuda.max_memory_allocated() - before}
    with _LargestTensor() as largest:
        run()
    return {"largest_tensor_bytes": largest.nbytes}


class _LargestTensor(TorchDispatchMode):
    """Notes the largest storage that an operation returns and was not given."""

    nbytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        new = [s.nbytes() for s in _storages(result) if s.data_ptr() not in given]
        self.nbytes = max([self.nbytes, *new])
        return result


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
