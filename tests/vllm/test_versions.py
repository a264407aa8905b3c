"""Which weights sampled which token, where weights change under requests that are kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any

import httpx2
import numpy as np
import pytest

from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import Completion, SamplingParams
from perl.rollout.vllm.client import Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.types import RunFailed
from tests.vllm_checks import changed, differences, prompt

PARAMS = SamplingParams(n=64, temperature=1.0, max_new_tokens=400)


def tokens_generated(url: str) -> float:
    found = re.search(
        r"^vllm:generation_tokens_total\{.*\} (.*)$", httpx2.get(f"{url}/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


def across_an_update(
    url: str, engine: VLLMEngine, policy: Policy, processor: Processor, update: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Of each completion of two versions the largest |Δ log p| of the first's tokens under its weights, and of the second's."""
    asked, before = prompt(processor, 2, 0, 1), deepcopy(policy)
    completions: list[Completion] = []
    with engine.serving(0):
        generated = tokens_generated(url)
        work = Thread(target=lambda: completions.extend(engine.generate([asked], PARAMS, 0)[0]))
        work.start()
        while tokens_generated(url) < generated + 1000 and work.is_alive():
            time.sleep(0.05)
        changed(policy)
        update()
        work.join()
    two = [c for c in completions if len(c.weight_versions) == 2]
    assert len(two) > 5
    by_old = differences(before, processor, asked, two)
    by_new = differences(policy, processor, asked, two)
    old, new, ends = [], [], []
    for completion, under_old, under_new in zip(two, by_old, by_new, strict=True):
        first, second = completion.weight_versions
        assert (first.version, first.start) == (0, 0) and first.end > 1
        assert tuple(second) == (1, first.end, len(completion.token_ids))
        old.append(float(np.abs(under_old[: first.end]).max()))
        new.append(float(np.abs(under_new[first.end :]).max()))
        ends.append(first.end)
    print(
        f"\n{len(two)} of {PARAMS.n} of two versions, {np.mean(ends):.0f} tokens under the first; "
        f"largest |Δ log p| {max(old):.1e} under the first, {max(new):.1e} under the second"
    )
    return old, new


def test_each_token_is_of_the_weights_that_its_span_names(
    url: str, engine: VLLMEngine, policy: Policy, processor: Processor
) -> None:
    """Keys and values of what stands before an update are computed anew where caches are cleared."""
    old, new = across_an_update(url, engine, policy, processor, lambda: engine.sync(1, keep=True))
    assert max(old) <= 1e-5 and max(new) <= 1e-5


def test_kept_caches_give_tokens_of_no_weights(
    url: str,
    engine: VLLMEngine,
    policy: Policy,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values of the old weights go on to be read: what comes is of neither, and the probe stops the run."""
    post = Server.post

    async def caches_kept(server: Server, path: str, body: Any = None, **query: str) -> Any:
        said = {"clear_cache": "false"} if path == "/pause" else {}
        return await post(server, path, body, **query | said)

    def update() -> None:
        monkeypatch.setattr(Server, "post", caches_kept)
        with pytest.raises(RunFailed, match="other log-probs than the trainer"):
            engine.sync(1, keep=True)

    old, new = across_an_update(url, engine, policy, processor, update)
    assert max(old) <= 1e-5 and np.median(new) > 1e-2
