"""The bytes that a training step keeps on one GPU."""

from __future__ import annotations

from perl.model.head import make_policy_loss, needs_reference
from perl.rollout.decoding.slots import PREFILL_TOKENS
from perl.training.roofline.devices import Device
from perl.training.roofline.step import StepWork

Bytes = dict[str, float]

RESERVED = 2e9
"""The driver's own, compiled kernels, and what the allocator cannot use; assumed."""
_GPU_SHARE = 32
"""Part of a GPU's memory that the loss takes for a block of logits, by `perl_kernels`."""


def activation_bytes(work: StepWork) -> float:
    """What one layer keeps of a token for its backward.

    In bfloat16 the inputs of norms, products and attention, and the keys and values that are gathered for each completion;
    of transformers' norms also an fp32 copy and what they make before they scale, of its SwiGLU the activation.
    """
    f = work.facts
    queries = 4 * f.heads * f.head_dim
    gathered = f.cached_bytes * work.keys / work.tokens
    if work.fused:
        return 8 * f.hidden + 6 * f.intermediate + queries + gathered
    return 16 * f.hidden + 8 * f.intermediate + queries + gathered


def memory(work: StepWork, device: Device) -> dict[str, Bytes]:
    """Bytes by what they are for: `always` there, and beside them in the `rollout` and in the `update`."""
    f, config, shape = work.facts, work.config, work.shape
    loss = make_policy_loss(config.loss, config.rollout.max_new_tokens)
    copied = needs_reference(loss) and not f.adapters_alone
    images = work.questions * shape.images
    features = 2 * f.hidden * f.features * images * shape.tokens_per_image
    always = {
        "weights": 2.0 * f.weights,
        "masters and moments": 12.0 * f.trained,
        "reference": 2.0 * (f.weights - f.tower * (not f.tower_trained)) * copied,
        "image features": min(features, config.model.feature_cache_mb * 2.0**20),
        "driver and allocator": RESERVED,
    }
    layer, (slots, rows) = activation_bytes(work), work.slots
    cached = slots * (shape.prompt + rows * config.rollout.max_new_tokens)
    rollout = {
        "keys and values": float(cached * f.cached_bytes * f.layers),
        "prefill": layer * min(PREFILL_TOKENS, slots * shape.prompt),
        "scores": 20.0 * slots * rows * f.vocab,
    }
    row, share = max(work.row_tokens), work.checkpointed
    block = 2.0 * f.vocab * row * work.scored / work.tokens
    shown = row / work.tokens * images * shape.tokens_per_image * f.patches_per_token
    patch = 4 * (4 * f.tower_hidden + f.tower_intermediate)
    kept = 2 * f.tower_hidden * share + patch * (1 - share)
    update = {
        "gradients": 4.0 * f.trained,
        # A layer that is computed again keeps its input; while one is, its own activations and their gradients are there.
        "layers' activations": row
        * (f.layers * (share * 2 * f.hidden + (1 - share) * layer) + 2 * layer),
        "tower's activations": shown * (f.tower_depth * kept + 2 * patch) * f.tower_trained,
        "logits and their gradients": min(block, device.memory / _GPU_SHARE)
        + 4.0 * f.hidden * row
        + 4.0 * f.flops.scored * f.head_trained,
    }
    return {"always": always, "rollout": rollout, "update": update}


def advice(work: StepWork, device: Device, kept: dict[str, Bytes]) -> list[str]:
    """Whether it fits; if not, which key to change."""
    found, config, largest = [], work.config, 0.0
    always = sum(kept["always"].values())
    if always > device.memory:
        model = config.model
        lower = "model.lora_rank = 64" * (not model.lora_rank)
        lower += " and " * (bool(lower) and not model.freeze_vision)
        lower += "model.freeze_vision = true" * (not model.freeze_vision)
        return [
            f"weights and what training keeps of them take {_gb(always)} of {_gb(device.memory)}: "
            + (f"set {lower}" if lower else "take a smaller model")
        ]
    for part, key in (
        ("rollout", "rollout.kv_cache_tokens"),
        ("update", "train.tokens_per_micro_batch"),
    ):
        peak = always + sum(kept[part].values())
        largest = max(largest, peak)
        if peak <= device.memory:
            continue
        most = max(kept[part], key=lambda name: kept[part][name])
        change = f"lower {key}"
        if part == "update" and work.checkpointed < 1:
            change = "raise model.gradient_checkpointing to 1"
        if most == "gradients" and not config.model.lora_rank:
            change = "set model.lora_rank = 64"
        found.append(
            f"the {part} takes {_gb(peak)} of {_gb(device.memory)}, {_gb(kept[part][most])} of them {most}: {change}"
        )
    if not found:
        found.append(f"it fits: {_gb(largest)} of {_gb(device.memory)} at most")
    features = kept["always"]["image features"]
    if features >= config.model.feature_cache_mb * 2**20:
        found.append(
            f"model.feature_cache_mb = {config.model.feature_cache_mb} holds less than a step's images: raise it, or they go "
            "through the tower again in each pass, which is not in the times"
        )
    return found


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"
