"""The curves of a run's pictures, point by point, as they are when a figure is saved."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from perl.report.metrics import RunLog
from perl.report.plots import Picture, draw_pictures
from perl.report.style import COLOURS

CURVES = {
    "curve": {"accuracy, training": "reward/accuracy", "consistency, training": "consistency"},
    "reward": {"weighted sum": "reward/mean", "accuracy": "reward/accuracy", "form": "reward/form"},
    "accuracy": {"training": "reward/accuracy"},
    "consistency": {"training": "consistency"},
    "length": {"mean": "length/mean"},
    "truncated": {"truncated": "length/truncated"},
    "entropy": {"entropy": "entropy"},
    "kl": {"KL": "kl"},
    "clip_fraction": {"clipped": "clip_fraction"},
    "grad_norm": {"norm": "grad_norm"},
    "throughput": {"throughput": "throughput/tokens_per_second"},
    "mfu": {"step": "mfu/step", "update": "mfu/update"},
    "sharing": {"tokens": "packing/token_sharing", "images": "packing/image_sharing"},
    "cold_start": {"loss": "loss"},
}
POINTS = {
    "curve": {"accuracy, held out": "accuracy", "consistency, held out": "consistency"},
    "accuracy": {"held out, sampled": "accuracy", "held out, greedy": "greedy"},
    "consistency": {"held out": "consistency"},
}
METRICS = sorted({key for lines in CURVES.values() for key in lines.values()})
GROUPS = {"groups/kept": 12, "groups/zero_variance": 3, "groups/seen": 16}


def value(key: str, step: int, seed: int) -> float:
    """Another one for each metric, step and seed."""
    return (1 + METRICS.index(key)) / 50 + step / 1000 + seed / 10_000


def run(seed: int = 0, steps: tuple[int, ...] = (1, 2, 3)) -> RunLog:
    rows = [{"step": s, **{k: value(k, s, seed) for k in METRICS}, **GROUPS} for s in steps]
    rl = [row | {"reward/std": 1.0, "loss": 9.0} for row in rows]
    measured = {"accuracy": 0.5, "greedy": 0.6, "consistency": 0.3}
    evaluations = [
        {"step": s, **{k: v + s / 100 + seed / 10 for k, v in measured.items()}} for s in (0, 3)
    ]
    return RunLog(f"seed-{seed}", Path(), cold_start=rows, rl=rl, evaluations=evaluations)


class Drawn(dict[str, Any]):
    """Figures by the names of their files."""

    def curves(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """The named lines of a figure's first axes."""
        lines = self[name].axes[0].lines
        return {
            line.get_label(): list(zip(*line.get_data(), strict=True))
            for line in lines
            if not line.get_label().startswith("_")
        }

    def texts(self, name: str) -> list[str]:
        return [text.get_text() for text in self[name].axes[0].texts]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What would be saved; the files are empty."""
    figures = Drawn()

    def save(figure: Any, path: Path, **_: Any) -> None:
        figures[path.stem] = figure
        path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    return figures


def draw(folder: Path, *runs: RunLog, **seconds: float) -> dict[str, Picture]:
    pictures, troubles, _ = draw_pictures(runs, seconds, folder)
    assert not [line for line in troubles if "could not" in line]
    return {picture.name: picture for picture in pictures}


def test_each_curve_is_its_metrics(tmp_path: Path, drawn: Drawn) -> None:
    pictures = draw(tmp_path, run(), rollout=1)
    assert drawn.keys() == pictures.keys() == {*CURVES, "groups", "time"}
    for name, curves in CURVES.items():
        wanted = {
            label: [(s, value(key, s, 0)) for s in (1, 2, 3)] for label, key in curves.items()
        }
        for label, key in POINTS.get(name, {}).items():
            first = {"accuracy": 0.5, "greedy": 0.6, "consistency": 0.3}[key]
            wanted[label] = [(0, first), (3, first + 0.03)]
        assert drawn.curves(name) == wanted
    assert drawn.texts("curve") == ["50 %", "53 %", "30 %", "33 %"]
    colours = [to_hex(line.get_color()) for line in drawn["curve"].axes[0].lines]
    blue, vermilion = (colour.lower() for colour in COLOURS[:2])
    assert colours == [blue, vermilion] * 2  # Of a measure alike in training and held out.


def test_a_noisy_curve_is_drawn_as_measured_and_smoothed(tmp_path: Path, drawn: Drawn) -> None:
    rows = [{"step": s, "kl": float(s % 2)} for s in range(9)]
    draw(tmp_path, RunLog("run", Path(), rl=rows))
    faint, strong = drawn["kl"].axes[0].lines
    assert list(faint.get_ydata()) == [0, 1] * 4 + [0]
    # Three values each, two at the ends.
    assert list(strong.get_ydata()) == pytest.approx([1 / 2, *[1 / 3, 2 / 3] * 3, 1 / 3, 1 / 2])
    assert faint.get_alpha() < 1 and strong.get_label() == "KL"


def test_seeds_are_a_mean_and_their_range_as_far_as_all_go(tmp_path: Path, drawn: Drawn) -> None:
    seeds = run(0), run(1), run(5, steps=(1, 2))
    pictures = draw(tmp_path, *seeds)
    axes = drawn["kl"].axes[0]
    # The mean of seeds 0, 1 and 5.
    assert drawn.curves("kl") == {"KL": [(s, pytest.approx(value("kl", s, 2))) for s in (1, 2)]}
    single = [list(line.get_ydata()) for line in axes.lines[:-1]]
    assert single == [[value("kl", s, seed) for s in (1, 2, 3)][:n] for seed, n in ((0, 3), (1, 3), (5, 2))]  # fmt: skip
    band = axes.collections[0].get_paths()[0].vertices
    at = [sorted({y for x, y in band if x == s}) for s in (1, 2)]
    assert at == [[value("kl", s, 0), value("kl", s, 5)] for s in (1, 2)]
    assert "at step 2" in pictures["kl"].alt
    # Whiskers from the lowest to the highest of 0.3, 0.4, 0.8.
    whiskers = next(c for c in drawn["consistency"].axes[0].collections if isinstance(c, LineCollection) and len(c.get_segments()) == 2)  # fmt: skip
    assert [list(map(tuple, s)) for s in whiskers.get_segments()] == [
        [(x, pytest.approx(low)), (x, pytest.approx(low + 0.5))] for x, low in ((0, 0.3), (3, 0.33))
    ]
    assert drawn.curves("consistency")["held out"] == [(0, pytest.approx(0.5)), (3, pytest.approx(0.53))]  # fmt: skip


def test_groups_and_time_are_shares_of_all(tmp_path: Path, drawn: Drawn) -> None:
    seconds = {"rollout": 90.0, "update": 60.0, "cold_start": 30.0, "idle": 0.0}
    pictures = draw(tmp_path, run(), **seconds)
    layers = drawn["groups"].axes[0].collections
    # Twelve kept of sixteen, three of equal rewards, one of neither; one on top of the other.
    assert [c.get_paths()[0].vertices[:, 1].max() for c in layers] == [12, 15, 16]
    assert [c.get_label() for c in layers][:2] == ["trained on", "equal rewards"]
    assert re.findall(r"\d+ %", pictures["groups"].alt) == ["75 %", "19 %", "6 %"]
    bars = drawn["time"].axes[0].patches
    assert [bar.get_width() for bar in bars] == [30, 60, 90]  # Under two minutes: in seconds.
    assert drawn.texts("time") == ["17 %", "33 %", "50 %"]
    assert re.findall(r"(\w+) (\d+) %", pictures["time"].alt) == [("rollout", "50"), ("update", "33"), ("start", "17")]  # fmt: skip
    draw(tmp_path, run(), rollout=7200.0)
    assert [bar.get_width() for bar in drawn["time"].axes[0].patches] == [2]
    assert drawn["time"].axes[0].get_xlabel() == "hours"


def test_an_older_picture_does_not_stay(tmp_path: Path, drawn: Drawn) -> None:
    (tmp_path / "kl.png").touch()
    _, (missing,), _ = draw_pictures([RunLog("run", Path(), rl=[{"step": 1}])], {}, tmp_path)
    assert not list(tmp_path.iterdir()) and "KL to the reference model" in missing


def test_what_is_zero_throughout_is_named_and_not_drawn(tmp_path: Path, drawn: Drawn) -> None:
    """But for measures, the sum of rewards, and faults, of which there should be none."""
    flat = {"kl": 0.0, "reward/form": 0.0, "reward/accuracy": 0.0, "reward/faults/form": 0}
    rows = [{**row, **flat, "reward/mean": 0.0} for row in run().rl]
    pictures, _, zero = draw_pictures([replace(run(), rl=rows)], {}, tmp_path)
    assert drawn.curves("reward") == {"weighted sum": [(1, 0), (2, 0), (3, 0)]}
    assert drawn.curves("accuracy")["training"] == [(1, 0), (2, 0), (3, 0)]
    assert not {"kl", "faults"} & {p.name for p in pictures}
    assert zero == ["Reward: accuracy", "Reward: form", "KL to the reference model"]
    # Where some fail they have a picture of their own.
    rows = [{**row, "reward/faults/a/b.py:f": row["step"] // 2} for row in rows]
    draw(tmp_path, replace(run(), rl=rows))
    assert drawn.curves("faults") == {"a/b.py:f": [(1, 0), (2, 1), (3, 1)]}
    (legend,) = drawn["faults"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/b.py:f"]
    assert list(drawn.curves("reward")) == ["weighted sum"]


def test_parts_of_rewards_have_a_picture_of_their_own(tmp_path: Path, drawn: Drawn) -> None:
    rows = [{**row, "reward/form/length": 90.0, "reward/faults/form": 0} for row in run().rl]
    draw(tmp_path, replace(run(), rl=rows))
    assert drawn.curves("parts") == {"form/length": [(1, 90), (2, 90), (3, 90)]}
    assert list(drawn.curves("reward")) == ["weighted sum", "accuracy", "form"]


def test_what_samples_is_compared_with_what_is_trained_where_they_differ(
    tmp_path: Path, drawn: Drawn
) -> None:
    near, far = ({"rollout/mismatch_mean": 10.0**-k, "rollout_kl": -(10.0**-k)} for k in (5, 2))
    for numbers in (near, far):
        draw(tmp_path, replace(run(), rl=[{**row, **numbers} for row in run().rl]))
        if numbers is near:
            assert "mismatch" not in drawn
    mean, kl = drawn.curves("mismatch").values()
    assert (mean[0], kl[0]) == ((1, 0.01), (1, -0.01))


def test_the_held_out_sum_has_the_colour_of_the_sum(tmp_path: Path, drawn: Drawn) -> None:
    measured = [{**row, "reward": 0.5} for row in run().evaluations]
    draw(tmp_path, replace(run(), evaluations=measured))
    colours = {line.get_label(): line.get_color() for line in drawn["reward"].axes[0].lines}
    assert colours["weighted sum, held out"] == colours["weighted sum"] != colours["form"]


def test_every_reward_has_a_line_of_its_own(tmp_path: Path, drawn: Drawn) -> None:
    names = [f"reward/{letter}" for letter in "abcdefgh"]
    rows = [{**row, **dict.fromkeys(names, 1.0)} for row in run().rl]
    draw(tmp_path, replace(run(), rl=rows))
    lines = drawn["reward"].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 11


def test_groups_that_were_trained_on(tmp_path: Path, drawn: Drawn) -> None:
    """Of ten that were kept eight fit into the batch beside two from before; one more is replayed."""
    more = {"groups/kept": 10, "groups/overflow": 2, "groups/reused": 2, "groups/replayed": 1}
    rows = [{**row, **more} for row in run().rl]
    pictures = draw(tmp_path, replace(run(), rl=rows))
    layers = drawn["groups"].axes[0].collections
    assert [c.get_paths()[0].vertices[:, 1].max() for c in layers] == [8, 10, 13, 16]
    assert [c.get_label() for c in layers][:3] == ["trained on", "over the batch", "equal rewards"]
    layers = drawn["trained"].axes[0].collections
    assert [c.get_paths()[0].vertices[:, 1].max() for c in layers] == [8, 10, 11]
    assert {y for _, y in drawn.curves("trained")["rolled out"]} == {16}
    assert re.findall(r"\d+ %", pictures["trained"].alt) == ["73 %", "18 %", "9 %"]
    assert "trained" not in draw(tmp_path, run())
