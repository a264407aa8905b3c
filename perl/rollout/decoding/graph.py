"""A decode step as a CUDA graph: one launch in place of those of every layer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_said = False


class Graphed:
    """A step, captured at its first call and replayed from then on."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None
        self.failed = False

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        """What `step` returns, which the next call writes anew.

        Args:
            step: always the same one. It reads and writes tensors that stay where they are, and waits for nothing.
        """
        if self.graph is None and not self.failed:
            self._capture(step)
        if self.graph is None or self.out is None:
            return step()
        self.graph.replay()
        return self.out

    def _capture(self, step: Callable[[], Tensor]) -> None:
        global _said
        try:
            # What libraries set up at their first call must not be captured; the step may run any number of times.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Threads that read pictures ahead may pin memory meanwhile, which "global", the default, makes an error.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.out = step()
            self.graph = graph
        except RuntimeError as error:
            self.failed = True
            if not _said:
                logger.warning("decoding without CUDA graphs: %s", str(error).partition("\n")[0])
            _said = True
