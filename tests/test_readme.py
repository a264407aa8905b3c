"""The documents' Python runs, its recipe loads, and its data lines are read."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def printed(code: str) -> str:
    # A process starts with the peak memory of the one it was forked from; the shell's is small.
    shell = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", code]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_as_printed() -> None:
    code, _ = blocks("python")
    first, second = printed(code).splitlines()
    assert "torch.Size([11])" in first
    assert second == "tensor(True) tensor(True)"


def test_the_way_from_padded_batches_runs() -> None:
    (code,) = blocks("python", (ROOT / "docs" / "losses.md").read_text())
    said = printed(code)
    assert "'tokens': 14.0" in said and "'invalid_rows': 0.0" in said


def test_the_comparison_gives_the_same_loss_in_less_memory() -> None:
    _, code = blocks("python")
    ours, plain = (re.findall(r"-?[\d.]+", line) for line in printed(code).splitlines())
    assert abs(float(ours[0]) - float(plain[0])) < 1e-4
    assert 4 * int(ours[1]) < int(plain[1])


def test_the_recipe_loads(tmp_path: Path) -> None:
    from perl.recipe import load_recipe

    (text,) = blocks("toml")
    path = tmp_path / "mine.toml"
    path.write_text(text)
    config = load_recipe(str(path))
    assert config.permutation.orders == 2
    assert config.run.dir == "runs/mine"


def test_the_data_is_read(tmp_path: Path) -> None:
    from perl.config import DataConfig
    from perl.data.dataset import load_examples

    (text,) = blocks("json")
    for name in re.findall(r"[\w/]+\.png", text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    data = load_examples(str(path), DataConfig(), "train", seed=0)
    assert [len(data[i].images) for i in range(len(data))] == [2, 3, 3]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        assert "<!--" not in document.read_text(), document
