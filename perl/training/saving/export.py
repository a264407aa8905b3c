"""What a run leaves for others: model folders that transformers, vLLM and peft load."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from perl.distributed import Processes
from perl.files import replacing
from perl.model.sources import ADAPTER, cached_file_of, copy_companions, layers_of
from perl.model.weights import trains_adapters_alone
from perl.training.components import Components

logger = logging.getLogger(__name__)


def save_model(components: Components, processes: Processes, name: str) -> Path:
    """Export model and processor as an ordinary model folder under `models/`; all processes take part, the first writes.

    Weights have the dtype of the model that the run began with. LoRA adapters are merged into them, and lie beside them in
    `adapter/`, in peft's format, where they alone are what was trained and the model below them is one that peft can load.
    """
    target, policy = components.folder.models / name, components.policy
    is_main = components.is_main
    *above, base = layers_of(components.model_path)
    with components.watch("export"), processes.jointly(), ExitStack() as stack:
        folder = target
        with processes.jointly():
            if is_main:
                folder = stack.enter_context(replacing(target, folder=True))
        with processes.jointly():
            policy.save_pretrained(folder, _dtype_of(base), is_main)
        if trains_adapters_alone(policy) and not above:
            with processes.jointly():
                policy.save_adapter(folder / ADAPTER, base, is_main)
        elif components.config.model.lora_rank and is_main:
            reason = (
                "the vision tower is trained too" if not above else f"it would lie over {above[0]}"
            )
            logger.info("%s has the adapter merged and none beside it: %s", target, reason)
        if is_main:
            components.processor.save(folder)
            copy_companions(base, folder)
    return target


def _dtype_of(base: str) -> torch.dtype | None:
    """Of the weights of a local or cached model; None: it does not say."""
    file = cached_file_of(base, "config.json")
    config = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    parts = (config, config.get("text_config") or {})
    named = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    found = getattr(torch, str(named[0]), None) if named else None
    return found if isinstance(found, torch.dtype) else None
