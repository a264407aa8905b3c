"""Weights for vLLM from safetensors files in memory that processes share; runs inside a vLLM server, not in the trainer.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package (see pyproject.toml); the backend is then named
by `--weight-transfer-config '{"backend": "perl"}'`. vLLM's own backends move weights between GPUs; this one needs none.
"""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BACKEND = "perl"


def register() -> None:
    """Make the backend known; every process of a server calls it, some of them twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeights)


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to set up."""


@dataclass
class Folder(WeightTransferUpdateInfo):
    """Where an update's safetensors files lie, with names as in a model folder."""

    path: str


class FileWeights(WeightTransferEngine[Nothing, Folder]):
    """Loads the files of a folder as vLLM loads those of a model folder, into the storage that it computes with."""

    init_info_cls = Nothing
    update_info_cls = Folder

    def init_transfer_engine(self, init_info: Nothing) -> None: ...

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # The base class does so in any case, which fails on a CPU.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Folder) -> None:
        from safetensors import safe_open

        files = sorted(Path(update_info.path).glob("*.safetensors"))
        if not files:
            raise ValueError(f"no safetensors files in {update_info.path}")
        for file in files:
            with safe_open(file, "pt") as tensors:
                self.model.load_weights(
                    (name, tensors.get_tensor(name)) for name in tensors.offset_keys()
                )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # On a CPU a head computes with a packed copy of its weight. A tied one has no tensor of its own among those that come,
        # so that it got the new weight but kept the old copy.
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)

    def shutdown(self) -> None: ...
