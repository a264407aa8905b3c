"""The documents' Python runs, its recipe loads, and its data lines are read."""

import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perl.config import Config
from perl_kernels.dispatch import available_backends
from tests.command_line import finish
from tests.forked import Forked

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


LOSSES = blocks("python", (ROOT / "docs" / "losses.md").read_text())


def test_the_way_from_padded_batches_runs_without_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch import nn

    shapes = []
    linear = nn.Linear.forward

    def forward(self: nn.Linear, x: Any) -> Any:
        shapes.append(self.out_features)
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    said = printed(LOSSES[0])
    assert "'tokens': 14.0" in said and "'invalid_rows': 0.0" in said
    assert shapes and 100 not in shapes, "the head was called"


_RANK = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import Qwen2Config, Qwen2ForCausalLM

sizes = {{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}}
sizes |= {{"vocab_size": 51, "hidden_size": 8, "intermediate_size": 16}}
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(**sizes)).double()
whole = {{"scored": torch.rand(4, 7) < 0.6, "ids": torch.randint(50, (4, 7)), "a": torch.randn(4)}}

def batch(rows):
    scored, ids = whole["scored"][rows], whole["ids"][rows]
    ends = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0))
    given = dict(inputs={{"input_ids": ids}}, scored=scored, targets=ids.roll(-1, 1)[scored])
    return given | dict(advantages=whole["a"][rows], cu_seqlens=ends)

{code}

tokens = int(whole["scored"].sum())
alone = WithLoss(model, PolicyLoss.preset("dapo"))
alone(**batch(slice(0, 4)), normalizer=tokens).backward()
wanted = {{name: p.grad.clone() for name, p in alone.named_parameters()}}
alone.zero_grad()
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{{store}}", rank=rank, world_size=2)
own = batch([slice(0, 1), slice(1, 4)][rank])

def check(how):
    for name, p in alone.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, wanted[name], msg=f"{{how}} {{name}}")
    alone.zero_grad()

step(DistributedDataParallel(alone), own, tokens)
check("DDP")
alone(**own, normalizer=tokens).backward()
sum_gradients(model)
check("sum")
mesh = init_device_mesh("cpu", (2,))
parallelize_module(model, mesh, {{"lm_head": ColwiseParallel()}})
every = batch(slice(0, 4))
rows = model.model(**every.pop("inputs")).last_hidden_state[every.pop("scored")]
split_loss(model, mesh, rows, loss=PolicyLoss.preset("dapo"), **every).backward()
check("split")
torch.distributed.destroy_process_group()  # Else gloo's threads may outlive the interpreter, which aborts.
"""


@pytest.mark.slow
def test_the_ways_to_the_gradients_of_several_ranks_agree_with_one(tmp_path: Path) -> None:
    code = tmp_path / "rank.py"
    code.write_text(_RANK.format(code="\n".join(LOSSES[1:])))
    done = finish([Forked(code, rank, tmp_path / "store") for rank in range(2)])
    assert [code for code, _ in done] == [0, 0], done


def test_the_recipe_of_a_loss_loads(tmp_path: Path) -> None:
    from perl.model.head import make_policy_loss
    from perl.recipe import read_config
    from perl_kernels import PolicyLoss

    (text,) = blocks("toml", (ROOT / "docs" / "losses.md").read_text())
    (tmp_path / "loss.toml").write_text(text)
    loss = make_policy_loss(read_config(tmp_path / "loss.toml").loss, 512)
    assert loss == PolicyLoss.preset(
        "dapo", delta=4.0, kl="k3+", kl_coef=0.01, correction="token_truncate"
    )


@pytest.mark.slow
def test_the_comparison_gives_the_same_loss_in_less_memory() -> None:
    code = blocks("python")[1].replace("range(5)", "range(2)")
    # A process starts with the peak memory of the one it was forked from; the shell's is small.
    shell = ["sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", code]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, plain = (re.findall(r"-?[\d.]+", line) for line in done.stdout.splitlines())
    assert abs(float(ours[0]) - float(plain[0])) < 1e-4
    # In PyTorch a block of logits has temporaries of its size.
    times = 4 if available_backends()["native"][0] else 2
    assert times * int(ours[1]) < int(plain[1])


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


def test_keys_that_documents_name_are_keys() -> None:
    """`section.key`, alone or with a value behind it, and `--section.key` on a command line."""
    known = {
        f"{section.name}.{key.name}"
        for section in fields(Config)
        if section.name != "stages"
        for key in fields(getattr(Config(), section.name))
    }
    sections = "|".join(sorted({key.partition(".")[0] for key in known}))
    of_code = re.compile(rf"`({sections})\.([a-z_]+)(?:`| = )")
    of_command = re.compile(rf"--({sections})\.([a-z-]+)")
    # Of verl, where its own stand beside them, and an attribute of transformers' models.
    others = {
        "data.train_files",
        "data.val_files",
        "data.train_batch_size",
        "rollout.n",
        "rollout.name",
    }
    others |= {"data.max_prompt_length", "data.max_response_length", "model.model"}
    named = 0
    for path in DOCUMENTS:
        if path.name == "CHANGELOG.md":  # It names those that are gone.
            continue
        text = path.read_text()
        found = {".".join(m) for m in of_code.findall(text)}
        found |= {".".join(m).replace("-", "_") for m in of_command.findall(text)}
        assert found <= known | others, (path.name, sorted(found - known - others))
        named += len(found)
    assert named > 100
