"""`perl-rl profile`: where the time of a training step goes, and a trace of one."""

from __future__ import annotations

import os
import platform
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tyro.conf import Positional, arg

from perl.config import Command, Config
from perl.files import is_main_process, write_json
from perl.recipe import save_config
from perl.training.profiling_folder import RESULT, profile_folder, several_processes
from perl.types import UserError


@dataclass(frozen=True)
class Profile(Command):
    """Where the time of a training step goes, by stage, and a trace of one: takes a few steps of a recipe's first RL
    stage from the recipe's initial model, without cold start and evaluation, and keeps neither weights nor metrics.
    Groups that filter.* would drop are kept, so that every step has something to train on. Every key of the
    recipe can be overridden, as in `perl-rl profile demo --train.examples-per-step 4`."""

    recipe: Positional[str] = "demo"
    """A bundled recipe's name or a .toml file."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    steps: int = 3
    """Steps that are timed, without torch.profiler, which would slow the host down."""
    warmup: int = 1
    """Steps before them, in no figure."""
    traced: int = 1
    """Steps behind them under torch.profiler: operators, a GPU's times, the trace; 0: none."""
    forwards: int = 96
    """How many forward passes of the language model a traced step's rollout is traced for, and a sixteenth as many rows
    of its log-probs and of its update: a trace that can still be opened."""
    stage: str = ""
    """Name of another stage of the recipe, as in --stage cold_start; empty: the first of RL."""
    output: Path | None = None
    """Folder for profile.json, config.toml and the trace; empty: runs/profile-RECIPE."""
    overwrite: bool = False
    """Replace the profile that is there."""
    shapes: bool = False
    """Record the shapes of operators' inputs, and tell operators apart by them."""
    memory: bool = False
    """Record allocations in the trace."""
    stacks: bool = False
    """Record the lines of Python that called, in the trace; slow."""

    def execute(self) -> None:
        # The profiler's library announces itself on stderr; it looks at this when it is first used.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from perl.training.components import check_setup
        from perl.training.profiling_report import figures, print_report
        from perl.training.profiling_session import Plan, StepDisplay, run_profile, stage_to_profile

        _check_numbers(self)
        load = os.getloadavg()[0]
        plan = Plan(self.warmup, self.steps, self.traced, self.forwards)
        target = self.output or Path("runs") / f"profile-{Path(self.recipe).stem}"
        stage, dropping = stage_to_profile(self.config, self.stage)
        check_setup(stage.config)
        options = {
            "record_shapes": self.shapes,
            "profile_memory": self.memory,
            "with_stack": self.stacks,
        }
        main = is_main_process()
        with _stopping(), profile_folder(target, self.overwrite) as folder:
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
        recipe = Path(self.recipe).name
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

    from perl.training.summary import versions

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
