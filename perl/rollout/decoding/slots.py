"""What goes on at a time: slots of one prompt and its completions each, filled again when all of these have ended.

The host knows how many tokens each slot has, as the completions of a slot go on in step; what they are and which have
ended is on the device, and looked at from time to time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perl.model.packed.pack import prompt_row
from perl.model.policy import Policy
from perl.rollout.decoding.attention import Attend, Span, choose, flash_attention_2, varlen
from perl.rollout.decoding.cache import KVCache
from perl.rollout.decoding.graph import Graphed
from perl.rollout.decoding.step import Step, rotations
from perl.timing import span
from perl.types import EncodedPrompt

PREFILL_TOKENS = 2**14
"""Most tokens of prompts that are read together."""


@dataclass(frozen=True, slots=True)
class Job:
    """`count` completions to be made of a prompt; `number` says which."""

    number: int
    prompt: EncodedPrompt
    count: int


def may_be_captured(device: torch.device, attend: Attend) -> bool:
    """Whether a CUDA graph may replay a decode step: only the flash kernels take lengths from the device."""
    return device.type == "cuda" and attend in (flash_attention_2, varlen)


class Slots:
    """S slots of R rows, of which each job takes one slot.

    Args:
        prompts: all that will be read.
        shape: S and R at first; R is the most completions of a job.
        max_new_tokens: T.

    Attributes:
        jobs: what goes on in each slot; None: nothing.
        ages: tokens that the rows of each slot have.
        going: whether each row of each slot had not ended when the host last looked.
        homes: of each slot and row, where `record` has it.
        alive: bool [S, R], rows that have not ended.
        record: int32 [2, rows at first, T], tokens and log-probs (the bits of float32); tokens are -1 behind an end.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        shape: tuple[int, int],
        max_new_tokens: int,
    ) -> None:
        self.policy, self.max_new_tokens = policy, max_new_tokens
        decoder = policy.core.language_model
        attention, weight = decoder.layers[0].self_attn, decoder.embed_tokens.weight
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        longest = max(len(p.input_ids) for p in prompts)
        sizes = (shape[0], self.kv_heads, longest, shape[1], max_new_tokens, attention.head_dim)
        self.cache = KVCache(len(decoder.layers), sizes, weight)
        self.attend = choose(weight.device, weight.dtype)
        last = max(p.next_position for p in prompts) + max_new_tokens
        self.rotations = rotations(policy, last, len(prompts[0].position_ids))
        (slots, rows), self.device = shape, weight.device
        self.jobs: list[Job | None] = [None] * slots
        self.ages = [0] * slots
        self.going = [[False] * rows for _ in range(slots)]
        self.homes = [[slot * rows + row for row in range(rows)] for slot in range(slots)]
        self._first = [slot * rows for slot in range(slots)]
        self.record = self._new(2, slots * rows, max_new_tokens).int()
        self.alive = self._new(slots, rows).bool()
        self.token = self._new(slots * rows)
        self.age, self.start, self.lengths = self._new(slots), self._new(slots), self._new(slots)
        self._fresh: list[tuple[Tensor, Tensor]] = []
        self._settle()

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _settle(self) -> None:
        """Ready a decode step for the slots and rows that there are, and the tensors that it reads."""
        self._step = Step(self.policy, self.cache, self.attend, self.rotations)
        self._graph = Graphed() if may_be_captured(self.device, self.attend) else None
        self.home = torch.tensor(self.homes, device=self.device).flatten()
        self.heads = self.lengths.int().repeat_interleave(self.kv_heads)

    def _decode(self) -> Tensor:
        going = self._going()
        prompts = [len(job.prompt.input_ids) for job, _ in going]
        ages = [min(max(age, 1), self.max_new_tokens) for _, age in going]
        prompt = Span(self.heads, min(prompts), max(prompts))
        return self._step(self.token, self.age, self.start, prompt, (min(ages), max(ages)))

    def _going(self) -> list[tuple[Job, int]]:
        return [(j, age) for j, age in zip(self.jobs, self.ages, strict=True) if j]

    @property
    def steps_left(self) -> int:
        """How many tokens may still be sampled until every row has as many as it may; 0: nothing goes on."""
        return max((self.max_new_tokens - age for _, age in self._going()), default=0)

    def fill(self, slots: Sequence[int], jobs: Sequence[Job]) -> None:
        """Read the prompts of jobs, whose completions go on in these slots."""
        prompts = [job.prompt for job in jobs]
        rows = torch.arange(self.alive.shape[1], device=self.device)
        for part in _parts([len(p.input_ids) for p in prompts]):
            own, lengths = [prompts[i] for i in part], [len(prompts[i].input_ids) for i in part]
            index = torch.tensor([slots[i] for i in part])
            slot = index.repeat_interleave(torch.tensor(lengths))
            place = torch.cat([torch.arange(length) for length in lengths])
            self.cache.places = (slot.to(self.device), place.to(self.device))
            hidden = self.policy(prompt_row(own), kv_cache=self.cache)
            index = index.to(self.device)
            self._fresh.append((index, self.policy.base.lm_head(hidden)))
            self.age[index] = 0
            self.start[index] = torch.tensor([p.next_position for p in own], device=self.device)
            self.lengths[index] = torch.tensor(lengths, device=self.device)
            counts = torch.tensor([jobs[i].count for i in part], device=self.device)
            self.alive[index] = rows < counts[:, None]
        self.heads.copy_(self.lengths.repeat_interleave(self.kv_heads))
        for slot, job in zip(slots, jobs, strict=True):
            self.jobs[slot], self.ages[slot] = job, 0
            self.going[slot] = [row < job.count for row in range(len(rows))]
            first = self._first[slot]
            self.record[0, first : first + len(rows)] = -1

    def logits(self) -> Tensor:
        """[S * R, V] for the next token of each row."""
        if any(self.ages[slot] for slot, job in enumerate(self.jobs) if job):
            with span("decode"):
                logits = self._graph(self._decode) if self._graph else self._decode()
        else:
            logits = self._fresh[0][1].new_zeros(self.alive.numel(), self._fresh[0][1].shape[1])
        for slots, fresh in self._fresh:
            logits.view(*self.alive.shape, -1)[slots] = fresh[:, None]
        self._fresh = []
        return logits

    def put(self, token: Tensor, logprob: Tensor, ends: Tensor) -> None:
        """Append sampled tokens [S * R] to the rows that go on; a token of `ends` ends them."""
        most = self.max_new_tokens
        alive = self.alive & (self.age < most)[:, None]
        place = self.home * most + self.age.clamp(max=most - 1).repeat_interleave(alive.shape[1])
        new = torch.stack([token.int(), logprob.float().view(torch.int32)])
        record = self.record.view(2, -1)
        old = record.index_select(1, place)
        record.index_copy_(1, place, torch.where(alive.flatten(), new, old))
        torch.logical_and(alive, ~torch.isin(token, ends).view_as(alive), out=self.alive)
        self.token.copy_(token)
        self.age += 1
        self.ages = [age + 1 for age in self.ages]

    def end(self, slot: int, row: int, length: int) -> None:
        """Cut a row behind its first tokens."""
        self.alive[slot, row] = False
        self.record[0, self.homes[slot][row], length:] = -1

    def look(self) -> list[tuple[int, Tensor]]:
        """See which rows go on, which waits for the device, and free the slots where none does: numbers of their jobs
        and copies of their rows' records [2, count, T]."""
        self.going = self.alive.tolist()
        ended = []
        for slot, job in enumerate(self.jobs):
            if job and (self.ages[slot] >= self.max_new_tokens or not any(self.going[slot])):
                first = self._first[slot]
                ended.append((job.number, self.record[:, first : first + job.count].clone()))
                self.jobs[slot], self.going[slot] = None, [False] * len(self.going[slot])
        return ended

    def compact(self) -> None:
        """Let go of rows that have ended, if that leaves at most half of the rows; then no slot is filled any more."""
        slots = [slot for slot, job in enumerate(self.jobs) if job]
        rows = max(sum(self.going[slot]) for slot in slots)
        if 2 * len(slots) * rows > self.alive.numel():
            return
        # A slot with fewer rows that go on keeps some that do not. Rows stay in their order.
        kept = [
            sorted(sorted(range(len(going)), key=lambda row: not going[row])[:rows])
            for going in (self.going[slot] for slot in slots)
        ]
        index, among = (torch.tensor(x, device=self.device) for x in (slots, kept))
        self.cache.keep(index, among)
        self.token = self.token.view_as(self.alive)[index[:, None], among].flatten()
        self.alive = self.alive[index[:, None], among]
        self.age, self.start, self.lengths = (
            x[index] for x in (self.age, self.start, self.lengths)
        )
        self.jobs = [self.jobs[slot] for slot in slots]
        self.ages = [self.ages[slot] for slot in slots]
        self._first = [self._first[slot] for slot in slots]
        both = list(zip(slots, kept, strict=True))
        self.homes = [[self.homes[slot][row] for row in own] for slot, own in both]
        self.going = [[self.going[slot][row] for row in own] for slot, own in both]
        self._settle()


def _parts(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers in runs of at most `PREFILL_TOKENS` tokens; a longer prompt alone."""
    part: list[int] = []
    for i, length in enumerate(lengths):
        if part and sum(lengths[j] for j in part) + length > PREFILL_TOKENS:
            yield part
            part = []
        part.append(i)
    yield part
