"""`perl-rl profile`: stages add up to the step, the trace names them, and nothing else is left behind."""

import gzip
import json
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from perl.cli import parse
from perl.config import Config, RolloutConfig, StageConfig
from perl.timing import StageClock, span, span_of_backward
from perl.training.profile_report import add_device, figures, hints, print_report
from tests.command_line import ErrorOf, finish, rewarded, run, spawn, spawn_two
from tests.messages import tells

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


def ranges(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = (str(e.get("name")) for e in events)
    return [n.removeprefix("perl::") for n in names if n.startswith("perl::")]


def inside(out: dict[str, Any], part: str) -> set[str]:
    return {n.partition("/")[2] for n in out["stages"] if n.startswith(f"{part}/")}


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
    assert inside(out, "rollout") == {"vision", "prefill", "decode"}
    # Of four new tokens one comes of the prompt.
    assert out["stages"]["rollout/decode"]["calls"] <= 3
    assert all(
        step["metrics"]["groups/tries"] == 1 and step["metrics"]["packing/rows"]
        for step in (*out["steps"], *out["traced_steps"])
    )
    assert "2.0 of 2.0 groups a step have equal rewards" in said
    assert said.startswith("short.toml, stage rl: a step on ")
    assert f"torch {torch.__version__}" in said
    assert "device s" not in said and "aten::" in said and "Self CPU" in said

    # The rollout's trace ends at the third pass, and the next part is traced again.
    assert out["traced_in_part"] == ["rollout"]
    assert {p.name for p in folder.iterdir()} == {"trace.json.gz", "profile.json", "config.toml"}
    named = ranges(folder / "trace.json.gz")
    assert named.count("prefill") + named.count("decode") == 2
    assert {"data", "permute", "preprocess", "reward", "pack", "update"} | UPDATE <= {*named}
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["rollout"]["per_order"] == 2 and not config["filter"]["zero_variance"]
    assert not (short_recipe.parent / "run").exists()

    error = error_of(*command)
    assert str(folder) in error and "--overwrite" in error
    (folder / ".run").mkdir()
    error = error_of(*command, "--overwrite")
    assert f"--output {folder}" in error and f"remove {behind / '.run'}" in error
    (folder / ".run").rmdir()
    # What is not the profile's stays, also what comes during the run.
    (folder / "notes.txt").write_text("mine")
    writes = rewarded(
        short_recipe.parent,
        "import pathlib\n"
        "def f(completions, **_):\n"
        f"    pathlib.Path({str(folder)!r}, 'more.txt').write_text('mine')\n"
        "    return [0.0] * len(completions)\n",
    )
    short = ("--overwrite", "--steps", "1", "--traced", "0", "--warmup", "0")
    assert run(*command, *short, *writes) == 0
    assert "aten::" not in capsys.readouterr().out
    assert folder.is_symlink()
    names = {"profile.json", "config.toml", "notes.txt", "more.txt"}
    assert {p.name for p in folder.iterdir()} == names
    assert len(json.loads((folder / "profile.json").read_text())["steps"]) == 1


def test_a_cold_start_with_a_frozen_tower(
    short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_recipe.parent / "profile"
    options = ("--model.freeze-vision", "--model.gradient-checkpointing=1", "--model.lora-rank=2")
    stage = ("--stage", "cold_start", "--cold-start.batch-size", "2", "--steps", "1")
    assert run("profile", short_recipe, "--output", folder, *stage, *options, "--shapes") == 0
    out = json.loads((folder / "profile.json").read_text())
    check_sums(out)
    assert inside(out, "cold_start") >= UPDATE - {"vision.backward"}
    assert "vision.backward" not in inside(out, "cold_start")
    assert out["tokens_per_second"] > 0
    assert "Input Shapes" in capsys.readouterr().out


def test_a_model_on_padded_batches(
    short_recipe: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its tower is not told apart from its language model."""
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
    tower = {"vision", "vision.backward"}
    assert inside(out, "update") >= UPDATE - tower and not inside(out, "update") & tower
    assert "generate" in inside(out, "rollout")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_what_was_there(
    number: signal.Signals,
    short_recipe: Path,
    two_tokens: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stops = rewarded(
        short_recipe.parent,
        "import os, signal\n"
        "def f(completions, **_):\n"
        f"    os.kill(os.getpid(), {number.value})\n"
        "    return [0.0] * len(completions)\n",
    )
    folder = short_recipe.parent / "profile"
    folder.mkdir()
    (folder / "profile.json").write_text("mine")
    assert run("profile", short_recipe, "--output", folder, "--overwrite", *stops) == 130
    assert capsys.readouterr().err.endswith("stopped at once\n")
    assert (folder / "profile.json").read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("options", "matches"),
    [
        (["--steps", "0"], ["--steps 0", "1 or more"]),
        (["--warmup", "-1"], ["--warmup -1", "0 or more"]),
        (["--train.lrr", "1"], ["--train.lrr", "--train.lr?"]),
        (["--stages", "[]"], ["--stages", "[[stages]]"]),
        (["--stage", "sieve"], ["--stage sieve", "choose easy"]),
        (["--stage", "hard"], ["--stage hard", "choose easy"]),
        ([], ["--output runs/profile-recipe", "--overwrite"]),
        (["--output", "other", "--overwrite"], ["--output other", "choose another"]),
        (["--output", "recipe.toml"], ["--output recipe.toml", "choose another"]),
    ],
)
def test_what_it_refuses(
    options: list[str],
    matches: list[str],
    short_recipe: Path,
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(short_recipe.parent)
    Path("recipe.toml").write_text(short_recipe.read_text() + STAGES)
    for file in (Path("runs/profile-recipe/profile.json"), Path("other/notes.txt")):
        file.parent.mkdir(parents=True)
        file.touch()
    said = error_of("profile", "recipe.toml", *options)
    assert all(match in said for match in matches), said
    assert Path("other/notes.txt").exists() and Path("runs/profile-recipe/profile.json").exists()


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


def clock_of(*moments: float) -> StageClock:
    return StageClock(iter(moments).__next__)


def step_of(clock: StageClock) -> dict[str, Any]:
    return clock.lap() | {"metrics": {"tokens": 20}}


COLD_START = Config(stages=(StageConfig(name="cold_start", kind="cold_start"),))


def test_device_time_goes_to_the_stage_that_launched_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step of 10 s: 4 s of rollout, 6 of update with 2 of loss in it."""
    clock = clock_of(0, 4, 4, 5, 7, 10, 10)
    clock.enter("rollout")
    clock.leave("rollout")
    clock.enter("update")
    clock.enter("loss")
    clock.leave("loss")
    clock.leave("update")
    step = step_of(clock)
    second = 1e6
    events = [
        event("perl::rollout", 5 * second, 9 * second),
        event("aten::mm", 6 * second, 6.1 * second, 0.5 * second, 0.5 * second),
        event("perl::update", 9 * second, 15 * second),
        event("perl::loss", 10 * second, 12 * second),
        event("linear_grpo_loss", 10.5 * second, 11 * second, 3 * second),
        # What was launched at 10.5 s runs when the host has gone on; a range has a shadow on the device.
        event("kernel", 6 * second, 7 * second, gpu=True),
        event("kernel", 11 * second, 14 * second, gpu=True),
        event("kernel", 13 * second, 14 * second, gpu=True),
        event("perl::rollout", 5 * second, 15 * second, gpu=True),
    ]
    out = figures([step], [step], COLD_START) | {"peak_device_bytes": 2**30}
    add_device(out, events, cut=())
    stages = out["stages"]
    assert {n: (s["seconds"], s["device_seconds"], s["launches"]) for n, s in stages.items()} == {
        "other": (0, 0, 0),
        "rollout": (4, pytest.approx(1), 2),
        "update": (4, 0, 0),
        "update/loss": (2, pytest.approx(3), 1),
    }
    assert out["device_idle"] == pytest.approx(0.6) and out["tokens_per_second"] == 2
    shown = {"peak_rss_bytes": 2**30, "traced_in_part": [], "hints": ["a hint"]}
    print_report(out | shown, "synthetic")
    said = capsys.readouterr().out
    assert "launches" in said and "the device is idle for 60%" in said and "- a hint" in said

    out = figures([step], [step], COLD_START)
    add_device(out, events, cut={"rollout"})
    assert out["stages"]["rollout"]["device_seconds"] is None and "device_idle" not in out
    assert out["stages"]["update/loss"]["launches"] == 1


def test_a_range_without_an_end_shifts_no_other(caplog: pytest.LogCaptureFixture) -> None:
    clock = clock_of(*range(99))
    clock.enter("update")
    clock.enter("loss.backward")
    clock.leave("update")
    clock.enter("data")
    clock.leave("data")
    clock.leave("loss.backward")
    step = clock.lap()
    assert step["stages"] == {"other": 3, "update": 1, "update/loss.backward": 1, "data": 1}
    assert step["seconds"] == 6
    assert "the end of loss.backward was not seen" in caplog.text


def test_tokens_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    clock = clock_of(0, 1, 1)
    clock.enter("update")
    clock.leave("update")
    assert figures([step_of(clock)], [], COLD_START)["tokens_per_second"] == 20


@pytest.mark.slow
def test_each_process_leaves_a_trace(short_recipe: Path) -> None:
    folder = short_recipe.parent / "profile"
    # Of their own, since what is said depends on what libraries read when they are imported.
    done = finish(
        spawn_two("profile", short_recipe, "--output", folder, "--steps", "1", start=spawn)
    )
    assert [code for code, _ in done] == [0, 0], done
    assert "times and memory of the first of 2 processes; tokens of all" in done[0][1]
    # The other one says nothing but what is logged.
    assert all(line.startswith("perl") for line in done[1][1].splitlines())
    traces = {"trace-0.json.gz", "trace-1.json.gz"}
    assert {p.name for p in folder.iterdir()} == {*traces, "profile.json", "config.toml"}
    check_sums(json.loads((folder / "profile.json").read_text()))


def test_every_group_is_trained_on_at_every_step(short_recipe: Path) -> None:
    given = "--filter.min-accuracy 0.2 --filter.max-accuracy 0.8 --eval.every 2 --train.steps 1"
    config = parse(
        "profile", [str(short_recipe), "--steps", "3", *given.split()]
    ).config_to_profile()
    kept = config.filter
    assert (kept.zero_variance, kept.min_accuracy, kept.max_accuracy) == (False, 0.0, 1.0)
    # One to warm up, three that are timed and one that is traced.
    assert (config.train.steps, config.eval.every, config.run.log_every) == (5, 0, 1)
    assert (config.run.checkpoint_every, config.run.save_rollouts_every) == (0, 0)


BUSY = {"tokens/completion": 600, "tokens/prompt": 6000}


@pytest.mark.parametrize(
    ("seconds", "metrics", "about"),
    [
        # Of 10 s: a tower's share, its backward's, and the rollout's.
        ({"update/vision": 1.5, "update/vision.backward": 1.0}, {}, ["freeze_vision"]),
        ({"update/vision": 1.0, "update/vision.backward": 1.0}, {}, []),
        ({"update/vision": 3.0}, {}, []),
        # 300 completions of up to 10 tokens, and 50 prompts of 20: 4000 tokens.
        ({"rollout/decode": 4.5}, BUSY, ["rollout.kv_cache_tokens"]),
        ({"rollout/decode": 4.0}, BUSY, []),
        ({"rollout/decode": 4.5}, {**BUSY, "tokens/prompt": 5994}, []),
        ({}, {"length/truncated": 0.6}, ["max_new_tokens"]),
        ({}, {"length/truncated": 0.5}, []),
        ({}, {"groups/zero_variance": 1}, ["filter.zero_variance"]),
    ],
)
def test_hints_follow_from_shares(
    seconds: dict[str, float], metrics: dict[str, float], about: list[str]
) -> None:
    out = {
        "seconds_per_step": 10.0,
        "stages": {name: {"seconds": s} for name, s in seconds.items()},
        "metrics": {
            **{"length/mean": 2, "groups/seen": 4, "tokens/completion": 2, "tokens/prompt": 20},
            **metrics,
        },
    }
    sampling = RolloutConfig(kv_cache_tokens=3999, max_new_tokens=10, per_order=6)
    found = list(hints(out, Config(rollout=sampling)))
    assert len(found) == len(about)
    for hint, name in zip(found, about, strict=True):
        tells(hint, name)
