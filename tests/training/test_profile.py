"""`perl-rl profile`: stages add up to the step, the trace names them, and nothing else is left behind."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from perl.cli import main
from perl.config import Config
from perl.timing import span, span_of_backward
from perl.training.profiling_clock import StageClock
from perl.training.profiling_report import figures, print_report
from perl.training.profiling_session import Profile, Step
from perl.training.profiling_trace import Traced, read_device

ErrorOf = Callable[..., str]
DOCUMENT = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
STAGES = """
[[stages]]
name = "sieve"
kind = "filter"
[[stages]]
name = "easy"
kind = "rl"
"""
UPDATE = {
    *("vision", "vision.backward", "language_model", "language_model.backward"),
    *("loss", "loss.backward", "optimizer", "sync"),
}


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def ranges(trace: Path) -> set[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {str(e.get("name")) for e in events}
    return {n.removeprefix("perl::") for n in names if n.startswith("perl::")}


def inside(out: dict[str, Any], part: str) -> set[str]:
    return {n.partition("/")[2] for n in out["stages"] if n.startswith(f"{part}/")}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def check_sums(out: dict[str, Any]) -> None:
    for step in (*out["steps"], *out["traced_steps"]):
        assert sum(step["stages"].values()) == pytest.approx(step["seconds"])
        assert min(step["stages"].values()) >= 0
    total = sum(stage["seconds"] for stage in out["stages"].values())
    assert total == pytest.approx(out["seconds_per_step"])


def test_a_step_by_stage(
    short_recipe: Path, capsys: pytest.CaptureFixture[str], error_of: ErrorOf
) -> None:
    """Rewards are all 0 here, and it trains nevertheless; a link as output stays one."""
    folder, behind = short_recipe.parent / "profile", short_recipe.parent / "elsewhere"
    behind.mkdir()
    folder.symlink_to(behind)
    command = ("profile", short_recipe, "--output", folder, "--rollout.per-order", "2")
    assert run(*command, "--steps", "2", "--forwards", "2") == 0
    said = capsys.readouterr().out
    out = json.loads((folder / "profile.json").read_text())
    check_sums(out)
    assert len(out["steps"]) == 2 and len(out["traced_steps"]) == 1
    assert inside(out, "update") >= UPDATE
    assert inside(out, "rollout") == {"vision", "prompts", "tokens"}
    assert (
        out["stages"]["rollout/tokens"]["calls"] <= 3
    )  # Of four new tokens one comes of the prompt.
    assert all(
        step["metrics"]["groups/tries"] == 1 and step["metrics"]["packing/rows"]
        for step in out["steps"]
    )
    assert "of 2 groups a step, training would drop 2 with equal rewards" in said
    assert (
        "\nshort.toml, stage rl: a step on " in f"\n{said}" and f"torch {torch.__version__}" in said
    )
    # What the profiler takes is told apart from what the step takes.
    assert {"profiler", "rollout/profiler"} <= out["traced_steps"][0]["stages"].keys()
    assert not any("profiler" in step["stages"] for step in out["steps"])
    assert "device s" not in said and "aten::mm" in said

    # The rollout's trace ends at the third pass, and the next part begins another file.
    assert out["traced_in_part"] == ["rollout"]
    assert out["traces"] == ["trace.json.gz", "trace-part2.json.gz"]
    files = {*out["traces"], "profile.json", "config.toml"}
    assert {p.name for p in folder.iterdir()} == files
    first, second = (ranges(folder / name) for name in out["traces"])
    assert {"data", "permute", "preprocess", "prompts", "tokens"} <= first
    assert {"reward", "pack", "update"} | UPDATE <= second
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["rollout"]["per_order"] == 2 and not config["filter"]["zero_variance"]
    assert not (short_recipe.parent / "run").exists()

    assert "is already there: replace it with --overwrite" in error_of(*command)
    quick = ("--overwrite", "--steps", "1", "--traced", "0", "--warmup", "0")
    band = ("--filter.no-zero-variance", "--filter.min-accuracy", "0.5")
    assert run(*command, *quick, *band) == 0
    said = capsys.readouterr().out
    assert "training would drop 2 outside of filter.min_accuracy" in said and "equal" not in said
    assert folder.is_symlink() and not hidden(folder.parent)
    assert {p.name for p in folder.iterdir()} == {"profile.json", "config.toml"}
    assert len(json.loads((folder / "profile.json").read_text())["steps"]) == 1


def test_a_cold_start_with_a_frozen_tower(short_recipe: Path) -> None:
    folder = short_recipe.parent / "profile"
    options = ("--model.freeze-vision", "--model.gradient-checkpointing", "--model.lora-rank", "2")
    stage = ("--stage", "cold_start", "--cold-start.batch-size", "2", "--steps", "1")
    assert run("profile", short_recipe, "--output", folder, *stage, *options, "--shapes") == 0
    out = json.loads((folder / "profile.json").read_text())
    check_sums(out)
    assert inside(out, "cold_start") >= UPDATE - {"vision.backward"}
    assert "vision.backward" not in inside(out, "cold_start")
    assert any("[[" in operator["name"] for operator in out["operators"])


def test_a_model_on_padded_batches(
    short_recipe: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its tower's backward is the end of its language model's."""
    model = shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8}
    config["text_config"]["layer_types"] = ["full_attention", "sliding_attention"] * 2
    (model / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "profile"
    options = ("--output", folder, "--steps", "1", "--model.path", model)
    assert run("profile", short_recipe, *options) == 0
    out = json.loads((folder / "profile.json").read_text())
    check_sums(out)
    assert inside(out, "update") >= UPDATE and "vision" in inside(out, "rollout")
    assert "vision.backward" in ranges(folder / "trace.json.gz")
    calls = out["steps"][0]["calls"]
    assert calls["update/vision.backward"] == calls["update/language_model.backward"]

    # The text's embedding goes back after the tower, and is not counted as the tower's.
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    times: dict[str, list[tuple[float, float]]] = {}
    for e in events:
        if "dur" in e:
            times.setdefault(str(e["name"]), []).append((e["ts"], e["ts"] + e["dur"]))
    embedding = times["EmbeddingBackward0"]
    assert not any(
        start <= at < end for start, end in times["perl::vision.backward"] for at, _ in embedding
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_what_was_there(
    number: signal.Signals, short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = short_recipe.with_name("reward.py")
    reward.write_text(
        "import os, signal\n"
        "def f(completions, **_):\n"
        f"    os.kill(os.getpid(), {number.value})\n"
        "    return [0.0] * len(completions)\n"
    )
    folder = short_recipe.parent / "profile"
    folder.mkdir()
    (folder / "profile.json").write_text("mine")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stops = ("--reward.functions", f"{reward}:f", "--reward.weights", "1")
        assert run("profile", short_recipe, "--output", folder, "--overwrite", *stops) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("stopped at once\n")
    assert (folder / "profile.json").read_text() == "mine"
    assert not hidden(folder.parent)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_what_comes_during_the_run_stays(
    overwrite: list[str], short_recipe: Path, error_of: ErrorOf
) -> None:
    folder = short_recipe.parent / "profile"
    reward = short_recipe.with_name("reward.py")
    reward.write_text(
        "import pathlib\n"
        "def f(completions, **_):\n"
        f"    folder = pathlib.Path({str(folder)!r})\n"
        "    folder.mkdir(exist_ok=True)\n"
        "    (folder / 'notes.txt').write_text('mine')\n"
        "    return [0.0] * len(completions)\n"
    )
    options = ("--reward.functions", f"{reward}:f", "--reward.weights", "1", "--traced", "0")
    said = error_of(
        "profile", short_recipe, "--output", folder, *options, *overwrite, "--steps", "1"
    )
    assert "this came during the run, whose profile is in " in said
    kept = Path(said.rpartition(" ")[2])
    assert {p.name for p in kept.iterdir()} == {"profile.json", "config.toml"}
    assert [p.name for p in folder.iterdir()] == ["notes.txt"] and not hidden(folder.parent)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--warmup", "-1"], "--warmup -1: must be 0 or more"),
        (["--train.lrr", "1"], "unknown option --train.lrr; did you mean --train.lr?"),
        (["--stages", "[]"], "unknown option --stages: stages stand in a recipe's file"),
        (["--stage", "sieve"], "--stage sieve: a filter stage takes no steps; choose easy"),
    ],
)
def test_numbers_and_stages_it_refuses(
    options: list[str], match: str, short_recipe: Path, error_of: ErrorOf
) -> None:
    short_recipe.write_text(short_recipe.read_text() + STAGES)
    assert match in error_of("profile", short_recipe, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--stage", "hard"],
        ["--stage", "sieve"],
        [],
        ["--output", "other", "--overwrite"],
        ["--output", "recipe.toml"],
    ],
    ids=" ".join,
)
def test_the_document_has_the_errors(
    options: list[str], short_recipe: Path, error_of: ErrorOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_recipe.parent)
    Path("recipe.toml").write_text(short_recipe.read_text() + STAGES)
    for folder in ("runs/profile-recipe", "other"):
        Path(folder).mkdir(parents=True)
        for name in ("profile.json", "notes.txt"):
            Path(folder, name).touch()
    said = error_of("profile", "recipe.toml", *options)
    assert f"| `{said}` |" in DOCUMENT, said
    assert Path("other", "notes.txt").exists()


def test_ranges_for_ones_own_profiler() -> None:
    hidden = torch.ones(3, requires_grad=True) * 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with span("loss"):
            loss = hidden.square().sum()
        span_of_backward("loss.backward", loss, hidden)
        loss.backward()
    found = {e.name: e.time_range for e in profiler.events() if e.name.startswith("perl::")}
    assert list(found) == ["perl::loss", "perl::loss.backward"]
    within = [
        e.name
        for e in profiler.events()
        if e.name.endswith("Backward0")
        and found["perl::loss.backward"].start <= e.time_range.start
        and e.time_range.end <= found["perl::loss.backward"].end
    ]
    assert {"SumBackward0", "PowBackward0"} <= set(within) and "MulBackward0" not in within


def event(name: str, start: float, end: float, *kernels: float, gpu: bool = False) -> FunctionEvent:
    """Microseconds; `kernels` last so long."""
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    kwargs = {"device_type": device, "is_user_annotation": name.startswith("perl::")}
    made = FunctionEvent(1, name, 1, start, end, use_device="cuda", **kwargs)
    for duration in kernels:
        made.append_kernel("kernel", 0, duration)
    return made


def test_device_time_goes_to_the_stage_that_launched_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step of 10 s on the host's clock from 100 s on: 4 s of rollout, 6 of update with 2 of loss in it."""
    moments = iter([0, 100, 100, 104, 104, 105, 107, 110, 110])
    clock = StageClock(lambda: float(next(moments)))
    clock.begin()
    clock.enter("rollout")
    clock.leave("rollout")
    clock.enter("update")
    clock.enter("loss")
    clock.leave("loss")
    clock.leave("update")
    times = clock.finish()
    second = 1e6
    traced = Traced(windows=[(100.0, 110.0)], files=[Path("trace.json.gz")])
    events = [
        event("perl::clock", 5 * second, 5 * second),  # The profiler's zero is at 95 s.
        event("perl::rollout", 5 * second, 9 * second),
        event("aten::mm", 6 * second, 6.1 * second, 0.5 * second, 0.5 * second),
        event("linear_grpo_loss", 10.5 * second, 11 * second, 3 * second),
        # What was launched at 105.5 s runs when the host has gone on; a range has a shadow on the device.
        event("kernel", 6 * second, 7 * second, gpu=True),
        event("kernel", 11 * second, 14 * second, gpu=True),
        event("kernel", 13 * second, 14 * second, gpu=True),
        event("perl::rollout", 5 * second, 15 * second, gpu=True),
    ]
    read_device(events, marked=100.0, into=traced)
    step = Step(times, {"tokens": 20})
    out = figures(Profile([step], [step], traced, peak_device_bytes=2**30), Config())
    stages = out["stages"]
    assert {n: (s["seconds"], s["device_seconds"], s["launches"]) for n, s in stages.items()} == {
        "other": (0, 0, 0),
        "rollout": (4, pytest.approx(1), 2),
        "update": (4, 0, 0),
        "update/loss": (2, pytest.approx(3), 1),
    }
    assert out["device_idle"] == pytest.approx(0.6) and out["tokens_per_second"] == 2
    print_report(out | {"peak_rss_bytes": 2**30}, "synthetic")
    said = capsys.readouterr().out
    assert "launches" in said and "the device is idle for 60%" in said

    traced.cut.add("rollout")
    out = figures(Profile([step], [step], traced, peak_device_bytes=2**30), Config())
    assert out["stages"]["rollout"]["device_seconds"] is None
    assert out["stages"]["update/loss"]["launches"] == 1


def test_a_range_without_an_end_shifts_no_other() -> None:
    clock = StageClock(iter(range(99)).__next__)
    clock.begin()
    clock.enter("update")
    clock.enter("loss.backward")
    clock.leave("update")
    clock.enter("data")
    clock.leave("data")
    clock.leave("loss.backward")
    step = Step(clock.finish(), {"tokens": 20})
    assert step.times.by_stage() == {"other": 4, "update": 1, "update/loss.backward": 1, "data": 1}
    out = figures(Profile([step], unended=clock.unended), Config())
    assert any("the end of loss.backward was not seen" in hint for hint in out["hints"])


def test_work_is_one_process_and_tries_are_told() -> None:
    clock = StageClock(iter(range(99)).__next__)
    steps = []
    for tries in (3, 2, 2):
        clock.begin()
        steps.append(Step(clock.finish(), {"tokens": 20, "groups/tries": tries}))
    out = figures(Profile(steps, processes=2), Config())
    assert out["work_per_step"] == {"tokens": 10} and out["tokens_per_second"] == 10
    assert any("a step rolls out 2.3 times on average" in hint for hint in out["hints"])


@pytest.mark.slow
def test_each_process_leaves_a_trace(short_recipe: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder = short_recipe.parent / "profile"
    words = ["profile", str(short_recipe), "--output", str(folder), "--steps", "1"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "perl", *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": r, "LOCAL_RANK": r},
        )
        for r in ("0", "1")
    ]
    try:
        said = [p.communicate(timeout=150)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0]
    assert "figures of the first of 2 processes" in said[0] and not said[1]
    traces = {"trace-0.json.gz", "trace-1.json.gz"}
    assert {p.name for p in folder.iterdir()} == {*traces, "profile.json", "config.toml"}
    check_sums(json.loads((folder / "profile.json").read_text()))
