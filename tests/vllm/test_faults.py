"""What others get wrong between a trainer and a server, done here on purpose: the probe behind each sync stops it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.vllm import engine as engine_module
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.serve import plugin_folder
from perl.types import RunFailed
from tests.stand_ins import processes
from tests.vllm_checks import changed


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


def caught(engine: VLLMEngine, version: int) -> bool:
    """Whether the probe stops what the present weights are to sample, for its log-probs."""
    try:
        with engine.serving(version):
            return False
    except RunFailed as error:
        print("\n", error)
        return "other log-probs than the trainer" in str(error)


@pytest.mark.parametrize("fault", [caches_kept, prefixes_cleared_only, sync_skipped])
def test_a_faulty_sync_is_caught(
    fault: Callable, engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not caught(engine, 0)
    changed(policy)
    with monkeypatch.context() as patch:
        patch.setattr(Server, "post", fault(Server.post))
        assert caught(engine, 1)
    assert not caught(engine, 2)


def test_pictures_in_a_wrong_order_are_caught(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = engine_module.features
    monkeypatch.setattr(
        engine_module, "features", lambda images, places: features(images[::-1], places)
    )
    assert caught(engine, 0)


def test_a_tied_heads_old_copy_is_caught(
    serving: Callable[..., AbstractContextManager[str]],
    folder: Path,
    policy: Policy,
    processor: Processor,
    tmp_path: Path,
) -> None:
    """On a CPU alone: a GPU's head computes with the weight itself."""
    packages = tmp_path / "packages"
    copytree(plugin_folder(), packages)
    plugin = packages / "perl" / "rollout" / "vllm" / "plugin.py"
    packed_anew = "method.process_weights_after_loading(module)"
    assert plugin.read_text().count(packed_anew) == 1
    plugin.write_text(plugin.read_text().replace(packed_anew, "pass"))
    with serving(folder, packages=packages) as url:
        engine = VLLMEngine([Server(url, None, 60.0, 64)], policy, processor, processes())
        assert not caught(engine, 0)
        changed(policy)
        assert caught(engine, 1)
        engine.close()
