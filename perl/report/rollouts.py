"""Rollouts as the report shows them: what the model saw, what it wrote, what it was worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perl.report.html import thumbnail
from perl.report.metrics import RunLog, mean, number, plural, read_records
from perl.types import IMAGE_SLOT

MAX_ROLLOUTS = 60
"""Rollouts shown in all."""
MAX_PER_GROUP = 12
"""Rollouts shown of one example at one step."""
MAX_TEXT = 6000
"""Characters shown of one completion or question."""
MAX_IMAGE_BYTES = 4_000_000
"""Bytes of rollout images in the page."""


def rollout_groups(
    runs: Sequence[RunLog], notes: list[str]
) -> tuple[list[dict[str, Any]], int, int]:
    """Rollouts of the same example and step together, the newest first, spread evenly over the run.

    Returns (groups for the page, rollouts shown, rollouts there are).
    """
    found: dict[tuple[str, ...], tuple[RunLog, list[dict[str, Any]]]] = {}
    for run in runs:
        for row in read_records(run.folder / "rollouts.jsonl", notes):
            key = (run.name, *(str(row.get(k)) for k in ("stage", "step", "example")))
            found.setdefault(key, (run, []))[1].append(row)
    total = sum(len(rows) for _, rows in found.values())
    if not total:
        notes.append("No rollouts kept.")
        return [], 0, 0
    everything = sorted(found.values(), key=lambda item: number(item[1][0].get("step")) or 0.0)
    typical = total / len(everything)
    count = min(len(everything), max(1, round(MAX_ROLLOUTS / min(typical, MAX_PER_GROUP))))
    picks = [everything[round(i * (len(everything) - 1) / max(1, count - 1))] for i in range(count)]
    groups, shown, images = [], 0, _Images()
    for run, rows in reversed(picks):
        chosen = _across_orders(rows, min(MAX_PER_GROUP, MAX_ROLLOUTS - shown))
        if not chosen:
            break
        shown += len(chosen)
        groups.append(_group(run, rows, chosen, images, several=len(runs) > 1))
    notes += images.notes()
    return groups, shown, total


def _across_orders(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first `limit` rollouts, taken from each order in turn."""
    turn: dict[str, int] = {}
    ranked = []
    for row in rows:
        order = str(row.get("order"))
        turn[order] = turn.get(order, -1) + 1
        ranked.append((turn[order], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:limit]]


def _group(
    run: RunLog,
    rows: Sequence[dict[str, Any]],
    chosen: Sequence[dict[str, Any]],
    images: _Images,
    *,
    several: bool,
) -> dict[str, Any]:
    """One example at one step: numbers of all its rollouts, the chosen ones by order."""
    by_order: dict[str, list[dict[str, Any]]] = {}
    for row in chosen:
        by_order.setdefault(str(row.get("order")), []).append(row)
    rewards = [v for row in rows if (v := number(row.get("reward"))) is not None]
    stage, step, *names = (_text(rows[0].get(k)) for k in ("stage", "step", "task", "example"))
    return {
        "title": f"{ {'rl': 'RL', 'evaluate': 'Evaluation'}.get(stage, stage) }, step {step}",
        "where": [text for text in (run.name if several else "", *names) if text],
        "reward": f"{mean(rewards):.2f}" if rewards else "unscored",
        "count": len(rows),
        "hidden": len(rows) - len(chosen),
        "orders": [_order(run.folder, same, images) for same in by_order.values()],
    }


def _order(folder: Path, rows: Sequence[dict[str, Any]], images: _Images) -> dict[str, Any]:
    """The rollouts of one image order: what the model saw, and what it made of it."""
    first = rows[0]
    order = [int(v) + 1 if (v := number(o)) is not None else "?" for o in _list(first.get("order"))]
    slots = []
    for j, name in enumerate(_list(first.get("images"))):
        original = order[j] if j < len(order) else "?"
        slots.append({"slot": j + 1, "original": original, "src": images.inline(folder, str(name))})
    text, *others = _text(first.get("question")).split(IMAGE_SLOT)
    parts = [("text", text)]
    for k, text in enumerate(others, 1):
        parts += [("slot", str(k)), ("text", text)]
    return {
        "order": " ".join(map(str, order)),
        "slots": slots,
        "question": parts,
        "answer": _text(first.get("answer")),
        "rollouts": [_rollout(row) for row in rows],
    }


def _rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = row.get("rewards")
    badges = []
    for name, value in parts.items() if isinstance(parts, dict) else ():
        score = number(value)
        if score is None:
            badges.append({"name": name, "value": "unscored", "kind": "none"})
        else:
            kind = "good" if score >= 1 else "bad" if score <= 0 else "part"
            badges.append({"name": name, "value": f"{score:g}", "kind": kind})
    reward, advantage = number(row.get("reward")), number(row.get("advantage"))
    text = _text(row.get("text"))
    return {
        "text": text,
        "start": " ".join(text[:160].split()) if len(text) > 420 or text.count("\n") > 8 else "",
        "badges": badges,
        "reward": "—" if reward is None else f"{reward:.3g}",
        "advantage": "" if advantage is None else f"{advantage:+.2f}",
    }


class _Images:
    """Inlines images of a run as small data URIs, up to a number of bytes in all."""

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}
        self.left, self.missing, self.over = MAX_IMAGE_BYTES, 0, 0

    def inline(self, folder: Path, name: str) -> str:
        """The data URI, or empty where the file is missing, outside the folder or too much."""
        from PIL import Image

        try:
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ValueError("outside the run folder")
            if path not in self.known:
                with Image.open(path) as image:
                    self.known[path] = thumbnail(image)
        except Exception:  # whatever a damaged image file makes its decoder raise
            self.missing += 1
            return ""
        if self.left < len(self.known[path]):
            self.over += 1
            return ""
        self.left -= len(self.known[path])
        return self.known[path]

    def notes(self) -> Iterator[str]:
        if self.missing:
            yield f"{self.missing} {plural('image', self.missing)} of rollouts cannot be read."
        if self.over:
            yield f"{self.over} {plural('image', self.over)} of rollouts left out: page full."


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    cut = len(text) - limit
    return text if cut <= 0 else f"{text[:limit]}… ({cut:,} more characters)"


def _text(value: object) -> str:
    """Whatever stands where a text is expected, as a text of bounded length."""
    if value is None:
        return ""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
