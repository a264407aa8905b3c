"""Which engine samples from a policy."""

from __future__ import annotations

import os
from typing import Literal

from perl.config import RolloutConfig
from perl.distributed import Processes
from perl.model.padded import PaddedPolicy
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.rollout.engine import InProcessEngine
from perl.rollout.padded import PaddedEngine
from perl.rollout.vllm.client import KEY, Loop, Server
from perl.rollout.vllm.engine import VLLMEngine
from perl.rollout.vllm.gpu import GPUTransfer
from perl.rollout.vllm.gpu import is_there as vllm_is_here
from perl.rollout.vllm.weights import FileTransfer
from perl.types import UserError


def in_process(policy: Policy, processor: Processor, kv_cache_tokens: int) -> InProcessEngine:
    """The engine that samples from this policy in this process; see `InProcessEngine`."""
    engine = PaddedEngine if isinstance(policy, PaddedPolicy) else InProcessEngine
    return engine(policy, processor, kv_cache_tokens)


def on_servers(
    config: RolloutConfig, policy: Policy, processor: Processor, processes: Processes
) -> VLLMEngine | None:
    """The engine that samples from this policy on vLLM servers; None where the config asks for none.

    Raises:
        UserError: no server is named, or the model is one whose prompts they cannot be given.
    """
    if config.engine == "inprocess":
        return None
    if not config.url:
        raise UserError(
            "rollout.engine = vllm samples on vLLM servers, and none is named; give --rollout.url http://127.0.0.1:8000"
        )
    if isinstance(policy, PaddedPolicy):
        raise UserError(
            "rollout.engine = vllm: this model is trained on padded batches, whose prompts vLLM cannot be given token by "
            "token; leave rollout.engine out, or write a family for the model (docs/models.md)"
        )
    servers = [
        Server(url, os.environ.get(KEY), config.timeout, config.requests) for url in config.url
    ]
    loop, colocated = Loop(), config.placement == "colocated"
    transfer = _transfer(config, policy, processes, loop)
    return VLLMEngine(
        servers, policy, processor, processes, transfer, config.tolerance, colocated, loop
    )


def _transfer(
    config: RolloutConfig, policy: Policy, processes: Processes, loop: Loop
) -> FileTransfer | GPUTransfer:
    way = transfer_of(config, policy.device.type == "cuda")
    if way == "files":
        return FileTransfer(policy, processes)
    return GPUTransfer(way, policy, processes, loop.run)


def transfer_of(config: RolloutConfig, cuda: bool) -> Literal["files", "nccl", "ipc"]:
    """How weights come to servers, by what the config says and what is there.

    Raises:
        UserError: what is asked for needs a GPU.
    """
    if config.transfer == "auto":
        if not cuda or not vllm_is_here():
            return "files"
        return "ipc" if config.placement == "colocated" else "nccl"
    if config.transfer != "files" and not cuda:
        raise UserError(
            f"rollout.transfer = {config.transfer} goes from GPU to GPU, and no GPU is here; set rollout.transfer = files"
        )
    if config.transfer == "ipc" and config.placement == "separate":
        raise UserError(
            "rollout.transfer = ipc is for servers on the trainer's own GPUs; set rollout.placement = colocated, or another "
            "rollout.transfer"
        )
    return config.transfer
