"""The documents' Python runs, its recipe loads, and its data lines are read."""

import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def printed(code: str) -> str:
    with redirect_stdout(StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_the_example_runs_as_printed() -> None:
    code, _ = blocks("python")
    first, second = printed(code).splitlines()
    assert "torch.Size([11])" in first
    assert second == "tensor(True) tensor(True)"


def test_the_way_from_padded_batches_runs() -> None:
    (code,) = blocks("python", (ROOT / "docs" / "losses.md").read_text())
    said = printed(code)
    assert "'tokens': 14.0" in said and "'invalid_rows': 0.0" in said


@pytest.mark.slow
def test_the_comparison_gives_the_same_loss_in_less_memory() -> None:
    code = blocks("python")[1].replace("range(5)", "range(2)")
    # A process starts with the peak memory of the one it was forked from; the shell's is small.
    shell = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", code]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, plain = (re.findall(r"-?[\d.]+", line) for line in done.stdout.splitlines())
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
    """Of all documents, to files and to headings; those of the README are many."""
    found = {}
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        found[document.name] = re.findall(r"\]\((?!https?:)([^)\s]*)\)", text)
        for target in found[document.name]:
            path, _, heading = target.partition("#")
            file = (document.parent / path).resolve() if path else document
            assert file.exists(), f"{document}: {target}"
            assert not heading or heading in headings(file), f"{document}: {target}"
    assert len(found["README.md"]) > 5 and sum(map(len, found.values())) > 20


def headings(document: Path) -> set[str]:
    """What a link into the document may end in: a heading in lower case with - for blanks, as GitHub writes it."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_nothing_is_left_to_fill_in() -> None:
    for document in DOCUMENTS:
        assert "<!--" not in document.read_text(), document
