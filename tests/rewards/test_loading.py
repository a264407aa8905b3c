"""Reward functions by name, module or file, with options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.rewards.scorer import Scorer, load_reward
from perl.types import UserError


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
    with pytest.raises(UserError, match=r"has no 'quarters' \(did you mean 'quarter'\?\)"):
        load_reward(f"{file}:quarters")
    with pytest.raises(UserError, match="'three' is a int, not a function"):
        load_reward("my_rewards:three")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (
            "acuracy",
            r"function 'acuracy' \(did you mean 'accuracy'\?\); known are accuracy, format",
        ),
        ("box_iou(threshold=0.5", "cannot be read; write a name"),
        ("box_iou(0.5)", r"its options cannot be read \(options are written name=value\)"),
        ("box_iou(**{'threshold': 1})", "written name=value, without"),
        ("box_iou(threshold=)", "its options cannot be read"),
        ("box_iou(threshold=open('x'))", "its options cannot be read"),
        ("box_iou(threshold=1)(2)", "its options cannot be read"),
        ("box_iou(threshhold=1)", r"'threshhold' \(did you mean 'threshold'\?\); its options are"),
        ("format(x=1)", "has no option 'x'; it takes none"),
        ("frame_index", "needs the option count"),
        ("fine.py:f(scale=2, size=3)", "has no option 'size'; its options are scale"),
        ("fine.py:f(prompts=2)", "has no option 'prompts'"),
        ("zzz", "unknown reward function 'zzz'; known are"),
        ("no_such_module:f", "No module named 'no_such_module'; install it"),
        ("missing.py:f", "there is no file .*missing.py; correct the path"),
        ("broken.py:f", "broken.py raised SyntaxError"),
        ("failing.py:f", "failing.py raised RuntimeError: at import"),
    ],
)
def test_functions_that_do_not_load(
    spec: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("raise RuntimeError('at\\nimport')\n")
    (tmp_path / "fine.py").write_text("def f(prompts, completions, scale=1, **columns): ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match):
        load_reward(spec)
