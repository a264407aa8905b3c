"""What the public functions refuse, which backend they choose, and what importing them costs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import perl_kernels
from perl_kernels import (
    GroupedRewards,
    PolicyLoss,
    dispatch,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    operators,
    policy_loss,
    token_logprobs,
)
from perl_kernels.objective import Aggregation, Surrogate
from tests.kernels.call import BACKENDS, DEVICE
from tests.messages import refused, tells

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


LOGPROBS = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
POSITIVE = [0.0, -1.0, math.inf, NAN]
ELSEWHERE = {
    name: tensor.to("meta")
    for name, tensor in arguments(
        **dict.fromkeys([*LOGPROBS, "temperature", "weights"], torch.ones(N)), bias=torch.ones(V)
    ).items()
    if isinstance(tensor, torch.Tensor) and name != "hidden"
}


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        # what has the wrong shape, the shape that came, the shape that is wanted
        ({"hidden": torch.randn(N, 2, H)}, ValueError, ("hidden", [N, 2, H], "[N, H]", "hidden[mask]")),
        ({"hidden": torch.randn(N)}, ValueError, ("hidden", [N], "[N, H]")),
        ({"weight": torch.randn(V)}, ValueError, ("weight", [V], "[V, H]")),
        ({"weight": torch.randn(V, 3)}, ValueError, ("weight", [V, 3], "[V, H]", "hidden", H)),
        ({"weight": torch.empty(0, H)}, ValueError, ("targets", "V = 0")),
        ({"bias": torch.randn(V, 1)}, ValueError, ("bias", [V, 1], "[V]")),
        ({"bias": torch.randn(3)}, ValueError, ("bias", [3], "[V]", "V = 7")),
        ({"targets": torch.arange(5)}, ValueError, ("targets", [5], "[N]", "N = 6")),
        ({"temperature": torch.ones(3)}, ValueError, ("temperature", [3], "[N]", "N = 6")),
        ({"temperature": torch.tensor(1.0)}, ValueError, ("temperature", [], "[N]")),
        ({"advantages": torch.ones(3)}, ValueError, ("advantages", [3], "[B]", "B = 2", "N = 6")),
        ({"advantages": torch.ones(2, 3)}, ValueError, ("advantages", [2, 3], "[B]", "[N]")),
        ({"advantages": GroupedRewards(torch.ones(3), [3])}, ValueError, ("advantages.rewards", 3, "[B]", "B = 2")),
        ({"cu_seqlens": bounds()}, ValueError, ("cu_seqlens", [0], "[B + 1]")),
        ({"cu_seqlens": bounds(0)}, ValueError, ("cu_seqlens", [1], "B = 0", "N = 6")),
        ({"cu_seqlens": bounds(0, 2, 5)}, ValueError, ("cu_seqlens", 0, 5, "N = 6")),
        ({"cu_seqlens": bounds(1, 2, N)}, ValueError, ("cu_seqlens", 1, 6, "N = 6")),
        ({"cu_seqlens": bounds(0, 5, 2, N)}, ValueError, ("cu_seqlens", 5, 2)),
        ({"ref_logprobs": torch.ones(2, N)}, ValueError, ("ref_logprobs", [2, N], "[N]", "ref_logprobs[mask]")),
        ({"advantages": torch.ones(N) * 1j}, TypeError, ("advantages", "complex64")),
        ({"hidden": torch.randn(N, H).to(torch.float8_e4m3fn)}, TypeError, ("hidden", "float8_e4m3fn", 16)),
        *(({name: torch.ones(3)}, ValueError, (name, [3], "[N]", "N = 6")) for name in LOGPROBS),
        ({"weights": torch.ones(5)}, ValueError, ("weights", [5], "[N]", "N = 6")),
        ({"normalizer": torch.ones(2)}, ValueError, ("normalizer", [2], "float")),
        # of the wrong type, or dtype
        ({"hidden": [1.0]}, TypeError, ("hidden", "list", "[N, H]")),
        ({"hidden": torch.ones(N, H).long()}, TypeError, ("hidden", "torch.int64")),
        ({"weight": torch.randn(V, H).bfloat16()}, TypeError, ("weight", "torch.bfloat16", "hidden", "torch.float32", "autocast")),
        ({"bias": torch.ones(V).long()}, TypeError, ("bias", "torch.int64")),
        ({"targets": torch.rand(N)}, TypeError, ("targets", "torch.float32", "int64", "int32")),
        ({"temperature": "1"}, TypeError, ("temperature", "str", "float", "[N]")),
        ({"temperature": True}, TypeError, ("temperature", "bool")),
        ({"softcap": "a"}, TypeError, ("softcap", "str", "float", "None")),
        *(({name: "a"}, TypeError, (name, "str", "int", "None")) for name in ("chunk_size", "memory_budget")),
        *(({name: 2.0}, TypeError, (name, "float", "int", "None")) for name in ("chunk_size", "memory_budget")),
        ({"chunk_size": True}, TypeError, ("chunk_size", "bool", "int")),
        ({"advantages": 1.0}, TypeError, ("advantages", "float", "tensor")),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, ("cu_seqlens", "torch.float32", "int32", "int64")),
        ({"loss": "grpo"}, TypeError, ("loss", "str", "PolicyLoss.preset('grpo')")),
        ({"loss": 3}, TypeError, ("loss", "int", "PolicyLoss")),
        ({"rollout_logprobs": 0.0}, TypeError, ("rollout_logprobs", "float", "[N]")),
        *(({name: torch.zeros(N).long()}, TypeError, (name, "torch.int64")) for name in LOGPROBS),
        ({"normalizer": "6"}, TypeError, ("normalizer", "str", "float", "0-dim")),
        ({"normalizer": True}, TypeError, ("normalizer", "bool", "float")),
        # out of range
        ({"targets": torch.full((N,), V)}, ValueError, ("targets", V, "[0, V)", "V = 7")),
        ({"targets": torch.full((N,), -100)}, ValueError, ("targets", -100, "[0, V)", "V = 7")),
        *(({"temperature": x}, ValueError, ("temperature", x, 0)) for x in POSITIVE),
        *(({"temperature": torch.full((N,), x)}, ValueError, ("temperature", x, 0)) for x in POSITIVE),
        *(({"softcap": x}, ValueError, ("softcap", x, 0, "None")) for x in POSITIVE),
        *(({"normalizer": x}, ValueError, ("normalizer", x, 0)) for x in POSITIVE),
        *(({"normalizer": torch.tensor(x)}, ValueError, ("normalizer", x, 0)) for x in POSITIVE),
        ({"normalizer": torch.tensor(0)}, ValueError, ("normalizer", 0)),
        ({"chunk_size": 0}, ValueError, ("chunk_size", 0, 1)),
        ({"memory_budget": 0}, ValueError, ("memory_budget", 0, 1)),
        ({"chunk_size": 1, "memory_budget": 1}, ValueError, ("chunk_size", "memory_budget")),
        ({"logits_dtype": torch.float64}, ValueError, ("logits_dtype", "torch.float64", "torch.float32")),
        ({"weights": -0.5 * torch.ones(N)}, ValueError, ("weights", -0.5, 0)),
        ({"weights": -torch.ones(N).int()}, ValueError, ("weights", -1, 0)),
        ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "auto", "triton", "torch")),
        # missing, where the loss needs it
        ({"loss": PolicyLoss.preset("perl")}, ValueError, ("ref_logprobs", "None", "kl='k3'")),
        ({"loss": PolicyLoss(correction="token_mask")}, ValueError, ("rollout_logprobs", "None", "correction='token_mask'")),
        ({"loss": PolicyLoss.preset("dr_grpo")}, ValueError, ("PolicyLoss.max_completion_length", "None", "aggregation='seq-mean-token-sum-norm'")),
        # on another device
        *(({name: tensor}, ValueError, (name, "meta", "cpu")) for name, tensor in ELSEWHERE.items()),
        ({"normalizer": torch.ones((), device="meta")}, ValueError, ("normalizer", "meta", "cpu")),
        ({"advantages": GroupedRewards(torch.ones(2, device="meta"), [2])}, ValueError, ("advantages", "meta", "cpu")),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], error: type[Exception], names: tuple[Any, ...]) -> None:
    with refused(*names, error=error):
        linear_grpo_loss(**arguments(**changes))


def test_the_other_functions_check_too() -> None:
    logits, targets = torch.randn(N, V), torch.arange(N)
    common = (torch.ones(2), bounds(0, 2, N))
    with refused("logits", [N], "[N, V]", error=ValueError):
        token_logprobs(logits[:, 0], targets)
    with refused("temperature", 0.0, error=ValueError):
        token_logprobs(logits, targets, temperature=0.0)
    with refused("targets", "meta", "cpu", error=ValueError):
        token_logprobs(logits, targets.to("meta"))
    with refused("targets", 8, "V = 7", error=ValueError):
        grpo_loss(logits, targets + 3, *common, PolicyLoss())
    with refused("targets", -1, "V = 7", error=ValueError):
        linear_token_logprobs(torch.randn(N, H), torch.randn(V, H), targets - 1)
    with refused("logprobs", [N, V], "[N]", error=ValueError):
        policy_loss(logits, *common, PolicyLoss())
    with refused("logprobs", "torch.int64", error=TypeError):
        policy_loss(targets, *common, PolicyLoss())
    with refused("entropy", "None", "entropy_coef=0.1", error=ValueError):
        policy_loss(logits[:, 0], *common, PolicyLoss(entropy_coef=0.1))
    for entropy, error, names in (
        (targets, TypeError, ("torch.int64",)),
        (logits[0], ValueError, ([V], "[N]")),
        (logits[:, 0].to("meta"), ValueError, ("meta", "cpu")),
    ):
        with refused("entropy", *names, error=error):
            policy_loss(logits[:, 0], *common, PolicyLoss(), entropy=entropy)
    for function in (token_logprobs, grpo_loss, linear_token_logprobs, policy_loss):
        given = arguments(logits=logits, logprobs=logits[:, 0])
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        with refused("backend", "'cuda'", error=ValueError):
            function(**{name: given[name] for name in names}, backend="cuda")


def test_a_head_that_is_split_by_dtensor() -> None:
    """It is said what to give instead, in every function, of every argument."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.randn(8, H), mesh, [Shard(0)])
        rows = distribute_tensor(torch.randn(N, V), mesh, [Replicate()])
        with refused("weight", "DTensor", "group", error=TypeError):
            linear_grpo_loss(**arguments(weight=weight))
        with refused("weight", "DTensor", "group", error=TypeError):
            linear_token_logprobs(torch.randn(N, H), weight, torch.arange(N))
        with refused("logits", "DTensor", "full_tensor", error=TypeError):
            token_logprobs(rows, torch.arange(N))
        with refused("old_logprobs", "DTensor", "full_tensor", error=TypeError):
            linear_grpo_loss(**arguments(old_logprobs=rows[:, 0]))
        with refused("normalizer", "DTensor", "full_tensor", error=TypeError):
            linear_grpo_loss(**arguments(normalizer=rows[0, 0]))
        with refused("rewards", "DTensor", error=TypeError):
            group_advantages(rows[:, 0], [N])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nothing_else_is_refused(dtype: torch.dtype) -> None:
    """The last target, an empty first completion, bounds of either type, a cold row, weights that are flags."""
    changes: dict[str, Any] = {
        "targets": torch.tensor([0, V - 1, 0, 1, 2, 3], dtype=dtype),
        "cu_seqlens": bounds(0, 0, N).to(dtype),
        "temperature": torch.full((N,), 1e-3),
        "weights": torch.ones(N, dtype=torch.bool),
        "chunk_size": 1,
        "logits_dtype": torch.float32,
        "normalizer": torch.tensor(1e-3),
    }
    assert linear_grpo_loss(**arguments(**changes)).metrics["invalid_rows"] == 0


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`auto` is each of them in turn, and tensors are where it works."""
    monkeypatch.setenv("PERL_BACKEND", request.param)
    with torch.device(DEVICE):
        yield


@pytest.mark.usefixtures("each_backend")
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
    gspo, old = PolicyLoss.preset("gspo"), -torch.ones(N)
    by_completion = {"loss": gspo, "old_logprobs": old, "chunk_size": 3}
    for changes, rows in (
        *(
            ({"cu_seqlens": broken, **loss}, N)
            for broken in (bounds(0, 2, 5), bounds(0, 2, 9), bounds(1, 2, 6), bounds(0, 8, 6))
            for loss in ({}, by_completion)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_rows_may_have_any_temperature(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native" and dtype == torch.float16:
        pytest.skip("the native rows are for fp32 and bf16")
    monkeypatch.setattr("perl_kernels.checks.values_visible", lambda tensor: False)
    temperature = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0, 1.0])
    given = arguments(temperature=temperature, weights=(temperature > 0).float(), backend=backend)
    hidden = given["hidden"].to(dtype).requires_grad_()
    output = linear_grpo_loss(**{**given, "hidden": hidden, "weight": given["weight"].to(dtype)})
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    assert output.loss.isfinite() and output.metrics["invalid_rows"] == 0
    assert gradient.isfinite().all() and (gradient[temperature <= 0] == 0).all()


def test_any_default_device() -> None:
    """Numbers stay on the CPU, where the operators read them."""
    given = arguments(advantages=GroupedRewards(torch.arange(2.0), [2], reward_weights=[2.0]))
    with torch.device("meta"):
        output = linear_grpo_loss(**given)
    assert output.loss == linear_grpo_loss(**given).loss


@pytest.mark.usefixtures("each_backend")
def test_group_sizes_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_kernels.advantage.values_visible", lambda tensor: False)
    for sizes in ([2, 3], [5, -1]):
        seen = perl_kernels.group_advantages(torch.arange(4.0), torch.tensor(sizes))
        assert all(values.isnan().all() for values in (seen.advantages, seen.mean, seen.std))
        assert not seen.active.any()
        # A list is on the host, whatever the rewards are on.
        with refused("group_sizes", 4, error=ValueError):
            perl_kernels.group_advantages(torch.ones(4), sizes)


class NoCopyFromTheHost(TorchFunctionMode):
    """Fails where a Python value is made a tensor on a device: the copy there is waited for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            assert kwargs.get("device") in (None, "cpu"), (
                f"{args[0]!r} is copied to {kwargs['device']}"
            )
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
    # There is no autocast of meta tensors to turn off.
    monkeypatch.setattr(operators, "no_autocast", lambda hidden: contextlib.nullcontext())
    # Called as an operator, a meta tensor would get the fake instead.
    implementation = operators.IMPLEMENTATIONS["linear_grpo_loss"]
    monkeypatch.setattr(operators, "linear_grpo_loss", implementation)
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
    # As within an operator, where autograd does not look.
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    old = given["old_logprobs"]
    for changes in (
        {"normalizer": None, "old_logprobs": old},
        {"normalizer": 6.0, "old_logprobs": old, "advantages": grouped},
        {"normalizer": torch.ones((), device="meta"), "old_logprobs": None},
        {"normalizer": torch.tensor(6.0), "old_logprobs": None, "advantages": grouped},
    ):
        with NoCopyFromTheHost(), torch.no_grad():
            output = linear_grpo_loss(**{**given, **changes})
        assert output.loss.is_meta and output.logprobs.shape == (N,)
    # Here everything is looked at, and so nothing can go unnoticed above.
    monkeypatch.setattr("perl_kernels.checks.values_visible", lambda tensor: True)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"), torch.no_grad():
        linear_grpo_loss(**given)


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu() -> None:
    given = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments(normalizer=6.0, weights=torch.ones(N)).items()
    }
    given["hidden"].requires_grad_()
    grouped = GroupedRewards(torch.ones(2, device="cuda"), [2], reward_weights=[1.0])
    linear_grpo_loss(**given).loss.backward()
    losses = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for advantages in (given["advantages"], grouped):
            losses.append(linear_grpo_loss(**{**given, "advantages": advantages}).loss)
            losses[-1].backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            losses[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Every ratio is 1: the mean of the advantages, of ones and of equal rewards.
    torch.testing.assert_close(torch.stack(losses).cpu(), torch.tensor([-1.0, 0.0]))


def test_entropy_is_no_argument_where_it_is_computed() -> None:
    with refused("'entropy'", error=TypeError):
        linear_grpo_loss(**arguments(entropy=torch.ones(N)))


def test_grouped_rewards_can_be_compared() -> None:
    grouped = GroupedRewards(torch.ones(3), torch.tensor([3]))
    assert grouped == grouped and grouped != GroupedRewards(torch.ones(3), torch.tensor([3]))
    assert len({grouped, grouped}) == 1


def test_backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERL_BACKEND", "fastest")
    with refused("PERL_BACKEND", "'fastest'", "auto", "torch", error=ValueError):
        linear_grpo_loss(**arguments())
    linear_grpo_loss(**arguments(backend="torch"))


def test_auto_says_once_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PERL_BACKEND", raising=False)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="perl_kernels"):
        linear_grpo_loss(**arguments())
        linear_grpo_loss(**arguments())
    assert len(caplog.records) == 1
    on_cpu = "native" if dispatch.available_backends()["native"][0] else "torch"
    tells(caplog.text, "triton" if torch.cuda.is_available() else on_cpu)


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
        "import sys, time, torch; t = time.process_time(); before = set(sys.modules)\n"
        "import perl_kernels; new = set(sys.modules) - before\n"
        "assert time.process_time() - t < 0.5\n"
        "assert not {n for n in new if n.startswith('triton')}, new\n"
        "from perl_kernels import PolicyLoss, linear_grpo_loss\n"
        "weight = torch.zeros(5, 2, requires_grad=True)\n"
        "loss = linear_grpo_loss(torch.ones(3, 2), weight, torch.arange(3), torch.ones(1),"
        " torch.tensor([0, 3]), PolicyLoss()).loss.backward()\n"
        "assert not {'torch._dynamo', 'triton'} & (set(sys.modules) - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
