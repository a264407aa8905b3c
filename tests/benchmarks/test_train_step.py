"""The benchmark of training steps: its counts are the setting's, and a wrong variant is not timed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

pytest.importorskip("transformers")


import perl.model.policy
from benchmarks.bench_train_step import main, parse
from benchmarks.train_step import flops
from benchmarks.train_step.measure import Reference, fresh, make_trainee, time_rounds
from benchmarks.train_step.variants import Step, Trainee
from tests.messages import refused, tells

IMAGES, ORDERS, ROLLOUTS = (2, 3), 2, 3
SMALL = [
    *("--device=cpu", "--model=tiny", "--images", *map(str, IMAGES)),
    *(f"--orders={ORDERS}", f"--rollouts={ROLLOUTS}", "--completion=100", "--repeats=1"),
    *("--tokens-per-image=12", "--budget=1024"),
]


SECONDS = {"padded": [4.0, 6.0, 50.0], "packed": [3.0, 5.0, 4.0], "shared": [1.0, 2.0, 9.0]}


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    return make_trainee(parse(SMALL)[0])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All but the clock is real."""
    file = tmp_path_factory.mktemp("bench") / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.train_step.measure.time_rounds", lambda *_: SECONDS)
        assert main([*SMALL, f"--json={file}"]) == 0
    return json.loads(file.read_text())


def test_variants_agree_and_are_measured(report: dict[str, Any]) -> None:
    assert list(report["variants"]) == ["padded", "packed", "shared"]
    for name, found in report["variants"].items():
        assert found["max_rel_grad_diff"] < 1e-3
        assert found["seconds_by_round"] == SECONDS[name]
        assert found["flops"] == sum(found["flops_by_part"].values())
        assert min(found["flops_by_part"].values()) > 0
    assert [found["seconds"] for found in report["variants"].values()] == [6, 4, 2]
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


def test_each_round_has_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """From no gradients, and nothing but the step is timed."""
    now, steps = [0.0], []

    def passes(seconds: float) -> None:
        now[0] += seconds

    def step(name: str) -> None:
        steps.append(name)
        passes(len(steps))

    model: Any = SimpleNamespace(zero_grad=lambda set_to_none: passes(100.0))
    stand_in: Any = SimpleNamespace(model=model, device=torch.device("cpu"), step=step)
    monkeypatch.setattr("benchmarks.train_step.measure.time.perf_counter", lambda: now[0])
    found = time_rounds(stand_in, 2)
    assert found == {"padded": [1, 4], "packed": [2, 5], "shared": [3, 6]}
    # As many rounds as are over in 12 seconds, three at least.
    steps.clear()
    assert len(time_rounds(stand_in, 0)["padded"]) == 3


@pytest.fixture(scope="module")
def reference(trainee: Trainee) -> Reference:
    return Reference(trainee, fresh(trainee, "padded")())


def test_wrong_log_probs_are_refused(
    trainee: Trainee, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions that do not see their prompt."""
    layout = perl.model.policy.PackedLayout

    def blind(starts, prefix_starts, prefix_lengths, device):
        return layout(starts, prefix_starts, torch.zeros_like(prefix_lengths), device)

    assert reference.check("shared", fresh(trainee, "shared")(), trainee) < 1e-3
    monkeypatch.setattr("perl.model.policy.PackedLayout", blind)
    with refused("shared", "log-probs", "padded", error=AssertionError):
        reference.check("shared", fresh(trainee, "shared")(), trainee)


def heavy(trainee: Trainee, factor: float) -> Step:
    """A step of packed whose every gradient is a little too large, with the right log-probs."""
    trainee.normalizer /= factor
    step = fresh(trainee, "packed")()
    trainee.normalizer *= factor
    return step


def test_wrong_gradients_are_refused(trainee: Trainee, reference: Reference) -> None:
    with refused("packed", "gradient", "padded", error=AssertionError):
        reference.check("packed", heavy(trainee, 1.01), trainee)


def test_in_bfloat16_with_a_frozen_tower_and_checkpointing() -> None:
    options = ("--dtype=bfloat16", "--freeze-vision", "--checkpointing", "--padded-tower=packed")
    trainee = make_trainee(parse([*SMALL, *options])[0])
    reference = Reference(trainee, fresh(trainee, "padded")())
    for name, copies in (("packed", ORDERS * ROLLOUTS), ("shared", 1)):
        step = fresh(trainee, name)()
        assert 0 < reference.check(name, step, trainee) < 0.1
        assert sum(step.counts.images.values()) == copies * sum(IMAGES)
    with refused("packed", "gradient", error=AssertionError):
        reference.check("packed", heavy(trainee, 1.03), trainee)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--rollouts=0"], ["--rollouts", 0]),
        (["--images", "2", "many"], ["--images", "many"]),
        (["--images", "2", "--orders=3"], ["--orders", 3, 2]),
        (["--model=nowhere"], ["--model", "nowhere", "3b", "7b", "0.6b", "tiny"]),
        (["--orders=1", "--rollouts=1"], ["--orders", "--rollouts"]),
        (["--json=/nowhere/report.json"], ["--json", "/nowhere/report.json"]),
        ([*SMALL, "--budget=20"], ["--budget", 20, 234]),
        (["--batch=3"], ["--batch", "--help"]),
    ],
)
def test_bad_options_are_one_line(options: list[str], names: list[Any], fails) -> None:
    tells(fails(main, ["--device=cpu", *options]), *names)
