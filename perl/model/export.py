"""Model folders and adapters written a tensor at a time: wherever the weights lie, no second copy of them is made."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Named = tuple[str, torch.Tensor]

FILE_BYTES = 5 * 10**9
"""Most bytes of weights in one file of a model folder, as hub repositories have them."""


def write_model(model: Any, folder: Path, dtype: torch.dtype, writes: bool = True) -> None:
    """Write what the `save_pretrained` of transformers would: config, generation config, and weights under its names.

    Args:
        model: of transformers; LoRA layers in it are merged, in float32 at least.
        folder: that is there.
        dtype: of the parameters, each of which is rounded once; buffers keep theirs.
        writes: whether this process does. Where weights are in shards all processes take part.

    Raises:
        OSError: also where the others go on to the end, as they wait for this process's part.
    """
    exported = Exported(model, dtype)
    with _to_the_end(iter(exported)) as converted:
        if not writes:
            return
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:
                part.dtype = dtype
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        split = _write(folder, "model", exported.planned, converted, FILE_BYTES)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": exported.parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


class Exported:
    """What a model folder holds: names of transformers' `save_pretrained`, LoRA layers merged, in float32 at least.

    Iterating makes one tensor at a time, of whole weights; where these are in shards all processes iterate together. Each
    tensor is rounded to `dtype` once; buffers keep theirs.

    Attributes:
        planned: name -> tensor on the meta device, in the sequence of `save_pretrained`.
        sequence: the names in that in which they come.
        parameters: how many numbers the model's parameters are.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._tensors = model, _merged_tensors(model)
        self._specs = {
            name: _spec(tensor, dtype if isinstance(tensor, nn.Parameter) else tensor.dtype)
            for name, (tensor, _) in self._tensors.items()
        }
        self.parameters = sum(
            t.numel() for t, _ in self._tensors.values() if isinstance(t, nn.Parameter)
        )
        self.planned = self._reverted(self._specs)
        # Some tensors of a folder are made of several: of a layer mostly.
        groupings = ([[name] for name in self._specs], _layers_of(self._specs), [[*self._specs]])
        shapes = {name: spec.shape for name, spec in self.planned.items()}
        for self._groups in groupings:
            parts = [self._reverted({n: self._specs[n] for n in group}) for group in self._groups]
            if {n: spec.shape for part in parts for n, spec in part.items()} == shapes:
                break
        self.sequence = [name for part in parts for name in part]

    def __iter__(self) -> Iterator[Named]:
        for group in self._groups:
            yield from self._reverted(
                {name: _merged(*self._tensors[name]).to(self._specs[name].dtype) for name in group}
            ).items()

    def _reverted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self._model, {**tensors})


def write_adapter(model: Any, folder: Path, base: str, writes: bool = True) -> None:
    """Write the LoRA adapters of a peft model in peft's format, in the dtype that they are trained in.

    Args:
        base: the model folder or hub name that they lie over, which the adapter tells those that load it.
        writes: as in `write_model`.
    """
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    specs = {name: _spec(tensor, tensor.dtype) for name, tensor in state.items()}
    planned = get_peft_model_state_dict(model, specs, save_embedding_layers=False)
    by_spec = {id(spec): state[name] for name, spec in specs.items()}
    whole = ((name, _whole(by_spec[id(spec)])) for name, spec in planned.items())
    with _to_the_end(whole) as tensors:
        if not writes:
            return
        local = Path(base).expanduser()
        model.active_peft_config.base_model_name_or_path = (
            str(local.resolve()) if local.exists() else base
        )
        # Its config and its card; the weights are hollow, and written anew.
        hollow = {name: torch.empty(0) for name in state}
        model.save_pretrained(folder, state_dict=hollow, save_embedding_layers=False)
        _write(folder, "adapter_model", planned, tensors, sum(t.nbytes for t in planned.values()))


def _merged_tensors(model: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    """What a model folder holds, by its names in the model without adapters, each with the LoRA layer that adds to it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    out: dict[str, tuple[torch.Tensor, Any]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = next((n for n in _above(name) if n in adapted), None)
        if layer is None:
            out[name] = tensor, None
        elif (own := name[len(layer) + 1 :]).startswith("base_layer."):
            own = own.removeprefix("base_layer.")
            out[f"{layer}.{own}"] = tensor, adapted[layer] if own == "weight" else None
    for pattern in model._keys_to_ignore_on_save or ():
        out.pop(pattern, None)
    # It tells tied weights by their storage. One element each stands for weights that may lie in shards.
    storages = {id(tensor): torch.empty(1) for tensor, _ in out.values()}
    kept = remove_tied_weights_from_state_dict(
        {name: storages[id(tensor)] for name, (tensor, _) in out.items()}, model
    )
    return {name: out[name] for name in kept}


def _above(name: str) -> Iterator[str]:
    """The modules that a tensor lies in, from the innermost."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _layers_of(names: Iterable[str]) -> list[list[str]]:
    """The names of each numbered layer together, in their order; any other alone."""

    def layer(name: str) -> str:
        match = re.match(r".*?\.\d+\.", name)
        return match[0] if match else name

    return [list(group) for _, group in groupby(names, layer)]


def _merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    whole = _whole(weight)
    if layer is None:
        return whole
    wide = torch.promote_types(whole.dtype, torch.float32)
    [name] = layer.active_adapters
    down, up = (_whole(m[name].weight).to(wide) for m in (layer.lora_A, layer.lora_B))
    return (up @ down).mul_(layer.scaling[name]).add_(whole)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        # Shards on the host are gathered on the devices that the processes talk through.
        return cast(Any, tensor.to(tensor.device_mesh.device_type)).full_tensor()
    return tensor


def _spec(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


@contextmanager
def _to_the_end(tensors: Iterator[Named]) -> Iterator[Iterator[Named]]:
    """Tensors, of which those that the block leaves are made too: other processes gather them with this one."""
    try:
        yield tensors
    finally:
        for _ in tensors:
            pass


def _write(
    folder: Path,
    stem: str,
    planned: dict[str, torch.Tensor],
    tensors: Iterable[Named],
    file_bytes: int,
) -> Any:
    """Write safetensors files, each tensor when it comes.

    The format: https://huggingface.co/docs/safetensors.

    Returns:
        huggingface_hub's split into files.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        planned, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=file_bytes
    )
    with ExitStack() as files:
        places: dict[str, tuple[Any, int]] = {}
        for file_name, names in split.filename_to_tensors.items():
            file = files.enter_context((folder / file_name).open("wb"))
            header, starts = _header(planned, names)
            file.write(header)
            places |= {name: (file, len(header) + at) for name, at in starts.items()}
        for name, tensor in tensors:
            file, at = places.pop(name)
            file.seek(at)
            file.write(_bytes(tensor))
        assert not places, f"{len(places)} tensors were not written"
    return split


def _header(
    planned: Mapping[str, torch.Tensor], names: Sequence[str]
) -> tuple[bytes, dict[str, int]]:
    """The table of contents of a safetensors file, and where behind it each tensor begins."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # Wide ones first, as the library has them, so that each is aligned.
    for name in sorted(names, key=lambda name: (-planned[name].itemsize, name)):
        spec = planned[name]
        starts[name], end = end, end + spec.nbytes
        code = str(spec.dtype).removeprefix("torch.").upper()
        for long, short in (("UINT", "U"), ("INT", "I"), ("FLOAT", "F")):
            code = code.replace(long, short)
        offsets = [starts[name], end]
        table[name] = {"dtype": code, "shape": [*spec.shape], "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))
