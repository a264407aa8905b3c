"""Everything a run works with, built once from its config."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from perl.config import EVAL_SEED, Config, DataConfig
from perl.data.check import acceptance
from perl.data.dataset import BUNDLED, Dataset, load_examples
from perl.data.readahead import ReadAhead, warm_up
from perl.data.streamed import StreamedExamples
from perl.data.streams import ExampleStream, MixedStream, Stream, training_sources
from perl.data.tasks import vocabulary
from perl.distributed import Processes, on_main_process, process_state
from perl.files import RunFolder, replacing
from perl.model.head import HeadLoss
from perl.model.loading import compute_dtype, load_policy, load_processor
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import TINY_MODELS, make_tiny_model
from perl.recipe import Stage, plan, source_key
from perl.report.trackers import usable_trackers
from perl.rewards.scorer import Scorer
from perl.rollout.collect import Collector
from perl.rollout.engine import Engine
from perl.rollout.engines import in_process, on_servers, own_server
from perl.rollout.instruction import Instruction
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.rollout.vllm.engine import VLLMEngine
from perl.timing import Stopwatch
from perl.training.parallel.mesh import check_shared, make_sharding
from perl.training.roofline.check import check_memory
from perl.types import UserError

logger = logging.getLogger(__name__)

WORKERS = 4
"""`data.workers` on a GPU: a question of eight images of 512 x 512 pixels takes a core 0.17 seconds."""


@dataclass
class Components:
    """What a stage of a run works with; `for_stage` gives those of another one with the same model."""

    stage: Stage
    folder: RunFolder
    accelerator: Any
    policy: Policy
    processor: Processor
    watch: Stopwatch
    model_path: str
    filtered: Mapping[str, Path] = field(default_factory=dict)
    """What filter stages have left of data sources, by `source_key`."""
    servers: VLLMEngine | None = None
    """What samples, if it is not this process; one for the whole run."""

    def for_stage(self, stage: Stage, filtered: Mapping[str, Path] | None = None) -> Components:
        return replace(self, stage=stage, filtered=filtered or {})

    @property
    def config(self) -> Config:
        return self.stage.config

    @cached_property
    def encoder(self) -> PromptEncoder:
        limit, data = PromptLimit.to_train(self.config), self.config.data
        asked = Instruction.of(self.config)
        return PromptEncoder(self.processor, limit, data.overlong, asked, data.control_tokens)

    @cached_property
    def engine(self) -> Engine:
        tokens = self.config.rollout.kv_cache_tokens
        return self.servers or in_process(self.policy, self.processor, tokens)

    @cached_property
    def collector(self) -> Collector:
        reward = self.config.reward
        scorer = Scorer(reward.functions, reward.weights, reward.timeout)
        return Collector(self.stage, self.engine, self.encoder, scorer, self.watch)

    @cached_property
    def head(self) -> HeadLoss:
        banned = self.processor.unsampled_token_ids()
        return HeadLoss(self.policy, banned, self.config.rollout.temperature)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def stream(self) -> Stream:
        """The stage's training examples, in an order of its own."""
        sources = training_sources(self.config.data)
        # Different stages see different questions; primes keep the seeds of stages and sources apart.
        seed = self.config.run.seed * 2 + (self.stage.kind == "rl") + 1_000_003 * self.stage.number
        config = self.config
        rewards = [config.reward.functions] if self.stage.kind == "rl" else []
        accept = acceptance(config.data, config.permutation.text, self.processor, rewards)
        streams = []
        for number, (source, _) in enumerate(sources):
            own = seed + 7919 * number  # Two bundled sources give different questions.
            found, data = self.source(source)
            if data.streaming and found == source and not source.startswith(BUNDLED):
                streams.append(StreamedExamples(source, data, own, accept))
                continue
            dataset = load_examples(found, data, "train", own)
            streams.append(ExampleStream(dataset, own, accept))
        if len(streams) == 1:
            return streams[0]
        return MixedStream(streams, [weight for _, weight in sources], seed)

    def read_ahead(self) -> ReadAhead | None:
        """What reads the pictures of a stream's next examples; None where `data.workers` are none."""
        device = self.accelerator.device
        workers = _workers(self.config, device)
        return ReadAhead(workers, self.processor.encoder, device) if workers else None

    def source(self, source: str) -> tuple[str, DataConfig]:
        """Where a training source is read from and how: what a filter stage has left of it, if one has."""
        data = self.config.data
        left = self.filtered.get(source_key(source))
        if left is None:
            return source, data
        if source.startswith(BUNDLED):  # They are written with our names.
            data = replace(data, columns="auto", map=())
        # Nothing that is held out is left in it.
        return str(left), replace(data, image_root="", eval="")

    def held_out(self) -> Dataset:
        """The examples that are measured on."""
        config = self.config
        return load_examples(config.data.eval, config.data, "test", EVAL_SEED, config.eval.examples)


def build(config: Config, stage: Stage, folder: RunFolder) -> Components:
    """Load or make the model and put the components of a stage together.

    Args:
        config: the run's, which knows all stages. A stage's own has that stage's values in place: other stages
            planned from it would take them over.

    Raises:
        UserError: for whatever in the config, the model or the rewards cannot be used.
    """
    accelerator = make_accelerator(config, folder)
    path = model_folder(config, stage, folder, accelerator)
    dtype = compute_dtype(config.model.dtype, accelerator.device)
    processor = load_processor(path, config.model, dtype)
    if any(_workers(each.config, accelerator.device) for each in plan(config)):
        warm_up(processor.encoder)
    sharding = make_sharding(config, accelerator.device, accelerator.num_processes)
    check_memory(config, path, plan(config), accelerator.device, accelerator.num_processes)
    torch.manual_seed(config.run.seed)
    own = None
    if accelerator.is_main_process:  # It starts while the weights are read here.
        cuda = accelerator.device.type == "cuda"
        own = own_server(config, path, dtype, cuda, folder.root / "vllm.log")
    policy = load_policy(path, config.model, accelerator.device, sharding)
    servers = on_servers(config.rollout, policy, processor, Processes(accelerator), own)
    return Components(
        stage, folder, accelerator, policy, processor, Stopwatch(), path, servers=servers
    )


def _workers(config: Config, device: torch.device) -> int:
    """What `data.workers` means on this device."""
    if config.data.workers == "auto":
        return WORKERS if device.type == "cuda" else 0
    return config.data.workers


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let PyTorch take deterministic algorithms, or raise where it has none.

    Flash attention, PyTorch's and flash-attn's, follows the switch (see `perl.model.packed.flash`). cuBLAS reads how its
    workspace is to be laid out when it is first used.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def make_accelerator(config: Config, folder: RunFolder) -> Any:
    """accelerate's view of devices, processes and trackers.

    Raises:
        UserError: a tracker that is not installed, or a step's examples that cannot be shared out.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    usable = usable_trackers(config)
    process_state()
    # Of accelerate launch --use_fsdp: else its own plugin would stand beside train.sharding.
    if (
        os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true"
        and config.train.sharding == "none"
    ):
        logger.warning(
            "accelerate's settings of FSDP are not used: every process holds all weights; set train.sharding = fsdp"
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # The weights have the dtype that is computed in.
        log_with=usable or None,
        project_config=ProjectConfiguration(logging_dir=str(folder.root / "tensorboard")),
    )
    on_main_process(partial(check_shared, config, accelerator.num_processes))
    return accelerator


def check_bundled(config: Config) -> None:
    """Raise UserError if some stage has questions other than those that a tiny model knows the words of."""
    used = [source for stage in plan(config) for source, _ in training_sources(stage.config.data)]
    for source in (config.data.train, *used):
        if not source.startswith(BUNDLED):
            raise UserError(
                f"model.path = {config.model.path} knows only the words of the bundled tasks; "
                f"with data.train = {source}, give a model folder or hub name"
            )


def model_folder(config: Config, stage: Stage, folder: RunFolder, accelerator: Any) -> str:
    """Where the model starts from; a tiny one is made in the run folder first."""
    if config.model.path not in TINY_MODELS:
        return config.model.path
    target = folder.models / "initial"
    if not (target / "config.json").exists() and accelerator.is_main_process:
        check_bundled(config)
        words = vocabulary(stage.config.data.train.removeprefix(BUNDLED))
        with replacing(target, folder=True) as temporary:
            make_tiny_model(config.model.path, words, temporary, config.run.seed)
    accelerator.wait_for_everyone()
    return str(target)
