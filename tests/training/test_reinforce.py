"""From groups to what an optimizer step trains on: segments, and log-probs of the policies that sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from perl.config import Config, ModelConfig
from perl.evaluation.agreement import Reading
from perl.model.head import HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.pack import pack_row
from perl.permutation import permute
from perl.rollout.collect import Collected
from perl.training import reinforce
from perl.training.checks import check_setup
from perl.training.reinforce import PolicyStep, Reference, group_tally, old_logprobs, segments_of
from perl.types import EncodedPrompt, Example, Group, Rollout
from tests.command_line import json_lines, metrics
from tests.messages import refused, tells
from tests.model.steps import segments_of as segments_of_steps
from tests.training.two_tokens import TwoTokens, config_of, session_of, train_in

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
    ("unscored", "condition", "prompts", "completions", "advantages"),
    [
        ([2], "permuted", [2, 3], [[1, 2], [4]], [(1.0, -1.0), (-0.5,)]),
        ([2], "original", [2], [[1, 2, 4]], [(1.0, -1.0, -0.5)]),
        # None of the original order's own.
        ([0, 1], "permuted", [3], [[3, 4]], [(0.5, -0.5)]),
        ([0, 1], "original", [2], [[3, 4]], [(0.5, -0.5)]),
    ],
)
def test_rollouts_stand_behind_what_they_are_conditioned_on(
    unscored: list[int],
    condition: str,
    prompts: list[int],
    completions: list[list[int]],
    advantages: list[Any],
) -> None:
    """Those without a reward are left out."""
    own = group([np.nan if i in unscored else i % 2 for i in range(4)])
    segments = segments_of(own, condition)
    assert [len(s.prompt.input_ids) for s in segments] == prompts
    assert [[len(c) for c in s.completions] for s in segments] == completions
    assert [s.advantages for s in segments] == advantages
    assert not any(s.off_policy for s in segments)


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


TOKENS = ([1], [0, 1], [0, 0, 1], [1, 1, 0, 1])
"""What the four rollouts of a group wrote."""


def written(number: int, off_policy: bool) -> Group:
    """A group of such rollouts, with advantages of its own; its prompts are as in `group`."""
    made = group([1, 0, 1, 0], off_policy)
    rollouts = tuple(
        replace(r, token_ids=np.array(t)) for r, t in zip(made.rollouts, TOKENS, strict=True)
    )
    return replace(made, rollouts=rollouts, advantages=made.advantages * np.float32(number + 1))


@pytest.mark.parametrize(
    ("kl", "correction"), [(0.0, "none"), (0.5, "token_truncate"), (0.0, "sequence_mask")]
)
@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("off_policy", [(), (1, 4)], ids=["fresh", "stored"])
def test_updates_share_a_batch_out_and_compare_with_the_policy_that_sampled(
    updates: int,
    off_policy: tuple[int, ...],
    kl: float,
    correction: str,
    tmp_path: Path,
    two_tokens: None,
) -> None:
    """Two steps on five groups, against torch's autograd and AdamW on the formula of clipped policy gradients.

    The engine's log-probs are not the policy's: the weight exp(old - engine's), of a token at most 1.5, of a completion from 0
    to 1.5, corrects for it. How far they are apart is told of the tokens of fresh groups, by the policy before the first update.
    """
    more = f"""
        train = {{ steps = 2, updates_per_batch = {updates}, lr = 0.2, schedule = "linear" }}
        loss = {{ preset = "dapo", kl_coef = {kl}, correction = "{correction}", correction_high = 1.5 }}
        rollout.temperature = 2.0
    """
    session = session_of(config_of(tmp_path, more), tmp_path / "run")
    session.enter_stage(session.stages[1])
    step = PolicyStep(session)
    groups = [written(number, number in off_policy) for number in range(5)]

    head, gain = torch.zeros(2, requires_grad=True), torch.ones(1, requires_grad=True)
    adamw = torch.optim.AdamW(
        [{"params": [head], "weight_decay": 0.01}, {"params": [gain], "weight_decay": 0.0}], lr=1.0
    )
    start = torch.zeros(2).log_softmax(0)
    for number in range(2):
        tally = step(number, groups)
        found = tally.agreed
        present = (head * gain / 2).log_softmax(0).detach()
        rows, gaps, outside = [], [], []
        for k in range(updates):
            terms, ratios = [], []
            for g in groups[k::updates]:
                for rollout, advantage in zip(g.rollouts, g.advantages, strict=True):
                    olds = rollout.logprobs if g.off_policy else present[rollout.token_ids].numpy()
                    shared = math.exp((olds - rollout.logprobs).sum())
                    for y, sampled in zip(rollout.token_ids, rollout.logprobs, strict=True):
                        logprob = (head * gain / 2).log_softmax(0)[y]
                        old = torch.tensor(sampled) if g.off_policy else present[y]
                        own = math.exp(old - sampled)
                        weight = {
                            "none": 1.0,
                            "token_truncate": min(own, 1.5),
                            "sequence_mask": shared if shared <= 1.5 else 0.0,
                        }[correction]
                        if not g.off_policy:
                            gaps.append((sampled - old).item())
                            outside.append((shared if correction == "sequence_mask" else own) > 1.5)
                        ratio = (logprob - old).exp()
                        clipped = ratio.clamp(0.8, 1.28)
                        d = start[y] - logprob
                        gained = torch.minimum(ratio * float(advantage), clipped * float(advantage))
                        terms.append(-weight * gained + kl * (d.exp() - d - 1))
                        ratios.append(ratio.item())
            loss = torch.stack(terms).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([head, gain], 1.0)
            rate = 0.2 * (1 - (number * updates + k) / (2 * updates))
            for own in adamw.param_groups:
                own["lr"] = rate
            adamw.step()
            adamw.zero_grad()
            rows.append(
                {
                    "loss": loss.item(),
                    "lr": rate,
                    "grad_norm": float(norm),
                    "ratio_max": max(ratios),
                    "tokens": len(terms),
                }
            )
        expected = {name: sum(row[name] for row in rows) / updates for name in rows[0]}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        mismatch = {name: value / count for name, (value, count) in tally.means.items()}
        assert {count for _, count in tally.means.values()} == {len(gaps)}
        assert (mismatch | tally.largest) == pytest.approx(
            {
                "rollout_kl": np.mean(gaps),
                "rollout/mismatch_mean": np.mean(np.abs(gaps)),
                "rollout/mismatch_max": np.max(np.abs(gaps)),
                "rollout/outside": np.mean(outside),
            },
            rel=1e-4,
        )
        assert 0 < sum(outside) < len(outside)
        policy: Any = session.components.policy
        assert policy.head_weight.flatten().tolist() == pytest.approx(head.tolist(), rel=1e-4)
        assert policy.gain.tolist() == pytest.approx(gain.tolist(), rel=1e-4)
    # Each prompt stands in the row once, with ten tokens behind both: 2 + 3 + 10 of a group instead of 2 * 5 + 10.
    assert tally.sums["packing/tokens"] == 5 * 15
    assert tally.sums["packing/unshared_tokens"] == 5 * 20


def test_a_large_mismatch_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for row in ({}, *({"rollout/mismatch_mean": apart} for apart in (0.05, 0.3, 0.4))):
        reinforce._tell_mismatch(row, "rl")
    (said,) = caplog.messages
    tells(said, "rollout/mismatch_mean = 0.3", "docs/rollouts.md")


def test_the_original_prompt_is_the_first_order_s_also_where_that_has_one_rollout() -> None:
    whole = group([1, 0, 1, 0])
    one = replace(
        whole,
        rollouts=whole.rollouts[1:],
        rewards=whole.rewards[1:],
        advantages=whole.advantages[1:],
    )
    (segment,) = segments_of(one, "original")
    assert len(segment.prompt.input_ids) == 2 and segment.advantages == (-1.0, 0.5, -0.5)


def test_another_prompt_s_log_probs_correct_nothing(tmp_path: Path) -> None:
    (segment,) = segments_of(group([1, 0, 1, 0]), "original")
    assert segment.sampled_logprobs is None
    more = 'loss.correction = "token_mask"\npermutation.condition = "original"'
    with refused("loss.correction = token_mask", "permutation.condition = original"):
        check_setup(config_of(tmp_path, more))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_reference_reads_a_frozen_tower_s_features_and_drops_its_own(
    frozen: bool, tmp_path: Path, two_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, int]] = []

    def load(
        path: str, config: ModelConfig, device: torch.device, sharding: None, trained: bool
    ) -> TwoTokens:
        loaded.append((path, config.lora_rank))
        return TwoTokens().requires_grad_(trained)

    monkeypatch.setattr("perl.training.reinforce.load_policy", load)
    model = f"model = {{ freeze_vision = {str(frozen).lower()}, lora_rank = 4 }}"
    more = f"{model}\nloss.kl_coef = 0.5"
    session = session_of(config_of(tmp_path, more), tmp_path / "run")
    session.enter_stage(session.stages[1])
    session.components.policy.vision.trained = not frozen  # type: ignore[misc]
    step = PolicyStep(session)
    for number in range(2):
        step(number, [written(0, off_policy=False)])
    assert step.reference is not None and loaded == [("initial", 0)]  # Without adapters.
    policies: Any = step.reference.head.policy, session.components.policy
    reference, policy = policies
    assert (reference.vision is policy.vision) == frozen
    assert reference.vision.cleared == (0 if frozen else 2)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


def test_what_a_step_s_rollouts_were_like() -> None:
    """Of two groups the second lost a reward; one rollout of each was cut off."""
    seen = [
        replace(g, reward_parts={"own": np.array(g.rewards) / 2}, rollouts=(*g.rollouts[:3], cut))
        for g in (group([1, 0, 1, 0]), group([1, 1, np.nan, 1]))
        for cut in [replace(g.rollouts[3], finished=False, text=r"\boxed{A}")]
    ]
    counts = {"kept": 3, "zero_variance": 4, "too_hard": 5, "too_easy": 6, "unscorable": 7}
    collected = Collected(
        groups=[],
        seen=seen,
        replayed=8,
        overflow=9,
        short=10,
        tries=11,
        rate=0.25,
        dropped=12,
        ages=[1, 4],
        faults={"own": 13},
        logged={"own": [2.0, math.nan, 3.0]},
        counts=counts,
    )
    tally = group_tally(collected, Reading())
    assert tally.agreed == {"permutation/rate": 0.25, "groups/tries": 11}
    assert tally.means == {
        "reward/mean": (5.0, 7),
        "reward/own": (2.5, 7),
        "logged/own": (5.0, 2),
        "consistency": (0.0, 2),
        "permutation/orders": (4.0, 2),
        "length/mean": (20.0, 8),
        "length/truncated": (2.0, 8),
        "groups/age": (5.0, 2),
    }
    assert tally.sums == {
        "reward/faults/own": 13,
        "groups/seen": 2,
        **{f"groups/{name}": count for name, count in counts.items()},
        "groups/overflow": 9,
        "groups/reused": 2,
        "groups/replayed": 8,
        "groups/short": 10,
        "prompts/dropped": 12,
        "tokens/prompt": 2 * (2 + 2 + 3 + 3),
        "tokens/completion": 2 * (1 + 2 + 3 + 4),
        "images/shown": 0,
    }


def tells_all(
    completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **columns: Any
) -> list[dict[str, float]]:
    log_metric("steps_left", trainer_state.max_steps - trainer_state.global_step)
    log_extra("slots", [len(order) for order in columns["order"]])
    return [{"score": 1.0, "letters": len(ids)} for ids in columns["completion_ids"]]


def test_what_functions_say_beside_their_scores_is_recorded(
    tmp_path: Path, two_tokens: None
) -> None:
    more = f"""
        run.save_rollouts_every = 1
        reward.functions = ["{__name__}:tells_all"]
    """
    train_in(tmp_path / "run", config_of(tmp_path, more))
    rows = metrics(tmp_path / "run", "rl")
    assert [row["logged/steps_left"] for row in rows] == [2, 1]
    lengths = [row["reward/tells_all/letters"] for row in rows]
    assert lengths == [row["length/mean"] for row in rows]
    kept = json_lines(tmp_path / "run" / "rollouts.jsonl")
    assert [own["logged"] for own in kept] == [{"slots": 2}] * len(kept)
    letters = [own["text"].count("A") + own["text"].count("B") for own in kept]
    assert [own["rewards"]["tells_all/letters"] for own in kept] == letters


def test_a_reference_has_a_tower_of_its_own_where_the_policy_s_lies_in_shards(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, it would else be gathered by those processes alone that lack an image's features."""
    start = str(tiny_folder("tiny-qwen2.5-vl"))
    model = ModelConfig(path=start, freeze_vision=True)
    policy = load_policy(start, model, torch.device("cpu"))
    own = load_policy(start, model, torch.device("cpu"))
    asked = []
    monkeypatch.setattr(reinforce, "load_policy", lambda *a, **_: asked.append(a[3]) or own)
    session: Any = SimpleNamespace(
        config=Config(model=model),
        trained_before=None,
        components=SimpleNamespace(
            policy=policy,
            model_path=start,
            processor=load_processor(start, model),
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        ),
    )
    for vision in (True, False):
        policy.sharding = SimpleNamespace(  # type: ignore[assignment]
            vision=vision, device=torch.device("cpu"), dtype=torch.float32
        )
        reference = Reference(session)
        assert asked[-1].vision == reference.own_tower == vision
        assert (own.vision is policy.vision) != vision


def test_the_reference_of_a_later_stage_has_none_of_what_adapters_of_the_tower_learn(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """Its tower is that of the model which the stage before left, also where the policy's own weights are frozen."""
    start = tiny_folder("tiny-qwen2.5-vl")
    targets = (r"model\.visual\..*", "q_proj")
    model = ModelConfig(path=str(start), freeze_vision=True, lora_rank=2, lora_targets=targets)
    cpu = torch.device("cpu")
    policy = load_policy(str(start), model, cpu)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    processor = load_processor(str(start), model)
    session: Any = SimpleNamespace(
        config=Config(model=model),
        trained_before=start.name,
        folder=SimpleNamespace(models=start.parent),
        components=SimpleNamespace(
            policy=policy,
            processor=processor,
            accelerator=SimpleNamespace(device=cpu),
        ),
    )
    reference = Reference(session)
    batch = pack_row(segments_of_steps(processor))
    plain = load_policy(str(start), ModelConfig(path=str(start)), cpu)
    banned = processor.unsampled_token_ids()
    for each, same in ((plain, True), (policy, False)):
        expected = HeadLoss(each, banned, 1.0).logprobs(batch).logprobs
        assert torch.allclose(reference([[batch]])[0][0], expected, atol=1e-4) == same
