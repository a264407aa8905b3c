"""The configuration of a run: nested dataclasses with the defaults and the help of every key."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from tyro.conf import Suppress

from perl.types import UserError

# Bounds that pydantic checks. They are annotated_types' and not pydantic's own fields, as importing pydantic would
# double the time of `perl-rl --help`.
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Lt(2**31)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]

REWARD_SPEC = re.compile(
    r"(?:(?P<module>.*?):)?(?P<name>[A-Za-z_]\w*)\s*(?:\((?P<options>.*)\))?", re.S
)
"""How a reward function is written: `name`, `module:name`, with options in brackets."""

INSTRUCTIONS = {
    "think-box": (
        "You first think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process must be enclosed within <think> </think> tags. The final answer must be put in \\boxed{}."
    ),
    "think-tags": (
        "You first think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process and the final answer must be enclosed within <think> </think> and <answer> </answer> "
        "tags, as in <think> reasoning process here </think><answer> final answer here </answer>."
    ),
    "box": "The final answer must be put in \\boxed{}.",
}
"""What `data.instruction` may name. think-box is the one that PeRL is trained and evaluated with (arXiv 2506.14907,
appendix A.3.2)."""

EVAL_SEED = 20250617
"""Held-out examples are the same in every run, so that runs can be compared."""


@dataclass(frozen=True)
class Command(ABC):
    """What every command of `perl-rl` can be told; a command adds its options and does its work in `execute`."""

    debug: bool = False
    """Show the whole trace of an error, and debug messages."""

    @abstractmethod
    def execute(self) -> None:
        """Do it.

        Raises:
            UserError: a mistake of the user's.
            Interrupted: stopped, and what was done is kept.
        """


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what it leaves behind."""

    dir: str = ""
    """Run folder; empty: runs/<recipe name>."""
    seed: Seed = 0
    """Seed of everything random: weights, data order, image orders, sampling."""
    seeds: tuple[Seed, ...] = ()
    """Several seeds: one whole run each, in seed-N folders, and a summary of mean and range."""
    deterministic: bool = False
    """The same bits each time on the same machine, also on a GPU, and so a resume to the bit: PyTorch's and flash-attn's
    deterministic algorithms, some of which are slower. A CPU has them anyway."""
    log_every: Positive = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Count = 50
    """Optimizer steps between two checkpoints; 0: only at the end of a stage."""
    keep_checkpoints: Positive = 2
    """How many checkpoints stay; the older one serves if the newest is damaged."""
    keep_best: str = ""
    """Number of an evaluation, higher is better, by which the best checkpoint stays as well and is exported as
    models/best: reward, greedy_reward, accuracy, greedy, ...; empty: only the newest stay."""
    push_to_hub: str = ""
    """Repository of the hub, as user/name, that the model is pushed to when the run ends, a new one as private; empty:
    nothing is pushed."""
    save_rollouts_every: Count = 10
    """Steps between two samples of rollouts kept for the report; 0: none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate that also get the metrics: tensorboard, wandb, trackio, ... (docs/trackers.md)"""
    project: str = ""
    """The trackers' project; empty: WANDB_PROJECT, or perl-rl."""
    name: str = ""
    """The run's name there; empty: WANDB_NAME, or the run folder's name."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and which of its weights are trained."""

    path: str = ""
    """The model to train: a model folder, a hub name, a LoRA adapter's folder, a run (its newest model) or one of its
    checkpoints; or tiny-qwen2.5-vl / tiny-qwen3-vl / tiny-qwen2-vl / tiny-internvl, made from config in the run folder
    for the bundled tasks."""
    chat_template: str = ""
    """A Jinja file that takes the place of the tokenizer's chat template, and is saved with the model; empty: the
    tokenizer's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights and all that is computed with them (docs/precision.md); bfloat16 is trained with float32 masters.
    auto: bfloat16 on a GPU that has it, else float32."""
    attention: Literal["auto", "flash_attention_2", "varlen", "flex", "sdpa"] = "auto"
    """Packed attention: flash-attn, PyTorch's varlen_attn, compiled flex_attention, SDPA; auto: the first that runs
    here in this precision."""
    freeze_vision: bool = False
    """Keep the vision tower's weights as they are."""
    lora_rank: Count = 0
    """Rank of LoRA adapters, of the language model's linear layers unless lora_targets says other ones (the vision tower is
    trained in full unless it is frozen); 0: train all weights."""
    lora_alpha: AboveZero = 32.0
    """Scale of the LoRA update: alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Which linear layers get adapters: names of the language model's, as in q_proj and v_proj, or regular expressions over
    whole names, as in ".*visual.*" for Qwen's vision tower and its projector, which must be frozen; empty: all of the
    language model's attention and MLP."""
    lora_dropout: Decay = 0.0
    """Share of the adapters' inputs that is dropped in training."""
    gradient_checkpointing: Share = 0.0
    """Share of the layers, evenly spread, whose activations are computed again in the backward: of all (1), most of their
    memory for about a third more time."""
    feature_cache_mb: Count = 1024
    """Most MiB of image features that are kept for the passes which need no gradient of the vision tower: rollouts, old and
    reference log-probs of one step; of a frozen tower all passes of all steps. 0: none are kept."""
    compile: Literal[True, False, "auto"] = "auto"
    """torch.compile the language model's decoder layers for training; the first steps then take longer. auto: on a GPU
    where Liger's kernels cannot run."""
    liger: Literal[True, False, "auto"] = "auto"
    """Liger's Triton kernels for RMSNorm, SwiGLU and rotary embeddings; needs liger-kernel and a GPU. auto: where both are
    there, unless compile is true."""
    min_pixels: Positive = 28 * 28
    """Images below this many pixels are enlarged."""
    max_pixels: Positive = 512 * 512
    """Images above this many pixels are shrunk."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from."""

    train: str = ""
    """The training data: a file (JSONL, JSON, CSV, Parquet), several (data/*.jsonl, or with commas), a folder or hub name
    with [:CONFIG][:SPLIT], bundled:digits (questions made over scikit-learn's scanned digits), or bundled:folder:PATH
    (over your pictures, one sub-folder per class)."""
    eval: str = ""
    """Held-out examples, in the same forms (the bundled tasks keep train and test images apart); split:0.05 holds that
    share of data.train out, by groups of rows that share images; empty: no evaluation."""
    columns: Literal[
        "auto", "perl", "trl", "verl", "easyr1", "open-r1", "ms-swift", "sharegpt", "alpaca"
    ] = "auto"
    """Whose column names the files use."""
    map: tuple[str, ...] = ()
    """What columns of ours are called in the data, as in "question=problem_text"."""
    frames: Count = 0
    """Images that a video is shown as, evenly spaced over it; 0: rows with videos are refused."""
    image_root: str = ""
    """Folder that image paths start from and may not leave, those of data.train and data.eval alike; empty: each data
    file's folder."""
    mix: tuple[str, ...] = ()
    """More training sources beside data.train, each with the share of draws it gets for one of data.train's, as in
    "k12.jsonl*0.5"."""
    tasks: tuple[str, ...] = ("which",)
    """Bundled tasks: which, odd, count, first, same, single."""
    min_images: Positive = 2
    """Fewest images in a bundled question."""
    max_images: Positive = 4
    """Most images in a bundled question."""
    first_slot: Share = 0.0
    """Share of bundled training questions whose right picture is put into the first slot, for experiments with a
    position bias; 0: all slots are alike."""
    instruction: str = "auto"
    """What every question is followed by, so that the model writes answers in the form that the rewards read:
    think-box, think-tags, box (`perl-rl preview` shows them), or a text of your own; auto: the one whose form
    reward.functions read, where a question does not ask for it already; "": nothing."""
    instruction_in: Literal["user", "system"] = "user"
    """Whether it ends the last user turn or the system message."""
    system: str = ""
    """A system message for the questions that have none."""
    streaming: bool = False
    """Read training data of the hub, a folder or Parquet as it comes, shuffled in blocks of 1,000 rows, instead of bringing
    all of it here first; of held-out data the first eval.examples rows."""
    on_error: Literal["error", "skip"] = "error"
    """What to do with a faulty row, also one whose image turns out broken when it is drawn: stop, or leave it out, which
    training counts in data/skipped. A filter stage always stops."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that read the pictures of the next step's questions and turn them into pixels while this one trains; 0: the
    run's own process does when it needs them; auto: 4 on a GPU, else 0."""
    max_prompt_tokens: Positive = 8192
    """A prompt with more tokens, image tokens included, is an error or is dropped."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with a prompt over max_prompt_tokens."""
    control_tokens: Literal["error", "escape"] = "error"
    """What to do with a row whose text holds a control token of the model, as <|im_end|>: error, or make plain text of it
    by a space, as in "< |im_end|>"."""


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Supervised fine-tuning on demonstrations before RL; it gives RL something to reinforce."""

    steps: Count = 0
    """Optimizer steps; 0: no cold start."""
    batch_size: Positive = 64
    """Examples per step."""
    lr: NotNegative = 2e-3
    """Peak learning rate."""
    warmup_steps: Count = 50
    """Steps of linear warm-up."""
    schedule: str = "linear"
    """Learning rate after the warm-up, as train.schedule."""
    noise: Share = 0.0
    """Share of demonstrations whose final answer is replaced by a random one (imperfect annotators)."""


@dataclass(frozen=True, kw_only=True)
class PermutationConfig:
    """The image orders every example is rolled out in."""

    orders: Positive = 2
    """Orders per example with the original one (the paper's n_s + 1); 1: plain GRPO. Where fewer exist, these share
    the rollouts."""
    text: Literal["slots", "references"] = "slots"
    """What keeps text and images consistent. slots: the text stays, and an answer that names an image follows it;
    references: "Image 2", "the second picture" and options such as "A. Image 2" are rewritten to follow theirs."""
    rate: Share = 1.0
    """Share of the examples that are permuted, the paper's alpha at the start; the others get all their rollouts in
    the original order."""
    rate_schedule: Literal["constant", "linear", "cosine", "released"] = "constant"
    """How that share falls to 0 over the stage; released: as in the paper's code, which in effect permutes all until
    the last 2.5 % of the steps."""
    draw: Literal["random", "released"] = "random"
    """random: distinct orders, new ones each epoch; released: the one fixed order per number of images that the
    paper's code draws (its generator is seeded anew each time)."""
    condition: Literal["permuted", "original"] = "permuted"
    """Prompt that loss and KL are conditioned on: the order a rollout was sampled in (the paper's Eq. 6), or always
    the original one (as NoisyRollout does; the paper warns of collapse)."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What samples, in a run and in the commands that ask a model."""

    engine: Literal["inprocess", "vllm"] = "inprocess"
    """What samples: the weights of this process, or vLLM servers that are given them (docs/rollouts.md)."""
    url: tuple[str, ...] = ()
    """Addresses of vLLM servers, as in http://127.0.0.1:8000; empty: one is started, and stopped at the end."""
    vllm: str = "vllm"
    """The executable that starts one; it may be of another environment, as in ~/vllm/bin/vllm."""
    gpu_memory: Annotated[float, Gt(0), Le(1)] = 0.85
    """Share of a GPU's memory that one takes which is started."""
    devices: str = ""
    """CUDA_VISIBLE_DEVICES of one that is started, as in 6,7; empty: this process's."""
    serve_args: tuple[str, ...] = ()
    """Further arguments of `vllm serve`, as in --tensor-parallel-size 2."""
    requests: Positive = 256
    """Most requests, of one prompt and all its completions each, that a process has under way at a server."""
    timeout: AboveZero = 600.0
    """Seconds after which a server that answers nothing counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(EngineConfig):
    """Sampling of completions."""

    per_order: Positive = 6
    """Completions per order."""
    temperature: AboveZero = 1.0
    """Sampling temperature; log-probs are taken at the same one."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample only from the likeliest tokens that have this probability together; 1: from all. Log-probs stay those of
    the whole distribution, as in TRL; from vLLM they are of what is left, as those of top_k."""
    top_k: Count = 0
    """Sample only from this many likeliest tokens; 0: from all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which keeps them, as in "</answer>"."""
    max_new_tokens: Positive = 512
    """Longest completion."""
    kv_cache_tokens: Positive = 131072
    """Most tokens, of prompts and completions, whose keys and values are kept at once while sampling: what goes on at a
    time. A prompt counts once for all its completions; each of these counts max_new_tokens. Of the engine in process."""
    placement: Literal["separate", "colocated"] = "separate"
    """Whether vLLM servers have GPUs of their own, or share the trainer's and sleep while it trains."""
    transfer: Literal["auto", "files", "nccl", "ipc"] = "auto"
    """How weights come to servers: by files in shared memory, from GPU to GPU, within a GPU; auto: the last two where vLLM is
    in the trainer's environment too, else files."""
    ahead: Literal[0, 1] = 0
    """1: the next step's first batch is sampled while this one is trained on, by weights that are one step old, or by newer
    ones from where these come (needs engine = vllm; docs/rollouts.md)."""
    surplus: NotNegative = 0.0
    """Share of a step's examples that are rolled out beyond them: the step takes the first groups with signal that end, and
    gives up the rest. Short completions come first, so that it favours them."""
    tolerance: NotNegative = 0.0
    """Most mean |log p(server) - log p(trainer)| over the tokens of a probe behind each weight sync, else the run stops; 0:
    1e-4 in float32, 0.1 in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a completion is worth: a weighted sum of functions."""

    functions: tuple[str, ...] = ("accuracy", "format")
    """Names, or package.module:function / file.py:function with TRL's convention
    f(prompts, completions, **columns) -> list of floats (None: left out of that rollout's sum), or verl's or EasyR1's
    compute_score; options as in box_iou(threshold=0.5)."""
    weights: tuple[float, ...] = ()
    """One weight per function; empty: 1 each, but 0.9 and 0.1 for accuracy and format, the paper's."""
    timeout: NotNegative = 60.0
    """Seconds that one call of a function may take; 0: no limit."""
    group_weight: Literal["none", "exp", "power", "log"] = "none"
    """How much more groups of hard examples count, by the mean m of a reward: exp(1 - m),
    (1.05 - m)^group_weight_power, -log(0.02 + m)."""
    group_weight_of: str = ""
    """The reward function whose mean over a group that is, by its name or as it is written in functions."""
    group_weight_power: AboveZero = 1.0
    """The power of group_weight = "power"."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which groups are worth an optimizer step."""

    zero_variance: bool = True
    """Drop groups whose rollouts all got the same reward, and refill the batch."""
    max_tries: Positive = 4
    """Rollout batches per step at most, the first included; then the step runs with what there is."""
    min_accuracy: Share = 0.0
    """Drop groups whose mean of `measure` is below this (0.1 in MM-Eureka); a mean equal to it stays."""
    max_accuracy: Share = 1.0
    """Drop groups whose mean of `measure` is above this (0.9 in MM-Eureka); a mean equal to it stays."""
    measure: str = "accuracy"
    """The reward function that min_accuracy, max_accuracy and the offline filter are about, by its name or as it is
    written in reward.functions."""
    reuse_overflow: bool = False
    """Keep groups with signal beyond the batch, a batch of them at most, for the next step, which trains on them
    off-policy."""
    replay: Count = 0
    """Groups of earlier steps that each step trains on again (VL-Rethinker), over all processes; 0: none."""
    replay_size: Positive = 256
    """How many groups are kept for that, the newest ones, by each process."""
    replay_power: NotNegative = 1.0
    """Probability of a group is its mean |advantage| to this power; 0: all alike."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """What a rollout's reward is compared with."""

    over: Literal["group", "order", "order+group"] = "group"
    """group: mean and deviation of all rollouts of a question, in all its orders (the paper's Eq. 4-5); order: of
    those in the same order; order+group: the sum of both z-scores (R1-ShareVL)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of that set, of all rewards that a process samples at once, or not at all."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """Subtract the mean of the set, or of its other members."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss: a preset, and each axis of it that is to differ. The fields are those of perl_kernels.PolicyLoss,
    whose docstring has the formulas; what is left empty is the preset's."""

    preset: str = "perl"
    """perl, grpo, bnpo, dr_grpo, dapo, gspo, gspo_token, cispo, sapo, luspo, vespo, gmpo, dppo_tv, dppo_kl, reinforce."""
    surrogate: (
        Literal["clip", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"] | None
    ) = None
    """The policy term."""
    ratio: Literal["token", "sequence", "sequence_token"] | None = None
    """Importance ratio of each token, of the whole completion (GSPO), or the latter with each token's own gradient."""
    clip_low: NotNegative | None = None
    """Lower clip range (TRL's epsilon, verl's clip_ratio_low)."""
    clip_high: NotNegative | None = None
    """Upper clip range (TRL's epsilon_high, verl's clip_ratio_high)."""
    dual_clip: NotNegative | None = None
    """Bound of the loss where the advantage is negative, above 1 (verl's clip_ratio_c); 0: none."""
    delta: NotNegative | None = None
    """Upper bound of the unclipped ratio, above 1 + clip_high (TRL's delta); 0: none."""
    sapo_tau_pos: AboveZero | None = None
    """Temperature of sapo where the advantage is positive."""
    sapo_tau_neg: AboveZero | None = None
    """Temperature of sapo elsewhere."""
    vespo_k_pos: NotNegative | None = None
    """vespo's k where the advantage is not negative."""
    vespo_lambda_pos: AboveZero | None = None
    """vespo's lambda where the advantage is not negative."""
    vespo_k_neg: NotNegative | None = None
    """vespo's k elsewhere."""
    vespo_lambda_neg: AboveZero | None = None
    """vespo's lambda elsewhere."""
    dppo_ratio_cap: AboveZero | None = None
    """Upper bound of the ratio in dppo_tv and dppo_kl."""
    kl: Literal["none", "k1", "k2", "k3", "abs", "k1+", "k3+"] | None = None
    """Estimator of the KL to the reference model (verl's kl_loss_type); k1+ and k3+ have the gradient of k2."""
    kl_coef: NotNegative | None = None
    """Weight of the KL to the reference model (TRL's beta); 0: no reference model is kept."""
    kl_bias_correction: bool | None = None
    """Multiply the KL by the importance ratio (TRL's use_bias_correction_kl)."""
    entropy_coef: Annotated[float, Gt(-math.inf), Lt(math.inf)] | None = None
    """Weight of the entropy bonus."""
    aggregation: (
        Literal[
            "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
        ]
        | None
    ) = None
    """From the terms of tokens to one number (verl's loss_agg_mode)."""
    max_completion_length: Positive | None = None
    """What seq-mean-token-sum-norm divides by; empty: rollout.max_new_tokens."""
    correction: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Importance weight of the training policy against the engine that sampled, on the policy term (TRL's
    vllm_importance_sampling_mode, verl's rollout_is); empty: token_truncate for what vLLM samples, else none. The metrics
    rollout/mismatch_mean and rollout_kl say how far they are apart."""
    correction_low: NotNegative | None = None
    """Lower bound of that weight."""
    correction_high: AboveZero | None = None
    """Upper bound of that weight."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The RL loop; optimizer, weight_decay, betas, max_grad_norm and tokens_per_micro_batch serve the cold start too."""

    steps: Count = 100
    """Rollout batches to train on."""
    epochs: NotNegative = 0.0
    """Passes over data.train instead: as many steps as draw each row so often, those of data.mix beside them; 0: steps."""
    examples_per_step: Positive = 16
    """Groups per rollout batch."""
    updates_per_batch: Positive = 1
    """Optimizer steps per rollout batch; with more than one, old log-probs are computed and clipping acts."""
    tokens_per_micro_batch: Positive = 16384
    """Most tokens of one packed row; one forward and backward each."""
    share_prompts: bool = True
    """Compute each ordered prompt once per row, however many completions continue it; false: once per completion.
    The gradients are the same."""
    lr: NotNegative = 1e-6
    """Peak learning rate."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant, linear, cosine, or another of transformers' schedulers with its options,
    as in cosine_with_min_lr(min_lr_rate=0.1)."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or torchao's AdamW with moments of 8 bits, 2 bytes a weight instead of 8 (docs/precision.md)."""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's moment decays."""
    max_grad_norm: NotNegative = 1.0
    """Gradient norm is clipped to this; 0: not clipped."""
    sharding: Literal["none", "fsdp"] = "none"
    """Whether every process holds all weights, gradients and optimizer state, or they are spread over processes by
    PyTorch's fully_shard (docs/sharding.md)."""
    shards: Count = 0
    """Processes that hold one copy of the weights together; 0: those of a node, so that several nodes have a copy each."""
    reshard_after_forward: bool = True
    """Let go of a layer's weights between its forward and its backward, and gather them again: less memory, more traffic."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """That gradients of sharded weights are summed over processes in."""
    shard_vision: bool = False
    """Shard the vision tower too; else every process holds it whole."""
    cpu_offload: bool = False
    """Keep shards, their gradients and the optimizer's state in the host's memory; needs GPUs."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Measurement on held-out examples."""

    examples: Count = 100
    """Held-out examples; 0: no evaluation."""
    max_orders: Positive = 24
    """Orders per example: all of them when there are no more than this, else this many sampled ones."""
    samples: Positive = 1
    """Completions sampled per order at temperature 1, beside one greedy one."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(MeasureConfig):
    """Measurement on held-out examples, before and after RL."""

    every: Count = 0
    """RL steps between two evaluations along the way; 0: only before and after."""
    patience: Count = 0
    """Evaluations in a row that may be no better than the best by run.keep_best; then the RL stage ends; 0: it never does."""


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """Rollout filtering before RL: how hard every question is, and which ones are kept."""

    rollouts: Positive = 10
    """Completions per question."""
    orders: Positive = 1
    """Image orders that they are spread over; 1: the original one."""
    examples: Count = 0
    """Questions to measure; 0: all of the data (endless bundled questions need a number)."""
    histogram: str = "paper"
    """Target shares of the accuracies 0.0, 0.1, ..., 1.0: paper (its Fig. 3b), uniform, or eleven numbers with commas."""
    size: Count = 0
    """Questions to keep; 0: as many as meet the target without repeats."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run. In a recipe: a [[stages]] table with a name, a kind, and any key of other sections."""

    name: str
    """Name in metrics, and of the model it leaves under models/."""
    kind: Literal["cold_start", "filter", "rl"]
    """Supervised fine-tuning on demonstrations, offline rollout filtering, or reinforcement."""
    set: dict[str, Any] = field(default_factory=dict)
    """Section -> key -> value for this stage alone."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on; saved as config.toml in the run folder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    resample: ResampleConfig = field(default_factory=ResampleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: Annotated[tuple[StageConfig, ...], Suppress] = ()
    """Stages in turn, each with keys of its own; empty: a cold start (if cold_start.steps) and then RL."""


def names_of(functions: Sequence[str | Callable[..., Any]]) -> tuple[str, ...]:
    """Distinct names to report by: the function's own, or the whole spec where two are alike."""
    whole = [
        f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__) for f in functions
    ]
    matches = [REWARD_SPEC.fullmatch(name.strip()) for name in whole]
    short = [m["name"] if m else name for m, name in zip(matches, whole, strict=True)]
    names = tuple(w if short.count(s) > 1 else s for w, s in zip(whole, short, strict=True))
    if len(set(names)) < len(names):
        raise UserError(
            f"reward.functions names one function twice: {', '.join(names)}; leave one out"
        )
    return names


def part_name(functions: Sequence[str], wanted: str) -> str | None:
    """The name that a reward function's scores are reported under (see `names_of`).

    `wanted` is one of `functions` as it is written there, or its plain name if no other has that too; None if it
    is neither. Raises UserError where one function is named twice.

    Example: `part_name(["box_iou(threshold=0.5)"], "box_iou(threshold=0.5)") == "box_iou"`.
    """
    places = places_of(functions, wanted)
    return names_of(functions)[places[0]] if len(places) == 1 else None


def places_of(functions: Sequence[str], wanted: str) -> list[int]:
    """Places of the functions that a name may stand for: the one written just so, or all with this plain name."""
    wanted, whole = wanted.strip(), [f.strip() for f in functions]
    if wanted in whole:
        return [whole.index(wanted)]
    return [i for i, f in enumerate(functions) if names_of([f]) == (wanted,)]
