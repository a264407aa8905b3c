"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of any number per image, M-RoPE, deepstack features in the third."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from perl.model.families.base import Family, ImageFeatures
from perl.types import EncodedImage

if TYPE_CHECKING:
    from PIL import Image


class QwenVL(Family):
    """The Qwen-VL models of transformers."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    image_token = "<|image_pad|>"
    vision_tokens = (
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    longest_aspect = 200.0
    packed_tower = True

    def load_image_processor(self, folder: str | Path) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        processor = self.image_processor_of(folder, Qwen2VLImageProcessorPil)
        if not hasattr(processor, "merge_size"):
            raise ValueError(f"{type(processor).__name__} does not fit a Qwen-VL model")
        return processor

    def preprocess(
        self, image_processor: Any, image: Image.Image, key: str, min_pixels: int, max_pixels: int
    ) -> EncodedImage:
        """Patches float32 [t * h * w, channels * temporal * patch^2], grid (t, h, w) in patches."""
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        out = image_processor(images=[image], size=size, return_tensors="pt")
        t, h, w = (int(x) for x in out["image_grid_thw"][0])
        merge, patch = image_processor.merge_size, image_processor.patch_size
        tokens, shown = t * h * w // merge**2, (w * patch, h * patch)
        return EncodedImage(key, out["pixel_values"], (t, h, w), tokens, merge, shown)

    def positions(
        self, input_ids: np.ndarray, images: Sequence[EncodedImage], image_token_id: int
    ) -> tuple[np.ndarray, int]:
        """M-RoPE's temporal, height and width axes (arXiv 2409.12191 §2.1): int64 [3, P], and the next position.

        Text advances all axes by one a token. The axes of an image of t x h x w tokens count inside it from the
        position it starts at; the text after it goes on from its largest position + 1.
        """
        positions = np.empty((3, len(input_ids)), dtype=np.int64)
        is_image = input_ids == image_token_id
        index = next_position = 0
        for image in images:
            t, h, w = image.grid
            shape = (t, h // image.merge, w // image.merge)
            start = index + int(np.argmax(is_image[index:]))
            end = start + image.tokens
            positions[:, index:start] = np.arange(next_position, next_position + start - index)
            next_position += start - index
            positions[:, start:end] = np.indices(shape).reshape(3, -1) + next_position
            next_position += max(shape)
            index = end
        rest = len(input_ids) - index
        positions[:, index:] = np.arange(next_position, next_position + rest)
        return positions, next_position + rest

    def tower(self, core: Any) -> list[nn.Module]:
        return [core.visual]

    def encode(self, core: Any, images: Sequence[EncodedImage]) -> ImageFeatures:
        visual = core.visual
        device = next(visual.parameters()).device
        pixels = torch.cat([image.pixel_values for image in images]).to(device, visual.dtype)
        grid = torch.tensor([image.grid for image in images], device=device)
        output = core.get_image_features(pixels, grid, return_dict=True)
        deepstack = getattr(output, "deepstack_features", None) or ()
        return ImageFeatures(
            torch.cat(tuple(output.pooler_output)), tuple(_joined(layer) for layer in deepstack)
        )

    def patches_per_token(self, config: Any) -> float:
        return config.vision_config.spatial_merge_size**2

    def layer_inputs(self, visual_mask: torch.Tensor, features: ImageFeatures) -> dict[str, Any]:
        """Deepstack: each of the first layers adds its own features to the visual tokens."""
        if not features.deepstack:
            return {}
        return {
            "visual_pos_masks": visual_mask,
            "deepstack_visual_embeds": list(features.deepstack),
        }


def _joined(layer: Any) -> torch.Tensor:
    """One layer's deepstack features as [K, H]; newer transformers split them by image."""
    return layer if isinstance(layer, torch.Tensor) else torch.cat(tuple(layer))
