"""The part of the report about whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.results_file import Failed, Side, Steps, Trainer, TrainStep, Variant
from benchmarks.tables import figure, mebibytes, plain, scientific, table, times

_VARIANTS = {
    "padded": "padded, a prompt and images for each completion",
    "packed": "packed, a prompt and images for each completion",
    "shared": "**shared prompts and images (PeRL)**",
}
_COSTS: dict[str, Callable[[Variant | Side], tuple[float, str]]] = {
    "LM tokens": lambda v: (v.lm_tokens, f"{v.lm_tokens:,}"),
    "images encoded": lambda v: (v.images_encoded, f"{v.images_encoded:,}"),
    "seconds": lambda v: (v.seconds, figure(v.seconds)),
    "peak MiB": lambda v: (v.peak_bytes, mebibytes(v.peak_bytes)),
}


def steps_markdown(steps: Steps) -> Iterator[str]:
    """Blocks of text; none for what was not asked for."""
    if step := steps.train_step:
        yield "## A training step: padded, packed, shared"
        yield from _failed(step) if isinstance(step, Failed) else _train_step(step)
    if trainer := steps.trainer:
        yield "## A step of two trainers: TRL and PeRL"
        yield from _failed(trainer) if isinstance(trainer, Failed) else _trainer(trainer)


def _failed(step: Failed) -> Iterator[str]:
    yield f"Not measured: {plain(step.failed)}."


def _train_step(step: TrainStep) -> Iterator[str]:
    setting = step.setting
    yield (
        f"{_model(setting)}. Micro-batches of {_of(setting, 'budget')} tokens; completions of "
        f"{_of(setting, 'mean_completion')} tokens on average, images of {_of(setting, 'mean_tokens_per_image')}; "
        f"packed attention {_of(setting, 'attention')}. In brackets: what padded takes over what this takes."
    )
    padded = step.variants.get("padded")
    costs = {**_COSTS, "TFLOP": _tflop}

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


def _tflop(found: Any) -> tuple[float, str]:
    return found.flops, figure(found.flops / 1e12)


def _trainer(step: Trainer) -> Iterator[str]:
    if not step.available:
        yield f"Not compared: {plain(step.reason)}."
        return
    setting, trl, perl = step.setting, step.trainers["trl"], step.trainers["perl"]
    yield (
        f"{_model(setting)}, TRL {_of(setting, 'trl')}. Completions of {_of(setting, 'completion')} tokens, images of "
        f"{_of(setting, 'tokens_per_image')}; micro-batches of {_of(setting, 'budget')} tokens; packed attention "
        f"{_of(setting, 'packed_attention')}."
    )
    pairs = {name: (of(trl), of(perl)) for name, of in _COSTS.items()}
    lines = [
        [name, theirs[1], ours[1], times(theirs[0] / ours[0]) if ours[0] else ""]
        for name, (theirs, ours) in pairs.items()
    ]
    where = list(pairs).index("seconds") + 1
    lines[where:where] = [
        [f"… {plain(part)}", figure(seconds), figure(perl.parts.get(part)), ""]
        for part, seconds in trl.parts.items()
    ]
    yield table(["a step", "TRL", "**PeRL**", "TRL over PeRL"], lines)
    rounds = [a / b for a, b in zip(trl.seconds_by_round, perl.seconds_by_round, strict=False)]
    if len(rounds) > 1:
        yield f"TRL over PeRL by round: {times(min(rounds))} to {times(max(rounds))}."
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


def _of(setting: Mapping[str, Any], key: str) -> str:
    value = setting.get(key, "?")
    return f"{value:,.0f}" if isinstance(value, int | float) else plain(value)
