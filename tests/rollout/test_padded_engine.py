"""Sampling by transformers' `generate`: what it is asked, and whose tokens and log-probs are whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.model.padded import PaddedPolicy
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.rollout.engines import in_process
from perl.rollout.padded import PaddedEngine
from perl.types import EncodedImage, EncodedPrompt

END, PAD, BANNED = 8, 7, [5, 6]
IMAGE = EncodedImage("k", torch.zeros(0), (1,), 1)


def prompt(token: int, shows: bool = False) -> EncodedPrompt:
    return EncodedPrompt(np.array([token]), np.zeros((1, 1)), 1, (IMAGE,) if shows else (), -1)


class Padded(PaddedPolicy):
    """Completes prompt t by t, t + 1 and the end, and its next copy by three that do not end; token t has log-prob -t."""

    base: Any = None  # type: ignore[assignment]
    device = torch.device("cpu")  # type: ignore[assignment]
    compiled = False

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.asked: list[tuple[list[int], Any]] = []
        self.packed: list[tuple[int, bool]] = []
        self.before = SimpleNamespace(eos_token_id=None)
        self.base = SimpleNamespace(generate=self.generate, generation_config=self.before)

    def prompt_inputs(self, prompts: Any, side: str) -> Any:
        assert side == "left" and len({bool(p.images) for p in prompts}) == 1
        return {"input_ids": torch.tensor([[PAD, *p.input_ids] for p in prompts])}

    def generate(self, input_ids: torch.Tensor, stopping_criteria: Any = None) -> torch.Tensor:
        self.stopping_criteria = stopping_criteria
        asked = input_ids[:, 1].tolist()
        self.asked.append((asked, self.base.generation_config))
        rows = []
        for i, t in enumerate(asked):
            again = i and asked[i - 1] == t
            rows.append([t, END, PAD] if not again else [t, t + 1, t + 2])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    def pack(self, segments: Any, tokens: int, share: bool) -> Any:
        """One batch, the last segment's completions first."""
        self.packed.append((tokens, share))
        source = [
            (s, r)
            for s in reversed(range(len(segments)))
            for r in range(len(segments[s].completions))
        ]
        ids = [segments[s].completions[r] for s, r in source]
        ends = torch.tensor([0, *np.cumsum([len(i) for i in ids])])
        return [SimpleNamespace(source=source, completion_cu_seqlens=ends, ids=np.concatenate(ids))]


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_completions_of_prompts_with_and_without_pictures(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[Any] = []

    def head(policy: Any, banned: torch.Tensor, temperature: float) -> Any:
        heads.append((banned.tolist(), temperature))
        return SimpleNamespace(
            logprobs=lambda batch: SimpleNamespace(logprobs=-torch.tensor(batch.ids).double())
        )

    monkeypatch.setattr("perl.rollout.padded.HeadLoss", head)
    policy = Padded()
    processor: Any = SimpleNamespace(
        pad_token_id=PAD, eos_token_id=END, unsampled_token_ids=lambda: torch.tensor(BANNED)
    )
    engine = in_process(policy, processor, 80)
    assert isinstance(engine, PaddedEngine)
    prompts = [prompt(10, shows=True), prompt(20), prompt(30, shows=True)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    out = engine.generate(prompts, SamplingParams(2, temperature, 9), seed=1)
    assert (
        torch.equal(torch.get_rng_state(), state) and policy.base.generation_config is policy.before
    )
    for t, (first, second) in zip((10, 20, 30), out, strict=True):
        assert (first.token_ids.tolist(), first.finished) == ([t, END], True)
        assert (second.token_ids.tolist(), second.finished) == ([t, t + 1, t + 2], False)
        assert first.logprobs.tolist() == [-t, -END] and first.logprobs.dtype == np.float32
        assert second.logprobs.tolist() == [-t, -t - 1, -t - 2]
    assert [asked for asked, _ in policy.asked] == [[20, 20], [10, 10, 30, 30]]
    for _, settings in policy.asked:
        assert (settings.max_new_tokens, settings.pad_token_id) == (9, PAD)
        assert (settings.eos_token_id, settings.suppress_tokens) == ([END], BANNED)
        assert settings.do_sample == (temperature > 0)
        if temperature:
            assert (settings.temperature, settings.top_k, settings.top_p) == (0.7, 0, 1.0)
    assert heads == [(BANNED, temperature or 1.0)] and policy.packed == [(2**14, False)]


def test_a_stop_text_ends_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` is told which rows have come to it, and what it padded behind it is cut."""
    policy = Padded()
    monkeypatch.setattr(PaddedEngine, "_logprobs", lambda *_: {(0, 0): "first", (0, 1): "second"})
    processor: Any = SimpleNamespace(
        pad_token_id=PAD,
        eos_token_id=END,
        unsampled_token_ids=lambda: torch.tensor(BANNED),
        decode=lambda ids: " ".join(str(i) for i in ids),
    )
    engine = in_process(policy, processor, 80)
    params = SamplingParams(2, 1.0, 9, 0.9, 5, ("10 11",))
    ((first, second),) = engine.generate([prompt(10)], params, seed=1)
    assert (first.token_ids.tolist(), first.finished) == ([10, END], True)
    assert (second.token_ids.tolist(), second.finished) == ([10, 11], True)
    (criterion,) = policy.stopping_criteria
    so_far = torch.tensor([[PAD, 10, 10, 10], [PAD, 11, 10, 11], [10, 11, 10, 10]])
    assert criterion(so_far, None).tolist() == [False, True, False]
    ((_, settings),) = policy.asked
    assert (settings.top_k, settings.top_p) == (5, 0.9)


def test_other_policies_are_packed() -> None:
    policy: Any = SimpleNamespace(base=None, device="cpu")
    processor: Any = SimpleNamespace(
        pad_token_id=PAD, eos_token_id=END, unsampled_token_ids=lambda: torch.tensor(BANNED)
    )
    assert type(in_process(policy, processor, 8)) is InProcessEngine  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "together"), [(80, [3]), (79, [2, 1]), (1, [1, 1, 1])])
def test_the_budget_counts_each_completion_with_its_prompt(
    tokens: int, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts of at most 4 tokens with two completions of up to 9 each: 78 tokens; the shortest first."""
    processor: Any = SimpleNamespace(
        pad_token_id=PAD, eos_token_id=END, unsampled_token_ids=lambda: torch.tensor(BANNED)
    )
    asked: list[int] = []

    def batch(self: Any, prompts: Any, *_: Any) -> list[Any]:
        asked.append(len(prompts))
        return [p.next_position for p in prompts]

    monkeypatch.setattr(PaddedEngine, "_batch", batch)
    prompts = [EncodedPrompt(np.zeros(n), np.zeros((1, n)), n, (), -1) for n in (4, 1, 2)]
    engine = in_process(Padded(), processor, tokens - 2)
    assert engine.generate(prompts, SamplingParams(2, 1.0, 9), 1) == [4, 1, 2]
    assert asked == together
