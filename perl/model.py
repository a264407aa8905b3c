"""The policy: a transformers vision-language model that reads packed rows and gives hidden states of scored tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from perl.attention import choose, use_packed_attention
from perl.config import ModelConfig
from perl.hub import offline_if_unreachable
from perl.processor import Processor
from perl.run import check_safetensors
from perl.types import EncodedImage, PackedBatch, UserError

logger = logging.getLogger(__name__)

SUPPORTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Values of `model_type` whose packed log-probs are tested to equal one sequence at a time."""


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the vision tower made of M images, one after the other.

    `rows` [K, H] visual tokens; `deepstack` (Qwen3-VL) one [K, H] per decoder layer it is added to.
    """

    rows: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]

    def take(self, index: torch.Tensor) -> ImageFeatures:
        """The rows at `index` [n]."""
        return ImageFeatures(self.rows[index], tuple(d[index] for d in self.deepstack))


class Policy(nn.Module):
    """A vision-language model with the three things training needs: image features, packed rows, its head.

    `model` is transformers' own; nothing in it is patched but the name of the attention it uses.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

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
        return next(self.parameters()).device

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] weight of the language-model head."""
        return self.base.lm_head.weight

    def encode_images(self, images: Sequence[EncodedImage]) -> ImageFeatures | None:
        """Run the vision tower once over distinct images; None without images."""
        if not images:
            return None
        pixels = torch.cat([image.pixel_values for image in images]).to(
            self.device, self.core.visual.dtype
        )
        grid = torch.tensor([image.grid for image in images], device=self.device)
        output = self.core.get_image_features(pixels, grid, return_dict=True)
        deepstack = getattr(output, "deepstack_features", None) or ()
        return ImageFeatures(
            torch.cat(tuple(output.pooler_output)), tuple(_joined(layer) for layer in deepstack)
        )

    def embed(
        self, input_ids: torch.Tensor, visual_mask: torch.Tensor, features: ImageFeatures | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Token embeddings [B, T, H] with visual rows put in at `visual_mask` [B, T], and the layers' extra inputs."""
        embeds = self.core.language_model.embed_tokens(input_ids)
        if features is None:
            return embeds, {}
        embeds = embeds.masked_scatter(visual_mask[..., None], features.rows.to(embeds.dtype))
        if not features.deepstack:
            return embeds, {}
        return embeds, {
            "visual_pos_masks": visual_mask,
            "deepstack_visual_embeds": list(features.deepstack),
        }

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states of the scored tokens, [N, H]: row i predicts `batch.targets[i]`."""
        device = self.device
        features = self.encode_images(batch.images)
        if features is not None:
            features = features.take(batch.visual_source.to(device))
        mask = torch.zeros(1, batch.num_tokens, dtype=torch.bool, device=device)
        mask[0, batch.visual_positions.to(device)] = True
        embeds, extra = self.embed(batch.input_ids[None].to(device), mask, features)
        cu_seqlens = batch.cu_seqlens.to(device)
        # The cache must be off: with one, transformers no longer sees a packed row and sequences leak.
        output = self.core.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids[1:, None].to(device),
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            **extra,
        )
        return output.last_hidden_state[0].index_select(0, batch.scored.to(device))

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model as it was before LoRA, for reference log-probs."""
        with cast(Any, self.model).disable_adapter():
            yield

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary model folder; LoRA is merged into the weights of a copy."""
        if not hasattr(self.model, "peft_config"):
            cast(Any, self.model).save_pretrained(folder)
            return
        merged = cast(Any, copy.deepcopy(self.model)).merge_and_unload()
        merged.save_pretrained(folder)


def load_policy(folder: str, config: ModelConfig, device: torch.device) -> Policy:
    """Load a checkpoint's weights into a Policy, ready for packed rows.

    Args:
        folder: a model folder or hub name.
        config: what to train and how to attend.
        device: decides the attention implementation.

    Raises:
        UserError: the folder is no model, or of a family that is not supported.
    """
    from transformers import AutoModelForImageTextToText

    check_model(folder)
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
            f"model.path = {folder}: its weights cannot be loaded ({_first_line(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.path = {folder}: its weights lack {len(missing)} tensors, {missing[0]} for one; "
            "copy every file of the original checkpoint into it"
        )
    try:
        name, reason = choose(config.attention, device, uses_bfloat16(config.dtype))
    except ValueError as error:
        raise UserError(str(error)) from error
    _announce(name, reason)
    use_packed_attention(model, name)
    if config.freeze_vision:
        cast(Any, model).model.visual.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if config.lora_rank:
        model = _add_lora(model, config)
    return Policy(model)


def check_model(folder: str) -> None:
    """Look at a model without loading it; nothing it brings is run or unpickled.

    Args:
        folder: a model folder or hub name.

    Raises:
        UserError: it is not there, has no weights in safetensors, or is of a family that is not supported.
    """
    from transformers import PretrainedConfig

    _check_files(folder)
    try:
        model_type = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    except Exception as error:  # transformers raises many types for broken files.
        raise UserError(
            f"model.path = {folder}: no model can be read there ({_first_line(error)})"
        ) from error
    if model_type not in SUPPORTED:
        raise UserError(
            f"model.path = {folder}: the family {model_type} is not supported; choose one of {', '.join(SUPPORTED)}"
        )


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
    """Tokenizer and image processor of a checkpoint.

    Raises:
        UserError: the folder has no tokenizer, no image processor or no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        image_processor = _load_image_processor(folder)
    except Exception as error:  # transformers raises many types for missing and broken files.
        raise UserError(
            f"model.path = {folder}: no processor can be read there ({_first_line(error)}); "
            "copy the tokenizer and preprocessor files of the original checkpoint into it"
        ) from error
    missing = [t for t in ("<|vision_start|>", "<|image_pad|>") if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no {missing[0]}; a Qwen-VL tokenizer is needed"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no chat template; add chat_template.jinja"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no end or padding token; a Qwen-VL tokenizer is needed"
        )
    if not hasattr(image_processor, "merge_size"):
        raise UserError(
            f"model.path = {folder}: {type(image_processor).__name__} does not cut images into patches; "
            "a Qwen-VL preprocessor_config.json is needed"
        )
    return Processor(tokenizer, image_processor, config.min_pixels, config.max_pixels)


def _load_image_processor(folder: str) -> Any:
    """The image processor that the folder names; without torchvision the PIL one that all supported families share.

    Older transformers have no AutoImageProcessor where torchvision is missing.
    """
    from transformers import AutoImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:
        return Qwen2VLImageProcessorPil.from_pretrained(folder)


def uses_bfloat16(dtype: str) -> bool:
    """Whether `model.dtype` means bfloat16 autocast on this machine."""
    if dtype == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"


@cache
def _announce(attention: str, reason: str) -> None:
    logger.info("attention: %s (%s)", attention, reason)


def _add_lora(model: nn.Module, config: ModelConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    )
    wrapped = get_peft_model(cast(Any, model), lora)
    if not config.freeze_vision:
        cast(Any, wrapped.get_base_model()).model.visual.requires_grad_(True)
    return wrapped


def _joined(layer: Any) -> torch.Tensor:
    """One layer's deepstack features as [K, H]; newer transformers split them by image."""
    return layer if isinstance(layer, torch.Tensor) else torch.cat(tuple(layer))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
