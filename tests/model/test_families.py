"""InternVL in packed, shared rows against one sequence at a time through the stock model, in fp64."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perl.config import ModelConfig
from perl.model.families import FAMILIES, family_of
from perl.model.head import HeadLoss
from perl.model.loading import check_model, load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import TINY_INTERNVL
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.types import Message, Segment, UserError
from tests.model.steps import (
    completions_of,
    furthest_gradient,
    furthest_value,
    picture,
    shared_step,
    stock_model,
    weights,
)

CPU = torch.device("cpu")
CONFIG = ModelConfig(max_pixels=28 * 28 * 4)


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(TINY_INTERNVL)


@pytest.fixture
def large_tiles(folder: Path, tmp_path: Path) -> Path:
    """The same model with tiles of 56 x 56 pixels: four visual tokens each."""
    copy = Path(shutil.copytree(folder, tmp_path / "large"))
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 56, "width": 56}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    return copy


def load(folder: Path, config: ModelConfig = CONFIG) -> tuple[Policy, Processor]:
    return load_policy(str(folder), config, CPU).double(), load_processor(str(folder), config)


def segments_of(processor: Processor) -> list[Segment]:
    """Two orders of images of one, four and five tiles, one image, none; completions of 5, 2, 1 and 0 tokens."""
    rng = np.random.default_rng(0)
    a, b, c = picture(28, 28, 1), picture(170, 56, 2), picture(90, 90, 3)
    chats = [
        ((a, b, c), "A <image> B <image> C <image> which image shows two ?"),
        ((c, a, b), "A <image> B <image> C <image> which image shows two ?"),
        ((c,), "<image> which image"),
        ((), "which image"),
    ]
    prompts = [
        processor.encode_messages((Message("user", text),), images) for images, text in chats
    ]
    return [
        Segment(p, tuple(rng.integers(20, 60, n) for n in (5, 2, 1, 0)), (1.0,) * 4, group)
        for p, group in zip(prompts, (0, 0, 1, 2), strict=True)
    ]


def stock_logprobs(model: torch.nn.Module, segment: Segment, number: int) -> torch.Tensor:
    """float64 [L] of one completion behind its prompt, nothing else."""
    prompt, completion = segment.prompt, segment.completions[number]
    ids = torch.tensor(np.concatenate([prompt.input_ids, completion]))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.cat([i.pixel_values for i in prompt.images]).double()
    logits = model(**inputs).logits[0, len(prompt.input_ids) - 1 : -1]
    targets = torch.from_numpy(completion)[:, None]
    return logits.log_softmax(-1).gather(1, targets).squeeze(1)


@pytest.mark.parametrize("budget", [60, 1000])
@pytest.mark.parametrize("tiles", ["folder", "large_tiles"])
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(
    tiles: str,
    budget: int,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_equal_to_stock(request.getfixturevalue(tiles), budget, capsys)


@pytest.mark.parametrize("text_type", ["qwen3", "llama"])
def test_every_language_model_that_may_be_inside(
    text_type: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    copy = Path(shutil.copytree(folder, tmp_path / text_type))
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    kept = (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "eos_token_id",
    )
    config["text_config"] = {
        **{key: text[key] for key in kept},
        **{"model_type": text_type, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"head_dim": 32, "tie_word_embeddings": True},
    }
    (copy / "config.json").write_text(json.dumps(config))
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(copy)).save_pretrained(copy)
    assert check_model(str(copy)) is family_of("internvl")
    assert_equal_to_stock(copy, 60, capsys)
    config["text_config"]["model_type"] = "gemma2"
    (copy / "config.json").write_text(json.dumps(config))
    assert check_model(str(copy)) is None


def assert_equal_to_stock(folder: Path, budget: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts shared, each image encoded once for several rows, against the stock model."""
    policy, processor = load(folder, replace(CONFIG, max_pixels=56 * 56 * 4))
    stock, segments = stock_model(folder), segments_of(processor)
    assert (len(policy.pack(segments, budget, True)) > 1) == (budget == 60)
    found = shared_step(policy, segments, budget)
    assert policy.vision.images_encoded == 3
    expected = {}
    for i, r in completions_of(segments):
        logprobs = stock_logprobs(stock, segments[i], r)
        (logprobs * weights(i, r, len(logprobs))).sum().backward()
        expected[i, r] = logprobs.detach()
    value, (gradient, compared) = furthest_value(found, expected), furthest_gradient(policy, stock)
    with capsys.disabled():
        print(
            f"\n{folder.name}: max |d log p| {value:.1e}, max relative |d gradient| {gradient:.1e}",
            end="",
        )
    assert value < 1e-12 and gradient < 1e-6 and compared > 60


def test_pictures_become_tiles_within_the_bounds(folder: Path, large_tiles: Path) -> None:
    def tiles(size: tuple[int, int], tokens: int, where: Path = folder, **bounds: int) -> int:
        processor = load_processor(str(where), replace(CONFIG, **bounds))
        image = processor.encode_image(picture(*size, seed=0))
        side = 28 if where == folder else 56
        assert image.pixel_values.shape == (image.grid[0], 3, side, side)
        assert image.tokens == image.grid[0] * tokens
        return image.grid[0]

    area = 28 * 28
    assert tiles((28, 28), 1) == 1
    assert tiles((90, 90), 1) == 5  # 2 x 2, and the picture as a whole
    assert tiles((170, 56), 1) == 4  # 3 x 1
    assert tiles((170, 56), 1, max_pixels=area) == 1
    assert tiles((170, 56), 1, max_pixels=area // 2) == 1
    assert (
        tiles((400, 400), 1, max_pixels=100 * area) == 10
    )  # 3 x 3: the checkpoint's own bound is 12
    assert tiles((28, 28), 1, min_pixels=2 * area) == 5
    assert tiles((90, 90), 4, large_tiles) == 1
    assert tiles((170, 56), 4, large_tiles, max_pixels=12 * area) == 4


def test_our_prompt_is_the_stock_processors(large_tiles: Path) -> None:
    """transformers' own processor cannot be made without a video processor, and that not without torchvision."""
    from transformers import AutoTokenizer, InternVLProcessor

    _, ours = load(large_tiles, replace(CONFIG, max_pixels=56 * 56 * 4))
    tokenizer = AutoTokenizer.from_pretrained(large_tiles)
    stock = InternVLProcessor.__new__(InternVLProcessor)
    for name in ("start_image_token", "end_image_token"):
        setattr(stock, name, getattr(tokenizer, name))
    stock.image_token, stock.image_seq_length = tokenizer.context_image_token, 4
    images = [picture(28, 28, 1), picture(170, 56, 2)]
    prompt = ours.encode_messages((Message("user", "A <image> B <image> which image ?"),), images)
    text = tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "A "},
                    {"type": "image"},
                    {"type": "text", "text": " B "},
                    {"type": "image"},
                    {"type": "text", "text": " which image ?"},
                ],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    counts = {"num_patches": [i.grid[0] for i in prompt.images]}
    assert counts == {"num_patches": [1, 4]}
    first, second, third = text.split(stock.image_token)
    replaced = [stock.replace_image_token(counts, i) for i in range(2)]
    expected = tokenizer(
        first + replaced[0] + second + replaced[1] + third, add_special_tokens=False
    )
    assert prompt.input_ids.tolist() == expected["input_ids"]
    assert (prompt.input_ids == ours.image_token_id).sum() == 20
    theirs = ours.image_processor.images(
        images, crop_to_patches=True, max_patches=4, return_tensors="pt"
    )
    assert torch.equal(torch.cat([i.pixel_values for i in prompt.images]), theirs["pixel_values"])


def test_the_engine_samples_from_the_packed_models_distribution(folder: Path) -> None:
    policy, processor = load(folder)
    prompts = [s.prompt for s in segments_of(processor)]
    out = InProcessEngine(policy, processor, batch_size=6).generate(
        prompts, SamplingParams(3, 0.7, 9), seed=1
    )
    segments = [
        Segment(p, tuple(c.token_ids for c in cs), (1.0,) * 3)
        for p, cs in zip(prompts, out, strict=True)
    ]
    head = HeadLoss(policy, processor.unsampled_token_ids(), temperature=0.7)
    [batch] = policy.pack(segments, 1000, True)
    sampled = np.concatenate([out[i][r].logprobs for i, r in batch.source])
    np.testing.assert_allclose(head.logprobs(batch).logprobs, sampled, rtol=0, atol=5e-6)
    assert not np.isin(batch.targets, processor.unsampled_token_ids()).any()
    assert len(processor.unsampled_token_ids()) == 4


def test_saved_it_is_an_ordinary_folder(folder: Path, tmp_path: Path) -> None:
    policy, processor = load(folder, replace(CONFIG, freeze_vision=True))
    assert all(not p.requires_grad for p in policy.vision.weights)
    policy.save_pretrained(tmp_path)
    processor.save(tmp_path)
    _, again = load(tmp_path)
    for one, other in zip(segments_of(processor), segments_of(again), strict=True):
        assert one.prompt.input_ids.tolist() == other.prompt.input_ids.tolist()


def test_an_image_processor_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    CLIPImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(copy)
    # Older transformers without torchvision cannot make what the folder names.
    with pytest.raises(UserError, match=r"does not fit an internvl model|it names CLIPImage"):
        load_processor(str(copy), CONFIG)


def test_families_are_found_by_model_type() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names)) == 4
    assert all(family_of(name) in FAMILIES for name in names)
    assert family_of("llava") is None
