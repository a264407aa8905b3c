"""The policy: a transformers vision-language model that reads packed rows and gives hidden states of scored tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from perl.model.export import write_adapter, write_model
from perl.model.families import Family, ImageFeatures
from perl.model.packed.gather import gather_rows
from perl.model.packed.layout import PackedLayout
from perl.model.packed.pack import pack
from perl.model.sharding import Sharding
from perl.model.vision import Vision
from perl.types import PackedBatch, Segment


class Policy(nn.Module):
    """A vision-language model with the three things training needs: image features, packed rows, its head.

    `model` is transformers' own; nothing in it is patched but the name of the attention it uses.

    Args:
        model: a transformers model with `.model.language_model` and `.lm_head`, LoRA adapters around it or not.
        family: what is special about it.
        feature_cache_bytes: most bytes of image features that are kept between calls without gradient.
        compiled: whether its decoder layers are; generation then runs without.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        feature_cache_bytes: int = 2**30,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.family, self.compiled = model, family, compiled
        self.vision = Vision(self.core, family, feature_cache_bytes)

    @property
    def base(self) -> Any:
        """The transformers model under a LoRA wrapper, if there is one."""
        return (
            cast(Any, self.model).get_base_model()
            if hasattr(self.model, "peft_config")
            else self.model
        )

    @property
    def core(self) -> Any:
        return self.base.model

    @property
    def device(self) -> torch.device:
        """That is computed on."""
        return self.sharding.device if self.sharding else self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That is computed in."""
        return self.sharding.dtype if self.sharding else self.head_weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] weight of the language-model head."""
        return self.base.lm_head.weight

    @property
    def patches_per_token(self) -> float:
        """See `Family.patches_per_token`."""
        return self.family.patches_per_token(self.core.config)

    shares_prompts = True
    """Whether completions can share their prompt."""
    sharding: Sharding | None = None
    """How the weights are spread over processes; None: each has all of them."""

    def share_tower(self, other: Policy) -> None:
        """Read another policy's image features, whose tower has equal weights, and let go of the own tower."""
        self.vision = other.vision
        for module in self.family.tower(self.core):
            module.to("meta")

    def pack(self, segments: Sequence[Segment], budget: int, share: bool) -> list[PackedBatch]:
        """Micro-batches as this model reads them; see `perl.model.packed.pack.pack`."""
        return pack(segments, budget, share)

    def embed(
        self, input_ids: torch.Tensor, visual_mask: torch.Tensor, features: ImageFeatures | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Token embeddings [B, T, H] with visual rows put in at `visual_mask` [B, T], and the layers' extra inputs."""
        table = self.core.language_model.embed_tokens
        if table.weight.dtype.itemsize < 4:
            # The module's backward adds up a token that occurs again and again in the dtype of the weight.
            rows = gather_rows(table.weight, input_ids.flatten())
            embeds = rows.view(*input_ids.shape, -1)
        else:
            embeds = table(input_ids)
        if features is None:
            return embeds, {}
        embeds = embeds.masked_scatter(visual_mask[..., None], features.rows.to(embeds.dtype))
        return embeds, self.family.layer_inputs(visual_mask, features)

    def position_ids(self, axes: torch.Tensor) -> torch.Tensor:
        """Positions int64 [A, B, T] on the device, without the first dimension where the model has one axis."""
        return (axes if len(axes) > 1 else axes[0]).to(self.device)

    def forward(
        self, batch: PackedBatch, features: ImageFeatures | None = None, kv_cache: Any = None
    ) -> torch.Tensor:
        """Final hidden states of the scored tokens, [N, H]: row i predicts `batch.targets[i]`.

        Args:
            batch: a packed row.
            features: of `batch.images`, one after the other; left out, they are made or found in the cache.
            kv_cache: an object whose `store` takes each layer's number, and its keys and values [1, kv_heads, T, d].
        """
        device = self.device
        if features is None:
            features = self.vision.features(batch.images)
        if features is not None:
            index = batch.visual_source.to(device)
            features = features.map(lambda rows: gather_rows(rows, index))
        mask = torch.zeros(1, batch.num_tokens, dtype=torch.bool, device=device)
        mask[0, batch.visual_positions.to(device)] = True
        embeds, extra = self.embed(batch.input_ids[None].to(device), mask, features)
        # transformers' own cache must be off: with one, it no longer sees a packed row and sequences leak.
        output = self.core.language_model(
            inputs_embeds=embeds,
            position_ids=self.position_ids(batch.position_ids[:, None]),
            use_cache=False,
            packed_layout=PackedLayout(
                batch.cu_seqlens_q, batch.prefix_starts, batch.prefix_lengths, device
            ),
            kv_cache=kv_cache,
            **extra,
        )
        # Only these reach the head. The last row of a prompt is taken once for each of its completions.
        return gather_rows(output.last_hidden_state[0], batch.scored.to(device))

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model as it was before LoRA, for reference log-probs."""
        with cast(Any, self.model).disable_adapter():
            yield

    def save_pretrained(
        self, folder: Path, dtype: torch.dtype | None = None, writes: bool = True
    ) -> None:
        """Write an ordinary model folder, adapters merged; see `perl.model.export.write_model`.

        Args:
            dtype: of its parameters; None: that is computed in.
        """
        write_model(self.base, folder, dtype or self.dtype, writes)

    def save_adapter(self, folder: Path, base: str, writes: bool = True) -> None:
        """Write the LoRA adapters in peft's format; see `perl.model.export.write_adapter`."""
        write_adapter(self.model, folder, base, writes)


def merged(model: Any) -> Any:
    """A peft model's own model, the adapters added to its weights in float32 at least: each is rounded once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        layer.to(torch.promote_types(dtype, torch.float32)).merge()
        base.to(dtype)
    return model.unload()
