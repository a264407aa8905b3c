"""`perl-rl generate`: a model is asked about images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from perl.config import (
    EVAL_SEED,
    Command,
    Config,
    Count,
    EngineConfig,
    MeasureConfig,
    NotNegative,
    Positive,
    Seed,
)
from perl.recipe import check_options
from perl.types import IMAGE_SLOT, EncodedImage, Example, Message, UserError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Generate(Command):
    """Ask a model about images, or about a held-out example of its run."""

    model: Positional[str] = ""
    """A run folder (its newest model), a checkpoint, a model or LoRA adapter folder, or a hub name."""
    prompt: str = ""
    """The question; `<image>` marks where each image goes, else they stand before it."""
    images: tuple[Path, ...] = ()
    """Image files, in the order of their slots."""
    example: Count | None = None
    """Number of one of the examples that the run is evaluated on, from 0, instead of prompt and images."""
    n: Positive = 1
    """Completions."""
    temperature: NotNegative | None = None
    """0: the most likely completion; empty: 0 for one completion, 1 for several."""
    max_new_tokens: Positive | None = None
    """Longest completion; empty: the run's."""
    seed: Seed = 0
    """Of the sampling."""
    rollout: EngineConfig = field(default_factory=EngineConfig)
    save_images: Path | None = None
    """Folder for the pictures as the model sees them: image-1.png, image-2.png, ... in the order shown."""

    def execute(self) -> None:
        from perl.permutation import permute
        from perl.rollout.engine import SamplingParams
        from perl.rollout.opening import config_of, engine_and_encoder

        check_options(self)
        if self.example is not None and (self.prompt or self.images):
            raise UserError("give --example or --prompt with --images, not both")
        config = config_of(self.model, rollout=asdict(self.rollout))
        longest = self.max_new_tokens or config.rollout.max_new_tokens
        example = _held_out(config, self.example) if self.example is not None else _asked(self)
        engine, encoder = engine_and_encoder(config)
        asked = permute(example, range(len(example.images)))
        if self.example is not None:
            asked = encoder.ask(asked)
        prompt = encoder.processor.encode_messages(asked.messages, example.images, example.id)
        if unknown := encoder.processor.unknown_words(asked.messages):
            print(f"words the model does not know: {', '.join(unknown)}", file=sys.stderr)
        _tell_pictures(example.images, prompt.images, self.save_images)
        usual = 1.0 if self.n > 1 else 0.0
        temperature = usual if self.temperature is None else self.temperature
        params = replace(
            SamplingParams.of(config.rollout, self.n),
            temperature=temperature,
            max_new_tokens=longest,
        )
        if self.example is not None:
            for message in asked.messages[:-1]:
                print(f"{message.role}: {message.content}")
            print(
                f"question: {asked.messages[-1].content}\nright answer: {example.answer or '(none)'}"
            )
        for completion in engine.generate([prompt], params, self.seed)[0]:
            text = encoder.processor.decode(completion.token_ids)
            print(text if completion.finished else f"{text} [cut at {longest} tokens]")


def _tell_pictures(
    images: Sequence[Image.Image], encoded: Sequence[EncodedImage], folder: Path | None
) -> None:
    """Say which pictures are shown in which order, and save them."""
    from perl.data.pictures import FILE
    from perl.report.gallery import as_shown

    if folder:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--save-images {folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
    for number, (image, e) in enumerate(zip(images, encoded, strict=True), 1):
        shown = as_shown(e, image)
        said = [image.info.get(FILE, ""), _size(image)]
        said += [f"seen as {_size(shown)}"] if shown.size != image.size else []
        print(f"image {number}: {', '.join(filter(None, said))}", file=sys.stderr)
        if folder:
            shown.save(folder / f"image-{number}.png")


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def _asked(command: Generate) -> Example:
    """The prompt and image files of the command line."""
    from perl.data.pictures import open_image

    if not command.prompt:
        raise UserError("perl-rl generate needs --prompt, with --images, or --example")
    images = tuple(open_image(path, str(path)) for path in command.images)
    text = command.prompt
    if IMAGE_SLOT not in text:
        text = " ".join([*[IMAGE_SLOT] * len(images), text])
    return Example("--prompt", images, (Message("user", text),), answer="")


def _held_out(config: Config, number: int) -> Example:
    from perl.data.dataset import load_examples

    if not config.data.eval:
        raise UserError(
            f"--example {number} is one of a run's data.eval, and there is none; give --prompt and --images"
        )
    count = config.eval.examples or MeasureConfig().examples
    examples = load_examples(config.data.eval, config.data, "test", EVAL_SEED, count)
    if number >= len(examples):
        raise UserError(
            f"--example {number}: the run is evaluated on {len(examples)} examples, numbered from 0"
        )
    return examples[number]
