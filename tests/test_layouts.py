"""Data in the layouts of peers: the same rows whichever they stand in, from the file to a trained model that answers."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config as settings
import pytest
from PIL import Image

from perl.config import DataConfig
from perl.data.columns import CONVENTIONS
from perl.data.dataset import RowDataset, load_examples
from perl.data.pictures import DIGITS, load_collection
from perl.types import Message
from tests.command_line import ALTERNATING, metrics, run, same_weights

COUNT = 200


@dataclass(frozen=True)
class Plain:
    """A question over two digits, as every layout must have it."""

    question: str
    answer: str
    names: tuple[str, str]
    pictures: tuple[bytes, bytes]

    @property
    def completion(self) -> str:
        return f"<think> look </think> \\boxed{{{self.answer}}}"

    @property
    def embedded(self) -> list[dict[str, Any]]:
        return [{"bytes": picture, "path": None} for picture in self.pictures]


def parts(question: str) -> list[dict[str, str]]:
    """A question as parts of a chat."""
    return [
        {"type": "image"} if text == "<image>" else {"type": "text", "text": text}
        for text in re.split("(<image>)", question)
        if text
    ]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


LAYOUTS: dict[str, tuple[str, str, Callable[[Plain], dict[str, Any]]]] = {
    "perl": ("perl", "jsonl", lambda p: {"question": p.question, "answer": p.answer, "images": p.names}),
    "trl": ("trl", "jsonl", lambda p: {"prompt": p.question, "solution": f"\\boxed{{{p.answer}}}", "images": p.names}),
    "trl-chat": ("trl", "parquet",
        lambda p: {"prompt": [user(parts(p.question))], "ground_truth": p.answer, "images": p.embedded}),
    "verl": ("verl", "parquet", lambda p: {
        "data_source": "digits", "prompt": [user(p.question)], "images": p.embedded, "ability": "look",
        "reward_model": {"style": "rule", "ground_truth": p.answer}, "extra_info": {"split": "train"}}),
    "easyr1": ("easyr1", "parquet", lambda p: {"problem": p.question, "answer": p.answer, "images": p.embedded}),
    "open-r1": ("open-r1", "parquet", lambda p: {
        "problem": p.question, "solution": f"<think> look </think><answer> {p.answer} </answer>", "images": p.embedded}),
    "ms-swift": ("ms-swift", "jsonl",
        lambda p: {"messages": [user(p.question)], "images": p.names, "solution": p.answer}),
    "ms-swift-sft": ("ms-swift", "jsonl", lambda p: {
        "messages": [user(p.question), {"role": "assistant", "content": p.completion}],
        "images": [{"bytes": None, "path": name} for name in p.names]}),
    "ms-swift-old": ("ms-swift", "jsonl", lambda p: {"query": p.question, "response": p.completion, "images": p.names}),
    "sharegpt": ("sharegpt", "json", lambda p: {
        "conversations": [{"from": "human", "value": p.question}, {"from": "gpt", "value": p.completion}],
        "images": p.names}),
    "sharegpt-pairs": ("sharegpt", "jsonl", lambda p: {
        "conversation": [{"human": p.question, "assistant": p.completion}], "images": p.names}),
    "alpaca": ("alpaca", "json",
        lambda p: {"instruction": p.question, "input": "", "output": p.completion, "images": p.names}),
    "mapped": ("perl", "jsonl", lambda p: {"query_text": p.question, "gt": p.answer, "pics": p.names}),
}  # fmt: skip
"""By name: the convention, the type of file, and a row."""

CHATS = {"ms-swift-sft", "ms-swift-old", "sharegpt", "sharegpt-pairs", "alpaca"}
"""Layouts whose answer is the assistant's last turn."""

MAP = ("question=query_text", "answer=gt", "images=pics")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Plain]]:
    """The folder of the pictures, and the rows."""
    root = tmp_path_factory.mktemp("layouts")
    digits, rows = load_collection("digits"), []
    for i in range(COUNT):
        classes = (i % 10, (i + 1 + i // 10 % 9) % 10)
        names, pictures = [], []
        for c in classes:
            stream = io.BytesIO()
            digits.open(digits.keys["train"][c][i // 2]).save(stream, format="PNG")
            names.append(f"pictures/{i}-{c}.png")
            pictures.append(stream.getvalue())
            (root / names[-1]).parent.mkdir(exist_ok=True)
            (root / names[-1]).write_bytes(stream.getvalue())
        question = f"A <image> B <image> Which image shows {DIGITS[classes[i % 2]]} ?"
        rows.append(Plain(question, "AB"[i % 2], (names[0], names[1]), (pictures[0], pictures[1])))
    return root, rows


def written(plain: tuple[Path, list[Plain]], layout: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    root, rows = plain
    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", str(root / "cache"))
    _, kind, row_of = LAYOUTS[layout]
    path, lines = root / f"{layout}.{kind}", [row_of(row) for row in rows]
    if kind == "parquet":
        datasets.Dataset.from_list(lines).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(lines))
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(layout: str) -> DataConfig:
    return DataConfig(map=MAP if layout == "mapped" else ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_examples(
    plain: tuple[Path, list[Plain]], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(plain, layout, monkeypatch)
    data = load_examples(str(path), config_of(layout), "train", 0)
    assert isinstance(data, RowDataset) and data.layout.convention.name == LAYOUTS[layout][0]
    own = load_collection("digits")
    assert len(data) == COUNT
    for i, row in enumerate(plain[1]):
        example = data[i]
        assert example.messages == (Message("user", row.question),)
        assert (example.answer, example.kind) == (row.answer, "none")
        assert example.demonstration == (row.completion if layout in CHATS else None)
        keys = [(int(name.partition("-")[2][:-4]), i // 2) for name in row.names]
        shown = [own.open(own.keys["train"][c][k]).tobytes() for c, k in keys]
        assert [image.tobytes() for image in example.images] == shown


def test_the_documented_rows(tmp_path: Path) -> None:
    document = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    section = document.partition("### Layouts of others")[2]
    (rows, *_) = re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = []
    for line in rows.splitlines():
        (tmp_path / "row.jsonl").write_text(line)
        data = load_examples(str(tmp_path / "row.jsonl"), DataConfig(), "train", 0)
        assert isinstance(data, RowDataset)
        found.append(data.layout.convention.name)
        content = "<image><image>Which image shows a dog?"
        assert data[0].messages == (Message("user", content),) and data[0].answer == "B", line
    documented = re.findall(r"^\| `([\w-]+)` \|", section.partition("```")[0], flags=re.MULTILINE)
    assert list(dict.fromkeys(found)) == documented
    assert {*documented, "perl"} == {convention.name for convention in CONVENTIONS}


@pytest.mark.parametrize(
    "layout", ["trl", "verl", "easyr1", "open-r1", "ms-swift-sft", "sharegpt", "alpaca", "mapped"]
)
def test_every_layout_goes_from_a_file_to_a_model_that_answers(
    plain: tuple[Path, list[Plain]], layout: str, monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Data and model alone are named, beside what makes the run small and gives an untrained model a signal."""
    # Its pictures take seconds.
    monkeypatch.setattr("perl.report.page.write_report", lambda folder: folder)
    path, folder = written(plain, layout, monkeypatch), tmp_path / "run"
    (tmp_path / "reward.py").write_text(ALTERNATING)
    rewards = ["accuracy", f"{tmp_path}/reward.py:f"]
    small = ["--train.examples_per_step", 2, "--rollout.per_order", 1]
    small += ["--rollout.max_new_tokens", 3, "--eval.examples", 2, "--run.trackers"]
    small += ["--reward.functions", *rewards, "--reward.weights", 0.5, 0.5]
    small += ["--run.dir", folder, "--run.checkpoint_every", 1]
    named = ["--data.map", *MAP] if layout == "mapped" else []
    data = ["--data.train", path, *named]
    model = tiny_folder("tiny-qwen2.5-vl")
    assert run("train", *data, "--model.path", model, "--train.steps", 2, *small) == 0
    measured = [row["examples"] for row in metrics(folder, "evaluate")]
    assert measured == [2, 2] and [row["groups/kept"] for row in metrics(folder, "rl")] == [2, 2]

    final, first = folder / "models" / "final", tmp_path / "first" / "models" / "final"
    first.parent.mkdir(parents=True)
    final.rename(first)
    shutil.rmtree(folder / "checkpoints" / "step-2")
    assert run("resume", folder) == 0
    assert same_weights(folder, tmp_path / "first")
    assert len(metrics(folder, "rl")) == 2

    capsys.readouterr()
    assert run("generate", folder, "--example", 1) == 0
    said = capsys.readouterr().out
    asked = re.search(r"question: (.*)\nright answer: (.*)\n", said)
    assert asked and asked.groups() in {(row.question, row.answer) for row in plain[1]}
