"""Rewards of groups to advantages: `group_advantages` against what trainers write in PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contest import Contest, Provider, Run, Work
from benchmarks.harness.proof import Proven, Results
from benchmarks.providers.common import need_cuda
from perl_kernels import group_advantages

EPS = 1e-6
GROUPS = 64
SIZES = (4, 8, 16, 32, 64, 128, 256)


def contests(cuda: bool, quick: bool) -> list[Contest]:
    """64 groups of 4 to 256 rollouts; and groups of different sizes, as filtering leaves them."""
    equal = [_contest(f"{GROUPS} groups of {n}", [n] * GROUPS, n) for n in SIZES]
    ragged = [2 + 5 * i % 29 for i in range(GROUPS)]
    return [*equal, _contest(f"{GROUPS} groups of 2 to 30", ragged, None)]


def _contest(case: str, sizes: list[int], size: int | None) -> Contest:
    """`size` is that of all groups, None if they are different."""
    total = sum(sizes)
    providers = [
        Provider("PeRL, Triton", partial(_ours, backend="triton")),
        Provider("PeRL, PyTorch", partial(_ours, backend="torch")),
        Provider("PyTorch, loop over groups", _loop, "torch", "as verl's grpo estimator"),
    ]
    if size:
        note = "equal groups only, as TRL does it"
        providers.append(Provider("PyTorch, rows of a table", _table, "torch", note))
    return Contest(
        "Advantages of groups",
        case,
        {"groups": GROUPS, "rollouts": total, **({"group size": size} if size else {})},
        partial(_Rewards, sizes),
        providers,
        # Rewards and advantages in fp32, sizes in int64.
        Work(bytes=8 * total + 8 * GROUPS),
        axis="group size" if size else "",
    )


class _Rewards(Proven):
    """Rewards [B] of groups one after the other, on the device with the groups' sizes."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.sizes = sizes
        generator = torch.Generator().manual_seed(0)
        self.rewards = torch.rand(sum(sizes), generator=generator).to(device)
        self.group_sizes = torch.tensor(sizes, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.rewards.dtype

    def expected(self, dtype: torch.dtype) -> Results:
        return {"advantages": _by_group(self, self.rewards.to(dtype))}


def _ours(p: _Rewards, backend: Any) -> Run:
    if backend == "triton":
        need_cuda(p.rewards)
    return Run(
        lambda: group_advantages(p.rewards, p.group_sizes, eps=EPS, backend=backend),
        read=lambda output: {"advantages": output.advantages},
    )


def _by_group(p: _Rewards, rewards: Tensor) -> Tensor:
    groups = rewards.split(p.sizes)
    return torch.cat([(g - g.mean()) / (g.std() + EPS) for g in groups])


def _loop(p: _Rewards) -> Run:
    return Run(lambda: {"advantages": _by_group(p, p.rewards)})


def _table(p: _Rewards) -> Run:
    def call() -> Results:
        table = p.rewards.view(len(p.sizes), -1)
        mean, std = table.mean(1, keepdim=True), table.std(1, keepdim=True)
        return {"advantages": ((table - mean) / (std + EPS)).flatten()}

    return Run(call)
