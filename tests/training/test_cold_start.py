"""What the cold start trains on, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.command_line import json_lines, metrics
from tests.messages import refused
from tests.training.two_tokens import config_of, train_in

STEP = "train.steps = 0\ncold_start = { steps = 1, batch_size = 6 }\n"


def test_prompts_over_the_budget_are_left_out(tmp_path: Path, two_tokens: None) -> None:
    """Five demonstrations of "A B B" and one of "A" behind a long question."""
    config = config_of(tmp_path, STEP + "data = { max_prompt_tokens = 7, overlong = 'drop' }")
    rows = json_lines(tmp_path / "data.jsonl")
    rows[2] |= {"question": f"{rows[2]['question']} Or not?", "demonstration": "A"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_in(tmp_path / "run", config)
    (row,) = metrics(tmp_path / "run", "cold_start")
    assert row["tokens"] == 5 * 3 and row["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("more", "demonstration", "names"),
    [
        ("", None, ["data.jsonl", "demonstration", "cold_start.steps = 0"]),
        (
            "data = { max_prompt_tokens = 6, overlong = 'drop' }",
            "A",
            ["6", "data.max_prompt_tokens = 6", "model.max_pixels"],
        ),
        ("data.max_prompt_tokens = 6", "A", ["data.max_prompt_tokens = 6", "model.max_pixels"]),
    ],
)
def test_what_cannot_be_learnt_from(
    more: str, demonstration: str | None, names: list[str], tmp_path: Path, two_tokens: None
) -> None:
    config = config_of(tmp_path, STEP + more)
    rows = [r | {"demonstration": demonstration} for r in json_lines(tmp_path / "data.jsonl")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(*names):
        train_in(tmp_path / "run", config)
    assert not (tmp_path / "run" / "models" / "cold_start").exists()
