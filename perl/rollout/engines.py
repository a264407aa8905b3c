"""Which engine samples from a policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from perl.config import Config, RolloutConfig
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
from perl.rollout.vllm.serve import OwnServer, launch
from perl.rollout.vllm.weights import FileTransfer
from perl.types import UserError


def in_process(policy: Policy, processor: Processor, kv_cache_tokens: int) -> InProcessEngine:
    """The engine that samples from this policy in this process; see `InProcessEngine`."""
    engine = PaddedEngine if isinstance(policy, PaddedPolicy) else InProcessEngine
    return engine(policy, processor, kv_cache_tokens)


def on_servers(
    config: RolloutConfig,
    policy: Policy,
    processor: Processor,
    processes: Processes,
    own: OwnServer | None = None,
) -> VLLMEngine | None:
    """The engine that samples from this policy on vLLM servers; None where the config asks for none.

    Args:
        own: the server that the first process has started, where the config names none; it is waited for.

    Raises:
        UserError: the model is one whose prompts servers cannot be given.
    """
    if config.engine == "inprocess":
        return None
    if isinstance(policy, PaddedPolicy):
        raise UserError(
            "rollout.engine = vllm: this model is trained on padded batches, whose prompts vLLM cannot be given token by "
            "token; leave rollout.engine out, or write a family for the model (docs/models.md)"
        )
    with processes.jointly():
        if own:
            own.wait()
    urls = config.url or processes.gather([own.launch.url] if own else [])
    key = os.environ.get(KEY)
    servers = [Server(url, key, config.timeout, config.requests, own) for url in urls]
    loop, colocated = Loop(), config.placement == "colocated"
    transfer = _transfer(config, policy, processes, loop)
    return VLLMEngine(
        servers, policy, processor, processes, transfer, config.tolerance, colocated, loop
    )


def own_server(
    config: Config, model: str, dtype: torch.dtype, cuda: bool, log: Path
) -> OwnServer | None:
    """A server that is being started for a run; None where the config names some, or needs none.

    Raises:
        UserError: it cannot be started so.
    """
    rollout = config.rollout
    if rollout.engine == "inprocess" or rollout.url:
        return None
    named = str(dtype).removeprefix("torch.")
    started = OwnServer(
        launch(config, model, named, transfer_of(rollout, cuda), cuda), log, rollout.timeout
    )
    started.start()
    return started


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
