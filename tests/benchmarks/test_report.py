"""The report on benchmarks: what it says of good and bad figures, of none, and of files that are no results."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from benchmarks.report import __main__ as report
from benchmarks.report.cases import Case, fit, series
from benchmarks.report.pictures import draw
from benchmarks.report.results_file import Results, Row
from benchmarks.report.tables import figure, mebibytes, times
from tests.messages import tells

TWO = "## A step of two"
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
    ours = lines[OPS[0], "PeRL, Triton"]
    tells(ours, "N from 1024", 65536, "N^1.00 ± 0.00", "N^1.00")
    tells(lines[OPS[1], "PyTorch, eager"], 1024, 16384, "N^2.00 ± 0.00")
    assert not any(provider == "Quack" for _, provider in lines)
    growth = markdown(found).partition("## Growth")[2]
    assert f"- PeRL, Triton: {ours}" in growth and "N^2.00 ± 0.00" in growth


def test_an_axis_of_several_words() -> None:
    rows = [row(OPS[0], MODELS[0], n, "CCE", axis="group size") for n in SIZES]
    for r in rows:
        r["shape"]["group size"] = r["shape"]["N"] // 256
    (found,) = series(Results.model_validate(results(rows=rows)).rows)
    assert re.findall(r"[\d.]+|\(.*?\)", found.line)[:4] == ["4", "256", "(group size)", "1.00"]


def test_tables_have_all_rows_the_fastest_first() -> None:
    text = markdown(results())
    case = text.partition(f"{MODELS[1]}, N = 65536")[2].partition("\n\n")[2]
    shape, table = case.split("\n\n")[:2]
    assert re.findall(r"[\d,]+\d|\w+16", shape) == ["65,536", "2,048", "151,936", "bfloat16"]
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
    tells(lines[-3][6], "37 GiB")
    # What somebody's message holds is neither a column nor a tag.
    tells(lines[-1][6], "missing", r"sm_90 \| sm_100 &lt;GPU>")
    assert {len(line) for line in lines} == {7}


def test_head_and_summary() -> None:
    text = markdown(results())
    heading, when, peaks = text.split("\n\n")[:3]
    tells(heading, "Invented GPU")
    names = ("2026-11-20", "abc1234", "full", "4.2", "8 cores", "4 threads", "3.11.7", "2.13.0")
    tells(when, *names)
    assert "transformers" not in when
    tells(peaks, "4,300 GB/s", "790 TFLOP/s", "bfloat16")
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
    trouble = re.findall(
        r"^- (.*?), \**(PeRL, Triton|PyTorch, eager|Quack)\**: .* (\d) of (\d)", text, re.M
    )
    assert trouble == [
        (op, name, count, of)
        for op, of in ((OPS[0], "8"), (OPS[1], "4"))
        for name, count in (("PeRL, Triton", of), ("PyTorch, eager", "1"))
    ]
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
    shape, pieces = (text.partition(f"#### {case}\n\n")[2].partition("\n")[0] for case in shapes)
    assert shape.split(", ") == [
        "N = 4,096 rows",
        "float32 (4 bytes)",
        "sequence level",
        "frozen head",
        "head of Q / 8",
    ]
    assert pieces == "tokens: 1,024, pieces: 8"
    words = ("N: rows", "H: hidden size", "V: vocabulary", "*/ 8*", "*sequence level*")
    assert [text.count(word) for word in (*words, "*frozen head*")] == [1] * 6


def test_what_makes_figures_doubtful_is_said_first() -> None:
    found = results()
    for load, said in (([4.0, 4.4], True), ([0.9, 9.0], False)):
        text = markdown(found | {"load": load})
        assert ("busy" in text.split("\n\n")[1]) == ("busy" in text) == said
        if said:
            tells(text.split("\n\n")[1], "4.0", "8 cores")
    text = markdown(found | {"only": "linear or <b>", "interrupted": True})
    doubts = text.partition("\n\n")[2].partition("2026")[0]
    assert "`--only 'linear or &lt;b>'`" in doubts and "interrupted" in doubts
    assert not re.search("partial|interrupted|busy", markdown(found))


def test_few_points_or_a_large_error_are_uncertain() -> None:
    for values, said in (((1, 4, 16, 64), False), ((1, 4, 16), True), ((1, 20, 21, 400), True)):
        sizes = [4**i for i in range(len(values))]
        rows = [
            row(OPS[0], MODELS[1], n, "CCE", median=v) for n, v in zip(sizes, values, strict=True)
        ]
        text = markdown(results(rows=rows)).partition("## Growth\n")[2]
        assert bool(re.search(r"- CCE: .*; uncertain\n", text)) == said


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
    assert cells(text, "| 1024 prompts")[2:6] == ["–"] * 4
    tells(cells(text, "| 1024 prompts")[6], "refused", "two rows")
    tells(text.partition("## In short")[2].partition("## Cases")[0], "**PeRL**: refused", "1 of 3")


def test_training_steps() -> None:
    text = markdown(results())
    shared = cells(text, "## A training step", "| **shared")
    assert shared[1:] == ["15,000 (4.0x)", "36 (4.0x)", "1.05 (4.0x)", "225 (4.0x)", "0.0850 (4.0x)", "2e-05 |"]  # fmt: skip
    assert cells(text, TWO, "| seconds")[1:] == ["3.00", "1.50", "2.0x |"]
    assert cells(text, TWO, "| … update")[1:] == ["0.900", "0.450", "|"]
    assert cells(text, TWO, "| images encoded")[1:] == ["24", "24", "1.0x |"]
    short = text.partition("## In short")[2].partition("## Cases")[0]
    of_step, of_trainers = (line for line in short.splitlines() if line.startswith("- ["))
    assert "](#a-training-step-padded-packed-shared)" in of_step
    assert re.findall(r"[\d.]+x", of_step) == ["4.0x", "4.0x"]
    # Seconds, in each round, memory.
    assert "](#a-step-of-two-trainers-trl-and-perl)" in of_trainers
    assert re.findall(r"[\d.]+x|\d rounds", of_trainers) == [
        "2.0x",
        "2.0x",
        "2.0x",
        "2 rounds",
        "1.0x",
    ]
    assert all(f"\n- {line}" in text for line in trainer()["differences"])


def test_training_steps_that_were_not_measured() -> None:
    found = results()
    found["steps"] = {"train_step": {"failed": "no\nmodel"}, "trainer": {"available": False}}
    found["steps"]["trainer"]["reason"] = "TRL is gone"
    text = markdown(found)
    short, _, behind = text.partition("## Cases")
    for part in (short, behind):
        assert part.count("no model") == part.count("TRL is gone") == 1
    del found["steps"]
    assert "step" not in markdown(found).partition("## Growth")[2]


def test_a_training_steps_ratios_by_round() -> None:
    found, variants = results(), train_step()
    padded, packed, shared = variants["variants"].values()
    padded |= {"seconds": 5.0, "seconds_by_round": [4.0, 6.0, 5.0]}
    packed |= {"seconds": 4.0, "seconds_by_round": [4.0, 4.0, 4.0]}
    shared |= {"seconds": 4.0, "seconds_by_round": [4.0, 2.0, 5.0]}
    found["steps"] = {"train_step": variants}
    text = markdown(found)
    line = next(line for line in text.splitlines() if line.startswith("- ["))
    # The medians' ratio; in the first and in the second round; bytes.
    assert re.findall(r"[\d.]+x|\d rounds", line) == ["1.2x", "1.0x", "3.0x", "3 rounds", "4.0x"]
    trainers = trainer()
    trainers["trainers"]["trl"]["seconds_by_round"] = [3.0, 6.6]
    found["steps"] = {"trainer": trainers}
    text = markdown(found)
    line = next(line for line in text.splitlines() if line.startswith("- ["))
    assert re.findall(r"[\d.]+x", line) == ["2.0x", "2.0x", "4.0x", "1.0x"]
    assert "round: 2.0x to 4.0x." in text


def test_the_command_writes_the_report_and_its_pictures(tmp_path: Path, capsys) -> None:
    file = written(tmp_path, results())
    assert report.main([str(file)]) == 0
    names = ["", "-ratio", "-bound", "-memory"]
    paths = [tmp_path / f"{file.stem}{n}.{'svg' if n else 'md'}" for n in names]
    assert capsys.readouterr().out.splitlines() == [f"written: {path}" for path in paths]
    assert {*tmp_path.iterdir()} == {file, *paths}
    text = paths[0].read_text(encoding="utf-8")
    links = [line for line in text.splitlines() if line.startswith("![")]
    assert [link.partition("](")[2] for link in links] == [
        f"2026-11-20-abc1234%2B{name}.svg)" for name in names[1:]
    ]
    shown = ["".join(ElementTree.parse(path).getroot().itertext()) for path in paths[1:]]
    for words in shown:
        tells(words, "Liger", "Invented GPU" if words is not shown[0] else "PyTorch, eager")
    assert "Qwen3-VL-8B, N = 8192" in shown[0] and "PeRL, Triton" in shown[1]
    # A series has pictures of its own, which say what of.
    assert "N = 65536" not in shown[0]
    for words in shown[1:]:
        tells(words, "H = 2,048", "V = 151,936", "bfloat16")
    assert "Quack" not in "".join(shown)


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    def sums(folder: Path) -> list[str]:
        folder.mkdir()
        pictures = draw(Results.model_validate(results()), folder / "x")
        return [hashlib.sha256(p.path.read_bytes()).hexdigest() for p in pictures]

    assert sums(tmp_path / "a") == sums(tmp_path / "b c")


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
    assert "TFLOP/s" not in text and "## Growth" not in text
    found["rows"] = []
    assert "## Cases" not in markdown(found)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = written(tmp_path, results(), "x.json")
    assert report.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert text.count("`pip install") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "x.md"} and "![" not in text


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in results().items() if k != key}


def with_row(**changes: Any) -> dict[str, Any]:
    return results(rows=[row(OPS[0], MODELS[0], 1024, "CCE", **changes)])


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ("", ["JSON"]),
        (json.dumps(results())[:-99], ["JSON"]),
        ("[1]", ["object"]),
        (without("schema"), ["schema"]),
        (results(schema=2), ["schema", 1]),
        (without("rows"), ["rows"]),
        (with_row(median=-1), ["rows.0.median", 0]),
        (with_row(median=float("nan")), ["rows.0.median"]),
        (with_row(axis="V2"), ["rows.0", "shape", "V2"]),
        (results(steps={"trainer": {"available": True}}), ["steps.trainer", "trainers"]),
    ],
)
def test_files_that_are_no_results(found: Any, names: list[Any], tmp_path: Path, fails) -> None:
    file = written(tmp_path, found)
    tells(fails(report.main, [str(file)]), file, *names)
    assert list(tmp_path.iterdir()) == [file]


def test_mistakes_on_the_command_line(tmp_path: Path, fails) -> None:
    for arguments, name in (
        ([], "FILE.json"), ([str(tmp_path / "none.json")], "none.json"), ([str(tmp_path)], tmp_path), (["--x"], "--help")
    ):  # fmt: skip
        tells(fails(report.main, arguments), name)


# Numbers of a case.


def timed(provider: str, *turns: list[float], **fields: Any) -> Row:
    values = {"op": "op", "case": "case", "shape": {}, "provider": provider, "status": "timed"}
    values |= {"ours": provider.startswith("PeRL"), "turns": list(turns)}
    return Row.model_validate({**values, "median": turns[0][0], **fields})


def test_ratios_are_theirs_over_ours_turn_by_turn() -> None:
    ours = timed("PeRL, PyTorch", [2.0, 2.0, 8.0], [4.0], peak_extra_bytes=4)
    peer = timed("peer", [3.0, 1.0, 9.0], [10.0], [7.0], peak_extra_bytes=6)
    out = timed("out", [1.0], status="failed")
    case = Case("op", "case", [out, peer, timed("PeRL, sdpa", [0.5]), ours])
    assert case.reference is ours  # Not the fastest of ours, but the backend that comes first.
    assert (case.ratio(peer), case.ratio(ours), case.ratio(out)) == (1.5, 1, None)
    assert (case.ratios(peer), case.ratios(ours), case.ratios(out)) == ([1.5, 2.5], [], [])
    assert (case.memory_ratio(peer), case.memory_ratio(out)) == (1.5, None)
    assert [row.provider for row in case.ordered] == ["PeRL, sdpa", "PeRL, PyTorch", "peer", "out"]
    triton = timed("PeRL, Triton", [9.0])
    assert Case("op", "case", [ours, triton]).reference is triton


@pytest.mark.parametrize(
    ("turns", "sign"),
    [(([2.0], [3.0]), 1), (([0.5], [0.9]), -1), (([2.0], [0.9]), 0), (([2.0], [1.0]), 0), (([2.0],), 1), (([1.0],), 0)],
)  # fmt: skip
def test_turns_on_both_sides_of_one_are_no_difference(turns: Any, sign: int) -> None:
    peer = timed("peer", *turns)
    assert Case("op", "case", [timed("PeRL", [1.0], [1.0]), peer]).difference(peer) == sign


def test_in_short_a_peer_has_the_median_of_its_cases_and_their_range() -> None:
    """Each peer its own; slower, same and faster are counted apart."""
    ratios = {"CCE": (3.0, 1.5, 0.5, 1.25, 1.75), "Liger, fused linear GRPO": (4.0,) * 5}
    rows = []
    for i, n in enumerate((1, 2, 3, 4, 5)):
        rows.append(
            row(
                OPS[0],
                MODELS[0],
                n,
                "PeRL, Triton",
                median=2.0,
                turns=[[2.0], [2.0]],
                peak_extra_bytes=100,
            )
        )
        for name, found in ratios.items():
            around = [found[i] * 2, found[i] * 2] if i < 4 else [1.0, 5.0]
            fields = {"median": found[i] * 2, "turns": [[s] for s in around]}
            rows.append(row(OPS[0], MODELS[0], n, name, **fields, peak_extra_bytes=100 * (i + 1)))
    text = markdown(results(rows=rows))
    short = text.partition("## In short")[2]
    cce = cells(short, "| **Linear")
    assert cce[1:] == ["CCE", "1.5x (0.50 to 3.0)", "3.0x (1.0 to 5.0)", "5 cases", "3", "1", "1 |"]
    liger = next(line for line in short.splitlines() if "| Liger" in line)
    assert cells(liger, "|")[2:] == [
        "4.0x (4.0 to 4.0)",
        "3.0x (1.0 to 5.0)",
        "5 cases",
        "4",
        "1",
        "0 |",
    ]


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (figure, 0.0012345, "0.00123"), (figure, 1234567.0, "1,234,567"), (figure, 0, "0"), (figure, 9.996, "10.00"),
        (times, 1.26, "1.3x"), (times, 0.004, "<0.01x"), (times, 123.4, "123x"), (times, None, "–"),
        (mebibytes, 2**20, "1.0"), (mebibytes, 2**30, "1,024"), (mebibytes, None, "–"),
    ],
)  # fmt: skip
def test_figures(show: Any, value: Any, text: str) -> None:
    assert show(value) == text


def test_pictures_show_each_peers_ratios_shares_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the figures: panels by operation, lines by provider."""
    figures: list[Any] = []

    def save(figure: Any, path: Path, **_: Any) -> None:
        figures.append(figure)
        path.touch()

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    draw(Results.model_validate(results()), tmp_path / "x")
    drawn = [
        {
            (i, line.get_label()): [
                (float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)
            ]
            for i, axes in enumerate(figure.axes)
            for line in axes.lines
        }
        for figure in figures
    ]
    ratio, bound, memory = drawn
    peers = {
        name: slower
        for name, (package, slower, *_) in PROVIDERS.items()
        if package and name != "Quack"
    }
    for name, slower in peers.items():
        # Of the three models without a series; the time over that of Triton.
        assert [x for x, _ in ratio[0, name]] == pytest.approx([slower] * 3)
        assert [round(y) for _, y in ratio[0, name]] == [0, 1, 2]
    for name, (_, slower, element, beside) in PROVIDERS.items():
        for panel in (0, 1) if name != "Quack" else ():
            most = SIZES[2] if element > 9 else SIZES[-1]
            sizes = [n for n in sorted({*SIZES, 8192 >> 3 * panel}) if n <= most]
            assert bound[panel, name] == [(n, pytest.approx(80 / slower)) for n in sizes]
            held = [max(2**16, int(element * n * 151_936) + beside) / 2**20 for n in sizes]
            assert memory[panel, name] == list(zip(sizes, held, strict=True))
    assert (0, "Quack") not in {**ratio, **bound, **memory}
    logits = [(n, n * 151_936 * 2 / 2**20) for n in sorted({*SIZES, 8192})]
    assert logits in [memory[key] for key in memory if key[1] not in PROVIDERS]
