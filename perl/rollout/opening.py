"""A trained model to ask: found in a run folder, a model folder or on the hub, and made ready to generate."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perl.config import Config
from perl.recipe import plan, read_config
from perl.types import UserError

_SAMPLE = 1 << 16


def config_of(model: str, **sections: Mapping[str, Any]) -> Config:
    """Settings with a model's path: of a run folder its newest model and the settings of the stage that left it, or
    the defaults for any other. `sections` replaces keys; those that are None stay as they are.

    Raises:
        UserError: a folder that is neither, that is not there, or a run without a model yet.
    """
    config, path = _found(model)
    sections = {"model": {"path": path}, **sections}
    changed = {
        name: replace(getattr(config, name), **{k: v for k, v in keys.items() if v is not None})
        for name, keys in sections.items()
    }
    return replace(config, **changed)


def _found(model: str) -> tuple[Config, str]:
    folder = Path(model).expanduser()
    # A name that is no folder was meant as one: `runs/nope` where there is a folder runs.
    local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if not folder.exists() and (local or Path(*Path(model).parts[:1]).is_dir()):
        raise UserError(f"{model}: there is no such folder; give a run folder or a model folder")
    if not (folder / "config.toml").exists():
        if (folder / "config.json").exists() or not folder.exists():
            return Config(), model
        raise UserError(
            f"{model} is neither a run folder (no config.toml) nor a model folder (no config.json)"
        )
    config = read_config(folder / "config.toml")
    if config.run.seeds:
        folder = folder / f"seed-{config.run.seeds[0]}"
    stages = plan(config)
    for name, stage in (("final", stages[-1]), *((s.name, s) for s in reversed(stages))):
        found = folder / "models" / name
        if (found / "config.json").exists():
            unfinished = " (the run has not finished; `perl-rl resume` goes on)"
            print(f"model: {found}{'' if name == 'final' else unfinished}", file=sys.stderr)
            return stage.config, str(found)
    raise UserError(f"{model} has no finished model yet; go on with perl-rl resume {model}")


def engine_and_encoder(config: Config) -> tuple[Any, Any]:
    """An `InProcessEngine` and a `PromptEncoder` for `config.model.path`, on a GPU where there is one."""
    import torch

    from perl.model.loading import load_policy, load_processor, uses_bfloat16
    from perl.rollout.padded import make_engine
    from perl.rollout.prompts import PromptEncoder, PromptLimit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config.model.path, replace(config.model, lora_rank=0), device).to(device)
    processor = load_processor(config.model.path, config.model)
    limit = replace(
        PromptLimit.to_generate(config),
        advice="raise it with --max-prompt-tokens, or leave such examples out with --overlong drop",
    )
    encoder = PromptEncoder(processor, limit, config.data.overlong)

    def autocast() -> torch.autocast:
        return torch.autocast(
            device.type, torch.bfloat16, enabled=uses_bfloat16(config.model.dtype)
        )

    return make_engine(policy, processor, config.rollout.batch_size, autocast), encoder


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
