"""The loss at the head of a policy of two hidden states, in numbers; and what the config makes of a preset."""

import math
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from perl.config import Config, LossConfig, PermutationConfig, RolloutConfig
from perl.model.head import (
    SUPERVISED,
    HeadLoss,
    make_policy_loss,
    needs_reference,
    policy_loss_of,
    step_normalizer,
)
from perl.model.packed.pack import pack_row
from perl.model.policy import Policy
from perl.timing import Listener, listening
from perl.types import EncodedPrompt, PackedBatch, Segment
from perl_kernels import PolicyLoss
from tests.messages import refused


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig(preset="perl"), PolicyLoss.preset("perl")),
        (LossConfig(preset="gspo"), PolicyLoss.preset("gspo")),
        (
            LossConfig(preset="dapo", clip_low=0.1, clip_high=0.4, entropy_coef=-0.5),
            PolicyLoss.preset("dapo", clip_low=0.1, clip_high=0.4, entropy_coef=-0.5),
        ),
        (LossConfig(preset="dapo", clip_low=0.0), PolicyLoss.preset("dapo", clip_low=0.0)),
        (LossConfig(preset="dr_grpo"), PolicyLoss.preset("dr_grpo", max_completion_length=64)),
        (
            LossConfig(preset="grpo", aggregation="seq-mean-token-sum-norm"),
            PolicyLoss(aggregation="seq-mean-token-sum-norm", max_completion_length=64),
        ),
        (
            LossConfig(preset="dr_grpo", aggregation="token-mean"),
            PolicyLoss(aggregation="token-mean"),
        ),
        (
            LossConfig(preset="grpo", kl_coef=0.25),
            PolicyLoss.preset("grpo", kl="k3", kl_coef=0.25),
        ),
        (LossConfig(preset="grpo", kl_coef=0.0), PolicyLoss.preset("grpo")),
        (LossConfig(preset="perl", kl_coef=0.5), PolicyLoss.preset("perl", kl_coef=0.5)),
        (LossConfig(preset="perl", kl_coef=0.0), PolicyLoss.preset("perl", kl_coef=0.0)),
        (
            LossConfig(preset="perl", kl="none", dual_clip=0.0),
            PolicyLoss.preset("perl", kl=None, kl_coef=0.0, dual_clip=None),
        ),
        (
            LossConfig(preset="grpo", kl="k1+", kl_coef=0.25, kl_bias_correction=True),
            PolicyLoss.preset("grpo", kl="k1+", kl_coef=0.25, kl_bias_correction=True),
        ),
        (
            LossConfig(preset="dr_grpo", max_completion_length=9, correction="none", delta=0.0),
            PolicyLoss.preset("dr_grpo", max_completion_length=9),
        ),
    ],
    ids=str,
)
def test_what_the_config_makes_of_a_preset(config: LossConfig, expected: PolicyLoss) -> None:
    loss = make_policy_loss(config, 64)
    assert loss == expected
    assert needs_reference(loss) == (config.kl_coef != 0 and loss.kl is not None)


@pytest.mark.parametrize(
    ("engine", "condition", "wanted", "correction"),
    [
        ("inprocess", "permuted", None, None),
        ("vllm", "permuted", None, "token_truncate"),
        ("vllm", "permuted", "none", None),
        ("vllm", "permuted", "sequence_mask", "sequence_mask"),
        ("vllm", "original", None, None),
    ],
)
def test_what_vllm_samples_is_weighed_unless_it_is_said_how(
    engine: Any, condition: Any, wanted: Any, correction: str | None
) -> None:
    config = Config(
        rollout=RolloutConfig(engine=engine, max_new_tokens=7),
        permutation=PermutationConfig(condition=condition),
        loss=LossConfig(preset="dr_grpo", correction=wanted),
    )
    loss = policy_loss_of(config)
    assert loss == PolicyLoss.preset("dr_grpo", max_completion_length=7, correction=correction)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LossConfig(preset="grbo"), ("loss.preset", "grbo", "grpo")),
        (LossConfig(clip_low=1.5), ("loss.clip_low", 1.5)),
        # What the preset has is named beside the key that does not go with it.
        (
            LossConfig(delta=4.0),
            ("loss.delta", "loss.dual_clip", "loss.dual_clip = 3.0", 0),
        ),
        (LossConfig(surrogate="cispo"), ("loss.dual_clip", "loss.dual_clip = 3.0", 0)),
        (
            LossConfig(preset="dapo", ratio="sequence", surrogate="gmpo"),
            ("loss.ratio", "'sequence'", "'gmpo'"),
        ),
    ],
)
def test_what_is_no_loss_is_refused(config: LossConfig, names: tuple[object, ...]) -> None:
    with refused(*names):
        make_policy_loss(config, 64)


def test_every_axis_of_the_loss_is_a_key_of_its_type() -> None:
    def kinds(hint: Any) -> set[Any]:
        """The types and literals that a value may be, without None and its name in recipes."""
        inner = get_args(hint)
        if get_origin(hint) is Literal:
            return set(inner) - {"none"}
        return set().union(*map(kinds, inner)) if inner else {hint} - {type(None)}

    keys, axes = get_type_hints(LossConfig), get_type_hints(PolicyLoss)
    assert list(keys) == ["preset", *axes]
    assert {name: kinds(keys[name]) for name in axes} == {n: kinds(h) for n, h in axes.items()}
    assert {LossConfig.__dict__[name] for name in axes} == {None}
    may_be_off = [name for name, hint in axes.items() if type(None) in get_args(hint)]
    assert may_be_off == ["dual_clip", "delta", "kl", "max_completion_length", "correction"]


def test_what_a_step_is_divided_by() -> None:
    by_token, by_sequence = PolicyLoss.preset("dapo"), PolicyLoss.preset("grpo")
    assert [step_normalizer(by_token, n, 7) for n in (0, 1, 90)] == [1, 1, 90]
    assert [step_normalizer(by_sequence, 90, n) for n in (0, 1, 7)] == [1, 1, 7]


class TwoStates(nn.Module):
    """A policy whose hidden state is (1, 0), (0, 1), (1, 0), ... for the scored tokens of a batch, halved where it
    drops out; a head over four tokens."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(
            torch.tensor([[0.5, 1.0], [2.0, -1.0], [0.0, 3.0], [9.0, 9.0]])
        )

    def forward(self, batch: PackedBatch, features: object = None) -> torch.Tensor:
        assert features in (None, "features")
        states = torch.eye(2).repeat(batch.num_scored, 1)[: batch.num_scored]
        states.requires_grad_()
        return states * 0.5 if self.training else states


COMPLETIONS = ([0, 2], [1])
BANNED = torch.tensor([3])


def batch() -> PackedBatch:
    prompt = EncodedPrompt(np.arange(3), np.arange(3)[None], 3, (), -1)
    return pack_row([Segment(prompt, tuple(map(np.array, COMPLETIONS)), (2.0, -1.0))])


def logprobs(policy: TwoStates, temperature: float, scale: float = 1.0) -> torch.Tensor:
    """[3, 3] over the tokens that are sampled: of (1, 0), (0, 1) and (1, 0) again."""
    states = scale * torch.eye(2)[[0, 1, 0]]
    return (states @ policy.head_weight[:3].T / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0, 100.0])
def test_logprobs_are_of_what_is_sampled_at_the_temperature_without_dropout(
    temperature: float,
) -> None:
    policy = TwoStates()
    head = HeadLoss(cast(Policy, policy), BANNED, temperature)
    for training in (True, False):
        policy.train(training)
        out = head.logprobs(batch())
        assert policy.training == training
        assert not out.logprobs.requires_grad
        want = logprobs(policy, temperature)
        torch.testing.assert_close(out.logprobs, want[[0, 1, 2], [0, 2, 1]])
        torch.testing.assert_close(out.entropy, -(want.exp() * want).sum(-1))


def test_dropout_comes_back_where_scoring_fails() -> None:
    policy = TwoStates().train()
    with pytest.raises(AttributeError):
        HeadLoss(cast(Policy, policy), BANNED, 1.0).logprobs(None)  # type: ignore[arg-type]
    assert policy.training


def test_a_micro_batch_is_its_share_of_the_step() -> None:
    """Old log-probs a tenth below make ratios of e^0.1; k3 against log-probs that are 0.3 above; at temperature 2."""
    loss = PolicyLoss.preset("dapo", kl="k3", kl_coef=0.5)
    ours, plain = TwoStates(), TwoStates()
    own = logprobs(plain, 2.0, 0.5)[[0, 1, 2], [0, 2, 1]]
    old, ref = own.detach() - 0.1, own.detach() + 0.3
    advantages = torch.tensor([2.0, 2.0, -1.0])
    kl = (ref - own).exp() - (ref - own) - 1
    want = ((-advantages * (own - old).exp()) + 0.5 * kl).sum() / 8
    # sum(A) = 3, all ratios e^0.1 and within the bounds; k3 = e^0.3 - 1.3
    assert want.item() == pytest.approx((-3 * math.exp(0.1) + 1.5 * (math.exp(0.3) - 1.3)) / 8)
    want.backward()
    head = HeadLoss(cast(Policy, ours), BANNED, 2.0)
    ranges: list[str] = []
    with listening(cast(Listener, SimpleNamespace(enter=ranges.append, leave=str))):
        out = head(batch(), loss, 8.0, cast(None, "features"), old, ref)
        out.loss.backward()
    torch.testing.assert_close(out.loss, want)
    assert ranges == ["language_model", "loss", "loss.backward"]
    torch.testing.assert_close(ours.head_weight.grad, plain.head_weight.grad)


def test_supervised_is_cross_entropy() -> None:
    policy = TwoStates().eval()
    one = batch()
    one.advantages.fill_(1.0)
    out = HeadLoss(cast(Policy, policy), BANNED, 1.0)(one, SUPERVISED, 3.0)
    targets = torch.tensor([0, 2, 1])
    want = nn.functional.cross_entropy(torch.eye(2)[[0, 1, 0]] @ policy.head_weight[:3].T, targets)
    torch.testing.assert_close(out.loss, want)
