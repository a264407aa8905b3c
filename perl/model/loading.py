"""Model folders and hub names: looked at, loaded, and made ready for training."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from perl.config import ModelConfig
from perl.files import check_safetensors, offline_if_unreachable
from perl.model.families import FAMILIES, Family, family_of
from perl.model.layers import check_compiler, check_liger, compile_layers, use_liger
from perl.model.packed.attention import (
    WITHOUT_DROPOUT,
    choose,
    use_packed_attention,
)
from perl.model.padded import PaddedPolicy, check_head, decoder_name, tower_of
from perl.model.padded_processor import PaddedProcessor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.types import UserError, one_line

logger = logging.getLogger(__name__)

_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_policy(folder: str, config: ModelConfig, device: torch.device) -> Policy:
    """Load a checkpoint's weights into a Policy, ready for packed rows.

    Args:
        folder: a model folder or hub name.
        config: what to train and how to attend.
        device: decides the attention implementation.

    Raises:
        UserError: the folder is no model, or of a family that is not supported.
    """
    family = check_model(folder)
    model = _load_weights(folder)
    if family is None:
        return _padded_policy(model, folder, config)
    name, reason = check_kernels(config, device)
    _say_once(logging.INFO, f"attention: {name} ({reason})")
    core = cast(Any, model).model
    tower = family.tower(core)
    if name in WITHOUT_DROPOUT and getattr(core.language_model.config, "attention_dropout", 0):
        raise UserError(
            f"model.attention = {name} has no dropout, and {folder}/config.json has attention_dropout; "
            "set it to 0 there, or model.attention to sdpa"
        )
    use_packed_attention(core.language_model, tower if family.packed_tower else (), name)
    if config.liger:
        use_liger(core.language_model)
    if config.compile:
        compile_layers(core.language_model)
    model = _prepared(model, config, tower, r".*language_model")
    return Policy(model, family, config.feature_cache_mb * 2**20, config.compile)


def check_kernels(config: ModelConfig, device: torch.device | None = None) -> tuple[str, str]:
    """See that what packed rows run on is there; padded batches have no use for it.

    Args:
        config: what is asked for.
        device: of the model; left out, a GPU if there is one.

    Returns:
        The attention implementation, and why that one.

    Raises:
        UserError: something is not.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = choose(config.attention, device, uses_bfloat16(config.dtype))
    if config.liger:
        check_liger(device)
    if config.compile:
        check_compiler()
    return attention


def _load_weights(folder: str) -> Any:
    """A transformers model in float32."""
    from transformers import AutoModelForImageTextToText

    try:
        model, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types for broken files.
        raise UserError(
            f"model.path = {folder}: its weights cannot be loaded ({_said(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path = {folder}: its weights lack {len(missing)} tensors, {missing[0]} for one; "
            "copy every file of the original checkpoint into it"
        )
    return model


def _padded_policy(model: Any, folder: str, config: ModelConfig) -> PaddedPolicy:
    """A model without a family, or with a language model that its family cannot pack."""
    _say_once(
        logging.WARNING,
        f"training on padded batches, as {_obstacle(model.config)}: prompts are computed once per completion and images "
        "once per completion, rows are padded; expect several times the work; a family class in perl/model/families "
        "would change that, see docs/models.md",
    )
    processor = load_processor(folder, config)
    assert isinstance(processor, PaddedProcessor)
    check_head(model, folder, processor.eos_token_id)
    divided = config.freeze_vision or config.lora_rank
    tower = tower_of(model, folder) if divided else []
    try:
        model = _prepared(model, config, tower, decoder_name(model) if divided else "")
    except ValueError as error:
        raise UserError(f"model.path = {folder}: {_said(error)}") from error
    return PaddedPolicy(model, processor)


@cache
def _say_once(level: int, message: str) -> None:
    """Put it into the log, once a process."""
    logger.log(level, message)


def _prepared(
    model: Any, config: ModelConfig, tower: Sequence[nn.Module], decoder: str
) -> nn.Module:
    """Freezing, checkpointing and adapters as the config wants them.

    Args:
        decoder: a regular expression for the name of the language model.
    """
    if config.freeze_vision:
        for module in tower:
            module.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if not config.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=_adapted(model, config.lora_targets, decoder),
    )
    wrapped = get_peft_model(model, lora)
    if not config.freeze_vision:
        # peft freezes everything but its adapters.
        for module in tower:
            module.requires_grad_(True)
    return cast(nn.Module, wrapped)


def _adapted(model: nn.Module, targets: Sequence[str], decoder: str) -> str:
    """A regular expression for the layers that get adapters.

    Raises:
        UserError: the language model has no linear layer of a wanted name.
    """
    inside = re.compile(rf"{decoder}\..*\.(\w+)")
    there = {
        match[1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (match := inside.fullmatch(name))
    }
    if missing := [name for name in targets if name not in there]:
        raise UserError(
            f"model.lora_targets: the language model has no linear layer {missing[0]}; "
            f"it has {', '.join(sorted(there))}"
        )
    return rf"{decoder}\..*\.({'|'.join(targets or _LORA_TARGETS)})"


def check_model(folder: str) -> Family | None:
    """Look at a model without loading it; nothing it brings is run or unpickled.

    Args:
        folder: a model folder or hub name.

    Returns:
        The family it is of; None: it has to be trained on padded batches.

    Raises:
        UserError: it is not there, has no weights in safetensors, or is no model that continues texts with images.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    _check_files(folder)
    try:
        model_type = str(PretrainedConfig.get_config_dict(folder)[0].get("model_type"))
        known = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if known else None
    except Exception as error:  # transformers raises many types for broken files.
        raise UserError(
            f"model.path = {folder}: no model can be read there ({_said(error)})"
        ) from error
    if config is None or config.is_encoder_decoder:
        exact = ", ".join(t for f in FAMILIES for t in f.model_types)
        problem = "has an encoder and a decoder" if config else "is none of images and text"
        raise UserError(
            f"model.path = {folder}: the family {model_type} is not supported: to transformers it {problem}; "
            f"choose a model of {exact}, or another that AutoModelForImageTextToText loads"
        )
    return None if _obstacle(config) else family_of(model_type)


def _obstacle(config: Any) -> str:
    """Why rows of this model cannot be packed; empty if they can."""
    family, text = family_of(config.model_type), config.get_text_config()
    if family is None:
        return f"the family {config.model_type} is not known"
    layers = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if layers is None else None
    if window is not None or any(kind != "full_attention" for kind in layers or ()):
        return f"this {config.model_type} has layers of sliding-window or linear attention"
    if family.text_types and text.model_type not in family.text_types:
        return f"the language model {text.model_type} of this {config.model_type} is not known"
    return ""


def _check_files(folder: str) -> None:
    path = Path(folder)
    if not path.exists():
        if folder.startswith((".", "/", "~")) or folder.count("/") > 1:
            raise UserError(f"model.path = {folder}: there is no such folder; correct the path")
        offline_if_unreachable()
        return
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.path = {folder} is no model folder: it has no config.json; correct the path"
        )
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"model.path = {folder} holds a LoRA adapter; merge it into its model and give that folder"
        )
    if weights := sorted(path.glob("*.safetensors")):
        for file in weights:
            try:
                check_safetensors(file)
            except ValueError as error:
                raise UserError(
                    f"model.path = {folder}: damaged weights ({error}); copy them again"
                ) from error
        return
    if pickled := sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        raise UserError(
            f"model.path = {folder}: its weights are pickled ({pickled[0]}), and pickle is never loaded; "
            "convert them to safetensors"
        )
    raise UserError(
        f"model.path = {folder} has no weights: copy the checkpoint's .safetensors files into it"
    )


def load_processor(folder: str, config: ModelConfig) -> Processor:
    """Tokenizer and image processor of a checkpoint; without a family its own processor.

    Raises:
        UserError: the folder has no tokenizer, no image processor or no chat template, or they do not fit the model.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    family = check_model(folder)
    stock: Any = None
    model_config: Any = None
    try:
        if family is None:
            stock = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = getattr(stock, "tokenizer", None)
            image_processor = getattr(stock, "image_processor", None)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            image_processor = family.load_image_processor(folder)
    except Exception as error:  # transformers raises many types for missing and broken files.
        raise UserError(
            f"model.path = {folder}: no processor can be read there ({_said(error)}); copy the tokenizer and "
            "preprocessor files of the original checkpoint into it, and install what they ask for"
        ) from error
    if tokenizer is None or image_processor is None:
        raise UserError(
            f"model.path = {folder}: {type(stock).__name__} takes no texts with pictures; "
            "copy the processor files of the original checkpoint into it"
        )
    if family and family.image_token not in tokenizer.get_vocab():
        raise UserError(
            f"model.path = {folder}: its tokenizer has no {family.image_token}; "
            f"the tokenizer of a {family.model_types[0]} checkpoint is needed"
        )
    if not (getattr(stock, "chat_template", None) or tokenizer.chat_template):
        raise UserError(
            f"model.path = {folder}: its tokenizer has no chat template; add chat_template.jinja"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no end or padding token; name them in tokenizer_config.json"
        )
    if family is None:
        return PaddedProcessor(stock, model_config, config.min_pixels, config.max_pixels)
    return Processor(tokenizer, image_processor, family, config.min_pixels, config.max_pixels)


def uses_bfloat16(dtype: str) -> bool:
    """Whether `model.dtype` means bfloat16 autocast on this machine."""
    if dtype == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"


def _said(error: Exception) -> str:
    return one_line(error) or type(error).__name__
