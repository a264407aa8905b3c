"""From chats and pictures to token ids and pixels, for every family of models, without torchvision."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from perl.model.control_tokens import ControlTokens
from perl.model.demands import Demands
from perl.model.families import Family
from perl.permutation.alike import content_key
from perl.types import (
    IMAGE_SLOT,
    EncodedImage,
    EncodedPrompt,
    Message,
    UserError,
    Variant,
    one_line,
)

ENCODED = "encoded"
"""The attribute of a picture that has been read ahead with its `EncodedImage`, until it is asked for."""
_CACHE_BYTES = 2**29
"""How much of encoded images is kept, by content."""


@dataclass(frozen=True)
class ImageEncoder:
    """From an RGB picture to the tower's input; other processes can be given it.

    Args:
        family: how images become pixels, tokens and positions.
        image_processor: of the family.
        min_pixels, max_pixels: images outside this range are resized, keeping their aspect.
        dtype: of the tower, and so of the pixels.
    """

    family: Family
    image_processor: Any
    min_pixels: int
    max_pixels: int
    dtype: torch.dtype = torch.float32

    def __call__(self, image: Image.Image) -> EncodedImage:
        encoded = self.family.preprocess(
            self.image_processor, image, content_key(image), self.min_pixels, self.max_pixels
        )
        return replace(encoded, pixel_values=encoded.pixel_values.to(self.dtype))


class Processor(Demands):
    """A tokenizer with its chat template and an encoder of images, and a cache of encoded images.

    Args:
        tokenizer: a transformers tokenizer with a chat template and the family's tokens.
        encoder: of the family's images.
    """

    def __init__(self, tokenizer: Any, encoder: ImageEncoder) -> None:
        self.tokenizer, self.encoder, self.family = tokenizer, encoder, encoder.family
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self.family.image_token))
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.eos_token_id = int(tokenizer.eos_token_id)
        self._cache: OrderedDict[str, EncodedImage] = OrderedDict()
        self._cached_bytes = 0

    def encode_image(self, image: Image.Image) -> EncodedImage:
        """Pixels of one picture; the same content is encoded once, here or where the picture was read."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        key, ahead = content_key(image), vars(image).pop(ENCODED, None)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        encoded = self._cache[key] = ahead or self.encoder(image)
        self._cached_bytes += encoded.pixel_values.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.pixel_values.nbytes
        return encoded

    def encode(self, variant: Variant) -> EncodedPrompt:
        """The chat of a variant, ready for the assistant's turn, with every slot expanded to its image."""
        return self.encode_messages(variant.messages, variant.images, variant.example.id)

    def encode_messages(
        self, messages: Sequence[Message], images: Sequence[Image.Image], where: str = "the prompt"
    ) -> EncodedPrompt:
        """Tokens and positions of a chat and its pictures.

        Raises:
            UserError: the number of `<image>` slots is not the number of images, or the text holds a control token.
        """
        self.check_messages(messages, where)
        check_slots(messages, images, where)
        for image in images:
            self._check_shape(image, where)
        encoded = tuple(self.encode_image(image) for image in images)
        text = self.render(messages, where)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        flat = self._expand(ids, encoded, where)
        positions, next_position = self.family.positions(flat, encoded, self.image_token_id)
        return EncodedPrompt(
            flat, positions, next_position, encoded, self.image_token_id, pictures=tuple(images)
        )

    def render(
        self,
        messages: Sequence[Message],
        where: str = "the prompt",
        add_generation_prompt: bool = True,
    ) -> str:
        """A chat as the chat template writes it, with what begins the assistant's turn; each image is one `image_token`.

        Raises:
            UserError: the template refuses it.
        """
        from jinja2 import TemplateError

        chat = [{"role": m.role, "content": parts(m.content)} for m in messages]
        try:
            return self._template.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"{where}: the chat template refuses it ({one_line(error)}); see model.chat_template"
            ) from error

    @property
    def _template(self) -> Any:
        """What writes chats."""
        return self.tokenizer

    @property
    def image_token(self) -> str:
        """Stands for an image in what `render` writes; empty where that is not known."""
        return self.family.image_token

    @property
    def longest_aspect(self) -> float:
        return self.family.longest_aspect

    @property
    def demands(self) -> str:
        return f"{super().demands} {self.tokenizer.name_or_path}"

    def _expand(self, ids: Sequence[int], images: Sequence[EncodedImage], where: str) -> np.ndarray:
        waiting = iter(images)
        flat: list[int] = []
        for token in ids:
            if token == self.image_token_id:
                image = next(waiting, None)
                if image is None:
                    raise UserError(
                        f"{where}: the chat template writes {self.family.image_token} more often than there are images; "
                        "name another in model.chat_template"
                    )
                flat += self.tokenizer.convert_tokens_to_ids(self.family.placeholder(image))
            else:
                flat.append(token)
        if next(waiting, None) is not None:
            raise UserError(
                f"{where}: the chat template shows fewer images than there are; is it a vision template?"
            )
        return np.asarray(flat, dtype=np.int64)

    def unknown_words(self, messages: Sequence[Message]) -> list[str]:
        """Words that a word-level tokenizer, as the tiny models have, cannot read; others read everything."""
        if self.tokenizer.unk_token != "<unk>":
            return []
        words = [w for m in messages for w in m.content.replace(IMAGE_SLOT, " ").split()]
        ids = self.tokenizer.convert_tokens_to_ids(words)
        unknown = self.tokenizer.unk_token_id
        return list(dict.fromkeys(w for w, i in zip(words, ids, strict=True) if i == unknown))

    def encode_completion(self, text: str, where: str = "the completion") -> np.ndarray:
        """int64 [L]: a demonstration as tokens, with the end token.

        Raises:
            UserError: it holds a token that stands for an image, which has no probability.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if banned := sorted(self._unsampled.intersection(ids)):
            token = self.tokenizer.convert_ids_to_tokens(banned[0])
            raise UserError(
                f"{where} holds {token}, which stands for an image and is never sampled; remove it"
            )
        return np.asarray([*ids, self.eos_token_id], dtype=np.int64)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        unsampled = self.tokenizer.convert_ids_to_tokens(sorted(self._unsampled))
        # Some tokenizers do not call special what their template writes around a turn.
        turn = self.render([Message("user", "?")], add_generation_prompt=False)
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        around = (token for token in added if token in turn and re.search(r"[^\w\s]", token))
        return ControlTokens.of(self.tokenizer, *unsampled, *around)

    @cached_property
    def _unsampled(self) -> frozenset[int]:
        return frozenset(self.unsampled_token_ids().tolist())

    def decode(self, ids: np.ndarray) -> str:
        """Text of completion tokens, special tokens removed."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def unsampled_token_ids(self) -> torch.Tensor:
        """int64 [K]: vision placeholders, which a completion must never hold."""
        vocabulary = self.tokenizer.get_vocab()
        known = sorted(vocabulary[t] for t in self.family.vision_tokens if t in vocabulary)
        return torch.tensor(known, dtype=torch.int64)

    def save(self, folder: Path) -> None:
        """Write tokenizer and image processor the way transformers reads them."""
        self.tokenizer.save_pretrained(folder)
        self.encoder.image_processor.save_pretrained(folder)


def check_slots(messages: Sequence[Message], images: Sequence[Image.Image], where: str) -> None:
    """Every image has its slot.

    Raises:
        UserError: it has not.
    """
    slots = sum(m.content.count(IMAGE_SLOT) for m in messages)
    if slots != len(images):
        raise UserError(
            f"{where}: {slots} {IMAGE_SLOT} slots but {len(images)} images; give every image one slot"
        )


def parts(content: str) -> list[dict[str, str]]:
    """`"A <image> B"` as the parts that chat templates take."""
    return [
        {"type": "image"} if part == IMAGE_SLOT else {"type": "text", "text": part}
        for part in re.split(f"({IMAGE_SLOT})", content)
        if part
    ]
