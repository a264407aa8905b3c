"""On a CUDA device: the same log-probs as on the CPU for every attention that is installed, and a run in bfloat16."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perl.cli import main
from perl.config import ModelConfig
from perl.loading import load_policy, load_processor
from perl.loss import HeadLoss
from perl.packing import pack_row
from perl.rollout import InProcessEngine, SamplingParams
from perl.tiny import TINY_QWEN
from perl.types import Message, Segment

pytestmark = pytest.mark.gpu

INSTALLED = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
# bfloat16 keeps 8 bits: log-probs of a few nats come out a few hundredths off.
TOLERANCE = {"sdpa": 1e-4, "flash_attention_2": 0.1}


@pytest.mark.parametrize("attention", INSTALLED)
@pytest.mark.parametrize("name", TINY_QWEN)
def test_logprobs_are_those_of_the_cpu(
    name: str, attention: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder, config = str(tiny_folder(name)), ModelConfig(max_pixels=28 * 28 * 16)
    processor = load_processor(folder, config)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
        for w, h in ((28, 28), (90, 60))
    ]
    prompts = [
        processor.encode_messages((Message("user", "A <image> B <image> which image ?"),), order)
        for order in (pictures, pictures[::-1])
    ]
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    there = load_policy(folder, replace(config, attention=attention), cuda).to(cuda)
    banned = processor.unsampled_token_ids()
    with torch.autocast("cuda", torch.bfloat16, enabled=attention != "sdpa"):
        out = InProcessEngine(there, processor, 8).generate(
            prompts, SamplingParams(3, 1.0, 9), seed=1
        )
        batch = pack_row(
            [
                Segment(p, tuple(c.token_ids for c in cs), (1.0,) * 3)
                for p, cs in zip(prompts, out, strict=True)
            ]
        )
        ours = HeadLoss(there, banned, 1.0).logprobs(batch).logprobs.cpu()
    here = HeadLoss(load_policy(folder, config, cpu), banned, 1.0).logprobs(batch).logprobs
    sampled = torch.from_numpy(np.concatenate([c.logprobs for cs in out for c in cs]))
    assert (ours - here).abs().max() < TOLERANCE[attention]
    assert (sampled - here).abs().max() < TOLERANCE[attention]


@pytest.mark.parametrize("attention", INSTALLED)
def test_a_run_in_bfloat16(attention: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (
        "--run.seeds --run.trackers --cold-start.steps 30 --train.steps 3 --eval.examples 4 "
        f"--train.updates-per-batch 2 --model.attention {attention}"
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo", "--run.dir", str(folder), *options.split()])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cold = [r["loss"] for r in rows if r["stage"] == "cold_start"]
    assert cold[-1] < 0.8 * cold[0]
    assert all(math.isfinite(r["reward/mean"]) for r in rows if r["stage"] == "rl")
    assert json.loads((folder / "summary.json").read_text())["device"].startswith("cuda")
