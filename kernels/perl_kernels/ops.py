"""The operators of `torch.ops.perl_kernels`: opaque to `torch.compile`, with fakes and gradients.

The public functions check their arguments and call these. A loss comes with its gradients, computed
in the forward and not yet divided by the loss's denominator; the backward multiplies them by
grad_loss / denominator.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .dispatch import engine
from .grouping import GroupAdvantages, Grouping, Rewards
from .inputs import Coefficients, LossInputs, compute_dtype
from .objective import NUMBERS, PolicyLoss
from .outputs import METRICS
from .passes import Scored, gradient_pass, loss_pass, stats_pass
from .registry import differentiable, fake, operator
from .scores import RowStats, Scoring
from .tiles import HeadTiles, LogitsTiles, no_autocast
from .tuning import logits_rows

_SCORING = "Tensor targets, Tensor? temperatures, float temperature"
_HEAD = f"Tensor hidden, Tensor weight, Tensor? bias, {_SCORING}, float? softcap"
_TILES = "int? chunk_size, int? memory_budget, ScalarType matmul_dtype, ScalarType logits_dtype"
_GROUPING = "str scale, str baseline, bool unbiased, float eps, str combine"
_LOSS = (
    f"str axes, {', '.join(f'float {name}' for name in NUMBERS)}, Tensor cu_seqlens, "
    "Tensor? advantages, Tensor? rewards, Tensor? group_sizes, "
    f"Tensor? reward_weights, {_GROUPING}, Tensor? old, Tensor? ref, Tensor? rollout, "
    "Tensor? weights, Tensor? normalizer, float? count"
)
_N_LOSS = len(_LOSS.split(","))
_STATS = "Tensor logprobs, Tensor entropy, Tensor shift, Tensor log_sum"
_Tensors = tuple[Tensor, ...]


def _like(tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.new_empty(shape, dtype=dtype or compute_dtype(tensor))


# ---- arguments of the operators as values, and back


@functools.lru_cache(maxsize=256)
def _objective(axes: str, *numbers: float) -> PolicyLoss:
    return PolicyLoss.of(axes, numbers)


def loss_arguments(loss: PolicyLoss, inputs: LossInputs) -> tuple[Any, ...]:
    """The arguments `_LOSS` of a call."""
    rewards = inputs.rewards
    return (
        loss.axes,
        *loss.numbers,
        inputs.cu_seqlens,
        inputs.advantages,
        *((None, None, None) if rewards is None else rewards[:3]),
        *(Grouping() if rewards is None else rewards.grouping),
        inputs.old,
        inputs.ref,
        inputs.rollout,
        inputs.weights,
        inputs.normalizer,
        inputs.count,
    )


def _loss_inputs(
    like: Tensor, arguments: tuple[Any, ...]
) -> tuple[PolicyLoss, LossInputs, list[int] | None]:
    """The objective, the inputs on the device of `like [N, ...]`, and the lengths of the completions
    if the host knows them."""
    loss = _objective(*arguments[: 1 + len(NUMBERS)])
    arguments = arguments[1 + len(NUMBERS) :]
    cu_seqlens, advantages, rewards, sizes, reward_weights = arguments[:5]
    grouping = Grouping(*arguments[5:10])
    old, ref, rollout, weights, normalizer, count = arguments[10:]
    lengths = None
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff().tolist()
        # torch.compile has not let the values be checked.
        if cu_seqlens[0] != 0 or min(lengths, default=0) < 0 or sum(lengths) != like.shape[0]:
            lengths = None
        if like.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "cu_seqlens is on the CPU, must be on the device of the other tensors while a "
                    "CUDA graph is captured"
                )
            # A copy, as the caller may fill a pinned buffer anew before this one is read.
            cu_seqlens = cu_seqlens.clone().pin_memory().to(like.device, non_blocking=True)
    if normalizer is not None and normalizer.device.type == "cpu":
        normalizer, count = None, float(normalizer)
        count = count if 0 < count < math.inf else math.nan
    group = None if rewards is None else Rewards(rewards, sizes, reward_weights, grouping)
    per_token = advantages is not None and advantages.shape[0] != cu_seqlens.shape[0] - 1
    others = (old, ref, rollout, weights, normalizer, count, per_token)
    inputs = LossInputs(cu_seqlens, advantages, group, *others)
    return loss, inputs, lengths


def _scoring(
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Scoring:
    return Scoring(targets, bias, temperature if temperatures is None else temperatures, softcap)


# ---- log-probs of logits


@operator("token_logprobs", f"(Tensor logits, {_SCORING}, str backend) -> ({_STATS})")
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    backend: str,
) -> _Tensors:
    scoring = _scoring(targets, temperatures, temperature)
    tiles = LogitsTiles(
        logits, scoring, logits_rows(logits.shape[0], logits.shape[1], backend), None
    )
    return tuple(stats_pass(engine(backend), tiles))


@fake("token_logprobs")
def _(logits: Tensor, *_: Any) -> _Tensors:
    return tuple(_like(logits, logits.shape[0]) for _ in range(4))


@operator(
    "token_logprobs_backward",
    f"(Tensor grad_logprobs, Tensor? grad_entropy, Tensor logits, {_SCORING}, str backend, "
    f"{_STATS}) -> Tensor",
)
def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    backend: str,
    *stats: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scoring = _scoring(targets, temperatures, temperature)
    tiles = LogitsTiles(
        logits, scoring, logits_rows(logits.shape[0], logits.shape[1], backend), grad
    )
    gradient_pass(
        engine(backend), tiles, RowStats(*stats), Coefficients(grad_logprobs, grad_entropy)
    )
    return grad


@fake("token_logprobs_backward")
def _(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return _like(logits, *logits.shape, dtype=logits.dtype)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    logits, targets, temperatures, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, targets, temperatures, *output)


def _logits_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    logits, targets, temperatures, *stats = ctx.saved_tensors
    grad_logprobs, grad_entropy = grads[:2]
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(stats[0])
    grad = token_logprobs_backward(
        grad_logprobs, grad_entropy, logits, targets, temperatures, *ctx.settings, *stats
    )
    return grad, *[None] * 4


differentiable("token_logprobs", _save_logits, _logits_backward)


# ---- log-probs of hidden states and head


@operator(
    "linear_token_logprobs", f"({_HEAD}, {_TILES}, bool persistent, str backend) -> ({_STATS})"
)
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
    memory_budget: int | None,
    matmul_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    persistent: bool,
    backend: str,
) -> _Tensors:
    scoring = _scoring(targets, temperatures, temperature, bias, softcap)
    with no_autocast(hidden):
        if persistent:
            operands = (hidden.to(matmul_dtype), weight.to(matmul_dtype))
            found = engine(backend).head_stats(*operands, scoring)
            if found is not None:
                return tuple(found)
        tiles = HeadTiles(
            hidden, weight, scoring, chunk_size, memory_budget, matmul_dtype, logits_dtype
        )
        return tuple(stats_pass(engine(backend), tiles))


@fake("linear_token_logprobs")
def _(hidden: Tensor, *_: Any) -> _Tensors:
    return tuple(_like(hidden, hidden.shape[0]) for _ in range(4))


@operator(
    "linear_token_logprobs_backward",
    f"(Tensor grad_logprobs, Tensor? grad_entropy, bool need_hidden, bool need_weight, "
    f"bool need_bias, {_HEAD}, {_TILES}, str backend, {_STATS}) "
    "-> (Tensor hidden, Tensor weight, Tensor bias)",
)
def linear_token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_size: int | None,
    memory_budget: int | None,
    matmul_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    backend: str,
    *stats: Tensor,
) -> _Tensors:
    scoring = _scoring(targets, temperatures, temperature, bias, softcap)
    needs = (need_hidden, need_weight, need_bias)
    with no_autocast(hidden):
        tiles = HeadTiles(
            hidden,
            weight,
            scoring,
            chunk_size,
            memory_budget,
            matmul_dtype,
            logits_dtype,
            needs,
        )
        gradient_pass(
            engine(backend), tiles, RowStats(*stats), Coefficients(grad_logprobs, grad_entropy)
        )
    found = _head_gradients(tiles)
    given = (hidden, weight, bias)
    return tuple(
        grad.to(tensor.dtype) if needed and tensor is not None else grad
        for grad, tensor, needed in zip(found, given, needs, strict=True)
    )


@fake("linear_token_logprobs_backward")
def _(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> _Tensors:
    needs = (need_hidden, need_weight, need_bias)
    return _fake_head_gradients(hidden, weight, bias, needs, accumulated=False)


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    *settings, _, backend = inputs[5:]
    ctx.settings = (*settings, backend)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:5], *output)


def _head_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    head, stats = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    grad_logprobs, grad_entropy = grads[:2]
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(stats[0])
    needs = ctx.needs_input_grad[:3]
    found = linear_token_logprobs_backward(
        grad_logprobs, grad_entropy, *needs, *head, *ctx.settings, *stats
    )
    return *_needed(found, needs), *[None] * 10


differentiable("linear_token_logprobs", _save_head, _head_backward)


def _head_gradients(tiles: HeadTiles) -> _Tensors:
    """Gradients of hidden, weight and bias; empty where they are not needed."""
    return tuple(
        torch.empty(0, dtype=tiles.dtype, device=tiles.hidden.device) if found is None else found
        for found in (tiles.grad_hidden, tiles.grad_weight, tiles.grad_bias)
    )


def _fake_head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    accumulated: bool,
) -> _Tensors:
    dtype = compute_dtype(hidden)
    found = []
    for tensor, needed in zip((hidden, weight, bias), needs, strict=True):
        if tensor is None or not needed:
            found.append(_like(hidden, 0))
        else:
            wide = accumulated and tensor is not hidden
            found.append(_like(tensor, *tensor.shape, dtype=dtype if wide else tensor.dtype))
    return tuple(found)


def _needed(found: _Tensors, needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


# ---- losses


@operator(
    "policy_loss",
    f"(Tensor logprobs, Tensor? entropy, {_LOSS}, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor by_logprob, Tensor by_entropy, Tensor factor)",
)
def policy_loss(logprobs: Tensor, entropy: Tensor | None, *arguments: Any) -> _Tensors:
    loss, inputs, _ = _loss_inputs(logprobs, arguments[:-1])
    found = engine(arguments[-1]).evaluate(loss, inputs, logprobs, entropy)
    by_entropy = found.coefficients.entropy
    if by_entropy is None:
        by_entropy = torch.zeros_like(found.coefficients.logprobs)
    return found.value, found.metrics, found.coefficients.logprobs, by_entropy, found.factor


@fake("policy_loss")
def _(logprobs: Tensor, *_: Any) -> _Tensors:
    coefficients = (_like(logprobs, logprobs.shape[0]) for _ in range(2))
    return *_fake_value(logprobs), *coefficients, _like(logprobs)


def _save_policy(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    logprobs, entropy = inputs[:2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = (logprobs.dtype, None if entropy is None else entropy.dtype)
    ctx.save_for_backward(*output[2:])


def _policy_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *found, factor = ctx.saved_tensors
    grads: list[Tensor | None] = [None, None]
    for i, (grad, dtype) in enumerate(zip(found, ctx.dtypes, strict=True)):
        if grad_loss is not None and ctx.needs_input_grad[i]:
            grads[i] = scale(grad, grad_loss, factor, dtype)
    return *grads, *[None] * (_N_LOSS + 1)


differentiable("policy_loss", _save_policy, _policy_backward)


@operator(
    "grpo_loss",
    f"(Tensor logits, {_SCORING}, {_LOSS}, bool gradient, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, Tensor grad, Tensor factor)",
)
def grpo_loss(logits: Tensor, *arguments: Any) -> _Tensors:
    gradient = arguments[-2]
    grad = _like(logits, 0)
    if gradient:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    found = _grpo_loss(logits, arguments, grad if gradient else None)
    return *_value(found), grad, found.evaluated.factor


@fake("grpo_loss")
def _(logits: Tensor, *arguments: Any) -> _Tensors:
    shape = logits.shape if arguments[-2] else (0,)
    dtype = logits.dtype if arguments[-2] else None
    return (
        *_fake_value(logits),
        *(_like(logits, logits.shape[0]) for _ in range(2)),
        _like(logits, *shape, dtype=dtype),
        _like(logits),
    )


def _save_grpo(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[-2:])


def _grpo_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grad, factor = ctx.saved_tensors
    grads = None if grad_loss is None else scale(grad, grad_loss, factor, ctx.dtype)
    return grads, *[None] * (3 + _N_LOSS + 2)


differentiable("grpo_loss", _save_grpo, _grpo_backward)


@operator(
    "grpo_loss_",
    f"(Tensor(a!) logits, {_SCORING}, {_LOSS}, str backend) "
    "-> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, Tensor factor)",
)
def grpo_loss_(logits: Tensor, *arguments: Any) -> _Tensors:
    """`grpo_loss` whose gradient takes the place of the logits."""
    found = _grpo_loss(logits, (*arguments[:-1], True, arguments[-1]), logits)
    return *_value(found), found.evaluated.factor


@fake("grpo_loss_")
def _(logits: Tensor, *_: Any) -> _Tensors:
    stats = (_like(logits, logits.shape[0]) for _ in range(2))
    return *_fake_value(logits), *stats, _like(logits)


def _grpo_loss(logits: Tensor, arguments: tuple[Any, ...], out: Tensor | None) -> Scored:
    *others, gradient, backend = arguments
    loss, inputs, lengths = _loss_inputs(logits, tuple(others[3:]))
    rows = logits_rows(logits.shape[0], logits.shape[1], backend)
    tiles = LogitsTiles(logits, _scoring(*others[:3]), rows, out)
    return loss_pass(engine(backend), tiles, loss, inputs, lengths, gradient=gradient)


@operator(
    "linear_grpo_loss",
    f"({_HEAD}, {_LOSS}, bool need_hidden, bool need_weight, bool need_bias, bool skip_idle, "
    f"{_TILES}, str backend) -> (Tensor loss, Tensor metrics, Tensor logprobs, Tensor entropy, "
    "Tensor hidden, Tensor weight, Tensor bias, Tensor factor)",
)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    *arguments: Any,
) -> _Tensors:
    loss, inputs, lengths = _loss_inputs(hidden, arguments[:_N_LOSS])
    need_hidden, need_weight, need_bias, skip_idle = arguments[_N_LOSS : _N_LOSS + 4]
    chunk_size, memory_budget, matmul_dtype, logits_dtype, backend = arguments[_N_LOSS + 4 :]
    needs = (need_hidden, need_weight, need_bias)
    scoring = _scoring(targets, temperatures, temperature, bias, softcap)
    with no_autocast(hidden):
        tiles = HeadTiles(
            hidden,
            weight,
            scoring,
            chunk_size,
            memory_budget,
            matmul_dtype,
            logits_dtype,
            needs,
        )
        found = loss_pass(
            engine(backend),
            tiles,
            loss,
            inputs,
            lengths,
            gradient=any(needs),
            skip_idle=skip_idle,
        )
    return *_value(found), *_head_gradients(tiles), found.evaluated.factor


@fake("linear_grpo_loss")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    *arguments: Any,
) -> _Tensors:
    needs = arguments[_N_LOSS : _N_LOSS + 3]
    return (
        *_fake_value(hidden),
        *(_like(hidden, hidden.shape[0]) for _ in range(2)),
        *_fake_head_gradients(hidden, weight, bias, needs, accumulated=True),
        _like(hidden),
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.n_inputs = len(inputs)
    ctx.save_for_backward(*output[4:])


def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *found, factor = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.n_inputs
    for i in range(3):
        if grad_loss is not None and ctx.needs_input_grad[i]:
            grads[i] = scale(found[i], grad_loss, factor, ctx.dtypes[i])
    return tuple(grads)


differentiable("linear_grpo_loss", _save_linear, _linear_backward)


def _value(found: Scored) -> _Tensors:
    evaluated, stats = found
    return evaluated.value, evaluated.metrics, stats.logprobs, stats.entropy


def _fake_value(like: Tensor) -> tuple[Tensor, Tensor]:
    return _like(like), _like(like, len(METRICS))


@operator("scale", "(Tensor x, Tensor grad, Tensor factor, ScalarType dtype) -> Tensor")
def scale(x: Tensor, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * (grad * factor) in the precision of `factor`, rounded once to `dtype`."""
    by = grad.to(factor.dtype) * factor
    # Of the shape of x, because a 0-dim factor would be rounded to the dtype of x first.
    return torch.mul(x, by.expand(x.shape), out=torch.empty_like(x, dtype=dtype))


@fake("scale")
def _(x: Tensor, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


# ---- advantages


@operator(
    "group_advantages",
    f"(Tensor rewards, Tensor group_sizes, Tensor? reward_weights, {_GROUPING}, str backend) "
    "-> (Tensor advantages, Tensor mean, Tensor std, Tensor active)",
)
def group_advantages(
    rewards: Tensor, group_sizes: Tensor, reward_weights: Tensor | None, *arguments: Any
) -> _Tensors:
    grouped = Rewards(rewards, group_sizes, reward_weights, Grouping(*arguments[:-1]))
    return tuple(engine(arguments[-1]).group_advantages(grouped))


@fake("group_advantages")
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
