"""`perl-rl check`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from perl.config import EVAL_SEED, Command, Config
from perl.report.metrics import plural
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.types import Example, UserError, Variant

if TYPE_CHECKING:
    from perl.data.check import Checks

_SHOWN = 3
"""Faulty rows that are named for each kind of fault."""


@dataclass(frozen=True)
class Check(Command):
    """Read every row of a data set, its images in full, and say which are faulty and what the data look like. A run over
    data that have been checked, and have not changed since, starts at once."""

    data: Positional[str] = ""
    """What data.train takes; or a recipe's .toml file, for all the data it names."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)
    output: Path | None = None
    """JSONL file for the faulty rows, each with `fault`, `fault_kind` and `place`."""

    def execute(self) -> None:
        from perl.data.check import checked
        from perl.data.dataset import RowDataset, load_examples
        from perl.data.rows import check_output
        from perl.data.streams import training_sources

        config = self.config
        if self.output:
            check_output(self.output, self.data)
        sources: list[tuple[str, Any]] = [(self.data, "train")]
        if self.data.endswith(".toml"):
            sources = [(source, "train") for source, _ in training_sources(config.data)]
            sources = [each for each in (*sources, (config.data.eval, "test")) if each[0]]
        processor = named_processor(config)
        if processor is None:
            print(
                f"model.path = {config.model.path or '(none)'}: no model is there to ask, so prompts are not counted in tokens, and "
                "texts and pictures are held to what the Qwen-VL models take"
            )
        faulty: list[tuple[Any, Any]] = []
        summaries: list[str] = []
        for source, split in sources:
            data = replace(config.data, streaming=False)
            seed = config.run.seed if split == "train" else EVAL_SEED
            dataset = load_examples(source, data, split, seed)
            if not isinstance(dataset, RowDataset):
                print(f"{source}: bundled questions need no check")
                continue
            with Display() as display:
                found = checked(dataset, checks_for(config, processor), display)
            _print(source, found)
            faulty += [(dataset, fault) for fault in found.faults]
            if found.faults:
                summaries.append(
                    f"{len(found.faults)} of the {found.rows} {plural('row', found.rows)} of {source}"
                )
        if self.output:
            _write(faulty, self.output)
        if faulty:
            kinds = sorted({fault.kind for _, fault in faulty})
            skip = "or train with --data.on-error skip (label with --on-error skip), which leaves them out"
            raise UserError(
                f"faulty: {'; '.join(summaries)} ({', '.join(kinds)}); correct them"
                + (f", {skip}" if kinds != ["id"] else "")
            )


def named_processor(config: Config) -> Any:
    """Of the model, where one is named that is there already."""
    if not config.model.path:
        return None
    from perl.model.loading import load_processor
    from perl.model.tiny import TINY_MODELS

    return (
        None
        if config.model.path in TINY_MODELS
        else load_processor(config.model.path, config.model)
    )


def checks_for(config: Config, processor: Any) -> Checks:
    """Those of training, and what takes longer."""
    from perl.data.check import checks_of
    from perl.model.demands import Demands
    from perl.rewards.gold import gold_check

    functions = config.reward.functions
    text, control = config.permutation.text, config.data.control_tokens
    checks = checks_of(text, processor or Demands(), [functions], control)
    more = replace(
        checks,
        inspect=(*checks.inspect, ("gold", gold_check(functions))),
        key=f"{checks.key} {functions} ids",
        start_key=checks.key,
        decode=True,
        ids=True,
    )
    if processor is None:
        return more
    from perl.rollout.instruction import Instruction
    from perl.rollout.prompts import PromptEncoder, PromptLimit

    asked, limit = Instruction.of(config), PromptLimit.to_train(config)
    encoder = PromptEncoder(
        processor, limit, config.data.overlong, asked, config.data.control_tokens
    )

    def tokens(example: Example) -> int:
        order = tuple(range(len(example.images)))
        variant = Variant(example, order, example.images, example.answer)
        if config.data.overlong == "error":
            return len(encoder.encode([variant])[0][1].input_ids)
        return len(processor.encode(encoder.ask(variant)).input_ids)

    model, data = config.model, config.data
    pixels = (model.min_pixels, model.max_pixels, model.chat_template)
    key = f"{more.key} {pixels} {limit} {data.overlong} {encoder.instruction}"
    return replace(more, tokens=tokens, most_tokens=limit.tokens, key=key)


def _print(source: str, found: Any) -> None:
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for fault in found.faults:
        by_kind[fault.kind].append(fault.message)
    table = [["", "least", "median", "most"]]
    lines = []
    for name, value in found.statistics.items():
        if isinstance(value, list):
            table.append([name, *(f"{v:,.0f}" for v in value)])
        elif isinstance(value, dict):
            counts = "; ".join(f"{kind} {count:,}" for kind, count in value.items())
            lines.append(f"{name}: {counts}")
        else:
            sound = max(1, found.rows - len(found.faults))
            lines.append(f"{name}: {value:,} ({100 * value / sound:.0f} %)")
    print_table(
        table,
        f"{source}: {found.rows:,} {plural('row', found.rows)}, {len(found.faults):,} of them faulty",
    )
    print("\n".join(lines))
    for kind, messages in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        print(f"\n{kind}: {len(messages):,}")
        print("\n".join(f"  {message}" for message in messages[:_SHOWN]))
        if len(messages) > _SHOWN:
            print(f"  and {len(messages) - _SHOWN:,} more (--output FILE lists all)")


def _write(faulty: Sequence[tuple[Any, Any]], output: Path) -> None:
    from perl.files import replacing, to_line

    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for dataset, fault in faulty:
            try:
                row = dict(dataset.row(fault.index))
            except UserError:  # It is no object.
                row = {}
            said = {"fault": fault.message, "fault_kind": fault.kind}
            file.write(to_line({**row, **said, "place": dataset.place(fault.index)}))
