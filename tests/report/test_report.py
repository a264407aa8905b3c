"""The report of finished, stopped, damaged and empty runs, made from a run folder alone."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.report.metrics import RunLog, curve_of, headline, read_records, read_run
from perl.report.page import duration, size, write_report
from perl.report.rollouts import MAX_PER_GROUP, MAX_ROLLOUTS, rollout_groups
from tests.messages import refused, tells

SCRIPT = "<script>alert('x')</script>"


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_row(step: int, steps: int) -> dict:
    gone = step / steps
    return {
        "stage": "rl", "step": step, "reward/mean": 0.64 + 0.3 * gone, "reward/accuracy": 0.6 + 0.32 * gone,
        "reward/format": 0.95 + gone / 20, "consistency": (0.6 + 0.32 * gone) ** 2, "length/mean": 14 - 3 * gone,
        "length/truncated": 0.01, "entropy": 0.5 * math.exp(-2 * gone), "kl": 0.04 * gone, "clip_fraction": 0.002,
        "grad_norm": 0.8, "lr": 1e-4, "groups/seen": 16, "groups/kept": 12, "groups/zero_variance": 4,
        "groups/tries": 1, "time/rollout": 1.9, "time/reward": 0.02, "time/pack": 0.05, "time/logprobs": 0.3,
        "time/update": 1.1, "time/step": 3.5, "time/elapsed": 30 + 3.5 * step, "throughput/tokens_per_second": 2100,
        "packing/token_sharing": 2.4, "packing/image_sharing": 16.1, "memory/peak_rss_bytes": 1_400_000_000,
        "mfu/rollout": 0.02, "mfu/step": 0.125, "memory/rollout/rss_bytes": 3 << 28,
    }  # fmt: skip


def evaluation(step: int, at: str, accuracy: float) -> dict:
    numbers = {"accuracy": accuracy, "greedy": accuracy + 0.03, "consistency": accuracy**2}
    odd = {"accuracy": accuracy / 2, "greedy": accuracy / 4}
    return {"stage": "evaluate", "step": step, "at": at, **numbers, "examples": 100,
            "by_task": {"which": numbers, "odd": odd}}  # fmt: skip


def rollout_rows(steps: int) -> list[dict]:
    """Every ten steps three rollouts of each of two examples in each of two orders, the first one wrong."""
    question = "A <image> B <image> C <image> which image shows three ?"
    rows = []
    orders = (([0, 1, 2], "B"), ([2, 0, 1], "C"))
    for step, e, (order, answer), k in product(
        range(10, steps + 1, 10), range(2), orders, range(3)
    ):
        thought = f"<think> {'image one shows a seven . ' * (40 if k == 2 else 2)}</think>"
        rows.append({
            "stage": "rl", "step": step, "example": f"digits-train-which-{e:06d}", "task": "which", "order": order,
            "images": [f"images/{o}.png" for o in order], "question": question, "answer": answer,
            "text": f"{thought} \\boxed{{ {answer} }}" if k else f"{SCRIPT} \\boxed{{ A }}",
            "reward": 1.0 if k else 0.1, "advantage": 0.7 if k else -1.4,
            "rewards": {"accuracy": float(k > 0), "format": 0.5 if k else 1.0},
        })  # fmt: skip
    return rows


def make_run(folder: Path, *, steps: int = 60, seed: int = 0) -> Path:
    """A run folder as the trainer leaves it, with `steps` RL steps after a cold start."""
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("L", (56, 56), 80 * i).save(folder / "images" / f"{i}.png")
    (folder / "config.toml").write_text('[run]\ndir = "runs/digits"\n\n[train]\nsteps = 60\n')
    cold = [{"stage": "cold_start", "step": s, "loss": 2.5 * math.exp(-s / 25), "time/step": 0.2,
             "time/elapsed": 0.2 * s} for s in range(1, 101)]  # fmt: skip
    rl = [rl_row(s, steps) for s in range(1, steps + 1)]
    before, after = evaluation(0, "before", 0.6), evaluation(steps, "after", 0.92 + seed / 100)
    write_jsonl(folder / "metrics.jsonl", [*cold, before, *rl, after])
    write_jsonl(folder / "rollouts.jsonl", rollout_rows(steps))
    (folder / "summary.json").write_text(json.dumps({
        "accuracy_before": 0.61, "accuracy_after": 0.93, "greedy_before": 0.64, "greedy_after": 0.95,
        "consistency_before": 0.37, "consistency_after": 0.85, "seconds": 312.4 + seed, "peak_rss_bytes": 1.5e9,
        "seconds_by_stage": {"cold_start": 20.0, "rollout": 140.2, "update": 90.0, "evaluate": 40.0},
        "model": "tiny-qwen2.5-vl", "parameters": 1_234_567, "processes": 2, "weights": "in shards over 2 processes", "versions": {"torch": "2.13.0"},
    }))  # fmt: skip
    return folder


class Page(HTMLParser):
    """What the tests ask of a page: its tags, its attributes, its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        """Cells of every row of every table."""
        self.in_cell = False
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def row(self, name: str) -> list[str]:
        """The cells behind this one."""
        return next(cells[1:] for cells in self.rows if cells and cells[0] == name)

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture(autouse=True)
def _pictures_are_empty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """But for a test that looks at them: what they show is in test_plots.py."""
    if request.node.name != "test_finished_run":
        figure = "matplotlib.figure.Figure.savefig"
        monkeypatch.setattr(figure, lambda self, path, **_: path.touch())


def test_finished_run(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "digits"))
    assert path == tmp_path / "digits" / "report.html"
    page = Page(path)
    plots = {p.stem for p in (tmp_path / "digits" / "plots").glob("*.png")}
    assert plots == {
        "curve", "reward", "accuracy", "consistency", "length", "truncated", "entropy", "kl",
        "clip_fraction", "grad_norm", "groups", "time", "throughput", "sharing", "cold_start", "mfu",
    }  # fmt: skip
    with Image.open(tmp_path / "digits" / "plots" / "curve.png") as curve:
        assert curve.width >= 1200
    for image in page.images():
        assert (image["src"] or "").startswith("data:image/") and image["alt"]
    assert not [a for _, a in page.tags if "href" in a] and "://" not in page.source
    for label, *words in (
        ("Accuracy, sampled, held out", "61.0 %", "93.0 %", "+32.0 points"),
        ("Accuracy, greedy, held out", "64.0 %", "95.0 %", "+31.0 points"),
        ("Consistency, held out", "37.0 %", "85.0 %", "+48.0 points"),
        ("Time", "5 min 12 s"),
        ("Peak memory", "1.4 GiB"),
        ("RL steps", "60", "100"),  # Behind as many cold-start steps.
    ):
        tells(page.text.partition(f" {label} ")[2][:60], *words)
    tells(page.text, "1.23 M")
    assert "weights in shards over 2 processes" in page.text
    # Of the last evaluations, before and after of each measure; 0.6 and 0.92 of accuracy.
    assert page.row("which") == ["60.0 %", "92.0 %", "63.0 %", "95.0 %", "36.0 %", "84.6 %"]
    assert page.row("odd") == ["30.0 %", "46.0 %", "15.0 %", "23.0 %", "—", "—"]
    assert page.row("rollout") == ["2 min 20 s", "48.3 %", "768 MiB", "2.0 %"]
    assert page.row("cold start") == ["20.0 s", "6.9 %", "—", "—"]
    assert page.row("all") == ["4 min 50 s", "100.0 %", "—", "12.5 %"]
    assert "60 of 72 rollouts" in page.text and "Good to know" not in page.text
    # Grouped by example and step, and there by order; the newest group comes first.
    assert page.text.count("digits-train-which-000001") == 5
    assert page.text.count("Image order 1 2 3") == page.text.count("Image order 3 1 2") == 10
    slots = [image for image in page.images() if "slot" in (image["alt"] or "")][3:6]
    assert [re.findall(r"\d", image["alt"] or "") for image in slots] == [
        [str(o), str(s)] for s, o in ((1, 3), (2, 1), (3, 2))
    ]
    assert [grey(image["src"] or "") for image in slots] == pytest.approx([160, 0, 80], abs=2)


def grey(uri: str) -> int:
    """Of a picture within a page."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.convert("L").getpixel((9, 9))


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
    tells(page.text, "2 images")


def test_many_long_rollouts_stay_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    rows = [row | {"text": "w " * 50_000, "example": f"e{i // 30}"}
            for i, row in enumerate(rollout_rows(10) * 50)]  # fmt: skip
    write_jsonl(run / "rollouts.jsonl", rows)
    page = Page(write_report(run))
    assert len(page.source) < 4_000_000
    assert f"{MAX_ROLLOUTS} of {len(rows)} rollouts" in page.text
    assert f"{30 - MAX_PER_GROUP} more in" in page.text and "more characters" in page.text


def test_seeds_give_mean_and_range_and_may_differ_in_length(tmp_path: Path) -> None:
    for seed, steps in enumerate((12, 12, 4)):
        make_run(tmp_path / f"seed-{seed}", steps=steps, seed=seed)
    (tmp_path / "seed-2" / "summary.json").unlink()
    (tmp_path / "summary.json").write_text(json.dumps({"seeds": [0, 1, 2], "model": "tiny"}))
    page = Page(write_report(tmp_path))
    assert (tmp_path / "plots" / "curve.png").exists()
    tells(page.text, "3 seeds", "seed-2: The")
    # By the summaries, without one by the metrics.
    finished = ["61.0 %", "93.0 %", "64.0 %", "95.0 %", "37.0 %", "85.0 %"]
    assert page.row("seed 0") == [*finished, "5 min 12 s", "1.4 GiB"]
    assert page.row("seed 1") == [*finished, "5 min 13 s", "1.4 GiB"]
    stopped = ["60.0 %", "94.0 %", "63.0 %", "97.0 %", "36.0 %", "88.4 %"]
    assert page.row("seed 2") == [*stopped, "44.0 s", "1.3 GiB"]
    means = ["60.7 %", "93.3 %", "63.7 %", "95.7 %", "36.7 %", "86.1 %"]
    assert page.row("mean") == [*means, "3 min 43 s", "1.4 GiB"]
    ranges = ["60.0 to 61.0 %", "93.0 to 94.0 %", "63.0 to 64.0 %", "95.0 to 97.0 %"]
    ranges += ["36.0 to 37.0 %", "85.0 to 88.4 %", "44.0 s to 5 min 13 s", "1.3 to 1.4 GiB"]
    assert page.row("range") == ranges
    assert page.row("which")[:2] == ["60.0 %", "93.0 %"]  # 92, 93 and 94.
    tells(page.text.partition("Accuracy, sampled, held out")[2], "93.0 to 94.0 %", "+32.7 points")
    tells(page.text, "4 to 12")
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
    assert "summary.json" in page.text
    assert ("No metrics" in page.text) == (left in ("nothing", "config"))
    assert ("No RL" in page.text) == (left == "cold start")
    assert ("No rollouts" in page.text) == (left != "no rollouts")
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
    odd = [
        {"order": 3, "images": "x", "text": None, "rewards": [1]},
        {"order": [None], "images": [{}]},
    ]
    write_jsonl(run / "rollouts.jsonl", [{}, *odd])
    (run / "images" / "0.png").write_bytes(b"no picture")
    (run / "summary.json").write_text("{")
    page = Page(write_report(run))
    tells(page.text, "metrics.jsonl: 2 damaged", "there: kl", "summary.json cannot")
    assert curve_of(read_run(run).rl, "step")[21] == 21
    found = headline(read_run(run))  # From the metrics.
    assert found["seconds"] == 100.0 and found["peak_rss_bytes"] == 1_400_000_000
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.6, 0.92)


def log(folder: Path, rows: list[dict]) -> RunLog:
    folder.mkdir()
    write_jsonl(folder / "rollouts.jsonl", rows)
    return RunLog(folder.name, folder)


def shown(groups: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[str]]]:
    """Of each group its title, the mean reward, and the texts that stand in it."""
    for group in groups:
        texts = [r["text"] for order in group["orders"] for r in order["rollouts"]]
        yield group["title"], group["reward"], texts


def test_rollouts_of_an_example_and_step_are_a_group_the_newest_first(tmp_path: Path) -> None:
    rows = [
        {"stage": stage, "step": step, "example": name, "order": order, "reward": r, "text": text}
        for stage, step, name, order, r, text in (
            ("rl", 2, "e", [0, 1], 1, "a"), ("rl", 1, "e", [0, 1], 0.5, "b"), ("rl", 2, "e", [1, 0], 0, "c"),
            ("rl", 2, "f", [0, 1], None, "d"), ("evaluate", 3, "e", [0, 1], 0, "g"), ("rl", 2, "e", [0, 1], 0.4, "h"),
        )
    ]  # fmt: skip
    groups, count, total = rollout_groups([log(tmp_path / "run", rows)], [])
    assert (count, total) == (6, 6)
    assert list(shown(groups)) == [
        ("Evaluation, step 3", "0.00", ["g"]),
        ("RL, step 2", "unscored", ["d"]),
        ("RL, step 2", "0.47", ["a", "h", "c"]),  # 1.4 / 3, by order.
        ("RL, step 1", "0.50", ["b"]),
    ]
    assert [order["order"] for order in groups[2]["orders"]] == ["1 2", "2 1"]
    # Two runs with the same example at the same step are apart.
    pair = [log(tmp_path / name, rows[:1]) for name in ("seed-0", "seed-1")]
    groups, count, _ = rollout_groups(pair, [])
    assert count == 2 and [group["where"] for group in groups] == [["seed-1", "e"], ["seed-0", "e"]]


def test_of_many_rollouts_some_of_each_order_are_shown(tmp_path: Path) -> None:
    """All count in the mean; groups are spread over the run, the first and the last among them."""
    rows = [
        {"stage": "rl", "step": step, "example": "e", "order": [k // 20], "reward": k % 20 // 10, "text": str(k)}
        for step in range(1, 12)
        for k in range(40)
    ]  # fmt: skip
    groups, count, total = rollout_groups([log(tmp_path / "run", rows)], [])
    assert (count, total) == (60, 440)
    assert [title for title, *_ in shown(groups)] == [f"RL, step {s}" for s in (11, 9, 6, 3, 1)]
    for _, reward, texts in shown(groups):
        assert reward == "0.50" and texts == [str(k) for k in (*range(6), *range(20, 26))]
    assert {(group["count"], group["hidden"]) for group in groups} == {(40, 28)}


def test_a_rollout_shows_its_worth(tmp_path: Path) -> None:
    row = {"reward": 0.125, "advantage": -0.5, "text": "t", "answer": "B", "order": [1, 0]}
    row |= {"rewards": {"accuracy": 1.0, "format": 0.5, "length": 0, "judge": None}}
    row |= {"question": "A <image> B <image> which ?", "stage": "rl", "step": 1}
    ((order,),) = (g["orders"] for g in rollout_groups([log(tmp_path / "run", [row])], [])[0])
    (found,) = order["rollouts"]
    assert (order["answer"], found["reward"], found["advantage"]) == ("B", "0.125", "-0.50")
    badges = [(b["name"], b["value"], b["kind"]) for b in found["badges"]]
    assert badges == [("accuracy", "1", "good"), ("format", "0.5", "part"), ("length", "0", "bad"), ("judge", "unscored", "none")]  # fmt: skip
    assert order["question"] == [("text", "A "), ("slot", "1"), ("text", " B "), ("slot", "2"), ("text", " which ?")]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.44, "8.4 s"), (59.96, "60.0 s"), (245, "4 min 05 s"), (3720, "1 h 02 min")]
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes() -> None:
    assert [size(n * 2**20) for n in (512, 1023, 1434)] == ["512 MiB", "1023 MiB", "1.4 GiB"]


def test_a_wrong_folder_is_the_users_error(tmp_path: Path) -> None:
    with refused(tmp_path / "nowhere", "train"):
        write_report(tmp_path / "nowhere")


def test_what_is_zero_throughout_is_said_where_it_would_be_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    lines = [rl_row(s, 4) | {"kl": 0.0} for s in range(1, 5)]
    write_jsonl(run / "metrics.jsonl", [evaluation(0, "before", 0.6), *lines])
    page = Page(write_report(run))
    assert page.text.index("Along the way") < page.text.index("KL to the reference model")
    assert not (run / "plots" / "kl.png").exists()
