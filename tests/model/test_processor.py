"""Prompts and positions are those of transformers' own processors and models."""

import pytest
import torch

from perl.model.processor import parts
from perl.model.tiny import TINY_QWEN
from perl.types import Message
from tests.messages import refused
from tests.model.conftest import CONFIG
from tests.model.steps import picture, segments_of, stock_inputs, stock_model

qwen = pytest.mark.parametrize("name", TINY_QWEN)


@qwen
def test_positions_equal_the_stock_models(name: str, load, tiny_folder) -> None:
    _, processor = load(name)
    stock = stock_model(tiny_folder(name))
    for segment in segments_of(processor):
        if not segment.prompt.images:
            continue
        inputs = stock_inputs(stock, segment.prompt, segment.completions[0])
        positions, _ = stock.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        prompt = len(segment.prompt.input_ids)
        assert (positions[:, 0, :prompt].numpy() == segment.prompt.position_ids).all()
        assert (
            positions[:, 0, prompt:]
            == segment.prompt.next_position + torch.arange(len(segment.completions[0]))
        ).all()


@qwen
def test_our_prompt_is_the_stock_processors(name: str, load, tiny_folder) -> None:
    """And transformers' own classes load the folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, ours = load(name)
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder(name))
    stock = AutoProcessor.from_pretrained(tiny_folder(name))
    text = stock.apply_chat_template(
        [{"role": "user", "content": parts("A <image> which image ?")}], add_generation_prompt=True
    )
    size = {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
    theirs = stock(
        text=[text],
        images=[picture(90, 60, 2)],
        return_tensors="pt",
        images_kwargs={"size": size},
    )
    mine = ours.encode_messages((Message("user", "A <image> which image ?"),), [picture(90, 60, 2)])
    assert mine.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(mine.images[0].pixel_values, theirs["pixel_values"])
    image_tokens = int((theirs["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == int(theirs["image_grid_thw"].prod()) // 4
    out = model.generate(**theirs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > theirs["input_ids"].shape[1]


def test_slots_and_images_must_match(load) -> None:
    _, processor = load(TINY_QWEN[0])
    with refused("row 3", "2 <image>", "1 images"):
        processor.encode_messages(
            (Message("user", "<image> <image> ?"),), [picture(28, 28, 0)], "row 3"
        )
    with refused("row 3", "<|image_pad|>", "<image>"):
        processor.encode_messages((Message("user", "<|image_pad|> ?"),), [], "row 3")
