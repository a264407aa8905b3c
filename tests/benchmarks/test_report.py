"""The report on benchmarks: what it says of good and bad figures, of none, and of files that are no results."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from benchmarks.report import __main__ as report
from benchmarks.report.cases import fit, series
from benchmarks.report.pictures import draw
from benchmarks.report.results_file import Results

ROOT = Path(__file__).parents[2]
OPS = ("Linear loss, forward and backward", "Log-probs, forward")
PROVIDERS = {
    # name: (package, times slower than ours, bytes of an element of the logits, bytes beside)
    "PeRL, Triton": ("", 1.0, 0.0, 300 << 20),
    "PeRL, PyTorch": ("", 1.6, 0.0, 400 << 20),
    "PyTorch, eager": ("torch 2.13.0", 2.0, 10.0, 0),
    "PyTorch, torch.compile": ("torch 2.13.0", 0.8, 4.0, 0),
    "PyTorch, F.linear_cross_entropy": ("torch 2.13.0", 4.0, 0.0, 90 << 20),
    "Liger, fused linear GRPO": ("liger-kernel 0.8.5", 1.5, 1.0, 200 << 20),
    "TRL, selective log-softmax": ("trl 1.16.0", 2.6, 12.0, 0),
    "verl, linear cross entropy": ("verl 0.9.1", 1.2, 0.0, 250 << 20),
    "CCE": ("cut-cross-entropy 25.9.3", 1.1, 0.0, 10 << 20),
    "Quack": ("quack-kernels", 0.9, 0.0, 0),
}
SIZES = (1024, 4096, 16384, 65536)
MODELS = ("Qwen3-0.6B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-8B")


def markdown(found: dict[str, Any]) -> str:
    return report.markdown(Results.model_validate(found))


def row(op: str, model: str, n: int, provider: str, **changes: Any) -> dict[str, Any]:
    """Time grows as N; the logits of those who keep them do not fit at the largest size."""
    package, slower, element, beside = PROVIDERS[provider]
    shape = {"model": model, "N": n, "H": 2048, "V": 151_936, "itemsize": 2}
    median = 1.5e-5 * n * slower * (1 + 0.2 * OPS.index(op))
    found = {
        "op": op,
        "case": f"{model}, N = {n}",
        "shape": shape,
        "axis": "N" if model == MODELS[1] else "",
        "provider": provider,
        "package": package,
        "ours": not package,
        "note": "no entropy" if provider == "CCE" else "",
        "status": "timed",
        "reason": "",
        "median": median,
        "turns": [[median] * 3],
        "peak_extra_bytes": int(element * n * shape["V"]) + beside,
        "error": 3e-3,
        "fraction": 0.8 / slower,
    }
    if provider == "Quack":
        found |= {"status": "missing", "reason": "it needs an sm_90 | sm_100 <GPU>"}
    elif element > 9 and n == SIZES[-1]:
        found |= {"status": "out of memory", "reason": "CUDA out of memory. Tried 37 GiB"}
    if found["status"] != "timed":
        for key in ("median", "turns", "peak_extra_bytes", "error", "fraction"):
            del found[key]
    return found | changes


def results(**changes: Any) -> dict[str, Any]:
    """As of a machine that does not exist."""
    sizes = [(MODELS[1], n) for n in SIZES]
    cases = [(OPS[0], model, 8192) for model in MODELS]
    cases += [(op, *size) for op in OPS for size in sizes]
    rows = [row(*case, provider) for case in cases for provider in PROVIDERS]
    machine = {"kind": "cuda", "device": "Invented GPU", "cores": 8, "threads": 4}
    machine |= {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1", "transformers": ""}
    return {
        "schema": 1,
        "date": "2026-11-20",
        "commit": "abc1234+",
        "mode": "full",
        "minutes": 4.25,
        "machine": machine,
        "peaks": {"bytes_per_s": 4.3e12, "flops_per_s": 7.9e14, "dtype": "bfloat16"},
        "rows": rows,
        "steps": {"train_step": train_step(), "trainer": trainer()},
        **changes,
    }


def train_step() -> dict[str, Any]:
    def variant(share: float) -> dict[str, Any]:
        found = {"lm_tokens": int(60_000 * share), "images_encoded": int(144 * share)}
        found |= {"flops": 3.4e11 * share, "seconds": 4.2 * share, "max_rel_grad_diff": 2e-5}
        return {**found, "peak_bytes": int(share * 900 * 2**20), "seconds_by_round": []}

    variants = {"padded": variant(1), "packed": variant(0.9), "shared": variant(0.25)}
    setting = {"model": "tiny", "parameters": 2_000_000, "dtype": "float32", "images": [4, 8]}
    setting |= {"sequences": 24, "budget": 16384, "mean_completion": 511.6, "attention": "sdpa"}
    return {"variants": variants, "ratios": {}, "setting": setting}


def trainer() -> dict[str, Any]:
    def side(seconds: float) -> dict[str, Any]:
        parts = {"generation": 0.7 * seconds, "update": 0.3 * seconds}
        found = {"seconds": seconds, "seconds_by_round": [seconds, 1.1 * seconds], "parts": parts}
        return found | {"lm_tokens": 9000, "images_encoded": 24, "peak_bytes": 2**29}

    return {
        "available": True,
        "setting": {"model": "tiny", "dtype": "float32", "trl": "1.16.0", "images": [4, 8]},
        "trainers": {"trl": side(3.0), "perl": side(1.5)},
        "differences": ["Padding: TRL pads.", "Optimizer: none."],
    }


def cells(text: str, *starts: str) -> list[str]:
    """The cells of the first line of a table, behind headings, that begins with the last of `starts`."""
    lines = iter(text.splitlines())
    for start in starts:
        found = next(line for line in lines if line.startswith(start))
    return [cell.strip() for cell in found.split(" | ")]


def written(folder: Path, found: Any, name: str = "2026-11-20-abc1234+.json") -> Path:
    file = folder / name
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    return file


def test_a_power_law_is_found_with_its_error() -> None:
    exact = fit([(x, 3 * x**1.5) for x in (8, 2, 128, 32)])
    assert exact and (exact.low, exact.high) == (2, 128)
    assert exact.exponent == pytest.approx(1.5) and exact.last == pytest.approx(1.5)
    assert exact.standard_error == pytest.approx(0, abs=1e-6)
    # By hand: log2 y = 0, 1, 4 over log2 x = 0, 2, 4 has slope 1, residuals 1/3, -2/3, 1/3.
    bent = fit([(1, 1), (4, 2), (16, 16)])
    assert bent and bent.exponent == pytest.approx(1) and bent.last == pytest.approx(1.5)
    assert bent.standard_error == pytest.approx((6 / 9 / 8) ** 0.5)
    assert fit([(1, 1), (100, 5)]) is None
    assert fit([(1, 1), (1, 2), (100, 5)]) is None
    assert fit([(10, 1), (20, 2), (39, 4)]) is None


def test_a_line_for_each_series() -> None:
    found = results()
    for r in found["rows"]:
        if r["status"] == "timed" and r["provider"] == "PyTorch, eager":
            r["median"] = r["shape"]["N"] ** 2 * 1e-9
    lines = {(s.op, s.provider): s.line for s in series(Results.model_validate(found).rows)}
    ours = "N from 1024 to 65536: time grows as N^1.00 ± 0.00, N^1.00 at the end"
    assert lines[OPS[0], "PeRL, Triton"] == ours
    assert lines[OPS[1], "PyTorch, eager"].startswith("N from 1024 to 16384: time grows as N^2.00")
    assert not any(provider == "Quack" for _, provider in lines)
    growth = markdown(found).partition("## Growth")[2]
    assert f"- PeRL, Triton: {ours}" in growth and "N^2.00 ± 0.00" in growth


def test_an_axis_of_several_words() -> None:
    rows = [row(OPS[0], MODELS[0], n, "CCE", axis="group size") for n in SIZES]
    for r in rows:
        r["shape"]["group size"] = r["shape"]["N"] // 256
    (found,) = series(Results.model_validate(results(rows=rows)).rows)
    assert found.line.startswith("group size from 4 to 256: time grows as (group size)^1.00")


def test_tables_have_all_rows_the_fastest_first() -> None:
    text = markdown(results())
    case = text.partition(f"{MODELS[1]}, N = 65536")[2].partition("\n\n")[2]
    shape, table = case.split("\n\n")[:2]
    assert shape == "N = 65,536 rows, H = 2,048, V = 151,936, bfloat16 (2 bytes)"
    lines = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines()]
    names = [line[0].removeprefix("| ") for line in lines[2:]]
    assert names == [
        "PyTorch, torch.compile (torch 2.13.0)",
        "**PeRL, Triton**",
        "CCE (cut-cross-entropy 25.9.3)",
        "verl, linear cross entropy (verl 0.9.1)",
        "Liger, fused linear GRPO (liger-kernel 0.8.5)",
        "**PeRL, PyTorch**",
        "PyTorch, F.linear_cross_entropy (torch 2.13.0)",
        "PyTorch, eager (torch 2.13.0)",
        "TRL, selective log-softmax (trl 1.16.0)",
        "Quack (quack-kernels)",
    ]
    assert lines[2][1:6] == ["786", "0.80", "100", "37,984", "3e-03"]
    assert lines[3][1:6] == ["983", "1.00", "80", "300", "3e-03"]
    assert lines[4][-1].startswith("no entropy")
    assert lines[-3][1:6] == ["–"] * 5
    assert lines[-3][6].startswith("out of memory: CUDA out of memory. Tried 37 GiB")
    # What somebody's message holds is neither a column nor a tag.
    assert r"missing: it needs an sm_90 \| sm_100 &lt;GPU>" in lines[-1][6]
    assert {len(line) for line in lines} == {7}


def test_head_and_summary() -> None:
    text = markdown(results())
    assert text.startswith(
        "# Benchmarks on Invented GPU\n\n2026-11-20, commit abc1234 with changes"
    )
    assert "full mode, 4.2 minutes. 8 cores, 4 threads, Python 3.11.7, torch 2.13.0" in text
    assert "transformers" not in text.splitlines()[2]
    assert "copies 4,300 GB/s, large products in bfloat16 790 TFLOP/s" in text
    eager = cells(text, "## In short", "|", f"| **{OPS[0]}**, over PeRL, Triton ")
    assert eager[1:3] == ["PyTorch, eager", "2.0x (2.0 to 2.0)"]
    # (10 bytes an element of the logits) / 300 MiB: at 8192 rows 40; from 1024 to 16384 rows 4.9 to 79.
    assert eager[3:] == ["40x (4.9 to 79)", "7 of 8 cases", "7", "0", "0 |"]
    compiled = cells(text, "## In short", "|                                  ")
    assert compiled[1] == "PyTorch, torch.compile" and compiled[4:] == ["8 cases", "0", "0", "8 |"]
    assert re.search(r"\| +\| Quack +\| +– \| +– \| 0 of 8 cases \| +– \| +– \| +– \|", text)
    assert f"### {OPS[0]}\n\n<details>\n<summary>8 cases</summary>\n\n" in text
    assert "![" not in text


def test_ratios_refer_to_the_first_of_ours_that_was_timed() -> None:
    found = results()
    out = {"status": "out of memory", "median": None}
    for r in found["rows"]:
        if r["provider"] == "PeRL, Triton":
            r |= out
    text = markdown(found)
    assert f"| **{OPS[0]}**, over PeRL, PyTorch " in text
    assert f"- {OPS[0]}, **PeRL, Triton**: out of memory in 8 of 8 cases\n" in text
    assert f"- {OPS[0]}, PyTorch, eager: out of memory in 1 of 8 cases\n" in text
    assert "Quack: missing" not in text
    assert cells(text, "## Cases", "| PyTorch, eager")[2] == "1.25"  # 2.0 / 1.6
    for r in found["rows"]:
        if r["ours"]:
            r |= out
    text = markdown(found)
    assert cells(text, "## Cases", "| PyTorch, eager")[2] == "–"
    assert "0 of 8 cases" in text


def test_a_ratio_shows_its_range_over_turns() -> None:
    ours = row(OPS[0], MODELS[0], 1024, "PeRL, Triton", median=1.0, turns=[[1.0, 1.0], [1.0]])
    peer = row(OPS[0], MODELS[0], 1024, "CCE", median=1.1, turns=[[0.9, 0.9, 9.0], [1.2]])
    found = results(rows=[ours, peer])
    text = markdown(found)
    case = f"#### {MODELS[0]}, N = 1024"
    assert cells(text, case, "| CCE")[2] == "~1.10 (0.90 to 1.20)"
    short = cells(text, "## In short", "| **Linear")[2:]
    assert short == ["1.1x", "0.033x", "1 case", "0", "1", "0 |"]
    peer["turns"] = [[1.1], [1.2]]
    text = markdown(found)
    assert cells(text, case, "| CCE")[2] == "1.10 (1.10 to 1.20)"
    assert cells(text, "## In short", "| **Linear")[5:] == ["1", "0", "0 |"]


def test_memory_without_a_figure_or_of_next_to_nothing() -> None:
    for ours, theirs, said in (
        (1 << 30, 1 << 12, "<0.01x"),
        (0, 1 << 12, "–"),
        (1 << 30, None, "–"),
    ):
        rows = [
            row(OPS[0], MODELS[0], 1024, provider, peak_extra_bytes=held)
            for provider, held in (("PeRL, Triton", ours), ("CCE", theirs))
        ]
        assert cells(markdown(results(rows=rows)), "## In short", "| **Linear")[3] == said


def test_what_a_case_was_measured_on() -> None:
    level = {"level": "sequence", "frozen": True}
    shapes = {
        "frozen head": {"model": "Q / 8", "N": 4096, "itemsize": 4, **level},
        "8 pieces": {"tokens": 1024, "pieces": 8},
    }
    rows = [
        row(OPS[0], MODELS[0], 1024, name, case=case, shape=shape)
        for case, shape in shapes.items()
        for name in ("PeRL, Triton", "CCE")
    ]
    text = markdown(results(rows=rows))
    shape = "N = 4,096 rows, float32 (4 bytes), sequence level, frozen head, head of Q / 8"
    assert f"#### frozen head\n\n{shape}\n\n|" in text
    assert "#### 8 pieces\n\ntokens: 1,024, pieces: 8\n\n|" in text
    words = ("N: rows", "H: hidden size", "V: vocabulary", "*/ 8*", "*sequence level*")
    assert [text.count(word) for word in (*words, "*frozen head*")] == [1] * 6


def test_what_makes_figures_doubtful_is_said_first() -> None:
    found = results()
    busy = "**The machine was busy (load 4.0 on 8 cores): times say little.**"
    for load, said in (([4.0, 4.4], True), ([0.9, 9.0], False)):
        text = markdown(found | {"load": load})
        assert text.startswith(f"# Benchmarks on Invented GPU\n\n{busy}\n\n") == said
        assert ("busy" in text) == said
    text = markdown(found | {"only": "linear or <b>", "interrupted": True})
    doubts = text.partition("\n\n")[2].partition("2026")[0]
    assert (
        "partial run: only what `--only 'linear or &lt;b>'`" in doubts and "interrupted" in doubts
    )
    assert not re.search("partial|interrupted|busy", markdown(found))


def test_few_points_or_a_large_error_are_uncertain() -> None:
    for values, said in (((1, 4, 16, 64), False), ((1, 4, 16), True), ((1, 20, 21, 400), True)):
        sizes = [4**i for i in range(len(values))]
        rows = [
            row(OPS[0], MODELS[1], n, "CCE", median=v) for n, v in zip(sizes, values, strict=True)
        ]
        text = markdown(results(rows=rows)).partition("## Growth\n")[2]
        assert bool(re.search(r"- CCE: .* at the end; uncertain\n", text)) == said


def test_a_size_measured_twice_is_two_cases() -> None:
    """Their rows took turns apart, so a ratio across them would mean little."""
    found = results()
    found["rows"] = [
        row(OPS[0], MODELS[0], 1024, provider, axis=axis, median=median)
        for axis, slow in (("", 1.0), ("N", 3.0))
        for provider, median in (("PeRL, Triton", slow), ("CCE", 2 * slow))
    ]
    found["machine"]["threads"] = 1
    text = markdown(found)
    assert "#### Qwen3-0.6B, N = 1024\n" in text
    again = "#### Qwen3-0.6B, N = 1024 (series over N)"
    assert cells(text, again, "| CCE")[1:3] == ["6,000", "2.00"]
    assert cells(text, "## In short", "| **Linear")[2] == "2.0x (2.0 to 2.0)"
    assert cells(text, "## In short", "| **Linear")[4] == "2 cases"
    assert ", 1 thread, " in text


def test_what_nobody_else_does_is_one_table() -> None:
    found = results()
    alone = {"op": "Packing", "provider": "PeRL", "fraction": None, "error": 0.0}
    found["rows"] = [
        row(OPS[0], MODELS[0], n, "PeRL, Triton", case=f"{n} prompts", median=n * 1e-5, **out)
        | alone
        for n, out in ((64, {}), (256, {}), (1024, {"status": "refused", "reason": "two rows"}))
    ]
    del found["steps"]
    text = markdown(found)
    assert text.count("\n| ---") == 1 and "<details>" not in text
    assert cells(text, "| 256 prompts")[1:] == ["**PeRL**", "2.56", "–", "300", "0", "|"]
    assert cells(text, "| 1024 prompts")[2:] == ["–", "–", "–", "–", "refused: two rows |"]
    assert (
        "## In short\n\nWithout a time, though they can run here:\n\n- Packing, **PeRL**: refused in 1 of 3 cases"
        in text
    )


def test_training_steps() -> None:
    text = markdown(results())
    shared = cells(text, "## A training step", "| **shared")
    assert shared[1:] == ["15,000 (4.0x)", "36 (4.0x)", "1.05 (4.0x)", "225 (4.0x)", "0.0850 (4.0x)", "2e-05 |"]  # fmt: skip
    assert cells(text, "## A step of two", "| seconds")[1:] == ["3.00", "1.50", "2.0x |"]
    assert cells(text, "## A step of two", "| … update")[1:] == ["0.900", "0.450", "|"]
    assert "packed attention ?. Seconds: median of 2 rounds." in text
    short = text.partition("## In short")[2].partition("## Cases")[0]
    link = "](#a-training-step-padded-packed-shared), padded over shared: "
    assert f"{link}seconds 4.0x, memory 4.0x." in short
    assert (
        "](#a-step-of-two-trainers-trl-and-perl), TRL over PeRL: seconds 2.0x "
        "(2.0x to 2.0x by round, median of 2 rounds), memory 1.0x."
    ) in short
    assert "What differs:\n\n- Padding: TRL pads.\n- Optimizer: none." in text

    found = results()
    found["steps"] = {"train_step": {"failed": "no\nmodel"}, "trainer": {"available": False}}
    found["steps"]["trainer"]["reason"] = "TRL cannot be imported"
    text = markdown(found)
    assert "Not measured: no model." in text and "Not compared: TRL cannot be imported." in text
    short = text.partition("## In short")[2].partition("## Cases")[0]
    assert "padded over shared: not measured: no model." in short
    assert "TRL over PeRL: not compared: TRL cannot be imported." in short
    variants = train_step()
    for i, variant in enumerate(variants["variants"].values(), 1):
        variant["seconds_by_round"] = [4.0, 6.0 / i, 5.0]
    found["steps"] = {"train_step": variants}
    text = markdown(found)
    assert "(1.0x to 3.0x by round, median of 3 rounds)" in text
    assert "What padded takes" not in text and "Seconds: median of 3 rounds." in text
    del found["steps"]
    assert "step" not in markdown(found).partition("## Growth")[2]


def test_the_command_writes_the_report_and_its_pictures(tmp_path: Path) -> None:
    file = written(tmp_path, results())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = ["", "-ratio", "-bound", "-memory"]
    paths = [tmp_path / f"{file.stem}{n}.{'svg' if n else 'md'}" for n in names]
    assert done.stdout.splitlines() == [f"written: {path}" for path in paths]
    assert {*tmp_path.iterdir()} == {file, *paths}
    text = paths[0].read_text(encoding="utf-8")
    links = [line for line in text.splitlines() if line.startswith("![")]
    assert [link.partition("](")[2] for link in links] == [
        f"2026-11-20-abc1234%2B{name}.svg)" for name in names[1:]
    ]
    shown = ["".join(ElementTree.parse(path).getroot().itertext()) for path in paths[1:]]
    assert all("Liger, fused linear GRPO" in words for words in shown)
    assert "Qwen3-VL-8B, N = 8192" in shown[0] and "PeRL, Triton" in shown[1]
    # A series has pictures of its own, which say what of.
    assert "N = 65536" not in shown[0]
    for words in shown[1:]:
        assert "H = 2,048, V = 151,936, bfloat16" in words and "Measured on Invented GPU" in words
    assert "Quack" not in "".join(shown)


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    def sums(folder: Path) -> list[str]:
        folder.mkdir()
        pictures = draw(Results.model_validate(results()), folder / "x")
        return [hashlib.sha256(p.path.read_bytes()).hexdigest() for p in pictures]

    assert sums(tmp_path / "a") == sums(tmp_path / "CCE, every block")


def test_equal_times_do_not_hide_one_another(tmp_path: Path) -> None:
    rows = [row(OPS[0], MODELS[0], 1024, name) for name in PROVIDERS if name != "Quack"]
    for r in rows:
        r["median"] = 1.0 if r["ours"] else 2.2
    (picture,) = draw(Results.model_validate(results(rows=rows)), tmp_path / "x")
    heights: dict[str, list[float]] = {}
    for mark in ElementTree.parse(picture.path).iter("{http://www.w3.org/2000/svg}use"):
        heights.setdefault(mark.attrib["x"], []).append(float(mark.attrib["y"]))
    points = sorted(max(heights.values(), key=len))
    assert len(points) == 7
    assert min(b - a for a, b in itertools.pairwise(points)) > 6.5  # A marker's size, in points.


def test_no_pictures_without_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results()
    found["rows"] = [{**row(OPS[0], MODELS[1], 1024, name)} for name in ("PeRL, PyTorch", "Quack")]
    found["rows"][0] |= {"axis": "", "fraction": None, "peak_extra_bytes": None}
    found["peaks"] = None
    file = written(tmp_path, found, "x.json")
    (tmp_path / "x-bound.svg").write_text("of an older report")
    assert report.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "x.md"}
    assert "![" not in text and "picture" not in text.lower()
    assert "peaks were not measured" in text and "## Growth" not in text
    found["rows"] = []
    assert "No benchmark has run." in markdown(found)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = written(tmp_path, results(), "x.json")
    assert report.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("matplotlib is not installed (`pip install matplotlib`)") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "x.md"} and "![" not in text


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in results().items() if k != key}


def with_row(**changes: Any) -> dict[str, Any]:
    return results(rows=[row(OPS[0], MODELS[0], 1024, "CCE", **changes)])


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ("", "Invalid JSON"),
        (json.dumps(results())[:-99], "Invalid JSON"),
        ("[1]", "Input should be an object"),
        (without("schema"), "schema: Field required"),
        (results(schema=2), "schema: Input should be 1"),
        (without("rows"), "rows: Field required"),
        (with_row(median=-1), "rows.0.median: Input should be greater than 0"),
        (with_row(median=float("nan")), "rows.0.median: Input should be"),
        (with_row(axis="V2"), "rows.0: Value error, shape has no positive number 'V2'"),
        (results(steps={"trainer": {"available": True}}), "trainers are not both there"),
    ],
)
def test_files_that_are_no_results(found: Any, match: str, tmp_path: Path, fails) -> None:
    file = written(tmp_path, found)
    said = fails(report.main, [str(file)])
    assert said.startswith(f"{file}: ") and match in said
    assert list(tmp_path.iterdir()) == [file]


def test_mistakes_on_the_command_line(tmp_path: Path, fails) -> None:
    for arguments in ([], [str(tmp_path / "none.json")], [str(tmp_path)], ["--x"]):
        assert fails(report.main, arguments)
