"""Packed rows against one sequence at a time through the stock model, in fp64: values, gradients, and no leak."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perl.config import ModelConfig
from perl.loss import HeadLoss
from perl.model import Policy, load_policy, load_processor
from perl.packing import pack_row
from perl.processor import Processor
from perl.rollout import InProcessEngine, SamplingParams
from perl.tiny import TINY_MODELS
from perl.types import Message, Segment, UserError

CPU = torch.device("cpu")
CONFIG = ModelConfig(max_pixels=28 * 28 * 16)
both = pytest.mark.parametrize("name", TINY_MODELS)


@pytest.fixture
def load(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Policy, Processor]]:
    def load(name: str, config: ModelConfig = CONFIG) -> tuple[Policy, Processor]:
        folder = str(tiny_folder(name))
        return load_policy(folder, config, CPU).double(), load_processor(folder, config)

    return load


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def segments_of(processor: Processor) -> list[Segment]:
    """Two orders of two unequal images, three images, no image; completions of 5, 2, 1 and 0 tokens."""
    rng = np.random.default_rng(0)
    a, b, c = picture(28, 28, 1), picture(90, 60, 2), picture(56, 140, 3)
    chats = [
        ((a, b), "A <image> B <image> which image shows two ?"),
        ((b, a), "A <image> B <image> which image shows two ?"),
        ((c, a, b), "<image> <image> <image> how many images show one ?"),
        ((), "which image"),
    ]
    prompts = [
        processor.encode_messages((Message("user", text),), images) for images, text in chats
    ]
    return [Segment(p, rng.integers(20, 60, n)) for p in prompts for n in (5, 2, 1, 0)]


def stock_inputs(segment: Segment, processor: Processor) -> dict[str, torch.Tensor]:
    ids = torch.tensor(np.concatenate([segment.prompt.input_ids, segment.completion_ids]))[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
    }
    if segment.prompt.images:
        inputs["pixel_values"] = torch.cat([i.pixel_values for i in segment.prompt.images]).double()
        inputs["image_grid_thw"] = torch.tensor([i.grid for i in segment.prompt.images])
    return inputs


def stock_logprobs(model: torch.nn.Module, segment: Segment, processor: Processor) -> torch.Tensor:
    model.model.rope_deltas = None
    logits = model(**stock_inputs(segment, processor)).logits[0]
    start, length = len(segment.prompt.input_ids), len(segment.completion_ids)
    targets = torch.from_numpy(segment.completion_ids)[:, None]
    return logits[start - 1 : start + length - 1].log_softmax(-1).gather(1, targets).squeeze(1)


def packed_logprobs(policy: Policy, segments: list[Segment]) -> list[torch.Tensor]:
    batch = pack_row(segments)
    logits = policy(batch) @ policy.head_weight.T
    flat = logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    return list(flat.split([len(s.completion_ids) for s in segments]))


def stock_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )


@both
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(
    name: str, load, tiny_folder, capsys
) -> None:
    policy, processor = load(name)
    stock = stock_model(tiny_folder(name))
    segments = segments_of(processor)
    packed = packed_logprobs(policy, segments)
    single = [stock_logprobs(stock, s, processor) for s in segments]
    value = max((p - s).abs().max().item() for p, s in zip(packed, single, strict=True) if len(p))
    weights = torch.randn(sum(len(p) for p in packed), dtype=torch.float64)
    (torch.cat(packed) * weights).sum().backward()
    (torch.cat(single) * weights).sum().backward()
    ours, theirs = dict(policy.model.named_parameters()), dict(stock.named_parameters())
    gradient = max(
        ((ours[n].grad - g.grad).abs().max() / g.grad.abs().max().clamp(min=1e-12)).item()
        for n, g in theirs.items()
        if g.grad is not None
    )
    with capsys.disabled():
        print(f"\n{name}: max |d log p| {value:.1e}, max relative |d gradient| {gradient:.1e}")
    assert value < 1e-12
    assert gradient < 1e-5  # transformers computes RMSNorm and RoPE in fp32


@both
def test_positions_equal_the_stock_models(name: str, load, tiny_folder) -> None:
    _, processor = load(name)
    stock = stock_model(tiny_folder(name))
    for segment in segments_of(processor):
        if not segment.prompt.images:
            continue
        inputs = stock_inputs(segment, processor)
        positions, _ = stock.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        prompt = len(segment.prompt.input_ids)
        assert (positions[:, 0, :prompt].numpy() == segment.prompt.position_ids).all()
        assert (
            positions[:, 0, prompt:]
            == segment.prompt.next_position + torch.arange(len(segment.completion_ids))
        ).all()


@both
def test_a_segment_never_sees_its_neighbours(name: str, load) -> None:
    """Change one segment wherever it stands: the others' log-probs stay equal to the bit."""
    policy, processor = load(name)
    segments = segments_of(processor)
    before = packed_logprobs(policy, segments)
    for poisoned in (0, 5, len(segments) - 4):
        changed = list(segments)
        ids = segments[poisoned].completion_ids
        changed[poisoned] = replace(segments[poisoned], completion_ids=(ids + 7) % 60)
        after = packed_logprobs(policy, changed)
        assert not torch.equal(before[poisoned], after[poisoned])
        for i in set(range(len(segments))) - {poisoned}:
            assert torch.equal(before[i], after[i])


@both
def test_checkpointing_changes_nothing(name: str, load) -> None:
    grads = []
    for on in (False, True):
        policy, processor = load(name, replace(CONFIG, gradient_checkpointing=on))
        policy.train()
        torch.cat(packed_logprobs(policy, segments_of(processor))).sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain is None) == (recomputed is None)
        if plain is not None:
            torch.testing.assert_close(plain, recomputed, rtol=1e-9, atol=1e-12)


@both
def test_a_frozen_tower_gets_no_gradient_and_changes_no_value(name: str, load) -> None:
    policy, processor = load(name, replace(CONFIG, freeze_vision=True))
    free, _ = load(name)
    logprobs = torch.cat(packed_logprobs(policy, segments_of(processor)))
    assert torch.equal(logprobs, torch.cat(packed_logprobs(free, segments_of(processor))))
    logprobs.sum().backward()
    assert all(p.grad is None for p in policy.core.visual.parameters())
    assert any(p.grad is not None for p in policy.core.language_model.parameters())


def test_lora_trains_adapters_only_and_starts_as_the_base(load, tmp_path: Path) -> None:
    name = TINY_MODELS[0]
    policy, processor = load(name, replace(CONFIG, lora_rank=4, freeze_vision=True))
    base, _ = load(name)
    segments = segments_of(processor)
    assert torch.equal(
        torch.cat(packed_logprobs(policy, segments)), torch.cat(packed_logprobs(base, segments))
    )
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    for parameter_name, parameter in policy.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    changed = torch.cat(packed_logprobs(policy, segments))
    with policy.without_adapters():
        plain = torch.cat(packed_logprobs(policy, segments))
    assert torch.equal(plain, torch.cat(packed_logprobs(base, segments)))
    policy.save_pretrained(tmp_path)
    merged = load_policy(str(tmp_path), CONFIG, CPU).double()
    torch.testing.assert_close(
        torch.cat(packed_logprobs(merged, segments)), changed, rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(changed, plain, atol=1e-3)


@both
def test_the_engine_samples_from_the_packed_models_distribution(name: str, load) -> None:
    policy, processor = load(name)
    prompts = [s.prompt for s in segments_of(processor)[::4]]
    head = HeadLoss(policy, processor.unsampled_token_ids(), temperature=0.7)
    engine = InProcessEngine(policy, processor, batch_size=6)
    out = engine.generate(prompts, SamplingParams(3, 0.7, 9), seed=1)
    assert [len(cs) for cs in out] == [3] * len(prompts)
    pairs = [(p, c) for p, cs in zip(prompts, out, strict=True) for c in cs]
    batch = pack_row([Segment(p, c.token_ids) for p, c in pairs])
    sampled = torch.from_numpy(np.concatenate([c.logprobs for _, c in pairs])).double()
    torch.testing.assert_close(head.logprobs(batch).logprobs.double(), sampled, rtol=0, atol=5e-6)
    banned = set(processor.unsampled_token_ids().tolist())
    assert not banned & {t for _, c in pairs for t in c.token_ids.tolist()}


def test_the_engine_repeats_itself_and_greedy_ignores_the_seed(load) -> None:
    policy, processor = load(TINY_MODELS[0])
    prompts = [s.prompt for s in segments_of(processor)[::4]]
    engine = InProcessEngine(policy, processor, batch_size=64)

    def ids(params: SamplingParams, seed: int) -> list[list[int]]:
        return [c.token_ids.tolist() for cs in engine.generate(prompts, params, seed) for c in cs]

    assert ids(SamplingParams(2, 1.0, 8), 3) == ids(SamplingParams(2, 1.0, 8), 3)
    assert ids(SamplingParams(2, 1.0, 8), 3) != ids(SamplingParams(2, 1.0, 8), 4)
    assert ids(SamplingParams(1, 0.0, 8), 3) == ids(SamplingParams(1, 0.0, 8), 4)


def test_auto_classes_load_the_folder(tiny_folder) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for name in TINY_MODELS:
        folder = tiny_folder(name)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": "which image shows two ?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[picture(90, 60, 2)], return_tensors="pt")
        image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert image_tokens == int(inputs["image_grid_thw"].prod()) // 4
        assert (
            model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1]
            > inputs["input_ids"].shape[1]
        )


def test_our_prompt_is_the_stock_processors(load, tiny_folder) -> None:
    from transformers import AutoProcessor

    for name in TINY_MODELS:
        _, ours = load(name)
        stock = AutoProcessor.from_pretrained(tiny_folder(name))
        content = [
            {"type": "text", "text": "A"},
            {"type": "image"},
            {"type": "text", "text": "which image ?"},
        ]
        text = stock.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        size = {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
        theirs = stock(
            text=[text],
            images=[picture(90, 60, 2)],
            return_tensors="pt",
            images_kwargs={"size": size},
        )
        mine = ours.encode_messages(
            (Message("user", "A <image> which image ?"),), [picture(90, 60, 2)]
        )
        assert mine.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert torch.equal(mine.images[0].pixel_values, theirs["pixel_values"])


def test_slots_and_images_must_match(load) -> None:
    _, processor = load(TINY_MODELS[0])
    with pytest.raises(UserError, match="2 <image> slots but 1 images"):
        processor.encode_messages((Message("user", "<image> <image> ?"),), [picture(28, 28, 0)])
    with pytest.raises(UserError, match="the text itself holds"):
        processor.encode_messages((Message("user", "<|image_pad|> ?"),), [])
