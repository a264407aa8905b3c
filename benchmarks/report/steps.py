"""The part of the report about whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.report.results_file import Side, Steps, Trainer, TrainStep, Variant
from benchmarks.report.tables import counted, figure, mebibytes, plain, scientific, table, times

_TRAIN_STEP = "A training step: padded, packed, shared"
_TRAINER = "A step of two trainers: TRL and PeRL"
_VARIANTS = {
    "padded": "padded, a prompt and images for each completion",
    "packed": "packed, a prompt and images for each completion",
    "shared": "**shared prompts and images (PeRL)**",
}
_COSTS: dict[str, Callable[[Any], tuple[float, str]]] = {
    "LM tokens": lambda v: (v.lm_tokens, f"{v.lm_tokens:,}"),
    "images encoded": lambda v: (v.images_encoded, f"{v.images_encoded:,}"),
    "seconds": lambda v: (v.seconds, figure(v.seconds)),
    "peak MiB": lambda v: (v.peak_bytes, mebibytes(v.peak_bytes)),
}
_TFLOP = {"TFLOP": lambda v: (v.flops, figure(v.flops / 1e12))}


def steps_summary(steps: Steps) -> list[str]:
    """A line for each kind of step that was asked for, with a link to its section."""
    found = []
    if step := steps.train_step:
        what = step.why_not or "not both measured."
        if isinstance(step, TrainStep) and {"padded", "shared"} <= step.variants.keys():
            what = _over(step.variants["padded"], step.variants["shared"])
        found.append(f"[A training step](#{_anchor(_TRAIN_STEP)}), padded over shared: {what}")
    if step := steps.trainer:
        what = step.why_not
        if isinstance(step, Trainer) and not what:
            what = _over(step.trainers["trl"], step.trainers["perl"])
        found.append(f"[Two trainers](#{_anchor(_TRAINER)}), TRL over PeRL: {what}")
    return found


def steps_markdown(steps: Steps) -> Iterator[str]:
    """Blocks of text; none for what was not asked for."""
    for heading, step in ((_TRAIN_STEP, steps.train_step), (_TRAINER, steps.trainer)):
        if step is None:
            continue
        yield f"## {heading}"
        if step.why_not:
            yield step.why_not[0].upper() + step.why_not[1:]
        elif isinstance(step, TrainStep):
            yield from _train_step(step)
        elif isinstance(step, Trainer):
            yield from _trainer(step)


def _anchor(heading: str) -> str:
    """GitHub's, of a heading of words, colons and commas."""
    return "".join(c for c in heading.lower() if c.isalnum() or c == " ").replace(" ", "-")


def _over(theirs: Variant | Side, ours: Variant | Side) -> str:
    around = _by_round(theirs, ours)
    rounds = [f"{times(min(around))} to {times(max(around))} by round"] if len(around) > 1 else []
    brackets = ", ".join(rounds + _rounds(ours))
    seconds = times(theirs.seconds / ours.seconds) + (f" ({brackets})" if brackets else "")
    memory = times(theirs.peak_bytes / ours.peak_bytes) if ours.peak_bytes else "no figure"
    return f"seconds {seconds}, memory {memory}."


def _by_round(theirs: Variant | Side, ours: Variant | Side) -> list[float]:
    pairs = zip(theirs.seconds_by_round, ours.seconds_by_round, strict=False)
    return [a / b for a, b in pairs]


def _rounds(side: Variant | Side) -> list[str]:
    """How often it was timed; nothing where that is not told."""
    count = len(side.seconds_by_round)
    return [f"median of {counted(count, 'round')}"] if count else []


def _train_step(step: TrainStep) -> Iterator[str]:
    setting = step.setting
    first = next(iter(step.variants.values()), None)
    rounds = "".join(f" Seconds: {text}." for text in (_rounds(first) if first else []))
    yield (
        f"{_model(setting)}. Micro-batches of {_of(setting, 'budget')} tokens; completions of "
        f"{_of(setting, 'mean_completion')} tokens on average, images of {_of(setting, 'mean_tokens_per_image')}; "
        f"packed attention {_of(setting, 'attention')}. In brackets: what padded takes over what this takes.{rounds}"
    )
    padded = step.variants.get("padded")
    costs = {**_COSTS, **_TFLOP}

    def cell(of: Callable[[Any], tuple[float, str]], found: Variant) -> str:
        value, text = of(found)
        if padded is None or found is padded or not value:
            return text
        return f"{text} ({times(of(padded)[0] / value)})"

    lines = [
        [
            _VARIANTS[name],
            *(cell(of, found) for of in costs.values()),
            scientific(found.max_rel_grad_diff),
        ]
        for name, found in step.variants.items()
    ]
    yield table(["a step of", *costs, "gradients differ by"], lines)
    if all(found.flops_by_part for found in step.variants.values()):
        shares = [
            f"{name} {'/'.join(f'{100 * n / v.flops:.0f}' for n in v.flops_by_part.values())}"
            for name, v in step.variants.items()
        ]
        yield f"Percent of the operations in tower/LM/head: {', '.join(shares)}. {_machine(setting)}"


def _trainer(step: Trainer) -> Iterator[str]:
    setting, trl, perl = step.setting, step.trainers["trl"], step.trainers["perl"]
    seconds = "".join(f" Seconds: {text}." for text in _rounds(perl))
    yield (
        f"{_model(setting)}, TRL {_of(setting, 'trl')}. Completions of {_of(setting, 'completion')} tokens, images of "
        f"{_of(setting, 'tokens_per_image')}; micro-batches of {_of(setting, 'budget')} tokens; packed attention "
        f"{_of(setting, 'packed_attention')}.{seconds}"
    )
    lines = []
    for name, of in _COSTS.items():
        (theirs, text), (ours, our_text) = of(trl), of(perl)
        lines.append([name, text, our_text, times(theirs / ours) if ours else ""])
        if name == "seconds":
            lines += [
                [f"… {plain(part)}", figure(seconds), figure(perl.parts.get(part)), ""]
                for part, seconds in trl.parts.items()
            ]
    yield table(["a step", "TRL", "**PeRL**", "TRL over PeRL"], lines)
    rounds = _by_round(trl, perl)
    if len(rounds) > 1:
        yield f"TRL over PeRL by round: {times(min(rounds))} to {times(max(rounds))}."
    if step.proof and trl.micro_batch_tokens and perl.micro_batch_tokens:
        yield (
            f"Proof: on {step.proof['completions']} completions of TRL's the gradients of {step.proof['parameters']} "
            f"parameters agree to {scientific(step.proof['max_rel_grad_diff'])} of their maxima. The largest micro-batch "
            f"has {trl.micro_batch_tokens:,} tokens in TRL, {perl.micro_batch_tokens:,} in PeRL. {_machine(setting)}"
        )
    yield "\n".join(["What differs:", "", *(f"- {plain(text)}" for text in step.differences)])


def _model(setting: Mapping[str, Any]) -> str:
    """What both kinds of step tell in the same fields."""
    parameters = setting.get("parameters")
    size = f" ({parameters / 1e6:,.1f} M parameters)" if isinstance(parameters, int) else ""
    images = setting.get("images") or ()
    return (
        f"{_of(setting, 'model')}{size} in {_of(setting, 'dtype')}; questions of "
        f"{' and '.join(map(str, images)) or '?'} images, {_of(setting, 'sequences')} sequences"
    )


def _machine(setting: Mapping[str, Any]) -> str:
    return (
        f"Micro-batches of {_of(setting, 'padded_micro_batch')} padded sequences; {_of(setting, 'device_name')}, "
        f"{_of(setting, 'threads')} threads, torch {_of(setting, 'torch')}, transformers {_of(setting, 'transformers')}."
    )


def _of(setting: Mapping[str, Any], key: str) -> str:
    value = setting.get(key, "?")
    return f"{value:,.0f}" if isinstance(value, int | float) else plain(value)
