"""`perl-rl score`: what reward functions give for completions that are there already; no model is loaded."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tyro.conf import Positional

from perl.config import Command, Count, DataConfig, NotNegative, RewardConfig
from perl.recipe import check_options
from perl.report.metrics import mean, plural
from perl.report.progress import Display
from perl.report.tables import print_table
from perl.rewards.columns import conversations, rollout_columns
from perl.rewards.forms import reader_of
from perl.rewards.loading import BoundReward
from perl.rewards.peers import PeerForm, parameters_of
from perl.rewards.reading import Reader
from perl.rewards.scorer import BUILT_IN, Scorer
from perl.types import Rollout, UserError, Variant, one_line

if TYPE_CHECKING:
    from perl.data.dataset import RowDataset
    from perl.evaluation.completions import Given

_AT_ONCE = 512
"""Completions of one call of the functions."""
_SHOWN = 20
"""Completions that are printed, and letters of what they say."""
_REASONS = 3
"""Reasons of one function that are printed."""


@dataclass(frozen=True)
class Score(Command):
    """What reward functions give for completions that you have, each in the order of the images that it was written for,
    the answer that is read in it, and the right one. No model is loaded."""

    data: Positional[str] = ""
    """The questions: what data.train takes, but bundled ones."""
    completions: Positional[Path | None] = None
    """JSONL file, or - for standard input: rows with id, completion and order, the original numbers of the images by slot
    from 1, as `perl-rl preview --json` has them; without order the original one. A run's rollouts.jsonl does as well."""
    functions: tuple[str, ...] = RewardConfig.functions
    """As reward.functions."""
    weights: tuple[float, ...] = ()
    """As reward.weights; with them the weighted sum is given too, as `reward`."""
    timeout: NotNegative = RewardConfig.timeout
    """As reward.timeout, for each 512 completions."""
    text: Literal["slots", "references"] = "slots"
    """How text and images are kept consistent in other orders, as permutation.text."""
    stage: Literal["rl", "evaluate"] | None = None
    """Of a run's rollouts.jsonl those of training (rl) or of the evaluations alone; empty: all."""
    map: tuple[str, ...] = ()
    """What columns of ours are called in the data, as in "question=problem_text"."""
    frames: Count = DataConfig.frames
    """As data.frames."""
    image_root: str = ""
    """Folder that image paths start from and may not leave; empty: the data file's."""
    json: bool = False
    """Print one JSON object for each completion, and nothing else."""
    output: Path | None = None
    """JSONL file for the same objects."""

    def execute(self) -> None:
        from perl.data.dataset import BUNDLED, RowDataset, load_examples
        from perl.data.rows import check_output
        from perl.evaluation.completions import open_completions, read_completions, variants_of
        from perl.files import replacing, to_line

        check_options(self)
        if self.completions is None:
            raise UserError(
                "perl-rl score needs DATA and COMPLETIONS, a file or - for standard input"
            )
        if self.data.startswith(BUNDLED):
            raise UserError(f"{self.data}: each run makes its own questions; give rows of a file")
        if self.output:
            for source in (self.data, str(self.completions)):
                check_output(self.output, source)
        scorer = Scorer(self.functions, self.weights, self.timeout)
        config = DataConfig(map=self.map, frames=self.frames, image_root=self.image_root)
        dataset = load_examples(self.data, config, "train", 0)
        assert isinstance(dataset, RowDataset)
        given = list(read_completions(open_completions(self.completions), self.stage))
        if not given:
            of = f" of stage {self.stage}" if self.stage else ""
            raise UserError(f"{self.completions} holds no completions{of}; give a row for each")
        places, variants = variants_of(given, dataset, self.text)
        decode = any(map(_sees_pictures, scorer.functions.values()))
        lines: list[dict[str, Any]] = []
        with Display() as display:
            display.stage("score", len(given), unit="completion")
            for start in range(0, len(given), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                asked = variants[part]
                if decode:
                    asked = _decoded(asked, places[part], dataset)
                lines += _scored(given[part], asked, scorer, bool(self.weights))
                display.advance(len(asked))
        _check_functions(lines, scorer)
        if self.output:
            with replacing(self.output) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(map(to_line, lines))
        if self.json:
            sys.stdout.writelines(map(to_line, lines))
            return
        _print(lines, scorer)
        without = len(dataset) - len(set(places))
        print(f"{without:,} of the {len(dataset):,} rows of {self.data} have no completion")


def _sees_pictures(function: BoundReward) -> bool:
    """Whether it may look at pixels: a function of the user's that takes images."""
    if function.function in BUILT_IN.values() or PeerForm.of(function.function):
        return False
    parameters = parameters_of(function.function)
    return parameters is None or any(
        name == "images" or p.kind is p.VAR_KEYWORD for name, p in parameters.items()
    )


def _decoded(
    variants: Sequence[Variant], places: Sequence[int], dataset: RowDataset
) -> list[Variant]:
    examples = {i: dataset[i] for i in set(places)}
    return [
        replace(v, example=examples[i], images=tuple(examples[i].images[k] for k in v.order))
        for v, i in zip(variants, places, strict=True)
    ]


def _scored(
    given: Sequence[Given], variants: Sequence[Variant], scorer: Scorer, weighted: bool
) -> list[dict[str, Any]]:
    """One object for each completion, as it is written."""
    nothing: Any = np.zeros(0)
    rollouts = [
        Rollout(variant, nothing, nothing, nothing, each.text, True)
        for each, variant in zip(given, variants, strict=True)
    ]
    prompts, texts, columns = rollout_columns(rollouts)
    for of_tokens in ("completion_length", "completion_ids"):  # Nobody knows whose tokens.
        del columns[of_tokens]
    chats = conversations(rollouts, prompts, texts)
    totals, parts = scorer.score(prompts, texts, columns, chats, lenient=True)
    read = _reader(scorer)
    lines = []
    for k, (each, variant) in enumerate(zip(given, variants, strict=True)):
        faults = {
            name: f"{of[k].what} this completion" for name, of in scorer.failed.items() if k in of
        }
        lines.append(
            {
                "id": each.id,
                "order": [i + 1 for i in variant.order],
                "rewards": {name: _number(values[k]) for name, values in parts.items()},
                **({"reward": _number(totals[k])} if weighted else {}),
                "answer": read(each.text) if read else None,
                "gold": variant.answer or None,
                **({"faults": faults} if faults else {}),
            }
        )
    return lines


def _check_functions(lines: Sequence[Mapping[str, Any]], scorer: Scorer) -> None:
    """Raise UserError if a function fails on all completions, as training would."""
    for name in scorer.functions:
        faults = [line["faults"][name] for line in lines if name in line.get("faults", {})]
        if len(faults) == len(lines):
            raise UserError(
                f"reward function '{name}' {faults[0]}, '{lines[0]['id']}', and on all others; correct it, its options "
                "or the data, or leave it out"
            )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _reader(scorer: Scorer) -> Reader | None:
    """What reads answers as the first function does that reads one."""
    return next(filter(None, map(reader_of, scorer.functions.values())), None)


def _print(lines: Sequence[Mapping[str, Any]], scorer: Scorer) -> None:
    """The first completions, then every function over all of them."""
    names = dict.fromkeys(name for line in lines for name in line["rewards"])
    scores = {name: [line["rewards"].get(name) for line in lines] for name in names}
    if "reward" in lines[0]:
        scores["weighted sum"] = [line["reward"] for line in lines]
    table = [["id", "order", "answer", "gold", *scores]]
    for k, line in enumerate(lines[:_SHOWN]):
        order = " ".join(map(str, line["order"]))
        cells = (line["answer"], line["gold"], *(values[k] for values in scores.values()))
        table.append([str(line["id"]), order, *map(_cell, cells)])
    print_table(table, left=4)
    if len(lines) > _SHOWN:
        print(f"and {len(lines) - _SHOWN:,} more (--json prints all, --output FILE keeps them)\n")
    table = [["", "mean", "scored", "not scored"]]
    for name, values in scores.items():
        missing = values.count(None)
        counts = (str(len(values) - missing), str(missing))
        table.append([name, _cell(_number(mean(values))), *counts])
    print_table(table, f"{len(lines):,} {plural('completion', len(lines))}")
    for name, function in scorer.functions.items():
        reasons = Counter(
            line.get("faults", {}).get(name, _why(function, line))
            for line in lines
            if line["rewards"][name] is None
        )
        for reason, count in reasons.most_common(_REASONS):
            print(f"{name}: {count:,} not scored: {reason}")
        if len(reasons) > _REASONS:
            print(f"{name}: {len(reasons) - _REASONS:,} other reasons")
    if _reader(scorer):
        unread = sum(line["answer"] is None for line in lines)
        print(f"{unread:,} of the {len(lines):,} completions give no answer that can be read")
    else:
        print("none of the functions reads an answer")


def _why(function: BoundReward, line: Mapping[str, Any]) -> str:
    gold = line["gold"] is not None or not function.reads_answer
    return "the function gave None" if gold else "the row has no answer"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else one_line(value, _SHOWN)
