"""What TensorBoard, wandb and trackio are given, by accelerate's own trackers; the last two are stand-ins."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from perl.config import Config, RunConfig
from perl.distributed import process_state
from perl.files import RunFolder
from perl.report.trackers import Trackers, project_of, usable_trackers
from tests.messages import refused

CLASSES: dict[str, type[Any]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "trackio": TrackioTracker,
}


class Accelerator:
    """As much of accelerate's as trackers ask, in one process."""

    is_main_process = True

    def __init__(self, root: Path, *names: str) -> None:
        process_state()  # accelerate's logger asks it.
        self.root, self.names = root, names
        self.trackers: list[Any] = []

    def init_trackers(self, project: str, init_kwargs: dict[str, dict[str, Any]]) -> None:
        for name in self.names:
            where = [str(self.root / "tensorboard")] if name == "tensorboard" else []
            self.trackers.append(CLASSES[name](project, *where, **init_kwargs[name]))
        for tracker in self.trackers:
            tracker.start()

    def log(self, numbers: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(numbers, step=step)


@dataclass
class Service:
    """Takes the place of wandb and of trackio."""

    began: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    finished: int = 0

    def init(self, **options: Any) -> Any:
        self.began.append(options)
        return SimpleNamespace(name=options["name"], log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, path: str, caption: str) -> str:
        return f"{caption}: {Image.open(path).convert('L').getpixel((0, 0))}"

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return [dict(zip(columns, row, strict=True)) for row in data]


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    found = {"wandb": Service(), "trackio": Service()}
    for name, service in found.items():
        monkeypatch.setitem(sys.modules, name, service)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return found


def trackers(root: Path, *names: str, **run: Any) -> Trackers:
    root.mkdir(parents=True, exist_ok=True)
    config = Config(run=RunConfig(trackers=names, **run))
    return Trackers(Accelerator(root, *names), config, RunFolder(root))


def rows(root: Path) -> list[dict[str, Any]]:
    """Two rollouts of three pictures, in two orders."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for grey, size in ((10, (448, 448)), (20, (40, 20)), (30, (4, 4))):
        Image.new("L", size, grey).save(root / "images" / f"{grey}.webp", lossless=True)
    shared = {"stage": "rl", "example": "e", "question": "<image>?", "text": "so", "answer": "A"}
    return [
        {
            **shared,
            "order": order,
            "images": [f"images/{10 * (k + 1)}.webp" for k in order],
            "reward": 0.5,
            "rewards": {"accuracy": 1.0, "judge": None},
        }
        for order in ([0, 1, 2], [2, 1, 0])
    ]


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path, services: dict[str, Service]) -> None:
    root = tmp_path / "first"
    for again_from in (None, 4):
        one = trackers(root, "wandb", "trackio")
        one.start(again_from)
        one.log({"loss": 1.5}, 4)
        one.finish()
    wandb, trackio = (services[name].began for name in ("wandb", "trackio"))
    assert [o["id"] for o in wandb] == [
        json.loads((root / "trackers.json").read_text())["wandb"]
    ] * 2
    assert [o["resume"] for o in wandb] == ["allow", "allow"]
    assert [(o["name"], o["resume"]) for o in trackio] == [("first", "never"), ("first", "allow")]
    for options in (*wandb, *trackio):
        assert (options["project"], options["name"], options["group"]) == ("perl-rl", "first", None)
        assert options["config"]["run"]["trackers"] == ("wandb", "trackio")
    for service in services.values():
        assert service.logged == [({"loss": 1.5}, 4)] * 2 and service.finished == 2
    # A run that begins anew in the same folder, or another one, is another run.
    trackers(root, "wandb").start()
    trackers(tmp_path / "second", "wandb").start(0)
    assert len({o["id"] for o in wandb}) == 3


def test_names_by_config_environment_and_folder(
    tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed is a run of its own in the group of its recipe's."""
    for number, (run, variables, wanted) in enumerate(
        (
            ({}, {}, ("perl-rl", "demo-seed-7", "demo")),
            ({}, {"PROJECT": "team", "NAME": "n", "RUN_ID": "id"}, ("team", "n-seed-7", "n")),
            ({"project": "p", "name": "m"}, {"PROJECT": "t"}, ("p", "m-seed-7", "m")),
        )
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"WANDB_{name}", value)
            trackers(tmp_path / str(number) / "demo" / "seed-7", "wandb", **run).start()
        options = services["wandb"].began[-1]
        assert tuple(options[key] for key in ("project", "name", "group")) == wanted
        assert (options["id"] == "id") == ("RUN_ID" in variables)


def test_tables_have_all_pictures_in_the_order_shown(
    tmp_path: Path, services: dict[str, Service]
) -> None:
    one = trackers(tmp_path, "wandb", "trackio")
    one.start()
    one.show(rows(tmp_path), 7)
    one.show([], 8)
    for service in services.values():
        (((name, table),), step), *more = [(list(v.items()), s) for v, s in service.logged]
        assert (name, step, more) == ("rl/rollouts", 7, [])
        assert [row["images"] for row in table] == [
            ["slot 1: 10", "slot 2: 20", "slot 3: 30"],
            ["slot 1: 30", "slot 2: 20", "slot 3: 10"],
        ]
        assert {k: v for k, v in table[1].items() if k != "images"} == {
            **{"example": "e", "order": "[2, 1, 0]", "question": "<image>?", "answer": "A"},
            **{"text": "so", "reward": 0.5, "reward/accuracy": 1.0, "reward/judge": None},
        }


def test_tensorboard_forgets_what_is_written_again(tmp_path: Path) -> None:
    """A run that was killed behind step 5, with a checkpoint of step 3: no step twice, and its values of the second time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for again_from, steps, value in ((None, range(1, 6), 1.0), (4, range(4, 7), 2.0)):
        one = trackers(tmp_path, "tensorboard", project="team")
        one.start(again_from)
        for step in steps:
            one.log({"rl/loss": value}, step)
            one.show(rows(tmp_path)[:1], step)
        one.finish()
    found = EventAccumulator(str(tmp_path / "tensorboard" / "team"), {"images": 0, "tensors": 0})
    found.Reload()
    scalars = [(e.step, e.value) for e in found.Scalars("rl/loss")]
    assert scalars == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    strips = found.Images("rl_rollouts/01")
    assert [strip.step for strip in strips] == [1, 2, 3, 4, 5, 6]
    with Image.open(io.BytesIO(strips[0].encoded_image_string)) as strip:
        # Three pictures of one height, the second twice as wide, with white between them.
        assert strip.size == (4 * 224 + 2 * 4, 224)
        at = [strip.convert("L").getpixel((x, 100)) for x in (100, 226, 400, 678, 800)]
    assert at == pytest.approx([10, 255, 20, 255, 30], abs=3)
    (text,) = {e.tensor_proto.string_val[0] for e in found.Tensors("rl_rollouts/01/text_summary")}
    assert b"**order** [0, 1, 2]" in text and b"**text** so" in text


def test_what_trackers_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/b", "..", "a%", "x" * 129):
        config = Config(run=RunConfig(project=name))
        with refused("run.project", repr(name)):
            usable_trackers(config)
        assert usable_trackers(replace(config, run=replace(config.run, trackers=()))) == []
    assert project_of(Config()) == "perl-rl"

    def init(**_: Any) -> None:
        raise RuntimeError("no login\nhere")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with refused("run.trackers", "wandb", "no login", "WANDB_MODE=offline"):
        trackers(tmp_path, "wandb").start()
