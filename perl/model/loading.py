"""Model folders and hub names: looked at, loaded, and made ready for training."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from perl.config import ModelConfig
from perl.distributed import all_processes
from perl.files import check_safetensors, offline_if_unreachable
from perl.model.families import FAMILIES, Family, family_of
from perl.model.layers import choose_layers, compile_layers, use_liger, use_linear_patches
from perl.model.packed.attention import (
    WITHOUT_DROPOUT,
    choose,
    use_packed_attention,
)
from perl.model.padded import PaddedPolicy, check_head
from perl.model.padded_processor import PaddedProcessor
from perl.model.policy import Policy
from perl.model.processor import ImageEncoder, Processor
from perl.model.sharding import Sharding, shard, spread
from perl.model.sources import check_layers, layers_of, run_of
from perl.model.weights import load_weights, prepared, said
from perl.recipe import read_config
from perl.types import IMAGE_SLOT, Message, UserError

logger = logging.getLogger(__name__)


def load_policy(
    folder: str,
    config: ModelConfig,
    device: torch.device,
    sharding: Sharding | None = None,
    trained: bool = True,
) -> Policy:
    """Load a model's weights into a Policy, ready for packed rows, in the dtype of `compute_dtype`.

    Of weights that are sharded the first process alone reads files; the others get their shards of it.

    Args:
        folder: a model folder, a hub name, or a checkpoint or LoRA adapter, which is merged into what it lies over.
        config: what to train and how to attend.
        device: that it is put on; decides dtype and attention.
        sharding: how its weights are spread over processes, all of which call this; None: each has all of them.
        trained: whether any of its weights are.

    Raises:
        UserError: the device lacks bfloat16, or the folder is no model or of a family that is not supported.
    """
    family, layers = check_model(folder), layers_of(folder)
    dtype = compute_dtype(config.dtype, device)
    if family is None:
        model = load_weights(layers, None, dtype, device)
        return _padded_policy(model, folder, config).to(device)
    name, reason = check_kernels(config, device)
    lie = spread(sharding, int(os.environ.get("WORLD_SIZE", "1")))
    _say_once(logging.INFO, f"weights: {str(dtype).removeprefix('torch.')}, {lie}")
    _say_once(logging.INFO, f"attention: {name} ({reason})")
    if sharding is None:
        model = load_weights(layers, family, dtype, device)
    else:
        processes = all_processes()
        with processes.jointly():
            where = torch.device("cpu" if processes.index == 0 else "meta")
            model = load_weights(layers, family, dtype, where)
    core = cast(Any, model).model
    tower = family.tower(core)
    if name in WITHOUT_DROPOUT and getattr(core.language_model.config, "attention_dropout", 0):
        raise UserError(
            f"model.attention = {name} has no dropout, and {layers[-1]}/config.json has attention_dropout; "
            "set it to 0 there, or model.attention to sdpa"
        )
    use_packed_attention(core.language_model, tower if family.packed_tower else (), name)
    use_linear_patches(tower)
    liger, compiled, layers_said = choose_layers(config.liger, config.compile, device)
    _say_once(logging.INFO, f"layers: {layers_said}")
    if liger:
        use_liger(core.language_model)
    if compiled:
        compile_layers(core.language_model)
    model = prepared(model, config, family, folder)
    policy = Policy(model, family, config.feature_cache_mb * 2**20, compiled)
    if not trained:
        policy.requires_grad_(False)
    if sharding is None:
        return policy.to(device)
    shard(policy, sharding)
    return policy


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
    bfloat16 = compute_dtype(config.dtype, device) == torch.bfloat16
    attention = choose(config.attention, device, bfloat16)
    choose_layers(config.liger, config.compile, device)
    return attention


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
    return PaddedPolicy(prepared(model, config, None, folder), processor)


@cache
def _say_once(level: int, message: str) -> None:
    """Put it into the log, once a process."""
    logger.log(level, message)


def check_model(folder: str) -> Family | None:
    """Look at a model without loading it; nothing it brings is run or unpickled.

    Args:
        folder: as `load_policy` takes it.

    Returns:
        The family it is of; None: it has to be trained on padded batches.

    Raises:
        UserError: it is not there, has no weights in safetensors, or is no model that continues texts with images.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    *above, folder = layers_of(folder)
    check_layers(above)
    _check_files(folder)
    try:
        model_type = str(PretrainedConfig.get_config_dict(folder)[0].get("model_type"))
        known = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if known else None
    except Exception as error:  # transformers raises many types for broken files.
        raise UserError(
            f"model.path = {folder}: no model can be read there ({said(error)})"
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


def load_processor(
    folder: str, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Processor:
    """Tokenizer and image processor of a checkpoint, with pixels in `dtype`; without a family its own processor.

    Raises:
        UserError: the folder has no tokenizer, no image processor or no chat template, or they do not fit the model.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    family, layers = check_model(folder), layers_of(folder)
    folder, own_template = layers[-1], config.chat_template or _template_of_run(layers)
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
            f"model.path = {folder}: no processor can be read there ({said(error)}); copy the tokenizer and "
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
    if own_template:
        template = _read_template(own_template)
        for holder in filter(None, (tokenizer, stock)):
            holder.chat_template = template
    if not (getattr(stock, "chat_template", None) or tokenizer.chat_template):
        raise UserError(
            f"model.path = {folder}: its tokenizer has no chat template; add chat_template.jinja"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"model.path = {folder}: its tokenizer has no end or padding token; name them in tokenizer_config.json"
        )
    if family is None:
        out: Processor = PaddedProcessor(stock, model_config, config.min_pixels, config.max_pixels)
    else:
        sizes = config.min_pixels, config.max_pixels
        out = Processor(tokenizer, ImageEncoder(family, image_processor, *sizes, dtype))
    if own_template:
        _check_template(out, own_template)
    _check_generation_prompt(out, folder)
    return out


def _template_of_run(layers: list[str]) -> str:
    """The chat template of the run that a checkpoint or adapter lies in; whole models are saved with theirs."""
    root = run_of(layers[0]) if len(layers) > 1 else None
    return read_config(root / "config.toml").model.chat_template if root else ""


def _read_template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"model.chat_template = {file} cannot be read: {reason}; name a Jinja file, or leave it empty"
        ) from error


def _check_template(processor: Processor, file: str) -> None:
    """See that a chat template writes a question, and each of its images once."""
    where, ask = f"model.chat_template = {file}", "which of these is it"
    one, two = (
        processor.render([Message("user", f"{IMAGE_SLOT * n}{ask}")], where) for n in (1, 2)
    )
    token = processor.image_token
    shown = (one.count(token), two.count(token)) if token else (1, 1 + (one != two))
    if ask not in one or shown != (1, 2):
        raise UserError(
            f"{where}: of a question with one image and with two it shows {shown[0]} and {shown[1]}"
            + ("" if ask in one else ", and not the question's text")
            + f"; it must write {token or 'a token'} for each part of type image, and the text of the others"
        )


def _check_generation_prompt(processor: Processor, folder: str) -> None:
    """See that the prompt ends where the assistant's turn begins: else the model would go on with the question.

    A template that writes nothing there is right if its own chats have nothing between the end of the user's turn and the
    answer, as Mistral's `[INST] ... [/INST]`.
    """
    where, ask, reply = f"the chat template of {folder}", "which of these is it", "the second one"
    question = Message("user", ask)
    prompt = processor.render([question], where)
    if prompt != processor.render([question], where, add_generation_prompt=False):
        return
    whole = processor.render([question, Message("assistant", reply)], where, False)
    begun = prompt.rstrip()
    goes_on = whole.startswith(begun) and whole[len(begun) :].lstrip().startswith(reply)
    if not goes_on or begun.endswith(ask):
        raise UserError(
            f"{where} (model.chat_template) has no generation prompt: with add_generation_prompt it writes nothing more, so "
            "that the model would go on with the question; name a template in model.chat_template that begins the "
            "assistant's turn {% if add_generation_prompt %}"
        )


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations (docs/precision.md) that `model.dtype` means on a device.

    Raises:
        UserError: bfloat16 on a GPU that does not compute in it.
    """
    # A GPU before Ampere only emulates it.
    there = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return torch.bfloat16 if there else torch.float32
    if wanted == "bfloat16" and device.type == "cuda" and not there:
        raise UserError(
            f"model.dtype = bfloat16: {torch.cuda.get_device_name(device)} does not compute in it; "
            "take float32, or auto"
        )
    return getattr(torch, wanted)
