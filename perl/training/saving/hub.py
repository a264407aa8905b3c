"""The hub at the end of a run: whether its model may be pushed there, the model card, and pushing."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from perl.config import Config
from perl.files import offline_if_unreachable, replacing
from perl.model.sources import layers_of
from perl.recipe import to_toml
from perl.types import UserError, one_line

_CARD = """---
{data}
---

# {name}

Trained by reinforcement learning over several images in permuted orders with
[PeRL](https://arxiv.org/abs/2506.14907) (perl-rl {version}), from `{base}`.

{numbers}

## Recipe

```toml
{recipe}```
"""


def check_push(repo: str) -> None:
    """Whether a model could be pushed to a repository of the hub; empty: none is asked for.

    Raises:
        UserError: no such name can be, the hub is not to be reached, or nobody is logged in.
    """
    if not repo:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    where = f"run.push_to_hub = {repo}"
    offline_if_unreachable()
    try:
        validate_repo_id(repo)
        if constants.is_offline_mode():
            raise UserError(
                f"{where}: the hub is offline (HF_HUB_OFFLINE is set or it cannot be reached); leave the key empty and "
                "push later with: hf upload"
            )
        HfApi().whoami()
    except UserError:
        raise
    except Exception as error:  # The hub's client raises many types.
        raise UserError(
            f"{where}: {one_line(error)}; correct the name, or log in with: hf auth login"
        ) from error


def push(config: Config, root: Path, summary: dict[str, Any]) -> str:
    """Push what a run has left, `models/best` where there is one, else `models/final`; a new repository is private.

    Returns:
        Where it is now.

    Raises:
        UserError: it could not be pushed; the run is as it was.
    """
    from huggingface_hub import HfApi

    repo = config.run.push_to_hub
    folder = root / "models" / ("best" if config.run.keep_best else "final")
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(model_card(config, summary), encoding="utf-8")
    try:
        api = HfApi()
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained by perl-rl")
    except Exception as error:  # The hub's client raises many types.
        command = shlex.join(["hf", "upload", repo, str(folder)])
        raise UserError(
            f"the run is whole in {root}, but was not pushed to {repo} ({one_line(error)}); push it with: {command} --private"
        ) from error
    return str(url)


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """README.md of a pushed model: what it came from, what it was measured at, and the whole recipe."""
    from huggingface_hub import ModelCardData

    base = layers_of(config.model.path)[-1]
    local = Path(base).expanduser().exists() or "/" not in base
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=None if local else base,
        tags=["perl-rl", "grpo", "reinforcement-learning"],
    )
    return _CARD.format(
        data=data.to_yaml(),
        name=config.run.push_to_hub.rpartition("/")[2],
        version=summary["versions"]["perl-rl"],
        base=Path(base).name if local else base,
        numbers=_numbers(config, summary),
        recipe=to_toml(config),
    )


def _numbers(config: Config, summary: dict[str, Any]) -> str:
    """A table of what was measured before and after."""
    rows = ["| held out, over image orders | before | after |", "| --- | ---: | ---: |"]
    for key, value in summary.items():
        name, _, at = key.rpartition("_")
        if at == "before" and value is not None and summary.get(f"{name}_after") is not None:
            rows.append(f"| {name} | {value:.4f} | {summary[f'{name}_after']:.4f} |")
    best = summary.get("best")
    told = (
        f"\n\nThis is the best model by {best['by']}: {best['value']:.4f} at step {best['step']}."
        if best
        else ""
    )
    return ("\n".join(rows) if len(rows) > 2 else "Nothing was measured.") + told
