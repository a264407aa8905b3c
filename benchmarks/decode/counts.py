"""What a decode step costs, read off the operators that PyTorch dispatches: no clock, so it holds for any machine."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FREE = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "is_same_size"}
_NO_WORK = {"promote_types", "_record_function_enter_new", "_record_function_exit", "result_type"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_READ_SOME = {"embedding", "index", "index_select", "gather"}
"""They read as much of their first tensor as they give."""
_WRITE_SOME = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_", "slice_scatter_"}
"""They write as much of their first tensor as the last one holds."""
_WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select"}


class Tally(TorchDispatchMode):
    """Counts what runs inside the block.

    `operators` and `bytes` by name: bytes are those of distinct elements that an operator reads and writes, a tensor that is
    expanded counting once. Views and allocations are neither. `waits` are reads of the device by the host: of a scalar,
    of a size that depends on data, of a tensor copied to the CPU (on a CPU: asked for by `tolist`, `numpy` or `cpu`).

    Args:
        compute: whether products with weights are computed. Where only counts are wanted they need not be: they give
            zeros, so that logits are zeros too.
    """

    def __init__(self, compute: bool = True) -> None:
        super().__init__()
        self.compute = compute
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._reads = _HostReads(self.waits)

    def __enter__(self) -> Tally:
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in ("mm", "addmm") and not self.compute:
            a, b = args[-2:]
            out = a.new_zeros(len(a), b.shape[1])
        else:
            out = func(*args, **(kwargs or {}))
        if name in _WAITS or (name in ("_to_copy", "copy_") and _leaves_device(args, kwargs, out)):
            self.waits[name] += 1
        if not (
            func.is_view
            or name in _FREE
            or name in _NO_WORK
            or name in _EMPTY
            or name == "_local_scalar_dense"
        ):
            self.operators[name] += 1
            read = {k: x for k, x in (kwargs or {}).items() if k != "out"}
            self.bytes[name] += moved(name, _tensors((args, read)), _tensors(out))
        return out


class _HostReads(TorchFunctionMode):
    """Reads of whole tensors, which are no operators on a CPU."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "__array__", "cpu") and args[0].device.type == "cpu":
            if not getattr(args[0], "_read_by_host", False):
                self.waits[name] += 1
            if name == "cpu":
                # A copy, if the tensor were on a GPU: what reads it waits for nothing.
                out = out.view_as(out)
                out._read_by_host = True
        return out


def moved(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if name in _READ_SOME:
        return _nbytes(inputs[1:]) + 2 * _nbytes(outputs)
    if name in _WRITE_SOME:
        return _nbytes(inputs[1:]) + _nbytes(inputs[-1:])
    if name == "copy_":
        return _nbytes(inputs[1:]) + _nbytes(outputs)
    if name in ("fill_", "zero_"):
        return _nbytes(outputs)
    return _nbytes(inputs) + _nbytes(outputs)


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(
        x.element_size() * math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s)
        for x in tensors
    )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _leaves_device(args: Any, kwargs: Any, out: Any) -> bool:
    sources = _tensors((args, kwargs))
    return out.device.type == "cpu" and any(x.device.type != "cpu" for x in sources)
