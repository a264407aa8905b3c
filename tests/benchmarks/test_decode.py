"""The benchmark of decoding: both sides sample what the setting says, and what is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.bench_decode import main, parse
from benchmarks.decode import measure
from benchmarks.decode.counts import Tally
from benchmarks.decode.sides import Ours, Stock
from tests.messages import tells

IMAGES, N, TOKENS, ROUNDS = (2, 1), 3, 12, 2
SMALL = [
    *("--device=cpu", "--model=tiny-7b", "--images", *map(str, IMAGES), f"--rollouts={N}"),
    *(f"--tokens={TOKENS}", "--tokens-per-image=6", f"--rounds={ROUNDS}"),
]
COUNTED = {
    "bytes_per_prompt_token_layer": 3.0,
    "bytes_per_own_token_layer": 9.0,
    "operators_per_layer": 2.0,
    "host_waits_per_step": 1.0,
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes seconds: tests/rollout/test_decode_counts.py does it."""
    monkeypatch.setattr(measure, "counts", lambda make_side, device: COUNTED)


def test_a_report_has_both_sides(
    counted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    assert main([*SMALL, f"--json={file}"]) == 0
    report = json.loads(file.read_text())
    setting = report["setting"]
    for name in ("stock", "ours"):
        side = report[name]
        assert 0 < side["max_logprob_diff"] < 1e-5
        assert side["seconds_first_token"] > 0 and side["cpu_seconds"] > 0
        assert len(side["seconds_by_round"]) == len(side["seconds_uneven_by_round"]) == ROUNDS
        assert side["seconds"] == np.median(side["seconds_by_round"])
        assert all(0 < n < len(IMAGES) * N * TOKENS for n in side["tokens_uneven_by_round"])
        prompt = np.mean(setting["prompt_tokens"])
        mean = (3 * prompt + 9 * TOKENS / 2) / (prompt + TOKENS / 2)
        assert side["bytes_per_cached_token_layer"] == pytest.approx(mean)
        assert side["operators_per_layer"] == 2
    assert len(setting["prompt_tokens"]) == len(IMAGES)
    assert setting["tokens"] == TOKENS and setting["dtype"] == "float32"
    tells(capsys.readouterr().out, *setting["prompt_tokens"], "tiny-7b", f"{TOKENS}")


@pytest.mark.parametrize("wrong", ["stock", "ours"])
def test_wrong_log_probs_are_not_timed(
    wrong: str, counted: None, monkeypatch: pytest.MonkeyPatch, fails: Any
) -> None:
    """Of a single token, by a hundredth."""
    kind = {"stock": Stock, "ours": Ours}[wrong]
    sample = kind.sample

    def altered(self: Any, *args: Any) -> Any:
        out = sample(self, *args)
        out[1][0].logprobs[0] += 0.01
        return out

    def timed(*_: Any) -> None:
        raise AssertionError("this was timed")

    monkeypatch.setattr(kind, "sample", altered)
    monkeypatch.setattr(measure._Timed, "rounds", timed)
    tells(fails(main, SMALL, code=1), wrong, "log-probs", "fp64")


def test_completions_of_stock_end_behind_their_first_end() -> None:
    setting, _ = parse(SMALL)
    model = measure.make_model(setting)
    prompts = measure.prompts_of(setting, model.config)
    ends = list(range(200))
    out = Stock(model).sample(prompts, N, TOKENS, 1, ends, logprobs=True)
    completions = [c for cs in out for c in cs]
    assert [len(cs) for cs in out] == [N] * len(IMAGES)
    assert len({len(c.token_ids) for c in completions}) > 2
    for c in completions:
        assert len(c.logprobs) == len(c.token_ids) and c.logprobs.max() < 0
        ended = np.isin(c.token_ids, ends)
        assert not ended[:-1].any() and ended[-1] == c.finished
        assert c.finished or len(c.token_ids) == TOKENS


def test_operators_bytes_and_waits_are_counted() -> None:
    x, table = torch.ones(2, 3), torch.ones(100, 4)
    with Tally() as tally:
        y = x.expand(5, 2, 3) + 1  # Reads 24 bytes, writes 120.
        y.view(30)[:6].tolist()
        table.index_copy_(0, torch.tensor([3]), torch.zeros(1, 4))
        table[torch.tensor([1, 2])].cpu().tolist()
        bool(y.sum() > 0)
        torch.empty(1000)
        y.nonzero()
    assert tally.bytes["add"] == 24 + 120
    # An index of 8 bytes; a row of 16 that is read and written.
    assert tally.bytes["index_copy_"] == 8 + 2 * 16
    assert tally.bytes["index"] == 2 * 8 + 2 * 2 * 16
    assert tally.waits == {"tolist": 1, "cpu": 1, "_local_scalar_dense": 1, "nonzero": 1}
    assert "view" not in tally.operators and "empty" not in tally.operators
    with Tally(compute=False) as tally:
        assert not (x @ x.T).any()
    assert tally.bytes["mm"] == 2 * 24 + 16


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--rollouts=0"], ["--rollouts", 0]),
        (["--images", "2", "--prompts=3"], ["--prompts", 3, 2]),
        (["--model=nowhere"], ["--model", "nowhere", "tiny-7b"]),
        (["--json=/nowhere/report.json"], ["--json", "/nowhere/report.json"]),
        (["--batch=3"], ["--batch", "--help"]),
    ],
)
def test_bad_options_are_one_line(options: list[str], names: list[Any], fails: Any) -> None:
    tells(fails(main, ["--device=cpu", *options]), *names)
