"""The comparison of trainers from setting to report: nothing is timed that is not proven."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness.device import free_memory, peak_memory, software
from benchmarks.harness.models import counting
from benchmarks.trainer.clock import PARTS, StepTime
from benchmarks.trainer.start import Setting, Start, make_start
from perl.report.progress import Display

Report = dict[str, Any]
Make = Callable[[Start, Path, int, int], Any]
"""A trainer from the start, a folder, a number of steps and a seed."""

OLDEST = (1, 16)
_USED = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_generate_single_turn",
    "_prepare_inputs",
    "compute_loss",
)

DIFFERENCES = (
    "Prompts and images: TRL repeats a prompt and its images for each of its completions, when it samples and when "
    "it trains; PeRL reads each ordered prompt once for its completions and encodes each image once when it samples "
    "and once when it trains, for all orders.",
    "Padding: TRL pads all sequences to the longest prompt of the step (left) and the longest completion (right); "
    "PeRL trains on packed rows and pads only the prompts that it samples from.",
    "Sampling: TRL calls transformers' generate with a key-value cache, PeRL its own loop with a key-value cache. Both "
    "sample in this process, all completions at once and to their full length. Neither uses an inference server; "
    "TRL can use vLLM. Tokens that end a completion are kept out in TRL by one of generate's processors of logits "
    "(suppress_tokens: an isin and a where for each token that is sampled), in PeRL by a masked_fill.",
    "bfloat16: PeRL's weights are bfloat16, with float32 masters in the optimizer; TRL's are float32 under autocast. Its "
    "bfloat16 copies of them are kept for all of sampling; TRL alone would make them again for each token.",
    "Pictures: TRL processes each picture twice for each completion, once to sample and once to train; PeRL once, and "
    "keeps it. Both use the same image processor.",
    "Head: TRL's fused head makes log-probs and entropies in tiles and computes the tiles again in the backward; on a "
    "CPU it scores every position, on a GPU those of completions alone. PeRL's makes loss and gradients in one pass "
    "over the scored positions.",
    "Softmax: PeRL leaves tokens that are never sampled out of it. Here it does not, as TRL cannot.",
    "Optimizer: AdamW in both, transformers' default (fused where PyTorch has that) in TRL, fused on CUDA in PeRL.",
    "Advantages: both divide by the standard deviation within the ordered prompt, TRL adds 1e-4 to it, PeRL 1e-6.",
    "Micro-batches: of equally many tokens at most, padded in TRL, where their number of sequences also has to divide "
    "the step's. The budget is the same, what it holds is not: a step that fits one micro-batch of PeRL's may be several "
    "times the tokens in TRL, so the ratio of peak memory follows from the budget (see `micro-batch "
    "tokens`); --budget changes it.",
    "Attention: TRL's as --trl-attention says, PeRL's the first that runs here (see `packed attention`).",
    "Layers: both run transformers' own. Kernels for them that TRL can be told to use, Liger's (use_liger_kernel) or "
    "the hub's (use_kernels), are not used.",
    "Records: neither writes logs, checkpoints or completions; both compute the metrics that they would log.",
)


def measure(setting: Setting, display: Display | None = None) -> Report:
    """Prove, count and time both trainers.

    Returns:
        `available`, false with a `reason` where there is no TRL; else also `setting`, `proof`, `trainers` (`trl` and
        `perl`), and `differences`.

    Raises:
        AssertionError: the trainers make different steps of the same completions.
        UserError: the setting cannot be run.
    """
    if reason := why_not():
        return {"available": False, "reason": reason}
    # It imports TRL.
    from benchmarks.trainer.agreement import prove

    display = display or Display(enabled=False)
    with _silence(), quick_collections(), TemporaryDirectory(prefix="bench-trainer-") as folder:
        try:
            start = make_start(setting, Path(folder))
            display.say("proving a step of each trainer")
            proof = prove(start, Path(folder) / "proof")
            return {
                "available": True,
                "setting": _described(start),
                "proof": proof,
                "trainers": _measured(start, Path(folder), display),
                "differences": list(DIFFERENCES),
            }
        finally:
            forget_trainers()


def why_not() -> str:
    """One line that says why TRL's GRPO trainer cannot be used here; empty if it can."""
    try:
        import trl
        from trl import GRPOTrainer
    except Exception as error:  # A package that TRL needs may fail in any way.
        while error.__cause__ is not None:
            error = error.__cause__
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"TRL's GRPOTrainer cannot be imported ({reason}); pip install 'trl>=1.16'"
    numbers = trl.__version__.split(".")[:2]
    if not all(n.isdecimal() for n in numbers) or tuple(map(int, numbers)) < OLDEST:
        return (
            f"TRL {trl.__version__} is installed, 1.16 or newer is needed; pip install 'trl>=1.16'"
        )
    lacking = [name for name in _USED if not hasattr(GRPOTrainer, name)]
    if lacking:
        return (
            f"the GRPOTrainer of TRL {trl.__version__} has no {lacking[0]}; pip install trl==1.16.0"
        )
    return ""


def _measured(start: Start, folder: Path, display: Display) -> dict[str, Any]:
    """Seconds and counts of each trainer."""
    from benchmarks.trainer.perl_trainer import PerlTrainer
    from benchmarks.trainer.trl_trainer import TrlTrainer

    sides: dict[str, Make] = {"trl": TrlTrainer, "perl": PerlTrainer}
    setting = start.setting
    display.say("counting a step of each trainer")
    counted = {name: count(make, start, folder / name) for name, make in sides.items()}
    display.stage("timing", setting.rounds, unit="rounds")
    times: dict[str, list[list[StepTime]]] = {name: [] for name in sides}
    for number in range(setting.rounds):
        # Both in every round, so that a busy machine is busy for both, and each as often the first.
        for name in sorted(sides, reverse=number % 2 == 1):
            own = folder / f"{name}-{number}"
            times[name].append(_time(sides[name], start, own, setting.seed + number))
        display.advance()
    display.close()
    return {name: {**_seconds(times[name]), **counted[name]} for name in sides}


def count(make: Make, start: Start, folder: Path, steps: int = 2) -> dict[str, Any]:
    """What enters the model in the first step, and the most memory that all take beyond the weights: none is timed.

    The optimizer's state is made at the end of the first step, so only from the second on it lies beside activations.
    """
    forget_trainers()
    side = make(start, folder, steps, start.setting.seed)
    with counting(side.core, lambda: not side.clock.ended) as counts:
        _, most = peak_memory(side.train, torch.device(start.setting.device))
    return {
        "lm_tokens": sum(counts.lm_tokens.values()),
        "lm_tokens_by_part": counts.lm_tokens,
        "micro_batch_tokens": counts.largest,
        "images_encoded": sum(counts.images.values()),
        "images_encoded_by_part": counts.images,
        "peak_bytes": most,
    }


def _time(make: Make, start: Start, folder: Path, seed: int) -> list[StepTime]:
    """The steps of one round behind the first, which warms up."""
    forget_trainers()
    side = make(start, folder, start.setting.steps + 1, seed)
    side.train()
    return side.clock.steps


def _seconds(rounds: list[list[StepTime]]) -> dict[str, Any]:
    steps = [step for own in rounds for step in own]
    return {
        "seconds": statistics.median(step.seconds for step in steps),
        "seconds_by_round": [statistics.median(step.seconds for step in own) for own in rounds],
        "parts": {name: statistics.median(step.parts[name] for step in steps) for name in PARTS},
    }


def _described(start: Start) -> dict[str, Any]:
    """The setting, and what it came to on this machine."""
    import trl

    from perl.model.packed.attention import choose

    setting = start.setting
    device = torch.device(setting.device)
    size = setting.padded_micro_batch(start.longest)
    return {
        **asdict(setting),
        "tokens_per_image": setting.side**2,
        "sequences": setting.sequences,
        "longest_sequence": start.longest,
        "padded_micro_batch": size,
        "parameters": start.parameters,
        "packed_attention": choose("auto", device, setting.half)[0],
        **software(device),
        "trl": trl.__version__,
    }


@contextmanager
def _silence() -> Iterator[None]:
    """No bars and remarks of libraries, and none about what one of them sets of another."""
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leave what is there now out of Python's garbage collections, which else take long in the middle of steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def forget_trainers() -> None:
    """Free the memory of trainers that are gone, and make accelerate forget its precision and accumulation of gradients.

    It keeps them for the life of a process; a trainer that still lives cannot be used afterwards.
    """
    from accelerate.state import AcceleratorState, GradientState

    free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
