"""`perl-rl profile`: where the time of a training step goes, and a trace of one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.processes import on_main_process, process_state
from perl.recipe import save_config
from perl.run import is_main_process, write_json
from perl.types import UserError

if TYPE_CHECKING:
    from perl.cli import Profile

_RESULT = "profile.json"
_OURS = r"profile\.json|config\.toml|trace[-\w]*\.json\.gz"
"""Names of what a profile leaves."""


def profile_command(command: Profile) -> None:
    """`perl-rl profile`"""
    # The profiler's library announces itself on stderr; it looks at this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from perl.profiling_report import figures, print_report
    from perl.profiling_session import Plan, StepDisplay, run_profile, stage_to_profile
    from perl.setup import check_setup

    _check_numbers(command)
    plan = Plan(command.warmup, command.steps, command.traced, command.forwards)
    target = command.output or Path("runs") / f"profile-{Path(command.recipe).stem}"
    stage = stage_to_profile(command.config, command.stage)
    check_setup(stage.config)
    on_main_process(lambda: _check_target(target, command.overwrite))
    options = {
        "record_shapes": command.shapes,
        "profile_memory": command.memory,
        "with_stack": command.stacks,
    }
    main = is_main_process()
    with _folder(target) as folder:
        with StepDisplay(plan.steps, main) as display:
            found = run_profile(stage, plan, folder, _suffix(), display, **options)
        out = {
            "stage": stage.name,
            **figures(found, stage.config),
            "command": {"warmup": plan.warmup, "forwards": plan.forwards, **options},
            **_surroundings(),
        }
        if main:
            shutil.rmtree(folder / "models", ignore_errors=True)  # A tiny one, made for this.
            save_config(stage.config, folder / "config.toml")
            write_json(folder / _RESULT, out)
    if not main:
        return
    print_report(out, f"{command.recipe}, stage {stage.name}: a step on {out['device']}")
    _tell_files(target, out)


def _check_numbers(command: Profile) -> None:
    for name, least in (("steps", 1), ("warmup", 0), ("traced", 0), ("forwards", 1)):
        if (value := getattr(command, name)) < least:
            raise UserError(f"--{name} {value}: must be {least} or more")


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to write where something else lies."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; choose another")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--output {target} is already there: replace it with --overwrite, or choose another"
        )
    names = {path.name for path in target.iterdir()}
    if _RESULT not in names or any(not re.fullmatch(_OURS, name) for name in names):
        raise UserError(
            f"--output {target} holds something else than a profile, so --overwrite leaves it alone; "
            "choose another"
        )


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder of all processes that takes the place of `target` when the block ends well in all of them."""
    temporary = target.resolve().with_name(f".{target.name}.tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target.resolve())

    on_main_process(begin)
    try:
        yield temporary
        if _several():
            process_state().wait_for_everyone()
        on_main_process(finish)
    finally:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _suffix() -> str:
    return f"-{os.environ.get('RANK', '0')}" if _several() else ""


def _surroundings() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from perl.metrics import peak_rss_bytes
    from perl.summary import versions

    cuda = torch.cuda.is_available()
    cpu = f"the CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
    }


def _tell_files(target: Path, out: dict[str, Any]) -> None:
    size = sum((target / name).stat().st_size for name in out["traces"]) / 2**20
    if out["processes"] > 1:
        print(f"figures of the first of {out['processes']} processes")
    print(f"written: {target / _RESULT}, config.toml", end="")
    if out["traces"]:
        names = ", ".join(out["traces"])
        print(
            f", {names} ({size:.1f} MiB; open at https://ui.perfetto.dev or chrome://tracing)",
            end="",
        )
    print()
