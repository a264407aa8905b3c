"""Tiny vision-language models from config: the true architecture, small enough to train on two CPU cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY_QWEN = ("tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-qwen2-vl")
TINY_INTERNVL = "tiny-internvl"
TINY_MODELS = (*TINY_QWEN, TINY_INTERNVL)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{%- if message.content is string %} {{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %} <|vision_start|><|image_pad|><|vision_end|>
{%- else %} {{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif %} <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant {% endif -%}
"""

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

INTERNVL_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %}{{ '<IMG_CONTEXT>\\n' }}
{%- else %}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif %}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

_HIDDEN, _LAYERS, _HEADS = 128, 4, 4
_VISION_HIDDEN, _VISION_DEPTH, _VISION_HEADS = 128, 3, 4


def make_tiny_model(name: str, words: Sequence[str], folder: Path, seed: int) -> None:
    """Make a randomly initialised model and save it as an ordinary transformers model folder.

    Args:
        name: one of `TINY_MODELS`.
        words: the vocabulary of its word-level tokenizer.
        folder: where config, weights, tokenizer and image processor go; `AutoModelForImageTextToText` and, for
            Qwen-VL, `AutoProcessor` load it. InternVL's processor insists on torchvision.
        seed: of the weights.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    tokenizer = tiny_tokenizer(name, words)
    config = tiny_config(name, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    if name == TINY_INTERNVL:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        height, width = config.vision_config.image_size
        tokenizer.save_pretrained(folder)
        GotOcr2ImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
    else:
        save_processor(tokenizer, make_image_processor(config.vision_config), folder)


def tiny_tokenizer(name: str, words: Sequence[str]) -> Any:
    """The tokenizer of a tiny model that knows these words."""
    if name != TINY_INTERNVL:
        return make_tokenizer(words)
    special = (*SPECIAL_TOKENS[:3], *INTERNVL_TOKENS.values())
    return make_tokenizer(words, special, INTERNVL_TOKENS, INTERNVL_CHAT_TEMPLATE)


def make_tokenizer(
    words: Sequence[str],
    special: Sequence[str] = SPECIAL_TOKENS,
    named: Mapping[str, str] = MappingProxyType({"image_token": "<|image_pad|>"}),
    template: str = CHAT_TEMPLATE,
) -> Any:
    """A tokenizer of whole words, with Qwen's special tokens and images in its chats unless others are given.

    Args:
        words: its vocabulary besides what follows.
        special: its special tokens, `<|endoftext|>` and `<|im_end|>` (which ends a turn) among them.
        named: attributes of the tokenizer that name special tokens.
        template: of chats.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict.fromkeys([*special, "<unk>", "user", "assistant", "system", *words])
    model = models.WordLevel(
        {word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=dict(named),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(name: str, tokenizer: Any) -> Any:
    """The transformers config of a tiny model over the given tokenizer's vocabulary."""
    from transformers import InternVLConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": _HIDDEN,
        "intermediate_size": 4 * _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    sizes = {"hidden_size": _VISION_HIDDEN, "intermediate_size": 2 * _VISION_HIDDEN}
    if name == TINY_INTERNVL:
        # Tiles of 28 x 28 pixels, one visual token each.
        vision: dict[str, Any] = {
            **sizes,
            "num_hidden_layers": _VISION_DEPTH,
            "num_attention_heads": _VISION_HEADS,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        }
        return InternVLConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=1,
            tie_word_embeddings=True,
        )
    rope = text["rope_parameters"]
    rope["mrope_section"] = [4, 6, 6]
    vision = {
        "depth": _VISION_DEPTH,
        "num_heads": _VISION_HEADS,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if name == "tiny-qwen2-vl":
        make: Any = Qwen2VLConfig
        vision |= {"embed_dim": _VISION_HIDDEN, "mlp_ratio": 2, "hidden_size": _HIDDEN}
    elif name == "tiny-qwen2.5-vl":
        make = Qwen2_5_VLConfig
        vision |= {**sizes, "out_hidden_size": _HIDDEN, "window_size": 112}
        vision["fullatt_block_indexes"] = [_VISION_DEPTH - 1]
    else:
        make = Qwen3VLConfig
        vision |= {**sizes, "out_hidden_size": _HIDDEN, "patch_size": 16}
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
        text["head_dim"] = _HIDDEN // _HEADS
        rope["mrope_interleaved"] = True
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    start, end, image, video = tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names])
    return make(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )


def make_image_processor(vision_config: Any) -> Any:
    """Qwen2-VL's image processor (PIL), for the vision tower's patch and merge sizes."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    half: dict[str, Any] = {}
    if vision_config.patch_size == 16:  # Qwen3-VL
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    unit = vision_config.patch_size * vision_config.spatial_merge_size
    return Qwen2VLImageProcessorPil(
        patch_size=vision_config.patch_size,
        merge_size=vision_config.spatial_merge_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        size={"shortest_edge": unit * unit, "longest_edge": 16 * unit * unit},
        **half,
    )


def save_processor(tokenizer: Any, image_processor: Any, folder: Path) -> None:
    """Save both so that `AutoProcessor` loads them, with torchvision or without.

    Qwen's own processor classes insist on a video processor, and that on torchvision. Without it the folder names
    PaddleOCR-VL's processor: the same image layout, image tokens and chat template, and no video. A vLLM server makes Qwen's
    of the same folder, and reads the video processor's settings.
    """
    import importlib.util
    import json

    from transformers import PaddleOCRVLProcessor

    shared = ("patch_size", "merge_size", "temporal_patch_size")
    if importlib.util.find_spec("torchvision") is None:
        processor = PaddleOCRVLProcessor(
            image_processor, tokenizer, chat_template=tokenizer.chat_template
        )
        kind = (
            "Qwen3VLVideoProcessor" if image_processor.patch_size == 16 else "Qwen2VLVideoProcessor"
        )
        settings = {
            "video_processor_type": kind,
            "do_resize": True,
            "size": dict(image_processor.size),
        }
        settings |= {k: getattr(image_processor, k) for k in shared}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    else:
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

        sizes = {k: getattr(image_processor, k) for k in shared}
        processor = Qwen2_5_VLProcessor(
            image_processor,
            tokenizer,
            Qwen2VLVideoProcessor(**sizes),
            chat_template=tokenizer.chat_template,
        )
    processor.save_pretrained(folder)
