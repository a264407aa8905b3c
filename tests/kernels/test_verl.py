"""verl as an outside oracle: the functions of its `core_algos`, loaded from the released wheel.

verl pins an old transformers and imports ray, so it is not installed: the wheel is downloaded, and
what `core_algos` imports but our comparisons do not run is replaced by empty modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perl_kernels import LossOutput, PolicyLoss, group_advantages, policy_loss
from tests.kernels.downloads import release

B, T = 5, 7
LENGTHS = (7, 1, 2, 4, 5)
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
MODES: dict[str, dict[str, Any]] = {
    "vanilla": {"dual_clip": 1.4},
    # verl's gspo is the paper's GSPO-token.
    "gspo": {"ratio": "sequence_token"},
    "sapo": {"surrogate": "sapo", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05},
    "cispo": {"surrogate": "cispo"},
    # verl has one option for the bound of the ratio of dppo and for the dual clip of vanilla.
    "dppo_tv": {"surrogate": "dppo_tv", "dppo_ratio_cap": 1.4},
    "dppo_kl": {"surrogate": "dppo_kl", "dppo_ratio_cap": 1.4},
    "gpg": {"surrogate": "reinforce"},
}
# In the other modes, a bound of 0.2 is one of the ratio or of its logarithm.
BOUNDS = {"dppo_tv": (0.1, 0.15), "dppo_kl": (0.02, 0.03)}


@dataclass
class ActorConfig:
    """What the losses read of verl's class of that name, which needs all of verl."""

    clip_ratio: float = 0.2
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28
    clip_ratio_c: float = 1.4
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    global_batch_info: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def empty(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@pytest.fixture(scope="module")
def verl(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModuleType]:
    """`verl.trainer.ppo.core_algos`."""
    cache = getattr(pytestconfig, "cache", None)
    downloads = cache.mkdir("releases") if cache else tmp_path_factory.mktemp("releases")
    # Python imports from a wheel as it does from a folder.
    wheel = release("verl==0.9.1", downloads, "--only-binary", ":all:") / "verl"
    before = dict(sys.modules)
    try:
        sys.modules["omegaconf"] = empty("omegaconf", DictConfig=dict)
        sys.modules["tensordict"] = empty("tensordict", TensorDict=dict)
        # Packages without what their __init__ would import.
        for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo"):
            path = str(wheel.joinpath(*name.split(".")[1:]))
            sys.modules[name] = empty(name, __path__=[path])
        sys.modules["verl.trainer.config"] = empty("verl.trainer.config", AlgoConfig=type(None))
        sys.modules["verl.workers"] = empty("verl.workers", __path__=[])
        sys.modules["verl.workers.config"] = empty("verl.workers.config", ActorConfig=ActorConfig)
        groupwise = importlib.import_module("verl.utils.groupwise")
        vars(sys.modules["verl.utils"]).update(
            as_torch_index=groupwise.as_torch_index, group_mean_std=groupwise.group_mean_std
        )
        yield importlib.import_module("verl.trainer.ppo.core_algos")
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("verl", "omegaconf", "tensordict"):
                del sys.modules[name]
        sys.modules.update(before)


@dataclass
class Batch:
    """Padded [B, T], an advantage for each token."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    weights: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def make(cls, lengths: tuple[int, ...] = LENGTHS) -> Batch:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        logprobs = -2 * torch.rand(B, T, dtype=torch.float64) - 0.1
        old = (logprobs + 0.4 * normal(B, T)).clamp(max=-0.01)
        mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        return cls(
            logprobs.requires_grad_(),
            old,
            logprobs.detach() + 0.5 * normal(B, T),
            torch.exp(0.3 * normal(B, T)),
            normal(B, T),
            mask,
        )

    def theirs(
        self, function: Any, mode: str, config: ActorConfig, *, weighted: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        weights = self.weights if weighted else None
        mask = self.mask.double()
        return function(
            self.old, self.logprobs, self.advantages, mask, mode, config, rollout_is_weights=weights
        )

    def ours(self, loss: PolicyLoss, **replaced: Any) -> LossOutput:
        mask, ends = self.mask, self.mask.sum(1).cumsum(0)
        arguments: dict[str, Any] = {
            "advantages": self.advantages[mask],
            "old_logprobs": self.old[mask],
            "rollout_logprobs": (self.old - self.weights.log())[mask],
        }
        bounds = torch.tensor([0, *ends], dtype=torch.int32)
        arguments |= replaced
        return policy_loss(self.logprobs[mask], cu_seqlens=bounds, loss=loss, **arguments)


def assert_same(batch: Batch, ours: Tensor, other: Tensor) -> None:
    # verl adds 1e-8 to a sequence's token count.
    torch.testing.assert_close(ours, other, rtol=2e-8, atol=1e-12)
    got, wanted = (torch.autograd.grad(loss, batch.logprobs)[0] for loss in (ours, other))
    torch.testing.assert_close(got, wanted, rtol=2e-8, atol=1e-12)


def fields(mode: str, aggregation: str, **more: Any) -> dict[str, Any]:
    low, high = BOUNDS.get(mode, (0.2, 0.28))
    if aggregation == "seq-mean-token-sum-norm":
        more["max_completion_length"] = T
    return {"clip_low": low, "clip_high": high, "aggregation": aggregation, **MODES[mode], **more}


def config(mode: str, **more: Any) -> ActorConfig:
    low, high = BOUNDS.get(mode, (0.2, 0.28))
    return ActorConfig(clip_ratio_low=low, clip_ratio_high=high, **more)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(verl: ModuleType, mode: str, aggregation: str, weighted: bool) -> None:
    if mode == "sapo" and aggregation != "seq-mean-token-mean":
        pytest.skip("verl's sapo has one aggregation")
    batch = Batch.make()
    function = verl.get_policy_loss_fn(mode)
    other, metrics = batch.theirs(function, aggregation, config(mode), weighted=weighted)
    correction = {"correction": "token_truncate", "correction_high": 100.0} if weighted else {}
    ours = batch.ours(PolicyLoss(**fields(mode, aggregation, **correction)))
    assert_same(batch, ours.loss, other)
    if mode in ("vanilla", "dppo_tv", "dppo_kl", "gspo"):
        expected = pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
        assert ours.metrics["clip_fraction"].item() == expected
    if mode == "vanilla":
        expected = pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)
        assert ours.metrics["dual_clip_fraction"].item() == expected


def test_gmpo(verl: ModuleType) -> None:
    """verl's geo_mean takes the mean over the sequences whatever the aggregation: ours per token
    and then per sequence. Its advantages are those of the sequences."""
    batch = Batch.make()
    batch.advantages = batch.advantages[:, :1].expand(B, T)
    loss = PolicyLoss(
        surrogate="gmpo", clip_low=0.2, clip_high=0.28, aggregation="seq-mean-token-mean"
    )
    other, _ = batch.theirs(verl.get_policy_loss_fn("geo_mean"), "token-mean", config("vanilla"))
    assert_same(batch, batch.ours(loss).loss, other)


def test_gmpo_with_rollout_weights(verl: ModuleType) -> None:
    """verl weights a sequence by the geometric mean of its tokens' weights: as weights of the
    tokens, these are one of our corrections."""
    batch = Batch.make()
    batch.advantages = batch.advantages[:, :1].expand(B, T)
    other, _ = batch.theirs(
        verl.get_policy_loss_fn("geo_mean"), "token-mean", config("vanilla"), weighted=True
    )
    log_weights = batch.weights.log() * batch.mask
    mean = (log_weights.sum(1) / batch.mask.sum(1))[:, None].expand(B, T)
    loss = PolicyLoss(
        surrogate="gmpo",
        clip_low=0.2,
        clip_high=0.28,
        aggregation="seq-mean-token-mean",
        correction="token_truncate",
        correction_high=100.0,
    )
    ours = batch.ours(loss, rollout_logprobs=(batch.old - mean)[batch.mask])
    assert_same(batch, ours.loss, other)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregation_over_the_whole_step(verl: ModuleType, aggregation: str) -> None:
    """A part of a step that is split over 2 processes and several calls: our normalizer. verl
    leaves completions without tokens out of the count, as we do for token means only."""
    batch = Batch.make((7, 0, 2, 4, 5))
    scale = 2 / 40.0 if aggregation == "token-mean" else 2 / 12.0
    info = {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 12.0}
    if aggregation == "seq-mean-token-sum-norm":
        info["loss_scale_factor"] = T
    function = verl.get_policy_loss_fn("vanilla")
    other, _ = batch.theirs(function, aggregation, config("vanilla", global_batch_info=info))
    loss = PolicyLoss(**fields("vanilla", aggregation))
    assert_same(batch, batch.ours(loss, normalizer=1 / scale).loss, other)

    other, _ = batch.theirs(function, aggregation, config("vanilla"))
    count = None if "token-mean" in aggregation else B - 1.0
    assert_same(batch, batch.ours(loss, normalizer=count).loss, other)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_kl(verl: ModuleType, kind: str) -> None:
    batch = Batch.make()
    other = verl.agg_loss(
        verl.kl_penalty(batch.logprobs, batch.ref, kind), batch.mask.double(), "token-mean"
    )
    ours = batch.ours(
        PolicyLoss(surrogate="reinforce", kl=kind, kl_coef=1.0),  # type: ignore[arg-type]
        advantages=torch.zeros(B, dtype=torch.float64),
        ref_logprobs=batch.ref[batch.mask],
    )
    assert_same(batch, ours.loss, other)


def test_kl_far_from_the_reference(verl: ModuleType) -> None:
    """Both bound the log-ratio of k3 by 20; verl also bounds the result, by 10."""
    logprobs, ref = torch.tensor([-30.0, -12.0, -2.0, -1.0]).double(), torch.tensor(-1.0).double()
    other = verl.kl_penalty(logprobs, ref, "k3")
    loss = PolicyLoss(surrogate="reinforce", kl="k3", kl_coef=1.0)
    for index, wanted in enumerate(other):
        ours = policy_loss(
            logprobs[index, None],
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([0, 1], dtype=torch.int32),
            loss,
            ref_logprobs=ref[None],
        )
        torch.testing.assert_close(ours.loss.clamp(max=10.0), wanted)


def test_entropy(verl: ModuleType) -> None:
    """verl subtracts the aggregated entropy from the aggregated policy loss."""
    batch = Batch.make()
    entropy = torch.rand(B, T, dtype=torch.float64)
    function = verl.get_policy_loss_fn("vanilla")
    for aggregation in AGGREGATIONS:
        other, _ = batch.theirs(function, aggregation, config("vanilla"))
        other = other - 0.1 * verl.agg_loss(entropy, batch.mask.double(), aggregation)
        loss = PolicyLoss(**fields("vanilla", aggregation, entropy_coef=0.1))
        assert_same(batch, batch.ours(loss, entropy=entropy[batch.mask]).loss, other)


@pytest.mark.parametrize(
    ("estimator", "theirs", "ours"),
    [
        ("grpo", {}, {}),
        ("grpo", {"norm_adv_by_std_in_grpo": False}, {"scale": "none"}),
        ("grpo_vectorized", {}, {}),
        ("grpo_vectorized", {"norm_adv_by_std_in_grpo": False}, {"scale": "none"}),
        ("rloo", {}, {"baseline": "leave_one_out", "scale": "none"}),
        ("rloo_vectorized", {}, {"baseline": "leave_one_out", "scale": "none"}),
    ],
)
def test_advantages(
    verl: ModuleType, estimator: str, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    sizes = [4, 3, 2]
    index = np.repeat(["a", "b", "c"], sizes).astype(object)
    rewards = torch.rand(9, 3)
    mask = torch.ones(9, 3)
    other, _ = verl.get_adv_estimator_fn(estimator)(rewards.clone(), mask, index=index, **theirs)
    got = group_advantages(rewards.sum(1), sizes, **ours).advantages
    torch.testing.assert_close(got[:, None].expand(9, 3), other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_group_of_one(verl: ModuleType, estimator: str) -> None:
    """verl gives a lone rollout its reward as advantage; there is nothing to compare it with, and
    ours is 0, as TRL's and as verl's own `rloo_vectorized`."""
    reward, mask, index = torch.tensor([[0.7]]), torch.ones(1, 1), np.array(["a"])
    other, _ = verl.get_adv_estimator_fn(estimator)(reward.clone(), mask, index=index)
    torch.testing.assert_close(other, reward, rtol=1e-5, atol=0)
    vectorized, _ = verl.get_adv_estimator_fn("rloo_vectorized")(reward, mask, index=index)
    ours = group_advantages(reward[:, 0], [1]).advantages
    assert ours.item() == vectorized.item() == 0
