"""The same start for both trainers: a model folder, and processors that give the same tokens and pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import shape
from benchmarks.trainer.questions import stream, variants
from benchmarks.trainer.setting import MODELS, Setting
from perl.config import ModelConfig
from perl.data.tasks import vocabulary
from perl.model.families.qwen import QwenVL
from perl.model.loading import check_model, load_processor
from perl.model.processor import Processor
from perl.model.tiny import make_image_processor, make_tokenizer, save_processor, tiny_config
from perl.types import UserError


@dataclass(frozen=True)
class Start:
    """`model` and `processor` are folders that transformers loads; `longest` is the longest sequence of a first step.

    `pixels` of every image, after it was enlarged.
    """

    setting: Setting
    model: Path
    processor: Path
    pixels: int
    unsampled: tuple[int, ...]
    """Ids that stand for images: neither trainer samples them."""
    longest: int
    parameters: int

    @property
    def model_config(self) -> ModelConfig:
        """PeRL's `model` section."""
        return ModelConfig(
            path=str(self.model),
            dtype=self.setting.dtype,
            min_pixels=self.pixels,
            max_pixels=self.pixels,
        )


def make_start(setting: Setting, folder: Path) -> Start:
    """Make the model, or find it, and write TRL's processor.

    Raises:
        UserError: the model cannot be used, or a sequence is longer than the budget.
    """
    from transformers import AutoConfig

    if setting.model in MODELS:
        model = folder / "model"
        _make_model(setting, model)
    else:
        model = _given(setting.model)
    vision = AutoConfig.from_pretrained(model).vision_config
    pixels = (setting.side * vision.patch_size * vision.spatial_merge_size) ** 2
    limits = ModelConfig(min_pixels=pixels, max_pixels=pixels)
    processor = load_processor(str(model), limits)
    # TRL's image processor has the limits in it that PeRL gives at each call.
    images = processor.image_processor
    kept = {k: v for k, v in images.to_dict().items() if k not in ("min_pixels", "max_pixels")}
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    sized = type(images).from_dict({**kept, "size": size})
    save_processor(processor.tokenizer, sized, folder / "processor")

    longest = _longest_prompt(setting, processor) + setting.completion
    if longest > setting.budget:
        raise UserError(
            f"--budget {setting.budget}: a sequence has {longest} tokens; raise it, or lower "
            "--tokens-per-image or --completion"
        )
    return Start(
        setting=setting,
        model=model,
        processor=folder / "processor",
        pixels=pixels,
        unsampled=tuple(processor.unsampled_token_ids().tolist()),
        longest=longest,
        parameters=_parameters(model),
    )


def _parameters(model: Path) -> int:
    from transformers import AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        return sum(
            p.numel() for p in auto.from_config(AutoConfig.from_pretrained(model)).parameters()
        )


def _given(name: str) -> Path:
    path = Path(name)
    if not (path / "config.json").is_file():
        raise UserError(f"--model {name}: choose {', '.join(MODELS)} or a model folder")
    family = check_model(name)
    if not isinstance(family, QwenVL):
        raise UserError(f"--model {name}: it is none of {', '.join(QwenVL.model_types)}")
    return path


def _make_model(setting: Setting, folder: Path) -> None:
    """Random weights, and a tokenizer with a word for every id: each text that is sampled is another one."""
    from transformers import AutoModelForImageTextToText

    tokenizer = make_tokenizer(vocabulary())
    if setting.model == "tiny":
        config = tiny_config("tiny-qwen2.5-vl", tokenizer)
    else:
        config = shape(setting.model)
        missing = config.text_config.vocab_size - len(tokenizer)
        tokenizer = make_tokenizer([*vocabulary(), *(f"word{i}" for i in range(missing))])
        _use_tokens(config, tokenizer)
    torch.manual_seed(setting.seed)
    auto: Any = AutoModelForImageTextToText
    with torch.device(setting.device):
        model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    save_processor(tokenizer, make_image_processor(config.vision_config), folder)


def _use_tokens(config: Any, tokenizer: Any) -> None:
    """Make a shape's config name the ids of this tokenizer."""
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id


def _longest_prompt(setting: Setting, processor: Processor) -> int:
    first = stream(setting, setting.seed).draw(len(setting.images))
    shown = [variants(d, 1, setting.seed)[0] for d in first]
    return max(len(processor.encode(v).input_ids) for v in shown)
