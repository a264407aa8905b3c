"""Whether a run's memory suffices, told before weights are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from perl.config import Config
from perl.model.loading import check_model, compute_dtype
from perl.model.sources import layers_of
from perl.recipe import Stage
from perl.training.roofline.advice import first_that_fits, peak_of, without_change
from perl.training.roofline.memory import certain, memory
from perl.training.roofline.model import model_facts
from perl.training.roofline.step import Shape, StepWork
from perl.types import UserError

logger = logging.getLogger(__name__)

_OF_A_FILE = 10
"""Most bytes that training keeps for one of a weight's as it is stored: of bfloat16 those of weight, master, moments,
gradient and reference, all in fp32."""
_IMAGES, _TEXT = 6, 150
"""Of a question, as `perl-rl plan` takes it."""


def check_memory(
    config: Config,
    path: str,
    stages: Sequence[Stage],
    device: torch.device,
    processes: int,
) -> None:
    """See that what the run keeps in any case fits the memory, and warn where an estimate of its peak does not.

    Args:
        path: where the weights are, `model.path` or what was made for it.
        device: of this process.
        processes: of the run.

    Raises:
        UserError: weights, masters, moments, gradients and reference alone take more than there is.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    capacity = _capacity(device, here)
    folder = Path(layers_of(path)[-1])
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not capacity or (0 < _OF_A_FILE * stored < capacity / 10) or check_model(path) is None:
        return
    trains = [s.config for s in stages if s.kind == "rl" and s.steps]
    if not trains:
        return
    own = replace(trains[0], model=replace(config.model, path=path))
    facts = model_facts(own, compute_dtype(config.model.dtype, device))
    rollout, most = own.rollout, own.data.max_prompt_tokens
    tokens = min(facts.tokens_of(own.model.max_pixels), max(1, most - _TEXT))
    shape = Shape(
        max(1, min(_IMAGES, (most - _TEXT) // tokens)),
        tokens,
        min(_TEXT, most - tokens),
        max(1, rollout.max_new_tokens // 2),
    )
    try:
        work = StepWork(own, facts, shape, processes, here, cpu=device.type == "cpu")
    except UserError:
        return  # Of sizes that the run itself looks at.
    kept, of = certain(work), f"{capacity / 1e9:.1f} GB"
    where = "of one GPU" if device.type == "cuda" else "that a process of this machine can have"
    if kept > capacity:
        raise UserError(
            f"model.path = {path}: its weights and what training keeps of them take {kept / 1e9:.1f} GB, of {of} {where}; "
            + _advice(work, capacity)
        )
    peak = peak_of(memory(work, capacity))
    if peak > capacity:
        logger.warning(
            "memory may not suffice: a step of %d images a question is estimated at %.1f GB, of %s %s; %s (perl-rl plan)",
            *(shape.images, peak / 1e9, of, where, _advice(work, capacity)),
        )


def _advice(work: Any, capacity: float) -> str:
    change = first_that_fits(work, capacity)
    if change is None:
        return without_change(work, capacity)
    keys = " and ".join(f"{key} = {value}" for key, value in change.keys.items())
    return f"with {keys} a step would take {change.peak / 1e9:.1f} GB, as {change.why}"


def _capacity(device: torch.device, here: int) -> float:
    """Bytes that a process can have: its GPU's, or its share of what the machine has left, swap included; 0: not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    found = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
    return (found.get("MemAvailable", 0) + found.get("SwapFree", 0)) / here
