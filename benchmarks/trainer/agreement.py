"""Proof before timing: on the completions that TRL sampled, both trainers make the same step.

TRL runs one step of its own. Its completions then take the place of those that PeRL sampled for the same ordered
prompts, with TRL's advantages, and PeRL's step runs on them. Rewards, advantages, loss, mean entropy and the gradient
of every parameter have to agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.proof import GradientProof
from benchmarks.trainer.measure import forget_trainers
from benchmarks.trainer.perl_trainer import PerlTrainer
from benchmarks.trainer.start import Start
from benchmarks.trainer.trl_trainer import Seen, TrlTrainer
from perl.rollout.advantages import advantages_of
from perl.training.reinforce import PolicyStep
from perl.types import EncodedPrompt, Group

FLOAT32 = 1e-3
"""Relative, for gradients: of each parameter's largest."""
TRL_EPS = 1e-4
"""TRL adds it to the standard deviation that it divides by; PeRL adds 1e-6."""

PromptKey = tuple[bytes, bytes]


def prove(start: Start, folder: Path) -> dict[str, Any]:
    """What both made of the same completions.

    In bfloat16 TRL makes the same step in float32 too, which shows what bfloat16 costs it; see `GradientProof`.

    Raises:
        AssertionError: anything differs; the message says what.
    """
    setting = start.setting
    seen = _trl_step(start, folder / "trl")
    exact = None
    if setting.half:
        exact = _trl_step(start, folder / "trl-float32", replay=seen.inputs).gradients
    proof = GradientProof(seen.gradients, exact)
    forget_trainers()
    trainer = PerlTrainer(start, folder / "perl", 1, setting.seed, clip_gradients=False)
    components = trainer.session.components
    drawn = trainer.session.stream().draw(len(setting.images))
    sampled = components.collector.roll_out(drawn, setting.seed)
    groups = _with_completions(sampled, seen, setting.completion)
    rewards, advantages = _check_advantages(trainer, groups, seen)
    row, ours = _perl_step(trainer, groups)
    scale = float(seen.batch["advantages"].abs().mean())
    loss = {"trl": sum(seen.losses), "perl": row["loss"]}
    assert abs(loss["perl"] - loss["trl"]) <= FLOAT32 * scale, (
        f"PeRL's loss is {loss['perl']:.6f}, TRL's {loss['trl']:.6f}"
    )
    entropy = {"trl": float(np.mean(seen.entropies)), "perl": row["entropy"]}
    tolerance = 10 * proof.eps if setting.half else FLOAT32
    assert abs(entropy["perl"] - entropy["trl"]) <= tolerance * entropy["trl"], (
        f"the mean entropy is {entropy['perl']:.6f} in PeRL, {entropy['trl']:.6f} in TRL"
    )
    found = proof.check(ours, "PeRL's", "TRL's")
    return {
        "completions": setting.sequences,
        "parameters": len(found),
        "max_rel_grad_diff": max(d.most for d in found.values()),
        "allowed_rel_grad_diff": max(d.most for d in proof.allowed.values()),
        "max_grad_norm_diff": max(d.norm for d in found.values()),
        "max_grad_scale_diff": max(d.scale for d in found.values()),
        "loss": loss,
        "entropy": entropy,
        "max_reward_diff": rewards,
        "max_advantage_diff": advantages,
    }


def _trl_step(start: Start, folder: Path, replay: list[dict[str, Any]] | None = None) -> Seen:
    """What a step of TRL's saw and made; of replayed micro-batches in float32."""
    forget_trainers()
    half = None if replay is None else False
    seed = start.setting.seed
    side = TrlTrainer(start, folder, 1, seed, clip_gradients=False, half=half, replay=replay)
    side.seen.wanted = True
    side.train()
    return side.seen


def _perl_step(
    trainer: PerlTrainer, groups: list[Group]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of the step of PeRL's trainer on these groups."""
    session = trainer.session
    step = PolicyStep(session)
    gradients: dict[str, torch.Tensor] = {}
    masters = step.optimizer.masters

    def copy(*_: Any) -> None:
        for name, parameter in session.components.policy.model.named_parameters():
            if parameter in masters and (gradient := masters[parameter].grad) is not None:
                gradients[name] = gradient.to("cpu", copy=True)

    step.optimizer.adamw.register_step_pre_hook(copy)
    return step(0, groups).agreed, gradients


def _with_completions(groups: list[Group], seen: Seen, length: int) -> list[Group]:
    """The groups with TRL's completions and advantages.

    Raises:
        AssertionError: TRL's prompts, tokens and pixels, are not those of the groups, or completions of either are
            not of this length.
    """
    theirs: defaultdict[PromptKey, list[tuple[np.ndarray, float, float]]] = defaultdict(list)
    # PeRL's pixels have the dtype of its tower.
    dtype = groups[0].rollouts[0].prompt.images[0].pixel_values.dtype
    for key, completion in _completions(seen, dtype):
        theirs[key].append(completion)
    out = []
    for group in groups:
        taken = []
        for rollout in group.rollouts:
            waiting = theirs.get(_key_of(rollout.prompt))
            assert waiting, (
                f"TRL has no completion for {rollout.variant.example.id} with its images in the order "
                f"{rollout.variant.order}: prompts or pixels differ"
            )
            ids, reward, advantage = waiting.pop(0)
            assert len(ids) == len(rollout.token_ids) == length, (
                f"a completion has {len(ids)} tokens in TRL, {len(rollout.token_ids)} in PeRL, not {length}"
            )
            taken.append((rollout, ids, reward, advantage))
        rollouts = tuple(
            replace(rollout, token_ids=ids, logprobs=np.zeros(len(ids), np.float32))
            for rollout, ids, _, _ in taken
        )
        rewards = np.array([reward for *_, reward, _ in taken], dtype=np.float64)
        advantages = np.array([advantage for *_, advantage in taken], dtype=np.float32)
        out.append(replace(group, rollouts=rollouts, rewards=rewards, advantages=advantages))
    left = sum(map(len, theirs.values()))
    assert not left, f"TRL has {left} completions for prompts that PeRL does not have"
    return out


def _completions(
    seen: Seen, dtype: torch.dtype
) -> Iterator[tuple[PromptKey, tuple[np.ndarray, float, float]]]:
    """For each completion of TRL's its prompt with pixels of a dtype, and its tokens, reward and advantage."""
    batch = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in seen.batch.items()}
    patches = batch["image_grid_thw"].prod(-1).split(batch["num_images"])
    pixels = batch["pixel_values"].split([int(n.sum()) for n in patches])
    assert seen.rewards is not None
    for i, shown in enumerate(pixels):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        scores = float(seen.rewards[i]), float(batch["advantages"][i])
        yield _key(prompt, shown.to(dtype)), (ids.numpy().astype(np.int64), *scores)


def _key_of(prompt: EncodedPrompt) -> PromptKey:
    pixels = torch.cat([image.pixel_values for image in prompt.images])
    return _key(torch.from_numpy(prompt.input_ids), pixels)


def _key(ids: torch.Tensor, pixels: torch.Tensor) -> PromptKey:
    """Orders of the same images have equal tokens: the pixels tell them apart."""
    return ids.long().numpy().tobytes(), pixels.float().contiguous().numpy().tobytes()


def _check_advantages(trainer: PerlTrainer, groups: list[Group], seen: Seen) -> tuple[float, float]:
    """Largest differences of PeRL's rewards and advantages of the completions from TRL's.

    Raises:
        AssertionError: they are not those of TRL.
    """
    components, setting = trainer.session.components, trainer.session.start.setting
    decode = components.processor.decode
    rollouts = [replace(r, text=decode(r.token_ids)) for g in groups for r in g.rollouts]
    rewards, _ = components.collector.scorer.score_rollouts(rollouts)
    wrong = float(np.abs(rewards - np.concatenate([g.rewards for g in groups])).max())
    assert wrong < 1e-6, f"PeRL's rewards differ from TRL's by up to {wrong:.2e}"

    per_group = setting.orders * setting.per_order
    ours = advantages_of(
        rewards,
        [per_group] * len(groups),
        [setting.per_order] * (setting.orders * len(groups)),
        components.config.advantage,
    )
    theirs = np.concatenate([g.advantages for g in groups])
    deviation = rewards.reshape(-1, setting.per_order).std(1, ddof=1).repeat(setting.per_order)
    # Where both divide by the same: what is left is rounding.
    off = float(np.abs(ours * (deviation / (deviation + TRL_EPS)) - theirs).max())
    assert off < FLOAT32, f"PeRL's advantages differ from TRL's by up to {off:.2e}"
    return wrong, float(np.abs(ours - theirs).max())
