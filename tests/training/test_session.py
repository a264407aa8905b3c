"""What a session keeps of a run between steps, and gives back to one that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perl.distributed import StopSignal
from perl.recipe import filtered_file
from perl.report.progress import Display
from perl.training.session import Session
from tests.command_line import untimed
from tests.messages import refused
from tests.stand_ins import HereWorker
from tests.training.two_tokens import OwnEngine, config_of, saved, session_of, train_in

TWO_STAGES = """
[[stages]]
name = "easy_ones"
kind = "rl"
train.steps = 2
[[stages]]
name = "hard"
kind = "rl"
train.steps = 0
[[stages]]
name = "warm_up"
kind = "cold_start"
cold_start.steps = 3
"""


def again(session: Session) -> Session:
    """Of the same run, in another process."""
    config = session.stages[0].config
    other = Session(config, session.folder, Display(enabled=False), StopSignal())
    other.restore()
    return other


def test_the_seconds_of_a_run_go_on(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    session = session_of(config_of(tmp_path), tmp_path / "run")
    for step, (pause, elapsed) in enumerate([(100.0, 100.0), (7.5, 107.5), (20.0, 127.5)]):
        clock.now += pause
        with session.components.watch("rollout"):
            clock.now += 2.0
        assert session.elapsed == elapsed + 2 * (step + 1)
        session.record({"stage": "rl", "step": 0})
        session.progress.step = step + 1
        session.save()
        clock.now += 1000
        session = again(session)
        assert session.elapsed == elapsed + 2 * (step + 1)
        assert session.components.watch.total_seconds["rollout"] == 2.0 * (step + 1)
    rows = [json.loads(line) for line in session.folder.metrics.read_text().splitlines()]
    assert [row["time/elapsed"] for row in rows] == [102, 111.5, 133.5]


def test_trackers_go_on_behind_the_checkpoint(tmp_path: Path, two_tokens: None) -> None:
    """They count the steps of all stages: three of the cold start and one of RL stay, the fifth is written again."""

    def began(session: Session) -> Any:
        session.start_trackers()
        accelerator: Any = session.components.accelerator
        return accelerator.began[1]["tensorboard"]["purge_step"]

    session = session_of(config_of(tmp_path, "cold_start.steps = 3"), tmp_path / "run")
    assert (began(session), began(again(session))) == (None, 0)
    session.progress.stage, session.progress.step = "rl", 1
    session.progress.taken["cold_start"] = 3
    session.save()
    assert began(again(session)) == 5
    session.enter_stage(session.stages[1])
    session.gallery.folder.make_parts()
    shown: list[tuple[Any, int]] = []
    session.trackers.show = lambda *given: shown.append(given)  # type: ignore[method-assign]
    row = {"stage": "rl", "step": 2}
    session.show([])
    session.show([row])
    assert shown == [([row], 5)]


def test_each_step_begins_alike_whatever_came_before(tmp_path: Path, two_tokens: None) -> None:
    """Else a resumed run could not give the same numbers: what is encoded together differs in its last bits, and dropout
    draws from torch's generator. Each process draws its own."""
    session = session_of(config_of(tmp_path, "train.steps = 3"), tmp_path / "run")
    session.enter_stage(session.stages[1])
    policy: Any = session.components.policy
    drawn = [(step, policy.vision.cleared, torch.rand(1).item()) for step in session.steps()]
    assert [(step, cleared) for step, cleared, _ in drawn] == [(0, 1), (1, 2), (2, 3)]
    session.progress.step = 2
    torch.manual_seed(0)
    assert [(step, 3, torch.rand(1).item()) for step in session.steps()] == drawn[2:]
    session.processes.index = 1
    drawn += [(step, 3, torch.rand(1).item()) for step in session.steps()]
    assert len({number for *_, number in drawn}) == 4


def test_a_run_whose_pictures_are_read_ahead_is_the_same(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With refills, demonstrations, and where it goes on after it was stopped; on a GPU it is so by itself."""
    keys = """
run.save_rollouts_every = 1
cold_start.steps = 2
filter.zero_variance = true
filter.max_tries = 3
rollout.per_order = 1
train.steps = 3
"""
    roots = [tmp_path / name for name in ("here", "ahead")]
    monkeypatch.setattr("perl.data.readahead.Worker", HereWorker)
    monkeypatch.setattr(HereWorker, "opened", opened := [])
    train_in(roots[0], config_of(tmp_path, keys))
    config = config_of(tmp_path, f"{keys}data.workers = 2")
    generate, calls = OwnEngine.generate, []

    def stopped(self: OwnEngine, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *given)

    monkeypatch.setattr(OwnEngine, "generate", stopped)
    assert not opened
    with pytest.raises(KeyboardInterrupt):
        train_in(roots[1], config)
    train_in(roots[1], config, resume=True)
    one, other = map(untimed, roots)
    assert one == other and max(row["groups/tries"] for row in one[2:]) > 1
    assert len(opened) > 12
    for file in ("rollouts.jsonl", "models/final/weights"):
        assert (roots[0] / file).read_bytes() == (roots[1] / file).read_bytes()


def test_on_a_gpu_pictures_are_read_ahead(tmp_path: Path, two_tokens: None) -> None:
    components = session_of(config_of(tmp_path), tmp_path / "run").components
    components.accelerator.device = torch.device("cuda", 0)
    ahead = components.read_ahead()
    assert ahead and ahead.workers == 4


def test_a_stage_begins_once_and_is_shown_by_its_name(tmp_path: Path, two_tokens: None) -> None:
    shown: list[tuple[Any, ...]] = []
    session = session_of(config_of(tmp_path, TWO_STAGES), tmp_path / "run")
    session.display = SimpleNamespace(close=lambda: None, stage=lambda *a: shown.append(a))  # type: ignore[assignment]
    easy, hard, warm = session.stages
    assert session.points == [
        *("before", "easy_ones", "after easy_ones", "hard", "after hard", "warm_up"),
        *("after", "done"),
    ]
    session.enter_stage(easy)
    assert session.begin(easy) and shown == [("RL: easy_ones", 2, 0)]
    session.progress.step = 1
    assert session.begin(easy) and shown[1:] == [("RL: easy_ones", 2, 1)]
    session.progress.step = 2
    session.finish_stage()
    assert saved(session.folder.root) == [("after easy_ones", 0)] and not session.begin(easy)
    # A stage without steps is over at once, and leaves no checkpoint.
    session.enter_stage(hard)
    assert session.trained_before == "easy_ones" and not session.begin(hard)
    assert session.progress.stage == "after hard" and len(saved(session.folder.root)) == 1
    session.enter_stage(warm)
    assert session.trained_before == "easy_ones" and session.begin(warm)
    assert shown[2:] == [("warm up", 3, 0)]
    # Trackers count all stages' steps; what is measured behind another kind than RL stands at its end.
    session.record({"stage": "cold_start", "step": 1, "loss": 0.5})
    session.record({"stage": "evaluate", "step": 2, "at": "after"})
    assert [step for _, step in session.components.accelerator.logged] == [2 + 1, 2 + 3]


def test_a_checkpoint_of_a_stage_that_is_no_more_is_refused(
    tmp_path: Path, two_tokens: None
) -> None:
    session = session_of(config_of(tmp_path, TWO_STAGES), tmp_path / "run")
    session.progress.stage = "warm_up"
    session.save()
    fewer = TWO_STAGES.partition('[[stages]]\nname = "warm_up"')[0]
    other = Session(
        config_of(tmp_path, fewer), session.folder, Display(enabled=False), StopSignal()
    )
    with refused("warm_up", "config.toml", "easy_ones, hard"):
        other.restore()


def test_one_point_is_saved_once(tmp_path: Path, two_tokens: None) -> None:
    session = session_of(config_of(tmp_path, "run.keep_checkpoints = 9"), tmp_path / "run")
    for step in (1, 1, 2):
        session.progress.step = step
        session.save()
    again(session).save()
    assert saved(session.folder.root) == [("cold_start", 1), ("cold_start", 2)]


def test_a_stage_behind_a_filter_reads_what_it_left(tmp_path: Path, two_tokens: None) -> None:
    more = tmp_path / "more.jsonl"
    stages = """
        data.map = ["answer=answer"]
        [[stages]]
        name = "sift"
        kind = "filter"
        data.train = "MORE"
        [[stages]]
        name = "hard"
        kind = "rl"
        data.mix = ["MORE*3"]
    """.replace("MORE", str(more))
    session = session_of(config_of(tmp_path, stages), tmp_path / "run")
    sources = []
    for stage in session.stages:
        session.enter_stage(stage)
        sources.append([session.components.source(str(f))[0] for f in (more, tmp_path / "other")])
    left = str(filtered_file(session.folder.root, "sift"))
    assert sources == [[str(more), str(tmp_path / "other")], [left, str(tmp_path / "other")]]
    # Bundled questions are left with our names for their columns, whatever those of other sources are.
    filtered = {"bundled:digits": Path(left), str(more): Path(left)}
    components = session.components.for_stage(session.stages[-1], filtered)
    maps = [components.source(source)[1].map for source in filtered]
    assert maps == [(), ("answer=answer",)]


def test_the_bar_of_a_stage_ends_with_it(tmp_path: Path, two_tokens: None) -> None:
    session = session_of(config_of(tmp_path, TWO_STAGES), tmp_path / "run")
    closed: list[str] = []
    session.display.close = lambda: closed.append(session.progress.stage)  # type: ignore[method-assign]
    session.advance_to("easy_ones")
    session.finish_stage()
    assert closed == ["easy_ones"]


def test_each_step_seeds_every_device_anew(
    tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that checkpoints need no generator's state: a run that goes on draws what the whole one drew."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    session = session_of(config_of(tmp_path, "train.steps = 4"), tmp_path / "run")
    session.enter_stage(session.stages[-1])
    session.begin(session.stage)
    drawn = []
    for step in session.steps():
        drawn.append(torch.rand(()).item())
        torch.rand(step + 1)
        session.progress.step = step + 1
        if step == 1:
            session.save()
    assert len(set(seeds)) == len(set(drawn)) == 4
    other = again(session)
    other.enter_stage(other.stages[-1])
    assert [(step, torch.rand(()).item()) for step in other.steps()] == [*enumerate(drawn)][2:]
    assert seeds[4:] == seeds[2:4]
