"""Reward functions by name, module or file, with options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.rewards.scorer import Scorer, load_reward
from tests.messages import refused


def test_functions_load_from_modules_and_files(tmp_path: Path, monkeypatch: Any) -> None:
    source = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Score:\n    value: float = 0.25\n"
        "def quarter(prompts, completions, **columns):\n    return [Score().value] * len(completions)\n"
        "def half(prompts, completions, **columns):\n    return [0.5] * len(completions)\n"
        "def scaled(completions, scale, **columns):\n    return [scale * len(c) for c in completions]\n"
        "three = 3\n"
    )
    file = tmp_path / "my_rewards.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = Scorer((f"{file}:quarter", "my_rewards:half"), (1.0, 1.0))
    assert scorer.names == ("quarter", "half")
    np.testing.assert_array_equal(scorer.score(["q"], ["a"], {})[0], [0.75])
    alike = Scorer((f"{file}:half", "my_rewards:half"), (1.0, 1.0))
    assert alike.names == (f"{file}:half", "my_rewards:half")
    options = Scorer((f"{file}:scaled(scale=2)", f"{file}:quarter"), (1.0, 0.0))
    assert options.names == ("scaled", "quarter")
    np.testing.assert_array_equal(options.score(["q"], ["abc"], {"scale": [9]})[0], [6])
    with refused(f"{file}:quarters", "'quarter'"):
        load_reward(f"{file}:quarters")
    with refused("my_rewards:three", "'three'", "int"):
        load_reward("my_rewards:three")


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("acuracy", ["'accuracy'?", "accuracy, format", "file.py:function"]),
        ("zzz", ["accuracy, format", "package.module:function"]),
        ("box_iou(threshold=0.5", ["file.py:function", "box_iou(threshold=0.5)"]),
        ("box_iou(0.5)", ["options", "name=value", "name(option=0.5)"]),
        ("box_iou(**{'threshold': 1})", ["options", "name=value", "**", "name(option=0.5)"]),
        ("box_iou(threshold=)", ["options", "syntax", "name(option=0.5)"]),
        ("box_iou(threshold=open('x'))", ["options", "name(option=0.5)"]),
        ("box_iou(threshold=1)(2)", ["options", "name=value", "name(option=0.5)"]),
        ("box_iou(threshhold=1)", ["option 'threshhold'", "'threshold'?", "threshold, column"]),
        ("format(x=1)", ["option 'x'", "none"]),
        ("frame_index", ["option count", "frame_index(count=...)"]),
        ("fine.py:f(scale=2, size=3)", ["option 'size'", "scale"]),
        ("fine.py:f(prompts=2)", ["option 'prompts'", "scale"]),
        ("no_such_module:f", ["'no_such_module'", "PYTHONPATH", "file.py:function"]),
        ("missing.py:f", ["missing.py", "path"]),
        ("broken.py:f", ["broken.py", "SyntaxError"]),
        ("failing.py:f", ["failing.py", "RuntimeError: at import"]),
    ],
)
def test_functions_that_do_not_load(
    spec: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("raise RuntimeError('at\\nimport')\n")
    (tmp_path / "fine.py").write_text("def f(prompts, completions, scale=1, **columns): ...\n")
    monkeypatch.chdir(tmp_path)
    with refused(f"'{spec}'", *names):
        load_reward(spec)
