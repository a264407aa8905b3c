"""InternVL: pictures cut into tiles of one size, each of which becomes the same number of visual tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perl.model.families.base import Family, ImageFeatures
from perl.types import EncodedImage

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class TileProcessor:
    """GotOcr2's image processor, whose tiles of `area` pixels become `tokens` visual tokens each in the model."""

    images: Any
    area: int
    tokens: int

    def save_pretrained(self, folder: Path) -> None:
        """Write it as transformers reads it; what is derived from the model's config is derived again."""
        self.images.save_pretrained(folder)


class InternVL(Family):
    """transformers' own InternVL models (hub names that end in `-hf`)."""

    model_types = ("internvl",)
    text_types = ("qwen2", "qwen3", "llama")
    image_token = "<IMG_CONTEXT>"
    vision_tokens = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    packed_tower = False

    def load_image_processor(self, folder: str | Path) -> TileProcessor:
        """The one that the folder names, with the model's geometry.

        The tower makes (tile / patch * downsample_ratio) visual tokens of each side of a tile.
        """
        from transformers import AutoConfig
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        images = self.image_processor_of(folder, GotOcr2ImageProcessorPil)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        height, width = (int(images.size.get(side, 0)) for side in ("height", "width"))
        sides = [
            pixels // patch * config.downsample_ratio
            for pixels, patch in zip((height, width), config.vision_config.patch_size, strict=True)
        ]
        if not (
            hasattr(images, "max_patches") and height == width and float(sides[0]).is_integer()
        ):
            raise ValueError(f"{type(images).__name__} does not fit an internvl model")
        return TileProcessor(images, height * width, int(sides[0] * sides[1]))

    def preprocess(
        self,
        image_processor: TileProcessor,
        image: Image.Image,
        key: str,
        min_pixels: int,
        max_pixels: int,
    ) -> EncodedImage:
        """Tiles float32 [tiles, 3, size, size], grid (tiles,).

        The picture is resized to the arrangement of tiles that is closest to its aspect, of at most
        `max_pixels // pixels of a tile` tiles but at least one and no more than the checkpoint's `max_patches`, and
        of at least `min_pixels // pixels of a tile`. Where that is several, the picture as a whole is one more tile.
        """
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            get_optimal_tiled_canvas,
        )

        stock, area = image_processor.images, image_processor.area
        most = max(1, min(int(stock.max_patches), max_pixels // area))
        least = min(most, max(int(stock.min_patches), min_pixels // area))
        out = stock(
            images=[image],
            crop_to_patches=True,
            min_patches=least,
            max_patches=most,
            return_tensors="pt",
        )
        tiles, side = int(out["num_patches"][0]), math.isqrt(area)
        columns, rows = get_optimal_tiled_canvas(image.size[::-1], (side, side), least, most)
        tokens, shown = tiles * image_processor.tokens, (columns * side, rows * side)
        return EncodedImage(key, out["pixel_values"], (tiles,), tokens, size=shown)

    def placeholder(self, image: EncodedImage) -> list[str]:
        return ["<img>", *[self.image_token] * image.tokens, "</img>"]

    def tower(self, core: Any) -> list[nn.Module]:
        return [core.vision_tower, core.multi_modal_projector]

    def encode(self, core: Any, images: Sequence[EncodedImage]) -> ImageFeatures:
        weight = next(core.vision_tower.parameters())
        pixels = torch.cat([image.pixel_values for image in images])
        output = core.get_image_features(pixels.to(weight.device, weight.dtype), return_dict=True)
        return ImageFeatures(output.pooler_output.flatten(0, 1))

    def patches_per_token(self, config: Any) -> float:
        return config.downsample_ratio**-2
