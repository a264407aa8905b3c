"""The same training step three ways: padded, packed, packed and shared.

`padded` is what trainers on transformers' models do, TRL for one: a micro-batch of padded sequences, each with its own
prompt and its own images. `packed` is what EasyR1 and verl do: the padding is gone, prompts and images are still
repeated for each completion. `shared` is `perl.training.optimizer`: an ordered prompt once for its completions, an image once for
the step. Head and loss are the same function in all three, over the scored rows alone, so packing alone is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness.models import Counts, counting, special_tokens
from benchmarks.train_step.workload import one_each
from perl.model.families import Family, ImageFeatures
from perl.model.head import HeadLoss, step_normalizer
from perl.model.packed.attention import use_packed_attention
from perl.model.packed.pack import pack
from perl.model.policy import Policy
from perl.model.vision import StepFeatures
from perl.types import PackedBatch, Segment
from perl_kernels import PolicyLoss

LOSS = PolicyLoss.preset("perl", kl=None, kl_coef=0.0)
"""The paper's, without the KL term: log-probs of a reference model are no part of the training step."""

_CACHE_BYTES = 2**30
"""Of image features, kept within a step where the tower is frozen; the trainer's default."""


@dataclass(frozen=True)
class Step:
    """`logprobs` float32 of each completion, in the order of the segments; gradients are in the parameters."""

    logprobs: list[torch.Tensor]
    counts: Counts


class Trainee:
    """A model, and the completions of one optimizer step.

    Args:
        model: transformers' own, on its device, in train mode.
        family: what is special about it.
        segments: prompts with their completions.
        attention: of packed rows: a name in `perl.model.packed.attention.IMPLEMENTATIONS`.
        budget: most tokens of a micro-batch, padded or packed.
        stock_tower: whether the tower of padded batches attends as transformers does, which under SDPA loops over
            images and windows; else as that of packed rows does.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        segments: list[Segment],
        attention: str,
        budget: int,
        stock_tower: bool = True,
    ) -> None:
        self.model, self.family, self.attention = model, family, attention
        self.stock_tower, self.device = stock_tower, model.device
        self.segments, self.single = segments, one_each(segments)
        self.budget = budget
        self.lengths = [len(s.completions[0]) for s in self.single]
        self.normalizer = step_normalizer(LOSS, sum(self.lengths), len(self.lengths))
        self.padded_size = max(1, budget // max(map(_tokens, self.single)))
        """Sequences in a padded micro-batch."""
        self.banned = torch.tensor(special_tokens(model.config))

    def step(self, variant: str) -> Step:
        """Forward and backward of `padded`, `packed` or `shared`; gradients are added to those there are."""
        with counting(self.model.model) as counts:
            found = dict(VARIANTS[variant](self))
        return Step([found[key] for key in sorted(found)], counts)

    def exact(self) -> Trainee:
        """The same weights in float32, where padded batches of one sequence take least memory."""
        model = copy.deepcopy(self.model).float()
        return Trainee(model, self.family, self.segments, "sdpa", 1)

    def policy(self, cache_bytes: int) -> Policy:
        """The model reading packed rows; its cache is empty, so a step with a frozen tower starts from pixels too."""
        self.attend(packed=True)
        return Policy(self.model, self.family, cache_bytes)

    def attend(self, packed: bool) -> None:
        """Choose the attention: of packed rows, or transformers' SDPA for padded batches."""
        self.model.set_attn_implementation("sdpa")
        core = self.model.model
        if packed or not self.stock_tower:
            use_packed_attention(core.language_model, self.family.tower(core), self.attention)
        if not packed:
            core.language_model.config._attn_implementation = "sdpa"

    def backward(
        self, reader: Any, batch: _Padded | PackedBatch, features: ImageFeatures | None = None
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """One micro-batch; gives (segment, completion) and log-probs of each completion.

        Args:
            reader: gives hidden states of scored tokens, as a Policy does.
        """
        head: Any = HeadLoss(reader, self.banned, temperature=1.0)
        output = head(batch, LOSS, self.normalizer, features)
        output.loss.backward()
        parts = output.logprobs.detach().float().split(batch.completion_cu_seqlens.diff().tolist())
        return zip(batch.source, parts, strict=True)


Logprobs = Iterator[tuple[tuple[int, int], torch.Tensor]]


def padded(trainee: Trainee) -> Logprobs:
    """transformers' model as it is, with its SDPA; sequences in their order, as many at a time as fit the budget."""
    trainee.attend(packed=False)
    reader, size = _StockModel(trainee.model), trainee.padded_size
    for start in range(0, len(trainee.single), size):
        yield from trainee.backward(reader, _Padded(trainee.single[start : start + size], start))


def packed(trainee: Trainee) -> Logprobs:
    """Rows without padding; no two completions have a prompt or an image in common."""
    policy = trainee.policy(cache_bytes=0)
    for batch in pack(trainee.single, trainee.budget, share=False):
        yield from trainee.backward(policy, batch)


def shared(trainee: Trainee) -> Logprobs:
    """As `perl.training.optimizer.Updater.step` runs it."""
    policy = trainee.policy(_CACHE_BYTES)
    batches = pack(trainee.segments, trainee.budget)
    if not policy.vision.trained:
        for batch in batches:
            yield from trainee.backward(policy, batch)
        return
    features_of = StepFeatures(policy.vision.encode, batches).of
    for number, batch in enumerate(batches):
        with features_of(number) as features:
            found = trainee.backward(policy, batch, features)
        yield from found


VARIANTS: dict[str, Callable[[Trainee], Logprobs]] = {
    "padded": padded,
    "packed": packed,
    "shared": shared,
}


class _Padded:
    """Sequences [prompt | completion], padded on the right to the longest, and what HeadLoss reads of a batch."""

    sampled_logprobs = None

    def __init__(self, segments: Sequence[Segment], start: int) -> None:
        self.segments = segments
        self.source = tuple((start + i, 0) for i in range(len(segments)))
        width = max(map(_tokens, segments))
        self.input_ids = torch.zeros(len(segments), width, dtype=torch.int64)
        self.attention_mask = torch.zeros_like(self.input_ids)
        scored = []
        for i, segment in enumerate(segments):
            ids = np.concatenate([segment.prompt.input_ids, segment.completions[0]])
            self.input_ids[i, : len(ids)] = torch.from_numpy(ids)
            self.attention_mask[i, : len(ids)] = 1
            scored.append(torch.arange(len(segment.prompt.input_ids), len(ids)) - 1 + i * width)
        self.scored = torch.cat(scored)
        self.targets = torch.from_numpy(np.concatenate([s.completions[0] for s in segments]))
        self.completion_cu_seqlens = torch.tensor([0, *map(len, scored)]).cumsum(0).int()
        self.advantages = torch.tensor([s.advantages[0] for s in segments])
        self.images = [image for s in segments for image in s.prompt.images]


class _StockModel:
    """What HeadLoss asks of a policy, from transformers' model, which merges images and makes positions by itself."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head_weight = model.lm_head.weight
        self.device, self.dtype = self.head_weight.device, self.head_weight.dtype

    def __call__(self, batch: _Padded, features: None) -> torch.Tensor:
        def put(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device)

        is_image = batch.input_ids == self.model.config.image_token_id
        output = self.model.model(
            input_ids=put(batch.input_ids),
            attention_mask=put(batch.attention_mask),
            # Sampled completions hold no image tokens, so those there are stand in prompts.
            mm_token_type_ids=put(is_image.int()),
            pixel_values=put(torch.cat([image.pixel_values for image in batch.images])),
            image_grid_thw=put(torch.tensor([image.grid for image in batch.images])),
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, put(batch.scored))


def _tokens(single: Segment) -> int:
    return len(single.prompt.input_ids) + len(single.completions[0])
