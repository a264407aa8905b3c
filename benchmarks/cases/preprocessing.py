"""Chats with pictures to tokens and pixels: a question in several orders of its images."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness.contest import Contest, Inputs, Provider, Run
from perl.config import ModelConfig
from perl.model.processor import Processor, parts
from perl.permutation import orders, permute
from perl.types import EncodedPrompt, Example, Variant

ORDERS = 4
SIDES = (336, 448)
"""Pixels; images differ between these in width and height."""
SIZES = {"min_pixels": 28**2, "max_pixels": 2**20}
QUESTION = "which image is the darkest ?"


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """On the host, whatever the device."""
    return [_contest(images) for images in ((2, 8, 32) if quick else (2, 4, 8, 16, 32))]


def _contest(images: int) -> Contest:
    return Contest(
        "Preprocessing of a question in 4 orders",
        f"{images} images of 336 to 448 pixels",
        {"images per prompt": images, "orders": ORDERS},
        partial(_question, images),
        [
            Provider("PeRL", _ours, note="each picture once"),
            Provider("transformers", _theirs, "transformers", "each picture in every order"),
        ],
        host=True,
        axis="images per prompt",
    )


Results = list[tuple[list[int], np.ndarray]]
"""Of each order: token ids, and patches of all images."""


def _question(images: int, device: torch.device) -> Inputs:
    rng = np.random.default_rng(0)
    pictures = tuple(
        Image.fromarray(rng.integers(0, 256, (*rng.integers(*SIDES, 2), 3), dtype=np.uint8))
        for _ in range(images)
    )
    example = Example("question", pictures, "<image> " * images + QUESTION, "1")
    # Two images have two orders only, which then come twice.
    found = orders(example, min(ORDERS, images), seed=0, epoch=0)
    variants = [permute(example, order) for order in (found * ORDERS)[:ORDERS]]
    return Inputs(variants, partial(_check, variants))


def _check(variants: list[Variant], results: Results) -> None:
    """Against the image processor on one picture after the other."""
    processor = _processor()
    for variant, (ids, pixels) in zip(variants, results, strict=True):
        encoded = [processor.encode_image(image) for image in variant.images]
        expected = torch.cat([image.pixel_values for image in encoded]).numpy()
        assert np.array_equal(pixels, expected), "other pixels, or in another order"
        shown = "".join("x" if i == processor.image_token_id else " " for i in ids).split()
        assert list(map(len, shown)) == [image.tokens for image in encoded], "other image tokens"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A tiny Qwen2.5-VL, whose image processor is that of the large ones; gone when the process ends."""
    from perl.model.tiny import make_tiny_model

    folder = tempfile.TemporaryDirectory()
    make_tiny_model("tiny-qwen2.5-vl", QUESTION.split(), Path(folder.name), seed=0)
    return folder


def _processor() -> Processor:
    from perl.model.loading import load_processor

    return load_processor(_folder().name, ModelConfig(**SIZES))


def _ours(p: Inputs) -> Run:
    made = _processor()

    def call() -> list[EncodedPrompt]:
        # A new one has an empty cache, as for a question that was not seen before.
        processor = Processor(made.tokenizer, made.encoder)
        return [processor.encode(variant) for variant in p.value]

    def read(prompts: list[EncodedPrompt]) -> Results:
        return [
            (e.input_ids.tolist(), torch.cat([i.pixel_values for i in e.images]).numpy())
            for e in prompts
        ]

    return Run(call, read=read)


def _theirs(p: Inputs) -> Run:
    """The model's own processor on each order, as trainers on stock transformers call it."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(_folder().name)
    size = {"shortest_edge": SIZES["min_pixels"], "longest_edge": SIZES["max_pixels"]}

    def encode(variant: Variant) -> Any:
        chat = [{"role": m.role, "content": parts(m.content)} for m in variant.messages]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = list(variant.images)
        return processor(
            text=[text], images=images, images_kwargs={"size": size}, return_tensors="pt"
        )

    def read(encoded: list[Any]) -> Results:
        return [(e["input_ids"][0].tolist(), e["pixel_values"].numpy()) for e in encoded]

    return Run(lambda: [encode(variant) for variant in p.value], read=read)
