"""Sampling with a cache: every token comes from the distribution that the sequence alone has, read off a formula."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.types import EncodedImage, EncodedPrompt

WORDS, IMAGE = 12, 11
BANNED, END, OTHER_END = [10, IMAGE], 8, 9


def logits_of(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[..., V] after tokens [..., T] at positions [..., T]: what came, where, and in which sequence."""
    state = (tokens * (1 + positions)).sum(-1, keepdim=True)
    return 3 * torch.cos(state * torch.arange(1, WORDS + 1) ** 1.5)


class Formula:
    """A language model by that formula: the keys of its cache are tokens, the values positions."""

    def __init__(self) -> None:
        from transformers import Qwen2Config

        self.config = Qwen2Config(num_hidden_layers=1)
        self.read: list[tuple[int, int]] = []

    def __call__(
        self,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        beside: Any = None,
    ) -> Any:
        assert use_cache and (beside == "of the embedding" or inputs_embeds is None)
        new = input_ids.double() if inputs_embeds is None else inputs_embeds
        self.read.append(tuple(new.shape))
        cached = (x.reshape(len(new), 1, -1, 1) for x in (new, position_ids.sum(0).double()))
        keys, values = past_key_values.update(*cached, 0)
        seen = attention_mask[:, None, :, None]
        tokens, positions = (torch.where(seen, x, 0)[:, 0, :, 0] for x in (keys, values))
        hidden = torch.full((*new.shape, WORDS), torch.nan)
        hidden[:, -1] = logits_of(tokens, positions)
        return SimpleNamespace(last_hidden_state=hidden)


class FormulaPolicy:
    """Its image tokens become the number that their picture's key is."""

    training, compiled, device = True, False, torch.device("cpu")

    def __init__(self, ends: Any = None) -> None:
        self.base = SimpleNamespace(
            lm_head=lambda hidden: hidden, generation_config=SimpleNamespace(eos_token_id=ends)
        )
        self.core = SimpleNamespace(language_model=Formula())
        self.vision = SimpleNamespace(
            features=lambda images: torch.tensor(
                [float(i.key) for i in images for _ in range(i.tokens)]
            )
        )
        self.modes: list[bool] = []

    def embed(self, ids: Any, visual: Any, features: Any) -> tuple[Any, dict[str, Any]]:
        embeds = ids.double()
        embeds[visual] = features.double()
        return embeds, {"beside": "of the embedding"}

    def position_ids(self, positions: Any) -> Any:
        return positions

    def eval(self) -> None:
        self.train(False)

    def train(self, mode: bool) -> None:
        self.training = mode
        self.modes.append(mode)


def prompt(*ids: int, key: str = "1", axes: int = 2) -> EncodedPrompt:
    """Image tokens show one picture; the second axis goes on half as fast, and both end further on than the prompt."""
    tokens = np.array(ids)
    places = np.arange(len(ids))
    positions = np.stack([places, places // 2])[:axes]
    count = int((tokens == IMAGE).sum())
    images = (EncodedImage(key, torch.zeros(0), (1,), count),) if count else ()
    return EncodedPrompt(tokens, positions, len(ids) + 3, images, IMAGE)


PROMPTS = [
    prompt(1, 2, 3, 4, 5),
    prompt(3, IMAGE, IMAGE, key="5"),
    prompt(6),
    prompt(2, IMAGE, 4, 4, key="9"),
]


def engine_of(policy: Any, batch_size: int = 64, **options: Any) -> InProcessEngine:
    processor: Any = SimpleNamespace(
        pad_token_id=7,
        eos_token_id=END,
        unsampled_token_ids=lambda: torch.tensor(BANNED),
        decode=lambda ids: "".join("abcdefgh.ijk"[i] for i in ids),
    )
    return InProcessEngine(policy, processor, batch_size, **options)


def distributions(asked: EncodedPrompt, ids: np.ndarray, temperature: float) -> torch.Tensor:
    """float64 [L, V]: log-probs of each token of a completion, the sequence alone."""
    shown = torch.tensor(asked.input_ids).double()
    if asked.images:
        shown[shown == IMAGE] = float(asked.images[0].key)
    shown = torch.cat([shown, torch.tensor(ids).double()])
    axes = len(asked.position_ids)
    after = axes * (asked.next_position + torch.arange(len(ids)))
    positions = torch.cat([torch.tensor(asked.position_ids.sum(0)), after])
    start = len(asked.input_ids)
    logits = torch.stack([logits_of(shown[:n], positions[:n]) for n in range(start, len(shown))])
    logits[:, BANNED] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def generate(
    policy: Any, params: SamplingParams, seed: int = 1, **options: Any
) -> list[list[Completion]]:
    return engine_of(policy, **options).generate(PROMPTS, params, seed)


@pytest.mark.parametrize("batch_size", [64, 6, 1])
def test_samples_have_the_log_probs_of_their_sequence(batch_size: int) -> None:
    """Prompts of unlike length and pictures together, completions that end at other times."""
    policy = FormulaPolicy()
    out = generate(policy, SamplingParams(3, 0.7, 9), batch_size=batch_size)
    assert [len(completions) for completions in out] == [3] * len(PROMPTS)
    lengths = set()
    for asked, completions in zip(PROMPTS, out, strict=True):
        for completion in completions:
            ids = completion.token_ids
            lengths.add(len(ids))
            assert (ids.dtype, completion.logprobs.dtype) == (np.int64, np.float32)
            every = distributions(asked, ids, 0.7)
            own = every[range(len(ids)), ids]
            np.testing.assert_allclose(completion.logprobs, own.numpy(), rtol=0, atol=2e-5)
            assert completion.finished == (ids[-1] == END) and END not in ids[:-1]
            assert completion.finished or len(ids) == 9
    assert len(lengths) > 3
    assert len({tuple(c.token_ids) for cs in out for c in cs}) > 9
    # Each prompt is read once however many completions continue it, those of like length together.
    prefills = [shape for shape in policy.core.language_model.read if shape[1] > 1 or shape[0] == 1]
    assert prefills[0] == {64: (4, 5), 6: (2, 3), 1: (1, 1)}[batch_size]


def test_what_has_ended_is_not_read_again() -> None:
    policy = FormulaPolicy()
    out = generate(policy, SamplingParams(3, 0.7, 9))
    _, *decoded = policy.core.language_model.read
    lengths = [len(c.token_ids) for cs in out for c in cs]
    assert decoded == [(sum(n > k for n in lengths), 1) for k in range(1, max(lengths))]
    policy = FormulaPolicy()
    generate(policy, SamplingParams(3, 0.7, 1))
    assert len(policy.core.language_model.read) == 1


def test_the_most_likely_token_at_temperature_zero() -> None:
    out = generate(FormulaPolicy(), SamplingParams(1, 0.0, 6))
    for asked, (completion,) in zip(PROMPTS, out, strict=True):
        every = distributions(asked, completion.token_ids, 1.0)
        assert every.argmax(-1).tolist() == completion.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, every.max(-1).values, rtol=0, atol=2e-5)
    other_seed = generate(FormulaPolicy(), SamplingParams(1, 0.0, 6), seed=2)
    assert [c.token_ids.tolist() for (c,) in other_seed] == [c.token_ids.tolist() for (c,) in out]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """Of the first tokens of 4000 samples; three standard deviations are at most 0.024."""
    (found,) = engine_of(FormulaPolicy(), 4000).generate(
        [PROMPTS[0]], SamplingParams(4000, 2.0, 1), 1
    )
    shares = np.bincount([int(c.token_ids[0]) for c in found], minlength=WORDS) / 4000
    wanted = distributions(PROMPTS[0], np.array([0]), 2.0)[0].exp()
    np.testing.assert_allclose(shares, wanted, atol=0.024)
    assert shares[BANNED].tolist() == [0, 0]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 4)])
def test_what_is_not_among_the_likeliest_is_left_out(top_p: float, top_k: int) -> None:
    """Of the first tokens of 4000 samples; log-probs stay those of the whole distribution."""
    params = SamplingParams(4000, 2.0, 1, top_p, top_k)
    (found,) = engine_of(FormulaPolicy(), 4000).generate([PROMPTS[0]], params, 1)
    every = distributions(PROMPTS[0], np.array([0]), 2.0)[0]
    likely, of_rank = every.exp().sort(descending=True)
    kept = likely[: top_k or WORDS]
    kept = kept / kept.sum()
    # The last one is that which first brings the sum to top-p.
    count = len(kept) if top_p == 1 else int((kept.cumsum(0) < top_p).sum()) + 1
    wanted = torch.zeros(WORDS).double()
    wanted[of_rank[:count]] = kept[:count] / kept[:count].sum()
    ids = [int(c.token_ids[0]) for c in found]
    shares = np.bincount(ids, minlength=WORDS) / 4000
    np.testing.assert_allclose(shares, wanted, atol=0.024)
    assert set(ids) == set(of_rank[:count].tolist()) and 1 < count < WORDS - 2
    np.testing.assert_allclose([c.logprobs[0] for c in found], every[ids], rtol=0, atol=2e-5)


def test_a_stop_text_ends_a_completion_and_stays() -> None:
    """It may span tokens, and stand anywhere in the last one."""
    free = [c for cs in generate(FormulaPolicy(), SamplingParams(30, 2.0, 9)) for c in cs]
    stop = ("bd", "k")
    out = generate(FormulaPolicy(), SamplingParams(30, 2.0, 9, stop=stop))
    decode = engine_of(FormulaPolicy()).processor.decode
    stopped = 0
    for completion in (c for cs in out for c in cs):
        text = decode(completion.token_ids)
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert not ends or min(ends) == len(text)
        assert completion.finished == (bool(ends) or text.endswith("."))
        assert len(completion.logprobs) == len(text) and (completion.finished or len(text) == 9)
        stopped += bool(ends) and text.endswith("bd")
    assert stopped and any("bd" in decode(c.token_ids)[:-2] for c in free)


def test_the_seed_says_what_is_sampled() -> None:
    def ids(seed: int) -> list[list[int]]:
        out = generate(FormulaPolicy(), SamplingParams(2, 1.0, 8), seed=seed)
        return [c.token_ids.tolist() for completions in out for c in completions]

    assert ids(3) == ids(3) != ids(4)


@pytest.mark.parametrize(
    ("ends", "known"),
    [
        (None, {END}),
        (END, {END}),
        (OTHER_END, {END, OTHER_END}),
        ([END, OTHER_END], {END, OTHER_END}),
    ],
)
def test_ends_are_the_tokenizers_and_the_checkpoints(ends: Any, known: set[int]) -> None:
    out = generate(FormulaPolicy(ends), SamplingParams(30, 2.0, 9))
    completions = [c for cs in out for c in cs]
    assert {int(c.token_ids[-1]) for c in completions if c.finished} == known
    for completion in completions:
        assert not known & {int(t) for t in completion.token_ids[:-1]}
        assert completion.finished or len(completion.token_ids) == 9


@pytest.mark.parametrize("training", [False, True])
def test_the_policy_is_left_as_it_was(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, entered = FormulaPolicy(), []
    policy.training = training

    @contextmanager
    def autocast() -> Any:
        entered.append(policy.training)
        yield

    generate(policy, SamplingParams(1, 1.0, 2), batch_size=2, autocast=autocast)
    assert entered == [False, False] and policy.training == training
    monkeypatch.setattr(policy, "embed", None)
    with pytest.raises(TypeError):
        generate(policy, SamplingParams(1, 1.0, 2))
    assert policy.training == training


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_layers_run_uncompiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has another shape."""
    policy, entered = FormulaPolicy(), []
    policy.compiled = compiled

    @contextmanager
    def uncompiled() -> Any:
        entered.append(len(policy.core.language_model.read))
        yield
        entered.append(len(policy.core.language_model.read))

    monkeypatch.setattr("perl.rollout.engine.uncompiled", uncompiled)
    generate(policy, SamplingParams(1, 0.0, 2))
    assert entered == ([0, 2] if compiled else [])


def test_no_prompts() -> None:
    assert engine_of(FormulaPolicy()).generate([], SamplingParams(2, 1.0, 2), 1) == []
