"""What the packed trainer has to know about a family of models: one short class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from perl.types import EncodedImage


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the vision tower made of M images, one after the other.

    `rows` [K, H] visual tokens; `deepstack` (Qwen3-VL) one [K, H] per decoder layer it is added to.
    """

    rows: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.rows, *self.deepstack)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ImageFeatures:
        """`function` of each tensor."""
        return ImageFeatures(function(self.rows), tuple(function(d) for d in self.deepstack))

    def split(self, sizes: Sequence[int]) -> list[ImageFeatures]:
        """Consecutive rows of these numbers apart; views."""
        parts = zip(*(t.split(list(sizes)) for t in self.tensors), strict=True)
        return [ImageFeatures(rows, tuple(deepstack)) for rows, *deepstack in parts]

    @staticmethod
    def join(features: Sequence[ImageFeatures]) -> ImageFeatures:
        """One after the other."""
        tensors = zip(*(f.tensors for f in features), strict=True)
        rows, *deepstack = (torch.cat(t) for t in tensors)
        return ImageFeatures(rows, tuple(deepstack))


class Family(ABC):
    """A family of transformers vision-language models: a language model over text and visual tokens, and a tower.

    docs/models.md says how to add one. It has to be a model whose visual tokens are
    attended to causally like text, and whose images are encoded independently of each other.
    """

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    text_types: tuple[str, ...] = ()
    """Values of `model_type` of the language models inside that packed rows are exact for; empty: whatever is there."""
    image_token: str
    """Marks one visual token in a prompt; the chat template writes it once for each image."""
    vision_tokens: tuple[str, ...]
    """Tokens that stand for or around images: a completion never holds them."""
    longest_aspect: float = float("inf")
    """How many times an image may be longer than it is wide, or the other way round."""
    packed_tower: bool
    """Whether the tower takes many images end to end and so needs packed attention."""

    @abstractmethod
    def load_image_processor(self, folder: str | Path) -> Any:
        """The image processor of a checkpoint; raises whatever transformers raises for a broken one.

        Raises:
            ValueError: `preprocess` cannot work with it.
        """

    @staticmethod
    def image_processor_of(folder: str | Path, pil: Any) -> Any:
        """The image processor that a folder names; without torchvision `pil`, if that is the one it names.

        Older transformers have no AutoImageProcessor where torchvision is missing.

        Raises:
            ValueError: the folder names another.
        """
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError:
            named = pil.get_image_processor_dict(folder)[0].get("image_processor_type", "")
            if not named.startswith(pil.__name__.removesuffix("Pil")):
                raise ValueError(f"it names {named or 'no image processor'}") from None
            return pil.from_pretrained(folder)

    @abstractmethod
    def preprocess(
        self, image_processor: Any, image: Image.Image, key: str, min_pixels: int, max_pixels: int
    ) -> EncodedImage:
        """One RGB picture as the tower's input; `key` is the hash of its content."""

    def placeholder(self, image: EncodedImage) -> list[str]:
        """The tokens that the template's one image token becomes."""
        return [self.image_token] * image.tokens

    def positions(
        self, input_ids: np.ndarray, images: Sequence[EncodedImage], image_token_id: int
    ) -> tuple[np.ndarray, int]:
        """int64 [A, P], and the position that the next text token takes; here: one axis that counts."""
        return np.arange(len(input_ids))[None], len(input_ids)

    @abstractmethod
    def tower(self, core: Any) -> list[nn.Module]:
        """The modules of a model (transformers' `model.model`) that turn pixels into visual tokens."""

    @abstractmethod
    def encode(self, core: Any, images: Sequence[EncodedImage]) -> ImageFeatures:
        """Run the tower once over distinct images."""

    def patches_per_token(self, config: Any) -> float:
        """Patches of the tower that become one visual token; only the balance between processes rests on it."""
        return 1.0

    def layer_inputs(self, visual_mask: torch.Tensor, features: ImageFeatures) -> dict[str, Any]:
        """What the language model takes besides embeddings; `visual_mask` bool [B, T]."""
        return {}
