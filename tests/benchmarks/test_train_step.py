"""The benchmark of training steps: its counts are the setting's, and a wrong variant is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

pytest.importorskip("transformers")


import perl.model.policy
from benchmarks.bench_train_step import main, parse
from benchmarks.train_step import flops, variants
from benchmarks.train_step.measure import make_trainee
from benchmarks.train_step.variants import Logprobs, Trainee

ROOT = Path(__file__).parents[2]
IMAGES, ORDERS, ROLLOUTS = (2, 3), 2, 3
SMALL = [
    *("--device=cpu", "--model=tiny", "--images", *map(str, IMAGES)),
    *(f"--orders={ORDERS}", f"--rollouts={ROLLOUTS}", "--completion=100", "--repeats=1"),
    *("--tokens-per-image=12", "--budget=1024"),
]


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    return make_trainee(parse(SMALL)[0])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """As a user runs it, from a folder that holds none of its modules."""
    folder = tmp_path_factory.mktemp("bench")
    script = ROOT / "benchmarks" / "bench_train_step.py"
    done = subprocess.run(
        [sys.executable, str(script), *SMALL, "--json=report.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in variants.VARIANTS)
    yield json.loads((folder / "report.json").read_text())


def test_variants_agree_and_are_measured(report: dict[str, Any]) -> None:
    assert list(report["variants"]) == ["padded", "packed", "shared"]
    for found in report["variants"].values():
        assert found["max_rel_grad_diff"] < 1e-3
        assert found["seconds"] > 0
        assert found["flops"] == sum(found["flops_by_part"].values())
        assert min(found["flops_by_part"].values()) > 0
    assert report["variants"]["padded"]["max_rel_grad_diff"] == 0
    assert report["variants"]["packed"]["max_rel_grad_diff"] > 0
    assert report["setting"]["dtype"] == "float32"
    assert report["setting"]["torch"] == torch.__version__


def test_counts_are_those_of_the_setting(report: dict[str, Any], trainee: Trainee) -> None:
    found = report["variants"]
    sequences = ORDERS * ROLLOUTS
    images = {name: variant["images_encoded"] for name, variant in found.items()}
    shown = sum(IMAGES)
    assert images == {"padded": sequences * shown, "packed": sequences * shown, "shared": shown}

    prompts = [len(s.prompt.input_ids) for s in trainee.segments]
    completions = [[len(c) for c in s.completions] for s in trainee.segments]
    lengths = [p + n for p, own in zip(prompts, completions, strict=True) for n in own]
    size = 1024 // max(lengths)
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    assert found["padded"]["lm_tokens"] == sum(len(b) * max(b) for b in batches)
    assert found["packed"]["lm_tokens"] == sum(lengths)
    # Each prompt and its completions fit the budget together.
    assert found["shared"]["lm_tokens"] == sum(prompts) + sum(map(sum, completions))
    assert all(70 <= n <= 130 for own in completions for n in own)


def test_shared_computes_least(report: dict[str, Any]) -> None:
    padded, packed, shared = report["variants"].values()
    assert shared["lm_tokens"] < packed["lm_tokens"] < padded["lm_tokens"]
    assert shared["flops"] < 0.6 * min(packed["flops"], padded["flops"])
    # SDPA pads the images of a row a little, which stock towers take one by one.
    towers = [v["flops_by_part"]["tower"] for v in (padded, packed)]
    assert towers[0] <= towers[1] <= 1.2 * towers[0]
    # Every copy of an image costs the same: 6 copies of 5 images each, next to 5.
    copies = towers[0] / shared["flops_by_part"]["tower"]
    assert copies == pytest.approx(ORDERS * ROLLOUTS, rel=0.1)
    texts = [v["flops_by_part"]["language_model"] for v in (padded, packed, shared)]
    assert texts[2] < texts[1] <= texts[0]
    assert shared["peak_bytes"] < padded["peak_bytes"]
    # Heads score the same tokens, and nothing else reaches them.
    assert len({v["flops_by_part"]["head"] for v in (padded, packed, shared)}) == 1


def test_pieces_count_as_attention_on_each() -> None:
    """What PyTorch's counter says of SDPA on one piece after the other."""
    sizes = [(3, 5), (2, 4)]
    heads, dim = 4, 8
    query, key = torch.empty(5, heads, dim), torch.empty(9, 2, dim)
    cu_query, cu_key = torch.tensor([0, 3, 5]), torch.tensor([0, 5, 9])
    shapes = [((1, heads, q, dim), (1, 2, k, dim)) for q, k in sizes]
    forward = sum(flops._sdpa(q, k, k) for q, k in shapes)
    backward = sum(flops._sdpa_backward(q, q, k, k) for q, k in shapes)
    repeated = [(q, (1, heads, *k[2:])) for q, k in shapes]
    assert forward == sum(sdpa_flop_count(q, k, k) for q, k in repeated)
    assert backward == sum(sdpa_backward_flop_count(q, q, k, k) for q, k in repeated)
    assert flops._varlen(query, key, key, cu_query, cu_key, 3, 5) == forward
    saved = (query, key, key, query, torch.empty(0), cu_query, cu_key)
    assert flops._varlen_backward(query, *saved, 3, 5) == backward


def test_wrong_log_probs_are_refused(monkeypatch, tmp_path, fails) -> None:
    """Completions that do not see their prompt."""
    layout = perl.model.policy.PackedLayout

    def blind(starts, prefix_starts, prefix_lengths, device):
        return layout(starts, prefix_starts, torch.zeros_like(prefix_lengths), device)

    monkeypatch.setattr("perl.model.policy.PackedLayout", blind)
    said = fails(main, [*SMALL, f"--json={tmp_path / 'report.json'}"], 1)
    assert said.startswith("shared: log-probs differ from padded's by")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.01), ("bfloat16", 1.03)])
def test_wrong_gradients_are_refused(dtype, factor, monkeypatch, tmp_path, fails) -> None:
    """Log-probs are right, and every gradient is a little too large."""
    right = variants.packed

    def heavy(trainee: Trainee) -> Logprobs:
        trainee.normalizer /= factor
        yield from right(trainee)
        trainee.normalizer *= factor

    monkeypatch.setitem(variants.VARIANTS, "packed", heavy)
    said = fails(main, [*SMALL, f"--dtype={dtype}", f"--json={tmp_path / 'report.json'}"], 1)
    assert said.startswith("packed: the gradient of ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [["--dtype=bfloat16"], ["--freeze-vision"], ["--checkpointing"]], ids=lambda x: x[0]
)
def test_other_settings_are_proven_too(options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main([*SMALL, *options, "--padded-tower=packed", f"--json={file}"]) == 0
    found = json.loads(file.read_text())["variants"]
    assert found["shared"]["images_encoded"] == sum(IMAGES)
    assert found["packed"]["images_encoded"] == ORDERS * ROLLOUTS * sum(IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollouts=0"], "argument --rollouts: 0 is not a positive whole number"),
        (["--images", "2", "many"], "argument --images: many is not a positive whole number"),
        (["--images", "2", "--orders=3"], "--orders 3: 2 images have only 2"),
        (["--model=nowhere"], "--model nowhere: choose 3b, 7b, 0.6b, tiny or a model folder"),
        (["--orders=1", "--rollouts=1"], "--orders 1 --rollouts 1: a single completion"),
        (["--json=/nowhere/report.json"], "--json /nowhere/report.json: give a file in a folder"),
        (["--json=/dev/null"], "--json /dev/null: give a file in a folder"),
        ([f"--json={300 * 'x'}"], f"--json {300 * 'x'}: it cannot be written (File name too long)"),
        ([*SMALL, "--budget=20"], "--budget 20: a sequence has 234 tokens; raise it"),
        (["--batch=3"], "unrecognized arguments: --batch=3"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, fails) -> None:
    assert fails(main, ["--device=cpu", *options]).startswith(message)
