"""Packed rows against one sequence at a time through the stock model, in fp64: values, gradients, and no leak."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.model.head import HeadLoss
from perl.model.loading import load_policy
from perl.model.packed.pack import pack_row
from perl.model.policy import Policy
from perl.model.tiny import TINY_MODELS, TINY_QWEN
from perl.model.weights import trains_adapters_alone
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import Message, Segment
from tests.messages import refused
from tests.model.conftest import CONFIG
from tests.model.steps import (
    batch_logprobs,
    furthest_gradient,
    furthest_value,
    picture,
    segments_of,
    segments_of_samples,
    step_of,
    stock_logprobs,
    stock_model,
)

every = pytest.mark.parametrize("name", TINY_MODELS)
qwen = pytest.mark.parametrize("name", TINY_QWEN)


def packed_logprobs(policy: Policy, segments: list[Segment]) -> torch.Tensor:
    """Of all completions in one row, one after the other."""
    return torch.cat(list(batch_logprobs(policy, pack_row(segments)).values()))


@pytest.mark.parametrize(
    ("frozen", "checkpointing", "rows"),
    [
        (False, False, ((1000, True), (60, True), (28, True), (60, False))),
        (False, True, ((60, True),)),
        (True, False, ((60, True),)),
        (True, True, ((28, True),)),
    ],
    ids=["trained", "trained, checkpointing", "frozen", "frozen, checkpointing"],
)
@every
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(
    name: str, frozen: bool, checkpointing: bool, rows: tuple[tuple[int, bool]], load, stock_step
) -> None:
    """Orders x rollouts x unequal images, in one row, in a few, and with groups and prompts split over many."""
    stock, expected = stock_step(name)
    policy, processor = load(
        name, replace(CONFIG, freeze_vision=frozen, gradient_checkpointing=checkpointing)
    )
    policy.train()
    segments = segments_of(processor)
    names = {n for n, _ in policy.model.named_parameters()}
    tower = {n for n, p in policy.model.named_parameters() for w in policy.vision.weights if p is w}
    assert tower and tower < names
    for budget, share in rows:
        policy.zero_grad()
        policy.vision.encoded.clear()
        batches = policy.pack(segments, budget, share)
        assert (len(batches) > 1) == (budget < 1000)
        assert furthest_value(step_of(policy, batches), expected) < 1e-12
        gradient, compared = furthest_gradient(policy, stock)
        assert compared == len(names - tower if frozen else names)
        assert gradient < 1e-6  # transformers computes RMSNorm and RoPE in fp32
        assert policy.vision.images_encoded == 3


@qwen
def test_many_images_and_an_image_token_inside_a_completion(name: str, load, tiny_folder) -> None:
    """32 images of different sizes; a sampled image token is text and never takes a feature."""
    policy, processor = load(name)
    stock = stock_model(tiny_folder(name))
    pictures = [picture(28 + 11 * (k % 5), 28 + 17 * (k % 3), k) for k in range(32)]
    prompt = processor.encode_messages(
        (Message("user", "<image> " * 32 + "which image ?"),), pictures
    )
    completions = (np.array([21, processor.image_token_id, 22]), np.array([23]))
    [batch] = policy.pack([Segment(prompt, completions, (1.0, 1.0))], 4096, True)
    with_token, plain = batch_logprobs(policy, batch).values()
    expected = stock_logprobs(stock, prompt, completions[1])
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)
    # The stock model refuses the sequence; up to the image token it is that of the text before.
    before = stock_logprobs(stock, prompt, completions[0][:1])
    torch.testing.assert_close(with_token[:1], before, rtol=0, atol=1e-12)
    assert with_token.isfinite().all()


def test_adapters_on_layers_that_are_not_there(load) -> None:
    with refused("model.lora_targets", "q_prj", "q_proj"):
        load(TINY_QWEN[0], replace(CONFIG, lora_rank=2, lora_targets=("v_proj", "q_prj")))


TOWER = (r"model\.(visual|vision_tower|multi_modal_projector)\..*",)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", r".*\.v_prj"), [r".*\.v_prj", "whole name", "model.visual.merger.mlp.2"]),
        (("(q_proj",), ["(q_proj", "regular expression", "unterminated"]),
        (("lm_head",), ["lm_head", "q_proj"]),
        ((r"lm_.*",), ["lm_.*", "whole name"]),
        (TOWER, ["model.visual.blocks.0.attn.proj", "model.freeze_vision = true"]),
    ],
)
def test_adapters_that_cannot_be(targets: tuple[str, ...], names: list[str], load) -> None:
    with refused("model.lora_targets", *names):
        load(TINY_QWEN[0], replace(CONFIG, lora_rank=2, lora_targets=targets))


@every
def test_adapters_of_the_tower_are_trained_and_switched_off(name: str, load) -> None:
    """Also where features are in the cache: without adapters, images are those of the model below."""
    adapted = replace(CONFIG, lora_rank=4, freeze_vision=True, lora_targets=TOWER)
    policy, processor = load(name, adapted)
    base, _ = load(name)
    segments = segments_of(processor)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert policy.vision.trained and trains_adapters_alone(policy)
    assert trained and not any("language_model" in n for n in trained)
    plain = packed_logprobs(base, segments)
    for parameter_name, parameter in policy.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = packed_logprobs(policy, segments)
    assert not torch.allclose(changed, plain, atol=1e-3)
    with torch.no_grad():  # With gradients no features are kept.
        for _ in range(2):
            torch.testing.assert_close(packed_logprobs(policy, segments), changed)
            with policy.without_adapters():
                torch.testing.assert_close(packed_logprobs(policy, segments), plain)


@every
def test_lora_trains_adapters_only_and_starts_as_the_base(name: str, load, tmp_path: Path) -> None:
    policy, processor = load(name, replace(CONFIG, lora_rank=4, freeze_vision=True))
    base, _ = load(name)
    segments = segments_of(processor)
    assert torch.equal(packed_logprobs(policy, segments), packed_logprobs(base, segments))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    for parameter_name, parameter in policy.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = packed_logprobs(policy, segments)
    with policy.without_adapters():
        plain = packed_logprobs(policy, segments)
    assert torch.equal(plain, packed_logprobs(base, segments))
    policy.save_pretrained(tmp_path)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    assert torch.equal(packed_logprobs(policy, segments), changed)
    merged = load_policy(str(tmp_path), CONFIG, torch.device("cpu")).double()
    torch.testing.assert_close(packed_logprobs(merged, segments), changed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


@every
def test_the_engine_samples_from_the_packed_models_distribution(name: str, load) -> None:
    policy, processor = load(name)
    prompts = [s.prompt for s in segments_of(processor)]
    head = HeadLoss(policy, processor.unsampled_token_ids(), temperature=0.7)
    engine = InProcessEngine(policy, processor, kv_cache_tokens=2**12)
    out = engine.generate(prompts, SamplingParams(3, 0.7, 9), seed=1)
    assert [len(cs) for cs in out] == [3] * len(prompts)
    batch = pack_row(segments_of_samples(prompts, out))
    completions = [c for cs in out for c in cs]
    sampled = torch.from_numpy(np.concatenate([c.logprobs for c in completions])).double()
    torch.testing.assert_close(head.logprobs(batch).logprobs.double(), sampled, rtol=0, atol=5e-6)
    banned = set(processor.unsampled_token_ids().tolist())
    assert not banned & {t for c in completions for t in c.token_ids.tolist()}
