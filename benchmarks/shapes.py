"""Sizes of models for benchmarks: transformers configs, from which weights are drawn on the device."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, dict[str, Any]] = {
    # As in config.json of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct.
    "3b": {
        "vocabulary": 151936,
        "special": 151652,
        "tied": True,
        "text": (2048, 11008, 36, 16, 2),
        "mrope": [16, 24, 24],
        "vision": (1280, 3420, 32, 16),
        "full": [7, 15, 23, 31],
    },
    "7b": {
        "vocabulary": 152064,
        "special": 151652,
        "tied": False,
        "text": (3584, 18944, 28, 28, 4),
        "mrope": [16, 24, 24],
        "vision": (1280, 3420, 32, 16),
        "full": [7, 15, 23, 31],
    },
    # A language model as in config.json of Qwen/Qwen2.5-0.5B-Instruct, and a tower of a quarter of its size.
    "0.6b": {
        "vocabulary": 151936,
        "special": 151652,
        "tied": True,
        "text": (896, 4864, 24, 14, 2),
        "mrope": [8, 12, 12],
        "vision": (768, 2048, 16, 12),
        "full": [3, 7, 11, 15],
    },
    # Tower, language model and head take about the shares of a step that they take in the 3b.
    "tiny": {
        "vocabulary": 1000,
        "special": 995,
        "tied": True,
        "text": (32, 128, 2, 1, 1),
        "mrope": [4, 6, 6],
        "vision": (32, 64, 2, 1),
        "full": [1],
    },
}

SHAPES = tuple(_SIZES)


def shape(name: str) -> Any:
    """The config of a Qwen2.5-VL: `3b` and `7b` are those of the released models, `0.6b` lies between, `tiny` is for a
    CPU."""
    from transformers import Qwen2_5_VLConfig

    size = _SIZES[name]
    hidden, intermediate, layers, heads, key_heads = size["text"]
    vision_hidden, vision_intermediate, depth, vision_heads = size["vision"]
    start = size["special"]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size["vocabulary"],
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": size["mrope"],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "tie_word_embeddings": size["tied"],
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
            "fullatt_block_indexes": size["full"],
        },
        vision_start_token_id=start,
        vision_end_token_id=start + 1,
        image_token_id=start + 3,
        video_token_id=start + 4,
        tie_word_embeddings=size["tied"],
    )
