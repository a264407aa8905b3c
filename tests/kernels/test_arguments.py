"""What the public functions refuse, which backend they choose, and what importing them costs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.overrides import TorchFunctionMode

import perl_kernels
from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    dispatch,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    ops,
    policy_loss,
    registry,
    token_logprobs,
)
from perl_kernels.objective import Aggregation, Surrogate

N, V, H = 6, 7, 4
NAN = math.nan


def arguments(**changes: Any) -> dict[str, Any]:
    base = {
        "hidden": torch.randn(N, H),
        "weight": torch.randn(V, H),
        "targets": torch.arange(N),
        "advantages": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2, N], dtype=torch.int32),
        "loss": PolicyLoss(),
    }
    return {**base, **changes}


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"hidden": torch.randn(N, 2, H)},
            ValueError,
            r"hidden has shape \[6, 2, 4\], must be \[N, H\]",
        ),
        ({"hidden": [1.0]}, TypeError, r"hidden is a list, must be a tensor \[N, H\]"),
        ({"hidden": torch.ones(N, H).long()}, TypeError, "hidden has dtype torch.int64"),
        ({"weight": torch.randn(V, 3)}, ValueError, r"weight has shape \[7, 3\], must be .* 4"),
        ({"weight": torch.randn(V, H).bfloat16()}, TypeError, "weight has dtype torch.bfloat16"),
        ({"bias": torch.randn(3)}, ValueError, "bias has another length"),
        ({"targets": torch.arange(5)}, ValueError, r"targets has shape \[5\], must be .* N = 6"),
        ({"targets": torch.rand(N)}, TypeError, "targets has dtype torch.float32"),
        ({"targets": torch.full((N,), V)}, ValueError, r"targets holds 7, must be in \[0, V\)"),
        ({"targets": torch.full((N,), -100)}, ValueError, "targets holds -100"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, must be above 0"),
        ({"temperature": "1"}, TypeError, "temperature is a str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \[3\]"),
        ({"temperature": torch.tensor(1.0)}, ValueError, r"temperature has shape \[\]"),
        ({"temperature": torch.zeros(N)}, ValueError, "temperature must be above 0 and finite in"),
        (
            {"temperature": float("inf")},
            ValueError,
            "temperature is inf, must be above 0 and finite",
        ),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, must be above 0"),
        ({"softcap": "a"}, TypeError, "softcap is a str, must be a float or None"),
        ({"chunk_size": "a"}, TypeError, "chunk_size is a str, must be an int or None"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is a float, must be an int or None"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, must be at least 1"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages has shape \[3\], .* B = 2, N = 6"),
        ({"advantages": 1.0}, TypeError, "advantages is a float, must be a tensor"),
        (
            {"advantages": GroupedRewards(rewards=torch.ones(3), group_sizes=[3])},
            ValueError,
            "advantages.rewards has length 3, must be .B. with B = 2",
        ),
        ({"cu_seqlens": bounds(0, 2, 5)}, ValueError, "cu_seqlens runs from 0 to 5, .* N = 6"),
        ({"cu_seqlens": bounds(1, 2, 6)}, ValueError, "cu_seqlens runs from 1 to 6"),
        ({"cu_seqlens": bounds(0, 5, 2, 6)}, ValueError, "cu_seqlens decreases, must be monotone"),
        ({"cu_seqlens": bounds()}, ValueError, r"cu_seqlens has shape \[0\]"),
        ({"cu_seqlens": bounds(0)}, ValueError, "so B = 0, but there are N = 6"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens has dtype torch.float32"),
        ({"loss": "grpo"}, TypeError, "loss is a str, must be a PolicyLoss"),
        ({"loss": PolicyLoss.preset("perl")}, ValueError, "ref_logprobs is None.* kl='k3'"),
        (
            {"loss": PolicyLoss(correction="token_mask")},
            ValueError,
            "rollout_logprobs is None.* correction='token_mask'",
        ),
        ({"loss": PolicyLoss.preset("dr_grpo")}, ValueError, "max_completion_length is None"),
        (
            {"old_logprobs": torch.ones(3)},
            ValueError,
            r"old_logprobs has shape \[3\], must be \[N\]",
        ),
        ({"ref_logprobs": torch.ones(N, 1)}, ValueError, r"ref_logprobs has shape \[6, 1\]"),
        ({"rollout_logprobs": 0.0}, TypeError, "rollout_logprobs is a float"),
        *(
            (
                {f"{name}_logprobs": torch.zeros(N, dtype=torch.int64)},
                TypeError,
                f"{name}_logprobs has dtype torch.int64, must be floating point",
            )
            for name in ("old", "ref", "rollout")
        ),
        ({"weights": torch.ones(5)}, ValueError, r"weights has shape \[5\]"),
        ({"weights": -torch.ones(N)}, ValueError, "weights holds a negative value"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \[2\]"),
        ({"normalizer": "6"}, TypeError, "normalizer is a str"),
        ({"normalizer": True}, TypeError, "normalizer is a bool"),
        ({"normalizer": -1.0}, ValueError, "normalizer is -1.0, must be above 0 and finite"),
        ({"normalizer": 0.0}, ValueError, "normalizer is 0.0, must be above 0 and finite"),
        ({"normalizer": torch.tensor(0)}, ValueError, "normalizer is 0, must be above 0"),
        (
            {"normalizer": torch.ones((), device="meta")},
            ValueError,
            "normalizer is on meta, must be on cpu",
        ),
        (
            {"weights": torch.ones(N, device="meta")},
            ValueError,
            "weights is on meta, must be on cpu",
        ),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', must be one of auto, triton"),
        ({"backend": "native"}, ValueError, "'native' is not available: this build .* no native"),
        ({"backend": "native"}, ValueError, "'native' is not available"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear_grpo_loss(**arguments(**changes))


def test_the_other_functions_check_too() -> None:
    logits, targets = torch.randn(N, V), torch.arange(N)
    cu_seqlens, advantages = bounds(0, 2, N), torch.ones(2)
    with pytest.raises(ValueError, match=r"logits has shape \[6\], must be \[N, V\]"):
        token_logprobs(logits[:, 0], targets)
    with pytest.raises(ValueError, match="targets holds 8"):
        grpo_loss(logits, targets + 3, advantages, cu_seqlens, PolicyLoss())
    with pytest.raises(ValueError, match="targets holds -1"):
        linear_token_logprobs(torch.randn(N, H), torch.randn(V, H), targets - 1)
    with pytest.raises(ValueError, match=r"logprobs has shape \[6, 7\], must be \[N\]"):
        policy_loss(logits, advantages, cu_seqlens, PolicyLoss())
    with pytest.raises(TypeError, match="logprobs has dtype"):
        policy_loss(targets, advantages, cu_seqlens, PolicyLoss())
    with pytest.raises(ValueError, match="entropy is None, but the loss has entropy_coef"):
        policy_loss(logits[:, 0], advantages, cu_seqlens, PolicyLoss(entropy_coef=0.1))
    with pytest.raises(TypeError, match=r"entropy has dtype torch.int64, must be floating point"):
        policy_loss(logits[:, 0], advantages, cu_seqlens, PolicyLoss(), entropy=targets)
    with pytest.raises(TypeError, match="eps is a str, must be a number"):
        perl_kernels.group_advantages(advantages, [2], eps="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"entropy has shape \[7\]"):
        policy_loss(logits[:, 0], advantages, cu_seqlens, PolicyLoss(), entropy=logits[0])
    for function in (token_logprobs, grpo_loss, linear_token_logprobs, policy_loss):
        given = arguments(logits=logits, logprobs=logits[:, 0], backend="native")
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        with pytest.raises(ValueError, match="'native' is not available"):
            function(**{name: given[name] for name in names}, backend="native")


def test_broken_values_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a check would synchronise, the result is NaN and counted, never out of bounds."""
    for module in ("checks", "advantage"):
        monkeypatch.setattr(f"perl_kernels.{module}.values_visible", lambda tensor: False)
    out_of_range = torch.tensor([0, -100, 2, V, 4, 5])
    output = linear_grpo_loss(**arguments(targets=out_of_range))
    assert output.loss.isnan() and output.metrics["invalid_rows"] == 2
    masked = linear_grpo_loss(
        **arguments(targets=out_of_range, weights=torch.tensor([1, 0, 1, 0, 1, 1]))
    )
    assert masked.loss.isfinite() and masked.metrics["invalid_rows"] == 0
    second = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    for changes, rows in (
        *(
            ({"cu_seqlens": broken}, N)
            for broken in (bounds(0, 2, 5), bounds(0, 2, 9), bounds(1, 2, 6), bounds(0, 8, 6))
        ),
        *(({"normalizer": torch.tensor(value)}, N) for value in (-4.0, 0.0, NAN, math.inf)),
        ({"normalizer": torch.tensor(-4)}, N),
        ({"weights": second}, 1),
        ({"weights": second.where(second > 0, NAN)}, 1),
        ({"weights": second.where(second > 0, math.inf), "normalizer": 6.0}, 1),
        ({"temperature": second}, 1),
        ({"temperature": second.where(second > 0, 0.0)}, 1),
        ({"temperature": second.where(second > 0, math.inf)}, 1),
    ):
        for needs_gradient in (False, True):
            given = arguments(**changes)
            given["hidden"].requires_grad_(needs_gradient)
            output = linear_grpo_loss(**given)
            assert output.loss.isnan() and output.metrics["invalid_rows"] == rows, changes
            if needs_gradient and "temperature" not in changes:
                (gradient,) = torch.autograd.grad(output.loss, given["hidden"])
                assert gradient.isnan().any()
    nothing = {"hidden": torch.empty(0, H), "targets": torch.arange(0)}
    output = linear_grpo_loss(**arguments(**nothing))
    assert output.loss.isnan() and output.metrics["invalid_rows"] == 1


def test_masked_rows_may_have_any_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_kernels.checks.values_visible", lambda tensor: False)
    temperature = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0, 1.0])
    given = arguments(temperature=temperature, weights=(temperature > 0).float())
    hidden = given["hidden"].requires_grad_()
    output = linear_grpo_loss(**given)
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    assert output.loss.isfinite() and output.metrics["invalid_rows"] == 0
    assert gradient.isfinite().all() and (gradient[temperature <= 0] == 0).all()


def test_group_sizes_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_kernels.advantage.values_visible", lambda tensor: False)
    for sizes in ([2, 3], [5, -1]):
        seen = perl_kernels.group_advantages(torch.arange(4.0), torch.tensor(sizes))
        assert all(values.isnan().all() for values in (seen.advantages, seen.mean, seen.std))
        assert not seen.active.any()
        # A list is on the host, whatever the rewards are on.
        with pytest.raises(ValueError, match="group_sizes must be at least 0 and sum to the 4"):
            perl_kernels.group_advantages(torch.ones(4), sizes)


class NoCopyFromTheHost(TorchFunctionMode):
    """Fails where a Python value is made a tensor on a device: the copy there is waited for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            assert kwargs.get("device") is None, f"{args[0]!r} is copied to {kwargs['device']}"
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("surrogate", "aggregation"),
    [
        *((surrogate, "token-mean") for surrogate in get_args(Surrogate)),
        *(("clip", aggregation) for aggregation in get_args(Aggregation)[1:]),
    ],
)
def test_no_synchronisation(
    surrogate: Any, aggregation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meta tensor has no values: .item(), bool(tensor) and the like raise, as on a GPU that
    may not be waited for."""
    # There is no autocast of meta tensors to ask for or to turn off.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(ops, "no_autocast", lambda hidden: contextlib.nullcontext())
    # Called as an operator, a meta tensor would get the fake instead.
    monkeypatch.setattr(ops, "linear_grpo_loss", registry.IMPLEMENTATIONS["linear_grpo_loss"])
    loss = PolicyLoss(
        surrogate=surrogate,
        aggregation=aggregation,
        max_completion_length=4,
        kl="k3",
        kl_coef=0.1,
        entropy_coef=0.1,
        correction="token_mask",
    )
    given = arguments(loss=loss, temperature=torch.ones(N))
    others = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "weights")
    given.update({name: torch.zeros(N) for name in others})
    given = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    given["hidden"].requires_grad_()
    grouped = GroupedRewards(torch.ones(2, device="meta"), [2], reward_weights=[1.0])
    for advantages in (given["advantages"], grouped):
        for normalizer in (None, 6.0, torch.ones((), device="meta"), torch.tensor(6.0)):
            for old in (given["old_logprobs"], None):
                changes = {"advantages": advantages, "normalizer": normalizer, "old_logprobs": old}
                # As within an operator, where autograd does not look.
                monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
                with NoCopyFromTheHost(), torch.no_grad():
                    linear_grpo_loss(**{**given, **changes})


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    given = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments(normalizer=6.0, weights=torch.ones(N)).items()
    }
    given["hidden"].requires_grad_()
    grouped = GroupedRewards(torch.ones(2, device="cuda"), [2], reward_weights=[1.0])
    linear_grpo_loss(**given).loss.backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for advantages in (given["advantages"], grouped):
            linear_grpo_loss(**{**given, "advantages": advantages}).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_entropy_is_no_argument_where_it_is_computed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'entropy'"):
        linear_grpo_loss(**arguments(entropy=torch.ones(N)))


def test_grouped_rewards_can_be_compared() -> None:
    grouped = GroupedRewards(torch.ones(3), torch.tensor([3]))
    assert grouped == grouped and grouped != GroupedRewards(torch.ones(3), torch.tensor([3]))
    assert len({grouped, grouped}) == 1


def test_backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERL_BACKEND", "native")
    with pytest.raises(ValueError, match="'native' is not available"):
        linear_grpo_loss(**arguments())
    linear_grpo_loss(**arguments(backend="torch"))
    monkeypatch.setenv("PERL_BACKEND", "fastest")
    with pytest.raises(ValueError, match="PERL_BACKEND is 'fastest'"):
        linear_grpo_loss(**arguments())


def test_auto_says_once_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PERL_BACKEND", raising=False)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="perl_kernels"):
        linear_grpo_loss(**arguments())
        linear_grpo_loss(**arguments())
    assert len(caplog.records) == 1
    on_a_gpu = torch.cuda.is_available()
    assert ("chose triton" if on_a_gpu else "chose torch") in caplog.text
    assert dispatch.available_backends()["torch"][0]


def test_public_names_and_cost_of_the_import() -> None:
    assert set(perl_kernels.__all__) == {
        "GroupAdvantages",
        "GroupedRewards",
        "LossOutput",
        "PolicyLoss",
        "TokenLogprobs",
        "__version__",
        "group_advantages",
        "grpo_loss",
        "linear_grpo_loss",
        "linear_token_logprobs",
        "policy_loss",
        "token_logprobs",
        "top_entropy_weights",
    }
    root = str(Path(perl_kernels.__file__).parents[1])
    script = (
        "import sys, time, torch; t = time.perf_counter(); before = set(sys.modules)\n"
        "import perl_kernels; new = set(sys.modules) - before\n"
        "assert time.perf_counter() - t < 0.5\n"
        "assert not {n for n in new if n.startswith('triton')}, new\n"
        "from perl_kernels import PolicyLoss, linear_grpo_loss\n"
        "weight = torch.zeros(5, 2, requires_grad=True)\n"
        "loss = linear_grpo_loss(torch.ones(3, 2), weight, torch.arange(3), torch.ones(1),"
        " torch.tensor([0, 3]), PolicyLoss()).loss.backward()\n"
        "assert not {'torch._dynamo', 'triton'} & (set(sys.modules) - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
