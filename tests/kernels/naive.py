"""The losses a second time, token by token in fp64, written from the papers' formulas alone; and
advantages, group by group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perl_kernels import GroupAdvantages, PolicyLoss

LENGTHS = (5, 1, 0, 7, 3)


@dataclass(frozen=True)
class Problem:
    """A small ragged batch with an empty and a one-token completion."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    weights: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor

    @classmethod
    def make(cls, lengths: tuple[int, ...] = LENGTHS, vocab: int = 13, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        count, features = sum(lengths), 6

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight, bias = normal(count, features), normal(vocab, features), normal(vocab)
        targets = torch.randint(0, vocab, (count,), generator=generator)
        logits = hidden @ weight.T + bias
        current = logits.log_softmax(1)[torch.arange(count), targets]
        old = current + 0.4 * normal(count)
        weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
        weights[::4] = 0.0
        return cls(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=targets,
            advantages=normal(len(lengths)),
            cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
            weights=weights,
            old_logprobs=old.clamp(max=-1e-3),
            ref_logprobs=current + 0.5 * normal(count),
            rollout_logprobs=old + 0.3 * normal(count),
        )

    def token_level(self) -> Problem:
        """With an advantage of its own for every token."""
        generator = torch.Generator().manual_seed(7)
        count = len(self.targets)
        return replace(
            self, advantages=torch.randn(count, generator=generator, dtype=torch.float64)
        )

    def loss_arguments(self, *, old: bool = True) -> dict[str, Any]:
        return {
            "advantages": self.advantages,
            "cu_seqlens": self.cu_seqlens,
            "old_logprobs": self.old_logprobs if old else None,
            "ref_logprobs": self.ref_logprobs,
            "rollout_logprobs": self.rollout_logprobs,
            "weights": self.weights,
        }


def naive_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    logprobs, entropies = [], []
    for row in range(len(hidden)):
        logits = weight @ hidden[row] + (0 if bias is None else bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        tau = temperature[row] if isinstance(temperature, Tensor) else temperature
        probs = torch.softmax(logits / tau, 0)
        logprobs.append(probs[targets[row]].log())
        entropies.append(-(probs * probs.log()).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def naive_loss(
    loss: PolicyLoss,
    logprobs: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    bounds = cu_seqlens.tolist()
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    w = torch.ones_like(logprobs) if weights is None else weights
    sequences = []
    for b in range(len(bounds) - 1):
        tokens = [t for t in range(bounds[b], bounds[b + 1]) if w[t] != 0]
        per_sequence = len(advantages) == len(bounds) - 1
        adv = {t: float(advantages[b] if per_sequence else advantages[t]) for t in tokens}
        correction = _correction(loss, tokens, old, rollout_logprobs)
        terms = {}
        for t in tokens:
            term = _surrogate(loss, t, tokens, logprobs, old, adv, correction)
            if loss.surrogate != "vespo":
                term = term * correction[t]
            if loss.kl is not None and loss.kl_coef:
                assert ref_logprobs is not None
                kl = _kl(loss.kl, logprobs[t], ref_logprobs[t])
                if loss.kl_bias_correction:
                    kl = kl * _ratio(loss, t, tokens, logprobs, old)
                term = term + loss.kl_coef * kl
            if loss.entropy_coef:
                assert entropy is not None
                term = term - loss.entropy_coef * entropy[t]
            terms[t] = term
        sequences.append([(float(w[t]), terms[t]) for t in tokens])
    return _aggregate(loss, sequences, normalizer) + 0 * logprobs.sum()


def _ratio(loss: PolicyLoss, t: int, tokens: list[int], logprobs: Tensor, old: Tensor) -> Tensor:
    if loss.ratio == "token":
        return torch.exp(logprobs[t] - old[t])
    geometric = torch.stack([logprobs[s] - old[s] for s in tokens]).mean().exp()
    if loss.ratio == "sequence":
        return geometric
    return geometric.detach() * torch.exp(logprobs[t] - logprobs[t].detach())


def _surrogate(
    loss: PolicyLoss,
    t: int,
    tokens: list[int],
    logprobs: Tensor,
    old: Tensor,
    adv: dict[int, float],
    correction: dict[int, float],
) -> Tensor:
    a, lp, r = adv[t], logprobs[t], _ratio(loss, t, tokens, logprobs, old)
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if loss.surrogate == "clip":
        free = torch.clamp(r, max=loss.delta) if loss.delta else r
        value = max(-a * free, -a * torch.clamp(r, low, high), key=Tensor.item)
        if loss.dual_clip and a < 0:
            value = min(value, -a * loss.dual_clip + 0 * lp, key=Tensor.item)
        return value
    if loss.surrogate == "cispo":
        return -min(max(r.item(), low), high) * a * lp
    if loss.surrogate == "sapo":
        tau = loss.sapo_tau_pos if a > 0 else loss.sapo_tau_neg
        return -a * 4 / tau / (1 + torch.exp(-tau * (r - 1)))
    if loss.surrogate == "vespo":
        return -_vespo_phi(loss, a, tokens, logprobs, old, correction) * a * lp
    if loss.surrogate == "gmpo":
        logs = []
        for s in tokens:
            log = logprobs[s] - old[s]
            if adv[s] > 0:
                log = torch.clamp(log, max=loss.clip_high)
            elif adv[s] < 0:
                log = torch.clamp(log, min=-loss.clip_low)
            logs.append(log)
        return -sum(adv.values()) / len(adv) * torch.stack(logs).mean().exp()
    if loss.surrogate.startswith("dppo"):
        new_p, old_p = math.exp(lp.item()), math.exp(float(old[t]))
        distance = abs(new_p - old_p)
        if loss.surrogate == "dppo_kl":
            distance = old_p * math.log(old_p / new_p)
            distance += (1 - old_p) * math.log((1 - old_p) / (1 - new_p))
        leaving = new_p > old_p if a > 0 else new_p < old_p
        bound = loss.clip_high if a > 0 else loss.clip_low
        if leaving and distance > bound:
            return 0 * lp
        return -a * min(r.item(), loss.dppo_ratio_cap) * lp
    assert loss.surrogate == "reinforce"
    return -a * lp


def _vespo_phi(
    loss: PolicyLoss,
    a: float,
    tokens: list[int],
    logprobs: Tensor,
    old: Tensor,
    correction: dict[int, float],
) -> float:
    log_w = sum((logprobs[s] - old[s]).item() for s in tokens)
    logs = [math.log(max(correction[s], 1e-8)) for s in tokens]
    per_sequence = loss.correction is not None and loss.correction.startswith("sequence")
    log_w += logs[0] if per_sequence else sum(logs)
    log_w = min(max(log_w, math.log(1e-8)), 20.0)
    k = loss.vespo_k_pos if a >= 0 else loss.vespo_k_neg
    lam = loss.vespo_lambda_pos if a >= 0 else loss.vespo_lambda_neg
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def _correction(
    loss: PolicyLoss, tokens: list[int], old: Tensor, rollout: Tensor | None
) -> dict[int, float]:
    if loss.correction is None:
        return dict.fromkeys(tokens, 1.0)
    assert rollout is not None
    gaps = {t: float(old[t] - rollout[t]) for t in tokens}
    if loss.correction.startswith("sequence"):
        gaps = dict.fromkeys(tokens, sum(gaps.values()))
    low, high, result = loss.correction_low, loss.correction_high, {}
    for t, gap in gaps.items():
        weight = math.exp(gap)
        if loss.correction.endswith("truncate"):
            result[t] = min(max(weight, low), high)
        else:
            result[t] = weight if low <= weight <= high else 0.0
    return result


def _kl(kind: str, lp: Tensor, ref: Tensor) -> Tensor:
    k1, k2, k3 = lp - ref, (lp - ref) ** 2 / 2, torch.exp(ref - lp) - (ref - lp) - 1
    values = {"k1": k1, "k2": k2, "k3": k3, "abs": abs(lp - ref)}
    if kind in values:
        return values[kind]
    # The value of the first, the gradient of k2.
    return values[kind[:-1]].detach() + k2 - k2.detach()


def _aggregate(
    loss: PolicyLoss, sequences: list[list[tuple[float, Tensor]]], normalizer: float | None
) -> Any:
    sums = [sum(w * term for w, term in sequence) for sequence in sequences]
    totals = [sum(w for w, _ in sequence) for sequence in sequences]
    if loss.aggregation == "token-mean":
        return sum(sums) / (normalizer or sum(totals))
    if loss.aggregation == "seq-mean-token-mean":
        means = [s / total for s, total in zip(sums, totals, strict=True) if total > 0]
        return sum(means) / (normalizer or len(means))
    count = normalizer or len(sequences)
    if loss.aggregation == "seq-mean-token-sum":
        return sum(sums) / count
    assert loss.max_completion_length
    return sum(sums) / (count * loss.max_completion_length)


def naive_advantages(
    rewards: Tensor,
    group_sizes: Any,
    *,
    scale: str,
    baseline: str,
    unbiased: bool,
    eps: float,
    reward_weights: Any = None,
    combine: str = "sum_then_normalize",
) -> GroupAdvantages:
    """As `group_advantages`, in fp64."""
    table = rewards.double() if rewards.ndim == 2 else rewards.double()[:, None]
    weights = torch.ones(table.shape[1]) if reward_weights is None else reward_weights
    weights = torch.as_tensor(weights, dtype=torch.float64, device=table.device)
    total = (table * weights).nansum(1)
    total[table.isnan().all(1)] = torch.nan
    sizes = [int(size) for size in group_sizes]

    def normalised(values: Tensor) -> Tensor:
        whole, pieces = _spread(values, unbiased), [values[:0]]
        for group in values.split(sizes):
            if not _differ(group):
                pieces.append(torch.zeros_like(group))
                continue
            known = ~group.isnan()
            advantage = group - group[known].mean()
            if baseline == "leave_one_out":
                advantage = group - (group[known].sum() - group) / (int(known.sum()) - 1)
            if scale != "none":
                by = _spread(group, unbiased) if scale == "group" else whole
                advantage = advantage / (by + eps)
            pieces.append(advantage.nan_to_num(0.0))
        return torch.cat(pieces)

    if combine == "sum_then_normalize":
        advantages = normalised(total)
    else:
        summed = torch.stack([normalised(column) for column in table.T], 1) @ weights
        summed[total.isnan()] = torch.nan
        advantages = torch.zeros_like(summed)
        if _differ(summed):
            centred = summed - summed[~summed.isnan()].mean()
            advantages = (centred / (_spread(summed, unbiased) + eps)).nan_to_num(0.0)
    groups = [group[~group.isnan()] for group in total.split(sizes)]
    none = [total[:0].sum()] if not sizes else []
    mean = torch.stack([g.mean() if len(g) else g.sum() for g in groups] + none)[: len(sizes)]
    std = torch.stack([_spread(g, unbiased) for g in groups] + none)[: len(sizes)]
    active = torch.tensor([_differ(g) for g in groups], dtype=torch.bool)
    return GroupAdvantages(advantages, mean, std, active.to(total.device))


def _differ(values: Tensor) -> bool:
    known = values[~values.isnan()]
    return len(known) > 1 and bool((known != known[0]).any())


def _spread(values: Tensor, unbiased: bool) -> Tensor:
    """Standard deviation of the values that are not NaN; 0 if all are equal."""
    known = values[~values.isnan()]
    return known.std(unbiased=unbiased) if _differ(known) else values.new_zeros(())
