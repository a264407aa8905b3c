"""A benchmark of training steps from setting to report: nothing is timed that is not proven."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness.device import peak_memory, software, synchronize
from benchmarks.harness.models import SHAPES, given_model, shape
from benchmarks.harness.proof import GradientProof, copied_gradients, gradients
from benchmarks.train_step.flops import flops
from benchmarks.train_step.variants import VARIANTS, Step, Trainee
from benchmarks.train_step.workload import Workload
from perl.model.families import family_of
from perl.model.packed.attention import choose
from perl.types import UserError

TIMING_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 12.0, 3, 20

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run, and where; see the options of `bench_train_step.py`."""

    workload: Workload
    device: str
    model: str
    dtype: str
    budget: int
    checkpointing: bool = False
    freeze_vision: bool = False
    padded_tower: str = "stock"
    repeats: int = 0


def measure(setting: Setting) -> Report:
    """Prove, count and time all variants.

    Returns:
        `variants` and `setting`.

    Raises:
        AssertionError: a variant's log-probs or gradients are not those of padded.
        UserError: the model cannot be used.
    """
    trainee = make_trainee(setting)
    longest = max(len(s.prompt.input_ids) + max(map(len, s.completions)) for s in trainee.segments)
    if longest > setting.budget:
        raise UserError(f"--budget {setting.budget}: a sequence has {longest} tokens; raise it")
    reference, variants = None, {}
    for name in VARIANTS:
        print(f"{name}: proving and counting", file=sys.stderr)
        counted = partial(flops, fresh(trainee, name), trainee.model.model)
        (step, operations), peak = peak_memory(counted, trainee.device)
        reference = reference or Reference(trainee, step)
        variants[name] = {
            "lm_tokens": sum(step.counts.lm_tokens.values()),
            "images_encoded": sum(step.counts.images.values()),
            "flops": sum(operations.values()),
            "flops_by_part": operations,
            "peak_bytes": peak,
            "max_rel_grad_diff": reference.check(name, step, trainee),
        }
    del reference
    print("timing", file=sys.stderr)
    for name, seconds in time_rounds(trainee, setting.repeats).items():
        variants[name] |= {"seconds": statistics.median(seconds), "seconds_by_round": seconds}
    return {"variants": variants, "setting": described(setting, trainee)}


def make_trainee(setting: Setting) -> Trainee:
    """The model on its device, and the step's completions."""
    device = torch.device(setting.device)
    torch.manual_seed(setting.workload.seed)
    model = make_model(setting.model, device, getattr(torch, setting.dtype))
    family = family_of(model.config.model_type)
    assert family is not None
    if setting.freeze_vision:
        for module in family.tower(model.model):
            module.requires_grad_(False)
    if setting.checkpointing:
        # transformers 5.23 renamed it.
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    half = setting.dtype == "bfloat16"
    # Of the implementations those whose operations can be counted.
    attention, _ = choose("varlen" if half and device.type == "cuda" else "sdpa", device, half)
    return Trainee(
        model.train(),
        family,
        setting.workload.segments(model.config, family),
        attention=attention,
        budget=setting.budget,
        stock_tower=setting.padded_tower == "stock",
    )


def make_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A shape with random weights, or a checkpoint's.

    Raises:
        UserError: no model of the Qwen-VL family can be read there.
    """
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    if name in SHAPES:
        with device:
            return auto.from_config(shape(name), dtype=dtype)
    folder = given_model(name, SHAPES)
    try:
        return auto.from_pretrained(folder, dtype=dtype).to(device)
    except Exception as error:  # transformers raises many types for broken files.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--model {name}: no model can be read there ({reason})") from error


def fresh(trainee: Trainee, name: str) -> Callable[[], Step]:
    """A step of a variant from no gradients, as it is proven, counted and timed."""
    trainee.model.zero_grad(set_to_none=True)
    return lambda: trainee.step(name)


class Reference:
    """What `padded` gave, and how far from it a variant may be: see `GradientProof`; log-probs by 1e-3 in float32, by
    three times what bfloat16 costs padded and 16 eps in bfloat16.

    Args:
        step: of padded, whose gradients are in the parameters.
    """

    def __init__(self, trainee: Trainee, step: Step) -> None:
        self.logprobs, self.allowed_logprobs = step.logprobs, 1e-3
        padded = copied_gradients(trainee.model)
        if trainee.model.dtype == torch.float32:
            self.gradients = GradientProof(padded)
            return
        exact = trainee.exact()
        lost = logprob_difference(self.logprobs, fresh(exact, "padded")().logprobs)
        self.allowed_logprobs = 3 * lost + 16 * torch.finfo(torch.bfloat16).eps
        self.gradients = GradientProof(padded, copied_gradients(exact.model))

    def check(self, name: str, step: Step, trainee: Trainee) -> float:
        """The largest relative difference of a gradient's element.

        Raises:
            AssertionError: log-probs or gradients are too far off; the message says which.
        """
        off = logprob_difference(step.logprobs, self.logprobs)
        assert off <= self.allowed_logprobs, (
            f"{name}: log-probs differ from padded's by {off:.2e}, {self.allowed_logprobs:.2e} allowed"
        )
        found = self.gradients.check(gradients(trainee.model), f"{name}: the", "padded's")
        return max(difference.most for difference in found.values())


def logprob_difference(got: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Largest |difference| of log-probs; completions have to be as many and as long."""
    if list(map(len, got)) != list(map(len, reference)):
        raise AssertionError("log-probs of other completions")
    return max(float((a - b).abs().max()) for a, b in zip(got, reference, strict=True))


def time_rounds(trainee: Trainee, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant by round; a round has all variants, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    start = time.perf_counter()
    for number in range(repeats or MOST_ROUNDS):
        spent = time.perf_counter() - start
        enough = number >= FEWEST_ROUNDS and spent * (number + 1) / number > TIMING_SECONDS
        if enough and not repeats:
            break
        for name, times in seconds.items():
            step = fresh(trainee, name)
            synchronize(trainee.device)
            before = time.perf_counter()
            step()
            synchronize(trainee.device)
            times.append(time.perf_counter() - before)
    return seconds


def described(setting: Setting, trainee: Trainee) -> dict[str, Any]:
    """The setting, and what it came to on this machine."""
    images = [image.tokens for s in trainee.segments for image in s.prompt.images]
    device = trainee.device
    return {
        **asdict(setting.workload),
        **{k: v for k, v in asdict(setting).items() if k not in ("workload", "repeats")},
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "attention": trainee.attention,
        "sequences": len(trainee.lengths),
        "prompt_tokens": [len(s.prompt.input_ids) for s in trainee.segments],
        "mean_completion": statistics.mean(trainee.lengths),
        "mean_tokens_per_image": statistics.mean(images),
        "padded_micro_batch": trainee.padded_size,
        **software(device),
    }
