"""Packed rows against one sequence at a time through the stock model, in fp64: values, gradients, and no leak."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.config import ModelConfig
from perl.model.families import ImageFeatures
from perl.model.head import HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.pack import pack_row
from perl.model.packed.plan import Share
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import TINY_QWEN
from perl.model.vision import Vision
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import (
    EncodedImage,
    EncodedPrompt,
    Message,
    Segment,
    UserError,
)
from tests.model.steps import (
    Logprobs,
    batch_logprobs,
    completions_of,
    furthest_gradient,
    furthest_value,
    picture,
    shared_step,
    step_of,
    stock_model,
    weights,
)

CPU = torch.device("cpu")
CONFIG = ModelConfig(max_pixels=28 * 28 * 16)
both = pytest.mark.parametrize("name", TINY_QWEN)


@pytest.fixture
def load(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Policy, Processor]]:
    def load(name: str, config: ModelConfig = CONFIG) -> tuple[Policy, Processor]:
        folder = str(tiny_folder(name))
        return load_policy(folder, config, CPU).double(), load_processor(folder, config)

    return load


def segments_of(processor: Processor) -> list[Segment]:
    """Two orders of two unequal images, three images, no image, one; completions of 5, 2, 1 and 0 tokens."""
    rng = np.random.default_rng(0)
    a, b, c = picture(28, 28, 1), picture(90, 60, 2), picture(56, 140, 3)
    chats = [
        ((a, b), "A <image> B <image> which image shows two ?"),
        ((b, a), "A <image> B <image> which image shows two ?"),
        ((c, a, b), "<image> <image> <image> how many images show one ?"),
        ((), "which image"),
        ((c,), "<image> which image"),
    ]
    prompts = [
        processor.encode_messages((Message("user", text),), images) for images, text in chats
    ]
    return [
        Segment(p, tuple(rng.integers(20, 60, n) for n in (5, 2, 1, 0)), (1.0,) * 4, group)
        for p, group in zip(prompts, (0, 0, 1, 2, 3), strict=True)
    ]


def stock_inputs(
    prompt: EncodedPrompt, completion: np.ndarray, processor: Processor
) -> dict[str, torch.Tensor]:
    ids = torch.tensor(np.concatenate([prompt.input_ids, completion]))[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
    }
    if prompt.images:
        inputs["pixel_values"] = torch.cat([i.pixel_values for i in prompt.images]).double()
        inputs["image_grid_thw"] = torch.tensor([i.grid for i in prompt.images])
    return inputs


def stock_logprobs(
    model: torch.nn.Module, prompt: EncodedPrompt, completion: np.ndarray, processor: Processor
) -> torch.Tensor:
    model.model.rope_deltas = None
    logits = model(**stock_inputs(prompt, completion, processor)).logits[0]
    start, length = len(prompt.input_ids), len(completion)
    targets = torch.from_numpy(completion)[:, None]
    return logits[start - 1 : start + length - 1].log_softmax(-1).gather(1, targets).squeeze(1)


def packed_logprobs(policy: Policy, segments: list[Segment]) -> list[torch.Tensor]:
    """All in one row; one tensor for each completion."""
    return list(batch_logprobs(policy, pack_row(segments)).values())


def naive_step(model: torch.nn.Module, segments: list[Segment], processor: Processor) -> Logprobs:
    """One sequence at a time through the stock model; gradients of the weighted log-probs stay on it."""
    out = {}
    for i, r in completions_of(segments):
        logprobs = stock_logprobs(model, segments[i].prompt, segments[i].completions[r], processor)
        (logprobs * weights(i, r, len(logprobs))).sum().backward()
        out[i, r] = logprobs.detach()
    return out


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@both
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(
    name: str, frozen: bool, checkpointing: bool, load, tiny_folder, capsys
) -> None:
    """Orders x rollouts x unequal images, in one row, in a few, and with groups and prompts split over many."""
    stock = stock_model(tiny_folder(name))
    config = replace(CONFIG, freeze_vision=frozen, gradient_checkpointing=checkpointing)
    _, processor = load(name, config)
    segments = segments_of(processor)
    expected = naive_step(stock, segments, processor)
    gradients = {n: p.grad for n, p in stock.named_parameters()}
    towers = {n for n in gradients if ".visual." in n}
    assert towers and all(gradients[n] is not None for n in towers)
    images = {image.key for s in segments for image in s.prompt.images}
    shown = sum(len(s.prompt.images) * len(s.completions) for s in segments)
    for budget, share in ((1000, True), (60, True), (28, True), (60, False)):
        policy, _ = load(name, config)
        policy.train()
        value = furthest_value(shared_step(policy, segments, budget, share), expected)
        gradient, compared = furthest_gradient(policy, stock)
        assert compared == sum(not (frozen and n in towers) for n in gradients)
        batches = policy.pack(segments, budget, share)
        with capsys.disabled():
            print(
                f"\n{name}, {'frozen' if frozen else 'trained'} tower, "
                f"{'' if checkpointing else 'no '}checkpointing, {len(batches)} rows of "
                f"{'shared' if share else 'repeated'} prompts: max |d log p| {value:.1e}, "
                f"max relative |d gradient| {gradient:.1e}, "
                f"{policy.vision.images_encoded} of {shown} images encoded",
                end="",
            )
        assert value < 1e-12
        assert gradient < 1e-6  # transformers computes RMSNorm and RoPE in fp32
        assert policy.vision.images_encoded == len(images) == 3


@both
def test_images_that_come_back_after_others(name: str, load) -> None:
    """Rows that show a and b, then c, then a and b again: c is done with before what was encoded earlier."""
    policy, processor = load(name)
    other, _ = load(name)
    segments = segments_of(processor)
    order = [[Share(i, (0, 1, 2, 3))] for i in (0, 4, 1, 3, 2)]
    got = step_of(policy, [pack_row(segments, shares) for shares in order])
    expected = shared_step(other, segments, 1000)
    assert policy.vision.images_encoded == 3
    assert furthest_value(got, expected) < 1e-12
    assert furthest_gradient(policy, other.model)[0] < 1e-6


@both
def test_bfloat16_autocast_loses_no_more_than_the_stock_model(name: str, load, tiny_folder) -> None:
    """Gradients of shared prompts and images are summed in fp32: no further from fp64 than one sequence at a time."""
    policy, processor = load(name)
    segments = segments_of(processor)
    stock = stock_model(tiny_folder(name))
    naive_step(stock, segments, processor)
    exact = {n: p.grad for n, p in stock.named_parameters()}
    off = {}
    for way in ("stock", "shared"):
        model = (stock_model(tiny_folder(name)) if way == "stock" else policy).float()
        with torch.autocast("cpu", torch.bfloat16):
            if way == "stock":
                naive_step(model, segments, processor)
            else:
                shared_step(policy, segments, 60)
        grads = dict((model if way == "stock" else policy.model).named_parameters())
        lost = sum((grads[n].grad - e).square().sum() for n, e in exact.items())
        off[way] = (lost / sum(e.square().sum() for e in exact.values())).sqrt().item()
    assert off["shared"] <= 1.5 * off["stock"] and off["stock"] < 0.1, off


@both
def test_no_grad_passes_share_one_encoding_until_the_weights_change(name: str, load) -> None:
    policy, processor = load(name)
    segments = segments_of(processor)
    prompts = [s.prompt for s in segments]
    head = HeadLoss(policy, processor.unsampled_token_ids(), 1.0)
    InProcessEngine(policy, processor, 4).generate(prompts, SamplingParams(2, 1.0, 3), seed=0)
    before = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert policy.vision.images_encoded == 3
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    torch.cat(packed_logprobs(policy, segments)).sum().backward()
    assert policy.vision.images_encoded == 6
    optimizer.step()
    after = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert policy.vision.images_encoded == 9
    assert not torch.equal(torch.cat(before), torch.cat(after))
    policy.vision = Vision(policy.core, policy.family, 0)
    fresh = [head.logprobs(b).logprobs for b in policy.pack(segments, 60, True)]
    assert torch.equal(torch.cat(fresh), torch.cat(after))


def test_a_frozen_tower_encodes_an_image_once_for_all_passes(load) -> None:
    policy, processor = load(TINY_QWEN[0], replace(CONFIG, freeze_vision=True))
    segments = segments_of(processor)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        shared_step(policy, segments, 60)
        optimizer.step()
    assert policy.vision.images_encoded == 3


def test_a_reference_model_reads_the_features_of_an_equal_tower(load) -> None:
    config = replace(CONFIG, freeze_vision=True)
    policy, processor = load(TINY_QWEN[1], config)
    reference, _ = load(TINY_QWEN[1], config)
    batch = pack_row(segments_of(processor))
    head = HeadLoss(reference, processor.unsampled_token_ids(), 1.0)
    expected = head.logprobs(batch).logprobs
    reference.share_tower(policy)
    assert torch.equal(head.logprobs(batch).logprobs, expected)
    assert policy.vision.images_encoded == 3
    assert all(p.device.type == "meta" for p in reference.core.visual.parameters())


def test_the_feature_cache_keeps_to_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    weight, encoded = torch.nn.Linear(1, 1), []

    class Blank:
        def tower(self, core: object) -> list[torch.nn.Module]:
            return [weight]

        def encode(self, core: object, images: Sequence[EncodedImage]) -> ImageFeatures:
            encoded.extend(image.key for image in images)
            rows = [torch.full((i.tokens, 8), float(i.key)) for i in images]
            return ImageFeatures(torch.cat(rows))

    images = [EncodedImage(str(k), torch.empty(0), (1, 2, 2), 1 + k % 2) for k in range(6)]
    vision = Vision(None, Blank(), cache_bytes=32 * 4)  # type: ignore[arg-type]

    def features(*images: EncodedImage) -> list[float]:
        with torch.no_grad():
            found = vision.features(images)
        assert found is not None
        return found.rows[:, 0].tolist()

    assert features(images[0], images[1], images[0]) == [0, 1, 1, 0] and encoded == ["0", "1"]
    features(*images[2:4])
    # Four tokens fit: the two oldest images went.
    assert features(*images[2:4]) == [2, 3, 3]
    assert features(images[1]) == [1, 1]
    assert encoded == ["0", "1", "2", "3", "1"]
    with torch.no_grad():
        weight.weight += 1
    features(images[1])
    assert encoded[5:] == ["1"]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1 and "model.feature_cache_mb = 0 is too small" in warnings[0]


@both
def test_positions_equal_the_stock_models(name: str, load, tiny_folder) -> None:
    _, processor = load(name)
    stock = stock_model(tiny_folder(name))
    for segment in segments_of(processor):
        if not segment.prompt.images:
            continue
        inputs = stock_inputs(segment.prompt, segment.completions[0], processor)
        positions, _ = stock.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        prompt = len(segment.prompt.input_ids)
        assert (positions[:, 0, :prompt].numpy() == segment.prompt.position_ids).all()
        assert (
            positions[:, 0, prompt:]
            == segment.prompt.next_position + torch.arange(len(segment.completions[0]))
        ).all()


@both
def test_a_completion_never_sees_its_neighbours(name: str, load) -> None:
    """Change one completion wherever it stands: the others' log-probs stay equal to the bit."""
    policy, processor = load(name)
    segments = segments_of(processor)
    order = completions_of(segments)
    before = dict(zip(order, packed_logprobs(policy, segments), strict=True))
    for i, r in ((0, 0), (1, 1), (3, 0)):
        completions = list(segments[i].completions)
        completions[r] = (completions[r] + 7) % 60
        changed = list(segments)
        changed[i] = replace(segments[i], completions=tuple(completions))
        after = dict(zip(order, packed_logprobs(policy, changed), strict=True))
        assert not torch.equal(before[i, r], after[i, r])
        for other in set(order) - {(i, r)}:
            assert torch.equal(before[other], after[other])


@both
def test_a_segment_never_sees_another_prompt(name: str, load) -> None:
    policy, processor = load(name)
    segments = segments_of(processor)
    order = completions_of(segments)
    before = dict(zip(order, packed_logprobs(policy, segments), strict=True))
    changed = list(segments)
    ids = segments[1].prompt.input_ids.copy()
    ids[0] = 30
    changed[1] = replace(segments[1], prompt=replace(segments[1].prompt, input_ids=ids))
    after = dict(zip(order, packed_logprobs(policy, changed), strict=True))
    for at in order:
        same = torch.equal(before[at], after[at])
        assert same == (at[0] != 1 or len(before[at]) == 0)


@both
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
    expected = stock_logprobs(stock, prompt, completions[1], processor)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)
    # The stock model refuses the sequence; up to the image token it is that of the text before.
    before = stock_logprobs(stock, prompt, completions[0][:1], processor)
    torch.testing.assert_close(with_token[:1], before, rtol=0, atol=1e-12)
    assert with_token.isfinite().all()


def test_lora_trains_adapters_only_and_starts_as_the_base(load, tmp_path: Path) -> None:
    name = TINY_QWEN[0]
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
    prompts = [s.prompt for s in segments_of(processor)]
    head = HeadLoss(policy, processor.unsampled_token_ids(), temperature=0.7)
    engine = InProcessEngine(policy, processor, batch_size=6)
    out = engine.generate(prompts, SamplingParams(3, 0.7, 9), seed=1)
    assert [len(cs) for cs in out] == [3] * len(prompts)
    batch = pack_row(
        [
            Segment(p, tuple(c.token_ids for c in cs), (1.0,) * 3)
            for p, cs in zip(prompts, out, strict=True)
        ]
    )
    completions = [c for cs in out for c in cs]
    sampled = torch.from_numpy(np.concatenate([c.logprobs for c in completions])).double()
    torch.testing.assert_close(head.logprobs(batch).logprobs.double(), sampled, rtol=0, atol=5e-6)
    banned = set(processor.unsampled_token_ids().tolist())
    assert not banned & {t for c in completions for t in c.token_ids.tolist()}


def test_the_engine_repeats_itself_and_greedy_ignores_the_seed(load) -> None:
    policy, processor = load(TINY_QWEN[0])
    prompts = [s.prompt for s in segments_of(processor)]
    engine = InProcessEngine(policy, processor, batch_size=64)

    def ids(params: SamplingParams, seed: int) -> list[list[int]]:
        return [c.token_ids.tolist() for cs in engine.generate(prompts, params, seed) for c in cs]

    assert ids(SamplingParams(2, 1.0, 8), 3) == ids(SamplingParams(2, 1.0, 8), 3)
    assert ids(SamplingParams(2, 1.0, 8), 3) != ids(SamplingParams(2, 1.0, 8), 4)
    assert ids(SamplingParams(1, 0.0, 8), 3) == ids(SamplingParams(1, 0.0, 8), 4)


def test_auto_classes_load_the_folder(tiny_folder) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for name in TINY_QWEN:
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

    for name in TINY_QWEN:
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
    _, processor = load(TINY_QWEN[0])
    with pytest.raises(UserError, match="2 <image> slots but 1 images"):
        processor.encode_messages((Message("user", "<image> <image> ?"),), [picture(28, 28, 0)])
    with pytest.raises(UserError, match="the text itself holds"):
        processor.encode_messages((Message("user", "<|image_pad|> ?"),), [])
