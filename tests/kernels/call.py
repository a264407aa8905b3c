"""One small call of each function, for the tests of what all of them have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perl_kernels import (
    PolicyLoss,
    dispatch,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from tests.kernels.naive import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = tuple(name for name, (there, _) in dispatch.available_backends().items() if there)
NAMES = (
    "linear_grpo_loss",
    "grpo_loss",
    "policy_loss",
    "token_logprobs",
    "linear_token_logprobs",
)
TAKING = {
    "normalizer": NAMES[:3],
    "temperature": ("linear_grpo_loss", "grpo_loss", "token_logprobs", "linear_token_logprobs"),
    "softcap": ("linear_grpo_loss", "linear_token_logprobs"),
}
"""The functions that take an argument."""


class Call:
    """Arguments of every function on `DEVICE` in fp32."""

    def __init__(self, backend: str, old: bool = True) -> None:
        problem = Problem.make()
        self.backend: Any = backend
        self.hidden, self.weight, self.bias = (
            x.to(DEVICE, torch.float32).requires_grad_()
            for x in (problem.hidden, problem.weight, problem.bias)
        )
        self.targets = problem.targets.to(DEVICE)
        self.common: dict[str, Any] = {
            name: x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype)
            for name, x in problem.loss_arguments().items()
        }
        if not old:
            self.common["old_logprobs"] = None
        self.sizes = torch.tensor([2, 3], device=DEVICE)

    def logits(self) -> Tensor:
        return (self.hidden @ self.weight.T + self.bias).detach().requires_grad_()

    def run(self, name: str, loss: PolicyLoss, **changes: Any) -> Tensor:
        """A scalar through the function `name`."""
        chosen = {"backend": self.backend}
        head = (self.hidden, self.weight, self.targets)
        if name in NAMES[:3]:
            changes = {**self.common, **changes, "loss": loss}
        match name:
            case "linear_grpo_loss":
                return linear_grpo_loss(*head, bias=self.bias, **changes, **chosen).loss
            case "grpo_loss":
                return grpo_loss(self.hidden @ self.weight.T, head[2], **changes, **chosen).loss
            case "policy_loss":
                seen = linear_token_logprobs(*head, bias=self.bias, **chosen)
                return policy_loss(seen.logprobs, entropy=seen.entropy, **changes, **chosen).loss
            case "token_logprobs":
                seen = token_logprobs(self.hidden @ self.weight.T, head[2], **changes, **chosen)
            case _:
                seen = linear_token_logprobs(*head, **changes, **chosen)
        return (seen.logprobs + 0.3 * seen.entropy).sum()
