"""TRL's side: its GRPOTrainer on transformers' model, with what its options offer for speed inside one process."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.harness.proof import copied_gradients
from benchmarks.trainer.clock import StepClock
from benchmarks.trainer.start import Start, text_hash, trl_rows


class TrlTrainer:
    """A fresh GRPOTrainer over the ordered prompts that PeRL trains on with the same seed.

    Args:
        folder: for whatever it writes.
        steps: optimizer steps of the run.
        clip_gradients: off for a look at the gradients.
        half: bfloat16 autocast; left out, as the setting says. Without it flash attention cannot run: SDPA does.
        replay: micro-batches to train on instead of sampling new ones.
    """

    def __init__(
        self,
        start: Start,
        folder: Path,
        steps: int,
        seed: int,
        clip_gradients: bool = True,
        half: bool | None = None,
        replay: list[dict[str, Any]] | None = None,
    ) -> None:
        setting = start.setting
        half = setting.half if half is None else half
        flash = setting.trl_attention == "flash_attention_2"
        attention = "sdpa" if flash and not half else setting.trl_attention
        auto: Any = AutoModelForImageTextToText
        model = auto.from_pretrained(
            start.model, dtype=torch.float32, attn_implementation=attention
        )
        processor = AutoProcessor.from_pretrained(start.processor, padding_side="left")
        unsampled = {*start.unsampled, *_ends(model, processor)}
        self.clock = StepClock(torch.device(setting.device))
        self.seen = Seen()
        self.trainer = _Trainer(
            model=model,
            reward_funcs=text_hash,
            args=_config(start, folder, steps, seed, clip_gradients, half, sorted(unsampled)),
            train_dataset=Dataset.from_list(trl_rows(setting, steps, seed)),
            processing_class=processor,
            callbacks=[_Watch(self.clock, self.seen)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.clock, self.trainer.seen, self.trainer.replay = self.clock, self.seen, replay
        self.core: Any = model.model

    def train(self) -> None:
        """All steps."""
        self.trainer.train()


@dataclass
class Seen:
    """What the trainer made of the last step, kept if `wanted`.

    `batch` is what it generated and scored, `rewards` float32 [B] of that; `inputs` and `losses` are those of its
    micro-batches in turn, `entropies` their means; `gradients` by parameter, on the CPU.
    """

    wanted: bool = False
    batch: dict[str, Any] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    entropies: list[float] = field(default_factory=list)


class _Trainer(GRPOTrainer):
    """TRL's trainer, looked at from outside: every method does what TRL's does.

    One autocast around the whole of sampling: in that of each forward alone, bfloat16 copies of the weights would be made
    anew for every token.
    """

    clock: StepClock
    seen: Seen
    replay: list[dict[str, Any]] | None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.replay is not None:
            return self.replay[self._step % len(self.replay)]
        return super()._prepare_inputs(generation_batch)

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        with self.clock.part("generation"), self.accelerator.autocast():
            return super()._generate_single_turn(*arguments, **options)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.clock.part("preparation"):
            batch = super()._generate_and_score_completions(inputs)
        if self.seen.wanted:
            self.seen.batch = dict(batch)
        return batch

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        rewards = super()._calculate_rewards(*arguments, **options)
        if self.seen.wanted:
            self.seen.rewards = rewards[:, 0].cpu()
        return rewards

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **options)
        if self.seen.wanted:
            self.seen.inputs.append(inputs)
            self.seen.losses.append(float(loss.detach()))
            self.seen.entropies.append(self._metrics["train"]["entropy"][-1])
        return loss


class _Watch(TrainerCallback):
    """Tells the clock of steps, and keeps the gradients of a step if they are wanted.

    What of a step is not sampled or prepared in it is the update, up to the emptied gradients.
    """

    def __init__(self, clock: StepClock, seen: Seen) -> None:
        self.clock, self.seen, self.update = clock, seen, ExitStack()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.update.enter_context(self.clock.part("update"))

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if self.seen.wanted:
            self.seen.gradients = copied_gradients(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.update.close()
        self.clock.end_step()


def _ends(model: Any, processor: Any) -> list[int]:
    """What ends a completion by itself."""
    ends = model.generation_config.eos_token_id
    several = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [processor.tokenizer.eos_token_id, *several]


def _config(
    start: Start,
    folder: Path,
    steps: int,
    seed: int,
    clip_gradients: bool,
    half: bool,
    unsampled: list[int],
) -> Any:
    setting = start.setting
    size = setting.padded_micro_batch(start.longest)
    return GRPOConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=setting.device == "cpu",
        bf16=half,
        gradient_checkpointing=False,
        # One batch of completions for each optimizer step, all sampled at once.
        per_device_train_batch_size=size,
        gradient_accumulation_steps=setting.sequences // size,
        num_generations=setting.per_order,
        max_completion_length=setting.completion,
        shuffle_dataset=False,
        max_steps=steps,
        temperature=1.0,
        # Without an end token no processor of logits has to keep it away until the length is reached.
        generation_kwargs={
            "eos_token_id": None,
            "suppress_tokens": unsampled,
            "use_cache": True,
        },
        loss_type="dapo",
        epsilon=setting.clip,
        epsilon_high=setting.clip,
        beta=0.0,
        scale_rewards="group",
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=setting.weight_decay,
        adam_beta1=setting.betas[0],
        adam_beta2=setting.betas[1],
        max_grad_norm=setting.max_grad_norm if clip_gradients else 0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        log_multimodal=False,
        disable_tqdm=True,
        dataloader_pin_memory=setting.device == "cuda",
    )
