"""What is special about a family: InternVL's tiles and the language models inside it; its rest is in test_policy.py."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from perl.config import ModelConfig
from perl.model.families import FAMILIES, family_of
from perl.model.loading import (
    check_kernels,
    check_model,
    compute_dtype,
    load_policy,
    load_processor,
)
from perl.model.processor import parts
from perl.model.tiny import TINY_INTERNVL, TINY_MODELS
from perl.types import Message
from tests.messages import refused
from tests.model.steps import (
    furthest_gradient,
    furthest_value,
    naive_step,
    picture,
    segments_of,
    shared_step,
    stock_model,
)

CONFIG = ModelConfig(max_pixels=28 * 28 * 4)
CPU = torch.device("cpu")


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


@pytest.mark.parametrize("budget", [60, 1000])
def test_tiles_of_several_tokens(budget: int, large_tiles: Path, load) -> None:
    assert_equal_to_stock(large_tiles, budget, load)


@pytest.mark.parametrize("text_type", ["qwen3", "llama"])
def test_every_language_model_that_may_be_inside(
    text_type: str, folder: Path, tmp_path: Path, load
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    copy = Path(shutil.copytree(folder, tmp_path / text_type))
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config["text_config"] = {
        **{key: text[key] for key in (*sizes, "eos_token_id")},
        **{"model_type": text_type, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"head_dim": 32, "tie_word_embeddings": True},
    }
    (copy / "config.json").write_text(json.dumps(config))
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(copy)).save_pretrained(copy)
    assert check_model(str(copy)) is family_of("internvl")
    assert_equal_to_stock(copy, 60, load)
    config["text_config"]["model_type"] = "gemma2"
    (copy / "config.json").write_text(json.dumps(config))
    assert check_model(str(copy)) is None


def assert_equal_to_stock(folder: Path, budget: int, load) -> None:
    """Prompts shared, each image encoded once for several rows, against the stock model."""
    policy, processor = load(folder, replace(CONFIG, max_pixels=56 * 56 * 4))
    stock, segments = stock_model(folder), segments_of(processor)
    assert (len(policy.pack(segments, budget, True)) > 1) == (budget == 60)
    found = shared_step(policy, segments, budget)
    assert policy.vision.images_encoded == 3
    assert furthest_value(found, naive_step(stock, segments)) < 1e-12
    gradient, compared = furthest_gradient(policy, stock)
    assert gradient < 1e-6 and compared > 60


def test_pictures_become_tiles_within_the_bounds(folder: Path, large_tiles: Path) -> None:
    def tiles(size: tuple[int, int], tokens: int, where: Path = folder, **bounds: int) -> int:
        processor = load_processor(str(where), replace(CONFIG, **bounds))
        image = processor.encode_image(picture(*size, seed=0))
        side = 28 if where == folder else 56
        assert image.pixel_values.shape == (image.grid[0], 3, side, side)
        assert image.tokens == image.grid[0] * tokens
        # Of several tiles one more shows the whole.
        shown = image.size[0] * image.size[1] // side**2
        assert (shown + (shown > 1), image.size[0] % side) == (image.grid[0], 0)
        assert (image.size[0] > image.size[1]) == (size[0] > size[1] and shown > 1)
        return image.grid[0]

    area = 28 * 28
    assert tiles((28, 28), 1) == 1
    assert tiles((90, 90), 1) == 5  # 2 x 2, and the picture as a whole
    assert tiles((170, 56), 1) == 4  # 3 x 1
    assert tiles((170, 56), 1, max_pixels=area) == 1
    assert tiles((170, 56), 1, max_pixels=area // 2) == 1
    # 3 x 3: the checkpoint's own bound is 12.
    assert tiles((400, 400), 1, max_pixels=100 * area) == 10
    assert tiles((28, 28), 1, min_pixels=2 * area) == 5
    assert tiles((90, 90), 4, large_tiles) == 1
    assert tiles((170, 56), 4, large_tiles, max_pixels=12 * area) == 4


def test_our_prompt_is_the_stock_processors(large_tiles: Path, load) -> None:
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
    chat = [{"role": "user", "content": parts("A <image> B <image> which image ?")}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    counts = {"num_patches": [i.grid[0] for i in prompt.images]}
    assert counts == {"num_patches": [1, 4]}
    first, second, third = text.split(stock.image_token)
    replaced = [stock.replace_image_token(counts, i) for i in range(2)]
    whole = first + replaced[0] + second + replaced[1] + third
    expected = tokenizer(whole, add_special_tokens=False)
    assert prompt.input_ids.tolist() == expected["input_ids"]
    assert (prompt.input_ids == ours.image_token_id).sum() == 20
    theirs = ours.encoder.image_processor.images(
        images, crop_to_patches=True, max_patches=4, return_tensors="pt"
    )
    assert torch.equal(torch.cat([i.pixel_values for i in prompt.images]), theirs["pixel_values"])


def test_saved_it_is_an_ordinary_folder(folder: Path, tmp_path: Path, load) -> None:
    policy, processor = load(folder, replace(CONFIG, freeze_vision=True))
    assert all(not p.requires_grad for p in policy.vision.weights)
    policy.save_pretrained(tmp_path)
    processor.save(tmp_path)
    _, again = load(tmp_path, CONFIG)
    for one, other in zip(segments_of(processor), segments_of(again), strict=True):
        assert one.prompt.input_ids.tolist() == other.prompt.input_ids.tolist()


def test_an_image_processor_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    CLIPImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(copy)
    with refused("model.path", copy, "preprocessor"):
        load_processor(str(copy), CONFIG)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_visual_token_is_made_of_four_patches(name: str, tiny_folder) -> None:
    config = AutoConfig.from_pretrained(tiny_folder(name))
    family = family_of(config.model_type)
    assert family is not None and family.patches_per_token(config) == 4


def test_dropout_of_attention_is_refused_where_the_kernel_has_none(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    load_policy(str(folder), replace(CONFIG, attention="sdpa"), CPU)
    with refused("model.attention", "flex", "attention_dropout", "sdpa"):
        load_policy(str(folder), replace(CONFIG, attention="flex"), CPU)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "ampere", "dtype"),
    [
        ("auto", CPU, True, torch.float32),
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float32),
        ("bfloat16", CPU, False, torch.bfloat16),
        ("bfloat16", CUDA, True, torch.bfloat16),
        ("float32", CUDA, True, torch.float32),
    ],
)
def test_which_dtype_is_computed_in(
    wanted: str, device: torch.device, ampere: bool, dtype: torch.dtype, gpu: Callable[[bool], None]
) -> None:
    gpu(ampere)
    assert compute_dtype(wanted, device) == dtype


def test_bfloat16_is_refused_where_it_is_emulated(
    gpu: Callable[[bool], None], tiny_folder: Callable[[str], Path]
) -> None:
    """Before any weights are loaded, and also for what is trained on padded batches."""
    gpu(False)
    bfloat16 = replace(CONFIG, dtype="bfloat16")
    for refuses in (
        lambda: check_kernels(bfloat16),
        lambda: load_policy(str(tiny_folder("tiny-qwen2.5-vl")), bfloat16, CUDA),
    ):
        with refused("model.dtype", "bfloat16", "Tesla T4", "float32", "auto"):
            refuses()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Puts one into this machine: of Ampere, or of the generation before, where torch says yes with emulation only."""

    def put(ampere: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: ampere or including_emulation,
        )

    return put


def test_families_are_found_by_model_type() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names)) == 4
    assert all(family_of(name) in FAMILIES for name in names)
    assert family_of("llava") is None
