"""The sizes of a model that work and memory follow from; its weights are not needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.config import Config
from perl.files import offline_if_unreachable
from perl.model.families import family_of
from perl.model.sources import layers_of
from perl.model.tiny import TINY_MODELS
from perl.training.parallel.balancing import Met, ModelFlops
from perl.types import UserError

if TYPE_CHECKING:
    import torch

    from perl.model.policy import Policy


def _qwen(kind: str, text: tuple[int, ...], vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    """A config.json's: hidden size, intermediate size, layers, heads, key heads and vocabulary of the language model."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: dict[str, Any] = dict(
        zip((*names, "num_key_value_heads", "vocab_size"), text, strict=True)
    )
    sizes["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    if kind == "qwen3_vl":
        sizes["head_dim"] = 128
    vision = {**vision, "out_hidden_size": text[0]}
    return {
        "model_type": kind,
        "text_config": {**sizes, "tie_word_embeddings": tied},
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


_TOWER_25 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_TOWER_3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
_TOWER_3 |= {"deepstack_visual_indexes": [5, 11, 17]}
_LARGE_3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
_TEXT_3B, _TEXT_7B = (2048, 11008, 36, 16, 2, 151936), (3584, 18944, 28, 28, 4, 152064)
_TEXT_4B, _TEXT_8B = (2560, 9728, 36, 32, 8, 151936), (4096, 12288, 36, 32, 8, 151936)
CONFIGS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen("qwen2_5_vl", _TEXT_3B, _TOWER_25, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen("qwen2_5_vl", _TEXT_7B, _TOWER_25, False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen("qwen3_vl", _TEXT_4B, _TOWER_3, True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen("qwen3_vl", _TEXT_8B, _LARGE_3, False),
}
"""What the config.json of these hub names says of sizes; any other model's is read."""


@dataclass(frozen=True)
class Weights:
    """A part of a model: numbers of weights, and bytes of them as they are loaded."""

    count: int
    trained: int
    narrow: int
    """Trained ones with fewer than 32 bits, which have a float32 master elsewhere or become float32 in shards."""
    frozen_bytes: int
    trained_bytes: int
    in_blocks: int
    """Trained ones whose moments adamw_8bit keeps in 8 bits."""
    largest: int
    """Weights of the largest tensor that is trained."""

    @classmethod
    def of(cls, parameters: Iterable[Any]) -> Weights:
        from perl.training.optimizer import in_blocks

        parameters = list(parameters)
        trained = [p for p in parameters if p.requires_grad]
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in trained),
            sum(p.numel() for p in trained if p.itemsize < 4),
            sum(p.nbytes for p in parameters if not p.requires_grad),
            sum(p.nbytes for p in trained),
            sum(p.numel() for p in trained if in_blocks(p)),
            max((p.numel() for p in trained), default=0),
        )

    @property
    def bytes(self) -> int:
        return self.frozen_bytes + self.trained_bytes


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of weights and sizes."""

    flops: ModelFlops
    itemsize: int
    """Bytes of a number that is computed with."""
    in_layers: Weights
    around: Weights
    """Embeddings, head and last norm."""
    in_tower: Weights
    layer: Weights
    """One of the layers."""
    adapters_alone: bool
    """Whether the model without its adapters is the reference, so that no second one is kept."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    weights: int
    trained: int
    trained_layers: int
    """Weights of the language model's layers that are trained."""
    tensors: int
    """Trained ones."""
    tower: int
    """Weights."""
    tower_trained_weights: int
    head_trained: bool
    tower_depth: int
    tower_hidden: int
    tower_intermediate: int
    tower_gated: bool
    """Whether its MLPs are gated and its norms RMSNorms, as those of Qwen2.5-VL, or plain ones with LayerNorms."""
    tower_spans: tuple[int, ...]
    """Most patches that a patch sees, for each block of the tower; 0: all of its image's."""
    patch: int
    """Pixels of a patch's side."""
    patch_values: int
    """Numbers that the tower reads of one."""
    patches_per_token: int
    features: int
    """Tensors [K, H] that the tower makes: deepstack has more than one."""

    @property
    def cached_bytes(self) -> int:
        """Of a token's keys and values, a layer."""
        return 2 * self.itemsize * self.kv_heads * self.head_dim

    @property
    def tower_trained(self) -> bool:
        return self.tower_trained_weights > 0

    @property
    def layers_backward(self) -> float:
        """Products of a layer's backward for one of its forward: gradients of inputs are as many, those of weights as many of
        these as are trained."""
        return 1 + self.trained_layers / self.flops.token

    @property
    def head_backward(self) -> float:
        """The same of the head."""
        return 1.0 + self.head_trained

    @property
    def tower_backward(self) -> float:
        """The same of the tower; 0 where nothing of it is trained, as no gradient goes through it then."""
        return (1 + self.tower_trained_weights / self.tower) if self.tower_trained else 0.0

    @property
    def adapters(self) -> int:
        """Weights that are beside those of the language model's layers, not of them."""
        return self.trained_layers if self.trained_layers < self.flops.token else 0

    def tokens_of(self, pixels: int) -> int:
        """Visual tokens of an image of so many pixels."""
        return max(1, pixels // (self.patch**2 * self.patches_per_token))

    def tower_flops(self, tokens: int) -> float:
        """Of the forward of one image, attention included."""
        patches = tokens * self.patches_per_token
        seen = sum(min(span or patches, patches) for span in self.tower_spans)
        weights = self.flops.visual * (1 if self.tower_trained else 3)
        return 2 * tokens * weights + 4 * self.tower_hidden * patches * seen

    def text_flops(self, met: Met, gradients: bool, adapters: bool = True) -> dict[str, float]:
        """Of a forward of `language` model and `head`, with the backward where there are `gradients`.

        The model's own: what is computed again, or skipped, counts as if it were done once. A multiplication with an addition
        is two FLOPs; of attention both products count, over the keys that a query sees, and twice that in the backward.

        Args:
            adapters: False: those that go without.
        """
        weights = self.flops.token - (0 if adapters else self.adapters)
        times, scored = (self.layers_backward, self.head_backward) if gradients else (0.0, 0.0)
        products = 2 * met.tokens * weights * (1 + times)
        attention = 2 * met.pairs * self.flops.pair * (3 if gradients else 1)
        head = 2 * met.scored * self.flops.scored * (1 + scored)
        return {"language": products + attention, "head": head}

    def vision_flops(self, encoded: Mapping[int, int], gradients: bool) -> float:
        """The same of images, how many of how many visual tokens."""
        forward = sum(count * self.tower_flops(tokens) for tokens, count in encoded.items())
        return forward * (1 + self.tower_backward * gradients)


def model_facts(config: Config, dtype: torch.dtype | None = None) -> ModelFacts:
    """Of the recipe's model as it would be trained, with its adapters; made without memory for its weights.

    Args:
        dtype: that is computed in; left out: what `model.dtype` means on a GPU.

    Raises:
        UserError: `model.path` is empty, nothing is known of it, or it trains on padded batches.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from perl.model.policy import Policy
    from perl.model.weights import prepared

    path = config.model.path
    if dtype is None:
        dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    settings = _settings(config)
    family = family_of(settings.model_type)
    if family is None:
        raise UserError(
            f"model.path = {path}: {settings.model_type} trains on padded batches, which plan does not count; "
            "measure a step with perl-rl profile"
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(settings, dtype=dtype)
        policy = Policy(prepared(model, config.model, family, path), family)
    return facts_of(policy, config.train.share_prompts)


def facts_of(policy: Policy, share_prompts: bool) -> ModelFacts:
    """Of a policy that is trained on packed rows, and of what of it is trained."""
    from perl.model.weights import trains_adapters_alone

    text, vision = policy.base.get_decoder().config, policy.core.config.vision_config
    layers = policy.base.get_decoder().layers
    flops = ModelFlops.of(policy, share_prompts)
    trained = [p for p in policy.parameters() if p.requires_grad]
    patch = vision.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    span, full = 0, range(depth)
    if window := getattr(vision, "window_size", None):
        span, full = (window // patch) ** 2, vision.fullatt_block_indexes
    elif size := getattr(vision, "image_size", None):  # Tiles, each with a class token.
        span, full = prod(size) // patch**2 + 1, ()
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    in_layers, in_tower = Weights.of(layers.parameters()), Weights.of(policy.vision.weights)
    apart = {*layers.parameters(), *policy.vision.weights}
    return ModelFacts(
        flops=flops,
        itemsize=policy.dtype.itemsize,
        in_layers=in_layers,
        around=Weights.of(p for p in policy.parameters() if p not in apart),
        in_tower=in_tower,
        layer=Weights.of(layers[0].parameters()),
        adapters_alone=trains_adapters_alone(policy),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=policy.head_weight.shape[0],
        weights=sum(p.numel() for p in policy.parameters()),
        trained=sum(p.numel() for p in trained),
        trained_layers=in_layers.trained,
        tensors=len(trained),
        tower=in_tower.count,
        tower_trained_weights=in_tower.trained,
        head_trained=policy.head_weight.requires_grad,
        tower_depth=depth,
        tower_hidden=hidden,
        tower_intermediate=getattr(vision, "intermediate_size", 0) or 4 * hidden,
        tower_gated=any(
            "gate_proj" in name for name, _ in policy.core.named_parameters() if "visual" in name
        ),
        tower_spans=tuple(0 if block in full else span for block in range(depth)),
        patch=patch,
        patch_values=3 * getattr(vision, "temporal_patch_size", 1) * patch**2,
        patches_per_token=round(policy.patches_per_token),
        features=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
    )


def _settings(config: Config) -> Any:
    """transformers' config of the model."""
    from transformers import AutoConfig

    from perl.data.dataset import BUNDLED
    from perl.data.tasks import vocabulary
    from perl.model.tiny import tiny_config, tiny_tokenizer

    path = config.model.path
    if not path:
        raise UserError(
            "model.path is empty; name a model to plan for, as in --model.path Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if path in TINY_MODELS:
        words = vocabulary(config.data.train.removeprefix(BUNDLED))
        return tiny_config(path, tiny_tokenizer(path, words))
    folder = layers_of(path)[-1]
    if folder in CONFIGS and not Path(folder).exists():
        return AutoConfig.for_model(**CONFIGS[folder])
    offline_if_unreachable()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for what it cannot find or read.
        raise UserError(
            f"model.path = {path}: no config.json can be read there; give a model folder, or one of "
            f"{', '.join(CONFIGS)}"
        ) from error
