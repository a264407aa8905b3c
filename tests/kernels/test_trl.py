"""TRL as an outside oracle: `GRPOTrainer`'s own loss, corrections and advantages, run on a stub."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from perl_kernels import (
    LossOutput,
    PolicyLoss,
    group_advantages,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)

pytest.importorskip("trl", reason="needs trl")
trainer_module = pytest.importorskip(
    "trl.trainer.grpo_trainer", reason="TRL's GRPO trainer does not import here"
)
Trainer = trainer_module.GRPOTrainer

B, T, MAX_LENGTH, ITEMS, ACCUMULATION, STEPS = 5, 7, 9, 23.0, 2, 4
LENGTHS = (7, 1, 0, 4, 5)
# Numbers that fp32 holds: torch.where of two Python numbers, as TRL has it, is fp32.
SAPO = {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.0625}
VESPO = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5}

LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "bnpo": {"aggregation": "token-mean"},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm", "max_completion_length": MAX_LENGTH},
    "dapo": {"aggregation": "token-mean"},
    "luspo": {"aggregation": "seq-mean-token-sum"},
    "sapo": {"surrogate": "sapo", "aggregation": "seq-mean-token-mean", **SAPO},
    # TRL's epsilon_high is the bound of the ratio itself, and there is no lower one.
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 1.28 - 1},
    "vespo": {"surrogate": "vespo", **VESPO},
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PER_WINDOW = ("cispo", "dapo", "vespo")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class Batch:
    """Padded [B, T], with a completion without tokens and a hole that no loss is to see."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    sampling: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def make(cls) -> Batch:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        logprobs = -2 * torch.rand(B, T, dtype=torch.float64) - 0.1
        mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
        mask[0, 3] = False
        old = logprobs + 0.4 * normal(B, T)
        return cls(
            logprobs.requires_grad_(),
            old,
            logprobs.detach() + 0.5 * normal(B, T),
            old + 0.5 * normal(B, T),
            torch.rand(B, T, dtype=torch.float64).requires_grad_(),
            torch.tensor([1.0, -0.7, 0.4, -1.2, 0.0], dtype=torch.float64),
            mask,
        )

    def ours(self, loss: PolicyLoss, *, old: bool = True, **replaced: Any) -> LossOutput:
        mask, ends = self.mask, self.mask.sum(1).cumsum(0)
        arguments: dict[str, Any] = {
            "advantages": self.advantages,
            "old_logprobs": self.old[mask] if old else None,
            "ref_logprobs": self.ref[mask],
            "rollout_logprobs": self.sampling[mask],
            "entropy": self.entropy[mask],
        }
        return policy_loss(
            self.logprobs[mask],
            cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
            loss=loss,
            **(arguments | replaced),
        )

    def normalizer(self, loss_type: str) -> float:
        """TRL's denominators: with empty completions, gradient accumulation, and the window."""
        if loss_type in PER_WINDOW:
            return ITEMS * ACCUMULATION / STEPS
        return ACCUMULATION * float(self.mask.sum() if loss_type == "bnpo" else B)


class Accelerator:
    """The accelerator of one process."""

    num_processes, process_index, sync_gradients = 1, 0, True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: float) -> Tensor:
        return tensor


def stub(batch: Batch, loss_type: str, **options: Any) -> SimpleNamespace:
    """What `_compute_loss` reads of its trainer, with the log-probs of `batch`."""
    options = {"level": "token", "beta": 0.0, "delta": None, "bias_correction": False} | options
    args = SimpleNamespace(
        use_bias_correction_kl=options["bias_correction"],
        delta=options["delta"],
        sapo_temperature_pos=SAPO["sapo_tau_pos"],
        sapo_temperature_neg=SAPO["sapo_tau_neg"],
        steps_per_generation=STEPS,
        **VESPO,
    )
    trainer = SimpleNamespace(
        args=args,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=options["level"],
        beta=options["beta"],
        epsilon_low=0.2,
        epsilon_high=1.28 if loss_type == "cispo" else 0.28,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=ACCUMULATION,
        aux_loss_enabled=False,
        top_entropy_quantile=options.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=options.get("off_policy_threshold"),
        use_vllm="correction" in options,
        vllm_importance_sampling_correction="correction" in options,
        vllm_importance_sampling_mode=options.get("correction"),
        vllm_importance_sampling_clip_min=0.6,
        vllm_importance_sampling_clip_max=1.5,
        _entropy_bonus_enabled="entropy_coef" in options,
        entropy_coef=options.get("entropy_coef"),
        use_adaptive_entropy=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        get_gamma_weights=Trainer.get_gamma_weights,
        get_off_policy_mask=Trainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.entropy, None),
    )
    trainer.get_high_entropy_mask = lambda *a: Trainer.get_high_entropy_mask(trainer, *a)
    return trainer


def statements(start: str, end: str | None = None) -> Any:
    """The code of `_generate_and_score_completions` from the statement that starts with `start`
    to the one that starts with `end`: TRL has no function of its own for it."""
    source = textwrap.dedent(inspect.getsource(Trainer._generate_and_score_completions))
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            # A lambda's body is an expression.
            if not isinstance(body, list):
                continue
            texts = [ast.unparse(part) for part in body]
            first = next((i for i, text in enumerate(texts) if text.startswith(start)), None)
            if first is None:
                continue
            last = first
            if end is not None:
                last = next(i for i in range(first, len(texts)) if texts[i].startswith(end))
            part = ast.Module(body=body[first : last + 1], type_ignores=[])
            return compile(part, trainer_module.__file__, "exec")
    pytest.fail(f"TRL's trainer has no statement {start!r} any more")


def importance_ratio(batch: Batch, trainer: SimpleNamespace, *, old: bool) -> Tensor:
    names = {
        "self": trainer,
        "completion_mask": batch.mask.long(),
        "tool_mask": None,
        "old_per_token_logps": batch.old if old else batch.logprobs.detach(),
        "sampling_per_token_logps": batch.sampling,
    }
    code = statements(
        "if self.use_vllm and self.vllm_importance_sampling_correction:\n    mask = completion_mask"
    )
    exec(code, {**vars(trainer_module), **names}, names)
    return names["vllm_importance_sampling_ratio"]


def theirs(batch: Batch, trainer: SimpleNamespace, *, old: bool = True) -> Tensor:
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": torch.tensor(ITEMS, dtype=torch.float64),
    }
    if old:
        inputs["old_per_token_logps"] = batch.old
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = importance_ratio(batch, trainer, old=old)
    return Trainer._compute_loss(trainer, None, inputs)


def fields(loss_type: str, **more: Any) -> dict[str, Any]:
    return {"clip_low": 0.2, "clip_high": 0.28, **LOSS_TYPES[loss_type], **more}


def assert_same(batch: Batch, ours: Tensor, other: Tensor) -> None:
    leaves = [batch.logprobs, batch.entropy]
    torch.testing.assert_close(ours, other, rtol=1e-11, atol=1e-13)
    got = torch.autograd.grad(ours, leaves, materialize_grads=True)
    wanted = torch.autograd.grad(other, leaves, materialize_grads=True)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type(loss_type: str, level: str, beta: float, old: bool) -> None:
    batch = Batch.make()
    # vespo's ratio is of the sequence, whatever the level.
    ratio = {} if loss_type == "vespo" else {"ratio": level}
    kl = {"kl": "k3", "kl_coef": beta} if beta else {}
    other = theirs(batch, stub(batch, loss_type, level=level, beta=beta), old=old)
    ours = batch.ours(
        PolicyLoss(**fields(loss_type, **ratio, **kl)),
        old=old,
        normalizer=batch.normalizer(loss_type),
    )
    assert_same(batch, ours.loss, other)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "vespo"])
def test_kl_bias_correction(loss_type: str, level: str) -> None:
    batch = Batch.make()
    trainer = stub(batch, loss_type, level=level, beta=0.1, bias_correction=True)
    options = {"ratio": level, "kl": "k3", "kl_coef": 0.1, "kl_bias_correction": True}
    ours = batch.ours(
        PolicyLoss(**fields(loss_type, **options)), normalizer=batch.normalizer(loss_type)
    )
    assert_same(batch, ours.loss, theirs(batch, trainer))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_delta(loss_type: str, level: str) -> None:
    batch = Batch.make()
    other = theirs(batch, stub(batch, loss_type, level=level, delta=1.4))
    loss = PolicyLoss(**fields(loss_type, ratio=level, delta=1.4))
    assert_same(batch, batch.ours(loss, normalizer=batch.normalizer(loss_type)).loss, other)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_correction(loss_type: str, mode: str, old: bool) -> None:
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL refuses vespo with a correction of sequences")
    batch = Batch.make()
    other = theirs(batch, stub(batch, loss_type, correction=mode, beta=0.1), old=old)
    options = {"correction": mode, "correction_low": 0.6, "correction_high": 1.5}
    loss = PolicyLoss(**fields(loss_type, kl="k3", kl_coef=0.1, **options))
    ours = batch.ours(loss, old=old, normalizer=batch.normalizer(loss_type))
    assert_same(batch, ours.loss, other)


@pytest.mark.parametrize("shift", [-0.5, 0.5, 30.0])
def test_vespo_far_from_the_old_policy(shift: float) -> None:
    """Within the bounds of vespo's log-weight and at the lower one; small k and lambda leave
    something of the loss there. At the upper one TRL, which takes a lambda below 1e-4 as 1e-4, has
    nothing left: see `test_edges.py`."""
    batch = Batch.make()
    batch.old = batch.old + shift
    flat = dict.fromkeys(("vespo_k_pos", "vespo_k_neg"), 0.125)
    flat |= dict.fromkeys(("vespo_lambda_pos", "vespo_lambda_neg"), 2.0**-10)
    trainer = stub(batch, "vespo", correction="token_mask")
    vars(trainer.args).update(flat)
    correction = {"correction": "token_mask", "correction_low": 0.6, "correction_high": 1.5}
    loss = PolicyLoss(surrogate="vespo", **flat, **correction)  # type: ignore[arg-type]
    ours = batch.ours(loss, normalizer=batch.normalizer("vespo")).loss
    assert ours.abs() > 1e-3
    assert_same(batch, ours, theirs(batch, trainer))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus(loss_type: str) -> None:
    """TRL takes the mean over the tokens for every loss type, we the loss's own aggregation: the
    same for token means, otherwise a second call."""
    batch = Batch.make()
    trainer = stub(batch, loss_type, entropy_coef=0.05)
    policy = batch.ours(
        PolicyLoss(**fields(loss_type)), normalizer=batch.normalizer(loss_type)
    ).loss
    bonus = batch.ours(
        PolicyLoss(surrogate="reinforce", entropy_coef=0.05),
        advantages=torch.zeros(B, dtype=torch.float64),
        normalizer=batch.normalizer("bnpo"),
    ).loss
    assert_same(batch, policy + bonus, theirs(batch, trainer))
    if loss_type == "bnpo":
        loss = PolicyLoss(**fields(loss_type, entropy_coef=0.05))
        ours = batch.ours(loss, normalizer=batch.normalizer("bnpo"))
        assert_same(batch, ours.loss, theirs(batch, trainer))


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_high_entropy_tokens(loss_type: str) -> None:
    """TRL's entropy quantile is a mask of the policy term: our weights, over all tokens' count."""
    batch = Batch.make()
    trainer = stub(batch, loss_type, top_entropy_quantile=0.4)
    kept = Trainer.get_high_entropy_mask(trainer, batch.entropy, batch.mask.long(), 0.6)
    weights = kept[batch.mask].double()
    assert 0 < weights.sum() < len(weights)
    ours = batch.ours(
        PolicyLoss(**fields(loss_type)), weights=weights, normalizer=batch.normalizer(loss_type)
    )
    assert_same(batch, ours.loss, theirs(batch, trainer))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "vespo"])
def test_off_policy_sequences(loss_type: str, level: str) -> None:
    """TRL drops the policy term of a sequence by a mask: an advantage of 0 does the same."""
    batch = Batch.make()
    trainer = stub(batch, loss_type, level=level, beta=0.1, off_policy_threshold=0.0)
    kept = Trainer.get_off_policy_mask(
        batch.advantages[:, None], batch.logprobs, batch.old, batch.mask.double(), 0.0
    )
    assert 0 < kept.sum() < B
    loss = PolicyLoss(**fields(loss_type, ratio=level, kl="k3", kl_coef=0.1))
    ours = batch.ours(
        loss, advantages=batch.advantages * kept[:, 0], normalizer=batch.normalizer(loss_type)
    )
    assert_same(batch, ours.loss, theirs(batch, trainer))


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_metrics(loss_type: str) -> None:
    batch = Batch.make()
    trainer = stub(batch, loss_type, beta=0.1)
    theirs(batch, trainer)
    ours = batch.ours(PolicyLoss(**fields(loss_type, kl="k3", kl_coef=0.1))).metrics
    pairs = {"kl": "kl", "entropy": "entropy"}
    if loss_type == "cispo":
        pairs["cispo_clip_ratio"] = "clip_fraction"
    else:
        pairs |= {
            "clip_ratio/low_mean": "clip_fraction_low",
            "clip_ratio/high_mean": "clip_fraction_high",
            "clip_ratio/region_mean": "clip_fraction",
        }
    for name, own in pairs.items():
        assert trainer._metrics["train"][name] == [pytest.approx(ours[own].item(), rel=1e-6)]


@pytest.mark.parametrize(
    ("combine", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ],
)
def test_advantages(combine: str, scale: str) -> None:
    rewards = torch.rand(12, 2, dtype=torch.float64)
    # One reward is missing, one rollout has none, one group has equal rewards.
    rewards[1, 0], rewards[6], rewards[8:] = torch.nan, torch.nan, 0.5
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    trainer = SimpleNamespace(
        multi_objective_aggregation=combine,
        scale_rewards=scale,
        reward_weights=weights,
        reward_funcs=[None, None],
    )
    names = {
        "self": trainer,
        "rewards_per_func": rewards,
        "num_generations": 4,
        "device": rewards.device,
    }
    code = statements("unscorable_mask = ", "advantages = torch.nan_to_num")
    exec(code, {**vars(trainer_module), **names}, names)
    ours = group_advantages(
        rewards,
        [4, 4, 4],
        scale=scale,  # type: ignore[arg-type]
        eps=1e-4,
        reward_weights=weights,
        combine=combine,  # type: ignore[arg-type]
    )
    # The factor count / (count - 1) of TRL's variance is fp32.
    torch.testing.assert_close(ours.advantages, names["advantages"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_chunked_logprobs(has_bias: bool, softcap: float | None) -> None:
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    hidden, weight, targets = torch.randn(11, 8), torch.randn(37, 8), torch.randint(0, 37, (11,))
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.randn(37))][: 2 + has_bias]
    bias = leaves[2] if has_bias else None
    other = chunked.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 0.8, 16, softcap, 1.0, ("entropy",)
    )
    ours = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.8, softcap=softcap, chunk_size=4
    )
    torch.testing.assert_close(tuple(ours), tuple(other[:2]), rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 11)
    got = torch.autograd.grad(ours, leaves, tuple(upstream))
    wanted = torch.autograd.grad(other[:2], leaves, tuple(upstream))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_logprobs_of_logits() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    logits = torch.randn(3, 5, 19, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 19, (3, 5))
    ours = token_logprobs(logits.flatten(0, 1), targets.flatten())
    other = utils.selective_log_softmax(logits, targets), utils.entropy_from_logits(logits)
    for got, wanted in zip(ours, other, strict=True):
        torch.testing.assert_close(got.view(3, 5), wanted, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), logits, retain_graph=True),
            torch.autograd.grad(wanted.sum(), logits),
        )


def test_fused_logprobs_of_logits() -> None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    fused = pytest.importorskip("trl.kernels.logprob_entropy", reason="needs triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(3, 5, 2000, device=device, requires_grad=True)
    targets = torch.randint(0, 2000, (3, 5), device=device)
    other = fused.selective_log_softmax_and_entropy(logits, targets, 0.8)
    ours = token_logprobs(logits.flatten(0, 1), targets.flatten(), temperature=0.8)
    for got, wanted in zip(ours, other, strict=True):
        torch.testing.assert_close(got.view(3, 5), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 3, 5, device=device)
    got = torch.autograd.grad(ours, logits, tuple(upstream.flatten(1)))
    wanted = torch.autograd.grad(other, logits, tuple(upstream))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
