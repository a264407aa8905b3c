"""Which model and which settings the name of a run, a folder or a hub model stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perl.config import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, StageConfig
from perl.recipe import save_config
from perl.rollout.opening import config_of, engine_and_encoder, fingerprint
from tests.messages import refused, tells

STAGES = (
    StageConfig(name="warm", kind="cold_start", set={}),
    StageConfig(name="easy", kind="rl", set={"rollout": {"max_new_tokens": 7}}),
    StageConfig(name="hard", kind="rl", set={"rollout": {"max_new_tokens": 9}}),
)


def run_folder(folder: Path, *models: str, at: str = "", **sections: object) -> Path:
    """A run that has left these models, and with `at` step-7 of an earlier stage and step-10 of that point."""
    folder.mkdir()
    save_config(Config(**sections), folder / "config.toml")  # type: ignore[arg-type]
    for name in models:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    for step, point in (("7", "warm"), ("10", at)) if at else ():
        manifest = folder / "checkpoints" / f"step-{step}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"format": 1, "progress": {"stage": point}}))
    return folder


@pytest.mark.parametrize(
    ("asked", "models", "at", "found", "tokens"),
    [
        ("", [], "warm", "checkpoints/step-10", 5),
        ("", ["warm"], "before", "checkpoints/step-10", 5),
        ("", ["warm"], "easy", "checkpoints/step-10", 7),
        ("", ["easy"], "after easy", "checkpoints/step-10", 7),
        # One that was given more steps.
        ("", ["easy", "final"], "hard", "checkpoints/step-10", 9),
        ("", ["easy", "final"], "done", "models/final", 9),
        ("", ["initial", "final"], "", "models/final", 9),
        ("checkpoints/step-7", ["final"], "done", "checkpoints/step-7", 5),
        ("models/easy", ["easy", "final"], "done", "models/easy", 7),
        ("models/final", ["easy", "final"], "hard", "models/final", 9),
        (
            "models/easy/adapter",
            ["easy", "easy/adapter", "final"],
            "done",
            "models/easy/adapter",
            7,
        ),
    ],
)
def test_a_run_and_what_lies_in_it_come_with_the_settings_of_their_stage(
    asked: str,
    models: list[str],
    at: str,
    found: str,
    tokens: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run_folder(
        tmp_path / "run",
        *(f"models/{name}" for name in models),
        at=at,
        stages=STAGES,
        rollout=RolloutConfig(max_new_tokens=5),
        model=ModelConfig(path="m", chat_template="gone.jinja"),
    )
    config = config_of(str(folder / asked), rollout={"temperature": 0.5, "kv_cache_tokens": None})
    # What a run leaves has its chat template with it.
    assert config.model == ModelConfig(path=str(folder / found))
    assert config.rollout == RolloutConfig(max_new_tokens=tokens, temperature=0.5)
    said = capsys.readouterr().err
    assert (str(folder / found) in said) == (not asked)
    assert ("perl-rl resume" in said) == (not asked and found != "models/final")


def test_a_model_of_a_run_is_one_from_within_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "run", "models/easy/adapter", stages=STAGES)
    monkeypatch.chdir(folder / "models" / "easy")
    for name in ("adapter", "."):
        assert config_of(name).rollout.max_new_tokens == 7


def test_a_damaged_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", at="easy", stages=STAGES)
    newest = folder / "checkpoints" / "step-10"
    (newest / "manifest.json").write_text("{")
    assert config_of(str(folder)).model.path == str(newest.with_name("step-7"))
    with refused(newest):
        config_of(str(newest))


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", at="easy", stages=STAGES)
    newest = folder / "checkpoints" / "step-10"
    (newest / "manifest.json").write_text('{"format": 3, "progress": {"stage": "easy"}}')
    for asked in (folder, newest):
        with refused(newest, 3, 2):
            config_of(str(asked))


def test_a_run_of_several_seeds_gives_its_first(tmp_path: Path) -> None:
    models = ("seed-4/models/final", "seed-3/models/final")
    folder = run_folder(tmp_path / "run", *models, run=RunConfig(seeds=(4, 3)))
    assert config_of(str(folder)).model.path == str(folder / "seed-4" / "models" / "final")


def test_models_that_no_run_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("model", str(tmp_path / "model"), "Qwen/Qwen2-VL-2B", "some-model"):
        config = config_of(name)
        assert config.model.path == name and config.rollout == Config().rollout


def test_names_that_stand_for_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/empty").mkdir(parents=True)
    run_folder(tmp_path / "runs" / "new", "models/initial")
    Path("lone").mkdir()
    (Path("lone") / "manifest.json").touch()
    with refused("lone", "config.toml"):
        config_of("lone")
    for name in ("runs/nope", "./nope", "../nope", "~/no/nope", "/nope", "a/b/c"):
        with refused(name, "a run folder", "a model folder"):
            config_of(name)
    with refused("runs/empty", "config.toml", "config.json"):
        config_of("runs/empty")
    with refused("runs/new", "perl-rl resume"):
        config_of("runs/new")


def test_engine_and_encoder_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are merged in what a run leaves, so that none are made anew."""
    config = Config(
        model=ModelConfig(path="m", lora_rank=8, max_pixels=999),
        data=DataConfig(max_prompt_tokens=77, overlong="drop", instruction="box", system="S"),
        rollout=RolloutConfig(kv_cache_tokens=700),
    )
    loaded: list[Any] = []

    def load(path: str, model: ModelConfig, *device: Any) -> Any:
        loaded.append((path, model))
        return SimpleNamespace(to=lambda device: "policy")

    monkeypatch.setattr("perl.model.loading.load_policy", load)
    monkeypatch.setattr("perl.model.loading.load_processor", load)
    monkeypatch.setattr("perl.rollout.engines.in_process", lambda *parts: parts)
    (policy, processor, tokens), encoder = engine_and_encoder(config)
    assert loaded == [("m", config.model), ("m", replace(config.model, lora_rank=0))]
    assert (policy, tokens, encoder.processor) == ("policy", 700, processor)
    assert (encoder.limit.tokens, encoder.overlong) == (77, "drop")
    assert (encoder.instruction.name, encoder.instruction.system) == ("box", "S")
    tells(encoder.limit.advice, "--max-prompt-tokens", "--overlong drop")
    less = replace(config, rollout=RolloutConfig(kv_cache_tokens=588))
    _, encoder = engine_and_encoder(less)
    assert encoder.limit.tokens == 588 - 512
    assert "--max-prompt-tokens" not in encoder.limit.advice


def test_a_fingerprint_changes_with_the_weights(tmp_path: Path) -> None:
    """Head, middle and tail of each file, its size and its name."""
    size = 1 << 20

    def changed(place: int | None = None, size: int = size, name: str = "a") -> str:
        for old in tmp_path.glob("*.safetensors"):
            old.unlink()
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        return fingerprint(str(tmp_path))

    same = changed()
    assert changed() == same and len(same) == 16
    samples = (0, (1 << 16) - 1, size // 2, size // 2 + (1 << 16) - 1, size - (1 << 16), size - 1)
    others = [changed(place) for place in samples]
    others += [changed(size=size + 1), changed(name="b"), changed(0, 9), changed(8, 9)]
    assert len({same, *others}) == len(others) + 1
    (tmp_path / "b.safetensors").write_bytes(b"x")
    assert fingerprint(str(tmp_path)) not in {same, *others}
    assert fingerprint("Qwen/Qwen2-VL-2B") == ""
