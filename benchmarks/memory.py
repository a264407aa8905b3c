"""What a training step keeps in memory, counted, beside what `perl-rl plan` computes.

    python -m benchmarks.memory [--only WORDS] [--json FILE]

Each step is a real one, on random weights: a rollout, log-probs and an update of a policy, on this machine's CPU. Counted are
the bytes that PyTorch's allocator has given out, at most, in each of them; what the process has besides is in neither figure.
Sharded steps run in two processes that talk by gloo, of which the first is counted. Models of true size are on the meta
device: of their update, on rows of the recipe's length, the storages that live are counted, in flash attention's form; blocks of
logits, which the head's kernel makes inside, are in neither figure, and AdamW's step is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.harness.models import shape as shape_of
from benchmarks.sharding import ALONE, spawn, spread_over
from perl.config import Config, LossConfig, ModelConfig, RolloutConfig, TrainConfig
from perl.distributed import all_processes, shutdown
from perl.files import write_json
from perl.model.families import ImageFeatures
from perl.model.families.qwen import QwenVL
from perl.model.head import HeadLoss, make_policy_loss
from perl.model.packed.attention import use_packed_attention
from perl.model.policy import Policy
from perl.model.sharding import gathered, shard
from perl.model.weights import prepared
from perl.rollout.decoding.sampling import SamplingParams
from perl.rollout.engine import InProcessEngine
from perl.training.optimizer import Optimizer, Schedule
from perl.training.roofline.memory import memory
from perl.training.roofline.model import facts_of
from perl.training.roofline.step import Shape, StepWork
from perl.types import EncodedImage, EncodedPrompt, Segment

SHAPE = Shape(2, 64, 60, 40)


@dataclass(frozen=True)
class Case:
    """A step: of which sizes, on what, how trained."""

    name: str
    size: str = "tiny"
    text: dict[str, Any] = field(default_factory=dict)
    """Of the language model, what is unlike the size's."""
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    budget: int = 4096
    shape: Shape = SHAPE
    questions: int = 4
    rollouts: int = 4


_MIDDLE = {"num_hidden_layers": 4, "vocab_size": 20000}
_CHECKPOINTED = {"gradient_checkpointing": 1.0, "freeze_vision": True}
_LORA = {"lora_rank": 8, "freeze_vision": True}
# A shape that no formula was fitted to: shares of heads, MLP, vocabulary, layers computed again, and lengths.
_OTHER = {
    "hidden_size": 320,
    "intermediate_size": 480,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 2500,
}
_OTHER_SHAPE = Shape(3, 36, 95, 75)
CASES = (
    Case("tiny, all weights"),
    Case("tiny, checkpointed, frozen tower", model=_CHECKPOINTED),
    Case("tiny, LoRA", model=_LORA),
    Case("tiny, bfloat16", dtype=torch.bfloat16),
    Case("small, all weights", "small"),
    Case("small, checkpointed, frozen tower", "small", model=_CHECKPOINTED),
    Case("small, LoRA", "small", model=_LORA),
    Case("small, LoRA, checkpointed", "small", model={**_LORA, **_CHECKPOINTED}),
    Case("middle, all weights", "0.6b", _MIDDLE, questions=2),
    Case("middle, checkpointed, frozen tower", "0.6b", _MIDDLE, model=_CHECKPOINTED, questions=2),
    Case("middle, LoRA", "0.6b", _MIDDLE, model=_LORA, questions=2),
)
OTHER = tuple(
    Case(f"other shape, {name}", "small", _OTHER, dtype, model, {}, 3000, _OTHER_SHAPE, 2, 3)
    for name, dtype, model in (
        ("all weights, 2 of 5 layers again", torch.float32, {"gradient_checkpointing": 0.4}),
        ("frozen tower, bfloat16", torch.bfloat16, {"freeze_vision": True}),
        (
            "LoRA 4, 3 of 5 layers again",
            torch.float32,
            {"lora_rank": 4, "gradient_checkpointing": 0.6, "freeze_vision": True},
        ),
    )
)
_FSDP = {"sharding": "fsdp"}
SHARDED = (
    Case("2 processes, tiny, all weights", train=_FSDP),
    Case("2 processes, tiny, LoRA", model=_LORA, train=_FSDP),
    Case("2 processes, small, all weights", "small", train=_FSDP),
    Case(
        "2 processes, small, checkpointed, frozen tower", "small", model=_CHECKPOINTED, train=_FSDP
    ),
    Case("2 processes, small, LoRA", "small", model=_LORA, train=_FSDP),
    Case(
        "2 processes, small, bfloat16, checkpointed",
        "small",
        dtype=torch.bfloat16,
        model={"gradient_checkpointing": 1.0},
        train=_FSDP,
    ),
)
# Of the recipes: 6 images of 504 pixels a side, answers of half the most tokens.
_TRUE = {"dtype": torch.bfloat16, "budget": 32768, "shape": Shape(6, 324, 150, 1024)}
_TRUE |= {"questions": 3, "rollouts": 6}
_LORA_TRUE = {"lora_rank": 64, "lora_alpha": 64.0, "freeze_vision": True}
TRUE = tuple(
    Case(f"Qwen2.5-VL-{size.upper()}, {name}", size, model=model, **_TRUE)
    for size in ("3b", "7b")
    for name, model in (
        ("all weights, checkpointed", {"gradient_checkpointing": 1.0}),
        ("LoRA, checkpointed", {**_LORA_TRUE, "gradient_checkpointing": 1.0}),
        ("LoRA", _LORA_TRUE),
    )
)


_SIZES = {
    # Heads, layers and shares of MLP and vocabulary more like a large one's.
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "vocab_size": 4000,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


class QwenOnMeta(QwenVL):
    """Qwen2.5-VL on the meta device, where the images' grid has no values that places could be read off."""

    def encode(self, core: Any, images: Sequence[EncodedImage]) -> ImageFeatures:
        from transformers import vision_utils

        visual = core.visual
        pixels = torch.cat([image.pixel_values for image in images])
        grid = torch.tensor([image.grid for image in images])
        merge = visual.spatial_merge_size
        index, windows = vision_utils.get_vision_window_index(
            grid, merge, visual.window_size, visual.patch_size
        )
        output = visual(
            pixels,
            grid_thw=grid,
            position_ids=vision_utils.get_vision_position_ids(grid, merge).to(pixels.device),
            window_index=index.to(pixels.device),
            cu_window_seqlens=windows,
        )
        return ImageFeatures(output.pooler_output)


class OneStep:
    """A policy with random weights, and what a step of a case shows it: questions of two orders, all alike."""

    def __init__(self, case: Case, device: str = "cpu", processes: int = 1) -> None:
        from transformers import AutoModelForImageTextToText

        settings = shape_of("tiny" if case.size in _SIZES else case.size)
        text = settings.text_config
        for name, value in {**_SIZES.get(case.size, {}), **case.text}.items():
            setattr(text, name, value)
        if case.size in _SIZES:
            eighth = text.hidden_size // text.num_attention_heads // 8
            text.rope_parameters["mrope_section"] = [eighth, 3 * eighth // 2, 3 * eighth // 2]
            settings.vision_config.out_hidden_size = text.hidden_size
            settings.vision_config.hidden_size = text.hidden_size // 2
            settings.vision_config.intermediate_size = text.hidden_size
        text.layer_types = text.layer_types[:1] * text.num_hidden_layers
        names = ("vision_start", "vision_end", "image", "video")
        for place, name in enumerate(names, 1):
            setattr(settings, f"{name}_token_id", text.vocab_size - place)
        self.case = case
        self.config = Config(
            model=ModelConfig(compile=False, liger=False, **case.model),
            rollout=RolloutConfig(
                per_order=case.rollouts, max_new_tokens=case.shape.completion_tokens
            ),
            # Two updates, so that old log-probs are computed.
            train=TrainConfig(
                examples_per_step=case.questions * processes,
                tokens_per_micro_batch=case.budget,
                updates_per_batch=2,
                **case.train,
            ),
            loss=LossConfig(kl_coef=0.0, kl="none"),
        )
        family = QwenVL() if device == "cpu" else QwenOnMeta()
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(settings, dtype=case.dtype)
        attention = "sdpa" if device == "cpu" else "varlen"
        use_packed_attention(model.model.language_model, family.tower(model.model), attention)
        self.policy = Policy(prepared(model, self.config.model, family, ""), family)
        self.accelerator = SimpleNamespace(**vars(ALONE) | {"device": torch.device(device)})
        # What one process holds, before it is spread.
        facts = facts_of(self.policy, True)
        self.work = StepWork(self.config, facts, case.shape, processes, cpu=device == "cpu")
        if processes > 1:
            self.accelerator = all_processes().accelerator
            shard(self.policy, spread_over(processes, dtype=case.dtype))
        self.segments = self._segments(settings)
        self.head = HeadLoss(self.policy, torch.tensor([0]), 1.0)
        self.loss = make_policy_loss(self.config.loss, 1)

    def _segments(self, settings: Any) -> list[Segment]:
        rng, own = np.random.default_rng(0), self.case.shape
        out = []
        for group in range(self.case.questions):
            images = [
                self._image(f"{group}-{k}", settings.vision_config) for k in range(own.images)
            ]
            for shown in (images, images[::-1]):
                ids = rng.integers(1, settings.text_config.vocab_size - 5, own.prompt)
                at = own.text_tokens // 2
                ids[at : at + own.images * own.tokens_per_image] = settings.image_token_id
                axes, following = self.policy.family.positions(ids, shown, settings.image_token_id)
                prompt = EncodedPrompt(ids, axes, following, tuple(shown), settings.image_token_id)
                made = (
                    rng.integers(1, settings.text_config.vocab_size - 5, own.completion_tokens)
                    for _ in range(self.case.rollouts)
                )
                weights = tuple(rng.normal(size=self.case.rollouts).tolist())
                out.append(Segment(prompt, tuple(made), weights, group))
        return out

    def _image(self, key: str, vision: Any) -> EncodedImage:
        """A square one."""
        tokens, merge = self.case.shape.tokens_per_image, vision.spatial_merge_size
        side = merge * round(tokens**0.5)
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(side**2, channels, dtype=self.case.dtype, device=self.policy.device)
        return EncodedImage(key, pixels, (1, side, side), tokens, merge)

    def rollout(self) -> None:
        budget = self.config.rollout.kv_cache_tokens
        known = SimpleNamespace(
            pad_token_id=0, eos_token_id=0, unsampled_token_ids=lambda: torch.tensor([0])
        )
        engine = InProcessEngine(self.policy, known, budget)  # pyright: ignore[reportArgumentType]
        params = SamplingParams(self.case.rollouts, 1.0, self.case.shape.completion_tokens)
        self.policy.vision._drop()  # Every image is new.
        with gathered(self.policy):
            engine.generate([s.prompt for s in self.segments], params, 0)

    def logprobs(self) -> None:
        with gathered(self.policy):
            for batch in self._batches():
                self.head.logprobs(batch)

    def update(self) -> None:
        """The second of two, for which the optimizer's state is there."""
        self.optimizer.step(1, self._batches(), self.loss)

    def _batches(self) -> list[Any]:
        return self.policy.pack(self.segments, self.case.budget, True)

    def ready(self) -> None:
        """Make what a step finds: the optimizer's state."""
        rate = Schedule(1e-6, "constant", 0, 1)
        self.optimizer = Optimizer(self.accelerator, self.head, rate, self.config.train)
        if self.policy.device.type != "meta":
            self.optimizer.step(0, self._batches()[:1], self.loss)
        self.policy.vision.clear_cache()

    def resting(self) -> int:
        """Bytes that lie there between steps."""
        return sum(s.nbytes() for s in self.storages()) + self.policy.vision._bytes

    def storages(self) -> list[torch.UntypedStorage]:
        """Of weights, buffers, masters and moments, those of this process."""
        kept: list[Any] = [*self.policy.parameters(), *self.policy.buffers()]
        kept += self.optimizer.masters.values()
        kept += [x for s in self.optimizer.adamw.state.values() for x in s.values()]
        mine = (x.to_local() if hasattr(x, "to_local") else x for x in kept)
        return list({s._cdata: s for s in (x.untyped_storage() for x in mine)}.values())


def most(call: Callable[[], None], times: int = 1) -> int:
    """Most bytes that PyTorch's allocator has given out in a call beyond those at its start.

    Args:
        times: how often it is counted. What gloo's threads let go of is not seen, so that a count is then too high, and of
            several that one is taken at whose end the least is left.
    """
    from torch.autograd.profiler import profile

    counts = []
    for _ in range(times):
        with profile(profile_memory=True, use_kineto=True) as profiler:
            call()
        result = cast(Any, profiler).kineto_results
        events = [e for e in result.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        counts.append((now, peak))
    return min(counts)[1]


class Living(TorchDispatchMode):
    """Counts the bytes of storages on the meta device that are made in its context and live, at most.

    Args:
        known: those that are not counted.
    """

    def __init__(self, known: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {storage._cdata for storage in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._take, out)
        return out

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" or storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.now -= size


def true_update(case: Case) -> dict[str, tuple[float, float]]:
    """Of an update on the meta device: most bytes counted, and computed; also without weights, masters and moments."""
    step = OneStep(case, "meta")
    computed = memory(step.work, 0.0)["update"]
    step.ready()
    if not step.policy.vision.trained:  # The rollout has made them.
        for batch in step._batches():
            step.policy.vision.features(batch.images)
    known = step.storages()
    with Living(known) as living:
        try:
            step.update()
        except (
            RuntimeError
        ) as error:  # The gradient's norm has no value there: AdamW's step is left out.
            if "item" not in str(error):
                raise
    resting, whole = step.resting(), sum(computed.values()) - computed["reserve"]
    return {
        "update": (resting + living.most, whole),
        "  but what rests": (living.most, whole - resting),
    }


def peaks(case: Case, processes: int = 1) -> dict[str, tuple[float, float]]:
    """Of each stage of a step: most bytes counted, and computed."""
    step = OneStep(case, processes=processes)
    computed = {stage: sum(parts.values()) for stage, parts in memory(step.work, 0.0).items()}
    step.ready()
    found = {}
    for stage in ("rollout", "logprobs", "update"):
        resting = step.resting()
        found[stage] = (
            resting + most(getattr(step, stage), 1 if processes == 1 else 4),
            computed[stage],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    if args.worker:
        processes = all_processes()
        for case in (case for case in SHARDED if args.only in case.name):
            found[case.name] = peaks(case, processes.count)
        if processes.index == 0:
            write_json(args.json, found)
        shutdown()
        # Interpreters that have profiled beside gloo's threads may not end by themselves.
        os._exit(0)

    def add(name: str, stages: dict[str, tuple[float, float]]) -> None:
        found[name] = stages
        for stage, (counted, computed) in stages.items():
            off = f"{computed / counted - 1:+7.1%}"
            print(
                f"{name:50}{stage:18}{counted / 1e6:10.1f}{computed / 1e6:10.1f} MB {off}",
                flush=True,
            )

    for case in (case for case in (*CASES, *OTHER) if args.only in case.name):
        add(case.name, peaks(case))
    if any(args.only in case.name for case in SHARDED):
        for name, stages in sharded(args.only).items():
            add(name, stages)
    for case in (case for case in TRUE if args.only in case.name):
        add(case.name, true_update(case))
    if args.json:
        write_json(args.json, found)


def sharded(only: str = "") -> dict[str, dict[str, tuple[float, float]]]:
    """`peaks` of the first of two processes, by case."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        spawn(2, "benchmarks.memory", "--worker", "--only", only, "--json", file)
        return json.loads(file.read_text())


if __name__ == "__main__":
    main()
