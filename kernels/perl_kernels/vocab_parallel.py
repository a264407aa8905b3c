"""Log-probs, and losses made of them, where the rows of the LM head are split over the ranks of a process group.

A rank makes the logits of its own rows of the head alone and finds, for each token, the largest
score m_r, l_r = log sum exp(score - m_r), the entropy H_r, and the log-prob of the target if it is
one of its rows, all within its part of the vocabulary. Over the ranks r

    m = max m_r,  l = log sum_r exp(m_r - m + l_r),  log w_r = m_r - m + l_r - l
    log-prob = log-prob within the target's part + log w of that part
    entropy = sum_r w_r (H_r - log w_r)

where no two large numbers are subtracted; m + l, the log-sum-exp, would round l away. Everybody
computes this from the same numbers, so that the results are the same to the last bit. The gradient
of a rank's logits needs no more than m, l and the entropy of the whole row; that of the hidden
states is the sum over the ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks
from .dispatch import engine, values_visible
from .head import Head, Products, no_autocast
from .passes import gradient_pass, stats_pass
from .values import Coefficients, RowStats, Scoring, compute_dtype

_Head = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
"""hidden, weight, bias, targets counted from this part's first row, temperatures."""


class _Settings(NamedTuple):
    """What a forward and its backward share beside tensors."""

    temperature: float
    softcap: float | None
    products: Products
    backend: str
    group: ProcessGroup
    skip_idle: bool


def check_shard(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    temperature: object,
    softcap: object,
    group: object,
) -> None:
    """What one rank can tell without the others, that is all but the range of the targets.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}, must be a ProcessGroup that this process is in "
            "(of a DeviceMesh, mesh.get_group()), or None"
        )
    rows = checks.check_floating("hidden", hidden, 2, "[N, H]")
    ids = checks.check_length("targets", targets, rows.shape[0])
    checks.check_temperature(temperature, rows.shape[0])
    checks.check_same_device(rows, temperature=temperature)
    # Of no tokens, because the targets' range is not that of these rows of the head.
    checks.check_linear(rows[:0], weight, ids[:0], bias, 1.0, softcap)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    products: Products,
    backend: str,
    group: ProcessGroup,
    skip_idle: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy [N] over the vocabulary of all ranks; `weight [V_rank, H]` and
    `bias [V_rank]` are this rank's part of it. Arguments have passed `check_shard`. With
    `skip_idle`, rows that no gradient flows to are left out of the backward's products.

    Raises:
        ValueError: a target outside the vocabulary of all ranks, or another N, H or other targets on
            another rank, where values may be looked at. Elsewhere such log-probs are NaN.
    """
    mine = torch.empty(4, dtype=torch.int64, device=hidden.device)
    for i, length in enumerate((weight.shape[0], *hidden.shape)):
        mine[i] = length  # fills, which a host does not wait for, unlike a copy
    # A sum that is another one of other targets, but for rare ones.
    mine[3] = (targets * torch.arange(1, len(targets) + 1, device=targets.device)).sum()
    ranks = _gather(mine, group)
    if values_visible(ranks):
        _check_ranks(ranks, targets)
    temperatures = temperature.detach() if isinstance(temperature, Tensor) else None
    tau = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    settings = _Settings(tau, softcap, products, backend, group, skip_idle)
    return _VocabParallel.apply(hidden, weight, bias, targets, temperatures, ranks, settings)


def _check_ranks(ranks: Tensor, targets: Tensor) -> None:
    """Of `ranks [R, 4]`: V_rank, N, H and a sum of the targets of each rank."""
    for i, name in ((1, "N"), (2, "H")):
        lengths = ranks[:, i].tolist()
        if len(set(lengths)) > 1:
            raise ValueError(f"hidden has {name} = {lengths} on the ranks, must be the same on all")
    if len(set(ranks[:, 3].tolist())) > 1:
        raise ValueError(
            "targets are not the same on all ranks of the group, must be: ids of the whole vocabulary"
        )
    checks.check_targets(targets, targets.shape[0], int(ranks[:, 0].sum()))


class _VocabParallel(torch.autograd.Function):
    """Not an operator as in `operators.py`, whose collectives nobody would see; so `torch.compile` breaks
    its graph here."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperatures: Tensor | None,
        ranks: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        group, sizes = settings.group, ranks[:, 0]
        ends = sizes.cumsum(0)
        starts = ends - sizes
        # Where this part starts is known on the device alone.
        local = targets.to(torch.int64) - starts[dist.get_rank(group)]
        head = (hidden, weight, bias, local, temperatures)
        found = torch.stack(_local_stats(head, settings))
        owned = (targets >= starts[:, None]) & (targets < ends[:, None])
        owned &= (ranks[:, 3] == ranks[0, 3]).all()
        stats = _whole(_gather(found, group), owned, sizes[:, None] > 0)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*head, *stats)
        return stats.logprobs, stats.entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        head, stats = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if by_logprob is None:
            by_logprob = torch.zeros_like(stats[0])
        needs = ctx.needs_input_grad[:3]
        found = _Gradient.apply(needs, ctx.settings, by_logprob, by_entropy, *head, *stats)
        return *found, *[None] * 4


class _Gradient(torch.autograd.Function):
    """The backward, which refuses to be differentiated: `once_differentiable` would give a constant
    where the derivatives that it is given are constants."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        needs: tuple[bool, bool, bool],
        settings: _Settings,
        by_logprob: Tensor,
        by_entropy: Tensor | None,
        *saved: Any,
    ) -> tuple[Tensor | None, ...]:
        head, stats = saved[:5], RowStats(*saved[5:])
        hidden, weight, bias = saved[:3]
        with no_autocast(hidden), torch.cuda.device_of(hidden):
            tiles = _tiles(head, settings, needs)
            if weight.shape[0]:
                backend, coefficients = (
                    engine(settings.backend),
                    Coefficients(by_logprob, by_entropy),
                )
                gradient_pass(backend, tiles, stats, coefficients, settings.skip_idle)
            total, *others = tiles.gradients()
        if total is not None:
            # The parts are rounded once each; a sum in bf16 would round once more per rank.
            total = total.to(compute_dtype(hidden)).contiguous()
            dist.all_reduce(total, group=settings.group)
            total = total.to(hidden.dtype)
        given = zip(others, (weight, bias), strict=True)
        return total, *(None if grad is None else grad.to(like.dtype) for grad, like in given)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "linear_token_logprobs and linear_grpo_loss over a group are differentiable once"
        )


def _tiles(head: _Head, settings: _Settings, needs: tuple[bool, bool, bool]) -> Head:
    hidden, weight, bias, targets, temperatures = head
    temperature = settings.temperature if temperatures is None else temperatures
    scoring = Scoring(targets, bias, temperature, settings.softcap)
    return Head(hidden, weight, scoring, settings.products, needs)


def _local_stats(head: _Head, settings: _Settings) -> RowStats:
    """Statistics of this rank's part of each row; of no columns, numbers that nobody reads but for
    the largest score, -inf."""
    hidden, weight = head[:2]
    if not weight.shape[0]:
        lowest = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=compute_dtype(hidden))
        return RowStats(*[lowest] * 4)
    with no_autocast(hidden), torch.cuda.device_of(hidden):
        return stats_pass(engine(settings.backend), _tiles(head, settings, (False, False, False)))


def _whole(parts: Tensor, owned: Tensor, present: Tensor) -> RowStats:
    """Statistics over the vocabulary of all ranks.

    Args:
        parts: [R, 4, N], the `RowStats` of each rank's part.
        owned: [R, N], whose part the target is in; nobody's if it is outside the vocabulary.
        present: [R, 1], who has a part at all.
    """
    logprobs, entropies, shifts, log_sums = parts.unbind(1)
    shift = shifts.amax(0)
    # A part of nothing but -inf has probability 0, and no entropy of its own.
    present = present & (shifts != -torch.inf)
    masses = torch.where(present, shifts - shift + log_sums, -torch.inf)
    # Not below 0, as the largest score is one of the terms.
    log_sum = masses.exp().sum(0).log()
    log_weights = masses - log_sum
    # A NaN or +inf has made its rank's entropy NaN, and NaN * 0 is NaN.
    spread = log_weights.exp() * (entropies - log_weights)
    entropy = torch.where(shift > -torch.inf, torch.where(present, spread, 0.0).sum(0), torch.nan)
    within = torch.where(present, logprobs + log_weights, -torch.inf)
    logprob = torch.where(owned, within, 0.0).sum(0)
    valid = owned.any(0) & entropy.isfinite()
    return RowStats(torch.where(valid, logprob, torch.nan), entropy, shift, log_sum)


def _gather(mine: Tensor, group: ProcessGroup) -> Tensor:
    """[R, *shape]: `mine` of each rank."""
    # `all_gather_into_tensor` goes by another name from one version of PyTorch to the next.
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)
