"""What a run leaves for others: model folders that transformers, vLLM and peft load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from perl.files import replacing
from perl.model.sources import ADAPTER, layers_of
from perl.model.weights import trains_adapters_alone
from perl.training.components import Components

logger = logging.getLogger(__name__)

_COMPANIONS = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
    "special_tokens_map.json",
)
"""Files that one version of transformers or vLLM writes and another one looks for."""


def save_model(components: Components, name: str) -> Path:
    """Export model and processor as an ordinary model folder under `models/`.

    LoRA adapters are merged into it, and lie beside it in `adapter/`, in peft's format, where they alone are what was
    trained and the model below them is one that peft can load.
    """
    target = components.folder.models / name
    if components.is_main:
        with replacing(target, folder=True) as temporary:
            components.policy.save_pretrained(temporary)
            components.processor.save(temporary)
            *above, base = layers_of(components.model_path)
            _copy_companions(base, temporary)
            if trains_adapters_alone(components.policy) and not above:
                components.policy.save_adapter(temporary / ADAPTER, base)
            elif components.config.model.lora_rank:
                reason = (
                    "the vision tower is trained too"
                    if not above
                    else f"it would lie over {above[0]}"
                )
                logger.info("%s has the adapter merged and none beside it: %s", target, reason)
    components.accelerator.wait_for_everyone()
    return target


def _copy_companions(base: str, target: Path) -> None:
    """Of a local or cached model what describes tokenizer and processor and was not written anew."""
    from transformers.utils.hub import cached_file

    for name in _COMPANIONS:
        if (target / name).exists():
            continue
        found = cached_file(
            base,
            name,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found:
            shutil.copyfile(found, target / name)
