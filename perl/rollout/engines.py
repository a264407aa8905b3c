"""Which engine samples from a policy."""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from perl.config import Config, RolloutConfig
from perl.distributed import Processes
from perl.model.loading import compute_dtype, load_policy, load_processor
from perl.model.padded import PaddedPolicy
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.sources import copy_companions, layers_of
from perl.rollout.engine import InProcessEngine, end_tokens
from perl.rollout.padded import PaddedEngine
from perl.rollout.vllm.client import KEY, Loop, Server
from perl.rollout.vllm.engine import ServedModel, VLLMEngine
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
        servers,
        policy,
        processor,
        processes,
        transfer,
        config.tolerance,
        colocated,
        loop,
        config.ahead > 0,
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
    if cuda and rollout.placement == "separate" and not rollout.devices:
        raise UserError(
            "rollout.placement = separate: name the GPUs of the server, as in --rollout.devices 7, and start the trainer on "
            "the others; or set rollout.placement = colocated"
        )
    named = str(dtype).removeprefix("torch.")
    started = OwnServer(
        launch(config, model, named, transfer_of(rollout, cuda), cuda), log, rollout.timeout
    )
    started.start()
    return started


def served_model(config: Config, processor: Processor, device: torch.device) -> ServedModel:
    """A model as it is, on vLLM servers; one that is started for it ends with this process.

    Raises:
        UserError: a server that is named has another model, or one that is trained.
        RunFailed: a server does not answer.
    """
    rollout, stack = config.rollout, ExitStack()
    atexit.register(stack.close)
    path, own = config.model.path, None
    if not rollout.url:
        # Nothing else is on the GPUs.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        rollout = replace(rollout, devices=rollout.devices or visible)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="perl-rl-")))
        dtype = compute_dtype(config.model.dtype, device)
        path = _as_model_folder(config, folder / "model", dtype)
        own = own_server(
            replace(config, rollout=rollout),
            path,
            dtype,
            device.type == "cuda",
            folder / "vllm.log",
        )
    urls = rollout.url
    if own:
        stack.callback(own.stop)
        own.wait()
        urls = (own.launch.url,)
    key = os.environ.get(KEY)
    servers = [Server(url, key, rollout.timeout, rollout.requests, own) for url in urls]
    engine = ServedModel(servers, processor, end_tokens(_generation_settings(path), processor))
    engine.check(path)
    return engine


def _as_model_folder(config: Config, folder: Path, dtype: torch.dtype) -> str:
    """A model that vLLM reads: a checkpoint or an adapter is merged into its model, in a folder for it."""
    path = config.model.path
    *above, base = layers_of(path)
    if not above:
        return path
    folder.mkdir()
    policy = load_policy(path, replace(config.model, lora_rank=0), torch.device("cpu"))
    policy.save_pretrained(folder, dtype)
    load_processor(path, config.model).save(folder)
    copy_companions(base, folder)
    return str(folder)


def _generation_settings(path: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # A model may have none.
        return None


def check_sampling(config: Config) -> None:
    """Raise UserError for settings of a stage's sampling that do not go together."""
    rollout = config.rollout
    asked = {"ahead": rollout.ahead, "surplus": rollout.surplus}
    key = next((key for key, value in asked.items() if value), None)
    if key and rollout.engine == "inprocess":
        raise UserError(
            f"rollout.{key} needs servers that sample while this process does something else; set rollout.engine = vllm, or "
            "leave it out"
        )
    if rollout.ahead and rollout.placement == "colocated":
        raise UserError(
            "rollout.ahead = 1 has servers sample while the trainer works, and rollout.placement = colocated has them sleep "
            "then; give them GPUs of their own, or leave rollout.ahead out"
        )
    if rollout.ahead and config.filter.reuse_overflow:
        raise UserError(
            "rollout.ahead = 1 and filter.reuse_overflow would train on rollouts that are two steps old; leave one out"
        )
    if rollout.surplus and config.advantage.scale == "batch":
        raise UserError(
            "rollout.surplus takes groups as they end, so that no batch is there for advantage.scale = batch; leave one out"
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
