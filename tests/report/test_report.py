"""The report of finished, stopped, damaged and empty runs, made from a run folder alone."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from perl.report.metrics import curve_of, headline, read_records, read_run, smoothed
from perl.report.page import write_report
from perl.report.rollouts import MAX_PER_GROUP, MAX_ROLLOUTS
from perl.types import UserError

SCRIPT = "<script>alert('x')</script>"


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_row(step: int, steps: int, rng: random.Random) -> dict:
    gone = step / steps
    accuracy = min(1.0, 0.6 + 0.32 * gone + rng.gauss(0, 0.04))
    kept = rng.randint(8, 14)
    return {
        "stage": "rl", "step": step, "reward/mean": 0.9 * accuracy + 0.1, "reward/accuracy": accuracy,
        "reward/format": min(1.0, 0.95 + gone / 20), "consistency": min(1.0, accuracy**2 + rng.gauss(0, 0.03)),
        "length/mean": 14 - 3 * gone + rng.gauss(0, 0.3), "length/truncated": max(0, rng.gauss(0.01, 0.01)),
        "entropy": 0.5 * math.exp(-2 * gone) + abs(rng.gauss(0, 0.02)), "kl": 0.04 * gone + abs(rng.gauss(0, 0.002)),
        "clip_fraction": abs(rng.gauss(0.002, 0.001)), "grad_norm": abs(rng.gauss(0.8, 0.2)), "lr": 1e-4,
        "groups/seen": 16, "groups/kept": kept, "groups/zero_variance": 16 - kept, "groups/tries": 1,
        "time/rollout": 1.9, "time/reward": 0.02, "time/pack": 0.05, "time/logprobs": 0.3, "time/update": 1.1,
        "time/step": 3.5, "time/elapsed": 30 + 3.5 * step, "throughput/tokens_per_second": rng.gauss(2100, 60),
        "packing/token_sharing": rng.gauss(2.4, 0.1), "packing/image_sharing": rng.gauss(16, 0.1),
        "memory/peak_rss_bytes": 1_400_000_000,
    }  # fmt: skip


def evaluation(step: int, at: str, accuracy: float) -> dict:
    numbers = {"accuracy": accuracy, "greedy": accuracy + 0.03, "consistency": accuracy**2}
    return {"stage": "evaluate", "step": step, "at": at, **numbers, "examples": 100,
            "by_task": {"which": numbers, "odd": numbers}}  # fmt: skip


def rollout_rows(steps: int) -> list[dict]:
    question = "A <image> B <image> C <image> which image shows three ?"
    rows = []
    for step in range(10, steps + 1, 10):
        for e in range(2):
            for order, answer in (([0, 1, 2], "B"), ([2, 0, 1], "C")):
                for k in range(3):
                    said = answer if k else "A"
                    text = f"<think> {'image one shows a seven . ' * (40 if k == 2 else 2)}</think> \\boxed{{ {said} }}"
                    rows.append({
                        "stage": "rl", "step": step, "example": f"digits-train-which-{e:06d}", "task": "which",
                        "order": order, "images": [f"images/{o}.png" for o in order], "question": question,
                        "answer": answer, "text": text if k else f"{SCRIPT} \\boxed{{ A }}",
                        "reward": 0.1 + 0.9 * (said == answer), "advantage": 0.7 if said == answer else -1.4,
                        "rewards": {"accuracy": float(said == answer), "format": 0.5 if k else 1.0},
                    })  # fmt: skip
    return rows


def make_run(folder: Path, *, steps: int = 60, seed: int = 0, digits: bool = False) -> Path:
    """A run folder as the trainer leaves it, with `steps` RL steps after a cold start."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        image = Image.new("L", (8, 8), 80 * i)
        if digits:
            from sklearn.datasets import load_digits

            image = Image.fromarray((load_digits().images[i + 1] * 15).astype("uint8"))
        image.resize((56, 56), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
    (folder / "config.toml").write_text('[run]\ndir = "runs/digits"\n\n[train]\nsteps = 60\n')
    cold = [{"stage": "cold_start", "step": s, "loss": 2.5 * math.exp(-s / 25) + abs(rng.gauss(0.1, 0.05)),
             "time/step": 0.2, "time/elapsed": 0.2 * s} for s in range(1, 101)]  # fmt: skip
    write_jsonl(folder / "metrics.jsonl", [
        *cold,
        evaluation(0, "before", 0.6 + rng.gauss(0, 0.01)),
        *(rl_row(s, steps, rng) for s in range(1, steps + 1)),
        evaluation(steps, "after", 0.92 + rng.gauss(0, 0.01)),
    ])  # fmt: skip
    write_jsonl(folder / "rollouts.jsonl", rollout_rows(steps))
    (folder / "summary.json").write_text(json.dumps({
        "accuracy_before": 0.61, "accuracy_after": 0.93, "greedy_before": 0.64, "greedy_after": 0.95,
        "consistency_before": 0.37, "consistency_after": 0.85, "seconds": 312.4 + seed, "peak_rss_bytes": 1.5e9,
        "seconds_by_stage": {"cold_start": 20.0, "rollout": 140.2, "update": 90.0, "evaluate": 40.0},
        "model": "tiny-qwen2.5-vl", "parameters": 1_234_567, "versions": {"torch": "2.13.0"},
    }))  # fmt: skip
    return folder


class Page(HTMLParser):
    """What the tests ask of a page: its tags, its attributes, its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def test_finished_run(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "digits"))
    assert path == tmp_path / "digits" / "report.html"
    page = Page(path)
    plots = {p.stem for p in (tmp_path / "digits" / "plots").glob("*.png")}
    assert plots == {
        "curve", "reward", "accuracy", "consistency", "length", "truncated", "entropy", "kl",
        "clip_fraction", "grad_norm", "groups", "time", "throughput", "sharing", "cold_start",
    }  # fmt: skip
    with Image.open(tmp_path / "digits" / "plots" / "curve.png") as curve:
        assert curve.width >= 1200
    for image in page.images():
        assert (image["src"] or "").startswith("data:image/") and image["alt"]
    assert not [a for _, a in page.tags if "href" in a] and "://" not in page.source
    for words in ("61.0 %", "93.0 %", "+32.0 points", "5 min 12 s", "1.4 GiB", "1.23 M parameters"):
        assert words in page.text
    assert "60 of 72 rollouts" in page.text and "Good to know" not in page.text


def test_model_text_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    rows = rollout_rows(10)
    rows[1] |= {"example": SCRIPT, "answer": SCRIPT, "question": SCRIPT, "task": f'"{SCRIPT}',
                "text": f'{SCRIPT}\ud800 " onerror="x', "rewards": {SCRIPT: 1.0},
                "images": ["../../secret.png", f'"><{SCRIPT}.png']}  # fmt: skip
    write_jsonl(run / "rollouts.jsonl", rows)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    page = Page(write_report(run))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert SCRIPT in page.text
    assert "2 images of rollouts cannot be read" in page.text


def test_rollouts_are_grouped_by_example_and_order(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", steps=10)))
    assert page.text.count("digits-train-which-000001") == 1
    assert page.text.count("Image order 1 2 3") == page.text.count("Image order 3 1 2") == 2
    alts = [image["alt"] for image in page.images() if "slot" in (image["alt"] or "")]
    assert alts[3:6] == [
        f"Image {o} of the example, shown in slot {s}" for s, o in ((1, 3), (2, 1), (3, 2))
    ]


def test_many_long_rollouts_stay_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    rows = [row | {"text": "w " * 50_000, "example": f"e{i // 30}"}
            for i, row in enumerate(rollout_rows(10) * 50)]  # fmt: skip
    write_jsonl(run / "rollouts.jsonl", rows)
    page = Page(write_report(run))
    assert len(page.source) < 4_000_000
    assert f"{MAX_ROLLOUTS} of {len(rows)} rollouts" in page.text
    assert f"{30 - MAX_PER_GROUP} more in" in page.text and "more characters" in page.text


def test_seeds_give_mean_and_range(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"seed-{seed}", steps=30, seed=seed)
    (tmp_path / "seed-2" / "summary.json").unlink()
    (tmp_path / "summary.json").write_text(json.dumps({"seeds": [0, 1, 2], "model": "tiny"}))
    page = Page(write_report(tmp_path))
    assert (tmp_path / "plots" / "curve.png").exists()
    assert "3 seeds" in page.text and "seed 2" in page.text
    assert "seed-2: The run has not finished" in page.text
    after = [headline(read_run(tmp_path / f"seed-{seed}"))["accuracy_after"] for seed in range(3)]
    assert f"seeds {100 * min(after):.1f} to {100 * max(after):.1f} %" in page.text
    assert f"{100 * sum(after) / 3:.1f} %" in page.text


def test_seeds_of_different_length_are_said(tmp_path: Path) -> None:
    make_run(tmp_path / "seed-0", steps=12)
    make_run(tmp_path / "seed-1", steps=4)
    page = Page(write_report(tmp_path))
    assert "The seeds stand at different steps, 4 to 12" in page.text
    alt = next(i["alt"] or "" for i in page.images() if "Policy entropy" in (i["alt"] or ""))
    assert alt.endswith("at step 4.")


@pytest.mark.parametrize("left", ["nothing", "config", "cold start", "no rollouts", "one step"])
def test_stopped_runs_say_what_is_missing(tmp_path: Path, left: str) -> None:
    if left != "nothing":
        make_run(tmp_path / "run")
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "summary.json").unlink(missing_ok=True)
    if left != "no rollouts":
        (run / "rollouts.jsonl").unlink(missing_ok=True)
    rows = read_records(run / "metrics.jsonl", [])
    keep = {"cold start": rows[:100], "no rollouts": rows, "one step": rows[100:102]}.get(left, [])
    write_jsonl(run / "metrics.jsonl", keep)
    page = Page(write_report(run))
    assert "The run has not finished" in page.text
    assert ("No metrics recorded" in page.text) == (left in ("nothing", "config"))
    assert ("No RL step recorded" in page.text) == (left == "cold start")
    assert ("No rollouts kept" in page.text) == (left != "no rollouts")
    assert (run / "plots" / "cold_start.png").exists() == (left in ("cold start", "no rollouts"))


def test_damaged_files_and_values_never_fail(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[50:52] = ['{"stage": "cold_', "[1, 2]"]
    odd = {"stage": "rl", "step": 21, "kl": float("nan"), "entropy": "high", "reward/mean": 10**400,
           "reward/accuracy": [1], "groups/kept": None, "time/step": True, "new/metric": {}}  # fmt: skip
    worse = {"stage": "evaluate", "step": None, "at": ["x"], "by_task": [1]}
    lines += [json.dumps(odd), json.dumps(worse), '{"stage": "rl", "step": 22, "kl"']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    rows = [
        {},
        {"order": 3, "images": "x", "text": None, "rewards": [1]},
        {"order": [None], "images": [{}]},
    ]
    write_jsonl(run / "rollouts.jsonl", rows)
    (run / "images" / "0.png").write_bytes(b"no picture")
    (run / "summary.json").write_text("{")
    page = Page(write_report(run))
    assert "metrics.jsonl: 2 damaged lines left out" in page.text
    assert "left out there: kl" in page.text
    assert "summary.json cannot be read" in page.text
    assert curve_of(read_run(run).rl, "step")[21] == 21


def test_headline_comes_from_metrics_without_a_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    (run / "summary.json").unlink()
    found = headline(read_run(run))
    assert found["seconds"] == 100.0 and found["peak_rss_bytes"] == 1_400_000_000
    assert found["accuracy_after"] > found["accuracy_before"]


def test_smoothing_is_centred() -> None:
    line = {float(i): 2.0 * i for i in range(40)}
    assert [smoothed(line)[i] for i in (0.0, 1.0, 20.0, 39.0)] == [2.0, 3.0, 40.0, 76.0]


def test_a_wrong_folder_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
