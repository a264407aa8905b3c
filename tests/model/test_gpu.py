"""On a CUDA device: the log-probs and gradients of the CPU for every attention that is installed, and whole runs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.cli import main
from perl.config import ModelConfig
from perl.model.head import HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.flash import flash_attn_problem
from perl.model.packed.pack import pack_row
from perl.model.tiny import TINY_QWEN
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import Message, Segment
from tests.model.steps import picture, segments_of_samples, shared_step

pytestmark = pytest.mark.gpu

INSTALLED = ["sdpa", "flex", "varlen", *([] if flash_attn_problem() else ["flash_attention_2"])]
# bfloat16 keeps 8 bits: log-probs of a few nats come out a few hundredths off.
TOLERANCE = {"sdpa": 1e-4, "flex": 1e-4, "varlen": 0.1, "flash_attention_2": 0.1}
IN_BFLOAT16 = ("varlen", "flash_attention_2")


@pytest.mark.parametrize("attention", INSTALLED)
@pytest.mark.parametrize("name", TINY_QWEN)
def test_logprobs_and_gradients_are_those_of_the_cpu(
    name: str, attention: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Of samples; gradients of shared prompts over two rows, with a trained tower and checkpointing."""
    folder = str(tiny_folder(name))
    config = ModelConfig(max_pixels=28 * 28 * 16, gradient_checkpointing=1.0)
    processor = load_processor(folder, config)
    pictures = [picture(28, 28, 0), picture(90, 60, 1)]
    prompts = [
        processor.encode_messages((Message("user", "A <image> B <image> which image ?"),), order)
        for order in (pictures, pictures[::-1])
    ]
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    here = load_policy(folder, config, cpu)
    dtype = "bfloat16" if attention in IN_BFLOAT16 else "float32"
    there = load_policy(folder, replace(config, attention=attention, dtype=dtype), cuda).to(cuda)
    banned = processor.unsampled_token_ids()
    out = InProcessEngine(there, processor, 8).generate(prompts, SamplingParams(3, 1.0, 9), seed=1)
    batch = pack_row(segments_of_samples(prompts, out))
    ours = HeadLoss(there, banned, 1.0).logprobs(batch).logprobs.cpu()
    expected = HeadLoss(here, banned, 1.0).logprobs(batch).logprobs
    of_engine = torch.from_numpy(np.concatenate([c.logprobs for cs in out for c in cs]))
    assert (ours - expected).abs().max() < TOLERANCE[attention]
    assert (of_engine - expected).abs().max() < TOLERANCE[attention]

    rng = np.random.default_rng(0)
    segments = [
        Segment(p, tuple(rng.integers(20, 60, n) for n in (30, 9, 1)), (1.0,) * 3) for p in prompts
    ]
    shared_step(here.train(), segments, 80)
    shared_step(there.train(), segments, 80)
    pairs = [
        (p.grad, q.grad.cpu()) for p, q in zip(here.parameters(), there.parameters(), strict=True)
    ]
    lost = sum((p - q).square().sum() for p, q in pairs) / sum(p.square().sum() for p, _ in pairs)
    assert lost.sqrt() < TOLERANCE[attention]


@pytest.mark.parametrize("more", ["", "--model.compile True", "--model.liger True"])
@pytest.mark.parametrize("attention", INSTALLED)
def test_a_run(attention: str, more: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (
        "--run.seeds --run.trackers --cold-start.steps 30 --train.steps 3 --eval.examples 4 "
        f"--train.updates-per-batch 2 --model.attention {attention} {more} "
        f"--model.dtype {'float32' if attention == 'flex' else 'bfloat16'}"
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo", "--run.dir", str(folder), *options.split()])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cold = [r["loss"] for r in rows if r["stage"] == "cold_start"]
    assert cold[-1] < 0.8 * cold[0]
    assert all(math.isfinite(r["reward/mean"]) for r in rows if r["stage"] == "rl")
    assert json.loads((folder / "summary.json").read_text())["device"].startswith("cuda")
