"""Bad data, rewards and models: one line that says what, where and what to do; nothing foreign is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from perl.training.checkpoint import CheckpointManager
from tests.command_line import ErrorOf, json_lines, metrics, rewarded, run
from tests.pictures import png_header

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


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ("none.png", "there is no image file"),
        ("garbage.png", "is no image that Pillow can read; replace it"),
        ("empty.png", "is no image that Pillow can read; replace it"),
        ("huge.png", "the image is too large"),
        ("../outside.png", "leaves"),
        ("/etc/hostname", "leaves"),
        ("link.png", "image path link.png leaves"),
        ("https://example.com/x.png", "is not fetched; download the image"),
        (7, "an image is a int; give a path"),
    ],
)
def test_bad_images_are_found_before_anything_is_written(
    image: Any,
    match: str,
    short_recipe: Path,
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = short_recipe.parent
    (folder / "garbage.png").write_bytes(b"no image" * 20)
    (folder / "empty.png").touch()
    (folder / "huge.png").write_bytes(png_header(10**6, 10**6))
    (folder / "link.png").symlink_to("/etc/hostname")
    monkeypatch.setattr(
        "perl.data.pictures.to_rgb", lambda image: pytest.fail("an image was decoded")
    )
    said = error_of(
        "train", short_recipe, "--data.train", write_rows(short_recipe, images=["0.png", image])
    )
    assert said.startswith(f"{folder}/changed.jsonl line 4, image 2: ") and match in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": ["0.png"]}, "1 images but 2 <image> slots"),
        ({"images": ["0.png", "1.png", "2.png"]}, "3 images but 2 <image> slots"),
        ({"answer": "E"}, "answer 'E' names none of its 2 images (A to B or 1 to 2)"),
        ({"answer": ""}, "the answer is empty"),
        (
            {"kind": "nonsense"},
            "unknown kind 'nonsense'; use all, first_fixed, last:K, ordering, none",
        ),
        (
            {"kind": "ordering"},
            "needs an answer that is the letter of an option such as 'A. 2, 1, 3'",
        ),
        (
            {
                "question": "<image> <image> What is the order of events? A. 2, 1 B. 1, 2",
                "kind": "ordering",
                "should_change": False,
            },
            "draws a new right option, but should_change is false; set it to true, or the kind to none",
        ),
        (
            {"answer": "B", "should_change": False},
            "answer 'B' names image 2, which may move; set should_change to true, or kind to none",
        ),
    ],
)
def test_bad_rows_are_found_before_anything_is_written(
    changes: dict[str, Any], match: str, short_recipe: Path, error_of: ErrorOf
) -> None:
    data = write_rows(short_recipe, **changes)
    said = error_of("train", short_recipe, "--data.train", data)
    assert said.startswith(f"{data} line 4: ") and match in said
    as_eval = ("--data.eval", data, "--eval.examples", "6")
    assert error_of("train", short_recipe, *as_eval) == said
    assert not (short_recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("question", "options", "match"),
    [
        (
            "<image> <image> Is image 1 a three ?",
            (),
            'its text names image 1, which moves; set permutation.text = "references", or a kind',
        ),
        (
            "Image 1: <image> and this one: <image> Is image 1 a three ?",
            ("--permutation.text", "references"),
            "its text may name an image by 'Image 1', which cannot be rewritten for certain; write",
        ),
    ],
)
def test_texts_that_name_images(
    question: str, options: tuple[str, ...], match: str, short_recipe: Path, error_of: ErrorOf
) -> None:
    data = write_rows(short_recipe, question=question, answer="yes", should_change=False)
    said = error_of("train", short_recipe, "--data.train", data, *options)
    assert said.startswith("example 'row-3': ") and match in said


def test_data_sets_without_rows(short_recipe: Path, error_of: ErrorOf) -> None:
    folder = short_recipe.parent
    for name, text in {"empty.jsonl": "", "blank.jsonl": "\n\n", "list.json": "[]"}.items():
        (folder / name).write_text(text)
        said = error_of("train", short_recipe, "--data.train", folder / name)
        assert said == f"{folder / name}: the data set is empty; give one with rows"
    for source, match in {
        folder / "nowhere.jsonl": "there is no data file or folder",
        "bundled:cats": "unknown picture collection 'cats'",
    }.items():
        assert match in error_of("train", short_recipe, "--data.train", source)


def test_an_image_cut_short_stops_a_run_that_keeps_its_last_step(
    short_recipe: Path, error_of: ErrorOf
) -> None:
    folder = short_recipe.parent
    Image.effect_noise((200, 200), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:9000])
    data = write_rows(short_recipe, images=["0.png", "cut.png"])
    # One row a step in the stream's order: some steps are complete before row 4 comes.
    options = ("--train.steps", "9", "--train.examples-per-step", "1", "--filter.max-tries", "1")
    said = error_of("train", short_recipe, "--data.train", data, *options)
    assert f"{data} line 4, image 2: image file {folder}/cut.png is broken" in said
    complete = metrics(folder / "run")[-1]["step"]
    assert complete > 0
    newest = CheckpointManager(folder / "run" / "checkpoints", 2).load()
    assert newest is not None and (newest[1].stage, newest[1].step) == ("rl", complete)
    shutil.copy(folder / "whole.png", folder / "cut.png")
    assert run("resume", folder / "run") == 0
    assert [row["step"] for row in metrics(folder / "run")] == list(range(1, 10))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_is_there_stays_as_it_is(short_recipe: Path, error_of: ErrorOf) -> None:
    """Whether a mistake shows before a new run begins or, as the last one, when it has begun."""
    folder = short_recipe.parent / "run"
    train, small = ("train", short_recipe), ("--data.max-prompt-tokens", "5")
    assert "over data.max_prompt_tokens = 5" in error_of(*train, *small, "--overwrite")
    assert not folder.exists()
    assert run(*train) == 0
    before = content(folder)
    assert "is already there: go on with `perl-rl resume" in error_of(*train)
    for options, match in {
        ("--resume",): "exclude each other",
        ("--model.path", "/nowhere"): "there is no such folder",
        ("--model.path", folder / "models" / "final"): "would delete model.path",
        ("--data.train", "/nowhere.jsonl"): "there is no data file",
        ("--data.image-root", folder): "would delete data.image_root",
        ("--reward.functions", "acuracy", "--reward.weights", "1"): "did you mean 'accuracy'?",
        ("--run.trackers", "wandb"): "wandb is not installed",
        ("--run.trackers", "nonsense"): "nonsense is unknown",
        ("--loss.preset", "gpro"): "no preset named 'gpro'",
        ("--model.attention", "flash_attention_2"): "flash_attention_2 needs",
        small: "over data.max_prompt_tokens = 5",
    }.items():
        assert match in error_of(*train, "--overwrite", *options), options
    own = error_of("train", folder / "config.toml", "--overwrite")
    assert "would delete the recipe" in own
    image_token = "example row-3: the text itself holds <|image_pad|>; write <image> for an image"
    start_token = "example row-3: its demonstration holds <|vision_start|>, which stands for an"
    for changes, match in (
        ({"question": "A <image> B <image> <|image_pad|> ?"}, image_token),
        ({"demonstration": "<answer> A </answer> <|vision_start|>"}, start_token),
    ):
        data = write_rows(short_recipe, **changes)
        assert match in error_of(*train, "--data.train", data, "--overwrite")
    assert content(folder) == before
    assert run(*train, "--overwrite") == 0
    assert content(folder) != before
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_prompts_over_the_budget(short_recipe: Path, error_of: ErrorOf) -> None:
    folder = short_recipe.parent
    small = ("--data.max-prompt-tokens", "5")
    said = error_of("train", short_recipe, *small)
    assert said.startswith("example row-") and "over data.max_prompt_tokens = 5; raise it" in said
    drop = (*small, "--data.overlong", "drop", "--overwrite")
    said = error_of("train", short_recipe, *drop)
    assert "prompts over data.max_prompt_tokens = 5; raise it or lower model.max_pixels" in said
    said = error_of("train", short_recipe, *drop, "--cold-start.steps", "1")
    assert "over data.max_prompt_tokens = 5" in said
    # The micro-batch has to hold a prompt and the longest completion.
    narrow = ("--train.tokens-per-micro-batch", "9", "--overwrite")
    said = error_of("train", short_recipe, *narrow)
    assert said.startswith("example row-") and (
        "over the 5 that train.tokens_per_micro_batch = 9 leaves beside rollout.max_new_tokens = 4; "
        "raise it" in said
    )
    said = error_of("train", short_recipe, "--train.tokens-per-micro-batch", "4", "--overwrite")
    assert "leaves no room for a prompt beside rollout.max_new_tokens = 4; raise the first" in said
    data = write_rows(short_recipe, question="A <image> B <image>" + " three" * 60)
    fitting = ("--data.train", data, "--data.max-prompt-tokens", "50", "--data.overlong", "drop")
    every = ("--train.examples-per-step", "6", "--filter.max-tries", "1", "--overwrite")
    assert run("train", short_recipe, *fitting, *every) == 0
    row = metrics(folder / "run")[-1]
    assert (row["prompts/dropped"], row["groups/seen"]) == (1, 5)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (
            "def f(**c): raise RuntimeError('first\\nsecond')",
            "raised RuntimeError: first second on",
        ),
        ("def f(**c): return [1.0]", "returned 1 values for 8 completions"),
        ("def f(prompts, **c): return ['x'] * len(prompts)", "returned 'x' for example"),
        ("def f(:", "raised SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'; install it"),
        ("def g(**c): return []", "has no 'f'"),
        ("f = 1", "'f' is a int, not a function"),
    ],
)
def test_bad_reward_functions(
    source: str, match: str, short_recipe: Path, error_of: ErrorOf
) -> None:
    """None of these takes a step, so none leaves a run folder."""
    assert match in error_of("train", short_recipe, *rewarded(short_recipe.parent, source))
    assert not (short_recipe.parent / "run").exists()


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
    ("damage", "match"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), "its tokenizer has no <|image_pad|>"),
        (without("tokenizer.json"), "no processor can be read there"),
        (without("processor_config.json"), "copy the tokenizer and preprocessor files"),
        (without("chat_template.jinja"), "no chat template; add chat_template.jinja"),
        (without("config.json"), "is no model folder: it has no config.json"),
        (without("model.safetensors"), "has no weights: copy"),
        (pickled, "pickled (pytorch_model.bin), and pickle is never loaded"),
        (with_file("config.json", '{"model_type": "llama"}'), "the family llama is not supported"),
        (with_file("config.json", "[]"), "no model can be read there"),
        (with_file("config.json", "{"), "no model can be read there"),
        (with_file("tokenizer_config.json", "{"), "no processor can be read there"),
        (with_file("model.safetensors", b"garbage!" * 99), "damaged weights (model.safetensors"),
        (with_file("adapter_config.json", "{}"), "holds a LoRA adapter; merge it"),
        (change_tensors(lambda t, name: t.pop(name)), "its weights lack 1 tensors, model.visual.p"),
        (change_tensors(lambda t, name: t.update({name: torch.zeros(3)})), "cannot be loaded"),
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
        "a LoRA adapter",
        "a tensor is missing",
        "a tensor of another size",
    ],
)
def test_bad_models(
    damage: Callable[[Path], None],
    match: str,
    model: Path,
    short_recipe: Path,
    error_of: ErrorOf,
) -> None:
    damage(model)
    said = error_of("train", short_recipe, "--model.path", model)
    assert said.startswith(f"model.path = {model}") and match in said
    assert str(model) in error_of("generate", model, "--prompt", "three")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "of_its_own"])
def test_code_in_a_model_folder_is_never_run(
    family: str, model: Path, short_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    code = run("train", short_recipe, "--model.path", model)
    assert not executed.exists()
    assert code == (0 if family == "qwen2_5_vl" else 2)
    assert ("the family of_its_own is not supported" in capsys.readouterr().err) == (code == 2)


def test_nothing_unpickles_and_no_foreign_code_is_trusted() -> None:
    sources = [p for folder in ("perl", "kernels") for p in (ROOT / folder).rglob("*.py")]
    text = "\n".join(p.read_text() for p in sources)
    loads = ("torch.load(", "np.load(", "allow_pickle", "import pickle", "trust_remote_code=True")
    assert [word for word in loads if word in text] == []
