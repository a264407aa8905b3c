"""Options of a session of benchmarks, and what is kept of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.harness.device import machine
from benchmarks.harness.results import Findings

RESULTS = pytest.StashKey[Findings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perl benchmarks")
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), help="where tensors live (cuda if there is one)")
    add("--threads", type=int, help="CPU threads of PyTorch (OMP_NUM_THREADS, else all cores)")
    add("--quick", action="store_true", help="fewer and smaller cases")
    add("--passes", type=int, default=1, help="how often the providers of a case take turns")
    add("--budget", type=float, default=0.1, help="seconds of a provider's turn")
    add("--minutes", type=float, help="cases that would start later are left out, and named")
    add("--results", type=Path, help="JSON file for all rows and the machine")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads") or torch.get_num_threads())
    # What a library would fetch is no part of a measurement.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config.stash[RESULTS] = Findings(chosen_device(config))


def pytest_report_header(config: pytest.Config) -> str:
    return "benchmarks: " + ", ".join(
        f"{key} {value}" for key, value in machine(chosen_device(config)).items() if value
    )


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, object]
) -> None:
    machine_info.update(machine(chosen_device(config)))


def pytest_report_teststatus(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """With results in a file, a line for each case in place of dots."""
    if config.getoption("results") and not report.failed:
        return report.outcome if report.when == "call" or report.skipped else "", "", ""
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if file := config.getoption("results"):
        config.stash[RESULTS].write(file)


def chosen_device(config: pytest.Config) -> torch.device:
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
