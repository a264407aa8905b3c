"""Training without packing: any vision-language model of transformers, on batches that are padded to one length.

Every completion has a row of its own, with its prompt and its images. That is several times the work of packed rows,
and asks nothing of the model but that it is called as transformers documents it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from perl.model.families import ImageFeatures
from perl.model.packed.pack import pack_row
from perl.model.packed.plan import Share
from perl.model.padded_processor import PaddedProcessor
from perl.model.policy import Policy
from perl.types import EncodedPrompt, PackedBatch, Segment, UserError


@dataclass(frozen=True, slots=True)
class PaddedBatch(PackedBatch):
    """One micro-batch of R rows [prompt | completion], each its own sequence of the same row without the padding.

    `images` is empty: nothing is shared between rows.
    """

    prompts: tuple[EncodedPrompt, ...]
    """The R prompts, one for each completion."""

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the language model, padding included."""
        return len(self.prompts) * int(self.cu_seqlens_q.diff().max())


class PaddedPolicy(Policy):
    """A vision-language model of any kind with the surface of `Policy`.

    Args:
        model: a transformers model whose base model gives the hidden states that its head reads; LoRA adapters
            around it or not.
        processor: makes its inputs.
    """

    def __init__(self, model: nn.Module, processor: PaddedProcessor) -> None:
        nn.Module.__init__(self)
        self.model, self.processor, self.compiled = model, processor, False
        # Images are encoded anew with each row: no features are kept or handed around, and the tower's own gradients
        # come with the backward of each micro-batch.
        self.vision: Any = SimpleNamespace(
            images_encoded=0, trained=False, weights=[], clear_cache=lambda: None
        )

    @property
    def core(self) -> Any:
        return self.base.base_model

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] weight of the language-model head."""
        return self.base.get_output_embeddings().weight

    shares_prompts = False

    @property
    def patches_per_token(self) -> float:
        """0: what its images cost is not known before a batch is made."""
        return 0.0

    def share_tower(self, other: Policy) -> None:
        """Nothing is shared: each row's images go through the own tower."""

    def pack(self, segments: Sequence[Segment], budget: int, share: bool) -> list[PackedBatch]:
        """Rows of like length together, at most `budget` tokens with the padding; a longer one stands alone.

        Prompts with and without images stay apart, as processors take either. `share` changes nothing.
        """
        rows = [(i, r) for i, s in enumerate(segments) for r in range(len(s.completions))]

        def kind(row: tuple[int, int]) -> tuple[bool, int]:
            prompt = segments[row[0]].prompt
            length = len(prompt.input_ids) + len(segments[row[0]].completions[row[1]])
            return bool(prompt.images), length

        batches: list[list[tuple[int, int]]] = []
        for row in sorted(rows, key=kind):
            shows, longest = kind(row)
            last = batches[-1] if batches else []
            if not last or kind(last[0])[0] != shows or (len(last) + 1) * longest > budget:
                batches.append([])
            batches[-1].append(row)
        return [_batch(segments, members) for members in batches]

    def forward(self, batch: PackedBatch, features: ImageFeatures | None = None) -> torch.Tensor:
        """Final hidden states of the scored tokens, [N, H]: row i predicts `batch.targets[i]`."""
        assert isinstance(batch, PaddedBatch)
        hidden = self.core(**self._inputs(batch), use_cache=False).last_hidden_state
        width, starts = hidden.shape[1], batch.cu_seqlens_q.long()
        row = torch.searchsorted(starts, batch.scored, right=True) - 1
        index = row * width + batch.scored - starts[row]
        return hidden.flatten(0, 1)[index.to(hidden.device)]

    def prompt_inputs(self, prompts: Sequence[EncodedPrompt], side: Any) -> dict[str, torch.Tensor]:
        """Inputs of a batch of prompts on the device, in the model's precision; see `PaddedProcessor.inputs`."""
        self.vision.images_encoded += sum(len(p.images) for p in prompts)
        dtype = self.head_weight.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.processor.inputs(prompts, side).items()
        }

    def _inputs(self, batch: PaddedBatch) -> dict[str, torch.Tensor]:
        """The prompts' inputs with the completions behind them; per-token inputs go on with zeros.

        Raises:
            UserError: the model takes an input for each token that is no single number.
        """
        inputs = self.prompt_inputs(batch.prompts, "right")
        rows, prompt_width = inputs["input_ids"].shape
        starts = batch.cu_seqlens_q.tolist()
        lengths = batch.cu_seqlens_q.diff().tolist()
        width = max(lengths)
        out: dict[str, torch.Tensor] = {}
        for name, value in inputs.items():
            if value.shape[:2] != (rows, prompt_width) or "pixel" in name:
                out[name] = value
                continue
            if value.ndim > 2:
                raise UserError(
                    f"{type(self.base).__name__} takes {name} of shape {list(value.shape)} and cannot be trained on "
                    "padded batches; choose another model or write a family for it (docs/models.md)"
                )
            fill = self.processor.pad_token_id if name == "input_ids" else 0
            out[name] = value.new_full((rows, width), fill)
            out[name][:, :prompt_width] = value
        out["attention_mask"] = out["input_ids"].new_zeros(rows, width)
        for row, (start, length, prompt) in enumerate(
            zip(starts, lengths, batch.prompts, strict=False)
        ):
            own = slice(len(prompt.input_ids), length)
            out["attention_mask"][row, :length] = 1
            ids = batch.input_ids[start + own.start : start + own.stop]
            out["input_ids"][row, own] = ids.to(self.device)
        return out


def _batch(segments: Sequence[Segment], members: Sequence[tuple[int, int]]) -> PaddedBatch:
    packed = replace(pack_row(segments, [Share(i, (r,)) for i, r in members]), images=())
    values = {f.name: getattr(packed, f.name) for f in fields(packed)}
    return PaddedBatch(**values, prompts=tuple(segments[i].prompt for i, _ in members))


@torch.no_grad()
def check_head(model: Any, folder: str, token: int) -> None:
    """Whether the logits are the head's weight times the last hidden states, which the loss takes them to be.

    Args:
        model: a transformers model on any device.
        folder: for the message.
        token: id of any text token.

    Raises:
        UserError: they are not, or the model does not show.
    """
    ids = torch.full((1, 2), token, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        hidden = model.base_model(**inputs).last_hidden_state
        theirs = model(**inputs).logits
        ours = hidden @ model.get_output_embeddings().weight.T
        # In bfloat16 by a rounding of ours, if the model makes its logits in float32.
        off = max(1e-3, torch.finfo(ours.dtype).eps)
        fits = torch.allclose(ours.to(theirs), theirs, off, off * float(theirs.abs().max()))
    except Exception as error:  # Any model may be here, and it may fail in any way.
        raise UserError(
            f"model.path = {folder}: {type(model).__name__} cannot be called as a base model and a head ({error}); "
            "choose another model or write a family for it (docs/models.md)"
        ) from error
    if not fits:
        raise UserError(
            f"model.path = {folder}: the logits of {type(model).__name__} are not its hidden states times the weight of "
            "its head (a bias, a scale or a soft cap), which the loss needs; choose another model"
        )


def tower_of(model: Any, folder: str) -> list[nn.Module]:
    """The modules of the base model beside its language model: towers and projectors.

    Raises:
        UserError: the two cannot be told apart.
    """
    decoder, children = model.get_decoder(), list(model.base_model.children())
    if not any(child is decoder for child in children):
        raise UserError(
            f"model.path = {folder}: vision tower and language model of {type(model).__name__} cannot be told apart; "
            "set model.freeze_vision = false and model.lora_rank = 0"
        )
    return [child for child in children if child is not decoder]


def decoder_name(model: Any) -> str:
    """A regular expression for the name of the language model inside the whole one."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return re.escape(name)
