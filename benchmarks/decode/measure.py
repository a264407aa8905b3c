"""The benchmark of decoding from setting to report: nothing is timed that is not proven."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.decode.counts import Tally
from benchmarks.decode.sides import Ours, Side, Stock, exact_logprobs
from benchmarks.harness.device import software, synchronize
from benchmarks.harness.models import SHAPES, given_model, shape, special_tokens
from benchmarks.train_step.workload import Workload
from perl.model.families import family_of
from perl.rollout.engine import Completion
from perl.types import EncodedPrompt

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is sampled, and where; see the options of `bench_decode.py`."""

    workload: Workload
    device: str
    model: str
    dtype: str
    rounds: int


def measure(setting: Setting) -> Report:
    """Prove, count and time both sides.

    Returns:
        `stock`, `ours` and `setting`.

    Raises:
        AssertionError: a side's log-probs are not those of the sequence alone in fp64.
        UserError: the model cannot be used.
    """
    model = make_model(setting)
    prompts = prompts_of(setting, model.config)
    exact = copy.deepcopy(model).double().eval()
    sides: dict[str, Side] = {"stock": Stock(copy.deepcopy(model)), "ours": Ours(model)}
    report: Report = {name: {} for name in sides}
    work = _Timed(setting, prompts, model.config)
    allowed = None
    for name, side in sides.items():
        print(f"{name}: proving", file=sys.stderr)
        off = max(
            _furthest(exact, prompts, work.run(side, 0, uneven, True)) for uneven in (False, True)
        )
        # What low precision costs stock, three times; stock itself is not wrong by a tenth.
        allowed = allowed or {"float32": 1e-3, "bfloat16": 0.1}[setting.dtype]
        assert off <= allowed, (
            f"{name}: log-probs differ from fp64's by {off:.2e}, {allowed:.2e} allowed"
        )
        if name == "stock":
            allowed = 3 * off + 16 * torch.finfo(model.dtype).eps
        report[name]["max_logprob_diff"] = off
    del exact
    print("timing", file=sys.stderr)
    for name, times in work.rounds(sides).items():
        report[name] |= times
    tokens = [len(p.input_ids) for p in prompts]
    for name, make in (("stock", Stock), ("ours", partial(Ours, looks=16))):
        print(f"{name}: counting", file=sys.stderr)
        counted = counts(make, setting.device)
        mean = bytes_per_cached_token(counted, statistics.mean(tokens), setting.workload.completion)
        report[name] |= {"bytes_per_cached_token_layer": mean, **counted}
    return {**report, "setting": described(setting, model, tokens)}


class _Timed:
    """Calls that are proven and timed: all completions to the full length, and with tokens that end them."""

    def __init__(self, setting: Setting, prompts: Sequence[EncodedPrompt], config: Any) -> None:
        self.setting, self.prompts = setting, prompts
        self.device = torch.device(setting.device)
        # Random weights find all tokens about equally likely: a completion ends after half the length on average.
        words = config.text_config.vocab_size
        share = 2 * words // setting.workload.completion
        self.ends = np.setdiff1d(np.arange(words), special_tokens(config))[: max(1, share)].tolist()

    def run(
        self, side: Side, seed: int, uneven: bool, logprobs: bool = False, tokens: int = 0
    ) -> list[list[Completion]]:
        load = self.setting.workload
        found = side.sample(
            self.prompts,
            load.rollouts,
            tokens or load.completion,
            seed,
            self.ends if uneven else (),
            logprobs,
        )
        synchronize(self.device)
        return found

    def rounds(self, sides: dict[str, Side]) -> dict[str, dict[str, Any]]:
        """Medians; a round has every kind of call of both sides, so that a busy machine is busy for all."""
        kinds: dict[str, Any] = {
            "seconds": {"uneven": False},
            "seconds_uneven": {"uneven": True},
            "seconds_first_token": {"uneven": False, "tokens": 1},
        }
        times: dict[str, dict[str, list[float]]] = {n: {k: [] for k in kinds} for n in sides}
        cpu: dict[str, list[float]] = {n: [] for n in sides}
        tokens: dict[str, list[int]] = {n: [] for n in sides}
        for seed in range(1, self.setting.rounds + 1):
            for kind, how in kinds.items():
                for name, side in sides.items():
                    start, start_cpu = time.perf_counter(), time.process_time()
                    found = self.run(side, seed, **how)
                    times[name][kind].append(time.perf_counter() - start)
                    if kind == "seconds":
                        cpu[name].append(time.process_time() - start_cpu)
                    if how["uneven"]:
                        tokens[name].append(sum(len(c.token_ids) for cs in found for c in cs))
        return {
            name: {
                **{kind: statistics.median(found) for kind, found in of_kind.items()},
                "cpu_seconds": statistics.median(cpu[name]),
                "seconds_by_round": of_kind["seconds"],
                "seconds_uneven_by_round": of_kind["seconds_uneven"],
                "tokens_uneven_by_round": tokens[name],
            }
            for name, of_kind in times.items()
        }


def _furthest(
    exact: Any, prompts: Sequence[EncodedPrompt], sampled: Sequence[Sequence[Completion]]
) -> float:
    """Largest difference of a sampled token's log-prob from fp64's."""
    return max(
        float(
            (torch.from_numpy(c.logprobs).double() - exact_logprobs(exact, p, c.token_ids))
            .abs()
            .max()
        )
        for p, completions in zip(prompts, sampled, strict=True)
        for c in completions
    )


def make_model(setting: Setting) -> Any:
    """A shape with random weights, or a checkpoint's, in the setting's dtype."""
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    dtype = getattr(torch, setting.dtype)
    if setting.model not in SHAPES:
        return auto.from_pretrained(given_model(setting.model, SHAPES), dtype=dtype).to(
            setting.device
        )
    torch.manual_seed(setting.workload.seed)
    with torch.device(setting.device):
        return auto.from_config(shape(setting.model), dtype=dtype)


def prompts_of(setting: Setting, config: Any) -> list[EncodedPrompt]:
    family = family_of(config.model_type)
    assert family is not None
    return [s.prompt for s in setting.workload.segments(config, family)]


_PROMPTS, _SEQUENCES = 2, 6
_SHORT, _LONG = 16, 48
_BEFORE, _BETWEEN = 16, 16


def counts(make_side: Callable[[Any], Side], device: str) -> dict[str, float]:
    """Of one decode step of two equally long prompts with six completions each, in a model with the heads of
    Qwen2.5-VL-7B (28 of queries and 4 of keys, of dimension 128) in bfloat16: what 16 more steps add, over 16.

    A cached token is one token of one sequence's context: six completions of a prompt of P tokens have 6 P of them, so
    that what is read once for all six shows. `bytes_per_prompt_token_layer` is what longer prompts add to a step of a layer over the
    cached tokens that they add, `bytes_per_own_token_layer` likewise for longer completions. `operators_per_layer` is
    half of what two more layers add.

    Args:
        make_side: from a model, whose weights mean nothing.
    """
    found = {layers: _Steps(make_side, layers, device) for layers in (1, 3)}

    def per_layer(of: str, steps: tuple[int, int], length: int = _SHORT) -> float:
        few, many = (found[n].between(of, steps, length) for n in (1, 3))
        return (many - few) / 2

    first = (_BEFORE, _BEFORE + _BETWEEN)
    second = (first[1], first[1] + _BETWEEN)
    sequences = _PROMPTS * _SEQUENCES
    short, long = per_layer("bytes", first), per_layer("bytes", first, _LONG)
    return {
        "bytes_per_prompt_token_layer": (long - short) / (sequences * (_LONG - _SHORT)),
        "bytes_per_own_token_layer": (per_layer("bytes", second) - short) / (sequences * _BETWEEN),
        "operators_per_layer": per_layer("operators", first),
        "host_waits_per_step": found[3].between("waits", first, _SHORT),
    }


def bytes_per_cached_token(counted: Mapping[str, float], prompt: float, completion: float) -> float:
    """The mean over a context of a prompt of so many tokens and half a completion, as much as is there on average."""
    of_prompt, of_own = (counted[f"bytes_per_{kind}_token_layer"] for kind in ("prompt", "own"))
    return (prompt * of_prompt + completion / 2 * of_own) / (prompt + completion / 2)


class _Steps:
    """Calls of a side with a model of so many layers."""

    def __init__(self, make_side: Callable[[Any], Side], layers: int, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                counted_config(layers), dtype=torch.bfloat16
            )
        # No weight is looked at.
        self.side = make_side(model.to_empty(device=device))
        self.tallies: dict[tuple[int, int], Tally] = {}

    def between(self, of: str, steps: tuple[int, int], length: int) -> float:
        """A step's share of what `generate` does between these numbers of tokens."""
        few, many = (sum(getattr(self.tally(n, length), of).values()) for n in steps)
        return (many - few) / (steps[1] - steps[0])

    def tally(self, tokens: int, length: int) -> Tally:
        if (tokens, length) not in self.tallies:
            ids = np.full(length, 7)
            prompt = EncodedPrompt(ids, np.tile(np.arange(length), (3, 1)), length, (), -1)
            # The replay of a CUDA graph dispatches nothing: what would be captured is counted.
            uncaptured = patch("perl.rollout.decoding.slots.may_be_captured", lambda *_: False)
            with uncaptured, Tally(compute=False) as counted:
                self.side.sample([prompt] * _PROMPTS, _SEQUENCES, tokens, 0)
            self.tallies[tokens, length] = counted
        return self.tallies[tokens, length]


def counted_config(layers: int) -> Any:
    """Of Qwen2.5-VL-7B's attention in so many layers, with as little as can be beside it."""
    config = shape("7b")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.intermediate_size, text.vocab_size = layers, 64, 256
    text.layer_types = ["full_attention"] * layers
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 64, 2
    for k, name in enumerate(("vision_start", "vision_end", "image", "video")):
        setattr(config, f"{name}_token_id", k)
    return config


def described(setting: Setting, model: Any, tokens: list[int]) -> dict[str, Any]:
    """The setting, and what it came to on this machine."""
    own = asdict(setting)
    load = own.pop("workload")
    return {
        **{k: load[k] for k in ("images", "rollouts", "seed")},
        "prompts": load["orders"],
        "tokens": load["completion"],
        **own,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": tokens,
        **software(torch.device(setting.device)),
    }
