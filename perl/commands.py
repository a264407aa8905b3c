"""What the commands of `perl-rl` do."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perl.config import Config
from perl.processes import on_main_process
from perl.progress import Display
from perl.recipe import (
    check_config,
    differences,
    read_config,
    recipe_names,
    save_config,
    to_toml,
)
from perl.run import RunFolder, is_main_process, write_json
from perl.types import IMAGE_SLOT, Example, Message, UserError

if TYPE_CHECKING:
    from perl.cli import Doctor, Evaluate, Generate, Report, Resume, ShowConfig, Train


def train_command(command: Train) -> None:
    """`perl-rl train`"""
    config = command.config
    if command.overwrite and command.resume:
        raise UserError("--overwrite and --resume exclude each other; leave one out")
    if not config.run.dir:
        raise UserError("run.dir is empty; name a folder with --run.dir")
    folder = RunFolder(Path(config.run.dir))
    if command.resume and folder.config.exists():
        _go(_stored(folder, config), folder, resume=True)
        return
    if command.overwrite:
        _check_kept(command, folder)
    _check(config)
    on_main_process(partial(_begin, config, folder, command.overwrite))
    try:
        _go(config, folder, resume=False)
    finally:
        if is_main_process():
            folder.settle()


def _begin(config: Config, folder: RunFolder, overwrite: bool) -> None:
    folder.create(overwrite)
    save_config(config, folder.config)


def resume_command(command: Resume) -> None:
    """`perl-rl resume`"""
    folder = RunFolder(command.run)
    if not folder.config.exists():
        raise UserError(
            f"{command.run} is no run folder: it has no config.toml; start one with perl-rl train"
        )
    _go(_stored(folder), folder, resume=True)


def _stored(folder: RunFolder, asked: Config | None = None) -> Config:
    """The settings of a run that is there; says so where others were asked for."""
    config = read_config(folder.config)
    config = replace(config, run=replace(config.run, dir=str(folder.root)))
    ignored = differences(config, asked) if asked else []
    if ignored and is_main_process():
        print(f"going on with {folder.config}; not used: {', '.join(ignored)}", file=sys.stderr)
    return config


def _check_kept(command: Train, folder: RunFolder) -> None:
    """Refuse to overwrite a folder that the new run reads from."""
    config, root = command.config, folder.root.resolve()
    sources = {
        "the recipe": command.recipe,
        "model.path": config.model.path,
        "data.train": config.data.train,
        "data.eval": config.data.eval,
        "data.image_root": config.data.image_root,
    }
    for name, value in sources.items():
        path = Path(value).expanduser()
        if value and path.exists() and path.resolve().is_relative_to(root):
            raise UserError(
                f"--overwrite would delete {name} = {value}; choose another --run.dir or move it out"
            )


def _check(config: Config) -> None:
    """Find mistakes before anything is written or removed."""
    from perl.data import load_examples, validate
    from perl.loss import make_policy_loss
    from perl.setup import EVAL_SEED, check_setup

    make_policy_loss(config.loss, config.rollout.max_new_tokens)
    datasets = [load_examples(config.data.train, config.data, "train", config.run.seed)]
    if config.eval.examples:
        datasets.append(
            load_examples(config.data.eval, config.data, "test", EVAL_SEED, config.eval.examples)
        )
    processor = check_setup(config)
    for dataset in datasets:
        validate(dataset, inspect=processor.check_texts if processor else None)


def _go(config: Config, folder: RunFolder, resume: bool) -> None:
    from perl.interrupt import Interrupted
    from perl.report import write_report
    from perl.summary import print_table
    from perl.train import train

    try:
        with Display(enabled=is_main_process()) as display:
            summary = train(config, folder, display, resume)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with perl-rl resume {folder.root}") from None
    if not is_main_process():
        return
    report = write_report(folder.root)
    print_table(summary, str(folder.root))
    print(f"report: {report}")


def evaluate_command(command: Evaluate) -> None:
    """`perl-rl evaluate`"""
    from perl.evaluate import aggregate, evaluate
    from perl.setup import EVAL_SEED

    config, path = _model_and_config(command.model)
    data = replace(config.data, eval=command.data or config.data.eval)
    if command.eval.examples == 0:
        raise UserError("eval.examples = 0: must be 1 or more to evaluate")
    if command.output and not command.output.absolute().parent.is_dir():
        raise UserError(
            f"--output {command.output}: there is no folder to write it to; make it first"
        )
    if command.max_new_tokens is not None:
        config = replace(
            config, rollout=replace(config.rollout, max_new_tokens=command.max_new_tokens)
        )
    config = replace(config, data=data, eval=command.eval, model=replace(config.model, path=path))
    check_config(config)
    from perl.data import load_examples

    examples = load_examples(data.eval, data, "test", EVAL_SEED, command.eval.examples)
    engine, encoder = _engine(config)
    with Display() as display:
        display.stage("evaluate", len(examples))
        results, _ = evaluate(
            engine,
            encoder,
            examples,
            range(len(examples)),
            command.eval,
            config.rollout.max_new_tokens,
            EVAL_SEED,
            display.advance,
        )
    numbers = aggregate(results)
    _print_evaluation(numbers, path)
    if command.output:
        by_example = [
            {"id": r.id, "task": r.task, "orders": r.orders}
            | {k: getattr(r, k) for k in ("accuracy", "greedy", "consistency")}
            for r in results
        ]

        write_json(command.output, {**numbers, "by_example": by_example})


def _print_evaluation(numbers: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = (
        "examples",
        "orders",
        "accuracy",
        "greedy",
        "consistency",
        "format",
    )
    for name in ("task", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name == "task" else "right")
    for task, row in {**numbers["by_task"], "all": numbers}.items():
        table.add_row(task, *(_cell(name, row[name]) for name in columns))
    Console().print(table)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if name in ("examples", "orders") else f"{100 * value:.1f} %"


def generate_command(command: Generate) -> None:
    """`perl-rl generate`"""
    from perl.rollout import SamplingParams

    _check_numbers(command)
    config, path = _model_and_config(command.model)
    config = replace(config, model=replace(config.model, path=path))
    example = _held_out(config, command.example) if command.example is not None else _asked(command)
    engine, encoder = _engine(config)
    prompt = encoder.processor.encode_messages(example.messages, example.images, "--prompt")
    if unknown := encoder.processor.unknown_words(example.messages):
        print(f"words the model does not know: {', '.join(unknown)}", file=sys.stderr)
    temperature = command.temperature
    if temperature is None:
        temperature = 1.0 if command.n > 1 else 0.0
    params = SamplingParams(command.n, temperature, command.max_new_tokens)
    if command.example is not None:
        print(f"question: {example.messages[-1].content}\nright answer: {example.answer}")
    for completion in engine.generate([prompt], params, command.seed)[0]:
        text = encoder.processor.decode(completion.token_ids)
        print(text if completion.finished else f"{text} [cut at {command.max_new_tokens} tokens]")


def _check_numbers(command: Generate) -> None:
    if command.n < 1 or command.max_new_tokens < 1:
        raise UserError("--n and --max-new-tokens must be 1 or more")
    if command.temperature is not None and not 0 <= command.temperature < math.inf:
        raise UserError(f"--temperature {command.temperature}: must be 0 or more")
    if not 0 <= command.seed < 2**31:
        raise UserError(f"--seed {command.seed}: must be from 0 to {2**31 - 1}")
    if command.example is not None and command.example < 0:
        raise UserError(f"--example {command.example}: must be 0 or more")
    if command.example is not None and (command.prompt or command.images):
        raise UserError("give --example or --prompt with --images, not both")


def _asked(command: Generate) -> Example:
    """The prompt and image files of the command line."""
    from perl.pictures import open_image

    if not command.prompt:
        raise UserError("perl-rl generate needs --prompt, with --images, or --example")
    images = tuple(open_image(path, str(path)) for path in command.images)
    text = command.prompt
    if IMAGE_SLOT not in text:
        text = " ".join([*[IMAGE_SLOT] * len(images), text])
    return Example("--prompt", images, (Message("user", text),), answer="")


def _held_out(config: Config, number: int) -> Example:
    from perl.data import load_examples
    from perl.setup import EVAL_SEED

    examples = load_examples(config.data.eval, config.data, "test", EVAL_SEED, number + 1)
    if number >= len(examples):
        raise UserError(f"--example {number}: the data has only {len(examples)} examples")
    return examples[number]


def report_command(command: Report) -> None:
    """`perl-rl report`"""
    from perl.report import write_report

    if not any((command.run / name).exists() for name in ("config.toml", "metrics.jsonl")):
        raise UserError(
            f"{command.run} is no run folder: it has neither config.toml nor metrics.jsonl"
        )
    print(write_report(command.run))


def config_command(command: ShowConfig) -> None:
    """`perl-rl config`"""
    if command.list:
        print("\n".join(recipe_names()))
        return
    print(to_toml(command.config), end="")


def doctor_command(command: Doctor) -> None:
    """`perl-rl doctor`"""
    from perl.doctor import examine

    if not examine():
        sys.exit(1)


def _engine(config: Config) -> tuple[Any, Any]:
    import torch

    from perl.collect import PromptEncoder, PromptLimit
    from perl.loading import load_policy, load_processor, uses_bfloat16
    from perl.rollout import make_engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config.model.path, replace(config.model, lora_rank=0), device).to(device)
    processor = load_processor(config.model.path, config.model)
    limit = replace(
        PromptLimit.to_generate(config),
        advice="leave the example out, or raise it in the config.toml of the run folder",
    )
    encoder = PromptEncoder(processor, limit, config.data.overlong)

    def autocast() -> torch.autocast:
        return torch.autocast(
            device.type, torch.bfloat16, enabled=uses_bfloat16(config.model.dtype)
        )

    return make_engine(policy, processor, config.rollout.batch_size, autocast), encoder


def _model_and_config(model: str) -> tuple[Config, str]:
    """A run folder stands for its settings and its newest model; anything else for a model with the defaults."""
    folder = Path(model)
    if not (folder / "config.toml").exists():
        if (folder / "config.json").exists() or not folder.exists():
            return Config(), model
        raise UserError(
            f"{model} is neither a run folder (no config.toml) nor a model folder (no config.json)"
        )
    config = read_config(folder / "config.toml")
    if config.run.seeds:
        folder = folder / f"seed-{config.run.seeds[0]}"
    for name in ("final", "cold_start"):
        if (folder / "models" / name / "config.json").exists():
            note = "" if name == "final" else " (RL has not finished; `perl-rl resume` goes on)"
            print(f"model: {folder / 'models' / name}{note}", file=sys.stderr)
            return config, str(folder / "models" / name)
    raise UserError(f"{model} has no finished model yet; go on with perl-rl resume {model}")
