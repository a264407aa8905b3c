"""A part of the training data that is held out is measured on and never trained on, whatever the stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from perl.config import Config
from perl.data.dataset import load_examples
from perl.data.streams import Drawn, ExampleStream
from perl.recipe import plan
from tests.command_line import json_lines
from tests.messages import refused
from tests.training.two_tokens import config_of, session_of, stand_in, train_in

STAGES = """
data.eval = "split:0.25"
data.mix = ["{folder}/data.jsonl*2", "{folder}/more.jsonl"]
eval.examples = 9
filter.replay = 1
resample = {{ rollouts = 2, histogram = "uniform", size = 12 }}
cold_start.steps = 1
train.steps = 1
stages = [
    {{ name = "warm", kind = "cold_start" }},
    {{ name = "sift", kind = "filter" }},
    {{ name = "easy", kind = "rl" }},
    {{ name = "other", kind = "rl", data = {{ train = "{folder}/more.jsonl", mix = [] }} }},
]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Over twenty rows of `data.jsonl` with a picture each, and six other rows of `more.jsonl`."""
    stand_in(monkeypatch)
    config = config_of(tmp_path, STAGES.format(folder=tmp_path))
    rows = []
    for k in range(20):
        Image.new("L", (1, 1), k).save(tmp_path / f"own-{k}.png")
        row = {"id": f"own-{k}", "question": "<image> A ?", "images": [f"own-{k}.png"]}
        rows.append(json.dumps(row | {"answer": "A", "demonstration": "A B B"}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(rows))
    return config


def test_no_stage_draws_what_is_held_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    draw = ExampleStream.draw_one

    def watched(self: ExampleStream, *given: bool) -> Drawn | None:
        out = draw(self, *given)
        drawn.extend([out.example.id] if out else [])
        return out

    monkeypatch.setattr(ExampleStream, "draw_one", watched)
    measured = load_examples(config.data.eval, config.data, "test", 0)
    held = {measured[i].id for i in range(len(measured))}
    assert len(held) == 5
    run = tmp_path / "run"
    summary = train_in(run, config)
    assert drawn and held.isdisjoint(drawn)
    assert {i for i in drawn if i.startswith("more")}
    sifted = [row["id"] for row in json_lines(run / "filtered" / "sift.accuracies.jsonl")]
    assert len(set(sifted)) == 15 and held.isdisjoint(sifted)
    rows = [r for r in json_lines(run / "metrics.jsonl") if r["stage"] == "evaluate"]
    assert [r["at"] for r in rows] == ["before", "after easy", "after"]
    assert {r["examples"] for r in rows} == {5} and summary["reward_after"] is not None


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_goes_on_draws_the_same(config: Config, tmp_path: Path, stage: int) -> None:
    session = session_of(config, tmp_path / "run")
    session.enter_stage(session.stages[stage])
    stream = session.stream()
    stream.draw(7)
    session.progress.streams[session.stage.name] = stream.state_dict()
    assert [d.example.id for d in session.stream().draw(9)] == [
        d.example.id for d in stream.draw(9)
    ]


def test_what_is_held_out_is_the_runs(config: Config, tmp_path: Path) -> None:
    """A stage with other data measures on the same examples."""
    names = [s.config.data.eval for s in plan(config)]
    assert names == ["split:0.25"] * 3 + [f"split:0.25:{tmp_path}/data.jsonl"]
    own = '[[stages]]\nname = "easy"\nkind = "rl"\ndata.eval = "data.jsonl"\n'
    with refused("stage easy", "data.eval = data.jsonl"):
        config_of(tmp_path, 'data.eval = "split:0.1"\n' + own)
    for share in ("0", "1", "x", "", "-0.1"):
        with refused(f"data.eval = split:{share}", "split:0.05", "between 0 and 1"):
            config_of(tmp_path, f'data.eval = "split:{share}"')
