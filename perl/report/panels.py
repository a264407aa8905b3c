"""The line charts of a report, each of which answers a question that a reader asks of a run's metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """What one line chart shows: metrics of a stage over its steps, and held-out points."""

    name: str
    title: str
    unit: str
    caption: str
    lines: tuple[tuple[str, str], ...]
    """(metric, label) of each line."""
    points: tuple[tuple[str, str], ...] = ()
    """(field of an evaluation, label) of each series of markers."""
    scale: Literal["share", "small_share", "zero", "free"] = "zero"
    """share, small_share: per cent, readable span or from 0; zero: from 0; free: as data go."""
    stage: Literal["rl", "cold_start"] = "rl"
    rest: str = ""
    """A line for every other metric that starts with this, too."""
    least: float = 0.0
    """Nothing is drawn where no value reaches this."""


FAULTS = "reward/faults/"
OF_THE_SUM = frozenset({"reward/mean", "reward/std", "reward/min", "reward/max"})

PANELS = (
    Panel("curve", "Accuracy and consistency over RL", "accuracy, consistency",
          "Training rollouts as lines, held-out examples in many image orders as markers.",
          (("reward/accuracy", "accuracy, training"), ("consistency", "consistency, training")),
          (("accuracy", "accuracy, held out"), ("consistency", "consistency, held out")), "share"),
    Panel("reward", "Reward", "mean per completion",
          "The weighted reward of a completion and its unweighted parts; on held-out examples as markers.",
          (("reward/mean", "weighted sum"),), (("reward", "weighted sum, held out"),), "free", rest="reward/"),
    Panel("parts", "Parts of rewards", "mean per completion",
          "What functions return beside their score, which counts nowhere.", (), (), "free", rest="reward/"),
    Panel("faults", "Reward faults", "completions per step",
          "Completions that a reward function failed on; they have no score of it.", (), rest=FAULTS),
    Panel("accuracy", "Accuracy", "right completions",
          "Right completions among training rollouts, and on held-out examples sampled and greedy.",
          (("reward/accuracy", "training"),),
          (("accuracy", "held out, sampled"), ("greedy", "held out, greedy")), "share"),
    Panel("consistency", "Consistency across image orders", "consistency",
          "How often completions of two different image orders choose the same picture.",
          (("consistency", "training"),), (("consistency", "held out"),), "share"),
    Panel("length", "Response length", "tokens per completion",
          "Mean length of a completion.", (("length/mean", "mean"),)),
    Panel("truncated", "Truncated completions", "share of completions",
          "Completions that reached the longest length without an end.",
          (("length/truncated", "truncated"),), (), "small_share"),
    Panel("entropy", "Policy entropy", "nats per token",
          "Mean entropy of the policy at the scored tokens.", (("entropy", "entropy"),)),
    Panel("kl", "KL to the reference model", "nats per token",
          "Distance of the policy from the model that RL started with.", (("kl", "KL"),)),
    Panel("clip_fraction", "Clip fraction", "share of tokens",
          "Tokens whose probability ratio was clipped.",
          (("clip_fraction", "clipped"),), (), "small_share"),
    Panel("mismatch", "Engine and trainer", "nats per token",
          "How far log-probs of sampled tokens are apart between what samples and what is trained: the mean distance, and the KL.",
          (("rollout/mismatch_mean", "mean |Δ log p|"), ("rollout_kl", "KL(engine ‖ trainer)")), (), "free", least=1e-4),
    Panel("grad_norm", "Gradient norm", "L2 norm",
          "Norm of the gradient before clipping.", (("grad_norm", "norm"),)),
    Panel("throughput", "Throughput", "tokens per second",
          "Prompt and completion of every rollout, shared or not, over the step's time.",
          (("throughput/tokens_per_second", "throughput"),)),
    Panel("mfu", "Model FLOPs utilization", "share of the peak",
          "FLOPs of the model, what is shared counted once, over the time and the devices' peak.",
          (("mfu/step", "step"), ("mfu/rollout", "rollout"), ("mfu/logprobs", "log-probs"),
           ("mfu/update", "update")), (), "small_share"),
    Panel("sharing", "Work shared", "times less",
          "Tokens and images if each completion had its own prompt, over those that were computed.",
          (("packing/token_sharing", "tokens"), ("packing/image_sharing", "images"))),
    Panel("cold_start", "Cold-start loss", "nats per token",
          "Loss of the supervised steps on demonstrations.",
          (("loss", "loss"),), (), "zero", "cold_start"),
)  # fmt: skip
