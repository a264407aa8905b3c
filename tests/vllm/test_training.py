"""A run on a real server, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

from tests.command_line import ALTERNATING, metrics, rewarded, run


def test_a_run_and_its_resumption(url: str, short_recipe: Path, tmp_path: Path) -> None:
    options = ["--rollout.engine", "vllm", "--rollout.url", url, *rewarded(tmp_path, ALTERNATING)]
    assert run("train", short_recipe, *options, "--train.steps", 3, "--train.lr", 1e-3) == 0
    assert run("resume", tmp_path / "run", "--train.steps", 6) == 0
    rows = metrics(tmp_path / "run", "rl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    print("\nmismatch_max by step:", " ".join(f"{row['rollout/mismatch_max']:.1e}" for row in rows))
    assert max(row["rollout/mismatch_max"] for row in rows) <= 1e-5
