"""Qwen2.5-VL in the sizes that training steps are measured at, and what enters such a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perl.model.families.qwen import QwenVL
from perl.model.loading import check_model
from perl.types import UserError


class _Size(NamedTuple):
    vocabulary: int
    special: int
    """The first of the ids that stand for or around images."""
    tied: bool
    text: tuple[int, int, int, int, int]
    """Hidden size, intermediate size, layers, heads, key heads."""
    vision: tuple[int, int, int, int]
    """Hidden size, intermediate size, depth, heads."""


_SIZES = {
    # As in config.json of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct.
    "3b": _Size(151936, 151652, True, (2048, 11008, 36, 16, 2), (1280, 3420, 32, 16)),
    "7b": _Size(152064, 151652, False, (3584, 18944, 28, 28, 4), (1280, 3420, 32, 16)),
    # A language model as in config.json of Qwen/Qwen2.5-0.5B-Instruct, and a tower of a quarter of its size.
    "0.6b": _Size(151936, 151652, True, (896, 4864, 24, 14, 2), (768, 2048, 16, 12)),
    # Tower, language model and head take about the shares of a step that they take in the 3b.
    # The heads of the 7b and a narrow MLP: the caches of twelve sequences are to its weights what those of two hundred are
    # to the 7b's.
    "tiny-7b": _Size(1000, 995, True, (448, 128, 4, 28, 4), (64, 128, 2, 1)),
    "tiny": _Size(1000, 995, True, (32, 128, 2, 1, 1), (32, 64, 2, 1)),
}

SHAPES = tuple(_SIZES)


def shape(name: str) -> Any:
    """The config of a Qwen2.5-VL: `3b` and `7b` are those of the released models, `0.6b` lies between, `tiny` is for a
    CPU."""
    from transformers import Qwen2_5_VLConfig

    size = _SIZES[name]
    hidden, intermediate, layers, heads, key_heads = size.text
    vision_hidden, vision_intermediate, depth, vision_heads = size.vision
    per_head = hidden // heads
    full_attention = max(2, depth // 4)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [per_head // 8, 3 * per_head // 16, 3 * per_head // 16],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "tie_word_embeddings": size.tied,
        },
        vision_config={
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "depth": depth,
            "num_heads": vision_heads,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(full_attention - 1, depth, full_attention)),
        },
        vision_start_token_id=size.special,
        vision_end_token_id=size.special + 1,
        image_token_id=size.special + 3,
        video_token_id=size.special + 4,
        tie_word_embeddings=size.tied,
    )


def given_model(name: str, shapes: Sequence[str]) -> Path:
    """The folder of a model whose pixels the benchmarks can make.

    Raises:
        UserError: there is none, or it is of another family.
    """
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: choose {', '.join(shapes)} or a model folder")
    if not isinstance(check_model(name), QwenVL):
        raise UserError(f"--model {name}: it is none of {', '.join(QwenVL.model_types)}")
    return Path(name)


def special_tokens(config: Any) -> list[int]:
    """Ids that stand for or around images: no completion holds them."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(config, name) for name in names]


@dataclass
class Counts:
    """By `generation` and `update`: tokens through the language model, padding included, and images through the tower."""

    lm_tokens: dict[str, int] = field(default_factory=lambda: {"generation": 0, "update": 0})
    images: dict[str, int] = field(default_factory=lambda: {"generation": 0, "update": 0})
    largest: int = 0
    """Tokens of the largest micro-batch that is trained on, padding included."""


@contextmanager
def counting(core: Any, wanted: Callable[[], bool] = lambda: True) -> Iterator[Counts]:
    """Count what the block runs, at the doors of the model's two parts, so that no trainer counts itself.

    Sampling is what runs without gradients.

    Args:
        core: transformers' model of text and images, without the head.
        wanted: whether what enters now counts.
    """
    counts = Counts()

    def layer(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        # PeRL's decoding calls the layers' modules itself.
        if wanted() and not torch.is_grad_enabled():
            counts.lm_tokens["generation"] += args[0].shape[:-1].numel()

    def language(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not by its layers, which checkpointing runs twice.
        if wanted() and torch.is_grad_enabled():
            tokens = kwargs.get("inputs_embeds")
            tokens = kwargs["input_ids"] if tokens is None else tokens
            number = tokens.shape[:2].numel()
            counts.lm_tokens["update"] += number
            counts.largest = max(counts.largest, number)

    def tower(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wanted():
            grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            part = "update" if torch.is_grad_enabled() else "generation"
            counts.images[part] += len(grids)

    hooks = [
        core.language_model.layers[0].self_attn.q_proj.register_forward_pre_hook(layer),
        core.language_model.register_forward_pre_hook(language, with_kwargs=True),
        core.visual.register_forward_pre_hook(tower, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
