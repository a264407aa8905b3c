"""Decoder layers through torch.compile, without a graph per step."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from perl.types import UserError

logger = logging.getLogger(__name__)


def check_compiler() -> None:
    """See that torch.compile can build its code.

    Raises:
        UserError: there is no C++ compiler.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if not any(name and shutil.which(name) for name in names):
        raise UserError(
            "model.compile needs a C++ compiler (g++ or clang++ in the PATH): install one, or leave it off"
        )


def compile_layers(language_model: nn.Module, backend: Any = "inductor") -> None:
    """Compile the forward of each decoder layer of a transformers language model, in place.

    All layers run one compiled code: the length of the row is a symbol in it, and attention is a break in the graph
    (see `perl.model.packed.attention.attention_function`), so that neither a new length nor a new layout compiles anew.
    Checkpoints and names of parameters stay as they are.

    Args:
        language_model: with `layers`.
        backend: of torch.compile.
    """
    layers: Any = language_model.layers
    forward = type(layers[0]).forward
    run = _run
    if _checkpoints_in_forward():
        # torch.compile skips a function that checkpoints code with a graph break: the checkpoint goes around it.
        forward, run = forward.__wrapped__, _run_checkpointed
    logger.info("compiling decoder layers: the first steps take longer")
    compiled = torch.compile(forward, dynamic=True, backend=backend)
    for layer in layers:
        layer.forward = partial(run, compiled, layer)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is compiled as it is written: generation grows its cache token by token, which would compile anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _checkpoints_in_forward() -> bool:
    """Whether a layer checkpoints in its `forward`, which wraps the one that is written, or in `__call__`, as older
    transformers do."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)


def _run(compiled: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    return compiled(layer, *args, **kwargs)


def _run_checkpointed(compiled: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)
