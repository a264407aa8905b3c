"""The comparison with TRL's trainer: both do the setting's work, and a wrong step is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("trl")

import trl

import perl.training.reinforce
from benchmarks.bench_trainer import main, parse
from benchmarks.harness.models import shape
from benchmarks.trainer import start
from benchmarks.trainer.clock import PARTS, StepTime
from benchmarks.trainer.measure import count, forget_trainers
from benchmarks.trainer.perl_trainer import PerlTrainer
from benchmarks.trainer.trl_trainer import TrlTrainer
from perl.config import AdvantageConfig
from perl.types import Segment

ROOT = Path(__file__).parents[2]
IMAGES, ORDERS, PER_ORDER, COMPLETION, PER_IMAGE = (2, 3), 2, 2, 5, 4
SIDES = {"trl": TrlTrainer, "perl": PerlTrainer}
SEQUENCES = len(IMAGES) * ORDERS * PER_ORDER
SMALL = [
    *("--model=tiny", "--dtype=float32", "--images", *map(str, IMAGES), f"--orders={ORDERS}"),
    *(f"--per-order={PER_ORDER}", f"--completion={COMPLETION}", f"--tokens-per-image={PER_IMAGE}"),
    # Two padded sequences, and several packed rows.
    *("--budget=90", "--steps=1", "--rounds=1"),
]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the setting is for a CPU")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "report.json"
    assert main([*SMALL, f"--json={file}"]) == 0
    return json.loads(file.read_text())


def test_both_make_the_same_step(report: dict[str, Any]) -> None:
    proof = report["proof"]
    assert proof["completions"] == SEQUENCES and proof["parameters"] == 92
    assert 0 < proof["max_rel_grad_diff"] < proof["allowed_rel_grad_diff"] == 1e-3
    assert proof["entropy"]["trl"] == pytest.approx(proof["entropy"]["perl"], rel=1e-4)
    assert proof["max_reward_diff"] < 1e-6
    assert report["available"] and len(report["differences"]) > 5


def test_counts_are_those_of_the_setting(report: dict[str, Any]) -> None:
    trl, perl = (report["trainers"][name] for name in ("trl", "perl"))
    shown = sum(IMAGES)
    copies = ORDERS * PER_ORDER
    assert trl["images_encoded_by_part"] == dict.fromkeys(("generation", "update"), copies * shown)
    assert perl["images_encoded_by_part"] == dict.fromkeys(("generation", "update"), shown)

    longest = report["setting"]["longest_sequence"]
    # The last token that is sampled is not read again.
    assert trl["lm_tokens_by_part"]["generation"] == SEQUENCES * (longest - 1)
    assert trl["lm_tokens_by_part"]["update"] == SEQUENCES * longest
    # A letter, two marks and the visual tokens are what the third image adds.
    prompts = [longest - COMPLETION - (3 + PER_IMAGE), longest - COMPLETION]
    assert perl["lm_tokens_by_part"]["generation"] == (
        len(IMAGES) * ORDERS * prompts[1] + SEQUENCES * (COMPLETION - 1)
    )
    assert perl["lm_tokens_by_part"]["update"] == ORDERS * sum(prompts) + SEQUENCES * COMPLETION
    assert report["setting"]["padded_micro_batch"] == 2
    assert trl["micro_batch_tokens"] == 2 * longest
    assert longest <= perl["micro_batch_tokens"] <= 90


def test_figures(report: dict[str, Any]) -> None:
    trl, perl = (report["trainers"][name] for name in ("trl", "perl"))
    for found in (trl, perl):
        assert len(found["seconds_by_round"]) == 1
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
        assert all(found["parts"][name] > 0 for name in ("generation", "preparation", "update"))
        # Gradients and AdamW's two moments of every weight, at least.
        assert found["peak_bytes"] > 3 * 4 * report["setting"]["parameters"]


def at_peak(trainer: str, options: list[str], folder: Path, **steps: int) -> int:
    setting, _ = parse(options)
    folder.mkdir()
    made = start.make_start(setting, folder)
    try:
        return count(SIDES[trainer], made, folder / "run", **steps)["peak_bytes"]
    finally:
        forget_trainers()


@pytest.mark.parametrize("trainer", ["trl", "perl"])
def test_peak_has_the_optimizers_state(trainer: str, tmp_path: Path) -> None:
    """Two moments of each weight beside the activations, which are most of the memory here."""
    options = [*SMALL, "--budget=16384", "--completion=8", "--tokens-per-image=64"]
    first = at_peak(trainer, options, tmp_path / "first", steps=1)
    steady = at_peak(trainer, options, tmp_path / "steady")
    made = start.make_start(parse(options)[0], tmp_path)
    assert steady - first == pytest.approx(8 * made.parameters, rel=0.1)


def test_either_trainer_is_the_first_in_turn(monkeypatch, capsys) -> None:
    order = []

    def timed(make: Any, *_: Any) -> list[StepTime]:
        order.append(make)
        return [StepTime(1.0, dict.fromkeys(PARTS, 0.25))]

    monkeypatch.setattr("benchmarks.trainer.measure._time", timed)
    assert main([*SMALL, "--rounds=3"]) == 0
    trl, perl = SIDES.values()
    assert order == [perl, trl, trl, perl, perl, trl]


class Sampling(TorchDispatchMode):
    """Counts weights that are made bfloat16, and how often logits [B, V] are masked."""

    def __init__(self, weights: set[int], logits: tuple[int, int]) -> None:
        super().__init__()
        self.weights, self.logits = weights, logits
        self.casts = self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.casts += args[0].data_ptr() in self.weights
        output = func(*args, **kwargs)
        self.masks += func.overloadpacket is torch.ops.aten.where and output.shape == self.logits
        return output


def test_sampling_does_no_more_in_trl_than_it_must(monkeypatch, tmp_path: Path) -> None:
    """Weights are copied once, and logits masked once a token."""
    setting, _ = parse([*SMALL, "--dtype=bfloat16"])
    trainer = TrlTrainer(start.make_start(setting, tmp_path), tmp_path / "run", 1, 0)
    projections = [p for n, p in trainer.core.language_model.named_parameters() if "_proj.w" in n]
    vocabulary = trainer.core.get_input_embeddings().num_embeddings
    seen = Sampling({p.data_ptr() for p in projections}, (SEQUENCES, vocabulary))
    generate = trainer.trainer.model.generate

    def watched(*arguments: Any, **options: Any) -> Any:
        with seen:
            return generate(*arguments, **options)

    monkeypatch.setattr(trainer.trainer.model, "generate", watched)
    try:
        trainer.train()
    finally:
        forget_trainers()
    assert seen.casts == len(projections)
    assert seen.masks == COMPLETION


@pytest.mark.parametrize(
    ("dtype", "there", "attention"),
    [
        ("bfloat16", True, "flash_attention_2"),
        ("bfloat16", False, "sdpa"),
        ("float32", True, "sdpa"),
    ],
)
def test_trl_has_flash_attention_where_it_can(dtype, there, attention, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn") if there else None)
    assert parse(["--device=cuda", f"--dtype={dtype}"])[0].trl_attention == attention


def louder(segments: list[Segment], factor: float = 1.01) -> list[Segment]:
    """Advantages that are a little too large."""
    return [replace(s, advantages=tuple(factor * a for a in s.advantages)) for s in segments]


def misplaced(segments: list[Segment]) -> list[Segment]:
    """Completions behind the same question with its images in the other order."""
    return [replace(s, prompt=t.prompt) for s, t in zip(segments, reversed(segments), strict=True)]


def wrong_segments(wrong: Any) -> tuple[str, Any]:
    right = perl.training.reinforce.segments_of
    return "perl.training.reinforce.segments_of", lambda *given: wrong(right(*given))


PERMUTE, OVER_ALL = start.permute, AdvantageConfig(over="group")


@pytest.mark.parametrize(
    ("planted", "dtype", "message"),
    [
        (wrong_segments(louder), "float32", "PeRL's gradient of "),
        (wrong_segments(misplaced), "float32", "PeRL's gradient of "),
        (wrong_segments(partial(louder, factor=1.03)), "bfloat16", "PeRL's gradient of "),
        # TRL's images the other way round: the tokens are the same.
        (
            ("benchmarks.trainer.start.permute", lambda e, order: PERMUTE(e, order[::-1])),
            "float32",
            "TRL has no completion for digits-train-which-",
        ),
        (
            ("benchmarks.trainer.perl_trainer.configs.AdvantageConfig", lambda over: OVER_ALL),
            "float32",
            "PeRL's advantages differ from TRL's by up to ",
        ),
    ],
    ids=["louder", "misplaced", "louder in bfloat16", "other prompts", "other advantages"],
)
def test_wrong_steps_are_refused(planted, dtype, message, monkeypatch, tmp_path, fails) -> None:
    monkeypatch.setattr(*planted)
    file = tmp_path / "report.json"
    said = fails(main, [*SMALL, f"--dtype={dtype}", f"--json={file}"], 1)
    assert said.startswith(message) and said.endswith("; nothing is timed")
    assert not list(tmp_path.iterdir())


def test_shapes_and_bfloat16(monkeypatch, tmp_path: Path) -> None:
    """A vocabulary larger than the questions', and the yardstick of rounding."""
    monkeypatch.setattr(start, "shape", lambda name: shape("tiny"))
    file = tmp_path / "report.json"
    assert main([*SMALL, "--model=0.6b", "--dtype=bfloat16", f"--json={file}"]) == 0
    found = json.loads(file.read_text())
    assert 1e-3 < found["proof"]["max_rel_grad_diff"] < 0.1
    assert found["setting"]["parameters"] < 1e6


def test_without_trl(tmp_path: Path) -> None:
    """As a user runs it, from a folder that holds none of its modules, where a package that TRL needs is broken."""
    (tmp_path / "datasets.py").write_text("raise ImportError('no data sets today')\n")
    script = ROOT / "benchmarks" / "bench_trainer.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--json=report.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("not compared: TRL's GRPOTrainer cannot be imported (")
    assert "no data sets today" in done.stdout and done.stdout.count("\n") == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["available"] is False and found["reason"] in done.stdout


def test_an_old_trl(monkeypatch, capsys) -> None:
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    assert main(SMALL) == 0
    assert capsys.readouterr().out.startswith(
        "not compared: TRL 1.15.2 is installed, 1.16 or newer"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per-order=0"], "argument --per-order: 0 is not a positive whole number"),
        (["--per-order=1"], "--per-order 1: a single completion has no advantage in TRL"),
        (["--images", "1", "4"], "--images 1: the bundled questions have 2 to 26"),
        (["--images", "2", "--orders=3"], "--orders 3: 2 images have only 2"),
        (["--model=nowhere"], "--model nowhere: choose tiny, 0.6b, 3b, 7b or a model folder"),
        ([*SMALL, "--budget=20"], "--budget 20: a sequence has 36 tokens; raise it"),
        (["--device=cuda"], "--device cuda: there is no GPU that PyTorch can use"),
        (["--json=/nowhere/report.json"], "--json /nowhere/report.json: give a file in a folder"),
        ([f"--json={300 * 'x'}"], f"--json {300 * 'x'}: it cannot be written (File name too long)"),
        (
            ["--trl-attention=flash_attention_2"],
            "--trl-attention flash_attention_2: it needs a GPU",
        ),
        (["--rollouts=3"], "unrecognized arguments: --rollouts=3"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, fails) -> None:
    assert fails(main, options).startswith(message)
