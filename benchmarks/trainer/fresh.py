"""What a trainer must not inherit from the one before it in the same process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.device import free_memory


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leave what is there now out of Python's garbage collections, which else take long in the middle of steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def forget_trainers() -> None:
    """Free the memory of trainers that are gone, and make accelerate forget its precision and accumulation of gradients.

    It keeps them for the life of a process; a trainer that still lives cannot be used afterwards.
    """
    from accelerate.state import AcceleratorState, GradientState

    free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
