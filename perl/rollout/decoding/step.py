"""One token of every row through the decoder: the modules of the stock model, over keys and values stored by slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perl.model.policy import Policy
from perl.rollout.decoding.attention import Attend, Span
from perl.rollout.decoding.cache import KVCache


class Step:
    """Logits after one more token of each row; a row is a completion, S slots of R after each other.

    `embed_tokens`, `layers` and `norm` are transformers' own for Qwen2, Qwen3 and Llama decoders and what is built of
    them, LoRA adapters on their linear layers or not. For text all axes of M-RoPE are equal, so the rotation is a plain
    one, by the model's own angles.

    Args:
        policy: the model.
        cache: where keys and values are.
        attend: one of `perl.rollout.decoding.attention`.
        rotations: what `rotations` makes.
    """

    def __init__(self, policy: Policy, cache: KVCache, attend: Attend, rotations: Tensor) -> None:
        self.decoder: Any = policy.core.language_model
        self.lm_head = policy.base.lm_head
        self.cache, self.attend, self.rotations = cache, attend, rotations
        slots, kv_heads, _, rows, new, head = cache.shape
        attention = self.decoder.layers[0].self_attn
        self.scale = attention.scaling
        self.group = attention.q_proj.out_features // (kv_heads * head)
        like = cache.completions[0]
        # Buffers of all layers: what is written to them need not be copied to another order.
        self.merged = like.new_empty(slots, rows, kv_heads, self.group, head)
        self.share = like.new_empty(slots * kv_heads, rows, self.group)
        self.first = torch.arange(0, slots * kv_heads * new, new, device=like.device)
        ones = torch.eye(2, dtype=like.dtype, device=like.device)
        self.unturned = ones.unsqueeze(2).expand(slots, rows, 2, 2, head // 2)

    def __call__(
        self, token: Tensor, age: Tensor, start: Tensor, prompts: Span, longest: tuple[int, int]
    ) -> Tensor:
        """[S * R, V]

        Args:
            token: int64 [S * R], the last one of each row.
            age: int64 [S], how many tokens the rows of a slot have; 0: a slot that is only being filled, what it gives
                has no meaning.
            start: int64 [S], position of the first of them.
            prompts: tokens of the prompts, for each slot and KV head.
            longest: least and largest age, as far as the host knows.
        """
        _, kv_heads, _, rows, new, _ = self.cache.shape
        place = (age - 1).clamp(0, new - 1)
        turned = self.rotations.index_select(0, start + place).unsqueeze(1)
        turned = turned.expand(-1, rows * (self.group + 1), -1, -1, -1)
        rotation = torch.cat([turned, self.unturned], 1).unsqueeze(1)
        every = place.unsqueeze(1).expand(-1, kv_heads).flatten()
        own = Span((every + 1).int(), *longest)
        index = self.first + every
        hidden = self.decoder.embed_tokens(token)
        for number in range(len(self.decoder.layers)):
            hidden = self._layer(number, hidden, rotation, index, prompts, own)
        return self.lm_head(_normed(self.decoder.norm, hidden))

    def _layer(
        self,
        number: int,
        hidden: Tensor,
        rotation: Tensor,
        index: Tensor,
        prompts: Span,
        own: Span,
    ) -> Tensor:
        slots, kv_heads, longest, rows, new, head = self.cache.shape
        layer, batch = self.decoder.layers[number], slots * kv_heads
        attention = layer.self_attn
        x = _normed(layer.input_layernorm, hidden)
        q = attention.q_proj(x).view(slots, rows, kv_heads, self.group, head)
        k, v = (
            p(x).view(slots, rows, kv_heads, head) for p in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
        # By slot and KV head [S, KV, R * group queries, R keys, R values, d], in one copy.
        joined = torch.cat([*q.unbind(1), k.transpose(1, 2), v.transpose(1, 2)], 2)
        # Halves (x1, x2) become (x1 cos - x2 sin, x1 sin + x2 cos); values stay.
        halves = joined.view(slots, kv_heads, -1, 1, 2, head // 2) * rotation
        turned = halves.sum(-2).view(batch, -1, head)
        queries, entries = turned.split([rows * self.group, 2 * rows], 1)
        stored = self.cache.completions[number]
        stored.view(batch * new, -1).index_copy_(0, index, entries.flatten(1))
        keys, values = self.cache.prompts[number].view(2, batch, longest, 1, head)
        prompt, lse = self.attend(queries.unsqueeze(1), keys, values, prompts, self.scale)
        keys, values = stored.view(batch, new, 2, rows, head).unbind(2)
        out, own_lse = self.attend(queries.unflatten(1, (rows, -1)), keys, values, own, self.scale)
        torch.sigmoid(lse.view_as(own_lse) - own_lse, out=self.share)
        apart = (slots, kv_heads, rows, self.group)
        torch.lerp(
            out.view(*apart, head),
            prompt.view(*apart, head),
            self.share.view(*apart, 1),
            out=self.merged.transpose(1, 2),
        )
        hidden = _added(hidden, attention.o_proj, self.merged.view(slots * rows, -1))
        x = _normed(layer.post_attention_layernorm, hidden)
        mlp = layer.mlp
        if "forward" in vars(mlp):  # Put in its place, by Liger's.
            return hidden + mlp(x)
        return _added(hidden, mlp.down_proj, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def rotations(policy: Policy, count: int, axes: int) -> Tensor:
    """[count, 2, 2, d / 2] for positions from 0: the share of each half of a head's input (second) in each half of its
    output (first), in the dtype of the weights.

    Args:
        axes: of the model's positions.
    """
    decoder = policy.core.language_model
    positions = policy.position_ids(torch.arange(count).expand(axes, 1, -1))
    cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight, positions)
    # Some versions of transformers give one of each axis.
    (cos1, cos2), (sin1, sin2) = (
        x.reshape(-1, count, x.shape[-1])[0].chunk(2, -1) for x in (cos, sin)
    )
    return torch.stack([cos1, -sin1, sin2, cos2], 1).unflatten(1, (2, 2))


def _normed(norm: Any, x: Tensor) -> Tensor:
    """One kernel on a GPU; on a CPU, PyTorch's takes more operators than the module."""
    if x.is_cuda and "forward" not in vars(norm):
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return norm(x)


def _added(hidden: Tensor, linear: Any, x: Tensor) -> Tensor:
    """hidden + linear(x), in one kernel where it can be."""
    if type(linear) is nn.Linear and linear.bias is None:
        return torch.addmm(hidden, x, linear.weight.t())
    return hidden + linear(x)
