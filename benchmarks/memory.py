"""What a training step keeps in memory, counted by PyTorch's allocator, beside what `perl-rl plan` computes.

    python -m benchmarks.memory [--json FILE]

Each step is a real one, on random weights: a rollout, log-probs and an update of a policy, on this machine's CPU. What is
counted are the bytes of tensors that live, at most, in each of them; what the process has besides is in neither figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.harness.models import shape as shape_of
from perl.config import Config, LossConfig, ModelConfig, RolloutConfig, TrainConfig
from perl.files import write_json
from perl.model.families.qwen import QwenVL
from perl.model.head import HeadLoss, make_policy_loss
from perl.model.packed.attention import use_packed_attention
from perl.model.policy import Policy
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
    layers: int = 0
    """0: as many as the size has."""
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32
    model: dict[str, Any] = field(default_factory=dict)
    budget: int = 4096
    shape: Shape = SHAPE
    questions: int = 4
    rollouts: int = 4


_CHECKPOINTED = {"gradient_checkpointing": 1.0, "freeze_vision": True}
_LORA = {"lora_rank": 8, "freeze_vision": True}
CASES = (
    Case("tiny, all weights"),
    Case("tiny, checkpointed, frozen tower", model=_CHECKPOINTED),
    Case("tiny, LoRA", model=_LORA),
    Case("tiny, bfloat16", dtype=torch.bfloat16),
    Case("small, all weights", "small"),
    Case("small, checkpointed, frozen tower", "small", model=_CHECKPOINTED),
    Case("small, LoRA", "small", model=_LORA),
    Case("small, LoRA, checkpointed", "small", model={**_LORA, **_CHECKPOINTED}),
    Case("middle, all weights", "0.6b", 4, 20000, questions=2),
    Case("middle, checkpointed, frozen tower", "0.6b", 4, 20000, model=_CHECKPOINTED, questions=2),
    Case("middle, LoRA", "0.6b", 4, 20000, model=_LORA, questions=2),
)


class OneStep:
    """A policy with random weights, and what a step of a case shows it: questions of two orders, all alike."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText

        settings = shape_of("tiny" if case.size == "small" else case.size)
        text = settings.text_config
        if (
            case.size == "small"
        ):  # Heads, layers and shares of MLP and vocabulary more like a large one's.
            text.hidden_size, text.intermediate_size, text.vocab_size = 256, 1024, 4000
            text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 4, 4, 2
            text.rope_parameters["mrope_section"] = [8, 12, 12]
            settings.vision_config.out_hidden_size = 256
            settings.vision_config.hidden_size, settings.vision_config.intermediate_size = 128, 256
        text.num_hidden_layers = case.layers or text.num_hidden_layers
        text.layer_types = text.layer_types[:1] * text.num_hidden_layers
        if case.vocabulary:
            text.vocab_size = case.vocabulary
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
                examples_per_step=case.questions,
                tokens_per_micro_batch=case.budget,
                updates_per_batch=2,
            ),
            loss=LossConfig(kl_coef=0.0, kl="none"),
        )
        family = QwenVL()
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(settings, dtype=case.dtype)
        use_packed_attention(model.model.language_model, family.tower(model.model), "sdpa")
        self.policy = Policy(prepared(model, self.config.model, family, ""), family)
        self.segments = self._segments(settings)
        self.head = HeadLoss(self.policy, torch.tensor([0]), 1.0)
        self.loss = make_policy_loss(self.config.loss, 1)
        self.work = StepWork(self.config, facts_of(self.policy, True), case.shape, gpus=1, cpu=True)

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
        return EncodedImage(
            key, torch.randn(side**2, channels).to(self.case.dtype), (1, side, side), tokens, merge
        )

    def rollout(self) -> None:
        budget = self.config.rollout.kv_cache_tokens
        known = SimpleNamespace(
            pad_token_id=0, eos_token_id=0, unsampled_token_ids=lambda: torch.tensor([0])
        )
        engine = InProcessEngine(self.policy, known, budget)  # pyright: ignore[reportArgumentType]
        params = SamplingParams(self.case.rollouts, 1.0, self.case.shape.completion_tokens)
        engine.generate([s.prompt for s in self.segments], params, 0)

    def logprobs(self) -> None:
        for batch in self._batches():
            self.head.logprobs(batch)

    def update(self) -> None:
        """The second of two, for which the optimizer's state is there."""
        self.optimizer.step(1, self._batches(), self.loss)

    def _batches(self) -> list[Any]:
        return self.policy.pack(self.segments, self.case.budget, True)

    def ready(self) -> None:
        """Make what a step finds: the optimizer's state."""
        alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
        rate = Schedule(1e-6, "constant", 0, 1)
        self.optimizer = Optimizer(alone, self.head, rate, self.config.train)
        self.optimizer.step(0, self._batches()[:1], self.loss)
        self.policy.vision.clear_cache()

    def resting(self) -> int:
        """Bytes that lie there between steps."""
        weights = [
            *self.policy.parameters(),
            *self.policy.buffers(),
            *self.optimizer.masters.values(),
        ]
        states = [x for s in self.optimizer.adamw.state.values() for x in s.values()]
        kept = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in (*weights, *states)
        }
        return sum(kept.values()) + self.policy.vision._bytes


def most(call: Callable[[], None]) -> int:
    """Most bytes that PyTorch's allocator has given out in a call beyond those at its start."""
    from torch.autograd.profiler import profile

    with profile(profile_memory=True, use_kineto=True) as profiler:
        call()
    result: Any = profiler.kineto_results
    events = [e for e in result.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peaks(case: Case) -> dict[str, tuple[float, float]]:
    """Of each stage of a step: most bytes counted, and computed."""
    step = OneStep(case)
    computed = {stage: sum(parts.values()) for stage, parts in memory(step.work, 0.0).items()}
    step.ready()
    found = {}
    for stage in ("rollout", "logprobs", "update"):
        resting = step.resting()
        found[stage] = (resting + most(getattr(step, stage)), computed[stage])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this")
    args = parser.parse_args()
    found = {}
    for case in (case for case in CASES if args.only in case.name):
        found[case.name] = peaks(case)
        for stage, (counted, computed) in found[case.name].items():
            print(
                f"{case.name:40}{stage:10}{counted / 1e6:10.1f}{computed / 1e6:10.1f} MB {computed / counted - 1:+7.1%}",
                flush=True,
            )
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
