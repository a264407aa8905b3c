"""The report of a run, made from its folder alone: `report.html` and the pictures in `plots/`.

A run that was stopped, damaged or never measured still gives a page; the page says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from perl.report.html import data_uri, write_page
from perl.report.metrics import (
    HEADLINE,
    MEASURES,
    RunLog,
    curve_of,
    headline,
    mean,
    number,
    read_run,
    stage_bytes,
    stage_seconds,
    step_medians,
)
from perl.report.plots import draw_pictures, filter_pictures
from perl.report.rollouts import rollout_groups, shorten
from perl.types import UserError

UNKNOWN = "—"
MAX_CONFIG = 20_000
"""Characters of config.toml shown."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and `run_dir/plots/*.png`, and return the page's path.

    A folder with sub-folders `seed-0`, `seed-1`, ... is reported as one recipe over several seeds.
    Raises UserError where `run_dir` is no folder and OSError where the page cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run folder: give the one `perl-rl train` wrote")
    seeds = [p for p in run_dir.glob("seed-*") if p.is_dir()]
    seeds.sort(key=lambda p: (len(p.name), p.name))
    top = read_run(run_dir)
    runs = [read_run(p) for p in seeds] or [top]
    notes = [f"{run.name}: {note}" if seeds else note for run in runs for note in run.notes]
    if seeds and not top.summary:
        notes.append("The run over all seeds has not finished: there is no common summary.json.")
    if len(reached := {run.last_step for run in runs}) > 1:
        notes.append(
            f"The seeds stand at different steps, {min(reached):g} to {max(reached):g}: "
            "means over RL go as far as all of them, thin lines are the single seeds."
        )
    seconds = stage_seconds(runs)
    try:
        pictures, troubles, zero = draw_pictures(runs, seconds, run_dir / "plots")
    except (OSError, ImportError) as error:
        pictures, troubles, zero = [], [f"No picture could be drawn: {error}"], []
    pictures += filter_pictures(runs)
    groups, shown, total = rollout_groups(runs, notes)
    path = run_dir / "report.html"
    write_page(
        path,
        "report.html.j2",
        {"percent": percent, "duration": duration},
        title=run_dir.resolve().name,
        facts=_facts(top, runs, several=bool(seeds)),
        notes=notes + troubles,
        cards=_cards(runs),
        seeds=_seed_table(runs) if seeds else [],
        measures=_measures(runs),
        tasks=_task_table(runs),
        pictures=[(p, data_uri(p.path.read_bytes(), "image/png")) for p in pictures],
        zero=zero,
        several=len(runs) > 1,
        seconds=seconds,
        costs=_stage_costs(runs),
        groups=groups,
        shown=shown,
        total=total,
        config=_config_text([run_dir, runs[0].folder]),
        versions=top.summary.get("versions") or runs[0].summary.get("versions"),
    )
    return path


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds for a reader: 8.4 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes for a reader: 512 MiB, 1.4 GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


_SHOW: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(HEADLINE, percent),
    "reward_before": "{:.3f}".format,
    "reward_after": "{:.3f}".format,
    "seconds": duration,
    "peak_rss_bytes": size,
}
"""How each headline number is written."""


def _mean_text(values: Sequence[float], show: Callable[[float], str]) -> str:
    return show(mean(values)) if values else UNKNOWN


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Lowest to highest, the unit once where it is the same; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    low, high = show(min(values)), show(max(values))
    (value, _, unit), (_, _, unit_too) = low.partition(" "), high.partition(" ")
    if low == high:
        return low
    return f"{value if unit == unit_too and ' ' not in unit else low} to {high}"


def _measures(runs: Sequence[RunLog]) -> dict[str, str]:
    """Those of MEASURES that were measured; without any, those that usually are."""
    found = {key for run in runs for key in headline(run)}
    measured = {
        measure: label
        for measure, label in MEASURES.items()
        if not found.isdisjoint((f"{measure}_before", f"{measure}_after"))
    }
    return measured or {m: label for m, label in MEASURES.items() if m != "reward"}


def _columns(runs: Sequence[RunLog]) -> list[str]:
    """The keys of the headline that have a column for each seed."""
    ends = ("before", "after")
    return [*(f"{m}_{at}" for m in _measures(runs) for at in ends), "seconds", "peak_rss_bytes"]


def _cards(runs: Sequence[RunLog]) -> list[dict[str, str]]:
    """The headline numbers: means over the seeds, with their range where there are several."""
    numbers = [headline(run) for run in runs]
    known = {key: [found[key] for found in numbers if key in found] for key in HEADLINE}
    cards = []
    for measure, label in _measures(runs).items():
        before, after = known[f"{measure}_before"], known[f"{measure}_after"]
        detail, show = [], _SHOW[f"{measure}_after"]
        if before and after:
            change = mean(after) - mean(before)
            points = f"{100 * change:+.1f} points" if show is percent else f"{change:+.3f}"
            detail.append(points)
        if len(after) > 1:
            detail.append(f"seeds {_range(after, show)}")
        cards.append(
            {
                "label": f"{label}, held out",
                "before": _mean_text(before, show) if before or after else "",
                "value": _mean_text(after, show),
                "detail": ", ".join(detail) or "not measured before and after RL",
            }
        )
    for key, label in (("seconds", "Time"), ("peak_rss_bytes", "Peak memory")):
        values, show = known[key], _SHOW[key]
        detail = f"mean of {len(values)} seeds, {_range(values, show)}" if len(values) > 1 else ""
        cards.append({"label": label, "value": _mean_text(values, show), "detail": detail})
    steps = [int(run.last_step) for run in runs]
    cold = max(max(curve_of(run.cold_start, "step"), default=0) for run in runs)
    detail = f"after {cold:.0f} cold-start steps" if cold else ""
    value = _range(steps, str) or str(steps[0])
    return [*cards, {"label": "RL steps", "value": value, "detail": detail}]


def _facts(top: RunLog, runs: Sequence[RunLog], *, several: bool) -> list[str]:
    """What was trained, for the line under the title."""
    summary = {**runs[0].summary, **top.summary}
    facts = [str(summary["model"])] if summary.get("model") else []
    if (count := number(summary.get("parameters"))) is not None:
        short = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
        facts.append(f"{short if count >= 1e6 else format(count, ',.0f')} parameters")
    if number(summary.get("processes")) not in (None, 1) and summary.get("weights"):
        facts.append(f"weights {summary['weights']}")
    if several:
        facts.append(f"{len(runs)} seeds" if len(runs) > 1 else "1 seed")
    return facts


def _seed_table(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """A row of headline numbers per seed, then their mean and range."""
    numbers = [headline(run) for run in runs]
    keys = _columns(runs)
    columns = [([f[k] for f in numbers if k in f], _SHOW[k]) for k in keys]
    rows = []
    for run, found in zip(runs, numbers, strict=True):
        cells = [_SHOW[k](found[k]) if k in found else UNKNOWN for k in keys]
        rows.append((run.name.replace("seed-", "seed "), cells))
    rows.append(("mean", [_mean_text(*column) for column in columns]))
    rows.append(("range", [_range(*column) or UNKNOWN for column in columns]))
    return rows


def _task_table(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """Before and after by task, the mean over the runs; empty where no evaluation names tasks."""
    keys = [(measure, at) for measure in _measures(runs) for at in ("before", "after")]
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for run in runs:
        last = {str(row.get("at")): row for row in run.evaluations}
        for measure, at in keys:
            by_task = last.get(at, {}).get("by_task")
            for task, numbers in by_task.items() if isinstance(by_task, dict) else ():
                value = number(numbers.get(measure)) if isinstance(numbers, dict) else None
                if value is not None:
                    found.setdefault(task, {}).setdefault((measure, at), []).append(value)
    return [
        (task, [_mean_text(cells.get(key, []), _SHOW["_".join(key)]) for key in keys])
        for task, cells in sorted(found.items())
    ]


def _stage_costs(runs: Sequence[RunLog]) -> dict[str, dict[str, str]]:
    """By heading, what stages took beside time: most memory of one process and of its device, and the median MFU."""
    most: dict[str, float] = {}
    for run in runs:
        rows = [*run.cold_start, *run.rl, *run.evaluations]
        known = run.summary.get("bytes_by_stage")
        found = stage_bytes(rows) | (known if isinstance(known, dict) else {})
        for name, value in found.items():
            most[name] = max(most.get(name, 0.0), number(value) or 0.0)
    shares = step_medians([row for run in runs for row in run.rl])
    columns: dict[str, dict[str, str]] = {}
    for kind, heading in (("device_bytes", "GPU memory"), ("rss_bytes", "Host memory")):
        ends = f"/{kind}"
        found = {n.removesuffix(ends): size(b) for n, b in most.items() if n.endswith(ends)}
        columns |= {heading: found} if found else {}
    found = {n.removeprefix("mfu/"): percent(v) for n, v in shares.items() if n.startswith("mfu/")}
    return columns | ({"MFU": found} if found else {})


def _config_text(folders: Sequence[Path]) -> str:
    for folder in folders:
        try:
            return shorten((folder / "config.toml").read_text("utf-8", "replace"), MAX_CONFIG)
        except OSError:
            continue
    return ""
