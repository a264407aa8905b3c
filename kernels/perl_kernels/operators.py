"""The operators of `torch.ops.perl_kernels`: opaque to `torch.compile`, with fakes and gradients.

The public functions check their arguments and call these. An operator takes its numbers as one CPU
tensor, its names as one string: a call costs the host little, and `torch.compile` does not compile
anew for other numbers.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import engine, tracing
from .head import Head, Logits, Products, kept_dtype, no_autocast
from .objective import PolicyLoss
from .passes import gradient_pass, loss_pass, stats_pass
from .values import (
    METRICS,
    Coefficients,
    GroupAdvantages,
    LossInputs,
    Rewards,
    RowStats,
    Scoring,
    compute_dtype,
)

_Tensors = tuple[Tensor, ...]

_SCORING = "Tensor targets, Tensor? temperatures"
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, {_SCORING}"
_PRODUCTS = "int chunk_size, int memory_budget, ScalarType operands, ScalarType logits"
_LOSS = (
    "Tensor cu_seqlens, Tensor? advantages, Tensor? rewards, Tensor? group_sizes, "
    "Tensor? reward_weights, Tensor? old, Tensor? ref, Tensor? rollout, Tensor? weights, "
    "Tensor? normalizer, Tensor numbers, str names"
)
_N_LOSS = len(_LOSS.split(","))
_STATS = "Tensor logprobs, Tensor entropy, Tensor shift, Tensor log_sum"


# ---- how an operator is registered

# Not torch.library.custom_op, which imports torch._dynamo at the first call: a second, 150 MB.
_library = torch.library.Library("perl_kernels", "FRAGMENT")
# Of the dispatcher: what it does after autograd, and what is the last thing that it does.
_BELOW = torch._C._after_ADInplaceOrView_keyset
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
ONCE = (
    "functions of perl_kernels can be differentiated once only (create_graph=True was given); "
    "perl_kernels.reference has the same functions, differentiable any number of times"
)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as `torch.ops.perl_kernels.<name>`; gives the operator."""

    def register(function: Callable[..., Any]) -> Any:
        # Another import of this module finds its operators there; they do the same.
        if not hasattr(torch.ops.perl_kernels, name):
            IMPLEMENTATIONS[name] = _on_its_device(function)
            _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(name, IMPLEMENTATIONS[name], "CompositeExplicitAutograd")
        return getattr(torch.ops.perl_kernels, name).default

    return register


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda:
            return function(first, *arguments)
        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return call


def _fake(name: str) -> Callable[[Callable[..., Any]], None]:
    def register(function: Callable[..., Any]) -> None:
        if name in IMPLEMENTATIONS:
            torch.library.register_fake(f"perl_kernels::{name}", function, lib=_library)

    return register


def _differentiable(
    name: str, count: int, save: Callable[..., None], backward: Callable[..., Sequence[Any]]
) -> None:
    """Give an operator its gradients: `save(ctx, arguments, outputs)`, then `backward(ctx, *grads)`
    for the first `count` arguments. `torch.library.register_autograd` would take 0.1 ms a call."""
    if name not in IMPLEMENTATIONS:
        return
    operator = getattr(torch.ops.perl_kernels, name).default

    def below(keyset: Any, arguments: tuple[Any, ...]) -> _Tensors:
        keyset = keyset & _BELOW
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.highestPriorityTypeId() in _DEVICES:
                # What the dispatcher would call, which takes longer to find it.
                return IMPLEMENTATIONS[name](*arguments)
            return operator.redispatch(keyset, *arguments)

    def forward(ctx: Any, keyset: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> _Tensors:
        outputs = below(keyset, arguments)
        ctx.set_materialize_grads(False)
        ctx.needs = ctx.needs_input_grad[2:]
        save(ctx, arguments, outputs)
        return outputs

    def checked(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        return None, None, *backward(ctx, *grads)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(checked)}
    # The name is the one of the loss's grad_fn.
    function = type(f"perl_kernels_{name}_", (torch.autograd.Function,), functions)

    def kernel(keyset: Any, *arguments: Any) -> _Tensors:
        if forward_ad._current_level >= 0:
            _refuse_tangents(arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[:count]):
            # Autograd looks at each argument, and needs those of the gradients only.
            return function.apply(keyset, arguments, *arguments[:count])  # type: ignore[attr-defined]
        return below(keyset, arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(
                "functions of perl_kernels have no forward-mode derivative (a tangent was given); "
                "perl_kernels.reference has the same functions with one"
            )


def handed_over(found: Tensor, by: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """found * by in `dtype`; in `found` itself unless another backward may ask for it."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    traced = tracing() or type(found) is not Tensor or found.is_meta
    if kept or traced or found.dtype != dtype:
        # Of the shape of `found`, as a 0-dim factor would be rounded to its dtype first.
        return torch.mul(found, by.expand(found.shape)).to(dtype)
    scale_(found, by, backend)
    return found


def scale_(x: Tensor, by: Tensor, backend: str) -> None:
    """x *= by, a 0-dim tensor; nothing is read or written where that is 1 (on a GPU, in Triton)."""
    if x.is_cuda and backend == "triton":
        engine(backend).rows.scale_(x, by)
    elif x.is_cuda:
        # A 0-dim factor would be rounded to the dtype of `x` first.
        x.mul_(by.expand(x.shape))
    elif by != 1:
        # On a CPU it is not, and an expanded one would make fp32 copies of `x`.
        x.mul_(by)


# ---- arguments of the operators as values, and back


def as_numbers(*values: float) -> Tensor:
    """[n] fp64 on the CPU."""
    if values and not tracing():
        # Takes a third of the time of torch.tensor.
        return torch.frombuffer(array("d", values), dtype=torch.float64)
    if torch.compiler.is_compiling():
        # A sum is what a number that changes between calls can go into without a new compilation.
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([zero + value for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def loss_arguments(
    loss: PolicyLoss,
    inputs: LossInputs,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    """The arguments `_LOSS` of a call."""
    rewards = inputs.rewards
    names, eps = "", 0.0
    if rewards is not None:
        names, eps = _grouping_names(rewards), rewards.eps
    numbers = as_numbers(
        *_scoring_numbers(temperature, softcap), inputs.count or 0.0, eps, *loss.numbers
    )
    return (
        inputs.cu_seqlens,
        inputs.advantages,
        *((None, None, None) if rewards is None else rewards[:3]),
        inputs.old,
        inputs.ref,
        inputs.rollout,
        inputs.weights,
        inputs.normalizer,
        numbers,
        f"{loss.axes};{names}",
    )


def scoring_arguments(
    targets: Tensor, temperature: float | Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Targets, temperatures by row, and the other numbers."""
    return targets, per_row(temperature), as_numbers(*_scoring_numbers(temperature, softcap))


def per_row(temperature: float | Tensor) -> Tensor | None:
    return temperature.detach() if isinstance(temperature, Tensor) else None


def _scoring_numbers(temperature: float | Tensor, softcap: float | None) -> tuple[float, float]:
    tau = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    return tau, 0.0 if softcap is None else float(softcap)


def _scoring(
    targets: Tensor, temperatures: Tensor | None, numbers: Sequence[float], bias: Tensor | None
) -> Scoring:
    temperature, softcap = numbers[:2]
    return Scoring(
        targets, bias, temperature if temperatures is None else temperatures, softcap or None
    )


def _grouping_names(rewards: Rewards) -> str:
    unbiased = "unbiased" if rewards.unbiased else ""
    return f"{rewards.scale}|{rewards.baseline}|{unbiased}|{rewards.combine}"


def _rewards(
    rewards: Tensor, sizes: Tensor, weights: Tensor | None, names: str, eps: float
) -> Rewards:
    scale, baseline, unbiased, combine = names.split("|")
    return Rewards(rewards, sizes, weights, scale, baseline, bool(unbiased), eps, combine)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _objective(axes: str, *numbers: float) -> PolicyLoss:
    return PolicyLoss.of(axes, numbers)


def _loss(like: Tensor, arguments: tuple[Any, ...]) -> tuple[PolicyLoss, LossInputs, list[float]]:
    """The objective, the inputs on the device of `like`, and the numbers."""
    cu_seqlens, advantages, rewards, sizes, reward_weights = arguments[:5]
    old, ref, rollout, weights, normalizer, numbers, names = arguments[5:]
    axes, grouping = names.split(";")
    numbers = numbers.tolist()
    count, eps = numbers[2:4]
    loss = _objective(axes, *numbers[4:])
    if cu_seqlens.device != like.device:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "cu_seqlens is on the CPU, must be on the device of the other tensors while a "
                "CUDA graph is captured"
            )
        # A copy, as the caller may fill a pinned buffer anew before this one is read.
        cu_seqlens = cu_seqlens.clone().pin_memory().to(like.device, non_blocking=True)
    if normalizer is not None and normalizer.device.type == "cpu":
        normalizer, count = None, float(normalizer)
        count = count if 0 < count < math.inf else math.nan
    group = None
    if rewards is not None:
        group = _rewards(rewards, sizes, reward_weights, grouping, eps)
    per_token = advantages is not None and advantages.shape[0] != cu_seqlens.shape[0] - 1
    others = (old, ref, rollout, weights, normalizer, count or None, per_token)
    return loss, LossInputs(cu_seqlens, advantages, group, *others), numbers


def _like(tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.new_empty(shape, dtype=dtype or compute_dtype(tensor))


def _fake_stats(like: Tensor, count: int) -> _Tensors:
    return tuple(_like(like, like.shape[0]) for _ in range(count))


def _fake_value(like: Tensor) -> tuple[Tensor, Tensor]:
    return _like(like), _like(like, len(METRICS))


# ---- log-probs of logits


@_operator(
    "token_logprobs", f"(Tensor logits, {_SCORING}, Tensor numbers, str backend) -> ({_STATS})"
)
def token_logprobs(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, numbers: Tensor, backend: str
) -> _Tensors:
    scoring = _scoring(targets, temperatures, numbers.tolist(), None)
    return tuple(engine(backend).rows.row_stats(logits, scoring))


@_fake("token_logprobs")
def _(logits: Tensor, *_: Any) -> _Tensors:
    return _fake_stats(logits, 4)


@_operator(
    "token_logprobs_backward",
    f"(Tensor grad_logprobs, Tensor? grad_entropy, Tensor logits, {_SCORING}, Tensor numbers, "
    f"str backend, {_STATS}) -> Tensor",
)
def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    numbers: Tensor,
    backend: str,
    *stats: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scoring = _scoring(targets, temperatures, numbers.tolist(), None)
    coefficients = Coefficients(grad_logprobs, grad_entropy)
    engine(backend).rows.row_gradient(logits, scoring, RowStats(*stats), coefficients, grad)
    return grad


@_fake("token_logprobs_backward")
def _(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return _like(logits, *logits.shape, dtype=logits.dtype)


def _save_logits(ctx: Any, arguments: tuple[Any, ...], outputs: _Tensors) -> None:
    *tensors, ctx.backend = arguments
    ctx.mark_non_differentiable(*outputs[2:])
    ctx.save_for_backward(*tensors, *outputs)


def _logits_backward(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
    tensors, stats = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    by_logprob = torch.zeros_like(stats[0]) if grads[0] is None else grads[0]
    return [token_logprobs_backward(by_logprob, grads[1], *tensors, ctx.backend, *stats)]


_differentiable("token_logprobs", 1, _save_logits, _logits_backward)


# ---- log-probs of hidden states and head


@_operator(
    "linear_token_logprobs", f"({_HEAD}, Tensor numbers, {_PRODUCTS}, str backend) -> ({_STATS})"
)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    numbers: Tensor,
    *arguments: Any,
) -> _Tensors:
    *products, backend = arguments
    scoring = _scoring(targets, temperatures, numbers.tolist(), bias)
    with no_autocast(hidden):
        head = Head(hidden, weight, scoring, Products(*products))
        return tuple(stats_pass(engine(backend), head))


@_fake("linear_token_logprobs")
def _(hidden: Tensor, *_: Any) -> _Tensors:
    return _fake_stats(hidden, 4)


@_operator(
    "linear_token_logprobs_backward",
    f"(Tensor grad_logprobs, Tensor? grad_entropy, bool[] needs, {_HEAD}, Tensor numbers, "
    f"{_PRODUCTS}, str backend, {_STATS}) -> (Tensor hidden, Tensor weight, Tensor bias)",
)
def linear_token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    needs: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    numbers: Tensor,
    *arguments: Any,
) -> _Tensors:
    products, backend, stats = Products(*arguments[:4]), arguments[4], RowStats(*arguments[5:])
    scoring = _scoring(targets, temperatures, numbers.tolist(), bias)
    with no_autocast(hidden):
        head = Head(hidden, weight, scoring, products, tuple(needs))  # type: ignore[arg-type]
        coefficients = Coefficients(grad_logprobs, grad_entropy)
        gradient_pass(engine(backend), head, stats, coefficients)
        return _dense(head, rounded=True)


@_fake("linear_token_logprobs_backward")
def _(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    needs: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> _Tensors:
    return _fake_head_gradients((hidden, weight, bias), needs, None)


def _save_head(ctx: Any, arguments: tuple[Any, ...], outputs: _Tensors) -> None:
    ctx.settings = arguments[6:]
    ctx.mark_non_differentiable(*outputs[2:])
    ctx.save_for_backward(*arguments[:6], *outputs)


def _head_backward(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
    head, stats = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    by_logprob = torch.zeros_like(stats[0]) if grads[0] is None else grads[0]
    needs = list(ctx.needs[:3])
    found = linear_token_logprobs_backward(
        by_logprob, grads[1], needs, *head, *ctx.settings, *stats
    )
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


_differentiable("linear_token_logprobs", 3, _save_head, _head_backward)


def _dense(head: Head, rounded: bool) -> _Tensors:
    """Gradients of hidden, weight and bias; empty where they are not needed."""
    found = []
    for grad, dtype in zip(head.gradients(), head.dtypes, strict=True):
        if grad is None:
            grad = torch.empty(0, dtype=head.dtype, device=head.hidden.device)
        elif rounded:
            grad = grad.to(dtype)
        found.append(grad)
    return tuple(found)


def _fake_head_gradients(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], operands: torch.dtype | None
) -> _Tensors:
    hidden = tensors[0]
    assert hidden is not None

    def kept(dtype: torch.dtype) -> torch.dtype:
        return dtype if operands is None else kept_dtype(hidden, operands, dtype)

    return tuple(
        _like(tensor, *tensor.shape, dtype=kept(tensor.dtype))
        if needed and tensor is not None
        else _like(hidden, 0)
        for tensor, needed in zip(tensors, needs, strict=True)
    )


# ---- losses


@_operator(
    "policy_loss",
    f"(Tensor logprobs, Tensor? entropy, {_LOSS}, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor by_logprob, Tensor by_entropy)",
)
def policy_loss(logprobs: Tensor, entropy: Tensor | None, *arguments: Any) -> _Tensors:
    loss, inputs, _ = _loss(logprobs, arguments[:-1])
    completions = engine(arguments[-1]).completions
    prepared = completions.prepare(loss, inputs, logprobs.shape[0], compute_dtype(logprobs))
    found = completions.evaluate(loss, prepared, inputs, logprobs, entropy)
    by_logprob, by_entropy = found.coefficients
    if by_entropy is None:
        by_entropy = by_logprob.new_empty(0)
    return found.value, found.metrics, by_logprob, by_entropy


@_fake("policy_loss")
def _(logprobs: Tensor, entropy: Tensor | None, *arguments: Any) -> _Tensors:
    names = arguments[-2]
    has_bonus = entropy is not None and "entropy" in names.partition(";")[0].split("|")
    by_entropy = _like(logprobs, logprobs.shape[0] if has_bonus else 0)
    return *_fake_value(logprobs), _like(logprobs, logprobs.shape[0]), by_entropy


def _save_policy(ctx: Any, arguments: tuple[Any, ...], outputs: _Tensors) -> None:
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in arguments[:2]]
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*outputs[2:])


def _policy_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Sequence[Tensor | None]:
    if grad_loss is None:
        return [None, None]
    return [
        (found * grad_loss).to(dtype) if needed and found.shape[0] else None
        for found, needed, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=False)
    ]


_differentiable("policy_loss", 2, _save_policy, _policy_backward)


@_operator(
    "grpo_loss_",
    f"(Tensor(a!) logits, {_SCORING}, {_LOSS}, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, Tensor unit)",
)
def grpo_loss_(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, *arguments: Any
) -> _Tensors:
    """The loss of logits, whose gradient takes their place; in fp16 times `unit []`, else empty."""
    loss, inputs, numbers = _loss(logits, arguments[:-1])
    tiles = Logits(logits, _scoring(targets, temperatures, numbers, None), logits)
    found, stats = loss_pass(
        engine(arguments[-1]), tiles, loss, inputs, arguments[0], gradient=True
    )
    unit = found.value.new_empty(0) if tiles.unit is None else tiles.unit
    return found.value, found.metrics, stats.logprobs, stats.entropy, unit


@_fake("grpo_loss_")
def _(logits: Tensor, *_: Any) -> _Tensors:
    unit = _like(logits) if logits.dtype == torch.float16 else _like(logits, 0)
    return *_fake_value(logits), *_fake_stats(logits, 2), unit


@_operator(
    "linear_grpo_loss",
    f"({_HEAD}, {_LOSS}, bool[] needs, bool skip_idle, {_PRODUCTS}, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, "
    "Tensor by_hidden, Tensor by_weight, Tensor by_bias)",
)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    *arguments: Any,
) -> _Tensors:
    needs, skip_idle, *products, backend = arguments[_N_LOSS:]
    loss, inputs, numbers = _loss(hidden, arguments[:_N_LOSS])
    scoring = _scoring(targets, temperatures, numbers, bias)
    with no_autocast(hidden):
        head = Head(hidden, weight, scoring, Products(*products), tuple(needs))  # type: ignore[arg-type]
        found, stats = loss_pass(
            engine(backend),
            head,
            loss,
            inputs,
            arguments[0],
            gradient=any(needs),
            skip_idle=skip_idle,
        )
        gradients = _dense(head, rounded=False)
    return found.value, found.metrics, stats.logprobs, stats.entropy, *gradients


@_fake("linear_grpo_loss")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    *arguments: Any,
) -> _Tensors:
    needs, operands = arguments[_N_LOSS], arguments[_N_LOSS + 4]
    gradients = _fake_head_gradients((hidden, weight, bias), needs, operands)
    return *_fake_value(hidden), *_fake_stats(hidden, 2), *gradients


def _save_linear(ctx: Any, arguments: tuple[Any, ...], outputs: _Tensors) -> None:
    ctx.backend = arguments[-1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in arguments[:3]]
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*outputs[4:])


def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Sequence[Tensor | None]:
    if grad_loss is None:
        return [None, None, None]
    return [
        handed_over(found, grad_loss, dtype, ctx.backend) if needed else None
        for found, needed, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=False)
    ]


_differentiable("linear_grpo_loss", 3, _save_linear, _linear_backward)


# ---- advantages


@_operator(
    "group_advantages",
    "(Tensor rewards, Tensor group_sizes, Tensor? reward_weights, Tensor numbers, str names, "
    "str backend) -> (Tensor advantages, Tensor mean, Tensor std, Tensor active)",
)
def group_advantages(
    rewards: Tensor,
    group_sizes: Tensor,
    reward_weights: Tensor | None,
    numbers: Tensor,
    names: str,
    backend: str,
) -> _Tensors:
    (eps,) = numbers.tolist()
    grouped = _rewards(rewards, group_sizes, reward_weights, names, eps)
    return tuple(engine(backend).completions.group_advantages(grouped))


@_fake("group_advantages")
def _(rewards: Tensor, group_sizes: Tensor, *_: Any) -> _Tensors:
    n_groups = group_sizes.shape[0]
    return tuple(
        GroupAdvantages(
            _like(rewards, rewards.shape[0]),
            _like(rewards, n_groups),
            _like(rewards, n_groups),
            _like(rewards, n_groups, dtype=torch.bool),
        )
    )


def advantages_arguments(rewards: Rewards) -> tuple[Any, ...]:
    """The arguments of `group_advantages`."""
    return *rewards[:3], as_numbers(rewards.eps), _grouping_names(rewards)
