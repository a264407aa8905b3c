"""What a recipe will show a model, as its chat template writes it, and what the rewards give for a right answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from perl.config import Config
from perl.recipe import Stage, check_named, plan
from perl.types import Rollout, UserError

if TYPE_CHECKING:
    from perl.model.processor import Processor
    from perl.rewards.forms import Form
    from perl.rewards.scorer import Scorer
    from perl.rollout.prompts import PromptEncoder, Shown

    Read = dict[str, tuple[Form, ...]]


def preview_recipe(config: Config, n: int, name: str = "") -> None:
    """Print `n` training questions of each data source of a stage, in the orders of their images that the first epoch has,
    and what rewards give for their right answers; of a cold start in the original order and with their demonstrations.
    Nothing is held out.

    Raises:
        UserError: a recipe that names no data or no model, or has no such stage.
    """
    from perl.data.dataset import load_examples
    from perl.data.streams import training_sources
    from perl.permutation import permute
    from perl.rewards.forms import forms_of
    from perl.rewards.scorer import Scorer
    from perl.rollout.collect import drawn_orders
    from perl.rollout.instruction import Instruction, is_taught, spread, warn_of_prompts
    from perl.rollout.prompts import PromptEncoder, PromptLimit

    check_named(config)
    stage = _stage(config, name)
    config = stage.config
    seed = config.run.seed
    data = [
        (source, load_examples(source, replace(config.data, eval=""), "train", seed))
        for source, _ in training_sources(config.data)
    ]
    reward = config.reward
    scorer = Scorer(reward.functions, reward.weights, reward.timeout)
    read = forms_of(reward.functions, reward.weights)
    with processor_of(config) as processor:
        limit = PromptLimit.to_train(config)
        asked = Instruction.of(config)
        encoder = PromptEncoder(
            processor, limit, config.data.overlong, asked, config.data.control_tokens
        )
        asked = encoder.instruction
        warn_of_prompts(config, asked, processor, data)
        print(f"instruction ({asked.why}): {asked.text or 'none'}")
        if asked.text:
            print(f"it ends the {asked.place} message of every question that does not ask already")
        if asked.system:
            print(f"system message, where a question has none: {asked.system}")
        for source, dataset in data:
            for i in spread(dataset.size, n):
                example = dataset[i]
                text, rate = config.permutation.text, config.permutation.rate
                some = drawn_orders(stage, example, rate, epoch=0)
                if stage.kind == "cold_start":
                    some = [tuple(range(len(example.images)))]
                print(f"\n=== {source}: {example.id}")
                shown = encoder.encode([permute(example, o, text) for o in some])
                for pair in shown:
                    _show(pair, encoder, scorer, read, stage, is_taught(config))
                if not shown:
                    print(f"left out: it has more tokens than {limit.name}")


def _stage(config: Config, name: str) -> Stage:
    stages = plan(config)
    found = [s for s in stages if (s.name == name if name else s.kind == "rl")]
    if not found:
        raise UserError(
            f"--stage {name or 'rl'}: the recipe has no such stage; choose {', '.join(s.name for s in stages)}"
        )
    return found[0]


@contextmanager
def processor_of(config: Config) -> Iterator[Processor]:
    """The model's; a tiny model that training would make is made for it, and removed."""
    from perl.data.dataset import BUNDLED
    from perl.data.tasks import vocabulary
    from perl.model.loading import load_processor
    from perl.model.tiny import TINY_MODELS, make_tiny_model

    if config.model.path not in TINY_MODELS:
        yield load_processor(config.model.path, config.model)
        return
    source = config.data.train
    with TemporaryDirectory() as folder:
        words = vocabulary(source.removeprefix(BUNDLED) if source.startswith(BUNDLED) else "digits")
        make_tiny_model(config.model.path, words, Path(folder), 0)
        yield load_processor(folder, config.model)


def _show(
    pair: Shown, encoder: PromptEncoder, scorer: Scorer, read: Read, stage: Stage, taught: bool
) -> None:
    """One order: the prompt, its tokens, the right answer or the demonstration of a cold start, and its rewards."""
    from perl.evaluation.trial import right_answer

    variant, prompt = pair
    processor, answer = encoder.processor, variant.answer
    text = processor.render(variant.messages, variant.example.id)
    order = " ".join(str(i + 1) for i in variant.order)
    tokens = f"{len(prompt.input_ids)} of at most {encoder.limit.tokens} tokens"
    print(f"\n--- images in the order {order or '(none)'}: {tokens}")
    print(with_sizes(text, processor.image_token, pair))
    demonstration, remark = variant.example.demonstration, ""
    if stage.kind == "cold_start":
        if demonstration is None:
            print("demonstration: none in the data, and the cold start needs one")
            return
        completion = demonstration
        said = f"demonstration: {completion}"
    elif not answer:
        print("right answer: none in the data")
        return
    else:
        shown = demonstration if taught else None
        completion, unasked = right_answer(text, shown or "", answer, read)
        said = f"right answer: {answer}, as {completion}"
        remark = "; no prompt asks for this form" if unasked else ""
    ids = processor.encode_completion(completion)
    rollout = Rollout(variant, prompt, ids, 0.0 * ids.astype("float32"), completion, finished=True)
    total, parts = scorer.score_rollouts([rollout], lenient=not answer)
    given = ", ".join(f"{name} {_number(values[0])}" for name, values in parts.items())
    print(f"{said}: reward {_number(total[0])} ({given}){remark}")


def with_sizes(text: str, token: str, pair: Shown) -> str:
    """The template's text with every image token as what stands there."""
    variant, prompt = pair
    if not token:
        return text
    first, *rest = text.split(token)
    out = [first]
    for k, after in enumerate(rest):
        image, tokens = variant.images[k], prompt.images[k].tokens
        count = f" -> {tokens} token{'s' * (tokens > 1)}" if tokens else ""
        out += [f"<image {variant.order[k] + 1}: {image.width}x{image.height}{count}>", after]
    return "".join(out)


def _number(value: Any) -> str:
    return "none" if value != value else f"{value:.4g}"
