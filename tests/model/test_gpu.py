"""On a CUDA device: the log-probs and gradients of the CPU for every attention that is installed, and whole runs."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from perl.cli import main
from perl.config import ModelConfig
from perl.data.tasks import vocabulary
from perl.model.head import HeadLoss
from perl.model.loading import load_policy, load_processor
from perl.model.packed.attention import IMPLEMENTATIONS
from perl.model.packed.flash import flash_attn_problem
from perl.model.packed.layout import AttentionArgs, PackedLayout
from perl.model.packed.pack import pack_row
from perl.model.policy import Policy
from perl.model.processor import Processor
from perl.model.tiny import (
    TINY_QWEN,
    make_image_processor,
    save_processor,
    tiny_config,
    tiny_tokenizer,
)
from perl.rollout.engine import InProcessEngine, SamplingParams
from perl.training.components import deterministic
from perl.types import EncodedPrompt, Message, Segment
from tests.model.steps import (
    picture,
    segments_of_samples,
    shared_step,
    stock_inputs,
    stock_model,
)

pytestmark = pytest.mark.gpu

INSTALLED = ["sdpa", "flex", "varlen", *([] if flash_attn_problem() else ["flash_attention_2"])]
IN_BFLOAT16 = ("varlen", "flash_attention_2")
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
MOST = 2.0
"""How many times as much as PyTorch's or transformers' own computation in bfloat16 ours may lose against float32."""


def off(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """Euclidean norm of the error over that of the result, all tensors together."""
    pairs = [(a.cpu().double(), b.cpu().double()) for a, b in zip(found, exact, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return (error / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def with_gradients(
    attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """What it gives, and gradients of the inputs."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = attend(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]


@pytest.mark.parametrize("attention", INSTALLED)
def test_attention_with_the_heads_of_7b(attention: str) -> None:
    """28 heads over 4 of dimension 128, in bfloat16: two prompts of 300 and 77 tokens, three completions each."""
    sizes = [(300, (130, 64, 1)), (77, (5, 200, 33))]
    starts, prefixes, seen, at = [], [], [], 0
    for prompt, completions in sizes:
        first, here = at, at
        for number, length in enumerate(completions):
            begin = first if number == 0 else here
            starts.append(begin)
            prefixes.append((first, prompt if number else 0))
            here += length + (0 if number else prompt)
            own = torch.arange(begin, here)
            keys = torch.cat([torch.arange(first, first + prompt), own]).unique()
            seen += [(int(q), keys[keys <= q]) for q in own]
        at = here
    places, lengths = (torch.tensor(x) for x in zip(*prefixes, strict=True))
    layout = PackedLayout(torch.tensor([*starts, at]), places, lengths, DEVICE)
    mask = torch.zeros(at, at, dtype=torch.bool)
    for query, keys in seen:
        mask[query, keys] = True
    mask = mask.to(DEVICE)
    inputs = [torch.randn(1, heads, at, 128, device=DEVICE).bfloat16() for heads in (28, 4, 4)]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return IMPLEMENTATIONS[attention](q, k, v, layout, AttentionArgs())

    exact = with_gradients(dense, inputs, torch.float32)
    lost = with_gradients(dense, inputs, torch.bfloat16)
    for found, torchs, right in zip(
        with_gradients(ours, inputs, torch.bfloat16), lost, exact, strict=True
    ):
        assert off([found], [right]) <= MOST * off([torchs], [right])


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of two layers with 28 heads over 4 of dimension 128."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = tiny_tokenizer("tiny-qwen2.5-vl", vocabulary())
    config = tiny_config("tiny-qwen2.5-vl", tokenizer)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 3584, 28, 4
    text.num_hidden_layers, text.layer_types = 2, ["full_attention"] * 2
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.out_hidden_size = 3584
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    save_processor(tokenizer, make_image_processor(config.vision_config), folder)
    return folder


@pytest.mark.parametrize("attention", IN_BFLOAT16)
def test_decoding_through_graphs_and_without_is_the_same(
    attention: str, wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention not in INSTALLED:
        pytest.skip("not installed")
    folder, replayed = str(wide_folder), []
    config = ModelConfig(attention=attention, dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    processor = load_processor(folder, config)
    policy = load_policy(folder, config, DEVICE).to(DEVICE)
    engine = InProcessEngine(policy, processor, 4096)
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))
    )
    found = []
    for _ in range(2):
        out = engine.generate(two_orders(processor), SamplingParams(3, 1.0, 40), 1)
        found.append([(c.token_ids.tolist(), c.logprobs.tolist()) for cs in out for c in cs])
        monkeypatch.setattr("perl.rollout.decoding.slots.may_be_captured", lambda *_: False)
    assert found[0] == found[1]
    assert replayed or DEVICE == CPU


def two_orders(processor: Processor) -> list[EncodedPrompt]:
    pictures = [picture(28, 28, 0), picture(90, 60, 1)]
    message = (Message("user", "A <image> B <image> which image ?"),)
    return [processor.encode_messages(message, order) for order in (pictures, pictures[::-1])]


@torch.no_grad()
def stocks_logprobs(
    model: Any, prompt: EncodedPrompt, completion: np.ndarray, banned: torch.Tensor
) -> torch.Tensor:
    """transformers' own, of one sequence, among the tokens that may be sampled."""
    model.model.rope_deltas = None
    inputs = {k: v.to(DEVICE) for k, v in stock_inputs(model, prompt, completion).items()}
    logits = model(**inputs).logits[0, len(prompt.input_ids) - 1 : -1].float().cpu()
    logits[:, banned] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.from_numpy(completion)[:, None]).squeeze(1)


@pytest.mark.parametrize("attention", IN_BFLOAT16)
def test_decoding_with_the_heads_of_7b(attention: str, wide_folder: Path) -> None:
    """Log-probs of the engine and of packed rows, against float32, beside those of transformers in bfloat16."""
    if attention not in INSTALLED:
        pytest.skip("not installed")
    folder = str(wide_folder)
    config = ModelConfig(attention=attention, dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    processor = load_processor(folder, config)
    prompts, banned = two_orders(processor), processor.unsampled_token_ids()
    there = load_policy(folder, config, DEVICE).to(DEVICE)
    out = InProcessEngine(there, processor, 4096).generate(prompts, SamplingParams(3, 1.0, 40), 1)
    segments = segments_of_samples(prompts, out)
    batch = pack_row(segments)
    packed = HeadLoss(there, banned, 1.0).logprobs(batch).logprobs
    here = load_policy(folder, ModelConfig(dtype="float32"), CPU)
    exact = HeadLoss(here, banned, 1.0).logprobs(batch).logprobs
    stock = stock_model(wide_folder).to(DEVICE, torch.bfloat16)
    theirs = [stocks_logprobs(stock, s.prompt, c, banned) for s in segments for c in s.completions]
    lost = off([torch.cat(theirs)], [exact])
    engines = torch.from_numpy(np.concatenate([c.logprobs for cs in out for c in cs]))
    assert off([packed], [exact]) <= MOST * lost
    assert off([engines], [exact]) <= MOST * lost


@pytest.mark.parametrize("attention", INSTALLED)
@pytest.mark.parametrize("name", TINY_QWEN)
def test_logprobs_and_gradients_are_those_of_the_cpu(
    name: str, attention: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Of samples; gradients of shared prompts over two rows, with a trained tower and checkpointing."""
    folder = str(tiny_folder(name))
    config = ModelConfig(
        max_pixels=28 * 28 * 16, gradient_checkpointing=1.0, dtype="float32", attention="sdpa"
    )
    processor = load_processor(folder, config)
    prompts, banned = two_orders(processor), processor.unsampled_token_ids()
    half = attention in IN_BFLOAT16
    own = replace(config, attention=attention, dtype="bfloat16" if half else "float32")
    there = load_policy(folder, own, DEVICE).to(DEVICE)
    out = InProcessEngine(there, processor, 4096).generate(prompts, SamplingParams(3, 1.0, 9), 1)
    batch = pack_row(segments_of_samples(prompts, out))
    rng = np.random.default_rng(0)
    segments = [
        Segment(p, tuple(rng.integers(20, 60, n) for n in (30, 9, 1)), (1.0,) * 3) for p in prompts
    ]

    def computed(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logprobs = HeadLoss(policy, banned, 1.0).logprobs(batch).logprobs
        shared_step(policy.train(), segments, 80)
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        return logprobs, gradients

    logprobs, gradients = computed(load_policy(folder, config, CPU))
    allowed = [1e-4, 1e-4]
    if half:  # What the same weights lose in bfloat16 on the CPU.
        lost = computed(load_policy(folder, replace(config, dtype="bfloat16"), CPU))
        allowed = [MOST * off([lost[0]], [logprobs]), MOST * off(lost[1], gradients)]
    found = computed(there)
    of_engine = torch.from_numpy(np.concatenate([c.logprobs for cs in out for c in cs]))
    assert off([found[0]], [logprobs]) <= allowed[0]
    assert off([of_engine], [logprobs]) <= allowed[0]
    assert off(found[1], gradients) <= allowed[1]


@pytest.mark.parametrize("attention", INSTALLED)
def test_a_deterministic_update_gives_the_same_bits_again(
    attention: str, tiny_folder: Callable[[str], Path]
) -> None:
    folder, dtype = (
        str(tiny_folder("tiny-qwen2.5-vl")),
        "float32" if attention == "flex" else "bfloat16",
    )
    config = ModelConfig(attention=attention, dtype=dtype)  # pyright: ignore[reportArgumentType]
    prompts = two_orders(load_processor(folder, config))
    completions = tuple(np.arange(n) % 40 + 20 for n in (300, 90, 41))
    segments = [Segment(p, completions, (1.0,) * 3) for p in prompts]
    policy = load_policy(folder, config, DEVICE).to(DEVICE).train()
    found = []
    with deterministic(True):
        for _ in range(2):
            policy.zero_grad(set_to_none=True)
            logprobs = shared_step(policy, segments, 10**5)
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            found.append([*logprobs.values(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("more", ["", "--model.compile True", "--model.liger True"])
@pytest.mark.parametrize("attention", INSTALLED)
def test_a_run(attention: str, more: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (
        "--run.seeds --run.trackers --cold-start.steps 30 --train.steps 3 --eval.examples 4 "
        f"--train.updates-per-batch 2 --model.attention {attention} {more} "
        f"--model.dtype {'float32' if attention == 'flex' else 'bfloat16'}"
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", "demo", "--run.dir", str(folder), *options.split()])
    assert stop.value.code == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cold = [r["loss"] for r in rows if r["stage"] == "cold_start"]
    assert cold[-1] < 0.8 * cold[0]
    assert all(math.isfinite(r["reward/mean"]) for r in rows if r["stage"] == "rl")
    assert json.loads((folder / "summary.json").read_text())["device"].startswith("cuda")
