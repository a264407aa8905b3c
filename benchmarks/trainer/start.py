"""What both trainers are given alike: a setting, a model and processors, the questions and the reward."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from benchmarks.harness.models import given_model, shape
from perl.config import DataConfig, ModelConfig
from perl.data.streams import Drawn, ExampleStream
from perl.data.tasks import BundledTasks, vocabulary
from perl.model.loading import load_processor
from perl.model.processor import Processor, parts
from perl.model.tiny import make_image_processor, make_tokenizer, save_processor, tiny_config
from perl.permutation import orders, permute
from perl.types import Example, UserError, Variant

MODELS = ("tiny", "0.6b", "3b", "7b")
"""`tiny` is the demo's model, the others are shapes of `benchmarks/harness/models.py`; all with random weights."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One optimizer step, where it runs and how often; see the options of `bench_trainer.py`.

    `images` of each question, one question for each number; `orders` of them; `per_order` completions of each
    order, all of `completion` tokens; `tokens_per_image` visual tokens; `budget` most tokens of a micro-batch,
    padded or packed; `steps` that are timed in each of `rounds`, after one that is not.
    """

    device: str
    model: str
    dtype: Literal["float32", "bfloat16"]
    images: tuple[int, ...]
    orders: int
    per_order: int
    completion: int
    tokens_per_image: int
    budget: int
    steps: int
    rounds: int
    seed: int = 0
    trl_attention: str = "sdpa"

    learning_rate: ClassVar = 1e-6
    weight_decay: ClassVar = 0.01
    betas: ClassVar = (0.9, 0.999)
    max_grad_norm: ClassVar = 1.0
    clip: ClassVar = 0.2

    @property
    def sequences(self) -> int:
        """Completions of a step."""
        return len(self.images) * self.orders * self.per_order

    @property
    def half(self) -> bool:
        """Whether forward and backward run in bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def side(self) -> int:
        """Visual tokens along an edge of an image: pictures stay square, so a number that is none is rounded up."""
        return math.ceil(math.sqrt(self.tokens_per_image))

    def padded_micro_batch(self, longest: int) -> int:
        """Most sequences of `longest` tokens within the budget, a divisor of all, as TRL's batches have to be."""
        fits = max(1, self.budget // longest)
        return max(n for n in range(1, fits + 1) if self.sequences % n == 0)


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
        model = given_model(setting.model, MODELS)
    vision = AutoConfig.from_pretrained(model).vision_config
    pixels = (setting.side * vision.patch_size * vision.spatial_merge_size) ** 2
    limits = ModelConfig(min_pixels=pixels, max_pixels=pixels)
    processor = load_processor(str(model), limits)
    # TRL's image processor has the limits in it that PeRL gives at each call.
    images = processor.encoder.image_processor
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


class Questions:
    """An endless data set: every step has one question for each number of images, in their sequence."""

    size = None

    def __init__(self, images: tuple[int, ...], seed: int) -> None:
        settings = [DataConfig(min_images=n, max_images=n) for n in images]
        self.tasks = [BundledTasks("digits", "train", setting, seed) for setting in settings]

    def __len__(self) -> int:
        raise TypeError("the questions are endless")

    def __getitem__(self, i: int) -> Example:
        return self.tasks[i % len(self.tasks)][i]

    def check(self, i: int) -> Example:
        return self[i]


def stream(setting: Setting, seed: int) -> ExampleStream:
    """The questions in the sequence in which PeRL trains on them."""
    return ExampleStream(Questions(setting.images, seed), seed)


def variants(drawn: Drawn, number: int, seed: int) -> list[Variant]:
    """A question in the orders that PeRL's collector draws for it, with the answers that are right there."""
    chosen = orders(drawn.example, number, seed, drawn.epoch)
    return [permute(drawn.example, order) for order in chosen]


def trl_rows(setting: Setting, steps: int, seed: int) -> list[dict[str, Any]]:
    """TRL knows no orders: each ordered prompt of PeRL's first `steps` steps is a prompt of its own."""
    drawn = stream(setting, seed).draw(steps * len(setting.images))
    return [_row(v) for d in drawn for v in variants(d, setting.orders, seed)]


def _row(variant: Variant) -> dict[str, Any]:
    prompt = [{"role": m.role, "content": parts(m.content)} for m in variant.messages]
    return {"prompt": prompt, "images": list(variant.images)}


REWARD = "benchmarks.trainer.start:text_hash"
"""As `reward.functions` names it."""


def text_hash(completions: Sequence[Any], **_: Any) -> list[float]:
    """0 to 1, from a checksum of the text: random weights write nothing that could be right or wrong.

    Args:
        completions: texts, or chats that end with one, as TRL hands them over.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]
