"""GRPO over image orders as one would write it down: stock transformers model, one sequence at a time, torch's AdamW.

Given are questions, sampled ids, rewards and which groups each step trains on; nothing of this project is imported. From
PeRL (arXiv 2506.14907) Eq. 4-6, PPO (1707.06347) Eq. 7 with the dual clip of 1912.09729 Eq. 5, Schulman's k3, Dr. GRPO
(2503.20783) and LoRA (2106.09685).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class Sample:
    """The completion `ids` of a chat that shows `images` in the `<image>` slots of the `question`."""

    question: str
    images: list[Any]
    ids: list[int]
    reward: float
    old: Any = None  # Log-probs under the policy that sampled it, as soon as it has.


@dataclass(eq=False)
class Group:
    """All samples of a question in all its orders; `step` sampled them, before its first update."""

    step: int
    samples: list[Sample]


@dataclass(kw_only=True)
class Settings:
    """Of a stage; `updates` are those of a step, `limit` is that of the gradient's norm."""

    steps: int = 3
    updates: int = 1
    temperature: float
    lr: float
    warmup: int
    betas: tuple[float, float]
    decay: float
    limit: float
    clip: float = 0.2
    dual: float = math.inf
    kl: float = 0.0
    mean: str = "token-mean"
    longest: int

    def lr_of(self, number: int) -> float:
        """Of an update, from 0: linear warm-up, then a cosine to 0."""
        if number < self.warmup:
            return self.lr * (number + 1) / self.warmup
        done = (number - self.warmup) / (self.steps * self.updates - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


@dataclass
class PlainLoop:
    """Trains those weights of the fp64 `model` that require gradients; the ids `never` are not sampled."""

    model: Any
    processor: Any
    never: list[int]

    def stage(self, to: Settings, steps: list[tuple[list[Group], list[Group]]]) -> Iterator[Any]:
        """`steps`: the groups that each samples, and those that it trains on. Yields the numbers of each update."""
        start = copy.deepcopy(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": to.decay}
        vectors = {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}
        adamw = torch.optim.AdamW([matrices, vectors], betas=to.betas)
        for step, (sampled, groups) in enumerate(steps):
            for sample in (s for group in sampled for s in group.samples):
                sample.old = self.logprobs(self.model, sample, to).detach()
            for k in range(to.updates):
                row = self.gradients(groups[k :: to.updates], step, start, to)
                norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained))
                for p in trained:
                    p.grad *= min(1.0, to.limit / (norm + 1e-6))
                lr = to.lr_of(step * to.updates + k)
                adamw.param_groups[0]["lr"] = adamw.param_groups[1]["lr"] = lr
                adamw.step()
                adamw.zero_grad()
                yield {**row, "grad_norm": norm, "lr": lr}

    def gradients(self, groups: list[Group], step: int, start: Any, to: Settings) -> dict[str, Any]:
        """Of an update's loss. Returns the loss, the largest ratio and means over tokens."""
        pairs = [(g, *pair) for g in groups for pair in zip(g.samples, advantages(g), strict=True)]
        tokens = sum(len(sample.ids) for _, sample, _ in pairs)
        loss = largest = kls = clipped = 0.0
        for group, sample, a in pairs:
            now = self.logprobs(self.model, sample, to)
            # What waits between steps is kept in float32.
            old = sample.old.float().double() if group.step < step else sample.old
            ratio = (now - old).exp()
            gain = torch.minimum(ratio * a, ratio.clamp(1 - to.clip, 1 + to.clip) * a)
            gain = gain.clamp(min=to.dual * a) if a < 0 else gain
            ahead = self.logprobs(start, sample, to).detach() - now if to.kl else 0 * now
            kl = ahead.exp() - ahead - 1
            weight = {
                "token-mean": 1 / tokens,
                "seq-mean-token-mean": 1 / len(now) / len(pairs),
                "seq-mean-token-sum-norm": 1 / to.longest / len(pairs),
            }[to.mean]
            share = weight * (to.kl * kl - gain).sum()
            share.backward()
            outside = ratio > 1 + to.clip if a > 0 else (ratio < 1 - to.clip) & (a < 0)
            loss, largest = loss + share.item(), max(largest, ratio.max().item())
            kls, clipped = kls + kl.sum().item() / tokens, clipped + outside.sum().item() / tokens
        return {"loss": loss, "ratio_max": largest, "kl": kls, "clip_fraction": clipped}

    def logprobs(self, model: Any, sample: Sample, to: Settings) -> torch.Tensor:
        """Of each token of the completion, behind the chat and the tokens before it."""
        texts = [{"type": "text", "text": text} for text in sample.question.split("<image>")]
        content = [part for text in texts for part in (text, {"type": "image"})][:-1]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=sample.images, return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([sample.ids])], 1)
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=inputs["pixel_values"].double(),
            image_grid_thw=inputs["image_grid_thw"],
        ).logits[0, -len(sample.ids) - 1 : -1]
        logits[:, self.never] = -math.inf
        return (logits / to.temperature).log_softmax(-1)[range(len(sample.ids)), sample.ids]


def advantages(group: Group) -> list[float]:
    """One mean and one deviation over all orders of the question; in float32."""
    rewards = torch.tensor([s.reward for s in group.samples], dtype=torch.float64)
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).float().tolist()


class Adapted(nn.Module):
    """W x + scale B A x."""

    def __init__(self, linear: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * (x @ self.a.T) @ self.b.T
