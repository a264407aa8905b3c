"""Whole runs of a policy over two tokens: their stages, what they record, and that they go on wherever they were stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from perl.distributed import StopSignal
from perl.files import RunFolder
from perl.rollout.replay import Replay, load_replay
from perl.training.optimizer import Optimizer
from perl.training.roofline.devices import Peak
from perl.training.saving.checkpoint import CheckpointManager
from perl.training.session import ProcessShare, Session
from perl.types import Interrupted, UserError
from tests.command_line import json_lines, metrics, untimed
from tests.messages import refused, tells
from tests.stand_ins import InARow, example, processes
from tests.training.two_tokens import (
    Accelerator,
    OwnEngine,
    Parts,
    Together,
    config_of,
    saved,
    stand_in,
    tensors_in,
    train_in,
    weights_in,
)

STAGES = """
run = { save_rollouts_every = 1, seed = 4 }
eval = { examples = 2, max_orders = 2, every = 2 }
cold_start.lr = 0.001

[[stages]]
name = "warm"
kind = "cold_start"
cold_start.steps = 3

[[stages]]
name = "sift"
kind = "filter"
data.train = "FOLDER/more.jsonl"
resample = { rollouts = 2, histogram = "uniform" }

[[stages]]
name = "easy"
kind = "rl"
train = { steps = 3, updates_per_batch = 2, warmup_steps = 4, lr = 0.2 }
loss.kl_coef = 0.01

[[stages]]
name = "hard"
kind = "rl"
train.steps = 4
data.mix = ["FOLDER/more.jsonl*3"]
loss.kl_coef = 0.01
filter = { zero_variance = true, reuse_overflow = true, replay = 2 }
"""


FIVE = "run.checkpoint_every = 0\ntrain = { steps = 5, updates_per_batch = 2 }"


def staged(folder: Path) -> Any:
    return config_of(folder, STAGES.replace("FOLDER", str(folder)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from the keys of a recipe to the folder of a run that nothing has stopped."""

    @cache
    def run(more: str) -> Path:
        root = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch)
            train_in(root / "run", config_of(root, more.replace("FOLDER", str(root))))
        return root / "run"

    return run


def test_what_a_run_of_four_stages_leaves(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, float], int]] = []

    def log(self: Any, numbers: dict[str, float], step: int) -> None:
        logged.append((numbers, step))

    monkeypatch.setattr(Accelerator, "log", log)
    folder = tmp_path / "run"
    train_in(folder, staged(tmp_path))
    rows = untimed(folder)
    places = [(r["stage"], r.get("name") or r.get("at"), r["step"]) for r in rows]
    assert places == [
        *(("cold_start", "warm", 1), ("cold_start", "warm", 2), ("cold_start", "warm", 3)),
        *(("filter", "sift", 0), ("evaluate", "before", 0)),
        *(("rl", "easy", 1), ("rl", "easy", 2), ("evaluate", "step", 2), ("rl", "easy", 3)),
        *(("evaluate", "after easy", 3), ("rl", "hard", 4), ("rl", "hard", 5)),
        *(("evaluate", "step", 5), ("rl", "hard", 6), ("rl", "hard", 7), ("evaluate", "after", 7)),
    ]
    # Trackers count on over the stages: three steps of the cold start lie before the first of RL.
    assert [step for _, step in logged] == [1, 2, 3, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9, 10, 10]
    for (numbers, _), row in zip(logged, metrics(folder), strict=True):
        own = {"step", "time/elapsed"}
        if row["stage"] != "rl":
            own.add("memory/peak_rss_bytes")
        kinds = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in own}
        known = {name: v for name, v in numbers.items() if not math.isnan(v)}
        assert known == {f"{row['stage']}/{name}": v for name, v in kinds.items()}
    assert {p.name for p in (folder / "models").iterdir()} == {"warm", "easy", "final"}
    # What comes behind the last step has its weights. Its optimizer stays, for a run that is given more steps.
    assert saved(folder) == [("hard", 3), ("done", 0)]
    assert all(tensors_in(p) != weights_in(p) for p in folder.glob("checkpoints/*"))

    # Of "A B B" twice under even chances; a mean of p - onehot(y) of (1/6, -1/6).
    first = rows[0]
    assert (first["tokens"], first["lr"]) == (6, 0.001 / 50)  # The first of a warm-up of 50.
    assert first["loss"] == pytest.approx(math.log(2))
    assert first["grad_norm"] == pytest.approx(math.sqrt(2) / 6)
    easy, hard = ([r for r in rows if r.get("name") == name] for name in ("easy", "hard"))
    # Warm-up of 0.05, 0.1, 0.15 and 0.2, two updates a step.
    assert [r["lr"] for r in easy] == pytest.approx([0.075, 0.175, 0.2])
    # The reference is the policy that the stage began with.
    assert [r["kl"] > 1e-6 for r in (*easy, *hard)] == [True] * 3 + [False] + [True] * 3
    assert [r["groups/replayed"] for r in hard] == [0, 2, 2, 2]
    assert [r["ratio_max"] == 1 for r in hard] == [True, False, False, False]
    # Passes: old and reference log-probs and the update of two parts; later reference and update, and old ones for replayed
    # groups. The reference looks through the policy's frozen tower.
    assert [r["throughput/images_encoded"] for r in metrics(folder, "rl")] == [6, 6, 6, 2, 3, 3, 3]
    for r in metrics(folder, "rl"):
        tokens = r["throughput/tokens_per_second"] * r["time/step"]
        assert tokens == pytest.approx(r["tokens/prompt"] + r["tokens/completion"])
    # Three steps of two questions go once through the six.
    kept = [
        (r["step"], r["example"])
        for r in json_lines(folder / "rollouts.jsonl")
        if r["stage"] == "rl"
    ]
    assert sorted({name for step, name in kept if step <= 3}) == [
        f"data.jsonl-{k}" for k in range(6)
    ]
    assert {name.partition("-")[0] for step, name in kept if step > 3} == {
        "data.jsonl",
        "more.jsonl",
    }
    # No two steps sample with the same seed.
    seeds = [
        seed for seed, params, _ in OwnEngine.asked if params.n == 2 and params.temperature == 1
    ]
    assert len(set(seeds)) == len(seeds) == 1 + sum(r["groups/tries"] for r in (*easy, *hard))


class Killed(BaseException):
    """Of the process, at once."""


@pytest.mark.parametrize(
    ("written", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")]
)
def test_a_run_that_is_killed_at_each_record_ends_as_one_that_is_not(
    written: bool,
    dtype: str,
    tmp_path: Path,
    two_tokens: None,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = f'model.dtype = "{dtype}"\n{STAGES}'
    config = config_of(tmp_path, more.replace("FOLDER", str(tmp_path)))
    broken, unbroken = tmp_path / "broken", whole(more)
    append, lived = RunFolder.append, 0

    def mortal(self: RunFolder, record: Path, row: dict[str, Any]) -> None:
        nonlocal lived
        if (
            record.name == "metrics.jsonl"
            and len(json_lines(record) if record.exists() else []) == lived
        ):
            lived += 1
            if written:
                append(self, record, row)
            raise Killed
        append(self, record, row)

    monkeypatch.setattr(RunFolder, "append", mortal)
    deaths = 0
    while True:
        try:
            train_in(broken, config, resume=deaths > 0)
            break
        except Killed:
            deaths += 1
    assert deaths == len(metrics(unbroken)) == 16
    assert untimed(broken) == untimed(unbroken)
    assert (broken / "rollouts.jsonl").read_text() == (unbroken / "rollouts.jsonl").read_text()
    for name in ("models/warm", "models/easy", "models/final"):
        one, other = (load_file(f / name / "weights") for f in (unbroken, broken))
        assert all(torch.equal(one[k], other[k]) for k in one)
        assert {str(w.dtype) for w in one.values()} == {f"torch.{dtype}"}
    one, other = (tensors_in(f / "checkpoints" / "step-10") for f in (unbroken, broken))
    assert all(torch.equal(one[k], other[k]) and one[k].dtype == torch.float32 for k in one)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in one.values())


def test_a_stop_saves_the_step_it_came_in(
    tmp_path: Path,
    two_tokens: None,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes in the first of two updates; a second one stops at once."""
    config = config_of(tmp_path, FIVE)
    step, folder = Optimizer.step, tmp_path / "run"
    signals = iter([0, 0, 1, 0, 0, 2])

    def stopped(self: Optimizer, *arguments: Any) -> dict[str, float]:
        for _ in range(next(signals, 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", stopped)
    with pytest.raises(Interrupted) as stop:
        train_in(folder, config)
    tells(stop.value, "rl", 2)
    assert saved(folder) == [("rl", 2)] and len(metrics(folder, "rl")) == 2
    with pytest.raises(KeyboardInterrupt):
        train_in(folder, config, resume=True)
    assert saved(folder) == [("rl", 2)] and len(metrics(folder, "rl")) == 2
    train_in(folder, config, resume=True)
    assert untimed(folder) == untimed(whole(FIVE))


def test_saves_in_the_background_are_waited_for_where_a_run_stops_or_fails(
    tmp_path: Path,
    two_tokens: None,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: stopped in its second step, then from the fourth on with a disk that is full, then to its end."""
    keys = FIVE.replace("every = 0", "every = 1")
    config, folder, room, stops = config_of(tmp_path, keys), tmp_path / "run", [3], iter([True])
    manager, write, step = CheckpointManager, safetensors.torch.save, Optimizer.step

    def in_background(*arguments: Any, asynchronous: bool) -> CheckpointManager:
        return manager(*arguments, asynchronous=True)

    def slow(*arguments: Any, **options: Any) -> bytes:
        time.sleep(0.1)
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    def stopped(self: Optimizer, number: int, *arguments: Any) -> dict[str, float]:
        if number == 2 and next(stops, False):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, *arguments)

    monkeypatch.setattr("perl.training.session.CheckpointManager", in_background)
    monkeypatch.setattr("safetensors.torch.save", slow)
    monkeypatch.setattr(Optimizer, "step", stopped)
    with pytest.raises(Interrupted):
        train_in(folder, config)
    assert saved(folder) == [("rl", 1), ("rl", 2)]
    with pytest.raises(OSError) as error:
        train_in(folder, config, resume=True)
    tells(error.value, "step-4", "space")
    tells(error.value.__notes__, "saved: rl step 3")
    assert saved(folder) == [("rl", 2), ("rl", 3)]
    room[0] = 9
    train_in(folder, config, resume=True)
    assert saved(folder) == [("rl", 4), ("done", 0)]
    assert untimed(folder) == untimed(whole(FIVE))


@pytest.mark.parametrize(
    ("call", "fails", "point", "records"),
    [
        (1, False, ("sift", 0), 3),
        (2, False, ("before", 0), 4),
        (6, False, ("easy", 2), 8),
        (6, True, ("easy", 2), 7),
    ],
    ids=["filter", "before", "along the way", "failure along the way"],
)
def test_a_stop_or_a_failure_in_a_measurement(
    call: int,
    fails: bool,
    point: tuple[str, int],
    records: int,
    tmp_path: Path,
    two_tokens: None,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends the measurement. One along the way belongs to a step: a stop lets it finish, and after a failure it is
    made when the run goes on."""
    config, folder = staged(tmp_path), tmp_path / "run"
    generate, calls = OwnEngine.generate, 0

    def ended(self: OwnEngine, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and fails:
            raise UserError("a picture cannot be read")
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *arguments)

    monkeypatch.setattr(OwnEngine, "generate", ended)
    with refused("picture") if fails else pytest.raises(Interrupted):
        train_in(folder, config)
    assert saved(folder)[-1] == point and len(metrics(folder)) == records
    train_in(folder, config, resume=True)
    assert untimed(folder) == untimed(whole(STAGES))


@pytest.mark.parametrize(
    ("fails", "kept"),
    [(0, []), (1, []), (4, [("rl", 2)]), (5, []), (9, [])],
    ids=["first", "first, between updates", "third", "third, between updates", "last"],
)
def test_a_failure_keeps_the_steps_before_it_unless_it_came_between_updates(
    fails: int,
    kept: list[tuple[str, int]],
    tmp_path: Path,
    two_tokens: None,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between updates the weights are those of no step, so the run has to go on from an earlier checkpoint."""
    config = config_of(tmp_path, FIVE)
    step, done, folder = Optimizer.step, 0, tmp_path / "run"

    def failing(self: Optimizer, *arguments: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        if done == fails + 1:
            raise UserError("the gradient is not finite")
        return step(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", failing)
    with refused("gradient"):
        train_in(folder, config)
    assert saved(folder) == kept
    train_in(folder, config, resume=True)
    assert untimed(folder) == untimed(whole(FIVE))


def test_checkpoints_and_records_come_when_due(tmp_path: Path, two_tokens: None) -> None:
    more = """
        run = { checkpoint_every = 2, keep_checkpoints = 9, log_every = 3, save_rollouts_every = 3 }
        train = { steps = 7, examples_per_step = 3 }
        eval = { examples = 1, every = 3 }
    """
    train_in(tmp_path / "run", config_of(tmp_path, more))
    steps = [("rl", 0), ("rl", 2), ("rl", 4), ("rl", 6)]
    assert saved(tmp_path / "run") == [*steps, ("done", 0)]
    rows = metrics(tmp_path / "run", "rl")
    assert [r["step"] for r in rows] == [3, 6]
    assert [r["step"] for r in metrics(tmp_path / "run", "evaluate")] == [0, 3, 6, 7]
    # Of the first two questions a rollout of each order.
    kept = json_lines(tmp_path / "run" / "rollouts.jsonl")
    assert [r["step"] for r in kept if r["stage"] == "rl"] == [
        *([1] * 4),
        *([4] * 4),
        *([7] * 4),
    ]


def test_every_seed_is_a_run_and_the_summary_their_mean(tmp_path: Path, two_tokens: None) -> None:
    more = "run.seeds = [0, 3]\neval.examples = 3\ntrain.steps = 1"
    summary = train_in(tmp_path / "run", config_of(tmp_path, more))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    one, other = summary["per_seed"]
    assert (summary["seeds"], one["seed"], other["seed"]) == ([0, 3], 0, 3)
    for name in ("reward", "reward/share_of_b"):
        for at in (f"{name}_before", f"{name}_after"):
            assert summary[at] == pytest.approx((one[at] + other[at]) / 2, abs=1e-6)
    rows = [metrics(tmp_path / "run" / f"seed-{seed}", "rl") for seed in (0, 3)]
    assert rows[0][0]["loss"] != rows[1][0]["loss"]
    # No function of the run says what is right.
    assert (one["greedy_before"], one["processes"], one["parameters"]) == (None, 1, 3)


PEAK = Peak(1e6, "given")


def both(processes: Together, folder: Path, config: Any) -> list[Any]:
    """What a run that goes on in two processes comes to in each: the summary or the error."""
    return processes.run(lambda _: train_in(folder, config, resume=True))


def test_two_processes_take_every_step_together(
    tmp_path: Path, two_processes: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("accounting", "summary"):
        monkeypatch.setattr(f"perl.training.{user}.peak_of", lambda *_: PEAK)
    config, folder = staged(tmp_path), tmp_path / "run"
    RunFolder(folder).create(overwrite=False)
    first, second = both(two_processes, folder, config)
    assert first["processes"] == second["processes"] == 2
    one, other = two_processes.policies.values()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    rows = untimed(folder)
    monkeypatch.setattr(Parts, "together", None)
    monkeypatch.setattr("perl.training.train.StopSignal", StopSignal)
    train_in(tmp_path / "alone", config)
    alone = untimed(tmp_path / "alone")
    assert [(r["stage"], r["step"]) for r in rows] == [(r["stage"], r["step"]) for r in alone]
    # The cold start does not sample: what two do together is what one does.
    for name in ("tokens", "loss", "grad_norm"):
        mine, its = ([r[name] for r in of[:3]] for of in (rows, alone))
        assert mine == pytest.approx(its, rel=1e-5)
    assert rows[3]["filter/measured"] == 6 and rows[4]["examples"] == 2
    rl = [r for r in rows if r["stage"] == "rl"]
    metrics_of = {row["step"]: row for row in metrics(folder, "rl")}
    # Each process draws one of the two questions of each try.
    assert [r["groups/seen"] for r in rl] == [2 * r["groups/tries"] for r in rl]
    assert [r["groups/replayed"] for r in rl] == [0] * 4 + [2] * 3
    for r in rl:
        # Prompts are sampled from twice and read once.
        read = r["tokens/prompt"] / 2 + r["tokens/completion"]
        assert r["flops/rollout/language"] == 2 * 10 * read
        assert r["flops/rollout/head"] == 2 * 5 * r["tokens/completion"]
        # Four of ten weights are trained: adapters, which the reference goes without.
        assert r["flops/update/language"] == 2.4 * 2 * 10 * r["packing/tokens"]
        done = sum(n for name, n in r.items() if name.startswith("flops/"))
        in_time = metrics_of[r["step"]]
        assert in_time["mfu/step"] * in_time["time/step"] * 2 * PEAK.flops == pytest.approx(done)
        per_gpu = in_time["throughput/tokens_per_second_per_gpu"]
        assert per_gpu == in_time["throughput/tokens_per_second"] / 2
        assert min(in_time[f"memory/{n}rss_bytes"] for n in ("peak_", "update/")) > 2**20
    steps = [row["time/step"] for row in metrics_of.values()]
    assert first["median_step"]["step"] == statistics.median(steps)
    assert first["peak_flops"] == vars(PEAK) and "export/rss_bytes" in first["bytes_by_stage"]
    logprobs = [r["flops/logprobs/language"] / (2 * 10 * r["packing/tokens"]) for r in rl]
    # Of old policies and of the reference; of the reference alone where one update follows the rollouts, until some are replayed.
    assert logprobs == [1.6, 1.6, 1.6, 0.6, 1.6, 1.6, 1.6]
    measured = [json_lines(folder / "filtered" / f"sift.accuracies-{k}.jsonl") for k in (0, 1)]
    assert [[row["index"] for row in own] for own in measured] == [[0, 2, 4], [1, 3, 5]]
    # Both sample, and never the same.
    seeds = [s for s, params, _ in OwnEngine.asked if params.n == 2]
    alone_seeds = 1 + sum(r["groups/tries"] for r in alone if r["stage"] == "rl")
    here = seeds[: len(seeds) - alone_seeds]
    assert len(set(here)) == len(here) == 2 * (1 + sum(r["groups/tries"] for r in rl))


def test_processes_share_the_stream_out() -> None:
    source = InARow([example(str(k), k, k + 1) for k in range(8)])
    shares = [ProcessShare(source, processes(2, index)) for index in (0, 1)]
    assert [d.example.id for d in shares[0].draw(4)] == ["0", "2"]
    assert [d.example.id for d in shares[1].draw(4)] == ["5", "7"]
    assert shares[1].find((3,)).id == "3"


@pytest.mark.parametrize("how", ["stop", "mistake", "bug", "exit"])
def test_what_ends_one_process_ends_both_and_both_go_on(
    how: str, tmp_path: Path, two_processes: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the rollouts of the last stage, by a request to stop or an error in the second process alone."""
    config, folder = staged(tmp_path), tmp_path / "run"
    RunFolder(folder).create(overwrite=False)
    generate, left = OwnEngine.generate, 7

    def ending(self: OwnEngine, prompts: Any, params: Any, seed: int) -> Any:
        nonlocal left
        if two_processes.here.index == 1 and params.n == 2:
            left -= 1
            if left == 0 and how != "stop":
                raise {"mistake": UserError, "bug": ValueError, "exit": SystemExit}[how](
                    "only here"
                )
            two_processes.stops[1].requested |= left == 0
        return generate(self, prompts, params, seed)

    monkeypatch.setattr(OwnEngine, "generate", ending)
    first, second = both(two_processes, folder, config)
    if how == "stop":
        assert isinstance(first, Interrupted) and isinstance(second, Interrupted)
    else:
        assert isinstance(first, UserError)
        expected = {"mistake": UserError, "bug": ValueError, "exit": RuntimeError}[how]
        assert type(second) is expected
        tells(second, "only here")
        assert "only here" not in str(first)
    stage, step = saved(folder)[-1]
    assert stage == "hard" and 0 < step < 4 and len(metrics(folder, "rl")) == 3 + step
    newest = max((folder / "checkpoints").iterdir())
    kept = {f"{name}-{k}.safetensors" for name in ("overflow", "buffer") for k in (0, 1)}
    assert {p.name for p in newest.glob("*-[01].safetensors")} == kept
    both(two_processes, folder, config)
    whole = tmp_path / "whole"
    RunFolder(whole).create(overwrite=False)
    both(two_processes, whole, config)
    assert untimed(folder) == untimed(whole)


@pytest.mark.parametrize("before", [1, 2])
def test_a_run_goes_on_in_another_number_of_processes(
    before: int, tmp_path: Path, two_processes: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits and what is replayed is all there, shared by two or held by one."""
    config, folder = staged(tmp_path), tmp_path / "run"
    RunFolder(folder).create(overwrite=False)
    record, load, loaded = Session.record_step, Replay.load_state_dict, []

    def recorded(self: Session, step: int, *args: Any) -> None:
        record(self, step, *args)
        self.stop.requested |= self.stage.name == "hard" and step == 1 and not loaded

    def kept(self: Replay, state: Any) -> None:
        loaded.append(state)
        load(self, state)

    def go_on(processes: int) -> list[Any]:
        if processes == 2:
            monkeypatch.setattr(Parts, "together", two_processes)
            monkeypatch.setattr("perl.training.train.StopSignal", two_processes.stop)
            return both(two_processes, folder, config)
        monkeypatch.setattr(Parts, "together", None)
        monkeypatch.setattr("perl.training.train.StopSignal", StopSignal)
        try:
            return [train_in(folder, config, resume=True)]
        except Interrupted as error:
            return [error]

    monkeypatch.setattr(Session, "record_step", recorded)
    monkeypatch.setattr(Replay, "load_state_dict", kept)
    assert all(isinstance(end, Interrupted) for end in go_on(before))
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name.partition("-")[2]))
    stored = [load_replay(newest, process, before) for process in range(before)]
    assert all(isinstance(end, dict) for end in go_on(3 - before))
    assert len(loaded) == 3 - before

    def keys(states: list[Any], name: str) -> list[Any]:
        return sorted((g.step, g.key) for state in states for g in state[name])

    for name in ("buffer", "overflow"):
        assert keys(loaded, name) == keys(stored, name)
    assert keys(stored, "buffer")
    rows = [r for r in metrics(folder, "rl") if r["name"] == "hard"]
    assert [r["step"] for r in rows] == [4, 5, 6, 7]
    assert [r["groups/replayed"] for r in rows] == [0, 2, 2, 2]
