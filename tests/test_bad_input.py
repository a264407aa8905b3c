"""Bad data, rewards and models: one line that says what, where and what to do; nothing foreign is run."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perl.model.loading import load_policy
from perl.recipe import load_recipe
from perl.training.checks import check_setup
from tests.command_line import ErrorOf, json_lines, rewarded, run
from tests.messages import refused, tells

ROOT = Path(__file__).parents[1]

CUSTOM_CODE = """
from pathlib import Path
Path({flag!r}).touch()
class Custom: ...
"""


def write_rows(recipe: Path, **changes: Any) -> Path:
    """The recipe's data with changes to its fourth row."""
    rows = json_lines(recipe.with_name("data.jsonl"))
    rows[3] |= changes
    path = recipe.with_name("changed.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXT = {"question": "<image> <image> Is image 1 a three ?", "answer": "yes", "should_change": False}


@pytest.mark.parametrize(
    ("changes", "options", "names"),
    [
        (
            {"images": ["0.png", "none.png"]},
            (),
            ["changed.jsonl line 4, image 2", "none.png", "path"],
        ),
        ({"answer": "E"}, (), ["changed.jsonl line 4", "'E'", "A to B"]),
        (
            TEXT,
            (),
            [
                "changed.jsonl line 4",
                "example 'row-3'",
                "image 1",
                'permutation.text = "references"',
            ],
        ),
        (
            TEXT | {"question": f"Image 1: <image> and this one: {TEXT['question'][8:]}"},
            ("--permutation.text", "references"),
            ["example 'row-3'", "'Image 1'"],
        ),
    ],
)
def test_mistakes_in_the_data_are_found_before_anything_is_written(
    changes: dict[str, Any],
    options: tuple[str, ...],
    names: list[str],
    short_recipe: Path,
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training and in held-out data, and images by their headers alone."""
    monkeypatch.setattr(
        "perl.data.pictures.to_rgb", lambda image: pytest.fail("an image was decoded")
    )
    data = write_rows(short_recipe, **changes)
    for source in (("--data.train", data), ("--data.eval", data, "--eval.examples", "6")):
        tells(error_of("train", short_recipe, *source, *options), *names)
    assert not (short_recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ((), ["data.jsonl", "accuracy", "format", "data.instruction"]),
        (("--data.instruction", "box"), ["data.jsonl", "format", "data.instruction"]),
        (("--data.instruction", "", "--reward.functions", "choice"), []),
        (("--cold-start.steps", "1"), ["data.jsonl", "accuracy"]),  # They show <answer> tags.
    ],
)
def test_what_no_prompt_asks_for_is_told_before_a_run_begins(
    options: tuple[str, ...],
    names: list[str],
    short_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("perl.training.commands._go", lambda *_, **__: None)
    monkeypatch.setattr("perl.training.commands.RunFolder.settle", lambda _: None)
    assert run("train", short_recipe, *options) == 0
    own = [r for r in caplog.records if r.name == "perl.rollout.instruction"]
    told = [r.getMessage() for r in own if r.levelname == "WARNING"]
    forms = [said for said in told if "data.instruction" in said]
    assert len(forms) == bool(names)
    if names:
        tells(forms[0], *names)
    (unknown,) = (said for said in told if "model.path" in said)
    tells(unknown, "data.jsonl", "Which", *["final"] * ("box" in options))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_is_there_stays_as_it_is(short_recipe: Path, error_of: ErrorOf) -> None:
    """Whether a mistake shows before a new run begins or, as the last one, when it has begun."""
    folder = short_recipe.parent / "run"
    train, small = ("train", short_recipe), ("--data.max-prompt-tokens", "5")
    budget = "data.max_prompt_tokens = 5"
    tells(error_of(*train, *small, "--overwrite"), "example row-2", budget, "model.max_pixels")
    assert not folder.exists()
    assert run(*train) == 0
    before = content(folder)
    tells(error_of(*train), f"run.dir = {folder}", f"perl-rl resume {folder}", "--overwrite")
    for options, names in {
        ("--resume",): ["--overwrite", "--resume"],
        ("--model.path", "/nowhere"): ["model.path = /nowhere", "path"],
        ("--model.path", folder / "models" / "final"): ["model.path", "--run.dir"],
        ("--data.train", "/nowhere.jsonl"): ["/nowhere.jsonl", "path"],
        ("--data.image-root", folder): ["data.image_root", "--run.dir"],
        ("--data.mix", folder / "config.toml"): ["data.mix", "--run.dir"],
        ("--reward.functions", "acuracy"): ["acuracy", "'accuracy'"],
        ("--reward.weights", "1"): [
            "reward.weights = [1.0]",
            "reward.functions",
            "accuracy, format",
        ],
        ("--run.trackers", "wandb"): ["run.trackers", "wandb", "pip install"],
        ("--run.trackers", "nonsense"): ["run.trackers", "nonsense"],
        ("--loss.preset", "gpro"): ["loss", "'gpro'", "grpo"],
        ("--train.schedule", "cosin"): ["train.schedule", "'cosin'", "cosine"],
        ("--cold-start.schedule", "linear(x=1)"): ["cold_start.schedule", "linear(x=1)"],
        ("--model.attention", "flash_attention_2"): ["model.attention = flash_attention_2"],
        ("--train.tokens-per-micro-batch", "4"): [
            "train.tokens_per_micro_batch = 4",
            "rollout.max_new_tokens = 4",
        ],
        # The micro-batch has to hold a prompt and the longest completion.
        ("--train.tokens-per-micro-batch", "9"): [
            "example row-2",
            "train.tokens_per_micro_batch = 9",
            "rollout.max_new_tokens = 4",
        ],
        small: ["example row-2", budget, "model.max_pixels"],
        (*small, "--data.overlong", "drop"): [budget, "model.max_pixels"],
        (*small, "--data.overlong", "drop", "--cold-start.steps", "1"): [budget, 64],
    }.items():
        tells(error_of(*train, "--overwrite", *options), *names)
    own = folder / "config.toml"
    tells(error_of("train", own, "--overwrite"), "the recipe", own, "--run.dir")
    for changes, names in (
        (
            {"question": "A <image> B <image> <|image_pad|> ?"},
            ["example row-3", "<|image_pad|>", "<image>"],
        ),
        (
            {"demonstration": "<answer> A </answer> <|vision_start|>"},
            ["example row-3", "demonstration", "<|vision_start|>"],
        ),
    ):
        data = write_rows(short_recipe, **changes)
        tells(error_of(*train, "--data.train", data, "--overwrite"), *names)
    assert content(folder) == before
    assert run(*train, "--overwrite") == 0
    assert content(folder) != before
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(**c): raise RuntimeError('first\\nsecond')", ["'f'", "RuntimeError: first second"]),
        ("def f(prompts, **c): return ['x'] * len(prompts)", ["'f'", "'x'", "example 'row-0'"]),
        ("def f(:", ["reward.py", "SyntaxError"]),
    ],
)
def test_bad_reward_functions(
    source: str, names: list[str], short_recipe: Path, error_of: ErrorOf
) -> None:
    """None of these takes a step, so none leaves a run folder."""
    folder = short_recipe.parent
    tells(error_of("train", short_recipe, *rewarded(folder, source)), *names)
    assert not (folder / "run").exists()


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), tmp_path / "model"))


def without(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names] and None


def with_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(data) and None


def pickled(model: Path) -> None:
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def change_tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    """Changes the weights; it is given the name of the patch embedding."""

    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors, next(name for name in tensors if name.endswith("patch_embed.proj.weight")))
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), ["<|image_pad|>", "tokenizer"]),
        (without("tokenizer.json"), ["processor", "tokenizer"]),
        (without("processor_config.json"), ["processor", "preprocessor"]),
        (without("chat_template.jinja"), ["chat_template.jinja"]),
        (without("config.json"), ["config.json", "path"]),
        (without("model.safetensors"), ["weights", ".safetensors"]),
        (pickled, ["pytorch_model.bin", "safetensors"]),
        (with_file("config.json", '{"model_type": "llama"}'), ["llama", "qwen2_5_vl"]),
        (with_file("config.json", "[]"), ["model"]),
        (with_file("config.json", "{"), ["model"]),
        (with_file("tokenizer_config.json", "{"), ["processor"]),
        (with_file("model.safetensors", b"garbage!" * 99), ["model.safetensors", "copy"]),
        (with_file("adapter_config.json", "{}"), ["adapter_config.json", "peft"]),
        (change_tensors(lambda t, name: t.pop(name)), ["1 tensors", "model.visual", "copy"]),
        (change_tensors(lambda t, name: t.update({name: torch.zeros(3)})), ["weights"]),
    ],
    ids=[
        "no tokenizer",
        "no tokenizer.json",
        "no image processor",
        "no chat template",
        "no config.json",
        "no weights",
        "pickled weights",
        "another family",
        "config.json is a list",
        "config.json is cut",
        "tokenizer_config.json is cut",
        "weights are garbage",
        "an adapter of nothing",
        "a tensor is missing",
        "a tensor of another size",
    ],
)
def test_bad_models(
    damage: Callable[[Path], None], names: list[str], model: Path, short_recipe: Path
) -> None:
    """Before a run begins, but for the weights themselves, which are read when it does."""
    damage(model)
    with refused(f"model.path = {model}", *names):
        load(short_recipe, model)


def load(recipe: Path, model: Path) -> None:
    """What a run does with a model folder before its first step."""
    config = load_recipe(str(recipe))
    config = replace(config, model=replace(config.model, path=str(model)))
    check_setup(config)
    load_policy(str(model), config.model, torch.device("cpu"))


def test_a_bad_model_is_one_line_of_any_command(
    model: Path, short_recipe: Path, error_of: ErrorOf
) -> None:
    (model / "model.safetensors").unlink()
    place = f"model.path = {model}"
    tells(error_of("train", short_recipe, "--model.path", model), place, ".safetensors")
    tells(error_of("generate", model, "--prompt", "three"), place, ".safetensors")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "of_its_own"])
def test_code_in_a_model_folder_is_never_run(family: str, model: Path, short_recipe: Path) -> None:
    executed = model.with_name("executed")
    (model / "custom.py").write_text(CUSTOM_CODE.format(flag=str(executed)))
    classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    auto_map = dict.fromkeys(classes, "custom.Custom")
    auto_map["AutoTokenizer"] = ["custom.Custom", "custom.Custom"]  # type: ignore[assignment]
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text()) | {"auto_map": auto_map}
        if name == "config.json":
            values["model_type"] = family
        (model / name).write_text(json.dumps(values))
    with nullcontext() if family == "qwen2_5_vl" else refused("model.path", "of_its_own"):
        load(short_recipe, model)
    assert not executed.exists()


def test_nothing_unpickles_and_no_foreign_code_is_trusted() -> None:
    sources = [p for folder in ("perl", "kernels") for p in (ROOT / folder).rglob("*.py")]
    text = "\n".join(p.read_text() for p in sources)
    loads = ("torch.load(", "np.load(", "allow_pickle", "import pickle", "trust_remote_code=True")
    assert [word for word in loads if word in text] == []
