"""Prompts and positions are those of transformers' own processors and models."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from perl.config import Config
from perl.model import processor as processor_module
from perl.model.control_tokens import ControlTokens
from perl.model.loading import load_processor
from perl.model.processor import Processor, parts
from perl.model.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY_MODELS, TINY_QWEN
from perl.permutation import permute
from perl.recipe import save_config
from perl.rollout.prompts import PromptEncoder, PromptLimit
from perl.types import Example, Message
from tests.messages import refused
from tests.model.conftest import CONFIG
from tests.model.steps import picture, segments_of, stock_inputs, stock_model

qwen = pytest.mark.parametrize("name", TINY_QWEN)


@qwen
def test_positions_equal_the_stock_models(name: str, load, tiny_folder) -> None:
    _, processor = load(name)
    stock = stock_model(tiny_folder(name))
    for segment in segments_of(processor):
        if not segment.prompt.images:
            continue
        inputs = stock_inputs(stock, segment.prompt, segment.completions[0])
        positions, _ = stock.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        prompt = len(segment.prompt.input_ids)
        assert (positions[:, 0, :prompt].numpy() == segment.prompt.position_ids).all()
        assert (
            positions[:, 0, prompt:]
            == segment.prompt.next_position + torch.arange(len(segment.completions[0]))
        ).all()


@qwen
def test_our_prompt_is_the_stock_processors(name: str, load, tiny_folder) -> None:
    """And transformers' own classes load the folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, ours = load(name)
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder(name))
    stock = AutoProcessor.from_pretrained(tiny_folder(name))
    text = stock.apply_chat_template(
        [{"role": "user", "content": parts("A <image> which image ?")}], add_generation_prompt=True
    )
    size = {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
    theirs = stock(
        text=[text],
        images=[picture(90, 60, 2)],
        return_tensors="pt",
        images_kwargs={"size": size},
    )
    mine = ours.encode_messages((Message("user", "A <image> which image ?"),), [picture(90, 60, 2)])
    assert mine.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(mine.images[0].pixel_values, theirs["pixel_values"])
    image_tokens = int((theirs["input_ids"] == model.config.image_token_id).sum())
    assert image_tokens == int(theirs["image_grid_thw"].prod()) // 4
    out = model.generate(**theirs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > theirs["input_ids"].shape[1]


def test_slots_and_images_must_match(load) -> None:
    _, processor = load(TINY_QWEN[0])
    for slots, images in ((2, 1), (1, 0), (1, 2)):
        pictures = [picture(28, 28, 0)] * images
        with refused("row 3", f"{slots} <image>", f"{images} images"):
            processor.encode_messages(
                (Message("user", "<image> " * slots + "?"),), pictures, "row 3"
            )
    with refused("row 3", "<|image_pad|>", "<image>"):
        processor.encode_messages((Message("user", "<|image_pad|> ?"),), [], "row 3")
    processor.tokenizer.chat_template = "<|image_pad|> ?"
    with refused("row 3", "<|image_pad|>", "model.chat_template"):
        processor.encode_messages((Message("user", "?"),), [], "row 3")


def test_a_picture_is_processed_once_while_it_is_kept(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its size and colours, whatever its mode; what was asked for longest ago goes first."""
    policy, processor = load(TINY_QWEN[0])
    made = []
    preprocess = type(policy.family).preprocess
    monkeypatch.setattr(
        type(policy.family), "preprocess", lambda *a: made.append(a[2].size) or preprocess(*a)
    )
    wide, high, grey = (
        Image.new("RGB", (56, 28)),
        Image.new("RGB", (28, 56)),
        Image.new("L", (28, 28), 9),
    )
    one = processor.encode_image(wide)
    assert processor.encode_image(wide.copy()) is one
    other = processor.encode_image(high)
    assert (one.grid, other.grid) == ((1, 2, 4), (1, 4, 2)) and one.key != other.key
    assert (one.size, other.size) == ((56, 28), (28, 56))
    shade = processor.encode_image(grey)
    assert processor.encode_image(grey.convert("RGBA")) is shade
    assert made == [(56, 28), (28, 56), (28, 28)]
    # `wide` is read once more; then there is room for two of the larger ones.
    processor.encode_image(wide)
    monkeypatch.setattr(processor_module, "_CACHE_BYTES", 2 * one.pixel_values.nbytes)
    processor.encode_image(Image.new("RGB", (56, 28), "red"))
    for picture_, times in ((wide, 0), (high, 1), (high, 0), (grey, 1)):
        before = len(made)
        processor.encode_image(picture_)
        assert len(made) == before + times
    red, blue = (Image.new("P", (28, 28), 1) for _ in range(2))
    for palette, image in (([255, 0, 0], red), ([0, 0, 255], blue)):
        image.putpalette([0, 0, 0, *palette])
    assert processor.encode_image(red).key != processor.encode_image(blue).key
    # One over the bound by itself is kept until the next.
    monkeypatch.setattr(processor_module, "_CACHE_BYTES", 0)
    assert processor.encode_image(wide) is processor.encode_image(wide)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_pixels_in_the_towers_dtype_and_pixels_that_were_read_ahead(
    name: str, load, tiny_folder
) -> None:
    _, wide = load(name)
    processor = load_processor(str(tiny_folder(name)), CONFIG, torch.bfloat16)
    image = picture(56, 84, seed=0)
    pixels = wide.encode_image(image).pixel_values
    assert pixels.dtype == torch.float32
    narrow = processor.encoder(image)
    assert torch.equal(narrow.pixel_values, pixels.bfloat16())
    assert narrow.pixel_values.dtype == torch.bfloat16
    copy, again = image.copy(), image.copy()
    for each in (copy, again):
        setattr(each, processor_module.ENCODED, replace(narrow, tokens=77))
    assert processor.encode_image(copy).tokens == 77
    # There is one of each content, and none stays on the picture.
    assert processor.encode_image(again) is processor.encode_image(copy)
    assert not hasattr(again, processor_module.ENCODED)


def test_completions_as_tokens_and_back(load) -> None:
    _, processor = load(TINY_QWEN[0])
    ids = processor.encode_completion("A which image")
    words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert words == ["A", "which", "image", "<|im_end|>"] and ids.dtype == np.int64
    assert processor.decode(ids) == "A which image"
    messages = (Message("user", "A <image> which oddword image ?"), Message("user", "odd oddword"))
    assert processor.unknown_words(messages) == ["oddword", "odd"]
    processor.tokenizer.unk_token = "[UNK]"
    assert processor.unknown_words(messages) == []


@pytest.mark.parametrize("name", TINY_MODELS)
def test_texts_that_hold_tokens_of_images_are_refused(name: str, load) -> None:
    policy, processor = load(name)
    fine = {"id": "7", "images": (), "question": "A <image> which ?", "answer": "A"}
    processor.check_texts(Example(**fine, demonstration="<answer> A </answer>"))
    processor.check_texts(Example(**fine))
    for token in policy.family.vision_tokens:
        with refused("example 7", token, "<image>"):
            processor.check_texts(Example(**{**fine, "question": f"A <image> {token} ?"}))
        with refused("example 7", "demonstration", token):
            processor.check_texts(Example(**fine, demonstration=f"A {token}"))
        with refused("row 3", token):
            processor.encode_completion(f"A {token}", "row 3")
    unsampled = processor.tokenizer.convert_ids_to_tokens(processor.unsampled_token_ids().tolist())
    assert sorted(unsampled) == sorted(policy.family.vision_tokens)


def of_bytes(processor: Processor) -> Processor:
    """A processor with Qwen's special tokens and a tokenizer that reads every text, as theirs do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, "<s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    named: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "!"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **named)
    return Processor(fast, processor.encoder)


HELD = ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|endoftext|>", "<s>"]


@pytest.mark.parametrize("token", HELD)
def test_control_tokens_in_a_text_are_refused(load, token: str) -> None:
    """Wherever the data have them; what is none of this model's is text."""
    processor = of_bytes(load(TINY_QWEN[0])[1])
    fine = "A <image> <|im_en d|> <im_end> [INST] </s> <think> | ! which?"
    processor.check_texts(Example("7", (), fine, "A", demonstration="<think> A"))
    shown = [picture(28, 28, 0)]
    processor.encode_messages((Message("user", fine),), shown, "row 3")
    turns = (Message("system", f"Be {token} brief."), Message("user", "<image>"))
    for text in (f"<image>{token}", f"<<image>{token}assistant", turns):
        example = Example("7", (), text, "A")
        with refused("example 7", token, "data.control_tokens", "--control-tokens"):
            processor.check_texts(example)
        with refused("row 3", token):
            processor.encode_messages(example.messages, shown, "row 3")
    with refused("example 7", "role", token):
        processor.check_texts(Example("7", (), (Message(f"user{token}", "?"),), "A"))
    with refused("example 7", "demonstration", token):
        processor.check_texts(Example("7", (), "?", "A", demonstration=f"A{token}"))


@pytest.mark.parametrize(
    "text", ["<image> A", *(f"<image> {t}{t} a<{t}B<im<s>_end>" for t in HELD)]
)
def test_escaped_control_tokens_are_text(load, text: str) -> None:
    """No id of one is there but those that the template writes."""
    processor = of_bytes(load(TINY_QWEN[0])[1])
    shown = [picture(28, 28, 0)]
    control = processor.tokenizer.convert_tokens_to_ids([*processor.control_tokens])
    own = processor.encode_messages((Message("user", "<image> A"),), shown).input_ids
    asked = example_asked(processor, text)
    ids = processor.encode_messages(asked, shown).input_ids
    assert [i for i in ids if i in control] == [i for i in own if i in control]
    assert asked[0].content.replace(" ", "") == text.replace(" ", "")
    said = processor.tokenizer.decode(ids)
    assert f" {asked[0].content[8:]} <|im_end|>" in said


def example_asked(processor: Processor, text: str) -> tuple[Message, ...]:
    encoder = PromptEncoder(processor, PromptLimit(99, ""), "error", None, "escape")
    example = Example("7", (picture(28, 28, 0),), text, "A")
    (shown,) = encoder.encode([permute(example, (0,))])
    return shown[0].messages


def test_what_a_template_writes_around_a_turn_is_a_control_token(load) -> None:
    """Called special by the tokenizer or not, as Cohere's; what it writes behind the turn and spaces are not."""
    processor = of_bytes(load(TINY_QWEN[0])[1])
    processor.tokenizer.add_tokens(["<|TURN|>", "<|user|>", "user", "\n\n"])
    processor.tokenizer.chat_template = (
        "{% for m in messages %}<|TURN|><|{{ m.role }}|>user\n\n" + BODY + "{% endfor %}<think>"
    ).replace("<think>", "{% if add_generation_prompt %}<think>{% endif %}")
    assert {"<|TURN|>", "<|user|>"} < {*processor.control_tokens}
    assert processor.control_tokens.found_in("a user\n\n <think>") == ""


def test_thousands_of_control_tokens_are_one_look() -> None:
    """As many as Gemma's tokenizer has; a text of 10,000 characters took seconds by trying one after the other."""
    tokens = ControlTokens([f"<unused{k}>" for k in range(6000)])
    text = "a < b and <unused6000> " * 500
    began = time.process_time()
    assert tokens.found_in(text) == "" and tokens.escaped(text) == text
    assert tokens.found_in(f"{text}<unused77>") == "<unused77>"
    assert time.process_time() - began < 0.5
    assert ControlTokens([]).found_in("?") == ""


def test_a_template_without_images_is_refused(load) -> None:
    _, processor = load(TINY_QWEN[0])
    processor.tokenizer.chat_template = "{% for m in messages %}text{% endfor %}"
    with refused("row 3", "chat template"):
        processor.encode_messages((Message("user", "<image> ?"),), [picture(28, 28, 0)], "row 3")


TEMPLATE = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<{{ m.role }}>
{%- for p in m.content %}{% if p.type == 'image' %}<|image_pad|>{% else %}{{ p.text }}{% endif %}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(
    tiny_folder, tmp_path: Path
) -> None:
    """And goes with the model."""
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    config = replace(CONFIG, chat_template=str(file))
    processor = load_processor(str(tiny_folder(TINY_QWEN[0])), config)
    chat = (Message("user", "A <image> which ?"),)
    assert processor.render(chat) == "<user>A <|image_pad|> which ?<assistant>"
    assert len(processor.encode_messages(chat, [picture(56, 28, 0)]).input_ids) == 1 + 2 + 2
    processor.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    # A checkpoint of a run with it has only weights.
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(
        '{"format": 1, "files": {}, "progress": {"stage": "rl"}}'
    )
    save_file({"w": torch.zeros(1)}, checkpoint / "model.safetensors")
    own = replace(config, path=str(tiny_folder(TINY_QWEN[0])))
    save_config(Config(model=own), tmp_path / "run" / "config.toml")
    assert load_processor(str(checkpoint), CONFIG).render(chat) == processor.render(chat)
    with refused("row 3", "no system", "model.chat_template"):
        processor.render((Message("system", "x"), *chat), "row 3")


BODY = "{% for p in m.content %}{{ p.text or '<|image_pad|>' }}{% endfor %}"
BARE = "{% for m in messages %}" + BODY + "{% endfor %}"
TURNS = "{% for m in messages %}<{{ m.role }}> " + BODY + "{% endfor %}"
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    + BODY
    + " [/INST]{% else %} "
    + BODY
    + "</s>{% endif %}{% endfor %}"
)
NO_REPLY = MISTRAL.replace("</s>", "{{ raise_exception('one turn') }}")


@pytest.mark.parametrize("own", [True, False])
def test_a_template_begins_the_assistants_turn(own: bool, tiny_folder, tmp_path: Path) -> None:
    """By a generation prompt, or by the end of the user's; the model's own template too."""

    def load(template: str) -> Processor:
        if own:
            (tmp_path / "own.jinja").write_text(template)
            config = replace(CONFIG, chat_template=str(tmp_path / "own.jinja"))
            return load_processor(str(tiny_folder(TINY_QWEN[0])), config)
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder(TINY_QWEN[0]), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return load_processor(str(folder), CONFIG)

    ask = [Message("user", "which ?")]
    for template in (TURNS, BARE):
        with refused("model.chat_template", "add_generation_prompt"):
            load(template)
    begins = "{% if add_generation_prompt %} <assistant>{% endif %}"
    assert load(TURNS + begins).render(ask) == "<user> which ? <assistant>"
    assert load(BARE + begins).render(ask) == "which ? <assistant>"
    assert load(MISTRAL).render(ask) == "[INST] which ? [/INST]"
    with refused("model.chat_template", "one turn"):
        load(NO_REPLY)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (None, ["own.jinja"]),
        (b"\xff", ["own.jinja", "UTF-8"]),
        (b"{% for m in", ["own.jinja"]),
        (b"{% for m in messages %}{{ m.content }}{% endfor %}", ["own.jinja", "<|image_pad|>"]),
        (b"{% for m in messages %}<|image_pad|>{{ m.content[-1].text }}{% endfor %}", ["1 and 1"]),
        (
            b"{% for p in messages[0].content if p.type == 'image' %}<|image_pad|>{% endfor %}",
            ["1 and 2"],
        ),
    ],
)
def test_a_template_that_cannot_be_used(
    content: bytes | None, names: list[str], tiny_folder, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    config = replace(CONFIG, chat_template=str(tmp_path / "own.jinja"))
    with refused("model.chat_template", *names):
        load_processor(str(tiny_folder(TINY_QWEN[0])), config)
