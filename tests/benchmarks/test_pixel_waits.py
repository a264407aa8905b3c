"""How long steps wait for pictures is measured of every run, and told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks import pixel_waits
from perl.recipe import load_recipe
from tests.messages import refused


def test_runs_take_turns_and_the_first_step_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        folder, workers = Path(command[-3]), int(command[-1])
        config = load_recipe(command[-5])
        assert (config.train.steps, config.train.examples_per_step) == (3, 2)
        rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
        assert [len(row["images"]) for row in rows] == [3] * 8
        names = [Path(config.data.train).parent / name for name in rows[0]["images"]]
        assert [Image.open(name).size for name in names] == [(40, 40)] * 3
        ran.append(workers)
        steps = [
            {"stage": "rl", "time/step": 10.0, "time/data": data, "time/preprocess": 0.5}
            for data in (9.0, 1.5 - workers / 2, 1.5 - workers / 2)
        ]
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(pixel_waits, "make_tiny_model", lambda *_, **__: None)
    file = tmp_path / "found.json"
    options = ["--images=3", "--side=40", "--questions=2", "--steps=3", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["pixel_waits", *options])
    assert pixel_waits.main() == 0
    assert ran == [0, 2, 0, 2]
    assert [(r["workers"], r["waits"]) for r in json.loads(file.read_text())["rows"]] == [
        (0, 2.0),
        (0, 2.0),
        (2, 1.0),
        (2, 1.0),
    ] * 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1:8:2] for line in lines] == [
        ["0", "10.0", "2.00", "20"],
        ["2", "10.0", "1.00", "10"],
    ]
    failed = SimpleNamespace(returncode=2, stderr="error: data.workers")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with refused("data.workers = 0", "error: data.workers"):
        pixel_waits.main()
