"""A trained model to ask: found in a run folder, a model folder or on the hub, and made ready to generate."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perl.config import Config
from perl.model.sources import (
    is_adapter,
    is_checkpoint,
    model_of,
    newest_model,
    read_manifest,
    run_of,
)
from perl.recipe import Stage, held_out_of, plan, points, read_config
from perl.types import UserError

_SAMPLE = 1 << 16


def config_of(model: str, **sections: Mapping[str, Any]) -> Config:
    """Settings with a model's path. A run folder stands for its newest model; that, like a checkpoint or a model of a run,
    comes with the settings of the stage that left it, any other with the defaults. `sections` replaces keys; those
    that are None stay as they are.

    Raises:
        UserError: a folder that is no model, that is not there, or a run without a model yet.
    """
    config, path = _found(model)
    # A run's models are saved with its chat template.
    sections = {"model": {"path": path, "chat_template": ""}, **sections}
    changed = {
        name: replace(getattr(config, name), **{k: v for k, v in keys.items() if v is not None})
        for name, keys in sections.items()
    }
    changed = replace(config, **changed)
    return replace(changed, data=held_out_of(changed.data, config.data.train))


def _found(model: str) -> tuple[Config, str]:
    folder = Path(model).expanduser()
    # A name that is no folder was meant as one: `runs/nope` where there is a folder runs.
    local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not folder.exists() and (local or Path(*Path(model).parts[:1]).is_dir()):
        raise UserError(
            f"{model}: there is no such folder; give a run folder, a checkpoint or a model folder"
        )
    root = run_of(folder)
    if root is None:
        if not folder.exists() or (folder / "config.json").exists() or is_adapter(folder):
            return Config(), model
        raise UserError(
            f"{model} is neither a run folder (no config.toml) nor a checkpoint in one, a model folder (no config.json) "
            "or a LoRA adapter (no adapter_config.json)"
        )
    path = newest_model(model)
    if path != model:
        unfinished = is_checkpoint(path)
        goes_on = " (the run has not finished; `perl-rl resume` goes on)"
        print(f"model: {path}{goes_on if unfinished else ''}", file=sys.stderr)
    return _stage_of(Path(path), plan(read_config(root / "config.toml"))).config, path


def _stage_of(model: Path, stages: list[Stage]) -> Stage:
    """The stage that left a checkpoint, a model or an adapter of a run."""
    if not is_checkpoint(model):
        name = model_of(model).name
        return next((s for s in stages if s.name == name), stages[-1])
    try:
        point = read_manifest(model)["progress"]["stage"]
        passed = points(stages)[: points(stages).index(point) + 1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {model} is damaged or of other stages than its config.toml says ({error}); give another"
        ) from error
    return next((s for s in reversed(stages) if s.name in passed), stages[0])


def engine_and_encoder(config: Config) -> tuple[Any, Any]:
    """An engine and a `PromptEncoder` for `config.model.path`, on a GPU where there is one."""
    import torch

    from perl.model.loading import load_policy, load_processor
    from perl.rollout.engines import in_process, served_model
    from perl.rollout.instruction import Instruction
    from perl.rollout.prompts import PromptEncoder, PromptLimit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = replace(config.model, lora_rank=0)
    processor = load_processor(config.model.path, config.model)
    limit = PromptLimit.to_generate(config)
    if limit.tokens == config.data.max_prompt_tokens:
        advice = (
            "raise it with --max-prompt-tokens, or leave such examples out with --overlong drop"
        )
        limit = replace(limit, advice=advice)
    encoder = PromptEncoder(
        processor, limit, config.data.overlong, Instruction.of(config), config.data.control_tokens
    )

    if config.rollout.engine == "vllm":  # The weights are read by the server alone.
        return served_model(config, processor, device), encoder
    policy = load_policy(config.model.path, model, device).to(device)
    return in_process(policy, processor, config.rollout.kv_cache_tokens), encoder


def fingerprint(model: str) -> str:
    """A few characters that change with the weights in a model folder; empty for a hub name.

    Of every safetensors file the name, the size and three samples of 64 KiB are hashed, not the whole.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16] if files else ""
