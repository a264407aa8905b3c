"""What a run shows and keeps while it goes on: the display, tables, and rollouts to look at."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perl.files import RunFolder
from perl.permutation import permute
from perl.report.gallery import Gallery, compact
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.types import (
    EncodedImage,
    EncodedPrompt,
    Example,
    Group,
    Message,
    Rollout,
    Variant,
    WeightSpan,
)
from tests.stand_ins import example


def rollout(variant: Variant, text: str) -> Rollout:
    images = tuple(
        EncodedImage(f"{image.getpixel((0, 0)):03}".ljust(20, "x"), torch.empty(0), (1, 1, 1), 1)
        for image in variant.images
    )
    prompt = EncodedPrompt(np.zeros(1, np.int64), np.zeros((3, 1)), 1, images, 9)
    versions = (WeightSpan(3, 0, 1),) if text == "d" else ()
    return Rollout(variant, prompt, np.zeros(1, np.int64), np.zeros(1), text, True, versions)


def test_the_first_rollout_of_each_order_is_kept_with_its_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.make_parts()
    shown = example("e", 10, 20, task="darkest")
    variants = [permute(shown, order) for order in ((1, 0), (0, 1))]
    group = Group(
        example=shown,
        variants=tuple(variants),
        rollouts=tuple(rollout(variants[i // 2], "abcd"[i]) for i in range(4)),
        rewards=np.array([0.1, 0.2, 0.3, 0.4]),
        reward_parts={"accuracy": np.arange(4.0), "judge": np.array([1, 1, math.nan, 1])},
        advantages=np.array([1.0, 2.0, -3.00004, math.nan]),
    )
    Gallery(folder).keep_groups("rl", 7, [group])
    Gallery(folder).keep_rollouts(
        "evaluate",
        8,
        zip(
            group.rollouts[2:],
            (0.9, math.nan),
            ({"accuracy": 1.0}, {"accuracy": math.nan}),
            strict=True,
        ),
    )
    one, two, *held_out = map(json.loads, folder.rollouts.read_text().splitlines())
    names = ("stage", "step", "example", "task", "order", "answer", "text", "reward", "rewards")
    assert [[row[name] for name in names] for row in (one, two)] == [
        ["rl", 7, "e", "darkest", [1, 0], "B", "a", 0.1, {"accuracy": 0, "judge": 1}],
        ["rl", 7, "e", "darkest", [0, 1], "A", "c", 0.3, {"accuracy": 2, "judge": None}],
    ]
    assert (one["advantage"], two["advantage"]) == (1, -3)
    assert one["images"] == two["images"][::-1]
    greys = [Image.open(tmp_path / name).convert("L").getpixel((0, 0)) for name in two["images"]]
    assert greys == [10, 20]
    found = [(row["step"], row["text"], row["reward"], row["rewards"]) for row in held_out]
    assert found == [(8, "c", 0.9, {"accuracy": 1}), (8, "d", None, {"accuracy": None})]
    assert [row.get("weight_versions") for row in held_out] == [None, [[3, 0, 1]]]


def test_pictures_are_kept_as_the_model_saw_them_and_small(tmp_path: Path) -> None:
    """A noisy photo at quality 90, a drawing exactly; once, whatever shows it."""
    folder = RunFolder(tmp_path)
    folder.make_parts()
    noise = np.random.default_rng(0).normal(0, 9, (300, 400, 3))
    ramp = np.mgrid[60:180:300j, 60:180:400j].sum(0)[..., None] / 2
    photo = Image.fromarray((ramp + noise).clip(0, 255).astype("uint8"))
    drawing = Image.new("RGB", (400, 300), "white")
    for k in range(0, 300, 3):
        drawing.paste((k % 256, 0, 99), (k, k, k + 90, k + 1))
    shown = Example("e", (photo, drawing), "<image> <image>", "A")
    pictures = tuple(
        EncodedImage(key * 20, torch.empty(0), (1, 1, 1), 1, size=size)
        for key, size in (("p", (200, 150)), ("d", None))
    )
    prompt = EncodedPrompt(np.zeros(1, np.int64), np.zeros((3, 1)), 1, pictures, 9)
    one = Rollout(
        permute(shown, (0, 1)), prompt, np.zeros(1, np.int64), np.zeros(1), "", finished=True
    )
    first, second = Gallery(folder).keep_rollouts("evaluate", 1, [(one, 1.0, {})] * 2)
    assert first["images"] == second["images"] and len(list(folder.images.iterdir())) == 2
    kept = [Image.open(tmp_path / name).convert("RGB") for name in first["images"]]
    smaller = photo.resize((200, 150), Image.Resampling.BICUBIC)
    off = np.abs(np.asarray(kept[0], int) - np.asarray(smaller, int)).mean()
    assert kept[0].size == (200, 150) and 0 < off < 4
    assert (tmp_path / first["images"][0]).stat().st_size < 20_000  # PNG takes 70,000.
    assert np.array_equal(np.asarray(kept[1]), np.asarray(drawing))


def test_a_picture_that_is_too_long_for_a_file_is_kept_smaller() -> None:
    with Image.open(io.BytesIO(compact(Image.new("RGB", (32766, 20))))) as image:
        assert image.size == (16383, 10)


def test_a_chat_is_kept_with_its_roles(tmp_path: Path) -> None:
    chat = (Message("system", "Be brief."), Message("user", "Which? Box it."))
    variant = replace(permute(example("e", 10), (0,)), asked=chat)
    folder = RunFolder(tmp_path)
    folder.make_parts()
    (row,) = Gallery(folder).keep_rollouts("evaluate", 1, [(rollout(variant, ""), 1.0, {})])
    assert row["question"] == "system: Be brief.\nuser: Which? Box it."


def test_lines_of_a_run_without_a_terminal(monkeypatch, capsys) -> None:
    """Every ten seconds and at the end: what is done, the numbers, and the time that the rest will take."""
    now = [100.0]
    monkeypatch.setattr("perl.report.progress.time.monotonic", lambda: now[0])
    display = Display()
    display.stage("rl", 10, done=4)
    for seconds, steps in ((9.0, 1), (21.0, 2), (25.0, 2), (27.0, 1)):
        now[0] = 100 + seconds
        display.advance(steps, {"kl": 0.12345, "length": 123.4, "loss": math.nan})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "rl: 6 steps"
    numbers = "kl 0.123  length 123  loss -"
    assert lines == [
        f"rl 7/10  {numbers}  21 s, eta 21 s",  # Three steps in 21 seconds, and three are left.
        f"rl 10/10  {numbers}  27 s, eta 0 s",
    ]
    display.stage("RL", 9, done=8)
    display.stage("evaluate", 1, unit="example")
    display.stage("label", 7, unit="row")
    said = ["RL: 1 step", "evaluate: 1 example", "label: 7 rows"]
    assert capsys.readouterr().err.splitlines() == said
    Display(enabled=False).stage("rl", 10)
    assert not capsys.readouterr().err


def test_a_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["model", "score"], ["[b]x", "1"], ["y", "10"]], "Title", rules=[2])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [["Title"], ["model", "score"], ["[b]x", "1"], ["y", "10"]]
