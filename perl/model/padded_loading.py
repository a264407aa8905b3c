"""Models that no family is written for: what is lost, what they must be able to do, how they are made ready."""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

import torch
from torch import nn

from perl.config import ModelConfig
from perl.model.padded_processor import PaddedProcessor
from perl.types import UserError

logger = logging.getLogger(__name__)

WHAT_IS_LOST = (
    "prompts are computed once per completion and images once per completion, rows are padded; expect several times "
    "the work; a family class in perl/families would change that, see docs/models.md"
)


@cache
def warn(reason: str) -> None:
    """Say once a process why rows are padded and what that costs."""
    logger.warning("training on padded batches, as %s: %s", reason, WHAT_IS_LOST)


def load_padded_processor(folder: str, config: ModelConfig) -> PaddedProcessor:
    """The checkpoint's own processor.

    Raises:
        UserError: there is none that takes texts and pictures, or its tokenizer lacks what is needed.
    """
    from transformers import AutoConfig, AutoProcessor

    try:
        stock: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for missing and broken files.
        raise UserError(
            f"model.path = {folder}: no processor can be read there ({str(error).strip()[:300]}); "
            "copy the tokenizer and processor files of the original checkpoint into it, and install what it asks for"
        ) from error
    if not hasattr(stock, "tokenizer") or not hasattr(stock, "image_processor"):
        raise UserError(
            f"model.path = {folder}: {type(stock).__name__} takes no texts with pictures; "
            "copy the processor files of the original checkpoint into it"
        )
    if not (stock.chat_template or stock.tokenizer.chat_template):
        raise UserError(
            f"model.path = {folder}: its processor has no chat template; add chat_template.jinja"
        )
    if stock.tokenizer.eos_token_id is None or stock.tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no end or padding token; name them in tokenizer_config.json"
        )
    return PaddedProcessor(stock, model_config, config.min_pixels, config.max_pixels)


@torch.no_grad()
def check_head(model: Any, folder: str, token: int) -> None:
    """Whether the logits are the head's weight times the last hidden states, which the loss takes them to be.

    Args:
        model: a transformers model on any device.
        folder: for the message.
        token: id of any text token.

    Raises:
        UserError: they are not, or the model does not show.
    """
    ids = torch.full((1, 2), token, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        hidden = model.base_model(**inputs).last_hidden_state
        theirs = model(**inputs).logits
        ours = hidden @ model.get_output_embeddings().weight.T
        fits = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    except Exception as error:  # Any model may be here, and it may fail in any way.
        raise UserError(
            f"model.path = {folder}: {type(model).__name__} cannot be called as a base model and a head ({error}); "
            "choose another model or write a family for it (docs/models.md)"
        ) from error
    if not fits:
        raise UserError(
            f"model.path = {folder}: the logits of {type(model).__name__} are not its hidden states times the weight of "
            "its head (a bias, a scale or a soft cap), which the loss needs; choose another model"
        )


def tower_of(model: Any, folder: str) -> list[nn.Module]:
    """The modules of the base model beside its language model: towers and projectors.

    Raises:
        UserError: the two cannot be told apart.
    """
    decoder, children = model.get_decoder(), list(model.base_model.children())
    if not any(child is decoder for child in children):
        raise UserError(
            f"model.path = {folder}: vision tower and language model of {type(model).__name__} cannot be told apart; "
            "set model.freeze_vision = false and model.lora_rank = 0"
        )
    return [child for child in children if child is not decoder]


def lora_targets(model: Any) -> str:
    """A regular expression for the linear layers of the language model."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return rf"{re.escape(name)}\..*\.(q|k|v|o|gate|up|down)_proj"
