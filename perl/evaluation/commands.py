"""`perl-rl evaluate` and `perl-rl compare`. What is slow to import is imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from perl.config import (
    EVAL_SEED,
    INSTRUCTIONS,
    Command,
    Config,
    Count,
    EngineConfig,
    EvalConfig,
    MeasureConfig,
    Positive,
)
from perl.recipe import check_config, check_options
from perl.report.metrics import plural
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.rollout.opening import config_of, engine_and_encoder, fingerprint
from perl.types import UserError


@dataclass(frozen=True)
class Evaluate(Command):
    """Accuracy and consistency of a model on held-out examples, over all or many orders of their images; or, with
    --suite, its answers to public benchmarks, as in
    `perl-rl evaluate runs/first --suite blink --suite-root suites --output runs/first/suites`."""

    model: Positional[str] = ""
    """A run folder (its newest model and its settings), a checkpoint, a model or LoRA adapter folder, or a hub name."""
    data: str = ""
    """JSONL or Parquet file, hub dataset or bundled:digits; empty: the run's."""
    map: tuple[str, ...] | None = None
    """What columns of ours are called in the data, as in "question=problem_text"; empty: the run's data.map."""
    image_root: str | None = None
    """Folder that image paths of the data start from and may not leave; empty: the run's data.image_root."""
    eval: MeasureConfig = field(default_factory=MeasureConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)
    max_new_tokens: int | None = None
    """Longest completion; empty: the run's, 2048 with --suite."""
    max_prompt_tokens: int | None = None
    """Longest prompt, image tokens included; empty: the run's data.max_prompt_tokens."""
    overlong: Literal["error", "drop"] | None = None
    """What to do with a longer prompt; a dropped one is left out, with --suite it counts as wrong; empty: the run's."""
    control_tokens: Literal["error", "escape"] | None = None
    """What to do with a control token in a row's text, as data.control_tokens; empty: the run's, escape with --suite."""
    functions: tuple[str, ...] | None = None
    """Reward functions to measure by, written as in reward.functions, as in "accuracy(tags=True)", with the weights of a recipe
    that names none; empty: the run's, without a run accuracy and format."""
    output: Path | None = None
    """JSON file for the numbers, by task and by example; with --suite a folder for answers, numbers and table."""
    suite: tuple[str, ...] = ()
    """Public benchmarks: mantis_eval, blink, mmiu, mathvista, mathverse, mathvision, remi, mv_math, or all."""
    suite_root: Path | None = None
    """Folder with one sub-folder for each benchmark, laid out as it is published."""
    list_suites: bool = False
    """Only print what is expected in the sub-folders and where to get it."""
    text: Literal["slots", "references"] | None = None
    """How text and images are kept consistent in other orders of one's own data; empty: the run's."""
    instruction: str | None = None
    """What asks for the answer. One's own data: as data.instruction, so think-box, "" or a text; empty: the run's. With
    --suite: official, as its authors do; think, as the run does (a model without one: think-box); or think-box, think-tags, box;
    empty: official."""
    orders: Positive = 1
    """With --suite: orders of the images where a benchmark lets them move, the official one first."""
    limit: Positive | None = None
    """With --suite: only the first items of each benchmark."""
    extract: Literal["rules", "llm"] = "rules"
    """Who reads the answer of a completion that boxes none: rules, or the model behind PERL_LLM_URL."""
    published: bool = False
    """With --suite: the rows of the PeRL paper's Table 1 in the table as well."""

    def execute(self) -> None:
        if self.list_suites:
            from perl.evaluation.suites import layout

            print(layout())
            return
        _check_options(self)
        if self.suite:
            _evaluate_suites(self)
        else:
            _evaluate_held_out(self)


@dataclass(frozen=True)
class Compare(Command):
    """Differences of two models on the same held-out examples or benchmarks, with intervals and probabilities, as in
    `perl-rl compare runs/plain runs/permuted`."""

    first: Positional[Path] = Path()
    """A run folder (its evaluation after RL), a file of evaluations/ in one or of `perl-rl evaluate --output`, or a folder
    that `perl-rl evaluate --suite` wrote."""
    second: Positional[Path | None] = None
    """Another one of the same kind."""
    changed: Count = 10
    """How many of the examples that changed most are listed."""

    def execute(self) -> None:
        from perl.evaluation.suites.answers import SETTINGS

        if self.second is None:
            raise UserError(
                "perl-rl compare needs two run folders, or two files or folders of perl-rl evaluate, with --output or --suite"
            )
        both = (self.first, self.second)
        compare = _compare_suites if any((p / SETTINGS).exists() for p in both) else _compare_own
        remarks = compare(*both, self.changed)
        test = "p: exact sign test (McNemar's where scores are 0 and 1) over those that differ"
        print("\n".join([f"1st: {self.first}", f"2nd: {self.second}", test, *remarks]))


def _compare_suites(first: Path, second: Path, _: int) -> list[str]:
    from perl.evaluation.suites.comparison import compare_folders, comparison_table

    found, remarks = compare_folders(first, second)
    print_table(comparison_table(found), "Accuracy over items, percent")
    return remarks


def _compare_own(first: Path, second: Path, changed: int) -> list[str]:
    from perl.evaluation.comparison import changed_rows, compare_pairs, comparison_rows, read_pairs

    pairs, remarks = read_pairs(first, second)
    print_table(comparison_rows(compare_pairs(pairs)), "Means over held-out examples")
    if len(rows := changed_rows(pairs, changed)) > 1:
        print_table(rows, "Examples that changed most", left=2)
    return remarks


_SUITE_TOKENS = 2048
_ASKED = ("official", "think")


def _check_options(command: Evaluate) -> None:
    """Refuse options of one way to evaluate that are given with the other."""
    if command.suite and command.data:
        raise UserError("--data and --suite exclude each other; leave one out")
    of_suites = {
        "--suite-root": command.suite_root is not None,
        "--orders": command.orders != 1,
        "--limit": command.limit is not None,
        "--extract": command.extract != "rules",
        "--published": command.published,
    }
    if not command.suite and (given := [name for name, is_given in of_suites.items() if is_given]):
        raise UserError(f"{given[0]} is for --suite; name benchmarks, as in --suite blink, or all")
    if command.suite and command.instruction not in (None, *_ASKED, *INSTRUCTIONS):
        raise UserError(
            f"--instruction {command.instruction}: a benchmark is asked as one of {', '.join((*_ASKED, *INSTRUCTIONS))} says; "
            "choose one"
        )
    of_data = {
        "--text": command.text,
        "--map": command.map,
        "--functions": command.functions,
        "--image-root": command.image_root,
    }
    for option, given in of_data.items():
        if command.suite and given:
            raise UserError(
                f"{option} is for one's own data; a benchmark is asked as it is published"
            )
    check_options(command)


def _settings(command: Evaluate, max_new_tokens: int | None) -> Config:
    """The settings of the model's run with those of the command line."""
    config = config_of(
        command.model,
        permutation={"text": command.text},
        data={
            "eval": command.data or None,
            "map": command.map,
            "image_root": command.image_root,
            "max_prompt_tokens": command.max_prompt_tokens,
            "overlong": command.overlong,
            "control_tokens": command.control_tokens or ("escape" if command.suite else None),
            "instruction": None if command.suite else command.instruction,
        },
        **(_measured_by(command.functions) if command.functions else {}),
        rollout=asdict(command.rollout) | {"max_new_tokens": max_new_tokens},
    )
    config = replace(config, eval=EvalConfig(**asdict(command.eval)))
    check_config(config)
    return config


def _measured_by(functions: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Other functions than the run's, without what groups are filtered and weighted by, as those may be none of them."""
    return {
        "reward": {"functions": functions, "weights": (), "group_weight": "none"},
        "filter": {"min_accuracy": 0.0, "max_accuracy": 1.0},
    }


def _evaluate_held_out(command: Evaluate) -> None:
    from perl.data.dataset import load_examples
    from perl.data.rows import check_output
    from perl.evaluation.evaluate import aggregate, evaluate, unmeasured
    from perl.evaluation.record import save_evaluation
    from perl.rewards.scorer import Scorer
    from perl.rollout.instruction import tell_prompts

    config = _settings(command, command.max_new_tokens)
    if not config.data.eval:
        raise UserError(f"{command.model} has no data.eval of its own to measure on; give --data")
    if command.eval.examples == 0:
        raise UserError("eval.examples = 0: must be 1 or more to evaluate")
    if command.output:
        check_output(command.output, config.data.eval)
    examples = load_examples(
        config.data.eval, config.data, "test", EVAL_SEED, command.eval.examples
    )
    scorer = Scorer(config.reward.functions, config.reward.weights, config.reward.timeout)
    engine, encoder = engine_and_encoder(config)
    tell_prompts(config, encoder.instruction, encoder.processor, [(config.data.eval, examples)])
    with Display() as display:
        display.stage("evaluate", len(examples), unit="example")
        everything = range(len(examples))
        results, _ = evaluate(
            engine, encoder, examples, everything, config, display.advance, scorer
        )
    numbers = aggregate(results)
    _print_evaluation(numbers, config, scorer.weights)
    if lost := unmeasured(numbers, config, scorer):
        print(lost)
    if encoder.dropped:
        print(
            f"left out: {encoder.dropped} {plural('example', encoder.dropped)} with more tokens than "
            f"{encoder.limit.name}"
        )
    if command.output:
        save_evaluation(command.output, results, numbers, config)


def _print_evaluation(
    numbers: dict[str, Any], config: Config, weights: Mapping[str, float]
) -> None:
    """A row for each task; the accuracies are in percent, rewards as the functions give them."""
    from perl.evaluation.evaluate import accuracy_of

    right = accuracy_of(config)
    shares = [k for k in ("accuracy", "greedy", "consistency") if numbers[k] is not None]
    rewards = [k for k in numbers if k.startswith("reward") and k != f"reward/{right and right[0]}"]
    columns = ["examples", "orders", *shares, *rewards]
    rows = [
        [task, *(_cell(name, row.get(name), name in shares) for name in columns)]
        for task, row in {**numbers["by_task"], "all": numbers}.items()
    ]
    heading = [name.removeprefix("reward/") for name in columns]
    print_table([["task", *heading], *rows], config.model.path)
    whole = " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
    by = f"accuracy by {right[1]}, at temperature 1 and greedy; " if right else ""
    print(f"{by}reward = {whole}, at temperature 1")
    if right and numbers["unread"]:
        print(
            f"{100 * numbers['unread']:.1f} % of the completions give no answer that {right[1]} can read"
        )
    if numbers["unscored"]:
        print(
            f"{numbers['unscored']} completions have no reward: a function failed, or none applies"
        )


def _cell(name: str, value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    if share:
        return f"{100 * value:.1f} %"
    if name in ("examples", "orders"):
        return f"{round(value, 2):,g}" if value < 1e5 else f"{value:,.0f}"
    return f"{value:.3f}"


def _evaluate_suites(command: Evaluate) -> None:
    """Every benchmark in turn; all files are looked at before the model is loaded."""
    from perl.evaluation.suites import choose_suites
    from perl.evaluation.suites.answers import AnswerFile, keep_settings
    from perl.evaluation.suites.base import open_items
    from perl.evaluation.suites.measure import Procedure, measure
    from perl.evaluation.suites.summary import SOURCE, write_summary
    from perl.llm import Endpoint

    chosen = choose_suites(command.suite)
    if command.suite_root is None or not command.suite_root.is_dir():
        raise UserError(
            "--suite needs --suite-root, a folder with one sub-folder for each benchmark "
            "(perl-rl evaluate --list-suites shows the layout)"
        )
    if command.output is None:
        raise UserError("--suite needs --output, a folder where the answers are kept as they come")
    tokens = _SUITE_TOKENS if command.max_new_tokens is None else command.max_new_tokens
    config = _settings(command, tokens)
    think = _instruction(command, config)
    # A benchmark's question says how it is to be answered.
    config = replace(config, data=replace(config.data, instruction="", system=""))
    opened = [open_items(suite, command.suite_root, think) for suite in chosen]
    reader = Endpoint.from_env() if command.extract == "llm" else None
    named = "rules" if reader is None else f"llm {reader.model}"
    keep_settings(command.output, _recorded(command, config, think, named))
    how = Procedure(command.orders, config.rollout.max_new_tokens, reader, command.limit)
    files = [AnswerFile(command.output / f"{items.suite.name}.jsonl") for items in opened]
    engine, encoder = engine_and_encoder(config)
    with Display() as display:
        for items, answers in zip(opened, files, strict=True):
            display.stage(items.suite.name, how.count(items), unit="item")
            measure(items, answers, engine, encoder, how, display.advance)
    tables = write_summary(command.output, command.model, command.published)
    for title, table in tables.items():
        print_table(table, title)
    if command.published:
        print(SOURCE)
    print(f"answers, summary.json and table.md are in {command.output}")


def _instruction(command: Evaluate, config: Config) -> str:
    """What a benchmark's questions are followed by in place of its own instruction; empty: that."""
    from perl.rollout.instruction import Instruction

    if command.instruction in (None, "official"):
        return ""
    if command.instruction == "think":
        return Instruction.of(config).text or INSTRUCTIONS["think-box"]
    return INSTRUCTIONS[command.instruction]


def _recorded(command: Evaluate, config: Config, think: str, extract: str) -> dict[str, Any]:
    """What answers depend on; those given under other settings are not mixed with them."""
    from perl.rollout.instruction import Instruction

    path = Path(config.model.path)
    return {
        "model": str(path.resolve()) if path.exists() else config.model.path,
        "weights": fingerprint(config.model.path),
        "instruction": Instruction(think).name if think else "official",
        "max_new_tokens": config.rollout.max_new_tokens,
        "orders": command.orders,
        "extract": extract,
        "min_pixels": config.model.min_pixels,
        "max_pixels": config.model.max_pixels,
        "dtype": config.model.dtype,
    }
