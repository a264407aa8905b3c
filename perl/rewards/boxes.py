"""Where something is: one box, several boxes, or a box in one of several images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from perl.rewards.answers import column_of, score_each
from perl.rewards.reading import final_answer

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in any one unit."""

_N = r"\s{0,4}(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s{0,4}"
_BOX = re.compile(rf"[\[(]{_N},{_N}(?:,|[)\]]\s{{0,4}},?\s{{0,4}}[\[(]){_N},{_N}[\])]")
_BARE = re.compile(",".join([_N] * 4))
_IMAGE = re.compile(
    r"""\b(?:image|picture|frame)(?:[_ ](?:index|id))?["']?\s{0,2}[-:#=_]?\s{0,2}([0-9]{1,4})""",
    re.I,
)


def box_iou(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    threshold: float | None = None,
    column: str = "answer",
    **columns: Any,
) -> list[float | None]:
    """Intersection over union of the first box of the final answer with the gold one, 0 to 1.

    UniVG-R1, arXiv 2505.14231. Boxes are written `(x1,y1),(x2,y2)` or `[x1, y1, x2, y2]`; the
    gold one is such a text, or four numbers, in `column`. With `threshold` 1 from that overlap on,
    else 0. None without gold; a gold without a box, or with one that has no area, is a fault.
    """

    def score(text: str, wanted: Any) -> float:
        return _overlap(final_answer(text), _one_box(wanted), threshold)

    return score_each(score, completions, column_of("box_iou", columns, column))


def detection(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    threshold: float = 0.5,
    iou_weight: float = 0.7,
    completeness_weight: float = 0.3,
    column: str = "answer",
    **columns: Any,
) -> list[float | None]:
    """How well the boxes of the final answer cover all gold boxes and nothing else, 0 to 1.

    VLM-R1, arXiv 2504.07615, without its label score: pairs are matched greedily, the largest
    overlap first, down to `threshold`. The score is the weighted mean of the sum of the pairs'
    overlaps over the number of gold boxes, and of 1 - (share of gold boxes missed + share of boxes
    that are false) / 2; without any box 0, or 1 if there was nothing to find. `column` names
    a text with boxes, or a list of boxes. None without gold.
    """

    def score(text: str, gold: Any) -> float:
        found, wanted = boxes_in(final_answer(text)), _gold_boxes(gold)
        if not found or not wanted:
            return float(not found and not wanted)
        pairs = ((iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted))
        matched: list[float] = []
        used_found, used_wanted = set(), set()
        for overlap, i, j in sorted(pairs, reverse=True):
            if overlap < threshold or overlap <= 0 or i in used_found or j in used_wanted:
                continue
            matched.append(overlap)
            used_found.add(i)
            used_wanted.add(j)
        missed, false = 1 - len(matched) / len(wanted), 1 - len(matched) / len(found)
        fit, completeness = sum(matched) / len(wanted), 1 - (missed + false) / 2
        weighted = iou_weight * fit + completeness_weight * completeness
        return weighted / (iou_weight + completeness_weight)

    return score_each(score, completions, column_of("detection", columns, column))


def grounding(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    image_column: str = "image",
    box_column: str = "box",
    threshold: float | None = None,
    image_weight: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Whether the final answer names the right image, and how well its box fits there, 0 to 1.

    After MIRG-RL, arXiv 2509.21788, and arXiv 2507.00748. An answer such as
    `image 2, (10,20),(30,40)` scores 0 with the wrong image, else
    `image_weight + (1 - image_weight) * IoU`; with `threshold` the IoU counts as 1 or 0.

    `image_column` names the column of the gold image's number, from 1 *in the data's order*, or of
    a text that names it; it follows the image through `order`. Only the column `answer` has been
    re-indexed already and is taken as it is. `box_column` names that of the box. None without gold.
    """
    images = column_of("grounding", columns, image_column)
    boxes = column_of("grounding", columns, box_column)
    orders = columns.get("order") or [None] * len(completions)
    orders = [() if order is None else order for order in orders]

    def score(text: str, image: Any, box: Any, order: Sequence[int]) -> float:
        slot = _image_number(image)
        if len(order) and image_column != "answer":
            slot = list(order).index(slot - 1) + 1
        target, answer = _one_box(box), final_answer(text)
        named = _IMAGE.search(answer)
        if named is None or int(named[1]) != slot:
            return 0.0
        return image_weight + (1 - image_weight) * _overlap(answer, target, threshold)

    return score_each(score, completions, images, boxes, orders)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 for a box without area.

    Example: `iou((0, 0, 2, 2), (1, 0, 3, 2)) == 2 / 6`.
    """
    areas = [max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (a, b)]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (areas[0] + areas[1] - shared) if shared > 0 else 0.0


def boxes_in(text: str) -> list[Box]:
    """Every `(x1,y1),(x2,y2)` or `[x1, y1, x2, y2]` of a text, in sequence."""
    return [_as_box(match.groups()) for match in _BOX.finditer(text)]


def _overlap(answer: str, wanted: Box, threshold: float | None) -> float:
    """That of an answer's first box; 1 from `threshold` on, else 0."""
    found = boxes_in(answer)
    overlap = iou(found[0], wanted) if found else 0.0
    return overlap if threshold is None else float(overlap >= threshold)


def _one_box(value: Any) -> Box:
    boxes = _gold_boxes(value)
    if len(boxes) != 1:
        raise ValueError(f"the gold {value!r} has {len(boxes)} boxes, and one is needed")
    return boxes[0]


def _gold_boxes(value: Any) -> list[Box]:
    """The boxes of a gold value; ValueError for one that nothing can overlap."""
    boxes = _boxes_of(value)
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1:
            raise ValueError(
                f"the gold box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] has no area: it has to be left, top, "
                "right, bottom"
            )
    return boxes


def _boxes_of(value: Any) -> list[Box]:
    """Boxes of a text, which may be four bare numbers, of four numbers, of `{"bbox_2d": [...]}`, or of a list of these."""
    if isinstance(value, str) and (bare := _BARE.fullmatch(value)):  # as an answer that is a list
        return [_as_box(bare.groups())]
    if isinstance(value, (str, Mapping)):
        return boxes_in(str(value))
    values = value.tolist() if hasattr(value, "tolist") else list(value)
    if not any(isinstance(v, Real) for v in values):
        return [box for v in values for box in _boxes_of(v)]
    if len(values) != 4 or not all(isinstance(v, Real) and math.isfinite(v) for v in values):
        raise ValueError(f"the gold {values} is no box of four numbers, all finite")
    return [_as_box(values)]


def _as_box(values: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = (float(v) for v in values)
    return x1, y1, x2, y2


def _image_number(value: Any) -> int:
    if isinstance(value, str):
        match = _IMAGE.search(value) or re.fullmatch(r"\s*([0-9]{1,4})\s*", value)
        if match is None:
            raise ValueError(f"the gold {value!r} names no image")
        return int(match[1])
    return int(value)
