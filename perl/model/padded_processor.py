"""Prompts of models that no family is written for, made by the model's own transformers processor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from perl.model.processor import Processor, check_slots
from perl.permutation.alike import content_key
from perl.types import EncodedImage, EncodedPrompt, Message, RawPrompt, UserError, one_line

_PLACEHOLDER = re.compile(r"(image|img|video|vision|audio|boi|eoi)", re.IGNORECASE)
_USUAL_SIDE, _USUAL_ASPECT = 28, 20
"""Pixels of the shorter side, and how many times it the other is at most: no image processor refuses such."""


class PaddedProcessor(Processor):
    """A transformers processor behind the surface of ours.

    Args:
        stock: with a tokenizer and a chat template; it turns texts and pictures into whatever its model takes.
        config: of the model; names the tokens that stand for pictures.
        min_pixels, max_pixels: images outside this range are resized, keeping their aspect, before `stock` does with
            them what its model needs.
    """

    encoder = None  # type: ignore[assignment]
    """Pictures are encoded with their text."""

    def __init__(self, stock: Any, config: Any, min_pixels: int, max_pixels: int) -> None:
        self.stock, self.config = stock, config
        self.tokenizer = stock.tokenizer
        self.pad_token_id = int(self.tokenizer.pad_token_id)
        self.eos_token_id = int(self.tokenizer.eos_token_id)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self._refusals: dict[tuple[int, int], str] = {}

    @property
    def longest_aspect(self) -> float:
        return math.inf

    @property
    def demands(self) -> str:
        return f"{super().demands} {self.min_pixels} {self.max_pixels}"

    def _check_shape(self, image: Image.Image, where: str) -> None:
        """An unusual shape is tried, on a black picture of it and once."""
        size = self._resized_to(image.size)
        if min(size) >= _USUAL_SIDE and max(size) <= _USUAL_ASPECT * min(size):
            return
        if size not in self._refusals:
            self._refusals[size] = ""
            try:
                self.stock.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
            except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
                self._refusals[size] = one_line(error)
        if why := self._refusals[size]:
            raise UserError(
                f"{where}: {image.width} x {image.height} pixels, which the model's "
                f"{type(self.stock.image_processor).__name__} refuses ({why}); crop it"
            )

    def encode_messages(
        self, messages: Sequence[Message], images: Sequence[Image.Image], where: str = "the prompt"
    ) -> EncodedPrompt:
        """Tokens of a chat and its pictures, with the text and the pictures that the model's inputs are made of.

        Raises:
            UserError: the number of `<image>` slots is not the number of images, the text holds a control token, or `stock`
                refuses the prompt.
        """
        self.check_messages(messages, where)
        check_slots(messages, images, where)
        text = self.render(messages, where)
        raw = RawPrompt(text, tuple(self._resized(image.convert("RGB")) for image in images))
        ids = self._call([raw], "right", where)["input_ids"][0].numpy().astype(np.int64)
        return EncodedPrompt(
            ids,
            np.arange(len(ids))[None],
            len(ids),
            tuple(
                EncodedImage(content_key(i), torch.empty(0), (), 0, size=i.size) for i in raw.images
            ),
            -1,
            raw,
        )

    @property
    def _template(self) -> Any:
        return self.stock

    @property
    def image_token(self) -> str:
        return str(getattr(self.stock, "image_token", None) or "")

    def inputs(
        self, prompts: Sequence[EncodedPrompt], side: Literal["left", "right"]
    ) -> dict[str, torch.Tensor]:
        """What the model takes for a batch of prompts, padded on one side; all of them show images, or none does.

        Raises:
            UserError: the processor gives a prompt other tokens in a batch than alone.
        """
        out = self._call([p.raw for p in prompts if p.raw], side, "a batch of prompts")
        ids = out["input_ids"]
        for row, prompt in zip(ids, prompts, strict=True):
            length = len(prompt.input_ids)
            own = row[:length] if side == "right" else row[len(row) - length :]
            if not np.array_equal(own.numpy(), prompt.input_ids):
                raise UserError(
                    f"{type(self.stock).__name__} gives a prompt other tokens in a padded batch than alone, "
                    "so this model cannot be trained; choose another or write a family for it (docs/models.md)"
                )
        return out

    def _call(
        self, prompts: Sequence[RawPrompt], side: Literal["left", "right"], where: str
    ) -> dict[str, torch.Tensor]:
        bos = self.tokenizer.bos_token
        # As transformers' own apply_chat_template does it: a template that writes the first token itself.
        written = bool(bos) and prompts[0].text.startswith(bos)
        images = [list(p.images) for p in prompts]
        try:
            out = self.stock(
                text=[p.text for p in prompts],
                images=images if any(images) else None,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                **({"add_special_tokens": False} if written else {}),
            )
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"{where}: {type(self.stock).__name__} refuses it ({error}); is it made for this many images?"
            ) from error
        return {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}

    def unsampled_token_ids(self) -> torch.Tensor:
        """int64 [K]: tokens that stand for or around pictures, by the config, the processor and their own names."""
        values = [
            value
            for key, value in self.config.to_dict().items()
            if _PLACEHOLDER.search(key) and re.search(r"token_(id|index)$", key)
        ]
        values += [
            getattr(self.stock, f"{kind}_{name}", None)
            for kind in ("image", "video", "audio")
            for name in ("token_id", "token_ids")
        ]
        special = self.tokenizer.added_tokens_decoder.items()
        values += [i for i, t in special if t.special and _PLACEHOLDER.search(t.content)]
        ids = {i for v in values for i in (v if isinstance(v, list | tuple) else [v])}
        vocabulary = int(self.config.get_text_config().vocab_size)
        known = sorted(i for i in ids if isinstance(i, int) and 0 <= i < vocabulary)
        return torch.tensor(known, dtype=torch.int64)

    def save(self, folder: Path) -> None:
        """Write it the way transformers reads it."""
        self.stock.save_pretrained(folder)

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self._resized_to(image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def _resized_to(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = size
        pixels = width * height
        scale = math.sqrt(min(max(pixels, self.min_pixels), self.max_pixels) / pixels)
        return max(1, round(width * scale)), max(1, round(height * scale))
