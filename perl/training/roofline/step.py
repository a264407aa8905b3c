"""The work of a training step on one GPU, by stage: operations, bytes, launches, waits, and the time they take at least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from perl.config import Config
from perl.model.head import needs_reference, policy_loss_of
from perl.model.packed.plan import Load, plan
from perl.rollout.decoding.cache import slots_and_rows
from perl.rollout.decoding.slots import PREFILL_TOKENS
from perl.training.parallel.mesh import check_shards
from perl.training.roofline.devices import Device
from perl.training.roofline.model import ModelFacts
from perl.types import UserError

SHARES = {
    "product": 0.6,
    "tower": 0.35,
    "attention": 0.35,
    "attention backward": 0.28,
    "head": 0.55,
    "bytes": 0.73,
    "link": 0.7,
}
"""What of a device's rate is assumed to be reached, by kind of work; that of `tower` includes what is not a product there."""
LAUNCH_SECONDS = 5e-6
"""Of the host, for an operation that it launches; assumed."""
STEPS_A_WAIT = 16
"""Decode steps between two looks of the host at what has ended."""
LAUNCHES = {"eager": 50, "fused": 20, "decode": 20}
"""Operations of a layer's forward: counted in transformers' layers, and assumed of compiled ones and of decoding."""
BACKWARD = {"launches": 2.1, "bytes": 2.4}
"""Of a layer's backward for one of its forward; counted in transformers' layers."""
SAMPLING = 58
"""Bytes moved for each token of the vocabulary that may be sampled: fp32 scores, their softmax, the draw; counted."""


@dataclass(frozen=True)
class Shape:
    """The data of a step, all questions alike."""

    images: int
    tokens_per_image: int
    text_tokens: int
    completion_tokens: int

    @property
    def prompt(self) -> int:
        return self.images * self.tokens_per_image + self.text_tokens


Work = dict[str, float]
"""FLOPs by the kinds of `SHARES`, `bytes` of a GPU's memory, `link` bytes between GPUs; done at the same time."""


@dataclass(frozen=True)
class Part:
    """A stage's work on one GPU, one thing after the other."""

    name: str
    phases: tuple[Work, ...]
    launches: float = 0.0
    waits: float = 0.0

    @property
    def flops(self) -> float:
        return sum(n for w in self.phases for kind, n in w.items() if kind not in ("bytes", "link"))

    @property
    def bytes(self) -> float:
        return sum(work.get("bytes", 0.0) for work in self.phases)

    def seconds(self, device: Device) -> float:
        """Of each phase operations or bytes, whichever take longer; of all of them no less than the launches."""
        return max(sum(_seconds(w, device) for w in self.phases), self.launches * LAUNCH_SECONDS)


def _seconds(work: Work, device: Device) -> float:
    rates = {"bytes": device.bandwidth, "link": device.link}
    spent = {k: n / (rates.get(k, device.flops) * SHARES[k]) for k, n in work.items()}
    return max(spent.pop("bytes", 0.0), sum(spent.values()))


@dataclass(frozen=True)
class StepWork:
    """A step of a recipe's RL stage on each of `gpus` GPUs, without refills, replay and evaluation.

    Raises:
        UserError: the questions cannot be shared out, or a prompt or a completion is over a limit.
    """

    config: Config
    facts: ModelFacts
    shape: Shape
    gpus: int
    node: int = 8
    """GPUs of one node."""
    cpu: bool = False
    """Whether these are no GPUs but processes on a CPU."""

    def __post_init__(self) -> None:
        shape, config = self.shape, self.config
        if config.train.examples_per_step % self.gpus:
            raise UserError(
                f"--gpus {self.gpus}: train.examples_per_step = {config.train.examples_per_step} cannot be shared by "
                "them; make it a multiple"
            )
        if config.train.sharding != "none" and self.gpus == 1:
            raise UserError(
                'train.sharding = "fsdp" with one process: there is nothing to share the weights with; give more '
                '--gpus, or set train.sharding = "none"'
            )
        check_shards(config.train, self.gpus, min(self.node, self.gpus))
        for what, tokens, key, limit in (
            ("prompt", shape.prompt, "data.max_prompt_tokens", config.data.max_prompt_tokens),
            (
                "completion",
                shape.completion_tokens,
                "rollout.max_new_tokens",
                config.rollout.max_new_tokens,
            ),
        ):
            if tokens > limit:
                raise UserError(
                    f"a {what} has {tokens} tokens, over {key} = {limit}; raise it, or give fewer images or tokens"
                )
        _ = self.slots  # Raises where the budget holds none.

    @property
    def shards(self) -> int:
        """Processes that hold one copy of the sharded weights together."""
        train = self.config.train
        if train.sharding == "none":
            return 1
        return min(train.shards or self.node, self.gpus)

    @cached_property
    def questions(self) -> int:
        return self.config.train.examples_per_step // self.gpus

    @cached_property
    def orders(self) -> int:
        return min(self.config.permutation.orders, math.factorial(self.shape.images))

    @cached_property
    def prompts(self) -> int:
        return self.questions * self.orders

    @cached_property
    def completions(self) -> tuple[int, ...]:
        """Tokens of each completion of a prompt; where fewer orders exist, these share the rollouts."""
        rollouts = self.config.permutation.orders * self.config.rollout.per_order
        return (self.shape.completion_tokens,) * (rollouts // self.orders)

    @cached_property
    def slots(self) -> tuple[int, int]:
        """Slots of the engine, each a prompt and some of its completions, and how many completions one has."""
        rollout, n = self.config.rollout, len(self.completions)
        return slots_and_rows(
            rollout.kv_cache_tokens, self.prompts, self.shape.prompt, n, rollout.max_new_tokens
        )

    @cached_property
    def jobs(self) -> int:
        """Prompts that take a slot, each again for every part of its completions."""
        return self.prompts * math.ceil(len(self.completions) / self.slots[1])

    @cached_property
    def rounds(self) -> int:
        """How often the slots are filled."""
        return math.ceil(self.jobs / self.slots[0])

    @cached_property
    def scored(self) -> int:
        return self.prompts * sum(self.completions)

    @cached_property
    def row_tokens(self) -> list[int]:
        """Tokens of each packed row, by the packing that training uses."""
        loads = [
            Load(self.shape.prompt, self.completions, i // self.orders) for i in range(self.prompts)
        ]
        train, shares = self.config.train, self.facts.flops.shared
        rows = plan(loads, train.tokens_per_micro_batch, shares)
        copies = [[(len(s.completions) if not shares else 1, s) for s in row] for row in rows]
        return [
            sum(
                n * self.shape.prompt + len(s.completions) * self.shape.completion_tokens
                for n, s in row
            )
            for row in copies
        ]

    @cached_property
    def tokens(self) -> int:
        return sum(self.row_tokens)

    @cached_property
    def pairs(self) -> float:
        """Queries and keys that meet in a forward of all rows."""
        completions = self.scored / self.shape.completion_tokens
        copies = (self.tokens - self.scored) / self.shape.prompt
        seen = self.shape.completion_tokens * (self.shape.prompt + self.shape.completion_tokens / 2)
        return copies * self.shape.prompt**2 / 2 + completions * seen

    @cached_property
    def keys(self) -> int:
        """Keys that all sequences of all rows see, those of a shared prompt once for each of them."""
        sequences = self.scored // self.shape.completion_tokens
        return sequences * self.shape.prompt + self.scored

    @cached_property
    def fused(self) -> bool:
        """Whether norms, activations and rotary embeddings are few kernels; "auto" is on, on a GPU."""
        asked = (self.config.model.compile, self.config.model.liger)
        return True in asked if self.cpu else any(asked)

    @cached_property
    def elementwise(self) -> float:
        """Bytes that a token's forward through a layer moves outside of products and attention.

        Of transformers' layers in bfloat16: norms compute in fp32 with a cast before and after, rotary embeddings are seven
        operations. Fused, each value is read and written once.
        """
        f = self.facts
        heads = (f.heads + f.kv_heads) * f.head_dim
        if self.fused:
            return 12 * f.hidden + 6 * f.intermediate + 4 * heads
        return 84 * f.hidden + 10 * f.intermediate + 22 * heads

    @cached_property
    def checkpointed(self) -> float:
        """Share of the layers whose forward runs again in the backward."""
        return float(self.config.model.gradient_checkpointing)

    @cached_property
    def again(self) -> float:
        """That work for one forward: PyTorch stops before the last product of a layer, which nothing needs again."""
        f = self.facts
        return self.checkpointed * (1 - f.hidden * f.intermediate * f.layers / f.flops.token)

    def parts(self) -> list[Part]:
        return [*self._rollout(), *self._logprobs(), *self._update()]

    def _encode(self, name: str, times: float = 1.0) -> Part:
        """Every distinct image through the tower once, `times` a forward."""
        images = self.questions * self.shape.images
        flops = images * self.facts.tower_flops(self.shape.tokens_per_image) * times
        calls = math.ceil(images * self.shape.tokens_per_image / 2**14)
        launches = calls * self.facts.tower_depth * LAUNCHES["eager"] * times
        return Part(name, ({"tower": flops},), launches, waits=calls)

    def _forward(self, tokens: float, pairs: float, rows: int) -> tuple[Work, Work, Work, float]:
        """Products, attention, the rest and launches of the layers on packed rows; weights are read once a row."""
        f = self.facts
        return (
            {"product": 2 * tokens * f.flops.token, "bytes": 2 * f.flops.token * rows},
            {"attention": 2 * f.flops.pair * pairs},
            {"bytes": tokens * f.layers * self.elementwise},
            rows * f.layers * LAUNCHES["fused" if self.fused else "eager"],
        )

    def _rollout(self) -> Iterator[Part]:
        f, prompt, n = self.facts, self.shape.prompt, self.shape.completion_tokens
        yield self._encode("rollout/vision")
        read, rows = self.jobs * prompt, self.slots[1]
        fills = math.ceil(read / PREFILL_TOKENS)
        *phases, launches = self._forward(read, read * prompt / 2, fills)
        yield Part("rollout/prefill", tuple(phases), launches, waits=fills)
        steps = self.rounds * n
        sampled = self.scored / steps
        cached = sampled * (prompt / rows + n / 2)
        moved = 2 * (f.flops.token + f.flops.scored) + cached * f.cached_bytes * f.layers
        moved += sampled * (f.layers * self.elementwise + SAMPLING * f.vocab)
        work = {
            "product": 2 * self.scored * (f.flops.token + f.flops.scored),
            "attention": 2 * f.flops.pair * self.scored * (prompt + n / 2),
            "bytes": moved * steps,
        }
        launches = f.layers * LAUNCHES["decode"] * steps
        yield Part("rollout/decode", (work,), launches, steps / STEPS_A_WAIT)

    def _logprobs(self) -> Iterator[Part]:
        """Forward passes without gradient: of earlier policies, of the reference."""
        loss = policy_loss_of(self.config)
        passes = ["old"] * (self.config.train.updates_per_batch > 1)
        passes += ["reference"] * needs_reference(loss)
        head = {"head": 2 * self.scored * self.facts.flops.scored}
        for name in passes:
            if name == "reference" and self.facts.tower_trained:  # Its own, as it was.
                yield self._encode("logprobs/reference's vision")
            rows = len(self.row_tokens)
            *phases, launches = self._forward(self.tokens, self.pairs, rows)
            yield Part(f"logprobs/{name}", (*phases, head), launches + 4 * rows, waits=rows)

    def _update(self) -> Iterator[Part]:
        f, rows, updates = self.facts, len(self.row_tokens), self.config.train.updates_per_batch
        if f.tower_trained:
            yield self._encode("update/vision", 1 + f.tower_backward + self.again)
        forwards = 1 + self.checkpointed
        products, attention, rest, launches = self._forward(self.tokens, self.pairs, rows)
        yield Part(
            "update/products",
            (
                {
                    kind: amount * (1 + self.again + f.layers_backward)
                    for kind, amount in products.items()
                },
            ),
            launches * (forwards + BACKWARD["launches"]),
            waits=rows,
        )
        met = attention["attention"]
        work = {"attention": met * forwards, "attention backward": 2.5 * met}
        yield Part("update/attention", (work,))
        moved = rest["bytes"] * (forwards + BACKWARD["bytes"])
        yield Part("update/norms, SwiGLU, rotary", ({"bytes": moved},))
        head = 2 * (1 + f.head_backward) * self.scored * f.flops.scored
        yield Part("update/head and loss", ({"head": head},), launches=10.0 * rows)
        # A row's gradient in bfloat16 is written, read and added to the sum in fp32. AdamW reads the sum twice, for its norm
        # and then with master and moments, and writes these and the weight.
        moved = f.trained * (12 * rows + 34 * updates)
        yield Part("update/optimizer", ({"bytes": moved},), float(f.tensors), waits=updates)
        yield from self._sync(rows, updates)

    def _sync(self, rows: int, updates: int) -> Iterator[Part]:
        """What GPUs send one another in an update, as if nothing were computed meanwhile; all links as the device's."""
        f, train, n = self.facts, self.config.train, self.shards
        whole, sent = f.trained, 0.0
        if n > 1:
            sharded = f.in_layers, f.around, *((f.in_tower,) if train.shard_vision else ())
            whole -= sum(part.trained for part in sharded)
            # A micro-batch gathers layers for its forward, and again for its backward unless they stay.
            gathers = [rows * (1 + train.reshard_after_forward), rows, updates]
            reduced = [rows, rows, updates]
            narrow = 2 if train.reduce_dtype == "bfloat16" else 4
            for part, g, r in zip(sharded, gathers, reduced, strict=False):
                sent += (n - 1) / n * (g * f.itemsize * part.count + r * narrow * part.trained)
            # Copies of a shard, on other nodes, are summed in the backward, too.
            copies = self.gpus // n
            of_shards = narrow * sum(part.trained for part in sharded) / n
            sent += 2 * (copies - 1) / copies * of_shards * rows
        sent += 2 * (self.gpus - 1) / self.gpus * 4 * whole * updates
        if self.gpus > 1:
            yield Part("update/sync", ({"link": sent},), f.tensors * updates, waits=updates)
