"""The bytes that a training step keeps on one GPU, and on the host of a node."""

from __future__ import annotations

from collections.abc import Iterator

from perl.model.head import needs_reference, policy_loss_of
from perl.rollout.decoding.slots import PREFILL_TOKENS
from perl.training.roofline.model import Weights
from perl.training.roofline.step import StepWork

Bytes = dict[str, float]
"""By what they are for: names of `PARTS`."""

PARTS = (
    *("parameters", "optimiser", "reference", "gradients", "gathered weights", "activations"),
    *("head block", "vision", "keys and values", "rollout engine", "reserve"),
)
RESERVED = 2e9
"""The driver's own, compiled kernels, and what the allocator cannot use, on a GPU; assumed."""
PROCESS = 3e9
"""Of the host's memory, what a process with PyTorch and CUDA takes of its own; assumed."""
EIGHT_BITS = 1 + 4 / 256
"""Bytes of a moment of adamw_8bit: 256 share a float32 scale."""
_GPU_SHARE, _CPU_BYTES, _CPU_ROWS = 32, 2**24, 512
"""How large `perl_kernels` makes a block of logits: part of a GPU's memory; on a CPU bytes or rows, whichever is more."""
_IMAGE_TOKENS = 2**14
"""Most visual tokens that a trained tower encodes together without gradient."""


def activation_bytes(work: StepWork) -> float:
    """What one layer keeps of a token for its backward.

    The inputs of norms, products and attention, and the keys and values that are gathered for each completion; of
    transformers' norms also an fp32 copy and what they make before they scale, of its SwiGLU the activation.
    """
    f, size = work.facts, work.facts.itemsize
    queries = 2 * size * f.heads * f.head_dim
    gathered = f.cached_bytes * work.keys / work.tokens
    if work.fused:
        return size * (4 * f.hidden + 3 * f.intermediate) + queries + gathered
    return 2 * (4 + 2 * size) * f.hidden + 4 * size * f.intermediate + queries + gathered


def memory(work: StepWork, capacity: float) -> dict[str, Bytes]:
    """Bytes on one GPU of `capacity`: of the `rollout`, the `logprobs` and the `update` those of the moment with the most."""
    found = {
        stage: max(moments, key=lambda moment: sum(moment.values()))
        for stage, moments in (
            ("rollout", list(_rollout(work))),
            ("logprobs", list(_logprobs(work, capacity))),
            ("update", list(_update(work, capacity))),
        )
        if moments
    }
    fixed = at_rest(work)
    kept = {n: b for n, b in fixed.items() if n != "gradients"} | {
        "vision": _features(work),
        "reserve": RESERVED * (not work.cpu),
    }
    return {
        stage: {part: kept.get(part, 0.0) + moment.get(part, 0.0) for part in PARTS}
        for stage, moment in found.items()
    }


def at_rest(work: StepWork) -> Bytes:
    """What lies on one GPU when an optimizer step is taken; exact."""
    return _resting(work, offloaded=False)


def on_host(work: StepWork) -> Bytes:
    """Bytes of a node's memory, at most at one time: of its processes, what is offloaded, the copy that a checkpoint is written
    from, and the weights that one process reads."""
    processes = min(work.gpus, work.node)
    moved = sum(_resting(work, offloaded=True).values())
    # Each process writes its shards, one of them what all have.
    written = sum(
        (4 * w.trained + _moments(work, w)) / n * min(n, processes) for w, n in _spread(work)
    )
    return {
        "processes": PROCESS * processes,
        "offloaded": moved * processes,
        "checkpoint": written,
        "weights that are read": float(work.facts.itemsize * work.facts.weights),
    }


def certain(work: StepWork) -> float:
    """Bytes that a run cannot do without."""
    return sum(at_rest(work).values())


def _spread(work: StepWork) -> list[tuple[Weights, int]]:
    """The parts of the model, and how many processes share each."""
    f, n = work.facts, work.shards
    return [
        (f.in_layers, n),
        (f.around, n),
        (f.in_tower, n if work.config.train.shard_vision else 1),
    ]


def _moments(work: StepWork, weights: Weights) -> float:
    """Bytes of AdamW's two of all weights of a part."""
    narrow = weights.in_blocks if work.config.train.optimizer == "adamw_8bit" else 0
    return 2 * (EIGHT_BITS * narrow + 4 * (weights.trained - narrow))


def _resting(work: StepWork, offloaded: bool) -> Bytes:
    """On the GPU, or `offloaded` to the host."""
    out: Bytes = dict.fromkeys(("parameters", "optimiser", "gradients", "reference"), 0.0)
    moves = work.config.train.cpu_offload and work.shards > 1
    for weights, n in _spread(work):
        if (moves and n > 1) != offloaded:
            continue
        sharded = n > 1
        # A trained weight in shards is its own master, elsewhere a narrow one has one beside it.
        trained = 4 * weights.trained if sharded else weights.trained_bytes
        out["parameters"] += (weights.frozen_bytes + trained) / n
        out["optimiser"] += _moments(work, weights) / n + 4 * weights.narrow * (not sharded)
        out["gradients"] += 4 * weights.trained / n
        if _copied(work) and (
            weights is not work.facts.in_tower or work.facts.tower_trained or sharded
        ):
            out["reference"] += work.facts.itemsize * weights.count / n
    return out


def _copied(work: StepWork) -> bool:
    """Whether a second model is kept as the reference."""
    config = work.config
    loss = policy_loss_of(config)
    return needs_reference(loss) and not work.facts.adapters_alone


def _features(work: StepWork) -> float:
    f = work.facts
    tokens = work.questions * work.shape.images * work.shape.tokens_per_image
    made = float(f.itemsize * f.hidden * f.features * tokens)
    return min(made, work.config.model.feature_cache_mb * 2.0**20)


def _whole(work: StepWork) -> float:
    """Weights that are gathered for forwards out of step."""
    return float(work.facts.itemsize * sum(w.count for w, n in _spread(work) if n > 1))


def _through(work: StepWork) -> float:
    """What a forward without gradient holds of a token at most: in the MLP, of adapters there also what they add."""
    f = work.facts
    inner = 3 + (work.config.model.lora_rank > 0)
    return f.itemsize * (inner * f.intermediate + 2 * f.hidden)


def _patch(work: StepWork) -> float:
    """What a block of the tower keeps of a patch for its backward."""
    f = work.facts
    if f.tower_gated:  # Its norms keep an fp32 copy.
        return (8 + 10 * f.itemsize) * f.tower_hidden + 4 * f.itemsize * f.tower_intermediate
    return f.itemsize * (10 * f.tower_hidden + 2 * f.tower_intermediate)


def _patch_through(work: StepWork) -> float:
    """What a forward of the tower without gradient holds of a patch: its pixels, and queries and keys turned in fp32 or an MLP."""
    f = work.facts
    turned = 5 * f.itemsize * f.tower_hidden + 24 * f.tower_hidden
    inner = f.itemsize * (2 * f.tower_hidden + (2 + f.tower_gated) * f.tower_intermediate)
    return f.itemsize * f.patch_values + max(turned, inner)


def _rollout(work: StepWork) -> Iterator[Bytes]:
    f, shape, (slots, rows) = work.facts, work.shape, work.slots
    size, new = f.itemsize, work.config.rollout.max_new_tokens
    cached = slots * (shape.prompt + rows * new)
    always = {
        "gathered weights": _whole(work),
        "keys and values": float(cached * f.cached_bytes * f.layers),
    }
    read = min(max(PREFILL_TOKENS, shape.prompt), slots * shape.prompt)
    first = size * f.vocab * slots
    yield {**always, "rollout engine": (_through(work) + 3 * size * f.hidden) * read + first}
    # Logits; what may not be drawn masked, divided, normalised; probabilities, noise and their ratio in fp32.
    yield {**always, "rollout engine": (size + 20.0) * slots * rows * f.vocab}
    images = work.questions * shape.images if f.tower_trained else 1
    tokens = min(max(_IMAGE_TOKENS, shape.tokens_per_image), images * shape.tokens_per_image)
    yield {**always, "vision": tokens * f.patches_per_token * _patch_through(work)}


def _logprobs(work: StepWork, capacity: float) -> Iterator[Bytes]:
    config = work.config
    loss = policy_loss_of(config)
    if config.train.updates_per_batch == 1 and not needs_reference(loss):
        return
    f, row = work.facts, max(work.row_tokens)
    # The policy's or the reference's, one after the other.
    always = {"gathered weights": _whole(work)}
    gathered = f.cached_bytes * work.keys / work.tokens
    yield {**always, "activations": row * (_through(work) + gathered)}
    yield {
        **always,
        "activations": row * f.itemsize * f.hidden,
        "head block": _block(work, capacity) + f.itemsize * f.hidden * _scored(work),
    }


def _scored(work: StepWork) -> float:
    """Scored tokens of the longest row."""
    return max(work.row_tokens) * work.scored / work.tokens


def _block(work: StepWork, capacity: float) -> float:
    """Bytes of a block of logits."""
    row = work.facts.itemsize * work.facts.vocab
    most = max(_CPU_BYTES, _CPU_ROWS * row) if work.cpu else capacity / _GPU_SHARE
    return min(_scored(work) * row, most)


def _update(work: StepWork, capacity: float) -> Iterator[Bytes]:
    f, train, n = work.facts, work.config.train, work.shards
    size, hidden, row, share = f.itemsize, f.hidden, max(work.row_tokens), work.checkpointed
    layer, rows = activation_bytes(work), len(work.row_tokens)
    summed = at_rest(work)["gradients"]
    gathered = head = of_layer = of_root = 0.0
    wide = 2 if train.reduce_dtype == "bfloat16" else 4
    if n > 1:
        layers = 2 * f.layer.count if train.reshard_after_forward else f.in_layers.count
        gathered = float(size * (layers + f.around.count))
        gathered += size * f.in_tower.count * train.shard_vision
        # Gradients as autograd makes them, the buffer that they are summed in, and the shard that comes of it.
        of_layer, of_root = ((size + wide + wide / n) * w.trained for w in (f.layer, f.around))
    images = work.questions * work.shape.images
    shown = row / work.tokens * images * work.shape.tokens_per_image
    patches = shown * f.patches_per_token * f.tower_trained
    kept = size * f.tower_hidden * share + _patch(work) * (1 - share)
    leaves = 8.0 * hidden * f.features * shown * f.tower_trained
    vision = patches * (f.tower_depth * kept + size * f.patch_values) + leaves
    inputs = row * f.layers * (share * size * hidden + (1 - share) * layer)
    block, table = _block(work, capacity), float(f.flops.scored)
    several = block < _scored(work) * size * f.vocab
    by_row = 2 * size * hidden * _scored(work)
    before = summed * (rows > 1)
    # Cosines and sines of the rotary embeddings, of three axes.
    angles = 6 * size * f.head_dim
    if f.head_trained:
        head = (4 if several else size) * table
    always = {"gathered weights": gathered, "vision": vision}
    yield {
        **always,
        "gradients": before,
        "activations": inputs + (2 * size * hidden + angles) * row,
        "head block": block + by_row + head,
    }
    # While a layer is computed again its own activations are there, in its backward also the gradients of some.
    passing = size * (f.intermediate + 4 * hidden) + angles
    passing = row * (passing + (layer if share else 0.0))
    waiting = size * table * f.head_trained * (n > 1)
    yield {
        **always,
        "gradients": before + of_layer,
        "activations": inputs + passing,
        "head block": waiting,
    }
    yield {
        **always,
        "gradients": summed + of_layer,
        "activations": inputs / f.layers + passing,
        "head block": waiting,
    }
    # The embeddings' gradient is added up in fp32, then rounded.
    if f.head_trained:
        own = (4 + size) * table if size < 4 else 4 * table
        yield {
            **always,
            "gradients": summed + max(own, of_root),
            "activations": 2 * row * size * hidden,
            "head block": waiting,
        }
    yield {**always, "gradients": summed, "vision": vision + patches * 2 * _patch(work)}
    # On a CPU AdamW takes tensor by tensor the root of its second moments and what it divides.
    largest = max(w.largest for w, _ in _spread(work))
    yield {"gradients": summed + 8.0 * largest * work.cpu}
