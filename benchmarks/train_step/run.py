"""A benchmark of training steps from setting to report: nothing is timed that is not proven."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.shapes import SHAPES, shape
from benchmarks.train_step import measure
from benchmarks.train_step.variants import VARIANTS, Step, Trainee
from benchmarks.train_step.workload import Workload
from perl.model.families import family_of
from perl.model.families.qwen import QwenVL
from perl.model.packed.attention import choose
from perl.types import UserError

TIMING_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 12.0, 3, 20
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

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


def run(setting: Setting) -> Report:
    """Prove, measure and time all variants.

    Returns:
        `variants`, `ratios` (what padded takes over what a variant takes), and `setting`.

    Raises:
        AssertionError: a variant's log-probs or gradients are not those of padded.
        UserError: the model cannot be used.
    """
    trainee = make_trainee(setting)
    longest = max(len(s.prompt.input_ids) + max(map(len, s.completions)) for s in trainee.segments)
    if longest > setting.budget:
        raise UserError(f"--budget {setting.budget}: a sequence has {longest} tokens; raise it")
    reference, steps, flops, peaks, differences = None, {}, {}, {}, {}
    for name in VARIANTS:
        print(f"{name}: proving and counting", file=sys.stderr)
        counted = partial(measure.flops, fresh(trainee, name), trainee.model.model)
        (steps[name], flops[name]), peaks[name] = memory.peak(counted, trainee.device)
        reference = reference or Reference(trainee, steps[name])
        differences[name] = reference.check(name, steps[name], trainee)
    del reference
    print("timing", file=sys.stderr)
    rounds = time_rounds(trainee, setting.repeats)
    variants = {
        name: {
            "lm_tokens": steps[name].counts.lm_tokens,
            "images_encoded": steps[name].counts.images,
            "flops": sum(flops[name].values()),
            "flops_by_part": flops[name],
            "seconds": statistics.median(rounds[name]),
            "seconds_by_round": rounds[name],
            "peak_bytes": peaks[name],
            "max_rel_grad_diff": differences[name],
        }
        for name in VARIANTS
    }
    ratios = {
        name: {
            key: variants["padded"][key] / max(1e-9, found[key])
            for key in ("lm_tokens", "images_encoded", "flops", "seconds", "peak_bytes")
        }
        for name, found in variants.items()
    }
    return {"variants": variants, "ratios": ratios, "setting": described(setting, trainee)}


def make_trainee(setting: Setting) -> Trainee:
    """The model on its device, with weights in float32, and the step's completions."""
    device = torch.device(setting.device)
    torch.manual_seed(setting.workload.seed)
    model = make_model(setting.model, device)
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
    try:
        attention, _ = choose("varlen" if half and device.type == "cuda" else "sdpa", device, half)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Trainee(
        model.train(),
        family,
        setting.workload.segments(model.config, family),
        attention=attention,
        budget=setting.budget,
        autocast=partial(torch.autocast, device.type, torch.bfloat16) if half else nullcontext,
        stock_tower=setting.padded_tower == "stock",
    )


def make_model(name: str, device: torch.device) -> Any:
    """A shape with random weights, or a checkpoint's.

    Raises:
        UserError: no model of the Qwen-VL family can be read there.
    """
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    if name in SHAPES:
        with device:
            return auto.from_config(shape(name), dtype=torch.float32)
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: choose {', '.join(SHAPES)} or a model folder")
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        # The workload makes pixels itself, in the patches that these take.
        if kind in QwenVL.model_types:
            return auto.from_pretrained(name, dtype=torch.float32).to(device)
    except Exception as error:  # transformers raises many types for broken files.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--model {name}: no model can be read there ({reason})") from error
    raise UserError(f"--model {name}: {kind} is not one of {', '.join(QwenVL.model_types)}")


def fresh(trainee: Trainee, name: str) -> Callable[[], Step]:
    """A step of a variant from no gradients, as it is proven, counted and timed."""
    trainee.model.zero_grad(set_to_none=True)
    return lambda: trainee.step(name)


class Reference:
    """What `padded` gave, and how far from it a variant may be.

    In float32: 1e-3, relative for gradients. In bfloat16, where exact arithmetic in another order gives other
    roundings, the yardstick is what bfloat16 costs padded itself, against the same step in float32: three times that,
    and 16 eps for log-probs; for gradients see `measure.allowances`.

    Args:
        step: of padded, whose gradients are in the parameters.
    """

    def __init__(self, trainee: Trainee, step: Step) -> None:
        self.logprobs = step.logprobs
        self.gradients = measure.gradients(trainee.model, CPU)
        self.eps = torch.finfo(torch.float32).eps
        self.allowed = dict.fromkeys(self.gradients, measure.Difference(1e-3, 1e-3, 1e-3))
        self.allowed_logprobs = 1e-3
        if trainee.autocast is nullcontext:
            return
        self.eps = torch.finfo(torch.bfloat16).eps
        exact = fresh(trainee.exact(), "padded")()
        truth = measure.gradients(trainee.model, CPU)
        lost = measure.relative_differences(self.gradients, truth, self.eps)
        self.allowed = measure.allowances(lost, truth, self.eps)
        lost_logprobs = measure.logprob_difference(self.logprobs, exact.logprobs)
        self.allowed_logprobs = 3 * lost_logprobs + 16 * self.eps
        # The caller still compares padded's gradients, which are exact's now.
        for name, p in trainee.model.named_parameters():
            if p.grad is not None:
                p.grad.copy_(self.gradients[name])

    def check(self, name: str, step: Step, trainee: Trainee) -> float:
        """The largest relative difference of a gradient's element.

        Raises:
            AssertionError: log-probs or gradients are too far off; the message says which.
        """
        off = measure.logprob_difference(step.logprobs, self.logprobs)
        assert off <= self.allowed_logprobs, (
            f"{name}: log-probs differ from padded's by {off:.2e}, {self.allowed_logprobs:.2e} allowed"
        )
        found = measure.relative_differences(
            measure.gradients(trainee.model), self.gradients, self.eps
        )
        for parameter, difference in found.items():
            excess = difference.excess(self.allowed[parameter])
            assert not excess, (
                f"{name}: the gradient of {parameter} differs from padded's by {excess}"
            )
        return max(difference.most for difference in found.values())


def time_rounds(trainee: Trainee, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant by round; a round has all variants, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    start = time.perf_counter()
    for number in range(repeats or MOST_ROUNDS):
        spent = time.perf_counter() - start
        if (
            not repeats
            and number >= FEWEST_ROUNDS
            and spent * (number + 1) / number > TIMING_SECONDS
        ):
            break
        for name, times in seconds.items():
            step = fresh(trainee, name)
            _wait(trainee.device)
            before = time.perf_counter()
            step()
            _wait(trainee.device)
            times.append(time.perf_counter() - before)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def described(setting: Setting, trainee: Trainee) -> dict[str, Any]:
    """The setting, and what it came to on this machine."""
    import transformers

    prompts = [len(s.prompt.input_ids) for s in trainee.segments]
    images = [image.tokens for s in trainee.segments for image in s.prompt.images]
    device = trainee.device
    return {
        **asdict(setting.workload),
        **{k: v for k, v in asdict(setting).items() if k not in ("workload", "repeats")},
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "attention": trainee.attention,
        "sequences": len(trainee.lengths),
        "prompt_tokens": prompts,
        "mean_completion": statistics.mean(trainee.lengths),
        "mean_tokens_per_image": statistics.mean(images),
        "padded_micro_batch": trainee.padded_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
