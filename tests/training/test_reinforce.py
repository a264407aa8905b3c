"""From groups to what an optimizer step trains on: segments, and log-probs of the policies that sampled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.model.packed.pack import pack_row
from perl.permutation import permute
from perl.training.checkpoint import Progress
from perl.training.reinforce import old_logprobs, segments_of
from perl.training.session import Session
from perl.types import EncodedPrompt, Example, Group, Rollout, UserError

EXAMPLE = Example("row", ("a", "b"), "A <image> B <image> which", "A")  # type: ignore[arg-type]


def group(rewards: list[float], off_policy: bool = False) -> Group:
    """Two rollouts in each of two orders; rollout i has i + 1 tokens of log-prob -i."""
    variants = [permute(EXAMPLE, order) for order in ((0, 1), (1, 0))]
    ids = [np.arange(2 + k) for k in range(2)]
    prompts = [EncodedPrompt(own, own[None], len(own), (), -1) for own in ids]
    rollouts = tuple(
        Rollout(
            variants[i // 2],
            prompts[i // 2],
            np.full(i + 1, i),
            np.full(i + 1, -float(i), np.float32),
            "",
            True,
        )
        for i in range(4)
    )
    advantages = np.array([1.0, -1.0, 0.5, -0.5], np.float32)
    return Group(
        EXAMPLE,
        tuple(variants),
        rollouts,
        np.array(rewards),
        {},
        advantages,
        off_policy=off_policy,
    )


@pytest.mark.parametrize(
    ("condition", "prompts", "completions", "advantages"),
    [
        ("permuted", [2, 3], [[1, 2], [4]], [(1.0, -1.0), (-0.5,)]),
        ("original", [2], [[1, 2, 4]], [(1.0, -1.0, -0.5)]),
    ],
)
def test_rollouts_stand_behind_what_they_are_conditioned_on(
    condition: str, prompts: list[int], completions: list[list[int]], advantages: list[Any]
) -> None:
    """The third rollout has no reward and is left out."""
    segments = segments_of(group([1, 0, np.nan, 0]), condition)
    assert [len(s.prompt.input_ids) for s in segments] == prompts
    assert [[len(c) for c in s.completions] for s in segments] == completions
    assert [s.advantages for s in segments] == advantages
    assert all(s.sampled_logprobs is None for s in segments)


def test_off_policy_groups_keep_the_log_probs_they_were_sampled_with() -> None:
    """Others get those of the present policy, here -9 everywhere."""
    segments = [
        *segments_of(group([1, 0, 1, 0]), "permuted"),
        *segments_of(group([1, 0, np.nan, 0], off_policy=True), "permuted"),
    ]
    batch = pack_row(segments)
    head: Any = SimpleNamespace(
        logprobs=lambda b: SimpleNamespace(logprobs=torch.full((b.num_scored,), -9.0))
    )
    old = old_logprobs(head, batch)
    present, sampled = [-9.0] * 10, [-0.0, -1.0, -1.0, -3.0, -3.0, -3.0, -3.0]
    assert old.tolist() == present + sampled
    assert old_logprobs(head, pack_row(segments[:2])).tolist() == present


@pytest.mark.parametrize(("updates", "kept"), [(4, ["saved"]), (5, [])])
def test_a_step_that_failed_between_its_updates_is_not_saved(
    updates: int, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two updates are recorded; the third step fails in its first update, or in its second."""
    saved: list[str] = []
    monkeypatch.setattr(Session, "save", lambda self: saved.append("saved"))
    session: Any = object.__new__(Session)
    session.display = SimpleNamespace(close=lambda: None)
    session.progress = Progress(stage="rl", step=2)
    session.optimizer, session._recorded_updates = SimpleNamespace(updates=updates), 4
    session.rescue(UserError("the gradient is not finite"))
    assert saved == kept
