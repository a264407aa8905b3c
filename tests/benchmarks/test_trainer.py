"""The comparison with TRL's trainer: both do the setting's work, and a wrong step is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
from benchmarks.trainer.agreement import prove
from benchmarks.trainer.clock import PARTS, PartWatch, StepClock, StepTime
from benchmarks.trainer.measure import count, forget_trainers, measure
from benchmarks.trainer.perl_trainer import PerlTrainer
from benchmarks.trainer.trl_trainer import TrlTrainer
from perl.config import AdvantageConfig
from perl.types import Segment
from tests.benchmarks.test_harness import Decoder, Part
from tests.messages import refused, tells

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
        ORDERS * sum(prompts) + SEQUENCES * (COMPLETION - 1)
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
        # Gradients and AdamW's two moments of every weight, at least: all but the first are there in the second step.
        assert found["peak_bytes"] > 3 * 4 * report["setting"]["parameters"]


class StandIn:
    """A trainer that samples from 3 tokens, trains on twice 5, encodes an image, and holds a MiB more in each step."""

    def __init__(self, start: Any, folder: Path, steps: int, seed: int) -> None:
        self.core: Any = torch.nn.Module()
        self.core.language_model, self.core.visual = Decoder(), Part()
        self.clock, self.steps = SimpleNamespace(ended=0), steps

    def train(self) -> None:
        for step in range(self.steps):
            with torch.no_grad():
                self.core.language_model(input_ids=torch.zeros(1, 3))
            self.core.visual(grid_thw=torch.ones(1, 3))
            for _ in range(2):
                self.core.language_model(inputs_embeds=torch.zeros(1, 5, 1))
            held = torch.zeros((1 + step) * 2**18)
            self.clock.ended += len(held) > 0


def test_a_step_is_counted_once_and_its_memory_is_the_second_ones() -> None:
    """The optimizer's state lies beside activations from the second step on."""
    begun: Any = SimpleNamespace(setting=SimpleNamespace(seed=0, device="cpu"))
    assert count(StandIn, begun, Path()) == {
        "lm_tokens": 13, "lm_tokens_by_part": {"generation": 3, "update": 10}, "micro_batch_tokens": 5,
        "images_encoded": 1, "images_encoded_by_part": {"generation": 0, "update": 1},
        "peak_bytes": 3 * 2**20,
    }  # fmt: skip


def test_either_trainer_is_the_first_in_turn_and_medians_are_its_own(monkeypatch, tmp_path) -> None:
    """Of all steps of all rounds; the rounds' beside them. Nothing is counted or timed before the proof."""
    order: list[Any] = []

    def timed(make: Any, *_: Any) -> list[StepTime]:
        order.append(make)
        scale = 1.0 if make is PerlTrainer else 10.0
        round_ = sum(make is one for one in order)
        seconds = {1: (1, 2, 9), 2: (4, 4, 4), 3: (3, 8, 8)}[round_]
        return [StepTime(s * scale, dict.fromkeys(PARTS, s * scale / 4)) for s in seconds]

    monkeypatch.setattr("benchmarks.trainer.measure._time", timed)
    monkeypatch.setattr("benchmarks.trainer.measure.make_start", lambda setting, _: SimpleNamespace(setting=setting))  # fmt: skip
    monkeypatch.setattr("benchmarks.trainer.measure._described", lambda start: {})
    monkeypatch.setattr("benchmarks.trainer.agreement.prove", lambda *_: order.append("proof"))
    counted = {"lm_tokens": 1, "images_encoded": 1, "peak_bytes": 1}
    monkeypatch.setattr("benchmarks.trainer.measure.count", lambda make, *_: order.append("count") or counted)  # fmt: skip
    found = measure(replace(parse(SMALL)[0], rounds=3))
    trl, perl = SIDES.values()
    assert order == ["proof", "count", "count", perl, trl, trl, perl, perl, trl]
    for name, scale in (("perl", 1), ("trl", 10)):
        assert found["trainers"][name] == counted | {
            "seconds": 4 * scale,  # Of 1 2 3 4 4 4 8 8 9.
            "seconds_by_round": [2 * scale, 4 * scale, 8 * scale],
            "parts": dict.fromkeys(PARTS, scale),
        }


def test_the_parts_of_a_step_add_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is without those inside it, a step goes from end to end, and the first one is left out."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.trainer.clock.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    watch = PartWatch(clock)
    for scale in (100, 1):
        with clock.part("preparation"):
            now[0] += scale
            with clock.part("generation"):
                now[0] += 2 * scale
        now[0] += 4 * scale  # Between parts.
        for name, seconds in (("update", 8), ("rollout", 16), ("pack", 32)):
            with watch(name):
                now[0] += seconds * scale
        clock.end_step()
    parts = {"generation": 18, "preparation": 33, "update": 8, "rest": 4}
    assert clock.steps == [StepTime(63, parts)] and clock.ended == 2


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


def wrong_segments(wrong: Any) -> tuple[str, Any]:
    right = perl.training.reinforce.segments_of
    return "perl.training.reinforce.segments_of", lambda *given: wrong(right(*given))


PERMUTE, OVER_ALL = start.permute, AdvantageConfig(over="group")


@pytest.mark.parametrize(
    ("planted", "names"),
    [
        (wrong_segments(louder), ["PeRL", "gradient", "TRL"]),
        # TRL's images the other way round: the tokens are the same.
        (
            ("benchmarks.trainer.start.permute", lambda e, order: PERMUTE(e, order[::-1])),
            ["TRL", "pixels"],
        ),
        (
            ("benchmarks.trainer.perl_trainer.configs.AdvantageConfig", lambda over: OVER_ALL),
            ["PeRL", "advantages", "TRL"],
        ),
    ],
    ids=["louder", "other prompts", "other advantages"],
)
def test_wrong_steps_are_refused(planted, names, monkeypatch, tmp_path: Path) -> None:
    begun = start.make_start(parse(SMALL)[0], tmp_path)
    monkeypatch.setattr(*planted)
    try:
        with refused(*names, error=AssertionError):
            prove(begun, tmp_path / "proof")
    finally:
        forget_trainers()


def test_shapes_and_bfloat16(monkeypatch, tmp_path: Path) -> None:
    """A vocabulary larger than the questions', and the yardstick of rounding."""
    monkeypatch.setattr(start, "shape", lambda name: shape("tiny"))
    begun = start.make_start(parse([*SMALL, "--model=0.6b", "--dtype=bfloat16"])[0], tmp_path)
    assert begun.parameters < 1e6
    try:
        assert 1e-3 < prove(begun, tmp_path / "proof")["max_rel_grad_diff"] < 0.1
    finally:
        forget_trainers()


@pytest.mark.slow
def test_without_trl(tmp_path: Path) -> None:
    """As a user runs it, from a folder that holds none of its modules, where a package that TRL needs is broken."""
    (tmp_path / "datasets.py").write_text("raise ImportError('no data')\n")
    script = ROOT / "benchmarks" / "bench_trainer.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--json=report.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tells(done.stdout, "TRL", "no data", "trl>=1.16")
    assert done.stdout.count("\n") == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["available"] is False and found["reason"] in done.stdout


@pytest.mark.parametrize("version", ["1.15.2", "0.99", "dev"])
def test_an_old_trl(version: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    assert main(SMALL) == 0
    tells(capsys.readouterr().out, version, "1.16", "trl>=1.16")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--per-order=0"], ["--per-order", 0]),
        (["--per-order=1"], ["--per-order", 1]),
        (["--images", "1", "4"], ["--images", 1, 2, 26]),
        (["--images", "2", "--orders=3"], ["--orders", 3, 2]),
        (["--model=nowhere"], ["--model", "nowhere", "tiny", "0.6b", "3b", "7b"]),
        ([*SMALL, "--budget=20"], ["--budget", 20, 36, "--tokens-per-image", "--completion"]),
        (["--device=cuda"], ["--device", "cuda"]),
        (["--trl-attention=flash_attention_2"], ["--trl-attention", "flash_attention_2"]),
        (["--rollouts=3"], ["--rollouts", "--help"]),
    ],
)
def test_bad_options_are_one_line(options: list[str], names: list[Any], fails) -> None:
    tells(fails(main, options), *names)
