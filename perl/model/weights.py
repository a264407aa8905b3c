"""Weights: read from a model folder or the hub, with a checkpoint or LoRA adapters over them, and made ready for training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from perl.config import ModelConfig
from perl.model.families import Family
from perl.model.layers import checkpoint_layers
from perl.model.padded import decoder_name, tower_of
from perl.model.policy import merged
from perl.model.sources import is_checkpoint, read_tensors, run_of, stored_shapes
from perl.recipe import read_config
from perl.types import UserError, one_line

_PREFIX = "model."
"""Of a checkpoint's names: those of the policy that holds the model."""
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_weights(
    layers: Sequence[str], family: Family | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """A transformers model, all of whose parameters may be trained.

    Args:
        layers: see `perl.model.sources.layers_of`.
        family: of the model; None: trained on padded batches.
        dtype: of its parameters. Buffers stay as transformers makes them: the frequencies of rotary embeddings are
            float32 in every model, and a later `.to(dtype)` would round them.
        device: that it lies on; meta: its structure alone, and what lies over the first layer is not read.

    Raises:
        UserError: weights that are missing, damaged or of another model.
    """
    if device.type == "meta":
        return _structure(layers[-1], dtype)
    model = _from_pretrained(layers[-1], dtype, device)
    for path in reversed(layers[:-1]):
        add = _add_checkpoint if is_checkpoint(path) else _add_adapter
        model = add(model, path, family)
        model.requires_grad_(True)
    return model


def prepared(model: Any, config: ModelConfig, family: Family | None, folder: str) -> nn.Module:
    """Freezing, checkpointing and adapters as the config wants them.

    Raises:
        UserError: vision tower and language model cannot be told apart, or no layer has a name that is to be adapted.
    """
    tower: Sequence[nn.Module] = ()
    decoder = r".*language_model"
    if family is not None:
        tower = family.tower(cast(Any, model).model)
    elif config.freeze_vision or config.lora_rank:
        tower, decoder = tower_of(model, folder), decoder_name(model)
    if config.freeze_vision:
        for module in tower:
            module.requires_grad_(False)
    if config.gradient_checkpointing:
        checkpoint_layers(model, config.gradient_checkpointing)
    if not config.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=_adapted(model, config, decoder, tower),
    )
    try:
        # Adapters in the dtype of the model: their masters are the optimizer's, as those of other weights.
        wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"model.path = {folder}: {said(error)}") from error
    if not config.freeze_vision:
        # peft freezes everything but its adapters.
        for module in tower:
            module.requires_grad_(True)
    return cast(nn.Module, wrapped)


def trains_adapters_alone(policy: nn.Module) -> bool:
    """Whether all that training changes of a policy are LoRA adapters."""
    return all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


def _adapted(
    model: Any, config: ModelConfig, decoder: str, tower: Sequence[nn.Module]
) -> str | list[str]:
    """The layers that get adapters, as peft takes them: a regular expression, or whole names where one was asked for.

    The head gets none: the loss reads its weight.

    Raises:
        UserError: no linear layer is called so, or some are of a tower whose own weights are trained.
    """
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    inside = re.compile(rf"{decoder}\..*\.(\w+)")
    there = {match[1] for name in linear if (match := inside.fullmatch(name))}
    plain = [target for target in config.lora_targets if re.fullmatch(r"\w+", target)]
    if missing := [name for name in plain if name not in there]:
        raise UserError(
            f"model.lora_targets: the language model has no linear layer {missing[0]}; it has {', '.join(sorted(there))}; "
            "others are reached by a regular expression over whole names"
        )
    everywhere = plain if config.lora_targets else _LORA_TARGETS
    named = rf"{decoder}\..*\.({'|'.join(everywhere)})"
    patterns = [target for target in config.lora_targets if target not in plain]
    if not patterns:
        return named
    chosen = {name for name in linear if re.fullmatch(named, name)} if plain else set()
    for pattern in patterns:
        try:
            found = {name for name in linear if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(
                f"model.lora_targets: {pattern} is no regular expression ({error}); correct it"
            ) from error
        if not found:
            raise UserError(
                f"model.lora_targets: {pattern} is the whole name of no linear layer; {min(linear)} and {max(linear)} are two"
            )
        chosen |= found
    inner = {module for part in tower for module in part.modules()}
    if not config.freeze_vision and (own := [n for n in chosen if linear[n] in inner]):
        raise UserError(
            f"model.lora_targets: {min(own)} is of the vision tower, whose own weights are trained; set model.freeze_vision = "
            "true, or leave the tower out"
        )
    return sorted(chosen)


def _structure(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return cast(Any, AutoModelForImageTextToText).from_config(config, dtype=dtype)


def _from_pretrained(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        model, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
            folder,
            dtype=dtype,
            # To a GPU tensor by tensor; on a CPU a map would only be in the way.
            device_map=device if device.type == "cuda" else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types for broken files.
        raise UserError(
            f"model.path = {folder}: its weights cannot be loaded ({said(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path = {folder}: its weights lack {len(missing)} tensors, {missing[0]} for one; "
            "copy every file of the original checkpoint into it"
        )
    return model


def _add_checkpoint(model: Any, path: str, family: Family | None) -> Any:
    """What a run of this program had trained, its adapters merged."""
    root = run_of(path)
    assert root is not None  # Else `layers_of` refuses it.
    config = replace(read_config(root / "config.toml").model, gradient_checkpointing=0.0)
    trained = prepared(model, config, family, path)
    checkpoint = Path(path).expanduser()
    own = {_PREFIX + name: p for name, p in trained.named_parameters() if p.requires_grad}
    stored = {n: s for n, s in stored_shapes(checkpoint).items() if "/" not in n}
    if stored != {name: p.shape for name, p in own.items()}:
        raise UserError(
            f"checkpoint {path} is of another model than {root}/config.toml says; "
            "put the settings under [model] back, and the model that it was trained from"
        )
    read_tensors(checkpoint, {name: p.detach() for name, p in own.items()})
    return merged(trained) if config.lora_rank else trained


def _add_adapter(model: Any, path: str, family: Family | None) -> Any:
    """LoRA adapters in peft's format, merged."""
    from peft import PeftConfig, PeftModel

    try:
        wrapped = PeftModel(model, PeftConfig.from_pretrained(path))
        found = wrapped.load_adapter(path, "default")
    except Exception as error:  # peft and torch raise many types for what does not fit.
        raise UserError(
            f"model.path = {path}: the adapter does not fit its model ({said(error)})"
        ) from error
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise UserError(
            f"model.path = {path}: the adapter's names are not those of its model, {wrong[0]} for one; "
            "save it again with the transformers that is installed"
        )
    return merged(wrapped)


def said(error: Exception) -> str:
    """One line about an error of a library's."""
    return one_line(error) or type(error).__name__
