"""What others get wrong between a trainer and a server, done here on purpose: the difference to the trainer shows each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import SamplingParams
from perl.rollout.vllm import engine as engine_module
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.types import EncodedPrompt, Message
from tests.stand_ins import processes
from tests.vllm_checks import apart, changed

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=8)


@pytest.fixture
def asked(processor: Processor) -> EncodedPrompt:
    """Pictures of the same size, which a wrong order does not show by."""
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (28, 28, 3), np.uint8)) for _ in range(3)]
    question = "A <image> B <image> C <image> Which image shows 3"
    return processor.encode_messages([Message("user", question)], pictures)


def measured(
    engine: VLLMEngine, policy: Policy, processor: Processor, asked: EncodedPrompt, version: int
) -> float:
    with engine.serving(version):
        (found,) = engine.generate([asked], PARAMS, seed=version)
    return apart(policy, processor, asked, found)


def caches_kept(post: Callable) -> Callable:
    async def instead(server: Server, path: str, body: Any = None, **query: str) -> Any:
        if path == "/pause":
            query["clear_cache"] = "false"
        return await post(server, path, body, **query)

    return instead


def prefixes_cleared_only(post: Callable) -> Callable:
    async def instead(server: Server, path: str, body: Any = None, **query: str) -> Any:
        if path == "/pause":
            query["clear_cache"] = "false"
        answer = await post(server, path, body, **query)
        if path == "/pause":
            await post(server, "/reset_prefix_cache")
        return answer

    return instead


def sync_skipped(post: Callable) -> Callable:
    async def instead(server: Server, path: str, body: Any = None, **query: str) -> Any:
        if path in ("/start_weight_update", "/update_weights"):
            return {}
        if path == "/finish_weight_update":
            said = {"new_version": body["weight_version"]}
            return await post(server, "/update_weight_version", said)
        return await post(server, path, body, **query)

    return instead


@pytest.mark.parametrize("fault", [caches_kept, prefixes_cleared_only, sync_skipped])
def test_a_faulty_sync_is_caught(
    fault: Callable,
    engine: VLLMEngine,
    policy: Policy,
    processor: Processor,
    asked: EncodedPrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert measured(engine, policy, processor, asked, 0) <= 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(Server, "post", fault(Server.post))
        changed(policy)
        found = measured(engine, policy, processor, asked, 1)
    print(f"\n{fault.__name__}: |Δ log p| {found:.3f}")
    assert found > 1e-2
    assert measured(engine, policy, processor, asked, 2) <= 1e-5


def test_pictures_in_a_wrong_order_are_caught(
    engine: VLLMEngine,
    policy: Policy,
    processor: Processor,
    asked: EncodedPrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = engine_module.features
    monkeypatch.setattr(
        engine_module, "features", lambda images, places: features(images[::-1], places)
    )
    found = measured(engine, policy, processor, asked, 0)
    print(f"\npictures in reverse: |Δ log p| {found:.3f}")
    assert found > 1e-2


def test_a_tied_heads_old_copy_is_caught(
    serving: Callable,
    folder: Path,
    plugin_path: Path,
    policy: Policy,
    processor: Processor,
    asked: EncodedPrompt,
    tmp_path: Path,
) -> None:
    """On a CPU alone: a GPU's head computes with the weight itself."""
    packages = tmp_path / "packages"
    copytree(plugin_path, packages)
    plugin = packages / "perl" / "rollout" / "vllm" / "plugin.py"
    packed_anew = "method.process_weights_after_loading(module)"
    assert plugin.read_text().count(packed_anew) == 1
    plugin.write_text(plugin.read_text().replace(packed_anew, "pass"))
    with serving(folder, packages=packages) as url:
        engine = VLLMEngine([Server(url, None, 60.0, 64)], policy, processor, processes())
        assert measured(engine, policy, processor, asked, 0) <= 1e-5
        changed(policy)
        found = measured(engine, policy, processor, asked, 1)
        engine.transfer.close()
    print(f"\nthe head's old copy: |Δ log p| {found:.3f}")
    assert found > 1e-2
