"""Sampling with a cache: every token comes from the distribution that the stock model gives its sequence alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.model.families import ImageFeatures, family_of
from perl.model.packed.attention import use_packed_attention
from perl.model.policy import Policy
from perl.rollout.decoding import slots as slots_module
from perl.rollout.decoding.cache import KVCache
from perl.rollout.decoding.slots import Job, Slots
from perl.rollout.decoding.step import Step
from perl.rollout.engine import Completion, InProcessEngine, SamplingParams
from perl.types import EncodedImage, EncodedPrompt
from tests.messages import refused

WORDS, IMAGE, HIDDEN = 12, 11, 32
BANNED, END, OTHER_END = [10, IMAGE], 8, 9


@cache
def model() -> Any:
    """Two layers in float64 with two query heads for each of two KV heads, and distributions far from even."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **{"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [2, 1, 1],
        },
        "tie_word_embeddings": False,
    }
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": HIDDEN}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Qwen2_5_VLForConditionalGeneration(config).double()
        for name, parameter in made.named_parameters():
            std = 0.8 if "embed" in name else 0.4 if "lm_head" in name else 0.3
            torch.nn.init.normal_(parameter, std=std)
    use_packed_attention(made.model.language_model, [], "sdpa")
    return made


def shown(image: EncodedImage) -> torch.Tensor:
    """What the tower makes of a picture."""
    return torch.randn(
        image.tokens,
        HIDDEN,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(int(image.key)),
    )


class SmallPolicy(Policy):
    """`read` has the tokens of each forward pass over prompts, `decoded` the rows of each decode step."""

    def __init__(self, ends: Any = None) -> None:
        family = family_of("qwen2_5_vl")
        assert family
        super().__init__(model(), family)
        self.base.generation_config = SimpleNamespace(eos_token_id=ends)
        self.vision: Any = SimpleNamespace(
            features=lambda images: (
                ImageFeatures(torch.cat([shown(i) for i in images])) if images else None
            )
        )
        self.read: list[int] = []

    def forward(self, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.read.append(batch.num_tokens)
        return super().forward(batch, *args, **kwargs)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each decode step."""
    rows: list[int] = []
    step = Step.__call__

    def counted(self: Step, token: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(token))
        return step(self, token, *args)

    monkeypatch.setattr(Step, "__call__", counted)
    return rows


def prompt(*ids: int, key: str = "1") -> EncodedPrompt:
    """Image tokens show one picture; the axes differ there, and the next position is further on than the prompt."""
    tokens = np.array(ids)
    places = np.arange(len(ids))
    positions = np.stack([places, places // 2, places])
    count = int((tokens == IMAGE).sum())
    images = (EncodedImage(key, torch.zeros(0), (1,), count),) if count else ()
    return EncodedPrompt(tokens, positions, len(ids) + 3, images, IMAGE)


PROMPTS = [
    prompt(1, 2, 3, 4, 5),
    prompt(3, IMAGE, IMAGE, key="5"),
    prompt(6),
    prompt(2, IMAGE, 4, 4, key="9"),
]
EVERYTHING = 2**14


def engine_of(policy: Any, kv_cache_tokens: int = EVERYTHING, looks: int = 1) -> InProcessEngine:
    processor: Any = SimpleNamespace(
        pad_token_id=7,
        eos_token_id=END,
        unsampled_token_ids=lambda: torch.tensor(BANNED),
        decode=lambda ids: "".join("abcdefgh.ijk"[i] for i in ids),
    )
    engine = InProcessEngine(policy, processor, kv_cache_tokens)
    engine.steps_between_looks = looks
    return engine


@torch.no_grad()
def distributions(asked: EncodedPrompt, ids: np.ndarray, temperature: float) -> torch.Tensor:
    """float64 [L, V]: log-probs of each token of a completion, by the stock model over the sequence alone."""
    stock, start = model().eval(), len(asked.input_ids)
    tokens = torch.tensor(np.concatenate([asked.input_ids, ids]))
    embeds = stock.get_input_embeddings()(tokens)
    if asked.images:
        embeds[:start][tokens[:start] == IMAGE] = shown(asked.images[0])
    after = np.tile(asked.next_position + np.arange(len(ids)), (3, 1))
    positions = torch.tensor(np.concatenate([asked.position_ids, after], 1))[:, None]
    out = stock.model.language_model(
        inputs_embeds=embeds[None], position_ids=positions, use_cache=False
    )
    logits = stock.lm_head(out.last_hidden_state[0, start - 1 : -1])
    logits[:, BANNED] = -torch.inf
    return (logits / temperature).log_softmax(-1)


def generate(
    policy: Any, params: SamplingParams, seed: int = 1, **options: Any
) -> list[list[Completion]]:
    return engine_of(policy, **options).generate(PROMPTS, params, seed)


def ids_of(out: list[list[Completion]]) -> list[list[int]]:
    return [c.token_ids.tolist() for completions in out for c in completions]


@pytest.mark.parametrize(
    ("tokens", "read"),
    [
        (EVERYTHING, [13]),
        (64, [9, 4]),
        # No slot holds three completions: 2 of each prompt, then 1.
        (31, [5, 5, 4, 4, 3, 3, 1, 1]),
        (14, [5, 5, 5, 4, 4, 4, 3, 3, 3, 1, 1, 1]),
    ],
)
def test_samples_have_the_log_probs_of_their_sequence(tokens: int, read: list[int]) -> None:
    """Prompts of unlike length and pictures together, completions that end at other times, slots filled again."""
    policy = SmallPolicy()
    out = generate(policy, SamplingParams(3, 0.7, 9), kv_cache_tokens=tokens)
    assert [len(completions) for completions in out] == [3] * len(PROMPTS)
    lengths = set()
    for asked, completions in zip(PROMPTS, out, strict=True):
        for completion in completions:
            ids = completion.token_ids
            lengths.add(len(ids))
            assert (ids.dtype, completion.logprobs.dtype) == (np.int64, np.float32)
            every = distributions(asked, ids, 0.7)
            own = every[range(len(ids)), ids]
            np.testing.assert_allclose(completion.logprobs, own.numpy(), rtol=0, atol=2e-6)
            assert completion.finished == (ids[-1] == END) and END not in ids[:-1]
            assert completion.finished or len(ids) == 9
    assert len(lengths) > 3
    assert len({tuple(ids) for ids in ids_of(out)}) > 9
    # Each prompt is read once however many completions continue it, with others that have room.
    assert sum(policy.read) == sum(read) and (tokens == 64 or policy.read == read)


def test_prompts_are_read_in_rows_of_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5, 4, 3 and 1."""
    policy, params = SmallPolicy(), SamplingParams(1, 0.0, 4)
    together = ids_of(generate(policy, params))
    for most, read in ((8, [5, 8]), (7, [5, 7, 1]), (4, [5, 4, 4])):
        monkeypatch.setattr(slots_module, "PREFILL_TOKENS", most)
        policy.read.clear()
        assert (ids_of(generate(policy, params)), policy.read) == (together, read)


def test_the_most_likely_token_at_temperature_zero() -> None:
    out = generate(SmallPolicy(), SamplingParams(1, 0.0, 6))
    for asked, (completion,) in zip(PROMPTS, out, strict=True):
        every = distributions(asked, completion.token_ids, 1.0)
        assert every.argmax(-1).tolist() == completion.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, every.max(-1).values, rtol=0, atol=2e-6)
    assert ids_of(generate(SmallPolicy(), SamplingParams(1, 0.0, 6), seed=2)) == ids_of(out)


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """Of the first tokens of 4000 samples; three standard deviations are at most 0.024."""
    (found,) = engine_of(SmallPolicy()).generate([PROMPTS[0]], SamplingParams(4000, 2.0, 1), 1)
    shares = np.bincount([int(c.token_ids[0]) for c in found], minlength=WORDS) / 4000
    wanted = distributions(PROMPTS[0], np.array([0]), 2.0)[0].exp()
    np.testing.assert_allclose(shares, wanted, atol=0.024)
    assert shares[BANNED].tolist() == [0, 0]


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 4)])
def test_what_is_not_among_the_likeliest_is_left_out(top_p: float, top_k: int) -> None:
    """Of the first tokens of 4000 samples; log-probs stay those of the whole distribution."""
    params = SamplingParams(4000, 2.0, 1, top_p, top_k)
    (found,) = engine_of(SmallPolicy()).generate([PROMPTS[0]], params, 1)
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
    np.testing.assert_allclose([c.logprobs[0] for c in found], every[ids], rtol=0, atol=2e-6)


def test_a_stop_text_ends_a_completion_and_stays() -> None:
    """It may span tokens, and stand anywhere in the last one."""
    free = [c for cs in generate(SmallPolicy(), SamplingParams(30, 2.0, 9)) for c in cs]
    stop = ("bd", "k")
    out = generate(SmallPolicy(), SamplingParams(30, 2.0, 9, stop=stop))
    decode = engine_of(SmallPolicy()).processor.decode
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
        return ids_of(generate(SmallPolicy(), SamplingParams(2, 1.0, 8), seed=seed))

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
    out = generate(SmallPolicy(ends), SamplingParams(30, 2.0, 9))
    completions = [c for cs in out for c in cs]
    assert {int(c.token_ids[-1]) for c in completions if c.finished} == known
    for completion in completions:
        assert not known & {int(t) for t in completion.token_ids[:-1]}
        assert completion.finished or len(completion.token_ids) == 9


@pytest.mark.parametrize("training", [False, True])
def test_the_policy_is_left_as_it_was(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = SmallPolicy().train(training), []
    embed = policy.embed
    monkeypatch.setattr(policy, "embed", lambda *a: seen.append(policy.training) or embed(*a))
    generate(policy, SamplingParams(1, 1.0, 2), kv_cache_tokens=14)
    assert seen == [False, False] and policy.training == training
    monkeypatch.setattr(policy, "embed", None)
    with pytest.raises(TypeError):
        generate(policy, SamplingParams(1, 1.0, 2))
    assert policy.training == training


def test_the_cache_is_freed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what comes next, not when Python next looks for cycles."""
    made: list[weakref.ref[KVCache]] = []

    class Kept(KVCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(slots_module, "KVCache", Kept)
    gc.disable()
    try:
        generate(SmallPolicy(), SamplingParams(6, 0.7, 30))
        assert [cache() for cache in made] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_layers_run_uncompiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, entered = SmallPolicy(), []
    policy.compiled = compiled

    @contextmanager
    def uncompiled() -> Iterator[None]:
        entered.append(len(policy.read))
        yield
        entered.append(len(policy.read))

    monkeypatch.setattr("perl.rollout.engine.uncompiled", uncompiled)
    generate(policy, SamplingParams(1, 0.0, 2))
    assert entered == ([0, 1] if compiled else [])


def test_no_prompts() -> None:
    assert engine_of(SmallPolicy()).generate([], SamplingParams(2, 1.0, 2), 1) == []


def test_a_prompt_over_the_budget() -> None:
    """Nothing is read before it is seen."""
    policy = SmallPolicy()
    with refused("rollout.kv_cache_tokens", 13, 14, "rollout.max_new_tokens"):
        generate(policy, SamplingParams(3, 1.0, 9), kv_cache_tokens=13)
    assert policy.read == []


def test_what_has_ended_is_let_go_of_when_that_halves_the_rows(decoded: list[int]) -> None:
    out = generate(SmallPolicy(), SamplingParams(6, 0.7, 30))
    lengths = [[len(c.token_ids) for c in completions] for completions in out]
    rows, expected = 24, []
    for step in range(1, max(map(max, lengths))):
        going = [n for n in (sum(length > step for length in own) for own in lengths) if n]
        smaller = len(going) * max(going)
        rows = smaller if 2 * smaller <= rows else rows
        expected.append(rows)
    assert decoded == expected and expected[-1] <= 12
    decoded.clear()
    generate(SmallPolicy(), SamplingParams(3, 0.7, 1))
    assert decoded == []


def test_a_slot_is_free_when_its_own_completions_have_ended(decoded: list[int]) -> None:
    """One slot of two rows: two completions of a prompt, then the third beside a row of nothing."""
    out = generate(SmallPolicy(), SamplingParams(3, 0.7, 9), kv_cache_tokens=5 + 2 * 9)
    lengths = [[len(c.token_ids) for c in completions] for completions in out]
    assert len(decoded) == sum(max(own[:2]) + own[2] - 2 for own in lengths) < 4 * 2 * 8


@pytest.mark.parametrize(
    ("sampled", "shape", "homes"),
    [
        # The first row of the second slot has ended, which takes none away from the first.
        ([1, 2, END, 3, END, END, END, END], (2, 2), [[0, 1], [2, 3]]),
        ([END, 2, 3, END, 4, END, END, 5], (4, 1), [[1], [2], [4], [7]]),
        ([END, END, 3, END, END, END, 4, END], (2, 1), [[2], [6]]),
        ([1, 2, END, 3, 4, END, END, END], (4, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_rows_that_move_together_stay_themselves(
    sampled: list[int], shape: tuple[int, int], homes: list[list[int]]
) -> None:
    policy, of_all = SmallPolicy().eval(), []
    for moves in (False, True):
        slots = Slots(policy, PROMPTS, (4, 2), 5)
        with torch.no_grad():
            slots.fill(range(4), [Job(i, asked, 2) for i, asked in enumerate(PROMPTS)])
            slots.logits()
            slots.put(torch.tensor(sampled), torch.zeros(8), torch.tensor([END]))
            slots.look()
            if moves:
                slots.compact()
                assert (tuple(slots.alive.shape), slots.homes) == (shape, homes)
            of_all.append(slots.logits())
    goes_on = [home for home in slots.home.tolist() if sampled[home] != END]
    assert len(goes_on) == 8 - sampled.count(END) == int(slots.alive.sum())
    torch.testing.assert_close(of_all[1][slots.alive.flatten()], of_all[0][goes_on])


@pytest.mark.parametrize("looks", [3, 16])
@pytest.mark.parametrize("tokens", [EVERYTHING, 64, 31])
def test_how_often_the_host_looks_changes_nothing(tokens: int, looks: int) -> None:
    params = SamplingParams(3, 0.0, 9)
    seldom = generate(SmallPolicy([OTHER_END]), params, kv_cache_tokens=tokens, looks=looks)
    assert ids_of(seldom) == ids_of(generate(SmallPolicy([OTHER_END]), params))
