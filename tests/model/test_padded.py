"""Models without a family, on padded batches: equal to the stock model, sampled from, trained by the command line."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perl.cli import main
from perl.config import ModelConfig
from perl.data.tasks import vocabulary
from perl.model.head import HeadLoss
from perl.model.loading import _say_once, check_model, load_policy, load_processor
from perl.model.padded import PaddedBatch, PaddedPolicy, check_head
from perl.model.padded_processor import PaddedProcessor
from perl.model.processor import Processor
from perl.model.tiny import make_tokenizer
from perl.permutation import permute
from perl.rollout.engine import SamplingParams
from perl.rollout.engines import in_process
from perl.rollout.padded import PaddedEngine
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import EncodedImage, EncodedPrompt, Example, Message, Segment
from tests.messages import refused, tells
from tests.model.steps import (
    batch_logprobs,
    completions_of,
    furthest_gradient,
    picture,
    segments_of_samples,
)

CPU = torch.device("cpu")
CONFIG = ModelConfig()
WORDS = ["USER:", "ASSISTANT:", *vocabulary()]
TEMPLATE = """\
{%- for message in messages -%}
USER: {% for part in message.content -%}
{%- if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT: {% endif -%}
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA: a CLIP tower whose 28 x 28 pixels become four visual tokens, and a Llama."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<|endoftext|>", "<s>", "<|im_end|>", "<image>"]
    tokenizer = make_tokenizer(WORDS, special, {}, TEMPLATE)
    tokenizer.bos_token = "<s>"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=False
    )
    folder = tmp_path_factory.mktemp("llava")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 28, "width": 28}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def load(llava: Path) -> Callable[..., tuple[PaddedPolicy, PaddedProcessor]]:
    def load(config: ModelConfig = CONFIG) -> tuple[PaddedPolicy, PaddedProcessor]:
        policy = load_policy(str(llava), config, CPU)
        processor = load_processor(str(llava), config)
        assert isinstance(policy, PaddedPolicy) and isinstance(processor, PaddedProcessor)
        return policy.double(), processor

    return load


def segments_of(processor: Processor) -> list[Segment]:
    """Two orders of two images, one image, none; two, one and no completions, one of no token."""
    rng = np.random.default_rng(0)
    a, b = picture(28, 28, 1), picture(90, 60, 2)
    chats = [
        ((a, b), "A <image> B <image> which image shows two ?", (5, 2)),
        ((b, a), "A <image> B <image> which image shows two ?", (1, 0)),
        ((a,), "<image> which image", (7,)),
        ((), "which image", (3, 4)),
        ((b,), "<image> which image", ()),
    ]
    out = []
    for images, text, lengths in chats:
        prompt = processor.encode_messages((Message("user", text),), images)
        completions = tuple(rng.integers(10, len(WORDS), n) for n in lengths)
        out.append(Segment(prompt, completions, tuple(rng.normal(size=len(lengths)).tolist())))
    return out


def stock_logprobs(
    model: torch.nn.Module, processor: PaddedProcessor, segment: Segment, number: int
) -> torch.Tensor:
    """float64 [L]: one sequence through the model as transformers documents it."""
    raw, ids = segment.prompt.raw, torch.from_numpy(segment.completions[number])
    assert raw is not None
    inputs = dict(
        processor.stock(text=raw.text, images=list(raw.images) or None, return_tensors="pt")
    )
    prompt = inputs.pop("input_ids")
    assert prompt[0].tolist() == segment.prompt.input_ids.tolist()
    whole = torch.cat([prompt, ids[None]], dim=1)
    inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    logits = model(**inputs).logits[0, prompt.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(
    budget: int, load, llava: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    policy, processor = load()
    stock = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float64)
    segments = segments_of(processor)
    weights = torch.randn(22, dtype=torch.float64)
    found = {}
    for batch in policy.pack(segments, budget, share=True):
        assert isinstance(batch, PaddedBatch) and not batch.images
        assert batch.num_tokens <= budget or len(batch.prompts) == 1
        for (i, r), advantage in zip(batch.source, batch.advantages.tolist(), strict=True):
            assert advantage == pytest.approx(segments[i].advantages[r])
        found |= batch_logprobs(policy, batch)
    keys = completions_of(segments)
    assert sorted(found) == keys
    ours = torch.cat([found[key] for key in keys])
    theirs = torch.cat([stock_logprobs(stock, processor, segments[i], r) for i, r in keys])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradient, compared = furthest_gradient(policy, stock)
    assert gradient < 1e-6 and compared > 40


def test_weights_in_bfloat16_are_trained_and_sampled_from(load, llava: Path) -> None:
    exact, processor = load()
    half = replace(CONFIG, dtype="bfloat16", lora_rank=2)
    policy = load_policy(str(llava), half, CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    segments = segments_of(processor)
    [batch, *_] = policy.pack(segments, 10_000, share=True)
    ours, truth = (
        HeadLoss(p, processor.unsampled_token_ids(), 1.0).logprobs(batch).logprobs
        for p in (policy, exact)
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=0.01)
    policy(batch).square().sum().backward()
    assert sum(p.grad is not None for p in policy.parameters()) > 20
    completions = in_process(policy, processor, 1000).generate(
        [s.prompt for s in segments], SamplingParams(2, 1.0, 3), seed=0
    )
    assert all(len(c.token_ids) for each in completions for c in each)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (30, [[(0, 1), (0, 0), (2, 0)], [(1, 0)], [(1, 1)]]),
        (29, [[(0, 1), (0, 0)], [(2, 0)], [(1, 0)], [(1, 1)]]),
        (44, [[(0, 1), (0, 0), (2, 0)], [(1, 0), (1, 1)]]),
        (43, [[(0, 1), (0, 0), (2, 0)], [(1, 0)], [(1, 1)]]),
        (1, [[(0, 1)], [(0, 0)], [(2, 0)], [(1, 0)], [(1, 1)]]),
    ],
)
def test_rows_of_like_length_and_kind_share_a_batch(
    budget: int, expected: list[list[tuple[int, int]]]
) -> None:
    def segment(prompt: int, lengths: tuple[int, ...], *images: EncodedImage) -> Segment:
        ids = np.arange(prompt)
        encoded = EncodedPrompt(ids, ids[None], prompt, images, -1)
        return Segment(encoded, tuple(np.ones(n, int) for n in lengths), (1.0,) * len(lengths))

    image = EncodedImage("a", torch.empty(0), (), 0)
    segments = [segment(5, (2, 1)), segment(10, (2, 12), image), segment(8, (2,))]
    policy = PaddedPolicy.__new__(PaddedPolicy)
    batches = policy.pack(segments, budget, share=True)
    assert [list(batch.source) for batch in batches] == expected
    lengths = {(0, 0): 7, (0, 1): 6, (2, 0): 10, (1, 0): 12, (1, 1): 22}
    for batch, rows in zip(batches, expected, strict=True):
        assert batch.num_tokens == len(rows) * max(lengths[row] for row in rows)


def test_the_engine_samples_from_the_distribution_that_is_trained(load) -> None:
    policy, processor = load()
    policy.base.generation_config.top_k = 2  # A checkpoint's habits are not the policy's.
    prompts = [s.prompt for s in segments_of(processor)]
    engine = in_process(policy, processor, 2**12)
    assert isinstance(engine, PaddedEngine)
    out = engine.generate(prompts, SamplingParams(3, 0.7, 9), seed=1)
    assert [len(cs) for cs in out] == [3] * len(prompts)
    segments = segments_of_samples(prompts, out)
    head = HeadLoss(policy, processor.unsampled_token_ids(), temperature=0.7)
    for batch in policy.pack(segments, 50, share=True):
        expected = np.concatenate([out[i][r].logprobs for i, r in batch.source])
        np.testing.assert_allclose(head.logprobs(batch).logprobs, expected, atol=5e-6)
    ids = np.concatenate([c.token_ids for cs in out for c in cs])
    assert 3 not in ids and len(set(ids.tolist())) > 20
    for completion in (c for cs in out for c in cs):
        ended = completion.token_ids == processor.eos_token_id
        assert completion.finished == ended[-1] and not ended[:-1].any()
    again = engine.generate(prompts, SamplingParams(3, 0.7, 9), seed=1)
    assert [c.token_ids.tolist() for cs in out for c in cs] == [
        c.token_ids.tolist() for cs in again for c in cs
    ]


def test_greedy_is_the_most_likely_token_of_the_padded_model(load) -> None:
    policy, processor = load()
    prompts = [s.prompt for s in segments_of(processor)]
    engine = in_process(policy, processor, 2**12)
    for prompt, [completion] in zip(
        prompts, engine.generate(prompts, SamplingParams(1, 0.0, 4), seed=1), strict=True
    ):
        [batch] = policy.pack([Segment(prompt, (completion.token_ids,), (0.0,))], 99, share=False)
        logits = policy(batch) @ policy.head_weight.T
        logits[:, processor.unsampled_token_ids()] = -torch.inf
        assert logits.argmax(-1).tolist() == completion.token_ids.tolist()


def test_frozen_towers_and_adapters(load, tmp_path: Path) -> None:
    policy, processor = load(replace(CONFIG, freeze_vision=True, lora_rank=2))
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and "language_model" in n for n in trained)
    policy, _ = load(replace(CONFIG, freeze_vision=True))
    frozen = {n.split(".")[2] for n, p in policy.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"}
    policy.save_pretrained(tmp_path)
    processor.save(tmp_path)
    segments = segments_of(processor)
    [expected, *_] = policy.pack(segments, 999, share=True)
    again = load_policy(str(tmp_path), CONFIG, CPU).double()
    torch.testing.assert_close(again(expected), policy(expected))
    [*_, prompt, _] = segments_of(load_processor(str(tmp_path), CONFIG))
    assert prompt.prompt.input_ids.tolist() == segments[3].prompt.input_ids.tolist()


def test_what_is_lost_is_said_once(load, caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "perl"):
        load()
        load()
    [said] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    tells(said, "llava", "perl/model/families", "docs/models.md")


def test_a_step_on_the_command_line(llava: Path, short_recipe: Path) -> None:
    reward = short_recipe.with_name("reward.py")
    reward.write_text("def f(completions, **_): return [float(len(c)) for c in completions]")
    options = {
        "model.path": llava,
        "cold_start.steps": 1,
        "loss.preset": "grpo",
        "loss.kl_coef": 0.1,
        "train.updates_per_batch": 2,
        "reward.functions": f"{reward}:f",
        "reward.weights": 1,
    }
    arguments = [str(a) for k, v in options.items() for a in (f"--{k}", v)]
    with pytest.raises(SystemExit) as stop:
        main(["train", str(short_recipe), *arguments])
    assert not stop.value.code
    run = short_recipe.parent / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    row = [r for r in map(json.loads, lines) if r["stage"] == "rl"][-1]
    assert row["groups/kept"] and row["grad_norm"] > 0
    assert row["packing/image_sharing"] == 1 and row["packing/token_sharing"] <= 1
    assert row["images/shown"] > 0
    final = run / "models" / "final"
    assert check_model(str(final)) is None
    before, after = (load_policy(str(f), CONFIG, CPU).state_dict() for f in (llava, final))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_sliding_windows_are_not_packed(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("tiny-qwen2.5-vl"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8}
    config["text_config"]["layer_types"] = ["full_attention", "sliding_attention"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    assert check_model(str(tiny_folder("tiny-qwen2.5-vl"))) is not None
    assert check_model(str(folder)) is None


def test_a_head_that_is_no_plain_product_is_refused(load) -> None:
    policy, _ = load()
    check_head(policy.base, "folder", 5)
    policy.base.lm_head.bias = torch.nn.Parameter(torch.ones(len(policy.head_weight)).double())
    with refused("model.path", "folder", "LlavaForConditionalGeneration", "bias"):
        check_head(policy.base, "folder", 5)


def test_prompts_it_cannot_read(load) -> None:
    _, processor = load()
    with refused("row 3", "1 <image>", "0 images"):
        processor.encode_messages((Message("user", "<image> ?"),), (), "row 3")
    with refused("row 3", "<image>"):
        processor.encode_completion("three <image>", "row 3")
    assert processor.unsampled_token_ids().tolist() == [3]
    huge, tiny = picture(900, 600, 0), picture(3, 2, 0)
    prompt = processor.encode_messages((Message("user", "<image> <image>"),), (huge, tiny))
    assert prompt.raw is not None
    areas = [image.width * image.height for image in prompt.raw.images]
    assert areas == pytest.approx([CONFIG.max_pixels, CONFIG.min_pixels], rel=0.05)


def test_slots_are_no_control_tokens(load) -> None:
    """The slot is written like the model's own image token."""
    _, processor = load()
    one = Example("7", (picture(28, 28, 0),), "<image> <|im_end|> three", "A")
    with refused("example 7", "<|im_end|>"):
        processor.check_texts(one)
    encoder = PromptEncoder(processor, PromptLimit(99, ""), "error", None, "escape")
    ((asked, prompt),) = encoder.encode([permute(one, (0,))])
    assert asked.messages[0].content == "<image> < |im_end|> three"
    assert 2 not in prompt.input_ids.tolist() and prompt.input_ids.tolist().count(3) == 4


def test_a_shape_that_its_image_processor_refuses(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by headers; unusual ones are tried, once and after they are resized."""
    _, processor = load()
    tried = []

    def refuses(images: list[Image.Image], **_: Any) -> None:
        tried.append(images[0].size)
        if min(images[0].size) < 3:
            raise ValueError("sides below 3")

    monkeypatch.setattr(processor.stock, "image_processor", refuses)

    def of(*sizes: tuple[int, int]) -> Example:
        return Example("7", tuple(Image.new("RGB", size) for size in sizes), "?", "A")

    fine, thin, long = (300, 200), (10, 300), (2, 500)
    processor.check_shapes(of(fine, (30, 600)))
    assert tried == []
    for _ in range(2):
        processor.check_shapes(of(fine, thin))
        with refused("example 7, image 3", "2 x 500", "sides below 3"):
            processor.check_shapes(of(fine, thin, long))
    assert tried == [thin, long]
