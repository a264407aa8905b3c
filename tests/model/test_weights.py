"""Models that lie over others: a run's checkpoints and LoRA adapters, loaded as the model that they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perl.config import Config, ModelConfig
from perl.model.loading import check_model, load_policy, load_processor
from perl.model.policy import Policy
from perl.model.sources import layers_of
from perl.recipe import save_config
from perl.training.saving.checkpoint import CheckpointManager, Progress
from tests.messages import refused

CPU = torch.device("cpu")
LORA = {"lora_rank": 2, "lora_alpha": 3.0}
Folder = Callable[[str], Path]


def trained(path: Path | str, **model: Any) -> Policy:
    """A policy whose trained weights are others than those of its model."""
    torch.manual_seed(0)
    policy = load_policy(str(path), ModelConfig(path=str(path), **model), CPU)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return policy


def checkpoint_of(policy: Policy, run: Path, **model: Any) -> Path:
    """The checkpoint of a run that has come to this policy."""
    run.mkdir()
    save_config(Config(model=ModelConfig(**model)), run / "config.toml")
    return CheckpointManager(run / "checkpoints", 1).save(policy, None, Progress("rl", 5))


def weights_of(path: Path, **model: Any) -> dict[str, torch.Tensor]:
    policy = load_policy(str(path), ModelConfig(path=str(path), **model), CPU)
    assert all(p.requires_grad for p in policy.parameters())
    # The run's own share of layers is not the reader's.
    assert not any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())
    return policy.state_dict()


def exported(policy: Policy, folder: Path, processor: Path) -> Path:
    policy.save_pretrained(folder)
    load_processor(str(processor), ModelConfig()).save(folder)
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "targets", [(), ("v_proj", "up_proj", "down_proj", r"model\.visual\..*\.(qkv|mlp\.0)")]
)
def test_an_adapter_makes_the_merged_model_in_peft_and_here(
    targets: tuple[str, ...], tmp_path: Path, tiny_folder: Folder
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = tiny_folder("tiny-qwen2.5-vl")
    policy = trained(base, freeze_vision=True, lora_targets=targets, **LORA)
    policy.save_adapter(tmp_path / "adapter", str(base))
    final = exported(policy, tmp_path / "final", base)
    theirs = [AutoModelForImageTextToText.from_pretrained(f).eval() for f in (base, final)]
    plain, merged = theirs[0], theirs[1]
    ids = torch.arange(3, 12)[None]
    before, expected = (model(input_ids=ids).logits for model in (plain, merged))
    pixels, grid = torch.rand(16, 1176), torch.tensor([[1, 4, 4]])
    blank, seen = (m.model.get_image_features(pixels, grid).pooler_output for m in (plain, merged))
    assert torch.equal(torch.cat(blank), torch.cat(seen)) == (not targets)
    # peft reads the model's name from the adapter.
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    found = adapted(input_ids=ids).logits
    features = plain.model.get_image_features(pixels, grid).pooler_output
    assert torch.allclose(torch.cat(features), torch.cat(seen), atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(
        before, expected, atol=0.1
    )
    assert same(weights_of(tmp_path / "adapter"), weights_of(final))
    # New adapters over it are trained from the merged weights.
    config = ModelConfig(path=str(tmp_path / "adapter"), lora_rank=4)
    with torch.no_grad():
        again = load_policy(config.path, config, CPU).base(input_ids=ids).logits
    assert torch.allclose(again, expected, atol=1e-5)


def damaged(**changes: Any) -> Callable[[Path], None]:
    """Of an adapter's config."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (damaged(base_model_name_or_path=None), ["base_model_name_or_path"]),
        (damaged(base_model_name_or_path="/no/model"), ["/no/model"]),
        (damaged(peft_type="IA3"), ["IA3", "LORA"]),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            ["adapter_model.safetensors"],
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), ["damaged"]),
        (damaged(r=3), ["adapter"]),
        (damaged(target_modules=r".*language_model.*\.up_proj"), ["adapter"]),
    ],
    ids=[
        "no base",
        "a base that is not there",
        "another kind",
        "no weights",
        "damaged",
        "another rank",
        "other layers",
    ],
)
def test_adapters_that_do_not_fit(
    damage: Callable[[Path], None], names: list[str], tmp_path: Path, tiny_folder: Folder
) -> None:
    base = tiny_folder("tiny-qwen2.5-vl")
    folder = tmp_path / "adapter"
    trained(base, freeze_vision=True, **LORA).save_adapter(folder, str(base))
    damage(folder)
    with refused("model.path", *names):
        weights_of(folder)


def test_an_adapter_over_itself_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(text)
    with refused("adapter_config.json"):
        check_model(str(tmp_path))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_folder: Folder) -> None:
    base = tiny_folder("tiny-qwen2.5-vl")
    run = tmp_path / "run"
    checkpoint = checkpoint_of(trained(base, **LORA), run, path=str(base), lora_rank=3)
    with refused(checkpoint, "config.toml", "[model]"):
        weights_of(checkpoint)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"freeze_vision": True, "gradient_checkpointing": 1.0},
        LORA,
        {**LORA, "freeze_vision": True},
    ],
    ids=["all", "frozen tower", "adapters and tower", "adapters"],
)
def test_a_checkpoint_is_the_model_that_would_be_exported(
    model: dict[str, Any], tmp_path: Path, tiny_folder: Folder
) -> None:
    base = tiny_folder("tiny-qwen2.5-vl")
    policy = trained(base, **model)
    checkpoint = checkpoint_of(policy, tmp_path / "run", path=str(base), **model)
    assert layers_of(str(tmp_path / "run")) == [str(checkpoint), str(base)]
    weights = weights_of(checkpoint)
    assert same(weights, weights_of(exported(policy, tmp_path / "final", base)))
    assert not same(weights, weights_of(base))


def test_in_bfloat16_adapters_are_merged_in_float32_and_rounded_once(
    tmp_path: Path, tiny_folder: Folder
) -> None:
    """Whether from the policy, from its adapters or from a checkpoint."""
    from peft.tuners.lora import Linear

    base, model = tiny_folder("tiny-qwen2.5-vl"), {**LORA, "freeze_vision": True}
    model["dtype"] = "bfloat16"
    policy = trained(base, **model)
    exact = {
        f"model.{name}.weight": (
            module.base_layer.weight.float()
            + 1.5
            * module.lora_B["default"].weight.float()
            @ module.lora_A["default"].weight.float()
        ).bfloat16()
        for name, module in policy.base.named_modules()
        if isinstance(module, Linear)
    }
    assert len(exact) == 28
    final = exported(policy, tmp_path / "final", base)
    found = weights_of(final, dtype="bfloat16")
    assert all(torch.equal(found[name], weight) for name, weight in exact.items())
    policy.save_adapter(tmp_path / "adapter", str(base))
    assert same(weights_of(tmp_path / "adapter", dtype="bfloat16"), found)
    checkpoint = checkpoint_of(policy, tmp_path / "run", path=str(base), **model)
    assert same(weights_of(checkpoint, dtype="bfloat16"), found)
    # Nothing else is said of the dtype than what the weights have, and they are read in any.
    text = json.loads((final / "config.json").read_text())
    assert {text[part]["dtype"] for part in ("text_config", "vision_config")} == {"bfloat16"}
    assert text["dtype"] == "bfloat16"
    wide = weights_of(final, dtype="float32")
    assert all(torch.equal(wide[name], weight.float()) for name, weight in found.items())
