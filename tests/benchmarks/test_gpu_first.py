"""The first run on a GPU goes through on a CPU, finds what is wrong, and does nothing twice."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import perl_kernels
from benchmarks import gpu_first as program
from benchmarks.first import folder, kernels, trainer
from benchmarks.first.bench import Bench
from perl.config import ModelConfig
from perl.model.loading import load_policy, load_processor
from perl.model.packed.attention import IMPLEMENTATIONS
from perl.model.packed.pack import pack_row
from perl.model.packed.sdpa import sdpa
from perl.training.roofline.model import CONFIGS
from perl.types import Message, Segment
from tests.messages import tells
from tests.model.steps import picture

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return Bench(CPU, tmp_path / "part.json", [])


@pytest.mark.parametrize("name", program.PARTS)
def test_every_part_goes_through(name: str, bench: Bench) -> None:
    program.PARTS[name](bench)
    assert bench.lines and not any("wrong" in line for line in bench.lines)
    assert json.loads(bench.file.read_text())["lines"] == bench.lines


def test_correct_looks_at_every_function_at_odd_sizes(bench: Bench) -> None:
    kernels.correct(bench)
    names = [line["name"] for line in bench.lines]
    for function in ("linear_grpo_loss", "grpo_loss", "linear_token_logprobs", "token_logprobs"):
        for size in ("V = 517", "V = 33"):
            assert any(name.startswith(f"{function}, {size}") for name in names)
    assert all(line["repeats_equal"] for line in bench.lines)


def off(*arguments: Any, **options: Any) -> Any:
    output = perl_kernels.linear_grpo_loss(*arguments, **options)
    return output._replace(loss=output.loss * 1.001)


class Unsteady:
    """Differs in the last bit from call to call."""

    calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        output = perl_kernels.linear_grpo_loss(*arguments, **options)
        return output._replace(entropy=output.entropy * (1 + self.calls % 2 * 2**-23))


@pytest.mark.parametrize(("planted", "said"), [(off, "loss"), (Unsteady(), "differs")])
def test_what_is_wrong_is_said(
    planted: Callable[..., Any], said: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.providers.ours.linear_grpo_loss", planted)
    kernels.correct(bench)
    wrong = [line for line in bench.lines if "wrong" in line]
    assert wrong and all(line["name"].startswith("linear_grpo_loss") for line in wrong)
    tells(wrong[0]["wrong"], said)
    options = ["correct", "--dry-run", f"--inside={bench.file}"]
    assert program.main(options) == 1


def test_without_a_gpu_it_is_one_line(fails: Callable[..., str], monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tells(fails(program.main, [f"--output={tmp_path}"]), "GPU", "--dry-run")
    assert not list(tmp_path.iterdir())
    tells(fails(program.main, ["nothing", "--dry-run"]), "nothing", "ceilings", "sanitizer")


def test_attention_that_loses_more_than_pytorchs_own_is_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundredth of the keys' weight on a wrong key."""

    def off(query: Any, key: Any, value: Any, layout: Any, how: Any) -> Any:
        return sdpa(query, key, 0.99 * value + 0.01 * value.roll(1, 2), layout, how)

    monkeypatch.setitem(IMPLEMENTATIONS, "flex", off)
    trainer.attention(bench)
    wrong = [line for line in bench.lines if "wrong" in line]
    assert [line["name"] for line in wrong] == ["attention, flex"]


def test_updates_that_differ_though_they_must_not_are_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], trainer._backward

    def unsteady(policy: Any, batch: Any) -> Any:
        found = real(policy, batch)
        calls.append(batch)
        policy.head_weight.grad[0] += len(calls)
        return found

    monkeypatch.setattr(trainer, "_backward", unsteady)
    trainer.repeat(bench)
    assert ["wrong" in line for line in bench.lines] == [True, False]


def test_decoding_that_waits_in_every_step_is_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prefill waits does not count, nor what else is warned of."""
    wait = UserWarning("called a synchronizing CUDA operation")
    for said, wrong in (([2, 9], "1.00 waits"), ([9, 9], None)):
        found = iter(said)
        monkeypatch.setattr(
            trainer,
            "_waits",
            lambda _, found=found: nullcontext(
                [Namespace(message=wait)] * next(found) + [Namespace(message="old")]
            ),
        )
        trainer.decode(bench)
        line = bench.lines.pop()
        assert wrong == (line.get("wrong") and line["wrong"].removesuffix(" a step"))


def test_a_folder_of_true_size_is_one_that_is_trained(tmp_path: Path) -> None:
    """Here with small numbers, which a config.json of Qwen2.5-VL may have too."""
    sizes = json.loads(json.dumps(CONFIGS[folder.MODEL]))
    sizes["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes["text_config"] |= {
        "num_attention_heads": 4,
        "vocab_size": 2000,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    sizes["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    sizes["vision_config"] |= {"depth": 1, "hidden_size": 32, "intermediate_size": 64}
    sizes["vision_config"] |= {"num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    folder.make(sizes, tmp_path / "model")
    policy = load_policy(str(tmp_path / "model"), ModelConfig(), CPU)
    processor = load_processor(str(tmp_path / "model"), ModelConfig(min_pixels=512 * 512))
    prompt = processor.encode_messages((Message("user", "<image> which"),), [picture(28, 28, 0)])
    assert len(policy.head_weight) == 2000 and prompt.images[0].tokens == 361
    batch = pack_row([Segment(prompt, (np.array([5, 6]),), (1.0,))])
    assert policy(batch).shape == (2, 64)


class Clerk:
    """Stands for a part's process: writes a line, and ends as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.code, self.started, self.folder = 0, 0, tmp_path
        monkeypatch.setattr(program, "_inside", self.command)
        monkeypatch.setattr(program, "commit", lambda: self.commit)
        self.commit = "abc"

    def command(self, name: str, given: Namespace, file: Path) -> list[str]:
        self.started += 1
        lines = {"lines": [{"name": "copy"}]}
        text = (
            f"open({str(file)!r}, 'w').write({json.dumps(lines)!r}); raise SystemExit({self.code})"
        )
        return [sys.executable, "-S", "-c", text]

    def __call__(self, *options: str) -> tuple[int, dict[str, Any]]:
        code = program.main(["ceilings", "--dry-run", f"--output={self.folder}", *options])
        (file,) = self.folder.glob("*/first/ceilings.json")
        return code, json.loads(file.read_text())


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path: Path, capsys) -> None:
    clerk = Clerk(monkeypatch, tmp_path)
    code, found = clerk()
    assert (code, found["outcome"], found["lines"]) == (0, "done", [{"name": "copy"}])
    assert found["commit"] == "abc" and found["machine"]["kind"] == "cpu"
    capsys.readouterr()
    assert clerk() == (0, found) and clerk.started == 1
    tells(capsys.readouterr().out, "ceilings", "done before", found["date"])
    assert clerk("--again")[0] == 0 and clerk.started == 2
    # Nor is what was done of another commit, or what failed, done.
    clerk.commit, clerk.code = "abd", 1
    code, found = clerk()
    assert (code, found["outcome"], clerk.started) == (1, "failed", 3)
    clerk.code = 0
    assert clerk()[1]["outcome"] == "done" and clerk.started == 4


def test_a_part_that_takes_too_long_ends_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid}; wait"
    monkeypatch.setattr(program, "SECONDS", 1.0)
    monkeypatch.setitem(program.PROGRAMS, "tests", lambda given, folder: [["bash", "-c", script]])
    given = Namespace(again=False, dry_run=False)
    assert program._part("tests", given, tmp_path, {"commit": "abc"}) == "out of time"
    assert json.loads((tmp_path / "tests.json").read_text())["outcome"] == "out of time"
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"  # Dead.


def test_programs_are_named_but_not_run_in_a_dry_run(tmp_path: Path, capfd) -> None:
    options = [*program.PROGRAMS, "--dry-run", f"--output={tmp_path}"]
    assert program.main(options) == 0
    said = capfd.readouterr().out
    tells(said, "-m pytest", "tests/kernels", "host_cost", "ncu ", "run.py", "memcheck")
    tells(said, "bench_train_step.py", "--model=7b", "benchmarks.first.folder", "perl profile")
    assert said.count("not run") == len(program.PROGRAMS)
    assert not list(tmp_path.glob("*/first/*.json"))


def test_a_program_that_is_not_there_is_missing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(program.PROGRAMS, "counters", lambda given, folder: [["no-such-ncu"]])
    given = Namespace(again=False, dry_run=False)
    assert program._part("counters", given, tmp_path, {"commit": "abc"}) == "missing"
