"""An evaluation as a file: its numbers, what they depend on besides the model, and the scores of every example."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perl.config import Config
from perl.evaluation.evaluate import ExampleResult
from perl.files import write_json
from perl.types import UserError

SETTINGS = (
    *("data.eval", "data.instruction", "data.instruction_in", "data.system"),
    *("eval.max_orders", "eval.samples", "permutation.text"),
    *("rollout.max_new_tokens", "rollout.stop", "reward.functions", "reward.weights"),
    *("model.min_pixels", "model.max_pixels", "model.dtype", "model.chat_template"),
)
"""Keys of a recipe that the scores of an example depend on."""


def save_evaluation(
    path: Path, results: Sequence[ExampleResult], numbers: dict[str, Any], config: Config
) -> None:
    """Write `numbers` (see `aggregate`), the settings, and a row for each example."""
    sections = asdict(config)
    settings = {
        key: sections[section][name]
        for key, (section, name) in zip(SETTINGS, (k.split(".") for k in SETTINGS), strict=True)
    }
    rows = [asdict(result) for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**numbers, "settings": settings, "by_example": rows})


def read_evaluation(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings of an evaluation, and its rows by the examples' ids.

    Args:
        path: the file, or a run folder, which stands for its evaluation after RL.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if path.is_dir():
        path = _after(path)
    try:
        found = json.loads(path.read_text("utf-8"))
        rows = _by_id([row for row in found["by_example"] if "content" in row])
        settings = dict(found["settings"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; {_ADVICE}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no evaluation with its examples; {_ADVICE}") from error
    if not rows:
        raise UserError(f"{path} names no examples; evaluate again")
    return settings, rows


def _by_id(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by their ids; those of one id, which some data give to several questions, by their contents too."""
    shared = {id for id, count in Counter(str(row["id"]) for row in rows).items() if count > 1}
    return {
        f"{row['id']} {row['content']}" if str(row["id"]) in shared else str(row["id"]): row
        for row in rows
    }


def _after(folder: Path) -> Path:
    path = folder / "evaluations" / "after.json"
    if path.exists():
        return path
    if seeds := sorted(p.name for p in folder.glob("seed-*") if p.is_dir()):
        raise UserError(f"{folder} has several seeds; give one, as in {folder / seeds[0]}")
    kept = sorted(str(p) for p in (folder / "evaluations").glob("*.json"))
    raise UserError(
        f"{folder} has no evaluation after RL ({path.name}); "
        + (f"it has {', '.join(kept)}" if kept else _ADVICE)
    )


_ADVICE = "give a run folder, or a file of perl-rl evaluate RUN --output FILE"
