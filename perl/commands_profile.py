"""`perl-rl profile`: where the time of a training step goes, and a trace of one."""

from __future__ import annotations

import os
import platform
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from perl.profiling_folder import RESULT, profile_folder, several_processes
from perl.recipe import save_config
from perl.run import is_main_process, write_json
from perl.types import UserError

if TYPE_CHECKING:
    from perl.cli import Profile


def profile_command(command: Profile) -> None:
    """`perl-rl profile`"""
    # The profiler's library announces itself on stderr; it looks at this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from perl.profiling_report import figures, print_report
    from perl.profiling_session import Plan, StepDisplay, run_profile, stage_to_profile
    from perl.setup import check_setup

    _check_numbers(command)
    load = os.getloadavg()[0]
    plan = Plan(command.warmup, command.steps, command.traced, command.forwards)
    target = command.output or Path("runs") / f"profile-{Path(command.recipe).stem}"
    stage, dropping = stage_to_profile(command.config, command.stage)
    check_setup(stage.config)
    options = {
        "record_shapes": command.shapes,
        "profile_memory": command.memory,
        "with_stack": command.stacks,
    }
    main = is_main_process()
    with _stopping(), profile_folder(target, command.overwrite) as folder:
        with StepDisplay(plan.steps, main) as display:
            found = run_profile(stage, dropping, plan, folder, _suffix(), display, **options)
        out = {
            "stage": stage.name,
            **figures(found, stage.config),
            "command": {"warmup": plan.warmup, "forwards": plan.forwards, **options},
            **_surroundings(load),
        }
        if main:
            shutil.rmtree(folder / "models", ignore_errors=True)  # A tiny one, made for this.
            save_config(stage.config, folder / "config.toml")
            write_json(folder / RESULT, out)
    if not main:
        return
    recipe = Path(command.recipe).name
    print_report(
        out,
        f"{recipe}, stage {stage.name}: a step on {out['device']}, torch {out['versions']['torch']}",
    )
    _tell_files(target, out)


def _check_numbers(command: Profile) -> None:
    for name, least in (("steps", 1), ("warmup", 0), ("traced", 0), ("forwards", 1)):
        if (value := getattr(command, name)) < least:
            raise UserError(f"--{name} {value}: must be {least} or more")


@contextmanager
def _stopping() -> Iterator[None]:
    """What asks a process to end does as Ctrl-C, so that nothing half done stays behind; nohup still holds."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {n: signal.signal(n, _interrupt) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _suffix() -> str:
    return f"-{os.environ.get('RANK', '0')}" if several_processes() else ""


def _surroundings(load: float) -> dict[str, Any]:
    """What the figures depend on; `load` is the machine's before the run."""
    import torch

    from perl.summary import versions

    threads = torch.get_num_threads()
    cpu = f"{_cpu()}, {threads} thread{'s' * (threads != 1)}"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions(),
        "load_before": load,
        "cores": os.cpu_count() or 1,
    }


def _cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "the CPU"


def _tell_files(target: Path, out: dict[str, Any]) -> None:
    size = sum((target / name).stat().st_size for name in out["traces"]) / 2**20
    if out["processes"] > 1:
        print(f"figures of the first of {out['processes']} processes")
    if out["load_before"] > out["cores"]:
        print(
            f"the machine was busy before the run: load {out['load_before']:.1f} on {out['cores']} cores; "
            "the seconds are longer than on an idle one"
        )
    print(f"written: {target / RESULT}, config.toml", end="")
    if out["traces"]:
        names = ", ".join(out["traces"])
        print(
            f", {names} ({size:.1f} MiB; open at https://ui.perfetto.dev or chrome://tracing)",
            end="",
        )
    print()
